"""The forks, compared with the losses of the official programs and with what their papers say.

The first half holds for every file in tests/forks/, a new one included: nothing to add here.
"""

import ast
import copy
import dataclasses
import functools
import importlib
import itertools
import json
import math
import re
from pathlib import Path

import forks.dispersive as dispersive
import forks.haste as haste
import forks.irepa as irepa
import forks.layersync as layersync
import forks.sprint as sprint
import forks.sra as sra
import forks.tread as tread
import forks.xar as xar
import pytest
import torch
from draws import Given, given, numbers, scores_of
from golden_cases import CASES, assert_golden, inputs, sizes, weights
from processes import ROOT, Program, start_ranks
from test_method import subset, trained_looking

import maskalign
import sample
from maskalign import Config, SiTOutput, StepRng, add_noise, gather_tokens, make_config
from sample import from_official, from_original_sit

NAMES = sorted(path.stem for path in Path(ROOT, "tests", "forks").glob("*.py"))
HASTE = CASES["loss/haste"]
SRA = CASES["loss/sra_linear"]
IREPA = CASES["loss_irepa/conv3_gamma0.6"]
SYNC = [case for name, case in CASES.items() if name.startswith("loss_layersync/")]
TREAD = CASES["loss_tread/flow_matching_1_to_2_half"]
SPRINT = [case for name, case in CASES.items() if name.startswith("sprint_loss/")]
in_both_precisions = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)
TINY = dict(
    steps=4,
    batch_size=8,
    hidden_size=32,
    num_heads=2,
    projector_dim=16,
    teacher_steps=1,
    preview_steps=1,
    log_every=1,
)
SLOW = dict(TINY, lr=1e-4)  # for what is compared up to rounding: see assert_follows


def launch(name, settings, out):
    """Starts a fork as a program of its own, in two ranks."""
    flags = [f"--{key}={value}" for key, value in settings.items()]
    return start_ranks(2, f"tests/forks/{name}.py", *flags, f"--out={out}")


def checkpoint(out):
    return torch.load(Path(out, "latest.pt"), weights_only=True)


def log(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def assert_equal_runs(one, other):
    """Weights, EMA, optimizer and log are equal to the bit; only the speed may differ."""
    a, b = checkpoint(one), checkpoint(other)
    assert a["step"] == b["step"]
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(value, b[part][name]) for name, value in a[part].items())
    a, b = a["optimizer"]["state"], b["optimizer"]["state"]
    assert a.keys() == b.keys()
    for key in a:
        assert all(torch.equal(value, b[key][name]) for name, value in a[key].items())
    for line, same in zip(log(one), log(other), strict=True):
        assert line | dict(images_per_s=0) == same | dict(images_per_s=0)


def assert_follows(one, other):
    """The same losses and gradients, up to the rounding of sums that are made in another order.

    Weights are not compared: where a gradient is zero in truth, as for the biases of keys, AdamW
    makes a step of what rounding left. Its exp_avg, the running mean of the gradients, tells.
    """
    for line, same in zip(log(one), log(other), strict=True):
        del line["images_per_s"], same["images_per_s"]
        assert line == pytest.approx(same, rel=1e-3, abs=1e-4)
    states = [checkpoint(out)["optimizer"]["state"] for out in (one, other)]
    pairs = [[state[key]["exp_avg"] for state in states] for key in states[0]]
    rounding = 1e-9 * max(a.norm() for a, _ in pairs)
    for a, b in pairs:
        off = (a - b).norm()
        assert off <= 1e-2 * a.norm() + rounding, f"{tuple(a.shape)}: {off / a.norm():.1e}"


# ---- Every file in tests/forks/


class Fork:
    """A file of tests/forks/: its module, its kind of Config, the functions it hands over."""

    def __init__(self, name):
        self.name = name
        self.path = Path(ROOT, "tests", "forks", f"{name}.py")
        self.module = importlib.import_module(f"forks.{name}")
        mine = [part for part in vars(self.module).values() if isinstance(part, type)]
        (self.kind,) = [part for part in mine if issubclass(part, Config) and part != Config]
        self.functions = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(maskalign, "train", lambda config, **own: self.functions.update(own))
            self.module.train(make_config(self.kind))

    def build_model(self, config):
        return self.functions.get("build_model", maskalign.SiT)(config)

    def train(self, out, **settings):
        self.module.train(make_config(self.kind, **(TINY | settings), out=str(out)))


@pytest.fixture(scope="module", params=NAMES)
def fork(request, tmp_path_factory):
    """With runs of the demo: `out`, `slow`, and `two` of two `ranks`, which run meanwhile."""
    fork = Fork(request.param)
    fork.out, fork.slow, fork.two = (tmp_path_factory.mktemp(fork.name) for _ in range(3))
    fork.ranks = launch(fork.name, SLOW, fork.two)
    fork.train(fork.out)
    fork.train(fork.slow, lr=SLOW["lr"])
    return fork


def test_it_learns_and_generates_on_the_demo(fork):
    state = checkpoint(fork.out)
    assert state["config"]["method"] == fork.name and state["config"]["num_classes"] == 8
    assert (fork.out / "samples-0000004.png").exists()
    lines, slow = log(fork.out), log(fork.slow)
    assert len(lines) == 4 and all(math.isfinite(v) for line in lines for v in line.values())
    # Both saw the same images and noise, and have learned nothing before the first line.
    assert lines[0]["denoise"] == slow[0]["denoise"]
    assert lines[-1]["denoise"] < slow[-1]["denoise"]


def test_its_network_can_be_rebuilt_from_the_checkpoint_and_all_of_it_has_learned(fork):
    state = checkpoint(fork.out)
    torch.manual_seed(0)
    fresh = fork.build_model(fork.kind(**state["config"]))
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


def test_two_processes_follow_one_or_are_refused(fork):
    """A loss that is no mean over images needs all of them, or refuses to have two processes."""
    ends = [rank.end() for rank in fork.ranks]
    if "rng.parts" in fork.path.read_text():  # it asks how many processes there are
        assert not (fork.two / "log.jsonl").exists(), ends  # it refuses before the first step
        for _, _, errors in ends:
            said = re.findall(r"^AssertionError: (.*)$", errors, re.M)
            assert len(said) == 1 and len(said[0].split()) > 3, errors
    else:
        assert_follows(fork.slow, fork.two)


def test_its_help_is_its_docstring_and_tells_its_own_settings(fork):
    status, shown, errors = Program(f"tests/forks/{fork.name}.py", "--help").end()
    assert status == 0, errors
    assert fork.module.__doc__.strip() in shown and maskalign.__doc__.strip() not in shown
    for field in set(dataclasses.fields(fork.kind)) - set(dataclasses.fields(Config)):
        assert (f"\n  --{field.name}" in shown) == bool(field.metadata["help"]), field.name


def test_the_sampling_command_of_its_docstring_shows_its_images(fork, tmp_path):
    told = rf"python (\S+\.py)( sample)? runs/{fork.name}-demo/latest.pt"
    script, own = re.search(told, fork.module.__doc__).groups()
    argv = [fork.out / "latest.pt", "--steps=2", "--per_class=1", f"--out={tmp_path}/grid.png"]
    status, _, errors = Program(script, *["sample"] * bool(own), *argv).end()
    assert status == 0 and (tmp_path / "grid.png").exists(), errors
    if own:  # of a network that sample.py does not know
        status, _, errors = Program("sample.py", *argv).end()
        assert status == 1 and f"is for python {script} sample" in errors


@pytest.mark.parametrize("size", maskalign.SIZES)
def test_every_size_has_a_row(size, fork):
    config = make_config(fork.kind, data="x" * (size != "demo"), size=size)
    expected = {name: maskalign.SIZES[size][name] for name in ("hidden_size", "depth", "num_heads")}
    assert expected.items() <= dataclasses.asdict(config).items()


def test_it_is_short_and_no_copy_of_maskalign(fork):
    lines = fork.path.read_text().splitlines()
    assert len(lines) <= 150, "too long for a fork: see 'When the hooks are not enough'"
    assert "python tests/forks/" in fork.module.__doc__ and "arXiv" in fork.module.__doc__

    def runs_of_six(text):
        kept = [line.strip() for line in text.splitlines() if line.strip()]
        return {tuple(kept[i : i + 6]) for i in range(len(kept) - 5)}

    copied = runs_of_six(fork.path.read_text()) & runs_of_six(Path(maskalign.__file__).read_text())
    assert not copied


def test_it_patches_nothing_and_does_nothing_when_it_is_imported(fork):
    text = fork.path.read_text()
    assert "maskalign." in text and "setattr" not in text
    plain = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.If)
    for node in ast.parse(text).body[1:]:
        line = ast.unparse(node)
        constant = isinstance(node, (ast.Assign, ast.AugAssign)) and "." not in line.split("=")[0]
        assert isinstance(node, plain) or constant or line.startswith("sys.path.insert("), line


PAGE = Path(ROOT, "tests", "forks", "README.md").read_text()


def row_of(start):
    """The cells of the only row of the page that starts with this cell."""
    rows = [line for line in PAGE.splitlines() if line.startswith(f"| {start} |")]
    assert len(rows) == 1, f"tests/forks/README.md has {len(rows)} rows for {start}"
    return [cell.strip() for cell in rows[0].split("|")[1:-1]]


def test_the_page_on_forks_tells_its_paper_its_functions_and_its_length(fork):
    _, method, differs, functions, lines = row_of(f"[`{fork.name}.py`]({fork.name}.py)")
    paper = re.search(r"arXiv \d{4}\.\d{5}", fork.module.__doc__).group()
    assert method.endswith(f", {paper}") and differs
    assert functions == ", ".join(f"`{name}`" for name in fork.functions)
    assert int(lines) == len(fork.path.read_text().splitlines())


def test_the_page_on_forks_tells_its_extra_parameters_and_fids(fork):
    with torch.device("meta"):
        plain = maskalign.SiT(make_config(data="x", size="SiT-B/2", method="sit"))
        model = fork.build_model(make_config(fork.kind, data="x", size="SiT-B/2"))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    of_training = sum(n for name, n in sizes.items() if name.startswith("projector"))
    extra = sum(sizes.values()) - sum(p.numel() for p in plain.parameters())
    told = [f"{n / 1e6:.1f}M" if n else "0" for n in (extra, extra - of_training)]
    _, parameters, fids, _ = row_of(f"`{fork.name}`")
    assert parameters == " / ".join(told)
    assert re.fullmatch(r"(-|[\d.]+) / (-|[\d.]+)", fids)


@pytest.mark.parametrize("module, heading", [(layersync, "Five steps"), (dispersive, "A loss")])
def test_the_code_on_the_page_on_forks_stands_in_a_fork(module, heading):
    section = PAGE.partition(f"## {heading}")[2].partition("\n## ")[0]
    shown = "".join(re.findall(r"```python\n(.*?)```", section, re.S)).splitlines()
    lines = iter(Path(module.__file__).read_text().splitlines())
    assert len(shown) > 5 and all(line in lines for line in shown)  # and in the same order


def test_the_teachers_that_the_page_on_forks_names_have_as_many_tokens_as_we_have_patches(
    monkeypatch,
):
    """Without their weights, and on the meta device, which computes nothing but shapes."""
    create = maskalign.timm.create_model
    shapes_alone = functools.partial(create, pretrained=False)
    monkeypatch.setattr(maskalign.timm, "create_model", lambda name, **how: shapes_alone(name))
    names = re.findall(r"--teacher (vit\S+)`", PAGE)
    assert len(names) == 3
    for name in [*names, "vit_base_patch16_siglip_gap_224.webli"]:
        config = make_config(data="x", teacher=name, class_token=False)
        with torch.device("meta"):
            teacher = maskalign.load_teacher(config, None, "meta")
            z = teacher(torch.zeros(2, 3, 256, 256, dtype=torch.uint8))
        assert z.shape == (2, 1 + 256, teacher.dim)


# ---- Networks with official or made-up weights, and losses of numbers that a test has chosen


def official(case, kind, build_model, state, **settings):
    """A fork's network with the official weights of a case, and its config."""
    config = make_config(kind, **(sizes(case) | dict(align_depth=1) | settings))
    sit = build_model(config).to(state["pos_embed"].dtype)
    sit.load_state_dict(state)
    return sit, config


def official_losses(training_losses, case, sit, config, z=None, turned=False, first=()):
    """The losses of a fork on the inputs of a case; turned: its time runs from noise to data;
    first: the random numbers that the fork asks for before those of maskalign."""
    x = inputs(case, sit.pos_embed.dtype)
    rng = Given([*first, 1 - x["t"] if turned else x["t"], x["drop_rand"]], [x["noise"]])
    return training_losses(sit, x["images"], x["y"], z, config, rng)


def without_class_token(z):
    """Patches of a teacher as its tokens, of which the first must not be read."""
    return torch.cat([torch.full_like(z[:, :1], torch.nan), z], dim=1)


def assert_golden_gradients(sit, case, prefix="", but=(), official_name=lambda name: name):
    """Each gradient that is stored under this prefix, and the norm over all weights."""
    grads = {name: p.grad for name, p in sit.named_parameters() if p.grad is not None}
    assert_golden(torch.nn.utils.get_total_norm(grads.values()), case, f"{prefix}grad_norm")
    assert assert_stored_gradients(grads, case, prefix, but, official_name) >= 3


def assert_stored_gradients(grads, case, prefix="", but=(), official_name=lambda name: name):
    """Each gradient that is stored under this prefix; how many there are."""
    stored = [name for name in case["outputs"] if name.startswith(f"{prefix}grad.")]
    for name in stored:
        (ours,) = from_official({name.removeprefix(f"{prefix}grad."): 0})
        if ours not in but:
            assert_golden(grads[official_name(ours)], case, name)
    return len(stored)


SMALL = dict(
    data="x",
    image_size=64,
    hidden_size=32,
    depth=4,
    num_heads=4,
    align_depth=2,
    num_classes=10,
    z_dim=8,
)


def small(kind, build_model, seed=0, **settings):
    """A network that looks trained, and its config: 16 patches, a teacher of width 8."""
    config = make_config(kind, **(SMALL | settings))
    return trained_looking(build_model(config), seed).train(), config


def small_batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, 8, 8, generator=generator), torch.arange(3)


def small_z():
    return torch.randn(3, 17, 8, generator=torch.Generator().manual_seed(2))


# ---- HASTE


def logits_as_qkv(logits):
    """Queries, keys and values whose logits (N, heads, K, K) are these: keys are unit vectors."""
    n, heads, k, _ = logits.shape
    q = logits.transpose(1, 2)
    keys = math.sqrt(k) * torch.eye(k, dtype=logits.dtype).view(1, k, 1, k).expand(n, k, heads, k)
    return torch.stack([q, keys, q], dim=2)


@pytest.mark.golden
@in_both_precisions
def test_haste_losses_and_gradients_equal_the_official_ones(dtype):
    x = inputs(HASTE, dtype)
    c = HASTE["config"]
    sit, config = official(
        HASTE,
        haste.Haste,
        haste.HasteSiT,
        from_official(weights(HASTE, dtype)),
        z_dim=c["z_dims"][0],
        projector_dim=c["projector_dim"],
        align_depth=c["encoder_depth"],
    )
    pairs = tuple((i + 1, j + 1) for i, j in HASTE["attn_pairs"])
    assert config.attn_pairs == pairs  # those of XL
    theirs = [logits_as_qkv(x[f"teacher_attn.{j}"]) for _, j in HASTE["attn_pairs"]]
    seen = []
    sit.register_forward_hook(lambda module, args, out: seen.append(out.extra))
    z = without_class_token(x["feat.0"]), theirs
    losses = official_losses(haste.training_losses, HASTE, sit, config, z)
    assert_golden(losses["attn"], HASTE, "attn_loss")
    assert_golden(losses["align"], HASTE, "proj_loss")
    assert_golden(losses["loss"], HASTE, "total")
    assert_golden(haste.attention_logits(seen[0][0], 256), HASTE, "attn_logits.4")
    losses["loss"].backward()
    grads = {name: p.grad for name, p in sit.named_parameters()}
    assert assert_stored_gradients(grads, HASTE) >= 3


def qkv(n, tokens, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, tokens, 3, heads, 5, generator=generator)


def test_attention_is_cut_to_common_patches_and_heads_before_the_softmax():
    ours, theirs = qkv(2, 1 + 9, 4, 0), qkv(2, 5 + 9, 3, 1)  # a class token; four registers more
    whole = haste.attention_loss([ours], [theirs], 9)
    cut = haste.attention_loss([ours[:, 1:, :, :3]], [theirs[:, 5:]], 9)
    torch.testing.assert_close(whole, cut)
    ids = subset(2, 9, 0.4)
    some = haste.attention_loss([ours[:, :6]], [theirs], 9, ids)  # class token and 5 kept patches
    kept = torch.stack([h[5:][i] for h, i in zip(theirs, ids, strict=True)])
    a, b = (part[:, -5:, :, :3].unbind(2) for part in (ours[:, 1:6], kept))
    scores = [torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(5) for q, k, _ in (a, b)]
    expected = -(scores[1].softmax(-1) * scores[0].softmax(-1).log()).sum(-1).mean()
    torch.testing.assert_close(some, expected)
    two = haste.attention_loss([ours, ours[:, 1:]], [theirs, theirs[:, 4:]], 9)
    torch.testing.assert_close(two, whole)  # a mean over layers


def test_attention_loss_is_smallest_at_the_teachers_own_attention():
    theirs = [qkv(2, 9, 3, 0)]
    floor = haste.attention_loss(theirs, theirs, 9)
    assert all(haste.attention_loss([qkv(2, 9, 3, s)], theirs, 9) > floor for s in range(1, 9))
    uniform = haste.attention_loss([torch.zeros(2, 9, 3, 3, 5)], theirs, 9)
    assert uniform.item() == pytest.approx(math.log(9))


def test_haste_takes_its_blocks_from_the_papers_table():
    for size, depth, pairs, stop in (
        ("SiT-B/2", 5, ((3, 8), (4, 10), (5, 12)), 100_000),
        ("SiT-XL/2", 8, ((5, 9), (6, 10), (7, 11), (8, 12)), 250_000),
    ):
        c = make_config(haste.Haste, data="x", size=size)
        assert (c.align_depth, c.attn_pairs, c.stop_align_at) == (depth, pairs, stop)
    chosen = make_config(haste.Haste, data="x", size="SiT-B/2", stop_align_at=7, align_depth=2)
    assert (chosen.stop_align_at, chosen.align_depth) == (7, 2)


def test_haste_teaches_with_its_mask_the_kept_patches_of_the_right_blocks():
    """The qkv that network and teacher return are those of their own attention."""
    on = dict(mask_ratio=0.25, mixer_depth=1, class_token=True, attn_pairs=((2, 1), (4, 2)))
    sit, config = small(haste.Haste, haste.HasteSiT, **on)
    (x, y), found = small_batch(), numbers(3, (4, 8, 8), z_dim=8, num_tokens=16)
    theirs = [qkv(3, 17, 4, seed) for seed in (3, 4)]
    seen = []
    for i in (1, 3):  # what enters the attention of blocks 2 and 4
        sit.blocks[i].attn.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    losses = haste.training_losses(sit, x, y, (small_z(), theirs), config, given(found))
    expected = []
    ids = maskalign.sample_token_subset(found["scores"], 0.25)
    for i, h, taught in zip((1, 3), seen, theirs, strict=True):
        assert h.shape == (3, 13, 32)
        q, k, _ = sit.blocks[i].attn.qkv(h)[:, 1:].view(3, 12, 3, 4, 8).unbind(2)
        logits = torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(8)
        q, k, _ = gather_tokens(taught[:, 1:], ids).unbind(2)
        target = (torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(5)).softmax(-1)
        expected.append(-(target * logits.log_softmax(-1)).sum(-1).mean())
    torch.testing.assert_close(losses["attn"], torch.stack(expected).mean())


def test_the_teacher_of_haste_returns_its_tokens_and_the_qkv_of_its_blocks():
    config = make_config(haste.Haste, **TINY)
    dataset = maskalign.demo_shapes(24)
    images = dataset[0]["image"][None]
    teacher = haste.HasteTeacher(dataclasses.replace(config, num_classes=8), dataset, "cpu")
    z, (first, second) = teacher(images)
    assert torch.equal(z, teacher.teacher(images)) and teacher.dim == z.shape[-1] == 64
    assert first.shape == second.shape == (1, 37, 3, 4, 16)  # pairs of blocks 1 and 2
    vit = teacher.teacher.vit
    h = []
    vit.blocks[1].register_forward_pre_hook(lambda block, args: h.append(args[0]))
    teacher(images)
    again = vit.blocks[1].attn.qkv(vit.blocks[1].norm1(h[0]))
    assert torch.equal(second.flatten(2), again)


@pytest.mark.parametrize("step, teaches", [(6, True), (7, False)])
def test_from_tau_on_the_gradient_is_that_of_denoising_alone(step, teaches):
    on = dict(class_token=True, stop_align_at=7, attn_pairs=((2, 1), (3, 2)))
    sit, config = small(haste.Haste, haste.HasteSiT, **on)
    (x, y), found = small_batch(), numbers(3, (4, 8, 8), z_dim=8)
    z = small_z(), [qkv(3, 17, 4, seed) for seed in (3, 4)]
    grads = []
    for alone in (False, True):
        rng = given(found)
        rng.step = step
        sit.zero_grad()
        losses = haste.training_losses(sit, x, y, z, config, rng)
        loss = losses["denoise"] + config.cls_coeff * losses["cls"] if alone else losses["loss"]
        loss.backward()
        trained = [(name, p) for name, p in sit.named_parameters() if p.requires_grad]
        assert alone or all(p.grad is not None for _, p in trained)  # DDP waits for each
        grads.append({name: p.grad for name, p in trained if not name.startswith("projector")})
    same = all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert same == (not teaches)


@pytest.fixture(scope="module")
def past_tau(tmp_path_factory):
    """HASTE stops aligning after two of four steps: a run of one process, and ranks of another."""
    out, two = (tmp_path_factory.mktemp(name) for name in ("past_tau", "past_tau_in_two"))
    ranks = launch("haste", SLOW | dict(stop_align_at=2), two)
    Fork("haste").train(out, **SLOW, stop_align_at=2)
    return out, two, ranks


def test_from_tau_on_both_losses_have_weight_zero(past_tau):
    for line in log(past_tau[0]):
        taught = 0.5 * line["align"] + 0.5 * line["attn"]
        weighted = line["denoise"] + 0.03 * line["cls"] + taught * (line["step"] <= 2)
        assert line["attn"] > 0 and line["loss"] == pytest.approx(weighted, rel=1e-5)


def test_a_run_resumed_at_tau_and_after_it_ends_bit_equal(past_tau, tmp_path):
    for steps in (2, 3, 4):
        Fork("haste").train(tmp_path, **(SLOW | dict(steps=steps)), stop_align_at=2)
    assert_equal_runs(past_tau[0], tmp_path)


def test_two_processes_pass_tau(past_tau):
    out, two, ranks = past_tau
    ends = [rank.end() for rank in ranks]
    assert all(status == 0 for status, _, _ in ends), ends
    assert_follows(out, two)


def test_nothing_is_kept_of_a_pass_and_an_ema_has_hooks_of_its_own():
    network = haste.HasteSiT(make_config(haste.Haste, **TINY))
    ema = copy.deepcopy(network).eval()  # as train does it
    x, t, y = torch.randn(2, 3, 24, 24), torch.rand(2), torch.arange(2)
    extra = [sit(x, t, y).extra for sit in (network, ema)]
    for a, b in zip(*extra, strict=True):
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()
    kept = [part for sit in (network, ema) for part in sit.modules() if hasattr(part, "kept")]
    assert len(kept) == 4 and all(layer.kept is None for layer in kept)


# ---- SRA


def sra_losses(dtype):
    """Student, EMA teacher and losses of the golden SRA case."""
    x, networks = inputs(SRA, dtype), []
    depths = dict(align_depth=SRA["block_out_s"], self_depth=SRA["block_out_t"])
    for seed in (SRA["seed"], SRA["teacher_seed"]):
        state = {}
        for name, value in from_official(weights(SRA, dtype, seed)).items():
            state[sra_name(name)] = value
        sit, config = official(SRA, sra.Sra, sra.build_model, state, **depths)
        networks.append(sit)
    assert SRA["t_max"] == 0.2
    rng = Given([x["t"], x["offset_rand"], x["drop_rand"]], [x["noise"]])
    student, ema = networks
    losses = sra.training_losses(student, x["images"], x["y"], None, config, rng, ema)
    return networks, losses, x


def sra_name(name):
    name = name.replace("ap_head.linear1", "projector.0")
    return name.replace("ap_head.linear2", "projector.2")


@pytest.mark.golden
@in_both_precisions
def test_sra_losses_and_gradients_equal_the_official_ones(dtype):
    (student, teacher), losses, x = sra_losses(dtype)
    assert_golden(losses["align"], SRA, "align_loss.sml1")
    assert_golden(losses["loss"], SRA, "total.sml1")
    t = (x["t"] - 0.2 * x["offset_rand"]).clamp(min=0)
    x_t = add_noise(x["images"], x["noise"], t.view(-1, 1, 1, 1))
    y = torch.where(x["drop_rand"] < 0.1, 10, x["y"])
    assert_golden(x_t, SRA, "teacher_input")
    assert_golden(sra.tokens_after(3, teacher, x_t, t, y), SRA, "teacher_features")
    losses["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    grads = {name: p.grad for name, p in student.named_parameters()}
    assert assert_stored_gradients(grads, SRA, official_name=sra_name) >= 3


def test_sra_aligns_only_the_kept_tokens_with_an_ema_that_sees_all():
    on = dict(self_depth=3, mask_ratio=0.25, mixer_depth=1)
    student, config = small(sra.Sra, sra.build_model, **on)
    ema = small(sra.Sra, sra.build_model, seed=1, **on)[0].eval()
    found, less = numbers(3, (4, 8, 8), num_tokens=16), torch.tensor([0.1, 0.9, 0.2])
    found["t"][0] = 0.01  # then the time of the EMA is 0
    (x, y), t = small_batch(), found["t"]
    rng = Given([t, less, found["drop"], found["scores"]], [found["noise"]])
    losses = sra.training_losses(student, x, y, None, config, rng, ema)

    y = torch.where(found["drop"] < 0.1, 10, y)
    ids = maskalign.sample_token_subset(found["scores"], 0.25)
    x_t = add_noise(x, found["noise"], t.view(3, 1, 1, 1))
    ours = student(x_t, t, y, None, ids)
    seen = []
    ema.blocks[2].register_forward_hook(lambda block, args, out: seen.append(out))
    t = torch.tensor([0.0, t[1] - 0.18, t[2] - 0.04])
    ema(add_noise(x, found["noise"], t.view(3, 1, 1, 1)), t, y)  # all its tokens, after block 3
    kept = torch.stack([h[i] for h, i in zip(seen[0], ids, strict=True)])
    assert ours.z_pred.shape == kept.shape == (3, 12, 32)
    gap = (ours.z_pred - kept).abs()
    expected = torch.where(gap < 0.05, gap.square() / 0.1, gap - 0.025).mean()
    assert losses["align"].item() == pytest.approx(expected.item())
    target = gather_tokens(maskalign.patchify(found["noise"] - x, 2), ids)
    torch.testing.assert_close(losses["denoise"], (ours.v - target).square().mean())
    torch.testing.assert_close(losses["loss"], losses["denoise"] + 0.2 * losses["align"])


class SpyEma:
    """An EMA without blocks, which keeps what it is shown."""

    blocks = []

    def embed(self, x_t, t, y):
        self.shown = x_t, t, y
        return torch.zeros(len(x_t), 1, 4), None


def test_the_ema_sees_less_of_the_same_noise_by_a_random_time_of_each_image():
    config = make_config(sra.Sra, data="x", image_size=16, num_classes=10)
    x, y = torch.zeros(2000, 4, 2, 2), torch.zeros(2000).long()
    shown, ema = [], SpyEma()

    def network(x_t, t, y, cls, ids_keep):
        shown.append((x_t, t, y))
        return SiTOutput(torch.zeros(2000, 1, 16), None, torch.zeros(2000, 1, 4))

    sra.training_losses(network, x, y, None, config, StepRng(config, step=1), ema)
    (x_t, t, labels), (x_ema, t_ema, labels_ema) = shown[0], ema.shown
    assert torch.equal(labels, labels_ema) and 100 < (labels == 10).sum() < 300
    less = (t - t_ema)[t > 0.2]
    assert t_ema.min() == 0 and less.min() >= 0 and 0.199 < less.max() < 0.2
    assert less.mean().item() == pytest.approx(0.1, abs=0.005)
    assert torch.corrcoef(torch.stack([less, t[t > 0.2]]))[0, 1].abs() < 0.1
    torch.testing.assert_close(x_ema * t.view(-1, 1, 1, 1), x_t * t_ema.view(-1, 1, 1, 1))


HEADS = {"SiT-S/2": 590976, "SiT-B/2": 2361600, "SiT-L/2": 4197376, "SiT-XL/2": 5311872}


@pytest.mark.parametrize("size", HEADS)
def test_networks_have_the_published_shapes(size):
    def shapes(kind, build_model=maskalign.SiT, **settings):
        with torch.device("meta"):
            state = build_model(make_config(kind, data="x", size=size, **settings)).state_dict()
        return {name: value.shape for name, value in state.items()}

    sit, repa = shapes(Config, method="sit"), shapes(Config, method="repa")
    assert shapes(haste.Haste, haste.HasteSiT) == repa
    ours = shapes(sra.Sra, sra.build_model)
    head = {name: shape for name, shape in ours.items() if name.startswith("projector.")}
    assert ours == sit | head and sum(map(math.prod, head.values())) == HEADS[size]
    assert shapes(xar.Xar, xar.CellSiT) == sit
    assert shapes(layersync.LayerSync, layersync.SyncSiT) == sit
    assert shapes(tread.Tread, tread.RoutedSiT) == sit
    assert shapes(dispersive.Dispersive, dispersive.WatchedSiT) == sit
    width, ours = repa["pos_embed"][-1], shapes(irepa.Irepa, irepa.ConvSiT)
    conv = {"projector_conv.weight": (768, width, 3, 3), "projector_conv.bias": (768,)}
    assert ours == sit | conv
    fusion = {"fusion.weight": (width, 2 * width), "fusion.bias": (width,), "mask_token": (width,)}
    assert shapes(sprint.Sprint, sprint.SprintSiT) == sit | fusion


# ---- xAR


small_xar = functools.partial(small, xar.Xar, xar.CellSiT)


def cell_of(k):
    """Rows and columns of the latent that belong to cell k of two by two."""
    return slice(k // 2 * 4, k // 2 * 4 + 4), slice(k % 2 * 4, k % 2 * 4 + 4)


def test_a_change_in_a_cell_leaks_exactly_nothing_into_the_cells_before_it():
    (sit, _), (x, y), t = small_xar(), small_batch(), torch.rand(3, 4)
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
    sit = maskalign.SiT(config).double()
    sit.load_state_dict(cells.state_dict())
    cells.double().cell.zero_()  # every token in the first cell
    (x, y), t = small_batch(), torch.rand(3)
    x = x.double()
    torch.testing.assert_close(cells(x, t[:, None].expand(3, 4), y).v, sit(x, t, y).v)


def test_each_cell_has_a_noise_level_of_its_own():
    config = make_config(xar.Xar, data="x", image_size=32, num_classes=10)
    seen = []

    def network(x_t, t, y):
        seen.append((x_t, t, y))
        return SiTOutput(torch.full((2000, 4, 16), 0.5), None, None)

    rand = torch.rand(2000, 4, generator=torch.Generator().manual_seed(0))
    drop = torch.rand(2000, generator=torch.Generator().manual_seed(1))
    x, y = torch.zeros(2000, 4, 4, 4), torch.zeros(2000).long()
    rng = Given([rand, drop], [torch.ones(2000, 4, 4, 4)])
    losses = xar.training_losses(network, x, y, None, config, rng)
    assert losses["loss"] == losses["denoise"] == 0.25  # its target is noise - x = 1
    x_t, t, labels = seen[0]
    assert t.shape == (2000, 4) and torch.equal(labels == 10, drop < 0.1)
    for k in range(4):
        part = x_t[:, :, k // 2 * 2 : k // 2 * 2 + 2, k % 2 * 2 : k % 2 * 2 + 2]
        assert torch.equal(part, t[:, k].view(-1, 1, 1, 1).expand_as(part))
    xar.training_losses(network, x, y, None, config, StepRng(config, step=0))
    assert torch.corrcoef(seen[1][1].T).sub(torch.eye(4)).abs().max() < 0.1


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

    noise, states = torch.randn(2, 4, 8, 8), []
    on = dict(num_steps=5, cfg_scale=4.0, states=states)
    out = xar.cell_ode(Field(), noise, torch.zeros(2).long(), **on)
    assert len(calls) == 5 + 3 * 5 * 2, "the first cell is not guided, the others are"
    assert len(states) == 4 * 5  # of sample.py --trajectory
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
        **dict(vae="none", image_size=4, patch_size=1, num_classes=1),
        **dict(hidden_size=32, depth=2, num_heads=4, align_depth=1),
    )
    torch.manual_seed(0)
    sit = xar.CellSiT(config)
    optimizer = torch.optim.AdamW(sit.parameters(), lr=1e-2)
    y = torch.zeros(64).long()
    for step in range(100):
        rng = StepRng(config, step)
        x = rng.randn(32, 1, 1, 1).sign().expand(32, 3, 4, 4)
        loss = xar.training_losses(sit, x, y[:32], None, config, rng)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.randn(64, 3, 4, 4, generator=maskalign.seeded("cpu", "noise"))
    out = xar.cell_ode(sit.eval().requires_grad_(False), noise, y, num_steps=10)
    agree = (out.flatten(1) > 0).float().mean(1)
    assert ((agree == 0) | (agree == 1)).float().mean() > 0.9
    assert 0.2 < agree.mean() < 0.8
    assert 0.8 < out.abs().mean() < 1.2


# ---- iREPA, LayerSync and TREAD: the official numbers, then what is true of each


@pytest.mark.golden
@in_both_precisions
def test_irepas_normalised_patches_equal_the_official_ones(dtype):
    case = CASES["irepa_norm/16x24"]
    for (name, z), gamma in itertools.product(inputs(case, dtype).items(), (0.6, 0.8, 1.0)):
        assert_golden(irepa.normalise(z, gamma), case, f"{name}.gamma{gamma}")


def irepa_name(name):
    return name.replace("projector.projection_layer", "projector_conv")


@pytest.mark.golden
@in_both_precisions
def test_irepas_losses_and_gradients_equal_the_official_ones(dtype):
    state = from_official(weights(IREPA, dtype))
    state = {irepa_name(name): value for name, value in state.items()}
    on = dict(z_dim=24, align_depth=2, align_coeff=1.0)
    sit, config = official(IREPA, irepa.Irepa, irepa.ConvSiT, state, **on)
    z, seen = inputs(IREPA, dtype)["feat.0"], []
    assert_golden(irepa.normalise(z, config.gamma), IREPA, "target.0")
    sit.register_forward_hook(lambda module, args, out: seen.append(out))
    z = without_class_token(z)
    losses = official_losses(irepa.training_losses, IREPA, sit, config, z)
    assert_golden(seen[0].z_pred, IREPA, "zs.0")
    assert_golden(losses["align"], IREPA, "proj_loss")
    assert_golden(losses["loss"], IREPA, "total")
    losses["loss"].backward()
    assert_golden_gradients(sit, IREPA, official_name=irepa_name)


@pytest.mark.golden
@in_both_precisions
@pytest.mark.parametrize("case", SYNC, ids=lambda case: case["time_direction"])
def test_layersyncs_losses_and_gradients_equal_the_official_ones(case, dtype):
    turned = case["time_direction"] == "t=1 is data"
    state = from_official(weights(case, dtype))
    if turned:  # as the paper runs it: a network that counts time from noise to data
        state = from_original_sit(state)
    for early, late in ((2, 4), (1, 3)):  # the last is that of the gradients
        on = dict(early_depth=early, late_depth=late)
        sit, config = official(case, layersync.LayerSync, layersync.SyncSiT, state, **on)
        seen = []
        sit.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.extra))
        losses = official_losses(layersync.training_losses, case, sit, config, turned=turned)
        assert_golden(losses["sync"], case, f"pair_loss.{case['pairs'].index([early, late])}")
    for name, tokens in zip(("early", "late"), seen[0], strict=True):
        assert_golden(tokens, case, f"features.{name}")
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
    state = from_official(weights(case, dtype))
    return official(case, tread.Tread, tread.RoutedSiT, state, **TREAD_ROUTE)


@pytest.mark.golden
@in_both_precisions
def test_treads_losses_and_gradients_equal_the_official_ones(dtype):
    sit, config = official_tread(TREAD, dtype)
    ids = inputs(TREAD)["ids_keep.0"]
    scores = scores_of(ids, 16)
    losses = official_losses(tread.training_losses, TREAD, sit, config, first=[scores])
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
    assert_golden(gather_tokens(seen[3], x["ids_keep.0"]), case, "kept_out.0")
    assert_golden(seen[3], case, "merged.0")
    assert_golden(maskalign.unpatchify(out.v, 2), case, "velocity")
    plain = sit(x["x"], x["t"], x["y"]).v
    assert_golden(maskalign.unpatchify(plain, 2), case, "velocity_without_route")


@pytest.mark.golden
@pytest.mark.parametrize("name", ["tread_forward/1_to_2_half", TREAD["id"]])
def test_treads_route_takes_the_tokens_that_the_official_one_takes(name):
    x = inputs(CASES[name])
    assert torch.equal(maskalign.sample_token_subset(x["route_rand.0"], 0.5), x["ids_keep.0"])


@pytest.mark.golden
def test_treads_images_equal_the_official_ones_that_no_route_made():
    case = CASES["tread_sampler/routing_guidance_2"]
    (sit, _), x = official_tread(case), inputs(case)
    for name, scale in (("samples_plain", 1.0), ("samples_cfg", 1.5)):
        on = dict(num_steps=2, cfg_scale=scale)
        assert_golden(maskalign.euler_ode(sit.eval(), x["latents"], x["y"], **on), case, name)


def test_irepas_kept_token_sees_its_kept_neighbours_in_the_grid_and_nothing_else():
    (sit, _), h = small(irepa.Irepa, irepa.ConvSiT), torch.randn(1, 16, 32)
    everything = sit.convolve(h, None)
    torch.testing.assert_close(sit.convolve(h, torch.arange(16)[None]), everything)
    ids = torch.tensor([[10, 1, 3, 4, 7, 0, 15]])  # of 4 x 4; 3 and 4 are neighbours in no grid
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
    sit, config = small(irepa.Irepa, irepa.ConvSiT, **on)
    (x, y), z = small_batch(), small_z()
    found = numbers(3, (4, 8, 8), z_dim=8, num_tokens=16)
    loss = irepa.training_losses(sit, x, y, z, config, given(found))["align"]

    target = (z - 0.6 * z[:, 1:].mean(1, keepdim=True)) / z[:, 1:].std(1, keepdim=True)
    target[:, 0] = z[:, 0]
    t, ids = found["t"], maskalign.sample_token_subset(found["scores"], 0.25)
    cls_t = add_noise(z[:, 0], found["cls_noise"], t[:, None])
    x_t = add_noise(x, found["noise"], t.view(3, 1, 1, 1))
    y = torch.where(found["drop"] < 0.1, 10, y)
    ours = sit(x_t, t, y, cls_t, ids).z_pred
    kept = gather_tokens(target, ids, class_token=True)
    assert ours.shape == kept.shape == (3, 13, 8)
    expected = -torch.cosine_similarity(ours, kept, dim=-1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)  # eps is 1e-6


def test_layersync_with_the_mask_compares_the_kept_tokens_and_needs_no_teacher():
    on = dict(mask_ratio=0.25, mixer_depth=1, early_depth=1, late_depth=3)
    sit, config = small(layersync.LayerSync, layersync.SyncSiT, **on)
    assert maskalign.load_teacher(config, None, "cpu") is None
    (x, y), seen = small_batch(), []
    for i in (0, 2):
        sit.blocks[i].register_forward_hook(lambda block, args, out: seen.append(out))
    rng = given(numbers(3, (4, 8, 8), num_tokens=16))
    losses = layersync.training_losses(sit, x, y, None, config, rng)
    early, late = seen
    assert early.shape == late.shape == (3, 12, 32)
    expected = -torch.cosine_similarity(early, late, dim=-1).mean()
    assert losses["sync"].item() == pytest.approx(expected.item())
    assert losses["loss"].item() == pytest.approx((losses["denoise"] + 0.2 * expected).item())
    losses["sync"].backward()
    learns = {name.split(".")[0] for name, p in sit.named_parameters() if p.grad is not None}
    assert learns == {"x_embedder", "t_embedder", "y_embedder", "mixer", "blocks"}


@pytest.mark.parametrize(
    "kind, build_model, names",
    [
        (layersync.LayerSync, layersync.SyncSiT, dict(early_depth=1, late_depth=3)),
        (tread.Tread, tread.RoutedSiT, TREAD_ROUTE),
        (dispersive.Dispersive, dispersive.WatchedSiT, dict(disperse_depth=2)),
    ],
)
def test_a_forward_pass_of_a_forks_own_is_that_of_sit(kind, build_model, names):
    """With class token, mixer, projector and, where there is one, mask."""
    on = dict(class_token=True, mixer_depth=1, align_coeff=0.5, **names)
    ours, config = small(kind, build_model, **on)
    sit = maskalign.SiT(config)
    sit.load_state_dict(ours.state_dict())
    (x, y), t, cls = small_batch(), torch.rand(3), torch.randn(3, 8)
    ids = subset(3, 16, 0.25) if kind is layersync.LayerSync else None
    for mode in (True, False):
        out, expected = ours.train(mode)(x, t, y, cls, ids), sit.train(mode)(x, t, y, cls, ids)
        assert torch.equal(out.v, expected.v) and torch.equal(out.v_cls, expected.v_cls)
        assert (out.z_pred is None) == (expected.z_pred is None) == (not mode)
        assert not mode or torch.equal(out.z_pred, expected.z_pred)


@pytest.mark.parametrize("class_token", [False, True])
def test_what_skips_the_route_comes_out_as_it_went_in(class_token):
    on = dict(class_token=class_token, **TREAD_ROUTE)
    (routed, _), (x, y), t = small(tread.Tread, tread.RoutedSiT, **on), small_batch(), torch.rand(3)
    cls, first = (torch.randn(3, 8), 1) if class_token else (None, 0)
    entered, left = [], []
    for block in routed.blocks:
        block.register_forward_pre_hook(lambda block, args: entered.append(args[0]))
        block.register_forward_hook(lambda block, args, out: left.append(out))
    ids = subset(3, 16, 0.5)
    routed(x, t, y, cls, ids_route=ids)
    assert [h.shape[1] - first for h in entered] == [16, 8, 8, 16]
    went_in, came_out = left[0], entered[3]  # after block 1, before block 4
    skips = torch.ones(3, 16).scatter_(1, ids, 0.0).bool()
    same = (went_in == came_out).all(-1)
    assert torch.equal(same[:, first:], skips) and not same[:, :first].any()
    assert torch.equal(gather_tokens(came_out, ids, class_token), left[2])


@pytest.mark.parametrize("align_depth, inside", [(1, False), (2, True), (3, True), (4, False)])
def test_tread_predicts_all_patches_and_aligns_those_that_its_block_sees(align_depth, inside):
    on = dict(class_token=True, align_coeff=0.5, align_depth=align_depth, **TREAD_ROUTE)
    sit, config = small(tread.Tread, tread.RoutedSiT, **on)
    (x, y), z = small_batch(), small_z()
    found = numbers(3, (4, 8, 8), z_dim=8, num_tokens=16)
    ids = maskalign.sample_token_subset(found["scores"], 0.5)
    shapes = []
    sit.register_forward_hook(lambda net, args, out: shapes.append([h.shape[1] for h in out[:3]]))

    def losses(x, z):
        rand = [found[name] for name in ("scores", "t", "drop")]
        rng = Given(rand, [found["noise"], found["cls_noise"]])
        return tread.training_losses(sit, x, y, z, config, rng)

    plain = losses(x, z)
    assert shapes == [[16, 8, 9 if inside else 17]]  # v, v_cls (N, 8), z_pred with class token
    skips = torch.ones(3, 17).scatter_(1, ids + 1, 0.0).bool()
    skips[:, 0] = False
    z[skips] = torch.nan  # a target that only blocks outside the route meet
    again = losses(x, z)
    assert again["align"].isnan() == (not inside)
    assert again["cls"] == plain["cls"] and again["denoise"] == plain["denoise"]
    far = 1e3 * skips[:, 1:, None].float().expand(-1, -1, 16)  # what skips is predicted, too
    loss = losses(x + maskalign.unpatchify(far, 2), z)["denoise"]
    assert loss.item() == pytest.approx(1e6 / 2, rel=0.05)


# ---- SPRINT


def sprint_name(name):
    """Our name of an official weight. Of five blocks, two are dense, two sparse, one dense."""
    firsts = dict(encoder_blocks=0, middle_blocks=2, decoder_blocks=4)
    part, _, rest = name.partition(".")
    if part in firsts:
        i, _, rest = rest.partition(".")
        return f"blocks.{firsts[part] + int(i)}.{rest}"
    name = name.replace("renoise_linear", "fusion").replace("embedding_table.", "")
    return name.replace("projectors", "projector")


def official_sprint(case, build_model, dtype=torch.float64):
    """Our network with the official weights. Theirs has no positions; patches of its output
    have the channel first."""
    state = dict(pos_embed=torch.zeros(1, 16, 32, dtype=dtype))
    for name, value in weights(case, dtype).items():
        if name == "mask_token":
            value = value.flatten()
        if name == "x_embedder.proj.weight":
            value = value.unflatten(1, (4, 2, 2))
        if name.startswith("final_layer.linear"):
            value = value.unflatten(0, (4, 2, 2)).movedim(0, 2).flatten(0, 2)
        state[sprint_name(name)] = value
    c = case["config"]
    on = dict(dense_first=2, dense_last=1, align_depth=case.get("align_after_block", 3))
    on |= dict(z_dim=24, projector_dim=64, align_coeff=0.5 * c["representation_align"])
    kept = round(4 * (1 - case["mask"]["mask_ratio"]))
    return official(case, sprint.Sprint, build_model, state, kept_of_four=kept, **on)


def scores_of_squares(token_rand):
    """Numbers of each square (N, side / 2, side / 2, 4) -> of the patches, row by row (N, T)."""
    return maskalign.unpatchify(token_rand.flatten(1, 2), 2).flatten(1)


@pytest.mark.golden
def test_sprints_middle_takes_the_patches_that_the_official_one_takes():
    case = CASES["sprint_mask/structured_0.75"]
    ids = sprint.sample_in_squares(scores_of_squares(inputs(case)["token_rand"]), 1)
    assert_golden(ids.double(), case, "ids_keep")
    gone = torch.ones(3, 64).scatter(1, ids, 0.0)
    assert_golden(gone.double(), case, "dropped")


@pytest.mark.golden
@in_both_precisions
def test_sprints_tokens_before_in_and_after_the_middle_equal_the_official_ones(dtype):
    case, seen = CASES["sprint_forward/plain_2_2_1_structured_0.75"], []
    (sit, _), x = official_sprint(case, sprint.SprintSiT, dtype), inputs(case, dtype)
    for layer in (*sit.blocks, sit.fusion):
        layer.register_forward_hook(lambda layer, args, out: seen.append((args[0], out)))
    assert torch.equal(
        x["ids_keep"], sprint.sample_in_squares(scores_of_squares(x["token_rand"]), 1)
    )
    out = sit(x["x"], x["t"], x["y"], ids_sparse=x["ids_keep"])
    assert_golden(seen[1][1], case, "dense")
    assert_golden(seen[2][0], case, "sparse_in")
    assert_golden(seen[3][1], case, "sparse_out")
    fusion_in, fused = seen[4]
    assert_golden(fusion_in, case, "fusion_in")
    assert_golden(fused, case, "fused")
    assert_golden(out.z_pred, case, "zs.0")
    assert_golden(maskalign.unpatchify(out.v, 2), case, "velocity")
    seen.clear()
    out = sit(x["x"], x["t"], x["y"])
    assert_golden(seen[3][1], case, "full.sparse_out")
    assert_golden(out.z_pred, case, "full.zs.0")
    assert_golden(maskalign.unpatchify(out.v, 2), case, "full.velocity")


@pytest.mark.golden
@in_both_precisions
@pytest.mark.parametrize("case", SPRINT, ids=lambda case: case["id"].split("/")[1])
def test_sprints_losses_and_gradients_equal_the_official_ones(case, dtype):
    sit, config = official_sprint(case, sprint.SprintSiT, dtype)
    x, seen = inputs(case, dtype), []
    sit.register_forward_hook(lambda module, args, out: seen.append(out))
    sit.fusion.register_forward_hook(lambda layer, args, out: seen.append(args[0]))
    scores = torch.zeros(4, 16)
    if "token_rand" in x:  # else all patches pass the middle
        scores = scores_of_squares(x["token_rand"])
        assert torch.equal(sprint.sample_in_squares(scores, 1), x["ids_keep"])
    first = [scores, x["path_rand"]]
    z = without_class_token(x["feat.0"])
    losses = official_losses(sprint.training_losses, case, sit, config, z, first=first)
    assert_golden(seen[0], case, "fusion_in")
    velocity = maskalign.unpatchify(seen[1].v, 2)
    assert_golden(velocity, case, "velocity")
    errors = (velocity - (x["noise"] - x["images"])).square().flatten(1).mean(1)
    assert_golden(errors, case, "denoising_loss")
    assert_golden(losses["align"], case, "proj_loss")
    assert_golden(losses["loss"], case, "total")
    losses["loss"].backward()
    grads = {name: p.grad for name, p in sit.named_parameters() if p.grad is not None}
    assert_golden(torch.nn.utils.get_total_norm(grads.values()), case, "grad_norm")
    stored = [name for name in case["outputs"] if name.startswith("grad.")]
    for name in stored:
        grad = grads[sprint_name(name.removeprefix("grad."))]
        if "final_layer.linear" in name:
            grad = grad.unflatten(0, (2, 2, 4)).movedim(2, 0).flatten(0, 2)
        assert_golden(grad, case, name)
    assert len(stored) == 12


@pytest.mark.golden
@in_both_precisions
def test_sprints_guided_velocities_and_images_equal_the_official_ones(dtype):
    case = CASES["sprint_sampler/plain_2_2_1"]
    x = inputs(case, dtype)
    latents, t, y = x["latents"], x["t"], x["y"]
    null = torch.full_like(y, 10)
    guided = official_sprint(case, sprint.PathDropGuided, dtype)[0].eval()
    sit = official_sprint(case, sprint.SprintSiT, dtype)[0].eval()
    calls = dict(
        strong=guided(latents, t, y), weak=guided(latents, t, null), null=sit(latents, t, null)
    )
    for name, out in calls.items():
        assert_golden(maskalign.unpatchify(out.v, 2), case, f"velocity_{name}")
    on = dict(cfg_scale=case["sampler_args"]["cfg_scale"])
    for name, network in dict(pdg=guided, cfg=sit).items():
        velocities = []
        for i in range(2):  # each has another time
            one = (latents[i : i + 1], t[i].item(), y[i : i + 1])
            v, _ = maskalign.guided_velocity(network, *one, None, dtype, **on)
            velocities.append(v)
        assert_golden(torch.cat(velocities).to(dtype), case, f"velocity_{name}")
        out = sample.euler_ode(network, latents, y, num_steps=2, **on)
        assert_golden(out, case, f"samples_ode_{name}")
    out = sample.euler_ode(guided, latents, y, num_steps=2)
    assert_golden(out, case, "samples_ode_plain")
    noises = iter([x["eps.0"], x["eps.1"]])
    on |= dict(num_steps=3, randn_like=lambda like: next(noises))
    out = sample.euler_maruyama(guided, latents, y, **on)
    assert_golden(out, case, "samples_sde_pdg")


def test_each_square_keeps_its_share_and_each_patch_is_kept_equally_often():
    scores = torch.rand(4000, 16, generator=torch.Generator().manual_seed(0))
    squares = maskalign.patchify(torch.arange(16).view(1, 1, 4, 4), 2)[0]
    for count in (1, 2, 3, 4):
        ids = sprint.sample_in_squares(scores, count)
        kept = torch.zeros(4000, 16).scatter_(1, ids, 1.0)
        assert (kept[:, squares].sum(-1) == count).all()
        assert (kept.mean(0) - count / 4).abs().max() < 0.04


def test_without_label_no_patch_enters_the_middle_of_a_guided_sprint():
    on = dict(dense_first=1, dense_last=1)
    (sit, _), (x, y), entered = small(sprint.Sprint, sprint.PathDropGuided, **on), small_batch(), []
    for block in sit.blocks:
        block.register_forward_pre_hook(lambda block, args: entered.append(args[0].shape[1]))
    maskalign.guided_velocity(sit.eval(), x, 0.5, y, None, torch.float32, 2.0)
    assert entered == [16, 16, 16, 16] + [16, 0, 0, 16]


def test_a_path_drop_hides_the_middle_of_its_image_and_of_no_other():
    """Its middle then gets no gradient from denoising; what is aligned in it does."""
    on = dict(dense_first=1, dense_last=1, align_coeff=0.5)
    (sit, config), (x, y) = small(sprint.Sprint, sprint.SprintSiT, **on), small_batch()
    t, ids = torch.rand(3), sprint.sample_in_squares(torch.rand(3, 16), config.kept_of_four)
    drop, seen = torch.tensor([False, True, False]), []
    sit.fusion.register_forward_hook(lambda layer, args, out: seen.append(args[0]))
    for mask in (None, drop):
        sit(x, t, y, ids_sparse=ids, drop=mask)
    plain, dropped = (tokens[..., :32] for tokens in seen)
    assert torch.equal(plain[~drop], dropped[~drop])
    assert (dropped[drop] == sit.mask_token).all() and not torch.equal(plain[drop], dropped[drop])
    assert torch.equal(seen[0][..., 32:], seen[1][..., 32:])
    missing = torch.ones(3, 16).scatter_(1, ids, 0.0).bool()
    assert ((plain == sit.mask_token).all(-1) == missing).all()


def test_a_new_fusion_is_a_linear_layer_like_others_and_its_mask_token_small():
    torch.manual_seed(0)
    sit = sprint.SprintSiT(make_config(sprint.Sprint))
    bound = math.sqrt(6 / (3 * 96))  # Xavier's, of a layer from 192 to 96
    assert 0.99 * bound < sit.fusion.weight.abs().max() <= bound and not sit.fusion.bias.any()
    assert 0.015 < sit.mask_token.std() < 0.025


# ---- Dispersive loss


def pairwise(h, temperature):
    """The loss, pair by pair."""
    terms = [torch.exp(-(a - b).square().mean() / temperature) for a in h for b in h]
    return torch.stack(terms).mean().log()


def test_the_dispersive_loss_is_the_log_of_a_mean_over_all_pairs():
    two = torch.tensor([[1.0], [3.0]])  # at a distance of 4
    expected = math.log((1 + math.exp(-4 / 0.5)) / 2)
    assert dispersive.dispersive_loss(two, 0.5).item() == pytest.approx(expected)
    h = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    for temperature in (0.5, 1.0):
        ours, theirs = dispersive.dispersive_loss(h, temperature), pairwise(h, temperature)
        torch.testing.assert_close(ours, theirs)
        grads = [torch.autograd.grad(loss, h)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*grads)
    same, far = torch.ones(8, 24), 100 * torch.randn(8, 24).double()
    assert dispersive.dispersive_loss(same, 0.5).item() == pytest.approx(0, abs=1e-6)
    assert dispersive.dispersive_loss(far, 0.5).item() == pytest.approx(-math.log(8))


def test_what_all_images_share_does_not_blur_their_distances():
    h = torch.randn(16, 1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        dispersive.dispersive_loss(h + 300, 1.0), dispersive.dispersive_loss(h, 1.0)
    )


def test_images_disperse_after_the_chosen_block_in_float32():
    names = dict(disperse_depth=2, disperse_coeff=0.25, temperature=1.0)
    sit, config = small(dispersive.Dispersive, dispersive.WatchedSiT, **names)
    (x, y), seen = small_batch(), []
    sit.blocks[1].register_forward_hook(lambda block, args, out: seen.append(out))
    for bf16 in (False, True):
        rng = given(numbers(3, (4, 8, 8)))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = dispersive.training_losses(sit, x, y, None, config, rng)
        expected = pairwise(seen[-1].flatten(1).float(), 1.0)
        torch.testing.assert_close(losses["disperse"], expected)
        torch.testing.assert_close(losses["loss"], losses["denoise"] + 0.25 * expected)
    losses["disperse"].backward()
    learns = [any(p.grad is not None for p in block.parameters()) for block in sit.blocks]
    assert learns == [True, True, False, False]


# ---- Combinations, refusals


@pytest.mark.parametrize(
    "name, settings",
    [
        ("haste", dict(mask_ratio=0.25, mixer_depth=1, class_token=True)),
        ("haste", dict(mask_ratio=0.25, stop_align_at=1)),
        ("haste", dict(attn_coeff=0.0)),
        ("sra", dict(mask_ratio=0.25, mixer_depth=1)),
        ("xar", dict(cells=3)),
        ("irepa", dict(mask_ratio=0.25, mixer_depth=1, class_token=True)),
        ("irepa", dict(mask_ratio=0.25)),
        ("layersync", dict(mask_ratio=0.25, mixer_depth=2)),
        ("layersync", dict(class_token=True, align_coeff=0.5)),
        ("tread", dict(class_token=True, align_coeff=0.5)),
        ("tread", dict(skip_ratio=0.0, mixer_depth=1)),
        ("sprint", dict(align_coeff=0.5)),
        ("sprint", dict(kept_of_four=4, path_drop=0.0)),
        ("sprint", dict(kept_of_four=2, dense_first=0, dense_last=0)),
        ("dispersive", dict(class_token=True, align_coeff=0.5)),
    ],
    ids=str,
)
def test_combinations_are_values(name, settings, tmp_path):
    Fork(name).train(tmp_path, **settings, steps=2)
    assert all(math.isfinite(value) for line in log(tmp_path) for value in line.values())
    if "mixer_depth" in settings:
        assert "mixer.0.mlp.fc1.weight" in checkpoint(tmp_path)["model"]


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (sra.Sra, dict(self_depth=7), "self_depth 7 is not 1 to 6"),
        (xar.Xar, dict(cells=4), "cells 4 is no divisor above 1 of 6 tokens"),
        (xar.Xar, dict(cells=1), "cells 1 is no divisor above 1"),
        (layersync.LayerSync, dict(late_depth=2), "early_depth 2 and late_depth 2 are not two"),
        (layersync.LayerSync, dict(late_depth=7), "late_depth 7 are not two blocks of 6"),
        (layersync.LayerSync, dict(early_depth=0), "early_depth 0 and"),
        (tread.Tread, dict(last_routed=1), "first_routed 2 to last_routed 1 is no route"),
        (tread.Tread, dict(last_routed=7), "last_routed 7 is no route through 6 blocks"),
        (tread.Tread, dict(first_routed=0), "first_routed 0 to"),
        (sprint.Sprint, dict(kept_of_four=5), "kept_of_four 5: not in 6 x 6 patches"),
        (sprint.Sprint, dict(patch_size=8), "kept_of_four 1: not in 3 x 3 patches"),
        (sprint.Sprint, dict(align_depth=1), "align_depth 1 is no block of the middle"),
        (sprint.Sprint, dict(dense_first=3), "align_depth 3 is no block of the middle"),
        (dispersive.Dispersive, dict(disperse_depth=7), "disperse_depth 7 is not 1 to 6"),
    ],
)
def test_combinations_that_make_no_sense_are_refused_with_a_reason(kind, settings, message):
    with pytest.raises(AssertionError, match=message) as caught:
        make_config(kind, **settings)
    assert "\n" not in str(caught.value)
