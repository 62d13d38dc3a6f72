"""tests/robust.py: what it drops is dropped, and it is the same for all networks."""

import json
import sys
from dataclasses import asdict

import effect
import figure2
import judge
import numpy as np
import pytest
import robust
import torch
from test_method import trained_looking
from test_model import tiny

import maskalign as ma
import sample

TINY = dict(hidden_size=32, num_heads=2, depth=2, align_depth=1, projector_dim=16, teacher_steps=2)
COUNT = 70  # images, so that there is a second batch


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setitem(effect.SAMPLES, "num_images", COUNT)
    monkeypatch.setitem(effect.SAMPLES, "steps", 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder as that of effect.py: two seeds of reg, one of maskalign, at steps 3 and 7."""
    out = tmp_path_factory.mktemp("effect")
    data = dict(num_classes=8, class_names=tuple(ma.SHAPES), z_dim=64)
    for method, seed, steps in (("reg", 0, (3, 7)), ("reg", 12, (3,)), ("maskalign", 0, (3,))):
        config = ma.make_config(method=method, seed=seed, **data, **TINY)
        for step in steps:
            state = trained_looking(ma.SiT(config), seed=seed + step).state_dict()
            path = robust.checkpoint(out / f"{method}-{seed}", step)
            ma.save_file(dict(ema=state, step=step, config=asdict(config)), path)
    (out / "maskalign-no-mixing-0").mkdir()  # which has begun
    return out


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs robust.py in this process, with two masks for the gap, and a judge without taste."""
    parse_args = figure2.parse_args
    monkeypatch.setattr(judge, "score", lambda images: dict(fd=images.double().mean().item()))
    monkeypatch.setattr(figure2, "parse_args", lambda argv: parse_args([*argv, "--masks=2"]))
    monkeypatch.setattr(figure2, "BATCH", 8)
    monkeypatch.setattr(figure2, "TIMES", (0.3, 0.7))
    monkeypatch.setattr(robust, "SHARES", (0.0, 0.75))

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["robust.py", *map(str, argv)])
        robust.main()
        return capsys.readouterr().out

    return run


def inputs(n=3):
    generator = ma.seeded("cpu", "inputs")
    x = torch.randn(n, 4, 8, 8, generator=generator)
    return x, torch.rand(n, generator=generator), torch.arange(n), torch.randn(n, 16)


# ---- 1. Disturbed sampling
@pytest.mark.parametrize("method", ["repa", "reg", "maskalign"])
def test_where_nothing_is_dropped_the_sampler_is_the_plain_one(method):
    network = trained_looking(tiny(method=method))
    x, _, y, cls = inputs()
    cls = cls if network.class_token else None
    dropper = robust.TokenDropper(network, 0.0, ma.seeded("cpu", 1))
    plain = ma.euler_ode(network, x, y, cls, num_steps=4)
    assert torch.equal(ma.euler_ode(dropper, x, y, cls, num_steps=4), plain)
    dropper = robust.TokenDropper(network, 0.5, ma.seeded("cpu", 1))
    assert not torch.allclose(ma.euler_ode(dropper, x, y, cls, num_steps=4), plain)


def test_images_without_a_drop_are_those_of_effect(runs, tmp_path):
    path = robust.checkpoint(runs / "reg-0", 3)
    flags = [f"--{name}={value}" for name, value in effect.SAMPLES.items()]
    sample.main(argv=[str(path), *flags, f"--out={tmp_path / 'images.npz'}"])
    _, model, config = figure2.load_model(path)
    images = robust.generate(model.eval(), config, 0.0, "cpu").permute(0, 2, 3, 1)
    assert np.array_equal(images, np.load(tmp_path / "images.npz")["arr_0"])


def test_a_kept_token_has_its_own_velocity_and_a_dropped_one_its_last():
    network = trained_looking(tiny())
    x, t, y, cls = inputs()
    dropper = robust.TokenDropper(network, 0.5, ma.seeded("cpu", 1))
    generator = ma.seeded("cpu", 1)
    last = network(x, t, y, cls).v
    assert torch.equal(dropper(x, t, y, cls).v, last)  # the first call drops nothing
    for _ in range(3):
        x = x + 1
        out = dropper(x, t, y, cls)
        ids_keep = ma.sample_token_subset(torch.rand(3, 16, generator=generator), 0.5)
        by_hand = network(x, t, y, cls, ids_keep)
        assert ids_keep.shape == (3, 8) and torch.equal(out.v_cls, by_hand.v_cls)
        for i in range(3):
            for j in range(16):
                where = (ids_keep[i] == j).nonzero()
                v = by_hand.v[i, where.item()] if len(where) else last[i, j]
                assert torch.equal(out.v[i, j], v)
        last = out.v


class Spy:
    """Keeps what it is told to keep, and predicts zeros."""

    patch_size = 4

    def __init__(self):
        self.seen = []

    def __call__(self, x, t, y, cls, ids_keep=None):
        self.seen.append(ids_keep)
        num_kept = 36 if ids_keep is None else ids_keep.shape[1]
        return ma.SiTOutput(torch.zeros(len(x), num_kept, 48), torch.zeros_like(cls), None)


def test_masks_are_the_same_for_all_networks_and_others_in_each_step_and_batch():
    found = {}
    for method, share in (("reg", 0.25), ("maskalign", 0.25), ("maskalign", 0.75)):
        spy = Spy()
        config = ma.make_config(method=method, num_classes=8, z_dim=16)
        assert robust.generate(spy, config, share, "cpu").shape == (COUNT, 3, 24, 24)
        assert spy.seen.pop(3) is None and spy.seen.pop(0) is None  # first steps of two batches
        found[method, share] = spy.seen
    first, second, *others = found["reg", 0.25]
    assert first.shape == (64, 27) and [len(ids) for ids in others] == [6, 6]
    assert not torch.equal(first, second) and not torch.equal(first[:6], others[0])
    for ids, again in zip(found["reg", 0.25], found["maskalign", 0.25], strict=True):
        assert torch.equal(ids, again)
    for many, few in zip(found["reg", 0.25], found["maskalign", 0.75], strict=True):
        assert torch.equal(many[:, :9], few)  # what 25% drops, 75% drops, too


# ---- 2. The command
def test_each_checkpoint_is_measured_once_and_seeds_are_summarised(
    runs, command, tmp_path, monkeypatch
):
    out = f"--out={tmp_path}"
    assert "| `maskalign` | 3 | 1 |" in command(runs, "--methods=maskalign", "--steps=3", out)
    shown = command(runs, "--steps", 3, 7, out)
    points = json.loads((tmp_path / "robust.json").read_text())["points"]
    places = [(p["method"], p["seed"], p["step"]) for p in points]
    assert places == [("maskalign", 0, 3), ("reg", 0, 3), ("reg", 0, 7), ("reg", 12, 3)]
    for point in points:
        assert -1 <= point["align"] <= 1 and point["gap"] != 0
        assert point["fd 0%"] > 0 and point["fd 75%"] != point["fd 0%"]
    lines = shown.splitlines()
    gap = [p["gap"] for p in points if p["method"] == "reg" and p["step"] == 3]
    cell = f"{np.mean(gap):.4f} ± {np.std(gap, ddof=1):.4f}"
    assert any(line.startswith(f"| `reg` | 3 | 2 | {cell} |") for line in lines)
    monkeypatch.setattr(figure2, "set_up", pytest.fail)  # nothing is measured again
    assert command(runs, "--steps", 3, 7, out) == shown


def test_the_gap_is_that_of_figure2(runs):
    _, model, config = figure2.load_model(robust.checkpoint(runs / "reg-0", 3))
    options = figure2.parse_args(["run", "--images=8", "--masks=2"])
    shared = figure2.set_up(config, options)
    found = robust.measure_alignment(model, shared, 0.25)
    gap = figure2.measure_gap(model, shared, options)["all"]["mean"]
    assert found["gap"] == pytest.approx(gap, rel=1e-4)


def test_a_folder_without_checkpoints_is_refused_in_one_sentence(command, tmp_path):
    with pytest.raises(AssertionError, match="has no checkpoints of .*'reg'.* at steps"):
        command(tmp_path)
    assert not list(tmp_path.iterdir())
