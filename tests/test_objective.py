"""The losses are those of REPA and REG, restricted to the kept tokens (Eq. 10 and 11)."""

import dataclasses

import pytest
import torch
from golden_cases import assert_golden, ids, inputs, model
from test_method import batch, trained_looking
from test_model import tiny

from maskalign import (
    Run,
    SiTOutput,
    draw_step,
    make_config,
    patchify,
    sample_token_subset,
    seeded,
    training_losses,
)
from sample import from_official

SIZE = dict(data="x", num_classes=10, image_size=64, z_dim=16)
CONFIG = make_config(**SIZE)


def draws(config=CONFIG, n=3, **given):
    """What a step of n images draws, with some of it given."""
    drawn = draw_step(Run(dataclasses.replace(config, batch_size=n)), seeded("cpu", "test"))
    del drawn["vae_noise"]  # for the VAE alone
    assert given.keys() <= drawn.keys()
    return drawn | given


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
    x, _, y, _ = batch()
    z = torch.randn(3, 17, 16)

    def perfect(x_t, t, y, cls_t, ids_keep):
        keep = torch.cat([torch.zeros(3, 1, dtype=torch.long), ids_keep + 1], 1)
        z_kept = torch.stack([row[ids] for row, ids in zip(z, keep, strict=True)])
        return SiTOutput(torch.zeros(3, ids_keep.shape[1], 16), torch.zeros(3, 16), 3 * z_kept)

    losses = training_losses(perfect, x, y, z, CONFIG, **draws())
    assert losses["align"].item() == pytest.approx(-1, abs=1e-6)


def test_a_perfect_velocity_gives_loss_zero():
    x, _, y, _ = batch()
    z, drawn = torch.randn(3, 17, 16), draws()

    def perfect(x_t, t, y, cls_t, ids_keep):
        v = patchify(drawn["noise"] - x, 2)
        v = torch.stack([row[ids] for row, ids in zip(v, ids_keep, strict=True)])
        return SiTOutput(v, drawn["cls_noise"] - z[:, 0], None)

    losses = training_losses(perfect, x, y, z, CONFIG, **drawn)
    assert losses["denoise"] == losses["cls"] == losses["align"] == losses["loss"] == 0


def test_velocity_is_the_derivative_of_the_path():
    """The model is shown x_t at two times; their slope is the target that it is held to."""
    x, _, y, _ = (part.double() if part.is_floating_point() else part for part in batch())
    z, seen = torch.randn(3, 17, 16).double(), []
    noise, cls_noise = torch.randn_like(x), torch.randn(3, 16).double()

    def spy(x_t, t, y, cls_t, ids_keep):
        seen.append((x_t, cls_t))
        slope = (seen[-1][0] - seen[0][0]) / 0.25, (seen[-1][1] - seen[0][1]) / 0.25
        return SiTOutput(patchify(slope[0], 2), slope[1], None)

    drawn = draws(noise=noise, cls_noise=cls_noise, ids_keep=None)
    for t in (0.5, 0.75):
        drawn["t"] = torch.full((3,), t).double()
        losses = training_losses(spy, x, y, z, CONFIG, **drawn)
    assert losses["denoise"] < 1e-24 and losses["cls"] < 1e-24


def test_time_zero_is_data_and_time_one_is_noise():
    x, _, y, _ = batch()
    drawn, shown = draws(ids_keep=None), []

    def spy(x_t, t, y, cls_t, ids_keep):
        shown.append(x_t)
        return SiTOutput(torch.zeros(3, 16, 16), torch.zeros(3, 16), None)

    for t in (0.0, 1.0):
        drawn["t"] = torch.full((3,), t)
        training_losses(spy, x, y, torch.randn(3, 17, 16), CONFIG, **drawn)
    assert torch.equal(shown[0], x) and torch.equal(shown[1], drawn["noise"])


def test_dropped_tokens_are_neither_predicted_nor_aligned():
    """Without a mixer, nothing about a dropped token can change any loss or gradient."""
    sit, (x, t, y, _) = trained_looking(tiny(mixer_depth=0)).double(), batch()
    x, t, z = x.double(), t.double(), torch.randn(3, 17, 16).double()
    noise = torch.randn(3, 4, 8, 8).double()
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
        pairs = zip(out.z_pred[i], torch.cat([z[i, :1], z[i, 1 + keep[i]]]), strict=True)
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
    config, sit = make_config(**SIZE, method=method), trained_looking(tiny(method=method))
    x, _, y, _ = batch()
    z = None if method == "sit" else torch.randn(3, 17, 16)
    losses = training_losses(sit, x, y, z, config, **draws(config))
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
        **draws(),
    )
    assert all(value.dtype == torch.float32 for value in losses.values())


def test_labels_are_dropped_at_the_stated_rate_and_times_are_uniform():
    drawn = draws(n=20000)
    assert drawn["drop"].float().mean().item() == pytest.approx(0.1, abs=0.01)
    t = drawn["t"]
    assert t.min() >= 0 and t.max() < 1
    assert t.mean().item() == pytest.approx(0.5, abs=0.01)
    assert t.var().item() == pytest.approx(1 / 12, abs=0.003)


def test_dropped_labels_become_the_null_class_and_the_others_stay():
    x, _, y, _ = batch()
    seen = []

    def spy(x_t, t, y, cls_t, ids_keep):
        seen.append(y.tolist())
        return SiTOutput(torch.zeros(3, 12, 16), torch.zeros(3, 16), None)

    drop = torch.tensor([True, False, True])
    training_losses(spy, x, y, torch.randn(3, 17, 16), CONFIG, **draws(drop=drop))
    assert seen == [[10, y[1].item(), 10]]


def test_a_step_draws_a_row_for_each_image_from_its_generator_alone():
    config = dataclasses.replace(CONFIG, batch_size=6)
    torch.manual_seed(0)
    one = draw_step(Run(config), seeded("cpu", "a step"))
    torch.manual_seed(1)
    two, other = (draw_step(Run(config), seeded("cpu", key)) for key in ("a step", "another"))
    assert {name: tuple(value.shape) for name, value in one.items()} == dict(
        ids_keep=(6, 12),
        t=(6,),
        noise=(6, 4, 8, 8),
        cls_noise=(6, 16),
        drop=(6,),
        vae_noise=(6, 4, 8, 8),
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if name != "drop")
    # The VAE's noise is not the path's.
    assert not torch.equal(one["noise"], one["vae_noise"])


def test_an_unmasked_method_draws_no_subset():
    assert draws(make_config(**SIZE, mask_ratio=0.0))["ids_keep"] is None


def test_a_draw_that_is_misspelt_is_refused():
    x, _, y, _ = batch()
    drawn = draws()
    drawn["nose"] = drawn.pop("noise")
    with pytest.raises(TypeError, match="nose"):
        training_losses(tiny(), x, y, torch.randn(3, 17, 16), CONFIG, **drawn)
