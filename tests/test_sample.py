"""sample.py: bytes that depend on (seed, index) alone, runs that go on, and published weights."""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_cases import CASES, assert_golden, ids, inputs, weights
from PIL import Image
from processes import start_ranks
from test_sampler import replay
from torch import nn

import maskalign
import sample
from maskalign import BadInput, Config, SiT, build_model, make_config, patchify
from sample import euler_maruyama, euler_ode

TINY = dict(hidden_size=32, num_heads=2, depth=3, align_depth=2, projector_dim=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny run of ours: weights with values, as after training, and class names."""
    names = tuple(maskalign.SHAPES)
    config = make_config(**TINY, num_classes=8, z_dim=64, class_names=names)
    path = tmp_path_factory.mktemp("run") / "latest.pt"
    return save(build_model(config), config, path)


def save(model, config, path):
    """A checkpoint as a run of maskalign.py writes it, with made-up weights."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: 0.2 * torch.randn(p.shape, generator=generator)
        for name, p in model.state_dict().items()
    }
    raw = {name: value + 0.05 for name, value in state.items()}
    torch.save(dict(model=raw, ema=state, step=1, config=dataclasses.asdict(config)), path)
    return path


def run(checkpoint, *argv):
    return sample.run(sample.parse_args([str(checkpoint), "--steps=2", *map(str, argv)]))


def images_of(path):
    with np.load(path) as data:
        return data["arr_0"]


def test_a_bare_checkpoint_gives_a_labelled_grid(checkpoint, capsys):
    path = run(checkpoint)
    assert path == checkpoint.with_name("grid.png") and str(path) in capsys.readouterr().out
    assert Image.open(path).size == (8 * 98 + 2 + 80, 8 * 98 + 2)


def test_classes_are_chosen_by_number_or_name(checkpoint, tmp_path):
    one = run(checkpoint, "--classes=7,star", "--per_class=3", f"--out={tmp_path}/a.png")
    two = run(checkpoint, "--classes=heart, 3", "--per_class=3", f"--out={tmp_path}/b.png")
    assert Image.open(one).size == (3 * 98 + 2 + 80, 2 * 98 + 2)
    assert one.read_bytes() == two.read_bytes()


def test_trajectory_starts_with_noise_and_ends_with_the_image(checkpoint, tmp_path):
    film = run(
        checkpoint, "--trajectory", "--classes=0,1", "--steps=9", f"--out={tmp_path}/film.png"
    )
    grid = run(
        checkpoint, "--classes=0,1", "--per_class=1", "--steps=9", f"--out={tmp_path}/grid.png"
    )
    pixels, last = np.array(Image.open(film)), np.array(Image.open(grid))
    assert pixels.shape == (2 * 98 + 2, 9 * 98 + 2 + 80, 3)
    assert np.array_equal(pixels[:98, 82 + 8 * 98 : 82 + 8 * 98 + 96], last[:98, 82 : 82 + 96])


@pytest.mark.parametrize("sampler", ["sde", "ode", "heun"])
def test_bytes_do_not_depend_on_the_batch_size(checkpoint, tmp_path, sampler):
    options = ["--num=21", f"--sampler={sampler}", "--cfg_scale=2"]
    files = [
        run(checkpoint, *options, f"--batch_size={size}", f"--out={tmp_path}/{size}.npz")
        for size in (1, 64)
    ]
    first, *others = map(images_of, files)
    assert first.shape == (21, 24, 24, 3) and first.dtype == np.uint8 and len(np.unique(first)) > 50
    assert all(np.array_equal(first, other) for other in others)


def test_bytes_do_not_depend_on_how_many_are_asked_for(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "SHARD", 5)  # shards that cut through groups
    many = images_of(run(checkpoint, "--num=19", f"--out={tmp_path}/many.npz"))
    monkeypatch.setattr(sample, "SHARD", 256)
    few = images_of(run(checkpoint, "--num=11", f"--out={tmp_path}/few.npz"))
    assert np.array_equal(many[:11], few)
    other = images_of(run(checkpoint, "--num=11", "--seed=1", f"--out={tmp_path}/other.npz"))
    assert not np.array_equal(few, other)


def test_two_processes_write_the_images_of_one(checkpoint, tmp_path):
    """But for rounding: where each has fewer threads, sums differ with their number."""
    one = run(checkpoint, "--num=260", f"--out={tmp_path}/one.npz")
    argv = ["--steps=2", "--num_images=260", f"--out={tmp_path}/two.npz"]
    ends = [rank.end() for rank in start_ranks(2, "sample.py", checkpoint, *argv)]
    assert [status for status, *_ in ends] == [0, 0], ends
    difference = np.abs(images_of(one).astype(int) - images_of(tmp_path / "two.npz"))
    assert difference.max() <= 1 and difference.mean() < 1e-3
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "one.json",
        "one.npz",
        "two.json",
        "two.npz",
    ]


def test_a_killed_run_goes_on_without_doing_finished_shards_again(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(sample, "SHARD", 8)
    whole = images_of(run(checkpoint, "--num=24", f"--out={tmp_path}/whole.npz"))
    calls, work = [], sample.in_batches

    def count(*args):
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return work(*args)

    monkeypatch.setattr(sample, "in_batches", count)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, "--num=24", f"--out={tmp_path}/cut.npz")
    assert not (tmp_path / "cut.npz").exists()
    assert np.array_equal(
        images_of(run(checkpoint, "--num=24", f"--out={tmp_path}/cut.npz")), whole
    )
    assert calls == [0, 8, 8, 16] and not (tmp_path / "cut.npz.parts").exists()


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """The images of a run that nothing disturbed."""
    return images_of(run(checkpoint, "--num=32", f"--out={tmp_path_factory.mktemp('x')}/x.npz"))


@pytest.mark.parametrize("target", ["--out=x.npz", "--png=x"])
@pytest.mark.parametrize("damaged", ["000001.raw", "protocol.json"])
@pytest.mark.parametrize("left", [0, 40], ids=["empty", "truncated"])
def test_what_was_cut_short_is_done_again(
    target, damaged, left, checkpoint, whole, tmp_path, monkeypatch
):
    """The mark of a shard of PNG files is empty when it is whole."""
    monkeypatch.setattr(sample, "SHARD", 16)
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sample, "finish", lambda *args: None)  # as a kill before it
        run(checkpoint, "--num=32", target)
    file = Path("x" if target == "--png=x" else "x.npz.parts", damaged)
    content = file.read_bytes()
    file.write_bytes(content[:left] if content else bytes(left))
    done, draw = [], sample.in_batches
    monkeypatch.setattr(sample, "in_batches", lambda *a: done.append(a[1]) or draw(*a))
    path = run(checkpoint, "--num=32", target)
    redone = [16] if damaged == "000001.raw" else [0, 16]
    assert done == ([] if content == bytes(left) else redone)
    assert not [*tmp_path.glob("*.parts"), *tmp_path.glob("x/*.raw")]
    found = [np.array(Image.open(f)) for f in sorted(path.glob("*.png"))] or images_of(path)
    assert np.array_equal(found, whole)


@pytest.mark.parametrize(
    "name, target",
    [
        ("package.json", "--out=package.npz"),
        ("package.npz", "--out=package.npz"),
        ("package.npz.parts/notes.txt", "--out=package.npz"),
        ("x/protocol.json", "--png=x"),
        ("x/samples.json", "--png=x"),
        ("x/000000.png", "--png=x"),
    ],
)
@pytest.mark.parametrize("content", ['{"name": "package"}', "hello"])
def test_files_from_elsewhere_are_never_replaced(
    name, target, content, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    with pytest.raises(BadInput, match="name another") as caught:
        run(checkpoint, "--num=8", target)
    assert "\n" not in str(caught.value) and file.read_text() == content
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_shards_of_other_settings_are_not_mixed_in(checkpoint, tmp_path, monkeypatch):
    join = SimpleNamespace(ZipFile=lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(sample, "zipfile", join)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, "--num=8", f"--out={tmp_path}/x.npz")
    with pytest.raises(
        BadInput, match="x.npz.parts holds other files, or images of other settings: name"
    ):
        run(checkpoint, "--num=8", "--cfg_scale=3", f"--out={tmp_path}/x.npz")


def test_a_finished_run_is_not_done_again(checkpoint, tmp_path, monkeypatch):
    for target in (f"--out={tmp_path}/x.npz", f"--png={tmp_path}/png"):
        path = run(checkpoint, "--num=8", target)
        with monkeypatch.context() as patch:
            patch.setattr(sample, "in_batches", None)
            assert run(checkpoint, "--num=8", target) == path
    with pytest.raises(BadInput, match="png holds other files, or images of other settings"):
        run(checkpoint, "--num=4", f"--png={tmp_path}/png")  # old files would stay among the new


def test_images_of_other_settings_are_never_passed_off_as_the_new_ones(
    checkpoint, tmp_path, monkeypatch
):
    """A kill while the new npz is joined leaves the old one there, but no record of it."""
    run(checkpoint, "--num=8", f"--out={tmp_path}/x.npz")
    join = SimpleNamespace(ZipFile=lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    again = ("--num=8", "--seed=1", f"--out={tmp_path}/x.npz")
    with monkeypatch.context() as patch:
        patch.setattr(sample, "zipfile", join)
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, *again)
    assert (tmp_path / "x.npz").exists() and not (tmp_path / "x.json").exists()
    found = images_of(run(checkpoint, *again))
    other = run(checkpoint, "--num=8", "--seed=1", f"--out={tmp_path}/other.npz")
    assert np.array_equal(found, images_of(other))


def test_labels_are_random_by_default_and_balanced_on_request(checkpoint, tmp_path):
    seen, sampler = [], sample.SAMPLERS["sde"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            sample.SAMPLERS,
            "sde",
            lambda m, x, y, *a, **k: seen.append(y.tolist()) or sampler(m, x, y, *a, **k),
        )
        run(checkpoint, "--num=64", f"--out={tmp_path}/a.npz")
        run(checkpoint, "--num=64", "--labels=balanced", f"--out={tmp_path}/b.npz")
    labels = sum(seen, [])
    random, balanced = labels[:64], labels[64:]
    assert balanced == [i % 8 for i in range(64)]
    assert set(random) == set(range(8)) and random != balanced


def test_png_files_hold_the_same_images_as_the_npz(checkpoint, tmp_path):
    images = images_of(run(checkpoint, "--num=10", f"--out={tmp_path}/x.npz"))
    folder = run(checkpoint, "--num=10", f"--png={tmp_path}/png")
    files = sorted(folder.glob("*.png"))
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(10)]
    assert np.array_equal([np.array(Image.open(file)) for file in files], images)
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".png") == ["samples.json"]


def test_the_protocol_is_printed_and_stored(checkpoint, tmp_path, capsys):
    run(checkpoint, "--num=8", f"--out={tmp_path}/x.npz")
    stored = json.loads((tmp_path / "x.json").read_text())
    assert stored["sampler"] == "sde" and stored["cfg_scale"] == 1.0 and stored["weights"] == "ema"
    assert stored["precision"] == "float32" and len(stored["checkpoint"]) == 16
    shown = capsys.readouterr().out
    assert all(f"{name} {value}" in shown for name, value in stored.items())


def test_presets_are_those_of_the_help_and_typed_flags_win():
    grid, fid = sample.parse_args(["x"]), sample.parse_args(["x", "--num=9"])
    assert (grid.sampler, grid.steps, grid.cfg_scale) == ("ode", 25, 2.0)
    assert (fid.sampler, fid.steps, fid.cfg_scale) == ("sde", 250, 1.0)  # as the papers
    assert (fid.guidance_low, fid.guidance_high, fid.labels) == (0.0, 1.0, "random")
    assert sample.parse_args(["x", "--sampler=heun", "--steps=7"]).steps == 7


def test_ema_weights_are_the_default_and_raw_ones_on_request(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    for raw, kind in ((False, "ema"), (True, "model")):
        model, _ = sample.load_checkpoint(str(checkpoint), raw)
        assert all(
            torch.equal(value, saved[kind][name]) for name, value in model.state_dict().items()
        )


def published(case, path, wrap=True):
    """A file as REPA's and REG's trainers write it: ema, and a pickled argparse.Namespace."""
    state = weights(case)
    torch.save(
        (
            dict(
                ema={f"module.{k}": v for k, v in state.items()},
                opt={},
                steps=1,
                args=argparse.Namespace(model="SiT"),
            )
            if wrap
            else state
        ),
        path,
    )
    return path


@ids("sampler/", without=["_10"])
@pytest.mark.parametrize("wrap", [True, False], ids=["trainer_file", "bare"])
def test_published_weights_give_the_official_samples_through_the_loader(
    case, wrap, tmp_path, monkeypatch
):
    path = published(case, tmp_path / "repa.pt", wrap)
    model, config = sample.load_checkpoint(path, num_heads=6)
    model, x = model.double(), inputs(case)
    noises = [
        x[f"{name}.{i}"]
        for i in range(case["num_steps"] - 1)
        for name in ("eps", "cls_eps")
        if f"{name}.{i}" in x
    ]
    replay(monkeypatch, noises)
    sampler = euler_maruyama if "sde" in case["id"] else euler_ode
    samples = sampler(
        model,
        x["latents"],
        x["y"],
        x.get("cls_latents"),
        num_steps=case["num_steps"],
        **case["sampler_args"],
    )
    assert_golden(samples, case, "samples")
    assert (config.num_classes, config.depth, config.image_size) == (1000, 2, 64)
    assert config.class_token == ("reg" in case["id"]) and config.z_dim == 48


@pytest.mark.golden
def test_the_original_sit_runs_in_our_time_through_the_loader(tmp_path):
    case = CASES["forward/sit_original_learn_sigma"]
    torch.save(weights(case), tmp_path / "sit.pt")
    model, config = sample.load_checkpoint(tmp_path / "sit.pt", num_heads=6)
    x = inputs(case)
    v = model.double()(x["x"], 1 - x["t"], x["y"]).v
    gold, found = case["outputs"]["velocity"], -maskalign.unpatchify(v, 2)
    assert found.shape == tuple(gold["shape"]) and config.align_coeff == 0.0
    values = found.flatten()[gold["idx"]]
    torch.testing.assert_close(
        values, torch.tensor(gold["val"], dtype=torch.float64), rtol=0, atol=2e-6
    )
    assert patchify(found, 2).shape == v.shape


def test_sras_training_head_is_left_out(tmp_path):
    case = CASES["loss/sra_linear"]
    torch.save({"ema": weights(case)}, tmp_path / "sra.pt")
    model, config = sample.load_checkpoint(tmp_path / "sra.pt", num_heads=6)
    assert not model.projectors and config.align_coeff == 0.0 and len(model.blocks) == 4
    weight = dict(weights(case))["blocks.3.attn.qkv.weight"]
    assert torch.equal(model.blocks[3].attn.qkv.weight.double(), weight.float().double())


@dataclasses.dataclass(frozen=True)
class ForkConfig(Config):
    """What a fork adds: a method of its name, settings that sample.py does not know."""

    method: str = maskalign.setting("fork")
    tau: int = maskalign.setting(250_000, "a setting of its own")
    levels: tuple = maskalign.setting(((1, 2), (3, 4)))


def fork_file(path, projector, **changes):
    """A checkpoint of a fork with another projector than REPA's, and its config."""
    options = TINY | dict(num_classes=8, z_dim=64, class_names=tuple(maskalign.SHAPES)) | changes
    config = make_config(ForkConfig, **options)
    model = build_model(config)
    model.projectors = nn.ModuleList(projector)
    return save(model, config, path), config


def repas_projector(hidden=16):
    first = [nn.Linear(32, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()]
    return nn.Sequential(*first, nn.Linear(hidden, 64))


def test_a_fork_with_a_projector_as_repas_keeps_it(tmp_path):
    """As HASTE: the network is REPA's, the config has more fields."""
    path, _ = fork_file(tmp_path / "latest.pt", [repas_projector()], align_coeff=0.3)
    model, config = sample.load_checkpoint(path)
    assert type(config) is Config and config.method == "fork" and config.align_coeff == 0.3
    saved = torch.load(path, weights_only=True)["ema"]
    assert model.state_dict().keys() == saved.keys() and "projectors.0.4.weight" in saved
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "projector",
    [
        [nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32))],  # SRA's
        [nn.Conv2d(32, 64, 3, padding=1)],  # iREPA's
        [repas_projector(hidden=24)],
        [repas_projector(), repas_projector()],
        [],
    ],
    ids=["two_layers", "convolution", "other_width", "two_teachers", "none"],
)
def test_a_fork_with_another_projector_is_drawn_without_it(projector, tmp_path):
    path, _ = fork_file(tmp_path / "latest.pt", projector)
    model, config = sample.load_checkpoint(path)
    assert config.align_coeff == 0.0 and not model.projectors
    saved = torch.load(path, weights_only=True)["ema"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert run(path, "--classes=star", "--per_class=1") == tmp_path / "grid.png"


def test_a_fork_draws_with_its_own_config_network_and_sampler(tmp_path, monkeypatch, capsys):
    class Fork(SiT):
        def __init__(self, config):
            super().__init__(config)
            self.gain = nn.Parameter(torch.ones(()))
            self.tau = config.tau

    def own_sampler(model, x, y, cls=None, **options):
        seen.append((type(model), model.tau, x.shape, options["num_steps"]))
        return torch.ones_like(x)

    names = tuple(maskalign.SHAPES)
    config = make_config(ForkConfig, **TINY, num_classes=8, class_names=names, z_dim=64, tau=7)
    path, seen = save(Fork(config), config, tmp_path / "latest.pt"), []
    with pytest.raises(BadInput, match="holds no SiT that fits: .*gain"):
        sample.load_checkpoint(path)
    model, config = sample.load_checkpoint(path, kind=ForkConfig, build_model=Fork)
    assert type(config) is ForkConfig and config.levels == ((1, 2), (3, 4)) and model.projectors

    monkeypatch.setattr(sys, "argv", ["fork.py", str(path), "--num=3", f"--out={tmp_path}/x.npz"])
    sample.main(kind=ForkConfig, build_model=Fork, samplers=dict(own=own_sampler))
    assert seen == [(Fork, 7, (16, 3, 24, 24), 250)]
    assert "method fork" in (shown := capsys.readouterr().out) and "sampler own" in shown
    assert (images_of(tmp_path / "x.npz") == 191).all()  # 1 in the latents is 0.5 in [-1, 1]
    monkeypatch.setattr(sys, "argv", ["fork.py", str(path), "--steps=0"])
    with pytest.raises(SystemExit, match="^fork.py: steps is 0"):
        sample.main(kind=ForkConfig, build_model=Fork, samplers=dict(own=own_sampler))
    monkeypatch.setattr(sys, "argv", ["fork.py", str(path), "--sampler=sde"])
    with pytest.raises(SystemExit):
        sample.main(samplers=dict(own=own_sampler))
    assert "invalid choice: 'sde'" in capsys.readouterr().err


def test_published_sizes_are_recognised_by_their_shapes(tmp_path):
    config = make_config(data="x", size="SiT-S/2", method="maskalign", num_classes=10)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in build_model(config).state_dict().items()}
    state = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}  # a small file
    torch.save(state, tmp_path / "bare.pt")
    _, found = sample.load_checkpoint(tmp_path / "bare.pt")
    same = (
        "hidden_size",
        "depth",
        "num_heads",
        "patch_size",
        "align_depth",
        "mixer_depth",
        "class_token",
        "num_classes",
        "z_dim",
        "projector_dim",
        "image_size",
        "vae",
    )
    assert all(getattr(found, name) == getattr(config, name) for name in same)


def test_repas_first_files_number_the_later_blocks_anew():
    old = {"blocks.0.a": 0, "blocks.1.a": 1, "decoder_blocks.0.a": 2, "decoder_blocks.1.a": 3}
    assert sample.merge_halves(old) == {f"blocks.{i}.a": i for i in range(4)}


@pytest.mark.parametrize(
    "content, message",
    [
        ({"weight": torch.zeros(2)}, "holds no SiT that fits: name another"),
        ({1: torch.zeros(2)}, "holds no SiT that fits: name another"),
        ([1, 2], "holds no state dict|cannot read"),
        ({"step": 1, "config": {}}, "holds no state dict"),
        ({"ema": None, "model": {}}, "holds no state dict called ema"),
        ({"model": {}, "config": {}}, "holds no state dict called ema"),
        ({"ema": {}, "config": {"hidden_size": 32, "depth": 8}}, "holds no SiT that fits"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_one_sentence(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=message) as caught:
        sample.load_checkpoint(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ([], "'list' object has no"),
        ("a", "'str' object has no"),
        (dict(depth=-1), "depth is -1: it must be above 0"),
        (dict(hidden_size="32"), "str"),
        (dict(patch_size=2.0), "patch_size is 2.0"),
        (dict(class_token=1), "class_token is 1"),
        (dict(num_heads=0), "num_heads is 0: it must be above 0"),
        (dict(num_heads=5), "num_heads is 5: it must be a divisor of 32"),
        (dict(hidden_size=64), "size mismatch for pos_embed"),
        (dict(image_size=25), "image_size is 25: it must be a multiple of 4"),
        (dict(size=3), "size is 3"),
        (dict(method=None), "method is None"),
        (dict(class_names=("a", "b")), r"class_names are \('a', 'b'\)"),
        (dict(class_names=tuple(range(8))), r"class_names are \(0, 1"),
        (dict(class_names=7), "TypeError"),
        (dict(mask_ratio=float("nan")), "mask_ratio is nan"),
    ],
    ids=str,
)
def test_a_config_that_describes_no_network_is_one_sentence(changes, message, checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    saved["config"] = saved["config"] | changes if isinstance(changes, dict) else changes
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=f"holds no SiT that fits: .*{message}") as caught:
        sample.load_checkpoint(tmp_path / "x.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), 1e300])
def test_weights_that_are_not_finite_are_not_sampled(value, checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    bias = saved["ema"]["blocks.0.attn.proj.bias"].double()  # 1e300 is not finite in float32
    saved["ema"]["blocks.0.attn.proj.bias"] = bias.index_fill(0, torch.tensor(3), value)
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(BadInput, match="x.pt holds weights that are not finite: name an earlier"):
        sample.load_checkpoint(tmp_path / "x.pt")
    sample.load_checkpoint(tmp_path / "x.pt", raw=True)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--classes=9"], "unknown class '9': choose from 0 to 7, disc, square"),
        (["--classes=dog"], "unknown class 'dog'"),
        (["--steps=0"], "steps is 0"),
        (["--png=x"], "png is x: it must be used with --num_images"),
        (["--num=-1"], "num is -1"),
        (["--num=8", "--out=x"], "out is x: it must be a name that ends with .npz"),
        (["--out=x.npz"], "out is x.npz: it must be a name that ends with .png"),
        (["--cfg_scale=0.5"], "cfg_scale is 0.5: it must be 1 .no guidance. or above"),
        (["--guidance_low=nan"], "guidance_low is nan"),
        (
            ["--guidance_low=0.8", "--guidance_high=0.2"],
            "guidance_low is 0.8: .* at most guidance_h",
        ),
        (["--guidance_high=1.5"], "both between 0 and 1"),
        (["--num=8", "--classes=3"], "classes is 3: it must be used without --num_images"),
        (["--num=8", "--per_class=3"], "per_class is 3: it must be used without --num_images"),
        (["--num=8", "--trajectory"], "trajectory is True: it must be used without --num_images"),
        (["--num=8", "--png=x", "--out=x.npz"], "out is x.npz: it must be used without --png"),
        (["--trajectory", "--per_class=3"], "per_class is 3: it must be used for grids alone"),
        (["--labels=balanced"], "labels is balanced: it must be used with --num_images"),
        (["--out=.png"], "out is .png: it must be a name that ends with .png"),
        (["--out="], "out is : it must be a name that ends with .png"),
    ],
)
def test_bad_input_is_one_sentence(checkpoint, argv, message):
    with pytest.raises(BadInput, match=message):
        run(checkpoint, *argv)


def test_a_full_disk_is_one_sentence_and_finished_shards_stay(
    checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sample, "SHARD", 8)
    sync, saved = os.fsync, []

    def disk_full(file):
        saved.append(1)
        if len(saved) == 3:  # of the protocol and two shards
            raise OSError(28, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", disk_full)
    monkeypatch.setattr(
        sys,
        "argv",
        ["sample.py", str(checkpoint), "--num=24", "--steps=2", f"--out={tmp_path}/x.npz"],
    )
    with pytest.raises(
        SystemExit, match="cannot write: .*No space left on device; finished shards stay"
    ):
        sample.main()
    assert (tmp_path / "x.npz.parts" / "000000.raw").exists()
    sample.main()
    assert len(images_of(tmp_path / "x.npz")) == 24
