"""Examples of what the functions of resize/ give."""

import numpy as np

from paramend.resize.arithmetic import grid


def test_grid():
    table = np.array([9.0, 0.0, 1.0, 2.0, 3.0])
    assert repr(grid(table, 0, prefix=1, old=(2, 2), new=(1, 2), cubic=False, antialias=True)) == "array([9., 1., 2.])"
