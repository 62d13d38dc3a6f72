"""Generates images from a checkpoint: a labelled grid, or the 50,000 that an FID needs.

  python sample.py runs/maskalign-demo/latest.pt            a grid; prints its path
  python sample.py CKPT --classes 207,360 --cfg_scale 4     chosen classes, more guidance
  python sample.py CKPT --trajectory                        from noise to image: PNG and GIF
  torchrun --nproc_per_node=8 sample.py CKPT --num_images 50000 --out samples.npz

CKPT is a checkpoint of maskalign.py, or a published file of SiT, REPA, REG or SRA, which
also needs --method and --size. Without other flags, a grid takes 25 steps of the ODE with
guidance 2, and --num_images takes 250 steps of the SDE without guidance, as the papers.
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
# Each takes normal noise x (N, C, H, W), labels y (N,), and normal noise cls (N, z_dim) or
# None, and returns latents. guidance are keywords of `scales`. randn_like, if given, makes
# the noise of each step, first that of x, then that of cls.
def scales(t, cfg_scale=1.0, cls_cfg_scale=None, guidance_low=0.0, guidance_high=1.0):
    """The scales of maskalign.guided_velocity at time t: 1, which is none, out of bounds.

    That of the class token is None for the same as x, or 0 for none, as in REG.
    """
    if not guidance_low <= t <= guidance_high:
        return 1.0, 1.0
    return cfg_scale, 1.0 if cls_cfg_scale == 0 else cls_cfg_scale


@torch.no_grad()
def euler_maruyama(model, x, y, cls=None, *, num_steps=250, randn_like=None, **guidance):
    """The papers' sampler, the reverse SDE: every step but the last one adds noise.

    Its drift is v - (w_t / 2) score, where score = -(x + (1 - t) v) / t. With w_t = 2t this
    is (2 - t) v + x, and a step dt < 0 adds noise of variance 2t |dt|.
    NOTE(paper): it prints w_t = t. The code of SiT, REPA and REG uses 2t, and so do we.
    """
    randn_like = randn_like or torch.randn_like
    dtype = x.dtype
    x = x.double()
    cls = None if cls is None else cls.double()
    # The last step goes from 0.04, a constant of SiT's code, to 0, and adds no noise, since
    # that would stay in the image.
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
    """maskalign.euler_ode with all keywords. The list states, if given, gets x at each step."""
    ours = functools.partial(velocity, guidance=guidance, states=states)
    return ma.euler_ode(model, x, y, cls, num_steps=num_steps, velocity=ours)


def velocity(model, x, t, y, cls, dtype, _, guidance: dict, states: list | None) -> tuple:
    """What maskalign.euler_ode asks for at each step."""
    if states is not None:
        states.append(x)
    return ma.guided_velocity(model, x, t, y, cls, dtype, *scales(t, **guidance))


@torch.no_grad()
def heun_ode(model, x, y, cls=None, *, num_steps=50, randn_like=None, **guidance):
    """Heun's method: a step follows the mean of the velocities at its start and at its end."""
    dtype = x.dtype
    x = x.double()
    cls = None if cls is None else cls.double()
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    for t, t_next in itertools.pairwise(times):
        dt = t_next - t
        on = scales(t, **guidance)
        v, v_cls = ma.guided_velocity(model, x, t, y, cls, dtype, *on)
        if t_next > 0:  # there is no velocity at t = 0
            x_end = x + dt * v
            cls_end = None if cls is None else cls + dt * v_cls
            v_end, v_cls_end = ma.guided_velocity(model, x_end, t_next, y, cls_end, dtype, *on)
            v = (v + v_end) / 2
            v_cls = None if cls is None else (v_cls + v_cls_end) / 2
        x = x + dt * v
        cls = None if cls is None else cls + dt * v_cls
    return x.to(dtype)


SAMPLERS = dict(sde=euler_maruyama, ode=euler_ode, heun=heun_ode)


# ---- 2. The autoencoder of Stable Diffusion (SD-VAE)
class AutoencoderKL:
    """Images (N, 3, H, W) in [-1, 1] <-> latents (N, 4, H / 8, W / 8), not scaled."""

    def __init__(self, state_dict: dict, scale: float = 0.18215):
        self.scale = scale  # gives the latents a variance of about 1
        self.tensors = state_dict
        names = dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0")
        for old, new in names.items():  # files from before 2023
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

    def moments(self, images: Tensor) -> Tensor:
        h = self.conv("encoder.conv_in", images)
        for i in range(4):
            h = self.resnet(f"encoder.down_blocks.{i}.resnets.0", h)
            h = self.resnet(f"encoder.down_blocks.{i}.resnets.1", h)
            if i < 3:  # half the size; padded on the right and at the bottom only
                down = self.layer(f"encoder.down_blocks.{i}.downsamplers.0.conv")
                h = F.conv2d(F.pad(h, (0, 1, 0, 1)), *down, stride=2)
        h = self.middle("encoder.mid_block", h)
        h = self.conv("encoder.conv_out", F.silu(self.norm("encoder.conv_norm_out", h)))
        mean, logvar = self.conv("quant_conv", h).chunk(2, dim=1)
        return torch.cat([mean, torch.exp(0.5 * logvar.clamp(-30, 20))], dim=1)

    def pixels(self, latents: Tensor) -> Tensor:
        h = self.conv("decoder.conv_in", self.conv("post_quant_conv", latents))
        h = self.middle("decoder.mid_block", h)
        for i in range(4):
            for j in range(3):
                h = self.resnet(f"decoder.up_blocks.{i}.resnets.{j}", h)
            if i < 3:
                h = F.interpolate(h, scale_factor=2.0)
                h = self.conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", h)
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.conv_norm_out", h)))

    def encode(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the latents (N, 8, h, w); 32 images at a time."""
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self.moments(some) for some in images.split(32)])

    def decode(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            return torch.cat([self.pixels(some) for some in latents.split(32)])


def load_vae(name: str, scale: float, device) -> AutoencoderKL:
    """The SD-VAE in float32, from a file or from a repository of the Hugging Face hub."""
    if os.path.isfile(name):
        state = timm.models.load_state_dict(name)
    else:
        file = "diffusion_pytorch_model.safetensors"
        state = timm.models.load_state_dict_from_hf(name, file)
    channels = len(state["encoder.conv_out.weight"]) // 2
    assert channels == 4, f"vae {name} has {channels} latent channels: choose one with 4"
    vae = AutoencoderKL({k: v.to(device).float() for k, v in state.items()}, scale)
    mean_std = vae.encode(torch.zeros(1, 3, 16, 16, device=device))
    vae.decode(mean_std[:, :4])  # if a tensor is missing, this fails, and not later
    return vae


# ---- 3. Checkpoints: ours, and published ones
def load_checkpoint(path, raw=False, kind=ma.Config, build_model=ma.SiT, **given) -> tuple:
    """The network of a checkpoint, in eval mode and without projector, and its config.

    raw takes the trained weights instead of their average (EMA). kind and build_model are
    those of a fork. For a published file, size, method (sit for the original SiT, repa, reg,
    sra), and what else differs from the defaults of Config, are given.
    """
    if str(path).endswith(".safetensors"):
        saved = timm.models.load_state_dict(path)
    else:
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    state = from_official(saved.get("model" if raw else "ema", saved))
    if "config" in saved:
        script = saved["config"].get("sample_with")
        known = {field.name for field in dataclasses.fields(kind)}
        assert not script or "sample_with" in known, f"{path} is for {script} alone"
        config = kind(**{k: v for k, v in saved["config"].items() if k in known})
    else:
        state, config = read_published(path, state, saved.get("args"), given)
    config = dataclasses.replace(config, align_coeff=0.0)  # then there is no projector
    model = build_model(config)
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith("projector")})
    finite = all(value.isfinite().all() for value in model.state_dict().values())
    assert finite, f"{path} has weights that are not finite: take an earlier checkpoint"
    return model.eval().requires_grad_(False), config


def from_official(state_dict: dict) -> dict:
    """A state dict of SiT, REPA, REG or SRA with our names, which stay as they are."""
    names = dict(cls_projectors2="cls_embedder", wg_norm="cls_norm", linear_cls="cls_head")
    names |= dict(module="", _orig_mod="", embedding_table="")  # these parts are left out
    renamed = {}
    for key, value in state_dict.items():
        parts = [names.get(part, part) for part in key.split(".")]
        key = ".".join(part for part in parts if part)
        renamed[key.replace("projectors.0.", "projector.")] = value
    return renamed


def read_published(path, state: dict, args, given: dict) -> tuple[dict, ma.Config]:
    """Weights in our convention, and config. What the file's args say of it is believed."""
    args = vars(args or argparse.Namespace())
    prediction = args.get("prediction", "v")
    path_type = args.get("path_type", "linear")
    assert prediction in ("v", "velocity"), f"{path} predicts {prediction}, not a velocity"
    assert path_type.lower() == "linear", f"{path} has a {path_type} path, not a linear one"
    assert "DiT" not in args.get("model", ""), f"{path} is a DiT, which predicts noise"
    assert {"size", "method"} <= given.keys(), f"{path} does not tell: give --size, --method"
    table = state["y_embedder.weight"]
    given = dict(given, num_classes=args.get("num_classes", len(table) - 1))
    if len(table) == given["num_classes"]:  # no null class was trained: no guidance
        state["y_embedder.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
        given["label_dropout"] = 0.0
    if given["method"] == "sit":
        state = from_original_sit(state)
    if given["method"] == "sra":  # a SiT, and a head that only training needs
        given["method"] = "sit"
        state = {k: v for k, v in state.items() if not k.startswith("ap_head.")}
    return state, ma.make_config(data="published", **given)


def from_original_sit(state: dict) -> dict:
    """The original SiT, whose time runs from noise to data, as a network of ours. Exact.

    With t' = 1 - t, cos(w t') = cos w cos wt + sin w sin wt and sin(w t') = sin w cos wt -
    cos w sin wt, which the first layer of the time MLP can absorb. The velocity changes its
    sign. With learn_sigma there are twice as many channels, of which SiT uses the first half.
    """
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


# ---- 4. Images that depend on (seed, index) alone, up to rounding
GUIDANCE = ("cfg_scale", "cls_cfg_scale", "guidance_low", "guidance_high")
Job = namedtuple("Job", "args config model vae sampler device")  # what generates images


def randn_of(streams: list, like: Tensor) -> Tensor:
    """Normal noise like `like` (N, ...), a row from each of N generators."""
    rows = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in streams]
    return torch.stack(rows).to(like.device)


def generate(job: Job, indices: range, labels: list | None = None, **more) -> np.ndarray:
    """Images uint8 (n, H, W, 3) with n indices and labels, by default random ones.

    Each image has a random stream of its own: label, latent, class token, noise of the SDE.
    """
    config, device = job.config, job.device
    streams = [ma.seeded("cpu", "image", job.args.seed, i) for i in indices]
    randint = functools.partial(torch.randint, config.num_classes, ())
    random_labels = [int(randint(generator=g)) for g in streams]
    y = torch.tensor(labels or random_labels, device=device)
    randn_like = functools.partial(randn_of, streams)
    x = randn_like(torch.empty(len(y), *config.latent_shape, device=device))
    cls = None
    if config.class_token:
        cls = randn_like(torch.empty(len(y), config.z_dim, device=device))
    more |= {name: getattr(job.args, name) for name in GUIDANCE}
    more |= dict(num_steps=job.args.steps, randn_like=randn_like)
    with torch.autocast(device.type, torch.bfloat16, enabled=job.args.fast):
        return to_numpy(job.vae, job.sampler(job.model, x, y, cls, **more))


def to_numpy(vae, x: Tensor) -> np.ndarray:
    return ma.decode_latents(vae, x).permute(0, 2, 3, 1).cpu().numpy()


# ---- 5. Pictures: a grid, or the way from noise to images
def draw_rows(images: np.ndarray, names: list) -> Image.Image:
    """images uint8 (R, C, H, W, 3) as R rows, with their names on the left."""
    rows, columns, height, width, _ = images.shape
    tiles = torch.from_numpy(images).flatten(0, 1).permute(0, 3, 1, 2)
    tiles = F.interpolate(tiles, scale_factor=max(1, 96 // height))  # large pixels
    grid = torchvision.utils.make_grid(tiles, columns, pad_value=255)
    picture = Image.new("RGB", (grid.shape[2] + 80, grid.shape[1]), "white")
    picture.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (80, 0))
    for r, name in enumerate(names):
        place = (6, (r + 0.5) * grid.shape[1] / rows)
        ImageDraw.Draw(picture).text(place, name[:12], fill="black", anchor="lm")
    return picture


def draw_grid(job: Job, classes: list, names: list, path: Path) -> None:
    """A row of --per_class images for each class."""
    labels = np.repeat(classes, job.args.per_class).tolist()
    images = generate(job, range(len(labels)), labels)
    draw_rows(images.reshape(len(classes), -1, *images.shape[1:]), names).save(path)


def draw_trajectory(job: Job, classes: list, names: list, path: Path) -> None:
    """An image of each class at nine times from noise on, as PNG; at all times, as GIF."""
    states = []
    final = generate(job, range(len(classes)), classes, states=states)
    frames = [*(to_numpy(job.vae, x) for x in states), final]
    kept = [frames[round(k)] for k in np.linspace(0, len(frames) - 1, 9)]
    draw_rows(np.stack(kept, axis=1), names).save(path)
    first, *others = [draw_rows(frame[:, None], names) for frame in frames]
    times = [80] * len(states) + [1500]  # milliseconds
    how = dict(save_all=True, append_images=others, duration=times, loop=0)
    first.save(path.with_suffix(".gif"), **how)


# ---- 6. Many images, in one npz of ADM's format
def write_many(job: Job, settings: str, out: Path, rank: int, world_size: int) -> None:
    """--num_images as an npz: arr_0 is uint8 (N, H, W, 3), settings is JSON text.

    At first each image is a file in a folder. After a kill, the same command generates those
    that are missing. Images of other settings are refused, so they never mix.
    """
    if out.exists():
        with np.load(out) as file:
            assert str(file["settings"]) == settings, f"{out} has other settings: choose --out"
        return
    folder = Path(f"{out}.parts")
    record = folder / "settings.json"
    if rank == 0 and not record.exists():
        folder.mkdir(parents=True, exist_ok=True)
        record.write_text(settings)
    if world_size > 1:
        dist.barrier()
    assert record.read_text() == settings, f"{folder} has other settings: choose --out"

    args = job.args
    files = [folder / f"{i:06d}.png" for i in range(args.num_images)]
    firsts = range(0, args.num_images, args.batch_size)
    for first in tqdm(firsts[rank::world_size], disable=rank > 0 or None):
        indices = range(first, min(first + args.batch_size, args.num_images))
        if all(files[i].exists() for i in indices):
            continue
        labels = [i % job.config.num_classes for i in indices]
        images = generate(job, indices, labels if args.labels == "balanced" else None)
        for i, image in zip(indices, images, strict=True):
            beside = f"{files[i]}.{os.getpid()}.tmp"
            Image.fromarray(image).save(beside, "PNG")
            os.replace(beside, files[i])
    if rank == 0:
        while not all(file.exists() for file in files):  # others are still at work
            time.sleep(1)
        join(files, settings, out)
        shutil.rmtree(folder)


def join(files: list, settings: str, out: Path) -> None:
    """PNG files -> npz, one after the other, so memory stays flat."""
    width, height = Image.open(files[0]).size
    header = dict(descr="|u1", fortran_order=False, shape=(len(files), height, width, 3))
    beside = f"{out}.{os.getpid()}.tmp"
    with zipfile.ZipFile(beside, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, header)
            for file in files:
                array.write(np.asarray(Image.open(file)).tobytes())
        with archive.open("settings.npy", "w") as array:
            np.lib.format.write_array(array, np.array(settings))
    os.replace(beside, out)


# ---- 7. The command
def parse_args(argv: list | None, samplers: dict) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s CKPT [--classes NAMES] [--num_images N] [--out FILE] ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="latest.pt of a run, or a published file")
    add("--out", metavar="FILE", help="file to write [grid.png beside CKPT; samples.npz]")
    add("--classes", default="", metavar="NAMES", help="names or numbers, as 207,star [8 of all]")
    add("--per_class", type=int, default=8, metavar="N", help="images per row of a grid [8]")
    add("--trajectory", action="store_true", help="show how images come out of noise")
    add("--num_images", type=int, default=0, metavar="N", help="write so many, without a grid")
    add("--labels", choices=["random", "balanced"], default="random", help="of --num_images")
    add("--sampler", choices=samplers, help="[ode; for --num_images: sde]")
    add("--steps", type=int, metavar="N", help="steps of the sampler [25; 250]")
    text = "guidance; 1 is none [2; 1]. The code of SiT and DiT guides 3 of 4 channels only"
    add("--cfg_scale", type=float, metavar="X", help=text)
    add("--cls_cfg_scale", type=float, metavar="X", help="that of the class token [the same]")
    add("--guidance_low", type=float, default=0.0, metavar="T", help="guide from this t on [0]")
    add("--guidance_high", type=float, default=1.0, metavar="T", help="guide up to this t [1]")
    add("--seed", type=int, default=0, metavar="N", help="decides image i together with i [0]")
    add("--raw", action="store_true", help="take the weights themselves, not their average")
    add("--batch_size", type=int, default=64, metavar="N", help="images at a time [64]")
    add("--fast", action="store_true", help="compute in bfloat16")
    add("--vae", metavar="VAE", help="SD-VAE: file or hub name [that of the training]")
    add("--size", choices=ma.SIZES, help="network of a published file")
    add("--method", choices=["sit", "repa", "reg", "sra"], help="where it comes from")
    args = parser.parse_args(argv)
    args.steps = args.steps or (250 if args.num_images else 25)
    args.sampler = args.sampler or ("sde" if args.num_images else "ode")
    if args.sampler not in samplers:
        args.sampler = next(iter(samplers))  # that of a fork
    return args


def parse_classes(text: str, config: ma.Config) -> list:
    """The labels of "207,star", or of "a, b;c, d" if names have commas. Names come first."""
    count = config.num_classes
    if not text:
        spread = np.linspace(0, count - 1, count if count <= 10 else 8)
        return spread.round().astype(int).tolist()
    labels = {str(label): label for label in range(count)}
    labels |= {name: label for label, name in enumerate(config.class_names)}
    words = [text] if text in labels else text.split(";" if ";" in text else ",")
    words = [word.strip() for word in words]
    for word in words:
        assert word in labels, f"there is no class {word}: choose from {', '.join(labels)[:300]}"
    return [labels[word] for word in words]


def main(kind=ma.Config, build_model=ma.SiT, samplers=SAMPLERS, argv: list | None = None):
    """The command line. A fork passes its own kind of Config, network and samplers."""
    args = parse_args(argv, samplers)
    rank, world_size, device = ma.setup_distributed()
    if not args.fast:  # then float32 means float32, and not TF32
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    path = Path(args.checkpoint).expanduser()
    given = {k: getattr(args, k) for k in ("size", "method") if getattr(args, k)}
    model, config = load_checkpoint(path, args.raw, kind, build_model, **given)
    config = dataclasses.replace(config, vae=os.path.expanduser(args.vae or config.vae))
    has_null = config.label_dropout > 0  # else the null class was never trained
    if args.cfg_scale is None:
        args.cfg_scale = 2.0 if has_null and not args.num_images else 1.0
    assert args.cfg_scale >= 1, f"cfg_scale {args.cfg_scale}: 1 is no guidance, 2 is some"
    assert has_null or args.cfg_scale == 1, f"{path} has no null class, so no guidance"
    vae = ma.build_vae(config, device)
    job = Job(args, config, model.to(device), vae, samplers[args.sampler], device)

    if args.num_images:
        out = Path(args.out or "samples.npz").expanduser()
        names = ("num_images", "labels", "sampler", "steps", "seed", "raw", "fast", *GUIDANCE)
        settings = {name: getattr(args, name) for name in names}
        settings["checkpoint"] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for name in ("method", "size", "vae", "image_size"):
            settings[name] = getattr(config, name)
        if rank == 0:
            print(", ".join(f"{name} {value}" for name, value in settings.items()))
        write_many(job, json.dumps(settings), out, rank, world_size)
    elif rank == 0:
        draw = draw_trajectory if args.trajectory else draw_grid
        out = path.with_name("trajectory.png" if args.trajectory else "grid.png")
        out = Path(args.out or out).expanduser()
        classes = parse_classes(args.classes, config)
        names = config.class_names or range(config.num_classes)
        draw(job, classes, [str(names[k]) for k in classes], out)
    if rank == 0:
        print(out)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
