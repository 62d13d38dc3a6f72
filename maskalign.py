"""MaskAlign: token-subset representation alignment for diffusion transformers, in one file.

Paper: Pang et al., arXiv 2606.08788 (2026), published without code. One training step (Sec. 5.1):
  1. A frozen teacher (DINOv2) reads the clean image: a token per patch, and a class token.
  2. Latent x and class token are noised: x_t = (1 - t) x + t noise; t = 0 is data, t = 1 is noise.
  3. All 1 + T tokens pass a light mixing block, so that each knows of the others.
  4. A random 25% of the patch tokens is dropped (none in sampling); the class token stays.
  5. The kept tokens alone pass the transformer and predict the velocity noise - x.     (Eq. 10)
  6. After block `align_depth` they are projected and pulled towards the teacher's.     (Eq. 11)
     loss = mean_kept |v - (noise - x)|^2 + beta |v_cls - (cls_noise - cls)|^2  (means of channels)
            - lambda mean_{cls, kept} cos(projected token, teacher token)
  torchrun --nproc_per_node=1 maskalign.py                    a demo: no GPU, no data, no download
  python maskalign.py --data DIR --size SiT-B/2               one GPU, images as DIR/class/*.jpg
  torchrun --nproc_per_node=8 maskalign.py --data IMAGENET    the paper's run (--prepare first)
Where to look: Tab. 7 is Config; Sec. 5.1 is sample_token_subset and SiT.forward; Eq. 10 and 11
are training_losses; sampling is euler_maruyama; the teacher is ViTTeacher; the loop is train.
"""
import argparse, collections, copy, dataclasses, functools, hashlib, inspect, itertools, json
import math, os, re, signal, sys, time, urllib.request, zipfile
from pathlib import Path
import huggingface_hub, numpy as np, safetensors.torch, timm, torch, torchvision
import torch.nn.functional as F
from PIL import Image, ImageDraw
from timm.layers import Attention, GELUTanh, Mlp, PatchEmbed
from torch import Tensor, distributed as dist, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from tqdm import tqdm

class BadInput(ValueError):
    """What the user can mend; the message is one sentence: the thing, its value, the way out."""

# ---- 1. Settings: one dataclass, and tables whose rows override it (Tab. 7) ----------------------
@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run. Defaults are the paper's main run; the comments become --help."""
    method: str = "maskalign"     # a row of METHODS: class_token to cells
    size: str = "SiT-XL/2"        # a row of SIZES: hidden_size to projector_dim
    data: str = ""                # folder with class/*.jpg or train/class/*.jpg; empty: the demo
    seed: int = 0                 # decides everything random: weights, order, noise, masks
    class_token: bool = True      # denoise the teacher's class token beside the image, as REG
    mixer_depth: int = 2          # Tab. 7: mixing blocks before the mask
    mask_ratio: float = 0.25      # Tab. 7: share of the patch tokens dropped in training
    align_coeff: float = 0.5      # Tab. 7: lambda, weight of the alignment loss; 0: none
    align_loss: str = "cosine"    # or smooth_l1, as SRA
    cls_coeff: float = 0.03       # Tab. 7: beta, weight of the class token's velocity loss
    self_depth: int = 0           # SRA: align with our own EMA's tokens after this block
    attn_coeff: float = 0.0       # HASTE: weight of the attention distillation; 0: none
    stop_align_at: int = 0        # HASTE: tau, the step from which nothing is aligned; 0: never
    cells: int = 1                # xAR: cells per side, each with its own noise level
    hidden_size: int = 1152       # SiT-XL: width D
    depth: int = 28               # SiT-XL: number of blocks, mixers not counted
    num_heads: int = 16           # SiT-XL: attention heads
    patch_size: int = 2           # SiT-XL/2: latent pixels per token side
    align_depth: int = 8          # Tab. 7: align after this block, counted from 1
    projector_dim: int = 2048     # as REPA: hidden width of the projector; 0: SRA's small head
    image_size: int = 256         # as REPA: pixels per side, after ADM's centre crop
    vae: str = "stabilityai/sd-vae-ft-ema"  # as REPA: SD-VAE on the hub; none: pixels
    vae_weights: str = ""         # file to read instead of the hub's
    teacher: str = "vit_base_patch14_dinov2.lvd142m"  # Tab. 7: any timm ViT; or: classifier
    teacher_weights: str = ""     # file to read instead of the hub's (timm's or Meta's keys)
    teacher_steps: int = 500      # ours: training steps of the teacher called classifier
    batch_size: int = 256         # Tab. 7: images per step, over all processes
    lr: float = 1e-4              # Tab. 7: AdamW, constant
    grad_clip: float = 1.0        # as REG: largest gradient norm
    ema_decay: float = 0.9999     # Tab. 7: average of all weights, used for sampling
    label_dropout: float = 0.1    # Tab. 7: share of labels replaced by the null class
    bf16: bool = True             # ours: autocast on GPU (REG: fp16); weights stay float32
    num_classes: int = 1000
    z_dim: int = 768
    class_names: tuple = ()
    attn_layers: tuple = ()
    # what a resumed run may change freely: none of it decides what is learned
    steps: int = 400_000          # ours: where the paper compares all methods
    out: str = ""                 # run folder; empty: runs/METHOD-SIZE
    override: bool = False        # go on from a checkpoint of other settings; its weights must fit
    prepare: bool = False         # encode the latents of --data once into --cache, then stop
    cache: str = ""               # folder of encoded latents; empty: DATA-latents
    workers: int = 8              # data loading processes per rank
    accum: int = 1                # micro-batches per step and process, to save memory
    compile: bool = True          # ours: torch.compile on GPU
    log_every: int = 100          # steps between log lines
    gap_every: int = 1000         # steps between measurements of the stability gap (Eq. 12)
    sample_every: int = 10_000    # steps between sample grids
    save_every: int = 10_000      # steps between checkpoints
    keep: int = 2                 # ours: checkpoints kept, should the newest be damaged
    preview_steps: int = 50       # ours: Euler steps of the sample grids
    @property
    def latent_shape(self) -> tuple:
        """(C, H, W) of what is noised and denoised: the pixels, or latents 8 times smaller."""
        s = self.image_size
        return (3, s, s) if self.vae == "none" else (4, s // 8, s // 8)
SIZES = {
    "SiT-S/2": dict(hidden_size=384, depth=12, num_heads=6, align_depth=4),
    "SiT-B/2": dict(hidden_size=768, depth=12, num_heads=12, align_depth=4),
    "SiT-L/2": dict(hidden_size=1024, depth=24, num_heads=16, align_depth=8),
    "SiT-XL/2": dict(hidden_size=1152, depth=28, num_heads=16, align_depth=8),
    "demo": dict(
        hidden_size=96, depth=6, num_heads=3, align_depth=3, patch_size=4, projector_dim=256)}
_PLAIN = dict(class_token=False, mixer_depth=0, mask_ratio=0.0)
METHODS = {  # each method is one row of settings over the same model, loss and loop
    "sit": _PLAIN | dict(align_coeff=0.0),
    "repa": _PLAIN,
    "reg": dict(mixer_depth=0, mask_ratio=0.0),
    "maskalign": dict(),
    "repa+maskalign": dict(class_token=False),              # Tab. 1
    "maskalign-no-mixing": dict(mixer_depth=0),             # Tab. 3
    "maskalign-no-masking": dict(mask_ratio=0.0),           # Tab. 3
    "haste": _PLAIN | dict(attn_coeff=0.5),
    "sra": _PLAIN | dict(align_coeff=0.2, align_loss="smooth_l1", projector_dim=0),
    "xar": _PLAIN | dict(align_coeff=0.0, cells=2)}
_EARLY = dict(align_depth=5, stop_align_at=100_000, attn_layers=((3, 8), (4, 10), (5, 12)))
_LATE = dict(align_depth=8, stop_align_at=250_000, attn_layers=((5, 9), (6, 10), (7, 11), (8, 12)))
_DEMO = dict(align_depth=3, stop_align_at=1000, attn_layers=((2, 1), (3, 2)))
AT_SIZE = {  # layers by size, from 1 (HASTE's Tab. 16; SRA); attn_layers: (ours, the teacher's)
    "haste": dict(zip(SIZES, (_EARLY, _EARLY, _LATE, _LATE, _DEMO))),
    "sra": {size: dict(align_depth=a, self_depth=b) for size, a, b in zip(
        SIZES, (3, 3, 6, 8, 2), (8, 8, 16, 20, 4))}}
DEMO = dict(size="demo", image_size=24, vae="none", teacher="classifier", batch_size=32, steps=2000,
            lr=3e-3, ema_decay=0.99, workers=0, sample_every=1000, save_every=500, gap_every=100,
            preview_steps=25)    # without --data: drawn shapes, and a run of minutes on a laptop
def make_config(**typed) -> Config:
    """Defaults, then DEMO (if no data), SIZES row, METHODS row, `typed`. Raises BadInput."""
    merged = vars(Config()) | ({} if typed.get("data") else DEMO) | typed
    for name, table in (("size", SIZES), ("method", METHODS)):
        if merged[name] not in table:
            raise BadInput(f"unknown {name} {merged[name]!r}: choose from {', '.join(table)}")
        merged |= table[merged[name]]
    c = Config(**(merged | AT_SIZE.get(merged["method"], {}).get(merged["size"], {}) | typed))
    shares = ("mask_ratio", "label_dropout", "ema_decay")
    zero = (*shares, "seed", "mixer_depth", "align_coeff", "cls_coeff", "self_depth", "attn_coeff",
            "stop_align_at", "projector_dim", "workers", "steps")
    for name, value in vars(c).items():
        high = 1 if name in shares else math.inf
        if type(value) in (int, float) and not (0 < value < high or value == 0 and name in zero):
            rule = "in [0, 1)" if name in shares else "0 or above" if name in zero else "above 0"
            raise BadInput(f"{name} is {value}: it must be {rule}")
    unit = c.patch_size * (1 if c.vae == "none" else 8)
    side, aligns = c.image_size // unit, c.align_coeff + c.attn_coeff > 0
    for name, fits, rule in (
            ("align_depth", c.align_depth <= c.depth, f"at most the depth, {c.depth}"),
            ("self_depth", c.self_depth <= c.depth * (c.align_coeff > 0 and not c.class_token),
             f"at most the depth, {c.depth}, and 0 with a class token or without align_coeff"),
            ("attn_coeff", not c.attn_coeff or c.attn_layers and c.cells == 1, "0 with cells (the "
             "teacher's attention crosses them), and for methods without attn_layers"),
            ("stop_align_at", aligns or not c.stop_align_at, "0 where nothing is aligned"),
            ("align_loss", c.align_loss in ("cosine", "smooth_l1"), "cosine or smooth_l1"),
            ("hidden_size", c.hidden_size % 4 == 0, "a multiple of 4"),
            ("num_heads", c.hidden_size % c.num_heads == 0, f"a divisor of {c.hidden_size}"),
            ("image_size", c.image_size % unit == 0, f"a multiple of {unit} for vae {c.vae} and "
             f"patch_size {c.patch_size}"),
            ("cells", side % c.cells == 0, f"a divisor of the {side} tokens per side"),
            ("prepare", not c.prepare or c.data and c.vae != "none", "used with --data and a VAE")):
        if not fits: raise BadInput(f"{name} is {getattr(c, name)}: it must be {rule}")
    return dataclasses.replace(c, cache=c.cache or f"{c.data.rstrip('/')}-latents",
                               out=c.out or f"runs/{c.method}-{c.size}".replace("/2", "-2"))
def parse_config(argv: list | None = None) -> Config:
    """Config from the command line: one flag per field of Config, its comment is its help."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="%(prog)s [--FLAG VALUE ...]", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, note in re.findall(r"^ +(\w+): .*?# (.*)$", inspect.getsource(Config), re.M):
        kind, default = Config.__annotations__[name], getattr(Config, name)
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind)
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS,
                            help=f"{note} [{default}]".replace("%", "%%"), **how)
    return make_config(**vars(parser.parse_args(argv)))
def seeded(device, *key) -> torch.Generator:
    """A generator that depends on `key` alone: so a resumed run needs no stored random state."""
    digest = hashlib.sha256(repr(key).encode()).digest()[:7]
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))

# ---- 2. Building blocks of SiT; attribute names are DiT's, so that published weights load --------
class TimestepEmbedder(nn.Module):
    """t (...) in [0, 1] -> (..., D): 128 cosines and 128 sines of t, then a small MLP."""
    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
    def forward(self, t: Tensor) -> Tensor:
        i = torch.arange(128, device=t.device)
        angles = t.float().unsqueeze(-1) * torch.exp(-math.log(10000.0) * i / 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        with torch.autocast(t.device.type, enabled=False):    # in bf16 near times look the same
            return self.mlp(waves.to(self.mlp[0].weight.dtype))
def sincos_pos_embed(dim: int, side: int) -> Tensor:
    """Fixed positions (side^2, dim) in raster order; the first half of dim codes the column."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)                       # (side, dim / 2)
    return torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)], dim=-1).float()
def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: a LayerNorm whose scale and shift come from the condition."""
    return F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift

class Block(nn.Module):
    """SiT block (adaLN-Zero), h (N, K, D) -> same; c (N, G, D) sets shift, scale, gate (first 0).
    G = 1, or (xAR) one row of c for each cell, and cell (N, K, 1) tells the cell of each token."""
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, qkv_bias=True)  # scaled_dot_product_attention
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
    def forward(self, h: Tensor, c: Tensor, cell=None) -> Tensor:
        rows = gather_tokens(self.adaLN_modulation(c), cell)             # (N, 1 or K, 6 D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rows.chunk(6, -1)
        sees = None if cell is None else (cell >= cell.mT).unsqueeze(1)  # earlier cells and its own
        h = h + gate_a * self.attn(modulate(h, shift_a, scale_a), attn_mask=sees)
        return h + gate_m * self.mlp(modulate(h, shift_m, scale_m))

class FinalLayer(nn.Module):
    """Tokens -> velocities: patches (N, K, out_dim), class token (N, cls_dim) or None."""
    def __init__(self, hidden_size: int, out_dim: int, cls_dim: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_dim)
        self.cls_head = nn.Linear(hidden_size, cls_dim) if cls_dim else None
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
    def forward(self, h: Tensor, c: Tensor, cell=None) -> tuple:
        h = modulate(h, *gather_tokens(self.adaLN_modulation(c), cell).chunk(2, -1))
        if self.cls_head is None: return self.linear(h), None
        return self.linear(h[:, 1:]), self.cls_head(h[:, 0])
def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(N, C, H, W) -> (N, T, p*p*C): tokens in raster order, channel fastest within a token."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // patch_size, patch_size, w // patch_size, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, -1, patch_size ** 2 * c)
def unpatchify(tokens: Tensor, patch_size: int) -> Tensor:
    """(N, T, p*p*C) -> (N, C, H, W) with H = W: undoes patchify."""
    n, t, d = tokens.shape
    side = math.isqrt(t)
    x = tokens.reshape(n, side, side, patch_size, patch_size, d // patch_size ** 2)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, side * patch_size, side * patch_size)

# ---- 3. The method: a random token subset, after a light mixing block (Sec. 5.1) -----------------
def sample_token_subset(n: int, num_tokens: int, mask_ratio: float,
                        generator: torch.Generator | None = None) -> Tensor:
    """Draws S: ids_keep (n, round((1 - mask_ratio) num_tokens)), uniform without replacement,
    anew for each image, ascending (so ratio 0 is the identity), on the generator's device."""
    len_keep = max(1, round((1 - mask_ratio) * num_tokens))
    scores = torch.rand(n, num_tokens, generator=generator, device=generator and generator.device)
    return scores.argsort(dim=-1)[:, :len_keep].sort(dim=-1).values
def gather_tokens(tokens: Tensor, ids_keep: Tensor | None, class_token=False):
    """(N, [1+]T, D), ids_keep (N, K) or None (all) -> (N, [1+]K, D). A class token stays."""
    if ids_keep is None or tokens is None: return tokens
    ids = ids_keep.flatten(1)
    if class_token: ids = F.pad(ids + 1, (1, 0))                         # row 0 is the class token
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
SiTOutput = collections.namedtuple("SiTOutput", "v v_cls z_pred")    # shapes: see SiT.forward

class SiT(nn.Module):
    """Scalable interpolant transformer with REPA's projector (after block align_depth, from 1; 0 or
    None: none), REG's class token, our mixer (blocks on all tokens before the mask, not counted in
    depth), xAR's cells^2 raster (tokens see their own cell and earlier ones). Draws nothing."""
    def __init__(self, input_size: int, patch_size: int, in_channels: int, hidden_size: int,
                 depth: int, num_heads: int, num_classes: int, z_dim: int,
                 projector_dim: int = 2048, align_depth: int | None = None, class_token=False,
                 mixer_depth: int = 0, mlp_ratio: float = 4.0, cells: int = 1):
        super().__init__()
        if (align_depth or 0) > depth:
            raise BadInput(f"align_depth is {align_depth}: it goes beyond the {depth} blocks")
        self.patch_size, self.num_classes = patch_size, num_classes
        self.align_depth, self.class_token, self.cells = align_depth, class_token, cells
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = nn.ModuleDict(dict(      # the last row is the null class: "no label"
            embedding_table=nn.Embedding(num_classes + 1, hidden_size)))
        if class_token:
            self.cls_embedder = nn.Linear(z_dim, hidden_size)
            self.cls_norm = nn.LayerNorm(hidden_size, eps=1e-6)
        side = self.x_embedder.grid_size[0]
        positions = F.pad(sincos_pos_embed(hidden_size, side), (0, 0, int(class_token), 0))
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)  # class token: zeros
        # NOTE(paper): the inside of the mixing layers is not given. Two plain SiT blocks are the
        # simplest reading conditioned on (t, y): +21.3M for B (paper 22M), +47.8M for XL (55M).
        block = functools.partial(Block, hidden_size, num_heads, mlp_ratio)
        self.mixer = nn.ModuleList(block() for _ in range(mixer_depth))
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        dims = [hidden_size, *(2 * [projector_dim] if projector_dim else [2 * hidden_size]), z_dim]
        layers = [layer for a, b in zip(dims, dims[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.projectors = nn.ModuleList([nn.Sequential(*layers[:-1])] if align_depth else [])
        line = torch.arange(side) * cells // side
        cell = F.pad((line[:, None] * cells + line).flatten(), (int(class_token), 0))
        self.register_buffer("cell", cell.view(1, -1, 1) if cells > 1 else None, persistent=False)
        out_dim, cls_dim = patch_size ** 2 * in_channels, z_dim if class_token else 0
        self.final_layer = FinalLayer(hidden_size, out_dim, cls_dim)
        # As DiT: zero gates and heads make every block the identity, and every output zero.
        for name, p in self.named_parameters():
            if name.endswith("bias") or "adaLN" in name or name.startswith("final_layer"):
                nn.init.zeros_(p)
            elif name.startswith(("y_embedder", "t_embedder")):
                nn.init.normal_(p, std=0.02)
            elif p.ndim > 1 and name != "pos_embed":
                nn.init.xavier_uniform_(p.view(len(p), -1))           # a view: convolutions, too
    def forward(self, x: Tensor, t: Tensor, y: Tensor, cls: Tensor | None = None,
                ids_keep: Tensor | None = None, until: int = 0) -> SiTOutput:
        """Noisy x (N, C, H, W), t (N,) in [0, 1] or (N, cells^2), y (N,), noisy cls (N, z_dim);
        ids_keep (N, K): the patch tokens that enter the blocks, None: all, as in sampling -> v
        (N, K, p*p*C), v_cls (N, z_dim), z_pred (N, [1+]K, z_dim). until: that block's tokens."""
        t = t.view(len(x), -1).expand(-1, self.cells ** 2)                           # (N, G)
        c = self.t_embedder(t) + self.y_embedder["embedding_table"](y).unsqueeze(1)  # (N, G, D)
        cell = None if self.cell is None else self.cell.expand(len(x), -1, -1)       # (N, [1+]T, 1)
        h = self.x_embedder(x)                                                       # (N, T, D)
        if self.class_token:
            h = torch.cat([self.cls_norm(self.cls_embedder(cls)).unsqueeze(1), h], dim=1)
        h = h + self.pos_embed      # (N, [1+]T, D); before the mask: a kept token knows its place
        for block in self.mixer:    # mixing: a dropped token leaves its trace in the others
            h = block(h, c, cell)
        h, cell = (gather_tokens(part, ids_keep, self.class_token) for part in (h, cell))
        z_pred = None                                                 # the mask: h is (N, [1+]K, D)
        for i, block in enumerate(self.blocks, start=1):
            h = block(h, c, cell)
            if i == until: return h
            if i == self.align_depth and not until:    # NOTE(paper): counted after the mixer
                z_pred = self.projectors[0](h)                        # h_phi(h_a) of Eq. 11
        v, v_cls = self.final_layer(h, c, cell)
        return SiTOutput(v, v_cls, z_pred)
def build_model(config: Config) -> SiT:
    """The network of a config, initialised from its seed."""
    torch.manual_seed(config.seed)
    channels, side, _ = config.latent_shape
    return SiT(side, config.patch_size, channels, config.hidden_size, config.depth,
               config.num_heads, config.num_classes, config.z_dim, config.projector_dim,
               config.align_depth if config.align_coeff > 0 else None,
               config.class_token, config.mixer_depth, cells=config.cells)
def from_official(state_dict: dict) -> dict:
    """A REPA or REG state dict in our names; one that has them already passes unchanged."""
    new = {"cls_projectors2": "cls_embedder", "wg_norm": "cls_norm", "linear_cls": "cls_head"}
    return {".".join(new.get(part, part) for part in key.split(".")
                     if part not in ("module", "_orig_mod")): v for key, v in state_dict.items()}

# ---- 4. The objective (Eq. 10 and 11), and what the family adds to it ----------------------------
def at_least_float32(x: Tensor) -> Tensor:
    """Losses are taken in float32, or wider where the inputs are: a bf16 cosine is too coarse."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
def draw_step(n: int, latent_shape: tuple, z_dim: int, config: Config, generator=None, device=None,
              t=None, noise=None, cls_noise=None, ids_keep=None, drop=None, lag=None) -> dict:
    """Everything random in a step of n images; what is given stays: t (n,) or (n, cells^2) < 1;
    noise (n, C, H, W), cls_noise (n, z_dim), ids_keep (n, K) or None (all), drop (n,): True where
    the label becomes the null class, lag like t < 0.2: SRA's EMA sees less noise, t - lag."""
    on = dict(generator=generator, device=device)
    levels = (n,) if config.cells == 1 else (n, config.cells ** 2)
    if ids_keep is None and config.mask_ratio > 0:
        num_tokens = latent_shape[1] * latent_shape[2] // config.patch_size ** 2
        ids_keep = sample_token_subset(n, num_tokens, config.mask_ratio, generator).to(device)
    return dict(t=torch.rand(levels, **on) if t is None else t,
                noise=torch.randn(n, *latent_shape, **on) if noise is None else noise,
                cls_noise=torch.randn(n, z_dim, **on) if cls_noise is None else cls_noise,
                ids_keep=ids_keep,
                drop=torch.rand(n, **on) < config.label_dropout if drop is None else drop,
                lag=0.2 * torch.rand(levels, **on) if lag is None else lag)
def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x + t noise: t = 0 is data, t = 1 is noise. t (N,), or one level per cell."""
    side = math.isqrt(t[0].numel())
    s = F.interpolate(t.reshape(len(t), 1, side, side), x.shape[-2:])              # (N, 1, H, W)
    return (1 - s) * x + s * noise
def tap_attention(layers: list) -> list:
    """[q, k, v (N, K, 3, heads, head_dim)] of these timm layers, as of the last forward pass."""
    seen = [None] * len(layers)
    for i, attn in enumerate(layers):
        attn.qkv.register_forward_hook(lambda _, h, qkv, i=i, heads=attn.num_heads:
                                       seen.__setitem__(i, qkv.unflatten(-1, (3, heads, -1))))
    return seen
def attention_loss(ours: list, teachers: list, num_tokens: int, ids_keep=None) -> Tensor:
    """HASTE: mean cross-entropy of our attention maps to the teacher's. Both are cut to the kept of
    num_tokens patches (no class token, no register) before the softmax, and to common heads."""
    losses = []
    for a, b in zip(ours, teachers):
        b = gather_tokens(b[:, -num_tokens:].flatten(2), ids_keep).unflatten(-1, b.shape[2:])
        heads = min(a.shape[3], b.shape[3])
        a, b = (at_least_float32(torch.einsum("nqhd,nkhd->nhqk", *h[:, :, :2, :heads].unbind(2)))
                / math.sqrt(h.shape[-1]) for h in (a[:, -b.shape[1]:], b))
        losses.append(-(b.softmax(-1) * a.log_softmax(-1)).sum(-1).mean())
    return torch.stack(losses).mean()
def training_losses(model, x: Tensor, y: Tensor, z: Tensor | None,
                    config: Config, *, t=None, noise=None, cls_noise=None, ids_keep=None,
                    drop=None, generator=None, lag=None, ema=None, attn=None) -> dict:
    """The objective on a batch: {"loss", "denoise", "cls", "align", "attn"}, all scalars.
    x (N, C, H, W) clean latents, y (N,) labels, z (N, 1+T, D) teacher tokens, class token first
    (ignored by methods without one, None for `sit`); `model` is called as model(x_t, t, y, cls_t,
    ids_keep). The others: see draw_step; ema: SRA's teacher; attn: ours and the teacher's taps."""
    t, noise, cls_noise, ids_keep, drop, lag = draw_step(
        len(x), x.shape[1:], config.z_dim if z is None else z.shape[-1], config, generator,
        x.device, t, noise, cls_noise, ids_keep, drop, lag).values()
    x_t, cls_t = add_noise(x, noise, t), None
    v_target = patchify(noise - x, config.patch_size)                 # d x_t / dt: (N, T, p*p*C)
    num_tokens = v_target.shape[1]
    if config.class_token:
        cls, s = at_least_float32(z[:, 0]), t.view(len(t), -1)[:, :1]
        cls_t = (1 - s) * cls + s * cls_noise                         # same t, noise of its own
    y = torch.where(drop, config.num_classes, y)                      # the null class
    v, v_cls, z_pred = model(x_t, t, y, cls_t, ids_keep)
    # Dropped tokens are neither predicted nor aligned: all means run over the kept ones.
    v_target = gather_tokens(v_target, ids_keep)                      # (N, K, p*p*C)
    denoise = (at_least_float32(v) - v_target).square().mean()        # Eq. 10, with cls_loss
    cls_loss = align = attn_loss = torch.zeros_like(denoise)
    if config.class_token: cls_loss = (at_least_float32(v_cls) - (cls_noise - cls)).square().mean()
    if z_pred is not None:                                            # Eq. 11
        if config.self_depth > 0:    # SRA: our average's view of the same noise, weaker; all tokens
            t = (t - lag).clamp(min=0)
            with torch.no_grad():
                z = ema(add_noise(x, noise, t), t, y, until=config.self_depth)
        z = gather_tokens(z if config.class_token else z[:, -num_tokens:], ids_keep,
                          config.class_token)
        pair = at_least_float32(z_pred), at_least_float32(z)
        align = (F.smooth_l1_loss(*pair, beta=0.05) if config.align_loss == "smooth_l1" else
                 -F.cosine_similarity(*pair, dim=-1).mean())
    if attn is not None: attn_loss = attention_loss(*attn, num_tokens, ids_keep)
    loss = (denoise + config.cls_coeff * cls_loss + config.align_coeff * align
            + config.attn_coeff * attn_loss)
    return dict(loss=loss, denoise=denoise, cls=cls_loss, align=align, attn=attn_loss)
@torch.no_grad()
def alignment_gap(model, x, y, z, config: Config, **drawn) -> tuple:
    """(G_r, L(full)): stability gap G_r = L(masked input) - L(full input), L = align (Eq. 12).
    Arguments as in training_losses; `drawn` is all of draw_step: both inputs see the same noise."""
    def full_input(x_t, t, y, cls_t, ids):
        v, v_cls, z_pred = model(x_t, t, y, cls_t)
        return gather_tokens(v, ids), v_cls, gather_tokens(z_pred, ids, config.class_token)
    # NOTE(paper): it does not say which tokens L(full) averages. Here the kept ones, as L(masked):
    # so the gap is 0 for a network whose tokens do not look at each other.
    masked, full = (training_losses(network, x, y, z, config, **drawn)["align"]
                    for network in (model, full_input))
    return (masked - full).item(), full.item()

# ---- 5. Sampling: from t = 1 (noise) to t = 0 (data), with every token (as REPA, REG) ------------
def guided_velocity(model: SiT, state: list, t: list, y, cfg_scale, cls_cfg_scale, dtype) -> list:
    """Velocities of state = [x] or [x, cls] at level t (or one per cell), in float64. Guided where
    w = cfg_scale > 1: v = v_null + w (v_label - v_null); class token: where cls_cfg_scale > 0."""
    n, guided = len(y), cfg_scale > 1
    if guided:
        y = torch.cat([y, torch.full_like(y, model.num_classes)])
        state = [torch.cat([part, part]) for part in state]
    x, *cls = (part.to(dtype) for part in state)
    out = model(x, x.new_tensor(t).expand(len(y), -1).squeeze(1), y, *cls)     # (N,), or (N, cells)
    velocities = [v.double() for v in (unpatchify(out.v, model.patch_size), out.v_cls)[:len(state)]]
    if guided:
        velocities = [v[n:] + w * (v[:n] - v[n:]) if w > 0 else v[:n]
                      for v, w in zip(velocities, (cfg_scale, cls_cfg_scale))]
    return velocities
@torch.no_grad()
def euler_maruyama(model: SiT, x, y, cls=None, *, num_steps: int = 250, cfg_scale: float = 1.0,
                   cls_cfg_scale: float | None = None, guidance_low: float = 0.0,
                   guidance_high: float = 1.0, sde: bool = True, heun: bool = False,
                   randn_like=None, cells: int = 1) -> Tensor:
    """Integrates the reverse SDE, w_t = 2t, from standard normal x (N, C, H, W), cls (N, z_dim)
    and labels y (N,) -> latents like x. Guided where guidance_low <= t <= guidance_high; the class
    token by cls_cfg_scale, None: by cfg_scale. sde=False: dx/dt = v; heun averages v over both ends
    of a step. randn_like: asked for latent, then class token. cells > 1 (xAR): cell after cell."""
    # NOTE(paper): it prints w_t = sigma_t = t; the code of its family uses twice that in the same
    # equation. The score, the gradient of log density, is -(x + (1-t) v) / t: so the drift
    # v - (w_t / 2) score is (2-t) v + x, and a step of dt < 0 adds noise of variance w_t |dt|.
    state, dtype = [part.double() for part in (x, cls) if part is not None], x.dtype
    cls_cfg_scale = cfg_scale if cls_cfg_scale is None else cls_cfg_scale
    grid = (1.0, 0.04, num_steps) if sde else (1.0, 0.0, num_steps + 1)
    times = torch.linspace(*grid, dtype=torch.float64).tolist() + ([0.0] if sde else [])
    ramp = torch.linspace(1, 0, cells ** 2).flip(0).tolist()    # of guidance: 0 ... 1; one cell: 1
    for k, (t, t_next) in itertools.product(range(cells ** 2), zip(times, times[1:])):
        # Only cell k moves (class token: with 0); before it all is clean, after it unseen noise.
        moves = torch.eye(cells ** 2, dtype=torch.float64)[k].view(1, 1, cells, cells)
        moves = [F.interpolate(moves, x.shape[-2:]).to(x.device), float(k == 0)]
        before, after, dt = [0.0] * k, [1.0] * (cells ** 2 - 1 - k), t_next - t
        scales = [1 + (w - 1) * ramp[k] if guidance_low <= t <= guidance_high else 1.0
                  for w in (cfg_scale, cls_cfg_scale)]
        drift = guided_velocity(model, state, [*before, t, *after], y, *scales, dtype)
        if heun and t_next > 0:
            ahead = [a + dt * m * v for a, m, v in zip(state, moves, drift)]
            v_ahead = guided_velocity(model, ahead, [*before, t_next, *after], y, *scales, dtype)
            drift = [(v + v2) / 2 for v, v2 in zip(drift, v_ahead)]
        if sde: drift = [(2 - t) * v + a for a, v in zip(state, drift)]
        state = [a + dt * m * d for a, m, d in zip(state, moves, drift)]
        if sde and t_next > 0:      # the last step, 0.04 -> 0, adds none: it would stay visible
            spread, randn = math.sqrt(-2 * t * dt), randn_like or torch.randn_like
            state = [a + spread * m * randn(a) for a, m in zip(state, moves)]
    return state[0].to(dtype)
euler_ode = functools.partial(euler_maruyama, num_steps=50, sde=False)

# ---- 6. Frozen networks: the teacher and the SD-VAE ----------------------------------------------
def read_weights(path: str, repo: str = "", filename: str = "", flag: str = "") -> dict:
    """State dict of `path` (.safetensors or .pth), or of a file on the hub where path is empty.
    Executes nothing that is in a file. Raises BadInput: unreadable, or offline without a file."""
    advice = f"run once with internet, or pass {flag} FILE" if flag else (
        "it must be a whole .safetensors or .pth file of tensors and plain values")
    try:
        path = path or huggingface_hub.try_to_load_from_cache(repo, filename)
        if not path:    # ask once ourselves: offline, the hub's own client tries again for 45 s
            urllib.request.urlopen(f"{huggingface_hub.constants.ENDPOINT}/{repo}", timeout=10)
            path = huggingface_hub.hf_hub_download(repo, filename)
        if str(path).endswith(".safetensors"):
            return safetensors.torch.load_file(path)
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:    # torch would load a flipped bit silently; a zip has a checksum of each part
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} is damaged")
        # Files from before torch 1.6 are no zips (pytorch-fid's is one), and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        name, reason, kind = path or f"{filename} of {repo}", str(error), type(error).__name__
        reason = reason[max(reason.find("Unsupported"), 0):]    # torch names a forbidden class late
        reason = reason.partition("\n")[0][:120]
        raise BadInput(f"cannot read {name} ({kind}: {reason}); {advice}") from error

def load_vit(vit: nn.Module, state: dict, name: str, path: str) -> None:
    """Loads a timm ViT, from timm's names or its authors'. Raises BadInput where a tensor of the
    ViT is not in the file, or the file has more blocks; its heads and mask token are left out."""
    try:    # timm renames Meta's keys, resamples positions (bicubic, antialias) to our grid
        convert = sys.modules[type(vit).__module__].checkpoint_filter_fn
        missing, unused = vit.load_state_dict(convert(state, vit), strict=False)
        if missing:
            raise ValueError(f"it has no {missing[0]}")
        blocks = [key for key in unused if key.startswith("blocks.")]
        if blocks:
            raise ValueError(f"it also has {blocks[0]}")
    except Exception as error:
        reason = str(error).rpartition("\n")[2].strip()[:120]
        raise BadInput(f"{path} holds weights of another model than {name} ({reason}): "
                       "pass its own with --teacher_weights FILE") from error

class ViTTeacher(nn.Module):
    """A frozen timm ViT: uint8 (N, 3, H, W) -> (N, 1 + grid^2, dim), normed: class token, patches
    in raster order. "classifier": a tiny one for build_teacher to train. Raises BadInput."""
    def __init__(self, name: str, grid: int, weights: str = ""):
        super().__init__()
        own = dict(patch_size=4, embed_dim=64, depth=2, num_heads=4) if name == "classifier" else {}
        arch = "vit_tiny_patch16_224" if own else name
        patch = re.search(r"vit_.*patch(\d+)", arch)
        unfit = BadInput(f"teacher {name!r} is no ViT of timm with a class token and a last norm: "
                         f"try {Config.teacher}, or classifier")
        if not patch or arch not in (*timm.list_models(), *timm.list_pretrained()): raise unfit
        source, self.size = timm.get_pretrained_cfg(arch), grid * (4 if own else int(patch[1]))
        try:
            self.vit = timm.create_model(arch, img_size=self.size, num_classes=0, **own)
        except Exception as error:
            raise unfit from error
        norm = getattr(self.vit, "norm", nn.Identity())
        if getattr(self.vit, "cls_token", None) is None or isinstance(norm, nn.Identity):
            raise unfit
        if not own:
            flag, repo = "--teacher_weights", source.hf_hub_id
            state = read_weights(weights, repo, "model.safetensors", flag)
            load_vit(self.vit, state, name, weights or repo)
        self.dim = self.vit.num_features
        constants = torch.tensor([source.mean, source.std], dtype=torch.float64)
        self.register_buffer("mean_std", constants.view(2, 3, 1, 1))
    def forward(self, images: Tensor) -> Tensor:
        # As REPA: normalise first, then bicubic without antialias, from 256 to 224 pixels.
        mean, std = self.mean_std.to(dtype := next(self.parameters()).dtype)
        x = F.interpolate((images.to(dtype) / 255 - mean) / std, self.size, mode="bicubic")
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            tokens = self.vit.forward_features(x)
        patches = tokens[:, self.vit.num_prefix_tokens:]        # skips registers, if it has some
        return at_least_float32(torch.cat([tokens[:, :1], patches], dim=1))
def build_teacher(config: Config, dataset: Dataset, device, rank: int = 0) -> ViTTeacher | None:
    """The frozen teacher of a run, or None; the demo trains its own on clean images, in seconds."""
    aligns = config.attn_coeff > 0 or config.align_coeff > 0 and not config.self_depth
    if not (config.class_token or aligns): return None
    torch.manual_seed(config.seed)
    grid, threads = config.latent_shape[1] // config.patch_size, torch.get_num_threads()
    teacher = ViTTeacher(config.teacher, grid, config.teacher_weights)
    if config.teacher == "classifier":
        teacher.vit.reset_classifier(len(dataset.classes))
        optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
        torch.set_num_threads(1)    # so that every rank and every resumed run has the very same one
        batches = torch.randint(len(dataset), (config.teacher_steps, 64)).tolist()
        for batch in tqdm(batches, "training the teacher", leave=False, disable=rank > 0):
            images, y, *_ = default_collate([dataset[i] for i in batch])
            z = teacher(images)
            optimizer.zero_grad()
            F.cross_entropy(teacher.vit.head(z[:, 0] + z[:, 1:].mean(dim=1)), y).backward()
            optimizer.step()
        torch.set_num_threads(threads)
    return teacher.to(device).eval().requires_grad_(False)

class AutoencoderKL(nn.Module):
    """Stable Diffusion's VAE, images in [-1, 1] (N, 3, H, W) <-> latents (N, 4, H/8, W/8): its
    tensors (diffusers' names, old or new) and the order in which they act. Raises BadInput."""
    def __init__(self, state_dict: dict, path: str = "the state dict"):
        super().__init__()
        new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out/0"}
        try:    # in the end one small image finds out what is missing
            for name, value in state_dict.items():    # a buffer's name may not hold dots
                self.register_buffer("/".join(new.get(k, k) for k in name.split(".")), value)
            self.decode(self.encode(value.new_zeros(1, 3, 16, 16))[0])
        except Exception as error:
            raise BadInput(f"{path} holds no SD-VAE: {error}".partition("\n")[0]) from error
    def layer(self, name: str, h: Tensor, stride: int = 1) -> Tensor:
        """The layer of that name: its weight's shape tells a norm, a linear map, a convolution."""
        weight, bias = getattr(self, f"{name}/weight"), getattr(self, f"{name}/bias")
        if weight.ndim == 1: return F.group_norm(h, 32, weight, bias, eps=1e-6)
        if weight.ndim == 2: return F.linear(h, weight, bias)
        if stride == 2: return F.conv2d(F.pad(h, (0, 1, 0, 1)), weight, bias, stride)
        return F.conv2d(h, weight, bias, padding="same")
    def resnet(self, name: str, x: Tensor) -> Tensor:
        h = self.layer(f"{name}/conv1", F.silu(self.layer(f"{name}/norm1", x)))
        h = self.layer(f"{name}/conv2", F.silu(self.layer(f"{name}/norm2", h)))
        return h + (x if h.shape == x.shape else self.layer(f"{name}/conv_shortcut", x))
    def middle(self, name: str, x: Tensor) -> Tensor:
        x, attn = self.resnet(f"{name}/resnets/0", x), f"{name}/attentions/0"
        h = self.layer(f"{attn}/group_norm", x).flatten(2).mT                         # (N, HW, C)
        q, k, v = (self.layer(f"{attn}/to_{part}", h) for part in "qkv")
        h = self.layer(f"{attn}/to_out/0", F.scaled_dot_product_attention(q, k, v))
        return self.resnet(f"{name}/resnets/1", x + h.mT.reshape(x.shape))
    def encode(self, images: Tensor) -> tuple:
        """Mean and standard deviation of the latents, unscaled."""
        h = self.layer("encoder/conv_in", images)
        for i in range(4):
            for j in range(2): h = self.resnet(f"encoder/down_blocks/{i}/resnets/{j}", h)
            if i < 3: h = self.layer(f"encoder/down_blocks/{i}/downsamplers/0/conv", h, stride=2)
        h = F.silu(self.layer("encoder/conv_norm_out", self.middle("encoder/mid_block", h)))
        mean, logvar = self.layer("quant_conv", self.layer("encoder/conv_out", h)).chunk(2, dim=1)
        return mean, torch.exp(0.5 * logvar.clamp(-30, 20))
    def decode(self, latents: Tensor) -> Tensor:
        """Images of unscaled latents, about in [-1, 1]."""
        h = self.layer("decoder/conv_in", self.layer("post_quant_conv", latents))
        h = self.middle("decoder/mid_block", h)
        for i in range(4):
            for j in range(3): h = self.resnet(f"decoder/up_blocks/{i}/resnets/{j}", h)
            if i < 3:
                h = F.interpolate(h, scale_factor=2.0)
                h = self.layer(f"decoder/up_blocks/{i}/upsamplers/0/conv", h)
        return self.layer("decoder/conv_out", F.silu(self.layer("decoder/conv_norm_out", h)))
def build_vae(config: Config, device) -> AutoencoderKL | None:
    """The SD-VAE of a run; None in pixel space."""
    if config.vae == "none": return None
    weights = read_weights(config.vae_weights, config.vae, "diffusion_pytorch_model.safetensors",
                           "--vae_weights")
    return AutoencoderKL(weights, config.vae_weights or config.vae).float().to(device)
SD_SCALE, PIXEL_SCALE = 0.18215, 2.0    # to variance about 1: SD-VAE's own; ours for [-1, 1]
def encode_images(vae: AutoencoderKL | None, images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) -> mean and standard deviation of the scaled latents, (N, 2C, h, w)."""
    x = images.float() / 127.5 - 1
    if vae is None: return torch.cat([PIXEL_SCALE * x, torch.zeros_like(x)], dim=1)
    return SD_SCALE * torch.cat([torch.cat(vae.encode(part), dim=1) for part in x.split(32)])
def decode_latents(vae: AutoencoderKL | None, x: Tensor) -> Tensor:
    """Scaled latents -> images uint8 (N, 3, H, W); truncated, not rounded, as REPA does."""
    images = x.float() / PIXEL_SCALE if vae is None else torch.cat(
        [vae.decode(part / SD_SCALE) for part in x.float().split(32)])
    return (255 * (images + 1) / 2).clamp(0, 255).to(torch.uint8)

# ---- 7. Data: drawn shapes for the demo, image folders, latents encoded beforehand ---------------
SHAPES = {  # class: signed distance at (x, y), negative inside; radius about 1, y points down
    "disc": lambda x, y: x.hypot(y) - 0.9,
    "square": lambda x, y: x.abs().maximum(y.abs()) - 0.78,
    "triangle": lambda x, y: y.maximum(0.87 * x.abs() - 0.5 * y) - 0.5,
    "star": lambda x, y: x.hypot(y) - 1 + 1.3 * ((x.atan2(-y) / 1.2566 + 0.5) % 1 - 0.5).abs(),
    "cross": lambda x, y: (x.abs().minimum(y.abs()) - 0.3).maximum(x.abs().maximum(y.abs()) - 0.95),
    "ring": lambda x, y: (x.hypot(y) - 0.7).abs() - 0.22,
    "crescent": lambda x, y: (x.hypot(y) - 0.95).maximum(0.8 - (x - 0.5).hypot(y)),
    "heart": lambda x, y: x.hypot(0.15 - y - 0.65 * x.abs().sqrt()) - 0.85}
def demo_shapes(size: int, count: int = 8192) -> TensorDataset:
    """(image uint8 (3, size, size), label) of class i % 8, looks decided by i alone; drawn once."""
    u = torch.rand(count, 13, 1, 1, generator=seeded("cpu", "shapes")).unbind(1)
    line, labels = torch.arange(size) + 0.5, torch.arange(count) % len(SHAPES)
    radius, tilt = size * (0.32 + 0.08 * u[0]), 0.2 * (u[1] - 0.5)
    x = (line - size * (0.45 + 0.1 * u[2])) / radius                            # (count, 1, size)
    y = (line[:, None] - size * (0.45 + 0.1 * u[3])) / radius                   # (count, size, 1)
    x, y = x * tilt.cos() + y * tilt.sin(), y * tilt.cos() - x * tilt.sin()
    distance = torch.stack([shape(x, y) for shape in SHAPES.values()])[labels, torch.arange(count)]
    inside = (0.5 - distance * radius).clamp(0, 1)                               # antialiased
    start, end, paint = (torch.stack(u[i:i + 3], dim=1) for i in (4, 7, 10))     # (count, 3, 1, 1)
    ground = 0.4 * (start + (end - start) * line / size)       # dark, from one colour to another
    images = torch.lerp(ground, 0.45 + 0.55 * paint, inside[:, None])
    dataset = TensorDataset((images * 255).to(torch.uint8), labels)
    dataset.classes = list(SHAPES)
    return dataset
def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's crop: halve by BOX while twice too large, BICUBIC to the size, cut out the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))

IMAGE_SUFFIXES = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".jpe", ".jfif", ".gif", ".avif",
                  ".jp2", ".j2k", ".jpx")    # no .eps: Pillow runs Ghostscript for it
SPLITS = {"train", "val", "valid", "validation", "test"}
def is_image(path: str, skipped: collections.Counter) -> bool:
    """Whether the file is named like an image; counts the suffixes of others in `skipped`."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in IMAGE_SUFFIXES:
        skipped[suffix or "no suffix"] += 1
    return suffix in IMAGE_SUFFIXES
def tell_skipped(folder: str, skipped: collections.Counter) -> None:
    """One line on the files left out, so that none goes missing without a word."""
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common())
    if kinds:
        print(f"{folder}: skipped what is no image by its name: {kinds}", flush=True)
def split_folder(folder: str) -> str:
    """`folder`/train, if nothing but other splits lies beside it: else "train" is a class."""
    names = {entry.name for entry in os.scandir(folder) if entry.is_dir()}
    beside = {name for name in names if not name.startswith(".")} - SPLITS
    return os.path.join(folder, "train") if "train" in names and not beside else folder
def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode. Pillow clips 16 bits to 0..255, which makes noise: they are scaled here.
    Raises BadInput for 32-bit and float images, of which nobody knows what white is."""
    sixteen = image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM")
    if sixteen:    # Pillow gives some of these as "I", scaled to 0..65535
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadInput(f"{image.filename} has pixels of mode {image.mode}, whose range is unknown: "
                       "save it with 8 or 16 bits")
    return image.convert("RGB")
class FolderImages(torchvision.datasets.ImageFolder):
    """class/*.jpg or train/class/*.jpg; items (crop uint8 (3, S, S), label[, cached moments])."""
    def __init__(self, folder: str, size: int):
        self.size, self.cache, self.skipped = size, None, collections.Counter()
        try:
            super().__init__(split_folder(folder), is_valid_file=functools.partial(
                is_image, skipped=self.skipped))
            for path, _ in self.samples[::1 + len(self) // 1000]: Image.open(path).close()
        except OSError as error:
            raise BadInput(f"--data {folder} must hold images as class/*.jpg: {error}") from error
    def __getitem__(self, i: int) -> tuple:
        path, label = self.samples[i]
        try:
            with Image.open(path) as file:
                crop = np.array(center_crop(to_rgb(file), self.size))
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(f"{path} is no readable image: mend or remove it") from error
        moments = [torch.tensor(np.load(self.cache, "r")[i])] if self.cache else []
        return torch.from_numpy(crop).permute(2, 0, 1), label, *moments
def cache_file(config: Config, dataset: FolderImages, vae: AutoencoderKL) -> Path:
    """Where the encoded latents are; the name changes with file names, crop and VAE weights."""
    names = [path.removeprefix(dataset.root).lstrip("/") for path, _ in dataset.samples]
    digest = hashlib.sha256(repr((config.image_size, names)).encode())
    for value in vae.buffers(): digest.update(value.cpu().numpy().tobytes())
    return Path(config.cache, f"{digest.hexdigest()[:16]}.npy")
def prepare(config: Config, dataset: FolderImages, vae: AutoencoderKL, device, rank, world_size):
    """Encodes all of --data once, as float16 (mean, std); rows start at 0, done ones have a std."""
    path, (c, h, w) = cache_file(config, dataset, vae), config.latent_shape
    part = path if path.exists() else path.with_suffix(".part")
    if rank == 0 and not part.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(part, "w+", np.float16, (len(dataset), 2 * c, h, w))
    if world_size > 1: dist.barrier()
    moments = np.load(part, mmap_mode="r+")
    todo = [i for i in range(rank, len(dataset), world_size) if moments[i, -1, -1, -1] == 0]
    loader = DataLoader(dataset, 32, sampler=todo, num_workers=config.workers)
    for i, (images, _) in enumerate(tqdm(loader, "encoding batches of 32", disable=rank > 0)):
        moments[todo[32 * i:32 * (i + 1)]] = encode_images(vae, images.to(device)).half().cpu()
    moments.flush()
    if world_size > 1: dist.barrier()
    if rank == 0: part.rename(path)
def index_batches(count: int, config: Config, start: int, rank: int, world_size: int):
    """Yields this rank's micro-batches of image indices; the seed permutes each epoch's images."""
    order = functools.lru_cache(maxsize=2)(lambda epoch: torch.randperm(
        count, generator=seeded("cpu", "epoch", config.seed, epoch)).tolist())
    local = config.batch_size // world_size
    for step in range(start, config.steps):
        first = step * config.batch_size + rank * local
        indices = [order(i // count)[i % count] for i in range(first, first + local)]
        yield from np.array_split(indices, config.accum)

# ---- 8. The training loop ------------------------------------------------------------------------
def setup_distributed() -> tuple:
    """(rank, world_size, device) as torchrun says; plain python is one process."""
    rank, world_size = int(os.getenv("RANK", 0)), int(os.getenv("WORLD_SIZE", 1))
    local_rank, local_size = int(os.getenv("LOCAL_RANK", 0)), int(os.getenv("LOCAL_WORLD_SIZE", 1))
    device = torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")                                       # TF32
    else:   # torchrun gives each process one thread: share the cores instead
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // local_size))
    if world_size > 1: dist.init_process_group("cpu:gloo" + ",cuda:nccl" * (device.type == "cuda"))
    return rank, world_size, device
def save_grid(images: Tensor, names: list, path) -> None:
    """Draws uint8 images (R * C, 3, H, W) as R rows, each with its name, into a PNG."""
    images = F.interpolate(images.cpu(), scale_factor=max(1, 96 // images.shape[-1]))   # big pixels
    grid = torchvision.utils.make_grid(images, len(images) // len(names), pad_value=255)
    picture = Image.new("RGB", (grid.shape[2] + 80, grid.shape[1]), "white")
    picture.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (80, 0))
    for y, name in zip(np.linspace(0, grid.shape[1], 2 * len(names) + 1)[1::2], names):
        ImageDraw.Draw(picture).text((6, y), name[:12], fill="black", anchor="lm")
    picture.save(path)
def preview(model: SiT, vae: AutoencoderKL | None, config: Config, path, device) -> None:
    """Draws 8 images of each of 8 classes, from the same noise at every step of a run."""
    classes = sorted({round(k) for k in np.linspace(0, config.num_classes - 1, 8)})
    y = torch.tensor(classes, device=device).repeat_interleave(8)
    generator = seeded(device, "preview", config.seed)
    drawn = draw_step(len(y), config.latent_shape, config.z_dim, config, generator, device)
    cls = drawn["cls_noise"] if config.class_token else None
    x = euler_ode(model, drawn["noise"], y, cls, num_steps=config.preview_steps, cfg_scale=2.0,
                  cells=config.cells)                        # guided: ours, pictures to recognise
    save_grid(decode_latents(vae, x), [config.class_names[k] for k in classes], path)
    tqdm.write(f"samples: {path}")
@torch.no_grad()
def load_batch(batch: list, eps: Tensor, vae, teacher) -> tuple:
    """A loader's batch -> latents x (N, C, h, w), labels y (N,), teacher tokens z or None."""
    images, y, *moments = (part.to(eps.device, non_blocking=True) for part in batch)
    mean, std = (moments[0].float() if moments else encode_images(vae, images)).chunk(2, dim=1)
    return mean + std * eps, y, teacher(images) if teacher else None
def resume(config: Config, out: Path, parts: dict, rank: int) -> int:
    """Loads the newest whole checkpoint into `parts`; its step, or 0. Sets damaged ones aside."""
    files = [*sorted(out.glob("step-*.pt"), reverse=True), *out.glob("latest.pt")]
    for path in files:
        try:
            saved = read_weights(str(path))
            break
        except BadInput as error:
            if rank == 0:
                print(f"{error}; looking for the one before", flush=True)
                path.rename(f"{path}.damaged")
    else:
        if not files: return 0
        raise BadInput(f"{out} holds no whole checkpoint: delete it, or name another --out")
    old, names = vars(Config()) | saved.get("config", {}), list(vars(config))
    odd = {name: f"{name} {old[name]} there, {value} here"
           for name, value in vars(config).items() if value != old[name]}
    wrong = "; ".join(odd[name] for name in names[:names.index("steps")] if name in odd)
    if odd and rank == 0: print(f"{path}: {'; '.join(odd.values())}", flush=True)
    if wrong and not config.override:
        raise BadInput(f"{path} has other settings ({wrong}): name another --out, or --override")
    for name, part in parts.items(): part.load_state_dict(saved[name])
    parts["optimizer"].param_groups[0]["lr"] = config.lr    # as typed now, not as it was then
    return saved["step"]
def save(config: Config, out: Path, step: int, parts: dict) -> None:
    """Writes step-STEP.pt, links it as latest.pt, keeps `keep`: a kill leaves whole files only."""
    path, beside = out / f"step-{step:07d}.pt", out / "unfinished.tmp"
    state = {name: part.state_dict() for name, part in parts.items()}
    try:
        beside.unlink(missing_ok=True)      # it may be another name of an older checkpoint
        torch.save(dict(state, step=step, config=dataclasses.asdict(config)), beside)
        with open(beside, "rb+") as file: os.fsync(file.fileno())
        os.replace(beside, path)
        os.link(path, beside)
        os.replace(beside, out / "latest.pt")
    except (OSError, RuntimeError) as error:
        beside.unlink(missing_ok=True)
        raise BadInput(f"cannot save {path} ({error}): those before it are whole; make room, then "
                       "type the same command") from error
    for old in sorted(out.glob("step-*.pt"))[:-config.keep]: old.unlink()
def train(config: Config, signals: list | tuple = ()) -> None:
    """Trains from the last checkpoint on; once `signals` is not empty, saves after the step."""
    rank, world_size, device = setup_distributed()
    on_gpu, out, size = device.type == "cuda", Path(config.out), config.image_size
    shape, pieces = config.latent_shape, world_size * config.accum
    if config.batch_size % pieces:
        raise BadInput(f"batch_size is {config.batch_size}: it must be a multiple of "
                       f"{world_size} processes x accum {config.accum}")
    dataset = FolderImages(config.data, size) if config.data else demo_shapes(size)
    if config.data and rank == 0:
        tell_skipped(config.data, dataset.skipped)
    vae = build_vae(config, device)
    if config.prepare: return prepare(config, dataset, vae, device, rank, world_size)
    if config.data and vae and (cache := cache_file(config, dataset, vae)).exists():
        dataset.cache = cache
    teacher = build_teacher(config, dataset, device, rank)
    config = dataclasses.replace(
        config, num_classes=len(dataset.classes), class_names=tuple(dataset.classes),
        z_dim=config.hidden_size if config.self_depth else teacher.dim if teacher else 768)
    model = build_model(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, (0.9, 0.999), weight_decay=0.0,
                                  fused=True)                                        # Tab. 7
    parts = dict(model=model, ema=ema, optimizer=optimizer)
    out.mkdir(parents=True, exist_ok=True)
    start, log = resume(config, out, parts, rank), out / "log.jsonl"
    if rank == 0:
        size = f"{config.size}, {sum(p.numel() for p in ema.parameters()):,} weights"
        data = f"{len(dataset)} images{', cached latents' * bool(getattr(dataset, 'cache', ''))}"
        print(f"{config.method}, {size}, {data}, {world_size} x {device.type}, "
              f"steps {start} to {config.steps}; {out}", flush=True)
        if start >= config.steps: print("finished: raise --steps for more, or name another --out")
        lines = log.read_text().splitlines(True) if log.exists() else []
        log.write_text("".join(        # without what a killed run logged too much
            line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= start))
    attn = [tap_attention([blocks[:pair[side]][-1].attn for pair in config.attn_layers])
            for side, blocks in enumerate((model.blocks, teacher.vit.blocks))
            ] if config.attn_coeff else None
    torch.backends.cuda.enable_cudnn_sdp(config.cells == 1)   # masked: NaN, see pytorch#196678
    if config.compile and on_gpu: model.compile()               # in place: names of weights stay
    # One fixed batch with fixed noise and the paper's mask: on it all methods compare.
    fixed = default_collate([dataset[i * (len(dataset) - 1) // 31] for i in range(32)])
    fixed = load_batch(fixed, torch.zeros(32, *shape, device=device), vae, teacher)
    paper = dataclasses.replace(config, mask_ratio=Config.mask_ratio)
    paper = draw_step(32, shape, config.z_dim, paper, seeded(device), device)
    loader = iter(DataLoader(
        dataset, batch_sampler=index_batches(len(dataset), config, start, rank, world_size),
        num_workers=config.workers, pin_memory=on_gpu, worker_init_fn=own_group))
    ddp = nn.Identity() if world_size == 1 else functools.partial(
        nn.parallel.DistributedDataParallel, gradient_as_bucket_view=True)
    ddp_model, good = ddp(model), torch.tensor(start, device=device)
    sums, since, tick = 0.0, start, time.time()
    for step in tqdm(range(start, config.steps), initial=start, total=config.steps, disable=rank):
        if step >= config.stop_align_at > 0 and (attn or model.align_depth):     # HASTE's tau
            attn, model.align_depth, teacher = None, None, teacher if config.class_token else None
            model.projectors.requires_grad_(False)
            ddp_model = ddp(model)      # a new one: it does not wait for the projector's gradients
        # Drawn for the whole batch on every rank: 1, 2 or 8 processes follow one trajectory.
        generator = seeded(device, "step", config.seed, step)
        drawn = draw_step(config.batch_size, shape, config.z_dim, config, generator, device)
        drawn["eps"] = torch.randn(drawn["noise"].shape, generator=generator, device=device)
        for part in range(config.accum):
            mine = {name: value.chunk(pieces)[rank * config.accum + part]
                    for name, value in drawn.items() if value is not None}
            batch = load_batch(next(loader), mine.pop("eps"), vae, teacher)
            ddp_model.require_backward_grad_sync = part + 1 == config.accum
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16 and on_gpu):
                losses = training_losses(ddp_model, *batch, config, ema=ema, attn=attn, **mine)
            (losses["loss"] / config.accum).backward()
            sums += torch.stack(list(losses.values())).detach() / config.accum / world_size
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        # From the first gradient on that is not finite the fused AdamW changes nothing: it reads
        # found_inf (GradScaler's switch) on the GPU, so no step waits. `good` counts those before.
        finite = torch.isfinite(grad_norm) & (good == step)
        good, optimizer.found_inf = good + finite, (~finite).float()
        optimizer.step()
        optimizer.zero_grad()
        weights = [p.detach() for p in model.parameters()]     # after the step, which it includes
        torch._foreach_lerp_(list(ema.parameters()), weights, 1 - config.ema_decay)
        done, stop = step + 1, torch.tensor(len(signals))
        if world_size > 1: dist.all_reduce(stop)    # by gloo, on the CPU: all ranks stop together
        last, gaps = done == config.steps or bool(stop), done % config.gap_every == 0
        logs, saves = last or gaps or done % config.log_every == 0, done % config.save_every == 0
        if logs or saves:
            means = sums / (done - since)
            if world_size > 1: dist.all_reduce(means)
            means = dict(zip(losses, means.tolist()))
            if not finite:
                odd = [name for name, value in means.items() if not math.isfinite(value)]
                raise BadInput(f"step {int(good) + 1}: {', '.join(odd) or 'gradient'} not finite: "
                               f"checkpoints in {out}, if any, are good; try a smaller --lr")
        if logs and rank == 0:
            rate = config.batch_size * (done - since) / (time.time() - tick)
            # model.forward: neither DDP nor torch.compile takes part, as only rank 0 is here.
            gap, full = alignment_gap(model.forward, *fixed, config, ema=ema, **paper)
            record = dict(means, align_full=full, **(dict(gap=gap) if gaps else {}),
                          grad_norm=grad_norm.item(), images_per_s=rate)
            line = ", ".join(f"{name} {value:.4g}" for name, value in record.items() if value)
            tqdm.write(f"step {done}: {line}")
            with open(log, "a") as file: file.write(json.dumps(dict(step=done, **record)) + "\n")
        if rank == 0 and (saves or last): save(config, out, done, parts)
        if rank == 0 and (done % config.sample_every == 0 or done == config.steps):
            preview(ema, vae, config, out / f"samples-{done:07d}.png", device)
        if stop:
            if rank == 0: tqdm.write(f"stopped and saved at step {done}: the same command goes on")
            break
        if logs: sums, since, tick = 0.0, done, time.time()
def own_group(worker: int) -> None:
    """For a data worker: else a signal to the whole job ends it before the last step is done."""
    if hasattr(os, "setpgid"): os.setpgid(0, 0)
def main() -> None:
    """Trains from the command line; bad input ends it with one sentence."""
    signals, signs = [], (signal.SIGINT, signal.SIGTERM) * ("--prepare" not in sys.argv)
    for sign in signs: signal.signal(sign, lambda number, _: signals.append(number))
    try:
        train(parse_config(), signals)
        if dist.is_initialized(): dist.destroy_process_group()  # in train, its DDP could hang gloo
    except (BadInput, OSError, RuntimeError) as error:
        died = isinstance(error, ConnectionResetError) or "DataLoader worker (" in str(error)
        if isinstance(error, RuntimeError) and not died: raise
        advice = "a data worker died (memory? /dev/shm?): type the same again, or fewer --workers"
        sys.exit(f"maskalign.py: {advice if died else str(error).strip().splitlines()[-1]}")
if __name__ == "__main__":
    main()
