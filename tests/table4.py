"""The paper's Table 4 again: what a training step of each row of METHODS costs, and why.

  python tests/table4.py                     every row of METHODS: the demo on CPU, XL/2 on GPU
  python tests/table4.py --size SiT-S/2 --methods reg maskalign --steps 5
  python tests/table4.py --data DIR --vae_weights FILE           loader and encoder, images/s
  python tests/table4.py --size SiT-B/2 --sample [--ckpt FILE]   sampling: float32 against bf16
  python tests/table4.py --check                                 FLOPs: ours against torch's count

A step is maskalign.train_step. Medians, after warm-up; compilation apart. On CPU the methods take
turns, and --threads 1 counts CPU time: a busy machine hits all, or none. Paper, SiT-XL/2: REG
0.359 s with 257 tokens, MaskAlign 0.317 s with 193; that is 0.88, where tokens x blocks alone
(column floor) would give 0.82.
"""

import argparse
import copy
import dataclasses
import functools
import gc
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":  # quiet; it must be said before torch is loaded
    os.environ |= dict(KINETO_LOG_LEVEL="9", TORCH_CPP_LOG_LEVEL="ERROR")
import numpy as np
import rates
import torch
from torch._dynamo.utils import counters

import maskalign as ma

# teacher: with what brings the batch there; backward: with the clipping; update: AdamW and EMA.
PHASES = ("draw", "teacher", "forward", "backward", "update")


# ---- 1. A step, taken apart ----------------------------------------------------------------------
class RandomTokens:
    """The same tokens z (N, 1 + T, z_dim), whatever the images: a teacher that costs nothing."""

    def __init__(self, config: ma.Config, device):
        count = 1 + (config.latent_shape[1] // config.patch_size) ** 2
        self.z = torch.randn(config.batch_size, count, config.z_dim, device=device)

    def __call__(self, images):
        return self.z


def make_run(config: ma.Config, device, teacher) -> ma.Run:
    """A run as set_up makes it, without data. teacher: images -> z; None: random tokens z."""
    if not config.class_token and config.align_coeff == 0:
        teacher = None
    elif teacher:
        config = dataclasses.replace(config, z_dim=teacher.dim)
    else:
        teacher = RandomTokens(config, device)
    model = ma.build_model(config).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0.0, fused=True)
    torch.compiler.reset()  # else, after 8 networks in one process, compile gives up silently
    if config.compile and device.type == "cuda":
        model.compile()
    return ma.Run(
        config,
        device=device,
        teacher=teacher,
        model=model,
        ddp_model=model,
        ema=ema,
        optimizer=optimizer,
    )


def make_batch(config: ma.Config, device, folder: str = "") -> list:
    """What a loader gives, of random images; where there is a VAE, latents of them are in files."""
    n = config.batch_size
    images = torch.randint(256, (n, 3, config.image_size, config.image_size), dtype=torch.uint8)
    batch = [images, torch.randint(config.num_classes, (n,))]
    batch = [part.pin_memory() if device.type == "cuda" else part for part in batch]
    if config.vae != "none":
        channels, *side = config.latent_shape
        batch.append([os.path.join(folder, f"{i}.npy") for i in range(n)])
        for file in batch[-1]:
            np.save(file, np.random.rand(2 * channels, *side).astype(np.float16))
    return batch


def timed_step(run: ma.Run, batch: list) -> list:
    """One step of train; returns the moments that begin and end each of PHASES."""
    stamps = []

    def mark(*_):
        stamps.append(rates.stamp(run.device))

    def draw_step(run, generator):
        drawn = ma.draw_step(run, generator)
        mark()
        return drawn

    def training_losses(*inputs, **drawn):
        mark()
        losses = ma.training_losses(*inputs, **drawn)
        mark()
        return losses

    hook = run.optimizer.register_step_pre_hook(mark)
    mark()
    ma.train_step(run, itertools.repeat(batch), draw_step, training_losses)
    mark()
    hook.remove()
    return stamps


def held_bytes(run: ma.Run) -> int:
    """What stays in memory between steps, in float32: weights, their average, AdamW's two moments,
    and the teacher."""
    held = 16 * sum(p.numel() for p in run.model.parameters())
    if isinstance(run.teacher, torch.nn.Module):
        held += 4 * sum(p.numel() for p in run.teacher.parameters())
    return held


def measure(configs: list, device, teacher, steps: int, rate: float, folder: str) -> list:
    """A dict for each config: one row of the table; of_reg and ratio compare FLOPs and time with
    REG's row (or the first). On GPU one network at a time."""
    rows = []
    for group in [configs] if device.type == "cpu" else [[config] for config in configs]:
        pairs = [(make_run(c, device, teacher), make_batch(c, device, folder)) for c in group]
        steppers = [functools.partial(timed_step, *pair) for pair in pairs]
        notes = [
            rates.inspect_step(step, held_bytes(run), device)
            for step, (run, _) in zip(steppers, pairs, strict=True)
        ]
        graphs = counters["stats"]["unique_graphs"]
        stamps = [[step() for step in steppers] for _ in range(steps)]
        graphs = counters["stats"]["unique_graphs"] - graphs  # a static shape compiles once
        for i, (run, _) in enumerate(pairs):
            laps = [rates.laps(device, taken[i]) for taken in stamps]
            row = summary(run.config, laps, rate)
            rows.append(row | notes[i] | dict(recompiled=graphs))
        del pairs, steppers, run
        gc.collect()  # a compiled network holds itself: its bytes are not the next's
    reg = next((row for row in rows if row["method"] == "reg"), rows[0])
    for row in rows:
        row["of_reg"], row["ratio"] = row["GFLOP"] / reg["GFLOP"], row["ms"] / reg["ms"]
    return rows


def summary(config: ma.Config, laps: list, rate: float) -> dict:
    """A row of the table, of steps whose phases took `laps` (seconds), for matrices at `rate`."""
    flops, total = rates.model_flops(config)[1], median(map(sum, laps))
    _, kept, floor = rates.tokens(config)
    phases = [1000 * median(column) for column in zip(*laps, strict=True)]
    return dict(
        method=config.method,
        tokens=kept,
        floor=floor,
        GFLOP=flops / 1e9,
        of_reg=1.0,
        ms=1000 * total,
        ratio=1.0,
        images_s=config.batch_size / total,
        MFU=flops * config.batch_size / total / rate,
        **dict(zip(PHASES, phases, strict=True)),
    )


# ---- 2. The command ------------------------------------------------------------------------------
def parse_args(gpu: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--methods", nargs="+", default=list(ma.METHODS), choices=ma.METHODS)
    add("--size", default="SiT-XL/2" if gpu else "demo")
    add("--batch_size", type=int, default=128 if gpu else 32)
    add("--depth", type=int, default=0, help="0: as the size")
    add("--steps", type=int, default=20 if gpu else 10, help="also the sampler's")
    add("--threads", type=int, default=torch.get_num_threads(), help="on CPU")
    for name in ("data", "vae_weights", "teacher_weights", "ckpt", "json"):
        add(f"--{name}", default="")
    add("--teacher", action=argparse.BooleanOptionalAction, default=True)
    add("--sample", action="store_true")
    add("--check", action="store_true")
    return parser.parse_args()


def make_configs(args: argparse.Namespace) -> list:
    typed = dict(size=args.size, batch_size=args.batch_size, vae_weights=args.vae_weights)
    if args.depth:
        typed["depth"] = args.depth
    if args.data or args.size != "demo":
        typed |= dict(data=args.data or "none", teacher_weights=args.teacher_weights)
    return [ma.make_config(method=method, **typed) for method in args.methods]


def check(configs: list) -> str:
    from test_table4 import count_flops

    rows = [
        dict(method=c.method, ours=str(rates.model_flops(c)), torch=str(count_flops(c)))
        for c in configs
    ]
    return rates.table(rows)


def main() -> None:
    _, _, device = ma.setup_distributed()
    args = parse_args(device.type == "cuda")
    torch.set_num_threads(args.threads)
    configs = make_configs(args)
    if args.check:
        print(check(configs))
        return
    rate, tables = rates.matrix_rate(device), {}
    head = f"{rates.machine(device)}; matrices {rate / 1e12:.3g} TFLOP/s; {args.size}"
    print(head, *sys.argv[1:])
    if args.sample:
        tables["sampling"] = [rates.sampling_rates(configs[0], device, args.steps, args.ckpt)]
    elif args.data:  # 256 / 0.317 s: what the paper's MaskAlign run eats on its 8 GPUs
        tables["data"] = [rates.loader_rates(configs[0], device, needed=256 / 0.317)]
    else:
        teachers = {"random teacher tokens": None}
        if args.teacher:
            name = f"teacher with {args.teacher_weights or 'random weights: as fast'}"
            teachers[name] = rates.make_teacher(configs[0], device)
        with tempfile.TemporaryDirectory() as folder:
            for name, teacher in teachers.items():
                tables[name] = measure(configs, device, teacher, args.steps, rate, folder)
    for name, rows in tables.items():
        print(f"\n{name}\n{rates.table(rows)}")
    if args.json:
        Path(args.json).write_text(json.dumps(dict(machine=head, argv=sys.argv, **tables)))


if __name__ == "__main__":
    main()
