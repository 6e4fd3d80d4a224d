"""`paramend.testing`: assertions for people's own tests."""

import numpy as np
import pytest
import torch

import paramend as pm
from paramend import testing
from paramend.errors import NoMatch

TREE = {"a": {"w": np.array([1.0, -0.0, np.nan]), "b": np.ones(2, np.float32)}, "n": np.arange(3)}


def test_only_the_chosen_leaves_changed():
    testing.assert_only_changed(TREE, pm.at(TREE, "a/b").zero(), "a/**")
    with pytest.raises(AssertionError, match=r"(?s)1 outside n.*changed outside n: 1 leaf.*a/b"):
        testing.assert_only_changed(TREE, pm.at(TREE, "a/b").zero(), "n")
    with pytest.raises(NoMatch):
        testing.assert_only_changed(TREE, TREE, "nope")


def test_an_edit_that_does_nothing_is_no_change():
    with pytest.raises(AssertionError, match="nothing in a/b"):
        testing.assert_only_changed(TREE, dict(TREE), "a/b")
    testing.assert_only_changed(TREE, dict(TREE), "a/b", allow_noop=True)


def test_identical(tmp_path):
    module = torch.nn.Linear(2, 2)
    pm.save(module.state_dict(), tmp_path / "m.safetensors")
    testing.assert_identical(module, tmp_path / "m.safetensors")
    with torch.no_grad():
        module.bias += 1
    with pytest.raises(AssertionError) as error:
        testing.assert_identical(module, tmp_path / "m.safetensors")
    assert list(error.value.changes) == ["bias"]
    testing.assert_identical(module, tmp_path / "m.safetensors", "weight")
