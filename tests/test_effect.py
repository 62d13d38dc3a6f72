"""tests/effect.py: its judge can tell, its study continues, and ends in a table and a picture."""

import json
import shutil
import sys
from argparse import Namespace
from math import sqrt

import effect
import judge
import numpy as np
import pytest
import spread
import torch
from PIL import Image

import maskalign as ma

TINY = dict(hidden_size=32, num_heads=2, depth=2, align_depth=1, projector_dim=16)
COUNT = 64  # images


@pytest.fixture(scope="module")
def tiny_demo():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ma.SIZES, "demo", TINY)
        patch.setattr(ma, "DEMO", ma.DEMO | dict(batch_size=8, teacher_steps=2))
        patch.setitem(effect.SAMPLES, "num_images", COUNT)
        patch.setitem(effect.SAMPLES, "steps", 2)
        yield


@pytest.fixture(scope="module")
def study(tiny_demo, tmp_path_factory):
    """Two runs of four steps, which were judged at two. The second was started twice."""
    args = Namespace(out=str(tmp_path_factory.mktemp("effect")), steps=[4, 2])
    effect.run("reg", 1, Namespace(out=args.out, steps=[2]))
    for seed in (0, 1):
        effect.run("reg", seed, args)
    return args


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs effect.py in this process, with one process for the runs."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["effect.py", "--jobs=1", *map(str, argv)])
        effect.main()
        return capsys.readouterr().out

    return run


# ---- 1. The judge
def test_the_judge_tells_real_shapes_from_noise_and_their_classes_from_each_other():
    _, (_, _, correct) = judge.make_judge()
    assert correct > 99
    real = judge.score_real(COUNT)
    noise = judge.score(torch.randint(256, (COUNT, 3, 24, 24)))
    assert real["named"] > 98 and noise["named"] < 40 and noise["fd"] > 20 * real["fd"]
    shifted = judge.other_shapes()[1 : COUNT + 1]
    assert judge.score(shifted)["named"] < 2


def test_the_nearest_template_is_of_the_right_class_whatever_the_colors():
    shapes = judge.other_shapes()[: 8 * COUNT]
    asked = torch.arange(len(shapes)) % 8
    assert (judge.name_by_template(shapes) == asked).double().mean() > 0.995
    colorless = judge.remove_colors(shapes)
    torch.testing.assert_close(colorless.norm(dim=1), torch.ones(len(shapes)).double())
    other_colors = 40 + shapes.flip(1) // 2  # up to rounding
    cosines = (colorless * judge.remove_colors(other_colors)).sum(dim=1)
    assert cosines.min() > 0.999
    real = judge.score(shapes)
    shifted = judge.score(judge.other_shapes()[1 : 8 * COUNT + 1])
    assert real["template"] > 99.5 and shifted["template"] < 1


def test_the_judge_saw_none_of_the_shapes_it_compares_with():
    demo = ma.demo_shapes(24)
    assert len(demo) == judge.COUNT  # what the demo's teacher and the judge are trained on
    images = [*demo.datasets["image"], *judge.other_shapes()]
    assert len(images) == 3 * judge.COUNT
    assert len({image.numpy().tobytes() for image in images}) == len(images)


# ---- 2. A run
@pytest.mark.parametrize("fork", effect.FORKS)
def test_a_fork_is_a_method(fork):
    train, kind = effect.load_method(fork)
    assert train.__module__ == kind.__module__ == f"forks.{fork}"
    assert ma.make_config(kind, method=fork, seed=3).method == fork
    assert effect.load_method("reg") == (ma.train, ma.Config)


def test_a_run_that_was_started_twice_ends_as_one_long_run(study, tmp_path):
    train, kind = effect.load_method("reg")
    given = dict(method="reg", seed=1, steps=4, out=str(tmp_path), preview_steps=1)
    train(ma.make_config(kind, **given))
    long = torch.load(tmp_path / "latest.pt", weights_only=True)
    folder = effect.run_folder("reg", 1, study)
    for name in ("latest.pt", "step-0000004.pt"):
        saved = torch.load(folder / name, weights_only=True)
        assert saved["step"] == 4
        for key, value in long["ema"].items():
            assert torch.equal(saved["ema"][key], value)
    assert torch.load(folder / "step-0000002.pt", weights_only=True)["step"] == 2


def test_cpu_seconds_are_those_of_the_network_s_steps(study):
    """Neither of the teacher's, nor from one start of train to the next."""
    for seed in (0, 1):
        text = (effect.run_folder("reg", seed, study) / "cpu_s.txt").read_text()
        seconds = [float(line) for line in text.split()]
        assert len(seconds) == 2 and min(seconds) > 0  # from step 1 to 2, and from 3 to 4


def test_all_images_have_the_same_noise_and_labels_but_other_seeds_other_weights(study):
    for seed, again in ((0, 1), (1, 0)):
        folder = effect.run_folder("reg", seed, study)
        with np.load(effect.images_file(folder, 4)) as file:
            settings = json.loads(str(file["settings"]))
            images = file["arr_0"]
        assert images.shape == (COUNT, 24, 24, 3)
        assert settings["labels"] == "balanced" and settings["cfg_scale"] == 1
        assert settings["seed"] == 0
        other = effect.images_file(effect.run_folder("reg", again, study), 4)
        assert not np.array_equal(np.load(other)["arr_0"], images)


def test_only_what_is_missing_is_done_again(study, tiny_demo, monkeypatch, tmp_path):
    args = Namespace(out=str(tmp_path), steps=study.steps)
    folder = effect.run_folder("reg", 0, args)
    shutil.copytree(effect.run_folder("reg", 0, study), folder)
    steps = []
    train_to = effect.train_to
    monkeypatch.setattr(effect, "train_to", lambda *args: steps.append(args[0]) or train_to(*args))
    # As after a kill while images of step 2 are generated, and one before step 4 is copied.
    for step, suffixes in ((2, [".npz"]), (4, [".npz", ".pt"])):
        images = effect.images_file(folder, step)
        before = np.load(images)["arr_0"]
        for suffix in suffixes:
            images.with_suffix(suffix).unlink()
        assert not effect.is_complete("reg", 0, args)
        effect.run("reg", 0, args)
        assert effect.is_complete("reg", 0, args)
        assert np.array_equal(np.load(images)["arr_0"], before)
    assert steps == [4]


def test_a_step_that_a_run_went_past_is_refused_in_one_sentence(study, tiny_demo):
    args = Namespace(out=study.out, steps=[3])
    with pytest.raises(AssertionError, match="latest.pt is of step 4, past 3: choose another"):
        effect.run("reg", 0, args)


# ---- 3. The study
def test_runs_that_are_there_are_only_judged(study, monkeypatch, command):
    waiting = []
    monkeypatch.setattr(effect, "run_all", lambda runs, args: waiting.extend(runs))
    shown = command("--methods=reg", "--seeds=2", "--steps", 2, 4, f"--out={study.out}")
    assert not waiting
    result = json.loads(effect.Path(study.out, "effect.json").read_text())
    places = [(p["method"], p["seed"], p["step"]) for p in result["points"]]
    assert places == [("reg", seed, step) for seed in (0, 1) for step in (2, 4)]
    assert all(p["fd"] > 0 and 0 <= p["named"] <= 100 for p in result["points"])
    assert all(0 <= p["template"] <= 100 for p in result["points"])
    half, whole = (p["cpu_s"] for p in result["points"][:2])
    assert whole == pytest.approx(2 * half) and half > 0
    assert "commit" in result["machines"][0]
    assert Image.open(effect.Path(study.out, "effect.png")).width == 840
    assert "| `reg` |" in shown


def test_one_seed_and_one_step_are_refused():
    with pytest.raises(AssertionError, match="seeds is 1: a standard deviation needs 2 or more"):
        effect.parse_args(["--seeds=1"])
    with pytest.raises(AssertionError, match="to time a step needs 2 or more"):
        effect.parse_args(["--steps=1"])


def test_mean_and_standard_deviation_are_those_of_the_seeds():
    points = [
        dict(method="reg", seed=0, step=5, cpu_s=2.0, fd=1.0, named=90.0, template=80.0),
        dict(method="reg", seed=1, step=5, cpu_s=2.0, fd=3.0, named=92.0, template=80.0),
    ]
    (row,) = spread.summarise(points)["reg"]
    assert row["fd"] == pytest.approx((2, sqrt(2))) and row["cpu_s"] == (2, 0)
    assert "| `reg` | 91.0 ± 1.4 |" in spread.as_markdown(dict(reg=[row]))


def test_each_method_has_a_dot_of_its_own_at_each_step_of_both_panels(tmp_path):
    """Also where methods are equal, as their dots are side by side."""
    row = dict(fd=(30.0, 4.0), named=(90.0, 2.0))
    rows = [row | dict(step=(2, 0)), row | dict(step=(5, 0))]
    spread.draw_spread(dict(sit=rows, reg=rows), tmp_path / "effect.png")
    pixels = np.array(Image.open(tmp_path / "effect.png"))[40:290, :660]  # without the names
    for panel in (pixels[:, 55:325], pixels[:, 390:660]):
        for color in spread.COLORS[:2]:
            rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
            columns = np.flatnonzero((panel == rgb).all(axis=2).any(axis=0))
            assert len(columns) >= 8 and (np.diff(columns) > 1).sum() == 1  # two dots, apart
