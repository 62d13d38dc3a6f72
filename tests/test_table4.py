"""tests/table4.py: its counts are torch's, its step is train()'s, its table has every method."""

import itertools
import sys

import pytest
import table4
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import maskalign as ma
from maskalign import METHODS, make_config


def count_flops(c: ma.Config) -> tuple:
    """What torch counts for the three of model_flops."""
    model, drawn = ma.build_model(c), ma.draw_step(1, c.latent_shape, c.z_dim, c)
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
        train = counter.get_total_flops()
        if c.self_depth:
            model(*inputs, until=c.self_depth)
        return forward, train, counter.get_total_flops() - train


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [{}, dict(mixer_depth=1, self_depth=0, depth=3, z_dim=20)])
def test_flops_are_those_that_torch_counts(method, changes):
    config = make_config(method=method, **changes)
    assert table4.model_flops(config) == count_flops(config)


def test_tokens_through_the_blocks():
    kept = {method: table4.tokens(make_config(data="x", method=method))[:2] for method in METHODS}
    assert kept["reg"] == kept["maskalign-no-masking"] == (257, 257)
    assert kept["maskalign"] == kept["maskalign-no-mixing"] == (257, 193)
    assert kept["repa+maskalign"] == (256, 192)
    assert all(kept[method] == (256, 256) for method in ("sit", "repa", "haste", "sra", "xar"))


def test_token_floor_of_the_paper():
    floor = {m: table4.tokens(make_config(data="x", method=m))[2] for m in ("reg", "maskalign")}
    assert floor["reg"] == 1 and floor["maskalign"] == pytest.approx(0.8224, abs=1e-4)


def test_table_has_a_row_for_each_method(monkeypatch, capsys, tmp_path):
    out = tmp_path / "t.json"
    monkeypatch.setattr(
        sys, "argv", ["table4.py", "--batch_size=2", "--steps=1", "--threads=1", f"--json={out}"]
    )
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


def test_step_is_that_of_train(monkeypatch, tmp_path):
    """The same sequence of maskalign's and torch's functions, seen from outside."""
    calls = []
    for owner, name in (
        (ma, "draw_step"),
        (ma, "load_batch"),
        (ma, "training_losses"),
        (torch.nn.utils, "clip_grad_norm_"),
        (torch.optim.AdamW, "step"),
        (torch, "_foreach_lerp_"),
    ):
        old = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, old=old, name=name, **k: calls.append(name) or old(*a, **k)
        )
    config = make_config(
        batch_size=2, steps=1, teacher="classifier", method="sit", out=str(tmp_path)
    )
    step = table4.make_step(config, torch.device("cpu"), None)[1]
    calls.clear()
    list(step())
    ours = list(calls)
    calls.clear()
    monkeypatch.setattr(ma, "alignment_gap", lambda *a, **k: (0.0, 0.0))
    monkeypatch.setattr(ma, "preview", lambda *a: None)
    ma.train(config)
    first = calls.index("draw_step", 1 + calls.index("load_batch"))  # after the fixed batch
    assert [name for name in calls[first + 1 :]] == ours


@pytest.mark.parametrize("method", ["maskalign", "haste", "xar"])
def test_shapes_are_static_so_that_compile_never_compiles_again(method, monkeypatch):
    built, build = [], ma.build_model
    monkeypatch.setattr(ma, "build_model", lambda c: built.append(build(c)) or built[-1])
    _, step, _ = table4.make_step(
        make_config(method=method, batch_size=2), torch.device("cpu"), None
    )
    built[0].compile(backend="eager", fullgraph=True)
    list(step())
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            assert len(list(step())) == len(table4.PHASES)  # it ran to its end, and did not raise


class Valueless(FakeTensorMode):
    """Tensors of shapes without values: whoever asks one for a value gets an error."""

    def __deepcopy__(self, memo):
        return self


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("method", ["maskalign", "haste", "sra"])
def test_no_step_of_train_waits_for_a_value_until_the_log_asks(method, tmp_path, monkeypatch):
    """On a GPU such a step is only queued: .item(), nonzero() or an if on a loss would stall it."""
    teacher = ma.ViTTeacher("classifier", 6).requires_grad_(False)
    monkeypatch.setattr(ma, "build_teacher", lambda *_: teacher)
    monkeypatch.setattr(ma, "DataLoader", lambda data, **_: itertools.repeat(list(data[:2])))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(1) or step(self))
    config = make_config(method=method, batch_size=2, log_every=3, out=str(tmp_path))
    with Valueless(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException) as end:
        ma.train(config)
    asks = [str(entry.statement) for entry in end.traceback if entry.path.name == "maskalign.py"]
    assert len(steps) == 3 and "means.tolist()" in asks[-1]
