"""Examples of what the functions of porting/ give."""

import numpy as np

from paramend.porting.proof import moves
from paramend.porting.values import arrays, wide


def test_moves():
    image = np.arange(24.0).reshape(1, 2, 3, 4)
    assert moves(np.moveaxis(image, 1, -1), image) == {(1, -1)}


def test_wide():
    assert (
        repr((wide(np.ones(2, "float32")).dtype, wide(np.ones(2, "int8")).dtype)) == "(dtype('float64'), dtype('int8'))"
    )


def test_arrays():
    assert [(path, array.shape) for path, array in arrays({"logits": np.ones(2), "past": [np.ones(3), None]})] == [
        ("logits", (2,)),
        ("past/0", (3,)),
    ]
