"""Settings: one truth for each default, tables that override it, one sentence for bad ones."""

import dataclasses
import os

import pytest

import maskalign
from maskalign import DEMO, METHODS, SIZES, Config, make_config, parse_config, setting


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


def test_the_command_line_beats_the_tables_and_these_the_demo_and_the_defaults():
    assert parse_config(["--method", "reg"]).mixer_depth == 0
    assert parse_config(["--method", "reg", "--mixer_depth", "1"]).mixer_depth == 1
    assert parse_config(["--size", "SiT-B/2", "--image_size", "32"]).hidden_size == 768
    assert parse_config(["--data", "x", "--size", "SiT-B/2"]).batch_size == 256
    assert parse_config(["--batch_size", "8"]).batch_size == 8


@pytest.mark.parametrize(
    "size, depth", [("SiT-S/2", 4), ("SiT-B/2", 4), ("SiT-L/2", 8), ("SiT-XL/2", 8)]
)
def test_alignment_depth_follows_the_size_unless_it_is_given(size, depth):
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


def test_every_field_with_a_help_text_is_a_flag(capsys):
    shown = help_of(capsys)
    for field in dataclasses.fields(Config):
        derived = field.name in ("num_classes", "z_dim", "class_names", "sample_with")
        assert (f"--{field.name} " in shown.replace(",", " ")) != derived, field.name
    assert "weight of the alignment loss, lambda (Tab. 7) [0.5]" in shown
    assert "pulled towards the teacher's" in shown  # the docstring of the file


def test_help_lists_the_choices_the_groups_and_the_values_of_the_demo(capsys):
    shown = help_of(capsys)
    assert "{" + ",".join(METHODS) + "}" in shown and "{" + ",".join(SIZES) + "}" in shown
    for group in ("run:", "method:", "network:", "data:", "optimizer:", "log:"):
        assert group in shown
    assert f"batch_size {DEMO['batch_size']}, steps {DEMO['steps']}" in shown


def test_a_wrong_flag_shows_a_line_of_usage_and_not_a_page(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--nonsense"])
    assert len(capsys.readouterr().err.splitlines()) <= 3


def test_bool_flags_work_both_ways():
    assert parse_config(["--no-compile"]).compile is False and parse_config(["--compile"]).compile


def test_config_survives_the_checkpoint():
    c = make_config(method="repa")
    assert Config(**dataclasses.asdict(c)) == c


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(mask_ratio=1.0), "mask_ratio 1.0"),
        (dict(mask_ratio=-0.1), "mask_ratio -0.1"),
        (dict(mask_ratio=float("nan")), "mask_ratio nan"),
        (dict(align_depth=7), "align_depth 7 .*6"),
        (dict(align_depth=0), "align_depth 0"),
        (dict(data="x", image_size=250), "image_size 250 .*16"),
        (dict(image_size=22), "image_size 22 .*4"),
        (dict(hidden_size=98), "hidden_size 98"),
        (dict(num_heads=5), "hidden_size 96 .*20"),
    ],
)
def test_a_value_that_cannot_work_is_one_sentence(given, message):
    with pytest.raises(AssertionError, match=message) as caught:
        make_config(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "argv",
    [["--lr", "fast"], ["--learning_rate", "1"], ["--mask", "0.5"], ["--method", "mae"]],
    ids=str,
)
def test_unknown_or_abbreviated_flags_and_rows_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(argv)
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder_in_every_path():
    paths = dict(data="~/a", out="~/b", cache="~/c", vae="~/d", teacher_weights="~/e")
    config = make_config(**paths)
    for name, path in paths.items():
        assert getattr(config, name) == path.replace("~", os.path.expanduser("~")), name
    assert make_config(data="~/a").cache == os.path.expanduser("~/a-latents")


def test_importing_has_no_side_effect():
    assert "torch.distributed" in repr(maskalign.dist) and not maskalign.dist.is_initialized()


# ---- what a fork brings


@dataclasses.dataclass(frozen=True)
class ForkConfig(Config):
    """As a fork writes it: its name, two defaults of its own, two settings, a row of sizes."""

    method: str = setting("fork")
    class_token: bool = setting(False, "as the fork's paper")
    align_coeff: float = setting(0.25, "as the fork's paper")
    warmth: float = setting(0.5, "share of warmth (ours)", "X", group="this fork")
    chatty: bool = setting(False, "tell more (ours)")
    plain: int = 3  # a field like any other has no flag

    sizes = SIZES | {"demo-tall": SIZES["demo"] | dict(depth=9)}


def test_a_fork_has_flags_a_docstring_and_a_command_line_of_its_own(capsys):
    c = parse_config(["--warmth", "0.7", "--chatty", "--lr", "1"], ForkConfig)
    assert type(c) is ForkConfig and (c.warmth, c.chatty, c.lr, c.plain) == (0.7, True, 1.0, 3)
    shown = help_of(capsys, kind=ForkConfig, doc="What this fork does.")
    assert "What this fork does." in shown and "share of warmth (ours) [0.5]" in shown
    assert "this fork:" in shown and "--method" not in shown and "--plain" not in shown
    assert "pulled towards" not in shown
    assert make_config(ForkConfig, plain=-1).plain == -1


def test_a_forks_own_method_is_its_defaults():
    c = make_config(ForkConfig)
    assert (c.method, c.class_token, c.align_coeff) == ("fork", False, 0.25)
    assert c.batch_size == DEMO["batch_size"] and c.out == "runs/fork-demo"
    reg = make_config(ForkConfig, method="reg", class_token=True)
    assert reg.mixer_depth == 0 and reg.class_token
    with pytest.raises(KeyError, match="mae"):
        make_config(ForkConfig, method="mae")
    with pytest.raises(KeyError, match="fork"):
        make_config(method="fork")


def test_a_fork_may_bring_sizes_of_its_own():
    assert make_config(ForkConfig, size="demo-tall").depth == 9
    assert make_config(ForkConfig, size="demo-tall", depth=10).depth == 10
    with pytest.raises(KeyError, match="demo-tall"):
        make_config(size="demo-tall")
