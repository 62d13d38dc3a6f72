"""What table4.py measures with: FLOP counts, clocks, a teacher; rates of the loader and sampler."""

import dataclasses, itertools, platform, re, subprocess, time
from pathlib import Path
from statistics import median
from unittest import mock

import timm
import torch
from torch.utils.data import DataLoader, Subset

import maskalign as ma


def tokens(c: ma.Config) -> tuple:
    """Tokens through the mixer and through the blocks (MaskAlign at 256 px: 257 and 193), and
    tokens x blocks, mixer included, as a share of REG's: MaskAlign's 0.82 at SiT-XL/2."""
    patches = (c.latent_shape[1] // c.patch_size) ** 2
    full, kept = (c.class_token + max(1, round(p * patches)) for p in (1, 1 - c.mask_ratio))
    return full, kept, (c.mixer_depth * full + c.depth * kept) / (c.depth * (1 + patches))


def model_flops(c: ma.Config) -> tuple:
    """Matrix FLOPs of one image: forward; training (3 x forward, less the gradients that no input
    asks for); SRA's EMA forward. xAR's attention counts in full, masked as it is. The last, the
    losses, optimizer and teacher are not the model's own FLOPs."""
    (full, kept, _), d, g, cls = tokens(c), c.hidden_size, c.cells**2, c.z_dim * c.class_token

    def blocks(count, k):  # qkv, proj, MLP; QK^T and AV; adaLN, a row for each noise level
        return count * (24 * k * d * d + 4 * k * k * d + 12 * g * d * d)

    side, patches = c.patch_size**2 * c.latent_shape[0], full - c.class_token
    inputs = 2 * d * (side * patches + cls + 256 * g)
    stem = inputs + 2 * g * d * d + blocks(c.mixer_depth, full)
    dims = [d, *(2 * [c.projector_dim] if c.projector_dim else [2 * d]), c.z_dim]
    projector = 2 * kept * sum(a * b for a, b in zip(dims, dims[1:])) * (c.align_coeff > 0)
    head = 2 * d * (side * (kept - c.class_token) + cls + 2 * g * d)
    forward = stem + blocks(c.depth, kept) + projector + head
    ema = stem + blocks(c.self_depth, full)
    return forward, 3 * forward - inputs, ema * (c.self_depth > 0)


def seconds(device, *runs) -> list:
    """For each iterator what each of its items takes; on GPU by events, so that nothing waits.
    On CPU a single thread is timed by its own work, whatever else the machine does."""

    def stamp():
        if device.type == "cpu":
            return time.perf_counter() if torch.get_num_threads() > 1 else time.process_time()
        (event := torch.cuda.Event(enable_timing=True)).record()
        return event

    stamps = [[stamp(), *(stamp() for _ in run)] for run in runs]
    if device.type == "cuda":
        torch.cuda.synchronize()
    return [
        [
            b - a if device.type == "cpu" else a.elapsed_time(b) / 1000
            for a, b in itertools.pairwise(run)
        ]
        for run in stamps
    ]


def machine(device) -> str:
    """Where and on what: one line."""
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else " ".join(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[:1])
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        text=True,
        capture_output=True,
        cwd=Path(ma.__file__).parent,
    ).stdout.strip()
    return (
        f"{name}, {torch.get_num_threads()} threads; torch {torch.__version__}, timm "
        f"{timm.__version__}, Python {platform.python_version()}; commit {commit}"
    )


def table(rows: list) -> str:
    """Rows of equal keys as aligned text."""
    cells = [
        list(rows[0]),
        *(
            [
                f"{v:.3g}"
                if type(v) is float and v < 100
                else f"{v:.0f}"
                if type(v) is float
                else str(v)
                for v in row.values()
            ]
            for row in rows
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in cells)


def matrix_rate(device) -> float:
    """FLOP/s of one large product of matrices: bf16 on GPU, float32 on CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds(device, (a @ a for _ in range(12)))[0])


def make_teacher(c: ma.Config, device):
    """build_teacher's network, with random weights where there is no file of them."""
    made_up = lambda *_: timm.create_model(c.teacher, num_classes=0).state_dict()
    with mock.patch.object(ma, "read_weights", ma.read_weights if c.teacher_weights else made_up):
        asks = dataclasses.replace(c, class_token=True, teacher_steps=1)
        return ma.build_teacher(asks, ma.demo_shapes(c.image_size, 64), device)


def inspect_step(step, resident: int, device) -> dict:
    """Warms up, then profiles a step: peak memory, attention kernels, waits of the CPU for the GPU.
    first_s: the first step, which compiles."""
    on_gpu, first = device.type == "cuda", sum(seconds(device, step())[0])
    seconds(device, *(step() for _ in range(4 * on_gpu)))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(profile_memory=not on_gpu) as seen:
        list(step())
    events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    held = itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]")
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident + max(held)
    kernels = {
        found[1]
        for e in events
        if (found := re.fullmatch(r"aten::_scaled_dot_product_((?!.*backward)\w+)", e.name()))
    }
    waits = sum(e.name() in ("cudaStreamSynchronize", "cudaEventSynchronize") for e in events)
    return dict(GiB=peak / 2**30, first_s=first, attention="+".join(sorted(kernels)), waits=waits)


def loader_rates(c: ma.Config, device, needed: float) -> dict:
    """Images/s that one core reads, decodes and crops, the cores that feed `needed` images/s, and
    what --prepare encodes besides: images/s of one core, or of the GPU."""
    threads, dataset = torch.get_num_threads(), ma.FolderImages(c.data, c.image_size)
    torch.set_num_threads(1)
    loader = DataLoader(Subset(dataset, [i % len(dataset) for i in range(256)]), 32)
    rates = dict(loader=256 / sum(seconds(torch.device("cpu"), loader)[0]))
    rates |= dict(needed=needed, cores=needed / rates["loader"])
    if c.vae_weights:
        vae, count = ma.build_vae(c, device), 32 if device.type == "cuda" else 2
        images = next(iter(loader))[0][:count].to(device)
        laps = seconds(device, (ma.encode_images(vae, images) for _ in range(3)))[0]
        rates |= dict(encode=count / median(laps))
        rates |= dict(prepare=1 / (1 / rates["encode"] + 1 / rates["loader"]))
    torch.set_num_threads(threads)
    return rates


def sampling_rates(c: ma.Config, device, num_steps: int, ckpt: str = "") -> dict:
    """Images/s by the SDE in float32 and in bf16 (on GPU compiled), and how far the pixels differ.
    Made-up weights (no checkpoint) show the speed, not what bf16 does to a real picture."""
    if ckpt:
        from sample import load_checkpoint

        model, saved = load_checkpoint(ckpt)
        model, c = (
            model.to(device),
            dataclasses.replace(saved, batch_size=c.batch_size, vae_weights=c.vae_weights),
        )
    else:
        model = ma.build_model(c).to(device).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.02) if not p.any() else None
    vae = ma.build_vae(c, device) if c.vae_weights else None
    drawn = ma.draw_step(c.batch_size, c.latent_shape, c.z_dim, c, ma.seeded(device), device)
    y = torch.arange(c.batch_size, device=device) % c.num_classes
    cls, rates, images = drawn["cls_noise"] if c.class_token else None, {}, []
    for name, fast in dict(float32=False, bf16=True).items():
        torch.set_float32_matmul_precision("high" if fast else "highest")  # as sample.py does
        torch.backends.cudnn.allow_tf32 = fast
        if fast and device.type == "cuda":
            model.compile()
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            for count in (2, num_steps):  # first warm up
                torch.manual_seed(c.seed)
                lap = seconds(
                    device,
                    (
                        images.append(
                            ma.euler_maruyama(
                                model, drawn["noise"], y, cls, num_steps=count, cells=c.cells
                            )
                        )
                        for _ in "1"
                    ),
                )
        rates[name] = c.batch_size / lap[0][0]
    a, b = images[1], images[3]
    if c.vae == "none" or vae:
        a, b = (ma.decode_latents(vae, x).float() for x in (a, b))
    return rates | dict(
        largest=(a - b).abs().max().item(),
        mean=(a - b).abs().mean().item(),
        unit="of 255" if c.vae == "none" or vae else "in latents: no --vae_weights",
    )
