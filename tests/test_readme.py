"""README stays true: its commands parse, what it names exists, its numbers are the program's."""

import importlib
import os
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_forks import NAMES, Fork
from torch.distributed.run import get_args_parser

import fid
import maskalign
import sample
from maskalign import METHODS, BadInput, Config, SiT, build_model, make_config, parse_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OTHERS = "".join((ROOT / "tests" / name).read_text() for name in ("README.md", "forks/README.md"))
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README + OTHERS, re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
TEXT = re.sub(r"```.*?```", "", README + OTHERS, flags=re.S)
MARKED = re.findall(r"`([^`\n]+)`", TEXT)
PARSERS = {"maskalign.py": parse_config, "sample.py": sample.parse_args, "fid.py": fid.parse_args}


def flags_of(script):
    """The flags in the help of a script."""
    module = importlib.import_module(Path(script).stem)
    parse = PARSERS.get(script) or getattr(module, "parse_args", None) or module.main
    shown = []
    keep = mock.patch("argparse.ArgumentParser.print_help", lambda parser: shown.append(parser))
    argv = mock.patch.object(sys, "argv", [script, "--help"])
    with argv, keep, pytest.raises(SystemExit):
        parse() if parse == getattr(module, "main", None) else parse(["--help"])
    return {flag for action in shown[0]._actions for flag in action.option_strings}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, tmp_path, monkeypatch):
    words = shlex.split(command)
    if words[0] not in ("python", "torchrun"):
        assert words[0] in ("pip", "pytest")
        assert all((ROOT / word).exists() for word in words if word.endswith(".txt"))
        return
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, rest = words[at], words[at + 1 :]
    assert (ROOT / script).exists()
    if words[0] == "torchrun":  # it must not take a flag of ours for its own
        given = get_args_parser().parse_args(words[1:])
        assert (given.training_script, given.training_script_args) == (script, rest)
    if script in PARSERS:
        monkeypatch.chdir(tmp_path)
        PARSERS[script](rest)
    typed = {word.split("=")[0] for word in rest if word.startswith("--")}
    assert typed <= flags_of(script), typed - flags_of(script)


def test_every_flag_that_is_named_exists():
    known = set().union(*map(flags_of, PARSERS), flags_of("tests/figure2.py"))
    known |= flags_of("tests/curves.py") | flags_of("tests/table4.py") | flags_of("tests/effect.py")
    texts = MARKED + [command.partition(".py ")[2] for command in COMMANDS]
    named = {word for text in texts for word in re.findall(r"(?<!\S)--[a-z]\w*(?:-\w+)?", text)}
    assert len(named) > 15 and named <= known, named - known


def test_every_file_that_is_named_exists_or_is_made_by_a_run():
    made = {
        "latest.pt",
        "log.jsonl",
        "samples.json",
        "samples.npz",
        "grid.png",
        "yours.py",
        "step-N.pt",
        "model.safetensors",
    }
    made |= {"trajectory.png", "curves.png", "heatmap.png", "figure2.json", "scores.json"}
    made |= {"dinov2_vitb14_pretrain.pth", "diffusion_pytorch_model.safetensors"}
    made |= {"pt_inception-2015-12-05-6726825d.pth", "ref.npz", "vae.pth"}
    for name in re.findall(r"[\w./-]+\.(?:py|png|txt|json|jsonl|pt|pth|npz|safetensors)\b", TEXT):
        short = name.rsplit("/")[-1]
        exists = any((ROOT / folder / name).exists() for folder in ("", "tests", "tests/forks"))
        assert exists or short in made or short.startswith("samples-"), name


def test_every_test_and_function_that_is_named_exists():
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    tests = set(re.findall(r"def (test_\w+)", sources))
    named = {name for name in MARKED if re.fullmatch(r"test_\w+", name)}
    assert len(named) >= 10 and named <= tests, named - tests
    names = {
        *METHODS,
        *maskalign.SIZES,
        *vars(Config()),
        *vars(maskalign),
        *vars(sample),
        *vars(fid),
        *vars(SiT),
    }
    names |= {"loss", "denoise", "cls", "align", "python", "torchrun", "pytest", "ours", "v"}
    names |= {f.removesuffix(".py") for f in os.listdir(ROOT / "tests" / "forks")}
    symbols = {
        "w_t",
        "x",
        "S",
        "r",
        "h",
        "h_phi",
        "K",
        "N",
        "i",
        "CKPT",
        "IMAGENET",
        "G_r",
        "sde",
        "golden",
    }
    symbols |= {
        "AVX2",
        "COMPATIBLE",
        "z",
        "z_pred",
        "ids_keep",
        "noise",
        "vae_noise",
        "sampler",
        "sizes",
    }
    symbols |= {"generator", "model", "method", "keep_output", "__post_init__"}
    for name in MARKED:
        is_file = re.search(r"\.(py|npz|pt|pth|png|jsonl?|safetensors)$|^[0-9a-f]{7}$", name)
        if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)?", name) and not (is_file or name[:5] == "test_"):
            assert name.split(".")[0] in names | symbols, name


def test_the_losss_weights_and_the_mask_are_the_defaults():
    assert f"denoise + {Config.cls_coeff} cls + {Config.align_coeff} align" in README
    assert f"random {100 * (1 - Config.mask_ratio):.0f}% of the tokens" in README
    preset = sample.PRESETS["fid"]
    assert (preset["sampler"], preset["steps"], preset["cfg_scale"]) == ("sde", 250, 1.0)
    assert "SDE, 250 steps, no guidance" in README
    for steps in re.findall(r"samples-0*(\d+)\.png", README):
        assert int(steps) == maskalign.DEMO["steps"]


def weights_added(model, plain):
    """README's cell: weights beside those of SiT, in training and in sampling."""
    counts = []
    for sit in (model, plain):
        counts.append(sum(p.numel() for p in sit.parameters()))
        counts.append(sum(p.numel() for p in sit.projectors.parameters()))
    added = (counts[0] - counts[2], counts[0] - counts[1] - counts[2])
    return " / ".join(f"{n / 1e6:.1f}M" if n else "0" for n in added)


def family_row(command):
    """The cells of a row: alignment, weights added, FID."""
    rows = re.findall(rf"^\| `{re.escape(command)}` \|(.*)\|$", README, re.M)
    assert len(rows) == 1, f"README has no row for {command}"
    return [cell.strip() for cell in rows[0].split("|")]


def assert_cost_is_told(name):
    """tests/README.md has the CPU ms of its step of the demo."""
    (costs,) = (
        line for line in OTHERS.splitlines() if line.startswith("The demo's step in CPU ms")
    )
    assert re.search(rf"`{name}` [1-9]\d+\b", costs), name


def added_at_b(build_model, config):
    with torch.device("meta"):
        plain = maskalign.build_model(make_config(data="x", size="SiT-B/2", method="sit"))
        return weights_added(build_model(config), plain)


@pytest.mark.parametrize("method", ["sit", "repa", "reg", "maskalign"])  # the others: ablations
def test_the_family_table_is_that_of_the_program(method):
    config = make_config(data="x", size="SiT-B/2", method=method)
    aligned, added, _ = family_row(f"--method {method}")
    assert added == added_at_b(build_model, config)
    assert_cost_is_told(method)
    assert aligned.startswith("cls") == config.class_token
    kept = f"{100 - 100 * config.mask_ratio:.0f}% of the patches"
    assert (kept in aligned) == (config.mask_ratio > 0 and config.align_coeff > 0)
    assert (f"block {config.align_depth}" in aligned) == (config.align_coeff > 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_family_table_has_every_fork_with_the_weights_that_it_adds(name):
    fork = Fork(name)
    config = make_config(fork.kind, data="x", size="SiT-B/2")
    aligned, added, _ = family_row(f"tests/forks/{name}.py")
    assert added == added_at_b(getattr(fork.module, "build_model", build_model), config)
    assert_cost_is_told(name)
    assert aligned.startswith("cls") == config.class_token


def test_no_placeholder_is_left_and_it_can_be_read_in_one_go():
    assert "@@" not in README and "TODO" not in README
    assert len(README.splitlines()) <= 200 and len(README.encode()) <= 11 * 1024


def test_bad_flags_in_readme_would_be_noticed(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--no_such_flag"])
    with pytest.raises(BadInput):
        parse_config(["--method", "nothing"])
    capsys.readouterr()
