"""The page of benchmarks is what one saved run gives, and the checker that judged it finds what is wrong."""

import importlib
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

TOP = Path(__file__).parents[2]


@pytest.fixture
def comparison(monkeypatch):
    monkeypatch.syspath_prepend(TOP / "bench")
    return importlib.import_module("comparison")


@pytest.fixture
def outcomes(monkeypatch):
    monkeypatch.syspath_prepend(TOP / "bench")
    return importlib.import_module("outcomes")


@pytest.fixture
def saved():
    return json.loads((TOP / "bench" / "comparison.json").read_text())


def test_the_page_is_what_was_measured(comparison, saved):
    page = (TOP / "docs" / "benchmarks.md").read_text()
    block = f"<!-- benchmarks -->\n{comparison.table(saved)}\n<!-- /benchmarks -->"
    assert block in page, "python bench/comparison.py table --write"
    assert not re.search(r"\d", page.replace(block, "")), "figures that are not of the run"


def test_the_run_is_whole_and_of_the_scripts_that_are_here(comparison, saved):
    assert list(saved["tasks"]) == list(comparison.TASKS)
    for task, rows in saved["tasks"].items():
        assert {tool: row["lines"] for tool, row in rows.items()} == {
            file.stem: comparison.lines_of(file) for file in comparison.scripts(task)
        }


def test_every_tool_is_named_and_every_task_has_one_of_ours(comparison):
    for task in comparison.TASKS:
        stems = {file.stem for file in (TOP / "bench" / "tasks" / task).iterdir()}
        assert "paramend" in stems and stems <= comparison.TOOLS.keys()


def test_no_name_of_a_machine_or_a_user_is_saved(saved):
    assert not re.search(r"/(tmp|home|root|work)\b|@", json.dumps(saved))


def test_the_tasks_of_the_usability_study_take_a_third_of_the_lines_or_fewer(comparison):
    for task, (_, theirs) in comparison.USABILITY.items():
        files = list((TOP / "bench" / "brainsurgery").glob(f"{task}.*"))
        assert 0 < 3 * sum(map(comparison.lines_of, files)) <= theirs


OLD = {"a": np.array([1, 2], "f4"), "b": np.array([3, -4], "f4")}
NEW = {"a": np.zeros(2, "f4")}


@pytest.mark.parametrize(
    ("found", "edit", "others"),
    [
        (OLD | NEW, True, True),
        (OLD | {"a": np.array([0, -0.0], "f4")}, True, True),  # said, and not counted as wrong
        (OLD, False, True),
        (OLD | {"a": np.zeros(2, "f2")}, False, True),
        (OLD | {"a": np.zeros((2, 1), "f4")}, False, True),
        (OLD | NEW | {"b": np.array([3, -4.0000005], "f4")}, True, False),
        (NEW, True, False),
        (OLD | NEW | {"c": NEW["a"]}, True, False),
        ({"b": OLD["b"]}, False, True),
    ],
)
def test_the_checker_tells_right_from_wrong(outcomes, found, edit, others):
    told = outcomes.compared(OLD, NEW, found, 0)
    assert (told["edit"], told["others"]) == (edit, others)


def test_the_checker_wants_a_leaf_that_goes_to_be_gone(outcomes):
    assert outcomes.compared(OLD, {"a": None}, {"b": OLD["b"]}, 0)["edit"]
    assert not outcomes.compared(OLD, {"a": None}, OLD, 0)["edit"]


def test_the_checker_allows_one_rounding_where_a_task_has_one(outcomes):
    one = {"a": np.array([1, 2], ml_dtypes.bfloat16)}
    off = {"a": np.array([1 + 2**-7, 2], ml_dtypes.bfloat16)}
    assert outcomes.compared(one, one, off, 2**-7)["edit"] and not outcomes.compared(one, one, off, 2**-9)["edit"]
