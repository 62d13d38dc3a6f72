"""What the server of processes.py imports: torch once, and the demo's 8192 images drawn once."""

import functools

import torch.distributed.run  # noqa: F401

import maskalign

maskalign.demo_shapes = functools.cache(maskalign.demo_shapes)
maskalign.demo_shapes(24)
