"""Plots what runs logged in log.jsonl, side by side. It opens no checkpoint.

  python tests/curves.py runs/reg-demo runs/maskalign-demo    loss, alignment, norm of gradient
  python tests/curves.py RUN [RUN ...] --curves denoise,cls/loss --first 1000 --out DIR

It writes curves.png into --out, by default the folder of the first RUN. --curves takes names
of the log, and plots a panel for each. a/b plots two in one panel, b with thin lines. What a
run did not log is left out, and so is a loss that its method does not have, which is 0.

The denoise of methods with different masks does not compare: a network that sees all tokens
has an easier task than one that sees 75%.
"""

import argparse
import json
import math
from collections import namedtuple
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
CURVES = "loss,align,grad_norm"

# A rectangle in pixels, and the numbers that its sides stand for.
Frame = namedtuple("Frame", "left top width height x_min x_max y_min y_max")


# ---- 1. The logs
def folder_of(run: str) -> Path:
    """A run is given as its folder, or as a checkpoint in it."""
    return Path(run) if Path(run).is_dir() else Path(run).parent


def by_name(runs: list) -> dict:
    """{name: run}. The name is that of the folder, or the whole path where names repeat."""
    for run in runs:
        assert Path(run).exists(), f"there is no {run}: give a run folder, as runs/reg-demo"
    names = [folder_of(run).absolute().name for run in runs]
    if len(set(names)) < len(runs):
        names = [str(run) for run in runs]
    return dict(zip(names, runs, strict=True))


def read_log(run: str, first: int = 0) -> list:
    """The lines of log.jsonl from step `first` on, as dicts in the order of their steps.

    A run that was killed repeats the lines since its checkpoint, so the last line of each step
    counts. A line that is still being written does not.
    """
    path = folder_of(run) / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    entries = [json.loads(line) for line in lines if line.endswith("}\n")]
    last = {entry["step"]: entry for entry in entries}
    return [last[step] for step in sorted(last) if step >= first]


def curves_of(logs: dict, panel: str) -> list:
    """The curves of a panel, `a` or `a/b`: (color, width, [(step, value), ...]) for each run.

    Values that are not finite are left out, and so are curves that are 0 throughout.
    """
    curves = []
    for i, name in enumerate(panel.split("/")):
        width = 7 if i == 0 else 3
        for color, log in zip(COLORS, logs.values(), strict=False):
            points = [(entry["step"], entry.get(name, math.nan)) for entry in log]
            points = [(step, value) for step, value in points if math.isfinite(value)]
            if any(value != 0 for _, value in points):
                curves.append((color, width, points))
    return curves


# ---- 2. The picture, whose sizes are in half pixels
def ticks(low: float, high: float) -> list:
    """Four to eleven round numbers between low and high."""
    least = (high - low) / 9
    unit = 10 ** math.floor(math.log10(least))
    step = next(k * unit for k in (1, 2, 5, 10) if k * unit >= least)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def place(frame: Frame, x: float, y: float) -> tuple:
    """The pixel at which a frame shows the point (x, y)."""
    across = (x - frame.x_min) / (frame.x_max - frame.x_min)
    down = (frame.y_max - y) / (frame.y_max - frame.y_min)
    return frame.left + frame.width * across, frame.top + frame.height * down


def draw_text(draw, x: float, y: float, text: str, anchor: str = "mm") -> None:
    draw.text((x, y), text, "black", font_size=32, anchor=anchor)


def draw_grid(draw, frame: Frame, x_labels: dict, y_labels: dict) -> None:
    """Grey lines at some values of x and of y, with labels {value: text}."""
    for value, text in x_labels.items():
        x, _ = place(frame, value, 0)
        draw.line((x, frame.top, x, frame.top + frame.height), "#dddddd", 2)
        draw_text(draw, x, frame.top + frame.height + 28, text)
    for value, text in y_labels.items():
        _, y = place(frame, 0, value)
        draw.line((frame.left, y, frame.left + frame.width, y), "#dddddd", 2)
        draw_text(draw, frame.left - 12, y, text, "rm")


def draw_border(draw, frame: Frame) -> None:
    corner = (frame.left + frame.width, frame.top + frame.height)
    draw.rectangle((frame.left, frame.top, *corner), outline="black", width=2)


def draw_panel(draw, left: int, panel: str, curves: list) -> None:
    """The curves of curves_of, with a title, a grid, and a border."""
    width = 780
    height = 640
    top = 150
    first, *others = panel.split("/")
    title = ", ".join([first, *(f"thin: {name}" for name in others)])
    draw_text(draw, left + width / 2, 115, title)
    if not curves:
        draw_text(draw, left + width / 2, top + height / 2, "not logged")
        return

    steps = [step for _, _, points in curves for step, _ in points]
    values = [value for _, _, points in curves for _, value in points]
    margin = 0.05 * (max(values) - min(values)) or 0.1
    start = min(min(steps), max(steps) - 1)  # a single step has a panel, too
    y_range = (min(values) - margin, max(values) + margin)
    frame = Frame(left, top, width, height, start, max(steps), *y_range)
    x_labels = {step: f"{step:.6g}" for step in ticks(start, max(steps))}
    y_labels = {value: f"{value:.6g}" for value in ticks(*y_range)}
    draw_grid(draw, frame, x_labels, y_labels)
    for color, thick, points in curves:
        draw.line([place(frame, *point) for point in points], color, thick, "curve")
        x, y = place(frame, *points[-1])  # a dot, since a single point is no line
        draw.ellipse((x - thick, y - thick, x + thick, y + thick), color)
    draw_border(draw, frame)
    draw_text(draw, left + width / 2, 870, "step")


def draw_curves(logs: dict, panels: list, path: Path) -> None:
    """A panel for each name or pair of names in `panels`, a color for each run."""
    picture = Image.new("RGB", (1000 * len(panels), 900), "white")
    draw = ImageDraw.Draw(picture)
    x = 150
    for color, name in zip(COLORS, logs, strict=False):  # the legend
        draw.line((x, 45, x + 50, 45), color, 8)
        draw_text(draw, x + 65, 45, name, "lm")
        x += 140 + draw.textlength(name, font_size=32)
    for i, panel in enumerate(panels):
        draw_panel(draw, 1000 * i + 150, panel, curves_of(logs, panel))
    picture.reduce(2).save(path)  # half the size, which smooths slanted lines


# ---- 3. The command
def plot_runs(runs: list, out: str = "", curves: str = CURVES, first: int = 0, more=None) -> Path:
    """Writes curves.png. `more`, if given, adds entries to the logs: {name of a run: list}."""
    logs = {name: read_log(run, first) for name, run in by_name(runs).items()}
    for name, entries in (more or {}).items():
        logs[name] = logs[name] + entries
    logs = {name: log for name, log in logs.items() if log}
    found = f"{len(logs)} of these runs logged something from step {first} on"
    assert 1 <= len(logs) <= len(COLORS), f"{found}: give 1 to {len(COLORS)} that did"
    folder = Path(out or folder_of(runs[0]))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "curves.png"
    draw_curves(logs, curves.split(","), path)
    return path


def parse_args(argv: list | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run folder, or a checkpoint in it")
    add("--out", default="", metavar="DIR", help="folder of the picture [that of the first RUN]")
    add("--first", type=int, default=0, metavar="N", help="leave out what was before step N [0]")
    add("--curves", default=CURVES, metavar="NAMES", help=f"names of the log [{CURVES}]")
    return parser.parse_args(argv)


def main() -> None:
    print(plot_runs(**vars(parse_args())))


if __name__ == "__main__":
    main()
