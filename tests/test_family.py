"""HASTE, SRA and xAR: rows of the same table, proved against their papers' own losses."""

import dataclasses
import math

import pytest
import torch
from golden_cases import CASES, assert_golden, inputs, model, weights
from test_method import batch, trained_looking
from test_model import tiny
from test_training import TINY, launch, log

import maskalign
from maskalign import (
    BadInput,
    SiT,
    SiTOutput,
    add_noise,
    attention_loss,
    draw_step,
    euler_maruyama,
    euler_ode,
    make_config,
    sample_token_subset,
    seeded,
    tap_attention,
    train,
    training_losses,
    unpatchify,
)

HASTE, SRA = CASES["loss/haste"], CASES["loss/sra_linear"]


# ---- HASTE


def logits_as_qkv(logits):
    """Queries, keys and values (N, K, 3, heads, K) whose attention logits are these: k is 1."""
    n, heads, k, _ = logits.shape
    q = logits.transpose(1, 2)
    keys = math.sqrt(k) * torch.eye(k, dtype=logits.dtype).view(1, k, 1, k).expand(n, k, heads, k)
    return torch.stack([q, keys, q], dim=2)


def haste(dtype):
    """Model, losses and taps of the golden HASTE case."""
    sit, x = model(HASTE, dtype), inputs(HASTE, dtype)
    pairs = HASTE["attn_pairs"]
    ours = tap_attention([sit.blocks[i].attn for i, _ in pairs])
    theirs = [logits_as_qkv(x[f"teacher_attn.{j}"]) for _, j in pairs]
    z = torch.cat([torch.full_like(x["feat.0"][:, :1], torch.nan), x["feat.0"]], 1)
    config = make_config(data="x", method="haste", num_classes=10)
    losses = training_losses(
        *(sit, x["images"], x["y"], z, config),
        t=x["t"],
        noise=x["noise"],
        drop=x["drop_rand"] < 0.1,
        attn=(ours, theirs),
    )
    return sit, losses, ours


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_haste_losses_and_gradients_equal_the_official_ones(dtype):
    sit, losses, ours = haste(dtype)
    assert_golden(losses["attn"], HASTE, "attn_loss")
    assert_golden(losses["align"], HASTE, "proj_loss")
    assert_golden(losses["loss"], HASTE, "total")
    q, k, _ = ours[0].unbind(2)
    assert_golden(torch.einsum("nqhd,nkhd->nhqk", q, k) / math.sqrt(8), HASTE, "attn_logits.4")
    losses["loss"].backward()
    for name, p in sit.named_parameters():
        if f"grad.{name}" in HASTE["outputs"]:
            assert_golden(p.grad, HASTE, f"grad.{name}")


def qkv(n, tokens, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, tokens, 3, heads, 5, generator=generator)


def test_attention_is_cut_to_common_patches_and_heads_before_the_softmax():
    ours, theirs = qkv(2, 1 + 9, 4, 0), qkv(2, 5 + 9, 3, 1)  # a class token; four registers more
    whole = attention_loss([ours], [theirs], 9)
    assert torch.equal(whole, attention_loss([ours[:, 1:, :, :3]], [theirs[:, 5:]], 9))
    ids = sample_token_subset(2, 9, 0.4, seeded("cpu", "test"))
    kept = torch.stack([h[5:][i] for h, i in zip(theirs, ids)])
    some = attention_loss([ours[:, :6]], [theirs], 9, ids)  # class token and 5 kept patches
    assert torch.equal(some, attention_loss([ours[:, 1:6]], [kept], 5))


def test_attention_loss_is_smallest_at_the_teachers_own_attention():
    theirs = qkv(2, 9, 3, 0)
    floor = attention_loss([theirs], [theirs], 9)
    assert all(attention_loss([qkv(2, 9, 3, seed)], [theirs], 9) > floor for seed in range(1, 9))
    uniform = torch.zeros_like(theirs)
    assert attention_loss([uniform], [theirs], 9).item() == pytest.approx(math.log(9))


def test_haste_takes_its_layers_from_the_papers_table():
    for size, depth, pairs, stop in (
        ("SiT-B/2", 5, [(3, 8), (4, 10), (5, 12)], 100_000),
        ("SiT-XL/2", 8, [(5, 9), (6, 10), (7, 11), (8, 12)], 250_000),
    ):
        c = make_config(data="x", method="haste", size=size)
        assert (c.align_depth, list(c.attn_layers), c.stop_align_at) == (depth, pairs, stop)
    assert make_config(method="haste", size="SiT-B/2", stop_align_at=7).stop_align_at == 7


@pytest.mark.parametrize("method, calls", [("haste", 4), ("repa", 4), ("maskalign", 7)])
def test_from_tau_on_nothing_is_aligned_and_an_idle_teacher_is_not_called(
    method, calls, monkeypatch, tmp_path
):
    seen, real = [], maskalign.ViTTeacher.forward
    monkeypatch.setattr(
        maskalign.ViTTeacher, "forward", lambda self, images: seen.append(1) or real(self, images)
    )
    settings = {**TINY, "teacher_steps": 1, "log_every": 1, "out": str(tmp_path)}
    train(make_config(**settings, method=method, attn_layers=((1, 1), (2, 2)), stop_align_at=2))
    # 1 to train it, 1 for the fixed batch, then the steps; MaskAlign goes on with the class token.
    assert len(seen) == calls + (method == "maskalign")
    lines = log(tmp_path)
    assert all((line["align"] == 0) == (line["step"] > 2) for line in lines)
    assert all((line["attn"] > 0) == (method == "haste" and line["step"] <= 2) for line in lines)
    for line in lines[2:]:
        cls = 0.03 * line["cls"]
        assert line["loss"] == pytest.approx(line["denoise"] + cls, rel=1e-5)


def test_two_processes_pass_tau_and_follow_one(tmp_path):
    typed = {**TINY, "method": "haste", "stop_align_at": 3, "log_every": 1}
    train(make_config(**typed, out=str(tmp_path / "one")))
    flags = ("--method=haste", "--stop_align_at=3", "--log_every=1")
    launch(*flags, "--out", tmp_path / "two", processes=2)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


# ---- SRA


def sra(dtype):
    """Student, EMA teacher and losses of the golden SRA case."""
    x, c = inputs(SRA, dtype), SRA["config"]
    networks = []
    for seed in (SRA["seed"], SRA["teacher_seed"]):
        state = weights(SRA, dtype, seed)
        for old, new in (("linear1", "0"), ("linear2", "2")):
            for kind in ("weight", "bias"):
                state[f"projectors.0.{new}.{kind}"] = state.pop(f"ap_head.{old}.{kind}")
        width, depth = c["hidden_size"], c["depth"]
        sit = SiT(
            *(c["input_size"], 2, 4, width, depth, c["num_heads"], 10, width, 0),
            align_depth=SRA["block_out_s"],
        ).to(dtype)
        sit.load_state_dict(state)
        networks.append(sit)
    config = make_config(
        data="x", method="sra", num_classes=10, depth=4, align_depth=2, self_depth=3
    )
    losses = training_losses(
        *(networks[0], x["images"], x["y"], None, config),
        t=x["t"],
        noise=x["noise"],
        drop=x["drop_rand"] < 0.1,
        lag=SRA["t_max"] * x["offset_rand"],
        ema=networks[1],
    )
    return networks, losses, x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_sra_losses_and_gradients_equal_the_official_ones(dtype):
    (student, teacher), losses, x = sra(dtype)
    assert_golden(losses["align"], SRA, "align_loss.sml1")
    assert_golden(losses["loss"], SRA, "total.sml1")
    t = (x["t"] - 0.2 * x["offset_rand"]).clamp(min=0)
    x_t, y = add_noise(x["images"], x["noise"], t), torch.where(x["drop_rand"] < 0.1, 10, x["y"])
    assert_golden(x_t, SRA, "teacher_input")
    assert_golden(teacher(x_t, t, y, until=3), SRA, "teacher_features")
    losses["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())
    for name, p in student.named_parameters():
        official = name.replace("projectors.0.0", "ap_head.linear1")
        if f"grad.{official}" in SRA["outputs"]:
            assert_golden(p.grad, SRA, f"grad.{official}")


def test_sra_aligns_only_the_kept_tokens_with_a_teacher_that_sees_all():
    config = make_config(data="x", method="sra", num_classes=10, self_depth=3, mask_ratio=0.25)
    student = trained_looking(tiny(class_token=False, z_dim=32, mixer_depth=1))
    ema = trained_looking(tiny(class_token=False, z_dim=32, mixer_depth=1), seed=1)
    x, _, y, _ = batch()
    drawn = draw_step(3, x.shape[1:], 1, config, seeded("cpu", "test"))
    loss = training_losses(student, x, y, None, config, **drawn, ema=ema)["align"]
    x_t, t = add_noise(x, drawn["noise"], drawn["t"]), (drawn["t"] - drawn["lag"]).clamp(min=0)
    y = torch.where(drawn["drop"], 10, y)
    ours = student(x_t, drawn["t"], y, None, drawn["ids_keep"]).z_pred
    teachers = ema(add_noise(x, drawn["noise"], t), t, y, until=3)
    kept = torch.stack([h[i] for h, i in zip(teachers, drawn["ids_keep"])])
    assert ours.shape == kept.shape == (3, 12, 32)
    gap = (ours - kept).abs()
    expected = torch.where(gap < 0.05, gap.square() / 0.1, gap - 0.025).mean()
    assert loss.item() == pytest.approx(expected.item())


# ---- xAR


def test_a_change_in_a_cell_leaks_exactly_nothing_into_the_cells_before_it():
    sit = trained_looking(tiny(cells=2))
    (x, _, y, cls), t = batch(), torch.rand(3, 4)
    cell = sit.cell[0, 1:, 0]
    assert cell.view(4, 4).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2
    ids = sample_token_subset(3, 16, 0.25, seeded("cpu", "test"))
    for keep in (None, ids):
        place = cell.expand(3, -1) if keep is None else cell[keep]
        before = sit(x, t, y, cls, keep)
        for k in range(4):
            other, t2 = x.clone(), t.clone()
            rows, columns = slice(k // 2 * 4, k // 2 * 4 + 4), slice(k % 2 * 4, k % 2 * 4 + 4)
            other[:, :, rows, columns], t2[:, k] = 9.0, 0.5
            after = sit(other, t2, y, cls, keep)
            same = (after.v == before.v).all(-1)
            assert same[place < k].all() and not same[place >= k].any()
            assert torch.equal(after.v_cls, before.v_cls) == (k > 0)  # it belongs to cell 0
            assert torch.equal(after.z_pred[:, 0], before.z_pred[:, 0]) == (k > 0)


def test_one_cell_with_one_noise_level_is_sit():
    x, t, y, _ = batch()
    plain = tiny(class_token=False)
    assert sorted(plain.state_dict()) == sorted(tiny(class_token=False, cells=2).state_dict())
    trained_looking(plain)
    one = trained_looking(tiny(class_token=False, cells=1))
    assert torch.equal(one(x, t, y).v, plain(x, t, y).v)
    assert torch.equal(one(x, t[:, None], y).v, plain(x, t, y).v)
    torch.manual_seed(0)
    a = euler_maruyama(plain, x, y, num_steps=5)
    torch.manual_seed(0)
    assert torch.equal(a, euler_maruyama(plain, x, y, num_steps=5, cells=1))


def test_each_cell_has_a_noise_level_of_its_own():
    c = make_config(method="xar", data="x")
    drawn = draw_step(2000, (4, 4, 4), 8, c, seeded("cpu", "test"))
    assert drawn["t"].shape == (2000, 4) and drawn["ids_keep"] is None
    assert torch.corrcoef(drawn["t"].T).sub(torch.eye(4)).abs().max() < 0.1
    x, noise = torch.zeros(2000, 4, 4, 4), torch.ones(2000, 4, 4, 4)
    x_t = add_noise(x, noise, drawn["t"])
    for k in range(4):
        part = x_t[:, :, k // 2 * 2 : k // 2 * 2 + 2, k % 2 * 2 : k % 2 * 2 + 2]
        assert torch.equal(part, drawn["t"][:, k].view(-1, 1, 1, 1).expand_as(part))


@pytest.mark.parametrize("sampler", [euler_ode, euler_maruyama])
def test_cells_are_sampled_one_after_another_on_clean_context(sampler):
    calls = []

    class Field:
        patch_size, num_classes = 2, 10

        def __call__(self, x, t, y, *cls):
            calls.append((x, t, y))
            v = (y >= 10).float().view(-1, 1, 1) * torch.ones(len(x), 16, 16)
            return SiTOutput(v, *cls or (None,), None)

    noise = torch.randn(2, 4, 8, 8)
    out = sampler(Field(), noise, torch.zeros(2).long(), num_steps=5, cfg_scale=4.0, cells=2)
    assert len(calls) == 4 * 5
    cells = [(slice(i, i + 4), slice(j, j + 4)) for i in (0, 4) for j in (0, 4)]
    for call, (x, t, y) in enumerate(calls):
        k = call // 5
        assert len(x) == (2 if k == 0 else 4), "the first cell is not guided"
        assert (t[:, :k] == 0).all() and (t[:, k + 1 :] == 1).all() and (t[:, k] > 0).all()
        for j, (rows, columns) in enumerate(cells):
            part = x[:2, :, rows, columns]
            if j < k:
                torch.testing.assert_close(part, out[:, :, rows, columns], rtol=0, atol=0)
            if j > k:
                torch.testing.assert_close(part, noise[:, :, rows, columns], rtol=0, atol=0)
    if sampler is euler_ode:  # v = 1 for the null class, else 0: guided by w it is 1 - w
        for k, (rows, columns) in enumerate(cells):
            w = 1 + (4 - 1) * k / 3
            moved = noise[:, :, rows, columns] - out[:, :, rows, columns]
            torch.testing.assert_close(moved, torch.full_like(moved, 1 - w))


def test_xar_learns_a_sign_that_all_cells_share():
    """Only a cell that sees the earlier ones, clean, can agree with them."""
    torch.manual_seed(0)
    sit = SiT(4, 1, 1, 48, 3, 4, 1, 8, cells=2)
    config = make_config(
        method="xar", data="x", vae="none", image_size=4, patch_size=1, num_classes=1
    )
    optimizer = torch.optim.AdamW(sit.parameters(), lr=3e-3)
    for step in range(300):
        x = torch.randint(0, 2, (64, 1, 1, 1)).mul(2.0).sub(1).expand(64, 1, 4, 4)
        loss = training_losses(sit, x, torch.zeros(64).long(), None, config)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    noise = torch.randn(64, 1, 4, 4)
    out = euler_ode(sit.eval(), noise, torch.zeros(64).long(), num_steps=20, cells=2)
    agree = (out.flatten(1) > 0).float().mean(1)
    assert ((agree == 0) | (agree == 1)).float().mean() > 0.9
    assert 0.2 < agree.mean() < 0.8
    assert 0.8 < out.abs().mean() < 1.2


# ---- one table


@pytest.mark.parametrize(
    "typed",
    [
        dict(method="maskalign", stop_align_at=2, log_every=1),
        dict(method="maskalign", cells=2),
        dict(method="repa", cells=3),
        dict(method="sra", mask_ratio=0.25, mixer_depth=1, self_depth=2),
        dict(method="sra", cells=2, self_depth=2),
        dict(method="haste", mask_ratio=0.25, mixer_depth=1, class_token=True),
    ],
    ids=lambda typed: ",".join(f"{k}={v}" for k, v in typed.items()),
)
def test_combinations_are_values(typed, tmp_path):
    settings = {**TINY, "steps": 4, "out": str(tmp_path), "attn_layers": ((1, 1), (2, 2))}
    train(make_config(**{**settings, **typed}))
    lines = log(tmp_path)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    if typed.get("stop_align_at"):
        assert [line["align"] == 0 for line in lines] == [False, False, True, True]


@pytest.mark.parametrize(
    "typed, message",
    [
        (
            dict(method="sra", class_token=True),
            "self_depth is 4: it must be .* 0 with a class token",
        ),
        (dict(method="sit", self_depth=2), "self_depth is 2: it must be .* without align_coeff"),
        (dict(method="sra", self_depth=7), "self_depth is 7: it must be at most the depth, 6"),
        (dict(method="haste", cells=2), "attn_coeff is 0.5: it must be 0 with cells"),
        (dict(method="sit", stop_align_at=5), "stop_align_at is 5: it must be 0 where nothing"),
        (dict(method="xar", cells=4), "cells is 4: it must be a divisor of the 6 tokens"),
        (dict(align_loss="l2"), "align_loss is l2: it must be cosine or smooth_l1"),
        (
            dict(method="repa", attn_coeff=0.5),
            "attn_coeff is 0.5: .*0 .*methods without attn_layers",
        ),
    ],
)
def test_combinations_that_make_no_sense_are_refused_with_a_reason(typed, message):
    with pytest.raises(BadInput, match=message) as caught:
        make_config(**typed)
    assert "\n" not in str(caught.value)


def test_a_network_with_fewer_blocks_distils_from_its_last(tmp_path):
    config = make_config(**{**TINY, "steps": 1, "out": str(tmp_path)}, method="haste")
    train(dataclasses.replace(config, attn_layers=((9, 9),)))  # 3 blocks; the teacher has 2
    assert log(tmp_path)[-1]["attn"] > 0


def test_velocity_field_of_a_celled_model_keeps_raster_order():
    sit = trained_looking(tiny(class_token=False, cells=2))
    x, _, y, _ = batch()
    v = unpatchify(sit(x, torch.zeros(3, 4), y).v, 2)
    assert v.shape == x.shape
    assert dataclasses.asdict(make_config(method="xar"))["cells"] == 2
