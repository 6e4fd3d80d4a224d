"""Moves of elements, the same on arrays of any library and on origins of leaves on disk."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from paramend.arrays.registry import backend
from paramend.leaves.origins import moved
from paramend.leaves.origins.boxes import Places
from paramend.leaves.origins.moved import How
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import Spec


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
