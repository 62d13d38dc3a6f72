"""The paper's Table 4: what does a training step of each row of METHODS cost, and why?

  python tests/table4.py                     every row of METHODS: the demo on CPU, XL/2 on GPU
  python tests/table4.py --size SiT-S/2 --methods reg maskalign --steps 5
  python tests/table4.py --data DIR [--vae FILE]                 loader and encoder, images/s
  python tests/table4.py --size SiT-B/2 --sample [--ckpt FILE]   sampling: float32 against bf16
  python tests/table4.py --check                                 FLOPs: ours against torch's count

A step is the body of the loop of maskalign.train. Times are medians, after warm-up, and those
of compilation are apart. On a CPU, the methods take turns, and with --threads 1, CPU time is
measured, so what else the machine does hits all methods or none.

The paper's SiT-XL/2: REG 0.359 s with 257 tokens, MaskAlign 0.317 s with 193. That is 0.88,
where tokens x blocks alone (column floor) would give 0.82.
"""

import argparse
import copy
import dataclasses
import functools
import gc
import json
import os
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace

if __name__ == "__main__":  # for a quiet profiler; to be set before torch is loaded
    os.environ |= dict(KINETO_LOG_LEVEL="9", TORCH_CPP_LOG_LEVEL="ERROR")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rates
import torch
from torch import nn
from torch._dynamo.utils import counters

import maskalign as ma

# The parts of a step: teacher (with the batch's way to the device), random numbers and forward,
# backward (with the clipping of the gradient), and update (AdamW and EMA).
PHASES = ("teacher", "forward", "backward", "update")


# ---- 1. A step, taken apart
class RandomTokens:
    """Always the same random tokens z (N, 1+T, z_dim): a teacher that costs nothing."""

    def __init__(self, config: ma.Config, device):
        self.dim = config.z_dim
        patches = (config.latent_shape[1] // config.patch_size) ** 2
        self.z = torch.randn(config.batch_size, 1 + patches, config.z_dim, device=device)

    def __call__(self, images):
        return self.z


class Step:
    """What a step of maskalign.train needs, as made there, and the step itself."""

    def __init__(self, config: ma.Config, device, teacher=None):
        """Without a teacher, its tokens are random."""
        teacher = teacher or RandomTokens(config, device)
        config = dataclasses.replace(config, z_dim=teacher.dim)
        if not config.class_token and config.align_coeff == 0:
            teacher = None
        self.config = config
        self.device = device
        self.teacher = teacher
        # The latents are kept, as after the first epoch, so there is nothing to encode.
        self.vae = None if config.vae == "none" else SimpleNamespace(scale=config.vae_scale)
        self.batch = make_batch(config, device)
        self.model = ma.SiT(config).to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.update_ema = ma.get_ema_multi_avg_fn(config.ema_decay)
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=0, fused=True)
        self.history = []
        torch.compiler.reset()  # else, after 8 networks in one process, compile gives up silently
        if config.compile and device.type == "cuda":
            self.model.compile()

    def __call__(self) -> list:
        """The body of the loop in maskalign.train. Returns the stamps that part the PHASES."""
        config = self.config
        device = self.device
        on_gpu = device.type == "cuda"
        stamps = [rates.stamp(device)]
        rng = ma.StepRng(config, step=0, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16 and on_gpu):
            x, y, z = ma.prepare_batch(self.batch, rng, self.vae, self.teacher)
            stamps.append(rates.stamp(device))
            terms = ma.training_losses(self.model, x, y, z, config, rng, self.ema)
        stamps.append(rates.stamp(device))
        self.optimizer.zero_grad()
        terms["loss"].backward()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        stamps.append(rates.stamp(device))
        self.optimizer.step()
        self.update_ema(list(self.ema.parameters()), list(self.model.parameters()), None)
        terms["grad_norm"] = grad_norm
        self.history.append({name: value.detach() for name, value in terms.items()})
        stamps.append(rates.stamp(device))
        return stamps

    def held_bytes(self) -> int:
        """What stays between steps, in float32: weights, EMA, AdamW's two moments, the teacher."""
        held = 16 * sum(p.numel() for p in self.model.parameters())
        if isinstance(self.teacher, nn.Module):
            held += 4 * sum(p.numel() for p in self.teacher.parameters())
        return held


def make_batch(config: ma.Config, device) -> dict:
    """Random images, and random latents if there is a VAE, as the loader would give them."""
    n = config.batch_size
    size = config.image_size
    batch = dict(image=torch.randint(256, (n, 3, size, size), dtype=torch.uint8))
    batch["label"] = torch.randint(config.num_classes, (n,))
    if config.vae != "none":
        channels, height, width = config.latent_shape
        batch["mean_std"] = torch.rand(n, 2 * channels, height, width).half()
    if device.type == "cuda":
        batch = {name: part.pin_memory() for name, part in batch.items()}
    return batch


# ---- 2. The table
def measure(configs: list, device, teacher, num_steps: int, rate: float) -> list:
    """A row for each config, as a dict. On a GPU, there is one network at a time.

    of_reg and ratio are FLOPs and time as shares of those of REG (or of the first row).
    """
    rows = []
    for group in [configs] if device.type == "cpu" else [[config] for config in configs]:
        rows += measure_group(group, device, teacher, num_steps, rate)
        gc.collect()  # a compiled network refers to itself, and would stay in memory
    reg = next((row for row in rows if row["method"] == "reg"), rows[0])
    for row in rows:
        row["of_reg"] = row["GFLOP"] / reg["GFLOP"]
        row["ratio"] = row["ms"] / reg["ms"]
    return rows


def measure_group(configs: list, device, teacher, num_steps: int, rate: float) -> list:
    """The rows of some configs, whose steps take turns."""
    steps = [Step(config, device, teacher) for config in configs]
    notes = [rates.inspect_step(step, step.held_bytes(), device) for step in steps]
    graphs = counters["stats"]["unique_graphs"]
    turns = [[step() for step in steps] for _ in range(num_steps)]
    graphs = counters["stats"]["unique_graphs"] - graphs  # 0, since the shapes are static
    rows = []
    for i, step in enumerate(steps):
        laps = [rates.seconds_between(device, stamps[i]) for stamps in turns]
        rows.append(summarise(step.config, laps, rate) | notes[i] | dict(recompiled=graphs))
    return rows


def summarise(config: ma.Config, laps: list, rate: float) -> dict:
    """A row of the table. laps are the seconds of the PHASES of each step.

    MFU is the FLOP/s of the network as a share of `rate`, that of a product of matrices.
    """
    _, tokens = rates.count_tokens(config)
    _, flops = rates.model_flops(config)
    total = median(map(sum, laps))
    row = dict(
        method=config.method,
        tokens=tokens,
        floor=rates.token_floor(config),
        GFLOP=flops / 1e9,
        of_reg=1.0,
        ms=1000 * total,
        ratio=1.0,
        images_s=config.batch_size / total,
        MFU=flops * config.batch_size / total / rate,
    )
    for name, column in zip(PHASES, zip(*laps, strict=True), strict=True):
        row[name] = 1000 * median(column)
    return row


# ---- 3. The command
def parse_args(argv: list | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu = torch.cuda.is_available()
    names = list(ma.METHODS)
    threads = torch.get_num_threads()
    add = parser.add_argument
    add("--methods", nargs="+", default=names, choices=names, metavar="NAME", help="rows [all]")
    size = "SiT-XL/2" if gpu else "demo"
    add("--size", default=size, choices=ma.SIZES, help="network [GPU: SiT-XL/2, CPU: demo]")
    n = 128 if gpu else 32
    add("--batch_size", type=int, default=n, metavar="N", help="images [GPU: 128, CPU: 32]")
    add("--depth", type=int, default=0, metavar="N", help="blocks after the mask [as the size]")
    text = "steps to time, or steps of the sampler [GPU: 20, CPU: 10]"
    add("--steps", type=int, default=20 if gpu else 10, metavar="N", help=text)
    add("--threads", type=int, default=threads, metavar="N", help="of the CPU [all cores]")
    add("--data", default="", metavar="DIR", help="measure how fast these images are loaded")
    add("--vae", default="", metavar="VAE", help="measure it, too: SD-VAE, file or hub name")
    add("--teacher_weights", default="", metavar="FILE", help="teacher [random weights]")
    text = "also measure steps with the teacher in them"
    add("--teacher", action=argparse.BooleanOptionalAction, default=True, help=text)
    add("--sample", action="store_true", help="measure the sampler instead of steps")
    add("--ckpt", default="", metavar="FILE", help="checkpoint for --sample [made-up weights]")
    add("--check", action="store_true", help="compare the FLOPs with torch's count")
    add("--json", default="", metavar="FILE", help="write the tables there, too")
    return parser.parse_args(argv)


def make_configs(args: argparse.Namespace) -> list:
    given = dict(size=args.size, batch_size=args.batch_size)
    if args.vae:
        given["vae"] = args.vae
    if args.depth:
        given["depth"] = args.depth
    if args.data or args.size != "demo":
        given |= dict(data=args.data or "none", teacher_weights=args.teacher_weights)
    else:
        given["num_classes"] = len(ma.SHAPES)
    return [ma.make_config(method=method, **given) for method in args.methods]


def check(configs: list) -> list:
    from test_table4 import count_flops

    rows = []
    for config in configs:
        ours = str(rates.model_flops(config))
        rows.append(dict(method=config.method, ours=ours, torch=str(count_flops(config))))
    return rows


def tables_of(args: argparse.Namespace, configs: list, device, rate: float) -> dict:
    """{title: rows} of what the command asks for."""
    first = configs[0]
    if args.check:
        return dict(FLOPs=check(configs))
    vae = ma.build_vae(first, device) if args.vae else None
    if args.sample:
        row = rates.sampling_rates(first, device, args.steps, args.ckpt, vae)
        return dict(sampling=[row])
    if args.data:
        needed = 256 / 0.317  # images/s of the paper's MaskAlign run, on its 8 GPUs
        return dict(data=[rates.loader_rates(first, device, needed, vae)])
    measured = functools.partial(measure, configs, device, num_steps=args.steps, rate=rate)
    tables = {"random teacher tokens": measured(teacher=None)}
    if args.teacher:
        title = f"teacher with {args.teacher_weights or 'random weights, which are as fast'}"
        tables[title] = measured(teacher=rates.make_teacher(first, device))
    return tables


def main() -> None:
    args = parse_args()
    _, _, device = ma.setup_distributed()
    torch.set_num_threads(args.threads)
    configs = make_configs(args)
    rate = rates.matrix_rate(device)
    head = f"{rates.machine(device)}; matrices {rate / 1e12:.3g} TFLOP/s; {args.size}"
    print(head, *sys.argv[1:])
    tables = tables_of(args, configs, device, rate)
    for title, rows in tables.items():
        print(f"\n{title}\n{rates.as_table(rows)}")
    if args.json:
        Path(args.json).write_text(json.dumps(dict(machine=head, argv=sys.argv, **tables)))


if __name__ == "__main__":
    main()
