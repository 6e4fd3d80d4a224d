"""Moves of elements, the same on arrays of any library and on origins of leaves on disk."""

from collections.abc import Iterator, Sequence
from functools import partial, reduce
from typing import Any

import numpy as np

from paramend.arrays.registry import backend, to_numpy
from paramend.errors import BadArgument
from paramend.leaves.leaves import Editable
from paramend.leaves.origins import moved
from paramend.leaves.origins.boxes import Places
from paramend.leaves.origins.moved import How
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Made, Stored
from paramend.leaves.specs import Spec, numpy_dtype


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
    library = backend(parts[0])
    if how == "concat":
        return library.concat(parts, axis)
    if how == "stack":
        return library.stack(parts, axis)
    shape = list(library.spec(parts[0]).shape)
    shape[axis] *= len(parts)
    return library.reshape(library.stack(parts, axis + 1), shape)


def add(parts: Sequence[Any]) -> Any:
    """The sum of several."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Origin):
        return moved.Summed(tuple(parts))
    return reduce(backend(parts[0]).add, parts)


def zeros(x: Any) -> Any:
    """+0.0 in every element."""
    if isinstance(x, Origin):
        return Made(x.spec, partial(np.zeros, x.spec.shape, numpy_dtype(x.spec.dtype)), "zeros")
    return backend(x).zeros(x)


def check_zero(x: Any) -> None:
    """Raise if an element is not zero."""
    largest = max((float(np.abs(piece.astype("float64")).max()) for piece in _pieces(x) if piece.size), default=0.0)
    if largest:
        raise BadArgument(
            f"this part of {spec_of(x)} must be zero, because nothing there takes it, and its largest value is "
            f"{largest:.3g}",
            hint="give the other model a place for it",
        )


def same(x: Any, y: Any) -> bool:
    """Whether two leaves are equal, bit for bit."""
    if x is y or spec_of(x) != spec_of(y):
        return x is y
    return all(a.tobytes() == b.tobytes() for a, b in zip(_pieces(x), _pieces(y), strict=True))


def check_equal(x: Any, y: Any) -> None:
    """Raise if two leaves that are to be one differ."""
    if not same(x, y):
        raise BadArgument(f"{spec_of(x)} and {spec_of(y)} are to be one leaf, and their values differ")


def _pieces(x: Any) -> Iterator[Any]:
    """The values, piece by piece; none of a plan, which is made before them."""
    if not isinstance(x, Origin):
        return iter([to_numpy(x)])
    planned = any(isinstance(each, Stored) and isinstance(each.source, Editable) for each in x.stored())
    return (x.read_range(*each) for each in (() if planned else x.ranges()))
