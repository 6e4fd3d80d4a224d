"""Places: what an index chooses along each axis, for arrays of which each device has a part."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from paramend.leaves.specs import Array


class Chosen(NamedTuple):
    """What an index chooses."""

    places: tuple[Array, ...]  # along each axis
    shape: tuple[int, ...]  # with an axis of length 1 for each that the index drops

    def spread(self, value: Any) -> Any:
        """A value that broadcasts to what is chosen, as a view with all of its axes."""
        given = iter(value.shape[::-1])
        kept = [next(given, 1) if place.ndim else 1 for place in self.places[::-1]][::-1]
        return value.reshape(kept if value.ndim else [1] * len(kept))


def chosen(index: Any, shape: Sequence[int]) -> Chosen | None:
    """What an index chooses, axis by axis; None if it is of another kind, such as a mask of the whole array.

    >>> found = chosen((..., slice(0, 2)), (2, 4))
    >>> [each.tolist() for each in found.places], found.shape
    ([[0, 1], [0, 1]], (2, 2))
    """
    parts = list(index) if isinstance(index, tuple) else [index]
    arrays = [part for part in parts if isinstance(part, np.ndarray | list)]
    numbers = any(isinstance(part, int | np.integer) for part in parts)
    if None in map(type_of, parts) or len(arrays) > 1 or (arrays and (numbers or np.ndim(arrays[0]) != 1)):
        return None
    gap = next((at for at, part in enumerate(parts) if part is ...), len(parts))
    parts[gap : gap + 1] = [slice(None)] * (len(shape) - sum(part is not ... for part in parts))
    places = tuple(np.asarray(np.arange(length)[part]) for length, part in zip(shape, parts, strict=True))
    return Chosen(places, tuple(max(1, each.size) if not each.ndim else each.size for each in places))


def type_of(part: Any) -> type | None:
    """The type of a part of an index; None if it is none of an axis."""
    known = isinstance(part, int | np.integer | slice | type(...) | np.ndarray | list) and not isinstance(part, bool)
    return type(part) if known else None


def kept_axis(before: Sequence[int], after: Sequence[int], axis: int, shards: int) -> int | None:
    """The axis of a new shape along which an array is cut into the same parts as along an axis of the old one, so that
    each is reshaped where it is; None if there is none.

    >>> kept_axis((8, 6), (8, 2, 3), 0, 4), kept_axis((8, 6), (2, 4, 6), 0, 2), kept_axis((8, 6), (6, 8), 1, 2)
    (0, 0, None)
    """
    for at, length in enumerate(after):
        even = length % shards == 0 and before[axis] % shards == 0
        if math.prod(after[:at]) == math.prod(before[:axis]) and (even or length == before[axis]):
            return at if length > 1 or before[axis] == 1 else None
    return None
