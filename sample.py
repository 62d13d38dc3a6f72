"""Images from a checkpoint: a labelled grid in seconds, or the 50,000 that an FID needs.

  python sample.py runs/maskalign-demo/latest.pt                   a grid; prints its path
  python sample.py CKPT --classes 207,360 --cfg_scale 4            chosen classes, stronger guidance
  python sample.py CKPT --trajectory                               how images come out of noise
  torchrun --nproc_per_node=8 sample.py CKPT --num_images 50000 --out samples.npz    for an FID

CKPT is a checkpoint of ours or a published one of SiT, REPA, REG or SRA. A grid uses the preset
`grid` (ODE, 25 steps, guidance 2: pictures to look at), --num_images the preset `fid` (SDE, 250
steps, no guidance: as the papers); typed flags win. Image i depends on --seed and i alone: on CPU
its bytes are the same for any batch size; on GPU, and for other numbers of threads, up to rounding.

Sections: 1 samplers, 2 checkpoints, 3 images by (seed, index), 4 the two uses, 5 the command.
A fork whose sampling network is a plain SiT is drawn as it is; another one hands `main` its own
Config, network or samplers.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch import distributed as dist
from tqdm import tqdm

import maskalign as ma
from maskalign import BadInput, Config, build_model, decode_latents, explained, require, seeded


# ---- 1. The samplers of the papers: from t = 1 (noise) to t = 0 (data), with every token ---------
def guided_velocities(model, state: list, t: float, y: Tensor, scales: list, dtype) -> list:
    """Velocities of state = [x] or [x, cls] at time t, guided by scales = [that of x, that of cls].
    x is guided where its scale is above 1, and only then the class token, where its own is above 0
    (as REG, whose scale 0 leaves it conditional); else only labels y are asked, in one call."""
    v = ma.velocities(model, state, t, y, dtype)
    if scales[0] <= 1:
        return v
    v_null = ma.velocities(model, state, t, torch.full_like(y, model.num_classes), dtype)
    pairs = zip(v, v_null, scales, strict=False)  # without a class token one scale is left over
    return [null + w * (label - null) if w > 0 else label for label, null, w in pairs]


@torch.no_grad()
def euler_maruyama(
    model,
    x,
    y,
    cls=None,
    *,
    num_steps: int = 250,
    cfg_scale: float = 1.0,
    cls_cfg_scale: float | None = None,
    guidance_low: float = 0.0,
    guidance_high: float = 1.0,
    sde: bool = True,
    heun: bool = False,
    randn_like=None,
) -> Tensor:
    """Integrates the reverse SDE, w_t = 2t, from standard normal x (N, C, H, W), cls (N, z_dim)
    and labels y (N,) -> latents like x. Guided where guidance_low <= t <= guidance_high; the class
    token by cls_cfg_scale, None: by cfg_scale. sde=False: dx/dt = v; heun averages v over both ends
    of a step. randn_like: asked for latent, then class token."""
    # NOTE(paper): it prints w_t = sigma_t = t; the code of its family uses twice that in the same
    # equation. The score, the gradient of log density, is -(x + (1-t) v) / t: so the drift
    # v - (w_t / 2) score is (2-t) v + x, and a step of dt < 0 adds noise of variance w_t |dt|.
    state, dtype = [part.double() for part in (x, cls) if part is not None], x.dtype
    guidance = [cfg_scale, cfg_scale if cls_cfg_scale is None else cls_cfg_scale]
    grid = (1.0, 0.04, num_steps) if sde else (1.0, 0.0, num_steps + 1)
    times = torch.linspace(*grid, dtype=torch.float64).tolist() + ([0.0] if sde else [])
    for t, t_next in zip(times, times[1:], strict=False):
        dt = t_next - t
        # For Heun the start of the step decides, as in the official code.
        scales = guidance if guidance_low <= t <= guidance_high else [1.0, 1.0]
        drift = guided_velocities(model, state, t, y, scales, dtype)
        if heun and t_next > 0:
            ahead = [a + dt * v for a, v in zip(state, drift, strict=True)]
            v_ahead = guided_velocities(model, ahead, t_next, y, scales, dtype)
            drift = [(v + v2) / 2 for v, v2 in zip(drift, v_ahead, strict=True)]
        if sde:
            drift = [(2 - t) * v + a for a, v in zip(state, drift, strict=True)]
        state = [a + dt * d for a, d in zip(state, drift, strict=True)]
        if sde and t_next > 0:  # the last step, 0.04 -> 0, adds none: it would stay visible
            randn = randn_like or torch.randn_like
            state = [a + math.sqrt(-2 * t * dt) * randn(a) for a in state]
    return state[0].to(dtype)


# maskalign.euler_ode with the flags of the papers; a test proves them equal.
euler_ode = functools.partial(euler_maruyama, num_steps=50, sde=False)
SAMPLERS = dict(sde=euler_maruyama, ode=euler_ode, heun=functools.partial(euler_ode, heun=True))


# ---- 2. Checkpoints: ours, and the published ones of SiT, REPA and REG ---------------------------
def load_checkpoint(
    path: str, raw: bool = False, num_heads: int = 0, kind=Config, build_model=build_model
) -> tuple[nn.Module, Config]:
    """The network of a checkpoint, in eval mode, and its config.
    raw: the trained weights in place of their average (EMA). num_heads is only needed for a
    published file of none of our SIZES: shapes do not tell it. kind, build_model: a fork's own.
    Raises BadInput for others (but a DiT has the same shapes as the original SiT, and a fork
    may have those of ours: without its keywords they would load and give noise)."""
    # REPA's and REG's files carry their command line as argparse.Namespace, a plain container.
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = ma.read_weights(str(path))
    name = "model" if raw else "ema"
    wrapped = isinstance(saved, dict) and not {"ema", "model"}.isdisjoint(saved)
    state = saved.get(name) if wrapped else saved
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise BadInput(f"{path} holds no state dict{f' called {name}' if wrapped else ''}")
    with explained(f"{path} holds no SiT that fits: name another, or use the command of its fork"):
        state = from_official(state)
        if wrapped and "config" in saved:
            config = read_config(saved["config"], kind)
        else:
            state, config = from_published(state, path, num_heads, kind)

        # Sampling needs no projector: one that is not of this network, as a fork's, is left out.
        model = build_model(config)
        if projector_shapes(state) != projector_shapes(model.state_dict()):
            for key in projector_shapes(state):
                del state[key]
            config = dataclasses.replace(config, align_coeff=0.0)
            model = build_model(config)
        model.load_state_dict(state)
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise BadInput(f"{path} holds weights that are not finite: name an earlier checkpoint")
    return model.eval().requires_grad_(False), config


def read_config(saved: dict, kind: type) -> Config:
    """The config in a checkpoint of ours, checked as what is typed. A fork's file may have more."""
    known = {field.name for field in dataclasses.fields(kind)} & saved.keys()
    known = {name: saved[name] for name in known}
    # The rows, maybe those of a fork, are mere names here: all that they set is in the file.
    rows = dict(method=kind.method, size=next(iter(kind.sizes)))
    config = ma.make_config(kind, **(known | rows))
    config = dataclasses.replace(config, method=known["method"], size=known["size"])
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if not isinstance(value, (int, float) if field.type is float else field.type):
            raise TypeError(f"{field.name} is {value!r}")
    names = config.class_names
    if len(names) not in (0, config.num_classes) or {*map(type, names)} - {str}:
        raise ValueError(f"class_names are {names}")
    return config


def projector_shapes(state: dict) -> dict:
    """Names and shapes of the projector in a state dict."""
    return {key: value.shape for key, value in state.items() if key.startswith("projectors.")}


def from_official(state_dict: dict) -> dict:
    """A REPA or REG state dict in our names; one that has them already passes unchanged."""
    new = {"cls_projectors2": "cls_embedder", "wg_norm": "cls_norm", "linear_cls": "cls_head"}
    renamed = {}
    for key, value in state_dict.items():
        parts = [part for part in key.split(".") if part not in ("module", "_orig_mod")]
        renamed[".".join(new.get(part, part) for part in parts)] = value
    return renamed


def from_published(state: dict, path: str, num_heads: int, kind: type) -> tuple[dict, Config]:
    """A published state dict -> (weights in our convention, config read off the shapes)."""
    state = merge_halves(state)
    dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
    class_token = "cls_norm.weight" in state
    tokens = state["pos_embed"].shape[1] - class_token
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    mixers = {key.split(".")[1] for key in state if key.startswith("mixer.")}
    out_dim = len(state["final_layer.linear.weight"])
    rows = {(row["hidden_size"], row["depth"]): row for row in kind.sizes.values()}
    row = rows.get((dim, depth), {})
    if not (num_heads or row):
        raise ValueError(f"width {dim}, depth {depth}: use load_checkpoint(..., num_heads=N)")
    projector = "projectors.0.4.weight" in state
    last = "projectors.0.4.weight" if projector else "final_layer.cls_head.weight"
    config = kind(
        method="published",
        size=Path(path).stem,
        hidden_size=dim,
        depth=depth,
        num_heads=num_heads or row["num_heads"],
        patch_size=patch,
        mixer_depth=len(mixers),
        class_token=class_token,
        num_classes=len(state["y_embedder.embedding_table.weight"]) - 1,
        z_dim=len(state[last]) if last in state else Config.z_dim,
        align_coeff=0.5 if projector else 0.0,
        align_depth=min(row.get("align_depth", 1), depth),
        projector_dim=len(state["projectors.0.0.weight"]) if projector else Config.projector_dim,
        image_size=math.isqrt(tokens) * patch * (8 if channels == 4 else 1),
        vae=Config.vae if channels == 4 else "none",
    )
    if out_dim == 2 * channels * patch**2:  # learn_sigma: only the original SiT has it
        state = from_original_sit(state, channels)
    unused = ("projectors.1.", "ap_head.")  # of a second teacher (REPA), or of SRA's training
    return {key: value for key, value in state.items() if not key.startswith(unused)}, config


def merge_halves(state: dict) -> dict:
    """REPA's first checkpoints number the blocks after the alignment layer anew: decoder_blocks."""
    first = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    renamed = {}
    for key, value in state.items():
        if key.startswith("decoder_blocks."):
            _, i, rest = key.split(".", 2)
            key = f"blocks.{int(i) + first}.{rest}"
        renamed[key] = value
    return renamed


def from_original_sit(state: dict, channels: int) -> dict:
    """The original SiT, whose time runs the other way, as a network of our convention. Exact.
    With t' = 1 - t, cos(w t') = cos w cos wt + sin w sin wt and sin(w t') = sin w cos wt - cos w
    sin wt: a rotation of the time features, which the first layer of the time MLP absorbs. Its
    velocity points from noise to data, so the last layer changes its sign; of the 2C outputs per
    pixel (learn_sigma) the second half is dropped."""
    state = dict(state)
    weight = state["t_embedder.mlp.0.weight"]
    omega = torch.exp(-math.log(10000.0) * torch.arange(128, dtype=torch.float32) / 128).double()
    a, b = weight.double().chunk(2, dim=1)  # of the cosines, of the sines
    turned = [a * omega.cos() + b * omega.sin(), a * omega.sin() - b * omega.cos()]
    state["t_embedder.mlp.0.weight"] = torch.cat(turned, dim=1).to(weight.dtype)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[name].unflatten(0, (-1, 2 * channels))[:, :channels]  # channel is fastest
        state[name] = -rows.flatten(0, 1)
    return state


# ---- 3. Images that depend on (seed, index) alone ------------------------------------------------
GUIDANCE = ("cfg_scale", "cls_cfg_scale", "guidance_low", "guidance_high")
GROUP = 16  # on CPU the network always sees images 16 k to 16 k + 15 together


@dataclasses.dataclass
class Job:
    """What is asked for, and what draws it: run fills it."""

    args: argparse.Namespace
    config: Config
    model: nn.Module
    vae: object  # AutoencoderKL; None in pixel space
    sampler: object  # called as euler_maruyama
    rank: int
    world_size: int
    device: torch.device


def randn_of(streams: list, like: Tensor) -> Tensor:
    """Standard normal noise like `like` (N, ...), a row from each of N generators on the CPU."""
    noise = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in streams]
    return torch.stack(noise).to(like.device)


def sample_images(job: Job, indices: range, label_of) -> np.ndarray:
    """Images uint8 (N, H, W, 3) of N indices; image i has class label_of(i), or -1: a random one.
    Each image has a random stream of its own: label, latent, class token, then the SDE's noise."""
    args, config, device = job.args, job.config, job.device
    streams = [seeded("cpu", "image", args.seed, i) for i in indices]
    # A label is drawn in any case: so an image has the same noise whatever its class.
    labels = [int(torch.randint(config.num_classes, (), generator=g)) for g in streams]
    for row, i in enumerate(indices):
        if label_of(i) >= 0:
            labels[row] = label_of(i)

    n, randn_like = len(indices), functools.partial(randn_of, streams)
    x = randn_like(torch.empty(n, *config.latent_shape, device=device))
    cls = randn_like(torch.empty(n, config.z_dim, device=device)) if config.class_token else None
    settings = {name: getattr(args, name) for name in GUIDANCE}
    settings |= dict(num_steps=args.steps, randn_like=randn_like)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.fast):
        x = job.sampler(job.model, x, torch.tensor(labels, device=device), cls, **settings)
    return decode_latents(job.vae, x).permute(0, 2, 3, 1).cpu().numpy()


def in_batches(job: Job, first: int, last: int, label_of) -> np.ndarray:
    """Images first..last - 1 as sample_images. Whole groups are computed, on CPU one at a time: so
    an image is always computed beside the same others, and its bytes never change."""
    start, stop = first // GROUP * GROUP, -(-last // GROUP) * GROUP
    size = GROUP * max(1, job.args.batch_size // GROUP if job.device.type == "cuda" else 1)
    batches = [range(i, min(i + size, stop)) for i in range(start, stop, size)]
    images = [sample_images(job, batch, label_of) for batch in batches]
    return np.concatenate(images)[first - start : last - start]


# ---- 4. The two uses: a picture, or very many images ---------------------------------------------
SHARD = 256  # images per resumable part of a large run


def save_grid(images: Tensor, names: list, path: Path) -> None:
    """Draws uint8 images (R * C, 3, H, W) as R rows, each with its name, into a PNG."""
    images = F.interpolate(images.cpu(), scale_factor=max(1, 96 // images.shape[-1]))  # big pixels
    grid = torchvision.utils.make_grid(images, len(images) // len(names), pad_value=255)
    picture = Image.new("RGB", (grid.shape[2] + 80, grid.shape[1]), "white")
    picture.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (80, 0))
    row = grid.shape[1] / len(names)
    for i, name in enumerate(names):
        place = (6, (i + 0.5) * row)
        ImageDraw.Draw(picture).text(place, name[:12], fill="black", anchor="lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def draw_grid(job: Job, classes: list) -> Tensor:
    """One row of --per_class images for each class, in reading order: uint8 (R * C, 3, H, W)."""
    each = job.args.per_class
    images = in_batches(job, 0, len(classes) * each, lambda i: classes[i // each % len(classes)])
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def draw_trajectory(job: Job, classes: list) -> Tensor:
    """One row for each class: the noisy state at eight times, from noise on, then the image."""
    states = {}  # by time, the last of each: guidance and Heun call the network there again

    def note(_, inputs):
        states[tuple(inputs[1].flatten().tolist())] = inputs[0]

    hook = job.model.register_forward_pre_hook(note)
    final = sample_images(job, range(GROUP), lambda i: classes[i % len(classes)])
    hook.remove()
    visited = list(states.values())
    kept = [visited[round(i)] for i in np.linspace(0, len(visited) - 1, 8)]
    frames = [decode_latents(job.vae, state).cpu() for state in kept]
    frames.append(torch.from_numpy(final).permute(0, 3, 1, 2))
    return torch.stack([frame[: len(classes)] for frame in frames], dim=1).flatten(0, 1)


@contextlib.contextmanager
def whole_file(path: Path):
    """A file to write that gets its name once it is whole: a kill leaves none, or the old one."""
    with open(f"{path}.tmp", "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def write_many(job: Job, protocol: dict) -> Path:
    """--num images as an ADM npz (arr_0, uint8 NHWC) or as PNG files; returns the path.
    Works in shards: a finished one is a file, and a run that was killed goes on with the next."""
    args, text = job.args, json.dumps(protocol, indent=1).encode()
    out = Path(args.png or args.out)
    work = out if args.png else Path(f"{out}.parts")
    record = out / "samples.json" if args.png else out.with_suffix(".json")
    if out.exists() and record.exists() and record.read_bytes() == text:
        return out  # finished before

    shards = [work / f"{k:06d}.raw" for k in range(-(-args.num // SHARD))]
    if job.rank == 0:
        claim(out, record, shards, text)
    if job.world_size > 1:
        dist.barrier()
    mine = range(job.rank, len(shards), job.world_size)  # whatever the others have done by now
    missing = [k for k in mine if not is_whole(job, shards[k])]
    for k in tqdm(missing, f"shards of {SHARD}", disable=job.rank > 0):
        write_shard(job, k, shards[k])
    if job.rank == 0:
        while not all(is_whole(job, shard) for shard in shards):  # a barrier would time out
            time.sleep(1)
        finish(job, shards, out, record, text)
    return out


def claim(out: Path, record: Path, shards: list, protocol: bytes) -> None:
    """Makes the folder in which shards of this protocol are collected. Raises BadInput where it
    holds something else, or where the result would replace what this program did not write."""
    work, claimed = shards[0].parent, shards[0].with_name("protocol.json")
    found = claimed.read_bytes() if claimed.exists() else None
    others = {file.name for file in work.glob("*")} - {"protocol.json.tmp"}  # of a kill in here
    foreign = others if found is None else not protocol.startswith(found)
    if foreign:
        raise BadInput(f"{work} holds other files, or images of other settings: name another")
    if record.exists() or out.exists() and work != out and found is None:
        with explained(f"{out}, {record.name} may not be of this program: name another --out"):
            if json.loads(record.read_bytes()).keys() != json.loads(protocol).keys():
                raise ValueError("no record of samples")

    work.mkdir(parents=True, exist_ok=True)
    if found != protocol:  # new; or cut short: then nobody knows of what settings the shards are
        for shard in shards:
            shard.unlink(missing_ok=True)
        with whole_file(claimed) as file:
            file.write(protocol)


def is_whole(job: Job, shard: Path) -> bool:
    """Whether a shard was written to its end."""
    count = 0 if job.args.png else min(SHARD, job.args.num - int(shard.stem) * SHARD)
    return shard.exists() and shard.stat().st_size == count * 3 * job.config.image_size**2


def write_shard(job: Job, k: int, shard: Path) -> None:
    """Draws images k * SHARD to (k + 1) * SHARD - 1 into a file, or into PNG files beside it."""
    args, num_classes = job.args, job.config.num_classes
    first, last = k * SHARD, min((k + 1) * SHARD, args.num)
    balanced = args.labels == "balanced"
    images = in_batches(job, first, last, lambda i: i % num_classes if balanced else -1)
    if args.png:
        for i, image in enumerate(images, start=first):
            Image.fromarray(image).save(shard.with_name(f"{i:06d}.png"))
        images = images[:0]  # an empty shard marks them as done
    with whole_file(shard) as file:
        file.write(images.tobytes())


def finish(job: Job, shards: list, out: Path, record: Path, protocol: bytes) -> None:
    """Joins the shards into one npz, as a stream: memory stays flat. Stores the protocol beside it,
    or in the folder of PNG files, and tidies up."""
    work, side = shards[0].parent, job.config.image_size
    if not job.args.png:
        record.unlink(missing_ok=True)  # it never stands beside images of other settings
        header = dict(descr="|u1", fortran_order=False, shape=(job.args.num, side, side, 3))
        with (
            whole_file(out) as file,
            zipfile.ZipFile(file, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as array,
        ):
            np.lib.format.write_array_header_1_0(array, header)
            for shard in shards:
                array.write(shard.read_bytes())
    with whole_file(record) as file:
        file.write(protocol)
    for file in (*shards, work / "protocol.json"):
        file.unlink()
    with contextlib.suppress(OSError):  # a folder of PNG files is not empty
        work.rmdir()


# ---- 5. The command ------------------------------------------------------------------------------
PRESETS = {
    "grid": dict(sampler="ode", steps=25, cfg_scale=2.0),
    "fid": dict(sampler="sde", steps=250, cfg_scale=1.0, out="samples.npz"),
}


def parse_classes(text: str, config: Config) -> list:
    """`207,360` or names, as in the data -> labels. Without any: eight classes, evenly spread."""
    if not text:
        return sorted({round(k) for k in np.linspace(0, config.num_classes - 1, 8)})
    names = {name: k for k, name in enumerate(config.class_names)}
    names |= {str(k): k for k in range(config.num_classes)}
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in names:
            known = ", ".join([f"0 to {config.num_classes - 1}", *config.class_names[:8]])
            raise BadInput(f"unknown class {word!r}: choose from {known}")
    return [names[word] for word in words]


def build_parser(samplers: dict) -> argparse.ArgumentParser:
    """The flags."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=raw)
    add = parser.add_argument
    add("checkpoint", help="latest.pt of a run, or a published file")
    add("--classes", default="", help="numbers or names, with commas between [8 of all]")
    add("--per_class", type=int, help="images per row of the grid [8]")
    note = "write this many images, no grid (older torchruns take --num for a flag of their own)"
    add("--num", "--num_images", type=int, default=0, help=note)
    add("--out", help="file to write [grid.png beside the checkpoint, or samples.npz]")
    add("--png", default="", metavar="DIR", help="with --num: PNG files in DIR instead of an npz")
    add("--labels", choices=["random", "balanced"], help="with --num [random]")
    add("--trajectory", action="store_true", help="draw the way from noise to image")
    add("--sampler", choices=samplers, help="[grid: ode, --num: sde]")
    add("--steps", type=int, help="steps of the sampler [grid: 25, --num: 250]")
    add("--cfg_scale", type=float, help="guidance; 1 is none [grid: 2, --num: 1]")
    add("--cls_cfg_scale", type=float, help="that of the class token; 0 is none [cfg_scale]")
    add("--guidance_low", type=float, default=0.0, help="guide only where t is at least this [0]")
    add("--guidance_high", type=float, default=1.0, help="... and at most this; 1 is noise [1]")
    add("--seed", type=int, default=0, help="image i depends on this and on i alone [0]")
    add("--raw", action="store_true", help="the trained weights, not their average (EMA)")
    add("--batch_size", type=int, default=64, help="images at a time on a GPU [64]; CPU: 16")
    add("--fast", action="store_true", help="bf16, and torch.compile on GPU; the record is float32")
    add("--vae_weights", default="", help="file to read instead of the hub's VAE")
    return parser


def parse_args(argv: list | None = None, samplers: dict = SAMPLERS) -> argparse.Namespace:
    """The command line, with the preset filled in. Raises BadInput."""
    args = build_parser(samplers).parse_args(argv)
    # What would have no effect is refused.
    for name in ("classes", "per_class", "trajectory"):
        require(args, name, not (args.num and getattr(args, name)), "used without --num_images")
    for name in ("png", "labels"):
        require(args, name, args.num or not getattr(args, name), "used with --num_images")
    require(args, "per_class", not (args.trajectory and args.per_class), "used for grids alone")
    require(args, "out", not (args.out and args.png), "used without --png")

    preset = PRESETS["fid" if args.num else "grid"] | dict(per_class=8, labels="random")
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.sampler not in samplers:
        args.sampler = next(iter(samplers))  # a fork's own comes first

    for name in ("per_class", "steps", "batch_size"):
        require(args, name, getattr(args, name) > 0, "above 0")
    for name in ("num", "seed"):
        require(args, name, getattr(args, name) >= 0, "0 or above")
    fits = 0 <= args.guidance_low <= args.guidance_high <= 1
    require(args, "guidance_low", fits, "at most guidance_high, both between 0 and 1")
    ending = ".npz" if args.num else ".png"
    fits = args.out is None or Path(args.out).suffix == ending
    require(args, "out", fits, f"a name that ends with {ending}")
    require(args, "cfg_scale", 1 <= args.cfg_scale < math.inf, "1 (no guidance) or above")
    scale = args.cls_cfg_scale or 0.0
    require(args, "cls_cfg_scale", 0 <= scale < math.inf, "0 (no guidance) or above")
    return args


def protocol_of(args: argparse.Namespace, config: Config) -> dict:
    """All that decides the images of a large run: stored beside them."""
    with open(args.checkpoint, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    names = ("num", "labels", "sampler", "steps", *GUIDANCE, "seed")
    return {name: getattr(args, name) for name in names} | dict(
        weights="raw" if args.raw else "ema",
        precision="bf16" if args.fast else "float32",
        checkpoint=digest[:16],
        method=config.method,
        size=config.size,
        vae=config.vae_weights or config.vae,
        image_size=config.image_size,
        pixels="truncated to uint8",
    )


def run(args, *, kind=Config, build_model=build_model, samplers=SAMPLERS) -> Path:
    """What the command line asks for; returns the path that was, or is being, written."""
    rank, world_size, device = ma.setup_distributed()
    model, config = load_checkpoint(args.checkpoint, args.raw, kind=kind, build_model=build_model)
    config = dataclasses.replace(config, vae_weights=args.vae_weights or config.vae_weights)
    classes = parse_classes(args.classes, config)
    vae, sampler = ma.build_vae(config, device), samplers[args.sampler]
    job = Job(args, config, model.to(device), vae, sampler, rank, world_size, device)
    if not args.fast:  # true float32: no TF32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    elif device.type == "cuda" and not args.trajectory:
        model.compile()

    protocol = protocol_of(args, config)
    if rank == 0:
        print(", ".join(f"{name} {value}" for name, value in protocol.items()), flush=True)
    if args.num:
        path = write_many(job, protocol)
    else:
        use, draw = ("trajectory", draw_trajectory) if args.trajectory else ("grid", draw_grid)
        path = Path(args.out or Path(args.checkpoint).with_name(f"{use}.png"))
        classes = classes[:GROUP] if args.trajectory else classes
        names = config.class_names or range(config.num_classes)  # published files tell none
        if rank == 0:
            save_grid(draw(job, classes), [str(names[k]) for k in classes], path)
    if rank == 0:
        print(path)
    if world_size > 1:
        dist.destroy_process_group()
    return path


def main(*, kind=Config, build_model=build_model, samplers=SAMPLERS) -> None:
    """Samples from the command line; bad input ends it with one sentence. A fork hands in its own
    kind of Config, build_model(config), or samplers by name, each called as euler_maruyama."""
    name = Path(sys.argv[0]).name
    try:
        args = parse_args(samplers=samplers)
        run(args, kind=kind, build_model=build_model, samplers=samplers)
    except BadInput as error:
        sys.exit(f"{name}: {error}")
    except OSError as error:
        sys.exit(f"{name}: cannot write: {error}; finished shards stay, run again to go on")


if __name__ == "__main__":
    main()
