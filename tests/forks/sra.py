"""SRA (arXiv 2505.02831): a diffusion transformer that is its own teacher.

What differs from REPA: there is no other network to learn from. The tokens of an early
block, through a small head, are pulled towards tokens of a late block of the EMA (the
average of the weights), which sees the same image with less of the same noise.

  python tests/forks/sra.py                                        the demo
  torchrun --nproc_per_node=8 tests/forks/sra.py --data IMAGENET   the paper's SiT-XL/2
  python sample.py runs/sra-demo/latest.pt                         images of the demo

--mask_ratio and --mixer_depth can be combined with it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
from maskalign import SIZES, add_noise, gather_tokens, patchify, setting

DEPTHS = {  # the demo's are ours
    "SiT-S/2": dict(align_depth=3, self_depth=8),
    "SiT-B/2": dict(align_depth=3, self_depth=8),
    "SiT-L/2": dict(align_depth=6, self_depth=16),
    "SiT-XL/2": dict(align_depth=8, self_depth=20),
    "demo": dict(align_depth=2, self_depth=4),
}


@dataclass(frozen=True)
class Sra(maskalign.Config):
    """The settings of REPA with another weight, and one more."""

    method: str = setting("sra")  # without a help text, so it is no flag
    class_token: bool = setting(False)  # there is no teacher that could make one
    mixer_depth: int = setting(0, "number of mixing blocks (REPA: 0)")
    mask_ratio: float = setting(0.0, "share of patches to drop (REPA: 0)")
    align_coeff: float = setting(0.2, "weight of the alignment loss, lambda (SRA)")
    self_depth: int = setting(20, "the EMA's block to learn from", group="this fork")
    sizes = {name: SIZES[name] | DEPTHS[name] for name in SIZES}

    def __post_init__(self):
        fits = 1 <= self.self_depth <= self.depth
        assert fits, f"self_depth {self.self_depth} is not 1 to {self.depth}"


def build_model(config: Sra) -> maskalign.SiT:
    """SiT with SRA's head of two layers as its projector."""
    model = maskalign.SiT(config)
    width = config.hidden_size
    layers = [nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)]
    model.projector = nn.Sequential(*layers)
    model.initialize_weights()
    return model


def no_teacher(config: Sra, dataset, device) -> None:
    return None


@torch.no_grad()
def tokens_after(depth: int, ema: maskalign.SiT, x_t, t, y) -> Tensor:
    """All tokens (N, T, D) of the EMA after its block of this number."""
    h, c = ema.embed(x_t, t, y)
    for block in ema.blocks[:depth]:
        h = block(h, c)
    return h


def training_losses(model, x, y, z, config: Sra, rng, ema) -> dict:
    """The losses loss, denoise and align. The first half is as in maskalign."""
    n = len(x)
    t = rng.rand(n)
    gap = 0.2 * rng.rand(n)  # the EMA sees each image this much closer to data
    drop_label = rng.rand(n) < config.label_dropout
    y = torch.where(drop_label, config.num_classes, y)  # for the EMA, too
    ids_keep = None
    if config.mask_ratio > 0:
        num_tokens = (x.shape[-1] // config.patch_size) ** 2
        scores = rng.rand(n, num_tokens)
        ids_keep = maskalign.sample_token_subset(scores, config.mask_ratio)
    noise = rng.randn(*x.shape)
    v_target = gather_tokens(patchify(noise - x, config.patch_size), ids_keep)
    x_t = add_noise(x, noise, t.view(-1, 1, 1, 1))
    out = model(x_t, t, y, None, ids_keep)
    denoise = (out.v - v_target).square().mean()

    t_ema = (t - gap).clamp(min=0)
    x_ema = add_noise(x, noise, t_ema.view(-1, 1, 1, 1))
    z = tokens_after(config.self_depth, ema, x_ema, t_ema, y)
    z = gather_tokens(z, ids_keep).to(x.dtype)  # those that the network saw
    align = F.smooth_l1_loss(out.z_pred.to(x.dtype), z, beta=0.05)
    return dict(loss=denoise + config.align_coeff * align, denoise=denoise, align=align)


def train(config: Sra) -> None:
    maskalign.train(
        config, build_model=build_model, build_teacher=no_teacher, losses=training_losses
    )


if __name__ == "__main__":
    maskalign.main(train, Sra, __doc__)
