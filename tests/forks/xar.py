"""xAR-style (arXiv 2502.20388): an image cell by cell, each out of noise of its own.

What differs from SiT: the image is cut into cells^2 cells, numbered row by row. In training each
has a time of its own, and its tokens see their own cell and those before it, however noisy. In
sampling one cell after another goes from noise to data, with those before it as clean context.
Not the paper's: the network is our SiT, the latents are SD-VAE's, the sampler is an ODE.

  python tests/forks/xar.py                                          the demo, on a laptop
  torchrun --nproc_per_node=8 tests/forks/xar.py --data IMAGENET     the real thing
  python tests/forks/xar.py sample runs/xar-demo/latest.pt           its images; flags of sample.py

--mixer_depth combines with it.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
import sample
from maskalign import require, setting


@dataclasses.dataclass(frozen=True)
class Xar(maskalign.Config):
    """SiT's settings as defaults, and one more."""

    method: str = setting("xar")  # no note, so no flag: there is no other here
    class_token: bool = setting(False)
    mixer_depth: int = setting(0, "as SiT: no mixing blocks", rule="0 or above")
    mask_ratio: float = setting(0.0, rule="in [0, 1)")
    align_coeff: float = setting(0.0, rule="0 or above")
    cells: int = setting(2, "xAR: cells per side of the image")

    def __post_init__(self):
        for name in ("class_token", "mask_ratio", "align_coeff"):
            require(self, name, not getattr(self, name), "0: cells do without")
        side = self.latent_shape[1] // self.patch_size
        rule = f"above 1 and a divisor of the {side} tokens per side"
        require(self, "cells", self.cells > 1 and side % self.cells == 0, rule)


class CellAttention(Attention):
    """timm's attention, in which a token sees its own cell and those before it."""

    def __init__(self, width: int, num_heads: int, cell: Tensor):
        super().__init__(width, num_heads, qkv_bias=True)
        self.register_buffer("sees", cell[:, None] >= cell, persistent=False)  # (T, T)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h, attn_mask=self.sees)


class Spread(nn.Module):
    """What each cell has (N, cells^2, D) -> to each of its tokens (N, T, D)."""

    def __init__(self, cell: Tensor):
        super().__init__()
        self.register_buffer("cell", cell, persistent=False)

    def forward(self, c: Tensor) -> Tensor:
        return c[:, self.cell]


class CellSiT(maskalign.SiT):
    """SiT whose t is (N, cells^2), with two parts of each block changed; weights as SiT's."""

    def __init__(self, config: Xar):
        super().__init__(config)
        self.cells, side = config.cells, config.latent_shape[1] // config.patch_size
        line = torch.arange(side) * self.cells // side
        cell = (line[:, None] * self.cells + line).flatten()  # (T,): the cell of each token
        for block in (*self.mixer, *self.blocks):
            block.attn = CellAttention(config.hidden_size, config.num_heads, cell)
            block.adaLN_modulation.append(Spread(cell))
        self.final_layer.adaLN_modulation.append(Spread(cell))
        maskalign.initialize_weights(self)

    def embed(self, x: Tensor, t: Tensor, y: Tensor, cls=None) -> tuple:
        """As SiT's, with a condition for each cell: c (N, cells^2, D)."""
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y).unsqueeze(1)
        h = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        for block in self.mixer:
            h = block(h, c)
        return h, c


def build_model(config: Xar) -> CellSiT:
    # Masked, cuDNN's attention gives gradients that are NaN: pytorch#196678.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(config.seed)
    return CellSiT(config)


def to_pixels(per_cell: Tensor, x: Tensor) -> Tensor:
    """(N, cells^2) -> (N, 1, H, W): of each pixel of x the value of its cell."""
    cells = round(per_cell.shape[1] ** 0.5)
    return F.interpolate(per_cell.view(-1, 1, cells, cells), x.shape[-2:])


def draw_step(run: maskalign.Run, generator: torch.Generator) -> dict:
    """As maskalign's, with t (n, cells^2), uniform and independent."""
    drawn = maskalign.draw_step(run, generator)
    shape = run.config.batch_size, run.config.cells**2
    drawn["t"] = torch.rand(shape, generator=generator, device=generator.device)
    return {name: drawn[name] for name in ("t", "noise", "drop", "eps")}


def training_losses(model, x, y, z, config: Xar, *, t, noise, drop) -> dict:
    """{"loss", "denoise"} of a batch: the same mean over all tokens as maskalign's; z is None."""
    level = to_pixels(t, x)
    y = torch.where(drop, config.num_classes, y)
    v = model((1 - level) * x + level * noise, t, y).v
    v_target = maskalign.patchify(noise - x, config.patch_size)
    denoise = (maskalign.at_least_float32(v) - v_target).square().mean()
    return dict(loss=denoise, denoise=denoise)
