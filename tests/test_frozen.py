"""Teacher and VAE: the official networks, read from files of the published formats."""

import collections
import pickletools
import zipfile

import pytest
import safetensors.torch
import torch
from golden_cases import CASES, assert_golden, inputs
from torch.nn.functional import interpolate

import maskalign
from maskalign import ViTTeacher, build_vae, decode_latents, demo_shapes, load_teacher, make_config
from sample import AutoencoderKL, load_vae

DINO, VAE = CASES["dinov2/vit_s14_224"], CASES["vae/sd_vae"]
NAME = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(scope="module")
def vae_weights(vae_file):
    return torch.load(vae_file)


@pytest.fixture(scope="module")
def small_vae(small_vae_file):
    return torch.load(small_vae_file)


def teacher_of(weights, name=NAME, grid=16, **changes):
    """A teacher from a file, for `grid` patches per side."""
    given = dict(data="x", teacher=name, teacher_weights=str(weights), image_size=16 * grid)
    return load_teacher(make_config(**given, **changes), None, "cpu")


@pytest.mark.golden
def test_teacher_tokens_equal_the_official_ones(dino_file, all_cores):
    teacher, x = teacher_of(dino_file).double(), inputs(DINO)
    # Positions are resampled in float32: without AVX2 they are 1.3e-7 of the largest off, not 0.
    positions = dict(rounding=5e-7)
    assert_golden(teacher.vit.pos_embed, DINO, "pos_embed_resampled", **positions)
    with torch.no_grad():
        found = teacher.vit.forward_features(x["pixels"])
        assert_golden(found, DINO, "forward_features", **positions)
        tokens = teacher(x["image_u8"].to(torch.uint8))  # 256 px: normalise, bicubic to 224
        assert_golden(tokens, DINO, "image_features", **positions)
    assert tokens.shape == (1, 257, 384) == (1, 1 + 16**2, teacher.dim)


@pytest.mark.golden
def test_teacher_in_float32_equals_the_official_run(dino_file):
    teacher, x = teacher_of(dino_file), inputs(DINO, torch.float32)
    with torch.no_grad():
        assert_golden(teacher(x["image_u8"].to(torch.uint8)), DINO, "image_features")


def test_teacher_reads_timms_format_like_metas(dino_file, tmp_path):
    """timm's file of the same network: safetensors, without a mask token."""
    state = torch.load(dino_file)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({k: v.clone() for k, v in state.items() if k != "mask_token"}, path)
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    a, b = (teacher_of(file, grid=4) for file in (dino_file, path))
    with torch.no_grad():
        torch.testing.assert_close(a(image), b(image))


def test_teacher_has_one_patch_per_latent_token_at_any_size(dino_file):
    teacher = teacher_of(dino_file, grid=4)
    with torch.no_grad():
        assert teacher(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 17, 384)


def test_teacher_is_frozen_and_in_eval_mode_and_sit_has_none(dino_file):
    teacher = teacher_of(dino_file, grid=4)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert load_teacher(make_config(data="x", method="sit"), None, "cpu") is None


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_a_dinov2_in_which_a_tensor_is_missing_or_of_another_size_is_refused(dino_file, tmp_path):
    """Nothing of a teacher may stay random. A single number each keeps the files small."""
    whole = {name: torch.ones(()).expand(shape) for name, shape in DINO["state_dict"]}
    without = {name: value for name, value in whole.items() if name != "blocks.7.norm1.weight"}
    prefixed = {f"student.{name}": value for name, value in whole.items()}
    wider = {**whole, "norm.weight": torch.ones(768)}
    wrong = [(without, "blocks.7.norm1.weight"), (prefixed, "cls_token"), (wider, "norm.weight")]
    for state, told in [*wrong, ({}, "cls_token")]:
        torch.save(state, tmp_path / "wrong.pth")
        with torch.device("meta"), pytest.raises(Exception, match=told):
            teacher_of(tmp_path / "wrong.pth", grid=4)
    with torch.device("meta"), pytest.raises(Exception, match="size mismatch"):
        teacher_of(dino_file, "vit_base_patch14_dinov2.lvd142m")


def test_a_file_of_weights_that_is_missing_never_asks_the_hub(tmp_path, monkeypatch):
    def ask(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", ask)
    with pytest.raises(FileNotFoundError):
        teacher_of(tmp_path / "none.pth", grid=4)


def test_dinov3_can_teach_and_has_no_table_of_positions(tmp_path):
    name = "vit_small_patch16_dinov3"
    torch.manual_seed(0)
    state = maskalign.timm.create_model(name, num_classes=0).state_dict()
    torch.save(state, tmp_path / "vit.pth")
    teacher = teacher_of(tmp_path / "vit.pth", name, grid=4)
    with torch.no_grad():
        tokens = teacher(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert teacher.vit.num_prefix_tokens == 5 and tokens.shape == (1, 17, 384)
    for key, value in teacher.vit.state_dict().items():
        assert torch.equal(value, state[key])


def test_dinov2_with_registers_is_read_from_metas_names_and_they_are_left_out(tmp_path):
    """Meta adds the class token's position apart; timm's network has it added."""
    name = "vit_small_patch14_reg4_dinov2"
    torch.manual_seed(0)
    timms = maskalign.timm.create_model(name, num_classes=0).state_dict()
    metas = dict(timms, mask_token=torch.zeros(1, 384))
    metas["register_tokens"] = metas.pop("reg_token")
    place = torch.full((1, 1, 384), 0.5)
    metas["pos_embed"] = torch.cat([place, timms["pos_embed"]], dim=1)
    metas["cls_token"] = timms["cls_token"] - place
    torch.save(metas, tmp_path / "vit.pth")
    teacher = teacher_of(tmp_path / "vit.pth", name, grid=4)
    for key, value in teacher.vit.state_dict().items():
        if key != "pos_embed":  # resampled
            torch.testing.assert_close(value, timms[key])
    with torch.no_grad():
        tokens = teacher(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    assert teacher.vit.num_prefix_tokens == 5 and tokens.shape == (1, 17, 384)


def test_a_teacher_without_class_token_serves_methods_that_need_none(monkeypatch):
    """They use all of z but its first token. With the class token of REG it is refused."""
    tiny = dict(embed_dim=32, depth=1, num_heads=2, class_token=False, global_pool="avg")
    vit = maskalign.timm.models.VisionTransformer(**tiny)  # as SigLIP's, but small
    vit.pretrained_cfg = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    monkeypatch.setattr(maskalign.timm, "create_model", lambda name, **options: vit)
    config = make_config(method="repa", teacher="vit_siglip", image_size=24)
    teacher = maskalign.load_teacher(config, None, "cpu")
    images = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    with torch.no_grad():
        z = teacher(images)
        resized = interpolate(images / 127.5 - 1, vit.patch_embed.img_size, mode="bicubic")
        torch.testing.assert_close(z[:, 1:], vit.forward_features(resized))
    assert z.shape == (2, 37, 32)
    with pytest.raises(AssertionError, match="no class token"):
        maskalign.load_teacher(make_config(teacher="vit_siglip"), None, "cpu")


@pytest.mark.parametrize("load", [teacher_of, lambda path: load_vae(str(path), 1.0, "cpu")])
@pytest.mark.parametrize("content", [b"", b"not weights"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_broken_weights_file_is_an_error(load, content, suffix, tmp_path):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(Exception):  # noqa: B017, each library has its own
        load(path)


@pytest.mark.parametrize("load", [teacher_of, lambda path: load_vae(str(path), 1.0, "cpu")])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_weights_file_cannot_run_code(load, zipped, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "attack.pth"
    torch.save({"weight": Attack()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Exception):  # noqa: B017, each library has its own
        load(path)
    assert not (tmp_path / "ran").exists()


def write_as(kind, state, path):
    """A file of one of the formats in which the networks of the field are published."""
    if kind == "safetensors":  # timm's DINOv2, the SD-VAE
        path = path.with_suffix(".safetensors")
        safetensors.torch.save_file(state, path)
    elif kind == "zip, typed tensors":  # Meta's dinov2_*_pretrain.pth
        state = dict(state)
        first = next(iter(state))
        state[first] = state[first].clone()
        state[first].note = "makes torch pickle the type too"
        torch.save(state, path)
    else:  # "before torch 1.6": pytorch-fid's Inception; "zip": SiT, REPA, REG, the SD-VAE's .bin
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    return path


FORMATS = ["before torch 1.6", "zip", "zip, typed tensors", "safetensors"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_published_format_is_read(kind, small_vae, tmp_path):
    vae = load_vae(str(write_as(kind, small_vae, tmp_path / "w.pth")), 0.5, "cpu")
    assert vae.scale == 0.5 and vae.tensors.keys() == small_vae.keys()
    assert all(torch.equal(vae.tensors[name], value) for name, value in small_vae.items())


def test_typed_tensors_are_pickled_as_in_metas_files(tmp_path):
    """The five names that the hub lists for dinov2_vitb14_pretrain.pth, and no other."""
    state = collections.OrderedDict(a=torch.zeros(2), b=torch.zeros(2))
    path = write_as("zip, typed tensors", state, tmp_path / "w.pth")
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("w/data.pkl")
    names = {name for code, name, _ in pickletools.genops(pickled) if code.name == "GLOBAL"}
    assert names <= {
        "collections OrderedDict",
        "torch FloatStorage",
        "torch Tensor",
        "torch._tensor _rebuild_from_type_v2",
        "torch._utils _rebuild_tensor_v2",
    }
    assert "torch._tensor _rebuild_from_type_v2" in names


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_a_file_cut_short_is_an_error_in_every_format(kind, share, small_vae, tmp_path):
    path = write_as(kind, small_vae, tmp_path / "w.pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(Exception):  # noqa: B017, each library has its own
        load_vae(str(path), 1.0, "cpu")


@pytest.mark.parametrize(
    "build, asked",
    [
        (lambda: load_teacher(make_config(data="x"), None, "cpu"), "dinov2"),
        (lambda: build_vae(make_config(data="x"), "cpu"), "stabilityai/sd-vae-ft-ema"),
    ],
    ids=["teacher", "vae"],
)
def test_without_a_file_the_hub_is_asked(build, asked, monkeypatch):
    asks = []

    def no_internet(model_id, *args, **kwargs):
        asks.append(model_id)
        raise OSError("Connection refused")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_internet)
    monkeypatch.setattr(maskalign.timm.models, "load_state_dict_from_hf", no_internet)
    with torch.device("meta"), pytest.raises(OSError, match="Connection refused"):
        build()  # without values, which would take a second
    assert len(asks) == 1 and asked in asks[0]


@pytest.mark.golden
def test_vae_equals_the_published_one(vae_weights, all_cores):
    vae = AutoencoderKL({k: v.double() for k, v in vae_weights.items()})
    x = inputs(VAE)
    mean, std = vae.encode(x["image_u8"].double() / 127.5 - 1).chunk(2, dim=1)
    assert_golden(mean, VAE, "mean")
    assert_golden(std, VAE, "std")
    assert_golden((mean + std * x["eps"]) * 0.18215, VAE, "scaled_sample")
    assert_golden(vae.decode(x["latent"]), VAE, "decoded")
    assert_golden(vae.decode(x["latent"] / 0.18215), VAE, "decoded_div_scale")


def test_vae_codes_many_images_as_it_codes_one(small_vae):
    """Thirty-two at a time. Training encodes under autocast, which encode leaves."""
    vae, images = AutoencoderKL(small_vae), torch.rand(40, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        codes = vae.encode(images)
    decoded = vae.decode(codes[:, :4])
    assert codes.shape == (40, 8, 2, 2) and codes.dtype == torch.float32
    torch.testing.assert_close(codes[38:], vae.encode(images[38:]))
    torch.testing.assert_close(decoded[38:], vae.decode(codes[38:, :4]))


def test_vae_reads_files_with_the_old_attention_names(small_vae, tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in small_vae.items():
        for new in old:
            key = key.replace(f".{new}.", f".{old[new]}.")
        renamed[key] = value
    assert sum("proj_attn" in key for key in renamed) == 4
    path = str(tmp_path / "old.safetensors")
    safetensors.torch.save_file(renamed, path)
    vae = build_vae(make_config(data="x", vae=path), "cpu")
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(vae.encode(x), AutoencoderKL(small_vae).encode(x))


@pytest.mark.golden
def test_latents_are_scaled_and_pixels_truncated_as_in_repa(vae_weights, all_cores):
    vae, x = AutoencoderKL(vae_weights), inputs(VAE, torch.float32)
    pixels = decode_latents(vae, x["latent"] * 0.18215).permute(0, 2, 3, 1)
    assert_golden(pixels.float(), VAE, "decoded_u8_nhwc")
    decoded = (255 * (vae.decode(x["latent"]) + 1) / 2).clamp(0, 255).permute(0, 2, 3, 1)
    assert (pixels == decoded.floor()).float().mean() > 0.999  # truncated, not rounded
    assert (pixels == decoded.round()).float().mean() < 0.9


def test_pixel_space_is_exact_up_to_rounding():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    batch = dict(image=images, label=torch.zeros(2))
    rng = maskalign.StepRng(make_config(), step=0)
    x, _, _ = maskalign.prepare_batch(batch, rng, None, None)
    assert x.abs().max() <= 2
    assert (decode_latents(None, x).int() - images.int()).abs().max() <= 1


def test_weights_that_are_no_vae_or_have_16_channels_are_refused(dino_file, small_vae, tmp_path):
    with pytest.raises(KeyError, match="encoder.conv_out.weight"):
        build_vae(make_config(data="x", vae=dino_file), "cpu")
    short = {k: v for k, v in small_vae.items() if "conv_shortcut" not in k}
    torch.save(short, tmp_path / "odd.pth")
    with pytest.raises(KeyError, match="conv_shortcut"):
        build_vae(make_config(data="x", vae=str(tmp_path / "odd.pth")), "cpu")
    wide = dict(small_vae)  # as the VAE of SD 3, which has no quant_conv either
    wide["encoder.conv_out.weight"] = torch.zeros(32, 128, 3, 3)
    del wide["quant_conv.weight"]
    torch.save(wide, tmp_path / "odd.pth")
    with pytest.raises(AssertionError, match="16 latent channels"):
        build_vae(make_config(data="x", vae=str(tmp_path / "odd.pth")), "cpu")


def demo_config(**changes):
    return make_config(num_classes=8, **changes)


def test_demo_teacher_learns_its_classes_and_has_a_patch_per_token():
    data = demo_shapes(16, 2048)
    teacher = load_teacher(demo_config(image_size=16, teacher_steps=100), data, "cpu")
    images, labels = data.datasets["image"], data.datasets["label"]
    with torch.no_grad():
        z = teacher(images[:512])
        named = teacher.vit.head(z[:, 0] + z[:, 1:].mean(1)).argmax(-1)
        assert (named == labels[:512]).float().mean() > 0.9  # chance: 0.125
    assert isinstance(teacher, ViTTeacher) and z.shape == (512, 1 + 4**2, 64)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    for tokens in (z[:, 0], z[:, 1:].flatten(0, 1)):
        assert tokens.mean().abs() < 0.3 and 0.7 < tokens.std() < 1.5


def test_demo_teacher_is_the_same_at_every_start():
    """Also with another number of threads, which it leaves as it was."""
    config, data = demo_config(teacher_steps=5), demo_shapes(24, 64)
    states, threads = [], torch.get_num_threads()
    try:
        for count in (2, 1):
            torch.set_num_threads(count)
            states.append(load_teacher(config, data, "cpu").state_dict())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    one, two = states
    assert all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))
