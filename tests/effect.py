"""The effect of alignment, with error bars: methods on the demo's drawn shapes, some seeds each.

  python tests/effect.py                  four methods, five seeds: about an hour on two cores
  python tests/effect.py --methods sit maskalign --seeds 2 --steps 250 500    5 minutes

A run is the demo's, on one thread. At each of --steps its EMA draws 768 images: without guidance,
from the same noise for all methods. A judge (judge.py) gives their Frechet distance from real
shapes, and the share that it names as the class asked for. CPU seconds of training are the steps
times the median of one: without saving, drawing, and the teacher's own training. --out gets the
runs (150 to 220 MB each), effect.json and effect.png. Stopped in any way, the same command goes on.
"""

import argparse
import importlib
import json
import math
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import judge
import rates
from bands import as_markdown, draw_bands, summarise

import maskalign as ma
import sample

FORKS = sorted({path.stem for path in Path(__file__).parent.glob("forks/*.py")} - {"xar"})  # no SiT
DRAW = dict(num=768, labels="balanced", sampler="ode", steps=25)  # flags of sample.py


class StepClock(list):
    """The signals of train, which asks for their number after each step: the moment to write down
    the CPU seconds since the step before. In a file, as a run may be stopped and go on."""

    def __init__(self, path: str):
        self.path, self.last = path, None

    def __len__(self) -> int:
        before, self.last = self.last, time.process_time()
        with open(self.path, "a") as file:
            file.write(f"{self.last - before}\n" if before else "")
        return 0


def make_run(method: str, seed: int, args: argparse.Namespace) -> tuple:
    """(train, config, {step: file of its images}). Raises BadInput."""
    module = importlib.import_module(f"forks.{method}") if method in FORKS else ma
    kinds = [x for x in vars(module).values() if isinstance(x, type) and issubclass(x, ma.Config)]
    typed = dict(method=method, seed=seed, steps=max(args.steps), log_every=50, sample_every=10**9)
    typed |= dict(milestone_every=math.gcd(*args.steps), out=f"{args.out}/{method}-{seed}")
    config = ma.make_config(kinds[-1], **typed)
    files = {step: Path(config.out, f"step-{step:07d}.npz") for step in sorted(args.steps)}
    return module.train, config, files


def run(planned: tuple) -> None:
    """Trains, or goes on, and draws, on one thread; what is printed goes to a file."""
    (train, config, files), folder = planned, Path(planned[1].out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    machine = time.strftime("%F, ") + rates.machine(torch.device("cpu"))
    (folder / "machine.txt").write_text(machine)
    with open(folder / "output.txt", "a") as shown, redirect_stdout(shown), redirect_stderr(shown):
        train(config, signals=StepClock(f"{folder}/cpu_s.txt"))
        for step, file in files.items():
            flags = [f"--{name}={value}" for name, value in (DRAW | dict(out=file)).items()]
            with ma.explained(f"cannot draw step {step} of {folder}: name another --out"):
                sample.run(sample.parse_args([str(file.with_suffix(".pt")), *flags]))


def judged(runs: list) -> list:
    """The points of all runs: {method, seed, step, cpu_s, fd, named}."""
    points = []
    for _, config, files in runs:
        second = float(np.median(np.loadtxt(f"{config.out}/cpu_s.txt")))
        for step, file in files.items():
            point = dict(method=config.method, seed=config.seed, step=step, cpu_s=step * second)
            points.append(point | judge.score_npz(file))
    return points


def parse_args(argv: list | None = None) -> argparse.Namespace:
    """The command line. Raises BadInput."""
    plain, defaults = argparse.RawDescriptionHelpFormatter, ["sit", "repa", "reg", "maskalign"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--methods", nargs="+", default=defaults, choices=[*ma.METHODS, *FORKS])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=[250, 500, 1000, 2000])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, a core for each")
    parser.add_argument("--out", default="runs/effect")
    args = parser.parse_args(argv)
    for name, least in dict(seeds=2, steps=1, jobs=1).items():  # one seed has no spread
        ma.require(args, name, np.min(getattr(args, name)) >= least, f"{least} or above")
    return args


def main() -> None:
    """Runs what is missing, then judges all; bad input ends it with one sentence."""
    try:
        args = parse_args()
        methods = dict.fromkeys(args.methods)  # seed by seed: when stopped, whole seeds are there
        runs = [make_run(m, seed, args) for seed in range(args.seeds) for m in methods]
        todo = [one for one in runs if not all(file.exists() for file in one[-1].values())]
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, which is ours alone
        deaf = (signal.signal, (signal.SIGINT, signal.SIG_IGN))
        with torch.multiprocessing.get_context("spawn").Pool(args.jobs, *deaf, 1) as pool:
            list(tqdm(pool.imap(run, todo), f"runs in {args.out}", total=len(todo)))
        points, real = judged(runs), judge.score_real(DRAW["num"])
        machines = sorted({Path(config.out, "machine.txt").read_text() for _, config, _ in runs})
        table = summarise(points)
        result = dict(machines=machines, settings=vars(args), real_shapes=real, mean_std=table)
        Path(args.out, "effect.json").write_text(json.dumps(result | dict(points=points), indent=1))
        draw_bands(table, Path(args.out, "effect.png"))
        print(as_markdown(table), *machines, f"real shapes: {real}", sep="\n")
    except (ma.BadInput, OSError) as error:
        sys.exit(f"effect.py: {error}")
    except KeyboardInterrupt:
        sys.exit("effect.py: stopped: the same command goes on")


if __name__ == "__main__":
    main()
