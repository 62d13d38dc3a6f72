"""The effect of alignment, with error bars: methods on the demo's shapes, some seeds of each.

  python tests/effect.py                  four methods, five seeds: one to two hours on two cores
  python tests/effect.py --methods sit maskalign --seeds 2 --steps 250 500    8 minutes

Each run is one of the demo, on one thread. At each of --steps its EMA generates 768 images,
without guidance, and from the same noise for all methods. A judge (judge.py) tells how far
they are from real shapes (Frechet distance), and how many of them are of the class that was
asked for. A second judge, which is no network, counts them, too. CPU seconds of training are
the number of steps times the median of one step. They count neither saving, nor generating,
nor the training of the teacher.

--out gets a folder for each run (about 100 MB), effect.json and effect.png. If the command is
killed, the same command continues.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import judge
import rates
from spread import as_markdown, draw_spread, summarise

import maskalign as ma
import sample

# The forks in forks/ are methods, too. The network of xAR is no SiT.
FORKS = sorted({path.stem for path in Path(__file__).parent.glob("forks/*.py")} - {"xar"})
SAMPLES = dict(num_images=768, labels="balanced", sampler="ode", steps=25)  # flags of sample.py


# ---- 1. A run
def load_method(method: str) -> tuple:
    """The function train of a method, and its kind of Config."""
    module = importlib.import_module(f"forks.{method}") if method in FORKS else ma
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    kinds = [kind for kind in classes if issubclass(kind, ma.Config)]
    return module.train, kinds[-1]


def run_folder(method: str, seed: int, args: argparse.Namespace) -> Path:
    return Path(args.out, f"{method}-{seed}")


def images_file(folder: Path, step: int) -> Path:
    """Where the images of a step are kept. Its checkpoint has the same name, as .pt."""
    return folder / f"step-{step:07d}.npz"


class StepClock:
    """Notes the CPU seconds between steps of an optimizer.

    PyTorch calls it after each step of any optimizer. That of the teacher comes first, so what
    was noted of another optimizer is dropped.
    """

    def __init__(self):
        self.optimizer = None
        self.moments = []

    def __call__(self, optimizer, args, kwargs) -> None:
        if optimizer is not self.optimizer:
            self.optimizer = optimizer
            self.moments = []
        self.moments.append(time.process_time())

    def seconds(self) -> list:
        return np.diff(self.moments).tolist()


def train_to(step: int, method: str, seed: int, folder: Path) -> None:
    """Trains a run until this step, and keeps its checkpoint as step-N.pt.

    The second call for a run continues from its latest.pt, and ends as one long run would.
    """
    train, kind = load_method(method)
    given = dict(method=method, seed=seed, steps=step, out=str(folder))
    config = ma.make_config(kind, log_every=50, preview_steps=1, **given)
    clock = StepClock()
    hook = register_optimizer_step_post_hook(clock)
    train(config)
    hook.remove()
    with open(folder / "cpu_s.txt", "a") as file:
        file.writelines(f"{seconds}\n" for seconds in clock.seconds())

    latest = folder / "latest.pt"
    found = torch.load(latest, weights_only=True)["step"]
    assert found == step, f"{latest} is of step {found}, past {step}: choose another --out"
    kept = images_file(folder, step).with_suffix(".pt")
    beside = f"{kept}.{os.getpid()}.tmp"
    shutil.copy(latest, beside)
    os.replace(beside, kept)


def run(method: str, seed: int, args: argparse.Namespace) -> None:
    """Does what a run lacks, on one thread. What it prints goes to output.txt in its folder."""
    torch.set_num_threads(1)
    folder = run_folder(method, seed, args)
    folder.mkdir(parents=True, exist_ok=True)
    machine = time.strftime("%F, ") + rates.machine(torch.device("cpu"))
    (folder / "machine.txt").write_text(machine)
    with open(folder / "output.txt", "a") as shown, redirect_stdout(shown), redirect_stderr(shown):
        for step in sorted(args.steps):
            images = images_file(folder, step)
            checkpoint = images.with_suffix(".pt")
            if not checkpoint.exists():
                train_to(step, method, seed, folder)
            if not images.exists():
                flags = [f"--{name}={value}" for name, value in SAMPLES.items()]
                sample.main(argv=[str(checkpoint), *flags, f"--out={images}"])


# ---- 2. All runs
def judge_run(method: str, seed: int, args: argparse.Namespace) -> list:
    """The points of a run, one for each step: {method, seed, step, cpu_s, fd, ...}."""
    folder = run_folder(method, seed, args)
    seconds = float(np.median(np.loadtxt(folder / "cpu_s.txt")))
    points = []
    for step in sorted(args.steps):
        point = dict(method=method, seed=seed, step=step, cpu_s=step * seconds)
        points.append(point | judge.score_npz(images_file(folder, step)))
    return points


def is_complete(method: str, seed: int, args: argparse.Namespace) -> bool:
    folder = run_folder(method, seed, args)
    return all(images_file(folder, step).exists() for step in args.steps)


def run_all(runs: list, args: argparse.Namespace) -> None:
    """Some runs [(method, seed), ...], --jobs of them at a time, each in its own process."""
    methods = [method for method, _ in runs]
    seeds = [seed for _, seed in runs]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, follow_parent) as pool:
        done = pool.map(functools.partial(run, args=args), methods, seeds)
        for _ in tqdm(done, "runs", total=len(runs)):
            pass


def follow_parent() -> None:
    """Ends this process when the command is killed, so that a new one has the runs to itself."""
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def parse_args(argv: list | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = [*ma.METHODS, *FORKS]
    four = ["sit", "repa", "reg", "maskalign"]
    steps = [250, 500, 1000, 2000]
    add("--methods", nargs="+", default=four, choices=names, metavar="NAME", help=", ".join(names))
    add("--seeds", type=int, default=5, metavar="N", help="runs of each method [5]")
    text = "when to generate images and judge them [250 500 1000 2000]"
    add("--steps", type=int, nargs="+", default=steps, metavar="N", help=text)
    add("--jobs", type=int, default=2, metavar="N", help="runs side by side, a core for each [2]")
    add("--out", default="runs/effect", metavar="DIR", help="folder to write into [runs/effect]")
    args = parser.parse_args(argv)
    assert args.seeds >= 2, f"seeds is {args.seeds}: a standard deviation needs 2 or more"
    assert min(args.steps) >= 2, f"steps {args.steps}: to time a step needs 2 or more"
    return args


def main() -> None:
    args = parse_args()
    methods = list(dict.fromkeys(args.methods))  # without repetition
    # Seed by seed, so that what is there after a while are whole seeds.
    runs = [(method, seed) for seed in range(args.seeds) for method in methods]
    run_all([one for one in runs if not is_complete(*one, args)], args)

    points = [point for one in runs for point in judge_run(*one, args)]
    real = judge.score_real(SAMPLES["num_images"])
    machines = sorted({(run_folder(*one, args) / "machine.txt").read_text() for one in runs})
    table = summarise(points)
    result = dict(machines=machines, settings=vars(args), real_shapes=real)
    result |= dict(mean_std=table, points=points)
    Path(args.out, "effect.json").write_text(json.dumps(result, indent=1))
    draw_spread(table, Path(args.out, "effect.png"))
    print(as_markdown(table), *machines, f"real shapes: {real}", sep="\n")


if __name__ == "__main__":
    main()
