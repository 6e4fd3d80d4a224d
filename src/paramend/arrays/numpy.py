"""Verbs over numpy arrays and numpy scalars, as `Backend` documents them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paramend.leaves.specs import Array, Spec, numpy_dtype


def _same(result: Any, x: Any) -> Any:
    """The result; a numpy scalar if x is one."""
    return x.dtype.type(result) if isinstance(x, np.generic) else result


def spec(x: Any) -> Spec:
    return Spec(tuple(x.shape), x.dtype.name)


def refusal(x: Any) -> str:
    return "" if x.dtype.kind in "biufcV" and x.dtype.names is None else f"{x.dtype} is not a number"


def abstract(x: Any) -> bool:
    return False


traced = parted = spread = abstract


def zeros(x: Any) -> Any:
    return _same(np.zeros_like(x), x)


def full(x: Any, value: Any) -> Any:
    return _same(np.full_like(x, np.asarray(value).astype(x.dtype)), x)


def like(value: Any, x: Any) -> Any:
    out = np.empty_like(x)
    out[...] = np.asarray(value)
    return _same(out, x)


def beside(values: Any, x: Any) -> Any:
    return values


resized = beside


def gathered(x: Any) -> Any:
    return x


def parts(x: Any) -> list[tuple[Any, Any]]:
    return [(tuple(map(range, x.shape)), x)]


def filled(x: Any, read: Callable[[Any], Any]) -> Any:
    return like(read(tuple(map(range, x.shape))), x)


def from_numpy(array: Any) -> Array:
    return np.array(array)


def add(x: Any, value: Any) -> Any:
    return _same((x + np.asarray(value).astype(x.dtype)).astype(x.dtype, copy=False), x)


def multiply(x: Any, value: Any) -> Any:
    return _same((x * np.asarray(value).astype(x.dtype)).astype(x.dtype, copy=False), x)


def matmul(x: Any, y: Any) -> Any:
    return x @ y


def clip(x: Any, lo: Any, hi: Any) -> Any:
    low, high = (None if bound is None else np.asarray(bound).astype(x.dtype) for bound in (lo, hi))
    return _same(np.clip(x, low, high).astype(x.dtype, copy=False), x)


def cast(x: Any, dtype: str) -> Any:
    return x.astype(numpy_dtype(dtype))


def get(x: Any, index: Any) -> Any:
    return np.array(x[index])


def put(x: Any, index: Any, verb: str, value: Any) -> Any:
    out = np.array(x)
    value = numpy(value).astype(x.dtype)
    out[index] = value if verb == "set" else getattr(np, verb)(out[index], value)
    return _same(out, x)


def stack(arrays: Any, axis: int) -> Array:
    return np.stack(arrays, axis)


def concat(arrays: Any, axis: int) -> Array:
    return np.concatenate(arrays, axis)


def take(x: Any, positions: Sequence[int], axis: int) -> Any:
    return np.take(x, np.asarray(positions, np.int64), axis)


def transpose(x: Any, axes: Sequence[int]) -> Array:
    return np.array(np.transpose(x, axes), order="C")


def reshape(x: Any, shape: Sequence[int]) -> Array:
    return np.array(x, order="C").reshape(shape)


def numpy(x: Any) -> Array:
    return np.asarray(x)


def local(x: Any) -> bool:
    return True


def mutable(x: Any) -> bool:
    """Whether the values can change in place: not those of scalars and read-only arrays."""
    return isinstance(x, np.ndarray) and bool(x.flags.writeable)


def memory(x: Any) -> tuple[str, Array] | None:
    return ("cpu", x) if isinstance(x, np.ndarray) and x.size else None


def assign(x: Any, value: Any) -> None:
    x[...] = value
