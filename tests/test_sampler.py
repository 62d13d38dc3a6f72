"""The samplers are the official ones, and exact where the answer is known."""

import pytest
import torch
from golden_cases import assert_golden, ids, inputs, model
from test_method import trained_looking
from test_model import tiny

import maskalign
from maskalign import SiTOutput, patchify
from sample import SAMPLERS, euler_maruyama, euler_ode, heun_ode


def replay(monkeypatch, noises):
    """torch.randn_like gives the stored noises, one after the other."""
    queue = list(noises)
    monkeypatch.setattr(torch, "randn_like", lambda like: queue.pop(0).to(like))
    return queue


@ids("sampler/")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_samples_equal_the_official_ones(case, dtype, monkeypatch):
    sit, x = model(case, dtype), inputs(case, dtype)
    noises = [
        x[f"{name}.{i}"]
        for i in range(case["num_steps"] - 1)
        for name in ("eps", "cls_eps")
        if f"{name}.{i}" in x
    ]  # the order: latent, class token
    left = replay(monkeypatch, noises)
    settings = dict(case["sampler_args"])
    kind = "sde" if "sde" in case["id"] else "heun" if settings.pop("heun", False) else "ode"
    sampler, calls = SAMPLERS[kind], []
    sit.register_forward_hook(
        lambda module, args, out: calls.append([len(args[0]), args[1][0].item()])
    )
    samples = sampler(
        sit,
        x["latents"],
        x["y"],
        x.get("cls_latents"),
        num_steps=case["num_steps"],
        **settings,
    )
    assert samples.dtype == dtype and not left
    assert_golden(samples, case, "samples")
    # Where the official program makes one call of twice the batch, for guidance, we make two.
    official = [t for size, t in case["model_calls"] for _ in range(size // 2)]
    assert [n for n, _ in calls] == [2] * len(official)
    assert [t for _, t in calls] == pytest.approx(official, abs=1e-7)


class PointData:
    """The exact velocity field where the data is one point: v = (x - point) / t."""

    patch_size, num_classes, point = 2, 10, 0.7

    def __call__(self, x, t, y, cls=None):
        v = (x - self.point) / t.view(-1, 1, 1, 1)
        return SiTOutput(
            patchify(v, 2), None if cls is None else (cls - self.point) / t[:, None], None
        )


@pytest.mark.parametrize("sampler", [euler_ode, heun_ode])
@pytest.mark.parametrize("num_steps", [1, 4, 25])
def test_ode_reaches_a_single_data_point_exactly(num_steps, sampler):
    x, cls = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 16).double()
    out = sampler(PointData(), x, torch.zeros(2).long(), cls, num_steps=num_steps)
    torch.testing.assert_close(out, torch.full_like(x, 0.7), rtol=0, atol=1e-12)


def test_sde_ends_at_a_single_data_point():
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    out = euler_maruyama(PointData(), x, torch.zeros(2).long(), num_steps=250)
    assert (out - 0.7).abs().max() < 0.2 and (out - 0.7).std() < 0.05  # the last step is 0.04 wide


class GaussianData:
    """The exact velocity field where the data is normal with the given mean and spread."""

    patch_size, num_classes, mean, std = 2, 10, 1.5, 0.5

    def __call__(self, x, t, y, cls=None):
        t = t.view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        gain = (t - (1 - t) * self.std**2) / variance
        return SiTOutput(patchify(gain * (x - (1 - t) * self.mean) - self.mean, 2), None, None)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_samples_of_gaussian_data_have_its_mean_and_spread(sampler):
    torch.manual_seed(0)
    x = sampler(
        GaussianData(), torch.randn(64, 4, 16, 16).double(), torch.zeros(64).long(), num_steps=250
    )
    assert x.mean().item() == pytest.approx(1.5, abs=0.01)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


def test_ode_of_gaussian_data_follows_the_known_map():
    """Its flow maps noise e to mean + std * e: Heun's error falls with the square of the step."""
    noise = torch.randn(8, 4, 8, 8, dtype=torch.float64)
    exact, errors = 1.5 + 0.5 * noise, []
    for num_steps in (50, 100):
        x = heun_ode(GaussianData(), noise, torch.zeros(8).long(), num_steps=num_steps)
        errors.append((x - exact).abs().max().item())
    assert errors[0] < 2e-3 and errors[0] / errors[1] == pytest.approx(4, rel=0.3)


def test_sde_adds_no_noise_in_its_last_step(monkeypatch):
    noises = [torch.zeros(1)] * 9
    left = replay(monkeypatch, noises)
    euler_maruyama(PointData(), torch.randn(1, 4, 8, 8), torch.zeros(1).long(), num_steps=10)
    assert not left  # 10 steps, 9 of them noisy


def test_drift_is_the_one_of_the_reverse_sde(monkeypatch):
    replay(monkeypatch, [torch.zeros(1)])
    x, v = torch.randn(1, 4, 8, 8).double(), 0.3

    class Constant(PointData):
        def __call__(self, x, t, y, cls=None):
            return SiTOutput(patchify(torch.full_like(x, v), 2), None, None)

    out = euler_maruyama(Constant(), x, torch.zeros(1).long(), num_steps=2)
    for t, dt in ((1.0, -0.96), (0.04, -0.04)):
        score = -(x + (1 - t) * v) / t
        x = x + (v - 0.5 * 2 * t * score) * dt
    torch.testing.assert_close(out, x)


def test_no_guidance_needs_one_call_a_step_and_guidance_two():
    sit, calls = trained_looking(tiny()), []
    sit.register_forward_hook(lambda module, args, out: calls.append((args[1][0].item(), args[2])))
    x, y, cls = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.randn(2, 16)
    euler_ode(sit, x, y, cls, num_steps=4, cfg_scale=1.0)
    assert [(t, labels.tolist()) for t, labels in calls] == [
        (t, [1, 2]) for t in (1.0, 0.75, 0.5, 0.25)
    ]
    calls.clear()
    euler_ode(sit, x, y, cls, num_steps=4, cfg_scale=2.0, guidance_low=0.5, guidance_high=0.75)
    assert [(t, labels.tolist()) for t, labels in calls] == [
        (1.0, [1, 2]),
        (0.75, [1, 2]),
        (0.75, [10, 10]),  # the null class
        (0.5, [1, 2]),
        (0.5, [10, 10]),  # both bounds are inside
        (0.25, [1, 2]),
    ]


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
@pytest.mark.parametrize("class_token", [True, False])
def test_the_sampler_of_the_previews_is_the_ode_of_the_papers(class_token, cfg_scale):
    sit, x = trained_looking(tiny(class_token=class_token)).double(), torch.randn(2, 4, 8, 8)
    cls, y = torch.randn(2, 16).double() if class_token else None, torch.tensor([1, 2])
    options = dict(num_steps=5, cfg_scale=cfg_scale)
    plain = maskalign.euler_ode(sit, x.double(), y, cls, **options)
    torch.testing.assert_close(
        plain, euler_ode(sit, x.double(), y, cls, **options), rtol=0, atol=1e-12
    )
    assert (plain - x).abs().max() > 0.1  # it moved


def test_class_token_guidance_defaults_to_that_of_the_image():
    sit, x, y = trained_looking(tiny()), torch.randn(2, 4, 8, 8).double(), torch.tensor([1, 2])
    sit, cls = sit.double(), torch.randn(2, 16).double()
    default, same, none = (
        euler_ode(sit, x, y, cls, num_steps=4, cfg_scale=2.0, cls_cfg_scale=w)
        for w in (None, 2.0, 0.0)
    )
    assert torch.equal(default, same) and not torch.allclose(default, none)


def test_state_is_kept_in_float64_between_steps():
    """A float32 state would lose the steps of size 1e-9 that this field takes."""

    class Slow(PointData):
        def __call__(self, x, t, y, cls=None):
            assert x.dtype == torch.float32
            return SiTOutput(patchify(torch.full_like(x, 1e-6), 2), None, None)

    out = euler_ode(Slow(), torch.ones(1, 4, 8, 8), torch.zeros(1).long(), num_steps=1000)
    torch.testing.assert_close(out, torch.full_like(out, 1 - 1e-6), rtol=0, atol=6e-8)
