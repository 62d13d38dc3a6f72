"""sample.py: images that depend on (seed, index) alone, runs that continue, published weights."""

import argparse
import dataclasses
import json
import os
from pathlib import Path

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
from maskalign import Config, SiT, make_config, patchify
from sample import SAMPLERS, load_checkpoint

TINY = dict(hidden_size=32, num_heads=2, depth=3, align_depth=2, projector_dim=16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny run of ours: weights with values, as after training, and class names."""
    names = tuple(maskalign.SHAPES)
    config = make_config(**TINY, num_classes=8, z_dim=64, class_names=names)
    return save(config, tmp_path_factory.mktemp("run") / "latest.pt")


def save(config, path, build_model=SiT, **more):
    """A checkpoint as a run of maskalign.py writes it, with made-up weights."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: 0.2 * torch.randn(p.shape, generator=generator)
        for name, p in build_model(config).state_dict().items()
    }
    raw = {name: value + 0.05 for name, value in state.items()}
    saved = dict(model=raw, ema=state, step=1, config=dataclasses.asdict(config) | more)
    torch.save(saved, path)
    return path


def run(checkpoint, *argv):
    """The path that the command prints last."""
    sample.main(argv=[str(checkpoint), "--steps=2", *map(str, argv)])


def images_of(path):
    with np.load(path) as data:
        return data["arr_0"]


def many(checkpoint, out, *argv):
    run(checkpoint, f"--out={out}", *argv)
    return images_of(out)


# ---- pictures


def test_a_bare_checkpoint_gives_a_labelled_grid_and_prints_its_path_alone(checkpoint, capsys):
    run(checkpoint)
    path = checkpoint.with_name("grid.png")
    assert capsys.readouterr().out == f"{path}\n"
    assert Image.open(path).size == (8 * 98 + 2 + 80, 8 * 98 + 2)


def test_classes_are_chosen_by_number_or_name(checkpoint, tmp_path):
    run(checkpoint, "--classes=7,flower", "--per_class=3", f"--out={tmp_path}/a.png")
    run(checkpoint, "--classes=heart, 3", "--per_class=3", f"--out={tmp_path}/b.png")
    assert Image.open(tmp_path / "a.png").size == (3 * 98 + 2 + 80, 2 * 98 + 2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def labels_of(text, names=(), num_classes=8):
    config = make_config(num_classes=num_classes, class_names=tuple(names))
    return sample.parse_classes(text, config)


def test_a_name_comes_before_a_number_and_may_have_commas():
    folders = [str(k) for k in sorted(map(str, range(1, 12)))]  # 1, 10, 11, 2, 3, ...
    assert labels_of("1", folders, 11) == [0] and labels_of("2,1", folders, 11) == [3, 0]
    names = ["tench, Tinca tinca", "goldfish, Carassius auratus"]
    assert labels_of("goldfish, Carassius auratus", names, 2) == [1]
    assert labels_of("goldfish, Carassius auratus; tench, Tinca tinca", names, 2) == [1, 0]
    with pytest.raises(AssertionError, match="dog"):
        labels_of("dog", ["cat"], 1)
    with pytest.raises(AssertionError, match="9"):
        labels_of("9")


def test_without_classes_all_are_shown_or_eight_of_many():
    assert labels_of("", num_classes=10) == list(range(10)) and labels_of("", num_classes=1) == [0]
    eight = labels_of("", num_classes=1000)
    assert len(eight) == 8 and eight[0] == 0 and eight[-1] == 999 and eight == sorted(eight)


def test_trajectory_starts_with_noise_and_ends_with_the_image(checkpoint, tmp_path):
    args = ("--classes=0,1", "--steps=12")
    run(checkpoint, *args, "--trajectory", f"--out={tmp_path}/film.png")
    run(checkpoint, *args, "--per_class=1", f"--out={tmp_path}/grid.png")
    film, last = (np.array(Image.open(tmp_path / f"{name}.png")) for name in ("film", "grid"))
    assert film.shape == (2 * 98 + 2, 11 * 98 + 2 + 80, 3)
    end = slice(82 + 10 * 98, 82 + 10 * 98 + 96)
    assert np.array_equal(film[:98, end], last[:98, 82 : 82 + 96])
    assert film[2:98, 82 : 82 + 96].std() > 50  # noise
    moving = Image.open(tmp_path / "film.gif")
    assert moving.n_frames == 11 and moving.size == (98 + 2 + 80, 2 * 98 + 2)
    moving.seek(10)
    assert moving.info["duration"] >= 1000  # it rests at the end


def test_the_ode_hands_out_the_states_on_its_way(checkpoint):
    model, config = load_checkpoint(checkpoint)
    x, cls, states = torch.randn(2, 3, 24, 24), torch.randn(2, 64), []
    out = sample.euler_ode(model, x, torch.tensor([0, 1]), cls, num_steps=5, states=states)
    assert len(states) == 5 and torch.equal(states[0], x.double())
    steps = [(b - a).abs().mean() for a, b in zip(states, [*states[1:], out], strict=True)]
    assert all(step > 0 for step in steps)


# ---- many images


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_do_not_depend_on_the_batch_size_or_on_how_many_are_asked_for(
    checkpoint, tmp_path, sampler
):
    options = [f"--sampler={sampler}", "--cfg_scale=2"]
    few = many(checkpoint, tmp_path / "few.npz", "--num_images=7", *options, "--batch_size=2")
    more = many(checkpoint, tmp_path / "more.npz", "--num_images=12", *options)
    assert more.shape == (12, 24, 24, 3) and more.dtype == np.uint8 and len(np.unique(more)) > 50
    difference = np.abs(few.astype(int) - more[:7])
    assert difference.max() <= 1 and difference.mean() < 1e-3  # rounding
    other = many(checkpoint, tmp_path / "other.npz", "--num_images=7", *options, "--seed=1")
    assert np.abs(few.astype(int) - other).mean() > 5


def test_two_processes_write_the_images_of_one(checkpoint, tmp_path):
    one = many(checkpoint, tmp_path / "one.npz", "--num_images=40", "--batch_size=8")
    argv = ["--steps=2", "--num_images=40", "--batch_size=8", f"--out={tmp_path}/two.npz"]
    ends = [rank.end() for rank in start_ranks(2, "sample.py", checkpoint, *argv)]
    assert [status for status, *_ in ends] == [0, 0], ends
    difference = np.abs(one.astype(int) - images_of(tmp_path / "two.npz"))
    assert difference.max() <= 1 and difference.mean() < 1e-3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.npz", "two.npz"]


def test_a_killed_run_continues_and_keeps_what_is_finished(checkpoint, tmp_path, monkeypatch):
    flags = ("--num_images=24", "--batch_size=8")
    whole = many(checkpoint, tmp_path / "whole.npz", *flags)
    replace, written = os.replace, []

    def killed(beside, path):
        if len(written) == 1:  # in the second batch; the file beside is whole, but not renamed
            raise KeyboardInterrupt
        written.append(path)
        replace(beside, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            many(checkpoint, tmp_path / "cut.npz", *flags)
    assert not (tmp_path / "cut.npz").exists()
    made, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda job, i, y: made.append(i) or generate(job, i, y))
    cut = many(checkpoint, tmp_path / "cut.npz", *flags)
    assert np.array_equal(cut, whole) and made == [range(8, 16), range(16, 24)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.npz", "whole.npz"]


def test_images_of_other_settings_never_mix(checkpoint, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sample, "join", killed)
        with pytest.raises(KeyboardInterrupt):
            many(checkpoint, tmp_path / "x.npz", "--num_images=8", "--seed=1")
    found = many(checkpoint, tmp_path / "x.npz", "--num_images=8")
    assert np.array_equal(found, many(checkpoint, tmp_path / "y.npz", "--num_images=8"))
    for other in ("--seed=1", "--cfg_scale=3", "--batch_size=4", "--steps=3", "--labels=balanced"):
        with pytest.raises(AssertionError, match="x.npz has other settings"):
            many(checkpoint, tmp_path / "x.npz", "--num_images=8", other)
    assert np.array_equal(found, images_of(tmp_path / "x.npz"))


def test_a_finished_run_is_not_done_again(checkpoint, tmp_path, monkeypatch):
    first = many(checkpoint, tmp_path / "x.npz", "--num_images=8")
    monkeypatch.setattr(sample, "generate", None)
    assert np.array_equal(many(checkpoint, tmp_path / "x.npz", "--num_images=8"), first)


def test_settings_are_printed_and_stored_in_the_npz(checkpoint, tmp_path, capsys):
    sample.main(argv=[str(checkpoint), "--num_images=3", "--steps=2", f"--out={tmp_path}/x.npz"])
    with np.load(tmp_path / "x.npz") as file:
        stored = json.loads(str(file["settings"]))
    assert stored["sampler"] == "sde" and stored["cfg_scale"] == 1.0 and stored["vae"] == "none"
    assert stored["steps"] == 2 and stored["labels"] == "random" and stored["num_images"] == 3
    assert len(stored["checkpoint"]) == 16
    shown = capsys.readouterr().out
    assert str(stored) in shown


def test_an_npz_is_read_by_numpy_and_has_the_format_of_adm(checkpoint, tmp_path):
    """Stored, not compressed, so that it is read as a stream."""
    import zipfile

    many(checkpoint, tmp_path / "x.npz", "--num_images=5")
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        kinds = {info.filename: info.compress_type for info in archive.infolist()}
    assert kinds == {"arr_0.npy": zipfile.ZIP_STORED, "settings.npy": zipfile.ZIP_STORED}


def test_labels_are_random_by_default_and_balanced_on_request(checkpoint, tmp_path):
    seen, sampler = [], SAMPLERS["sde"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            SAMPLERS,
            "sde",
            lambda m, x, y, *a, **k: seen.append(y.tolist()) or sampler(m, x, y, *a, **k),
        )
        many(checkpoint, tmp_path / "a.npz", "--num_images=64")
        many(checkpoint, tmp_path / "b.npz", "--num_images=64", "--labels=balanced")
    random, balanced = seen
    assert balanced == [i % 8 for i in range(64)]
    assert set(random) == set(range(8)) and random != balanced


def test_classes_are_not_chosen_for_many_images(checkpoint, tmp_path, capsys):
    """They are of all classes: to ignore the choice would be silent and wrong."""
    for classes in ("--classes=3", "--classes=ring,disc"):
        with pytest.raises(SystemExit):
            many(checkpoint, tmp_path / "x.npz", "--num_images=2", classes)
    assert "not allowed with" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_one_class_is_drawn_and_balanced_as_any_number_is(tmp_path):
    path = save(make_config(**TINY, num_classes=1, z_dim=64), tmp_path / "latest.pt")
    run(path, "--per_class=2")
    assert Image.open(tmp_path / "grid.png").size == (2 * 98 + 2 + 80, 98 + 2)
    random = many(path, tmp_path / "a.npz", "--num_images=3")
    balanced = many(path, tmp_path / "b.npz", "--num_images=3", "--labels=balanced")
    assert np.array_equal(random, balanced)


@pytest.mark.parametrize("vae", ["none", "stabilityai/sd-vae-ft-ema"])
def test_a_vae_that_does_not_fit_the_network_is_an_error(vae, tmp_path, monkeypatch):
    """Pixels for a network of latents, and the other way round."""
    other = "x" if vae == "none" else "none"
    own = dict(image_size=32, patch_size=4, num_classes=1, z_dim=64, vae=other)
    path = save(make_config(**TINY, **own), tmp_path / "latest.pt")
    monkeypatch.setattr(maskalign, "build_vae", lambda config, device: None)
    with pytest.raises((AssertionError, RuntimeError)):
        run(path, f"--vae={vae}", "--per_class=1")
    assert not (tmp_path / "grid.png").exists()


def test_defaults_are_a_quick_grid_and_the_papers_setting():
    grid = sample.parse_args(["x"], SAMPLERS)
    paper = sample.parse_args(["x", "--num_images=9"], SAMPLERS)
    assert (grid.sampler, grid.steps) == ("ode", 25)
    assert (paper.sampler, paper.steps) == ("sde", 250)
    assert (paper.guidance_low, paper.guidance_high, paper.labels) == (0.0, 1.0, "random")
    assert sample.parse_args(["x", "--sampler=heun", "--steps=7"], SAMPLERS).steps == 7


def scale_used(checkpoint, tmp_path, *argv):
    used = []
    own = dict(ode=lambda m, x, *a, **settings: used.append(settings["cfg_scale"]) or x)
    sample.main(samplers=own, argv=[str(checkpoint), f"--out={tmp_path}/x.npz", *argv])
    return used[0]


def test_a_grid_is_guided_and_the_papers_setting_is_not(checkpoint, tmp_path):
    assert scale_used(checkpoint, tmp_path, "--num_images=1") == 1.0
    run(checkpoint, f"--out={tmp_path}/x.png")
    grid = ["--out=" + str(tmp_path / "grid.png"), "--per_class=1", "--classes=1"]
    assert scale_used(checkpoint, tmp_path, *grid) == 2.0


def test_guidance_is_refused_where_no_null_class_was_trained(tmp_path):
    """Also in a checkpoint of ours: its null row has its first values."""
    config = make_config(**TINY, num_classes=8, z_dim=64, label_dropout=0.0)
    path = save(config, tmp_path / "latest.pt")
    run(path, "--per_class=1", f"--out={tmp_path}/x.png")  # by default without
    for scale in (1.5, 0.5):
        with pytest.raises(AssertionError, match=f"cfg_scale {scale}"):
            run(path, f"--cfg_scale={scale}")


def test_a_tilde_is_the_home_folder(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    run("~/latest.pt", "--per_class=1", "--out=~/tilde.png")
    run("~/latest.pt", "--num_images=1", "--out=~/tilde.npz")
    assert (checkpoint.parent / "tilde.png").exists() and (checkpoint.parent / "tilde.npz").exists()

    def build_vae(config, device):
        raise FileNotFoundError(config.vae)

    monkeypatch.setattr(maskalign, "build_vae", build_vae)
    with pytest.raises(FileNotFoundError, match=str(checkpoint.parent / "vae.pth")):
        run("~/latest.pt", "--vae=~/vae.pth")


# ---- checkpoints


def test_the_averaged_weights_are_sampled_without_the_projector(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    model, config = load_checkpoint(checkpoint)
    assert config.align_coeff == 0.0 and model.projector is None and not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved["ema"][name])
        assert not torch.equal(value, saved["model"][name])


@ids("forward/repa", without=["SiT-B"])
def test_a_network_without_its_projector_gives_the_same_velocities(case, tmp_path):
    torch.save(dict(ema=weights(case)), tmp_path / "repa.pt")
    model, _ = load_checkpoint(tmp_path / "repa.pt", **told(case))
    x = inputs(case)
    v = model.double()(x["x"], x["t"], x["y"]).v
    assert_golden(maskalign.unpatchify(v, 2), case, "velocity")


def told(case):
    """What the user tells of a small published file."""
    c = case["config"]
    settings = dict(size="SiT-S/2", image_size=8 * c["input_size"], patch_size=c["patch_size"])
    settings |= dict(hidden_size=c["hidden_size"], depth=c["depth"], num_heads=c["num_heads"])
    settings |= dict(align_depth=1, method=case["id"].split("/")[1].split("_")[0])
    return settings | dict(z_dim=c["z_dims"][0] if "z_dims" in c else 768)


def published(case, path, wrap=True, **args):
    """A file as REPA's and REG's trainers write it: ema, and a pickled argparse.Namespace."""
    state = weights(case)
    prefixed = {f"module._orig_mod.{k}": v for k, v in state.items()}
    told = argparse.Namespace(**{"model": "SiT-XL/2", "path_type": "linear", **args})
    torch.save(dict(ema=prefixed, opt={}, steps=1, args=told) if wrap else state, path)
    return path


@ids("sampler/", without=["_10"])
@pytest.mark.parametrize("wrap", [True, False], ids=["trainer_file", "bare"])
def test_published_weights_give_the_official_samples_through_the_loader(
    case, wrap, tmp_path, monkeypatch
):
    path = published(case, tmp_path / "repa.pt", wrap)
    model, config = load_checkpoint(path, **told(case))
    model, x = model.double(), inputs(case)
    noises = [
        x[f"{name}.{i}"]
        for i in range(case["num_steps"] - 1)
        for name in ("eps", "cls_eps")
        if f"{name}.{i}" in x
    ]
    replay(monkeypatch, noises)
    settings = dict(case["sampler_args"])
    kind = "sde" if "sde" in case["id"] else "heun" if settings.pop("heun", False) else "ode"
    samples = SAMPLERS[kind](
        model,
        x["latents"],
        x["y"],
        x.get("cls_latents"),
        num_steps=case["num_steps"],
        **settings,
    )
    assert_golden(samples, case, "samples")
    assert (config.num_classes, config.depth, config.image_size) == (1000, 2, 64)
    assert config.class_token == ("reg" in case["id"])


@pytest.mark.golden
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_the_original_sit_runs_in_our_time_through_the_loader(learn_sigma, tmp_path):
    case = CASES["forward/sit_original_learn_sigma"]
    state = weights(case)
    if not learn_sigma:
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            state[name] = state[name].unflatten(0, (4, 8))[:, :4].flatten(0, 1)
    torch.save(state, tmp_path / "sit.pt")
    model, config = load_checkpoint(tmp_path / "sit.pt", **told(case))
    x = inputs(case)
    v = model.double()(x["x"], 1 - x["t"], x["y"]).v
    gold, found = case["outputs"]["velocity"], -maskalign.unpatchify(v, 2)
    assert found.shape == tuple(gold["shape"]) and config.method == "sit"
    values = found.flatten()[gold["idx"]]
    torch.testing.assert_close(
        values, torch.tensor(gold["val"], dtype=torch.float64), rtol=0, atol=2e-6
    )
    assert patchify(found, 2).shape == v.shape


def test_sras_training_head_is_left_out_and_its_time_stays(tmp_path):
    case = CASES["loss/sra_linear"]
    torch.save({"ema": weights(case)}, tmp_path / "sra.pt")
    model, _ = load_checkpoint(tmp_path / "sra.pt", **told(case))
    for name in ("blocks.3.attn.qkv.weight", "t_embedder.mlp.0.weight"):
        weight = dict(weights(case))[name]
        assert torch.equal(model.state_dict()[name].double(), weight.float().double())
    assert model.projector is None and len(model.blocks) == 4


@pytest.mark.parametrize(
    "args",
    [
        dict(prediction="noise"),
        dict(prediction="score"),
        dict(path_type="cosine"),
        dict(path_type="VP"),
        dict(model="DiT-XL/2"),
    ],
    ids=str,
)
def test_a_file_that_says_it_is_no_velocity_on_the_linear_path_is_refused(args, tmp_path):
    case = CASES["forward/sit_original_learn_sigma"]
    path = published(case, tmp_path / "x.pt", **args)
    with pytest.raises(AssertionError, match=next(iter(args.values()))) as caught:
        load_checkpoint(path, **told(case))
    assert "\n" not in str(caught.value)
    right = published(case, tmp_path / "x.pt", prediction="velocity", path_type="Linear")
    load_checkpoint(right, **told(case))


def test_a_label_table_without_a_null_row_has_all_its_classes_and_no_guidance(tmp_path):
    case = dict(CASES["forward/sit_original_learn_sigma"])
    path = published(case, tmp_path / "x.pt", num_classes=11)  # as many as there are rows
    model, config = load_checkpoint(path, **told(case))
    assert config.num_classes == 11 and config.label_dropout == 0.0
    assert len(model.y_embedder.weight) == 12
    last = weights(case)["y_embedder.embedding_table.weight"][-1]
    assert torch.equal(model.y_embedder.weight[10].double(), last)
    assert sample.parse_classes("10", config) == [10]
    with_null = published(case, tmp_path / "y.pt", num_classes=10)
    _, config = load_checkpoint(with_null, **told(case))
    assert config.num_classes == 10 and config.label_dropout > 0


FILES = dict(sit="forward/sit_original_learn_sigma", repa="forward/repa_tiny8")
FILES |= dict(reg="forward/reg_tiny8", sra="loss/sra_linear")


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("method", FILES)
def test_a_published_file_is_never_read_by_a_method_of_another_time(kind, method, tmp_path):
    """SiT's time runs the other way: REPA's network would turn noise into noise. SRA is REPA to a
    sampler, which needs no projector."""
    case = CASES[FILES[kind]]
    torch.save(dict(ema=weights(case)), tmp_path / "x.pt")
    settings = dict(told(case), method=method)
    if kind == method or {kind, method} == {"repa", "sra"}:
        model, _ = load_checkpoint(tmp_path / "x.pt", **settings)
        same = torch.equal(model.t_embedder.mlp[0].weight, weights(case)[TIME].float())
        assert same == (kind != "sit")
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            load_checkpoint(tmp_path / "x.pt", **settings)


TIME = "t_embedder.mlp.0.weight"


def test_the_published_dit_which_has_no_args_is_known_by_its_name(tmp_path):
    case = CASES["forward/sit_original_learn_sigma"]  # its tensors have the same names and shapes
    folder = tmp_path / "DiT"
    folder.mkdir()
    path = published(case, folder / "DiT-XL-2-256x256.pt", wrap=False)
    with pytest.raises(AssertionError, match="no velocity"):
        load_checkpoint(path, **told(case))
    load_checkpoint(published(case, folder / "SiT-XL-2-256x256.pt", wrap=False), **told(case))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: dict(model=state, opt={}),  # raw weights are not the average
        lambda state: dict(ema_model=state),
        lambda state: dict(state_dict=state),
        lambda state: dict(model=state, ema=None),
        lambda state: dict(ema=dict(module=state)),
        lambda state: dict(ema=state, config=dict(size="demo", hidden_size=96, depth=2)),
        lambda state: dict(ema=state, args=dict(prediction="noise")),
        lambda state: dict(ema=state, args=argparse.Namespace(num_classes=5)),
    ],
)
def test_a_file_of_another_layout_is_an_error_and_not_a_guess(wrap, tmp_path):
    case = CASES["forward/sit_original_learn_sigma"]
    torch.save(wrap(weights(case)), tmp_path / "x.pt")
    with pytest.raises((KeyError, AttributeError, RuntimeError, TypeError)):
        load_checkpoint(tmp_path / "x.pt", **told(case))


def test_a_published_file_of_another_size_of_image_is_an_error(tmp_path):
    case = CASES["forward/sit_original_learn_sigma"]
    path = published(case, tmp_path / "x.pt", wrap=False)
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        load_checkpoint(path, **dict(told(case), image_size=128))


def test_a_published_file_needs_to_be_told_its_size_and_method(tmp_path):
    case = CASES["forward/sit_original_learn_sigma"]
    path = published(case, tmp_path / "x.pt", wrap=False)
    for given in (dict(), dict(size="SiT-S/2"), dict(method="sit")):
        with pytest.raises(AssertionError, match="--size and --method"):
            load_checkpoint(path, **given)


@dataclasses.dataclass(frozen=True)
class ForkConfig(Config):
    """What a fork adds: a method of its name, settings that sample.py does not know."""

    method: str = maskalign.setting("fork")
    tau: int = maskalign.setting(250_000, "a setting of its own")
    levels: tuple = maskalign.setting(((1, 2), (3, 4)))


class OtherProjector(SiT):
    """As iREPA: its projector is another one, which only training runs."""

    def __init__(self, config):
        super().__init__(config)
        self.projector = nn.Conv2d(32, 64, 3, padding=1)


def test_a_fork_whose_network_is_a_sit_is_sampled_without_its_projector(tmp_path):
    names = tuple(maskalign.SHAPES)
    config = make_config(ForkConfig, **TINY, num_classes=8, z_dim=64, class_names=names)
    path = save(config, tmp_path / "latest.pt", OtherProjector)
    model, found = load_checkpoint(path)
    assert type(found) is Config and found.method == "fork" and model.projector is None
    run(path, "--classes=flower", "--per_class=1")
    assert (tmp_path / "grid.png").exists()


def test_a_fork_samples_with_its_own_config_network_and_sampler(tmp_path):
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
    path, seen = save(config, tmp_path / "latest.pt", Fork), []
    with pytest.raises(RuntimeError, match="gain"):
        load_checkpoint(path)
    model, config = load_checkpoint(path, kind=ForkConfig, build_model=Fork)
    assert type(config) is ForkConfig and config.levels == ((1, 2), (3, 4))
    fork = dict(kind=ForkConfig, build_model=Fork, samplers=dict(own=own_sampler))
    sample.main(**fork, argv=[str(path), "--num_images=3", f"--out={tmp_path}/x.npz"])
    assert seen == [(Fork, 7, (3, 3, 24, 24), 250)]
    assert (images_of(tmp_path / "x.npz") == 191).all()  # 1 in the latents is 0.5 in [-1, 1]
    with pytest.raises(SystemExit):
        sample.main(**fork, argv=[str(path), "--sampler=sde"])


def test_a_network_that_means_something_else_is_refused_without_its_fork(tmp_path):
    """Its shapes are those of SiT, but it predicts x, say."""

    @dataclasses.dataclass(frozen=True)
    class Other(Config):
        method: str = maskalign.setting("other")
        sample_with: str = maskalign.setting("tests/forks/other.py sample")

    config = make_config(Other, **TINY, num_classes=8, z_dim=64)
    path = save(config, tmp_path / "latest.pt")
    with pytest.raises(AssertionError, match="is for python tests/forks/other.py sample"):
        load_checkpoint(path)
    assert type(load_checkpoint(path, kind=Other)[1]) is Other


@pytest.mark.parametrize(
    "content",
    [
        {"weight": torch.zeros(2)},
        [1, 2],
        {"step": 1, "config": dict(hidden_size=8, depth=1, num_heads=2, align_depth=1)},
        {"ema": None, "model": {}},
    ],
    ids=str,
)
def test_a_file_of_another_kind_is_an_error(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(Exception):  # noqa: B017, whose last line says what is missing
        load_checkpoint(tmp_path / "x.pt", size="SiT-S/2", method="repa")


def test_no_checkpoint_can_run_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"ema": Attack()}, tmp_path / "x.pt")
    with pytest.raises(Exception):  # noqa: B017, torch's own
        load_checkpoint(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), 1e300])
def test_weights_that_are_not_finite_are_not_sampled(value, checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    bias = saved["ema"]["blocks.0.attn.proj.bias"].double()  # 1e300 is not finite in float32
    saved["ema"]["blocks.0.attn.proj.bias"] = bias.index_fill(0, torch.tensor(3), value)
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(AssertionError, match="x.pt has weights that are not finite"):
        load_checkpoint(tmp_path / "x.pt")


def test_files_in_half_precision_and_without_ema_are_read(tmp_path):
    case = CASES["forward/sit_original_learn_sigma"]
    state = {name: value.half() for name, value in weights(case).items()}
    torch.save(state, tmp_path / "half.pt")
    torch.save({"ema": {k: v.float() for k, v in state.items()}}, tmp_path / "full.pt")
    half, _ = load_checkpoint(tmp_path / "half.pt", **told(case))
    full, _ = load_checkpoint(tmp_path / "full.pt", **told(case))
    name = "t_embedder.mlp.0.weight"  # which from_original_sit rounds to the type of the file
    one, two = half.state_dict(), full.state_dict()
    assert (one.pop(name) - two.pop(name)).abs().max() < 1e-3
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_help_tells_what_the_numbers_with_guidance_are_of(capsys):
    with pytest.raises(SystemExit):
        sample.main(argv=["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "SiT and DiT" in shown and "3 channels" in shown


def test_paths_are_paths(checkpoint):
    assert load_checkpoint(str(checkpoint))[1] == load_checkpoint(Path(checkpoint))[1]
