"""Examples of what the functions of demo/ give, which import jax."""

import numpy as np

from paramend.demo.step import digest


def test_digest():
    assert digest(np.zeros(2)) != digest(-np.zeros(2))
