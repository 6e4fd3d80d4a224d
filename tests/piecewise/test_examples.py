"""Examples of what the functions of piecewise/ give."""

import numpy as np

from paramend.arrays.initializers import NOWHERE
from paramend.edits.call import Call
from paramend.edits.ops import OPS
from paramend.leaves.specs import Spec
from paramend.piecewise.regions import region
from paramend.piecewise.steps import step_of


def test_region():
    assert [
        region((4, 6), index).count for index in (None, -1, slice(1, 3), (slice(None), 0), (slice(None), slice(2, 4)))
    ] == [1, 1, 1, 4, 4]
    assert region((4, 6), (slice(None, None, -2), slice(2, 4))).starts(0, 2).tolist() == [20, 8]


def test_step_of():
    step = step_of(Call(OPS["add"], {"value": np.array([10, 20])}), Spec((2, 2), "int64"), NOWHERE)
    assert (step(np.array([1, 2, 3]), 0).tolist(), step(np.array([4]), 3).tolist()) == ([11, 22, 13], [24])


def test_region_ascending():
    assert region((4,), slice(None, None, -2)).ascending().starts(0, 2).tolist() == [1, 3]


def test_region_of_a_row():
    assert repr(region((3, 4), (0, slice(1, 3)))) == "Region(shape=(2,), run=2, first=1, axes=(), last=None)"
