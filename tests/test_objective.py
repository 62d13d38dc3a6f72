"""The losses are those of REPA and REG, restricted to the kept tokens (Eq. 10 and 11)."""

import dataclasses

import pytest
import torch
from golden_cases import assert_golden, ids, inputs, model
from test_method import batch, trained_looking
from test_model import tiny

from maskalign import (
    SiTOutput,
    draw_step,
    from_official,
    make_config,
    patchify,
    sample_token_subset,
    seeded,
    training_losses,
)

CONFIG = make_config(data="x", num_classes=10)


def official_losses(sit, case, x, step=""):
    """REG's losses by our function.

    The golden cases give the diffused class token and the aligned one independently; ours are one.
    So the class token's noise is chosen, for the alignment term, such that c_t comes out the same.
    """
    config = make_config(data="x", method="reg" if sit.class_token else "repa", num_classes=10)
    x = {key.removeprefix(step): value for key, value in x.items() if key.startswith(step)}
    drop, feat = x["drop_rand"] < 0.1, x["feat.0"]
    options = dict(t=x["t"], noise=x["noise"], drop=drop)
    if not sit.class_token:
        z = torch.cat([torch.full_like(feat[:, :1], torch.nan), feat], 1)  # must not be read
        return training_losses(sit, x["images"], x["y"], z, config, **options)
    t, cls, noise = x["t"][:, None], x["cls_token"], x["noise_cls"]
    z = torch.cat([cls[:, None], feat[:, 1:]], 1)
    losses = training_losses(sit, x["images"], x["y"], z, config, cls_noise=noise, **options)
    moved = ((1 - t) * (cls - feat[:, 0]) + t * noise) / t
    losses["align"] = training_losses(
        sit, x["images"], x["y"], feat, config, cls_noise=moved, **options
    )["align"]
    losses["loss"] = losses["denoise"] + 0.03 * losses["cls"] + 0.5 * losses["align"]
    return losses


@ids("loss/", without=("haste", "sra"))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_losses_and_gradients_equal_the_official_ones(case, dtype):
    sit = model(case, dtype)
    losses = official_losses(sit, case, inputs(case, dtype))
    assert_golden(losses["loss"], case, "total")
    assert_golden(losses["align"], case, "proj_loss")
    gold = case["outputs"]
    assert losses["denoise"].item() == pytest.approx(gold["denoising_loss"]["mean"], abs=1e-6)
    if sit.class_token:
        assert losses["cls"].item() == pytest.approx(gold["cls_loss"]["mean"], abs=1e-6)
    losses["loss"].backward()
    for name, p in sit.named_parameters():
        for official in [key for key in gold if key.startswith("grad.")]:
            if [name] == list(from_official({official.removeprefix("grad."): 0})):
                assert_golden(p.grad, case, official)


@ids("train_steps/")
def test_three_optimiser_steps_equal_the_official_ones(case):
    sit, x, optim = model(case).train(), inputs(case), case["optimizer"]
    ema = {name: p.detach().clone() for name, p in sit.named_parameters()}
    start = {name: p.clone() for name, p in ema.items()}
    trained = [p for p in sit.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=CONFIG.lr, betas=(0.9, 0.999), weight_decay=0.0)
    totals, norms = [], []
    for step in range(case["n_steps"]):
        losses = official_losses(sit, case, x, f"step{step}/")
        optimizer.zero_grad()
        losses["loss"].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, CONFIG.grad_clip))
        optimizer.step()
        torch._foreach_lerp_(
            list(ema.values()), [p.data for p in sit.parameters()], 1 - CONFIG.ema_decay
        )
        totals.append(losses["loss"].detach())
    assert optim["lr"] == CONFIG.lr and optim["ema_decay"] == CONFIG.ema_decay
    assert_golden(torch.stack(totals), case, "total_per_step")
    assert_golden(torch.stack(norms), case, "grad_norm_per_step")
    for name, p in sit.named_parameters():
        for official in case["outputs"]:
            kind, _, key = official.partition("delta.")
            if key and [name] == list(from_official({key: 0})):
                end = p.data if kind == "" else ema[name]
                assert_golden(end - start[name], case, official)


def test_identical_features_give_alignment_minus_one():
    x, t, y, _ = batch()
    z = torch.randn(3, 17, 16)

    def perfect(x_t, t, y, cls_t, ids_keep):
        keep = torch.cat([torch.zeros(3, 1, dtype=torch.long), ids_keep + 1], 1)
        z_kept = torch.stack([row[ids] for row, ids in zip(z, keep)])
        return SiTOutput(torch.zeros(3, ids_keep.shape[1], 16), torch.zeros(3, 16), 3 * z_kept)

    losses = training_losses(perfect, x, y, z, CONFIG)
    assert losses["align"].item() == pytest.approx(-1, abs=1e-6)


def test_a_perfect_velocity_gives_loss_zero():
    x, t, y, _ = batch()
    z, noise, cls_noise = torch.randn(3, 17, 16), torch.randn(3, 4, 8, 8), torch.randn(3, 16)
    keep = sample_token_subset(3, 16, 0.25)

    def perfect(x_t, t, y, cls_t, ids_keep):
        v = patchify(noise - x, 2)
        v = torch.stack([row[ids] for row, ids in zip(v, ids_keep)])
        return SiTOutput(v, cls_noise - z[:, 0], None)

    losses = training_losses(
        perfect, x, y, z, CONFIG, noise=noise, cls_noise=cls_noise, ids_keep=keep
    )
    assert losses["denoise"] == losses["cls"] == losses["align"] == losses["loss"] == 0


def test_velocity_is_the_derivative_of_the_path():
    """The model is shown x_t at two times; their slope is the target that it is held to."""
    x, _, y, _ = (part.double() if part.is_floating_point() else part for part in batch())
    noise, cls_noise, z, seen = (
        torch.randn_like(x),
        torch.randn(3, 16).double(),
        torch.randn(3, 17, 16).double(),
        [],
    )

    def spy(x_t, t, y, cls_t, ids_keep):
        seen.append((x_t, cls_t))
        slope = (seen[-1][0] - seen[0][0]) / 0.25, (seen[-1][1] - seen[0][1]) / 0.25
        return SiTOutput(patchify(slope[0], 2), slope[1], None)

    config = dataclasses.replace(CONFIG, mask_ratio=0.0)
    for t in (0.5, 0.75):
        losses = training_losses(
            spy, x, y, z, config, t=torch.full((3,), t).double(), noise=noise, cls_noise=cls_noise
        )
    assert losses["denoise"] < 1e-24 and losses["cls"] < 1e-24


def test_time_zero_is_data_and_time_one_is_noise():
    x, _, y, _ = batch()
    noise, shown = torch.randn_like(x), []

    def spy(x_t, t, y, cls_t, ids_keep):
        shown.append(x_t)
        return SiTOutput(torch.zeros(3, 16, 16), torch.zeros(3, 16), None)

    config = dataclasses.replace(CONFIG, mask_ratio=0.0)
    for t in (0.0, 1.0):
        training_losses(
            spy, x, y, torch.randn(3, 17, 16), config, t=torch.full((3,), t), noise=noise
        )
    assert torch.equal(shown[0], x) and torch.equal(shown[1], noise)


def test_dropped_tokens_are_neither_predicted_nor_aligned():
    """Without a mixer, nothing about a dropped token can change any loss or gradient."""
    sit, (x, t, y, _) = trained_looking(tiny(mixer_depth=0)).double(), batch()
    x, t, z, noise = (
        x.double(),
        t.double(),
        torch.randn(3, 17, 16).double(),
        torch.randn(3, 4, 8, 8).double(),
    )
    keep = torch.arange(1, 16).expand(3, 15)
    options = dict(t=t, noise=noise, ids_keep=keep, cls_noise=torch.zeros(3, 16), drop=y < 0)
    one = training_losses(sit, x, y, z, CONFIG, **options)
    x[:, :, :2, :2], noise[:, :, :2, :2], z[:, 1] = 9.0, -9.0, 9.0
    two = training_losses(sit, x, y, z, CONFIG, **options)
    assert one == two


def test_losses_on_a_subset_are_means_over_that_subset():
    sit, (x, t, y, _) = trained_looking(tiny()), batch()
    z, noise = torch.randn(3, 17, 16), torch.randn(3, 4, 8, 8)
    cls_noise, drop = torch.randn(3, 16), torch.tensor([True, False, False])
    keep = sample_token_subset(3, 16, 0.25, seeded("cpu", "test"))
    losses = training_losses(
        sit, x, y, z, CONFIG, t=t, noise=noise, cls_noise=cls_noise, drop=drop, ids_keep=keep
    )
    s = t.view(3, 1, 1, 1)
    labels = torch.where(drop, 10, y)
    out = sit(
        (1 - s) * x + s * noise,
        t,
        labels,
        (1 - t[:, None]) * z[:, 0] + t[:, None] * cls_noise,
        keep,
    )
    v, error, cosines = patchify(noise - x, 2), [], []
    for i in range(3):
        error += [((out.v[i, j] - v[i, k]) ** 2).mean() for j, k in enumerate(keep[i])]
        pairs = zip(out.z_pred[i], torch.cat([z[i, :1], z[i, 1 + keep[i]]]))
        cosines += [a @ b / a.norm() / b.norm() for a, b in pairs]
    torch.testing.assert_close(losses["denoise"], torch.stack(error).mean())
    torch.testing.assert_close(losses["cls"], (out.v_cls - (cls_noise - z[:, 0])).square().mean())
    torch.testing.assert_close(losses["align"], -torch.stack(cosines).mean())
    assert len(cosines) == 3 * 13
    torch.testing.assert_close(
        losses["loss"], losses["denoise"] + 0.03 * losses["cls"] + 0.5 * losses["align"]
    )


@pytest.mark.parametrize(
    "method, parts",
    [("sit", {"denoise"}), ("repa", {"denoise", "align"}), ("reg", {"denoise", "align", "cls"})],
)
def test_each_method_has_its_own_terms(method, parts):
    config = make_config(data="x", method=method, num_classes=10)
    sit = trained_looking(
        tiny(
            class_token=config.class_token,
            mixer_depth=config.mixer_depth,
            align_depth=2 * (config.align_coeff > 0),
        )
    )
    x, _, y, _ = batch()
    losses = training_losses(sit, x, y, None if method == "sit" else torch.randn(3, 17, 16), config)
    assert {name for name, value in losses.items() if value != 0} == parts | {"loss"}
    losses["loss"].backward()
    unused = [name for name, p in sit.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused  # DDP would stop at a weight without gradient


def test_losses_are_float32_under_bfloat16():
    sit, (x, _, y, _) = trained_looking(tiny()).bfloat16(), batch()
    losses = training_losses(
        lambda x, t, y, cls, keep: sit(x.bfloat16(), t, y, cls.bfloat16(), keep),
        x,
        y,
        torch.randn(3, 17, 16).bfloat16(),
        CONFIG,
    )
    assert all(value.dtype == torch.float32 for value in losses.values())


def test_labels_are_dropped_at_the_stated_rate_and_only_by_the_loss():
    draw = draw_step(20000, (4, 8, 8), 16, CONFIG, seeded("cpu", "test"))
    assert draw["drop"].float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert 0 <= draw["t"].min() and draw["t"].max() < 1
    assert draw["t"].mean().item() == pytest.approx(0.5, abs=0.01)
    assert draw["ids_keep"].shape == (20000, 12)


def test_what_is_given_is_used_and_the_rest_is_drawn():
    keep = torch.zeros(2, 1, dtype=torch.long)
    draw = draw_step(2, (4, 8, 8), 16, CONFIG, None, None, torch.ones(2), None, None, keep)
    assert torch.equal(draw["t"], torch.ones(2)) and draw["ids_keep"] is keep
    assert draw["noise"].shape == (2, 4, 8, 8) and draw["cls_noise"].shape == (2, 16)
