"""Values of any dtype as float64 or complex128, converted in the fastest way for each."""

import math
from functools import cache
from typing import Any

import numpy as np

from paramend.leaves.specs import Array, kind_of


@cache
def _values(dtype: np.dtype[Any]) -> Array:
    """The value of each bit pattern of a dtype of one byte."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)


def widened(x: Array) -> Array | None:
    """The same values as float64, or as complex128 if they are complex; None if they are not numbers."""
    kind = kind_of(x.dtype.name)
    if kind == "other":
        return None
    if kind == "complex":
        with np.errstate(invalid="ignore"):
            return x.astype(np.complex128, copy=False)
    if x.dtype.itemsize == 1 and x.dtype.num >= 256:  # the conversion of ml_dtypes is several times slower
        return _values(x.dtype).take(x.view(np.uint8))
    with np.errstate(invalid="ignore"):
        if x.dtype.name == "bfloat16":
            x = x.astype(np.float32)
        return x.astype(np.float64, copy=False)


def total(parts: list[float]) -> float:
    """The sum of some numbers, rounded once, so independent of their order."""
    try:
        return math.fsum(parts)
    except (OverflowError, ValueError):  # beyond float64, or inf - inf
        with np.errstate(all="ignore"):
            return float(np.sum(parts))
