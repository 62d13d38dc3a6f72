"""tests/table4.py: its counts are torch's, its step is train()'s, its table has every method."""

import itertools
import sys
from dataclasses import replace

import pytest
import rates
import table4
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import maskalign as ma
from maskalign import METHODS, make_config


def count_flops(c: ma.Config) -> tuple:
    """What torch counts for the two of model_flops."""
    model = ma.build_model(c)
    drawn = ma.draw_step(ma.Run(replace(c, batch_size=1)), ma.seeded("cpu", "flops"))
    inputs = (
        drawn["noise"],
        drawn["t"],
        torch.zeros(1, dtype=torch.long),
        drawn["cls_noise"] if c.class_token else None,
        drawn["ids_keep"],
    )
    # Fused attention computes QK^T once more in backward: not work that the model asks for.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = [part for part in model(*inputs) if part is not None]
        forward = counter.get_total_flops()
        sum(part.sum() for part in out).backward()
        return forward, counter.get_total_flops()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [{}, dict(mixer_depth=1, depth=3, z_dim=20)])
def test_flops_are_those_that_torch_counts(method, changes):
    config = make_config(method=method, **changes)
    assert rates.model_flops(config) == count_flops(config)


def test_tokens_through_the_blocks():
    kept = {method: rates.tokens(make_config(data="x", method=method))[:2] for method in METHODS}
    assert kept["reg"] == kept["maskalign-no-masking"] == (257, 257)
    assert kept["maskalign"] == kept["maskalign-no-mixing"] == (257, 193)
    assert kept["repa+maskalign"] == (256, 192)
    assert all(kept[method] == (256, 256) for method in ("sit", "repa"))


def test_token_floor_of_the_paper():
    floor = {m: rates.tokens(make_config(data="x", method=m))[2] for m in ("reg", "maskalign")}
    assert floor["reg"] == 1 and floor["maskalign"] == pytest.approx(0.8224, abs=1e-4)


def test_table_has_a_row_for_each_method(monkeypatch, capsys, tmp_path):
    out = tmp_path / "t.json"
    flags = ["--batch_size=2", "--depth=3", "--steps=1", "--threads=1", f"--json={out}"]
    monkeypatch.setattr(sys, "argv", ["table4.py", *flags])
    threads = torch.get_num_threads()
    try:
        table4.main()
    finally:
        torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert out.exists() and "commit" in text.splitlines()[0]
    random, teacher = text.split("teacher with")
    for half in (random, teacher):
        names = [line.split()[0] for line in half.splitlines() if line.strip()]
        assert [name for name in names if name in METHODS] == list(METHODS)


STEP = (
    (ma, "draw_step"),
    (ma, "load_batch"),
    (ma, "training_losses"),
    (torch.nn.utils, "clip_grad_norm_"),
    (torch.optim.AdamW, "step"),
    (torch, "_foreach_lerp_"),
)


def telling(name, function, calls, optimizers):
    """`function`, which notes its call, and as an optimizer's step the settings of that."""

    def told(*inputs, **options):
        calls.append(name)
        if name == "step":
            optimizers.append(inputs[0].defaults)
        return function(*inputs, **options)

    return told


def test_step_is_that_of_train(monkeypatch, tmp_path):
    """The same sequence of maskalign's and torch's functions, seen from outside, and optimizers of
    the same settings."""
    calls, optimizers = [], []
    for owner, name in STEP:
        monkeypatch.setattr(owner, name, telling(name, getattr(owner, name), calls, optimizers))
    monkeypatch.setattr(ma, "preview", lambda *inputs: None)
    config = make_config(batch_size=2, steps=1, method="sit", out=str(tmp_path))
    cpu = torch.device("cpu")
    table4.timed_step(table4.make_run(config, cpu, None), table4.make_batch(config, cpu))
    ours = list(calls)
    calls.clear()
    ma.train(config, draw_step=ma.draw_step, training_losses=ma.training_losses)
    assert calls == ours == [name for _, name in STEP]
    assert optimizers[0] == optimizers[1]


@pytest.mark.parametrize("method", ["maskalign", "sit"])
def test_shapes_are_static_so_that_compile_never_compiles_again(method):
    config, cpu = make_config(method=method, batch_size=2, depth=3), torch.device("cpu")
    run, batch = table4.make_run(config, cpu, None), table4.make_batch(config, cpu)
    run.model.compile(backend="eager", fullgraph=True)
    table4.timed_step(run, batch)
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            stamps = table4.timed_step(run, batch)  # it ran to its end, and did not raise
            assert len(stamps) == 1 + len(table4.PHASES) and stamps == sorted(stamps)


class Valueless(FakeTensorMode):
    """Tensors of shapes without values: whoever asks one for a value gets an error."""

    def __deepcopy__(self, memo):
        return self


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("method", ["maskalign", "sit"])
def test_no_step_of_train_waits_for_a_value_until_the_log_asks(method, tmp_path, monkeypatch):
    """On a GPU such a step is only queued: .item(), nonzero() or an if on a loss would stall it."""
    teacher = ma.ViTTeacher("classifier", 6).requires_grad_(False)
    monkeypatch.setattr(ma, "DataLoader", lambda data, **_: itertools.repeat(list(data[:2])))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(1) or step(self))
    config = make_config(method=method, depth=3, batch_size=2, log_every=3, out=str(tmp_path))
    with Valueless(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException) as end:
        ma.train(config, build_teacher=lambda *inputs: teacher)
    asks = [entry for entry in end.traceback if entry.path.name == "maskalign.py"]
    assert len(steps) == 3 and asks[-1].name == "report" and "tolist()" in str(asks[-1].statement)
