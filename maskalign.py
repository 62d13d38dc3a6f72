"""MaskAlign: a diffusion transformer, aligned with DINOv2 on a random subset of its tokens.

This is an unofficial implementation of Pang et al., arXiv 2606.08788 (2026), in one file.

A diffusion transformer learns to turn noise into images. It learns faster when its hidden
tokens are pulled towards those of DINOv2, a frozen network that understands images. REPA
does this for each patch. REG adds DINOv2's class token, one vector for the whole image.
MaskAlign adds a mask: in training, most blocks see a random 75% of the tokens.

That makes a step cheaper (by 12% for SiT-XL/2) and, the paper reports, saves steps, too.
How can losing tokens help? In the paper, the gradient of the alignment loss is largest at
the same positions in image after image, so the network may come to rely on having all
tokens. Random subsets prevent that, as dropout does.

One training step (Sec. 5.1 of the paper):
  1. The teacher, DINOv2, reads the clean image and returns z: a class token, and a token
     for each patch. A frozen autoencoder turns the image into x, a latent of 1/8 the size.
     (In the demo, x is the image itself.)
  2. x and the class token get noise: x_t = (1 - t) x + t noise, at a random time t. So
     t = 0 is data and t = 1 is noise.
  3. x_t is cut into patches, a token each. All tokens pass two mixing blocks, ordinary
     transformer blocks in which each token can take up what the others know.
  4. A random 25% of the patch tokens are dropped. The class token always stays.
  5. The other blocks see only the kept tokens, and predict the velocity noise - x of each.
     Dropped tokens are never predicted.                                         (Eq. 10)
  6. After block `align_depth`, a projector maps the kept tokens to the teacher's width.
     The results are pulled towards the teacher's tokens.                        (Eq. 11)
The class token goes in with noise, its velocity is predicted, and it is aligned. To
generate images, no teacher is needed and no token is dropped. The class token starts as
noise, as x does, and is thrown away at the end.

  torchrun --nproc_per_node=1 maskalign.py                   the demo: minutes on a laptop
  python maskalign.py --data DIR --size SiT-B/2              one GPU, DIR/class/*.jpg
  torchrun --nproc_per_node=8 maskalign.py --data IMAGENET   the paper's run

Part I is the method. Part II is what it needs; skip it on a first reading. A fork (see
tests/forks/) is a program that imports this file and passes its own functions to `train`.

Letters in shapes: N images, T patches of an image, K kept patches, D width, C channels,
p pixels per side of a patch. [1+]T is 1 + T with a class token, else T.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.layers import Attention, GELUTanh, Mlp, PatchEmbed
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, StackDataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm


# ======== Part I: the method ========
# ---- 1. Building blocks of SiT (arXiv 2401.08740); attribute names are DiT's
class TimestepEmbedder(nn.Module):
    """Times t (...) in [0, 1] -> vectors (..., D): cosines and sines, then an MLP.

    DiT made these for t up to 1000. For t in [0, 1] most cosines are nearly constant and
    most sines nearly proportional to t, but an MLP can read t off them.
    """

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        i = torch.arange(128, device=t.device)
        frequencies = torch.exp(-math.log(10000.0) * i / 128)
        angles = t.float()[..., None] * frequencies  # (..., 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (..., 256)
        # In bfloat16 close times would look the same, so this MLP stays in float32 (our
        # choice: REPA runs it in mixed precision).
        with torch.autocast(t.device.type, enabled=False):
            return self.mlp(waves.to(self.mlp[0].weight.dtype))


def sincos_pos_embed(dim: int, side: int) -> Tensor:
    """Fixed position vectors (side * side, dim) for patches in rows: column, then row."""
    i = torch.arange(dim // 4).double()
    frequencies = 10000.0 ** (-i / (dim // 4))
    angles = torch.arange(side).double()[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, dim / 2)
    columns = line.repeat(side, 1)  # (side * side, dim / 2)
    rows = line.repeat_interleave(side, dim=0)  # (side * side, dim / 2)
    return torch.cat([columns, rows], dim=-1).float()


class Block(nn.Module):
    """A transformer block: tokens h (N, K, D) and a condition c (N, 1, D) -> (N, K, D).

    c comes from time and label. It scales and shifts what enters attention and MLP, and
    gates what they add. All of these start at zero (adaLN-Zero), so a block starts as the
    identity. Its gates learn first, then the rest.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        six = self.adaLN_modulation(c).chunk(6, dim=-1)  # (N, 1, D) each
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = six
        h = h + gate_attn * self.attn(self.norm1(h) * (1 + scale_attn) + shift_attn)
        h = h + gate_mlp * self.mlp(self.norm2(h) * (1 + scale_mlp) + shift_mlp)
        return h


class FinalLayer(nn.Module):
    """Tokens (N, [1+]K, D) -> velocities v (N, K, p*p*C), v_cls (N, z_dim) or None."""

    def __init__(self, width: int, out_dim: int, cls_dim: int | None):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out_dim)
        self.cls_head = nn.Linear(width, cls_dim) if cls_dim else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Tensor, c: Tensor) -> tuple:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        h = self.norm_final(h) * (1 + scale) + shift
        if self.cls_head is None:
            return self.linear(h), None
        return self.linear(h[:, 1:]), self.cls_head(h[:, 0])


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(N, C, H, W) -> (N, T, p*p*C): patches row after row, channels varying fastest."""
    n, c, h, w = x.shape
    p = patch_size
    x = x.reshape(n, c, h // p, p, w // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (N, H/p, W/p, p, p, C)
    return x.reshape(n, -1, p * p * c)


def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """(N, T, p*p*C) -> (N, C, H, W) with H = W: undoes patchify."""
    n, num_tokens, _ = tokens.shape
    side = math.isqrt(num_tokens)
    p = patch_size
    x = tokens.reshape(n, side, side, p, p, -1)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (N, C, side, p, side, p)
    return x.reshape(n, -1, side * p, side * p)


# ---- 2. The network: a random token subset after two mixing blocks (Sec. 5.1)
def sample_token_subset(scores: Tensor, mask_ratio: float) -> Tensor:
    """Uniform random scores (N, T) -> ids_keep (N, K): of each image, the K lowest."""
    len_keep = max(1, round((1 - mask_ratio) * scores.shape[1]))
    return scores.argsort(dim=1)[:, :len_keep]


def gather_tokens(tokens: Tensor, ids_keep: Tensor | None, class_token=False) -> Tensor:
    """Keeps the patches ids_keep (N, K), or all if None: (N, [1+]T, D) -> (N, [1+]K, D)."""
    if ids_keep is None:
        return tokens
    if class_token:  # it is the first token, and stays
        first = torch.zeros_like(ids_keep[:, :1])
        ids_keep = torch.cat([first, ids_keep + 1], dim=1)  # (N, 1+K)
    images = torch.arange(len(tokens), device=tokens.device)[:, None]  # (N, 1)
    return tokens[images, ids_keep]


# What a network returns; extra is for what the losses of a fork need.
SiTOutput = namedtuple("SiTOutput", "v v_cls z_pred extra", defaults=[None])


class SiT(nn.Module):
    """SiT with REG's class token, mixing blocks, a mask, and REPA's projector.

    Section 3 tells why a network that predicts velocities can generate images.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.patch_size = config.patch_size
        self.num_classes = config.num_classes
        self.class_token = config.class_token
        self.align_depth = config.align_depth
        channels, side, _ = config.latent_shape
        width = config.hidden_size
        heads = config.num_heads

        # The input: a token for each patch, and one vector each for time and label.
        self.x_embedder = PatchEmbed(side, config.patch_size, channels, width)
        self.t_embedder = TimestepEmbedder(width)
        # The last row is the null class. In training it replaces 10% of the labels, so the
        # network learns to do without one, as guidance needs (section 4).
        self.y_embedder = nn.Embedding(config.num_classes + 1, width)
        positions = sincos_pos_embed(width, side // config.patch_size)
        if config.class_token:
            self.cls_embedder = nn.Linear(config.z_dim, width)
            self.cls_norm = nn.LayerNorm(width, eps=1e-6)
            positions = torch.cat([torch.zeros(1, width), positions])
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)

        # NOTE(paper): it does not say what a mixing layer is. We take ordinary blocks. Two
        # add 47.8M parameters to SiT-XL, not the 55M of the paper.
        self.mixer = nn.ModuleList([Block(width, heads) for _ in range(config.mixer_depth)])
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(config.depth)])

        # The output: velocities, and tokens of the teacher's width (h_phi of Eq. 11).
        cls_dim = config.z_dim if config.class_token else None
        self.final_layer = FinalLayer(width, config.patch_size**2 * channels, cls_dim)
        self.projector = None
        if config.align_coeff > 0:
            hidden = config.projector_dim
            layers = [nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden)]
            layers += [nn.SiLU(), nn.Linear(hidden, config.z_dim)]
            self.projector = nn.Sequential(*layers)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        # As DiT: linear layers have Xavier weights and no bias.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # So has the patch embedding, a linear layer that is written as a convolution.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        # Times and labels have small weights.
        nn.init.normal_(self.y_embedder.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # Blocks start as the identity (adaLN-Zero), velocities as zero.
        for layer in [*self.mixer, *self.blocks, self.final_layer]:
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        if self.class_token:
            nn.init.zeros_(self.final_layer.cls_head.weight)

    def embed(self, x, t, y, cls=None) -> tuple[Tensor, Tensor]:
        """Inputs of forward -> all tokens after mixing (N, [1+]T, D), and c (N, 1, D)."""
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        c = c[:, None]  # (N, 1, D): the same for all tokens of an image
        h = self.x_embedder(x)  # (N, T, D)
        if self.class_token:
            first = self.cls_norm(self.cls_embedder(cls))  # (N, D)
            h = torch.cat([first[:, None], h], dim=1)  # (N, 1+T, D)
        h = h + self.pos_embed  # before the mask, so a kept token knows where it belongs
        # Mixing comes before the mask, too. The teacher's tokens know the whole image. A
        # kept token can only match them if it has seen the tokens that will be dropped.
        for block in self.mixer:
            h = block(h, c)
        return h, c

    def forward(self, x, t, y, cls=None, ids_keep=None) -> SiTOutput:
        """The velocities of noisy x (N, C, H, W) at times t (N,) for labels y (N,).

        cls (N, z_dim) is the noisy class token, ids_keep (N, K) the patches that enter the
        blocks. None, as in sampling, lets all enter. That works after training on 75%, since
        attention takes any number of tokens and each knows its position (Tab. 3).
        Returns v (N, K, p*p*C), v_cls (N, z_dim), z_pred (N, [1+]K, z_dim), or None.
        """
        h, c = self.embed(x, t, y, cls)  # (N, [1+]T, D)
        h = gather_tokens(h, ids_keep, self.class_token)  # the mask: (N, [1+]K, D)
        z_pred = None
        for i, block in enumerate(self.blocks, start=1):
            h = block(h, c)
            # NOTE(paper): it does not say where to count from. We leave out the mixing
            # blocks. Only training needs z_pred, so sampling skips the projector.
            if i == self.align_depth and self.training and self.projector is not None:
                z_pred = self.projector(h)  # h_phi(h_a) of Eq. 11
        v, v_cls = self.final_layer(h, c)
        return SiTOutput(v, v_cls, z_pred)


# ---- 3. The objective: flow matching (Eq. 10) and alignment (Eq. 11)
def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t noise: t = 0 is data, t = 1 noise. t has as many axes as x."""
    return (1 - t) * x + t * noise


# Why can a network that predicts velocities generate images?
#   (a) The line x_t = (1 - t) x + t noise joins an image and some noise. A point that
#       moves along it has the velocity noise - x. Lines of other images and other noise
#       cross it, so (x_t, t) does not tell on which line a point is.
#   (b) With a squared error, the network learns the mean velocity of all lines that pass
#       through x_t at time t.
#   (c) Let points follow these means. A point does not stay on its line. But at each time
#       all points together are distributed as the x_t are: as many flow into any region and
#       out of it (continuity equation; Lipman et al., arXiv 2210.02747). So points that
#       start as noise at t = 1 end, at t = 0, distributed as images are.
# Means do not blur the images. At t = 1 the velocity does point to the mean of all images.
# But as t falls, fewer images are compatible with x_t, and their mean sharpens.
def training_losses(model, x, y, z, config: Config, rng: StepRng, ema=None) -> dict:
    """The losses of a batch, as scalars: loss (the weighted sum), denoise, cls, align.

    x (N, C, H, W) are clean latents, y (N,) labels, z (N, 1+T, z_dim) the teacher's tokens,
    class token first, or None. rng.rand and rng.randn are torch.rand and torch.randn, but
    the same for any number of processes (section 10). Forks can learn from ema, the average
    of the weights.
    """
    n = len(x)
    t = rng.rand(n)
    drop_label = rng.rand(n) < config.label_dropout
    y = torch.where(drop_label, config.num_classes, y)  # the null class
    ids_keep = None
    if config.mask_ratio > 0:
        num_tokens = (x.shape[-1] // config.patch_size) ** 2
        ids_keep = sample_token_subset(rng.rand(n, num_tokens), config.mask_ratio)

    noise = rng.randn(*x.shape)
    x_t = add_noise(x, noise, t.view(-1, 1, 1, 1))
    cls_t = None
    if config.class_token:
        # It has the t of x: in sampling, both start as noise and get clean together. Near
        # t = 0 it nearly gives away its own target, as x_t does.
        cls = z[:, 0]  # (N, z_dim)
        cls_noise = rng.randn(*cls.shape)
        cls_t = add_noise(cls, cls_noise, t.view(-1, 1))

    v, v_cls, z_pred, _ = model(x_t, t, y, cls_t, ids_keep)

    # Losses are means over kept tokens: dropped ones are neither predicted nor aligned.
    v_target = patchify(noise - x, config.patch_size)  # d x_t / d t: (N, T, p*p*C)
    v_target = gather_tokens(v_target, ids_keep)  # (N, K, p*p*C)
    denoise = (v - v_target).square().mean()  # Eq. 10, first term
    cls_loss = torch.zeros_like(denoise)
    if config.class_token:
        cls_loss = (v_cls - (cls_noise - cls)).square().mean()  # Eq. 10, second term
    align = torch.zeros_like(denoise)
    if z_pred is not None:
        if not config.class_token:
            z = z[:, 1:]  # (N, T, z_dim)
        z = gather_tokens(z, ids_keep, config.class_token)  # (N, [1+]K, z_dim)
        z_pred = z_pred.to(z.dtype)  # float32, as bfloat16 is too coarse for a cosine
        align = -F.cosine_similarity(z_pred, z, dim=-1).mean()  # Eq. 11
    loss = denoise + config.cls_coeff * cls_loss + config.align_coeff * align
    return dict(loss=loss, denoise=denoise, cls=cls_loss, align=align)


# ---- 4. A sampler: from noise at t = 1 to images at t = 0
def guided_velocity(model, x, t, y, cls, dtype, cfg_scale=1.0, cls_cfg_scale=None):
    """Velocities of x (N, C, H, W) and cls (N, z_dim) or None at time t, in float64.

    A cfg_scale above 1 is classifier-free guidance (arXiv 2207.12598): it multiplies what
    labels change, so images get more typical of their class, and vary less. cls_cfg_scale
    is that of cls (None: the same), dtype that of the model.
    """
    times = torch.full((len(x),), t, dtype=dtype, device=x.device)
    x = x.to(dtype)
    cls = None if cls is None else cls.to(dtype)
    out = model(x, times, y, cls)
    v = out.v.double()
    v_cls = None if cls is None else out.v_cls.double()
    if cfg_scale > 1:
        null = model(x, times, torch.full_like(y, model.num_classes), cls)
        v = null.v + cfg_scale * (v - null.v)
        if cls is not None:
            scale = cfg_scale if cls_cfg_scale is None else cls_cfg_scale
            v_cls = null.v_cls + scale * (v_cls - null.v_cls)
    return unpatchify(v, model.patch_size), v_cls


@torch.no_grad()
def euler_ode(
    model, x, y, cls=None, *, num_steps=50, cfg_scale=1.0, velocity=guided_velocity
) -> Tensor:
    """Follows dx/dt = v, with all tokens, from normal noise x (N, C, H, W), and cls (N, z_dim)
    or None, to latents of the labels y (N,). The papers' sampler, which adds noise in every
    step, is in sample.py.
    """
    dtype = x.dtype
    x = x.double()  # in float32, rounding errors of many small steps would add up
    cls = None if cls is None else cls.double()
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    for t, t_next in itertools.pairwise(times):
        v, v_cls = velocity(model, x, t, y, cls, dtype, cfg_scale)
        x = x + (t_next - t) * v
        if cls is not None:
            cls = cls + (t_next - t) * v_cls
    return x.to(dtype)


# ---- 5. The training loop
def train(
    config, *, build_model=SiT, build_teacher=None, losses=training_losses, sampler=euler_ode
) -> None:
    """Trains until config.steps. A fork passes its own functions in place of these four.

    To stop it, kill it. The same command continues from latest.pt, and ends with the weights
    of a run that nobody stopped (on a GPU, up to rounding).
    """
    # ---- Processes: torchrun starts one for each GPU
    rank, world_size, device = setup_distributed()
    assert config.batch_size % world_size == 0, f"batch_size: take {world_size} times a number"

    # ---- Data and frozen networks
    dataset = FolderImages(config) if config.data else demo_shapes(config.image_size)
    names = tuple(dataset.classes)
    config = replace(config, num_classes=len(names), class_names=names)
    vae = build_vae(config, device)
    teacher = (build_teacher or load_teacher)(config, dataset, device)  # section 7
    if teacher is not None:
        config = replace(config, z_dim=teacher.dim)

    # ---- The network, and its EMA: the running average of its weights generates better
    torch.manual_seed(config.seed)
    model = build_model(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    update_ema = get_ema_multi_avg_fn(config.ema_decay)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0, fused=True)
    parts = dict(model=model, ema=ema, optimizer=optimizer)
    first_step = load_checkpoint(config, parts, rank, world_size)
    if rank == 0:
        os.makedirs(config.out, exist_ok=True)
        some = ", ".join([*names[:3], "..."][: len(names)])
        print(
            f"Training {config.method} ({config.size}) on {world_size} {device.type} process(es): "
            f"{len(dataset)} images of {config.data or 'the demo (no --data)'}, {len(names)} "
            f"classes ({some}), steps {first_step} to {config.steps}, output in {config.out}"
        )
    cuda = device.type == "cuda"
    if config.compile and cuda:
        model.compile()
    ddp_model = model
    if world_size > 1:  # its backward averages the gradients over all processes
        ddp_model = nn.parallel.DistributedDataParallel(model)

    # ---- The loop
    indices = index_batches(config, len(dataset), first_step, rank, world_size)
    how = dict(num_workers=config.workers, pin_memory=cuda)
    batches = iter(DataLoader(dataset, batch_sampler=indices, **how))
    history = []  # stays on the GPU: to read it means to wait for the GPU
    clock = time.time()
    for step in tqdm(range(first_step, config.steps), disable=rank > 0 or None):
        rng = StepRng(config, step, part=rank, parts=world_size, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16 and cuda):
            x, y, z = prepare_batch(next(batches), rng, vae, teacher)
            terms = losses(ddp_model, x, y, z, config, rng, ema)
        optimizer.zero_grad()
        terms["loss"].backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        update_ema(list(ema.parameters()), list(model.parameters()), None)
        terms["grad_norm"] = grad_norm
        history.append({name: value.detach() for name, value in terms.items()})

        done = step + 1
        saves = done % config.save_every == 0 or done == config.steps
        if saves or done % config.log_every == 0:
            write_log(config, done, history, clock, rank, world_size)
            if saves and rank == 0:
                saved = {name: part.state_dict() for name, part in parts.items()}
                saved |= dict(step=done, config=asdict(config))
                save_file(saved, f"{config.out}/latest.pt")
                preview(config, done, ema, vae, sampler, device)
            history = []
            clock = time.time()
    if rank == 0:
        print(f"Done. Generate more: python sample.py {config.out}/latest.pt")


# ======== Part II: what the method needs ========


# ---- 6. Settings
def setting(default, help="", metavar="N", group=None):
    """A field of Config. With help it is a flag, too; group is a heading above it."""
    return field(default=default, metadata=dict(help=help, metavar=metavar, group=group))


@dataclass(frozen=True)
class Config:
    """The settings of a run. The defaults train the paper's SiT-XL/2 (Tab. 7)."""

    method: str = setting("maskalign", "settings of a method", None, group="run")
    size: str = setting("SiT-XL/2", "settings of a network", None)
    data: str = setting("", "images as DIR/class/*.jpg or DIR/train/class/*.jpg", "DIR")
    out: str = setting("", "run folder (default: runs/METHOD-SIZE)", "DIR")
    steps: int = setting(400_000, "train until this step")
    seed: int = setting(0, "decides all random numbers; a GPU also rounds at random")

    class_token: bool = setting(True, "also denoise a class token (REG)", group="method")
    mixer_depth: int = setting(2, "number of mixing blocks (Tab. 7)")
    mask_ratio: float = setting(0.25, "share of the patch tokens to drop (Tab. 7)")
    align_depth: int = setting(8, "align after this block, counted from 1 (Tab. 7)")
    align_coeff: float = setting(0.5, "weight of the alignment loss, lambda (Tab. 7)")
    cls_coeff: float = setting(0.03, "weight of the class token's loss, beta (Tab. 7)")
    label_dropout: float = setting(0.1, "share of labels that become null (Tab. 7)")

    hidden_size: int = setting(1152, "width D (SiT-XL)", group="network")
    depth: int = setting(28, "number of blocks after the mask (SiT-XL)")
    num_heads: int = setting(16, "attention heads (SiT-XL)")
    patch_size: int = setting(2, "pixels of x per side of a patch (SiT)")
    projector_dim: int = setting(2048, "hidden width of the projector (REPA)")

    image_size: int = setting(256, "pixels per side, by ADM's crop (REPA)", group="data")
    vae: str = setting("stabilityai/sd-vae-ft-ema", "name on the hub, file or none", "VAE")
    vae_scale: float = setting(0.18215, "factor of the latents (SD-VAE)")
    teacher: str = setting("vit_base_patch14_dinov2.lvd142m", "of timm; or classifier", "VIT")
    teacher_weights: str = setting("", "file, as timm's or Meta's (default: hub)", "FILE")
    teacher_steps: int = setting(500, "training steps of a classifier as teacher (ours)")
    cache: str = setting("", "folder for latents (default: DATA-latents)", "DIR")
    workers: int = setting(8, "processes that load images, per GPU")

    batch_size: int = setting(256, "images per step, on all GPUs", group="optimizer")
    lr: float = setting(1e-4, "learning rate of AdamW, constant (Tab. 7)")
    grad_clip: float = setting(1.0, "largest norm of the gradient (REG)")
    ema_decay: float = setting(0.9999, "decay of the average of the weights (Tab. 7)")
    bf16: bool = setting(True, "bfloat16 on a GPU (ours; REG: float16)")
    compile: bool = setting(True, "torch.compile on a GPU (ours)")

    log_every: int = setting(100, "steps between lines of the log", group="log")
    save_every: int = setting(5000, "steps between checkpoints and pictures")
    preview_steps: int = setting(25, "sampler steps of the pictures (ours)")

    # From data and teacher; no flags
    num_classes: int = setting(1000)
    class_names: tuple = setting(())
    z_dim: int = setting(768)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x: an image, or a latent, which is 8 times smaller."""
        if self.vae == "none":
            return 3, self.image_size, self.image_size
        return 4, self.image_size // 8, self.image_size // 8


SIZES = {
    "SiT-S/2": dict(hidden_size=384, depth=12, num_heads=6, align_depth=4),
    "SiT-B/2": dict(hidden_size=768, depth=12, num_heads=12, align_depth=4),
    "SiT-L/2": dict(hidden_size=1024, depth=24, num_heads=16, align_depth=8),
    "SiT-XL/2": dict(hidden_size=1152, depth=28, num_heads=16, align_depth=8),
    "demo": dict(hidden_size=96, depth=6, num_heads=3, align_depth=3, projector_dim=256),
}
METHODS = {
    "sit": dict(class_token=False, mixer_depth=0, mask_ratio=0.0, align_coeff=0.0),
    "repa": dict(class_token=False, mixer_depth=0, mask_ratio=0.0),
    "reg": dict(mixer_depth=0, mask_ratio=0.0),
    "maskalign": dict(),
    "repa+maskalign": dict(class_token=False),  # Tab. 1
    "maskalign-no-mixing": dict(mixer_depth=0),  # Tab. 3
    "maskalign-no-masking": dict(mask_ratio=0.0),  # Tab. 3
}
# Without --data: rendered shapes, learned on a laptop in minutes. All values are ours.
DEMO = dict(size="demo", image_size=24, patch_size=4, vae="none", teacher="classifier", workers=0)
DEMO |= dict(batch_size=32, steps=2000, lr=3e-3, ema_decay=0.99, save_every=500)


def make_config(kind: type = Config, **given) -> Config:
    """A config of this kind. The first of these that names a setting decides it:

    1. given, the flags of the command line
    2. the rows of METHODS and SIZES that are asked for
    3. DEMO, unless data is given
    4. the defaults of kind
    """
    for name in given.keys() & {"data", "out", "vae", "teacher_weights", "cache"}:
        given[name] = os.path.expanduser(given[name])  # ~ is the home folder
    demo = {} if given.get("data") else DEMO
    asked = dict(method=kind.method, size=kind.size) | demo | given
    values = demo | getattr(kind, "sizes", SIZES)[asked["size"]]
    if asked["method"] != kind.method:  # whose row the defaults are
        values |= METHODS[asked["method"]]
    c = kind(**(values | given))
    out = c.out or f"runs/{c.method}-{c.size}".replace("/2", "-2")
    cache = c.cache or c.data.rstrip("/") + "-latents"

    unit = c.patch_size * (1 if c.vae == "none" else 8)
    assert c.image_size % unit == 0, f"image_size {c.image_size} is no multiple of {unit}"
    assert 1 <= c.align_depth <= c.depth, f"align_depth {c.align_depth} is not 1 to {c.depth}"
    unit = math.lcm(4, c.num_heads)  # 4, because of the position vectors
    assert c.hidden_size % unit == 0, f"hidden_size {c.hidden_size} is no multiple of {unit}"
    assert 0 <= c.mask_ratio < 1, f"mask_ratio {c.mask_ratio} is not from 0 to below 1"
    return replace(c, out=out, cache=cache)


def parse_config(argv=None, kind: type = Config, doc: str = __doc__) -> Config:
    """The config of a command line, which has a flag for each field with a help text."""
    demo = ", ".join(f"{name} {value}" for name, value in DEMO.items())
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--data DIR] [--method NAME] [--size NAME] [--out DIR] ...",
        description=f"{doc}\nWithout --data: {demo}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    choices = dict(method=METHODS, size=getattr(kind, "sizes", SIZES))
    for item in fields(kind):
        about = item.metadata
        if about.get("group"):
            group = parser.add_argument_group(about["group"])
        if not about.get("help"):
            continue
        flag = dict(type=type(item.default), metavar=about["metavar"])
        flag["choices"] = choices.get(item.name)
        if isinstance(item.default, bool):
            flag = dict(action=argparse.BooleanOptionalAction)
        text = f"{about['help']} [{item.default}]".replace(" []", "")
        group.add_argument(f"--{item.name}", help=text, **flag)
    return make_config(kind, **vars(parser.parse_args(argv)))


# ---- 7. The teacher
class ViTTeacher(nn.Module):
    """A timm ViT: images uint8 (N, 3, H, W) -> z (N, 1+T, z_dim), class token first."""

    def __init__(self, vit: nn.Module, mean: tuple, std: tuple):
        super().__init__()
        self.vit = vit
        self.dim = vit.num_features
        mean_std = torch.tensor([mean, std], dtype=torch.float64)
        self.register_buffer("mean_std", mean_std.view(2, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        dtype = self.vit.cls_token.dtype
        mean, std = self.mean_std.to(dtype)
        x = (images.to(dtype) / 255 - mean) / std  # before resizing, as REPA
        x = F.interpolate(x, self.vit.patch_embed.img_size, mode="bicubic")
        tokens = self.vit.forward_features(x)
        patches = tokens[:, self.vit.num_prefix_tokens :]  # leaves out register tokens
        return torch.cat([tokens[:, :1], patches], dim=1).to(dtype)


def load_teacher(config: Config, dataset: Dataset, device) -> ViTTeacher | None:
    """The frozen teacher, or None for a method that has none."""
    if not config.class_token and config.align_coeff == 0:
        return None
    side = config.latent_shape[1] // config.patch_size
    if config.teacher == "classifier":
        return train_classifier(config, dataset, side).to(device)
    # timm reads its own names and Meta's, and refuses a DINOv2 without one of its tensors. It
    # is less strict with ViTs that were published as classifiers.
    source = dict(file=config.teacher_weights) if config.teacher_weights else None
    vit = timm.create_model(
        config.teacher, pretrained=True, pretrained_cfg_overlay=source, num_classes=0
    )
    assert vit.cls_token is not None, f"teacher {config.teacher} has no class token"
    # It sees the image at a size at which it has exactly our T patches.
    size = side * vit.patch_embed.patch_size[0]
    vit.set_input_size((size, size))
    teacher = ViTTeacher(vit, vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"])
    return teacher.to(device).eval().requires_grad_(False)


def train_classifier(config: Config, dataset: Dataset, side: int) -> ViTTeacher:
    """The demo's teacher: a tiny ViT that learns to tell the classes apart."""
    torch.manual_seed(config.seed)
    tiny = dict(patch_size=4, embed_dim=64, depth=2, num_heads=4)
    vit = timm.models.VisionTransformer(4 * side, num_classes=config.num_classes, **tiny)
    teacher = ViTTeacher(vit, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same sums, and so the same teacher, in every process
    for _ in tqdm(range(config.teacher_steps), "training the teacher", disable=None):
        ids = torch.randint(len(dataset), (64,)).tolist()
        batch = default_collate([dataset[i] for i in ids])
        z = teacher(batch["image"])
        logits = vit.head(z[:, 0] + z[:, 1:].mean(dim=1))
        optimizer.zero_grad()
        F.cross_entropy(logits, batch["label"]).backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return teacher.eval().requires_grad_(False)


# ---- 8. Latents
def build_vae(config: Config, device):
    """The frozen SD-VAE, in float32 (TF32 on a GPU), or None where x is the image."""
    if config.vae == "none":
        return None
    import sample  # not above, as sample.py imports this file

    return sample.load_vae(config.vae, config.vae_scale, device)


def decode_latents(vae, x: Tensor) -> Tensor:
    """x (N, C, h, w) -> images uint8 (N, 3, H, W), truncated, not rounded, as REPA."""
    images = x.float() / 2 if vae is None else vae.decode(x.float() / vae.scale)
    return (255 * (images + 1) / 2).clamp(0, 255).to(torch.uint8)


def latent_file(config: Config, path: str) -> str:
    """The file that keeps the latent of an image; its name depends on all that counts."""
    key = [os.path.relpath(path, config.data), config.image_size, config.vae]
    for file in (path, config.vae):
        if os.path.exists(file):
            key += [os.path.getsize(file), os.path.getmtime(file)]
    return f"{config.cache}/{hashlib.sha256(repr(key).encode()).hexdigest()}.pt"


@torch.no_grad()
def prepare_batch(batch: dict, rng: StepRng, vae, teacher) -> tuple:
    """What the loader gives -> latents x (N, C, h, w), labels y (N,), the teacher's z."""
    images = batch["image"].to(rng.device, non_blocking=True)
    y = batch["label"].to(rng.device, non_blocking=True)
    z = None if teacher is None else teacher(images)
    if vae is None:
        return 2 * (images / 127.5 - 1), y, z  # the variance is about 1, as for latents

    mean_std = batch["mean_std"]  # (N, 2C, h, w), NaN where no latent is kept yet
    missing = mean_std.isnan().flatten(1).any(dim=1)
    if missing.any():
        # All images are encoded, since a smaller batch would be rounded differently.
        encoded = vae.encode(images / 127.5 - 1).half().cpu()
        for i in missing.nonzero().flatten().tolist():
            mean_std[i] = encoded[i]
            save_file(encoded[i].clone(), batch["latent_file"][i])
    mean, std = mean_std.to(rng.device, non_blocking=True).float().chunk(2, dim=1)
    return vae.scale * (mean + std * rng.randn(*mean.shape)), y, z


# ---- 9. Data
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF"]  # others may start programs
SHAPES = {  # signed distance of (x, y) from the outline, negative inside; y points down
    "disc": lambda x, y: x.hypot(y) - 0.9,
    "square": lambda x, y: x.abs().maximum(y.abs()) - 0.78,
    "triangle": lambda x, y: y.maximum(0.87 * x.abs() - 0.5 * y) - 0.5,
    "flower": lambda x, y: x.hypot(y) - 0.7 - 0.25 * (5 * x.atan2(-y)).cos(),
    "cross": lambda x, y: (x.abs().minimum(y.abs()) - 0.3).maximum(x.hypot(y) - 0.95),
    "ring": lambda x, y: (x.hypot(y) - 0.7).abs() - 0.22,
    "crescent": lambda x, y: (x.hypot(y) - 0.95).maximum(0.8 - (x - 0.5).hypot(y)),
    "heart": lambda x, y: x.hypot(0.15 - y - 0.65 * x.abs().sqrt()) - 0.85,
}


def demo_shapes(size: int, count: int = 8192) -> Dataset:
    """Renders images uint8 (3, size, size) of shapes; image i has the class i % 8."""
    rand = functools.partial(torch.rand, generator=seeded("cpu", "shapes"))
    radius = size * (0.32 + 0.08 * rand(count, 1, 1))
    center_x = size * (0.45 + 0.1 * rand(count, 1, 1))
    center_y = size * (0.45 + 0.1 * rand(count, 1, 1))
    background = 0.4 * rand(count, 3, 1, 1)  # darker than every shape
    color = 0.45 + 0.55 * rand(count, 3, 1, 1)

    pixels = torch.arange(size) + 0.5
    x = (pixels - center_x) / radius  # (count, 1, size)
    y = (pixels[:, None] - center_y) / radius  # (count, size, 1)
    labels = torch.arange(count) % len(SHAPES)
    inside = torch.empty(count, 1, size, size)
    for label, distance in enumerate(SHAPES.values()):
        ids = labels == label
        in_pixels = distance(x[ids], y[ids]) * radius[ids]
        inside[ids, 0] = (0.5 - in_pixels).clamp(0, 1)  # the edge is one pixel wide
    images = (255 * torch.lerp(background, color, inside)).to(torch.uint8)
    dataset = StackDataset(image=images, label=labels)
    dataset.classes = list(SHAPES)
    return dataset


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve while twice too large, resize the short side to size, cut."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class FolderImages(ImageFolder):
    """The images of DIR/class/ or DIR/train/class/, as dicts for prepare_batch."""

    def __init__(self, config: Config):
        self.config = config
        self.folder = Path(config.data)
        if any(self.folder.glob("train/[!.]*/")):
            self.folder = self.folder / "train"
        lists = [*self.folder.glob("dataset.json"), *self.folder.glob("*/dataset.json")]
        assert not lists, f"{lists[0]} is not read: give each class a folder of its own"
        super().__init__(self.folder, is_valid_file=self.is_image)

    def find_classes(self, directory) -> tuple[list, dict]:
        names = [name for name in super().find_classes(directory)[0] if name[0] != "."]
        return names, {name: label for label, name in enumerate(names)}

    def is_image(self, path: str) -> bool:
        """Leaves out what is hidden, or lies behind a link inside of a class folder."""
        inner = Path(path).relative_to(self.folder)
        hidden = any(part.startswith(".") for part in inner.parts)
        linked = any((self.folder / parent).is_symlink() for parent in inner.parents[:-2])
        return inner.suffix.lower() in IMG_EXTENSIONS and not hidden and not linked

    def __getitem__(self, i: int) -> dict:
        path, label = self.samples[i]
        try:
            image = Image.open(path, formats=IMAGE_FORMATS).convert("RGB")
        except Exception as error:
            raise OSError(f"cannot read the image {path}: {error}") from error
        crop = center_crop(image, self.config.image_size)
        item = dict(image=pil_to_tensor(crop), label=label)
        if self.config.vae != "none":
            c, h, w = self.config.latent_shape
            file = latent_file(self.config, path)
            kept = os.path.exists(file)
            mean_std = torch.load(file) if kept else torch.full((2 * c, h, w), math.nan).half()
            item |= dict(latent_file=file, mean_std=mean_std)
        return item


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> list:
    """The order of count images in an epoch."""
    return torch.randperm(count, generator=seeded("cpu", "order", seed, epoch)).tolist()


def index_batches(config: Config, count: int, first_step: int, rank: int, world_size):
    """Yields, for each step from first_step on, the indices of this process's images."""
    n = config.batch_size // world_size
    for step in range(first_step, config.steps):
        start = step * config.batch_size + rank * n
        places = range(start, start + n)
        yield [epoch_order(config.seed, i // count, count)[i % count] for i in places]


# ---- 10. Processes, random numbers, checkpoints, log
def setup_distributed() -> tuple:
    """Rank, number of processes, and device, as torchrun sets them."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world_size, device


def seeded(device, *key) -> torch.Generator:
    """A random generator that the key decides, so no state has to be saved."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


class StepRng:
    """The random numbers of a step, for one of the equal parts of its batch.

    It makes those of all parts and returns the n rows of this one. So an image has the same
    noise and mask for any number of processes.
    """

    def __init__(self, config: Config, step: int, part=0, parts=1, device="cpu"):
        self.step = step
        self.part = part
        self.parts = parts
        self.device = device
        self.on = dict(device=device, generator=seeded(device, "step", config.seed, step))

    def rand(self, n: int, *shape: int) -> Tensor:
        return torch.rand(n * self.parts, *shape, **self.on).chunk(self.parts)[self.part]

    def randn(self, n: int, *shape: int) -> Tensor:
        return torch.randn(n * self.parts, *shape, **self.on).chunk(self.parts)[self.part]


def save_file(value, path: str) -> None:
    """torch.save to a file beside path, then renamed: a kill never leaves half a file."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    beside = f"{path}.{os.getpid()}.tmp"  # another process uses another
    torch.save(value, beside)
    os.replace(beside, path)


def load_checkpoint(config: Config, parts: dict, rank: int, world_size: int) -> int:
    """Loads latest.pt of the run folder, where there is one. Returns its step, or 0."""
    path = f"{config.out}/latest.pt"
    step = 0
    if os.path.exists(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        step = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        parts["optimizer"].param_groups[0]["lr"] = config.lr  # not the one of then
        for name, value in asdict(config).items():
            before = saved["config"].get(name)
            if before != value and rank == 0:
                print(f"changed since the last run: {name} {before} -> {value}")
    found = [step] * world_size
    if world_size > 1:
        dist.all_gather_object(found, step)
    assert len(set(found)) == 1, f"steps {found} in {path}, which all must share"
    return step


def write_log(config, step: int, history: list, clock: float, rank, world_size) -> None:
    """A line of the log: means over all steps in history and over all processes."""
    rows = torch.stack([torch.stack(list(terms.values())) for terms in history])
    means = rows.mean(dim=0)
    if world_size > 1:
        dist.all_reduce(means)
        means = means / world_size
    line = dict(zip(history[0], means.tolist(), strict=True))  # waits for the GPU
    line["images_per_s"] = config.batch_size * len(history) / (time.time() - clock)
    assert all(map(math.isfinite, line.values())), f"step {step}: {line}, lower --lr"
    if rank == 0:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in line.items())
        tqdm.write(f"step {step}, {shown}")
        with open(f"{config.out}/log.jsonl", "a") as file:
            file.write(json.dumps(dict(step=step) | line) + "\n")


def preview(config: Config, step: int, ema, vae, sampler, device) -> None:
    """Generates 8 images each of 8 classes, always from the same noise."""
    rng = StepRng(config, step="preview", device=device)
    x = rng.randn(64, *config.latent_shape)
    cls = rng.randn(64, config.z_dim) if config.class_token else None
    y = torch.arange(64, device=device) // 8 * config.num_classes // 8  # evenly spread
    x = sampler(ema, x, y, cls, num_steps=config.preview_steps, cfg_scale=2.0)
    images = decode_latents(vae, x).cpu() / 255
    images = F.interpolate(images, scale_factor=max(1, 96 // config.image_size))
    path = f"{config.out}/samples-{step:07d}.png"
    torchvision.utils.save_image(images, path, nrow=8, pad_value=1.0)
    tqdm.write(f"generated images: {path}")


def main(train=train, kind: type = Config, doc: str = __doc__) -> None:
    """The command line. A fork passes its own train, Config and docstring."""
    train(parse_config(kind=kind, doc=doc))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
