"""SRA (arXiv 2505.02831): a diffusion transformer that is its own teacher.

What differs from REPA: there is no teacher. The tokens of an early block, through a small head, are
pulled towards those that the running average of the weights (EMA) makes in a late block, of the
same image with less of the same noise.

  python tests/forks/sra.py                                          the demo, on a laptop
  torchrun --nproc_per_node=8 tests/forks/sra.py --data IMAGENET     the real thing
  python sample.py runs/sra-demo/latest.pt                           its images

--mask_ratio and --mixer_depth combine with it.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
from maskalign import SIZES, add_noise, at_least_float32, gather_tokens, patchify, setting

ALIGN_DEPTH = dict(zip(SIZES, (3, 3, 6, 8, 2), strict=True))  # S, B, L, XL; the demo's is ours
SELF_DEPTH = dict(zip(SIZES, (8, 8, 16, 20, 4), strict=True))


@dataclasses.dataclass(frozen=True)
class Sra(maskalign.Config):
    """REPA's settings as defaults, with another weight, and one more."""

    method: str = setting("sra")  # no note, so no flag: there is no other here
    class_token: bool = setting(False, "must stay off: no teacher would make one")
    mixer_depth: int = setting(0, "as REPA: no mixing blocks", rule="0 or above")
    mask_ratio: float = setting(0.0, "as REPA: no token dropped", rule="in [0, 1)")
    align_coeff: float = setting(0.2, "SRA: lambda, alignment")
    self_depth: int = setting(20, "SRA: align with the EMA's tokens after this block, from 1")
    sizes = {
        size: row | dict(align_depth=ALIGN_DEPTH[size], self_depth=SELF_DEPTH[size])
        for size, row in SIZES.items()
    }

    def __post_init__(self):
        maskalign.require(self, "class_token", not self.class_token, "off: SRA has no teacher")
        rule = f"at most the depth, {self.depth}"
        maskalign.require(self, "self_depth", self.self_depth <= self.depth, rule)


def build_model(config: Sra) -> maskalign.SiT:
    """SiT with SRA's head, of two layers, in the place of REPA's projector."""
    model, width = maskalign.build_model(config), config.hidden_size
    head = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
    maskalign.initialize_weights(head)
    model.projectors[0] = head
    return model


def no_teacher(config: Sra, dataset, device, rank: int = 0) -> None:
    return None


def draw_step(run: maskalign.Run, generator: torch.Generator) -> dict:
    """As maskalign's, and lag (n,) in [0, 0.2): how much less noise the EMA sees. The EMA itself
    is no tensor, and reaches training_losses as it is."""
    drawn = maskalign.draw_step(run, generator)
    lag = 0.2 * torch.rand(drawn["t"].shape, generator=generator, device=generator.device)
    return drawn | dict(lag=lag, ema=run.ema)


@torch.no_grad()
def self_tokens(ema: maskalign.SiT, x_t: Tensor, t: Tensor, y: Tensor, self_depth: int) -> Tensor:
    """All tokens (N, T, D) of the EMA after block self_depth; nothing is learned through it."""
    h, c = ema.embed(x_t, t, y)
    for block in ema.blocks[:self_depth]:
        h = block(h, c)
    return h


def training_losses(
    model, x, y, z, config: Sra, *, t, noise, drop, lag, ema, cls_noise=None, ids_keep=None
) -> dict:
    """{"loss", "denoise", "align"} of a batch: see maskalign's. z is None, cls_noise not used."""
    y = torch.where(drop, config.num_classes, y)  # dropped for both
    v, _, z_pred = model(add_noise(x, noise, t), t, y, None, ids_keep)
    v_target = gather_tokens(patchify(noise - x, config.patch_size), ids_keep)  # (N, K, p*p*C)
    denoise = (at_least_float32(v) - v_target).square().mean()

    earlier = (t - lag).clamp(min=0)
    z = self_tokens(ema, add_noise(x, noise, earlier), earlier, y, config.self_depth)
    z = at_least_float32(gather_tokens(z, ids_keep))  # it saw all tokens, we answer for ours
    align = F.smooth_l1_loss(at_least_float32(z_pred), z, beta=0.05)
    return dict(loss=denoise + config.align_coeff * align, denoise=denoise, align=align)


def train(config: Sra, signals: list | tuple = ()) -> None:
    maskalign.train(
        config,
        build_model=build_model,
        build_teacher=no_teacher,
        draw_step=draw_step,
        training_losses=training_losses,
        signals=signals,
    )


if __name__ == "__main__":
    maskalign.main(train, Sra, __doc__)
