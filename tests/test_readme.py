"""What README and the two pages beside it tell stays true: commands, names, files, numbers."""

import functools
import importlib
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.run import get_args_parser

import fid
import sample
from maskalign import Config, SiT, make_config, parse_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / "tests" / name).read_text() for name in ("README.md", "forks/README.md")}
ALL = README + "".join(PAGES.values())
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", ALL, re.S)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
TEXT = re.sub(r"```.*?```", "", ALL, flags=re.S)
MARKED = re.findall(r"`([^`\n]+)`", TEXT)  # what is set as code
PARSERS = {
    "maskalign.py": parse_config,
    "sample.py": functools.partial(sample.parse_args, samplers=sample.SAMPLERS),
    "fid.py": fid.parse_args,
}
SCRIPTS = ["curves", "effect", "figure2", "pictures", "robust", "table4"]  # in tests/


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
    script = words[at]
    rest = words[at + 1 :]
    if script == "tests/forks/yours.py":  # what a reader is going to write
        return
    assert (ROOT / script).exists()
    if words[0] == "torchrun":  # it must not take a flag of ours for its own
        given = get_args_parser().parse_args(words[1:])
        assert (given.training_script, given.training_script_args) == (script, rest)
    if script in PARSERS:
        monkeypatch.chdir(tmp_path)
        PARSERS[script](rest)
    elif not script.startswith("tests/forks/"):
        typed = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert typed <= flags_of(script), typed - flags_of(script)


def test_a_wrong_command_would_be_noticed(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--no_such_flag"])
    with pytest.raises(SystemExit):
        parse_config(["--method", "nothing"])
    capsys.readouterr()


def test_every_flag_that_is_named_exists():
    known = set().union(*map(flags_of, [*PARSERS, *(f"tests/{name}.py" for name in SCRIPTS)]))
    for path in ROOT.glob("tests/forks/*.py"):
        known |= {
            f"--{name}" for name in re.findall(r"^    (\w+): .*setting", path.read_text(), re.M)
        }
    named = {flag for text in MARKED for flag in re.findall(r"(?<!\S)--[a-z]\w*(?:-\w+)?", text)}
    named -= {"--index-url"}  # of pip
    assert len(named) > 15 and named <= known, named - known


def test_every_link_leads_somewhere_and_every_picture_exists():
    pages = {ROOT: README, ROOT / "tests": PAGES["README.md"]}
    pages[ROOT / "tests" / "forks"] = PAGES["forks/README.md"]
    count = 0
    for folder, text in pages.items():
        headings = re.findall(r"^#+ (.*)$", text, re.M)
        anchors = {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}
        for target in re.findall(r"\]\(([^)]+)\)", text):
            count += 1
            path, _, anchor = target.partition("#")
            if target.startswith("https://"):
                continue
            assert not path or (folder / path).exists(), target
            assert path or anchor in anchors, target
    assert count > 20


def test_every_file_that_is_named_exists_or_is_made_by_a_run():
    made = {"latest.pt", "log.jsonl", "samples.npz", "curves.png", "yours.py", "robust.json"}
    made |= {
        "samples-0000500.png",
        "effect.json",
        "figure2.json",
        "step-N.pt",
        "vae.pth",
        "dinov2.safetensors",
    }
    made |= {"dinov2_vitb14_pretrain.pth", "diffusion_pytorch_model.safetensors"}
    made |= {"VIRTUAL_imagenet256_labeled.npz"}
    for name in re.findall(
        r"[\w./-]+\.(?:py|png|gif|txt|jsonl?|pth?|npz|safetensors|ipynb)\b", TEXT
    ):
        folders = ("", "tests", "tests/forks", ".github/assets")
        exists = any((ROOT / folder / name).exists() for folder in folders)
        assert exists or name.rsplit("/")[-1] in made or "://" in name or "//" in name, name


def test_every_test_and_function_that_is_named_exists():
    """A name that is set as code stands in the code, as a whole word."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("tests/**/*.py")]
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in sources)))
    words |= {"G_r", "purge_step", "log"}  # of the paper, of TensorBoard
    names = {name for name in MARKED if re.fullmatch(r"\w*_\w+|[A-Z]\w+|\w+\.[a-z]\w+", name)}
    files = re.compile(r".*\.(py|npz|pth?|png|gif|jsonl?|safetensors|ipynb)")
    names = {name for name in names if not files.fullmatch(name)} - {"CKPT", "DIR", "IMAGENET"}
    tests = {name for name in names if name.startswith("test_")}
    assert len(names) > 40 and len(tests) >= 8
    for name in names:
        assert set(name.split(".")) <= words, name


def test_the_weights_of_the_losses_and_the_share_of_tokens_are_the_defaults():
    assert f"`denoise + {Config.cls_coeff} cls + {Config.align_coeff} align`" in README
    assert f"a random {100 * (1 - Config.mask_ratio):.0f}% of the tokens" in README
    assert f"| {Config.cls_coeff} and {Config.align_coeff} |" in README
    args = PARSERS["sample.py"](["x.pt", "--num_images", "50000"])
    assert (args.sampler, args.steps) == ("sde", 250) and "250 steps of a stochastic" in README
    lines = len((ROOT / "maskalign.py").read_text().splitlines())
    assert f"which is {lines} lines long" in README


@pytest.mark.parametrize("method", ["sit", "repa", "reg", "maskalign"])
def test_the_table_of_methods_is_that_of_the_program(method):
    with torch.device("meta"):
        config = make_config(data="x", size="SiT-B/2", method=method)
        model = SiT(config)
        plain = SiT(make_config(data="x", size="SiT-B/2", method="sit"))
    total, projector, sit = map(count, (model, model.projector, plain))
    added = " / ".join(
        f"{n / 1e6:.1f}M" if n else "0" for n in (total - sit, total - projector - sit)
    )
    (row,) = re.findall(rf"^\| `--method {method}` \| (.*) \| (.*) \|$", README, re.M)
    assert row[1] == added
    assert ("class token" in row[0]) == config.class_token
    assert ("75% of the patches" in row[0]) == (config.mask_ratio == 0.25)
    assert (f"block {config.align_depth}" in row[0]) == (config.align_coeff > 0)


def count(module):
    return 0 if module is None else sum(weight.numel() for weight in module.parameters())


def test_no_placeholder_is_left():
    assert "@@" not in ALL and "TODO" not in ALL
