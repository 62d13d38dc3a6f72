"""The loop: it runs as typed, resumes to the bit, and is the same for 1 or 2 processes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import start_ranks, torchrun
from test_data import make_folder

import maskalign
from maskalign import (
    METHODS,
    BadInput,
    Run,
    build_model,
    build_teacher,
    draw_step,
    euler_ode,
    index_batches,
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
    teacher_steps=2,
    preview_steps=1,
    log_every=2,
    save_every=3,
    sample_every=100,
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
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def assert_equal_runs(a, b):
    """All but the speed and what the cache spared is equal to the bit: weights, sums, the log."""
    one, two = checkpoint(a), checkpoint(b)
    for name in ("model", "ema", "optimizer", "step", "sums"):
        assert_same(one[name], two[name])
    for x, y in zip(log(a), log(b), strict=True):
        free = dict(images_per_s=0, encoded=0)
        assert x | free == y | free


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
    assert (tmp_path / "samples-0000006.png").exists() and len(log(tmp_path)) == 3
    fresh = build_model(maskalign.Config(**state["config"])).state_dict()
    assert set(state) == {"model", "ema", "optimizer", "step", "sums", "log", "config"}
    assert state["step"] == 6
    assert state["config"]["method"] == config.method and state["config"]["num_classes"] == 8
    for name in fresh:
        moved = not torch.equal(fresh[name], state["model"][name])
        assert moved != (name == "pos_embed"), name
        if moved and name != "y_embedder.embedding_table.weight":
            between = (state["ema"][name] - fresh[name]).norm() / (
                state["model"][name] - fresh[name]
            ).norm()
            assert 0 < between < 0.2, name  # decay 0.99, six steps


def test_ema_keeps_no_graph(tmp_path, monkeypatch):
    """In grad mode each update would hang on to the one before: memory would grow for ever."""
    lerp, average = torch._foreach_lerp_, []
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda a, b, w: (lerp(a, b, w), average.append(a)))
    train(make_config(out=str(tmp_path), **TINY))
    assert len(average) == 6 and not any(p.requires_grad for p in average[-1])


def test_ema_is_the_running_average_of_all_steps(tmp_path):
    options = {**TINY, "steps": 3, "ema_decay": 0.9, "save_every": 1, "milestone_every": 1}
    train(make_config(out=str(tmp_path), **options))
    average = build_model(maskalign.Config(**checkpoint(tmp_path)["config"])).state_dict()
    for step in (1, 2, 3):
        state = torch.load(tmp_path / f"step-{step:07d}.pt", weights_only=True)
        average = {name: 0.9 * average[name] + 0.1 * state["model"][name] for name in average}
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
        file.write('{"step": 4, "loss": 0}\n{"step": 5, "lo')  # written past the checkpoint
    train(config)
    assert_equal_runs(one_run, tmp_path / "cut")  # the line of step 4 is the mean of 3 and 4
    assert [line["step"] for line in log(tmp_path / "cut")] == [2, 4, 6]


def test_n_steps_and_n_more_equal_2n_steps(one_run, tmp_path):
    for steps in (2, 6):
        train(make_config(out=str(tmp_path / "parts"), **{**TINY, "steps": steps}))
    assert_equal_runs(one_run, tmp_path / "parts")


def test_the_step_of_a_log_line_is_never_rounded(tmp_path, capsys):
    run = Run(make_config(out=str(tmp_path)), step=123_456)
    run.sums.update(loss=torch.tensor(0.123456), steps=1)
    maskalign.report(run, images_per_s=10.0)
    assert capsys.readouterr().out == "step 123456, loss 0.1235, images_per_s 10\n"
    assert json.loads((tmp_path / "log.jsonl").read_text())["step"] == 123_456


def test_a_line_of_the_log_is_the_mean_of_the_steps_since_the_line_before(tmp_path):
    """Against a log of every step; also where a run ended between two lines, and went on."""
    for name, every, ends in (("all", 1, (5,)), ("some", 3, (5,)), ("parts", 3, (1, 2, 5))):
        for steps in ends:
            changes = dict(steps=steps, log_every=every, out=str(tmp_path / name))
            train(make_config(**{**TINY, **changes}))
    each = {line["step"]: line for line in log(tmp_path / "all")}
    for name, lines in (("some", [(0, 3), (3, 5)]), ("parts", [(0, 1), (1, 2), (2, 3), (3, 5)])):
        found = log(tmp_path / name)
        assert [line["step"] for line in found] == [last for _, last in lines]
        for line, (before, last) in zip(found, lines, strict=True):
            for key in ("loss", "denoise", "cls", "align", "grad_norm"):
                mean = sum(each[step][key] for step in range(before + 1, last + 1)) / (
                    last - before
                )
                assert line[key] == pytest.approx(mean, rel=1e-5), (name, line["step"], key)


def test_a_typed_learning_rate_counts_after_a_resume(one_step):
    before = checkpoint(one_step)["model"]
    train(make_config(out=str(one_step), **{**TINY, "steps": 2}, lr=1e-12))
    state = checkpoint(one_step)
    assert state["optimizer"]["param_groups"][0]["lr"] == state["config"]["lr"] == 1e-12
    assert_same(before, state["model"], rtol=0, atol=1e-10)  # the step was made with it


def test_a_save_that_fails_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    train(make_config(out=str(tmp_path), **{**TINY, "steps": 3}))

    def disk_full(state, path):
        Path(path).write_bytes(b"half a file")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_full)
        with pytest.raises(BadInput, match="cannot save .*latest.pt: .*No space left on device"):
            train(make_config(out=str(tmp_path), **TINY))
    assert checkpoint(tmp_path)["step"] == 3
    train(make_config(out=str(tmp_path), **TINY))  # there is room again
    assert checkpoint(tmp_path)["step"] == 6 and not list(tmp_path.glob("*.tmp"))


def test_two_processes_follow_one(one_run, tmp_path):
    """Same images, noise, masks and dropped labels; the sums differ by rounding alone."""
    two = start_ranks(2, "maskalign.py", *TINY_FLAGS, f"--out={tmp_path}/two")
    accum = start_ranks(2, "maskalign.py", *TINY_FLAGS, "--accum=2", f"--out={tmp_path}/accum")
    finish(two)
    finish(accum)
    one = checkpoint(one_run)
    for other in ("two", "accum"):
        state = checkpoint(tmp_path / other)
        for name in ("model", "ema"):
            assert_same(one[name], state[name], rtol=1e-3, atol=2e-5)
        for a, b in zip(log(one_run), log(tmp_path / other), strict=True):
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


def test_the_readme_demo_command_runs_resumes_and_draws_its_picture(readme_demo, capsys):
    out, program = readme_demo
    status, shown, errors = program.end()
    assert status == 0 and "steps 0 to 6" in shown, errors
    found = ["latest.pt", "log.jsonl", "run.lock", "samples-0000006.png"]
    assert sorted(os.listdir(out)) == found
    assert Image.open(out / "samples-0000006.png").size == (8 * 98 + 2, 8 * 98 + 2)
    lines = log(out)
    assert [line["step"] for line in lines] == [2, 4, 6]
    keys = {"step", "loss", "denoise", "cls", "align", "grad_norm", "images_per_s", "encoded"}
    assert all(line.keys() == keys for line in lines)
    train(make_config(out=str(out), **TINY))
    assert "finished: raise --steps" in capsys.readouterr().out and len(log(out)) == 3
    train(make_config(out=str(out), **{**TINY, "steps": 8}))
    assert "steps 6 to 8" in capsys.readouterr().out
    assert [line["step"] for line in log(out)] == [2, 4, 6, 8]


# ---- image folders, and latents that keep themselves


def latents_in(folder):
    """{name: array} of the latents that are kept in a folder."""
    return {file.name: np.load(file) for file in Path(folder).rglob("*.npy")}


def test_image_folder_with_teacher_and_vae_files_trains_and_two_processes_share_its_latents(
    small_vae_file, dino_file, tmp_path
):
    """The ImageNet path, small: true file formats, made-up values."""
    folder = make_folder(tmp_path / "data", per_class=5, size=(70, 50))
    flags = [
        *TINY_FLAGS,
        f"--data={folder}",
        f"--vae_weights={small_vae_file}",
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
    assert all(np.allclose(a[name], b[name], rtol=1e-2, atol=1e-3) for name in a)


@pytest.fixture
def encoding(tmp_path, small_vae_file):
    """make(out, cache): settings of a run of 5 steps that sees 10 images twice, through a VAE."""
    folder = make_folder(tmp_path / "data", per_class=5)
    changes = dict(data=folder, vae_weights=small_vae_file, image_size=16, workers=0, method="sit")
    changes |= dict(batch_size=4, steps=5, save_every=2, log_every=3)

    def make(out, cache):
        own = dict(out=str(tmp_path / out), cache=str(tmp_path / cache))
        return make_config(**{**TINY, **changes, **own})

    return make


def test_a_run_is_the_same_with_an_empty_a_full_and_a_half_filled_cache(
    encoding, tmp_path, monkeypatch
):
    train(encoding("first", "kept"))
    with monkeypatch.context() as patch:
        patch.setattr(maskalign, "encode_images", None)  # all is there: nothing is encoded
        train(encoding("second", "kept"))
    assert_equal_runs(tmp_path / "first", tmp_path / "second")
    counts = [[line["encoded"] for line in log(tmp_path / name)] for name in ("first", "second")]
    assert counts[1] == [0] * len(counts[0]) and sum(counts[0]) == 10  # of 10 images

    save, files = np.save, []

    def killed(file, array):
        save(file, array)
        files.append(file)
        if len(files) == 10:  # the last image of the first epoch, after the checkpoint of step 2
            os.truncate(file, 150)
            raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(encoding("third", "own"))
    assert checkpoint(tmp_path / "third")["step"] == 2
    train(encoding("third", "own"))
    assert len(set(files)) == 10 and files[9:] == [files[9]] * 2, "the torn file alone comes twice"
    assert_equal_runs(tmp_path / "first", tmp_path / "third")
    kept, own = (latents_in(tmp_path / name) for name in ("kept", "own"))
    assert kept.keys() == own.keys() and all(np.array_equal(kept[name], own[name]) for name in kept)


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


def test_bad_input_ends_the_program_with_one_sentence(tmp_path):
    _, errors = launch("--data", "nowhere", "--out", tmp_path / "out", status=1)
    assert errors.startswith("maskalign.py: --data nowhere must hold images as class")
    assert errors.count("\n") == 1 and os.listdir(tmp_path / "out") == ["run.lock"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--batch_size=9", "--accum=2"],
            "batch_size is 9: it must be a multiple of 1 processes x",
        ),
        (["--method=mae"], "unknown method 'mae': choose from sit, repa, reg, maskalign"),
    ],
)
def test_bad_input_is_refused_before_any_work(argv, message, tmp_path):
    with pytest.raises(BadInput, match=message):
        train(parse_config([*argv, f"--out={tmp_path}/out"]))
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
    assert "cat/2.png is no readable image" in errors.splitlines()[-1]


def test_resuming_with_another_network_shows_what_differs(one_step):
    with pytest.raises(BadInput, match="has other settings .*mixer_depth 2 there, 1 here"):
        train(make_config(out=str(one_step), mixer_depth=1, **TINY))
    with pytest.raises(BadInput, match="method maskalign there, reg here.*name another --out"):
        train(make_config(out=str(one_step), method="reg", **TINY))
    assert checkpoint(one_step)["step"] == 1


def test_the_models_of_a_run_can_be_rebuilt_from_its_checkpoint_alone(one_step_run):
    state = checkpoint(one_step_run)
    config = maskalign.Config(**state["config"])
    model = build_model(config)
    model.load_state_dict(state["ema"])
    noise, cls = torch.randn(2, *config.latent_shape), torch.randn(2, config.z_dim)
    x = euler_ode(model.eval(), noise, torch.tensor([0, 7]), cls, num_steps=2)
    assert x.shape == (2, 3, 24, 24) and torch.isfinite(x).all()
    assert list(index_batches(Run(config, dataset=range(8192), step=1))) == []


# ---- a fork hands in functions of its own


def test_what_a_fork_hands_in_is_what_is_called(tmp_path):
    """Each function of its own leaves its name; the run goes on as ours."""
    called = []

    def note(name, function):
        return lambda *args, **options: (called.append(name), function(*args, **options))[1]

    own = dict(
        build_model=build_model,
        build_teacher=build_teacher,
        draw_step=draw_step,
        training_losses=training_losses,
        sampler=euler_ode,
    )
    options = {**TINY, "steps": 2, "accum": 2}
    train(make_config(out=str(tmp_path / "ours"), **options))
    noted = {name: note(name, function) for name, function in own.items()}
    train(make_config(out=str(tmp_path / "fork"), **options), **noted)
    step = ["draw_step", "training_losses", "training_losses"]
    assert called == ["build_teacher", "build_model", *step, *step, "sampler"]
    assert_equal_runs(tmp_path / "ours", tmp_path / "fork")


def test_a_forks_draws_reach_its_loss_and_a_loss_of_its_own_is_logged(tmp_path):
    """Tensors are cut to the rows of the process, anything else is handed on as it is; and the
    run that draw_step sees is as far as it says."""
    seen = []

    def draw(run, generator):
        assert run.ema.state_dict().keys() == run.model.state_dict().keys()
        drawn = draw_step(run, generator)
        return drawn | dict(rows=torch.arange(run.config.batch_size), now=run.step, word="word")

    def losses(model, x, y, z, config, *, rows, now, word, **drawn):
        seen.append((now, word, rows.tolist()))
        found = training_losses(model, x, y, z, config, **drawn)
        return found | dict(warmth=found["loss"] * 0 + len(x))

    options = {**TINY, "steps": 2, "accum": 2}
    train(make_config(out=str(tmp_path), **options), draw_step=draw, training_losses=losses)
    halves = [0, 1, 2, 3], [4, 5, 6, 7]
    assert seen == [(step, "word", half) for step in (0, 1) for half in halves]
    assert log(tmp_path)[-1]["warmth"] == 4


def test_a_forks_own_network_is_trained_saved_and_resumed(tmp_path):
    class Louder(maskalign.SiT):
        def __init__(self, config):
            super().__init__(config)
            self.gain = torch.nn.Parameter(torch.ones(()))

        def forward(self, *args):
            out = super().forward(*args)
            return out._replace(v=out.v * self.gain)

    def build(config):
        torch.manual_seed(config.seed)
        return Louder(config)

    for out, ends in (("whole", (4,)), ("parts", (2, 4))):
        for steps in ends:
            config = make_config(out=str(tmp_path / out), **{**TINY, "steps": steps})
            train(config, build_model=build)
    assert checkpoint(tmp_path / "whole")["model"]["gain"] != 1
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
