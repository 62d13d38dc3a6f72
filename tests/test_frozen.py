"""Teacher and VAE: the official networks, read from files of the published formats."""

import collections
import pickletools
import zipfile

import pytest
import safetensors.torch
import torch
from golden_cases import CASES, assert_golden, inputs

import maskalign
from maskalign import (
    AutoencoderKL,
    BadInput,
    ViTTeacher,
    build_teacher,
    build_vae,
    decode_latents,
    demo_shapes,
    encode_images,
    make_config,
    read_weights,
)

DINO, VAE = CASES["dinov2/vit_s14_224"], CASES["vae/sd_vae"]
NAME = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(scope="module")
def vae_weights(vae_file):
    return read_weights(vae_file)


@pytest.fixture(scope="module")
def small_vae(small_vae_file):
    return read_weights(small_vae_file)


@pytest.mark.golden
def test_teacher_tokens_equal_the_official_ones(dino_file, all_cores):
    teacher, x = ViTTeacher(NAME, 16, dino_file).double().eval(), inputs(DINO)
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
    teacher, x = ViTTeacher(NAME, 16, dino_file).eval(), inputs(DINO, torch.float32)
    with torch.no_grad():
        assert_golden(teacher(x["image_u8"].to(torch.uint8)), DINO, "image_features")


def test_teacher_reads_timms_format_like_metas(dino_file, tmp_path):
    """timm's file of the same network: safetensors, without a mask token."""
    state = read_weights(dino_file)
    path = str(tmp_path / "model.safetensors")
    safetensors.torch.save_file({k: v.clone() for k, v in state.items() if k != "mask_token"}, path)
    image = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    a, b = (ViTTeacher(NAME, 16, file).eval() for file in (dino_file, path))
    with torch.no_grad():
        torch.testing.assert_close(a(image), b(image))


def test_teacher_has_one_patch_per_latent_token_at_any_size(dino_file):
    teacher = ViTTeacher(NAME, 4, dino_file).eval()
    with torch.no_grad():
        assert teacher(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, 17, 384)


def test_built_teacher_is_frozen_and_in_eval_mode(dino_file):
    config = make_config(data="x", teacher=NAME, teacher_weights=dino_file, image_size=64)
    teacher = build_teacher(config, None, "cpu")
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert build_teacher(make_config(data="x", method="sit"), None, "cpu") is None


def test_a_file_of_another_teacher_is_refused_with_one_sentence(dino_file):
    with pytest.raises(BadInput, match="dinov2_vits14_pretrain.pth holds weights of another model"):
        ViTTeacher("vit_base_patch14_dinov2.lvd142m", 16, dino_file)
    with pytest.raises(BadInput, match="'resnet50' is no ViT of timm"):
        ViTTeacher("resnet50", 16, dino_file)


TINY = "vit_tiny_patch16_224"  # its published file has a head, where timm would not be strict


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    vit = maskalign.timm.create_model(TINY, img_size=96)
    return {name: value + 0.01 for name, value in vit.state_dict().items()}


def build(state, tmp_path, name=TINY):
    torch.save(state, tmp_path / "vit.pth")
    return ViTTeacher(name, 4, str(tmp_path / "vit.pth"))


def test_every_tensor_of_the_teacher_comes_from_the_file(tiny, tmp_path):
    """A head and a mask token more do no harm; positions are resampled from 6 x 6 to 4 x 4."""
    vit = build({**tiny, "mask_token": torch.zeros(1, 192)}, tmp_path).vit.state_dict()
    assert not any(name.startswith("head") for name in vit)
    for name, value in vit.items():
        assert name == "pos_embed" or torch.equal(value, tiny[name])
    whole_mean = tiny["pos_embed"].mean()
    assert vit["pos_embed"].shape[1] == 17 and (vit["pos_embed"].mean() - whole_mean).abs() < 1e-3


def test_weights_of_something_else_are_refused_and_not_left_random(tiny, small_vae, tmp_path):
    without = {name: value for name, value in tiny.items() if "blocks.7." not in name}
    prefixed = {f"module.{name}": value for name, value in tiny.items()}
    wider = {**tiny, "norm.weight": torch.ones(384)}
    for wrong, reason in (
        (small_vae, "cls_token is not in it"),
        (without, "blocks.7.norm1.weight is not in it"),
        (prefixed, "cls_token is not in it"),
        (wider, "size mismatch for norm.weight"),
        ([tiny], "list"),
    ):
        with pytest.raises(BadInput, match=f"vit.pth holds weights of another .*{reason}") as error:
            build(wrong, tmp_path)
        assert "\n" not in str(error.value)


def test_an_empty_file_of_weights_does_not_ask_the_hub(tmp_path, monkeypatch):
    def ask(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(maskalign.huggingface_hub, "hf_hub_download", ask)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", ask)
    for empty in ({}, {"model": {}}):
        with pytest.raises(BadInput, match="vit.pth holds weights of another .*cls_token is not"):
            build(empty, tmp_path)


def test_dinov3_can_teach_and_has_no_table_of_positions(tmp_path):
    name = "vit_small_patch16_dinov3"
    torch.manual_seed(0)
    state = maskalign.timm.create_model(name, num_classes=0).state_dict()
    teacher = build(state, tmp_path, name).eval()
    with torch.no_grad():
        tokens = teacher(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert teacher.vit.num_prefix_tokens == 5 and tokens.shape == (1, 17, 384)
    for key, value in teacher.vit.state_dict().items():
        assert torch.equal(value, state[key])
    del state["reg_token"]
    with pytest.raises(BadInput, match="reg_token is not in it"):
        build(state, tmp_path, name)


def test_dinov2_with_registers_is_read_from_metas_names(tmp_path):
    """Meta adds the class token's position apart; timm's network has it added."""
    name = "vit_small_patch14_reg4_dinov2"
    torch.manual_seed(0)
    timms = maskalign.timm.create_model(name, img_size=56, num_classes=0).state_dict()
    metas = dict(timms, mask_token=torch.zeros(1, 384))
    metas["register_tokens"] = metas.pop("reg_token")
    place = torch.full((1, 1, 384), 0.5)
    metas["pos_embed"] = torch.cat([place, timms["pos_embed"]], dim=1)
    metas["cls_token"] = timms["cls_token"] - place
    teacher = build(metas, tmp_path, name)
    for key, value in teacher.vit.state_dict().items():
        torch.testing.assert_close(value, timms[key])


def test_a_teacher_without_class_token_is_refused():
    name = "vit_base_patch16_siglip_224"
    with pytest.raises(BadInput, match=f"'{name}' is no ViT of timm with a class token"):
        ViTTeacher(name, 4, "its weights are not asked for.pth")


def test_any_timm_vit_can_teach(tmp_path):
    """Four registers: still one patch per token, and the registers are left out."""
    name = "vit_small_patch14_reg4_dinov2"
    vit = maskalign.timm.create_model(name, img_size=56, num_classes=0)
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    teacher = ViTTeacher(name, 4, str(tmp_path / "vit.pth")).eval()
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        tokens = teacher(image)
    assert teacher.vit.num_prefix_tokens == 5 and tokens.shape == (1, 17, 384)


@pytest.mark.parametrize("content", [b"", b"not weights"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_broken_weights_file_is_refused_with_one_sentence(content, suffix, tmp_path):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f"cannot read .*broken{suffix}") as caught:
        read_weights(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_weights_file_cannot_run_code(zipped, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    state, path = {"weight": Attack()}, tmp_path / "attack.pth"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadInput, match="cannot read .*/attack.pth") as error:
        read_weights(str(path))
    assert "\n" not in str(error.value)
    assert "can still be loaded" not in str(error.value), "torch's advice is no advice of ours"
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
def test_every_published_format_is_read(kind, tmp_path):
    state = {"a.weight": torch.randn(3, 4), "a.num_batches_tracked": torch.tensor(7)}
    found = read_weights(str(write_as(kind, state, tmp_path / "w.pth")))
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype


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
def test_a_file_cut_short_is_refused_in_every_format(kind, share, tmp_path):
    path = write_as(kind, {"weight": torch.randn(50, 50)}, tmp_path / "w.pth")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BadInput, match="cannot read .*/w[.]") as caught:
        read_weights(str(path))
    assert "\n" not in str(caught.value) and "delete" not in str(caught.value)


def test_a_flipped_bit_of_a_zip_is_refused(tmp_path):
    path = write_as("zip", {"weight": torch.randn(50, 50)}, tmp_path / "w.pth")
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1  # in the middle of the tensor: torch would load it
    path.write_bytes(whole)
    with pytest.raises(BadInput, match="cannot read .* a part of it is damaged"):
        read_weights(str(path))


@pytest.mark.parametrize(
    "build, flag, file",
    [
        (lambda c: build_teacher(c, None, "cpu"), "--teacher_weights", "model.safetensors"),
        (lambda c: build_vae(c, "cpu"), "--vae_weights", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_offline_without_a_file_names_both_ways_out(build, flag, file, monkeypatch, tmp_path):
    def no_internet(*args):
        raise OSError("Connection refused")

    monkeypatch.setattr(maskalign.huggingface_hub, "hf_hub_download", no_internet)
    monkeypatch.setattr(maskalign.huggingface_hub, "try_to_load_from_cache", lambda *a: None)
    with pytest.raises(BadInput, match=f"cannot read {file} of .*internet.* {flag} FILE"):
        build(make_config(data="x", teacher=NAME))


def test_a_file_in_the_hubs_cache_is_used_without_internet(monkeypatch, dino_file):
    monkeypatch.setattr(maskalign.huggingface_hub, "try_to_load_from_cache", lambda *a: dino_file)
    assert ViTTeacher(NAME, 4).dim == 384


@pytest.mark.golden
def test_vae_equals_the_published_one(vae_weights, all_cores):
    vae = AutoencoderKL({k: v.double() for k, v in vae_weights.items()})
    x = inputs(VAE)
    mean, std = vae.encode(x["image_u8"].double() / 127.5 - 1)
    assert_golden(mean, VAE, "mean")
    assert_golden(std, VAE, "std")
    assert_golden((mean + std * x["eps"]) * 0.18215, VAE, "scaled_sample")
    assert_golden(vae.decode(x["latent"]), VAE, "decoded")
    assert_golden(vae.decode(x["latent"] / 0.18215), VAE, "decoded_div_scale")


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
    vae = build_vae(make_config(data="x", vae_weights=path), "cpu")
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(vae.encode(x)[0], AutoencoderKL(small_vae).encode(x)[0])


@pytest.mark.golden
def test_latents_are_scaled_and_pixels_truncated_as_in_repa(vae_weights, all_cores):
    vae, x = AutoencoderKL(vae_weights), inputs(VAE, torch.float32)
    moments = encode_images(vae, x["image_u8"].to(torch.uint8))
    mean, std = moments.chunk(2, dim=1)
    assert_golden(mean / 0.18215, VAE, "mean")
    assert_golden(mean + std * x["eps"], VAE, "scaled_sample")
    pixels = decode_latents(vae, x["latent"] * 0.18215).permute(0, 2, 3, 1)
    assert_golden(pixels.float(), VAE, "decoded_u8_nhwc")
    decoded = (255 * (vae.decode(x["latent"]) + 1) / 2).clamp(0, 255).permute(0, 2, 3, 1)
    assert (pixels == decoded.floor()).float().mean() > 0.999  # truncated, not rounded
    assert (pixels == decoded.round()).float().mean() < 0.9


def test_pixel_space_is_exact_up_to_rounding():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mean, std = encode_images(None, images).chunk(2, dim=1)
    assert not std.any() and mean.abs().max() <= 2
    assert (decode_latents(None, mean).int() - images.int()).abs().max() <= 1


def test_weights_that_are_no_vae_are_refused_with_one_sentence(dino_file, small_vae, tmp_path):
    with pytest.raises(BadInput, match="dinov2_vits14_pretrain.pth holds no SD-VAE"):
        build_vae(make_config(data="x", vae_weights=dino_file), "cpu")
    short = {k: v for k, v in small_vae.items() if "conv_shortcut" not in k}
    for odd in ({}, {"state_dict": {"a": torch.ones(1)}}, {"epoch": 3}, [1], short):
        torch.save(odd, tmp_path / "odd.pth")
        with pytest.raises(BadInput, match="odd.pth holds no SD-VAE"):
            build_vae(make_config(data="x", vae_weights=str(tmp_path / "odd.pth")), "cpu")


def test_demo_teacher_learns_its_classes_and_has_a_patch_per_token():
    data = demo_shapes(16, 2048)
    config = make_config(num_classes=8, image_size=16, teacher_steps=120)
    teacher = build_teacher(config, data, "cpu")
    images, labels = data.tensors
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
    config, data = make_config(num_classes=8, teacher_steps=5), demo_shapes(24, 64)
    states, threads = [], torch.get_num_threads()
    try:
        for count in (2, 1):
            torch.set_num_threads(count)
            states.append(build_teacher(config, data, "cpu").state_dict())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    one, two = states
    assert all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))
