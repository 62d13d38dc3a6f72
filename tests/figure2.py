"""The paper's Figure 2 on checkpoints: where does the alignment pull, and what does a mask do?

  python tests/figure2.py runs/reg-demo runs/maskalign-demo      half a minute a run, two cores
  python tests/figure2.py RUN --data IMAGENET --out DIR          the images have moved

RUN is a run folder, or a checkpoint of maskalign.py. Into --out, by default the folder of the
first RUN, go
  heatmap.png   Fig. 2a, 2b. In each image, take the 10% of the patch tokens that the alignment
                pulls hardest (Eq. 5). A map shows how often each position is one of them, for
                inputs as in training. Two runs have a row for their difference.
  figure2.json  the numbers of all maps, and the stability gap G_r (Eq. 12) over random masks
  curves.png    Fig. 2c, 2d: the logged loss and alignment, and the gap. (tests/curves.py plots
                whatever is logged, also of runs without alignment.)

The maps are those of the newest checkpoint. The gap is measured at copies of earlier ones, too,
if the folder has any. effect.py keeps some, and so does
  python maskalign.py --steps 500; cp runs/maskalign-demo/latest.pt runs/maskalign-demo/step-500.pt
"""

import argparse
import functools
import json
import math
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from draws import Given, given
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import curves

import maskalign as ma

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # Tab. 8
BATCH = 64  # images at a time; the gap is measured on the first 64
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
RED_BLUE = ((33, 102, 172), (247, 247, 247), (178, 24, 43))  # less, as much, more
TOP = 0.4  # the scale of the maps ends here; what is above has the color of the end


# ---- 1. The two measurements
# `numbers` are the random numbers of a batch, for which the training loss asks: a dict of
# t (n,), drop (n,), noise (n, C, H, W), and cls_noise (n, z_dim) and scores (n, T) where there
# is a class token, and a mask. See given in draws.py.
def gradient_norms(model, x, y, z, config: ma.Config, numbers: dict) -> Tensor:
    """g_i = |d L / d h_i| (Eq. 5) of each image and each patch that entered the blocks: (N, K).

    L is the alignment loss of one image. h, after block align_depth, enters the projector.
    """
    h = []
    hook = model.projector.register_forward_pre_hook(functools.partial(start_graph, h))
    align = ma.training_losses(model, x, y, z, config, given(numbers))["align"]
    hook.remove()
    # `align` is the mean over images, which know nothing of each other. So the gradient of the
    # sum over images holds that of each one.
    (g,) = torch.autograd.grad(len(x) * align, h)
    return g[:, int(config.class_token) :].norm(dim=-1)


def start_graph(h: list, projector, inputs: tuple) -> Tensor:
    """Puts what enters the projector into h. The graph of autograd begins there, to be short."""
    h.append(inputs[0].detach().requires_grad_())
    return h[0]


@torch.no_grad()
def alignment_gap(model, x, y, z, config: ma.Config, numbers: dict) -> tuple:
    """G_r = L(masked input) - L(full input) (Eq. 12), and L(full input). L is the alignment loss.

    Both inputs have the same noise.
    """
    # NOTE(paper): it does not say over which tokens L(full input) is a mean. Here it is one over
    # the kept tokens, as L(masked input). So a network whose tokens ignore each other has no gap.
    full = functools.partial(see_all_tokens, model)
    masked_loss = ma.training_losses(model, x, y, z, config, given(numbers))["align"]
    full_loss = ma.training_losses(full, x, y, z, config, given(numbers))["align"]
    return (masked_loss - full_loss).item(), full_loss.item()


def see_all_tokens(model, x_t, t, y, cls_t, ids_keep) -> ma.SiTOutput:
    """As model(...), but the mask is applied to what comes out, not to what enters the blocks."""
    out = model(x_t, t, y, cls_t)
    z_pred = ma.gather_tokens(out.z_pred, ids_keep, class_token=cls_t is not None)
    return ma.SiTOutput(ma.gather_tokens(out.v, ids_keep), out.v_cls, z_pred)


def share_in_top(norms: Tensor, ids_keep: Tensor, num_tokens: int) -> Tensor:
    """norms, ids_keep (N, K) -> for each position, the share of images with it on top: (T,)."""
    # NOTE(paper): it does not define the map of a masked input. Here, the top 10% are those of
    # the kept tokens, and the share is one of the images that keep the position. So without a
    # pattern it is 0.10, with a mask, too.
    len_top = max(1, round(0.1 * norms.shape[1]))
    top = norms.topk(len_top, dim=-1).indices
    ids_top = ids_keep.gather(1, top)
    hits = torch.bincount(ids_top.flatten(), minlength=num_tokens)
    kept = torch.bincount(ids_keep.flatten(), minlength=num_tokens)
    return hits / kept.clamp(min=1)


def describe(norms: Tensor, ids_keep: Tensor, num_tokens: int) -> dict:
    """A map and its numbers.

    If some position is never on top, the ratio is a lower bound: it takes the share that the
    position would have with one image.
    """
    p = share_in_top(norms, ids_keep, num_tokens)
    one_image = num_tokens / ids_keep.numel()
    ratio = p.max() / p.min().clamp(min=one_image)
    side = math.isqrt(num_tokens)
    return dict(
        largest=p.max().item(),
        smallest=p.min().item(),
        std=p.std().item(),
        ratio=ratio.item(),
        ratio_is_lower_bound=p.min().item() == 0,
        map=p.view(side, side).tolist(),
    )


# ---- 2. A run: its checkpoints, images, and random numbers
# What all checkpoints of a run share. numbers and scores (one (n, T) for each mask) are those
# of all images at once, so they do not depend on checkpoint, time, mask or BATCH.
Shared = namedtuple("Shared", "config images vae teacher numbers scores device")


def checkpoints_of(run: str) -> list:
    """The paths of copies step-N.pt and of latest.pt in a run folder, or the one that is given."""
    path = Path(run)
    return [*path.glob("step-*.pt"), path / "latest.pt"] if path.is_dir() else [path]


def load_model(path: Path) -> tuple:
    """(step, network with the EMA's weights, config) of a checkpoint of maskalign.py."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    config = ma.Config(**saved["config"])
    text = f"{path} ({config.method}) aligns nothing: leave it out, tests/curves.py plots its log"
    assert config.align_coeff > 0, text
    model = ma.SiT(config)
    model.load_state_dict(saved["ema"])
    # In training mode, since only that runs the projector.
    return saved["step"], model.train().requires_grad_(False), config


def load_dataset(config: ma.Config) -> Dataset:
    """The images of a run, for which the config may name another folder."""
    dataset = ma.FolderImages(config) if config.data else ma.demo_shapes(config.image_size)
    same = tuple(dataset.classes) == tuple(config.class_names)
    where = config.data or "the demo"
    assert same, f"{where} has other classes than the checkpoint: give the run's images by --data"
    return dataset


def set_up(config: ma.Config, args: argparse.Namespace) -> Shared:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False
    names = ("data", "vae", "teacher_weights")
    changes = {name: getattr(args, name) for name in names if getattr(args, name)}
    if args.data:
        changes["cache"] = args.data.rstrip("/") + "-latents"
    config = replace(config, label_dropout=0.0, **changes)
    dataset = load_dataset(config)

    n = min(args.images, len(dataset))
    generator = ma.seeded("cpu", "figure2", args.seed)
    ids = torch.randperm(len(dataset), generator=generator)[:n].tolist()
    numbers = dict(drop=torch.ones(n))  # no label is dropped
    numbers["noise"] = torch.randn(n, *config.latent_shape, generator=generator)
    if config.class_token:
        numbers["cls_noise"] = torch.randn(n, config.z_dim, generator=generator)
    num_tokens = (config.latent_shape[1] // config.patch_size) ** 2
    scores = [torch.rand(n, num_tokens, generator=generator) for _ in range(args.masks)]
    vae = ma.build_vae(config, device)
    teacher = ma.load_teacher(config, dataset, device)
    return Shared(config, Subset(dataset, ids), vae, teacher, numbers, scores, device)


def batches(shared: Shared):
    """Yields rows, x, y, z and the random numbers of BATCH images at a time."""
    for i, batch in enumerate(DataLoader(shared.images, BATCH)):
        rows = slice(i * BATCH, (i + 1) * BATCH)
        numbers = {name: some[rows].to(shared.device) for name, some in shared.numbers.items()}
        mean = Given(rand=[], randn=[torch.zeros_like(numbers["noise"])])  # of the latents
        mean.device = shared.device
        x, y, z = ma.prepare_batch(batch, mean, shared.vae, shared.teacher)
        yield rows, x, y, z, numbers


def at_time(t: float, numbers: dict, scores: Tensor | None = None) -> dict:
    """The numbers of a batch with the time t for all images, and a mask or none."""
    times = torch.full_like(numbers["drop"], t)
    numbers = numbers | dict(t=times)
    if scores is not None:
        numbers["scores"] = scores.to(times.device)
    return numbers


def measure_maps(model, shared: Shared, args: argparse.Namespace) -> dict:
    """The maps of a network at each time, with and without a mask; and those of pure chance."""
    n = len(shared.images)
    num_tokens = model.x_embedder.num_patches
    scores = shared.scores[0]
    all_ids = torch.arange(num_tokens).expand(n, -1)
    ids_of = dict(full=all_ids, masked=ma.sample_token_subset(scores, args.mask_ratio))
    config_of = dict(
        full=replace(shared.config, mask_ratio=0.0),
        masked=replace(shared.config, mask_ratio=args.mask_ratio),
    )
    norms = {(mode, t): [] for mode in ids_of for t in TIMES}
    for rows, x, y, z, numbers in tqdm(batches(shared), total=math.ceil(n / BATCH)):
        for mode, t in norms:
            some = at_time(t, numbers, scores[rows] if mode == "masked" else None)
            norms[mode, t].append(gradient_norms(model, x, y, z, config_of[mode], some).cpu())
    maps = []
    for (mode, t), parts in norms.items():
        maps.append(dict(t=t, input=mode) | describe(torch.cat(parts), ids_of[mode], num_tokens))
    chance = torch.rand(n, num_tokens, generator=ma.seeded("cpu", "chance", args.seed))
    return dict(images=n, maps=maps, by_chance=describe(chance, all_ids, num_tokens))


def measure_gap(model, shared: Shared, args: argparse.Namespace) -> dict:
    """The gap at each time, and its mean over times: mean and deviation over the masks."""
    rows, x, y, z, numbers = next(batches(shared))
    config = replace(shared.config, mask_ratio=args.mask_ratio)
    gaps = {}
    for t in TIMES:
        found = []
        for scores in shared.scores:
            some = at_time(t, numbers, scores[rows])
            gap, _ = alignment_gap(model, x, y, z, config, some)
            found.append(gap)
        gaps[t] = torch.tensor(found)
    gaps["all"] = torch.stack(list(gaps.values())).mean(dim=0)
    return {t: dict(mean=gap.mean().item(), std=gap.std().item()) for t, gap in gaps.items()}


def measure(run: str, args: argparse.Namespace) -> dict:
    """The maps of the newest checkpoint of a run, and the gaps of all."""
    *earlier, newest = checkpoints_of(run)
    step, model, config = load_model(newest)
    shared = set_up(config, args)
    model = model.to(shared.device)
    maps = measure_maps(model, shared, args)
    gaps = {step: measure_gap(model, shared, args)}
    for path in earlier:
        step_then, model, _ = load_model(path)
        if step_then != step:  # the newest one may be among the copies
            gaps[step_then] = measure_gap(model.to(shared.device), shared, args)
    about = dict(steps=step, method=config.method, size=config.size, seed=config.seed)
    about["mask_ratio"] = config.mask_ratio
    return dict(about, **maps, gap=[dict(step=step) | gaps[step] for step in sorted(gaps)])


# ---- 3. The picture
def in_words(m: dict) -> str:
    more = ">" if m["ratio_is_lower_bound"] else ""
    return f"{m['smallest']:.2f} to {m['largest']:.2f}, {more}{m['ratio']:.3g}x"


def write(picture: Image.Image, x: float, y: float, text: str, size: int, anchor="mm") -> None:
    ImageDraw.Draw(picture).text((x, y), text, "black", font_size=size, anchor=anchor)


def paste(picture: Image.Image, values, colors: tuple, ends: tuple, box: tuple) -> None:
    """Values (H, W) as colors, whose scale has these ends, into the box (x, y, width, height)."""
    x, y, width, height = box
    stops = np.linspace(*ends, len(colors))
    rgb = [np.interp(values, stops, channel) for channel in zip(*colors, strict=True)]
    pixels = Image.fromarray(np.stack(rgb, axis=-1).astype(np.uint8))
    picture.paste(pixels.resize((width, height), Image.NEAREST), (x, y))


def rows_of(results: dict) -> list:
    """The rows (title, {t: map (H, W)}, {t: text}) of the picture.

    Each run is shown with the input of its training: masked, if it trained with a mask. Two runs
    have their difference as a third row.
    """
    rows = []
    for name, result in results.items():
        mode = "masked" if result["mask_ratio"] > 0 else "full"
        chosen = [m for m in result["maps"] if m["input"] == mode]
        maps = {m["t"]: np.array(m["map"]) for m in chosen}
        rows.append((f"{name}\n{mode} input", maps, {m["t"]: in_words(m) for m in chosen}))
    if len(rows) == 2:
        (first, maps, _), (second, maps_2, _) = rows
        less = {t: maps_2[t] - maps[t] for t in maps if maps[t].shape == maps_2[t].shape}
        texts = {t: f"{p.min():+.2f} to {p.max():+.2f}" for t, p in less.items()}
        rows.append(("difference", less, texts))
    return rows


def draw_maps(results: dict, path: Path) -> None:
    """A row for each run, and a column for each t. The maps have one scale, from 0 to TOP."""
    rows = rows_of(results)
    width = 190 + 166 * len(TIMES) + 150
    height = 100 + 196 * len(rows)
    picture = Image.new("RGB", (width, height), "white")
    title = "Share of images with the token in their top 10% by alignment gradient"
    write(picture, width / 2, 26, title, 24)
    for column, t in enumerate(TIMES):
        write(picture, 190 + 166 * column + 75, 82, f"t = {t}", 18)
    for row, (name, maps, texts) in enumerate(rows):
        y = 100 + 196 * row
        write(picture, 16, y + 75, name, 18, "lm")
        for column, t in enumerate(TIMES):
            x = 190 + 166 * column
            if t in maps:
                is_less = name == "difference"
                scale = (RED_BLUE, (-TOP / 2, TOP / 2)) if is_less else (VIRIDIS, (0, TOP))
                paste(picture, maps[t], *scale, (x, y, 150, 150))
                write(picture, x + 75, y + 164, texts[t], 14)

    # The scales, at the right: of the maps, and of the difference.
    tall = 196 * len(results) - 46
    draw_scale(picture, VIRIDIS, {0: "0", 0.1: "0.1 uniform", 0.2: "0.2", 0.4: "0.4"}, 100, tall)
    if len(rows) > len(results):
        top = 100 + 196 * len(results)
        draw_scale(picture, RED_BLUE, {-0.2: "-0.2", 0: "0", 0.2: "+0.2"}, top, 150)
    picture.save(path)


def draw_scale(picture: Image.Image, colors: tuple, texts: dict, top: int, tall: int) -> None:
    """A bar with texts at some values, of which the first and the last are its ends."""
    low = min(texts)
    high = max(texts)
    falling = np.linspace(high, low, 800)[:, None]
    x = picture.width - 142
    paste(picture, falling, colors, (low, high), (x, top, 22, tall))
    for value, text in texts.items():
        y = top + tall * (high - value) / (high - low)
        write(picture, x + 30, y, text, 16, "lm")


# ---- 4. The command
def parse_args(argv: list | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run folder, or a checkpoint")
    add("--out", default="", metavar="DIR", help="folder to write into [that of the first RUN]")
    add("--data", default="", metavar="DIR", help="folder of the images [that of the run]")
    add("--vae", default="", metavar="VAE", help="SD-VAE: file or hub name [that of the run]")
    add("--teacher_weights", default="", metavar="FILE", help="teacher [that of the run]")
    add("--images", type=int, default=1024, metavar="N", help="images of a map [1024]")
    add("--masks", type=int, default=16, metavar="N", help="random masks of the gap [16]")
    add("--mask_ratio", type=float, default=0.25, metavar="X", help="what they drop [0.25]")
    add("--seed", type=int, default=0, metavar="N", help="decides images, noise and masks [0]")
    args = parser.parse_args(argv)
    assert args.images >= 1, f"images {args.images}: give 1 or more"
    assert args.masks >= 2, f"masks {args.masks}: a standard deviation needs 2 or more"
    assert 0 < args.mask_ratio < 1, f"mask_ratio {args.mask_ratio} is not between 0 and 1"
    return args


def run(args: argparse.Namespace) -> list:
    """Does what the command asks for. Returns the paths of what it wrote."""
    runs = curves.by_name(args.runs)
    for path in runs.values():  # before the long work, see whether all can be measured
        load_model(checkpoints_of(path)[-1])
    results = {}
    gaps = {}
    for name, path in runs.items():
        results[name] = measure(path, args)
        for m in results[name]["maps"]:
            print(f"{name}, t {m['t']}, {m['input']} input: {in_words(m)}, std {m['std']:.3f}")
        gaps[name] = []
        for found in results[name]["gap"]:
            step = found["step"]
            mean = found["all"]["mean"]
            std = found["all"]["std"]
            print(f"{name}, step {step}: gap {mean:.4f}, +- {std:.4f} over {args.masks} masks")
            gaps[name].append(dict(step=step, gap=mean))
    out = Path(args.out or curves.folder_of(args.runs[0]))
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "heatmap.png", out / "figure2.json"]
    draw_maps(results, written[0])
    written[1].write_text(json.dumps(dict(settings=vars(args), runs=results), indent=1))
    if any(curves.read_log(path) for path in args.runs):
        written.append(curves.plot_runs(args.runs, str(out), "loss,align,gap", more=gaps))
    return written


def main() -> None:
    print(*run(parse_args()), sep="\n")


if __name__ == "__main__":
    main()
