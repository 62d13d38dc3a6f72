"""Reads tests/golden/*.json: weights and inputs rebuilt by name, outputs to compare with."""

import json
from pathlib import Path

import golden_formula as formula
import pytest
import torch

from maskalign import SiT, make_config, sincos_pos_embed
from sample import from_official

HERE = Path(__file__).parent
FILES = ("public.json", "more.json", "sprint.json")
GOLD = [json.loads((HERE / "golden" / name).read_text()) for name in FILES]
CASES = {case["id"]: case for gold in GOLD for case in gold["cases"]}


def ids(prefix, without=()):
    """Parametrises a test over the cases whose id starts with `prefix`, and marks it `golden`."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=name, marks=pytest.mark.golden)
            for name, case in CASES.items()
            if name.startswith(prefix) and not any(word in name for word in without)
        ],
    )


def weights(case, dtype=torch.float64, seed=None):
    """The official state dict of a case."""
    seed = case["seed"] if seed is None else seed
    state = {
        key: torch.from_numpy(formula.param(key, shape, seed)).to(dtype)
        for key, shape in case["state_dict"]
    }
    if "pos_embed" in case.get("keep_official_init", []):
        extra = state["pos_embed"].shape[1] - (case["config"]["input_size"] // 2) ** 2
        table = sincos_pos_embed(state["pos_embed"].shape[2], case["config"]["input_size"] // 2)
        state["pos_embed"] = torch.cat([torch.zeros(extra, table.shape[1]), table])[None].to(dtype)
    return state


def inputs(case, dtype=torch.float64):
    """The inputs of a case, by name."""
    tensors = {
        key: torch.from_numpy(formula.make(spec, case["seed"]))
        for key, spec in case["inputs"].items()
    }
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in tensors.items()}


def sizes(case):
    """The settings that say how large the network of a case is."""
    c, shapes = case["config"], dict(case["state_dict"])
    return dict(
        data="x",
        image_size=8 * c["input_size"],
        patch_size=c["patch_size"],
        hidden_size=c["hidden_size"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        num_classes=shapes["y_embedder.embedding_table.weight"][0] - 1,
    )


def model(case, dtype=torch.float64):
    """Our SiT with the official weights of a case, loaded strictly."""
    c, state = case["config"], from_official(weights(case, dtype))
    config = make_config(
        **sizes(case),
        method="reg" if "cls_norm.weight" in state else "repa",
        z_dim=c["z_dims"][0],
        projector_dim=c["projector_dim"],
        align_depth=c["encoder_depth"],
    )
    with torch.device("meta"):  # without values: those of the case take their places
        sit = SiT(config)
    sit.load_state_dict(state, assign=True)
    return sit  # in training mode, in which it also computes z_pred; there is no dropout


def assert_golden(value, case, name, rounding=0.0):
    """Every statistic and sampled value agrees, within the width that is stored with it.

    In float64 that is 2e-7 of the largest value where t is embedded: cos and sin in float32, as the
    official code takes them, differ in the last bit between processors. Else 1e-10 of it, or
    `rounding` of it where a test knows of another step in float32."""
    gold = case["outputs"][name]
    exact = value.dtype == torch.float64
    array = value.detach().double().numpy().reshape(gold["shape"])
    found = formula.summarize(array, f"{case['id']}/{name}", case["seed"])
    limit = gold["atol64"] if exact else gold["atol32"]
    limit = max(limit, rounding * gold["absmax"])
    pairs = list(zip(found["val"], gold["val"] if exact else gold["val32"], strict=True))
    pairs += [(found[key], gold[key]) for key in ("mean", "probe")]
    worst = max(abs(a - b) for a, b in pairs)
    assert worst <= limit, f"{case['id']} {name}: off by {worst:.2e}, allowed {limit:.2e}"


for gold in GOLD:
    assert gold["self_check"] == formula.self_check(), "the golden formula was changed"
