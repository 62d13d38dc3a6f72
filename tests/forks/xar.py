"""xAR-style (arXiv 2502.20388): an image is generated cell by cell.

What differs from SiT: the image is cut into cells x cells squares. In training each cell has
a time of its own, and its tokens see their own cell and those before it, however noisy. In
sampling, one cell after another goes from noise to data. The network, the latents and the
ODE are not the paper's.

  python tests/forks/xar.py                                        the demo
  torchrun --nproc_per_node=8 tests/forks/xar.py --data IMAGENET   a SiT-XL/2
  python tests/forks/xar.py sample runs/xar-demo/latest.pt         flags of sample.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
import sample
from maskalign import SiTOutput, add_noise, patchify, setting


@dataclass(frozen=True)
class Xar(maskalign.Config):
    """The settings of SiT, and two more."""

    method: str = setting("xar")  # without a help text, so it is no flag
    class_token: bool = setting(False)
    mixer_depth: int = setting(0)
    mask_ratio: float = setting(0.0)
    align_coeff: float = setting(0.0)
    cells: int = setting(2, "cells per side of the image", group="this fork")
    sample_with: str = setting("tests/forks/xar.py sample")

    def __post_init__(self):
        side = self.latent_shape[1] // self.patch_size
        fits = self.cells > 1 and side % self.cells == 0
        assert fits, f"cells {self.cells} is no divisor above 1 of {side} tokens per side"


def spread(values: Tensor, side: int) -> Tensor:
    """One value per cell (N, cells^2) -> a map (N, 1, side, side)."""
    cells = round(values.shape[1] ** 0.5)
    return F.interpolate(values.view(-1, 1, cells, cells), side)


class CellSiT(maskalign.SiT):
    """SiT with a time for each cell, t (N, cells^2), whose tokens see no later cell."""

    def __init__(self, config: Xar):
        super().__init__(config)
        # On a GPU, cuDNN's attention with a mask has NaN as gradients (pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.cells = config.cells
        numbers = torch.arange(config.cells**2, dtype=torch.float32)[None]
        cell = spread(numbers, self.x_embedder.grid_size[0]).flatten().long()
        self.register_buffer("cell", cell, persistent=False)  # (T,): each token's cell

    def forward(self, x, t, y, cls=None, ids_keep=None) -> SiTOutput:
        c = self.t_embedder(t) + self.y_embedder(y)[:, None]  # (N, cells^2, D)
        h = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        sees = self.cell[:, None] >= self.cell  # (T, T)
        for block in self.blocks:
            # As Block.forward, but with a mask, and each token has the condition of its cell.
            six = block.adaLN_modulation(c)[:, self.cell].chunk(6, dim=-1)  # (N, T, D)
            shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = six
            seen = block.norm1(h) * (1 + scale_attn) + shift_attn
            h = h + gate_attn * block.attn(seen, attn_mask=sees)
            h = h + gate_mlp * block.mlp(block.norm2(h) * (1 + scale_mlp) + shift_mlp)
        v, _ = self.final_layer(h, c[:, self.cell])
        return SiTOutput(v, None, None)


def training_losses(model, x, y, z, config: Xar, rng, ema=None) -> dict:
    """The losses loss and denoise, which are the same. z is None."""
    t = rng.rand(len(x), config.cells**2)
    drop_label = rng.rand(len(x)) < config.label_dropout
    y = torch.where(drop_label, config.num_classes, y)
    noise = rng.randn(*x.shape)
    v = model(add_noise(x, noise, spread(t, x.shape[-1])), t, y).v
    v_target = patchify(noise - x, config.patch_size)
    denoise = (v - v_target).square().mean()
    return dict(loss=denoise, denoise=denoise)


class OneCell:
    """A CellSiT as samplers know a SiT: t (N,) is the time of cell k, which alone moves.

    The cells before it are finished, so their time is 0. Those after it are still noise.
    """

    def __init__(self, model: CellSiT, k: int):
        self.model = model
        self.k = k
        self.patch_size = model.patch_size
        self.num_classes = model.num_classes

    def __call__(self, x, t, y, cls=None) -> SiTOutput:
        times = torch.zeros(len(x), self.model.cells**2, dtype=t.dtype, device=t.device)
        times[:, self.k] = t
        times[:, self.k + 1 :] = 1
        moves = self.model.cell == self.k  # (T,)
        v = self.model(x, times, y).v
        return SiTOutput(v * moves[:, None], None, None)


def cell_ode(model: CellSiT, x, y, cls=None, *, cfg_scale=1.0, **settings) -> Tensor:
    """sample.py's ODE, cell after cell. Guidance grows from none to cfg_scale."""
    last = model.cells**2 - 1
    for k in range(last + 1):
        scale = 1 + (cfg_scale - 1) * k / last
        x = sample.euler_ode(OneCell(model, k), x, y, cfg_scale=scale, **settings)
    return x


def train(config: Xar) -> None:
    maskalign.train(config, build_model=CellSiT, losses=training_losses, sampler=cell_ode)


if __name__ == "__main__":
    if sys.argv[1:2] == ["sample"]:
        sample.main(Xar, CellSiT, dict(ode=cell_ode), sys.argv[2:])
    else:
        maskalign.main(train, Xar, __doc__)
