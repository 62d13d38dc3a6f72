"""Images from a checkpoint: a labelled grid in seconds, or the 50,000 that an FID needs.

  python sample.py runs/maskalign-demo/latest.pt                   a grid; prints its path
  python sample.py CKPT --classes 207,360 --cfg_scale 4            chosen classes, stronger guidance
  python sample.py CKPT --trajectory                               how images come out of noise
  torchrun --nproc_per_node=8 sample.py CKPT --num_images 50000 --out samples.npz    for an FID

CKPT is a checkpoint of ours or a published one of SiT, REPA or REG. A grid uses the preset `grid`
(ODE, 25 steps, guidance 2: pictures to look at), --num_images the preset `fid` (SDE, 250 steps,
no guidance: as the papers); typed flags win. Image i depends on --seed and i alone: on CPU its
bytes are the same for any number of processes and any batch size; on GPU up to rounding.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from maskalign import (
    SIZES,
    BadInput,
    Config,
    SiT,
    SiTOutput,
    build_model,
    build_vae,
    decode_latents,
    read_weights,
    seeded,
    setup_distributed,
    velocities,
)


# ---- 0. The samplers of the papers: from t = 1 (noise) to t = 0 (data), with every token ---------
def guided_velocities(model, state: list, t: float, y: Tensor, scales: list, dtype) -> list:
    """Velocities of state = [x] or [x, cls], each guided by its scale w where w > 1 or, for the
    class token, above 0 (as REG, whose scale 0 leaves it conditional): see euler_ode."""
    v = velocities(model, state, t, y, dtype)
    if scales[0] <= 1:
        return v
    v_null = velocities(model, state, t, torch.full_like(y, model.num_classes), dtype)
    pairs = zip(v, v_null, scales, strict=False)
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


euler_ode = functools.partial(euler_maruyama, num_steps=50, sde=False)
SAMPLERS = {
    "sde": euler_maruyama,
    "ode": euler_ode,
    "heun": functools.partial(euler_ode, heun=True),
}
PRESETS = {
    "grid": dict(sampler="ode", steps=25, cfg_scale=2.0),
    "fid": dict(sampler="sde", steps=250, cfg_scale=1.0),
}
GROUP = 16  # on CPU the network always sees images 16 k to 16 k + 15 together
SHARD = 256  # images per resumable part of a large run


def save_grid(images: Tensor, names: list, path) -> None:
    """Draws uint8 images (R * C, 3, H, W) as R rows, each with its name, into a PNG."""
    images = F.interpolate(images.cpu(), scale_factor=max(1, 96 // images.shape[-1]))  # big pixels
    grid = torchvision.utils.make_grid(images, len(images) // len(names), pad_value=255)
    picture = Image.new("RGB", (grid.shape[2] + 80, grid.shape[1]), "white")
    picture.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (80, 0))
    row = grid.shape[1] / len(names)
    for i, name in enumerate(names):
        place = (6, (i + 0.5) * row)
        ImageDraw.Draw(picture).text(place, name[:12], fill="black", anchor="lm")
    picture.save(path)


# ---- 1. Checkpoints: ours, and the published ones of SiT, REPA and REG ---------------------------
def load_checkpoint(path: str, raw: bool = False, num_heads: int = 0) -> tuple[SiT, Config]:
    """The network of a checkpoint, in eval mode, and its config.

    raw: the trained weights in place of their average (EMA). num_heads is only needed for a
    published file of none of our SIZES: shapes do not tell it. Raises BadInput for other files
    (but a DiT has the same shapes as the original SiT: it would load and give noise)."""
    # REPA's and REG's files carry their command line as argparse.Namespace, a plain container.
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = read_weights(str(path))
    kind = "model" if raw else "ema"
    wrapped = isinstance(saved, dict) and not {"ema", "model"}.isdisjoint(saved)
    state = saved.get(kind) if wrapped else saved
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise BadInput(f"{path} holds no state dict{f' called {kind}' if wrapped else ''}")
    state = from_official(state)
    if wrapped and isinstance(saved.get("config"), dict):
        known = {field.name for field in dataclasses.fields(Config)}
        config = Config(**{name: v for name, v in saved["config"].items() if name in known})
    else:
        state, config = from_published(state, path, num_heads)
    model = build_model(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()[:150]
        raise BadInput(f"{path} does not fit the network it describes: {first}") from error
    return model.eval().requires_grad_(False), config


def from_official(state_dict: dict) -> dict:
    """A REPA or REG state dict in our names; one that has them already passes unchanged."""
    new = {"cls_projectors2": "cls_embedder", "wg_norm": "cls_norm", "linear_cls": "cls_head"}
    renamed = {}
    for key, value in state_dict.items():
        parts = [part for part in key.split(".") if part not in ("module", "_orig_mod")]
        renamed[".".join(new.get(part, part) for part in parts)] = value
    return renamed


def from_published(state: dict, path: str, num_heads: int = 0) -> tuple[dict, Config]:
    """A published state dict -> (weights in our convention, config read off the shapes)."""
    try:
        state = merge_halves(state)
        dim, channels, patch, _ = state["x_embedder.proj.weight"].shape
        table = state["y_embedder.embedding_table.weight"]
        class_token = "cls_norm.weight" in state
        tokens = state["pos_embed"].shape[1] - class_token
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        mixers = {key.split(".")[1] for key in state if key.startswith("mixer.")}
        out_dim = len(state["final_layer.linear.weight"])
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise BadInput(f"{path} holds no checkpoint of SiT, REPA or REG ({error})") from error
    size = next(
        (row for row in SIZES.values() if (row["hidden_size"], row["depth"]) == (dim, depth)), {}
    )
    if not (num_heads or size):
        raise BadInput(
            f"{path} has width {dim} and depth {depth}, none of our sizes: use "
            "load_checkpoint(..., num_heads=N)"
        )
    projector = "projectors.0.0.weight" in state
    last = "projectors.0.4.weight" if projector else "final_layer.cls_head.weight"
    config = dataclasses.replace(
        Config(),
        method="published",
        size=Path(path).stem,
        hidden_size=dim,
        depth=depth,
        num_heads=num_heads or size["num_heads"],
        patch_size=patch,
        mixer_depth=len(mixers),
        class_token=class_token,
        num_classes=len(table) - 1,
        z_dim=len(state[last]) if last in state else Config.z_dim,
        align_coeff=0.5 if projector else 0.0,
        align_depth=min(size.get("align_depth", 1), depth),
        projector_dim=len(state["projectors.0.0.weight"]) if projector else Config.projector_dim,
        image_size=math.isqrt(tokens) * patch * (8 if channels == 4 else 1),
        vae=Config.vae if channels == 4 else "none",
    )
    if out_dim == 2 * channels * patch**2:  # learn_sigma: only the original SiT has it
        state = from_original_sit(state, channels)
    unused = ("projectors.1", "ap_head")  # of a second teacher (REPA), or of SRA's training
    state = {key: value for key, value in state.items() if not key.startswith(unused)}
    return state, config


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


# ---- 2. Images that depend on (seed, index) alone ------------------------------------------------
class InGroups:
    """Calls a network on GROUP images at a time: a result then cannot depend on the batch size."""

    def __init__(self, model: SiT):
        self.model, self.patch_size, self.num_classes = model, model.patch_size, model.num_classes

    def __call__(self, *inputs) -> SiTOutput:
        parts = [self.model(*group) for group in zip(*(part.split(GROUP) for part in inputs))]
        return SiTOutput(
            *(None if column[0] is None else torch.cat(column) for column in zip(*parts))
        )


def sample_images(model: SiT, vae, config: Config, indices: list, labels: list, args) -> np.ndarray:
    """Images uint8 (n, H, W, 3) of the given indices; labels of -1 are drawn at random.

    Each image has a random stream of its own: label, latent, class token, then the SDE's noise."""
    device = next(model.parameters()).device
    streams = [seeded("cpu", "image", args.seed, i) for i in indices]
    drawn = [int(torch.randint(config.num_classes, (), generator=g)) for g in streams]
    y = torch.tensor([d if k < 0 else k for d, k in zip(drawn, labels)], device=device)

    def randn(like: torch.Tensor) -> torch.Tensor:
        noise = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in streams]
        return torch.stack(noise).to(device)

    x = randn(torch.empty(len(indices), *config.latent_shape))
    cls = randn(torch.empty(len(indices), config.z_dim)) if config.class_token else None
    fast = torch.autocast(device.type, torch.bfloat16) if args.fast else contextlib.nullcontext()
    with fast:
        x = SAMPLERS[args.sampler](
            model if device.type == "cuda" else InGroups(model),
            x,
            y,
            cls,
            num_steps=args.steps,
            cfg_scale=args.cfg_scale,
            cls_cfg_scale=args.cls_cfg_scale,
            randn_like=randn,
            guidance_low=args.guidance_low,
            guidance_high=args.guidance_high,
        )
    parts = x.split(GROUP) if device.type == "cpu" else [x]
    images = torch.cat([decode_latents(vae, part) for part in parts])
    return images.permute(0, 2, 3, 1).cpu().numpy()


def in_batches(model, vae, config, first: int, last: int, labels, args) -> np.ndarray:
    """Images first..last - 1; whole groups are computed, so that their members never change."""
    start, stop = first // GROUP * GROUP, -(-last // GROUP) * GROUP
    size = max(GROUP, args.batch_size // GROUP * GROUP)
    images = [
        sample_images(
            model,
            vae,
            config,
            list(range(i, min(i + size, stop))),
            [labels(k) for k in range(i, min(i + size, stop))],
            args,
        )
        for i in range(start, stop, size)
    ]
    return np.concatenate(images)[first - start : last - start]


# ---- 3. The two uses -----------------------------------------------------------------------------
def draw_grid(model, vae, config, classes: list, args) -> Path:
    """One row of --per_class images for each class."""
    path = Path(args.out or Path(args.checkpoint).with_name("grid.png"))
    path.parent.mkdir(parents=True, exist_ok=True)
    images = in_batches(
        model,
        vae,
        config,
        0,
        len(classes) * args.per_class,
        lambda i: classes[min(i // args.per_class, len(classes) - 1)],
        args,
    )
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    save_grid(images, [name_of(k, config) for k in classes], path)
    return path


def draw_trajectory(model, vae, config, classes: list, args) -> Path:
    """One row for each class: the noisy state at nine times, from noise (left) to the image."""
    states, path = [], Path(args.out or Path(args.checkpoint).with_name("trajectory.png"))

    @torch.compiler.disable  # a list that grows would be compiled anew at each step
    def record(module, inputs):
        states.append(inputs[0][:GROUP].float())

    path.parent.mkdir(parents=True, exist_ok=True)
    hook = model.register_forward_pre_hook(record)
    classes = classes[:GROUP]
    padded = classes + classes[-1:] * (GROUP - len(classes))
    final = sample_images(model, vae, config, list(range(GROUP)), padded, args)
    hook.remove()
    kept = [states[round(i)] for i in np.linspace(0, len(states) - 1, 8)]
    frames = [decode_latents(vae, state) for state in kept]
    frames.append(torch.from_numpy(final).permute(0, 3, 1, 2).to(frames[0].device))
    film = torch.stack([frame[: len(classes)] for frame in frames], dim=1).flatten(0, 1)
    save_grid(film, [name_of(k, config) for k in classes], path)
    return path


def write_many(model, vae, config, args, protocol: dict, rank: int, world_size: int) -> Path:
    """--num images as an ADM npz (arr_0, uint8 NHWC) or as PNG files; returns the path.

    Works in shards: a shard that is finished is a file, and a run that was killed goes on with the
    next one. The npz is joined from them as a stream, so that memory stays flat."""
    out, size = Path(args.png or args.out), config.image_size
    work = out if args.png else Path(f"{out}.parts")
    settings, record = (
        work / "protocol.json",
        (out / "samples.json" if args.png else out.with_suffix(".json")),
    )
    shards = [work / f"{k:06d}.npy" for k in range(-(-args.num // SHARD))]
    if out.exists() and record.exists() and json.loads(record.read_text()) == protocol:
        return out  # finished before
    if rank == 0:
        work.mkdir(parents=True, exist_ok=True)
        for file in (settings, record) if args.png else (settings,):
            if file.exists() and json.loads(file.read_text()) != protocol:
                raise BadInput(f"{work} holds images of other settings: delete it, or name another")
        Path(f"{settings}.tmp").write_text(json.dumps(protocol))
        os.replace(f"{settings}.tmp", settings)
    if world_size > 1:
        dist.barrier()
    missing = [k for k, shard in enumerate(shards) if not shard.exists()]
    if world_size > 1:  # only now: else a fast rank's first shard would shift another's share
        dist.barrier()
    labels = (lambda i: i % config.num_classes) if args.labels == "balanced" else (lambda i: -1)
    for k in tqdm(missing[rank::world_size], f"shards of {SHARD}", disable=rank > 0):
        first, last = k * SHARD, min((k + 1) * SHARD, args.num)
        images = in_batches(model, vae, config, first, last, labels, args)
        if args.png:
            for i, image in enumerate(images, start=first):
                Image.fromarray(image).save(work / f"{i:06d}.png")
            images = images[:0]  # the mark of a finished shard
        with open(f"{shards[k]}.tmp", "wb") as file:
            np.save(file, images)
        os.replace(f"{shards[k]}.tmp", shards[k])
    if rank > 0:
        return out
    while not all(shard.exists() for shard in shards):  # a barrier would time out after minutes
        time.sleep(1)
    record.write_text(json.dumps(protocol, indent=1))
    if args.png:
        for file in (settings, *shards):
            file.unlink()
        return out
    with (
        zipfile.ZipFile(f"{out}.tmp", "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        header = dict(descr="|u1", fortran_order=False, shape=(args.num, size, size, 3))
        np.lib.format.write_array_header_1_0(file, header)
        for shard in shards:
            file.write(np.load(shard).tobytes())
    os.replace(f"{out}.tmp", out)
    shutil.rmtree(work, ignore_errors=True)
    return out


def name_of(k: int, config: Config) -> str:
    """The name of class k in the data, or its number where the checkpoint tells no names."""
    return config.class_names[k] if config.class_names else str(k)


def parse_classes(text: str, config: Config) -> list:
    """`207,360` or names, as in the data -> labels. Without any: eight classes, evenly spread."""
    if not text:
        return sorted({round(k) for k in np.linspace(0, config.num_classes - 1, 8)})
    names = {name: k for k, name in enumerate(config.class_names)}
    names.update({str(k): k for k in range(config.num_classes)})
    for part in text.split(","):
        if part.strip() not in names:
            some = f" or {', '.join(config.class_names[:8])}" if config.class_names else ""
            raise BadInput(
                f"unknown class {part.strip()!r}: choose from 0 to {config.num_classes - 1}{some}"
            )
    return [names[part.strip()] for part in text.split(",")]


def parse_args(argv: list | None = None) -> argparse.Namespace:
    """The command line, with the preset filled in. Raises BadInput."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", help="latest.pt of a run, or a published file")
    add("--classes", default="", help="numbers or names, with commas between [8 of all]")
    add("--per_class", type=int, default=8, help="images per row of the grid [8]")
    add(
        "--num",
        "--num_images",
        type=int,
        default=0,
        help="write this many images, no grid "
        "(under torchrun type --num_images: older Pythons take --num for its --numa-binding)",
    )
    add("--out", default="", help="file to write [grid.png beside the checkpoint, or samples.npz]")
    add("--png", default="", metavar="DIR", help="with --num: PNG files in DIR instead of an npz")
    add("--labels", choices=["random", "balanced"], default="random", help="with --num [random]")
    add("--trajectory", action="store_true", help="draw the way from noise to image")
    add("--sampler", choices=SAMPLERS, help="[grid: ode, --num: sde]")
    add("--steps", type=int, help="steps of the sampler [grid: 25, --num: 250]")
    add("--cfg_scale", type=float, help="guidance; 1 is none [grid: 2, --num: 1]")
    add("--cls_cfg_scale", type=float, help="that of the class token; 0 is none [cfg_scale]")
    add("--guidance_low", type=float, default=0.0, help="guide only where t is at least this [0]")
    add("--guidance_high", type=float, default=1.0, help="... and at most this; 1 is noise [1]")
    add("--seed", type=int, default=0, help="image i depends on this and on i alone [0]")
    add("--raw", action="store_true", help="the trained weights, not their average (EMA)")
    add("--batch_size", type=int, default=64, help="images at a time per process [64]")
    add("--fast", action="store_true", help="bf16, and torch.compile on GPU; the record is float32")
    add("--vae_weights", default="", help="file to read instead of the hub's VAE")
    args = parser.parse_args(argv)
    for name, value in PRESETS["fid" if args.num else "grid"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.num and not args.out:
        args.out = "samples.npz"
    ending = ".npz" if args.num else ".png"
    scale = 1.0 if args.cls_cfg_scale is None else args.cls_cfg_scale
    for name, fits, rule in (
        ("per_class", args.per_class > 0, "above 0"),
        ("steps", args.steps > 0, "above 0"),
        ("batch_size", args.batch_size > 0, "above 0"),
        ("num", args.num >= 0, "0 or above"),
        ("seed", args.seed >= 0, "0 or above"),
        ("png", args.num or not args.png, "used with --num_images"),
        ("out", not args.out or args.out.endswith(ending), f"a name that ends with {ending}"),
        ("cfg_scale", 1 <= args.cfg_scale < math.inf, "1 (no guidance) or above"),
        ("cls_cfg_scale", 0 <= scale < math.inf, "0 (no guidance) or above"),
        ("guidance_low", 0 <= args.guidance_low <= 1, "between 0 and 1"),
        ("guidance_high", 0 <= args.guidance_high <= 1, "between 0 and 1"),
    ):
        if not fits:
            raise BadInput(f"{name} is {getattr(args, name)}: it must be {rule}")
    return args


def run(args: argparse.Namespace) -> Path:
    """What the command line asks for; returns the path that was written."""
    rank, world_size, device = setup_distributed()
    model, config = load_checkpoint(args.checkpoint, args.raw)
    classes = parse_classes(args.classes, config)
    config = dataclasses.replace(config, vae_weights=args.vae_weights or config.vae_weights)
    model, vae = model.to(device), build_vae(config, device)
    if not args.fast:  # true float32: no TF32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    elif device.type == "cuda":
        model.compile()
    digest = hashlib.sha256()
    with open(args.checkpoint, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    protocol = {
        name: getattr(args, name)
        for name in (
            "num",
            "labels",
            "sampler",
            "steps",
            "cfg_scale",
            "cls_cfg_scale",
            "guidance_low",
            "guidance_high",
            "seed",
        )
    }
    protocol.update(
        weights="raw" if args.raw else "ema",
        precision="bf16" if args.fast else "float32",
        checkpoint=digest.hexdigest()[:16],
        method=config.method,
        size=config.size,
        vae=config.vae_weights or config.vae,
        image_size=config.image_size,
        pixels="truncated to uint8",
    )
    if rank == 0:
        print(", ".join(f"{name} {value}" for name, value in protocol.items()), flush=True)
    if args.num:
        path = write_many(model, vae, config, args, protocol, rank, world_size)
    elif rank == 0:
        draw = draw_trajectory if args.trajectory else draw_grid
        path = draw(model, vae, config, classes, args)
    if rank == 0:
        print(path)
    if world_size > 1:
        dist.destroy_process_group()
    return path if rank == 0 else None


def main() -> None:
    """Samples from the command line; bad input ends it with one sentence."""
    try:
        run(parse_args())
    except BadInput as error:
        sys.exit(f"sample.py: {error}")
    except OSError as error:
        sys.exit(f"sample.py: cannot write: {error}; finished shards stay, run again to go on")


if __name__ == "__main__":
    main()
