"""What the mask of training changes: the gap, and sampling that is disturbed as training was.

  python tests/robust.py runs/effect      after effect.py --methods reg maskalign ...

For the checkpoints that effect.py kept of some methods and all their seeds, it measures
  gap     the stability gap G_r (Eq. 12): the alignment loss of a masked input minus that of the
          full input, on the same tokens. See figure2.py.
  align   that alignment loss of the full input
  fd 25%  Frechet distance, and
  named 25%, template 25%  shares of the correct class, by two judges (judge.py), of 768 images,
          when each step of the sampler drops a random 25% of the patch tokens. A dropped token
          keeps the velocity that was last predicted for it. So with 0%, 50% and 75%.
Images, noise and masks are the same for all networks. Into --out goes robust.json. If the
command is killed, the same command continues. Two to three minutes a checkpoint, on one thread.
"""

import argparse
import itertools
import json
import os
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import effect
import figure2
import judge
import rates
from spread import markdown_row

import maskalign as ma
import sample

SHARES = (0.0, 0.25, 0.5, 0.75)  # of the patch tokens, dropped in each step of the sampler
WHOLE = dict(gap="`G_r`", align="alignment loss, full input")


# ---- 1. Disturbed sampling
class TokenDropper:
    """A network for the samplers, whose blocks see a random subset of the patches in each call.

    A dropped token has the velocity of the call before. The first call drops none. There is
    one call for each step, since guidance, which needs two, is not for this network.
    """

    def __init__(self, model: ma.SiT, share: float, generator: torch.Generator):
        self.model = model
        self.patch_size = model.patch_size
        self.share = share
        self.generator = generator
        self.v = None  # the last velocities, (N, T, p*p*C)

    def __call__(self, x, t, y, cls=None) -> ma.SiTOutput:
        if self.v is None or self.share == 0:
            out = self.model(x, t, y, cls)
            self.v = out.v
            return out
        scores = torch.rand(self.v.shape[:2], generator=self.generator)
        ids_keep = ma.sample_token_subset(scores, self.share).to(x.device)  # (N, K)
        out = self.model(x, t, y, cls, ids_keep)
        rows = torch.arange(len(x), device=x.device)[:, None]  # (N, 1)
        self.v = self.v.clone()  # the sampler has the old one
        self.v[rows, ids_keep] = out.v
        return out._replace(v=self.v)


def generate(model: ma.SiT, config: ma.Config, share: float, device) -> Tensor:
    """Images uint8 (N, 3, H, W). With share 0, they are those of effect.py."""
    flags = [f"--{name}={value}" for name, value in effect.SAMPLES.items()]
    args = sample.parse_args(["", *flags, "--cfg_scale=1"], sample.SAMPLERS)
    sampler = sample.SAMPLERS[args.sampler]
    images = []
    for first in range(0, args.num_images, args.batch_size):
        indices = range(first, min(first + args.batch_size, args.num_images))
        labels = [i % config.num_classes for i in indices]
        generator = ma.seeded("cpu", "dropped", first)  # the same for all networks and shares
        network = TokenDropper(model, share, generator)
        job = sample.Job(args, config, network, None, sampler, device)
        images.append(sample.generate(job, indices, labels))
    return torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2)


# ---- 2. A run
def measure_alignment(model: ma.SiT, shared: figure2.Shared, mask_ratio: float) -> dict:
    """gap and align: means over the times and masks of figure2.py."""
    rows, x, y, z, numbers = next(figure2.batches(shared))
    config = replace(shared.config, mask_ratio=mask_ratio)
    found = []
    for t, scores in itertools.product(figure2.TIMES, shared.scores):
        some = figure2.at_time(t, numbers, scores[rows])
        found.append(figure2.alignment_gap(model, x, y, z, config, some))
    gaps, losses = zip(*found, strict=True)
    return dict(gap=mean(gaps), align=mean(losses))


def measure(folder: Path, steps: list):
    """Yields {step, gap, align, "fd 0%", "named 0%", ...} of a run at these steps."""
    options = figure2.parse_args([str(folder), f"--images={figure2.BATCH}"])
    shared = None
    for step in steps:
        _, model, config = figure2.load_model(checkpoint(folder, step))
        shared = shared or figure2.set_up(config, options)  # its teacher is that of all steps
        model = model.to(shared.device)
        point = dict(step=step) | measure_alignment(model, shared, options.mask_ratio)
        model.eval()  # no projector
        for share in SHARES:
            images = generate(model, config, share, shared.device)
            for name, value in judge.score(images).items():
                point[f"{name} {share:.0%}"] = value
        yield point


def checkpoint(folder: Path, step: int) -> Path:
    return effect.images_file(folder, step).with_suffix(".pt")


def runs_of(args: argparse.Namespace) -> list:
    """All (method, seed, folder, steps) that effect.py has trained and the command asks for."""
    runs = []
    for method in dict.fromkeys(args.methods):
        folders = Path(args.runs).glob(f"{method}-[0-9]*")
        seeds = sorted(int(folder.name.removeprefix(f"{method}-")) for folder in folders)
        for seed in seeds:
            folder = Path(args.runs, f"{method}-{seed}")
            steps = [step for step in args.steps if checkpoint(folder, step).exists()]
            runs.append((method, seed, folder, steps))
    return runs


# ---- 3. The table
def summarise(points: list) -> list:
    """Points {method, seed, step, gap, ...} -> rows {method, step, seeds, gap, ...}.

    There is a row for each method and step. Its values are pairs (mean, standard deviation)
    over seeds. With one seed, the deviation is None.
    """
    groups = defaultdict(list)
    for point in points:
        groups[point["method"], point["step"]].append(point)
    rows = []
    for (method, step), seeds in groups.items():
        row = dict(method=method, step=step, seeds=len(seeds))
        _, _, _, *measures = seeds[0]
        for name in measures:
            values = [point[name] for point in seeds]
            row[name] = (mean(values), stdev(values) if len(values) > 1 else None)
        rows.append(row)
    return rows


def as_markdown(rows: list) -> str:
    """A table of what has no shares, and one for each measure of the images."""
    shares = [f"{share:.0%}" for share in SHARES]
    measures = [name.removesuffix(" 0%") for name in rows[0] if name.endswith(" 0%")]
    lines = draw_table(rows, "", WHOLE, 4)
    for measure in measures:
        columns = {f"{measure} {share}": f"{share} dropped" for share in shares}
        lines += draw_table(rows, f"`{measure}`", columns, 1)
    return "\n".join(lines)


def draw_table(rows: list, title: str, columns: dict, digits: int) -> list:
    """columns are {name of a value: its header}."""
    lines = [markdown_row(title, "steps", "seeds", *columns.values())]
    lines.append(markdown_row(*["---"] * (3 + len(columns))))
    for row in rows:
        cells = [f"`{row['method']}`", str(row["step"]), str(row["seeds"])]
        cells += [as_text(*row[name], digits) for name in columns]
        lines.append(markdown_row(*cells))
    return [*lines, ""]


def as_text(middle: float, std: float | None, digits: int) -> str:
    text = f"{middle:.{digits}f}"
    return text if std is None else f"{text} ± {std:.{digits}f}"


# ---- 4. The command
def parse_args(argv: list | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = [method for method in ma.METHODS if method != "sit"]  # it aligns nothing
    four = ["reg", "maskalign", "maskalign-no-mixing", "maskalign-no-masking"]
    steps = [500, 1000, 2000]
    add("runs", metavar="DIR", help="the folder of effect.py")
    add("--methods", nargs="+", default=four, choices=names, metavar="NAME", help=", ".join(names))
    text = "checkpoints to measure [500 1000 2000]"
    add("--steps", type=int, nargs="+", default=steps, metavar="N", help=text)
    add("--out", default="", metavar="DIR", help="folder to write into [that of effect.py]")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    file = Path(args.out or args.runs, "robust.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    points = json.loads(file.read_text())["points"] if file.exists() else []
    known = {(point["method"], point["seed"], point["step"]): point for point in points}
    runs = runs_of(args)
    asked = [(*run, step) for *run, _, steps in runs for step in steps]
    assert asked, f"{args.runs} has no checkpoints of {args.methods} at steps {args.steps}"
    machine = rates.machine(torch.device("cpu"))
    for method, seed, folder, steps in tqdm(runs, disable=None):
        missing = [step for step in steps if (method, seed, step) not in known]
        for point in measure(folder, missing):
            place = (method, seed, point["step"])
            known[place] = dict(method=method, seed=seed) | point
            points = list(known.values())
            result = dict(machine=machine, mean_std=summarise(points), points=points)
            beside = file.with_suffix(f".{os.getpid()}.tmp")
            beside.write_text(json.dumps(result, indent=1))
            os.replace(beside, file)
    print(as_markdown(summarise([known[place] for place in asked])), machine, sep="\n")


if __name__ == "__main__":
    main()
