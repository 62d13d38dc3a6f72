"""tests/effect.py: its judge can tell, its study goes on and ends in a table and a picture."""

import json
import sys
from argparse import Namespace
from math import sqrt

import bands
import effect
import judge
import pytest
import torch
from PIL import Image

import maskalign as ma

TINY = dict(hidden_size=32, num_heads=2, depth=2, align_depth=1, projector_dim=16)
COUNT = 64  # images


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two runs of four steps, of which the second was stopped after two."""
    out = tmp_path_factory.mktemp("effect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ma.SIZES, "demo", TINY)
        patch.setattr(ma, "DEMO", ma.DEMO | dict(batch_size=8, preview_steps=1))
        patch.setitem(effect.DRAW, "num", COUNT)
        patch.setitem(effect.DRAW, "steps", 2)
        half, whole = (Namespace(out=str(out), steps=steps) for steps in ([2], [4, 2]))
        runs = [effect.make_run("sit", seed, whole) for seed in (0, 1)]
        for planned in (effect.make_run("sit", 1, half), *runs):
            effect.run(planned)
        yield out, runs


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["effect.py", "--jobs=1", *map(str, argv)])
    effect.main()


def test_the_judge_tells_real_shapes_from_noise_and_their_classes_from_each_other():
    *_, rightly = judge.make_judge()
    assert rightly > 99
    real, noise = judge.score_real(COUNT), judge.score(torch.randint(256, (COUNT, 3, 24, 24)))
    assert real["named"] > 98 and noise["named"] < 40 and noise["fd"] > 20 * real["fd"]
    shifted = ma.demo_shapes(24, 2 * judge.SHAPES).tensors[0][1 : COUNT + 1]
    assert judge.score(shifted)["named"] < 2


def test_the_judge_saw_none_of_the_shapes_it_compares_with():
    few, many = ma.demo_shapes(24).tensors[0], ma.demo_shapes(24, 2 * judge.SHAPES).tensors[0]
    assert len(few) == judge.SHAPES  # what the demo and the judge are trained on
    assert torch.equal(few, many[: len(few)])


@pytest.mark.parametrize("fork", effect.FORKS)
def test_a_fork_is_a_method(fork, tmp_path):
    """Before any test of `study`, whose small demo is too small for the forks."""
    train, config, _ = effect.make_run(fork, 3, Namespace(out=str(tmp_path), steps=[2, 3]))
    assert train.__module__ == f"forks.{fork}"
    assert (config.method, config.seed, config.milestone_every) == (fork, 3, 1)


def test_a_stopped_run_goes_on_and_counts_the_cpu_seconds_of_its_steps(study):
    out, runs = study
    _, config, files = runs[1]
    assert list(files) == [2, 4] and all(file.exists() for file in files.values())
    seconds = [float(line) for line in (out / "sit-1/cpu_s.txt").read_text().split()]
    assert len(seconds) == 2 and min(seconds) > 0  # none for the first step of a process
    assert ma.read_weights(f"{config.out}/latest.pt")["step"] == 4


def test_runs_that_are_there_are_only_judged(study, monkeypatch, capsys):
    out, _ = study
    monkeypatch.setattr(effect, "run", None)
    command(monkeypatch, "--methods=sit", "--seeds=2", "--steps", 2, 4, f"--out={out}")
    result = json.loads((out / "effect.json").read_text())
    places = [(p["method"], p["seed"], p["step"]) for p in result["points"]]
    assert places == [("sit", seed, step) for seed in (0, 1) for step in (2, 4)]
    assert all(p["fd"] > 0 and 0 <= p["named"] <= 100 for p in result["points"])
    half, whole = (p["cpu_s"] for p in result["points"][:2])
    assert whole == pytest.approx(2 * half) and half > 0
    assert "commit" in result["machines"][0]
    assert Image.open(out / "effect.png").width == 800
    assert "| `sit` |" in capsys.readouterr().out


def test_a_step_that_a_run_went_past_is_refused_in_one_sentence(study):
    out, _ = study
    planned = effect.make_run("sit", 0, Namespace(out=str(out), steps=[3]))
    with pytest.raises(ma.BadInput, match="cannot draw step 3 of .*: name another --out"):
        effect.run(planned)


def test_one_seed_is_refused(monkeypatch):
    with pytest.raises(SystemExit, match="seeds is 1: it must be 2 or above"):
        command(monkeypatch, "--seeds=1")


def test_mean_and_standard_deviation_are_those_of_the_seeds():
    rows = ((0, 1.0, 90.0), (1, 3.0, 92.0))
    points = [
        dict(method="reg", seed=i, step=5, cpu_s=2.0, fd=fd, named=named) for i, fd, named in rows
    ]
    (row,) = bands.summarise(points)["reg"]
    assert row["fd"] == pytest.approx((2, sqrt(2))) and row["cpu_s"] == (2, 0)
    assert "| `reg` | 91.0 ± 1.4 |" in bands.as_markdown(dict(reg=[row]))
