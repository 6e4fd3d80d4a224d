"""Verbs over numpy arrays and numpy scalars."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from paramend.leaves.specs import Array, Spec, numpy_dtype


def _same(result: Any, x: Any) -> Any:
    """The result; a numpy scalar if x is one."""
    return x.dtype.type(result) if isinstance(x, np.generic) else result


def spec(x: Any) -> Spec:
    """Shape and dtype."""
    return Spec(tuple(x.shape), x.dtype.name)


def refusal(x: Any) -> str:
    """Why arithmetic makes no sense, or ""."""
    return "" if x.dtype.kind in "biufcV" and x.dtype.names is None else f"{x.dtype} is not a number"


def abstract(x: Any) -> bool:
    """False: numpy arrays have values."""
    return False


def zeros(x: Any) -> Any:
    """+0.0 in every element."""
    return _same(np.zeros_like(x), x)


def full(x: Any, value: Any) -> Any:
    """The scalar in every element."""
    return _same(np.full_like(x, np.asarray(value).astype(x.dtype)), x)


def like(value: Any, x: Any) -> Any:
    """The values as an array like `x`."""
    out = np.empty_like(x)
    out[...] = np.asarray(value)
    return _same(out, x)


def add(x: Any, value: Any) -> Any:
    """x + value, in the dtype of x."""
    return _same((x + np.asarray(value).astype(x.dtype)).astype(x.dtype, copy=False), x)


def multiply(x: Any, value: Any) -> Any:
    """x * value, in the dtype of x."""
    return _same((x * np.asarray(value).astype(x.dtype)).astype(x.dtype, copy=False), x)


def clip(x: Any, lo: Any, hi: Any) -> Any:
    """x between two bounds, in the dtype of x."""
    low, high = (None if bound is None else np.asarray(bound).astype(x.dtype) for bound in (lo, hi))
    return _same(np.clip(x, low, high).astype(x.dtype, copy=False), x)


def cast(x: Any, dtype: str) -> Any:
    """The array in another dtype."""
    return x.astype(numpy_dtype(dtype))


def get(x: Any, index: Any) -> Any:
    """x[index], a copy."""
    return np.array(x[index])


def put(x: Any, index: Any, verb: str, value: Any) -> Any:
    """A new array with the slice changed."""
    out = np.array(x)
    value = numpy(value).astype(x.dtype)
    out[index] = value if verb == "set" else getattr(np, verb)(out[index], value)
    return _same(out, x)


def stack(arrays: Any, axis: int) -> Array:
    """The arrays along a new axis."""
    return np.stack(arrays, axis)


def concat(arrays: Any, axis: int) -> Array:
    """The arrays one after the other."""
    return np.concatenate(arrays, axis)


def take(x: Any, positions: Sequence[int], axis: int) -> Any:
    """A new array of slices of x."""
    return np.take(x, np.asarray(positions, np.int64), axis)


def transpose(x: Any, axes: Sequence[int]) -> Array:
    """A new array with the axes in another order."""
    return np.array(np.transpose(x, axes), order="C")


def reshape(x: Any, shape: Sequence[int]) -> Array:
    """A new array in another shape."""
    return np.array(x, order="C").reshape(shape)


def numpy(x: Any) -> Array:
    """The array itself."""
    return np.asarray(x)


def local(x: Any) -> bool:
    """True: numpy's arrays are the host's."""
    return True


def mutable(x: Any) -> bool:
    """Whether the values can change in place: not those of scalars and read-only arrays."""
    return isinstance(x, np.ndarray) and bool(x.flags.writeable)


def memory(x: Any) -> tuple[str, Array] | None:
    """The array itself; None for a scalar."""
    return ("cpu", x) if isinstance(x, np.ndarray) and x.size else None


def assign(x: Any, value: Any) -> None:
    """Write the value into x itself."""
    x[...] = value
