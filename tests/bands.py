"""Mean and standard deviation over seeds, as a table, and as lines with bands. See effect.py."""

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
    """The logarithm. A band can reach below 1, or even below 0, and is cut there."""
    return math.log(max(value, 1.0))


SCALES = dict(step=math.log, fd=log_from_1, named=float)


def lines_of(table: dict, measure: str) -> dict:
    """{method: [(x, lower edge, middle, upper edge), ...]} on the scales of both axes."""
    lines = {}
    for method, rows in table.items():
        lines[method] = []
        for row in rows:
            step, _ = row["step"]
            middle, std = row[measure]
            band = [SCALES[measure](value) for value in (middle - std, middle, middle + std)]
            lines[method].append((SCALES["step"](step), *band))
    return lines


def labels_of(name: str, steps: list) -> dict:
    """{value on the scale of an axis: what is written there}."""
    powers = [10**n for n in range(5)]
    values = dict(
        step=steps,
        fd=[k * power for power in powers for k in (1, 2, 5)],
        named=range(0, 101, 10),
    )
    return {SCALES[name](value): f"{value}" for value in values[name]}


def draw_panel(draw, left: int, top: int, lines: dict, x_labels: dict, y_labels: dict) -> Frame:
    """The lines of lines_of and their bands, over a grid, with a dot at each step."""
    points = list(itertools.chain(*lines.values()))
    x = [point[0] for point in points]
    y = [value for point in points for value in point[1:]]
    x_margin = 0.05 * (max(x) - min(x)) or 0.1
    y_margin = 0.05 * (max(y) - min(y)) or 0.1
    x_range = (min(x) - x_margin, max(x) + x_margin)
    y_range = (min(y) - y_margin, max(y) + y_margin)
    frame = Frame(left, top, 440, 500, *x_range, *y_range)
    draw_grid(draw, frame, within(x_labels, *x_range), within(y_labels, *y_range))
    for color, line in zip(itertools.cycle(COLORS), lines.values(), strict=False):
        lower = [place(frame, x, low) for x, low, _, _ in line]
        upper = [place(frame, x, high) for x, _, _, high in line]
        draw.polygon(lower + upper[::-1], color + "40")
        middles = [place(frame, x, middle) for x, _, middle, _ in line]
        draw.line(middles, color, 6, "curve")
        for x, y in middles:
            draw.ellipse((x - 9, y - 9, x + 9, y + 9), color)
    draw_border(draw, frame)
    return frame


def within(labels: dict, low: float, high: float) -> dict:
    return {value: text for value, text in labels.items() if low < value < high}


def draw_bands(table: dict, path: Path) -> None:
    """A panel for each of TITLES, over steps. The picture is 840 pixels wide."""
    picture = Image.new("RGB", (1680, 700), "white")
    draw = ImageDraw.Draw(picture, "RGBA")  # so that bands are translucent
    steps = [row["step"][0] for row in next(iter(table.values()))]
    for i, (measure, title) in enumerate(TITLES.items()):
        lines = lines_of(table, measure)
        labels = (labels_of("step", steps), labels_of(measure, steps))
        frame = draw_panel(draw, 110 + 850 * i, 80, lines, *labels)
        draw_text(draw, frame.left - 70, 45, title, "lm")
        draw_text(draw, frame.left + frame.width / 2, frame.top + frame.height + 80, "steps")
        draw_names(draw, frame, lines)
    picture.reduce(2).save(path)  # half the size, which smooths slanted lines


def draw_names(draw, frame: Frame, lines: dict) -> None:
    """The methods, right of a panel, where their lines end, or as near as there is room."""
    ends = {}
    for color, (method, line) in zip(itertools.cycle(COLORS), lines.items(), strict=False):
        x, _, middle, _ = line[-1]
        _, height = place(frame, x, middle)
        ends[method] = (height, color)
    heights = []
    for method in sorted(ends, key=ends.get):
        height, _ = ends[method]
        heights.append(max(height, heights[-1] + 38) if heights else height)
    up = max(0, heights[-1] - (frame.top + frame.height - 20))  # so that all are beside the panel
    for method, y in zip(sorted(ends, key=ends.get), heights, strict=True):
        _, color = ends[method]
        x = frame.left + frame.width + 14
        draw.text((x, y - up), method, color, font_size=32, anchor="lm")
