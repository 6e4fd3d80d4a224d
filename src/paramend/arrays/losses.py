"""Losses: values that a dtype cannot hold, counted after a cast or after arithmetic in the dtype of a leaf."""

from typing import Any

import ml_dtypes
import numpy as np

from paramend.arrays.registry import backend, to_numpy
from paramend.leaves.specs import Array, kind_of, numpy_dtype


def on_host(value: Any) -> Any:
    """The values of an array as a numpy array; a traced array as it is."""
    try:
        return to_numpy(value)
    except (TypeError, RuntimeError):
        return value


def damage(value: Any, dtype: str) -> tuple[int, int]:
    """How many values overflow in another dtype (become inf, NaN or another number), and how many are lost in it. A
    value is lost if it becomes zero or loses its fraction; rounding is not counted, nor are traced values. Of an array
    that is spread over processes each counts what it holds."""
    library = backend(value)
    if holds(dtype, library.spec(value).dtype):
        return 0, 0
    found = [_in_part(on_host(part), dtype) for _, part in library.parts(value)]
    return sum(overflowed for overflowed, _ in found), sum(lost for _, lost in found)


def _in_part(before: Any, dtype: str) -> tuple[int, int]:
    if not isinstance(before, np.ndarray | np.generic) or not before.size:
        return 0, 0
    kind, wide = kind_of(dtype), _wide(np.asarray(before))
    with np.errstate(all="ignore"):
        if kind in ("float", "complex"):
            return _in_float(wide, numpy_dtype(dtype))
        if kind == "bool":
            return 0, int(((wide != 0) & (wide != 1)).sum())
        info = ml_dtypes.iinfo(numpy_dtype(dtype))
        if wide.dtype.kind in "iu":
            return int(((wide < int(info.min)) | (wide > int(info.max))).sum()), 0
        # The bounds are exact as floats, where the greatest integer itself may not be.
        inside = (wide > float(info.min) - 1) & (wide < float(int(info.max) + 1))
        inside |= wide == float(info.min)
        return int((~inside).sum()), int((inside & (wide != np.trunc(wide))).sum())


def _wide(values: Array) -> Array:
    """Values of a dtype in which numpy computes fast, and which holds them exactly."""
    if values.dtype.kind == "V" or values.dtype.itemsize < 4 or values.dtype.name not in _FAST:
        return values.astype(np.int64 if kind_of(values.dtype.name) == "int" else np.float32)
    return values


_FAST = ("int32", "int64", "uint32", "uint64", "float32", "float64", "complex64", "complex128")


def _in_float(wide: Array, dtype: np.dtype[Any]) -> tuple[int, int]:
    """What overflows and what is lost in floats or complex numbers."""
    if dtype.kind == "c" or wide.dtype.kind in "iuc" or dtype.name == "float8_e8m0fnu":
        after = wide.astype(dtype).astype(np.complex128)
        return int((np.isfinite(wide) & ~np.isfinite(after)).sum()), int(((wide != 0) & (after == 0)).sum())
    info: Any = ml_dtypes.finfo(dtype)
    overflowed, most = 0, float(info.max)
    if not (-most <= wide.min() and wide.max() <= most):
        after = wide.astype(dtype).astype(wide.dtype)
        overflowed = int((np.isfinite(wide) & ~np.isfinite(after)).sum())
    return overflowed, int(((np.abs(wide) <= float(info.smallest_subnormal) / 2) & (wide != 0)).sum())


def overflow(verb: str, before: Array, operand: Array, after: Array) -> int:
    """How many results of an "add" or a "multiply" are not those of arithmetic: integers that wrap, floats that become
    inf or NaN."""
    if not before.size or before.dtype == bool:
        return 0
    with np.errstate(all="ignore"):
        if kind_of(before.dtype.name) != "int":
            wide = _wide(after)
            if wide.dtype.kind != "c" and np.isfinite(wide.min()) and np.isfinite(wide.max()):
                return 0
            finite = np.isfinite(_wide(before)) & np.isfinite(_wide(operand))
            return int((finite & ~np.isfinite(wide)).sum())
        info = ml_dtypes.iinfo(before.dtype)
        least, most = int(info.min), int(info.max)
        exact: Any = getattr(np, verb)
        near = exact(before.astype(np.float64), operand.astype(np.float64))
        slack = 1 + most * 1e-9
        doubtful = (np.abs(near - most) <= slack) | (np.abs(near - least) <= slack)
        count = int((((near > most) | (near < least)) & ~doubtful).sum())
        if doubtful.any():  # Python's integers do not round
            operand = np.broadcast_to(operand, before.shape)
            sure = exact(before[doubtful].astype(object), operand[doubtful].astype(object))
            count += int(((sure > most) | (sure < least)).sum())
        return count


def holds(dtype: str, other: str) -> bool:
    """Whether a dtype covers the range of another: no value overflows or is lost."""
    kinds = kind_of(dtype), kind_of(other)
    if "other" in kinds or kinds[1] == "bool" or dtype == other:
        return True
    if kinds == ("int", "int"):
        here, there = (ml_dtypes.iinfo(numpy_dtype(name)) for name in (dtype, other))
        return bool(here.min <= there.min and here.max >= there.max)
    if kinds[0] not in ("float", "complex") or dtype == "float8_e8m0fnu":
        return False
    new: Any = ml_dtypes.finfo(numpy_dtype(dtype))
    if kinds[1] == "int":
        return float(new.max) >= float(ml_dtypes.iinfo(numpy_dtype(other)).max)
    old: Any = ml_dtypes.finfo(numpy_dtype(other))
    return bool(float(new.max) >= float(old.max) and float(new.smallest_subnormal) <= float(old.smallest_subnormal))
