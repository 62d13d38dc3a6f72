"""The paper's Figure 2 from checkpoints of ours: where the alignment pulls, and what a mask does.

  python tests/figure2.py runs/reg-demo runs/maskalign-demo      half a minute per run, 2 cores
  python tests/figure2.py RUN --data IMAGENET --out DIR          the images lie elsewhere now

RUN is a run folder or a checkpoint. Into --out, by default the folder of the first RUN, it writes
  heatmap.png   Fig. 2a, 2b: in each image, take the 10% of the patch tokens that the alignment
                pulls hardest (Eq. 5); a map shows how often each position is among them
  figure2.json  the numbers of the maps, and the stability gap G_r (Eq. 12) over random masks
  curves.png    Fig. 2c, 2d: loss, alignment and gap as logged in training; tests/curves.py alone
                draws these and any other curve, also of runs that align nothing
"""

import argparse, dataclasses, json, math, sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import curves
import maskalign
from maskalign import BadInput, alignment_gap, seeded, training_losses
from sample import load_checkpoint

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # Tab. 8
BATCH = 64  # images at a time; the gap is taken on the first 64
COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis


# ---- 1. The two measurements ---------------------------------------------------------------------
def gradient_norms(model, x, y, z, config, **drawn) -> torch.Tensor:
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


def membership(norms: torch.Tensor, ids_keep: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """norms, ids_keep (N, K) -> share of images with the position in their top 10%: (T,)."""
    # NOTE(paper): for masked input the set is not defined. Here: the top 10% of the kept tokens,
    # as a share of the images that keep the position; so uniform is 0.10 with a mask, too.
    top = norms.topk(max(1, round(0.1 * norms.shape[1])), dim=-1).indices
    hits = torch.bincount(ids_keep.gather(1, top).flatten(), minlength=num_tokens)
    return hits / torch.bincount(ids_keep.flatten(), minlength=num_tokens).clamp(min=1)


def describe(norms: torch.Tensor, ids_keep: torch.Tensor, num_tokens: int) -> dict:
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


def measure(model, config, args: argparse.Namespace) -> dict:
    """Maps and gaps of a network, on images of its run with their labels, in float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False
    typed = {k: v for k in ("data", "vae_weights", "teacher_weights") if (v := getattr(args, k))}
    config = dataclasses.replace(config, mask_ratio=0.0, **typed)
    if not config.data and config.vae != "none":  # a published file: it is no demo
        raise BadInput("the checkpoint does not say where its images are: name them with --data")
    dataset = (
        maskalign.FolderImages(config.data, config.image_size)
        if config.data
        else maskalign.demo_shapes(config.image_size)
    )
    if len(dataset.classes) != config.num_classes:
        raise BadInput(
            f"{config.data or 'the demo'} has {len(dataset.classes)} classes, the "
            f"checkpoint {config.num_classes}: name the run's images with --data"
        )
    model, vae = model.to(device), maskalign.build_vae(config, device)
    teacher = maskalign.build_teacher(config, dataset, device)
    # Drawn on the CPU for all images at once: the same in any run, at every t, masked or not.
    n, num_tokens = min(args.images, len(dataset)), model.x_embedder.num_patches
    generator = seeded("cpu", "figure2", args.seed)
    picks = torch.randperm(len(dataset), generator=generator)[:n].tolist()
    drawn = maskalign.draw_step(
        n,
        config.latent_shape,
        config.z_dim,
        config,
        generator,
        drop=torch.zeros(n, dtype=torch.bool),
    )
    masks = [
        maskalign.sample_token_subset(n, num_tokens, args.mask_ratio, generator)
        for _ in range(args.masks)
    ]
    ids = dict(full=torch.arange(num_tokens).expand(n, -1), masked=masks[0])
    norms, gaps = {(t, mode): [] for mode in ids for t in TIMES}, {}
    for first, batch in zip(tqdm(range(0, n, BATCH)), DataLoader(Subset(dataset, picks), BATCH)):
        rows = slice(first, first + BATCH)
        mine = {
            name: drawn[name][rows].to(device) for name in ("noise", "cls_noise", "drop", "lag")
        }
        mine["ema"] = model  # SRA's teacher is the network itself
        x, y, z = maskalign.load_batch(batch, torch.zeros_like(mine["noise"]), vae, teacher)
        inputs = (model, x, y, z, config)
        for t in TIMES:
            mine["t"] = torch.full_like(mine["lag"], t)
            for mode in ids:
                g = gradient_norms(*inputs, ids_keep=ids[mode][rows].to(device), **mine)
                norms[t, mode].append(g.cpu())
            if first == 0:
                gaps[t] = torch.tensor(
                    [alignment_gap(*inputs, ids_keep=m[rows].to(device), **mine)[0] for m in masks]
                )
    gaps["all"] = torch.stack(list(gaps.values())).mean(dim=0)
    no_pattern = torch.rand(n, num_tokens, generator=generator)
    return dict(
        method=config.method,
        size=config.size,
        seed=config.seed,
        images=n,
        maps=[
            dict(t=t, input=mode, **describe(torch.cat(g), ids[mode], num_tokens))
            for (t, mode), g in norms.items()
        ],
        by_chance=describe(no_pattern, ids["full"], num_tokens),
        gap={t: dict(mean=g.mean().item(), std=g.std().item()) for t, g in gaps.items()},
    )


# ---- 2. The pictures -----------------------------------------------------------------------------
def in_words(m: dict) -> str:
    more = ">" if m["ratio_is_lower_bound"] else ""
    return f"{m['smallest']:.2f} to {m['largest']:.2f}, {more}{m['ratio']:.3g}x"


def draw_maps(results: dict, path: Path) -> None:
    """A row for each run and input, a column for each t; one colour range for all, [0, 0.8]."""
    rows = [(name, mode) for name in results for mode in ("full", "masked")]
    width, height = 190 + 166 * len(TIMES) + 150, 100 + 196 * len(rows)
    picture = Image.new("RGB", (width, height), "white")

    def text(x, y, words, size, anchor="mm"):
        ImageDraw.Draw(picture).text((x, y), words, "black", font_size=size, anchor=anchor)

    def paste(p, x, y, *size):
        stops = np.linspace(0, 0.8, len(COLOURS))
        rgb = np.stack([np.interp(p, stops, part) for part in zip(*COLOURS)], axis=-1)
        picture.paste(Image.fromarray(rgb.astype(np.uint8)).resize(size, Image.NEAREST), (x, y))

    text(width / 2, 26, "Share of images with the token in their top 10% by alignment gradient", 24)
    for row, (name, mode) in enumerate(rows):
        y = 100 + 196 * row
        text(16, y + 75, f"{name}\n{mode} input", 18, "lm")
        for column, m in enumerate(m for m in results[name]["maps"] if m["input"] == mode):
            x = 190 + 166 * column
            paste(m["map"], x, y, 150, 150)
            text(x + 75, y + 164, in_words(m), 14)
            text(x + 75, 82, f"t = {m['t']}" if row == 0 else "", 18)
    paste(np.linspace(0.8, 0, 800)[:, None], width - 142, 100, 22, height - 146)
    for p, note in ((0, ""), (0.1, " uniform"), (0.2, ""), (0.4, ""), (0.6, ""), (0.8, "")):
        text(width - 112, height - 46 - (height - 146) * p / 0.8, f"{p}{note}", 16, "lm")
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
    for name, fits, rule in (
        ("images", args.images > 0, "above 0"),
        ("masks", args.masks > 1, "2 or above"),
        ("mask_ratio", 0 < args.mask_ratio < 1, "between 0 and 1"),
    ):
        if not fits:
            raise BadInput(f"{name} is {getattr(args, name)}: it must be {rule}")
    return args


def run(args: argparse.Namespace) -> list:
    """What the command line asks for; returns the paths that were written. Raises BadInput."""
    loaded, steps, results = {}, {}, {}
    for name, typed in curves.by_name(args.runs).items():  # all, before the long work begins
        path = Path(typed, "latest.pt") if Path(typed).is_dir() else typed
        model, config = loaded[name] = load_checkpoint(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # as load_checkpoint
            steps[name] = maskalign.read_weights(str(path)).get("step")
        if not model.align_depth:
            raise BadInput(
                f"{typed} ({config.method}) aligns nothing, so it has no gradient to "
                "draw: leave it out, or draw its curves with tests/curves.py"
            )
    for name, (model, config) in loaded.items():
        results[name] = dict(steps=steps[name], **measure(model, config, args))
        for m in results[name]["maps"]:
            print(f"{name}, t {m['t']}, {m['input']} input: {in_words(m)}, std {m['std']:.3f}")
        gap = results[name]["gap"]["all"]
        print(f"{name}: gap {gap['mean']:.4f}, +- {gap['std']:.4f} over {args.masks} masks")
    out = Path(args.out or curves.folder_of(args.runs[0]))
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "heatmap.png", out / "figure2.json"]
    draw_maps(results, written[0])
    written[1].write_text(json.dumps(dict(settings=vars(args), runs=results), indent=1))
    if any(map(curves.read_log, args.runs)):
        written.append(curves.run(args.runs, str(out)))
    return written


def main() -> None:
    """Measures from the command line; bad input ends it with one sentence."""
    try:
        print(*run(parse_args()), sep="\n")
    except BadInput as error:
        sys.exit(f"figure2.py: {error}")


if __name__ == "__main__":
    main()
