"""Examples of what the functions of demo/ give."""

import numpy as np

from paramend.demo.step import digest


def test_digest():
    assert digest(np.zeros(2)) != digest(-np.zeros(2))
