"""The loop: it runs as written, resumes to the bit, and is the same for 1 or 2 processes."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import start_ranks, torchrun
from test_data import make_folder

import maskalign
from maskalign import (
    METHODS,
    SiT,
    euler_ode,
    load_teacher,
    make_config,
    parse_config,
    train,
    training_losses,
)

TINY = dict(
    steps=6,
    batch_size=8,
    hidden_size=32,
    num_heads=2,
    depth=3,
    align_depth=2,
    projector_dim=16,
    teacher_steps=1,
    preview_steps=1,
    log_every=2,
    save_every=3,
)
TINY_FLAGS = [f"--{name}={value}" for name, value in TINY.items()]


def launch(*argv, status=0):
    """maskalign.py as a program of its own; what it showed."""
    return finish(start_ranks(1, "maskalign.py", *TINY_FLAGS, *argv), status)


def finish(ranks, status=0):
    """Waits; what the first rank showed."""
    ends = [rank.end() for rank in ranks]
    assert all(end[0] == status for end in ends), ends
    return ends[0][1:]


def checkpoint(out):
    return torch.load(Path(out) / "latest.pt", weights_only=True)


def assert_same(a, b, **tolerance):
    """The same nested checkpoint: to the bit, or within a tolerance."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key], **tolerance)
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y, **tolerance)
    elif torch.is_tensor(a):
        torch.testing.assert_close(a, b, **(tolerance or dict(rtol=0, atol=0)))
    else:
        assert a == b


def log(out):
    """The lines of the log, of each step the last: a resumed run writes some again."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines}
    return [by_step[step] for step in sorted(by_step)]


def assert_equal_runs(a, b):
    """All but the speed is equal to the bit: weights, their average, the optimizer, the log."""
    one, two = checkpoint(a), checkpoint(b)
    for name in ("model", "ema", "optimizer", "step"):
        assert_same(one[name], two[name])
    for x, y in zip(log(a), log(b), strict=True):
        assert x | dict(images_per_s=0) == y | dict(images_per_s=0)


@pytest.fixture(scope="module", autouse=True)
def readme_demo(tmp_path_factory):
    """The README's command. It imports torch anew: so it starts first, and a late test waits."""
    out = tmp_path_factory.mktemp("readme")
    return out, torchrun(1, "maskalign.py", *TINY_FLAGS, f"--out={out}")


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """The run of TINY, undisturbed, for those to compare with that must end alike."""
    out = tmp_path_factory.mktemp("one_run")
    train(make_config(out=str(out), **TINY))
    return out


@pytest.fixture
def one_step(one_step_run, tmp_path):
    """A folder of one's own with a run of a single step."""
    return shutil.copytree(one_step_run, tmp_path / "one_step")


@pytest.fixture(scope="module")
def one_step_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("one_step")
    train(make_config(out=str(out), **{**TINY, "steps": 1}))
    return out


@pytest.mark.parametrize("method", METHODS)
def test_each_row_trains_and_samples_on_the_demo_and_its_ema_follows(method, tmp_path):
    config = make_config(method=method, out=str(tmp_path), **TINY)
    train(config)
    state = checkpoint(tmp_path)
    assert (tmp_path / "samples-0000006.png").exists()
    assert [line["step"] for line in log(tmp_path)] == [2, 3, 4, 6]  # 3 and 6 are also saved
    assert set(state) == {"model", "ema", "optimizer", "step", "config"} and state["step"] == 6
    assert state["config"]["method"] == config.method and state["config"]["num_classes"] == 8
    torch.manual_seed(config.seed)
    fresh = SiT(maskalign.Config(**state["config"])).state_dict()
    for name in fresh:
        moved = not torch.equal(fresh[name], state["model"][name])
        assert moved != (name == "pos_embed"), name
        if moved and name != "y_embedder.weight":
            between = (state["ema"][name] - fresh[name]).norm() / (
                state["model"][name] - fresh[name]
            ).norm()
            assert 0 < between < 0.2, name  # decay 0.99, six steps


def test_ema_is_the_running_average_of_all_steps_and_keeps_no_graph(tmp_path):
    """In grad mode each update would hang on to the one before: memory would grow for ever."""
    averages, weights = [], []

    def note(model, x, y, z, config, rng, ema=None):
        averages.append({name: p.clone() for name, p in ema.state_dict().items()})
        weights.append({name: p.detach().clone() for name, p in model.state_dict().items()})
        assert not any(p.requires_grad or p.grad_fn for p in ema.parameters())
        return training_losses(model, x, y, z, config, rng)

    train(make_config(out=str(tmp_path), ema_decay=0.9, **TINY), losses=note)
    state, average = checkpoint(tmp_path), averages[0]
    assert_same(averages[0], weights[0])  # it starts as the weights
    for after in [*weights[1:], state["model"]]:
        average = {name: 0.9 * average[name] + 0.1 * after[name] for name in average}
    assert_same(state["ema"], average, rtol=1e-5, atol=1e-7)


def test_interrupted_run_ends_bit_equal(one_run, tmp_path, monkeypatch):
    replace, saves = os.replace, []

    def stop_after_the_first_save(*names):
        replace(*names)
        saves.append(names)
        if len(saves) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop_after_the_first_save)
    config = make_config(out=str(tmp_path / "cut"), **TINY)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert checkpoint(tmp_path / "cut")["step"] == 3
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0}\n')  # written after the checkpoint
    train(config)
    assert_equal_runs(one_run, tmp_path / "cut")


def test_n_steps_and_n_more_equal_2n_steps(one_run, tmp_path):
    for steps in (3, 6):
        train(make_config(out=str(tmp_path / "parts"), **{**TINY, "steps": steps}))
    assert_equal_runs(one_run, tmp_path / "parts")


def test_a_line_of_the_log_is_the_mean_of_the_steps_since_the_line_before(tmp_path, capsys):
    """Against a log of every step."""
    for name, every in (("all", 1), ("some", 4)):
        changes = dict(steps=5, log_every=every, save_every=100, out=str(tmp_path / name))
        train(make_config(**{**TINY, **changes}))
    each = {line["step"]: line for line in log(tmp_path / "all")}
    some = log(tmp_path / "some")
    assert [line["step"] for line in some] == [4, 5]
    for line, steps in zip(some, [(1, 2, 3, 4), (5,)], strict=True):
        for key in ("loss", "denoise", "cls", "align", "grad_norm"):
            mean = sum(each[step][key] for step in steps) / len(steps)
            assert line[key] == pytest.approx(mean, rel=1e-5), key
    shown = capsys.readouterr().out
    assert f"step 5, loss {each[5]['loss']:.4g}, denoise {each[5]['denoise']:.4g}" in shown


def test_the_speed_is_that_of_the_steps_since_the_line_before(tmp_path, monkeypatch):
    """Its clock is read after the losses, for which a GPU must finish all steps."""
    clock, order = [100.0], []
    monkeypatch.setattr(maskalign.time, "time", lambda: order.append("clock") or clock[0])
    real = torch.Tensor.tolist

    def read(tensor):
        order.append("losses")
        clock[0] += 2.0  # the wait for the GPU
        return real(tensor)

    config = make_config(out=str(tmp_path), batch_size=8)
    history = [dict(loss=torch.tensor(1.0))] * 3
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", read)
        maskalign.write_log(config, 3, history, 98.0, 0, 1)
    assert order == ["losses", "clock"]
    assert log(tmp_path)[0]["images_per_s"] == 8 * 3 / (100.0 + 2.0 - 98.0)


def test_a_new_learning_rate_holds_after_a_resume_and_what_changed_is_told(one_step, capsys):
    before = checkpoint(one_step)["model"]
    train(make_config(out=str(one_step), **{**TINY, "steps": 2}, lr=1e-12))
    state = checkpoint(one_step)
    assert state["optimizer"]["param_groups"][0]["lr"] == state["config"]["lr"] == 1e-12
    assert_same(before, state["model"], rtol=0, atol=1e-10)  # the step was made with it
    shown = capsys.readouterr().out
    assert "lr 0.003 -> 1e-12" in shown and "steps 1 -> 2" in shown and "seed" not in shown


def test_another_data_set_in_the_same_run_folder_is_told(tmp_path, capsys):
    """It has as many classes, so its weights fit."""
    where = dict(vae="none", teacher="classifier", image_size=16, workers=0, method="sit")
    for name in ("a", "b"):
        folder = make_folder(tmp_path / name)
        settings = {**TINY, **where, "steps": 1 if name == "a" else 2}
        train(make_config(data=folder, out=str(tmp_path / "run"), **settings))
    assert f"data {tmp_path}/a -> {tmp_path}/b" in capsys.readouterr().out


def test_renamed_classes_are_told_and_another_number_of_them_is_an_error(tmp_path, capsys):
    where = dict(vae="none", image_size=16, workers=0, method="sit", out=str(tmp_path / "run"))
    data = tmp_path / "data"
    config = make_config(data=str(data), **{**TINY, **where, "steps": 1})
    make_folder(data, ("ant", "cat"))
    train(config)
    os.rename(data / "ant", data / "dog")
    train(config)  # no step is left to do
    shown = capsys.readouterr().out
    assert "class_names ('ant', 'cat') -> ('cat', 'dog')" in shown and "2 classes (cat, " in shown
    make_folder(data, ("eel",))
    with pytest.raises(RuntimeError, match="y_embedder.weight"):
        train(config)


def test_two_processes_follow_one(one_run, tmp_path):
    """Same images, noise, masks and dropped labels; the sums differ by rounding alone."""
    finish(start_ranks(2, "maskalign.py", *TINY_FLAGS, f"--out={tmp_path}/two"))
    one, two = checkpoint(one_run), checkpoint(tmp_path / "two")
    for name in ("model", "ema"):
        assert_same(one[name], two[name], rtol=1e-3, atol=2e-5)
    for a, b in zip(log(one_run), log(tmp_path / "two"), strict=True):
        for key in ("loss", "denoise", "cls", "align", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4), key


def test_another_seed_is_another_trajectory(one_run, tmp_path):
    train(make_config(out=str(tmp_path), seed=1, **{**TINY, "steps": 2}))
    a, b = (log(out)[0]["denoise"] for out in (one_run, tmp_path))
    assert abs(a - b) > 1e-4


def test_training_lowers_every_loss(tmp_path):
    train(
        make_config(
            out=str(tmp_path),
            **{**TINY, "steps": 30, "log_every": 10, "save_every": 30, "batch_size": 16},
        )
    )
    first, *_, last = log(tmp_path)
    assert all(last[name] < first[name] for name in ("loss", "denoise", "align"))


def test_the_readme_demo_command_runs_resumes_and_makes_its_picture(readme_demo, capsys):
    out, program = readme_demo
    status, shown, errors = program.end()
    assert status == 0, errors
    first, *_, last = shown.splitlines()
    for told in ("maskalign (demo)", "1 x cpu", "8192 images", "of the demo", "8 classes (disc, "):
        assert told in first
    assert "steps 0 to 6" in first and str(out) in first and str(out) in last
    assert "\r" not in errors and "it/s" not in errors, "no bar where no terminal is"
    found = ["latest.pt", "log.jsonl", "samples-0000003.png", "samples-0000006.png"]
    assert sorted(os.listdir(out)) == found
    assert Image.open(out / "samples-0000006.png").size == (8 * 98 + 2, 8 * 98 + 2)
    keys = {"step", "loss", "denoise", "cls", "align", "grad_norm", "images_per_s"}
    assert all(line.keys() == keys for line in log(out))
    train(make_config(out=str(out), **TINY))  # again: nothing is left to do
    assert checkpoint(out)["step"] == 6
    train(make_config(out=str(out), **{**TINY, "steps": 8}))
    assert "steps 6 to 8" in capsys.readouterr().out
    assert [line["step"] for line in log(out)] == [2, 3, 4, 6, 8]


# ---- image folders, and latents that are kept


def latents_in(folder):
    """{name: tensor} of the latents that are kept in a folder."""
    return {file.name: torch.load(file) for file in Path(folder).rglob("*.pt")}


def test_image_folder_with_teacher_and_vae_files_trains_and_two_processes_share_its_latents(
    small_vae_file, dino_file, tmp_path
):
    """The ImageNet path, small: true file formats, made-up values."""
    folder = make_folder(tmp_path / "data", per_class=5, size=(70, 50))
    flags = [
        *TINY_FLAGS,
        f"--data={folder}",
        f"--vae={small_vae_file}",
        "--image_size=32",
        "--workers=1",
        "--teacher=vit_small_patch14_dinov2.lvd142m",
        f"--teacher_weights={dino_file}",
        "--batch_size=4",
        "--steps=3",
    ]
    where = [f"--out={tmp_path}/two", f"--cache={tmp_path}/b"]
    ranks = start_ranks(2, "maskalign.py", *flags, *where)  # they run beside the one process
    train(parse_config([*flags, f"--out={tmp_path}/one", f"--cache={tmp_path}/a"]))
    finish(ranks)
    one, two = (checkpoint(tmp_path / name) for name in ("one", "two"))
    assert one["config"]["class_names"] == ("cat", "dog") and one["config"]["z_dim"] == 384
    assert_same(one["model"], two["model"], rtol=1e-2, atol=1e-3)  # float16 latents
    assert (tmp_path / "one" / "samples-0000003.png").exists()

    # 12 images were asked for, of 10: each is kept, in both folders, as near as float16 tells.
    a, b = (latents_in(tmp_path / name) for name in "ab")
    assert len(a) == 10 and a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name].float(), b[name].float(), rtol=1e-2, atol=1e-3)


@pytest.fixture
def encoding(tmp_path, small_vae_file):
    """make(out, cache): settings of a run of 5 steps that sees 10 images twice, through a VAE."""
    folder = make_folder(tmp_path / "data", per_class=5)
    changes = dict(data=folder, vae=small_vae_file, image_size=16, workers=0, method="sit")
    changes |= dict(batch_size=4, steps=5, save_every=2, log_every=3)

    def make(out, cache):
        own = dict(out=str(tmp_path / out), cache=str(tmp_path / cache))
        return make_config(**{**TINY, **changes, **own})

    return make


def test_a_run_is_the_same_with_an_empty_a_full_and_a_half_filled_cache(
    encoding, tmp_path, monkeypatch
):
    import sample

    train(encoding("first", "kept"))
    encode, calls = sample.AutoencoderKL.encode, []
    monkeypatch.setattr(
        sample.AutoencoderKL, "encode", lambda vae, x: calls.append(len(x)) or encode(vae, x)
    )
    train(encoding("second", "kept"))
    assert calls == [1]  # the look at the VAE; all latents are there
    assert_equal_runs(tmp_path / "first", tmp_path / "second")

    save, files = torch.save, []

    def killed(value, path):
        save(value, path)
        if torch.is_tensor(value):
            files.append(path)
        if len(files) == 10:  # the last image of the first epoch, after the checkpoint of step 2
            os.truncate(path, 150)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(encoding("third", "own"))
    assert checkpoint(tmp_path / "third")["step"] == 2
    assert len(latents_in(tmp_path / "own")) == 9
    train(encoding("third", "own"))
    assert_equal_runs(tmp_path / "first", tmp_path / "third")
    kept, own = (latents_in(tmp_path / name) for name in ("kept", "own"))
    assert kept.keys() == own.keys() and len(kept) == 10
    assert all(torch.equal(kept[name], own[name]) for name in kept)


def test_pixel_space_folder_trains_with_its_own_classifier(tmp_path):
    folder = make_folder(tmp_path / "data")
    train(
        make_config(
            data=folder,
            vae="none",
            teacher="classifier",
            image_size=16,
            workers=0,
            out=str(tmp_path / "out"),
            **TINY,
        )
    )
    assert checkpoint(tmp_path / "out")["config"]["class_names"] == ("cat", "dog")


def test_a_batch_that_cannot_be_shared_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(maskalign, "setup_distributed", lambda: (0, 3, torch.device("cpu")))
    monkeypatch.setattr(maskalign, "demo_shapes", None)
    with pytest.raises(AssertionError, match="batch_size.* 3"):
        train(make_config(out=str(tmp_path / "out"), **TINY))
    assert not (tmp_path / "out").exists()


def test_an_unreadable_image_in_a_worker_ends_with_its_name(tmp_path):
    folder = make_folder(tmp_path / "data", per_class=5)
    broken = tmp_path / "data" / "cat" / "2.png"
    broken.write_bytes(broken.read_bytes()[:200])
    _, errors = launch(
        f"--data={folder}",
        "--vae=none",
        "--teacher=classifier",
        "--image_size=16",
        "--method=sit",
        "--workers=1",
        f"--out={tmp_path}/out",
        status=1,
    )
    assert "cat/2.png" in errors.strip().splitlines()[-1]


def test_resuming_with_another_network_is_an_error_and_the_checkpoint_stays(one_step):
    before = (one_step / "latest.pt").read_bytes()
    for changes, told in ((dict(mixer_depth=1), "mixer"), (dict(method="sit"), "cls_embedder")):
        with pytest.raises(RuntimeError, match=told):
            train(make_config(out=str(one_step), **changes, **TINY))
    assert (one_step / "latest.pt").read_bytes() == before


def test_the_models_of_a_run_can_be_rebuilt_from_its_checkpoint_alone(one_step_run):
    state = checkpoint(one_step_run)
    config = maskalign.Config(**state["config"])
    model = SiT(config)
    model.load_state_dict(state["ema"])
    noise, cls = torch.randn(2, *config.latent_shape), torch.randn(2, config.z_dim)
    x = euler_ode(model.eval(), noise, torch.tensor([0, 7]), cls, num_steps=2)
    assert x.shape == (2, 3, 24, 24) and torch.isfinite(x).all()


# ---- a fork hands in functions of its own


def test_what_a_fork_hands_in_is_what_is_called(tmp_path):
    """Each function of its own leaves its name; the run is as before."""
    called = []

    def note(name, function):
        return lambda *args, **options: (called.append(name), function(*args, **options))[1]

    own = dict(
        build_model=SiT, build_teacher=load_teacher, losses=training_losses, sampler=euler_ode
    )
    options = {**TINY, "steps": 2}
    train(make_config(out=str(tmp_path / "ours"), **options))
    noted = {name: note(name, function) for name, function in own.items()}
    train(make_config(out=str(tmp_path / "fork"), **options), **noted)
    assert called == ["build_teacher", "build_model", "losses", "losses", "sampler"]
    assert_equal_runs(tmp_path / "ours", tmp_path / "fork")


def test_a_forks_loss_sees_step_ema_and_what_its_teacher_returns_and_is_logged(tmp_path):
    class Teacher(torch.nn.Module):
        dim = 5

        def forward(self, images):
            return dict(
                tokens=torch.zeros(len(images), 37, 5), means=images.float().mean((1, 2, 3))
            )

    seen = []

    def losses(model, x, y, z, config, rng, ema=None):
        seen.append((rng.step, z["means"].shape, ema.state_dict().keys()))
        found = training_losses(model, x, y, z["tokens"], config, rng)
        return found | dict(warmth=found["loss"] * 0 + len(x))

    options = {**TINY, "steps": 2}
    config = make_config(out=str(tmp_path), **options)
    train(config, losses=losses, build_teacher=lambda config, dataset, device: Teacher())
    state = checkpoint(tmp_path)
    assert [(step, shape) for step, shape, _ in seen] == [(0, (8,)), (1, (8,))]
    assert seen[0][2] == state["ema"].keys() and state["config"]["z_dim"] == 5
    assert log(tmp_path)[-1]["warmth"] == 8


def test_a_forks_own_network_is_trained_saved_and_resumed(tmp_path):
    class Louder(SiT):
        def __init__(self, config):
            super().__init__(config)
            self.gain = torch.nn.Parameter(torch.ones(()))

        def forward(self, *args):
            out = super().forward(*args)
            return out._replace(v=out.v * self.gain)

    for out, ends in (("whole", (4,)), ("parts", (2, 4))):
        for steps in ends:
            config = make_config(out=str(tmp_path / out), **{**TINY, "steps": steps})
            train(config, build_model=Louder)
    assert checkpoint(tmp_path / "whole")["model"]["gain"] != 1
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
