"""TREAD (arXiv 2501.04765): in training, half of the tokens skip the middle blocks.

What differs from SiT: a random share of the patches skips the blocks first_routed to
last_routed (the route). MaskAlign drops tokens for good; here they come back, and are
predicted, too.

  python tests/forks/tread.py                                        the demo
  torchrun --nproc_per_node=8 tests/forks/tread.py --data IMAGENET   the paper's SiT-XL/2
  python sample.py runs/tread-demo/latest.pt                         no token skips

--class_token --align_coeff 0.5 adds REG, for the tokens that pass the aligned block.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
from maskalign import SIZES, SiTOutput, gather_tokens, sample_token_subset, setting

ROUTES = {  # The code of TREAD counts from 0, and we from 1. The demo's route is ours.
    "SiT-S/2": dict(first_routed=3, last_routed=9),
    "SiT-B/2": dict(first_routed=3, last_routed=9),
    "SiT-L/2": dict(first_routed=3, last_routed=21),
    "SiT-XL/2": dict(first_routed=3, last_routed=25),
    "demo": dict(first_routed=2, last_routed=4),
}


@dataclass(frozen=True)
class Tread(maskalign.Config):
    """The settings of SiT, and three more."""

    method: str = setting("tread")  # without a help text, so it is no flag
    class_token: bool = setting(False, "also denoise a class token (SiT: no)")
    mixer_depth: int = setting(0, "number of mixing blocks (SiT: 0)")
    mask_ratio: float = setting(0.0)  # nothing is dropped for good
    align_coeff: float = setting(0.0, "weight of the alignment with a teacher (SiT: 0)")
    skip_ratio: float = setting(0.5, "share of patches that skip", group="this fork")
    first_routed: int = setting(3, "the first block that they skip, counted from 1")
    last_routed: int = setting(25, "the last block that they skip")
    sizes = {name: SIZES[name] | ROUTES[name] for name in SIZES}

    def __post_init__(self):
        fits = 1 <= self.first_routed <= self.last_routed <= self.depth
        route = f"first_routed {self.first_routed} to last_routed {self.last_routed}"
        assert fits, f"{route} is no route through {self.depth} blocks"


class RoutedSiT(maskalign.SiT):
    """SiT in which only the patches ids_route (N, K), or all if None, pass the route."""

    def __init__(self, config: Tread):
        super().__init__(config)
        self.first_routed = config.first_routed
        self.last_routed = config.last_routed

    def forward(self, x, t, y, cls=None, ids_keep=None, ids_route=None) -> SiTOutput:
        """Returns v (N, T, p*p*C) of all patches. ids_keep is None: nothing is dropped."""
        h, c = self.embed(x, t, y, cls)  # (N, [1+]T, D)
        z_pred = None
        for i, block in enumerate(self.blocks, start=1):
            if i == self.first_routed:
                before = h
                h = gather_tokens(before, ids_route, self.class_token)  # (N, [1+]K, D)
            h = block(h, c)
            if i == self.align_depth and self.training and self.projector is not None:
                z_pred = self.projector(h)
            if i == self.last_routed and ids_route is not None:
                # Tokens that skipped are not detached. Through them, the first blocks
                # learn what the last ones need.
                h = put_back(before, h, ids_route, self.class_token)  # (N, [1+]T, D)
        v, v_cls = self.final_layer(h, c)
        return SiTOutput(v, v_cls, z_pred)


def put_back(before: Tensor, h: Tensor, ids_route: Tensor, class_token: bool) -> Tensor:
    """before (N, [1+]T, D), in which tokens h (N, [1+]K, D) take the places ids_route."""
    if class_token:  # it is the first token, and never skips
        first = torch.zeros_like(ids_route[:, :1])
        ids_route = torch.cat([first, ids_route + 1], dim=1)
    images = torch.arange(len(h), device=h.device)[:, None]
    merged = before.clone()
    merged[images, ids_route] = h
    return merged


def training_losses(model, x, y, z, config: Tread, rng, ema=None) -> dict:
    """maskalign's losses of all patches, of which a random subset passes the route."""
    num_tokens = (x.shape[-1] // config.patch_size) ** 2
    ids_route = sample_token_subset(rng.rand(len(x), num_tokens), config.skip_ratio)
    if z is not None and config.first_routed <= config.align_depth <= config.last_routed:
        z = gather_tokens(z, ids_route, class_token=True)  # what the aligned block sees
    routed = functools.partial(model, ids_route=ids_route)
    return maskalign.training_losses(routed, x, y, z, config, rng)


def train(config: Tread) -> None:
    maskalign.train(config, build_model=RoutedSiT, losses=training_losses)


if __name__ == "__main__":
    maskalign.main(train, Tread, __doc__)
