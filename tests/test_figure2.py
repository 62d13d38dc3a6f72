"""figure2.py and curves.py: known gradients, known shares, known gaps; pictures, plain errors."""

import json
from dataclasses import asdict
from functools import partial

import curves
import figure2
import pytest
import torch
from curves import by_name, draw_curves, read_log, ticks
from figure2 import alignment_gap, describe, gradient_norms, membership, parse_args
from PIL import Image, ImageColor
from processes import ROOT, Program
from test_method import trained_looking
from test_model import tiny

import maskalign
from maskalign import (
    BadInput,
    Run,
    SiTOutput,
    build_model,
    draw_step,
    gather_tokens,
    make_config,
    patchify,
    sample_token_subset,
    seeded,
)

TINY = dict(hidden_size=32, num_heads=2, depth=3, align_depth=2, projector_dim=16, teacher_steps=3)


class TokenByToken(torch.nn.Module):
    """A linear projector on the noisy patches themselves; `mix` adds the mean of what went in."""

    def __init__(self, mix=0.0, z_dim=6):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        projector = torch.nn.Linear(16, z_dim, bias=False)
        self.weight = torch.randn(z_dim, 16, generator=generator)
        projector.weight.data.copy_(self.weight)
        self.projectors, self.mix = torch.nn.ModuleList([projector]), mix
        self.cls_weight = torch.randn(z_dim, 16, generator=generator)

    def tokens(self, x_t, cls_t, ids_keep):
        h = gather_tokens(patchify(x_t, 2), ids_keep)
        if cls_t is not None:
            h = torch.cat([(cls_t @ self.cls_weight.to(cls_t))[:, None], h], dim=1)
        return h + self.mix * h.mean(dim=1, keepdim=True)

    def forward(self, x_t, t, y, cls_t=None, ids_keep=None):
        h = self.tokens(x_t, cls_t, ids_keep)
        return SiTOutput(h[:, 1:] if cls_t is not None else h, cls_t, self.projectors[0](h))


def problem(method, masked, n=5, z_dim=6, dtype=torch.float64):
    """(x, y, z, config), drawn: a batch of n images of 16 tokens."""
    config = make_config(
        data="x",
        method=method,
        num_classes=10,
        image_size=64,
        z_dim=z_dim,
        batch_size=n,
        mask_ratio=0.25 if masked else 0.0,
    )
    g = seeded("cpu", "problem")
    x, z = torch.randn(n, 4, 8, 8, generator=g), torch.randn(n, 17, z_dim, generator=g)
    drawn = draw_step(Run(config), g)
    del drawn["vae_noise"]
    for name in ("t", "noise", "cls_noise"):
        drawn[name] = drawn[name].to(dtype)
    return (x.to(dtype), torch.arange(n), z.to(dtype), config), drawn


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", ["repa", "reg"])
def test_gradient_norms_of_a_linear_model_are_the_formula(method, masked):
    (x, y, z, config), drawn = problem(method, masked)
    net = TokenByToken().double()
    norms = gradient_norms(net, x, y, z, config, **drawn)
    t, ids = drawn["t"], drawn["ids_keep"]
    h = net.tokens(
        (1 - t[:, None, None, None]) * x + t[:, None, None, None] * drawn["noise"], None, ids
    )
    r = gather_tokens(z[:, 1:], ids)
    p = h @ net.weight.double().T
    cos = torch.cosine_similarity(p, r, dim=-1)[..., None]
    unit = torch.nn.functional.normalize
    # d(-cos) / dp = -(r/|r| - cos p/|p|) / |p|, and the loss is a mean over the tokens
    by_hand = (unit(r, dim=-1) - cos * unit(p, dim=-1)) / p.norm(dim=-1, keepdim=True)
    by_hand = (by_hand @ net.weight.double()).norm(dim=-1) / (p.shape[1] + (method == "reg"))
    torch.testing.assert_close(norms, by_hand, rtol=1e-10, atol=0)


def keep_output(seen, module, inputs, output):
    seen.append(output)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_in_a_batch_are_those_of_each_image_alone_at_the_alignment_layer(masked):
    (x, y, z, config), drawn = problem("maskalign", masked, z_dim=16)
    sit = trained_looking(tiny()).double()
    batch = gradient_norms(sit, x, y, z, config, **drawn)
    assert batch.shape == (5, 12 if masked else 16)
    assert not sit.projectors[0]._forward_pre_hooks and all(
        p.grad is None for p in sit.parameters()
    )
    for i in range(5):
        seen = []  # align_depth 2: the output of blocks[1]
        hook = sit.blocks[1].register_forward_hook(partial(keep_output, seen))
        one = {k: None if v is None else v[i : i + 1] for k, v in drawn.items()}
        row = (part[i : i + 1] for part in (x, y, z))
        align = maskalign.training_losses(sit, *row, config, **one)["align"]
        hook.remove()
        (alone,) = torch.autograd.grad(align, seen)
        torch.testing.assert_close(batch[i], alone[0, 1:].norm(dim=-1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("ratio", [0.0, 0.25])
def test_a_field_without_pattern_gives_ten_percent_everywhere(ratio):
    n, num_tokens = 20000, 40
    ids = sample_token_subset(n, num_tokens, ratio, seeded("cpu", 1))
    p = membership(torch.rand(ids.shape, generator=seeded("cpu", 2)), ids, num_tokens)
    assert (p - 0.1).abs().max() < 4.5 * (0.1 * 0.9 / (n * (1 - ratio))) ** 0.5
    assert describe(torch.rand(n, 36), torch.arange(36).expand(n, -1), 36)["ratio"] < 1.2


def test_a_position_that_always_stands_out_has_probability_one_among_images_that_keep_it():
    ids = sample_token_subset(500, 16, 0.25, seeded("cpu", 1))
    found = describe((ids == 5).float() + (ids == 6) * 0.5, ids, 16)  # top 10% of 12 is 1 token
    p = torch.tensor(found["map"])
    assert p.shape == (4, 4) and p[1, 1] == 1 and found["largest"] == 1
    assert p[1, 2] == pytest.approx(0.25 * 16 / 15, abs=0.05)  # 6 where 5 is dropped: 4 of 15
    assert found["smallest"] == 0 and found["ratio_is_lower_bound"]
    assert found["ratio"] == pytest.approx(500 * 0.75)  # finite: 1 against one of 375 images
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("method", ["repa", "reg"])
def test_gap_of_tokens_that_ignore_each_other_is_zero(method):
    inputs, drawn = problem(method, masked=True)
    assert abs(alignment_gap(TokenByToken().double(), *inputs, **drawn)[0]) < 1e-12
    assert abs(alignment_gap(TokenByToken(mix=3.0).double(), *inputs, **drawn)[0]) > 1e-4
    drawn["ids_keep"] = torch.arange(16).expand(5, -1)  # nothing dropped: nothing changes
    assert abs(alignment_gap(TokenByToken(mix=3.0).double(), *inputs, **drawn)[0]) < 1e-12


def test_gap_is_the_difference_of_the_two_losses_on_the_kept_tokens():
    (x, y, z, config), drawn = problem("repa", masked=True)
    net, t, ids = TokenByToken(mix=3.0).double(), drawn["t"][:, None, None, None], drawn["ids_keep"]
    x_t, r = (1 - t) * x + t * drawn["noise"], gather_tokens(z[:, 1:], ids)
    masked = net.projectors[0](net.tokens(x_t, None, ids))
    full = gather_tokens(net.projectors[0](net.tokens(x_t, None, None)), ids)
    by_hand = (torch.cosine_similarity(full, r, -1) - torch.cosine_similarity(masked, r, -1)).mean()
    gap, loss = alignment_gap(net, x, y, z, config, **drawn)
    assert gap == pytest.approx(by_hand.item(), rel=1e-10)
    assert loss == pytest.approx(-torch.cosine_similarity(full, r, -1).mean().item(), rel=1e-10)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three tiny runs, weights as after training: name -> folder with latest.pt and log.jsonl;
    maskalign has two milestones, the second of which is latest.pt again."""
    folders = {}
    for method in ("reg", "maskalign", "sit"):
        folder = tmp_path_factory.mktemp("runs") / method
        folder.mkdir()
        config = make_config(**{**TINY, "method": method}, num_classes=8, z_dim=64)
        names = {"latest.pt": 7}
        if method == "maskalign":
            names |= {"step-0000003.pt": 3, "step-0000007.pt": 7}
        for name, step in names.items():
            state = trained_looking(build_model(config), seed=step).state_dict()
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
        (gap,) = result["gap"]  # a checkpoint is named, or the folder has no milestones
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
    assert width > 900 and height == 100 + 4 * 196
    monkeypatch.setattr(figure2, "BATCH", 7)  # the maps do not depend on it
    newest = runs["maskalign"] / "latest.pt"
    figure2.run(options(newest, "--out", tmp_path / "again"))
    again = json.loads((tmp_path / "again" / "figure2.json").read_text())["runs"]["maskalign"]
    for a, b in zip(again["maps"], found["runs"]["maskalign"]["maps"], strict=True):
        moved = (torch.tensor(a["map"]) - torch.tensor(b["map"])).abs()
        assert moved.mean() < 0.01  # rounding may exchange a token or two of an image's top 10%


def test_a_run_with_milestones_gives_a_gap_at_each(runs, tmp_path, capsys):
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
    assert ImageColor.getrgb(curves.COLOURS[0]) in {colour for _, colour in panel.getcolors(9999)}


def test_bad_input_ends_the_command_with_one_sentence(runs, tmp_path):
    status, shown, errors = Program("tests/figure2.py", runs["sit"]).end()
    assert status == 1 and shown == "" and errors.count("\n") == 1
    assert "(sit) aligns nothing" in errors and "tests/curves.py" in errors
    for argv, message in (
        ([tmp_path / "nowhere"], "there is no .*nowhere"),
        ([tmp_path], "cannot read .*latest.pt"),
        ([runs["reg"], "--data", ROOT / "tests"], "must hold images|classes"),
    ):
        with pytest.raises(BadInput, match=message):
            figure2.run(options(*argv))
    config = asdict(make_config(**{**TINY, "data": "x", "image_size": 64, "method": "reg"}))
    config["data"] = ""  # as of a published file; its classes and pictures are not the demo's
    state = build_model(maskalign.Config(**config)).state_dict()
    torch.save(dict(ema=state, config=config), tmp_path / "published.pt")
    with pytest.raises(BadInput, match="name them with --data"):
        figure2.run(options(tmp_path / "published.pt"))
    for flag in ("--images=0", "--masks=1", "--mask_ratio=1"):
        with pytest.raises(BadInput, match="it must be"):
            parse_args(["run", flag])


def test_the_last_label_of_a_curve_is_not_cut_off(tmp_path):
    log = [dict(step=100, loss=1.0), dict(step=400_000, loss=0.5)]
    draw_curves({"run": log}, ["loss"], tmp_path / "curves.png")
    edge = Image.open(tmp_path / "curves.png").crop((498, 0, 500, 450))
    assert edge.getcolors() == [(900, (255, 255, 255))]


def test_curves_of_runs_share_a_picture_and_a_missing_one_is_left_out(runs, tmp_path):
    path = curves.run([str(folder) for folder in runs.values()], str(tmp_path))
    picture = Image.open(path)
    assert picture.size == (1500, 450)
    shown = [  # colours within each panel: reg, maskalign, sit
        {c for _, c in picture.crop((500 * i + 80, 80, 500 * i + 495, 390)).getcolors(9999)}
        for i in range(3)
    ]
    colours = [ImageColor.getrgb(c) for c in curves.COLOURS[:3]]
    assert set(colours) <= shown[0]
    assert colours[0] in shown[1] and colours[2] not in shown[1]  # sit's align is 0 throughout
    assert colours[1] in shown[2] and colours[0] not in shown[2]  # one logged value is a dot
    late = curves.run([str(runs["reg"])], str(tmp_path), curves="loss", first=4)
    assert Image.open(late).size == (500, 450)
    with pytest.raises(BadInput, match="0 of these runs logged"):
        curves.run([str(runs["reg"])], str(tmp_path), first=7)


def test_a_line_is_drawn_where_its_numbers_say(tmp_path):
    draw_curves({"a": [dict(step=s, up=s) for s in range(0, 101, 10)]}, ["up"], tmp_path / "c.png")
    picture = Image.open(tmp_path / "c.png")
    for x in range(90, 460, 20):  # the frame is 75 to 465 across, 395 to 75 up, with 5% of margin
        share = (x - 75) / 390
        y = 395 - 320 * (0.05 + share) / 1.1
        assert picture.getpixel((x, round(y))) == ImageColor.getrgb(curves.COLOURS[0])


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
