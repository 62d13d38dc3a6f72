"""iREPA (arXiv 2512.10794): REPA that hands on what is where in the image.

What differs from REPA: the projector is a convolution over the grid of tokens, which sees their
neighbours; and from the teacher's patches most of their common mean is taken off and their spread
made 1, since what all places share tells them not apart.

  python tests/forks/irepa.py                                        the demo, on a laptop
  torchrun --nproc_per_node=8 tests/forks/irepa.py --data IMAGENET   the real thing
  python sample.py runs/irepa-demo/latest.pt                         its images

--mask_ratio, --mixer_depth and --class_token combine with it.
"""

import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
from maskalign import SiTOutput, gather_tokens, setting


@dataclasses.dataclass(frozen=True)
class Irepa(maskalign.Config):
    """REPA's settings as defaults, and one more."""

    method: str = setting("irepa")  # no note, so no flag: there is no other here
    class_token: bool = setting(False, "as REPA: no class token")
    mixer_depth: int = setting(0, "as REPA: no mixing blocks", rule="0 or above")
    mask_ratio: float = setting(0.0, "as REPA: no token dropped", rule="in [0, 1)")
    # NOTE(paper): "as REPA", which has 0.5; its code for latents has 1.0.
    align_coeff: float = setting(0.5, "as REPA: lambda, alignment of tokens")
    gamma: float = setting(0.6, "iREPA: share of the mean that is taken off", rule="0 or above")


class ConvSiT(maskalign.SiT):
    """SiT whose projector is one 3 x 3 convolution over the grid of tokens."""

    def __init__(self, config: Irepa):
        super().__init__(config)
        conv = nn.Conv2d(config.hidden_size, config.z_dim, 3, padding=1)
        self.projectors = nn.ModuleList([nn.Identity(), conv])  # SiT applies the first

    def forward(self, x, t, y, cls=None, ids_keep=None) -> SiTOutput:
        v, v_cls, h = super().forward(x, t, y, cls, ids_keep)
        z_pred = self.convolve(h[:, int(self.class_token) :], ids_keep)  # (N, K, z_dim)
        if self.class_token:  # it has no neighbours: the middle of the kernel alone sees it
            z_cls = self.projectors[1](h[:, :1].mT.unsqueeze(-1)).flatten(2).mT
            z_pred = torch.cat([z_cls, z_pred], dim=1)
        return SiTOutput(v, v_cls, z_pred)

    def convolve(self, h: Tensor, ids_keep: Tensor | None) -> Tensor:
        """(N, K, D) -> (N, K, z_dim), each token with its neighbours."""
        side, _ = self.x_embedder.grid_size
        if ids_keep is not None:
            # NOTE(paper): it has no mask. Each kept token goes back to its place, since only there
            # a neighbour is one; a dropped one is zero, as all is beyond the border of the image.
            grid = h.new_zeros(len(h), side**2, h.shape[-1])
            h = grid.scatter(1, ids_keep.unsqueeze(-1).expand_as(h), h)
        z_pred = self.projectors[1](h.mT.unflatten(-1, (side, side)))  # (N, z_dim, side, side)
        return gather_tokens(z_pred.flatten(2).mT, ids_keep)


def build_model(config: Irepa) -> ConvSiT:
    torch.manual_seed(config.seed)
    return ConvSiT(config)


def normalise(z: Tensor, gamma: float) -> Tensor:
    """Patches z (N, T, z_dim) of an image: a share of their mean taken off, their spread made 1."""
    return (z - gamma * z.mean(dim=1, keepdim=True)) / (z.std(dim=1, keepdim=True) + 1e-6)


def training_losses(model, x, y, z, config: Irepa, **drawn) -> dict:
    """As maskalign's; the teacher's patches are normalised before the mask: it saw all of them."""
    z = torch.cat([z[:, :1], normalise(z[:, 1:], config.gamma)], dim=1)  # first: the class token
    return maskalign.training_losses(model, x, y, z, config, **drawn)


def train(config: Irepa, signals: list | tuple = ()) -> None:
    ours = dict(build_model=build_model, training_losses=training_losses)
    maskalign.train(config, **ours, signals=signals)


if __name__ == "__main__":
    maskalign.main(train, Irepa, __doc__)
