"""Mean and standard deviation over seeds, as tables and as a picture. See effect.py."""

import itertools
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from curves import COLORS, Frame, draw_border, draw_grid, draw_text, place
from PIL import Image, ImageDraw

MEASURES = dict(
    fd="Frechet distance from real shapes (lower is better)",
    named="named as the class that was asked for, % (higher is better)",
    template="the same by the nearest template, %",
)
TITLES = dict(fd="Frechet distance (lower is better)", named="correct class, %")
CPU_S = "CPU seconds of training"


# ---- 1. The table
def summarise(points: list) -> dict:
    """Points {method, seed, step, cpu_s, fd, ...} -> {method: [{step, cpu_s, fd, ...}, ...]}.

    There is a row for each step, and its values are pairs (mean, standard deviation).
    """
    groups = defaultdict(list)
    for point in points:
        groups[point["method"], point["step"]].append(point)
    table = defaultdict(list)
    for (method, _), seeds in groups.items():
        row = {}
        for name in ("step", "cpu_s", *MEASURES):
            values = [point[name] for point in seeds]
            row[name] = (mean(values), stdev(values))
        table[method].append(row)
    return dict(table)


def as_markdown(table: dict) -> str:
    """A table for each measure, with a row for each method and a column for each step."""
    steps = [f"{row['step'][0]} steps" for row in next(iter(table.values()))]
    lines = []
    for name, title in (MEASURES | dict(cpu_s=CPU_S)).items():
        lines.append(markdown_row(title, *steps))
        lines.append(markdown_row(*["---"] * (1 + len(steps))))
        for method, rows in table.items():
            cells = ["{:.1f} ± {:.1f}".format(*row[name]) for row in rows]
            lines.append(markdown_row(f"`{method}`", *cells))
        lines.append("")
    return "\n".join(lines)


def markdown_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


# ---- 2. The picture, whose sizes are in half pixels
def log_from_1(value: float) -> float:
    """The logarithm. A bar can reach below 1, or even below 0, and is cut there."""
    return math.log(max(value, 1.0))


SCALES = dict(fd=log_from_1, named=float)


def bars_of(table: dict, measure: str) -> dict:
    """{method: [(mean - std, mean, mean + std), one for each step]}, on the scale of its axis."""
    scale = SCALES[measure]
    bars = {}
    for method, rows in table.items():
        pairs = [row[measure] for row in rows]
        bars[method] = [(scale(m - std), scale(m), scale(m + std)) for m, std in pairs]
    return bars


def labels_of(measure: str) -> dict:
    """{value on the scale of its axis: what is written there}."""
    powers = [10**n for n in range(5)]
    values = dict(fd=[k * power for power in powers for k in (1, 2, 5)], named=range(0, 101, 10))
    return {SCALES[measure](value): f"{value}" for value in values[measure]}


def draw_panel(draw, left: int, top: int, bars: dict, labels: dict) -> Frame:
    """At each step the methods of bars_of side by side: dots, with a bar from end to end."""
    values = list(itertools.chain.from_iterable(itertools.chain(*bars.values())))
    margin = 0.05 * (max(values) - min(values)) or 0.1
    low, high = min(values) - margin, max(values) + margin
    num_steps = len(next(iter(bars.values())))
    frame = Frame(left, top, 540, 500, 0, num_steps, low, high)  # step i is from x = i to i + 1
    shown = {value: text for value, text in labels.items() if low < value < high}
    draw_grid(draw, frame, {i: "" for i in range(1, num_steps)}, shown)
    for k, (color, method) in enumerate(zip(itertools.cycle(COLORS), bars, strict=False), start=1):
        for i, (lower, middle, upper) in enumerate(bars[method]):
            x = i + k / (len(bars) + 1)
            draw.line((*place(frame, x, lower), *place(frame, x, upper)), color, 5)
            draw_dot(draw, *place(frame, x, middle), color)
    draw_border(draw, frame)
    return frame


def draw_dot(draw, x: float, y: float, color: str) -> None:
    draw.ellipse((x - 9, y - 9, x + 9, y + 9), color)


def draw_spread(table: dict, path: Path) -> None:
    """A panel for each of TITLES. The picture is 840 pixels wide."""
    picture = Image.new("RGB", (1680, 700), "white")
    draw = ImageDraw.Draw(picture)
    steps = [row["step"][0] for row in next(iter(table.values()))]
    for i, (measure, title) in enumerate(TITLES.items()):
        bars = bars_of(table, measure)
        frame = draw_panel(draw, 110 + 670 * i, 80, bars, labels_of(measure))
        draw_text(draw, frame.left - 70, 45, title, "lm")
        bottom = frame.top + frame.height
        draw_text(draw, frame.left + frame.width / 2, bottom + 80, "steps")
        for k, step in enumerate(steps):
            x, _ = place(frame, k + 0.5, 0)
            draw_text(draw, x, bottom + 28, f"{step}")
    draw_names(draw, frame.left + frame.width + 30, frame.top + 30, list(table))
    picture.reduce(2).save(path)  # half the size, which smooths round edges


def draw_names(draw, x: float, y: float, methods: list) -> None:
    for k, (color, method) in enumerate(zip(itertools.cycle(COLORS), methods, strict=False)):
        draw_dot(draw, x, y + 50 * k, color)
        draw.text((x + 22, y + 50 * k), method, color, font_size=32, anchor="lm")
