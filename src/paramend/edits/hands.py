"""Moves of elements, the same on arrays of any library and on origins of leaves on disk."""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any

import numpy as np

from paramend.arrays.registry import backend, to_numpy
from paramend.errors import Unsupported
from paramend.leaves.origins import moved
from paramend.leaves.origins.boxes import Places
from paramend.leaves.origins.moved import How
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Zeros
from paramend.leaves.specs import Array, Spec


def spec_of(x: Any) -> Spec:
    """Shape and dtype."""
    return x.spec if isinstance(x, Origin) else backend(x).spec(x)


def take(x: Any, places: Places, axis: int) -> Any:
    """Some places along an axis."""
    if isinstance(x, Origin):
        return moved.take(x, places, axis)
    return backend(x).take(x, np.asarray(places, np.int64).tolist(), axis)


def transpose(x: Any, axes: Sequence[int]) -> Any:
    """The axes in another order."""
    return moved.permute_axes(x, axes) if isinstance(x, Origin) else backend(x).transpose(x, axes)


def reshape(x: Any, shape: Sequence[int]) -> Any:
    """The elements, in C order, in another shape."""
    return moved.reshape(x, shape) if isinstance(x, Origin) else backend(x).reshape(x, shape)


def join(parts: Sequence[Any], axis: int, how: How) -> Any:
    """Several along an axis."""
    if isinstance(parts[0], Origin):
        return moved.join(parts, axis, how)
    moved.check_fit([spec_of(part) for part in parts], axis, how)
    library = backend(parts[0])
    if how == "concat":
        return library.concat(parts, axis)
    if how == "stack":
        return library.stack(parts, axis)
    shape = list(library.spec(parts[0]).shape)
    shape[axis] *= len(parts)
    return library.reshape(library.stack(parts, axis + 1), shape)


def pad(x: Any, count: int, axis: int) -> Any:
    """So many places of zeros behind those along an axis."""
    if not isinstance(x, Origin):
        return join([x, backend(x).zeros(take(x, np.zeros(count, np.int64), axis))], axis, "concat")
    shape = list(x.spec.shape)
    shape[axis] = count
    return join([x, Zeros(Spec(tuple(shape), x.spec.dtype))], axis, "concat")


def add(parts: Sequence[Any]) -> Any:
    """The sum of several."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Origin):
        moved.check_fit([part.spec for part in parts], 0, "stack")
        return moved.Summed(tuple(parts))
    return reduce(backend(parts[0]).add, parts)


def zeros(x: Any) -> Any:
    """+0.0 in every element."""
    return Zeros(x.spec) if isinstance(x, Origin) else backend(x).zeros(x)


def is_zero(x: Any) -> bool:
    """Whether every bit is zero."""
    return not any(piece.any() for piece in _bits(x, x))


def equal(x: Any, y: Any) -> bool:
    """Whether every bit is the same."""
    return x is y or all(map(np.array_equal, _bits(x, x), _bits(y, x)))


def _bits(x: Any, like: Any) -> Iterator[Array]:
    """The bytes, an origin's in the pieces in which another one is best read; `Unsupported` if there are no values."""
    if isinstance(x, Origin):
        pieces: Iterable[Array] = (x.read_range(*each) for each in like.ranges())
    else:
        try:
            pieces = [] if backend(x).abstract(x) else [to_numpy(x)]
        except Exception:  # what is traced by `jax.jit` says so in its own way
            pieces = []
        if not pieces:
            raise Unsupported(f"{spec_of(x)} has no values that could be checked")
    for piece in pieces:
        yield np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
