"""Examples of what the functions of porting/ give."""

import numpy as np

from paramend.porting.agreement import moves


def test_moves():
    image = np.arange(24.0).reshape(1, 2, 3, 4)
    assert moves(np.moveaxis(image, 1, -1), image) == {(1, -1)}
