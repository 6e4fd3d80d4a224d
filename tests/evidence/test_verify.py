"""`verify`: bit by bit, every leaf named, across kinds of trees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import paramend as pm
from paramend.errors import NoMatch, UnexpectedChange

TREE = {"a": {"w": np.array([1.0, -0.0, np.nan]), "b": np.ones(2, np.float32)}, "n": np.arange(3)}


def test_equal_trees_have_no_changes():
    assert pm.verify(TREE, dict(TREE)) == []
    copied = {"a": {"w": TREE["a"]["w"].copy(), "b": TREE["a"]["b"].copy()}, "n": TREE["n"].copy()}
    assert pm.verify(TREE, copied) == []


CHANGES = {
    "one bit of a sign": ("a/w", np.array([1.0, 0.0, np.nan]), "1 of 3 values, by at most 0"),
    "one ulp": ("a/w", np.array([np.nextafter(1.0, 2.0), -0.0, np.nan]), "1 of 3 values, by at most 2.22045e-16"),
    "another NaN": (
        "a/w",
        np.array([1.0, -0.0, np.float64(np.array([0x7FF8000000000001], np.uint64).view(np.float64)[0])]),
        "1 of 3 values, to or from NaN or inf",
    ),
    "another dtype": ("a/b", np.ones(2, np.float16), "float32[2] became float16[2]"),
    "another shape": ("a/b", np.ones((2, 1), np.float32), "float32[2] became float32[2,1]"),
    "integers": ("n", np.array([0, 1, 9]), "1 of 3 values, by at most 7"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_every_change_is_named_with_how_far(case):
    path, value, says = CHANGES[case]
    changed = {"a": dict(TREE["a"]), "n": TREE["n"]}
    if path == "n":
        changed["n"] = value
    else:
        changed["a"][path[2:]] = value
    with pytest.raises(UnexpectedChange) as error:
        pm.verify(TREE, changed)
    assert error.value.changes == {path: says}
    assert f"{path}: {says}" in str(error.value)
    assert isinstance(error.value, AssertionError)
    assert pm.verify(TREE, changed, only=path) == [path]
    with pytest.raises(UnexpectedChange):
        pm.verify(TREE, changed, only="a/b" if path != "a/b" else "n")


def test_leaves_that_come_and_go():
    with pytest.raises(UnexpectedChange) as error:
        pm.verify({"a": np.ones(1), "b": np.ones(1)}, {"a": np.ones(1), "c": np.ones(1)})
    assert error.value.changes == {"b": "gone", "c": "new"}


def test_only_must_match():
    with pytest.raises(NoMatch):
        pm.verify(TREE, TREE, only="z/**")


def test_across_kinds_and_from_a_file(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    assert pm.verify(module, module.state_dict()) == []
    pm.save(module.state_dict(), tmp_path / "m.safetensors")
    with pm.open(tmp_path / "m.safetensors") as file:
        assert pm.verify(module, file) == []
        edited = pm.at(module, "0.weight").zero()
        assert pm.verify(file, edited, only="0.weight") == ["0.weight"]
        with pytest.raises(UnexpectedChange, match=r"0\.weight: 6 of 6 values"):
            pm.verify(file, edited)


def test_a_gradient_of_zero_does_not_freeze():
    params = {"frozen": jnp.ones(3), "free": jnp.ones(3)}
    gradient = jax.tree.map(jnp.ones_like, params)
    for how, moves in (("exclude", False), ("updates", False), ("gradients", True)):
        tx = pm.freeze(optax.adamw(1e-2), "frozen", how=how)
        updates, _ = tx.update(gradient, tx.init(params), params)
        after = optax.apply_updates(params, updates)
        if moves:
            with pytest.raises(UnexpectedChange, match="frozen: 3 of 3 values"):
                pm.verify(params, after, only="free")
        else:
            assert pm.verify(params, after, only="free") == ["free"]
