"""xAR-style (arXiv 2502.20388): an image cell by cell, each out of noise of its own.

What differs from SiT: the image is cut into cells^2 cells. In training each has a time of its own,
and its tokens see their own cell and those before it, however noisy. In sampling one after another
goes from noise to data. Not the paper's: the network, the latents, the ODE.

  python tests/forks/xar.py                                          the demo, on a laptop
  torchrun --nproc_per_node=8 tests/forks/xar.py --data IMAGENET     the real thing
  python tests/forks/xar.py sample runs/xar-demo/latest.pt           its images; flags of sample.py
"""

import dataclasses
import functools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import maskalign
import sample
from maskalign import SiTOutput, modulate, require, setting


@dataclasses.dataclass(frozen=True)
class Xar(maskalign.Config):
    method: str = setting("xar")  # no note, so no flag
    class_token: bool = setting(False)
    mixer_depth: int = setting(0, "as SiT: no mixing blocks", rule="0 or above")
    mask_ratio: float = setting(0.0, rule="in [0, 1)")
    align_coeff: float = setting(0.0, rule="0 or above")
    cells: int = setting(2, "xAR: cells per side of the image")

    def __post_init__(self):
        for name in ("class_token", "mask_ratio", "align_coeff"):
            require(self, name, not getattr(self, name), "0, as cells do without")
        side = self.latent_shape[1] // self.patch_size
        rule = f"above 1 and a divisor of the {side} tokens per side"
        require(self, "cells", self.cells > 1 and side % self.cells == 0, rule)


def spread(values: Tensor, side: int) -> Tensor:
    """(N, cells^2) -> (N, 1, side, side): at each place of a raster the value of its cell."""
    cells = round(values.shape[1] ** 0.5)
    return F.interpolate(values.view(-1, 1, cells, cells), side)


class CellSiT(maskalign.SiT):
    """SiT with a time for each cell, t (N, cells^2). Tokens see their own cell and those before."""

    def __init__(self, config: Xar):
        super().__init__(config)
        cell = spread(torch.arange(config.cells**2.0)[None], self.x_embedder.grid_size[0])
        self.cells = config.cells
        # Of each token its cell, (T,). In a checkpoint it keeps sample.py from taking it for SiT's.
        self.register_buffer("cell", cell.flatten().long())

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> SiTOutput:
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y).unsqueeze(1)
        h = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        sees = self.cell[:, None] >= self.cell  # (T, T)
        for block in (*self.mixer, *self.blocks):
            # As Block.forward; c has a row for each cell, of which a token takes its own.
            rows = block.adaLN_modulation(c)[:, self.cell]  # (N, T, 6 D)
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rows.chunk(6, -1)
            h = h + gate_a * block.attn(modulate(h, shift_a, scale_a), attn_mask=sees)
            h = h + gate_m * block.mlp(modulate(h, shift_m, scale_m))
        return SiTOutput(*self.final_layer(h, c[:, self.cell]), None)


def build_model(config: Xar) -> CellSiT:
    torch.backends.cuda.enable_cudnn_sdp(False)  # masked, its gradients are NaN: pytorch#196678
    torch.manual_seed(config.seed)
    return CellSiT(config)


def draw_step(run: maskalign.Run, generator: torch.Generator) -> dict:
    """As maskalign's, with a time for each cell: t (n, cells^2)."""
    drawn = maskalign.draw_step(run, generator)
    t = torch.rand(len(drawn["t"]), run.config.cells**2, generator=generator, device=run.device)
    return dict(t=t, noise=drawn["noise"], drop=drawn["drop"], vae_noise=drawn["vae_noise"])


def training_losses(model, x, y, z, config: Xar, *, t, noise, drop) -> dict:
    """{"loss", "denoise"}: SiT's, with the noise level of each cell. z is None."""
    x_t = torch.lerp(x, noise, spread(t, x.shape[-1]))
    v = model(x_t, t, torch.where(drop, config.num_classes, y)).v
    v_target = maskalign.patchify(noise - x, config.patch_size)
    denoise = (maskalign.at_least_float32(v) - v_target).square().mean()
    return dict(loss=denoise, denoise=denoise)


def one_cell(model: CellSiT, k: int, x: Tensor, t: Tensor, y: Tensor) -> SiTOutput:
    """What a SiT would give that moves cell k alone, at times t (N,); those before it are clean."""
    times = (torch.arange(model.cells**2, device=t.device) > k).to(t).repeat(len(t), 1)
    times[:, k] = t  # 0 before it, 1 after it
    return SiTOutput(model(x, times, y).v * (model.cell == k)[:, None], None, None)


def cell_ode(model: CellSiT, x, y, cls=None, *, cfg_scale: float = 1.0, **settings) -> Tensor:
    """sample.py's ODE (its settings), cell after cell. Guidance grows from none to cfg_scale."""
    last = model.cells**2 - 1
    for k in range(last + 1):
        field = functools.partial(one_cell, model, k)
        field.patch_size, field.num_classes = model.patch_size, model.num_classes
        x = sample.euler_ode(field, x, y, cfg_scale=1 + (cfg_scale - 1) * k / last, **settings)
    return x


def train(config: Xar, signals: list | tuple = ()) -> None:
    maskalign.train(
        config,
        build_model=build_model,
        draw_step=draw_step,
        training_losses=training_losses,
        sampler=cell_ode,
        signals=signals,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["sample"]:
        del sys.argv[1]
        sample.main(kind=Xar, build_model=build_model, samplers=dict(ode=cell_ode))
    else:
        maskalign.main(train, Xar, __doc__)
