"""tests/table4.py: it counts as torch does, it times train's own step, its table is complete."""

import itertools
import sys

import pytest
import rates
import table4
import torch
from test_data import make_folder
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

import maskalign as ma
from maskalign import METHODS, make_config

CPU = torch.device("cpu")


# ---- 1. Counts
def count_flops(config: ma.Config) -> tuple:
    """What torch counts for the two numbers of rates.model_flops."""
    model = ma.SiT(config)
    rng = ma.StepRng(config, step=0)
    x = rng.randn(1, *config.latent_shape)
    y = torch.zeros(1, dtype=torch.long)
    cls = rng.randn(1, config.z_dim) if config.class_token else None
    ids_keep = None
    if config.mask_ratio > 0:
        scores = rng.rand(1, model.x_embedder.num_patches)
        ids_keep = ma.sample_token_subset(scores, config.mask_ratio)
    # Fused attention computes QK^T again in backward. That is no work that the model asks for.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(x, rng.rand(1), y, cls, ids_keep)
        forward = counter.get_total_flops()
        sum(part.sum() for part in out if part is not None).backward()
        return forward, counter.get_total_flops()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [{}, dict(mixer_depth=1, depth=3, z_dim=20)])
def test_flops_are_those_that_torch_counts(method, changes):
    config = make_config(method=method, **changes)
    assert rates.model_flops(config) == count_flops(config)


def test_tokens_in_the_blocks():
    count = {m: rates.count_tokens(make_config(data="x", method=m)) for m in METHODS}
    assert count["reg"] == count["maskalign-no-masking"] == (257, 257)
    assert count["maskalign"] == count["maskalign-no-mixing"] == (257, 193)
    assert count["repa+maskalign"] == (256, 192)
    assert count["sit"] == count["repa"] == (256, 256)


def test_token_floor_of_the_paper():
    floor = {m: rates.token_floor(make_config(data="x", method=m)) for m in ("reg", "maskalign")}
    assert floor["reg"] == 1 and floor["maskalign"] == pytest.approx(0.8224, abs=1e-4)


# ---- 2. The command
@pytest.fixture
def command(monkeypatch, capsys):
    """Runs table4.py in this process, on one thread, and returns what it prints."""
    threads = torch.get_num_threads()

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["table4.py", "--threads=1", *map(str, argv)])
        table4.main()
        return capsys.readouterr().out

    yield run
    torch.set_num_threads(threads)


def test_table_has_a_row_for_each_method(command, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "matrix_rate", lambda device: 1e9)  # which takes seconds
    out = tmp_path / "t.json"
    text = command("--batch_size=2", "--depth=3", "--steps=1", f"--json={out}")
    assert out.exists() and "commit" in text.splitlines()[0]
    random, teacher = text.split("teacher with")
    for half in (random, teacher):
        names = [line.split()[0] for line in half.splitlines() if line.strip()]
        assert [name for name in names if name in METHODS] == list(METHODS)


def test_matrix_rate_is_that_of_the_fastest_product(monkeypatch):
    def seconds(device, products):
        assert next(products).shape == (2048, 2048)
        return [4.0, 2.0, 3.0]

    monkeypatch.setattr(rates, "seconds_of_each", seconds)
    assert rates.matrix_rate(CPU) == 2 * 2048**3 / 2.0


def test_rates_of_loader_encoder_and_sampler_are_measured(
    command, small_vae_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(rates, "matrix_rate", lambda device: 1e9)  # which takes seconds
    folder = make_folder(tmp_path / "images")
    small = ("--size=SiT-S/2", "--batch_size=2", "--depth=4", "--steps=2", "--methods=maskalign")
    names, row = command(*small, f"--data={folder}", f"--vae={small_vae_file}").split("\n")[3:5]
    assert names.split() == ["loader", "needed", "cores", "encode", "first_epoch"]
    assert all(float(value) > 0 for value in row.split())
    names, row = command("--sample", "--batch_size=2", "--depth=3", "--steps=2").split("\n")[3:5]
    assert names.split() == ["float32", "bf16", "largest", "mean", "unit"]
    assert row.endswith("of 255") and all(float(value) >= 0 for value in row.split()[:4])


# ---- 3. The step
class Recorder(TorchDispatchMode):
    """Notes all operations of torch, those of backward too, with shapes, numbers and settings."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.calls.append((str(function), tree_map(about, args), tree_map(about, kwargs)))
        return function(*args, **kwargs)


def about(value):
    """What can be compared between two runs of other weights and images."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.dtype, value.requires_grad)
    known = (bool, int, float, str, torch.dtype, torch.device)
    return value if isinstance(value, known) else type(value)


@pytest.mark.parametrize("method", ["maskalign", "sit"])
def test_the_timed_step_is_that_of_train(method, monkeypatch, tmp_path):
    """Each operation of torch is the same, from prepare_batch on until the log is written."""
    settings = dict(batch_size=2, depth=3, num_classes=8, teacher_steps=1, steps=1)
    config = make_config(method=method, out=str(tmp_path), **settings)
    step = table4.Step(config, CPU, rates.make_teacher(config, CPU))
    recorder = Recorder()
    prepare_batch = ma.prepare_batch
    seen = []

    def begin(*args):
        recorder.calls.clear()
        return prepare_batch(*args)

    monkeypatch.setattr(ma, "prepare_batch", begin)
    monkeypatch.setattr(ma, "write_log", lambda *args: seen.extend(recorder.calls))
    monkeypatch.setattr(ma, "preview", lambda *args: None)
    with recorder:
        ma.train(config)
        step()
    assert len(seen) > 300 and recorder.calls == seen
    names = [name for name, _, _ in seen]
    assert [name for name in names if "adam" in name] == ["aten._fused_adamw_.default"]


@pytest.mark.parametrize("method", ["maskalign", "sit"])
def test_shapes_are_static_so_that_compile_never_compiles_again(method):
    config = make_config(method=method, batch_size=2, depth=1, align_depth=1)
    step = table4.Step(config, CPU)
    step.model.compile(backend="eager", fullgraph=True)
    step()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(2):
            stamps = step()  # it ran to its end, and did not raise
            assert len(stamps) == 1 + len(table4.PHASES) and stamps == sorted(stamps)


def test_a_step_reads_kept_latents():
    sizes = dict(image_size=32, hidden_size=32, num_heads=2, depth=2, align_depth=1)
    config = make_config(data="x", batch_size=2, **sizes)
    step = table4.Step(config, CPU)
    assert step.batch["mean_std"].shape == (2, 8, 4, 4)
    step()
    assert step.history[0]["loss"].isfinite()


class Valueless(FakeTensorMode):
    """Tensors of shapes without values: whoever asks one for a value gets an error."""

    def __deepcopy__(self, memo):
        return self


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("method", ["maskalign", "sit"])
def test_no_step_of_train_waits_for_a_value_until_the_log_asks(method, tmp_path, monkeypatch):
    """On a GPU such a step is only queued: .item(), nonzero() or an if on a loss would stall it."""
    small = dict(depth=1, align_depth=1, batch_size=2)
    config = make_config(method=method, log_every=3, out=str(tmp_path), **small)
    teacher = rates.make_teacher(config, CPU)
    shapes = ma.demo_shapes(24, 64)  # made here, since in the mode they would have no values
    monkeypatch.setattr(ma, "demo_shapes", lambda size: shapes)
    batch = default_collate([shapes[0], shapes[1]])
    monkeypatch.setattr(ma, "DataLoader", lambda *args, **how: itertools.repeat(batch))
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    steps = []
    hook = register_optimizer_step_post_hook(lambda *args: steps.append(1))
    with Valueless(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException) as end:
        ma.train(config, build_teacher=lambda *args: teacher)
    hook.remove()
    asks = [entry for entry in end.traceback if entry.path.name == "maskalign.py"]
    assert len(steps) == 3
    assert asks[-1].name == "write_log" and "tolist()" in str(asks[-1].statement)
