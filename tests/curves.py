"""Curves of one or more runs side by side, from their log.jsonl: no checkpoint is opened.

  python tests/curves.py runs/reg-demo runs/maskalign-demo     loss, alignment, norm of the gradient
  python tests/curves.py RUN [RUN ...] --curves denoise,cls/loss --first 1000 --out DIR

Writes curves.png into --out, by default the folder of the first RUN. --curves takes keys of
log.jsonl, a panel for each; a/b draws two in one panel, the second thin. What a run did not log
is left out, and so is a loss that its method does not have (logged as 0 throughout).
"""

import argparse
import json
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from maskalign import BadInput

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
CURVES = "loss,align,grad_norm"


def folder_of(run: str) -> Path:
    """A run is given as its folder, or as a checkpoint in it."""
    return Path(run) if Path(run).is_dir() else Path(run).parent


def by_name(runs: list) -> dict:
    """{name: run}: the name of its folder, or as typed where that is not unique."""
    for run in runs:
        if not Path(run).exists():
            raise BadInput(f"there is no {run}: name a run folder, such as runs/maskalign-demo")
    names = [folder_of(run).absolute().name for run in runs]
    if len(set(names)) < len(runs):
        names = map(str, runs)
    return dict(zip(names, runs, strict=True))


def read_log(run: str, first: int = 0) -> list:
    """log.jsonl from step `first` on; a last line that is still being written does not count."""
    path = folder_of(run) / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    log = [json.loads(line) for line in lines if line.endswith("}\n")]
    return [record for record in log if record["step"] >= first]


def ticks(low: float, high: float) -> list:
    """Some four to ten round numbers between low and high."""
    unit = 10 ** math.floor(math.log10((high - low) / 9))
    step = next(k * unit for k in (1, 2, 5, 10) if k * unit >= (high - low) / 9)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def curves_of(logs: dict, panel: str) -> list:
    """(colour, width, [(step, value), ...]) of each run that has the keys of a panel, `a` or `a/b`;
    what is no number or 0 throughout is left out."""
    curves, keys = [], panel.split("/")
    for key in keys:
        width = 7 if key == keys[0] else 3
        for colour, log in zip(COLOURS, logs.values(), strict=False):
            points = [(record["step"], record.get(key, math.nan)) for record in log]
            points = [(step, value) for step, value in points if math.isfinite(value)]
            if any(value for _, value in points):
                curves.append((colour, width, points))
    return curves


def draw_text(draw, x: float, y: float, words: str, anchor: str = "mm") -> None:
    draw.text((x, y), words, "black", font_size=32, anchor=anchor)


def draw_panel(draw, left: int, panel: str, curves: list) -> None:
    """Grid, curves and frame, between `left` and `left` + 780; see curves_of."""
    right, top, bottom = left + 780, 150, 790
    first, *others = panel.split("/")
    title = ", ".join([first, *(f"thin: {key}" for key in others)])
    draw_text(draw, (left + right) / 2, 115, title)
    if not curves:
        draw_text(draw, (left + right) / 2, (top + bottom) / 2, "not logged")
        return

    # What the frame spans: all steps, and all values with a margin.
    points = [point for *_, curve in curves for point in curve]
    steps, values = zip(*points, strict=True)
    margin = 0.05 * (max(values) - min(values)) or 0.1
    low, high, end = min(values) - margin, max(values) + margin, max(steps)
    start = min(min(steps), end - 1)

    def place(step, value):
        x = left + (right - left) * (step - start) / (end - start)
        return x, bottom - (bottom - top) * (value - low) / (high - low)

    for value in ticks(low, high):
        draw.line((place(start, value), place(end, value)), "#dddddd", 2)
        draw_text(draw, left - 12, place(start, value)[1], f"{value:.6g}", "rm")
    for step in ticks(start, end):
        draw.line((place(step, low), place(step, high)), "#dddddd", 2)
        draw_text(draw, place(step, low)[0], bottom + 28, f"{step:.6g}")
    for colour, width, curve in curves:
        draw.line([place(*point) for point in curve], colour, width, "curve")
        x, y = place(*curve[-1])  # a dot: a single point is no line
        draw.ellipse((x - width, y - width, x + width, y + width), colour)
    draw.rectangle((left, top, right, bottom), outline="black", width=2)
    draw_text(draw, (left + right) / 2, 870, "step")


def draw_curves(logs: dict, panels: list, path: Path) -> None:
    """A panel for each of `panels`, a colour for each run, sizes in half pixels."""
    picture = Image.new("RGB", (1000 * len(panels), 900), "white")
    draw = ImageDraw.Draw(picture)
    x = 150
    for colour, name in zip(COLOURS, logs, strict=False):  # the legend
        draw.line((x, 45, x + 50, 45), colour, 8)
        draw_text(draw, x + 65, 45, name, "lm")
        x += 140 + draw.textlength(name, font_size=32)
    for i, panel in enumerate(panels):
        draw_panel(draw, 1000 * i + 150, panel, curves_of(logs, panel))
    picture.reduce(2).save(path)  # smooth slanted lines


def run(runs: list, out: str = "", curves: str = CURVES, first: int = 0, more: dict | None = None):
    """Draws the curves of some runs, whose log `more` may continue (name: lines); returns the path
    that was written. Raises BadInput."""
    logs = {name: read_log(run, first) for name, run in by_name(runs).items()}
    for name, lines in (more or {}).items():
        logs[name] = logs[name] + lines
    logs = {name: log for name, log in logs.items() if log}
    if not logs or len(logs) > len(COLOURS):
        rule = f"from step {first} on: it must be 1 to {len(COLOURS)}"
        raise BadInput(f"{len(logs)} of these runs logged something (log.jsonl) {rule}")
    folder = Path(out or folder_of(runs[0]))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "curves.png"
    draw_curves(logs, curves.split(","), path)
    return path


def main() -> None:
    """Draws from the command line; bad input ends it with one sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a folder with log.jsonl")
    parser.add_argument("--out", default="", help="folder to write into [that of the first RUN]")
    parser.add_argument("--first", type=int, default=0, help="step to begin with [0]")
    parser.add_argument("--curves", default=CURVES, help=f"keys of log.jsonl [{CURVES}]")
    try:
        print(run(**vars(parser.parse_args())))
    except BadInput as error:
        sys.exit(f"curves.py: {error}")


if __name__ == "__main__":
    main()
