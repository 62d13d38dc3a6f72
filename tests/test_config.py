"""Settings: one truth for each default, tables that override it, one sentence for bad ones."""

import dataclasses

import pytest

import maskalign
from maskalign import (
    DEMO,
    METHODS,
    SIZES,
    BadInput,
    Config,
    make_config,
    parse_config,
    setting,
)


def test_defaults_are_the_papers_main_run():
    c = parse_config(["--data", "imagenet"])
    table_7 = dict(
        lr=1e-4,
        batch_size=256,
        ema_decay=0.9999,
        label_dropout=0.1,
        mask_ratio=0.25,
        mixer_depth=2,
        align_coeff=0.5,
        cls_coeff=0.03,
        align_depth=8,
        grad_clip=1.0,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        patch_size=2,
        image_size=256,
        teacher="vit_base_patch14_dinov2.lvd142m",
        class_token=True,
        method="maskalign",
    )
    assert {name: getattr(c, name) for name in table_7} == table_7
    assert c == dataclasses.replace(Config(), data="imagenet", out=c.out, cache=c.cache)
    assert c.latent_shape == (4, 32, 32)


def test_without_data_the_demo_row_applies():
    c = parse_config([])
    assert all(getattr(c, name) == value for name, value in DEMO.items())
    assert all(getattr(c, name) == value for name, value in SIZES["demo"].items())
    assert c.latent_shape == (3, 24, 24)


def test_precedence_is_defaults_demo_tables_typed():
    assert parse_config(["--method", "reg"]).mixer_depth == 0
    assert parse_config(["--method", "reg", "--mixer_depth", "1"]).mixer_depth == 1
    assert parse_config(["--size", "SiT-B/2", "--image_size", "32"]).hidden_size == 768
    assert parse_config(["--data", "x", "--size", "SiT-B/2"]).batch_size == 256
    assert parse_config(["--batch_size", "8"]).batch_size == 8


@pytest.mark.parametrize(
    "size, depth", [("SiT-S/2", 4), ("SiT-B/2", 4), ("SiT-L/2", 8), ("SiT-XL/2", 8)]
)
def test_alignment_depth_follows_the_size_unless_typed(size, depth):
    assert make_config(data="x", size=size).align_depth == depth
    assert make_config(data="x", size=size, align_depth=5).align_depth == 5


ROWS = {  # class_token, mixer_depth, mask_ratio, align_coeff: as the papers have them
    "sit": (False, 0, 0.0, 0.0),
    "repa": (False, 0, 0.0, 0.5),
    "reg": (True, 0, 0.0, 0.5),
    "maskalign": (True, 2, 0.25, 0.5),
    "repa+maskalign": (False, 2, 0.25, 0.5),
    "maskalign-no-mixing": (True, 0, 0.25, 0.5),
    "maskalign-no-masking": (True, 2, 0.0, 0.5),
}


@pytest.mark.parametrize("method", ROWS)
def test_the_papers_methods_differ_as_the_papers_say(method):
    c = make_config(method=method)
    assert (c.class_token, c.mixer_depth, c.mask_ratio, c.align_coeff) == ROWS[method]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_row_of_settings_and_nothing_else(method):
    ours, theirs = (dataclasses.asdict(make_config(method=name)) for name in ("maskalign", method))
    named = dict(method=method, out=theirs["out"])
    assert theirs == ours | METHODS["maskalign"] | METHODS[method] | named


def help_of(capsys, **options):
    with pytest.raises(SystemExit):
        parse_config(["--help"], **options)
    return " ".join(capsys.readouterr().out.split())


def test_every_field_with_a_note_has_a_flag_whose_help_it_is(capsys):
    shown = help_of(capsys)
    for field in dataclasses.fields(Config):
        derived = field.name in ("num_classes", "z_dim", "class_names")
        assert (f"--{field.name} " in shown.replace(",", " ")) != derived, field.name
    assert "Tab. 7: lambda, alignment; 0: none [0.5]" in shown
    assert "pulled towards the teacher's" in shown  # the docstring of the file


def test_bool_flags_work_both_ways():
    assert parse_config(["--no-compile"]).compile is False and parse_config(["--compile"]).compile


def test_config_survives_the_checkpoint():
    c = make_config(method="repa")
    assert Config(**dataclasses.asdict(c)) == c


@pytest.mark.parametrize(
    "typed, message",
    [
        (dict(method="mae"), r"unknown method 'mae': choose from sit, repa, reg, maskalign"),
        (dict(size="XXL"), r"unknown size 'XXL': choose from SiT-S/2"),
        (dict(mask_ratio=1.0), r"mask_ratio is 1.0: it must be in \[0, 1\)"),
        (dict(mask_ratio=-0.1), r"mask_ratio is -0.1"),
        (dict(mask_ratio=float("nan")), r"mask_ratio is nan"),
        (dict(align_depth=7), r"align_depth is 7: it must be at most the depth, 6"),
        (dict(align_depth=0), r"align_depth is 0"),
        (dict(data="x", image_size=250), r"image_size is 250: it must be a multiple of 16 for vae"),
        (dict(image_size=22), r"image_size is 22: it must be a multiple of 4 for vae none"),
        (dict(hidden_size=98), r"hidden_size is 98"),
        (dict(num_heads=5), r"num_heads is 5"),
        (dict(lr=0.0), r"lr is 0.0: it must be above 0"),
        (dict(lr=float("inf")), r"lr is inf"),
        (dict(batch_size=-1), r"batch_size is -1"),
        (dict(steps=-5), r"steps is -5: it must be 0 or above"),
        (dict(milestone_every=0), r"milestone_every is 0: it must be above 0"),
    ],
)
def test_a_value_that_cannot_work_is_one_sentence(typed, message):
    with pytest.raises(BadInput, match=message) as caught:
        make_config(**typed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argv", [["--lr", "fast"], ["--learning_rate", "1"], ["--mask", "0.5"]])
def test_unknown_or_abbreviated_flags_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(argv)
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err


def test_importing_has_no_side_effect():
    assert "torch.distributed" in repr(maskalign.dist) and not maskalign.dist.is_initialized()


# ---- what a fork brings


@dataclasses.dataclass(frozen=True)
class ForkConfig(Config):
    """As a fork writes it: its name, two defaults of its own, two settings, a row of sizes."""

    method: str = setting("fork", "this fork, or a row of METHODS")
    class_token: bool = setting(False, "as the fork's paper")
    align_coeff: float = setting(0.25, "as the fork's paper", rule="0 or above")
    warmth: float = setting(0.5, "ours: share of warmth", rule="in [0, 1)")
    chatty: bool = setting(False, "ours: tell more", free=True)
    plain: int = 3  # a field like any other: no flag, no rule, not free

    sizes = SIZES | {"demo-tall": SIZES["demo"] | dict(depth=9)}


def test_a_forks_own_settings_are_flags_with_rules_and_its_doc_is_the_help(capsys):
    c = parse_config(["--warmth", "0.25", "--chatty"], ForkConfig)
    assert type(c) is ForkConfig and (c.warmth, c.chatty) == (0.25, True)
    shown = help_of(capsys, kind=ForkConfig, doc="What this fork does.")
    assert "What this fork does." in shown and "ours: share of warmth [0.5]" in shown
    assert "pulled towards" not in shown and "--plain" not in shown
    assert make_config(ForkConfig, plain=-1).plain == -1
    with pytest.raises(BadInput, match=r"warmth is 1.0: it must be in \[0, 1\)"):
        make_config(ForkConfig, warmth=1.0)


def test_a_forks_own_method_is_its_defaults():
    c = make_config(ForkConfig)
    assert (c.method, c.class_token, c.align_coeff) == ("fork", False, 0.25)
    assert c.batch_size == DEMO["batch_size"] and c.out == "runs/fork-demo"
    reg = make_config(ForkConfig, method="reg", class_token=True)
    assert reg.mixer_depth == 0 and reg.class_token
    with pytest.raises(BadInput, match="unknown method 'mae': choose from sit, .*, fork"):
        make_config(ForkConfig, method="mae")
    with pytest.raises(BadInput, match="unknown method 'fork'"):
        make_config(method="fork")


def test_a_fork_may_bring_sizes_of_its_own():
    assert make_config(ForkConfig, size="demo-tall").depth == 9
    assert make_config(ForkConfig, size="demo-tall", depth=10).depth == 10
    with pytest.raises(BadInput, match="unknown size 'demo-tall'"):
        make_config(size="demo-tall")


def test_what_a_resume_may_change_is_told_by_the_field_itself():
    free = {field.name for field in dataclasses.fields(ForkConfig) if field.metadata.get("free")}
    assert {"lr", "steps", "workers", "accum", "log_every", "save_every", "chatty"} <= free
    assert (
        not {"warmth", "method", "seed", "batch_size", "mask_ratio", "num_classes", "plain"} & free
    )
