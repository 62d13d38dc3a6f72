"""Generates images from a checkpoint: a labelled grid, or the 50,000 of an FID.

  python sample.py runs/maskalign-demo/latest.pt          a grid
  python sample.py CKPT --classes 207,360 --cfg_scale 4   chosen classes, more guidance
  python sample.py CKPT --trajectory                      from noise to image: PNG and GIF
  torchrun --nproc_per_node=8 sample.py CKPT --num_images 50000

CKPT is a checkpoint of maskalign.py, or a published file of SiT, REPA, REG or SRA, which
also needs --method and --size. A grid takes 25 steps of the ODE and guidance 2.
--num_images takes the papers' 250 steps of the SDE, without guidance.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

import maskalign as ma


# ---- 1. The samplers of the papers: from noise at t = 1 to latents at t = 0
# Called like maskalign.euler_ode. guidance is for `scales`, randn_like for the SDE.
def scales(t, cfg_scale=1.0, cls_cfg_scale=None, guidance_low=0.0, guidance_high=1.0):
    """Guidance of x and of cls (None: the same) at t. 1 is none; for cls, 0 is, too (REG)."""
    if not guidance_low <= t <= guidance_high:
        return 1.0, 1.0
    return cfg_scale, (1.0 if cls_cfg_scale == 0 else cls_cfg_scale)


@torch.no_grad()
def euler_maruyama(model, x, y, cls=None, *, num_steps=250, randn_like=None, **guidance):
    """The papers' sampler, the reverse SDE.

    Noise spreads points, and the drift v - (w_t / 2) score pulls them back. score, the
    gradient of the log density, is -(x + (1 - t) v) / t. With w_t = 2t the drift is
    (2 - t) v + x, and the noise of a step dt < 0 has variance 2t |dt|.
    NOTE(paper): it prints w_t = t. SiT, REPA and REG use 2t, and so do we.
    """
    randn_like = randn_like or torch.randn_like
    dtype = x.dtype
    x = x.double()
    cls = None if cls is None else cls.double()
    # The last step, from 0.04 as in SiT, adds no noise: it would stay visible.
    times = [*torch.linspace(1.0, 0.04, num_steps, dtype=torch.float64).tolist(), 0.0]
    for t, t_next in itertools.pairwise(times):
        dt = t_next - t
        v, v_cls = ma.guided_velocity(model, x, t, y, cls, dtype, *scales(t, **guidance))
        x = x + dt * ((2 - t) * v + x)
        if cls is not None:
            cls = cls + dt * ((2 - t) * v_cls + cls)
        if t_next > 0:
            std = math.sqrt(-2 * t * dt)
            x = x + std * randn_like(x)
            cls = None if cls is None else cls + std * randn_like(cls)
    return x.to(dtype)


def euler_ode(model, x, y, cls=None, *, num_steps=50, randn_like=None, states=None, **guidance):
    """maskalign.euler_ode with all `scales`. The list states gets x at each step."""
    field = functools.partial(velocity, guidance=guidance, states=states)
    return ma.euler_ode(model, x, y, cls, num_steps=num_steps, velocity=field)


def velocity(model, x, t, y, cls, dtype, _, guidance, states):
    if states is not None:
        states.append(x)
    return ma.guided_velocity(model, x, t, y, cls, dtype, *scales(t, **guidance))


def heun_ode(model, x, y, cls=None, *, num_steps=50, randn_like=None, **guidance):
    """Heun's method: Euler's with the mean of the velocities at both ends of a step."""
    field = functools.partial(mean_velocity, dt=-1 / num_steps, guidance=guidance)
    return ma.euler_ode(model, x, y, cls, num_steps=num_steps, velocity=field)


def mean_velocity(model, x, t, y, cls, dtype, _, dt, guidance):
    w = scales(t, **guidance)
    v, v_cls = ma.guided_velocity(model, x, t, y, cls, dtype, *w)
    if t + dt < 1e-9:  # the last step is Euler's
        return v, v_cls
    cls_end = None if cls is None else cls + dt * v_cls
    end = ma.guided_velocity(model, x + dt * v, t + dt, y, cls_end, dtype, *w)
    return (v + end[0]) / 2, None if cls is None else (v_cls + end[1]) / 2


SAMPLERS = dict(sde=euler_maruyama, ode=euler_ode, heun=heun_ode)


# ---- 2. The autoencoder of Stable Diffusion (SD-VAE)
class AutoencoderKL:
    """Images (N, 3, H, W) in [-1, 1] <-> latents (N, 4, H / 8, W / 8), not scaled."""

    def __init__(self, state_dict: dict, scale: float = 0.18215):
        self.scale = scale  # latents times scale have variance 1
        self.tensors = state_dict
        names = dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0")
        for old, new in names.items():  # diffusers before 2023
            self.tensors = {k.replace(old, new): v for k, v in self.tensors.items()}

    def layer(self, name):
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    def norm(self, name, h):
        return F.group_norm(h, 32, *self.layer(name), eps=1e-6)

    def conv(self, name, h):
        return F.conv2d(h, *self.layer(name), padding="same")

    def resnet(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        if h.shape != x.shape:
            x = self.conv(f"{name}.conv_shortcut", x)
        return x + h

    def middle(self, name, x):
        x = self.resnet(f"{name}.resnets.0", x)
        attn = f"{name}.attentions.0"
        h = self.norm(f"{attn}.group_norm", x).flatten(2).mT  # (N, HW, C)
        q, k, v = (F.linear(h, *self.layer(f"{attn}.to_{letter}")) for letter in "qkv")
        h = F.scaled_dot_product_attention(q, k, v)
        h = F.linear(h, *self.layer(f"{attn}.to_out.0")).mT.reshape(x.shape)
        return self.resnet(f"{name}.resnets.1", x + h)

    def moments(self, images):
        h = self.conv("encoder.conv_in", images)
        for i in range(4):
            name = f"encoder.down_blocks.{i}"
            h = self.resnet(f"{name}.resnets.0", h)
            h = self.resnet(f"{name}.resnets.1", h)
            if i < 3:  # half the size; padded right and below only
                down = self.layer(f"{name}.downsamplers.0.conv")
                h = F.conv2d(F.pad(h, (0, 1, 0, 1)), *down, stride=2)
        h = self.middle("encoder.mid_block", h)
        h = self.conv("encoder.conv_out", F.silu(self.norm("encoder.conv_norm_out", h)))
        mean, logvar = self.conv("quant_conv", h).chunk(2, dim=1)
        return torch.cat([mean, torch.exp(0.5 * logvar.clamp(-30, 20))], dim=1)

    def pixels(self, latents):
        h = self.conv("decoder.conv_in", self.conv("post_quant_conv", latents))
        h = self.middle("decoder.mid_block", h)
        for i in range(4):
            name = f"decoder.up_blocks.{i}"
            for j in range(3):
                h = self.resnet(f"{name}.resnets.{j}", h)
            if i < 3:
                h = F.interpolate(h, scale_factor=2.0)
                h = self.conv(f"{name}.upsamplers.0.conv", h)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.conv_norm_out", h)))

    def encode(self, images: Tensor) -> Tensor:
        """Mean and std of the latents (N, 8, h, w)."""
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self.moments(some) for some in images.split(32)])

    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self.pixels(some) for some in latents.split(32)])


def load_vae(name: str, scale: float, device) -> AutoencoderKL:
    """The SD-VAE in float32, from a file or the Hugging Face hub."""
    if os.path.isfile(name):
        state = timm.models.load_state_dict(name)
    else:
        file = "diffusion_pytorch_model.safetensors"
        state = timm.models.load_state_dict_from_hf(name, file)
    channels = len(state["encoder.conv_out.weight"]) // 2
    assert channels == 4, f"vae {name} has {channels} latent channels, not 4"
    vae = AutoencoderKL({k: v.to(device).float() for k, v in state.items()}, scale)
    vae.decode(vae.encode(torch.zeros(1, 3, 16, 16, device=device))[:, :4])  # complete?
    return vae


# ---- 3. Checkpoints: ours, and published ones
def load_checkpoint(path, kind=ma.Config, build_model=ma.SiT, **given) -> tuple:
    """The EMA network of a checkpoint, without its projector, and its config.

    kind and build_model are a fork's. given is for a published file.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(path, map_location="cpu", weights_only=True)
    state = from_official(saved.get("ema", saved))
    if "config" in saved:
        command = saved["config"].get("sample_with", "sample.py")
        assert command == kind.sample_with, f"{path} is for python {command}"
        known = {field.name for field in dataclasses.fields(kind)}
        config = kind(**{k: v for k, v in saved["config"].items() if k in known})
    else:
        state, config = read_published(path, state, saved.get("args"), given)
    config = dataclasses.replace(config, align_coeff=0.0)  # then there is no projector
    model = build_model(config)
    unused = ("projector", "ap_head.")  # of REPA, REG, SRA
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith(unused)})
    finite = all(value.isfinite().all() for value in model.state_dict().values())
    assert finite, f"{path} has weights that are not finite"
    return model.eval().requires_grad_(False), config


def from_official(state_dict: dict) -> dict:
    """A state dict of SiT, REPA, REG, SRA or ours, in our names."""
    names = {"module.": "", "_orig_mod.": "", "embedding_table.": ""}
    names |= {"projectors.0.": "projector.", "cls_projectors2.": "cls_embedder."}
    names |= {"wg_norm.": "cls_norm.", "linear_cls.": "cls_head."}
    renamed = {}
    for key, value in state_dict.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = value
    return renamed


def read_published(path, state: dict, args, given: dict) -> tuple[dict, ma.Config]:
    """Weights in our convention, and config. The file's args, if any, are checked."""
    args = dict(model=os.path.basename(path)) | vars(args or argparse.Namespace())
    told = [str(args.get(name, "")) for name in ("prediction", "path_type", "model")]
    fits = told[0] in ("", "v", "velocity") and told[1].lower() in ("", "linear")
    assert fits and "DiT" not in told[2], f"{path}: {told} is no velocity on a linear path"
    assert given.get("size") and given.get("method"), f"{path}: give --size and --method"
    table = state["y_embedder.weight"]
    given = dict(given, num_classes=args.get("num_classes", len(table) - 1))
    if len(table) == given["num_classes"]:  # no null class, so no guidance
        state["y_embedder.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
        given["label_dropout"] = 0.0
    if given["method"] == "sit":
        state = from_original_sit(state)
    if given["method"] == "sra":
        given["method"] = "sit"  # but t = 1 is noise
    return state, ma.make_config(data="published", **given)


def from_original_sit(state: dict) -> dict:
    """Turns the original SiT, whose time runs from noise to data, into ours, exactly.

    cos(w (1 - t)) = cos w cos wt + sin w sin wt and sin(w (1 - t)) = sin w cos wt - cos w
    sin wt go into the first layer of the time MLP. The velocity changes its sign. Of twice
    the channels (learn_sigma) SiT uses the first half.
    """
    heads = [name for name in state if name.startswith(("projector", "ap_head"))]
    assert not heads, f"{heads[0]} is no weight of SiT: choose another --method"
    state = dict(state)
    weight = state["t_embedder.mlp.0.weight"]
    w = torch.exp(-math.log(10000.0) * torch.arange(128) / 128).double()
    of_cos, of_sin = weight.double().chunk(2, dim=1)
    new_cos = of_cos * w.cos() + of_sin * w.sin()
    new_sin = of_cos * w.sin() - of_sin * w.cos()
    state["t_embedder.mlp.0.weight"] = torch.cat([new_cos, new_sin], dim=1).to(weight.dtype)
    _, channels, p, _ = state["x_embedder.proj.weight"].shape
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state[name].unflatten(0, (p * p, -1))  # the channel varies fastest
        state[name] = -rows[:, :channels].flatten(0, 1)
    return state


# ---- 4. Images, each from its own random numbers
GUIDANCE = ("cfg_scale", "cls_cfg_scale", "guidance_low", "guidance_high")
Job = namedtuple("Job", "args config model vae sampler device")


def randn_of(streams: list, like: Tensor) -> Tensor:
    """Normal noise like `like` (N, ...), a row from each generator."""
    rows = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in streams]
    return torch.stack(rows).to(like.device)


def generate(job: Job, indices: range, labels: list | None = None, **more) -> np.ndarray:
    """Images uint8 (n, H, W, 3) of these indices, with these labels or random ones.

    Each has its own random stream for label, latent, class token and SDE.
    """
    config = job.config
    streams = [ma.seeded("cpu", "image", job.args.seed, i) for i in indices]
    classes = config.num_classes
    random_labels = [int(torch.randint(classes, (), generator=g)) for g in streams]
    y = torch.tensor(labels or random_labels, device=job.device)
    randn_like = functools.partial(randn_of, streams)
    x = randn_like(torch.empty(len(y), *config.latent_shape, device=job.device))
    cls = None
    if config.class_token:
        cls = randn_like(torch.empty(len(y), config.z_dim, device=job.device))
    more |= {name: getattr(job.args, name) for name in GUIDANCE}
    more |= dict(num_steps=job.args.steps, randn_like=randn_like)
    x = job.sampler(job.model, x, y, cls, **more)
    return ma.decode_latents(job.vae, x).permute(0, 2, 3, 1).cpu().numpy()


# ---- 5. Pictures: grid and trajectory
def draw_rows(images: np.ndarray, names: list) -> Image.Image:
    """uint8 (rows, columns, H, W, 3) -> a picture with named rows."""
    rows, columns, height, width, _ = images.shape
    tiles = torch.from_numpy(images).flatten(0, 1).permute(0, 3, 1, 2)
    tiles = F.interpolate(tiles, scale_factor=max(1, 96 // height))
    grid = torchvision.utils.make_grid(tiles, columns, pad_value=255)
    picture = Image.new("RGB", (grid.shape[2] + 80, grid.shape[1]), "white")
    picture.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (80, 0))
    for r, name in enumerate(names):
        place = (6, (r + 0.5) * grid.shape[1] / rows)
        ImageDraw.Draw(picture).text(place, name[:12], fill="black", anchor="lm")
    return picture


def draw_trajectory(job: Job, classes: list, names: list, path: Path):
    """x at ten times, and the image, of each class: side by side, and as a GIF."""
    states = []
    images = generate(job, range(len(classes)), classes, states=states)
    chosen = [states[round(k)] for k in np.linspace(0, len(states) - 1, 10)]
    frames = [ma.decode_latents(job.vae, x).permute(0, 2, 3, 1).cpu().numpy() for x in chosen]
    frames.append(images)
    draw_rows(np.stack(frames, axis=1), names).save(path)
    first, *others = [draw_rows(frame[:, None], names) for frame in frames]
    times = [150] * 10 + [1500]  # milliseconds
    gif = path.with_suffix(".gif")
    first.save(gif, save_all=True, append_images=others, duration=times, loop=0)


# ---- 6. Many images, in one npz of ADM's format
def write_many(job: Job, settings: str, out: Path, rank: int, world_size: int):
    """An npz of arr_0, uint8 (N, H, W, 3), and settings, JSON text.

    Each batch is a file at first. After a kill, the same command makes the missing ones.
    """
    if out.exists():
        with np.load(out) as file:
            assert str(file["settings"]) == settings, f"{out} has other settings"
        return
    folder = Path(f"{out}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}")
    count = job.args.num_images
    size = job.args.batch_size
    files = {first: folder / f"{first:06d}.pt" for first in range(0, count, size)}
    for first in tqdm(list(files)[rank::world_size], disable=rank > 0 or None):
        if files[first].exists():
            continue
        indices = range(first, min(first + size, count))
        labels = [i % job.config.num_classes for i in indices]
        images = generate(job, indices, labels if job.args.labels == "balanced" else None)
        ma.save_file(torch.from_numpy(images), files[first])
    if rank == 0:
        while not all(file.exists() for file in files.values()):  # of others
            time.sleep(1)
        join(list(files.values()), count, settings, out)
        shutil.rmtree(folder)


def join(files: list, count: int, settings: str, out: Path) -> None:
    """Batches -> npz."""
    shape = (count, *torch.load(files[0]).shape[1:])
    beside = f"{out}.{os.getpid()}.tmp"
    with zipfile.ZipFile(beside, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            header = dict(descr="|u1", fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(array, header)
            for file in files:
                array.write(torch.load(file).numpy().tobytes())
        with archive.open("settings.npy", "w") as array:
            np.lib.format.write_array(array, np.array(settings))
    os.replace(beside, out)


# ---- 7. The command
def parse_args(argv, samplers: dict) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage="%(prog)s CKPT ...", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    either = parser.add_mutually_exclusive_group().add_argument
    n = dict(type=int, metavar="N")
    x = dict(type=float, metavar="X")
    add("checkpoint", metavar="CKPT", help="see above")
    add("--out", metavar="FILE", help="file to write [grid.png beside CKPT; samples.npz]")
    either("--classes", default="", metavar="NAMES", help="names or numbers, as 3,ring")
    add("--per_class", **n, default=8, help="images per row [8]")
    add("--trajectory", action="store_true", help="show noise becoming images")
    either("--num_images", **n, default=0, help="N images, no grid")
    add("--labels", choices=["random", "balanced"], default="random", help="of --num_images")
    add("--batch_size", **n, default=64, help="images at a time [64]")
    add("--sampler", choices=samplers, help="[ode; sde for --num_images]")
    add("--steps", **n, help="steps of the sampler")
    add("--cfg_scale", **x, help="guidance, 1 is none (SiT and DiT guide 3 channels)")
    add("--cls_cfg_scale", **x, help="that of the class token [the same]")
    add("--guidance_low", **x, default=0.0, help="guide from this t [0]")
    add("--guidance_high", **x, default=1.0, help="guide up to this t [1]")
    add("--seed", **n, default=0, help="random seed [0]")
    add("--vae", metavar="VAE", help="file or hub name [that of the training]")
    add("--size", choices=ma.SIZES, help="network of a published file")
    add("--method", choices=["sit", "repa", "reg", "sra"], help="its method")
    args = parser.parse_args(argv)
    args.steps = args.steps or (250 if args.num_images else 25)
    usual = "sde" if args.num_images else "ode"
    if args.sampler is None:  # a fork may have others
        args.sampler = usual if usual in samplers else next(iter(samplers))
    if args.trajectory and args.sampler in ("sde", "heun"):
        parser.error("--trajectory needs --sampler ode")
    return args


def parse_classes(text: str, config: ma.Config) -> list:
    """The labels of "3,ring", or "a, b;c, d" for names with commas. A name beats a number."""
    count = config.num_classes
    if not text:  # all, or 8 of over 10
        return np.linspace(0, count - 1, count if count <= 10 else 8, dtype=int).tolist()
    labels = {str(label): label for label in range(count)}
    labels |= {name: label for label, name in enumerate(config.class_names)}
    words = [text] if text in labels else text.split(";" if ";" in text else ",")
    for word in words:
        assert word.strip() in labels, f"no class {word} in {', '.join(labels)[:200]}"
    return [labels[word.strip()] for word in words]


def main(kind=ma.Config, build_model=ma.SiT, samplers=SAMPLERS, argv=None) -> None:
    """The command line. A fork passes its own Config, network and samplers."""
    args = parse_args(argv, samplers)
    rank, world_size, device = ma.setup_distributed()
    path = Path(args.checkpoint).expanduser()
    given = dict(size=args.size, method=args.method)
    model, config = load_checkpoint(path, kind, build_model, **given)
    config = dataclasses.replace(config, vae=os.path.expanduser(args.vae or config.vae))
    if args.cfg_scale is None:
        args.cfg_scale = 1.0 if args.num_images or config.label_dropout == 0 else 2.0
    possible = args.cfg_scale == 1 or (args.cfg_scale > 1 and config.label_dropout > 0)
    assert possible, f"cfg_scale {args.cfg_scale} is below 1, or no null class was trained"
    vae = ma.build_vae(config, device)
    job = Job(args, config, model.to(device), vae, samplers[args.sampler], device)
    if args.num_images:
        out = Path(args.out or "samples.npz").expanduser()
        names = ["num_images", "batch_size", "labels", "sampler", "steps", "seed"]
        settings = {name: getattr(args, name) for name in [*names, *GUIDANCE]}
        settings["vae"] = config.vae
        settings["checkpoint"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        if rank == 0:
            print(settings)
        write_many(job, json.dumps(settings), out, rank, world_size)
    elif rank == 0:
        name = "trajectory" if args.trajectory else "grid"
        out = Path(args.out or path.with_name(f"{name}.png")).expanduser()
        classes = parse_classes(args.classes, config)
        names = config.class_names or range(config.num_classes)
        names = [str(names[k]) for k in classes]
        if args.trajectory:
            draw_trajectory(job, classes, names, out)
        else:
            labels = np.repeat(classes, args.per_class).tolist()
            images = generate(job, range(len(labels)), labels)
            draw_rows(images.reshape(len(classes), -1, *images.shape[1:]), names).save(out)
    if rank == 0:
        print(out)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
