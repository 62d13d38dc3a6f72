"""Mean and standard deviation over seeds: as a table, and as lines with bands. See effect.py."""

import itertools
import math
from pathlib import Path
from statistics import mean, stdev

from curves import COLOURS, draw_text
from PIL import Image, ImageDraw

MEASURES = dict(
    fd="Frechet distance from real shapes (lower is better)",
    named="named as the class that was asked for, % (higher is better)",
)
AXES = dict(step="steps", cpu_s="CPU seconds of training")
WIDTH, HEIGHT = 560, 420  # of a panel, in half pixels, as all that is drawn


def summarise(points: list) -> dict:
    """{method: [{step, cpu_s, fd, named}, ...]}, each a (mean, std), of points {method, seed, step,
    cpu_s, fd, named}."""
    table, keys = {}, [*AXES, *MEASURES]
    for point in points:
        table.setdefault(point["method"], {}).setdefault(point["step"], []).append(point)
    return {
        method: [
            {key: (mean(p[key] for p in same), stdev(p[key] for p in same)) for key in keys}
            for same in by_step.values()
        ]
        for method, by_step in table.items()
    }


def as_markdown(table: dict) -> str:
    """A table for each measure, a row for each method: mean ± standard deviation at each step."""
    steps = [f"{row['step'][0]} steps" for row in next(iter(table.values()))]
    lines = []
    for key, title in (MEASURES | dict(cpu_s=AXES["cpu_s"])).items():
        lines += [[title, *steps], ["---"] * (len(steps) + 1)]
        for method, rows in table.items():
            lines.append([f"`{method}`", *("{:.1f} ± {:.1f}".format(*row[key]) for row in rows)])
        lines.append([])
    return "\n".join(f"| {' | '.join(line)} |" if line else "" for line in lines)


def log_marks(values) -> dict:
    return {math.log(value): f"{value}" for value in values}


def log_above_1(value: float) -> float:
    """What a band may be below 1, or even 0, is not drawn."""
    return math.log(max(value, 1.0))


def draw_panel(draw, left: int, top: int, lines: dict, x_marks: dict, y_marks: dict) -> dict:
    """Lines {method: [(x, low, middle, high), ...]} with bands from low to high, over a grid of
    marks {place: label}. Returns the heights {method: y} at which the lines end."""
    xs, lows, _, highs = zip(*itertools.chain(*lines.values()), strict=True)
    x_margin, margin = (0.05 * (max(v) - min(v)) or 0.1 for v in (xs, lows + highs))
    start, end = min(xs) - x_margin, max(xs) + x_margin
    low, high = min(lows) - margin, max(highs) + margin

    def place(x, value):
        along, down = (x - start) / (end - start), (high - value) / (high - low)
        return left + WIDTH * along, top + HEIGHT * down

    for x, label in ((x, label) for x, label in x_marks.items() if start < x < end):
        draw.line((place(x, low), place(x, high)), "#dddddd", 2)
        draw_text(draw, place(x, low)[0], top + HEIGHT + 26, label)
    for value, label in ((y, label) for y, label in y_marks.items() if low < y < high):
        draw.line((place(start, value), place(end, value)), "#dddddd", 2)
        draw_text(draw, left - 12, place(start, value)[1], label, "rm")
    for colour, line in zip(itertools.cycle(COLOURS), lines.values(), strict=False):
        lower = [place(x, bottom) for x, bottom, _, _ in line]
        upper = [place(x, above) for x, _, _, above in line]
        draw.polygon(lower + upper[::-1], colour + "40")
        draw.line([place(x, middle) for x, _, middle, _ in line], colour, 6, "curve")
    draw.rectangle((left, top, left + WIDTH, top + HEIGHT), outline="black", width=2)
    return {method: place(line[-1][0], line[-1][2])[1] for method, line in lines.items()}


def draw_bands(table: dict, path: Path) -> None:
    """A row of panels for each of MEASURES, a column for each of AXES, 800 pixels wide. All scales
    are logarithms, but for that of percents."""
    picture = Image.new("RGB", (1600, 1220), "white")
    draw = ImageDraw.Draw(picture, "RGBA")  # so that bands are translucent
    steps = [row["step"][0] for row in next(iter(table.values()))]
    marks = dict(
        step=log_marks(steps),
        cpu_s=log_marks(k * 10**n for n in range(5) for k in (1, 2, 3, 5, 7)),
        fd=log_marks(k * 10**n for n in range(5) for k in (1, 2, 5)),
        named={percent: f"{percent}" for percent in range(0, 101, 10)},
    )
    for i, (key, title) in enumerate(MEASURES.items()):
        top, scale = 610 * i + 70, float if key == "named" else log_above_1
        draw_text(draw, 130, top - 35, title, "lm")
        for j, (axis, name) in enumerate(AXES.items()):
            lines = {
                method: [
                    (math.log(row[axis][0]), scale(m - s), scale(m), scale(m + s))
                    for row in rows
                    for m, s in [row[key]]
                ]
                for method, rows in table.items()
            }
            left = 130 + (WIDTH + 110) * j
            ends = draw_panel(draw, left, top, lines, marks[axis], marks[key])
            draw_text(draw, left + WIDTH / 2, top + HEIGHT + 75, name)
        # Names stand right of the last panel, where their lines end, or as near as there is room.
        y = 0
        for method in sorted(ends, key=ends.get):
            y = max(y + 38, ends[method])
            colour = COLOURS[list(table).index(method) % len(COLOURS)]
            draw.text((left + WIDTH + 14, y), method, colour, font_size=32, anchor="lm")
    picture.reduce(2).save(path)  # smooth slanted lines
