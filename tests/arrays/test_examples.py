"""Examples of what the functions of arrays/ give."""

import numpy as np

from paramend.arrays.initializers import NOWHERE, Draws, generator, initialize
from paramend.arrays.losses import damage, overflow
from paramend.arrays.registry import backend_of
from paramend.leaves.specs import Spec


def test_draws():
    spec = Spec((2, 3), "float32")
    draws = Draws("lecun_normal", generator(0, NOWHERE), spec, out_first=False)
    parts = [*draws.next(4).tolist(), *draws.next(2).tolist()]
    assert parts == initialize("lecun_normal", generator(0, NOWHERE), spec, out_first=False).reshape(-1).tolist()


def test_damage():
    assert damage(np.array([1e5, 1e-9, 1.0], "float32"), "float16") == (1, 1)
    assert damage(np.array([300.0, 1.5, 2.0, np.nan]), "int8") == (2, 1)


def test_overflow():
    x = np.array([100, 2, -100], "int8")
    assert overflow("multiply", x, np.int8(2), x * np.int8(2)) == 2


def test_backend_of():
    assert backend_of(np.ndarray).__name__ == "paramend.arrays.numpy"
    assert backend_of(float) is None
