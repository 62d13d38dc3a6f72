"""MaskAlign: a diffusion transformer, aligned with DINOv2 on a random subset of tokens.

An unofficial implementation of Pang et al., arXiv 2606.08788, in one file.

A diffusion transformer learns to turn noise into images. It learns faster when its hidden
tokens are pulled towards those of DINOv2, a frozen network that understands images. REPA
does this for each patch. REG also feeds in DINOv2's class token, one vector for the whole
image, and denoises it with the patches. MaskAlign adds a mask: in training, most blocks
see a random 75% of the tokens.

In the paper, a step takes 12% less time than REG's, and the same FID needs fewer steps.
How can losing tokens help? With all of them, alignment pulls hardest (by the norm of its
gradient) at the same positions in image after image. The paper sees a sign that tokens
rely on certain others. If any may be missing, none can be relied on, as with dropout.

One training step:
  1. The teacher, DINOv2, reads the clean image and returns z: a class token, and a token
     for each patch. A frozen autoencoder turns the image into x, a latent of 1/8 its
     height and width. (In the demo x is the image, and the teacher a tiny classifier.)
  2. x and the class token are mixed with normal noise, x_t = (1 - t) x + t noise, at a
     random time t: t = 0 is data, t = 1 is noise.
  3. x_t is cut into as many patches, a token each. All pass two mixing blocks, ordinary
     transformer blocks that know t and the image's label y, and learn of each other.
  4. A random 25% of the patch tokens are dropped. The class token always stays.
  5. The other blocks see the kept tokens, t and y. For each token they predict its part
     of `noise - x`, the velocity of x_t (Eq. 10; section 3 tells why).
  6. After block `align_depth`, a projector maps the kept tokens to the teacher's width.
     The results are pulled towards the teacher's tokens (Eq. 11).
So the class token is noised, its velocity is predicted, and it is aligned. To
generate images no teacher is needed and no token is dropped. The class token starts as
noise, like x, and is thrown away at the end.

  python maskalign.py  # the demo: minutes on a laptop
  torchrun --nproc_per_node=8 maskalign.py --data IMAGENET  # the paper's run

Part I is the method. Part II is what it needs; skip it on a first reading. A fork (in
tests/forks/) is a program that imports this file and passes its own functions to `train`.

In shapes: N images, T patches of an image, K kept patches, D width, z_dim width of the
teacher, C channels, p pixels per side of a patch. [1+]T is 1 + T with a class token.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import time
from collections import namedtuple
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import Attention, GELUTanh, Mlp, PatchEmbed
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, StackDataset, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm


# ======== Part I: the method ========
# ---- 1. Building blocks of SiT (arXiv 2401.08740): DiT (2212.09748) for velocities
class TimestepEmbedder(nn.Module):
    """Times t (...) in [0, 1] -> vectors (..., D): cosines and sines, then an MLP.

    They were made for t up to 1000 (DiT). SiT's published weights expect t in [0, 1].
    """

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        i = torch.arange(128, device=t.device)
        frequencies = torch.exp(-math.log(10000.0) * i / 128)
        angles = t.float()[..., None] * frequencies  # (..., 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)  # (..., 256)
        # In float32, as close times look the same in bfloat16.
        with torch.autocast(t.device.type, enabled=False):
            return self.mlp(waves.to(self.mlp[0].weight.dtype))


def sincos_pos_embed(dim: int, side: int) -> Tensor:
    """Fixed position vectors (side * side, dim): half for the column, half for the row."""
    i = torch.arange(dim // 4).double()
    frequencies = 10000.0 ** (-i / (dim // 4))
    angles = torch.arange(side).double()[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, dim / 2)
    columns = line.repeat(side, 1)  # (side * side, dim / 2)
    rows = line.repeat_interleave(side, dim=0)  # (side * side, dim / 2)
    return torch.cat([columns, rows], dim=-1).float()


class Block(nn.Module):
    """A transformer block: any number of tokens h (N, any, D), condition c (N, 1, D).

    c comes from time and label. It scales and shifts what enters attention and MLP, and
    gates what they add. SiT sets all of that to zero at first (adaLN-Zero), so that a block
    starts as the identity.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, h, c):
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

    def forward(self, h, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        h = self.norm_final(h) * (1 + scale) + shift
        if self.cls_head is None:
            return self.linear(h), None
        return self.linear(h[:, 1:]), self.cls_head(h[:, 0])


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(N, C, H, W) -> (N, T, p*p*C): patches row after row, channels varying fastest."""
    n, channels, height, width = x.shape
    p = patch_size
    x = x.reshape(n, channels, height // p, p, width // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (N, H/p, W/p, p, p, C)
    return x.reshape(n, -1, p * p * channels)


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
    """Uniform random scores (N, T) -> ids_keep (N, K): the K lowest of each image."""
    len_keep = max(1, round((1 - mask_ratio) * scores.shape[1]))
    return scores.argsort(dim=1)[:, :len_keep]


def gather_tokens(tokens: Tensor, ids_keep: Tensor | None, class_token=False) -> Tensor:
    """Keeps the patches ids_keep (N, K), or all: (N, [1+]T, D) -> (N, [1+]K, D)."""
    if ids_keep is None:
        return tokens
    if class_token:  # it is the first token, and stays
        first = torch.zeros_like(ids_keep[:, :1])
        ids_keep = torch.cat([first, ids_keep + 1], dim=1)  # (N, 1+K)
    rows = torch.arange(len(tokens), device=tokens.device)[:, None]  # (N, 1)
    return tokens[rows, ids_keep]


# extra is for what forks return; here it is None.
SiTOutput = namedtuple("SiTOutput", "v v_cls z_pred extra", defaults=[None])


class SiT(nn.Module):
    """SiT, and if asked for, class token (REG), mixing blocks and projector (REPA)."""

    def __init__(self, config: Config):
        super().__init__()
        self.patch_size = config.patch_size
        self.num_classes = config.num_classes
        self.class_token = config.class_token
        self.align_depth = config.align_depth
        channels, pixels, _ = config.latent_shape
        width = config.hidden_size
        heads = config.num_heads

        # The input: a token for each patch, and one vector each for time and label.
        self.x_embedder = PatchEmbed(pixels, config.patch_size, channels, width)
        self.t_embedder = TimestepEmbedder(width)
        # The last row is the null class. It replaces 10% of the labels in training, so the
        # network also learns velocities without label, for guidance (section 4).
        self.y_embedder = nn.Embedding(config.num_classes + 1, width)
        positions = sincos_pos_embed(width, pixels // config.patch_size)
        if config.class_token:
            self.cls_embedder = nn.Linear(config.z_dim, width)
            self.cls_norm = nn.LayerNorm(width, eps=1e-6)  # as REG
            positions = torch.cat([torch.zeros(1, width), positions])
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)

        # NOTE(paper): it does not say what a mixing layer is. We add ordinary blocks.
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

    def initialize_weights(self):
        # As DiT: linear layers have Xavier weights and biases of zero.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch embedding, too: it is a linear layer written as a convolution.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # a view
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

    def embed(self, x, t, y, cls=None):
        """Inputs of forward -> all tokens after mixing (N, [1+]T, D), and c (N, 1, D)."""
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        c = c[:, None]  # (N, 1, D): the same for all tokens of an image
        h = self.x_embedder(x)  # (N, T, D)
        if self.class_token:
            first = self.cls_norm(self.cls_embedder(cls))  # (N, D)
            h = torch.cat([first[:, None], h], dim=1)  # (N, 1+T, D)
        # Positions are added before the mask, so a kept token knows where it belongs.
        h = h + self.pos_embed
        # Mixing comes before the mask, too: a kept token is to match a teacher that saw the
        # whole image, which is easier if it saw the tokens that will be dropped.
        for block in self.mixer:
            h = block(h, c)
        return h, c

    def forward(self, x, t, y, cls=None, ids_keep=None) -> SiTOutput:
        """The velocities of noisy x (N, C, H, W) at times t (N,) for labels y (N,).

        cls (N, z_dim) is the noisy class token, ids_keep (N, K) the patches that enter the
        blocks. None, as in sampling, lets all enter: attention takes any number of tokens,
        and each knows its position. In the paper, images are better if the network was
        trained with the mask than without (Tab. 3). Returns v (N, K, p*p*C), v_cls
        (N, z_dim) or None without class token, and z_pred (N, [1+]K, z_dim) in training.
        """
        h, c = self.embed(x, t, y, cls)  # (N, [1+]T, D)
        h = gather_tokens(h, ids_keep, self.class_token)  # the mask: (N, [1+]K, D)
        z_pred = None
        for i, block in enumerate(self.blocks, start=1):
            h = block(h, c)
            # NOTE(paper): it does not say where to count from. We skip the mixing blocks.
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
#       moves along it has the velocity noise - x. For t > 0, every image x has a noise
#       that gives this x_t: (x_t - (1 - t) x) / t, be it probable or not. So x_t and t do
#       not tell on which line a point is.
#   (b) With a squared error, the network learns the mean velocity of all these lines,
#       weighted by their probability.
#   (c) Let points follow these means. A point does not stay on its line. But the net flow
#       through a surface, density times mean velocity, is that of points on their lines.
#       So at each t, both are distributed alike (continuity equation; Lipman et al.,
#       arXiv 2210.02747): points that start as noise at t = 1 arrive as images at t = 0.
# Does a mean not blur the images? At t = 1 the way back, -v, does point to the mean of
# all images. But as t falls, fewer images are probable, and their mean sharpens.
def training_losses(model, x, y, z, config: Config, rng: StepRng, ema=None) -> dict:
    """The losses of a batch, as scalars: loss (the weighted sum), denoise, cls, align.

    x (N, C, H, W) are clean latents, y (N,) labels, z (N, 1+T, z_dim) the tokens of the
    teacher, class token first, or None. rng.rand and rng.randn are torch's, but do not
    depend on the number of processes (section 10). ema is for forks.
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
        # x and cls have one t: in sampling, both start as noise and get clean together.
        # So near t = 0, cls_t nearly is the target of its own alignment, as in REG.
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
    """Velocities of x (N, C, H, W) and class token cls (N, z_dim) or None at time t.

    With a cfg_scale w > 1 they are v_null + w (v - v_null), v_null without label: images
    are more typical of the label, and vary less (classifier-free guidance, arXiv
    2207.12598). cls may have its own scale. The model computes in dtype, else float64.
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
    """Euler's method for dx/dt = v: normal noise x (N, C, H, W) and cls (N, z_dim) or None,
    labels y (N,) -> latents. The papers' sampler, an SDE, is in sample.py."""
    dtype = x.dtype
    x = x.double()
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

    To stop it, kill it. The same command continues from latest.pt, and ends with the
    weights of an undisturbed run (on a GPU, up to rounding).
    """
    # ---- Processes: torchrun starts one per GPU, with rank 0 to world_size - 1
    rank, world_size, device = setup_distributed()
    assert config.batch_size % world_size == 0, f"batch_size is no multiple of {world_size}"

    # ---- Data and frozen networks
    dataset = FolderImages(config) if config.data else demo_shapes(config.image_size)
    names = tuple(dataset.classes)
    config = replace(config, num_classes=len(names), class_names=names)
    vae = build_vae(config, device)
    build_teacher = build_teacher or load_teacher  # defined below
    teacher = build_teacher(config, dataset, device)
    if teacher is not None:
        config = replace(config, z_dim=teacher.dim)

    # ---- The network, and the running average of its weights (EMA), for sampling
    torch.manual_seed(config.seed)
    model = build_model(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    update_ema = get_ema_multi_avg_fn(config.ema_decay)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0, fused=True)
    stateful = dict(model=model, ema=ema, optimizer=optimizer)
    first_step = load_checkpoint(config, stateful, rank, world_size)
    if rank == 0:
        os.makedirs(config.out, exist_ok=True)
        print(
            f"Training {config.method} ({config.size}) on {world_size} x {device.type}: "
            f"{len(dataset)} images of {config.data or 'the demo (no --data)'}, "
            f"{len(names)} classes ({', '.join(names[:3])} ...), "
            f"steps {first_step} to {config.steps}, output in {config.out}"
        )
    cuda = device.type == "cuda"
    if config.compile and cuda:
        model.compile()
    ddp_model = model
    if world_size > 1:  # backward then averages the gradients of all processes
        ddp_model = nn.parallel.DistributedDataParallel(model)

    # ---- The loop
    indices = index_batches(config, len(dataset), first_step, rank, world_size)
    how = dict(num_workers=config.workers, pin_memory=cuda)
    batches = iter(DataLoader(dataset, batch_sampler=indices, **how))
    history = []  # stays on the GPU, since reading it waits for the GPU
    clock = time.time()
    for step in tqdm(range(first_step, config.steps), disable=None if rank == 0 else True):
        rng = StepRng(config, step, part=rank, parts=world_size, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16 and cuda):
            x, y, z = prepare_batch(next(batches), rng, vae, teacher)
            terms = losses(ddp_model, x, y, z, config, rng, ema)
        optimizer.zero_grad()
        terms["loss"].backward()
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        update_ema(list(ema.parameters()), list(model.parameters()), None)  # None: unused
        terms["grad_norm"] = grad_norm
        history.append({name: value.detach() for name, value in terms.items()})

        done = step + 1
        saves = done % config.save_every == 0 or done == config.steps
        if saves or done % config.log_every == 0:
            write_log(config, done, history, clock, rank, world_size)
            if saves and rank == 0:
                saved = {name: part.state_dict() for name, part in stateful.items()}
                saved |= dict(step=done, config=asdict(config))
                save_file(saved, f"{config.out}/latest.pt")
                preview(config, done, ema, vae, sampler, device)
            history = []
            clock = time.time()
    if rank == 0:
        print(f"Done. Generate more: python {config.sample_with} {config.out}/latest.pt")


# ======== Part II: what the method needs ========
# ---- 6. Settings
def setting(default, help="", metavar="N", group=None):
    """A field of Config. With help it is a flag; group is a heading above it."""
    return field(default=default, metadata=dict(help=help, metavar=metavar, group=group))


@dataclass(frozen=True)
class Config:
    """The settings of a run. The defaults are the paper's SiT-XL/2 (Tab. 7)."""

    data: str = setting("", "images, DIR/class/* or DIR/train/class/*", "DIR", group="run")
    method: str = setting("maskalign", "row of METHODS", metavar=None)
    size: str = setting("SiT-XL/2", "row of SIZES", metavar=None)
    out: str = setting("", "run folder (default: runs/METHOD-SIZE)", "DIR")
    steps: int = setting(400_000, "train until this step")
    seed: int = setting(0, "random seed")

    label_dropout: float = setting(0.1, "share of null labels (Tab. 7)", group="method")
    class_token: bool = setting(True, "also denoise a class token (REG)")
    mixer_depth: int = setting(2, "number of mixing blocks (Tab. 7)")
    mask_ratio: float = setting(0.25, "share of patches to drop (Tab. 7)")
    align_depth: int = setting(8, "align after this block, from 1 (Tab. 7)")
    align_coeff: float = setting(0.5, "weight of the alignment loss, lambda (Tab. 7)")
    cls_coeff: float = setting(0.03, "weight of the class token's loss, beta (Tab. 7)")

    hidden_size: int = setting(1152, "width D (SiT-XL)", group="network")
    depth: int = setting(28, "number of blocks after the mask (SiT-XL)")
    num_heads: int = setting(16, "attention heads (SiT-XL)")
    patch_size: int = setting(2, "pixels of x per side of a patch (SiT)")
    projector_dim: int = setting(2048, "hidden width of the projector (REPA)")

    image_size: int = setting(256, "pixels per side, after cropping (REPA)", group="data")
    vae: str = setting("stabilityai/sd-vae-ft-ema", "SD-VAE: hub name, file, or none", "NAME")
    vae_scale: float = setting(0.18215, "factor of the latents (SD-VAE)")
    teacher: str = setting("vit_base_patch14_dinov2.lvd142m", "name in timm, or classifier", "NAME")
    teacher_weights: str = setting("", "file of timm or Meta (default: hub)", "FILE")
    teacher_steps: int = setting(500, "steps to train a classifier (ours)")
    cache: str = setting("", "folder for latents (default: DATA-latents)", "DIR")
    workers: int = setting(8, "loader processes per GPU")

    batch_size: int = setting(256, "images per step, on all GPUs", group="optimizer")
    lr: float = setting(1e-4, "learning rate of AdamW (Tab. 7)")
    grad_clip: float = setting(1.0, "largest gradient norm (REG)")
    ema_decay: float = setting(0.9999, "decay of the average of weights (Tab. 7)")
    bf16: bool = setting(True, "bfloat16 on a GPU (ours)")
    compile: bool = setting(True, "torch.compile on a GPU (ours)")

    log_every: int = setting(100, "steps between log lines", group="log")
    save_every: int = setting(5000, "steps between checkpoints and pictures")
    preview_steps: int = setting(25, "sampler steps of the picture (ours)")

    # Filled in by data, teacher or a fork
    num_classes: int = setting(1000)
    class_names: tuple = setting(())
    z_dim: int = setting(768)
    sample_with: str = setting("sample.py")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x: an image, or a latent, 8 times smaller."""
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
METHODS = {  # of the papers; the last three from Tab. 1 and 3
    "sit": dict(class_token=False, mixer_depth=0, mask_ratio=0.0, align_coeff=0.0),
    "repa": dict(class_token=False, mixer_depth=0, mask_ratio=0.0),
    "reg": dict(mixer_depth=0, mask_ratio=0.0),
    "maskalign": dict(),
    "repa+maskalign": dict(class_token=False),
    "maskalign-no-mixing": dict(mixer_depth=0),
    "maskalign-no-masking": dict(mask_ratio=0.0),
}
# Without --data: rendered shapes, learned in minutes.
DEMO = dict(size="demo", image_size=24, patch_size=4, vae="none", teacher="classifier", workers=0)
DEMO |= dict(batch_size=32, steps=2000, lr=3e-3, ema_decay=0.99, save_every=500)


def make_config(kind: type = Config, **given) -> Config:
    """A config of this kind. The first of these that names a setting decides it:

    1. given, as the flags of the command line
    2. the rows of METHODS and SIZES
    3. DEMO, unless data is given
    4. the defaults of kind
    """
    for name in given.keys() & {"data", "out", "vae", "teacher_weights", "cache"}:
        given[name] = os.path.expanduser(given[name])  # ~ is the home folder
    demo = {} if given.get("data") else DEMO
    asked = dict(method=kind.method, size=kind.size) | demo | given
    sizes = getattr(kind, "sizes", SIZES)  # a fork may have sizes of its own
    methods = {kind.method: {}} | METHODS  # the own method of a fork has no row
    rows = sizes[asked["size"]] | methods[asked["method"]]
    c = kind(**(demo | rows | given))
    out = c.out or f"runs/{c.method}-{c.size}".replace("/2", "-2")
    cache = c.cache or c.data.rstrip("/") + "-latents"
    unit = c.patch_size * (1 if c.vae == "none" else 8)
    assert c.image_size % unit == 0, f"image_size {c.image_size} is no multiple of {unit}"
    assert 1 <= c.align_depth <= c.depth, f"align_depth {c.align_depth} of {c.depth} blocks"
    unit = math.lcm(4, c.num_heads)  # 4 for sincos_pos_embed
    assert c.hidden_size % unit == 0, f"hidden_size {c.hidden_size} is no multiple of {unit}"
    assert 0 <= c.mask_ratio < 1, f"mask_ratio {c.mask_ratio} is not in [0, 1)"
    return replace(c, out=out, cache=cache)


def parse_config(argv=None, kind: type = Config, doc: str = __doc__) -> Config:
    """The config of a command line, with a flag for each field with help."""
    demo = ", ".join(f"{name} {value}" for name, value in DEMO.items())
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--help] [--data DIR] [--out DIR] ...",
        description=f"{doc}\nWithout --data: {demo}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # returns only what is given
        allow_abbrev=False,
    )
    choices = dict(method=METHODS, size=getattr(kind, "sizes", SIZES))
    for item in fields(kind):
        about = item.metadata
        if about.get("group"):
            group = parser.add_argument_group(about["group"])
        if not about.get("help"):
            continue
        flag = dict(help=f"{about['help']} [{item.default}]".replace(" []", ""))
        if isinstance(item.default, bool):
            flag["action"] = argparse.BooleanOptionalAction
        else:
            flag["type"] = type(item.default)
            flag["metavar"] = about["metavar"]
            flag["choices"] = choices.get(item.name)
        group.add_argument(f"--{item.name}", **flag)
    return make_config(kind, **vars(parser.parse_args(argv)))


# ---- 7. The teacher
class ViTTeacher(nn.Module):
    """A timm ViT: images uint8 (N, 3, H, W) -> z (N, 1+T, z_dim), class token first."""

    def __init__(self, vit, mean, std):
        super().__init__()
        self.vit = vit
        self.dim = vit.num_features
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images):
        x = images.to(self.mean.dtype) / 255
        x = (x - self.mean) / self.std  # before resizing, as REPA
        x = F.interpolate(x, self.vit.patch_embed.img_size, mode="bicubic")
        tokens = self.vit.forward_features(x)
        patches = tokens[:, self.vit.num_prefix_tokens :]  # without registers
        return torch.cat([tokens[:, :1], patches], dim=1).to(x.dtype)


def load_teacher(config: Config, dataset: Dataset, device) -> ViTTeacher | None:
    """The frozen teacher, or None for a method that has none."""
    if not config.class_token and config.align_coeff == 0:
        return None
    side = config.latent_shape[1] // config.patch_size
    if config.teacher == "classifier":
        return train_classifier(config, dataset, side).to(device)
    how = dict(pretrained=True)  # knows Meta's names, too; a missing weight fails
    if config.teacher_weights:
        how["pretrained_cfg_overlay"] = dict(file=config.teacher_weights)
    vit = timm.create_model(config.teacher, **how)
    assert vit.cls_token is not None or not config.class_token, "teacher has no class token"
    # At this size of the image it has exactly our T patches.
    size = side * vit.patch_embed.patch_size[0]
    vit.set_input_size((size, size))
    teacher = ViTTeacher(vit, vit.pretrained_cfg["mean"], vit.pretrained_cfg["std"])
    return teacher.to(device).eval().requires_grad_(False)


def train_classifier(config: Config, dataset: Dataset, side: int) -> ViTTeacher:
    """A tiny ViT that learns to tell the classes."""
    assert config.num_classes > 1, "a classifier needs 2 classes"
    torch.manual_seed(config.seed)
    tiny = dict(patch_size=4, embed_dim=64, depth=2, num_heads=4)
    vit = timm.models.VisionTransformer(4 * side, num_classes=config.num_classes, **tiny)
    teacher = ViTTeacher(vit, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each process trains its own, rounded alike
    for _ in tqdm(range(config.teacher_steps), "training the teacher", disable=None):
        ids = torch.randint(len(dataset), (64,)).tolist()
        batch = default_collate([dataset[i] for i in ids])
        z = teacher(batch["image"])
        logits = vit.head(z[:, 0] + z[:, 1:].mean(dim=1))  # so that patches learn, too
        optimizer.zero_grad()
        F.cross_entropy(logits, batch["label"]).backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return teacher.eval().requires_grad_(False)


# ---- 8. Latents
def build_vae(config: Config, device):
    """The frozen SD-VAE in float32 (encode leaves autocast), or None where x is the image."""
    if config.vae == "none":
        return None
    from sample import load_vae  # here, since sample.py imports this file

    return load_vae(config.vae, config.vae_scale, device)


def decode_latents(vae, x: Tensor) -> Tensor:
    """x (N, C, h, w) -> images uint8 (N, 3, H, W), truncated, not rounded, as REPA."""
    images = x.float() / 2 if vae is None else vae.decode(x.float() / vae.scale)
    return (255 * (images + 1) / 2).clamp(0, 255).to(torch.uint8)


def latent_file(config: Config, path: str) -> str:
    """The file for the latent of an image, named by a hash of what it depends on."""
    key = [os.path.relpath(path, config.data), config.image_size, config.vae]
    for file in filter(os.path.exists, (path, config.vae)):
        key += [os.path.getsize(file), os.path.getmtime(file)]
    return f"{config.cache}/{hashlib.sha256(repr(key).encode()).hexdigest()}.pt"


@torch.no_grad()
def prepare_batch(batch: dict, rng: StepRng, vae, teacher):
    """A batch of the loader -> latents x (N, C, h, w), labels y (N,), the teacher's z."""
    images = batch["image"].to(rng.device, non_blocking=True)
    y = batch["label"].to(rng.device, non_blocking=True)
    z = None if teacher is None else teacher(images)
    if vae is None:
        return 2 * (images / 127.5 - 1), y, z  # variance about 1, as noise has
    # The VAE gives a normal distribution. Mean and std are kept in files, x is sampled anew.
    mean_std = batch["mean_std"]  # (N, 2C, h, w), NaN where there is no file yet
    missing = mean_std.isnan().flatten(1).any(dim=1)
    if missing.any():
        # All are encoded: fewer would be rounded otherwise, and a resumed run differ.
        encoded = vae.encode(images / 127.5 - 1).half().cpu()
        for i in missing.nonzero().flatten().tolist():
            mean_std[i] = encoded[i]
            save_file(encoded[i].clone(), batch["latent_file"][i])
    mean, std = mean_std.to(rng.device, non_blocking=True).float().chunk(2, dim=1)
    return vae.scale * (mean + std * rng.randn(*mean.shape)), y, z


# ---- 9. Data
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF"]  # EPS would run Ghostscript
SHAPES = {  # about the distance of (x, y) from the edge, negative inside; y points down
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
    """Renders images uint8 (3, size, size) of shapes. Image i has the class i % 8."""
    rand = partial(torch.rand, generator=seeded("cpu", "shapes"))
    radius = size * (0.32 + 0.08 * rand(count, 1, 1))
    center = size * (0.45 + 0.1 * rand(2, count, 1, 1))
    background = 0.4 * rand(count, 3, 1, 1)  # darker than all shapes
    color = 0.45 + 0.55 * rand(count, 3, 1, 1)
    pixels = torch.arange(size) + 0.5
    x = (pixels - center[0]) / radius  # (count, 1, size)
    y = (pixels[:, None] - center[1]) / radius  # (count, size, 1)
    labels = torch.arange(count) % len(SHAPES)
    inside = torch.empty(count, 1, size, size)
    for label, shape in enumerate(SHAPES.values()):
        ids = labels == label
        distance = shape(x[ids], y[ids]) * radius[ids]  # in pixels
        inside[ids, 0] = (0.5 - distance).clamp(0, 1)
    images = (255 * torch.lerp(background, color, inside)).to(torch.uint8)
    dataset = StackDataset(image=images, label=labels)
    dataset.classes = list(SHAPES)
    return dataset


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The crop of ADM (arXiv 2105.05233): halve, resize the short side to size, cut."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    image = image.resize((width, height), Image.BICUBIC)
    left = (image.width - size) // 2
    top = (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def list_images(folder: Path) -> list:
    """Paths of images at any depth, without hidden files and linked folders."""
    paths = []
    for place, folders, names in os.walk(folder, onerror=print):
        folders[:] = [name for name in folders if name[0] != "."]
        images = [name for name in names if name.lower().endswith(IMG_EXTENSIONS)]
        paths += [f"{place}/{name}" for name in images if name[0] != "."]
    return sorted(paths)


class FolderImages(Dataset):
    """The images of DIR/class/ or DIR/train/class/, as dicts for prepare_batch."""

    def __init__(self, config: Config):
        self.config = config
        root = Path(config.data)
        if any(root.glob("train/[!.]*/")):
            root = root / "train"
        lists = [*root.glob("dataset.json"), *root.glob("*/dataset.json")]
        assert not lists, f"labels in {lists[0]} are not read: make class folders"
        found = {folder.name: list_images(folder) for folder in sorted(root.glob("[!.]*/"))}
        empty = [name for name, paths in found.items() if not paths]
        assert found and not empty, f"{root} has no classes, or classes without images: {empty}"
        self.classes = list(found)
        self.samples = [(path, i) for i, paths in enumerate(found.values()) for path in paths]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> dict:
        path, label = self.samples[i]
        try:
            image = Image.open(path, formats=IMAGE_FORMATS)
            assert image.mode[0] not in "IF", f"{image.mode} would be clipped to 8 bits"
            image = image.convert("RGB")
        except Exception as error:
            raise OSError(f"{path}: {error}") from error
        crop = center_crop(image, self.config.image_size)
        item = dict(image=pil_to_tensor(crop), label=label)
        if self.config.vae != "none":
            channels, h, w = self.config.latent_shape
            file = latent_file(self.config, path)
            item["latent_file"] = file
            item["mean_std"] = torch.full((2 * channels, h, w), math.nan).half()
            if os.path.exists(file):
                item["mean_std"] = torch.load(file)
        return item


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> list:
    return torch.randperm(count, generator=seeded("cpu", "order", seed, epoch)).tolist()


def index_batches(config: Config, count, first_step, rank, world_size):
    """Yields the image indices of this process, step by step."""
    n = config.batch_size // world_size
    for step in range(first_step, config.steps):
        start = step * config.batch_size + rank * n
        places = range(start, start + n)
        yield [epoch_order(config.seed, i // count, count)[i % count] for i in places]


# ---- 10. Processes, random numbers, checkpoints, log
def setup_distributed() -> tuple:
    """Rank, number of processes and device, from torchrun."""
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
    """A random generator seeded by a hash of key, so no state has to be saved."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


class StepRng:
    """The random numbers of a step. Each process makes those of the whole batch and takes
    its own n rows: an image has the same noise and mask for any number of processes."""

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
    """torch.save beside path, then a rename: a kill never leaves half a file."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    beside = f"{path}.{os.getpid()}.tmp"
    torch.save(value, beside)
    os.replace(beside, path)


def load_checkpoint(config: Config, stateful: dict, rank, world_size) -> int:
    """Loads latest.pt of the run folder, if it is there. Returns its step, or 0."""
    path = f"{config.out}/latest.pt"
    step = 0
    if os.path.exists(path):
        saved = torch.load(path, map_location="cpu")
        step = saved["step"]
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        stateful["optimizer"].param_groups[0]["lr"] = config.lr  # not the saved one
        for name, new in asdict(config).items():
            old = saved["config"].get(name)
            if old != new and rank == 0:
                print(f"changed since then: {name} {old} -> {new}")
    found = [step] * world_size  # becomes the step of each process
    if world_size > 1:
        dist.all_gather_object(found, step)
    assert len(set(found)) == 1, f"steps {found} in {path}, which all must share"
    return step


def write_log(config: Config, step, history, clock, rank, world_size) -> None:
    """A line of the log: means over the steps in history and all processes."""
    rows = torch.stack([torch.stack(list(terms.values())) for terms in history])
    means = rows.mean(dim=0) / world_size
    if world_size > 1:
        dist.all_reduce(means)
    line = dict(zip(history[0], means.tolist(), strict=True))  # waits for the GPU
    line["images_per_s"] = config.batch_size * len(history) / (time.time() - clock)
    assert all(map(math.isfinite, line.values())), f"step {step}: {line}, lower --lr"
    if rank == 0:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in line.items())
        tqdm.write(f"step {step}, {shown}")
        with open(f"{config.out}/log.jsonl", "a") as file:
            file.write(json.dumps(dict(step=step) | line) + "\n")


def preview(config: Config, step, ema, vae, sampler, device) -> None:
    """8 images each of 8 classes, from the same noise every time."""
    rng = StepRng(config, step=-1, device=device)
    x = rng.randn(64, *config.latent_shape)
    cls = rng.randn(64, config.z_dim) if config.class_token else None
    y = (torch.arange(64, device=device) // 8) * config.num_classes // 8  # spread evenly
    scale = 2.0 if config.label_dropout > 0 else 1.0  # guidance needs the null class
    x = sampler(ema, x, y, cls, num_steps=config.preview_steps, cfg_scale=scale)
    images = decode_latents(vae, x).cpu() / 255
    images = F.interpolate(images, scale_factor=max(1, 96 // config.image_size))
    path = f"{config.out}/samples-{step:07d}.png"
    save_image(images, path, nrow=8, pad_value=1.0)
    tqdm.write(f"generated images: {path}")


def main(train=train, kind: type = Config, doc: str = __doc__) -> None:
    """The command line. A fork passes its own train, Config and docstring."""
    train(parse_config(kind=kind, doc=doc))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
