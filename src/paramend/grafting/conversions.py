"""Conversions: values in another dtype."""

from typing import Any

import numpy as np

from paramend.arrays.losses import on_host
from paramend.arrays.registry import backend
from paramend.leaves.specs import kind_of, numpy_dtype


def converted(value: Any, dtype: str) -> Any:
    """An array in another dtype: of its own library for floats and complex numbers, else of numpy.

    >>> converted(np.array([1.5, 2.0]), "int32")
    array([1, 2], dtype=int32)
    """
    if kind_of(dtype) in ("float", "complex"):
        with np.errstate(over="ignore"):
            return backend(value).cast(value, dtype)
    # A torch Parameter cannot hold integers; on the host it is a plain array.
    with np.errstate(invalid="ignore"):
        return on_host(value).astype(numpy_dtype(dtype))
