"""The forks, proved against the official programs' losses and against what their papers say.

The first half holds for every file in tests/forks/, a new one included: nothing to add here.
"""

import copy
import dataclasses
import importlib
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import forks.haste as haste
import forks.irepa as irepa
import forks.layersync as layersync
import forks.sra as sra
import forks.tread as tread
import forks.xar as xar
import pytest
import torch
from golden_cases import CASES, assert_golden, inputs, model, sizes, weights
from processes import ROOT, Program, start_ranks
from test_method import trained_looking
from test_training import assert_equal_runs, assert_same, checkpoint, log

import maskalign
from maskalign import BadInput, Config, Run, SiTOutput, add_noise, make_config, seeded
from sample import from_original_sit

NAMES = sorted(path.stem for path in Path(ROOT, "tests", "forks").glob("*.py"))
HASTE, SRA = CASES["loss/haste"], CASES["loss/sra_linear"]
IREPA = CASES["loss_irepa/conv3_gamma0.6"]
SYNC = [case for name, case in CASES.items() if name.startswith("loss_layersync/")]
TREAD = CASES["loss_tread/flow_matching_1_to_2_half"]
in_both_precisions = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)
TINY = dict(
    steps=4,
    batch_size=8,
    hidden_size=32,
    num_heads=2,
    projector_dim=16,
    teacher_steps=2,
    preview_steps=1,
    log_every=1,
    save_every=2,
)


def flags(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def launch(name, *argv):
    """Starts a fork as a program of its own, in two ranks."""
    return start_ranks(2, f"tests/forks/{name}.py", *argv)


def finish(ranks):
    ends = [rank.end() for rank in ranks]
    assert all(status == 0 for status, _, _ in ends), ends


def without_key_biases(state):
    """They shift all logits of a query alike, so that no loss depends on them: their gradient is
    rounding, which AdamW scales up to a step as large as any."""
    kept = {}
    for name, value in state.items():
        q, _, v = value.chunk(3) if name.endswith("attn.qkv.bias") else (value, None, value[:0])
        kept[name] = torch.cat([q, v])
    return kept


def assert_follows(one, other):
    """The same trajectory; the sums of two processes differ from those of one by rounding."""
    for part in ("model", "ema"):
        a, b = (without_key_biases(checkpoint(out)[part]) for out in (one, other))
        assert_same(a, b, rtol=1e-3, atol=2e-5)
    for a, b in zip(log(one), log(other), strict=True):
        del a["images_per_s"], b["images_per_s"]
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


# ---- Every file in tests/forks/


class Fork:
    """A file of tests/forks/: its module, its kind of Config, and runs of it on the demo: `out` of
    one process, `two` of `ranks`, which go on while other tests run."""

    def __init__(self, name, out=None):
        self.name, self.out, self.path = name, out, Path(ROOT, "tests", "forks", f"{name}.py")
        self.module = importlib.import_module(f"forks.{name}")
        mine = [part for part in vars(self.module).values() if isinstance(part, type)]
        (self.kind,) = [part for part in mine if issubclass(part, Config) and part != Config]

    def train(self, out, **settings):
        self.module.train(make_config(self.kind, **{**TINY, **settings}, out=str(out)))


@pytest.fixture(scope="module", params=NAMES)
def fork(request, tmp_path_factory):
    fork = Fork(request.param, tmp_path_factory.mktemp(request.param))
    fork.two = tmp_path_factory.mktemp("two")
    fork.ranks = launch(fork.name, *flags(TINY), f"--out={fork.two}")
    fork.train(fork.out)
    return fork


def test_it_trains_and_draws_on_the_demo(fork):
    state, lines = checkpoint(fork.out), log(fork.out)
    assert state["config"]["method"] == fork.name and state["config"]["num_classes"] == 8
    assert len(lines) == 4 and all(math.isfinite(v) for line in lines for v in line.values())
    assert lines[-1]["denoise"] < lines[0]["denoise"]
    assert (fork.out / "samples-0000004.png").exists()


def test_its_network_can_be_rebuilt_from_the_checkpoint_and_all_of_it_has_learned(fork):
    state = checkpoint(fork.out)
    build_model = getattr(fork.module, "build_model", maskalign.build_model)
    fresh = build_model(fork.kind(**state["config"]))
    names = dict(fresh.named_parameters())
    for part in ("model", "ema"):
        assert fresh.state_dict().keys() == state[part].keys()
        for name, value in fresh.state_dict().items():
            assert value.shape == state[part][name].shape, name
            moved = not torch.equal(value, state[part][name])
            assert moved == (name in names and name != "pos_embed"), name


def test_n_steps_and_n_more_equal_2n_steps(fork, tmp_path):
    for steps in (2, 4):
        fork.train(tmp_path, steps=steps)
    assert_equal_runs(fork.out, tmp_path)


def test_two_processes_follow_one(fork):
    finish(fork.ranks)
    assert_follows(fork.out, fork.two)


def test_its_help_is_its_docstring_and_tells_its_own_settings(fork):
    status, shown, errors = Program(f"tests/forks/{fork.name}.py", "--help").end()
    assert status == 0, errors
    assert fork.module.__doc__.strip() in shown and maskalign.__doc__.strip() not in shown
    for field in set(dataclasses.fields(fork.kind)) - set(dataclasses.fields(Config)):
        assert (f"--{field.name}" in shown) == bool(field.metadata["note"]), field.name


def test_it_is_refused_with_a_sentence(fork, tmp_path):
    argv = ["--batch_size=9", "--accum=2", f"--out={tmp_path}/out"]
    status, _, errors = Program(f"tests/forks/{fork.name}.py", *argv).end()
    assert status == 1 and errors.startswith(f"{fork.name}.py: batch_size is 9: it must be a mult")
    with pytest.raises(BadInput, match="unknown size 'big': choose from SiT-S/2"):
        make_config(fork.kind, size="big")


@pytest.mark.parametrize("size", maskalign.SIZES)
def test_every_size_has_a_row(size, fork):
    config = make_config(fork.kind, data="x" * (size != "demo"), size=size)
    expected = {name: maskalign.SIZES[size][name] for name in ("hidden_size", "depth", "num_heads")}
    assert expected.items() <= dataclasses.asdict(config).items()


def test_it_is_at_most_130_lines_and_no_copy_of_maskalign(fork):
    lines = fork.path.read_text().splitlines()
    assert len(lines) <= 130
    assert "python tests/forks/" in fork.module.__doc__ and "arXiv" in fork.module.__doc__

    def runs_of_six(text):
        kept = [line.strip() for line in text.splitlines() if line.strip()]
        return {tuple(kept[i : i + 6]) for i in range(len(kept) - 5)}

    copied = runs_of_six(fork.path.read_text()) & runs_of_six(Path(maskalign.__file__).read_text())
    assert not copied


PAGE = Path(ROOT, "tests", "forks", "README.md").read_text()


def test_the_page_on_forks_tells_its_length_and_the_functions_it_hands_over(fork):
    (row,) = re.findall(rf"^\| \[`{fork.name}.py`\].*", PAGE, re.M)
    _, _, _, functions, lines, _ = row.split("|")
    assert int(lines) == len(fork.path.read_text().splitlines())
    train = fork.path.read_text().partition("def train(")[2].partition("\n\n\n")[0]
    handed = re.findall(r"(\w+)=\w+", train)
    assert re.findall(r"`(\w+)`", functions) == [name for name in handed if name != "signals"]


def test_the_code_on_the_page_on_forks_stands_in_layersync():
    shown = "".join(re.findall(r"```python\n(.*?)```", PAGE, re.S)).splitlines()
    lines = iter(Path(layersync.__file__).read_text().splitlines())
    assert len(shown) > 20 and all(line in lines for line in shown)  # and in the same order


def test_it_patches_nothing(fork):
    text = fork.path.read_text()
    assert "maskalign." in text and "setattr" not in text
    assert not [line for line in text.splitlines() if line.startswith("maskalign.") and "=" in line]


# ---- HASTE


def layer(qkv):
    """Stands for an attention layer that has just seen these q, k, v (N, K, 3, heads, d)."""
    return SimpleNamespace(num_heads=qkv.shape[3], qkv=SimpleNamespace(kept=qkv.flatten(2)))


def logits_as_layer(logits):
    """An attention layer whose logits (N, heads, K, K) are these: its keys are unit vectors."""
    n, heads, k, _ = logits.shape
    q = logits.transpose(1, 2)
    keys = math.sqrt(k) * torch.eye(k, dtype=logits.dtype).view(1, k, 1, k).expand(n, k, heads, k)
    return layer(torch.stack([q, keys, q], dim=2))


def haste_losses(dtype):
    """Model, losses and compared layers of the golden HASTE case."""
    sit, x, pairs = model(HASTE, dtype), inputs(HASTE, dtype), HASTE["attn_pairs"]
    ours = haste.hook_attention(sit.blocks, [i + 1 for i, _ in pairs])
    theirs = [logits_as_layer(x[f"teacher_attn.{j}"]) for _, j in pairs]
    z = torch.cat([torch.full_like(x["feat.0"][:, :1], torch.nan), x["feat.0"]], dim=1)
    config = make_config(haste.Haste, data="x", num_classes=10)
    losses = haste.training_losses(
        *(sit, x["images"], x["y"], z, config),
        t=x["t"],
        noise=x["noise"],
        drop=x["drop_rand"] < 0.1,
        pairs=list(zip(ours, theirs, strict=True)),
    )
    return sit, losses, ours


@pytest.mark.golden
@in_both_precisions
def test_haste_losses_and_gradients_equal_the_official_ones(dtype):
    sit, losses, ours = haste_losses(dtype)
    assert_golden(losses["attn"], HASTE, "attn_loss")
    assert_golden(losses["align"], HASTE, "proj_loss")
    assert_golden(losses["loss"], HASTE, "total")
    assert_golden(haste.attention_logits(ours[0], 256), HASTE, "attn_logits.4")
    losses["loss"].backward()
    for name, p in sit.named_parameters():
        if f"grad.{name}" in HASTE["outputs"]:
            assert_golden(p.grad, HASTE, f"grad.{name}")


def qkv(n, tokens, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, tokens, 3, heads, 5, generator=generator)


def attention_loss(ours, theirs, ids_keep=None):
    """HASTE's "attn" for two images of 9 patches, from queries, keys and values alone."""

    def network(x_t, t, y, cls, ids_keep):
        return SiTOutput(
            torch.zeros(2, 9 if ids_keep is None else ids_keep.shape[1], 16), None, None
        )

    x = torch.zeros(2, 4, 6, 6)
    config = make_config(haste.Haste, data="x", image_size=48)
    drawn = dict(t=torch.rand(2), noise=x, drop=torch.zeros(2).bool(), ids_keep=ids_keep)
    pairs = [(layer(ours), layer(theirs))]
    y = torch.zeros(2).long()
    return haste.training_losses(network, x, y, None, config, pairs=pairs, **drawn)["attn"]


def test_attention_is_cut_to_common_patches_and_heads_before_the_softmax():
    ours, theirs = qkv(2, 1 + 9, 4, 0), qkv(2, 5 + 9, 3, 1)  # a class token; four registers more
    whole = attention_loss(ours, theirs)
    torch.testing.assert_close(whole, attention_loss(ours[:, 1:, :, :3], theirs[:, 5:]))
    ids = maskalign.sample_token_subset(2, 9, 0.4, seeded("cpu", "test"))
    some = attention_loss(ours[:, :6], theirs, ids)  # class token and 5 kept patches
    kept = torch.stack([h[5:][i] for h, i in zip(theirs, ids, strict=True)])
    a, b = (part[:, -5:, :, :3].unbind(2) for part in (ours[:, 1:6], kept))
    scores = [torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(5) for q, k, _ in (a, b)]
    expected = -(scores[1].softmax(-1) * scores[0].softmax(-1).log()).sum(-1).mean()
    torch.testing.assert_close(some, expected)


def test_attention_loss_is_smallest_at_the_teachers_own_attention():
    theirs = qkv(2, 9, 3, 0)
    floor = attention_loss(theirs, theirs)
    assert all(attention_loss(qkv(2, 9, 3, seed), theirs) > floor for seed in range(1, 9))
    assert attention_loss(torch.zeros_like(theirs), theirs).item() == pytest.approx(math.log(9))


def test_haste_takes_its_layers_from_the_papers_table():
    for size, depth, pairs, stop in (
        ("SiT-B/2", 5, ((3, 8), (4, 10), (5, 12)), 100_000),
        ("SiT-XL/2", 8, ((5, 9), (6, 10), (7, 11), (8, 12)), 250_000),
    ):
        c = make_config(haste.Haste, data="x", size=size)
        assert (c.align_depth, c.attn_layers, c.stop_align_at) == (depth, pairs, stop)
    typed = make_config(haste.Haste, data="x", size="SiT-B/2", stop_align_at=7, align_depth=2)
    assert (typed.stop_align_at, typed.align_depth) == (7, 2)


def train_haste(out, **settings):
    haste.train(make_config(haste.Haste, **{**TINY, **settings}, out=str(out)))


@pytest.fixture(scope="module")
def past_tau(tmp_path_factory):
    """A HASTE run that stops aligning after two of four steps, undisturbed."""
    out = tmp_path_factory.mktemp("past_tau")
    train_haste(out, stop_align_at=2)
    return out


@pytest.mark.parametrize("class_token, calls", [(False, 2), (True, 4)])
def test_from_tau_on_nothing_is_aligned_and_an_idle_teacher_is_not_called(
    class_token, calls, monkeypatch, tmp_path
):
    seen, real = [], maskalign.ViTTeacher.forward
    monkeypatch.setattr(
        maskalign.ViTTeacher, "forward", lambda self, images: seen.append(1) or real(self, images)
    )
    train_haste(tmp_path, stop_align_at=2, teacher_steps=1, class_token=class_token)
    assert len(seen) == 1 + calls  # one to train it
    lines = log(tmp_path)
    for line in lines:
        assert (line["align"] == 0) == (line["attn"] == 0) == (line["step"] > 2)
        extra = 0.03 * line["cls"] + 0.5 * line["align"] + 0.5 * line["attn"]
        assert line["loss"] == pytest.approx(line["denoise"] + extra, rel=1e-5)


def test_a_run_resumed_at_tau_and_after_it_ends_bit_equal(past_tau, tmp_path):
    for steps in (1, 2, 3, 4):
        train_haste(tmp_path, stop_align_at=2, steps=steps)
        if steps == 2:
            before = checkpoint(tmp_path)
    assert_equal_runs(past_tau, tmp_path)
    after = checkpoint(tmp_path)
    assert before["optimizer"]["state"].keys() == after["optimizer"]["state"].keys()
    frozen = [name for name in before["model"] if name.startswith("projectors.")]
    assert len(frozen) == 6 and all(
        torch.equal(before["model"][name], after["model"][name]) for name in frozen
    )


def test_two_processes_pass_tau_and_resume_after_it(past_tau, tmp_path):
    for steps in (3, 4):
        settings = {**TINY, "stop_align_at": 2, "steps": steps}
        finish(launch("haste", *flags(settings), f"--out={tmp_path}"))
    assert_follows(past_tau, tmp_path)


def test_a_network_with_fewer_blocks_is_compared_by_its_last(tmp_path):
    config = make_config(haste.Haste, **{**TINY, "steps": 1}, out=str(tmp_path))
    haste.train(dataclasses.replace(config, attn_layers=((9, 9),)))  # 6 blocks; the teacher has 2
    assert log(tmp_path)[-1]["attn"] > 0


def test_an_unknown_draw_is_no_silent_loss():
    with pytest.raises(TypeError, match="lagg"):
        haste.training_losses(None, None, None, None, None, pairs=[], lagg=1)


# ---- SRA


def sra_losses(dtype):
    """Student, EMA teacher and losses of the golden SRA case."""
    x, networks = inputs(SRA, dtype), []
    depths = dict(align_depth=SRA["block_out_s"], self_depth=SRA["block_out_t"])
    config = make_config(sra.Sra, **sizes(SRA), **depths)
    for seed in (SRA["seed"], SRA["teacher_seed"]):
        state = weights(SRA, dtype, seed)
        for (old, new), kind in itertools.product(
            (("linear1", "0"), ("linear2", "2")), ("weight", "bias")
        ):
            state[f"projectors.0.{new}.{kind}"] = state.pop(f"ap_head.{old}.{kind}")
        networks.append(sra.build_model(config).to(dtype))
        networks[-1].load_state_dict(state)
    losses = sra.training_losses(
        *(networks[0], x["images"], x["y"], None, config),
        t=x["t"],
        noise=x["noise"],
        drop=x["drop_rand"] < 0.1,
        lag=SRA["t_max"] * x["offset_rand"],
        ema=networks[1],
    )
    return networks, losses, x


@pytest.mark.golden
@in_both_precisions
def test_sra_losses_and_gradients_equal_the_official_ones(dtype):
    (student, teacher), losses, x = sra_losses(dtype)
    assert_golden(losses["align"], SRA, "align_loss.sml1")
    assert_golden(losses["loss"], SRA, "total.sml1")
    t = (x["t"] - 0.2 * x["offset_rand"]).clamp(min=0)
    x_t, y = add_noise(x["images"], x["noise"], t), torch.where(x["drop_rand"] < 0.1, 10, x["y"])
    assert_golden(x_t, SRA, "teacher_input")
    assert_golden(sra.self_tokens(teacher, x_t, t, y, 3), SRA, "teacher_features")
    losses["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    for name, p in student.named_parameters():
        official = name.replace("projectors.0.0", "ap_head.linear1")
        if f"grad.{official}" in SRA["outputs"]:
            assert_golden(p.grad, SRA, f"grad.{official}")


SMALL = dict(
    data="x",
    image_size=64,
    hidden_size=32,
    depth=4,
    num_heads=4,
    align_depth=2,
    num_classes=10,
    batch_size=3,
)


def small_batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.arange(3)


def test_sra_aligns_only_the_kept_tokens_with_an_ema_that_sees_all():
    config = make_config(sra.Sra, **SMALL, self_depth=3, mask_ratio=0.25, mixer_depth=1)
    student, ema = (trained_looking(sra.build_model(config), seed) for seed in (0, 1))
    drawn = sra.draw_step(Run(config, ema=ema), seeded("cpu", "test"))
    del drawn["vae_noise"]
    x, y = small_batch()
    loss = sra.training_losses(student, x, y, None, config, **drawn)["align"]

    x_t, t = add_noise(x, drawn["noise"], drawn["t"]), (drawn["t"] - drawn["lag"]).clamp(min=0)
    y = torch.where(drawn["drop"], 10, y)
    ours = student(x_t, drawn["t"], y, None, drawn["ids_keep"]).z_pred
    seen = []
    ema.blocks[2].register_forward_hook(lambda block, args, out: seen.append(out))
    ema(add_noise(x, drawn["noise"], t), t, y)  # all its tokens, after block 3
    kept = torch.stack([h[i] for h, i in zip(seen[0], drawn["ids_keep"], strict=True)])
    assert ours.shape == kept.shape == (3, 12, 32)
    gap = (ours - kept).abs()
    expected = torch.where(gap < 0.05, gap.square() / 0.1, gap - 0.025).mean()
    assert loss.item() == pytest.approx(expected.item())


def test_the_ema_sees_less_noise_by_a_lag_of_its_own_in_each_image():
    config = make_config(sra.Sra, data="x", batch_size=2000, image_size=16)
    drawn, again = (sra.draw_step(Run(config), seeded("cpu", "test")) for _ in range(2))
    lag = drawn["lag"]
    assert lag.shape == (2000,) and lag.min() >= 0 and 0.199 < lag.max() < 0.2
    assert lag.mean().item() == pytest.approx(0.1, abs=0.005)
    assert torch.corrcoef(torch.stack([lag, drawn["t"]]))[0, 1].abs() < 0.1
    assert torch.equal(lag, again["lag"])  # the step's generator decides it
    plain = maskalign.draw_step(Run(config), seeded("cpu", "test"))
    assert all(
        torch.equal(drawn[name], plain[name]) for name in ("t", "noise", "drop", "vae_noise")
    )


HEADS = {"SiT-S/2": 590976, "SiT-B/2": 2361600, "SiT-L/2": 4197376, "SiT-XL/2": 5311872}


@pytest.mark.parametrize("size", HEADS)
def test_networks_have_the_published_shapes(size):
    def shapes(kind, build_model=maskalign.build_model, **typed):
        with torch.device("meta"):
            state = build_model(make_config(kind, data="x", size=size, **typed)).state_dict()
        return {name: value.shape for name, value in state.items()}

    sit, repa = shapes(Config, method="sit"), shapes(Config, method="repa")
    assert shapes(haste.Haste, haste.build_model) == repa
    ours = shapes(sra.Sra, sra.build_model)
    head = {name: shape for name, shape in ours.items() if name.startswith("projectors.")}
    assert ours == sit | head and sum(map(math.prod, head.values())) == HEADS[size]
    assert shapes(xar.Xar, xar.build_model) == sit | dict(cell=(256,))
    assert shapes(layersync.LayerSync, layersync.build_model) == sit
    assert shapes(tread.Tread, tread.build_model) == sit
    width, ours = repa["pos_embed"][-1], shapes(irepa.Irepa, irepa.build_model)
    conv = {"projectors.1.weight": (768, width, 3, 3), "projectors.1.bias": (768,)}
    assert ours == sit | conv


# ---- xAR


def small_xar(**typed):
    config = make_config(xar.Xar, **{**SMALL, **typed})
    return trained_looking(xar.build_model(config)), config


def cell_of(k):
    """Rows and columns of the latent that belong to cell k of two by two."""
    return slice(k // 2 * 4, k // 2 * 4 + 4), slice(k % 2 * 4, k % 2 * 4 + 4)


def test_a_change_in_a_cell_leaks_exactly_nothing_into_the_cells_before_it():
    (sit, _), (x, y), t = small_xar(mixer_depth=1), small_batch(), torch.rand(3, 4)
    assert sit.cell.view(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    before = sit(x, t, y).v
    for k in range(4):
        other, t2 = x.clone(), t.clone()
        rows, columns = cell_of(k)
        other[:, :, rows, columns], t2[:, k] = 9.0, 0.5
        same = (sit(other, t2, y).v == before).all(-1)
        assert same[:, sit.cell < k].all() and not same[:, sit.cell >= k].any()


def test_cells_of_one_time_that_all_see_each_other_are_sit():
    cells, config = small_xar()
    sit = maskalign.SiT(config).eval()
    sit.load_state_dict({name: v for name, v in cells.state_dict().items() if name != "cell"})
    cells.cell.zero_()  # every token in the first cell
    (x, y), t = small_batch(), torch.rand(3)
    torch.testing.assert_close(cells(x, t[:, None].expand(3, 4), y).v, sit(x, t, y).v)


def test_each_cell_has_a_noise_level_of_its_own():
    config = make_config(xar.Xar, data="x", image_size=32, batch_size=2000)
    drawn = xar.draw_step(Run(config), seeded("cpu", "test"))
    assert drawn["t"].shape == (2000, 4) and set(drawn) == {"t", "noise", "drop", "vae_noise"}
    assert torch.corrcoef(drawn["t"].T).sub(torch.eye(4)).abs().max() < 0.1

    def network(x_t, t, y):
        for k in range(4):
            part = x_t[:, :, k // 2 * 2 : k // 2 * 2 + 2, k % 2 * 2 : k % 2 * 2 + 2]
            assert torch.equal(part, t[:, k].view(-1, 1, 1, 1).expand_as(part))
        assert torch.equal(y == 1000, drawn["drop"])
        return SiTOutput(torch.full((2000, 4, 16), 0.5), None, None)

    del drawn["vae_noise"]
    drawn["noise"] = torch.ones(2000, 4, 4, 4)
    x, y = torch.zeros(2000, 4, 4, 4), torch.zeros(2000).long()
    losses = xar.training_losses(network, x, y, None, config, **drawn)
    assert losses["loss"] == losses["denoise"] == 0.25  # its target is noise - x = 1


def test_cells_are_sampled_one_after_another_on_clean_context():
    calls, cell = [], xar.spread(torch.arange(4.0)[None], 4).flatten().long()

    class Field:
        patch_size, num_classes, cells = 2, 10, 2

        def __init__(self):
            self.cell = cell

        def __call__(self, x, t, y):
            calls.append((x, t, y))
            v = (y >= 10).float().view(-1, 1, 1) * torch.ones(len(x), 16, 16)
            return SiTOutput(v, None, None)

    noise = torch.randn(2, 4, 8, 8)
    out = xar.cell_ode(Field(), noise, torch.zeros(2).long(), num_steps=5, cfg_scale=4.0)
    assert len(calls) == 5 + 3 * 5 * 2, "the first cell is not guided, the others are"
    for call, (x, t, _) in enumerate(calls):
        k = 0 if call < 5 else 1 + (call - 5) // 10
        assert (t[:, :k] == 0).all() and (t[:, k + 1 :] == 1).all() and (t[:, k] > 0).all()
        for j in range(4):
            rows, columns = cell_of(j)
            part = x[:, :, rows, columns]
            if j < k:
                assert torch.equal(part, out[:, :, rows, columns])
            if j > k:
                assert torch.equal(part, noise[:, :, rows, columns])
    for k in range(4):  # v = 1 for the null class, else 0: guided by w it is 1 - w
        rows, columns = cell_of(k)
        moved = noise[:, :, rows, columns] - out[:, :, rows, columns]
        torch.testing.assert_close(moved, torch.full_like(moved, 1 - (1 + (4 - 1) * k / 3)))


def test_a_guidance_interval_and_a_misspelled_setting_reach_the_sampler():
    (sit, _), (x, y), on = small_xar(), small_batch(), dict(num_steps=2, cfg_scale=3.0)
    plain, guided = xar.cell_ode(sit, x, y, num_steps=2), xar.cell_ode(sit, x, y, **on)
    nowhere = xar.cell_ode(sit, x, y, guidance_low=0.6, guidance_high=0.7, **on)
    assert torch.equal(nowhere, plain) and not torch.allclose(guided, plain)
    with pytest.raises(TypeError, match="num_step"):
        xar.cell_ode(sit, x, y, num_step=2)


def test_xar_learns_a_sign_that_all_cells_share():
    """Only a cell that sees the earlier ones, clean, can agree with them."""
    config = make_config(
        xar.Xar,
        **dict(vae="none", image_size=4, patch_size=1, num_classes=1, batch_size=32),
        **dict(hidden_size=32, depth=2, num_heads=4, align_depth=1),
    )
    sit, run = xar.build_model(config), Run(config)
    optimizer = torch.optim.AdamW(sit.parameters(), lr=5e-3)
    y = torch.zeros(64).long()
    for step in range(200):
        drawn = xar.draw_step(run, seeded("cpu", "test", step))
        signs = drawn.pop("vae_noise")[:, :1, :1, :1].sign()
        x = signs.expand(32, 3, 4, 4)
        loss = xar.training_losses(sit, x, y[:32], None, config, **drawn)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.randn(64, 3, 4, 4, generator=seeded("cpu", "noise"))
    out = xar.cell_ode(sit.eval().requires_grad_(False), noise, y, num_steps=10)
    agree = (out.flatten(1) > 0).float().mean(1)
    assert ((agree == 0) | (agree == 1)).float().mean() > 0.9
    assert 0.2 < agree.mean() < 0.8
    assert 0.8 < out.abs().mean() < 1.2


# ---- iREPA, LayerSync and TREAD: the official numbers, then what is true of each


def official(case, kind, build_model, state, **typed):
    """A fork's network with the official weights of a case, and its config."""
    config = make_config(kind, **(sizes(case) | dict(align_depth=1) | typed))
    sit = build_model(config).to(state["pos_embed"].dtype)
    sit.load_state_dict(state)
    return sit, config


def official_losses(training_losses, case, sit, config, z=None, turned=False, **drawn):
    """The losses of a fork on the inputs of a case; turned: its time runs from noise to data."""
    x = inputs(case, sit.pos_embed.dtype)
    drawn |= dict(t=1 - x["t"] if turned else x["t"], noise=x["noise"], drop=x["drop_rand"] < 0.1)
    return training_losses(sit, x["images"], x["y"], z, config, **drawn)


def assert_golden_gradients(sit, case, prefix="", renamed=("", ""), but=()):
    """Each gradient that is stored under this prefix, and the norm over all weights."""
    grads = {name: p.grad for name, p in sit.named_parameters() if p.grad is not None}
    assert_golden(torch.nn.utils.get_total_norm(grads.values()), case, f"{prefix}grad_norm")
    grads = {name.replace(*renamed): grad for name, grad in grads.items()}
    stored = {name for name in case["outputs"] if name.startswith(f"{prefix}grad.")}
    assert len(stored) >= 3
    for name in stored - {f"{prefix}grad.{name}" for name in but}:
        assert_golden(grads[name.removeprefix(f"{prefix}grad.")], case, name)


@pytest.mark.golden
@in_both_precisions
def test_irepas_normalised_patches_equal_the_official_ones(dtype):
    case = CASES["irepa_norm/16x24"]
    for (name, z), gamma in itertools.product(inputs(case, dtype).items(), (0.6, 0.8, 1.0)):
        assert_golden(irepa.normalise(z, gamma), case, f"{name}.gamma{gamma}")


@pytest.mark.golden
@in_both_precisions
def test_irepas_losses_and_gradients_equal_the_official_ones(dtype):
    theirs, ours = "projectors.0.projection_layer", "projectors.1"
    state = {name.replace(theirs, ours): w for name, w in weights(IREPA, dtype).items()}
    on = dict(z_dim=24, align_depth=2, align_coeff=1.0)
    sit, config = official(IREPA, irepa.Irepa, irepa.build_model, state, **on)
    z, seen = inputs(IREPA, dtype)["feat.0"], []
    assert_golden(irepa.normalise(z, config.gamma), IREPA, "target.0")
    z = torch.cat([torch.full_like(z[:, :1], torch.nan), z], dim=1)  # no class token enters
    sit.register_forward_hook(lambda module, args, out: seen.append(out))
    losses = official_losses(irepa.training_losses, IREPA, sit, config, z)
    assert_golden(seen[0].z_pred, IREPA, "zs.0")
    assert_golden(losses["align"], IREPA, "proj_loss")
    assert_golden(losses["loss"], IREPA, "total")
    losses["loss"].backward()
    assert_golden_gradients(sit, IREPA, renamed=(ours, theirs))


@pytest.mark.golden
@in_both_precisions
@pytest.mark.parametrize("case", SYNC, ids=lambda case: case["time_direction"])
def test_layersyncs_losses_and_gradients_equal_the_official_ones(case, dtype):
    turned, state = case["time_direction"] == "t=1 is data", weights(case, dtype)
    if turned:  # as the paper runs it: a network that counts time from noise to data
        state = from_original_sit(state, channels=4)
    for early, late in ((2, 4), (1, 3)):  # the last is that of the gradients
        on = dict(early_depth=early, late_depth=late)
        sit, config = official(case, layersync.LayerSync, layersync.build_model, state, **on)
        losses = official_losses(
            layersync.training_losses, case, sit, config, turned=turned, pair=sit.pair
        )
        assert_golden(losses["sync"], case, f"pair_loss.{case['pairs'].index([early, late])}")
    for name, block in zip(("early", "late"), sit.pair, strict=True):
        assert_golden(block.kept, case, f"features.{name}")
    assert_golden(losses["sync"], case, "align_loss")
    assert_golden(losses["loss"], case, "total")
    losses["sync"].backward(retain_graph=True)  # alone it does not pass the early block
    assert all(p.grad is None for block in sit.blocks[1:] for p in block.parameters())
    assert_golden_gradients(sit, case, "align_only.")
    sit.zero_grad()
    losses["loss"].backward()
    converted = {"t_embedder.mlp.0.weight", "final_layer.linear.weight"} if turned else set()
    assert_golden_gradients(sit, case, but=converted)


TREAD_ROUTE = dict(first_routed=2, last_routed=3)  # the official program calls them 1 and 2


def official_tread(case, dtype=torch.float64):
    return official(case, tread.Tread, tread.build_model, weights(case, dtype), **TREAD_ROUTE)


@pytest.mark.golden
@in_both_precisions
def test_treads_losses_and_gradients_equal_the_official_ones(dtype):
    sit, config = official_tread(TREAD, dtype)
    ids = inputs(TREAD)["ids_keep.0"]
    losses = official_losses(tread.training_losses, TREAD, sit, config, ids_keep=ids)
    assert_golden(losses["loss"], TREAD, "total")
    losses["loss"].backward()
    assert_golden_gradients(sit, TREAD)


@pytest.mark.golden
@in_both_precisions
def test_treads_tokens_before_in_and_after_the_route_equal_the_official_ones(dtype):
    case, seen = CASES["tread_forward/1_to_2_half"], []
    sit, _ = official_tread(case, dtype)
    for block in sit.blocks:
        block.register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    x = inputs(case, dtype)
    out = sit(x["x"], x["t"], x["y"], ids_route=x["ids_keep.0"])
    assert_golden(seen[1], case, "kept_in.0")
    assert_golden(maskalign.gather_tokens(seen[3], x["ids_keep.0"]), case, "kept_out.0")
    assert_golden(seen[3], case, "merged.0")
    assert_golden(maskalign.unpatchify(out.v, 2), case, "velocity")
    plain = sit(x["x"], x["t"], x["y"]).v
    assert_golden(maskalign.unpatchify(plain, 2), case, "velocity_without_route")


@pytest.mark.golden
@pytest.mark.parametrize("name", ["tread_forward/1_to_2_half", TREAD["id"]])
def test_treads_route_takes_the_tokens_that_the_official_one_takes(name, monkeypatch):
    x = inputs(CASES[name])
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: x["route_rand.0"])
    ids = maskalign.sample_token_subset(3, 16, 0.5)
    assert torch.equal(ids, x["ids_keep.0"].sort(dim=-1).values)  # attention asks for no order


@pytest.mark.golden
def test_treads_images_equal_the_official_ones_that_no_route_made():
    case = CASES["tread_sampler/routing_guidance_2"]
    (sit, _), x = official_tread(case), inputs(case)
    for name, scale in (("samples_plain", 1.0), ("samples_cfg", 1.5)):
        on = dict(num_steps=2, cfg_scale=scale)
        assert_golden(maskalign.euler_ode(sit.eval(), x["latents"], x["y"], **on), case, name)


def tokens_of(config, seed=0):
    """Teacher tokens z (3, 1 + 16, 8), and the draws of a step without the VAE's noise."""
    z = torch.randn(3, 17, 8, generator=torch.Generator().manual_seed(seed))
    drawn = maskalign.draw_step(Run(config), seeded("cpu", "test"))
    del drawn["vae_noise"]
    return z, drawn


def small(module, kind, **typed):
    """A fork's network that looks trained, and its config: 16 patches, a teacher of width 8."""
    config = make_config(kind, **(SMALL | dict(z_dim=8) | typed))
    return trained_looking(module.build_model(config)), config


def test_irepas_kept_token_sees_its_kept_neighbours_in_the_grid_and_nothing_else():
    (sit, _), h = small(irepa, irepa.Irepa), torch.randn(1, 16, 32)
    everything = sit.convolve(h, None)
    torch.testing.assert_close(sit.convolve(h, torch.arange(16)[None]), everything)
    ids = torch.tensor([[0, 1, 3, 4, 7, 10, 15]])  # of 4 x 4; 3 and 4 are neighbours in no grid
    some, holes = sit.convolve(h[:, ids[0]], ids), torch.zeros_like(h)
    holes[:, ids[0]] = h[:, ids[0]]
    torch.testing.assert_close(some, sit.convolve(holes, None)[:, ids[0]])
    for i, token in enumerate(ids[0].tolist()):
        changed = h.clone()
        changed[:, token] += 1
        moved = (sit.convolve(changed[:, ids[0]], ids) - some).abs().amax(-1)[0] > 1e-4
        near = [
            max(abs(token // 4 - other // 4), abs(token % 4 - other % 4)) <= 1
            for other in ids[0].tolist()
        ]
        assert moved.tolist() == near and near[i]


def test_irepas_patches_are_normalised_before_the_mask_and_the_class_token_is_not():
    on = dict(mask_ratio=0.25, mixer_depth=1, class_token=True)
    sit, config = small(irepa, irepa.Irepa, **on)
    (x, y), (z, drawn) = small_batch(), tokens_of(config)
    loss = irepa.training_losses(sit, x, y, z, config, **drawn)["align"]

    target = (z - 0.6 * z[:, 1:].mean(1, keepdim=True)) / z[:, 1:].std(1, keepdim=True)
    target[:, 0] = z[:, 0]
    cls_t, x_t = (
        add_noise(*pair, drawn["t"])
        for pair in ((z[:, 0], drawn["cls_noise"]), (x, drawn["noise"]))
    )
    y = torch.where(drawn["drop"], 10, y)
    ours = sit(x_t, drawn["t"], y, cls_t, drawn["ids_keep"]).z_pred
    kept = maskalign.gather_tokens(target, drawn["ids_keep"], class_token=True)
    assert ours.shape == kept.shape == (3, 13, 8)
    expected = -torch.cosine_similarity(ours, kept, dim=-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)  # eps is 1e-6


def test_layersync_with_the_mask_compares_the_kept_tokens_and_needs_no_teacher():
    on = dict(mask_ratio=0.25, mixer_depth=1, early_depth=1, late_depth=3)
    sit, config = small(layersync, layersync.LayerSync, **on)
    (x, y), (_, drawn) = small_batch(), tokens_of(config)
    assert maskalign.build_teacher(config, None, "cpu") is None
    losses = layersync.training_losses(sit.train(), x, y, None, config, pair=sit.pair, **drawn)
    early, late = (block.kept for block in sit.pair)
    assert early.shape == late.shape == (3, 12, 32)
    expected = -torch.cosine_similarity(early, late, dim=-1).mean()
    assert losses["sync"].item() == pytest.approx(expected.item())
    assert losses["loss"].item() == pytest.approx((losses["denoise"] + 0.2 * expected).item())
    losses["sync"].backward()
    learns = {name.split(".")[0] for name, p in sit.named_parameters() if p.grad is not None}
    assert learns == {"x_embedder", "t_embedder", "y_embedder", "mixer", "blocks"}


@pytest.mark.parametrize("name", ["haste", "layersync"])
def test_hooks_keep_what_the_network_puts_out_but_not_what_its_ema_does(name):
    fork = Fork(name)
    network = fork.module.build_model(make_config(fork.kind, **TINY))
    ema = copy.deepcopy(network).eval()  # as set_up
    for sit, count in ((network, 2), (ema, 0)):
        sit(torch.randn(2, 3, 24, 24), torch.rand(2), torch.arange(2))
        kept = [part for part in sit.modules() if getattr(part, "kept", None) is not None]
        assert len(kept) == count


def test_tread_without_a_route_is_sit_and_what_skips_comes_out_as_it_went_in():
    routed, config = small(tread, tread.Tread, **TREAD_ROUTE, mixer_depth=1)
    sit = maskalign.SiT(config).eval()
    sit.load_state_dict(routed.state_dict())
    (x, y), t, seen = small_batch(), torch.rand(3), []
    assert torch.equal(routed(x, t, y).v, sit(x, t, y).v)
    for block in routed.blocks:
        block.register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    ids = maskalign.sample_token_subset(3, 16, 0.5, seeded("cpu", "test"))
    routed(x, t, y, ids_route=ids)
    assert [h.shape[1] for h in seen] == [16, 8, 8, 16]
    routed(x, t, y)
    went_in, came_out = seen[5], seen[3]  # before block 2, where all take it; before block 4
    skips = torch.ones(3, 16).scatter_(1, ids, 0.0).bool()
    same = (went_in == came_out).all(-1)
    assert torch.equal(same, skips)


@pytest.mark.parametrize("align_depth, inside", [(1, False), (2, True), (3, True), (4, False)])
def test_tread_predicts_all_patches_and_aligns_those_that_its_block_sees(align_depth, inside):
    on = dict(class_token=True, align_coeff=0.5, align_depth=align_depth, **TREAD_ROUTE)
    sit, config = small(tread, tread.Tread, **on)
    (x, y), (z, drawn) = small_batch(), tokens_of(config)
    shapes = []
    sit.register_forward_hook(lambda module, args, out: shapes.append([h.shape[1] for h in out]))
    losses = tread.training_losses(sit, x, y, z, config, **drawn)
    assert shapes == [[16, 8, 9 if inside else 17]]  # v, v_cls (N, 8), z_pred with class token
    skips = torch.ones(3, 17).scatter_(1, drawn["ids_keep"] + 1, 0.0).bool()
    skips[:, 0] = False
    z[skips] = torch.nan  # a target that only blocks outside the route meet
    again = tread.training_losses(sit, x, y, z, config, **drawn)
    assert again["align"].isnan() == (not inside)
    assert again["cls"] == losses["cls"] and again["denoise"] == losses["denoise"]
    far = 1e3 * skips[:, 1:, None].float().expand(-1, -1, 16)  # what skips is predicted, too
    x = x + maskalign.unpatchify(far, 2)
    loss = tread.training_losses(sit, x, y, z, config, **drawn)["denoise"]
    assert loss.item() == pytest.approx(1e6 / 2, rel=0.05)


# ---- Combinations, refusals, samples


@pytest.mark.parametrize(
    "name, typed",
    [
        ("haste", dict(mask_ratio=0.25, mixer_depth=1, class_token=True)),
        ("haste", dict(mask_ratio=0.25, stop_align_at=1)),
        ("haste", dict(attn_coeff=0.0)),
        ("sra", dict(mask_ratio=0.25, mixer_depth=1)),
        ("xar", dict(cells=3, mixer_depth=1)),
        ("irepa", dict(mask_ratio=0.25, mixer_depth=1, class_token=True)),
        ("irepa", dict(mask_ratio=0.25)),
        ("layersync", dict(mask_ratio=0.25, mixer_depth=2)),
        ("layersync", dict(class_token=True, align_coeff=0.5)),
        ("tread", dict(class_token=True, align_coeff=0.5)),
        ("tread", dict(mask_ratio=0.0, mixer_depth=1)),
    ],
    ids=str,
)
def test_combinations_are_values(name, typed, tmp_path):
    Fork(name).train(tmp_path, **typed, steps=2)
    assert all(math.isfinite(value) for line in log(tmp_path) for value in line.values())
    if "mixer_depth" in typed:
        assert "mixer.0.mlp.fc1.weight" in checkpoint(tmp_path)["model"]


@pytest.mark.parametrize(
    "kind, typed, message",
    [
        (sra.Sra, dict(class_token=True), "class_token is True: it must be off: SRA has no teach"),
        (sra.Sra, dict(self_depth=7), "self_depth is 7: it must be at most the depth, 6"),
        (sra.Sra, dict(align_coeff=0.0), "align_coeff is 0.0: it must be above 0"),
        (haste.Haste, dict(align_coeff=0.0), "align_coeff is 0.0: it must be above 0"),
        (haste.Haste, dict(attn_coeff=-1.0), "attn_coeff is -1.0: it must be 0 or above"),
        (haste.Haste, dict(stop_align_at=0), "stop_align_at is 0: it must be above 0"),
        (xar.Xar, dict(cells=4), "cells is 4: it must be .* a divisor of the 6 tokens"),
        (xar.Xar, dict(cells=1), "cells is 1: it must be above 1"),
        (xar.Xar, dict(mask_ratio=0.25), "mask_ratio is 0.25: it must be 0"),
        (xar.Xar, dict(class_token=True), "class_token is True: it must be 0"),
        (irepa.Irepa, dict(align_coeff=0.0), "align_coeff is 0.0: it must be above 0"),
        (irepa.Irepa, dict(gamma=-0.5), "gamma is -0.5: it must be 0 or above"),
        (layersync.LayerSync, dict(late_depth=2), "late_depth is 2: .* above early_depth, 2, and"),
        (layersync.LayerSync, dict(late_depth=7), "late_depth is 7: .* at most the depth, 6"),
        (layersync.LayerSync, dict(sync_coeff=0.0), "sync_coeff is 0.0: it must be above 0"),
        (tread.Tread, dict(last_routed=1), "last_routed is 1: .* first_routed, 2, or above"),
        (tread.Tread, dict(last_routed=7), "last_routed is 7: .* at most the depth, 6"),
        (tread.Tread, dict(first_routed=0), "first_routed is 0: it must be above 0"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_with_a_reason(kind, typed, message):
    with pytest.raises(BadInput, match=message) as caught:
        make_config(kind, **typed)
    assert "\n" not in str(caught.value)


def test_the_sampling_command_of_its_docstring_draws_its_checkpoint(fork, tmp_path):
    told = rf"python (\S+\.py)( sample)? runs/{fork.name}-demo/latest.pt"
    script, own = re.search(told, fork.module.__doc__).groups()
    argv = [fork.out / "latest.pt", "--steps=2", "--per_class=1", f"--out={tmp_path}/grid.png"]
    status, shown, errors = Program(script, *["sample"] * bool(own), *argv).end()
    assert status == 0 and "sampler ode" in shown and (tmp_path / "grid.png").exists(), errors
    if own:  # of a network that sample.py cannot draw
        status, _, errors = Program("sample.py", *argv).end()
        assert status == 1 and errors.count("\n") == 1 and "holds no SiT that fits" in errors
