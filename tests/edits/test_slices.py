"""What may stand between brackets, in every library and on disk."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import paramend as pm
from paramend.errors import BadArgument, OutOfRange

SLICES = [
    ([1, 3], [1, 3]),
    ([-1], [-1]),
    ([], np.array([], int)),
    ([True, False, True, False], np.array([True, False, True, False])),
    (range(2), [0, 1]),
    ([[0, 1], [1, 2]], [[0, 1], [1, 2]]),
    (np.array([1, 3], "uint8"), [1, 3]),
    (jnp.array([1, 3]), [1, 3]),
    (torch.tensor([1, 3]), [1, 3]),
    (torch.tensor([True, False, True, False]), np.array([True, False, True, False])),
    (np.array(2), 2),
    (jnp.array(2), 2),
    (np.int64(-2), -2),
    ((slice(None), [0, 1]), (slice(None), [0, 1])),
    (([0, 1], [1, 0]), ([0, 1], [1, 0])),
    ((1, [0, 2]), (1, [0, 2])),
    (slice(3, 0, -1), slice(3, 0, -1)),
    ((slice(None, None, -2), 1), (slice(None, None, -2), 1)),
    ((..., 0), (..., 0)),
    (slice(np.int64(1), jnp.array(3)), slice(1, 3)),
]
LIBRARIES = {"numpy": np.array, "jax": jnp.array, "torch": lambda x: torch.tensor(np.array(x))}
VALUES = np.arange(16, dtype="float32").reshape(4, 4)


@pytest.mark.parametrize(("index", "meant"), SLICES, ids=[str(index) for index, _ in SLICES])
def test_a_slice_takes_what_numpy_takes(index, meant, tmp_path):
    added, zeroed = VALUES.copy(), VALUES.copy()
    added[meant] = added[meant] + 1  # an element that is named twice changes once
    zeroed[meant] = 0
    for library in LIBRARIES.values():
        tree = {"w": library(VALUES)}
        assert np.array_equal(np.asarray(pm.at(tree, "w")[index].one()), VALUES[meant])
        assert np.array_equal(np.asarray(pm.at(tree, "w")[index].add(1)["w"]), added)
        assert np.array_equal(np.asarray(pm.at(tree, pm.sel("w")[index]).zero()["w"]), zeroed)
    pm.save({"w": VALUES}, tmp_path / "m.safetensors")
    checkpoint = pm.open(tmp_path / "m.safetensors")
    assert np.array_equal(pm.at(checkpoint, "w")[index].one(), VALUES[meant])
    pm.at(checkpoint, "w")[index].add(1).save(tmp_path / "added.safetensors")
    assert np.array_equal(pm.load(tmp_path / "added.safetensors")["w"], added)
    pm.patch(tmp_path / "m.safetensors", lambda t: pm.at(t, "w")[index].zero())
    assert np.array_equal(pm.load(tmp_path / "m.safetensors")["w"], zeroed)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_no_slice(library):
    tree = {"w": LIBRARIES[library](VALUES)}
    for index in (1.5, "a", [0.5], [1, [2]], {"a": 1}, slice("a", None), np.array([1.0])):
        with pytest.raises(BadArgument, match="is not a slice"):
            pm.at(tree, "w")[index]
    for index in ([1, 9], [True], 4, (0, 0, 0)):
        with pytest.raises(OutOfRange, match=r"w: the slice does not fit a leaf of shape \(4, 4\)"):
            pm.at(tree, "w")[index]


def test_a_slice_prints_as_it_is_written():
    assert repr(pm.sel("w")[[1, 3]]) == 'pm.sel("w")[[1, 3]]'
    assert repr(pm.sel("w")[np.arange(1000)]) == 'pm.sel("w")[<1,000 positions>]'
    assert pm.sel("w")[[1, 3]] == pm.sel("w")[np.array([1, 3])]
