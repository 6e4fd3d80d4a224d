"""Examples of what the functions of lessons/ give."""

import tempfile
from pathlib import Path

from paramend.lessons.catalogue import find
from paramend.lessons.grading import draw, summary
from paramend.lessons.observation import Observation, differences
from paramend.lessons.solutions import load


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
