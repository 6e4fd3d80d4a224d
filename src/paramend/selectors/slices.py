"""Slices: what stands between brackets after a selector, in one form for every library."""

import operator
from collections.abc import Hashable
from typing import Any

import numpy as np

from paramend.arrays.registry import backend_of, to_numpy
from paramend.errors import BadArgument
from paramend.leaves.specs import Slice
from paramend.reports import wording


def read_slice(index: Slice) -> Any:
    """What stands between brackets in the form that all libraries read alike: ints, slices, None, `...`, bools, arrays.

    >>> read_slice([1, 3]), read_slice((np.int64(2), range(2)))
    (array([1, 3]), (2, array([0, 1])))
    """
    return tuple(map(_along, index)) if isinstance(index, tuple) else _along(index)


def _along(part: Any) -> Any:
    try:
        if part is None or part is Ellipsis or isinstance(part, bool):
            return part
        if isinstance(part, slice):
            return slice(*(None if end is None else operator.index(end) for end in (part.start, part.stop, part.step)))
        array = to_numpy(part)
    except BadArgument:
        raise
    except Exception as error:  # traced, ragged, or no number
        traced = backend_of(type(part)) is not None
        raise BadArgument(
            "a slice must be known before the edit runs; this one holds a traced value"
            if traced
            else f"{wording.described(part)} is not a slice",
            hint="x.at[i] of jax.numpy takes traced indices" if traced else _SLICES,
        ) from error
    if not array.size and not hasattr(part, "dtype"):  # an empty list
        array = array.astype(np.int64)
    if array.dtype.kind not in "biu":
        raise BadArgument(f"{wording.described(part)} is not a slice", hint=_SLICES)
    array = array if array.dtype == bool else array.astype(np.int64)
    return array if array.ndim else array.item()


_SLICES = "-1, :4, ::2, [1, 3], or one for each axis: [0, :4]"


def write_index(index: Any) -> str:
    """A slice as it is written between brackets.

    >>> write_index((slice(None, 4), -1))
    ':4, -1'
    """
    if isinstance(index, tuple):
        return ", ".join(map(write_index, index))
    if isinstance(index, slice):
        step = "" if index.step is None else f":{index.step}"
        return f"{'' if index.start is None else index.start}:{'' if index.stop is None else index.stop}{step}"
    if isinstance(index, np.ndarray):
        return str(index.tolist()) if index.size <= _MOST_WRITTEN else f"<{index.size:,} positions>"
    return "..." if index is Ellipsis else repr(index)


_MOST_WRITTEN = 32


def plain_slice(index: Any) -> Hashable:
    """A slice that can be compared and hashed, which slices of Python 3.11 and arrays cannot."""
    if isinstance(index, tuple):
        return tuple(map(plain_slice, index))
    if isinstance(index, slice):
        return slice, index.start, index.stop, index.step
    if isinstance(index, list) or hasattr(index, "__array__"):
        return str(np.asarray(index).tolist())
    found: Hashable = index
    return found
