"""A run cannot be lost: kills, full disks, damaged files, broken numbers, dead ranks, odd input."""

import dataclasses
import errno
import functools
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
from processes import start_ranks, torchrun
from test_data import make_folder
from test_training import TINY, assert_equal_runs, assert_same, checkpoint, log

import maskalign
from maskalign import BadInput, Config, make_config, parse_config, setting, train

# log_every divides neither save_every nor most steps of a kill: sums must survive with the weights.
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
    return torchrun(2, "maskalign.py", *flags_of(folder / "out"), *flags), time.monotonic()


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
            maskalign.read_weights(str(tmp_path / "latest.pt"))  # it is whole
    (run,) = start(tmp_path)
    assert run.end()[0] == 0
    assert_equal_runs(whole, tmp_path)


class Killed(BaseException):
    """Stands for kill -9: nothing of the program's own may catch it."""


@pytest.mark.parametrize("operation", ["save", "fsync", "replace"])
@pytest.mark.parametrize("file", ["latest.pt", "milestone"])
def test_killed_at_each_moment_of_a_save_it_ends_bit_equal(
    operation, file, whole, tmp_path, monkeypatch
):
    """In the second save, of step 4; it writes a milestone first, and then latest.pt."""
    at, calls = 2 + (file == "latest.pt"), []
    module = torch if operation == "save" else os
    real = getattr(module, operation)

    def killed(*args):
        calls.append(args)
        if len(calls) == at:
            if operation == "save":
                Path(args[1]).write_bytes(b"half a checkpoint")
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, operation, killed)
        with pytest.raises(Killed):
            train(config(tmp_path, milestone_every=4))
    assert checkpoint(tmp_path)["step"] == 2
    assert (tmp_path / "step-0000004.pt").exists() == (file == "latest.pt")
    train(config(tmp_path, milestone_every=4))
    assert_equal_runs(whole, tmp_path)
    kept = sorted(path.name for path in tmp_path.glob("*[!k]"))
    assert kept[:3] == ["latest.pt", "log.jsonl", "samples-0000008.png"]
    assert kept[3:] == ["step-0000004.pt", "step-0000008.pt"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("damage", ["truncated", "one bit flipped", "empty", "noise"])
def test_a_damaged_checkpoint_is_one_sentence_and_nothing_is_touched(damage, tmp_path):
    train(config(tmp_path, steps=2, milestone_every=2))
    latest = tmp_path / "latest.pt"
    content = bytearray(latest.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    elif damage == "one bit flipped":
        content[len(content) // 2] ^= 4
    latest.write_bytes(dict(empty=b"", noise=b"noise").get(damage, content))
    before = contents(tmp_path)
    with pytest.raises(BadInput, match=f"cannot read {latest} ") as error:
        train(config(tmp_path))
    assert "\n" not in str(error.value)
    assert contents(tmp_path) == before

    # The way out: a milestone in its place.
    os.replace(tmp_path / "step-0000002.pt", latest)
    train(config(tmp_path, steps=3))
    assert checkpoint(tmp_path)["step"] == 3


def test_latest_is_replaced_and_milestones_stay(tmp_path):
    train(config(tmp_path, save_every=2, milestone_every=3))
    kept = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert kept == ["latest.pt", "step-0000003.pt", "step-0000006.pt"]
    steps = [torch.load(tmp_path / name, weights_only=True)["step"] for name in kept]
    assert steps == [8, 3, 6] and not list(tmp_path.glob("*.tmp"))


def test_a_milestone_is_what_the_run_was_then(whole, tmp_path):
    train(config(tmp_path, milestone_every=4))
    os.replace(tmp_path / "step-0000004.pt", tmp_path / "latest.pt")
    train(config(tmp_path))
    assert_equal_runs(whole, tmp_path)


def test_a_run_killed_before_its_last_picture_draws_it_when_typed_again(tmp_path, monkeypatch):
    def killed(run, sampler):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(maskalign, "preview", killed)
        with pytest.raises(Killed):
            train(config(tmp_path))
    assert checkpoint(tmp_path)["step"] == 8 and not list(tmp_path.glob("*.png"))
    train(config(tmp_path))
    assert (tmp_path / "samples-0000008.png").exists()


def test_a_second_run_in_the_same_folder_is_one_sentence(tmp_path):
    """As after kill -9 of torchrun: it dies at once, its ranks go on."""
    (first,) = start(tmp_path, "--steps=100000", "--save_every=100000")
    (second,) = start_ranks(1, "maskalign.py", *flags_of(tmp_path))
    status, shown, errors = second.end(timeout=60)
    sentence = f"maskalign.py: cannot lock {tmp_path}: end the run in there, or name another"
    assert status == 1 and shown == "" and errors.startswith(sentence), errors
    assert errors.count("\n") == 1 and first.runs()
    first.kill()
    first.end()
    (third,) = start(tmp_path)
    assert third.end()[0] == 0 and checkpoint(tmp_path)["step"] == 8


# ---- signals


def test_a_second_signal_ends_the_program_at_once(tmp_path):
    """As Ctrl-C while the teacher trains, where no step comes to an end."""
    argv = [*flags_of(tmp_path), "--method=reg", "--teacher_steps=100000"]
    (run,) = start_ranks(1, "maskalign.py", *argv)
    while run.runs() and "training the teacher" not in run.read()[1]:
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGINT)
    time.sleep(0.3)
    assert run.runs()
    os.kill(run.pid, signal.SIGINT)
    assert run.end(timeout=20)[0] == -signal.SIGINT
    assert os.listdir(tmp_path) == ["run.lock"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits_0(number, whole, tmp_path):
    (run,) = start(tmp_path, "--steps=100000", "--save_every=100000")
    os.kill(run.pid, number)
    status, shown, errors = run.end(timeout=60)
    step = checkpoint(tmp_path)["step"]
    assert status == 0 and 0 < step < 100_000, errors
    assert f"stopped and saved at step {step}: the same command goes on" in shown
    assert [line["step"] for line in log(tmp_path)] == list(range(3, step + 1, 3))
    assert list(tmp_path.glob("*.png")) == []  # that is for the end of a run
    if step < 8:
        train(config(tmp_path))
        assert_equal_runs(whole, tmp_path)


def test_a_run_that_is_told_to_stop_leaves_no_trace_in_its_log(whole, tmp_path):
    """Told between any two steps: its signals come from a list here."""
    for stop in (1, 3, 7):
        signals = []

        def draw(run, generator, stop=stop, signals=signals):
            if run.step == stop - 1:
                signals.append(signal.SIGTERM)
            return maskalign.draw_step(run, generator)

        train(config(tmp_path), draw_step=draw, signals=signals)
        assert checkpoint(tmp_path)["step"] == stop
    train(config(tmp_path))
    assert_equal_runs(whole, tmp_path)


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
    step = checkpoint(tmp_path)["step"]
    assert 0 < step < 100_000 and log(tmp_path)[-1]["step"] == step - step % 3


# ---- broken numbers, disks, files and ranks


@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize(
    "every, good, found",
    [
        (dict(save_every=5), 5, 8),
        (dict(save_every=5, log_every=7), 5, 7),
        (dict(save_every=3, log_every=6), 3, 6),
        (dict(milestone_every=4), 4, 8),
    ],
)
def test_weights_that_are_not_finite_are_never_saved(bad, every, good, found, tmp_path):
    """They break in step 6, and are found at the next line of the log, save, or end."""
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
    with pytest.raises(BadInput, match=f"step {found}: weights not finite.*smaller --lr") as error:
        train(settings, training_losses=broken)
    assert "\n" not in str(error.value) and len(steps) == found
    assert checkpoint(tmp_path)["step"] == good
    for path in tmp_path.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        for name in ("model", "ema"):
            assert all(value.isfinite().all() for value in state[name].values()), path
    assert not list(tmp_path.glob("samples-*.png"))

    # As the sentence says: the same command goes on from the checkpoint.
    train(config(tmp_path, lr=1e-4))
    assert checkpoint(tmp_path)["step"] == 8


def test_a_signal_saves_no_weights_that_are_not_finite(tmp_path):
    def broken(*args, **options):
        losses = maskalign.training_losses(*args, **options)
        return losses | dict(loss=losses["loss"] * math.nan)

    with pytest.raises(BadInput, match="step 1: weights not finite"):
        train(config(tmp_path), training_losses=broken, signals=[signal.SIGTERM])
    assert not list(tmp_path.glob("*.pt"))


def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(tmp_path):
    train(config(tmp_path, steps=3, save_every=3))
    limit = (tmp_path / "latest.pt").stat().st_size // 2

    small_disk = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    (run,) = start(tmp_path, "--steps=6", "--save_every=3", before=small_disk)
    status, _, errors = run.end(timeout=60)
    assert status == 1 and f"cannot save {tmp_path}/latest.pt" in errors
    assert checkpoint(tmp_path)["step"] == 3
    train(config(tmp_path, steps=6))  # there is room again
    assert checkpoint(tmp_path)["step"] == 6 and not list(tmp_path.glob("*.tmp"))


def test_a_disk_too_small_for_the_latents_is_one_sentence(tmp_path, small_vae_file):
    folder = make_folder(tmp_path / "data", per_class=9)
    flags = (f"--data={folder}", f"--vae_weights={small_vae_file}", "--image_size=128")
    small_disk = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (4000, 4000))
    (run,) = start(tmp_path / "out", *flags, "--workers=0", before=small_disk)  # 4096 for an image
    status, _, errors = run.end(timeout=60)
    assert status == 1 and errors.splitlines()[-1].startswith("maskalign.py: ")
    assert "Traceback" not in errors


def test_an_error_of_the_system_is_one_sentence(tmp_path, monkeypatch):
    """A disk may also be full when a row of latents, a line of the log or a picture is written."""

    def full(config, signals):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "log.jsonl")

    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["/somewhere/fork.py", "--out=run"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        maskalign.main(full)
    assert caught.value.code == "fork.py: [Errno 28] No space left on device: 'log.jsonl'"


def test_a_mistake_of_ours_keeps_its_traceback(tmp_path, monkeypatch):
    def wrong(config, signals):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["maskalign.py", "--out=run"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        maskalign.main(wrong)


def test_a_failing_rank_ends_the_others_within_a_minute_with_its_error_first(failing_job):
    job, began = failing_job
    status, _, errors = job.end(timeout=max(0, began + 60 - time.monotonic()))
    assert status != 0
    lines = [line for line in errors.splitlines() if "Error" in line or "maskalign.py:" in line]
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
    assert "DataLoader worker" in said[0] or "Connection reset" in said[0]
    assert checkpoint(tmp_path / "out")["step"] > 0


def test_no_file_that_is_loaded_can_run_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    out = tmp_path / "out"
    out.mkdir()
    torch.save({"model": Attack(), "step": 1}, out / "latest.pt")
    with pytest.raises(BadInput, match="cannot read .*latest.pt"):
        train(config(out))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change, told",
    [
        (
            lambda state: state.pop("config"),
            "is no checkpoint of this program: .*KeyError: 'config'",
        ),
        (lambda state: state.update(config=[1]), "is no checkpoint of this program"),
        (lambda state: state.clear(), "is no checkpoint of this program"),
        (lambda state: state.pop("ema"), "does not fit the network: .*KeyError: 'ema'"),
        (lambda state: state.pop("step"), "does not fit the network: .*KeyError: 'step'"),
        (lambda state: state.update(step=None), "does not fit the network"),
        (lambda state: state.update(optimizer={}), "does not fit the network"),
        (lambda state: state["model"].popitem(), "does not fit the network: .*Missing key"),
        (lambda state: state["ema"].update(pos_embed=torch.ones(3)), "does not fit the network"),
    ],
)
def test_a_checkpoint_of_something_else_is_one_sentence(change, told, whole, tmp_path):
    state = checkpoint(whole)
    change(state)
    torch.save(state, tmp_path / "latest.pt")
    before = contents(tmp_path)
    with pytest.raises(BadInput, match=f"latest.pt .*{told}") as error:
        train(config(tmp_path))
    assert "\n" not in str(error.value) and contents(tmp_path) == before


def test_a_bad_checkpoint_is_told_before_the_teacher_is_trained(whole, tmp_path):
    def not_yet(*args):
        raise AssertionError("the teacher comes later")

    (tmp_path / "latest.pt").write_bytes((whole / "latest.pt").read_bytes()[:5000])
    with pytest.raises(BadInput, match="cannot read "):
        train(config(tmp_path, method="reg"), build_teacher=not_yet)
    (tmp_path / "latest.pt").write_bytes((whole / "latest.pt").read_bytes())
    with pytest.raises(BadInput, match="has other settings"):
        train(config(tmp_path, method="reg"), build_teacher=not_yet)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_of_what_torchrun_sets_is_one_sentence(name, monkeypatch, tmp_path):
    monkeypatch.setenv(name, "1")
    with pytest.raises(BadInput, match="only one of RANK and WORLD_SIZE is set"):
        train(config(tmp_path))


# ---- settings


def test_settings_that_change_the_result_are_refused_and_nothing_is_touched(tmp_path):
    train(config(tmp_path, steps=2))
    before = contents(tmp_path)
    for changes, told in (
        (dict(label_dropout=0.2), "label_dropout 0.1 there, 0.2 here"),
        (dict(seed=1), "seed 0 there, 1 here"),
        (dict(batch_size=16), "batch_size 8 there, 16 here"),
        (dict(hidden_size=64), "hidden_size 32 there, 64 here"),
    ):
        with pytest.raises(BadInput, match=rf"other settings \({told}\): name another --out"):
            train(config(tmp_path, **changes))
    assert contents(tmp_path) == before


def test_settings_that_do_not_are_accepted(tmp_path):
    train(config(tmp_path, steps=2))
    free = dict(log_every=1, save_every=9, milestone_every=7, accum=2, preview_steps=2, lr=1e-4)
    train(config(tmp_path, steps=3, **free))
    state = checkpoint(tmp_path)
    assert state["step"] == 3 and free.items() <= state["config"].items()


@dataclasses.dataclass(frozen=True)
class ForkConfig(Config):
    """Its own settings stand behind ours: each tells for itself whether a resume may change it."""

    method: str = setting("fork", "this fork")
    warmth: float = setting(0.5, "ours: changes the result")
    chatty: bool = setting(False, "ours: changes nothing", free=True)
    plain: int = 3


def test_a_forks_setting_is_free_only_if_it_says_so(tmp_path):
    def run(**changes):
        train(make_config(ForkConfig, **{**TINY, "steps": 1, "out": str(tmp_path), **changes}))

    run()
    with pytest.raises(BadInput, match=r"other settings \(warmth 0.5 there, 0.25 here\)"):
        run(warmth=0.25)
    with pytest.raises(BadInput, match=r"other settings \(plain 3 there, 4 here\)"):
        run(plain=4)
    run(chatty=True, steps=2)
    assert checkpoint(tmp_path)["config"]["chatty"] and checkpoint(tmp_path)["step"] == 2
    with pytest.raises(BadInput, match=r"\(method fork there, maskalign here\)"):
        train(make_config(**{**TINY, "out": str(tmp_path)}))


def test_what_is_typed_as_free_decides_nothing_about_the_weights(whole, tmp_path):
    """All but lr, steps and accum, whose sums are taken in another order: equal to the bit."""
    train(config(tmp_path, steps=3, workers=1, log_every=2, save_every=1, sample_every=2))
    train(config(tmp_path, preview_steps=2, milestone_every=2))
    for name in ("model", "ema", "optimizer", "step"):
        assert_same(checkpoint(whole)[name], checkpoint(tmp_path)[name])


def test_random_settings_give_a_config_or_one_sentence(capsys):
    """Fuzz: flags of every type with values that may or may not make sense."""
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
