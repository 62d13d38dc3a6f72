"""The paper's Figure 2 from checkpoints of ours: where the alignment pulls, and what a mask does.

  python maskalign.py --milestone_every 500                      checkpoints to see the gap change
  python tests/figure2.py runs/reg-demo runs/maskalign-demo      half a minute per run, 2 cores
  python tests/figure2.py RUN --data IMAGENET --out DIR          the images lie elsewhere now

RUN is a run folder, with its milestones step-N.pt, or a checkpoint. The maps are those of the
newest checkpoint, the gap is taken at each. Into --out, by default the folder of the first RUN:
  heatmap.png   Fig. 2a, 2b: in each image, take the 10% of the patch tokens that the alignment
                pulls hardest (Eq. 5); a map shows how often each position is among them
  figure2.json  the numbers of the maps, and the stability gap G_r (Eq. 12) over random masks
  curves.png    Fig. 2c, 2d: loss and alignment as logged in training, and the gap; tests/curves.py
                alone draws any curve that is logged, also of runs that align nothing
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import curves

import maskalign
from maskalign import (
    BadInput,
    Config,
    Run,
    SiTOutput,
    draw_step,
    gather_tokens,
    load_batch,
    require,
    sample_token_subset,
    seeded,
    training_losses,
)
from sample import load_checkpoint

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # Tab. 8
BATCH = 64  # images at a time; the gap is taken on the first 64
COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis


# ---- 1. The two measurements ---------------------------------------------------------------------
def gradient_norms(model, x, y, z, config: Config, **drawn) -> Tensor:
    """g_i = |d L_REPA / d h_i| (Eq. 5): (N, K), per image, for the patch tokens that went in.
    L_REPA is the loss of each image alone; h, after block align_depth, is what is projected."""
    leaves = []

    def cut(projector, inputs):  # the graph begins here: with frozen weights it is short
        leaves.append(inputs[0].detach().requires_grad_())
        return leaves[0]

    with model.projectors[0].register_forward_pre_hook(cut):
        align = training_losses(model, x, y, z, config, **drawn)["align"]
    # Images do not mix: the gradient of the sum over images holds that of each, exactly.
    (g,) = torch.autograd.grad(len(x) * align, leaves)
    return g[:, int(config.class_token) :].norm(dim=-1)


@torch.no_grad()
def alignment_gap(model, x, y, z, config: Config, **drawn) -> tuple:
    """(G_r, L(full)): stability gap G_r = L(masked input) - L(full input), L = align (Eq. 12).
    Arguments as in training_losses; `drawn` is all of draw_step: both inputs see the same noise."""

    def full_input(x_t, t, y, cls_t, ids_keep):
        out = model(x_t, t, y, cls_t)
        z_pred = gather_tokens(out.z_pred, ids_keep, config.class_token)
        return SiTOutput(gather_tokens(out.v, ids_keep), out.v_cls, z_pred)

    # NOTE(paper): it does not say which tokens L(full) averages. Here the kept ones, as L(masked):
    # so the gap is 0 for a network whose tokens do not look at each other.
    masked = training_losses(model, x, y, z, config, **drawn)["align"]
    full = training_losses(full_input, x, y, z, config, **drawn)["align"]
    return (masked - full).item(), full.item()


def membership(norms: Tensor, ids_keep: Tensor, num_tokens: int) -> Tensor:
    """norms, ids_keep (N, K) -> share of images with the position in their top 10%: (T,)."""
    # NOTE(paper): for masked input the set is not defined. Here: the top 10% of the kept tokens,
    # as a share of the images that keep the position; so uniform is 0.10 with a mask, too.
    top = norms.topk(max(1, round(0.1 * norms.shape[1])), dim=-1).indices
    hits = torch.bincount(ids_keep.gather(1, top).flatten(), minlength=num_tokens)
    return hits / torch.bincount(ids_keep.flatten(), minlength=num_tokens).clamp(min=1)


def describe(norms: Tensor, ids_keep: Tensor, num_tokens: int) -> dict:
    """The map of membership and its numbers. A smallest probability of 0 enters the ratio as one
    image would: so the ratio is finite, and marked as a lower bound."""
    p, one_image = membership(norms, ids_keep, num_tokens), num_tokens / ids_keep.numel()
    ratio, side = p.max() / p.min().clamp(min=one_image), math.isqrt(num_tokens)
    return dict(
        largest=p.max().item(),
        smallest=p.min().item(),
        std=p.std().item(),
        ratio=ratio.item(),
        ratio_is_lower_bound=p.min().item() == 0,
        map=p.view(side, side).tolist(),
    )


def set_up(config: Config, args: argparse.Namespace) -> Run:
    """What all checkpoints of a run share: images and frozen networks; its config says that the
    n images of a map are one batch, without a mask, with their labels. Raises BadInput."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False
    typed = {k: v for k in ("data", "vae_weights", "teacher_weights") if (v := getattr(args, k))}
    config = dataclasses.replace(config, mask_ratio=0.0, label_dropout=0.0, **typed)
    if config.data:
        dataset = maskalign.FolderImages(config.data, config.image_size)
    elif config.vae != "none":  # a published file: it is no demo
        raise BadInput("the checkpoint does not say where its images are: name them with --data")
    else:
        dataset = maskalign.demo_shapes(config.image_size)
    if len(dataset.classes) != config.num_classes:
        found = f"{config.data or 'the demo'} has {len(dataset.classes)} classes"
        advice = f"the checkpoint {config.num_classes}: name the run's images with --data"
        raise BadInput(f"{found}, {advice}")
    config = dataclasses.replace(config, batch_size=min(args.images, len(dataset)))
    vae = maskalign.build_vae(config, device)
    teacher = maskalign.build_teacher(config, dataset, device)
    return Run(config, device=device, dataset=dataset, vae=vae, teacher=teacher)


def draw_all(run: Run, args: argparse.Namespace) -> tuple:
    """(picks, drawn, masks): indices of the images, their noise, and masks (n, K). Drawn on the CPU
    for all images at once: the same for any checkpoint, at every t, masked or not."""
    config, n = run.config, run.config.batch_size
    generator = seeded("cpu", "figure2", args.seed)
    picks = torch.randperm(len(run.dataset), generator=generator)[:n].tolist()
    drawn = draw_step(run, generator)
    num_tokens = (config.latent_shape[1] // config.patch_size) ** 2
    masks = [
        sample_token_subset(n, num_tokens, args.mask_ratio, generator) for _ in range(args.masks)
    ]
    return picks, drawn, masks


def batches(run: Run, picks: list, drawn: dict):
    """Yields (rows, (x, y, z, config), noise) of BATCH images at a time."""
    for first, batch in enumerate(DataLoader(Subset(run.dataset, picks), BATCH)):
        rows = slice(first * BATCH, (first + 1) * BATCH)
        noise = {name: drawn[name][rows].to(run.device) for name in ("noise", "cls_noise", "drop")}
        x, y, z = load_batch(run, batch, torch.zeros_like(noise["noise"]))
        yield rows, (x, y, z, run.config), noise


def measure_maps(model, run: Run, args: argparse.Namespace) -> dict:
    """The maps of a network on images of its run, in float32, and what chance alone would give."""
    picks, drawn, masks = draw_all(run, args)
    n, num_tokens = len(picks), model.x_embedder.num_patches
    ids = dict(full=torch.arange(num_tokens).expand(n, -1), masked=masks[0])
    norms = {(t, mode): [] for mode in ids for t in TIMES}
    for rows, inputs, noise in tqdm(batches(run, picks, drawn), total=math.ceil(n / BATCH)):
        for t, mode in norms:
            times = torch.full((len(inputs[0]),), t, device=run.device)
            kept = ids[mode][rows].to(run.device)
            found = gradient_norms(model, *inputs, t=times, ids_keep=kept, **noise)
            norms[t, mode].append(found.cpu())
    maps = [
        dict(t=t, input=mode, **describe(torch.cat(found), ids[mode], num_tokens))
        for (t, mode), found in norms.items()
    ]
    no_pattern = torch.rand(n, num_tokens, generator=seeded("cpu", "chance", args.seed))
    return dict(images=n, maps=maps, by_chance=describe(no_pattern, ids["full"], num_tokens))


def measure_gap(model, run: Run, args: argparse.Namespace) -> dict:
    """The gap of a network at each t, and of all: mean and deviation over masks, on one batch."""
    picks, drawn, masks = draw_all(run, args)
    rows, inputs, noise = next(batches(run, picks, drawn))
    gaps = {}
    for t in TIMES:
        times = torch.full((len(inputs[0]),), t, device=run.device)
        found = [
            alignment_gap(model, *inputs, t=times, ids_keep=mask[rows].to(run.device), **noise)[0]
            for mask in masks
        ]
        gaps[t] = torch.tensor(found)
    gaps["all"] = torch.stack(list(gaps.values())).mean(dim=0)
    return {t: dict(mean=gap.mean().item(), std=gap.std().item()) for t, gap in gaps.items()}


# ---- 2. The pictures -----------------------------------------------------------------------------
def in_words(m: dict) -> str:
    more = ">" if m["ratio_is_lower_bound"] else ""
    return f"{m['smallest']:.2f} to {m['largest']:.2f}, {more}{m['ratio']:.3g}x"


def write(picture: Image.Image, x: float, y: float, words: str, size: int, anchor="mm") -> None:
    ImageDraw.Draw(picture).text((x, y), words, "black", font_size=size, anchor=anchor)


def paste(picture: Image.Image, p, x: int, y: int, *size) -> None:
    """Pastes shares p (H, W) at (x, y) as colours, enlarged to `size`, (width, height)."""
    stops = np.linspace(0, 0.8, len(COLOURS))
    channels = zip(*COLOURS, strict=True)
    rgb = np.stack([np.interp(p, stops, channel) for channel in channels], axis=-1)
    picture.paste(Image.fromarray(rgb.astype(np.uint8)).resize(size, Image.NEAREST), (x, y))


def draw_maps(results: dict, path: Path) -> None:
    """A row for each run and input, a column for each t; one colour range for all, [0, 0.8]."""
    rows = [(name, mode) for name in results for mode in ("full", "masked")]
    width, height = 190 + 166 * len(TIMES) + 150, 100 + 196 * len(rows)
    picture = Image.new("RGB", (width, height), "white")
    title = "Share of images with the token in their top 10% by alignment gradient"
    write(picture, width / 2, 26, title, 24)
    for row, (name, mode) in enumerate(rows):
        y = 100 + 196 * row
        write(picture, 16, y + 75, f"{name}\n{mode} input", 18, "lm")
        maps = [m for m in results[name]["maps"] if m["input"] == mode]
        for column, m in enumerate(maps):
            x = 190 + 166 * column
            paste(picture, m["map"], x, y, 150, 150)
            write(picture, x + 75, y + 164, in_words(m), 14)
            if row == 0:
                write(picture, x + 75, 82, f"t = {m['t']}", 18)

    # The scale of colours, at the right.
    tall = height - 146
    paste(picture, np.linspace(0.8, 0, 800)[:, None], width - 142, 100, 22, tall)
    for p, note in ((0, ""), (0.1, " uniform"), (0.2, ""), (0.4, ""), (0.6, ""), (0.8, "")):
        write(picture, width - 112, 100 + tall * (1 - p / 0.8), f"{p}{note}", 16, "lm")
    picture.save(path)


# ---- 3. The command ------------------------------------------------------------------------------
def parse_args(argv: list | None = None) -> argparse.Namespace:
    """The command line. Raises BadInput."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run folder, or a checkpoint")
    add("--data", default="", help="image folder [that of the run]")
    add("--vae_weights", default="", help="file to read instead of the run's")
    add("--teacher_weights", default="", help="file to read instead of the run's")
    add("--out", default="", help="folder to write into [that of the first RUN]")
    add("--images", type=int, default=1024, help="images of a map, K [1024]")
    add("--masks", type=int, default=16, help="random masks of the gap [16]")
    add("--mask_ratio", type=float, default=0.25, help="share of the tokens they drop [0.25]")
    add("--seed", type=int, default=0, help="decides images, noise and masks [0]")
    args = parser.parse_args(argv)
    require(args, "images", args.images > 0, "above 0")
    require(args, "masks", args.masks > 1, "2 or above")
    require(args, "mask_ratio", 0 < args.mask_ratio < 1, "between 0 and 1")
    return args


def checkpoints(run: str) -> list:
    """Paths of the milestones of a run folder and of its latest.pt, or the checkpoint named."""
    folder = Path(run)
    return (
        [*sorted(folder.glob("step-*.pt")), folder / "latest.pt"] if folder.is_dir() else [folder]
    )


def load(path: Path) -> tuple:
    """(step or None, network, config) of a checkpoint. Raises BadInput where it aligns nothing."""
    model, config = load_checkpoint(path)
    if not model.align_depth:
        reason = f"{path} ({config.method}) aligns nothing, so it has no gradient to draw"
        raise BadInput(f"{reason}: leave it out, or draw its curves with tests/curves.py")
    with torch.serialization.safe_globals([argparse.Namespace]):  # as load_checkpoint
        return maskalign.read_weights(str(path)).get("step"), model, config


def measure(paths: list, args: argparse.Namespace) -> dict:
    """Maps of the last of some checkpoints of a run, gaps of all."""
    step, model, config = load(paths[-1])
    shared = set_up(config, args)
    model = model.to(shared.device)
    maps, newest = measure_maps(model, shared, args), measure_gap(model, shared, args)
    gaps = []
    for path in paths[:-1]:
        milestone, model, _ = load(path)
        if milestone != step:  # latest.pt may be the last milestone again
            gap = measure_gap(model.to(shared.device), shared, args)
            gaps.append({"step": milestone} | gap)
    gaps.append({"step": step} | newest)
    about = dict(steps=step, method=config.method, size=config.size, seed=config.seed)
    return dict(about, **maps, gap=gaps)


def run(args: argparse.Namespace) -> list:
    """What the command line asks for; returns the paths that were written. Raises BadInput."""
    runs = curves.by_name(args.runs)
    for typed in runs.values():  # what cannot be measured is refused before the long work
        load(checkpoints(typed)[-1])
    results, gaps = {}, {}
    for name, typed in runs.items():
        results[name] = measure(checkpoints(typed), args)
        for m in results[name]["maps"]:
            print(f"{name}, t {m['t']}, {m['input']} input: {in_words(m)}, std {m['std']:.3f}")
        gaps[name] = []
        for found in results[name]["gap"]:
            step, mean, std = found["step"], found["all"]["mean"], found["all"]["std"]
            print(f"{name}, step {step}: gap {mean:.4f}, +- {std:.4f} over {args.masks} masks")
            if step is not None:  # published files do not tell it
                gaps[name].append(dict(step=step, gap=mean))
    out = Path(args.out or curves.folder_of(args.runs[0]))
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "heatmap.png", out / "figure2.json"]
    draw_maps(results, written[0])
    written[1].write_text(json.dumps(dict(settings=vars(args), runs=results), indent=1))
    if any(map(curves.read_log, args.runs)):
        written.append(curves.run(args.runs, str(out), "loss,align,gap", more=gaps))
    return written


def main() -> None:
    """Measures from the command line; bad input ends it with one sentence."""
    try:
        print(*run(parse_args()), sep="\n")
    except BadInput as error:
        sys.exit(f"figure2.py: {error}")


if __name__ == "__main__":
    main()
