"""The loop: it runs as typed, resumes to the bit, and is the same for 1 or 2 processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import ROOT, start_ranks
from test_data import make_folder

import maskalign
from maskalign import (
    METHODS,
    BadInput,
    build_model,
    euler_ode,
    index_batches,
    make_config,
    parse_config,
    train,
)

TINY = dict(
    steps=6,
    batch_size=8,
    hidden_size=32,
    num_heads=2,
    depth=3,
    align_depth=2,
    projector_dim=16,
    teacher_steps=3,
    preview_steps=2,
    log_every=2,
    save_every=3,
    sample_every=100,
)
TINY_FLAGS = [f"--{name}={value}" for name, value in TINY.items()]


def launch(*argv, processes=1, status=0):
    """maskalign.py as a program of its own, in one or more ranks; what the first one showed."""
    ranks = start_ranks(processes, "maskalign.py", *TINY_FLAGS, *argv)
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


def test_the_readme_demo_command_runs_resumes_and_draws_its_picture(tmp_path, capsys):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command = [*torchrun, ROOT / "maskalign.py", *TINY_FLAGS, f"--out={tmp_path}"]
    first = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert first.returncode == 0 and "steps 0 to 6" in first.stdout, first.stderr
    files = ["latest.pt", "log.jsonl", "samples-0000006.png", "step-0000003.pt", "step-0000006.pt"]
    assert sorted(os.listdir(tmp_path)) == files
    assert Image.open(tmp_path / "samples-0000006.png").size == (8 * 98 + 2 + 80, 8 * 98 + 2)
    lines = log(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert {"loss", "denoise", "cls", "align", "align_full", "grad_norm", "images_per_s"} < set(
        lines[0]
    )
    train(make_config(out=str(tmp_path), **TINY))
    assert "finished: raise --steps" in capsys.readouterr().out and len(log(tmp_path)) == 3
    train(make_config(out=str(tmp_path), **{**TINY, "steps": 8}))
    assert "steps 6 to 8" in capsys.readouterr().out
    assert [line["step"] for line in log(tmp_path)] == [2, 4, 6, 8]


@pytest.mark.parametrize("method", METHODS)
def test_each_row_trains_and_samples_on_the_demo_and_its_ema_follows(method, tmp_path):
    shallow = {"self_depth": 3} if method == "sra" else {}
    config = make_config(method=method, out=str(tmp_path), **TINY, **shallow)
    train(config)
    state = checkpoint(tmp_path)
    assert (tmp_path / "samples-0000006.png").exists() and len(log(tmp_path)) == 3
    fresh = build_model(maskalign.Config(**state["config"])).state_dict()
    assert state["step"] == 6 and set(state) == {"model", "ema", "optimizer", "step", "config"}
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
    options = {**TINY, "steps": 3, "ema_decay": 0.9, "save_every": 1, "keep": 3}
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
        if len(saves) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop_after_the_first_save)
    config = make_config(out=str(tmp_path / "cut"), **TINY)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert checkpoint(tmp_path / "cut")["step"] == 3
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 0}\n{"step": 5, "lo')  # written past the checkpoint
    train(config)
    whole, cut = checkpoint(one_run), checkpoint(tmp_path / "cut")
    for name in ("model", "ema", "optimizer", "step"):
        assert_same(whole[name], cut[name])
    assert [line["step"] for line in log(tmp_path / "cut")] == [2, 4, 6]


def test_n_steps_and_n_more_equal_2n_steps(one_run, tmp_path):
    for steps in (2, 6):
        train(make_config(out=str(tmp_path / "parts"), **{**TINY, "steps": steps}))
    for name in ("model", "ema", "optimizer", "step"):
        assert_same(checkpoint(one_run)[name], checkpoint(tmp_path / "parts")[name])


def test_a_typed_learning_rate_counts_after_a_resume(one_step):
    train(make_config(out=str(one_step), **{**TINY, "steps": 2}, lr=1e-5, override=True))
    assert checkpoint(one_step)["optimizer"]["param_groups"][0]["lr"] == 1e-5


def test_a_save_that_fails_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    train(make_config(out=str(tmp_path), **{**TINY, "steps": 3}))

    def disk_full(state, path):
        Path(path).write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(BadInput, match="cannot save .*step-0000006.pt .No space left on device"):
        train(make_config(out=str(tmp_path), **TINY))
    assert checkpoint(tmp_path)["step"] == 3


def test_two_processes_follow_one(one_run, tmp_path):
    """Same images, noise, masks and dropped labels; the sums differ by rounding alone."""
    launch("--out", tmp_path / "two", processes=2)
    launch("--out", tmp_path / "accum", "--accum", 2, processes=2)
    one = checkpoint(one_run)
    for other in ("two", "accum"):
        state = checkpoint(tmp_path / other)
        for name in ("model", "ema"):
            assert_same(one[name], state[name], rtol=1e-3, atol=2e-5)
        for a, b in zip(log(one_run), log(tmp_path / other), strict=True):
            assert all(
                a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-4)
                for key in ("loss", "denoise", "cls", "align", "align_full", "grad_norm")
            )


def test_another_seed_is_another_trajectory(one_run, tmp_path):
    train(make_config(out=str(tmp_path), seed=1, **{**TINY, "steps": 2}))
    a, b = (log(out)[0]["denoise"] for out in (one_run, tmp_path))
    assert abs(a - b) > 1e-4


def test_training_lowers_every_loss(tmp_path):
    train(
        make_config(
            out=str(tmp_path),
            **{**TINY, "steps": 40, "log_every": 20, "teacher_steps": 40, "batch_size": 16},
        )
    )
    first, *_, last = log(tmp_path)
    assert all(last[name] < first[name] for name in ("loss", "denoise", "align", "align_full"))


def test_full_token_alignment_compares_masked_and_unmasked_runs(tmp_path):
    """Same fixed images, same noise: before training, the mask makes no difference to it."""
    values = []
    for mask_ratio in (0.0, 0.75):
        out = tmp_path / str(mask_ratio)
        train(make_config(out=str(out), mask_ratio=mask_ratio, lr=1e-12, **{**TINY, "steps": 1}))
        values.append(log(out)[0]["align_full"])
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_image_folder_with_teacher_and_vae_files_trains_from_cache_as_on_the_fly(
    vae_file, dino_file, tmp_path, capsys
):
    """The ImageNet path, small: true file formats, made-up values, two processes prepare."""
    folder = make_folder(tmp_path / "data", per_class=5, size=(70, 50))
    flags = [
        f"--data={folder}",
        f"--vae_weights={vae_file}",
        "--image_size=32",
        "--workers=1",
        "--teacher=vit_small_patch14_dinov2.lvd142m",
        f"--teacher_weights={dino_file}",
        "--batch_size=4",
        "--steps=2",
    ]
    train(parse_config([*TINY_FLAGS, *flags, f"--out={tmp_path}/direct"]))
    launch(*flags, "--prepare", processes=2)
    train(parse_config([*TINY_FLAGS, *flags, f"--out={tmp_path}/cached"]))
    assert "cached latents" in capsys.readouterr().out
    direct, cached = (checkpoint(tmp_path / name) for name in ("direct", "cached"))
    assert direct["config"]["class_names"] == ("cat", "dog") and direct["config"]["z_dim"] == 384
    assert_same(direct["model"], cached["model"], rtol=1e-2, atol=1e-3)  # float16 latents
    assert (tmp_path / "cached" / "samples-0000002.png").exists()


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
    assert errors.count("\n") == 1 and not (tmp_path / "out").exists()


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
    x = euler_ode(
        model.eval(),
        torch.randn(2, *config.latent_shape),
        torch.tensor([0, 7]),
        torch.randn(2, config.z_dim),
        num_steps=2,
    )
    assert x.shape == (2, 3, 24, 24) and torch.isfinite(x).all()
    assert list(index_batches(8192, config, 1, 0, 1)) == []
