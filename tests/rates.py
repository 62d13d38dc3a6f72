"""What table4.py measures with: FLOP counts, clocks, a teacher; rates of the loader and sampler."""

import dataclasses
import itertools
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from unittest import mock

import timm
import torch
from torch.utils.data import DataLoader, Subset

import maskalign as ma
from sample import euler_maruyama, load_checkpoint


# ---- 1. Counts -----------------------------------------------------------------------------------
def tokens(config: ma.Config) -> tuple:
    """Tokens through the mixer and through the blocks (MaskAlign at 256 px: 257 and 193), and
    tokens x blocks, mixer included, as a share of REG's: MaskAlign's 0.82 at SiT-XL/2."""
    patches = (config.latent_shape[1] // config.patch_size) ** 2
    full = config.class_token + patches
    kept = config.class_token + max(1, round((1 - config.mask_ratio) * patches))
    work = config.mixer_depth * full + config.depth * kept
    return full, kept, work / (config.depth * (1 + patches))


def block_flops(width: int, count: int) -> int:
    """Matrix FLOPs of a block on one image of `count` tokens."""
    linear = 24 * count * width**2  # qkv, the projection after attention, the MLP
    attention = 4 * count**2 * width  # QK^T and AV
    return linear + attention + 12 * width**2  # adaLN, whose condition is one row


def model_flops(config: ma.Config) -> tuple:
    """Matrix FLOPs of one image: forward, and training (3 x forward, less the gradients that no
    input asks for). Losses, optimizer and teacher are not the model's own FLOPs."""
    full, kept, _ = tokens(config)
    width, cls_dim = config.hidden_size, config.z_dim * config.class_token
    patches, patch_dim = full - config.class_token, config.patch_size**2 * config.latent_shape[0]

    inputs = 2 * width * (patch_dim * patches + cls_dim + 256)  # 256: waves of t
    embedders = inputs + 2 * width**2  # the second layer of the time MLP
    transformer = config.mixer_depth * block_flops(width, full)
    transformer += config.depth * block_flops(width, kept)
    projector = 0
    if config.align_coeff > 0:
        hidden = config.projector_dim
        projector = 2 * kept * (width * hidden + hidden**2 + hidden * config.z_dim)
    head = 2 * width * (patch_dim * (kept - config.class_token) + cls_dim + 2 * width)
    forward = embedders + transformer + projector + head
    return forward, 3 * forward - inputs


# ---- 2. Clocks -----------------------------------------------------------------------------------
def stamp(device):
    """A moment. On GPU an event, so that nothing waits; on CPU a single thread is timed by its own
    work, whatever else the machine does."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter() if torch.get_num_threads() > 1 else time.process_time()


def laps(device, stamps: list) -> list:
    """Seconds from each moment to the next."""
    pairs = itertools.pairwise(stamps)
    if device.type == "cuda":
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]
    return [end - start for start, end in pairs]


def seconds(device, items: Iterable) -> list:
    """What each of the items of an iterator takes."""
    return laps(device, [stamp(device), *(stamp(device) for _ in items)])


def matrix_rate(device) -> float:
    """FLOP/s of one large product of matrices: bf16 on GPU, float32 on CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds(device, (a @ a for _ in range(12))))


def machine(device) -> str:
    """Where and on what: one line."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = names[0] if names else platform.machine()
    describe = ["git", "describe", "--always", "--dirty"]
    folder = Path(ma.__file__).parent
    commit = subprocess.run(describe, text=True, capture_output=True, cwd=folder).stdout.strip()
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    python = platform.python_version()
    return (
        f"{name}, {torch.get_num_threads()} threads; {versions}, Python {python}; commit {commit}"
    )


def as_text(value) -> str:
    if type(value) is not float:
        return str(value)
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table(rows: list) -> str:
    """Rows of equal keys as aligned text."""
    lines = [list(rows[0])] + [[as_text(value) for value in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


# ---- 3. What is measured, the step apart ---------------------------------------------------------
def make_teacher(config: ma.Config, device):
    """build_teacher's network; where there is no file of its weights they stay random."""
    asks = dataclasses.replace(config, class_token=True, teacher_steps=1)
    shapes = ma.demo_shapes(config.image_size, 64)
    if config.teacher_weights:
        return ma.build_teacher(asks, shapes, device)
    state = {}
    if config.teacher != "classifier":
        state = timm.create_model(config.teacher, num_classes=0).state_dict()
    with mock.patch.object(ma, "read_weights", lambda *_: state):
        return ma.build_teacher(asks, shapes, device)


def inspect_step(step, held: int, device) -> dict:
    """Warms up, then profiles a step: peak memory, attention kernels, waits of the CPU for the GPU.
    step: a function that returns its stamps; held: bytes that stay between steps; first_s: seconds
    of the first step, which compiles."""
    on_gpu, first = device.type == "cuda", sum(laps(device, step()))
    if on_gpu:
        for _ in range(4):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(profile_memory=not on_gpu) as seen:
        step()
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        sizes = (event.nbytes() for event in events if event.name() == "[memory]")
        peak = held + max(itertools.accumulate(sizes))
    pattern = r"aten::_scaled_dot_product_((?!.*backward)\w+)"
    found = [re.fullmatch(pattern, event.name()) for event in events]
    kernels = sorted({match[1] for match in found if match})
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize")
    count = sum(event.name() in waits for event in events)
    return dict(GiB=peak / 2**30, first_s=first, attention="+".join(kernels), waits=count)


def loader_rates(config: ma.Config, device, needed: float) -> dict:
    """Images/s that one core reads, decodes and crops, the cores that feed `needed` images/s, and
    what the first epoch encodes besides: images/s of one core, or of the GPU."""
    threads, dataset = torch.get_num_threads(), ma.FolderImages(config.data, config.image_size)
    torch.set_num_threads(1)
    loader = DataLoader(Subset(dataset, [i % len(dataset) for i in range(256)]), 32)
    rates = dict(loader=256 / sum(seconds(torch.device("cpu"), loader)))
    rates |= dict(needed=needed, cores=needed / rates["loader"])
    if config.vae_weights:
        vae, count = ma.build_vae(config, device), 32 if device.type == "cuda" else 2
        images = next(iter(loader))[0][:count].to(device)
        with torch.no_grad():
            times = seconds(device, (ma.encode_images(vae, images) for _ in range(3)))
        rates["encode"] = count / median(times)
        rates["first_epoch"] = 1 / (1 / rates["encode"] + 1 / rates["loader"])
    torch.set_num_threads(threads)
    return rates


def sampling_network(config: ma.Config, ckpt: str) -> tuple:
    """(network, config) of a checkpoint; without one with made-up weights, which show the speed,
    not what bf16 does to a real picture."""
    if ckpt:
        model, saved = load_checkpoint(ckpt)
        typed = dict(batch_size=config.batch_size, vae_weights=config.vae_weights)
        return model, dataclasses.replace(saved, **typed)
    model = ma.build_model(config).eval()
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model, config


def sampling_rates(config: ma.Config, device, num_steps: int, ckpt: str = "") -> dict:
    """Images/s by the SDE in float32 and in bf16 (on GPU compiled), and how far pixels differ."""
    model, config = sampling_network(config, ckpt)
    model, n = model.to(device), config.batch_size
    in_pixels = config.vae == "none" or bool(config.vae_weights)
    drawn = ma.draw_step(ma.Run(config), ma.seeded(device))
    y = torch.arange(n, device=device) % config.num_classes
    inputs = drawn["noise"], y, drawn["cls_noise"] if config.class_token else None
    rates, images = {}, []
    for name, fast in dict(float32=False, bf16=True).items():
        # As sample.py does.
        torch.set_float32_matmul_precision("high" if fast else "highest")
        torch.backends.cudnn.allow_tf32 = fast
        if fast and device.type == "cuda":
            model.compile()
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            euler_maruyama(model, *inputs, num_steps=2)  # warms up
            torch.manual_seed(config.seed)
            start = stamp(device)
            x = euler_maruyama(model, *inputs, num_steps=num_steps)
            rates[name] = n / laps(device, [start, stamp(device)])[0]
        images.append(x)
    if in_pixels:
        vae = ma.build_vae(config, device)
        images = [ma.decode_latents(vae, x).float() for x in images]
    difference = (images[0] - images[1]).abs()
    unit = "of 255" if in_pixels else "in latents: no --vae_weights"
    return rates | dict(largest=difference.max().item(), mean=difference.mean().item(), unit=unit)
