"""A run cannot be lost: kills, full disks, damaged files, broken numbers, dead ranks, odd input."""

import functools
import inspect
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import ROOT, start_ranks
from test_data import make_folder
from test_training import TINY, assert_same, checkpoint, log

import maskalign
from maskalign import BadInput, make_config, parse_config, train

SETTINGS = {**TINY, "method": "sit", "steps": 8, "save_every": 2, "log_every": 1}
PARTS = ("model", "ema", "optimizer", "step")


def config(out, **changes):
    return make_config(**{**SETTINGS, "out": str(out), **changes})


def assert_equal_runs(a, b):
    for name in PARTS:
        assert_same(checkpoint(a)[name], checkpoint(b)[name])
    for x, y in zip(log(a), log(b), strict=True):
        assert {**x, "images_per_s": 0} == {**y, "images_per_s": 0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    train(config(out))
    return out


def flags_of(out):
    return [f"--{name}={value}" for name, value in {**SETTINGS, "out": out}.items()]


def start(out, *flags, processes=1, **options):
    """The program in the background, its ranks; returns once it has logged a step."""
    ranks = start_ranks(processes, "maskalign.py", *flags_of(out), *flags, **options)
    log_file = Path(out) / "log.jsonl"
    while ranks[0].runs() and not (log_file.exists() and log_file.read_text()):
        time.sleep(0.02)
    return ranks


# ---- kills


def test_killed_at_random_moments_it_resumes_and_ends_bit_equal(whole, tmp_path):
    chance = random.Random(0)
    for _ in range(3):
        (run,) = start(tmp_path)
        time.sleep(chance.uniform(0, 0.6))
        run.kill()
        run.end()
        if list(tmp_path.glob("step-*.pt")):
            maskalign.read_weights(str(max(tmp_path.glob("step-*.pt"))))  # the newest is whole
    (run,) = start(tmp_path)
    assert run.end()[0] == 0
    assert_equal_runs(whole, tmp_path)


class Killed(BaseException):
    """Stands for kill -9: nothing of the program's own may catch it."""


@pytest.mark.parametrize("operation", ["save", "fsync", "replace", "link", "second replace"])
def test_killed_at_each_moment_of_a_save_it_ends_bit_equal(operation, whole, tmp_path, monkeypatch):
    name, calls = operation.split()[-1], []
    at = 4 if operation == "second replace" else 3 if name == "replace" else 2  # in the second save
    module = torch if name == "save" else os
    real = getattr(module, name)

    def killed(*args):
        calls.append(args)
        if len(calls) == at:
            if name == "save":
                Path(args[1]).write_bytes(b"half a checkpoint")
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed)
        with pytest.raises(Killed):
            train(config(tmp_path))
    assert checkpoint(tmp_path)["step"] in (2, 4)
    train(config(tmp_path))
    assert_equal_runs(whole, tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "one bit flipped", "empty"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    damage, whole, tmp_path, capsys
):
    train(config(tmp_path, steps=4))
    newest = tmp_path / "step-0000004.pt"
    content = bytearray(newest.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "one bit flipped":
        content[len(content) // 2] ^= 4
    newest.write_bytes(b"" if damage == "empty" else content)
    train(config(tmp_path))
    shown = capsys.readouterr().out
    assert f"cannot read {newest}" in shown and "steps 2 to 8" in shown
    assert_equal_runs(whole, tmp_path)
    assert (tmp_path / "step-0000004.pt.damaged").exists()


def test_without_any_whole_checkpoint_nothing_is_overwritten(tmp_path):
    train(config(tmp_path, steps=2))
    (tmp_path / "step-0000002.pt").write_bytes(b"noise")  # latest.pt is the same file
    with pytest.raises(BadInput, match="holds no whole checkpoint: delete it, or name another"):
        train(config(tmp_path))


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept_and_latest_is_the_newest(keep, tmp_path):
    train(config(tmp_path, keep=keep))
    kept = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert kept == ["latest.pt", *[f"step-{s:07d}.pt" for s in (2, 4, 6, 8)[-keep:]]]
    assert os.path.samefile(tmp_path / "latest.pt", tmp_path / "step-0000008.pt")
    assert not list(tmp_path.glob("*.tmp"))


def test_the_last_checkpoint_is_deleted_only_after_the_next_is_on_disk(tmp_path, monkeypatch):
    seen, real = [], Path.unlink

    def watched(self, **options):
        if self.suffix == ".pt":
            seen.append(max(p.name for p in tmp_path.glob("step-*.pt")) > self.name)
            maskalign.read_weights(str(tmp_path / "latest.pt"))
        real(self, **options)

    monkeypatch.setattr(Path, "unlink", watched)
    train(config(tmp_path, keep=1))
    assert seen == [True] * 3


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits_0(number, whole, tmp_path):
    (run,) = start(tmp_path, "--steps=100000", "--save_every=100000")
    os.kill(run.pid, number)
    status, shown, _ = run.end(timeout=60)
    step = checkpoint(tmp_path)["step"]
    assert status == 0 and 0 < step < 100_000
    assert f"stopped and saved at step {step}: the same command goes on" in shown
    if step < 8:
        train(config(tmp_path))
        assert_same(checkpoint(whole)["model"], checkpoint(tmp_path)["model"])


def test_a_signal_to_the_whole_job_leaves_the_data_workers_alive_for_the_last_step(tmp_path):
    folder = make_folder(tmp_path / "data", per_class=9)
    flags = (f"--data={folder}", "--vae=none", "--image_size=16", "--workers=2", "--batch_size=2")
    flags += ("--steps=100000", "--save_every=100000")
    (run,) = start(tmp_path / "out", *flags, before=os.setsid)
    os.killpg(run.pid, signal.SIGTERM)
    status, shown, errors = run.end(timeout=60)
    assert status == 0 and "stopped and saved" in shown, errors
    assert checkpoint(tmp_path / "out")["step"] > 0


def test_all_ranks_stop_after_the_same_step_when_one_is_told_to(tmp_path):
    ranks = start(tmp_path, "--steps=100000", "--save_every=100000", processes=2)
    os.kill(ranks[1].pid, signal.SIGTERM)
    ends = [rank.end(timeout=60) for rank in ranks]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert [shown.count("stopped and saved at step") for _, shown, _ in ends] == [1, 0]
    assert checkpoint(tmp_path)["step"] == log(tmp_path)[-1]["step"]


# ---- broken numbers, disks, files and ranks


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_numbers_that_are_not_finite_never_reach_the_weights(bad, tmp_path, monkeypatch):
    real, calls = maskalign.training_losses, []

    def broken(model, *args, **options):
        losses = real(model, *args, **options)
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 6 and bad == "loss":
                losses["denoise"] = losses["denoise"] * math.nan
                losses["loss"] = losses["loss"] + losses["denoise"]
            elif len(calls) == 6:
                losses["loss"].register_hook(lambda g: g * math.inf)
        return losses

    monkeypatch.setattr(maskalign, "training_losses", broken)
    last, real_lerp = {}, torch._foreach_lerp_
    monkeypatch.setattr(
        torch,
        "_foreach_lerp_",
        lambda averaged, weights, w: (
            last.update({len(calls): [p.clone() for p in weights]})
            or real_lerp(averaged, weights, w)
        ),
    )
    parts = "loss, denoise" if bad == "loss" else "gradient"
    with pytest.raises(BadInput, match=f"step 6: {parts} not finite: .* are good"):
        train(config(tmp_path, log_every=8, save_every=5))
    assert checkpoint(tmp_path)["step"] == 5
    assert_same(last[5], last[8])  # from the bad step on, the weights stood still
    assert all(p.isfinite().all() for p in last[8])


def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(tmp_path):
    train(config(tmp_path, steps=3, save_every=3))
    limit = (tmp_path / "latest.pt").stat().st_size // 2

    small_disk = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    (run,) = start(tmp_path, "--steps=6", "--save_every=3", before=small_disk)
    status, _, errors = run.end(timeout=60)
    assert status == 1 and f"cannot save {tmp_path}/step-0000006.pt" in errors
    assert checkpoint(tmp_path)["step"] == 3 and not list(tmp_path.glob("*.tmp"))


def test_a_failing_rank_ends_the_others_within_a_minute_with_its_error_first(tmp_path):
    folder = make_folder(tmp_path / "data", per_class=9)
    (tmp_path / "data" / "cat" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    flags = (f"--data={folder}", "--vae=none", "--image_size=16", "--workers=0", "--batch_size=2")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, ROOT / "maskalign.py", *flags_of(tmp_path / "out"), *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode != 0
    lines = [line for line in run.stderr.splitlines() if "Error" in line or "maskalign.py:" in line]
    assert "cat/3.png" in lines[0]


def test_a_dead_data_worker_is_one_sentence_and_the_checkpoint_stays(tmp_path):
    folder = make_folder(tmp_path / "data", per_class=9)
    flags = (f"--data={folder}", "--vae=none", "--image_size=16", "--workers=1", "--batch_size=2")
    (run,) = start(tmp_path / "out", *flags, "--steps=100000", "--save_every=1")
    worker = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, check=True)
    os.kill(int(worker.stdout.split()[-1]), signal.SIGKILL)
    status, _, errors = run.end(timeout=60)
    said = [line for line in errors.splitlines() if line.startswith("maskalign.py: ")]
    assert status == 1 and len(said) == 1, errors
    assert "a data worker died" in said[0] and "fewer --workers" in said[0]
    assert checkpoint(tmp_path / "out")["step"] > 0


def test_no_file_that_is_loaded_can_run_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    out = tmp_path / "out"
    out.mkdir()
    for name in ("latest.pt", "step-0000001.pt"):
        torch.save({"model": Attack(), "step": 1}, out / name)
    with pytest.raises(BadInput, match="holds no whole checkpoint"):
        train(config(out))
    assert not (tmp_path / "ran").exists()


# ---- settings


def test_settings_that_change_the_result_need_override(tmp_path, capsys):
    train(config(tmp_path, steps=2))
    with pytest.raises(BadInput, match=r"other settings \(label_dropout 0.1 there, 0.2 here\)"):
        train(config(tmp_path, label_dropout=0.2))
    train(config(tmp_path, label_dropout=0.2, override=True, steps=4))
    assert "label_dropout 0.1 there, 0.2 here" in capsys.readouterr().out
    assert checkpoint(tmp_path)["config"]["label_dropout"] == 0.2


def test_settings_that_do_not_are_told_and_accepted(tmp_path, capsys):
    train(config(tmp_path, steps=2))
    train(config(tmp_path, steps=3, log_every=3, save_every=9, keep=5, accum=2))
    shown = capsys.readouterr().out
    for text in ("steps 2 there, 3 here", "log_every 1 there, 3 here", "accum 1 there, 2 here"):
        assert text in shown
    assert checkpoint(tmp_path)["step"] == 3


def test_random_settings_give_a_config_or_one_sentence(capsys, monkeypatch):
    """Fuzz: flags of every type with values that may or may not make sense."""
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))  # slow: --help
    chance, outcomes = random.Random(0), {"valid": 0, "refused": 0}
    odd = [
        -1,
        0,
        1,
        2,
        3,
        7,
        0.3,
        1.5,
        1e9,
        10**12,
        "nan",
        "inf",
        "-inf",
        "",
        "x",
        "SiT-B/2",
        "none",
    ]
    fields = {name: value for name, value in vars(make_config()).items() if name != "class_names"}
    for _ in range(120):
        flags = []
        for name in chance.sample(sorted(fields), chance.randint(1, 4)):
            if isinstance(fields[name], bool):
                flags.append(chance.choice(["--", "--no-"]) + name)
            else:
                flags.append(f"--{name}={chance.choice([*odd, fields[name]])}")
        try:
            assert parse_config(flags).steps >= 0
            outcomes["valid"] += 1
        except BadInput as error:
            assert "\n" not in str(error) and len(str(error)) > 10
            outcomes["refused"] += 1
        except SystemExit as error:  # argparse: a word where a number belongs
            assert error.code == 2 and "error:" in capsys.readouterr().err
            outcomes["refused"] += 1
    assert outcomes["valid"] > 10 and outcomes["refused"] > 50


def test_the_log_is_valid_json_after_every_end(whole):
    for line in (whole / "log.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] > 0
