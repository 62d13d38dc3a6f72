"""MaskAlign: token-subset representation alignment for diffusion transformers, in one file.

Paper: Pang et al., arXiv 2606.08788 (2026), published without code. One training step (Sec. 5.1):
  1. A frozen ViT, DINOv2, reads the clean image: a token per patch, a class token for all of it.
  2. Latent x and class token are noised: x_t = (1 - t) x + t noise; t = 0 is data, t = 1 is noise.
  3. All 1 + T tokens pass a light mixing block, so that each knows of the others.
  4. A random 25% of the patch tokens is dropped (none in sampling); the class token stays.
  5. The kept tokens alone pass the transformer and predict the velocity noise - x.     (Eq. 10)
  6. After block `align_depth` they are projected and pulled towards the teacher's.     (Eq. 11)

  torchrun --nproc_per_node=1 maskalign.py                    a demo: no GPU, no data, no download
  python maskalign.py --data DIR --size SiT-B/2               one GPU, images as DIR/class/*.jpg
  torchrun --nproc_per_node=8 maskalign.py --data IMAGENET    the paper's run
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import zipfile
from collections import Counter, namedtuple
from pathlib import Path

import huggingface_hub
import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torchvision
from filelock import FileLock
from PIL import Image
from timm.layers import Attention, GELUTanh, Mlp, PatchEmbed
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from tqdm import tqdm


class BadInput(ValueError):
    """What the user can mend; the message is one sentence: the thing, its value, the way out."""


@contextlib.contextmanager
def explained(sentence: str):
    """Any error inside becomes BadInput: the sentence, and in brackets the error's first."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0][:150]
        raise BadInput(f"{sentence} ({type(error).__name__}: {reason})") from error


# ---- 1. Settings: tables whose rows override one dataclass (Tab. 7) ------------------------------
SIZES = {
    "SiT-S/2": dict(hidden_size=384, depth=12, num_heads=6, align_depth=4),
    "SiT-B/2": dict(hidden_size=768, depth=12, num_heads=12, align_depth=4),
    "SiT-L/2": dict(hidden_size=1024, depth=24, num_heads=16, align_depth=8),
    "SiT-XL/2": dict(hidden_size=1152, depth=28, num_heads=16, align_depth=8),
    "demo": dict(hidden_size=96, depth=6, num_heads=3, align_depth=3, projector_dim=256),
}
METHODS = {  # a row of settings each, over the same model, loss and loop
    "sit": dict(class_token=False, mixer_depth=0, mask_ratio=0.0, align_coeff=0.0),
    "repa": dict(class_token=False, mixer_depth=0, mask_ratio=0.0),
    "reg": dict(mixer_depth=0, mask_ratio=0.0),
    "maskalign": dict(),  # the defaults of Config
    "repa+maskalign": dict(class_token=False),  # Tab. 1
    "maskalign-no-mixing": dict(mixer_depth=0),  # Tab. 3
    "maskalign-no-masking": dict(mask_ratio=0.0),  # Tab. 3
}
# Without --data: small drawn shapes, a run of minutes on a laptop.
DEMO = dict(size="demo", image_size=24, patch_size=4, vae="none", teacher="classifier", workers=0)
DEMO |= dict(batch_size=32, steps=2000, lr=3e-3, ema_decay=0.99, save_every=500)
RULES = {  # what a number may be
    "above 0": lambda value: 0 < value < math.inf,
    "0 or above": lambda value: 0 <= value < math.inf,
    "in [0, 1)": lambda value: 0 <= value < 1,
}


def setting(default, note="", *, rule="above 0", free=False):
    """A field of Config. note: its --help; none: no flag. free: a resumed run may change it."""
    return dataclasses.field(default=default, metadata=dict(note=note, rule=rule, free=free))


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. Defaults are the paper's main run; notes name where they stand."""

    method: str = setting("maskalign", "a row of METHODS: class_token to align_coeff")
    size: str = setting("SiT-XL/2", "a row of SIZES: hidden_size to projector_dim")
    data: str = setting("", "folder: class/*.jpg or train/class/*.jpg; empty: the demo", free=True)
    seed: int = setting(0, "decides all: weights, order, noise, masks", rule="0 or above")
    class_token: bool = setting(True, "as REG: denoise the teacher's class token, too")
    mixer_depth: int = setting(2, "Tab. 7: mixing blocks before the mask", rule="0 or above")
    mask_ratio: float = setting(0.25, "Tab. 7: share of patch tokens dropped", rule="in [0, 1)")
    align_coeff: float = setting(0.5, "Tab. 7: lambda, alignment; 0: none", rule="0 or above")
    cls_coeff: float = setting(0.03, "Tab. 7: beta, class token's velocity", rule="0 or above")
    hidden_size: int = setting(1152, "SiT-XL: width D")
    depth: int = setting(28, "SiT-XL: number of blocks, mixers not counted")
    num_heads: int = setting(16, "SiT-XL: attention heads")
    align_depth: int = setting(8, "Tab. 7: align after this block, counted from 1")
    projector_dim: int = setting(2048, "as REPA: hidden width of the projector")
    patch_size: int = setting(2, "SiT-XL/2: latent pixels per token side")
    image_size: int = setting(256, "as REPA: pixels per side, after ADM's centre crop")
    vae: str = setting("stabilityai/sd-vae-ft-ema", "as REPA: SD-VAE on the hub; none: pixels")
    vae_weights: str = setting("", "file to read instead of the hub's", free=True)
    teacher: str = setting("vit_base_patch14_dinov2.lvd142m", "Tab. 7: a timm ViT, or classifier")
    teacher_weights: str = setting("", "file to read, in timm's or Meta's names", free=True)
    teacher_steps: int = setting(500, "ours: training steps of the teacher called classifier")
    batch_size: int = setting(256, "Tab. 7: images per step, over all processes")
    lr: float = setting(1e-4, "Tab. 7: AdamW, constant", free=True)
    grad_clip: float = setting(1.0, "as REG: largest gradient norm")
    ema_decay: float = setting(0.9999, "Tab. 7: average of the weights", rule="in [0, 1)")
    label_dropout: float = setting(0.1, "Tab. 7: share of labels made null", rule="in [0, 1)")
    bf16: bool = setting(True, "ours: autocast on GPU (REG: fp16); weights stay float32")
    steps: int = setting(400_000, "ours: all methods' common point", rule="0 or above", free=True)
    out: str = setting("", "run folder; empty: runs/METHOD-SIZE", free=True)
    cache: str = setting("", "folder of encoded latents; empty: DATA-latents", free=True)
    workers: int = setting(8, "data processes per rank", rule="0 or above", free=True)
    accum: int = setting(1, "micro-batches per step and process, to save memory", free=True)
    compile: bool = setting(True, "ours: torch.compile on GPU", free=True)
    log_every: int = setting(100, "steps between log lines", free=True)
    sample_every: int = setting(10_000, "steps between sample grids", free=True)
    save_every: int = setting(10_000, "steps between writings of latest.pt", free=True)
    milestone_every: int = setting(100_000, "steps between files step-N.pt, which stay", free=True)
    preview_steps: int = setting(25, "ours: Euler steps of the sample grids", free=True)
    num_classes: int = setting(1000)  # no flag: the data and the teacher tell the last three
    z_dim: int = setting(768, free=True)  # goes with the teacher, which is not free
    class_names: tuple = setting(())
    sizes = SIZES  # no field: a fork may bring rows of its own

    @property
    def latent_shape(self) -> tuple:
        """(C, H, W) of what is noised and denoised: the pixels, or latents 8 times smaller."""
        channels, shrink = (3, 1) if self.vae == "none" else (4, 8)
        return channels, self.image_size // shrink, self.image_size // shrink


def require(config: Config, name: str, fits: bool, rule: str) -> None:
    """Raises BadInput unless the setting `name` fits."""
    if not fits:
        raise BadInput(f"{name} is {getattr(config, name)}: it must be {rule}")


def make_config(kind: type = Config, /, **typed) -> Config:
    """Defaults of kind, then DEMO if no data, rows of SIZES and METHODS, typed. Raises BadInput."""
    demo = {} if typed.get("data") else DEMO
    merged = dict(size=kind.size, method=kind.method) | demo | typed  # typed chooses the rows ...
    for name, table in (("size", kind.sizes), ("method", METHODS | {kind.method: {}})):
        if merged[name] not in table:
            raise BadInput(f"unknown {name} {merged[name]!r}: choose from {', '.join(table)}")
        merged |= table[merged[name]]
    c = kind(**(merged | typed))  # ... and beats them
    for field in dataclasses.fields(c):
        value, rule = getattr(c, field.name), field.metadata.get("rule")
        if rule and type(value) in (int, float):
            require(c, field.name, RULES[rule](value), rule)
    unit = c.patch_size * (1 if c.vae == "none" else 8)
    require(c, "image_size", c.image_size % unit == 0, f"a multiple of {unit} for vae {c.vae}")
    require(c, "align_depth", c.align_depth <= c.depth, f"at most the depth, {c.depth}")
    require(c, "hidden_size", c.hidden_size % 4 == 0, "a multiple of 4")
    require(c, "num_heads", c.hidden_size % c.num_heads == 0, f"a divisor of {c.hidden_size}")
    out = c.out or f"runs/{c.method}-{c.size}".replace("/2", "-2")
    return dataclasses.replace(c, out=out, cache=c.cache or f"{c.data.rstrip('/')}-latents")


def parse_config(argv: list | None = None, kind: type = Config, doc: str = __doc__) -> Config:
    """Config from the command line: a flag for each field with a note, which is its help."""
    plain, switch = argparse.RawDescriptionHelpFormatter, argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=doc, formatter_class=plain, allow_abbrev=False)
    for field in dataclasses.fields(kind):
        shown = f"{field.metadata.get('note')} [{field.default}]".replace("%", "%%")
        how = dict(action=switch) if field.type is bool else dict(type=field.type)
        if field.metadata.get("note"):
            parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=shown, **how)
    return make_config(kind, **vars(parser.parse_args(argv)))


@dataclasses.dataclass
class Run:
    """What a run holds, for each part of the loop and a fork's draw_step; set_up fills it."""

    config: Config
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"
    dataset: Dataset | None = None
    vae: object = None  # AutoencoderKL; None in pixel space
    teacher: nn.Module | None = None  # images -> tokens z
    model: nn.Module | None = None  # the raw network
    ddp_model: nn.Module | None = None  # the same, as a step calls it
    ema: nn.Module | None = None  # running average of the weights
    optimizer: torch.optim.Optimizer | None = None
    step: int = 0  # steps done
    log: list = dataclasses.field(default_factory=list)  # the lines of log.jsonl
    sums: Counter = dataclasses.field(default_factory=Counter)  # of losses since the last line
    encoded: int = 0  # images that this process encoded since then


def seeded(device, *key) -> torch.Generator:
    """A generator that depends on `key` alone: so a resumed run stores no random state."""
    digest = hashlib.sha256(repr(key).encode()).digest()[:7]
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


# ---- 2. Building blocks of SiT; attribute names are DiT's, so that published weights load --------
class TimestepEmbedder(nn.Module):
    """t (...) -> (..., D): 128 cosines and 128 sines, then an MLP. Made for DiT's t up to 1000; in
    SiT's [0, 1] most sines are a multiple of t: enough to read t off."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        i = torch.arange(128, device=t.device)
        angles = t.float().unsqueeze(-1) * torch.exp(-math.log(10000.0) * i / 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        with torch.autocast(t.device.type, enabled=False):  # in bf16 near times look the same
            return self.mlp(waves.to(self.mlp[0].weight.dtype))


def sincos_pos_embed(dim: int, side: int) -> Tensor:
    """Fixed positions (side^2, dim) in raster order; the first half of dim codes the column."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, dim / 2)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=-1).float()


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: a LayerNorm whose scale and shift come from the condition."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """SiT block, h (N, K, D) -> same; the condition c (N, 1, D) sets shifts, scales and gates. All
    start at zero (adaLN-Zero): at first h passes unchanged, until training moves the gates."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.attn = Attention(width, num_heads, qkv_bias=True)
        self.mlp = Mlp(width, 4 * width, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, -1)
        h = h + gate_a * self.attn(modulate(h, shift_a, scale_a))
        return h + gate_m * self.mlp(modulate(h, shift_m, scale_m))


class FinalLayer(nn.Module):
    """Tokens -> velocities: patches (N, K, out_dim), class token (N, cls_dim) or None."""

    def __init__(self, width: int, out_dim: int, cls_dim: int):
        super().__init__()
        self.linear = nn.Linear(width, out_dim)
        self.cls_head = nn.Linear(width, cls_dim) if cls_dim else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, c: Tensor) -> tuple:
        h = modulate(h, *self.adaLN_modulation(c).chunk(2, -1))
        if self.cls_head is None:
            return self.linear(h), None
        return self.linear(h[:, 1:]), self.cls_head(h[:, 0])


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(N, C, H, W) -> (N, T, p*p*C), raster order, channel fastest: the targets' tokens."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // patch_size, patch_size, w // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, patch_size**2 * c)


def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """(N, T, p*p*C) -> (N, C, H, W) with H = W: undoes patchify."""
    n, t, d = tokens.shape
    side = math.isqrt(t)
    x = tokens.reshape(n, side, side, patch_size, patch_size, d // patch_size**2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, side * patch_size, side * patch_size)


# ---- 3. The method: a random token subset, after a light mixing block (Sec. 5.1) -----------------
SiTOutput = namedtuple("SiTOutput", "v v_cls z_pred")  # shapes: see SiT.forward


def sample_token_subset(n: int, num_tokens: int, mask_ratio: float, generator=None) -> Tensor:
    """ids_keep (n, K), K = round((1 - mask_ratio) num_tokens), at least 1: uniform, ascending."""
    len_keep = max(1, round((1 - mask_ratio) * num_tokens))
    device = generator.device if generator else None
    scores = torch.rand(n, num_tokens, generator=generator, device=device)
    return scores.argsort(dim=-1)[:, :len_keep].sort(dim=-1).values


def gather_tokens(tokens: Tensor, ids_keep: Tensor | None, class_token: bool = False) -> Tensor:
    """(N, [1+]T, D), ids_keep (N, K) or None (all) -> (N, [1+]K, D). A class token stays."""
    if ids_keep is None:
        return tokens
    if class_token:
        ids_keep = F.pad(ids_keep + 1, (1, 0))  # row 0 is the class token
    return tokens.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class SiT(nn.Module):
    """SiT with REPA's projector, REG's class token, and the mixer: blocks before the mask."""

    def __init__(self, config: Config):
        super().__init__()
        channels, side, _ = config.latent_shape
        width, cls_dim = config.hidden_size, config.z_dim if config.class_token else 0
        self.patch_size, self.num_classes = config.patch_size, config.num_classes
        self.class_token = config.class_token
        self.align_depth = config.align_depth if config.align_coeff > 0 else 0  # 0: none
        self.x_embedder = PatchEmbed(side, config.patch_size, channels, width)
        self.t_embedder = TimestepEmbedder(width)
        # The last row is the null class, learned where labels are hidden: with it one network also
        # predicts without a class, which guidance subtracts (see euler_ode).
        table = nn.Embedding(config.num_classes + 1, width)
        self.y_embedder = nn.ModuleDict(dict(embedding_table=table))
        if config.class_token:
            self.cls_embedder = nn.Linear(config.z_dim, width)
            self.cls_norm = nn.LayerNorm(width, eps=1e-6)
        positions = sincos_pos_embed(width, side // config.patch_size)
        positions = F.pad(positions, (0, 0, int(config.class_token), 0))  # class token: zeros
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)

        # NOTE(paper): the inside of the mixing layers is not given. Two plain SiT blocks are the
        # simplest reading conditioned on (t, y): +21.3M for B (paper 22M), +47.8M for XL (55M).
        heads, hidden = config.num_heads, config.projector_dim
        self.mixer = nn.ModuleList(Block(width, heads) for _ in range(config.mixer_depth))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(config.depth))
        first = [nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
        projector = nn.Sequential(*first, nn.Linear(hidden, config.z_dim))  # REPA's h_phi
        self.projectors = nn.ModuleList([projector] if self.align_depth else [])
        self.final_layer = FinalLayer(width, config.patch_size**2 * channels, cls_dim)
        initialize_weights(self)

    def embed(self, x, t, y, cls=None) -> tuple:
        """Inputs of forward -> all tokens, mixed (N, [1+]T, D), and the condition c (N, 1, D)."""
        c = (self.t_embedder(t) + self.y_embedder["embedding_table"](y)).unsqueeze(1)
        h = self.x_embedder(x)  # (N, T, D)
        if self.class_token:
            h = torch.cat([self.cls_norm(self.cls_embedder(cls)).unsqueeze(1), h], dim=1)
        h = h + self.pos_embed  # before the mask: so a kept token knows its place
        # Before the mask, too: a token that will be dropped still tells the others what it sees,
        # since the kept ones must match a teacher that saw the whole image (Tab. 3).
        for block in self.mixer:
            h = block(h, c)
        return h, c

    def forward(self, x, t, y, cls=None, ids_keep=None) -> SiTOutput:
        """Noisy x (N, C, H, W) at times t (N,) in [0, 1], labels y (N,), noisy cls (N, z_dim);
        ids_keep (N, K): the patches that enter the blocks, None: all, as in sampling
        -> velocities v (N, K, p*p*C), v_cls (N, z_dim); projected z_pred (N, [1+]K, z_dim)."""
        h, c = self.embed(x, t, y, cls)  # (N, [1+]T, D)
        h = gather_tokens(h, ids_keep, self.class_token)  # the mask: (N, [1+]K, D)
        z_pred = None
        for i, block in enumerate(self.blocks, start=1):
            h = block(h, c)
            if i == self.align_depth:  # NOTE(paper): counted after the mixer
                z_pred = self.projectors[0](h)  # h_phi(h_a) of Eq. 11
        v, v_cls = self.final_layer(h, c)
        return SiTOutput(v, v_cls, z_pred)


def initialize_weights(model: nn.Module) -> None:
    """As DiT: blocks start as identity, velocities as 0; their loss moves heads, then gates."""
    for name, p in model.named_parameters():
        if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
            nn.init.zeros_(p)
        elif name.startswith(("y_embedder", "t_embedder")):
            nn.init.normal_(p, std=0.02)
        elif p.ndim > 1 and name != "pos_embed":
            nn.init.xavier_uniform_(p.view(len(p), -1))  # a view: convolutions, too


def build_model(config: Config) -> SiT:
    """The network of a config, initialised from its seed."""
    torch.manual_seed(config.seed)
    return SiT(config)


# ---- 4. The objective: flow matching (Eq. 10) and alignment (Eq. 11) -----------------------------
# Why a velocity lets one sample: on the path x_t = (1 - t) x + t noise, each pair of image and
# noise moves at the constant velocity noise - x. Many pairs' paths cross in a point; under the mean
# square the best answer there is their mean velocity. Density changes by this mean flow alone: so
# particles that start as noise and follow these means from t = 1 down to t = 0 have, at each t, the
# distribution of the x_t, and end among the images, wherever each noise came from.
def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t noise: t = 0 is data, t = 1 is noise. x (N, ...), t (N,)."""
    t = t.view(-1, *[1] * (x.ndim - 1))
    return (1 - t) * x + t * noise


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are taken in float32, or wider where the inputs are: a bf16 cosine is too coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def draw_step(run: Run, generator: torch.Generator) -> dict:
    """Everything random in a step, for the whole batch of n images: vae_noise, for the encoder, and
    keywords of training_losses: ids_keep (n, K) or None (all tokens), t (n,), noise, cls_noise,
    drop (n,), True where the label becomes the null class. A fork adds its own to both."""
    config, n, ids_keep = run.config, run.config.batch_size, None
    on = dict(generator=generator, device=generator.device)
    if config.mask_ratio > 0:
        num_tokens = (config.latent_shape[1] // config.patch_size) ** 2
        ids_keep = sample_token_subset(n, num_tokens, config.mask_ratio, generator)
    return dict(
        ids_keep=ids_keep,
        t=torch.rand(n, **on),
        noise=torch.randn(n, *config.latent_shape, **on),
        cls_noise=torch.randn(n, config.z_dim, **on),
        drop=torch.rand(n, **on) < config.label_dropout,
        vae_noise=torch.randn(n, *config.latent_shape, **on),
    )


def training_losses(model, x, y, z, config, *, t, noise, drop, cls_noise=None, ids_keep=None):
    """{"loss", "denoise", "cls", "align"} of a batch, scalars; 0: not of the method. Clean latents
    x (N, C, H, W), labels y (N,), teacher tokens z (N, 1+T, z_dim), class token first, or None;
    the rest are the draws of draw_step, cut to the batch."""
    cls_t = None
    if config.class_token:  # the same t, noise of its own
        r_cls = at_least_float32(z[:, 0])
        cls_t = add_noise(r_cls, cls_noise, t)
    y = torch.where(drop, config.num_classes, y)  # the null class
    v, v_cls, z_pred = model(add_noise(x, noise, t), t, y, cls_t, ids_keep)

    # Dropped tokens are neither predicted nor aligned: all means run over the kept ones.
    v_target = patchify(noise - x, config.patch_size)  # d x_t / dt: (N, T, p*p*C)
    v_target = gather_tokens(v_target, ids_keep)  # (N, K, p*p*C)
    denoise = (at_least_float32(v) - v_target).square().mean()  # Eq. 10, first term
    cls_loss = align = torch.zeros_like(denoise)
    if config.class_token:  # Eq. 10, second term
        cls_loss = (at_least_float32(v_cls) - (cls_noise - r_cls)).square().mean()
    if z_pred is not None:  # Eq. 11
        z = z if config.class_token else z[:, 1:]
        z = at_least_float32(gather_tokens(z, ids_keep, config.class_token))
        align = -F.cosine_similarity(at_least_float32(z_pred), z, dim=-1).mean()

    loss = denoise + config.cls_coeff * cls_loss + config.align_coeff * align
    return dict(loss=loss, denoise=denoise, cls=cls_loss, align=align)


# ---- 5. A sampler for the previews; those of the papers are in sample.py -------------------------
def velocities(model: nn.Module, state: list, t: float, y: Tensor, dtype: torch.dtype) -> list:
    """The model's velocities, in float64, of state = [x] or [x, cls] at time t, for labels y."""
    times = torch.full((len(y),), t, dtype=dtype, device=y.device)
    x, *cls = (part.to(dtype) for part in state)
    out = model(x, times, y, *cls)
    return [v.double() for v in (unpatchify(out.v, model.patch_size), out.v_cls)[: len(state)]]


@torch.no_grad()
def euler_ode(model, x, y, cls=None, *, num_steps: int = 50, cfg_scale: float = 1.0) -> Tensor:
    """Follows dx/dt = v, with all tokens, from standard normal x (N, C, H, W) and cls (N, z_dim) or
    None at t = 1 to latents like x at t = 0, of labels y (N,). cfg_scale w > 1 is classifier-free
    guidance: v = v_null + w (v_label - v_null) goes further in the direction of the label."""
    state = [part.double() for part in (x, cls) if part is not None]  # float32 sums lose digits
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    for t, t_next in zip(times, times[1:], strict=False):
        v = velocities(model, state, t, y, x.dtype)
        if cfg_scale > 1:
            v_null = velocities(model, state, t, torch.full_like(y, model.num_classes), x.dtype)
            v = [null + cfg_scale * (label - null) for label, null in zip(v, v_null, strict=True)]
        state = [part + (t_next - t) * dx_dt for part, dx_dt in zip(state, v, strict=True)]
    return state[0].to(x.dtype)


# ---- 6. Frozen networks: the teacher and the SD-VAE ----------------------------------------------
def read_weights(path: str | Path, repo: str = "", filename: str = "", flag: str = "") -> dict:
    """State dict of `path` (.safetensors or .pth), or of a file on the hub where path is empty.
    Runs no code of it. Raises BadInput: unreadable, or offline without a file."""
    advice = f": run once with internet, or pass {flag} FILE" if flag else ""
    with explained(f"cannot read {path or f'{filename} of {repo}'}{advice}"):
        path = path or huggingface_hub.try_to_load_from_cache(repo, filename)
        path = path or huggingface_hub.hf_hub_download(repo, filename)
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        zipped = zipfile.is_zipfile(path)  # older than torch 1.6: no zip, and cannot be mapped
        if zipped and zipfile.ZipFile(path).testzip():  # torch does not compare checksums
            raise ValueError("a part of it is damaged")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


class ViTTeacher(nn.Module):
    """A timm ViT, "classifier" a tiny one to be trained: images uint8 (N, 3, H, W) -> normed tokens
    (N, 1 + grid^2, dim), the class token first. Raises BadInput."""

    def __init__(self, name: str, grid: int, weights: str = ""):
        super().__init__()
        tiny = dict(patch_size=4, embed_dim=64, depth=2, num_heads=4)
        arch, how = ("vit_tiny_patch16_224", tiny) if name == "classifier" else (name, {})
        with explained(f"teacher {name!r} is no ViT of timm with a class token"):
            self.size = grid * (how.get("patch_size") or int(re.search(r"patch(\d+)", arch)[1]))
            self.vit = timm.create_model(arch, img_size=self.size, num_classes=0, **how)
            if self.vit.cls_token is None or isinstance(self.vit.norm, nn.Identity):
                raise ValueError("no class token, or no last norm")
        source = self.vit.pretrained_cfg
        if name != "classifier":
            repo = source["hf_hub_id"]
            state = read_weights(weights, repo, "model.safetensors", "--teacher_weights")
            with explained(f"{weights or repo} holds weights of another model"):
                # Takes timm's or Meta's names; resamples the positions to our grid.
                convert = sys.modules[type(self.vit).__module__].checkpoint_filter_fn
                missing, _ = self.vit.load_state_dict(convert(state, self.vit), strict=False)
                if missing:  # it would stay random
                    raise ValueError(f"{missing[0]} is not in it")
        self.dim = self.vit.num_features
        constants = torch.tensor([source["mean"], source["std"]], dtype=torch.float64)
        self.register_buffer("mean_std", constants.view(2, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        # As REPA: normalise, then bicubic without antialias: one teacher patch for each of ours.
        pixels = images.to(self.vit.cls_token.dtype) / 255
        mean, std = self.mean_std.to(pixels.dtype)
        x = F.interpolate((pixels - mean) / std, self.size, mode="bicubic")
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            tokens = self.vit.forward_features(x)
        patches = tokens[:, self.vit.num_prefix_tokens :]  # skips registers, if it has some
        return at_least_float32(torch.cat([tokens[:, :1], patches], dim=1))


def build_teacher(config: Config, dataset: Dataset, device, rank: int = 0) -> ViTTeacher | None:
    """The frozen teacher of a run, or None; the demo trains its own on clean images."""
    if not config.class_token and config.align_coeff == 0:
        return None
    torch.manual_seed(config.seed)
    grid, threads = config.latent_shape[1] // config.patch_size, torch.get_num_threads()
    teacher = ViTTeacher(config.teacher, grid, config.teacher_weights)
    if config.teacher == "classifier":  # learns to name the classes: the demo's DINOv2
        teacher.vit.reset_classifier(len(dataset.classes))
        optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
        torch.set_num_threads(1)  # so every rank and every resumed run has the very same teacher
        batches = torch.randint(len(dataset), (config.teacher_steps, 64)).tolist()
        for batch in tqdm(batches, "training the teacher", leave=False, disable=rank > 0):
            images, y, *_ = default_collate([dataset[i] for i in batch])
            z = teacher(images)
            optimizer.zero_grad()
            F.cross_entropy(teacher.vit.head(z[:, 0] + z[:, 1:].mean(dim=1)), y).backward()
            optimizer.step()
        torch.set_num_threads(threads)
    return teacher.to(device).eval().requires_grad_(False)


class AutoencoderKL:
    """Stable Diffusion's VAE: images (N, 3, H, W) in [-1, 1] <-> unscaled latents (N, 4, h, w)."""

    def __init__(self, state_dict: dict):
        self.scale = 0.18215  # gives latents a variance of about 1
        since_2023 = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
        self.tensors = state_dict
        for old, new in since_2023.items():
            self.tensors = {name.replace(old, new): value for name, value in self.tensors.items()}

    def layer(self, name):
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    def norm(self, name, h):
        return F.group_norm(h, 32, *self.layer(name), eps=1e-6)

    def conv(self, name, h):
        return F.conv2d(h, *self.layer(name), padding="same")

    def resnet(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        return h + (x if h.shape == x.shape else self.conv(f"{name}.conv_shortcut", x))

    def middle(self, name, x):
        x, attn = self.resnet(f"{name}.resnets.0", x), f"{name}.attentions.0"
        h = self.norm(f"{attn}.group_norm", x).flatten(2).mT  # (N, HW, C)
        q, k, v = (F.linear(h, *self.layer(f"{attn}.to_{letter}")) for letter in "qkv")
        h = F.linear(F.scaled_dot_product_attention(q, k, v), *self.layer(f"{attn}.to_out.0"))
        return self.resnet(f"{name}.resnets.1", x + h.mT.reshape(x.shape))

    def encode(self, images: Tensor) -> tuple:
        """Mean and standard deviation of the latents."""
        h = self.conv("encoder.conv_in", images)
        for i in range(4):
            for j in range(2):
                h = self.resnet(f"encoder.down_blocks.{i}.resnets.{j}", h)
            if i < 3:  # halves; padded at the right and at the bottom alone
                down = self.layer(f"encoder.down_blocks.{i}.downsamplers.0.conv")
                h = F.conv2d(F.pad(h, (0, 1, 0, 1)), *down, stride=2)
        h = F.silu(self.norm("encoder.conv_norm_out", self.middle("encoder.mid_block", h)))
        mean, logvar = self.conv("quant_conv", self.conv("encoder.conv_out", h)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))

    def decode(self, latents: Tensor) -> Tensor:
        h = self.conv("decoder.conv_in", self.conv("post_quant_conv", latents))
        h = self.middle("decoder.mid_block", h)
        for i in range(4):
            for j in range(3):
                h = self.resnet(f"decoder.up_blocks.{i}.resnets.{j}", h)
            if i < 3:
                h = F.interpolate(h, scale_factor=2.0)
                h = self.conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", h)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.conv_norm_out", h)))


def build_vae(config: Config, device) -> AutoencoderKL | None:
    """The SD-VAE of a run, in float32; None in pixel space. Raises BadInput."""
    if config.vae == "none":
        return None
    path, file = config.vae_weights, "diffusion_pytorch_model.safetensors"
    state = read_weights(path, config.vae, file, "--vae_weights")
    with explained(f"{path or config.vae} holds no SD-VAE"):  # one small image finds out
        vae = AutoencoderKL({name: value.to(device).float() for name, value in state.items()})
        vae.decode(vae.encode(torch.zeros(1, 3, 16, 16, device=device))[0])
    return vae


def encode_images(vae: AutoencoderKL | None, images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> mean and std of the scaled latents (N, 2C, h, w)."""
    x = images.float() / 127.5 - 1
    if vae is None:
        return torch.cat([2 * x, torch.zeros_like(x)], dim=1)  # a variance of about 1, too
    return vae.scale * torch.cat([torch.cat(vae.encode(some), dim=1) for some in x.split(32)])


def decode_latents(vae: AutoencoderKL | None, x: Tensor) -> Tensor:
    """Scaled latents -> images uint8 (N, 3, H, W); truncated, not rounded, as REPA does."""
    if vae is None:
        images = x.float() / 2
    else:
        images = torch.cat([vae.decode(some / vae.scale) for some in x.float().split(32)])
    return (255 * (images + 1) / 2).clamp(0, 255).to(torch.uint8)


# ---- 7. Data: drawn shapes for the demo, image folders, latents that keep themselves -------------
IMAGE_SUFFIXES = torchvision.datasets.folder.IMG_EXTENSIONS
IMAGE_SUFFIXES += (".jpe", ".jfif", ".gif", ".avif", ".jp2", ".j2k", ".jpx")
SHAPES = {  # class: signed distance at (x, y), negative inside; radius about 1, y points down
    "disc": lambda x, y: x.hypot(y) - 0.9,
    "square": lambda x, y: x.abs().maximum(y.abs()) - 0.78,
    "triangle": lambda x, y: y.maximum(0.87 * x.abs() - 0.5 * y) - 0.5,
    "star": lambda x, y: x.hypot(y) - 1 + 1.3 * ((x.atan2(-y) / 1.2566 + 0.5) % 1 - 0.5).abs(),
    "cross": lambda x, y: (x.abs().minimum(y.abs()) - 0.3).maximum(x.abs().maximum(y.abs()) - 0.95),
    "ring": lambda x, y: (x.hypot(y) - 0.7).abs() - 0.22,
    "crescent": lambda x, y: (x.hypot(y) - 0.95).maximum(0.8 - (x - 0.5).hypot(y)),
    "heart": lambda x, y: x.hypot(0.15 - y - 0.65 * x.abs().sqrt()) - 0.85,
}


def demo_shapes(size: int, count: int = 8192) -> TensorDataset:
    """(image uint8 (3, size, size), label) of class i % 8, looks decided by i alone; drawn once."""
    u = torch.rand(count, 13, 1, 1, generator=seeded("cpu", "shapes")).unbind(1)
    line, labels = torch.arange(size) + 0.5, torch.arange(count) % len(SHAPES)
    radius, tilt = size * (0.32 + 0.08 * u[0]), 0.2 * (u[1] - 0.5)
    x = (line - size * (0.45 + 0.1 * u[2])) / radius  # (count, 1, size)
    y = (line[:, None] - size * (0.45 + 0.1 * u[3])) / radius  # (count, size, 1)
    x, y = x * tilt.cos() + y * tilt.sin(), y * tilt.cos() - x * tilt.sin()
    distance = torch.stack([shape(x, y) for shape in SHAPES.values()])[labels, torch.arange(count)]
    inside = (0.5 - distance * radius).clamp(0, 1)  # antialiased
    start, end, paint = (torch.stack(u[i : i + 3], dim=1) for i in (4, 7, 10))  # (count, 3, 1, 1)
    ground = 0.4 * (start + (end - start) * line / size)  # darker than any shape
    images = torch.lerp(ground, 0.45 + 0.55 * paint, inside[:, None])
    dataset = TensorDataset((images * 255).to(torch.uint8), labels)
    dataset.classes = list(SHAPES)
    return dataset


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve by BOX while twice too large, BICUBIC to the size, cut out the middle."""
    if max(image.size) > 100 * min(image.size):  # a line, once enlarged, could fill the memory
        raise ValueError(f"{image.width} x {image.height} pixels")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; 16 bits, which Pillow would clip, are scaled. Raises ValueError."""
    wide = image.mode == "I" and image.format in ("PNG", "PPM")  # Pillow's name for some of them
    if wide or image.mode.startswith("I;16"):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its range is unknown: save it with 8 or 16 bits")
    return image.convert("RGB")


class FolderImages(torchvision.datasets.DatasetFolder):
    """Images of (train/)class/ -> uint8 (3, S, S), label[, file of latents]. Raises BadInput."""

    def __init__(self, folder: str, size: int):
        self.size, self.cache = size, None
        with explained(f"--data {folder} must hold images as class/*.jpg"):
            if any(Path(folder, "train").glob("*/")):  # without folders it is a class of this name
                folder = Path(folder, "train")
            super().__init__(folder, loader=Image.open, extensions=IMAGE_SUFFIXES)
        for i in range(0, len(self), 1 + len(self) // 100):  # a look at some of them
            self[i]

    def __getitem__(self, i: int) -> tuple:
        path, label = self.samples[i]
        with explained(f"{path} is no readable image: mend or remove it"):
            if not os.path.isfile(path):  # a pipe would be waited for
                raise ValueError("no regular file")
            with Image.open(path) as file:
                crop = np.array(center_crop(to_rgb(file), self.size))
        image = torch.from_numpy(crop).permute(2, 0, 1)
        if self.cache is None:
            return image, label
        stat = os.stat(path)  # another image of the same name has another date or length
        name = f"{os.path.relpath(path, self.root)}-{self.size}-{stat.st_mtime_ns}-{stat.st_size}"
        return image, label, os.path.join(self.cache, f"{name}.npy")


def keep_latents(run: Run, images: Tensor, files: list) -> Tensor:
    """Mean and std of latents (N, 2C, h, w), kept as float16 files once made. Raises BadInput."""
    rows, (channels, h, w) = {}, run.config.latent_shape
    for file in files:
        with contextlib.suppress(Exception):  # missing, or cut short by a kill
            rows[file] = np.load(file).reshape(2 * channels, h, w)
    missing = set(files) - rows.keys()
    run.encoded += len(missing)
    if missing:  # all are encoded: a smaller batch would round otherwise
        encoded = encode_images(run.vae, images).half().cpu().numpy()  # what is written is used
        if not np.isfinite(encoded).all():
            raise BadInput(f"{run.config.vae} gives latents that are not finite: name another")
        for file in missing:
            rows[file] = encoded[files.index(file)]
            with explained(f"cannot write {file}: make room, or name another --cache"):
                os.makedirs(os.path.dirname(file), exist_ok=True)
                np.save(file, rows[file])
    return torch.tensor(np.stack([rows[file] for file in files]), device=run.device).float()


@torch.no_grad()
def load_batch(run: Run, batch: list, vae_noise: Tensor) -> tuple:
    """A loader's batch -> latents x (N, C, h, w), labels y (N,), teacher tokens z or None."""
    images, y, *files = batch
    images, y = (part.to(run.device, non_blocking=True) for part in (images, y))
    moments = keep_latents(run, images, *files) if files else encode_images(run.vae, images)
    mean, std = moments.chunk(2, dim=1)
    return mean + std * vae_noise, y, run.teacher(images) if run.teacher else None


def index_batches(run: Run):
    """Yields this rank's micro-batches of image indices; the seed permutes each epoch's images."""
    config, count, order, batch = run.config, len(run.dataset), [], []
    for place in range(run.step * config.batch_size, config.steps * config.batch_size):
        if not order or place % count == 0:
            generator = seeded("cpu", "epoch", config.seed, place // count)
            order = torch.randperm(count, generator=generator).tolist()
        batch.append(order[place % count])
        if len(batch) == config.batch_size:
            shares = np.array_split(batch, run.world_size * config.accum)
            yield from shares[run.rank * config.accum : (run.rank + 1) * config.accum]
            batch = []


# ---- 8. The training loop ------------------------------------------------------------------------
def setup_distributed() -> tuple:
    """(rank, world_size, device) as torchrun says; plain python is one process. Raises BadInput."""
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
        raise BadInput("only one of RANK and WORLD_SIZE is set: unset it, or let torchrun set both")
    rank, world_size = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.getenv("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if world_size > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return rank, world_size, device


def set_up(config: Config, build_model, build_teacher) -> Run:
    """Processes, data, frozen networks, model, checkpoint. Raises BadInput."""
    rank, world_size, device = setup_distributed()
    rule = f"a multiple of {world_size} processes x accum {config.accum}"
    require(config, "batch_size", config.batch_size % (world_size * config.accum) == 0, rule)

    # Data and frozen networks; they tell the classes and the teacher's width.
    folder, size = config.data, config.image_size
    dataset = FolderImages(folder, size) if folder else demo_shapes(size)
    names = tuple(dataset.classes)
    config = dataclasses.replace(config, num_classes=len(names), class_names=names)
    saved = read_latest(config)  # here: bad input is told before the long work
    vae = build_vae(config, device)
    if folder and vae:
        weights = b"".join(value.cpu().numpy().tobytes() for value in vae.tensors.values())
        dataset.cache = os.path.join(config.cache, hashlib.sha256(weights).hexdigest()[:16])
    teacher = build_teacher(config, dataset, device, rank)
    if teacher:
        config = dataclasses.replace(config, z_dim=teacher.dim)

    # What is trained, and its average; torch's default betas are those of Tab. 7.
    run = Run(config, rank, world_size, device, dataset, vae, teacher)
    run.model = run.ddp_model = build_model(config).to(device)
    run.ema = copy.deepcopy(run.model).eval().requires_grad_(False)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), config.lr, weight_decay=0, fused=True)
    if saved:
        with explained(f"latest.pt in {config.out} does not fit the network: name another --out"):
            for name in ("model", "ema", "optimizer"):
                getattr(run, name).load_state_dict(saved[name])
            run.step, run.sums, run.log = int(saved["step"]), Counter(saved["sums"]), saved["log"]
        run.optimizer.param_groups[0]["lr"] = config.lr  # as typed now, not as it was then
    if rank == 0:
        os.makedirs(config.out, exist_ok=True)
        where = f"{len(dataset)} images, {world_size} x {device.type}; {config.out}"
        print(f"{config.method}, {config.size}, steps {run.step} to {config.steps}, {where}")
    if config.compile and device.type == "cuda":
        run.model.compile()  # in place: names of weights stay
    if world_size > 1:
        run.ddp_model = nn.parallel.DistributedDataParallel(run.model, gradient_as_bucket_view=True)
    return run


def read_latest(config: Config) -> dict | None:
    """latest.pt of the run folder, if there is one. Raises BadInput, also for other settings."""
    path = Path(config.out, "latest.pt")
    if not path.exists():
        return None
    saved = read_weights(path)
    with explained(f"{path} is no checkpoint of this program: name another --out"):
        then = dict(saved["config"])
    for field in dataclasses.fields(config):
        old, new = then.get(field.name), getattr(config, field.name)
        if old != new and not field.metadata.get("free"):
            changed = f"{field.name} {old} there, {new} here"
            raise BadInput(f"{path} has other settings ({changed}): name another --out")
    return saved


def train_step(run: Run, batches, draw_step, training_losses) -> None:
    """One step of the optimizer; adds its losses to run.sums."""
    config, device, means = run.config, run.device, Counter()
    # Drawn for the whole batch on each rank: up to rounding, the number of ranks changes nothing.
    drawn = draw_step(run, seeded(device, "step", config.seed, run.step))
    shares = run.world_size * config.accum
    for micro in range(config.accum):
        share = run.rank * config.accum + micro  # index_batches cuts the images alike
        mine = {k: v.chunk(shares)[share] if torch.is_tensor(v) else v for k, v in drawn.items()}
        x, y, z = load_batch(run, next(batches), mine.pop("vae_noise"))
        run.ddp_model.require_backward_grad_sync = micro + 1 == config.accum  # DDP's no_sync
        with torch.autocast(device.type, torch.bfloat16, config.bf16 and device.type == "cuda"):
            losses = training_losses(run.ddp_model, x, y, z, config, **mine)
        (losses["loss"] / config.accum).backward()
        means.update({name: value.detach() / shares for name, value in losses.items()})  # adds
    grad_norm = nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip)
    means["grad_norm"] = grad_norm / run.world_size  # the same on all ranks, summed below
    run.optimizer.step()
    run.optimizer.zero_grad()

    # ema = decay ema + (1 - decay) weights, those of the step just made; detached.
    weights = [p.detach() for p in run.model.parameters()]
    torch._foreach_lerp_(list(run.ema.parameters()), weights, 1 - config.ema_decay)
    run.step += 1

    values = torch.stack(list(means.values()))  # not read here: that would wait for the GPU
    if run.world_size > 1:
        dist.all_reduce(values)
    run.sums.update(dict(zip(means, values, strict=True), steps=1))


def report(run: Run, images_per_s: float) -> None:
    """Logs the losses' means since the last line, the speed (saves included), images encoded."""
    steps = run.sums.pop("steps")
    means = (torch.stack(list(run.sums.values())) / steps).tolist()
    line = dict(zip(run.sums, means, strict=True), images_per_s=images_per_s, encoded=run.encoded)
    run.sums, run.encoded, run.log = Counter(), 0, [*run.log, dict(step=run.step) | line]
    if run.rank == 0:
        shown = [f"{name} {value:.4g}" for name, value in line.items() if value]
        tqdm.write(", ".join([f"step {run.step}", *shown]))
        text = "".join(json.dumps(line) + "\n" for line in run.log)
        Path(run.config.out, "log.jsonl").write_text(text)  # anew: lines of lost steps go


def require_finite(run: Run) -> None:
    """Raises BadInput, on all ranks, if weights broke."""
    if not torch.stack([p.isfinite().all() for p in run.model.parameters()]).all():
        raise BadInput(f"step {run.step}: weights not finite, not saved: go on with a smaller --lr")


def save(run: Run, milestone: bool) -> None:
    """Writes step-N.pt at a milestone, then latest.pt: a kill leaves the earlier files whole."""
    state = {name: getattr(run, name).state_dict() for name in ("model", "ema", "optimizer")}
    state |= dict(step=run.step, sums=dict(run.sums), log=run.log)
    state["config"] = dataclasses.asdict(run.config)
    for name in [f"step-{run.step:07d}.pt"] * milestone + ["latest.pt"]:
        path, beside = Path(run.config.out, name), Path(run.config.out, "unfinished.tmp")
        with explained(f"cannot save {path}: make room, then type the same command"):
            torch.save(state, beside)
            with open(beside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)


def preview(run: Run, sampler) -> None:
    """Draws 8 images each of 8 classes, from the same noise every time."""
    config = run.config
    on = dict(generator=seeded(run.device, "preview", config.seed), device=run.device)
    y = torch.arange(64, device=run.device) // 8 * config.num_classes // 8  # spread evenly
    noise = torch.randn(64, *config.latent_shape, **on)
    cls = torch.randn(64, config.z_dim, **on) if config.class_token else None
    x = sampler(run.ema, noise, y, cls, num_steps=config.preview_steps, cfg_scale=2.0)
    images = decode_latents(run.vae, x).cpu() / 255
    images = F.interpolate(images, scale_factor=max(1, 96 // config.image_size))  # big pixels
    path = Path(config.out, f"samples-{run.step:07d}.png")
    torchvision.utils.save_image(images, path, nrow=8, pad_value=1.0)
    tqdm.write(f"samples: {path}")


def own_group(worker: int) -> None:
    """For a data worker: else a signal to the whole job ends it before the last step is done."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def train(
    config: Config,
    *,
    build_model=build_model,
    build_teacher=build_teacher,
    draw_step=draw_step,
    training_losses=training_losses,
    sampler=euler_ode,
    signals=(),
) -> None:
    """Trains from latest.pt on, if it is there. A fork hands in functions of its own. Once a rank
    finds a signal in `signals`, rank 0 saves after the step and all return. Raises BadInput."""
    run = set_up(config, build_model, build_teacher)
    how = dict(num_workers=config.workers, worker_init_fn=own_group)
    how["pin_memory"] = run.device.type == "cuda"
    batches = iter(DataLoader(run.dataset, batch_sampler=index_batches(run), **how))
    first, tick, steps = run.step, time.time(), range(run.step, config.steps)
    for _ in tqdm(steps, initial=run.step, total=config.steps, disable=run.rank > 0):
        train_step(run, batches, draw_step, training_losses)
        stop = torch.tensor(len(signals))
        if run.world_size > 1:
            dist.all_reduce(stop)  # by gloo, on the CPU: all ranks stop together
        last, stopped = run.step == config.steps, stop > 0
        logs = last or run.step % config.log_every == 0
        milestone = run.step % config.milestone_every == 0
        saves = last or stopped or milestone or run.step % config.save_every == 0
        if logs:
            report(run, config.batch_size * (run.step - first) / (time.time() - tick))
            first, tick = run.step, time.time()
        if logs or saves:
            require_finite(run)
        if saves and run.rank == 0:
            save(run, milestone)
        if run.rank == 0 and not last and run.step % config.sample_every == 0:
            preview(run, sampler)
        if stopped:
            break
    if run.rank == 0 and run.step < config.steps:
        tqdm.write(f"stopped and saved at step {run.step}: the same command goes on")
    elif run.rank == 0:
        preview(run, sampler)  # also when typed again: a kill may have come before it
        tqdm.write("finished: raise --steps for more, or name another --out")


def main(train=train, kind: type = Config, doc: str = __doc__) -> None:
    """The command line. A fork hands in its train(config, signals=...), Config and docstring."""
    signals = []

    def note(number, _):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # the second of a kind ends the program at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    try:
        config = parse_config(kind=kind, doc=doc)
        if int(os.getenv("RANK", 0)) == 0:
            with explained(f"cannot lock {config.out}: end the run in there, or name another"):
                os.makedirs(config.out, exist_ok=True)
                lock = FileLock(Path(config.out, "run.lock"), timeout=2)
                lock.acquire()  # until the process ends, however it does
        train(config, signals=signals)
        if dist.is_initialized():
            dist.destroy_process_group()  # not in train: its DDP, still alive, could hang gloo
    except (BadInput, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = str(error).strip().splitlines()[-1]  # a data worker's traceback stands before it
        sys.exit(f"{Path(sys.argv[0]).name}: {reason}")


if __name__ == "__main__":
    main()
