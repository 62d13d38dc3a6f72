"""The lesson in lesson.ipynb runs as it stands, without Jupyter, and is small."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from draws import Given, scores_of

LESSON = Path(__file__).parent / "lesson.ipynb"
CELLS = json.loads(LESSON.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
SOLUTION = "return tokens.gather(1, ids_keep[..., None].expand(-1, -1, tokens.shape[-1]))"


@pytest.fixture(scope="module")
def lesson():
    """The names that its code cells leave, run in order with small numbers."""
    names = {}
    start = os.getcwd()
    os.chdir(LESSON.parent)  # where Jupyter runs it
    for code in CODE:
        code = code.replace("STEPS = 300", "STEPS = 3").replace("STEPS = 500", "STEPS = 2")
        code = code.replace("% 50 == 0", "% 3 == 0").replace("num_steps=25", "num_steps=2")
        exec(compile(code, str(LESSON), "exec"), names)
    yield names
    os.chdir(start)


def test_all_cells_run_in_order(lesson, capsys):
    assert (lesson["STEPS"], lesson["TEACHER_STEPS"]) == (3, 2)
    assert lesson["generated"].shape == (64, 3, 24, 24) and lesson["generated"].isfinite().all()


def test_the_step_taken_apart_is_that_of_the_program(lesson):
    """Given the lesson's own random numbers, training_losses gives the lesson's losses."""
    ma = lesson["ma"]
    torch.manual_seed(lesson["config"].seed)
    model = ma.SiT(lesson["config"])  # as it was before it was trained
    uniform = [lesson["t"], torch.ones(32), scores_of(lesson["ids_keep"], 36)]
    rng = Given(uniform, [lesson["noise"], lesson["cls_noise"]])
    x, y, z, config = (lesson[name] for name in ("x", "y", "z", "config"))
    terms = ma.training_losses(model, x, y, z, config, rng)
    mine = dict(loss="loss", denoise="denoise", cls="cls_loss", align="align")
    for name, in_lesson in mine.items():
        torch.testing.assert_close(terms[name], lesson[in_lesson], rtol=1e-5, atol=1e-6)


def test_its_exercise_is_open_and_can_be_solved(lesson, capsys):
    exec(CODE[-1], lesson)
    assert capsys.readouterr().out.startswith("not yet")
    exec(CODE[-1].replace("return tokens  # replace this line", SOLUTION), lesson)
    assert capsys.readouterr().out == "solved\n"


def test_it_is_short_its_outputs_are_small_and_it_copies_no_function():
    assert len(CELLS) <= 25 and LESSON.stat().st_size < 300_000
    shown = [cell for cell in CELLS if cell.get("outputs")]
    assert len(shown) >= 8  # what a reader on the web sees without running it
    defined = re.findall(r"^(?:def|class) (\w+)", "\n".join(CODE), re.M)
    assert set(defined) == {"show", "my_gather_tokens"}
