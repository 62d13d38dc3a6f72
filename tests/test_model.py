"""The network is the official SiT / REPA / REG, to the last digit."""

import json

import pytest
import torch
from golden_cases import HERE, assert_golden, ids, inputs, model

from maskalign import METHODS, SiT, make_config, patchify, sincos_pos_embed, unpatchify
from sample import from_official


def tiny(**changes):
    """A SiT small enough for any test; class token and two mixers unless changed."""
    options = dict(
        data="x",
        image_size=64,
        hidden_size=32,
        depth=4,
        num_heads=4,
        num_classes=10,
        z_dim=16,
        projector_dim=24,
        align_depth=2,
    )
    return SiT(make_config(**{**options, **changes}))


@ids("forward/re", without=["SiT-B"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_forward_equals_the_official_one(case, dtype):
    sit, x = model(case, dtype), inputs(case, dtype)
    out = sit(x["x"], x["t"], x["y"], x.get("cls_token"))
    assert_golden(unpatchify(out.v, 2), case, "velocity")
    assert_golden(out.z_pred, case, "zs.0")
    assert_golden(sit.t_embedder(x["t"]), case, "t_embed")
    if sit.class_token:
        assert_golden(out.v_cls, case, "cls")


@pytest.mark.slow
@ids("forward/reg_SiT-B-2")
def test_forward_of_the_published_size_equals_the_official_one(case, all_cores):
    sit, x = model(case), inputs(case)
    with torch.no_grad():
        out = sit(x["x"], x["t"], x["y"], x["cls_token"])
    assert_golden(unpatchify(out.v, 2), case, "velocity")
    assert_golden(out.v_cls, case, "cls")


@ids("init/")
def test_positions_equal_the_official_table(case):
    c = case["config"]
    table = sincos_pos_embed(c["hidden_size"], c["grid"])
    shape = case["outputs"]["pos_embed"]["shape"]
    padded = torch.zeros(shape)
    padded.view(-1, shape[-1])[shape[-2] - len(table) :] = table
    assert_golden(padded, case, "pos_embed")


@pytest.mark.parametrize("method, official", [("repa", "REPA/SiT-B-2"), ("reg", "REG/SiT-B-2")])
def test_published_checkpoints_have_our_keys_and_shapes(method, official):
    keys = json.loads((HERE / "golden" / "official_keys.json").read_text())[official]
    with torch.device("meta"):
        ours = SiT(make_config(data="x", method=method, size="SiT-B/2")).state_dict()
        theirs = from_official({key: torch.empty(shape) for key, shape in keys["state_dict"]})
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_from_official_strips_wrappers_and_takes_our_own_names():
    state = tiny().state_dict()
    wrapped = {
        "module._orig_mod."
        + key.replace("cls_embedder", "cls_projectors2")
        .replace("cls_norm", "wg_norm")
        .replace("cls_head", "linear_cls")
        .replace("projector.", "projectors.0.")
        .replace("y_embedder.", "y_embedder.embedding_table."): value
        for key, value in state.items()
    }
    assert list(from_official(wrapped)) == list(state) == list(from_official(state))


BACKBONE = {"SiT-S/2": 32957200, "SiT-B/2": 130500112, "SiT-L/2": 458086416, "SiT-XL/2": 675111184}
REG = {"SiT-S/2": 33549328, "SiT-B/2": 131683600, "SiT-L/2": 459664144, "SiT-XL/2": 676886032}
BLOCK = {"SiT-S/2": 2659968, "SiT-B/2": 10628352, "SiT-L/2": 18889728, "SiT-XL/2": 23905152}
PROJECTOR = {"SiT-S/2": 6558464, "SiT-B/2": 7344896, "SiT-L/2": 7869184, "SiT-XL/2": 8131328}


@pytest.mark.parametrize("size", BACKBONE)
def test_parameter_counts_are_the_published_ones(size):
    for method, expected in {
        "sit": BACKBONE[size],
        "repa": BACKBONE[size] + PROJECTOR[size],
        "reg": REG[size] + PROJECTOR[size],
        "maskalign": REG[size] + PROJECTOR[size] + 2 * BLOCK[size],
        "repa+maskalign": BACKBONE[size] + PROJECTOR[size] + 2 * BLOCK[size],
    }.items():
        with torch.device("meta"):
            network = SiT(make_config(data="x", method=method, size=size))
        assert sum(p.numel() for p in network.parameters()) == expected, method


@pytest.mark.parametrize("method", METHODS)
def test_output_is_zero_at_initialisation(method):
    config = make_config(method=method)
    network, (c, h, w) = SiT(config), config.latent_shape
    out = network(torch.randn(2, c, h, w), torch.rand(2), torch.tensor([0, 1]), torch.randn(2, 768))
    assert out.v.shape == (2, 36, 48) and not out.v.any()
    assert (out.v_cls is None) == (not config.class_token)
    assert out.v_cls is None or (out.v_cls.shape == (2, 768) and not out.v_cls.any())
    assert (out.z_pred is None) == (config.align_coeff == 0)


def test_every_weight_is_initialised_as_in_dit():
    torch.manual_seed(0)
    for name, p in tiny(hidden_size=128, projector_dim=96).named_parameters():
        if name.endswith("bias") or "adaLN" in name or "final_layer" in name:
            assert not p.any(), name
        elif "y_embedder" in name or "t_embedder" in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
        elif name == "cls_norm.weight":
            assert (p == 1).all()
        elif name != "pos_embed":
            flat = p.flatten(1)
            assert p.abs().max() <= (bound := (6 / sum(flat.shape)) ** 0.5), name
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name


def test_adaln_zero_makes_every_block_the_identity():
    sit, h, c = tiny(), torch.randn(2, 17, 32), torch.randn(2, 1, 32)
    for block in (*sit.mixer, *sit.blocks):
        assert torch.equal(block(h, c), h)
    assert not any(part.any() for part in sit.final_layer(h, c))


def test_embedding_shows_all_tokens_mixed_and_the_forward_starts_from_it():
    sit, x, t, y = tiny(), torch.randn(3, 4, 8, 8), torch.rand(3), torch.arange(3)
    for p in sit.parameters():  # at init gates and heads hide everything
        p.data.normal_(std=0.2)
    cls = torch.randn(3, 16)
    h, c = sit.embed(x, t, y, cls)
    assert h.shape == (3, 17, 32) and c.shape == (3, 1, 32)
    for block in sit.blocks:
        h = block(h, c)
    v, v_cls = sit.final_layer(h, c)
    out = sit(x, t, y, cls)
    assert torch.equal(v, out.v) and torch.equal(v_cls, out.v_cls)


def test_class_token_has_no_position_and_positions_are_not_trained():
    sit = tiny()
    assert not sit.pos_embed[0, 0].any() and not sit.pos_embed.requires_grad
    assert torch.equal(sit.pos_embed[0, 1:], sincos_pos_embed(32, 4))


def test_first_half_of_the_positions_codes_the_column():
    table = sincos_pos_embed(32, 5).view(5, 5, 32)  # row, column, channel
    assert torch.equal(table[0, :, :16], table[3, :, :16])  # same in every row
    assert torch.equal(table[:, 0, 16:], table[:, 4, 16:])


def test_unpatchify_undoes_patchify_and_channel_is_fastest():
    x = torch.randn(2, 3, 8, 8)
    tokens = patchify(x, 4)
    assert tokens.shape == (2, 4, 48)
    assert torch.equal(unpatchify(tokens, 4), x)
    assert torch.equal(tokens[:, 1, :3], x[:, :, 0, 4])  # token 1: first row, second column


def test_model_draws_no_random_number():
    sit, x = tiny().train(), torch.randn(3, 4, 8, 8)
    before = torch.get_rng_state()
    sit(x, torch.rand(3, generator=torch.Generator()), torch.tensor([0, 1, 10]), torch.ones(3, 16))
    assert torch.equal(before, torch.get_rng_state())


def test_alignment_depth_beyond_the_depth_is_refused():
    with pytest.raises(AssertionError, match="align_depth 5"):
        tiny(align_depth=5)


def test_time_embedding_is_exact_under_bfloat16_autocast():
    embedder, t = tiny().t_embedder, torch.tensor([0.500, 0.501])
    with torch.autocast("cpu", torch.bfloat16):
        inside = embedder(t)
    assert torch.equal(inside, embedder(t))
