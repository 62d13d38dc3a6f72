"""What table4.py measures with: counts of FLOPs, clocks, a teacher, rates of loader and sampler."""

import dataclasses
import itertools
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import timm
import torch
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import maskalign as ma
from sample import euler_maruyama, load_checkpoint


# ---- 1. Counts
def count_tokens(config: ma.Config) -> tuple:
    """Tokens of an image in the mixing blocks, and in the others (MaskAlign, 256 pixels: 257, 193).

    Both count the class token.
    """
    patches = (config.latent_shape[1] // config.patch_size) ** 2
    full = config.class_token + patches
    kept = config.class_token + max(1, round((1 - config.mask_ratio) * patches))
    return full, kept


def token_floor(config: ma.Config) -> float:
    """Tokens x blocks as a share of REG's: 0.82 for MaskAlign and SiT-XL/2."""
    full, kept = count_tokens(config)
    patches = full - config.class_token
    work = config.mixer_depth * full + config.depth * kept
    return work / (config.depth * (1 + patches))


def block_flops(width: int, tokens: int) -> int:
    """FLOPs of the matrix products of a block, for one image."""
    linear = 24 * tokens * width**2  # qkv, the projection after attention, the MLP
    attention = 4 * tokens**2 * width  # QK^T, and its product with V
    modulation = 12 * width**2  # adaLN, once for all tokens of an image
    return linear + attention + modulation


def model_flops(config: ma.Config) -> tuple:
    """FLOPs of the network's matrix products for one image, forward, and forward and backward.

    Backward takes twice as many as forward, less the gradients of the inputs, which nobody
    needs. Losses, optimizer and teacher are not counted.
    """
    full, kept = count_tokens(config)
    width = config.hidden_size
    cls_dim = config.z_dim if config.class_token else 0
    patch_dim = config.patch_size**2 * config.latent_shape[0]

    # The first layers: of patches, of the class token, and of 256 cosines and sines of t.
    inputs = 2 * width * (patch_dim * (full - config.class_token) + cls_dim + 256)
    embedders = inputs + 2 * width**2
    blocks = config.mixer_depth * block_flops(width, full)
    blocks += config.depth * block_flops(width, kept)
    projector = 0
    if config.align_coeff > 0:
        hidden = config.projector_dim
        projector = 2 * kept * (width * hidden + hidden**2 + hidden * config.z_dim)
    final_layer = 2 * width * (patch_dim * (kept - config.class_token) + cls_dim + 2 * width)
    forward = embedders + blocks + projector + final_layer
    return forward, 3 * forward - inputs


# ---- 2. Clocks
def stamp(device):
    """A moment.

    On a GPU it is an event, so nothing waits. On a CPU, one thread is timed by its own work,
    whatever else the machine does. Several threads are timed by the clock on the wall.
    """
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter() if torch.get_num_threads() > 1 else time.process_time()


def seconds_between(device, stamps: list) -> list:
    """Seconds from each moment to the next."""
    pairs = itertools.pairwise(stamps)
    if device.type == "cuda":
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairs]
    return [end - start for start, end in pairs]


def seconds_of_each(device, items: Iterable) -> list:
    """Seconds that an iterator takes for each of its items."""
    stamps = [stamp(device)]
    for _ in items:
        stamps.append(stamp(device))
    return seconds_between(device, stamps)


def matrix_rate(device) -> float:
    """FLOP/s of one large product of matrices: in bf16 on a GPU, in float32 on a CPU."""
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds_of_each(device, (a @ a for _ in range(12))))


# ---- 3. What is printed
def machine(device) -> str:
    """One line: processor or GPU, threads, versions, commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        text = cpuinfo.read_text() if cpuinfo.exists() else ""
        found = re.search(r"model name\s*: (.*)", text)
        name = found[1] if found else platform.machine()
    describe = ["git", "describe", "--always", "--dirty"]
    folder = Path(ma.__file__).parent
    commit = subprocess.run(describe, text=True, capture_output=True, cwd=folder).stdout.strip()
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    python = f"Python {platform.python_version()}"
    return f"{name}, {torch.get_num_threads()} threads; {versions}, {python}; commit {commit}"


def as_text(value) -> str:
    if type(value) is not float:
        return str(value)
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def as_table(rows: list) -> str:
    """Rows, dicts with the same keys, as aligned text."""
    lines = [list(rows[0])]
    for row in rows:
        lines.append([as_text(value) for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


# ---- 4. Around the step: the teacher, and what a step does besides taking time
def make_teacher(config: ma.Config, device):
    """The teacher as train has it. Without teacher_weights, those are random: it is as fast."""
    config = dataclasses.replace(config, class_token=True, teacher_steps=1)
    shapes = ma.demo_shapes(config.image_size, 64)
    if config.teacher_weights or config.teacher == "classifier":
        return ma.load_teacher(config, shapes, device)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/random.pth"
        torch.save(timm.create_model(config.teacher, num_classes=0).state_dict(), file)
        config = dataclasses.replace(config, teacher_weights=file)
        return ma.load_teacher(config, shapes, device)


def inspect_step(step: Callable, held: int, device) -> dict:
    """Does some steps, and profiles the last one: GiB, first_s, attention, waits.

    GiB is the peak of the memory, of which `held` bytes stay between steps. first_s are the
    seconds of the first step, which compiles. attention are the names of its kernels, and
    waits says how often the CPU waits for the GPU. step() returns the stamps of a step.
    """
    on_gpu = device.type == "cuda"
    first = sum(seconds_between(device, step()))
    if on_gpu:
        for _ in range(4):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(profile_memory=not on_gpu) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    events = sorted(events, key=lambda event: event.start_ns())
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        changes = [event.nbytes() for event in events if event.name() == "[memory]"]
        peak = held + max(itertools.accumulate(changes))
    prefix = "aten::_scaled_dot_product_"
    names = [event.name() for event in events]
    kernels = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    kernels = sorted(name for name in kernels if "backward" not in name)
    waits = ("cudaStreamSynchronize", "cudaEventSynchronize")
    count = sum(name in waits for name in names)
    return dict(GiB=peak / 2**30, first_s=first, attention="+".join(kernels), waits=count)


# ---- 5. Rates of the loader and of the sampler
def loader_rates(config: ma.Config, device, needed: float, vae=None) -> dict:
    """Images/s that one core reads, decodes and crops, and how many cores feed `needed` images/s.

    With a vae also what it encodes, and both together, as in the first epoch: images/s of one
    core, or of the GPU.
    """
    cpu = torch.device("cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dataset = ma.FolderImages(config)
    images = Subset(dataset, [i % len(dataset) for i in range(256)])
    loader = DataLoader(images, 32)
    rate = 256 / sum(seconds_of_each(cpu, loader))
    rates = dict(loader=rate, needed=needed, cores=needed / rate)
    if vae is not None:
        count = 32 if device.type == "cuda" else 2
        batch = next(iter(loader))["image"][:count].to(device)
        with torch.no_grad():
            encoded = (vae.encode(batch / 127.5 - 1) for _ in range(3))
            rates["encode"] = count / median(seconds_of_each(device, encoded))
        rates["first_epoch"] = 1 / (1 / rates["encode"] + 1 / rate)
    torch.set_num_threads(threads)
    return rates


def sampling_network(config: ma.Config, checkpoint: str) -> tuple:
    """The network and config of a checkpoint. Without one, the weights are made up.

    Those show how fast it is, but not what bf16 does to a real image.
    """
    if checkpoint:
        model, saved = load_checkpoint(checkpoint)
        return model, dataclasses.replace(saved, batch_size=config.batch_size)
    model = ma.SiT(config).eval().requires_grad_(False)
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model, config


def sampling_rates(config: ma.Config, device, num_steps: int, checkpoint="", vae=None) -> dict:
    """Images/s by the SDE in float32 and in bf16 (compiled on a GPU), and how much images differ.

    They are compared in pixels if there is a vae, or none is needed. Else, latents are.
    """
    model, config = sampling_network(config, checkpoint)
    model = model.to(device)
    n = config.batch_size
    rng = ma.StepRng(config, step="sampling", device=device)
    x = rng.randn(n, *config.latent_shape)
    cls = rng.randn(n, config.z_dim) if config.class_token else None
    y = torch.arange(n, device=device) % config.num_classes
    rates = {}
    results = []
    for name, fast in dict(float32=False, bf16=True).items():
        # As sample.py does, without and with --fast.
        torch.set_float32_matmul_precision("high" if fast else "highest")
        torch.backends.cudnn.allow_tf32 = fast
        if fast and device.type == "cuda":
            model.compile()
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            euler_maruyama(model, x, y, cls, num_steps=2)  # the first steps compile
            torch.manual_seed(config.seed)
            start = stamp(device)
            result = euler_maruyama(model, x, y, cls, num_steps=num_steps)
            (seconds,) = seconds_between(device, [start, stamp(device)])
        rates[name] = n / seconds
        results.append(result)
    in_pixels = config.vae == "none" or vae is not None
    if in_pixels:
        results = [ma.decode_latents(vae, result).float() for result in results]
    difference = (results[0] - results[1]).abs()
    unit = "of 255" if in_pixels else "in latents: give --vae"
    return rates | dict(largest=difference.max().item(), mean=difference.mean().item(), unit=unit)
