"""Examples of what the functions of resize/ give."""

import numpy as np

from paramend.resize.arithmetic import grid, interpolated
from paramend.resize.detection import detected


def test_grid():
    table = np.array([9.0, 0.0, 1.0, 2.0, 3.0])
    assert repr(grid(table, 0, prefix=1, old=(2, 2), new=(1, 2), cubic=False, antialias=True)) == "array([9., 1., 2.])"


def test_interpolated():
    assert (
        repr(interpolated(np.array([[0.0, 1.0]]), {1: 4}, cubic=False, antialias=False))
        == "array([[0.  , 0.25, 0.75, 1.  ]])"
    )


def test_detected():
    assert repr(detected(["vit", "pos_embed"], (1, 197, 768), (1, 577, 768))) == "pm.resize.positions()"
