"""Streaming: the leaf of a row of a plan, edited, piece by piece from first to last."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from paramend.arrays.losses import holds
from paramend.edits.damage import of_call
from paramend.edits.plan import Plan, Row
from paramend.errors import SpecMismatch
from paramend.leaves.specs import Array, Spec, numpy_dtype
from paramend.piecewise.steps import CHUNK, Step, step_of


def values(source: Any, row: Row) -> Iterator[Array]:
    """The leaf of a row, edited, in pieces: flat arrays of the new dtype, first to last."""
    size = row.before.size
    if not row.calls:
        for start in range(0, size, CHUNK):
            yield source.read_range(row.source, start, min(start + CHUNK, size))
        return
    row.damage.clear()
    steps, deaf = steps_of(row)
    with np.errstate(all="ignore"):  # an overflow to inf is a valid result
        if None in steps:
            x = np.empty(size, deaf) if deaf else source.read_range(row.source, 0, size)
            x = x.reshape(row.before.shape)
            for edit, place in list(zip(row.calls, row.places, strict=True))[-len(steps) :]:
                before, x = x, edit.run(x, place)
                row.damage.add(of_call(edit, before, x))
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
    """The edits of a row as steps over flat pieces, first to last, without those whose results are overwritten.

    Returns:
        The steps, None for an edit that needs the whole leaf; and, if the first step does not read the old values, the
        dtype of its input, else None.
    """
    deaf = [at for at, edit in enumerate(row.calls) if not edit.op.reads and edit.index is None]
    first = deaf[-1] if deaf else 0
    spec = row.before
    for edit in row.calls[:first]:
        spec = edit.spec(spec)
    dtype = numpy_dtype(spec.dtype) if deaf else None
    steps = []
    for edit, place in zip(row.calls[first:], row.places[first:], strict=True):
        steps.append(step_of(edit, spec, place, row.damage))
        spec = edit.spec(spec)
    return steps, dtype


def _check(shape: tuple[int, ...], dtype: str, row: Row) -> None:
    if Spec(tuple(shape), dtype) != row.spec:
        raise SpecMismatch(f"{row.path}: {row.edit} returned {Spec(tuple(shape), dtype)} where {row.spec} was planned")


def data(source: Any, row: Row) -> Iterator[memoryview]:
    """The bytes of a row's leaf, in pieces."""
    dtype = numpy_dtype(row.spec.dtype)
    for array in values(source, row):
        if array.dtype.name != row.spec.dtype:
            _check(row.spec.shape, array.dtype.name, row)
        yield np.ascontiguousarray(array).astype(dtype, copy=False).reshape(-1).view(np.uint8).data


def survey(plan: Plan) -> None:
    """Count in the rows of a plan the values that its edits cannot hold, without writing: for dry runs.

    Only leaves that such edits change are read.
    """
    for row in plan.changed:
        if any(edit.op.losses is not None for edit in row.calls) and not _is_safe(row):
            for _ in values(plan.leaves, row):
                pass


def _is_safe(row: Row) -> bool:
    """Whether all that it does is a cast to a dtype that holds every value."""
    return len(row.calls) == 1 and row.calls[0].op.name == "cast" and holds(row.spec.dtype, row.before.dtype)
