"""Streaming: the leaf of a row of a plan, edited, piece by piece from first to last."""

import math
import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from paramend.computing import CHUNK, Step, step_of
from paramend.errors import SpecMismatch
from paramend.initializers import Place
from paramend.ops import Call
from paramend.plans import Row
from paramend.specs import Spec, numpy_dtype

Array = np.ndarray[Any, Any]


def values(source: Any, row: Row) -> Iterator[Array]:
    """The leaf of a row, edited, in pieces: flat arrays of the new dtype, first to last."""
    size = row.before.size
    if not row.calls:
        for start in range(0, size, CHUNK):
            yield source.read_range(row.source, start, min(start + CHUNK, size))
        return
    steps, deaf = steps_of(row)
    with np.errstate(all="ignore"):  # an overflow to inf is part of the arithmetic that was asked for
        if None in steps:
            x = np.empty(size, deaf) if deaf else source.read_range(row.source, 0, size)
            x = x.reshape(row.before.shape)
            for edit, place in list(zip(row.calls, row.places, strict=True))[-len(steps) :]:
                x = edit.run(x, place)
            _check(np.shape(x), np.asarray(x).dtype.name, row)
            yield np.ascontiguousarray(x).reshape(-1)
            return
        for start in range(0, size, CHUNK):
            stop = min(start + CHUNK, size)
            x = np.empty(stop - start, deaf) if deaf else source.read_range(row.source, start, stop)
            for step in steps:
                assert step is not None
                x = step(x, start)
            yield x


def steps_of(row: Row) -> tuple[list[Step | None], np.dtype[Any] | None]:
    """The edits of a row as steps over flat pieces, first to last, without those whose outcome nobody looks at.

    Returns:
        The steps, None standing for an edit that needs the leaf whole; and, where the first of them does not look at
        what was there, the dtype of what it is given, else None.
    """
    deaf = [at for at, edit in enumerate(row.calls) if not edit.op.reads and edit.index is None]
    first = deaf[-1] if deaf else 0
    spec = row.before
    for edit in row.calls[:first]:
        spec = edit.spec(spec)
    dtype = numpy_dtype(spec.dtype) if deaf else None
    steps = []
    for edit, place in zip(row.calls[first:], row.places[first:], strict=True):
        steps.append(_chunk_step(edit, spec, place))
        spec = edit.spec(spec)
    return steps, dtype


def _check(shape: tuple[int, ...], dtype: str, row: Row) -> None:
    if Spec(tuple(shape), dtype) != row.spec:
        raise SpecMismatch(f"{row.path}: {row.edit} gave {Spec(tuple(shape), dtype)} where {row.spec} was planned")


def data(source: Any, row: Row) -> Iterator[memoryview]:
    """The bytes of a row's leaf, in pieces."""
    dtype = numpy_dtype(row.spec.dtype)
    for array in values(source, row):
        if array.dtype.name != row.spec.dtype:
            _check(row.spec.shape, array.dtype.name, row)
        yield np.ascontiguousarray(array).astype(dtype, copy=False).reshape(-1).view(np.uint8).data


def _chunk_step(edit: Call, spec: Spec, place: Place) -> Step | None:
    """The edit of a flat piece of a leaf that begins at an element, or None: then it needs the leaf whole.

    Pieces must come in order.
    """
    if not isinstance(edit.args.get("seed", 0), int | np.integer):  # a key of JAX draws for the leaf at once
        return None
    if edit.index is None:
        return step_of(edit, spec, place)
    part = _part(edit.index, spec.shape)
    if part is None or np.ndim(edit.args.get("value", 0)):  # such a value is as large as the slice
        return None
    whole = step_of(replace(edit, index=None), spec, place)
    if whole is None:
        return None

    def step(x: Array, start: int) -> Array:
        low, high = (min(max(at - start, 0), x.size) for at in part)
        if low < high:
            x = x.copy()
            x[low:high] = whole(x[low:high], start + low)
        return x

    return step


def _part(index: Any, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The elements (first, stop) that a slice of the first axis names, in C order; None of any other slice."""
    if not shape or isinstance(index, bool | np.bool_) or not isinstance(index, int | np.integer | slice):
        return None
    row = math.prod(shape[1:])
    if isinstance(index, slice):
        start, stop, step = index.indices(shape[0])
        return (start * row, max(stop, start) * row) if step == 1 else None
    at = operator.index(index) % shape[0]
    return at * row, (at + 1) * row
