"""Draws the two pictures of README that explain the method, from the program's own functions.

python tests/pictures.py             mask.png and towers.png into .github/assets
python tests/pictures.py --out DIR
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import maskalign as ma

ROOT = Path(__file__).resolve().parents[1]
SIZE = 96  # pixels of a shape
PATCH = 12  # pixels of a patch, so there are 8 x 8
GAP = 3  # pixels between patches that are drawn apart
GREY = (205, 205, 205)  # a dropped token
BLUE = (66, 103, 178)  # a token of the network that is trained
ORANGE = (214, 126, 44)  # a token of the frozen teacher
FRAME = (120, 120, 120)


# ---- 1. The mask: an image on its way into the blocks
def spread_patches(patches: Tensor, ids_keep: Tensor | None = None) -> Tensor:
    """Patches (N, T, p*p*C) in [-1, 1] -> images (N, 3, S, S), the patches apart.

    Those that are not in ids_keep (N, K) are grey.
    """
    n, num_tokens, _ = patches.shape
    side = round(num_tokens**0.5)
    tiles = patches.reshape(n, side, side, PATCH, PATCH, 3)
    grey = torch.tensor(GREY) / 127.5 - 1
    if ids_keep is not None:
        kept = torch.zeros(n, num_tokens, dtype=torch.bool).scatter(1, ids_keep, True)
        tiles = torch.where(kept.view(n, side, side, 1, 1, 1), tiles, grey)
    step = PATCH + GAP
    spread = torch.ones(n, 3, side * step - GAP, side * step - GAP)  # white
    for row in range(side):
        for column in range(side):
            top = row * step
            left = column * step
            tile = tiles[:, row, column].permute(0, 3, 1, 2)  # (N, 3, p, p)
            spread[:, :, top : top + PATCH, left : left + PATCH] = tile
    return spread


def mask_columns(t: float) -> dict:
    """{title: images (N, 3, H, W) in [-1, 1]}, from the clean image to what the blocks see."""
    wanted = torch.tensor([3, 7])  # a flower and a heart
    images = ma.demo_shapes(SIZE, 8).datasets["image"][wanted]
    x = images / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator)
    x_t = ma.add_noise(x, noise, torch.tensor(t))
    patches = ma.patchify(x_t, PATCH)  # (N, T, p*p*3)
    scores = torch.rand(patches.shape[:2], generator=generator)
    ids_keep = ma.sample_token_subset(scores, ma.Config.mask_ratio)
    return {
        "what the teacher sees": x,
        f"x_t: with noise, t = {t}": x_t,
        "what the mixing blocks see": spread_patches(patches),
        "kept after mixing": spread_patches(patches, ids_keep),
    }


def draw_mask() -> Image.Image:
    """Two shapes as rows, and the columns of mask_columns."""
    columns = mask_columns(0.4)
    tile = 200
    picture = Image.new("RGB", (4 * (tile + 16) - 16, 2 * (tile + 12) + 20), "white")
    draw = ImageDraw.Draw(picture)
    for column, (title, images) in enumerate(columns.items()):
        left = column * (tile + 16)
        draw.text((left + tile / 2, 12), title, "black", font_size=16, anchor="mm")
        for row, image in enumerate(ma.decode_latents(None, 2 * images)):
            pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
            pixels = pixels.resize((tile, tile), Image.LANCZOS)
            picture.paste(pixels, (left, 32 + row * (tile + 12)))
    return picture.quantize(96)  # colors, as noise makes a large file


# ---- 2. The architecture: two towers. Positions are in half pixels
TOKENS = 16  # drawn for an image, beside its class token
SQUARE = 30
STEP = 38  # from one token to the next


def draw_tokens(draw, left: int, y: int, color: tuple, kept: list, cls: bool = True) -> None:
    """A row of tokens, the class token first and round. Dropped ones are grey."""
    for i in range(TOKENS + 1):
        x = left + STEP * i
        box = (x, y, x + SQUARE, y + SQUARE)
        if i == 0 and cls:
            draw.ellipse(box, color)
        elif i > 0:
            draw.rectangle(box, color if i - 1 in kept else GREY)


def write(draw, x: float, y: int, text: str) -> None:
    draw.text((x, y), text, "black", font_size=26, anchor="mm")


def draw_box(draw, left: int, top: int, height: int, text: str, color: tuple) -> None:
    width = STEP * (TOKENS + 1) + 12
    draw.rounded_rectangle((left - 10, top, left - 10 + width, top + height), 14, "white", color, 4)
    draw.text((left - 10 + width / 2, top + height / 2), text, "black", font_size=28, anchor="mm")


def draw_arrow(draw, start: tuple, end: tuple, color: tuple = FRAME) -> None:
    """A straight arrow, to the right, to the left, or down."""
    draw.line([start, end], color, 4)
    x, y = end
    if start[0] == x:
        head = [(x, y), (x - 9, y - 16), (x + 9, y - 16)]
    else:
        back = -16 if start[0] < x else 16
        head = [(x, y), (x + back, y - 9), (x + back, y + 9)]
    draw.polygon(head, color)


def draw_towers() -> Image.Image:
    """The network that is trained, at the left, and the teacher, at the right."""
    scores = torch.rand(1, TOKENS, generator=torch.Generator().manual_seed(4))
    kept = ma.sample_token_subset(scores, ma.Config.mask_ratio)[0].tolist()
    everything = list(range(TOKENS))
    picture = Image.new("RGB", (1720, 1160), "white")
    draw = ImageDraw.Draw(picture)
    left = 40
    right = 1030
    middle = left + STEP * (TOKENS + 1) // 2
    middle_right = right + STEP * (TOKENS + 1) // 2

    write(draw, middle, 26, "SiT (trained) gets x_t and the noisy class token")
    draw_tokens(draw, left, 54, BLUE, everything)
    draw_arrow(draw, (middle, 92), (middle, 126))
    draw_box(draw, left, 128, 72, "2 mixing blocks, all tokens", BLUE)
    draw_arrow(draw, (middle, 202), (middle, 236))
    draw_tokens(draw, left, 244, BLUE, everything)
    write(draw, middle, 302, "drop a random 25% of the patches")
    draw_tokens(draw, left, 332, BLUE, kept)
    draw_arrow(draw, (middle, 370), (middle, 404))
    draw_box(draw, left, 406, 130, "blocks 1 to align_depth, kept tokens", BLUE)
    draw_arrow(draw, (middle, 538), (middle, 572))
    draw_tokens(draw, left, 580, BLUE, kept)
    draw_arrow(draw, (middle, 618), (middle, 658))
    draw_box(draw, left, 660, 210, "the other blocks, kept tokens", BLUE)
    draw_arrow(draw, (middle, 872), (middle, 906))
    draw_box(draw, left, 908, 72, "final layer", BLUE)
    draw_arrow(draw, (middle, 982), (middle, 1016))
    draw_tokens(draw, left, 1024, BLUE, kept)
    write(draw, middle, 1086, "velocities of kept patches and class token")
    write(draw, middle, 1122, "loss: squared error to noise - x")

    write(draw, middle_right, 26, "DINOv2 (frozen) gets the clean image")
    draw_tokens(draw, right, 54, ORANGE, everything, cls=False)
    draw_arrow(draw, (middle_right, 92), (middle_right, 126))
    draw_box(draw, right, 128, 408, "the teacher", ORANGE)
    draw_arrow(draw, (middle_right, 538), (middle_right, 572))
    draw_tokens(draw, right, 580, ORANGE, kept)
    write(draw, middle_right, 638, "z: its class token and patches")

    # The class token goes over to the left, with noise.
    draw.line([(right + SQUARE // 2, 576), (right + SQUARE // 2, 556), (860, 556)], ORANGE, 4)
    draw.line([(860, 556), (860, 69)], ORANGE, 4)
    draw_arrow(draw, (860, 69), (left + STEP * (TOKENS + 1) + 16, 69), ORANGE)
    draw.text((876, 96), "+ noise (training)", ORANGE, font_size=26, anchor="lm")

    # The alignment: nothing flows, two rows are compared.
    end = left + STEP * (TOKENS + 1)
    draw_arrow(draw, (end, 595), (right - 16, 595))
    draw_arrow(draw, (right - 16, 595), (end, 595))
    write(draw, (end + right) / 2 - 8, 624, "projected,")
    write(draw, (end + right) / 2 - 8, 656, "compared (cosine)")

    # What the signs mean.
    for i, (text, color) in enumerate([("a patch", BLUE), ("dropped", GREY)]):
        y = 960 + 56 * i
        draw.rectangle((right, y, right + SQUARE, y + SQUARE), color)
        draw.text((right + 50, y + 15), text, "black", font_size=26, anchor="lm")
    draw.ellipse((right, 1072, right + SQUARE, 1072 + SQUARE), BLUE)
    draw.text((right + 50, 1087), "the class token", "black", font_size=26, anchor="lm")
    return picture.reduce(2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    assets = ROOT / ".github" / "assets"
    parser.add_argument("--out", type=Path, default=assets, metavar="DIR", help="[.github/assets]")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in (("mask", draw_mask), ("towers", draw_towers)):
        path = args.out / f"{name}.png"
        draw().save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main()
