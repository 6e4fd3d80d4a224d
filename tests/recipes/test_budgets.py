"""Recipes that are wrong in too many ways, nested too deeply, or larger than they look."""

import json

import numpy as np
import pytest

import paramend as pm
from paramend.errors import BadRecipe
from support.stacks import with_few_calls_left

Recipe = pm.Recipe


def refused(make):
    with pytest.raises(BadRecipe) as caught:
        make()
    return caught.value.problems


@pytest.mark.parametrize(
    "make",
    [
        lambda: Recipe([{"zeroo": "w"}] * 5000),
        lambda: Recipe([{"zero": ["a["] * 5000}]),
        lambda: Recipe([{f"verb{i}": "w" for i in range(5000)}]),
        lambda: Recipe.parse("version: 1\nsteps:\n" + "- zero: {at: w, at: v}\n" * 500),
        lambda: Recipe.parse(json.dumps({"version": 1, "steps": [{"fill": "w"}] * 5000})),
        lambda: Recipe.parse(
            '{"version": 1, "steps": [{"fill": {"at": "w", "value": 1, ' + '"at": "w", ' * 500 + '"at": 1}}]}'
        ),
        lambda: Recipe([{"zero": f"x{i}"} for i in range(1000)]).apply({"w": np.ones(1)}),
        lambda: Recipe([{"zero": [f"x{i}" for i in range(1000)]}]).apply({"w": np.ones(1)}),
        lambda: Recipe([{"zero": f"x{i}"} for i in range(1000)]).apply_({"w": np.ones(1)}),
    ],
)
def test_the_first_hundred_problems_are_listed(make):
    found = refused(make)
    assert len(found) == 101
    assert found[-1].message == "these are the first 100 problems; there may be more"


def test_a_hundred_problems_do_not_hide_a_step_that_has_none():
    tree = {"w": np.ones(2)}
    assert Recipe([{"zero": "w"}] * 150).apply(tree)["w"].tolist() == [0, 0]


@pytest.mark.parametrize("wrap", [lambda d: [d], lambda d: {"a": d}])
def test_deep_data(wrap):
    deep = 1
    for _ in range(200):
        deep = wrap(deep)
    data = {"version": 1, "steps": [{"fill": {"at": "w", "value": deep}}]}
    for make in (
        lambda: Recipe(data["steps"]),
        lambda: Recipe.parse(json.dumps(data)),
        lambda: Recipe.parse(json.dumps(data)[:-1] + "\n}"),
        lambda: Recipe.parse("# YAML\n" + json.dumps(data)),
        lambda: Recipe.parse("[" * 1500),
    ):
        (problem, *_) = refused(make)
        assert "nested too deeply" in problem.message
    text = '{"version": 1, "steps": [{"set": {"at": "w", "value": [[1, 2]]}}]}'
    assert with_few_calls_left(150, lambda: Recipe.parse(text)) == Recipe.parse(text)


def test_a_long_key_above_many_values():
    text = "version: 1\nsteps:\n  - ? " + "k" * 400_000 + "\n    : [" + "1," * 1000 + "]\n"
    (problem,) = refused(lambda: Recipe.parse(text))
    assert len(problem.address) < 200
    deep = "x" * 90
    text = "version: 1\nsteps:\n- " + "".join(f"{{{deep}: " for _ in range(60)) + f"[{'1,' * 5000}]" + "}" * 60
    (problem,) = refused(lambda: Recipe.parse(text))
    assert "too large" in problem.message


def test_aliases_are_counted_each_time():
    text = f"a: &a {'x' * 20_000}\nb: [{', '.join(['*a'] * 300)}]"
    (problem,) = refused(lambda: Recipe.parse(text))
    assert "too large with aliases expanded" in problem.message


def test_values_are_counted_while_they_are_read(monkeypatch):
    monkeypatch.setattr("paramend.recipes.text._MAX_VALUES", 1000)
    (problem,) = refused(lambda: Recipe.parse("version: 1\nsteps:\n" + "- zero: w\n" * 90_000))
    assert problem.message == "there are more than 1,000 values"
    assert problem.line == 334
