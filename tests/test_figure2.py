"""figure2.py and curves.py: known gradients, shares and gaps; pictures; errors in one sentence."""

import json
from dataclasses import asdict, replace

import curves
import figure2
import numpy as np
import pytest
import torch
from curves import by_name, draw_curves, read_log, ticks
from draws import given, numbers
from figure2 import alignment_gap, describe, gradient_norms, parse_args, share_in_top
from PIL import Image, ImageColor
from test_data import make_folder
from test_method import trained_looking
from test_model import tiny

import maskalign
from maskalign import (
    SiT,
    SiTOutput,
    add_noise,
    gather_tokens,
    make_config,
    patchify,
    sample_token_subset,
    seeded,
)

TINY = dict(hidden_size=32, num_heads=2, depth=3, align_depth=2, projector_dim=16, teacher_steps=3)


# ---- 1. The two measurements
class TokenByToken(torch.nn.Module):
    """A linear projector on the noisy patches themselves; `mix` adds the mean of what went in."""

    def __init__(self, mix=0.0, z_dim=6):
        super().__init__()
        self.mix = mix
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(z_dim, 16, generator=generator)
        self.cls_weight = torch.randn(z_dim, 16, generator=generator)
        self.projector = torch.nn.Linear(16, z_dim, bias=False)
        self.projector.weight.data.copy_(self.weight)

    def tokens(self, x_t, cls_t, ids_keep):
        h = gather_tokens(patchify(x_t, 2), ids_keep)
        if cls_t is not None:
            h = torch.cat([(cls_t @ self.cls_weight.to(cls_t))[:, None], h], dim=1)
        return h + self.mix * h.mean(dim=1, keepdim=True)

    def forward(self, x_t, t, y, cls_t=None, ids_keep=None):
        h = self.tokens(x_t, cls_t, ids_keep)
        v = h[:, 1:] if cls_t is not None else h
        return SiTOutput(v, cls_t, self.projector(h))


def problem(method, masked, n=5, z_dim=6):
    """(x, y, z, config), and random numbers, in float64: n images of 16 tokens."""
    sizes = dict(num_classes=10, image_size=64, z_dim=z_dim)
    mask_ratio = 0.25 if masked else 0.0
    config = make_config(data="x", method=method, mask_ratio=mask_ratio, **sizes)
    generator = seeded("cpu", "problem")
    x = torch.randn(n, 4, 8, 8, generator=generator).double()
    z = torch.randn(n, 17, z_dim, generator=generator).double()
    cls_dim = z_dim if config.class_token else None
    found = numbers(n, (4, 8, 8), cls_dim, num_tokens=16 if masked else None)
    found = {name: some.double() for name, some in found.items()}
    return (x, torch.arange(n), z, config), found


def ids_of(found, config):
    return sample_token_subset(found["scores"], config.mask_ratio) if "scores" in found else None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", ["repa", "reg"])
def test_gradient_norms_of_a_linear_model_are_the_formula(method, masked):
    (x, y, z, config), found = problem(method, masked)
    net = TokenByToken().double()
    norms = gradient_norms(net, x, y, z, config, found)
    ids = ids_of(found, config)
    h = net.tokens(add_noise(x, found["noise"], found["t"].view(-1, 1, 1, 1)), None, ids)
    r = gather_tokens(z[:, 1:], ids)
    p = h @ net.weight.double().T
    cos = torch.cosine_similarity(p, r, dim=-1)[..., None]
    unit = torch.nn.functional.normalize
    # d(-cos) / dp = -(r/|r| - cos p/|p|) / |p|, and the loss is a mean over the tokens
    by_hand = (unit(r, dim=-1) - cos * unit(p, dim=-1)) / p.norm(dim=-1, keepdim=True)
    by_hand = (by_hand @ net.weight.double()).norm(dim=-1) / (p.shape[1] + (method == "reg"))
    torch.testing.assert_close(norms, by_hand, rtol=1e-10, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_in_a_batch_are_those_of_each_image_alone_at_the_alignment_layer(masked):
    (x, y, z, config), found = problem("maskalign", masked, z_dim=16)
    sit = trained_looking(tiny()).double().train()
    batch = gradient_norms(sit, x, y, z, config, found)
    assert batch.shape == (5, 12 if masked else 16)
    assert not sit.projector._forward_pre_hooks
    assert all(p.grad is None for p in sit.parameters())
    for i in range(5):
        seen = []  # align_depth 2: the output of blocks[1]
        hook = sit.blocks[1].register_forward_hook(lambda *args, seen=seen: seen.append(args[-1]))
        one = {name: some[i : i + 1] for name, some in found.items()}
        row = (part[i : i + 1] for part in (x, y, z))
        align = maskalign.training_losses(sit, *row, config, given(one))["align"]
        hook.remove()
        (alone,) = torch.autograd.grad(align, seen)
        torch.testing.assert_close(batch[i], alone[0, 1:].norm(dim=-1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_a_field_without_pattern_gives_ten_percent_everywhere(ratio):
    n = 20000
    num_tokens = 40
    ids = sample_token_subset(torch.rand(n, num_tokens, generator=seeded("cpu", 1)), ratio)
    p = share_in_top(torch.rand(ids.shape, generator=seeded("cpu", 2)), ids, num_tokens)
    assert (p - 0.1).abs().max() < 4.5 * (0.1 * 0.9 / (n * (1 - ratio))) ** 0.5
    assert describe(torch.rand(n, 36), torch.arange(36).expand(n, -1), 36)["ratio"] < 1.2


def test_a_position_that_always_stands_out_has_probability_one_among_images_that_keep_it():
    ids = sample_token_subset(torch.rand(500, 16, generator=seeded("cpu", 1)), 0.25)
    found = describe((ids == 5).float() + (ids == 6) * 0.5, ids, 16)  # top 10% of 12 is 1 token
    p = torch.tensor(found["map"])
    assert p.shape == (4, 4) and p[1, 1] == 1 and found["largest"] == 1
    assert p[1, 2] == pytest.approx(0.25 * 16 / 15, abs=0.05)  # 6 where 5 is dropped: 4 of 15
    assert found["smallest"] == 0 and found["ratio_is_lower_bound"]
    assert found["ratio"] == pytest.approx(500 * 0.75)  # finite: 1 against one of 375 images
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("method", ["repa", "reg"])
def test_gap_of_tokens_that_ignore_each_other_is_zero(method):
    inputs, found = problem(method, masked=True)
    assert abs(alignment_gap(TokenByToken().double(), *inputs, found)[0]) < 1e-12
    assert abs(alignment_gap(TokenByToken(mix=3.0).double(), *inputs, found)[0]) > 1e-4
    *data, config = inputs
    config = replace(config, mask_ratio=0.01)  # nothing is dropped: nothing changes
    assert abs(alignment_gap(TokenByToken(mix=3.0).double(), *data, config, found)[0]) < 1e-12


def test_gap_is_the_difference_of_the_two_losses_on_the_kept_tokens():
    (x, y, z, config), found = problem("repa", masked=True)
    net = TokenByToken(mix=3.0).double()
    ids = ids_of(found, config)
    x_t = add_noise(x, found["noise"], found["t"].view(-1, 1, 1, 1))
    r = gather_tokens(z[:, 1:], ids)
    masked = net.projector(net.tokens(x_t, None, ids))
    full = gather_tokens(net.projector(net.tokens(x_t, None, None)), ids)
    by_hand = (torch.cosine_similarity(full, r, -1) - torch.cosine_similarity(masked, r, -1)).mean()
    gap, loss = alignment_gap(net, x, y, z, config, found)
    assert gap == pytest.approx(by_hand.item(), rel=1e-10)
    assert loss == pytest.approx(-torch.cosine_similarity(full, r, -1).mean().item(), rel=1e-10)


# ---- 2. The commands
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three tiny runs, with weights as after training: name -> folder with latest.pt, log.jsonl.

    That of maskalign has copies of two checkpoints, the second of which is latest.pt again.
    """
    folders = {}
    for method in ("reg", "maskalign", "sit"):
        folder = tmp_path_factory.mktemp("runs") / method
        folder.mkdir()
        names = tuple(maskalign.SHAPES)
        data = dict(num_classes=8, class_names=names, z_dim=64)
        config = make_config(method=method, **data, **TINY)
        files = {"latest.pt": 7}
        if method == "maskalign":
            files |= {"step-0000003.pt": 3, "step-7.pt": 7}
        for name, step in files.items():
            state = trained_looking(SiT(config), seed=step).state_dict()
            saved = dict(model=state, ema=state, step=step, config=asdict(config))
            torch.save(saved, folder / name)
        lines = [
            dict(
                step=s,
                loss=ord(method[-1]) / s,
                align=0.0 if method == "sit" else -s / ord(method[-1]),
            )
            for s in (2, 4, 6)
        ]
        lines[-1] |= dict(grad_norm=0.01) if method == "maskalign" else {}
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders[method] = folder
    return folders


def options(*argv):
    return parse_args([*map(str, argv), "--images=24", "--masks=2"])


def test_the_command_measures_two_runs_and_draws_them(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figure2, "BATCH", 16)
    shapes = maskalign.demo_shapes(24, 100)
    monkeypatch.setattr(maskalign, "demo_shapes", lambda size: shapes)
    written = figure2.run(options(runs["reg"], runs["maskalign"] / "latest.pt", "--out", tmp_path))
    assert written == [tmp_path / name for name in ("heatmap.png", "figure2.json", "curves.png")]
    found = json.loads(written[1].read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert found["settings"]["images"] == 24 and list(found["runs"]) == ["reg", "maskalign"]
    for result in found["runs"].values():
        (gap,) = result["gap"]  # a checkpoint is given, or the folder has no copies
        assert result["steps"] == gap["step"] == 7
        assert list(gap) == ["step", "0.1", "0.3", "0.5", "0.7", "0.9", "all"]
        assert [(m["t"], m["input"]) for m in result["maps"]] == [
            (t, mode) for mode in ("full", "masked") for t in (0.1, 0.3, 0.5, 0.7, 0.9)
        ]
        for m in result["maps"]:
            p = torch.tensor(m["map"])
            assert p.shape == (6, 6) and m["largest"] == p.max() and m["smallest"] == p.min()
            if m["input"] == "full":
                assert p.sum() == pytest.approx(4)  # each image has round(3.6) tokens in its top
        assert gap["all"]["std"] > 0
    assert "reg, t 0.1, full input: " in capsys.readouterr().out
    width, height = Image.open(written[0]).size
    assert width > 900 and height == 100 + 3 * 196  # each run as it was trained, and less
    (reg, full, _), (ours, masked, _), (_, less, texts) = figure2.rows_of(found["runs"])
    assert (reg, ours) == ("reg\nfull input", "maskalign\nmasked input")
    for t, p in less.items():
        assert np.array_equal(p, masked[t] - full[t]) and full[t].sum() == pytest.approx(4)
        assert texts[t] == f"{p.min():+.2f} to {p.max():+.2f}"
    monkeypatch.setattr(figure2, "BATCH", 7)  # the maps do not depend on it
    newest = runs["maskalign"] / "latest.pt"
    figure2.run(options(newest, "--out", tmp_path / "again"))
    again = json.loads((tmp_path / "again" / "figure2.json").read_text())["runs"]["maskalign"]
    for a, b in zip(again["maps"], found["runs"]["maskalign"]["maps"], strict=True):
        moved = (torch.tensor(a["map"]) - torch.tensor(b["map"])).abs()
        assert moved.mean() < 0.01  # rounding may exchange a token or two of an image's top 10%


def test_a_color_of_the_picture_tells_the_share():
    picture = Image.new("RGB", (40, 20))
    values = np.array([[0, figure2.TOP, 0.9], [0.1, 0.2, 0.3]])
    figure2.paste(picture, values, figure2.VIRIDIS, (0, figure2.TOP), (10, 0, 30, 20))
    assert picture.getpixel((5, 5)) == (0, 0, 0)  # beside the box
    assert picture.getpixel((15, 5)) == figure2.VIRIDIS[0]
    assert picture.getpixel((25, 5)) == picture.getpixel((35, 5)) == figure2.VIRIDIS[-1]
    columns = np.array([picture.getpixel((x, 15)) for x in (15, 25, 35)])
    assert np.abs(columns - np.array(figure2.VIRIDIS[1:4])).max() <= 1


def test_a_run_with_copies_of_checkpoints_gives_a_gap_at_each(runs, tmp_path, capsys):
    """On the same images, noise and masks: the gap of a file does not depend on the others."""
    written = figure2.run(options(runs["maskalign"], "--out", tmp_path / "all"))
    shown = capsys.readouterr().out
    assert "maskalign, step 3: gap " in shown and "maskalign, step 7: gap " in shown
    gaps = json.loads(written[1].read_text())["runs"]["maskalign"]["gap"]
    assert [gap["step"] for gap in gaps] == [3, 7] and gaps[0]["all"] != gaps[1]["all"]
    early = figure2.run(options(runs["maskalign"] / "step-0000003.pt", "--out", tmp_path / "one"))
    (alone,) = json.loads(early[1].read_text())["runs"]["maskalign"]["gap"]
    assert alone == gaps[0]
    panel = Image.open(written[2]).crop((1080, 80, 1495, 390))  # the gaps make a curve
    assert ImageColor.getrgb(curves.COLORS[0]) in {colour for _, colour in panel.getcolors(9999)}


def test_what_cannot_be_measured_is_refused_in_one_sentence(runs, tmp_path):
    cats_and_dogs = make_folder(tmp_path / "images")
    for argv, message in (
        ([runs["sit"]], r"\(sit\) aligns nothing: leave it out, tests/curves.py plots its log"),
        ([runs["reg"], runs["sit"]], "aligns nothing"),  # before the long work
        ([tmp_path / "nowhere"], "there is no .*nowhere: give a run folder"),
        ([runs["reg"], "--data", cats_and_dogs], "other classes than the checkpoint: .* --data"),
    ):
        with pytest.raises(AssertionError, match=message):
            figure2.run(options(*argv, "--out", tmp_path / "out"))
    with pytest.raises(FileNotFoundError, match="latest.pt"):
        figure2.run(options(tmp_path))
    assert not (tmp_path / "out").exists()
    for flag, message in (
        ("--images=0", "images 0: give 1 or more"),
        ("--masks=1", "masks 1: a standard deviation needs 2 or more"),
        ("--mask_ratio=1", "mask_ratio 1.0 is not between 0 and 1"),
    ):
        with pytest.raises(AssertionError, match=message):
            parse_args(["run", flag])


# ---- 3. Curves
def test_the_last_label_of_a_curve_is_not_cut_off(tmp_path):
    log = [dict(step=100, loss=1.0), dict(step=400_000, loss=0.5)]
    draw_curves({"run": log}, ["loss"], tmp_path / "curves.png")
    edge = Image.open(tmp_path / "curves.png").crop((498, 0, 500, 450))
    assert edge.getcolors() == [(900, (255, 255, 255))]


def test_curves_of_runs_share_a_picture_and_a_missing_one_is_left_out(runs, tmp_path):
    path = curves.plot_runs([str(folder) for folder in runs.values()], str(tmp_path))
    picture = Image.open(path)
    assert picture.size == (1500, 450)
    shown = [  # colours within each panel: reg, maskalign, sit
        {c for _, c in picture.crop((500 * i + 80, 80, 500 * i + 495, 390)).getcolors(9999)}
        for i in range(3)
    ]
    colours = [ImageColor.getrgb(c) for c in curves.COLORS[:3]]
    assert set(colours) <= shown[0]
    assert colours[0] in shown[1] and colours[2] not in shown[1]  # sit's align is 0 throughout
    assert colours[1] in shown[2] and colours[0] not in shown[2]  # one logged value is a dot
    late = curves.plot_runs([str(runs["reg"])], str(tmp_path), curves="loss", first=4)
    assert Image.open(late).size == (500, 450)
    with pytest.raises(AssertionError, match="0 of these runs logged"):
        curves.plot_runs([str(runs["reg"])], str(tmp_path), first=7)


def test_a_line_is_drawn_where_its_numbers_say(tmp_path):
    draw_curves({"a": [dict(step=s, up=s) for s in range(0, 101, 10)]}, ["up"], tmp_path / "c.png")
    picture = Image.open(tmp_path / "c.png")
    for x in range(90, 460, 20):  # the frame is 75 to 465 across, 395 to 75 up, with 5% of margin
        share = (x - 75) / 390
        y = 395 - 320 * (0.05 + share) / 1.1
        assert picture.getpixel((x, round(y))) == ImageColor.getrgb(curves.COLORS[0])


def test_a_resumed_run_repeats_lines_and_the_last_of_each_step_counts(tmp_path):
    lines = [dict(step=2, loss=2.0), dict(step=4, loss=4.0), dict(step=2, loss=2.5)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_log(tmp_path) == [dict(step=2, loss=2.5), dict(step=4, loss=4.0)]


def test_logs_are_read_as_training_leaves_them(tmp_path):
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    assert read_log(folder) == []
    (folder / "log.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2}\n{"step": 3, "lo')
    assert [line["step"] for line in read_log(folder)] == [1, 2]
    draw_curves({"a": read_log(folder)}, ["loss"], folder / "curves.png")  # says: not logged
    assert by_name([folder]) == {"a": folder}
    both = [folder, folder / "log.jsonl"]  # as two checkpoints of one run would be
    assert read_log(both[1]) == read_log(folder)
    assert by_name(both) == {str(path): path for path in both}


@pytest.mark.parametrize("low, high", [(0, 1), (-0.2, 0.8), (0.001, 0.0131), (100, 400000), (7, 8)])
def test_ticks_are_a_handful_of_round_numbers_inside(low, high):
    found = ticks(low, high)
    assert 4 <= len(found) <= 11 and low <= found[0] and found[-1] <= high * (1 + 1e-9)
    assert all(len(f"{abs(v):.6g}".strip("0.").replace(".", "")) <= 3 for v in found)
