"""The form of the three programs: what a reader meets on every page, in round numbers."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIMITS = {  # lines, KB
    "maskalign.py": (940, 45),
    "sample.py": (470, 22),
    "fid.py": (430, 19),
}
every_program = pytest.mark.parametrize("name", LIMITS)


def parsed(name):
    text = (ROOT / name).read_text()
    return text, ast.parse(text)


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def length(node):
    return node.end_lineno - node.lineno + 1


@every_program
def test_a_program_is_read_in_one_evening(name):
    text, _ = parsed(name)
    lines, kilobytes = LIMITS[name]
    assert len(text.splitlines()) <= lines
    assert len(text.encode()) <= kilobytes * 1024


@every_program
def test_lines_are_short_and_none_is_hidden_from_the_formatter(name):
    lines = parsed(name)[0].splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(len(line) > 90 for line in lines) <= 0.03 * len(lines)
    assert not [line for line in lines if "fmt:" in line]


@every_program
def test_one_statement_does_one_thing(name):
    """No `a, b = c, d`, no `a = 1; b = 2`."""
    text, tree = parsed(name)
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    packed = [
        node.lineno
        for node in assigned
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
    ]
    starts = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    assert not packed and len(starts) == len(set(starts))


@every_program
def test_comments_and_docstrings_are_a_fifth_of_the_lines(name):
    """More than in most code of the field (5 to 19%), less than in a text book."""
    text, tree = parsed(name)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    documented = [node.body[0] for node in nodes if ast.get_docstring(node)]
    comments = sum(line.strip().startswith("#") for line in text.splitlines())
    share = (comments + sum(map(length, documented))) / len(text.splitlines())
    assert 0.10 <= share <= 0.30


@every_program
def test_errors_are_asserts_of_one_sentence_and_few(name):
    tree = parsed(name)[1]
    asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert len(asserts) <= 12 and all(node.msg for node in asserts)
    assert not [node for node in tree.body if isinstance(node, ast.ClassDef) and is_error(node)]


def is_error(node):
    return any(
        "Error" in ast.unparse(base) or "Exception" in ast.unparse(base) for base in node.bases
    )


@every_program
def test_no_function_is_longer_than_a_page_but_the_training_script(name):
    found = {node.name: length(node) for node in functions(parsed(name)[1])}
    assert max(lines for name, lines in found.items() if name != "train") <= 60
    assert found.get("train", 0) <= 80


def test_the_screens_of_a_lecture_have_at_most_45_lines():
    tree = parsed("maskalign.py")[1]
    named = {node.name: node for node in functions(tree)}
    (loop,) = [node for node in named["train"].body if isinstance(node, ast.For)]
    screens = [node for node in functions(tree) if node.name == "forward"]
    assert max(map(length, [*screens, named["training_losses"], loop])) <= 45


def test_the_method_comes_first_and_the_loop_right_after_the_sampler():
    tree = parsed("maskalign.py")[1]
    order = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    method = ["SiT", "training_losses", "guided_velocity", "euler_ode", "train"]
    assert [name for name in order if name in method] == method
    assert order.index("train") == order.index("euler_ode") + 1
    assert order.index("train") < order.index("Config") < order.index("ViTTeacher")
