"""The paper's Table 4 again: what a training step of each row of METHODS costs, and why.

  python tests/table4.py                     every row of METHODS: the demo on CPU, XL/2 on GPU
  python tests/table4.py --size SiT-S/2 --methods reg maskalign --steps 5
  python tests/table4.py --data DIR --vae_weights FILE           loader and --prepare, images/s
  python tests/table4.py --size SiT-B/2 --sample [--ckpt FILE]   sampling: float32 against bf16
  python tests/table4.py --check                                 FLOPs: ours against torch's count

A step is train()'s, from the same functions. Medians, after warm-up; compilation apart. On CPU the
methods take turns, and --threads 1 counts CPU time: a busy machine hits all, or none. Paper,
SiT-XL/2: REG 0.359 s with 257 tokens, MaskAlign 0.317 s with 193; that is 0.88, where tokens x
blocks alone (column floor) would give 0.82.
"""

import argparse, copy, dataclasses, gc, itertools, json, os, sys
from pathlib import Path
from statistics import median

sys.path[:0] = [str(ROOT := Path(__file__).resolve().parent.parent), str(ROOT / "tests")]
if __name__ == "__main__":  # quiet; it must be said before torch is loaded
    os.environ |= dict(KINETO_LOG_LEVEL="9", TORCH_CPP_LOG_LEVEL="ERROR")
import torch
from torch._dynamo.utils import counters

import maskalign as ma
from rates import (
    inspect_step,
    loader_rates,
    machine,
    make_teacher,
    matrix_rate,
    model_flops,
    sampling_rates,
    seconds,
    table,
    tokens,
)

PHASES = ("draw", "teacher", "forward", "backward", "update")  # update: clip, AdamW, EMA


def make_step(c: ma.Config, device, teacher) -> tuple:
    """(config, step, bytes held between steps). A step is one of train(), on one batch of random
    images; it yields after each of PHASES. Without a teacher its tokens are random."""
    asks = c.class_token or c.attn_coeff > 0 or c.align_coeff > 0 and not c.self_depth
    teacher, n, on_gpu = teacher if asks else None, c.batch_size, device.type == "cuda"
    c = dataclasses.replace(
        c, z_dim=c.hidden_size if c.self_depth else teacher.dim if teacher else c.z_dim
    )
    model = ma.build_model(c).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    averaged, weights = list(ema.parameters()), list(model.parameters())
    optimizer = torch.optim.AdamW(weights, c.lr, weight_decay=0.0, fused=True)
    batch = [
        torch.randint(256, (n, 3, c.image_size, c.image_size), dtype=torch.uint8),
        torch.randint(c.num_classes, (n,)),
    ]
    if c.vae != "none":
        batch.append(torch.rand(n, 2 * c.latent_shape[0], *c.latent_shape[1:]).half())
    batch = [part.pin_memory() if on_gpu else part for part in batch]
    z, attn = torch.randn(n, tokens(c)[0] + (not c.class_token), c.z_dim, device=device), None
    if c.attn_coeff:  # HASTE: the teacher's queries, keys and values, or random ones
        attn = [
            ma.tap_attention([model.blocks[i - 1].attn for i, _ in c.attn_layers]),
            ma.tap_attention([teacher.vit.blocks[i - 1].attn for _, i in c.attn_layers])
            if teacher
            else [torch.randn(*z.shape[:2], 3, 12, 64, device=device)] * 9,
        ]
    torch.backends.cuda.enable_cudnn_sdp(c.cells == 1)  # as train
    torch.compiler.reset()  # else, after 8 networks in one process, compile gives up silently
    if c.compile and on_gpu:
        model.compile()

    def step(count=itertools.count()):
        generator = ma.seeded(device, "step", c.seed, next(count))
        drawn = ma.draw_step(n, c.latent_shape, c.z_dim, c, generator, device)
        eps = torch.randn(drawn["noise"].shape, generator=generator, device=device)
        yield
        x, y, z_teacher = ma.load_batch(batch, eps, None, teacher)
        yield
        with torch.autocast(device.type, torch.bfloat16, enabled=c.bf16 and on_gpu):
            losses = ma.training_losses(
                model, x, y, z_teacher if teacher else z, c, ema=ema, attn=attn, **drawn
            )
        yield
        losses["loss"].backward()
        yield
        grad_norm = torch.nn.utils.clip_grad_norm_(weights, c.grad_clip)
        optimizer.found_inf = (~torch.isfinite(grad_norm)).float()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1 - c.ema_decay)
        yield

    held = 16 * sum(p.numel() for p in averaged)  # weights, their average, AdamW's two moments
    return c, step, held + 4 * sum(p.numel() for p in teacher.parameters()) if teacher else held


def measure(configs: list, device, teacher, steps: int, rate: float) -> list:
    """A dict for each config: one row of the table; of_reg and ratio compare FLOPs and time with
    REG's row (or the first). On GPU one network at a time."""
    rows = []
    for group in [configs] if device.type == "cpu" else [[c] for c in configs]:
        built = [make_step(c, device, teacher) for c in group]
        notes = [inspect_step(step, held, device) for _, step, held in built]
        graphs = counters["stats"]["unique_graphs"]
        laps = seconds(device, *(step() for _ in range(steps) for _, step, _ in built))
        graphs = counters["stats"]["unique_graphs"] - graphs  # a static shape compiles once
        for i, (c, _, _) in enumerate(built):
            mine, flops = laps[i :: len(built)], model_flops(c)[1]
            total = median(map(sum, mine))
            rows.append(
                dict(
                    method=c.method,
                    tokens=tokens(c)[1],
                    floor=tokens(c)[2],
                    GFLOP=flops / 1e9,
                    of_reg=1.0,
                    ms=1000 * total,
                    ratio=1.0,
                    images_s=c.batch_size / total,
                    MFU=flops * c.batch_size / total / rate,
                    **{name: 1000 * median(lap) for name, lap in zip(PHASES, zip(*mine))},
                    **notes[i],
                    recompiled=graphs,
                )
            )
        del built
        gc.collect()  # a compiled network holds itself: its bytes are not the next's
    reg = next((row for row in rows if row["method"] == "reg"), rows[0])
    return [
        row | dict(of_reg=row["GFLOP"] / reg["GFLOP"], ratio=row["ms"] / reg["ms"]) for row in rows
    ]


def main() -> None:
    _, _, device = ma.setup_distributed()
    gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--methods", nargs="+", default=list(ma.METHODS), choices=ma.METHODS)
    for name, value in dict(  # steps: also the sampler's; depth 0: as the size; threads: on CPU
        size="SiT-XL/2" if gpu else "demo",
        batch_size=128 if gpu else 32,
        depth=0,
        steps=20 if gpu else 10,
        threads=torch.get_num_threads(),
        data="",
        vae_weights="",
        teacher_weights="",
        ckpt="",
        json="",
        teacher=True,
        sample=False,
        check=False,
    ).items():
        kind = (
            dict(type=type(value))
            if type(value) is not bool
            else dict(action=argparse.BooleanOptionalAction)
        )
        parser.add_argument(f"--{name}", default=value, **kind)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    typed = dict(depth=args.depth) if args.depth else {}
    if args.data or args.size != "demo":
        typed.update(data=args.data or "none", teacher_weights=args.teacher_weights)
    configs = [
        ma.make_config(
            method=method,
            size=args.size,
            batch_size=args.batch_size,
            vae_weights=args.vae_weights,
            **typed,
        )
        for method in args.methods
    ]
    if args.check:
        from test_table4 import count_flops

        return print(
            table(
                [
                    dict(method=c.method, ours=str(model_flops(c)), torch=str(count_flops(c)))
                    for c in configs
                ]
            )
        )
    rate, tables = matrix_rate(device), {}
    head = f"{machine(device)}; matrices {rate / 1e12:.3g} TFLOP/s; {args.size}"
    print(head, *sys.argv[1:])
    if args.sample:
        tables["sampling"] = [sampling_rates(configs[0], device, args.steps, args.ckpt)]
    elif args.data:  # 256 / 0.317 s: what the paper's MaskAlign run eats on its 8 GPUs
        tables["data"] = [loader_rates(configs[0], device, needed=256 / 0.317)]
    else:
        tables["random teacher tokens"] = measure(configs, device, None, args.steps, rate)
        if args.teacher:
            name = f"teacher with {args.teacher_weights or 'random weights: as fast'}"
            tables[name] = measure(
                configs, device, make_teacher(configs[0], device), args.steps, rate
            )
    for name, rows in tables.items():
        print(f"\n{name}\n{table(rows)}")
    if args.json:
        Path(args.json).write_text(json.dumps(dict(machine=head, argv=sys.argv, **tables)))


if __name__ == "__main__":
    main()
