"""Mean and standard deviation over seeds: as a table, and as lines with bands. See effect.py."""

import math
from pathlib import Path
from statistics import mean, stdev

from curves import COLOURS, draw_text, ticks
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


def draw_panel(draw, left: int, top: int, lines: dict, marks: list) -> dict:
    """Lines {name: [(x, mean, std), ...]} with bands of one std, and a grid at x of `marks`; equal
    ways along x are equal factors. Returns the heights {name: y} at which the lines end."""
    xs, lows, highs = zip(
        *((x, m - s, m + s) for line in lines.values() for x, m, s in line), strict=True
    )
    margin = 0.05 * (max(highs) - min(lows)) or 0.1
    first, low, high = min(xs), min(lows) - margin, max(highs) + margin

    def place(x, value):
        along = math.log(x / first) / (math.log(max(xs) / first) or 1)
        return left + WIDTH * (0.04 + 0.92 * along), top + HEIGHT * (high - value) / (high - low)

    for value in ticks(low, high):
        y = place(first, value)[1]
        draw.line((left, y, left + WIDTH, y), "#dddddd", 2)
        draw_text(draw, left - 12, y, f"{value:.6g}", "rm")
    for mark in (mark for mark in marks if first <= mark <= max(xs)):
        x = place(mark, low)[0]
        draw.line((x, top, x, top + HEIGHT), "#dddddd", 2)
        draw_text(draw, x, top + HEIGHT + 26, f"{mark}")
    for colour, line in zip(COLOURS, lines.values(), strict=False):
        above, below = ([place(x, m + sign * s) for x, m, s in line] for sign in (1, -1))
        draw.polygon(above + below[::-1], colour + "40")
        draw.line([place(x, m) for x, m, _ in line], colour, 6, "curve")
    draw.rectangle((left, top, left + WIDTH, top + HEIGHT), outline="black", width=2)
    return {name: place(*line[-1][:2])[1] for name, line in lines.items()}


def draw_bands(table: dict, path: Path) -> None:
    """A row of panels for each of MEASURES, a column for each of AXES; 800 pixels wide."""
    picture = Image.new("RGB", (1600, 1220), "white")
    draw = ImageDraw.Draw(picture, "RGBA")  # so that bands are translucent
    steps = [row["step"][0] for rows in table.values() for row in rows]
    marks = dict(step=sorted(set(steps)), cpu_s=[k * 10**n for n in range(6) for k in (1, 2, 5)])
    for i, (key, title) in enumerate(MEASURES.items()):
        top = 610 * i + 70
        draw_text(draw, 130, top - 35, title, "lm")
        for j, (axis, name) in enumerate(AXES.items()):
            lines = {
                method: [(row[axis][0], *row[key]) for row in rows]
                for method, rows in table.items()
            }
            left = 130 + (WIDTH + 110) * j
            ends = draw_panel(draw, left, top, lines, marks[axis])
            draw_text(draw, left + WIDTH / 2, top + HEIGHT + 75, name)
        # Names stand right of the last panel, where their lines end, or as near as there is room.
        y = 0
        for name in sorted(ends, key=ends.get):
            y = max(y + 38, ends[name])
            colour = COLOURS[list(table).index(name)]
            draw.text((left + WIDTH + 14, y), name, colour, font_size=32, anchor="lm")
    picture.reduce(2).save(path)  # smooth slanted lines
