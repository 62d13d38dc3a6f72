"""iREPA (arXiv 2512.10794): REPA that teaches what is where in the image.

What differs from REPA: the projector is a convolution over the grid of tokens, so it sees
the neighbours of a token. And the teacher's patches are normalised over the image: what all
of them share does not tell one place from another.

  python tests/forks/irepa.py                                        the demo
  torchrun --nproc_per_node=8 tests/forks/irepa.py --data IMAGENET   the paper's SiT-XL/2
  python sample.py runs/irepa-demo/latest.pt                         images of the demo

--mask_ratio, --mixer_depth and --class_token can be combined with it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
from maskalign import SiTOutput, gather_tokens, setting


@dataclass(frozen=True)
class Irepa(maskalign.Config):
    """The settings of REPA, and one more."""

    method: str = setting("irepa")  # without a help text, so it is no flag
    class_token: bool = setting(False, "also denoise a class token (REPA: no)")
    mixer_depth: int = setting(0, "number of mixing blocks (REPA: 0)")
    mask_ratio: float = setting(0.0, "share of patches to drop (REPA: 0)")
    # NOTE(paper): align_coeff is "as REPA", so 0.5. Its code for latents has 1.0.
    gamma: float = setting(0.6, "share of the mean to subtract", group="this fork")


class ConvSiT(maskalign.SiT):
    """SiT whose projector is one 3 x 3 convolution over the grid of tokens."""

    def __init__(self, config: Irepa):
        super().__init__(config)
        self.projector = nn.Identity()  # so SiT.forward returns the tokens themselves
        # sample.py leaves out what is called projector.
        self.projector_conv = nn.Conv2d(config.hidden_size, config.z_dim, 3, padding=1)

    def forward(self, x, t, y, cls=None, ids_keep=None) -> SiTOutput:
        out = super().forward(x, t, y, cls, ids_keep)
        if out.z_pred is None:  # in sampling
            return out
        h = out.z_pred  # (N, [1+]K, D)
        if not self.class_token:
            return out._replace(z_pred=self.convolve(h, ids_keep))
        # A class token has no neighbours, so only the middle of the kernel sees it.
        first = self.projector_conv(h[:, 0, :, None, None]).flatten(1)  # (N, z_dim)
        patches = self.convolve(h[:, 1:], ids_keep)
        return out._replace(z_pred=torch.cat([first[:, None], patches], dim=1))

    def convolve(self, h: Tensor, ids_keep: Tensor | None) -> Tensor:
        """Patches (N, K, D) -> (N, K, z_dim), each with its neighbours."""
        side, _ = self.x_embedder.grid_size
        if ids_keep is not None:
            # NOTE(paper): it has no mask. Kept tokens return to their places in the grid,
            # and dropped ones are zero, as is what lies beyond the border of the image.
            images = torch.arange(len(h), device=h.device)[:, None]
            all_tokens = h.new_zeros(len(h), side * side, h.shape[-1])
            all_tokens[images, ids_keep] = h
            h = all_tokens
        grid = h.mT.unflatten(-1, (side, side))  # (N, D, side, side)
        z_pred = self.projector_conv(grid).flatten(2).mT  # (N, T, z_dim)
        return gather_tokens(z_pred, ids_keep)


def normalise(z: Tensor, gamma: float) -> Tensor:
    """Subtracts gamma of their mean from patches z (N, T, z_dim), divides by their std."""
    mean = z.mean(dim=1, keepdim=True)
    std = z.std(dim=1, keepdim=True)
    return (z - gamma * mean) / (std + 1e-6)


def training_losses(model, x, y, z, config: Irepa, rng, ema=None) -> dict:
    """maskalign's losses, for normalised patches."""
    # Before the mask, since mean and std are those of the whole image.
    patches = normalise(z[:, 1:], config.gamma)
    z = torch.cat([z[:, :1], patches], dim=1)  # the class token stays as it is
    return maskalign.training_losses(model, x, y, z, config, rng)


def train(config: Irepa) -> None:
    maskalign.train(config, build_model=ConvSiT, losses=training_losses)


if __name__ == "__main__":
    maskalign.main(train, Irepa, __doc__)
