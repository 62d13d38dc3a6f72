"""A run cannot be lost: kills, full disks, damaged files, broken numbers, dead ranks, two runs."""

import functools
import json
import math
import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from processes import start_ranks, torchrun
from test_data import make_folder
from test_training import TINY, assert_equal_runs, assert_same, checkpoint, log

import maskalign
from maskalign import make_config, train

SETTINGS = {**TINY, "method": "sit", "steps": 8, "save_every": 2, "log_every": 3}


def config(out, **changes):
    return make_config(**{**SETTINGS, "out": str(out), **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    train(config(out))
    return out


def flags_of(out):
    return [f"--{name}={value}" for name, value in {**SETTINGS, "out": out}.items()]


@pytest.fixture(scope="module", autouse=True)
def failing_job(tmp_path_factory):
    """A job with an image that cannot be read. It imports torch anew: so it starts first."""
    folder = tmp_path_factory.mktemp("failing")
    data = make_folder(folder / "data", per_class=9)
    (folder / "data" / "cat" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    flags = (f"--data={data}", "--vae=none", "--image_size=16", "--workers=0", "--batch_size=2")
    return torchrun(2, "maskalign.py", *flags_of(folder / "out"), *flags)


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
        if (tmp_path / "latest.pt").exists():
            checkpoint(tmp_path)  # it is whole
    (run,) = start(tmp_path)
    assert run.end()[0] == 0
    assert_equal_runs(whole, tmp_path)


def test_ctrl_c_is_a_kill(whole, tmp_path):
    (run,) = start(tmp_path, "--steps=100000", "--save_every=2")
    while not (tmp_path / "latest.pt").exists():
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGINT)
    assert run.end(timeout=60)[0] != 0
    step = checkpoint(tmp_path)["step"]
    assert 0 < step < 100_000 and step % 2 == 0
    if step < 8:
        train(config(tmp_path))
        assert_equal_runs(whole, tmp_path)


class Killed(BaseException):
    """Stands for kill -9: nothing of the program's own may catch it."""


@pytest.mark.parametrize("operation", ["save", "replace"])
def test_killed_at_each_moment_of_a_save_it_ends_bit_equal(operation, whole, tmp_path, monkeypatch):
    """In the second save, of step 4."""
    calls = []
    module = torch if operation == "save" else os
    real = getattr(module, operation)

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            if operation == "save":
                Path(args[1]).write_bytes(b"half a checkpoint")
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, operation, killed)
        with pytest.raises(Killed):
            train(config(tmp_path))
    assert checkpoint(tmp_path)["step"] == 2
    train(config(tmp_path))
    assert_equal_runs(whole, tmp_path)


def die_after_two_steps():
    """Makes this process kill itself in the log line of step 3, which the other one waits for."""
    write_log = maskalign.write_log

    def write_or_die(config, step, *args):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        write_log(config, step, *args)

    maskalign.write_log = write_or_die


def test_a_killed_rank_of_two_leaves_a_checkpoint_from_which_both_continue(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ("--steps=4", "--save_every=1")
    ends = [rank.end() for rank in start(whole, *flags, processes=2)]
    assert [status for status, _, _ in ends] == [0, 0], ends
    ranks = start(cut, *flags, processes=2, before=[None, die_after_two_steps])
    assert ranks[1].end()[0] == -signal.SIGKILL
    ranks[0].kill()  # torchrun does this
    ranks[0].end()
    assert checkpoint(cut)["step"] == 2
    for rank in start(cut, *flags, processes=2):
        assert rank.end()[0] == 0
    for name in ("model", "ema"):
        one, two = checkpoint(whole)[name], checkpoint(cut)[name]
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_two_runs_in_one_folder_never_tear_a_file(whole, tmp_path):
    """As ranks that outlived a killed torchrun: both write the same steps."""
    runs = [run for _ in range(2) for run in start_ranks(1, "maskalign.py", *flags_of(tmp_path))]
    while any(run.runs() for run in runs):
        if (tmp_path / "latest.pt").exists():
            checkpoint(tmp_path)  # whole at every moment
    assert [run.end()[0] for run in runs] == [0, 0]
    assert_equal_runs(whole, tmp_path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "other"])
def test_a_damaged_checkpoint_is_an_error_and_nothing_is_touched(damage, whole, tmp_path):
    content = (whole / "latest.pt").read_bytes()
    damaged = dict(truncated=content[: len(content) // 2], empty=b"", noise=b"noise")
    latest = tmp_path / "latest.pt"
    latest.write_bytes(damaged.get(damage, b""))
    if damage == "other":
        torch.save({"step": 3}, latest)
    before = contents(tmp_path)
    with pytest.raises(Exception):  # noqa: B017, torch has several
        train(config(tmp_path))
    assert contents(tmp_path) == before


def test_no_file_that_is_loaded_can_run_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    out = tmp_path / "out"
    out.mkdir()
    torch.save({"model": Attack(), "step": 1}, out / "latest.pt")
    with pytest.raises(Exception):  # noqa: B017, torch has several
        train(config(out))
    assert not (tmp_path / "ran").exists()


def test_the_checkpoint_is_not_mapped_so_it_can_be_replaced_on_windows(tmp_path, monkeypatch):
    """A mapped file stays open: Windows does not replace it."""
    train(config(tmp_path, steps=2))
    options, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kw: options.append(kw) or load(*args, **kw))
    train(config(tmp_path, steps=4))
    assert len(options) == 1 and not options[0].get("mmap")


# ---- broken numbers, disks, files and ranks


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize(
    "every, good, found",
    [
        (dict(save_every=5), 5, 8),
        (dict(save_every=5, log_every=7), 5, 7),
        (dict(save_every=3, log_every=6), 3, 6),
        (dict(save_every=6, log_every=2), None, 6),
    ],
)
def test_nothing_is_saved_after_a_number_that_is_not_finite(bad, every, good, found, tmp_path):
    """It breaks in step 6, and is found at the next line of the log, save, or end."""
    steps = []

    def broken(*args, **options):
        losses = maskalign.training_losses(*args, **options)
        steps.append(1)
        if len(steps) == 6 and bad == "loss":
            losses["loss"] = losses["loss"] * math.nan
        elif len(steps) == 6:
            losses["loss"].register_hook(lambda gradient: gradient * math.inf)
        return losses

    settings = config(tmp_path, **(dict(log_every=100, save_every=100) | every))
    with pytest.raises(AssertionError, match=f"step {found}: ") as error:
        train(settings, losses=broken)
    assert "\n" not in str(error.value) and len(steps) == found
    kept = list(tmp_path.glob("*.pt"))
    assert bool(kept) == bool(good)
    if good:
        state = checkpoint(tmp_path)
        assert state["step"] == good
        for name in ("model", "ema"):
            assert all(value.isfinite().all() for value in state[name].values())
        assert [path.stem for path in tmp_path.glob("*.png")] == [f"samples-{good:07d}"]
    train(config(tmp_path, lr=1e-4))  # the same command continues from the checkpoint
    assert checkpoint(tmp_path)["step"] == 8


def test_a_full_disk_is_an_error_and_the_old_checkpoint_stays(tmp_path):
    train(config(tmp_path, steps=3, save_every=3))
    limit = (tmp_path / "latest.pt").stat().st_size // 2
    before = (tmp_path / "latest.pt").read_bytes()

    small_disk = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    (run,) = start(tmp_path, "--steps=6", "--save_every=3", before=small_disk)
    assert run.end(timeout=60)[0] != 0
    assert (tmp_path / "latest.pt").read_bytes() == before
    train(config(tmp_path, steps=6))  # there is room again
    assert checkpoint(tmp_path)["step"] == 6


def test_a_failing_rank_ends_the_others_with_its_error_first(failing_job):
    """Long before Gloo's half an hour has passed."""
    status, _, errors = failing_job.end()
    assert status != 0
    lines = [line for line in errors.splitlines() if line.startswith(("OSError", "[rank"))]
    assert "cat/3.png" in "".join(lines[:20])


def test_a_dead_data_worker_ends_the_run_and_the_checkpoint_stays(tmp_path):
    folder = make_folder(tmp_path / "data", per_class=9)
    flags = (f"--data={folder}", "--vae=none", "--image_size=16", "--workers=1", "--batch_size=2")
    (run,) = start(tmp_path / "out", *flags, "--steps=100000", "--save_every=1")
    while run.runs() and not (tmp_path / "out" / "latest.pt").exists():
        time.sleep(0.02)  # it is saved after the line of the log
    worker = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, check=True)
    os.kill(int(worker.stdout.split()[-1]), signal.SIGKILL)
    status, _, errors = run.end(timeout=60)
    assert status != 0 and ("DataLoader worker" in errors or "Connection re" in errors), errors
    assert checkpoint(tmp_path / "out")["step"] > 0


def test_ranks_that_found_other_steps_never_train(tmp_path):
    """As two machines without a shared disk: only the first has a latest.pt."""
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    train(config(one, steps=4))
    before = contents(one)
    flags = [*flags_of(tmp_path)[:-1], "--out=."]
    places = [functools.partial(os.chdir, folder) for folder in (one, two)]
    ranks = start_ranks(2, "maskalign.py", *flags, before=places)
    ends = [rank.end(timeout=60) for rank in ranks]
    assert all(status != 0 for status, _, _ in ends)
    assert all("AssertionError: steps [4, 0]" in errors for _, _, errors in ends), ends
    assert contents(one) == before and not contents(two)


@pytest.mark.parametrize("rank", [0, 1])
def test_whichever_rank_lacks_the_checkpoint_both_stop(rank, tmp_path, monkeypatch):
    others = [0, 4] if rank == 0 else [4, 0]

    def gather(found, step):
        assert step == others[rank] == 0
        found[:] = others

    monkeypatch.setattr(maskalign.dist, "all_gather_object", gather)
    with pytest.raises(AssertionError, match="steps .* all must share"):
        maskalign.load_checkpoint(config(tmp_path), {}, rank, 2)


def test_another_number_of_workers_steps_and_lines_decides_nothing(whole, tmp_path):
    """Equal to the bit, also when that changes on the way."""
    train(config(tmp_path, steps=3, workers=1, log_every=2, save_every=1))
    train(config(tmp_path, preview_steps=2))
    for name in ("model", "ema", "optimizer", "step"):
        assert_same(checkpoint(whole)[name], checkpoint(tmp_path)[name])


def test_the_log_is_valid_json_after_every_end(whole):
    lines = (whole / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [line["step"] for line in log(whole)]


def test_no_bar_is_shown_where_no_terminal_is(whole, tmp_path):
    """A bar in a file is 40 times the log."""
    (run,) = start(tmp_path, "--method=reg", "--teacher_steps=3", "--steps=2")
    status, _, errors = run.end()
    assert status == 0 and "%" not in errors and "\r" not in errors
