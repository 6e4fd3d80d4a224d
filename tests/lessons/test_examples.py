"""Examples of what the functions of lessons/ give, which import jax."""

import tempfile
from pathlib import Path

import numpy as np

from paramend.lessons.grading import draw, summary
from paramend.lessons.lesson import find, row_of
from paramend.lessons.observation import Observation, differences, file_of, observed, outcome, place_in
from paramend.lessons.solutions import load
from paramend.lessons.witness import same


def test_summary():
    lesson = find("partial_init")
    assert list(summary(lesson, draw(lesson, trials=1, seed=0)[0])) == [
        "seed",
        "x",
        "num_full_layers",
        "num_extra_layers",
        "features",
    ]


def test_differences():
    assert differences(Observation(result=[1, 2]), Observation(result=[1.0, 3.0])) == [
        ("integers (2,): [1 2]", "floats (2,): [1. 3.]")
    ]
    assert differences(Observation(facts={"bias": "all 0"}), Observation(facts={"bias": "kept"})) == [
        ("bias: all 0", "bias: kept")
    ]


def test_load():
    file = Path(tempfile.mkdtemp()) / "answer.py"
    file.write_text("def solve(x): return 2 * x")
    assert load(file, ["x"])(21) == 42


def test_row_of():
    assert row_of("3").title == "Freeze the first layer for one step"


def test_find():
    assert find("kernel_replace").title == "Replace one kernel, keep its bias"


def test_draw():
    assert len(draw(find("partial_init"), trials=2, seed=0)) == 2


def test_observed():
    assert str(observed(lambda: {}["kernel"], len).raised) == "KeyError: 'kernel'"


def test_file_of():
    assert (file_of(file_of).endswith("observation.py"), file_of(len)) == (True, "")


def test_place_in():
    assert place_in(ValueError("not raised"), "answer.py") == ""


def test_outcome():
    assert outcome(Observation(result=np.zeros((2, 2)))) == "floats (2, 2): [[0. 0.] [0. 0.]]"


def test_same():
    assert (same(np.zeros(2), np.zeros(2)), same(np.zeros(2), np.zeros(2, "float32"))) == (True, False)
