"""Conversions: values in another dtype, and what they lose."""

from typing import Any

import ml_dtypes
import numpy as np

from paramend.arrays.registry import backend
from paramend.leaves.specs import kind_of, numpy_dtype


def on_host(value: Any) -> Any:
    """The values of an array as a numpy array; a traced array as it is."""
    try:
        return backend(value).numpy(value)
    except TypeError:
        return value


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


def damage(value: Any, dtype: str) -> tuple[int, int]:
    """How many values overflow in another dtype (become inf, NaN or another number), and how many are lost in it.

    A value is lost if it becomes zero or loses its fraction; rounding is not counted, nor are traced values.

    >>> damage(np.array([1e5, 1e-9, 1.0], "float32"), "float16")
    (1, 1)
    >>> damage(np.array([300.0, 1.5, 2.0]), "int8")
    (1, 1)
    """
    if holds(dtype, backend(value).spec(value).dtype):
        return 0, 0
    before = on_host(value)
    if not isinstance(before, np.ndarray | np.generic):
        return 0, 0
    before = np.asarray(before)
    kind = kind_of(dtype)
    with np.errstate(all="ignore"):
        wide = before if before.dtype.kind == "c" else before.astype(np.float64)
        if kind in ("float", "complex"):
            after = before.astype(numpy_dtype(dtype)).astype(np.complex128 if kind == "complex" else wide.dtype)
            return int((np.isfinite(wide) & ~np.isfinite(after)).sum()), int(((wide != 0) & (after == 0)).sum())
        if kind == "bool":
            return 0, int(((wide != 0) & (wide != 1)).sum())
        info = ml_dtypes.iinfo(numpy_dtype(dtype))
        inside = (wide >= float(info.min)) & (wide <= float(info.max))
        return int((~inside).sum()), int((inside & (wide != np.trunc(wide))).sum())


def holds(dtype: str, other: str) -> bool:
    """Whether a dtype covers the range of another: no value overflows or is lost."""
    kinds = kind_of(dtype), kind_of(other)
    if "other" in kinds or kinds[1] == "bool":
        return True
    if kinds == ("int", "int"):
        here, there = (ml_dtypes.iinfo(numpy_dtype(name)) for name in (dtype, other))
        return bool(here.min <= there.min and here.max >= there.max)
    if kinds[0] not in ("float", "complex"):
        return False
    new: Any = ml_dtypes.finfo(numpy_dtype(dtype))
    if kinds[1] == "int":
        return float(new.max) >= float(ml_dtypes.iinfo(numpy_dtype(other)).max)
    old: Any = ml_dtypes.finfo(numpy_dtype(other))
    return bool(float(new.max) >= float(old.max) and float(new.smallest_subnormal) <= float(old.smallest_subnormal))
