"""The effect of alignment, with error bars: methods on the demo's drawn shapes, a few seeds each.

  python tests/effect.py                            four methods, five seeds: an hour on two cores
  python tests/effect.py --methods sit maskalign --seeds 2 --steps 250 500     a lesson: 5 minutes

A run is the demo's, on one thread. At each of --steps its EMA draws 768 images: no guidance, equal
noise for all methods. A judge that is not the teacher, a small convolutional network that learned
to name the 8192 shapes of the demo, says of them
  fd      Frechet distance, in its 64 features, from 8192 shapes on which nobody was trained
  named   share that it names as the class they were asked for, in %
cpu_s, the CPU seconds of training, are the steps times the median of one: without saving, sampling,
and the teacher's own training. --out gets effect.json, effect.png and the runs (170 MB each).
Stopped in any way, the same command goes on; fewer --seeds show what is there already.
"""

import argparse
import importlib
import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent / "forks")]
import fid
import maskalign as ma
import rates
import sample

FORKS = {path.stem for path in Path(__file__).parent.glob("forks/*.py")} - {"xar"}  # xar: no SiT
DRAW = "--num 768 --labels balanced --sampler ode --steps 25 --out".split()  # sample.py's flags


# ---- 1. The judge --------------------------------------------------------------------------------
def train_judge(images: Tensor, y: Tensor) -> nn.Sequential:
    """A classifier of uint8 images (N, 3, 24, 24); its last layer but one gives 64 features."""
    torch.manual_seed(1000)  # no run has this seed
    layers = []
    for channels, width in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.SiLU()]
    judge = nn.Sequential(*layers, nn.Flatten(), nn.Linear(9 * 64, 64), nn.SiLU(), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(judge.parameters())
    for batch in torch.randint(len(y), (1000, 64)):
        F.cross_entropy(judge(images[batch] / 127.5 - 1), y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return judge


@torch.no_grad()
def look(judge: nn.Sequential, images: Tensor) -> tuple:
    """Mean and covariance of the features; share in % named as asked: image i is of class i % 8."""
    features, sums = judge[:-1](images / 127.5 - 1), torch.zeros(65, 65, dtype=torch.float64)
    fid.add_moments(sums, features)
    hits = judge[-1](features).argmax(dim=1) == torch.arange(len(images)) % 8
    return *fid.mean_and_covariance(sums), 100 * hits.double().mean().item()


def judge_all(runs: list) -> tuple:
    """Points {method, seed, step, fd, named, cpu_s} of all runs, and the best that there can be:
    what the judge says of as many real shapes."""
    images, y = ma.demo_shapes(24, 2 * 8192 + 768).tensors  # the first 8192 are the demo's
    judge = train_judge(images[:8192], y[:8192])
    *held_out, accuracy = look(judge, images[8192:16384])

    def point(images):
        *stats, named = look(judge, images)
        return dict(fd=fid.frechet_distance(*stats, *held_out), named=named)

    points = []
    for _, config, files in runs:
        cpu_s = np.median(np.loadtxt(f"{config.out}/cpu_s.txt"))
        for step, file in files.items():
            told = point(torch.from_numpy(np.load(file)["arr_0"]).permute(0, 3, 1, 2))
            run = dict(method=config.method, seed=config.seed, step=step, cpu_s=step * cpu_s)
            points.append(run | told)
    return points, point(images[16384:]) | dict(judge_accuracy=accuracy)


# ---- 2. The runs, in processes of their own ------------------------------------------------------
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
    module = ma if method in ma.METHODS else importlib.import_module(method)
    kinds = [x for x in vars(module).values() if isinstance(x, type) and issubclass(x, ma.Config)]
    typed = dict(method=method, seed=seed, steps=max(args.steps), log_every=50, sample_every=10**9)
    typed |= dict(milestone_every=math.gcd(*args.steps), out=f"{args.out}/{method}-{seed}")
    config = ma.make_config(kinds[-1], **typed)
    return module.train, config, {n: Path(config.out, f"step-{n:07d}.npz") for n in args.steps}


def run(train, config: ma.Config, files: dict) -> None:
    """Trains, or goes on, and draws; what the two programs print goes to a file."""
    Path(config.out).mkdir(parents=True, exist_ok=True)
    sys.stdout = sys.stderr = open(f"{config.out}/output.txt", "a", buffering=1)
    torch.set_num_threads(1)
    train(config, signals=StepClock(f"{config.out}/cpu_s.txt"))
    for file in files.values():
        sample.run(sample.parse_args([str(file.with_suffix(".pt")), *DRAW, str(file)]))
    machine = f"{time.strftime('%F')}: {rates.machine(torch.device('cpu'))}"
    Path(config.out, "machine.txt").write_text(machine)


# ---- 3. The command ------------------------------------------------------------------------------
def summarise(points: list) -> dict:
    """{method: [{step, fd, named, cpu_s}, ...]}, of which the last three are (mean, std) over seeds."""
    table = {}
    for method, step in dict.fromkeys((p["method"], p["step"]) for p in points):
        these = [p for p in points if (p["method"], p["step"]) == (method, step)]
        spread = {k: torch.tensor([p[k] for p in these]) for k in ("fd", "named", "cpu_s")}
        spread = {k: (v.mean().item(), v.std().item()) for k, v in spread.items()}
        table.setdefault(method, []).append(dict(step=step) | spread)
    return table


def as_markdown(table: dict) -> str:
    """A row for each method and measure, mean and standard deviation at each step."""
    steps = [row["step"] for row in next(iter(table.values()))]
    lines = [["", *(f"{step} steps" for step in steps)], ["---"] * (len(steps) + 1)]
    for key in ("fd", "named", "cpu_s"):
        for method, rows in table.items():
            cells = [f"{row[key][0]:.3g} ± {row[key][1]:.2g}" for row in rows]
            lines.append([f"{key}, {method}", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """The command line; bad input ends it with one sentence."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("--methods", nargs="+", default=["sit", "repa", "reg", "maskalign"], metavar="METHOD")
    add("--seeds", type=int, default=5, help="two at least: one has no spread [5]")
    add("--steps", type=int, nargs="+", default=[250, 500, 1000, 2000])
    add("--jobs", type=int, default=2, help="runs side by side, a core each [2]")
    add("--out", default="runs/effect", help="folder [runs/effect]")
    args = parser.parse_args()
    # Seed by seed: so a study that was stopped has whole seeds.
    runs = [make_run(method, seed, args) for seed in range(args.seeds) for method in args.methods]
    todo = [run for run in runs if not all(file.exists() for file in run[-1].values())]
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        list(tqdm(pool.map(run, *zip(*todo, strict=True)), "runs", total=len(todo)))
    points, best = judge_all(runs)
    table = summarise(points)
    machines = sorted({Path(config.out, "machine.txt").read_text() for _, config, _ in runs})
    facts = dict(machines=machines, settings=vars(args), real_shapes=best, table=table)
    Path(args.out, "effect.json").write_text(json.dumps(facts | dict(points=points), indent=1))
    print(as_markdown(table), *machines, f"real shapes: {best}", sep="\n")


if __name__ == "__main__":
    main()
