"""What a GPU would refuse, shown without one: a tensor that was left on the CPU.

The device `meta` stands for the GPU. Its tensors have shapes and no values, so that all of this
is quick, and whatever asks for a value fails.
"""

import contextlib

import pytest
import rates
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

import maskalign as ma
import sample

META = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Refuses operations between two devices. Those of `meta` alone forgive an index on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors}
        assert len(devices) <= 1, f"{function} joins {devices}"
        return out


@pytest.fixture(autouse=True)
def meta_as_a_gpu(monkeypatch):
    """What `meta` lacks: random generators, autocast, and values to be copied to the CPU."""
    seeded = ma.seeded
    autocast = torch.autocast

    def seeded_on_cpu(device, *key):
        return None if torch.device(device) == META else seeded(device, *key)

    def autocast_on_cpu(device_type, *how, **more):
        no_op = contextlib.nullcontext()
        return no_op if device_type == "meta" else autocast(device_type, *how, **more)

    monkeypatch.setattr(ma, "seeded", seeded_on_cpu)
    monkeypatch.setattr(torch, "autocast", autocast_on_cpu)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: torch.zeros(x.shape, dtype=x.dtype))


def small(method, **changes):
    sizes = dict(hidden_size=32, num_heads=2, depth=1, align_depth=1, projector_dim=16)
    return ma.make_config(method=method, **(sizes | dict(num_classes=8, batch_size=2) | changes))


@pytest.fixture(scope="module")
def teacher():
    return rates.make_teacher(ma.make_config(num_classes=8), META)


def test_a_tensor_on_the_cpu_is_found():
    x = torch.zeros(3, 4, device=META)
    with pytest.raises(AssertionError, match="joins"), OneDevice():
        x[torch.arange(3)]
    with pytest.raises(AssertionError, match="joins"), OneDevice():
        torch.zeros(3).to(META)
    with pytest.raises(RuntimeError):
        x + torch.zeros(4)


@pytest.mark.parametrize("method", ["sit", "repa", "reg", "maskalign"])
def test_losses_and_gradients(method, teacher):
    config = small(method, z_dim=teacher.dim)
    model = ma.SiT(config).to(META)
    rng = ma.StepRng(config, step=0, device=META)
    shapes = ma.demo_shapes(24, 64)
    x, y, z = ma.prepare_batch(default_collate([shapes[0], shapes[1]]), rng, None, teacher)
    with OneDevice():
        terms = ma.training_losses(model, x, y, z, config, rng)
        terms["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    assert {value.device for value in terms.values()} == {META}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad.device == META for p in trained)


def test_kept_latents():
    config = small("maskalign", data="x", image_size=64)
    rng = ma.StepRng(config, step=0, device=META)
    batch = dict(image=torch.zeros(2, 3, 64, 64), label=torch.zeros(2, dtype=torch.long))
    batch["mean_std"] = torch.zeros(2, 8, 8, 8).half()
    vae = sample.AutoencoderKL({})
    x, y, _ = ma.prepare_batch(batch, rng, vae, None)
    assert x.device == y.device == META and x.shape == (2, 4, 8, 8)


@pytest.mark.parametrize("name", sample.SAMPLERS)
def test_samplers(name):
    config = small("maskalign")
    model = ma.SiT(config).to(META).eval()
    x = torch.randn(3, *config.latent_shape, device=META)
    y = torch.zeros(3, dtype=torch.long, device=META)
    cls = torch.randn(3, config.z_dim, device=META)
    with OneDevice():
        x = sample.SAMPLERS[name](model, x, y, cls, num_steps=2, cfg_scale=2.0)
    assert x.device == META and x.shape == (3, 3, 24, 24)


def test_vae(small_vae_file):
    vae = sample.load_vae(small_vae_file, 0.18215, META)
    with OneDevice():
        mean_std = vae.encode(torch.zeros(2, 3, 16, 16, device=META))
        images = ma.decode_latents(vae, mean_std[:, :4])
    assert images.device == META and images.shape == (2, 3, 16, 16)


def test_preview_and_generate(small_vae_file, tmp_path):
    vae = sample.load_vae(small_vae_file, 0.18215, META)
    config = small("maskalign", data="x", image_size=16, out=str(tmp_path), preview_steps=1)
    model = ma.SiT(config).to(META).eval()
    ma.preview(config, 1, model, vae, ma.euler_ode, META)
    assert list(tmp_path.glob("samples-*.png"))
    args = sample.parse_args(["", "--num_images=4", "--steps=1", "--cfg_scale=2"], sample.SAMPLERS)
    job = sample.Job(args, config, model, vae, sample.SAMPLERS[args.sampler], META)
    assert sample.generate(job, range(2)).shape == (2, 16, 16, 3)
