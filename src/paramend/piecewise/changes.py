"""Changing: the elements of a leaf that an edit affects, replaced in their file."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from paramend.arrays.initializers import Site
from paramend.disk.io import put
from paramend.edits.call import Call
from paramend.edits.damage import of_call
from paramend.edits.plan import Row
from paramend.formats.source import Source
from paramend.leaves.origins.origin import Extent
from paramend.leaves.specs import Array, Spec, numpy_dtype
from paramend.piecewise import steps as computing
from paramend.piecewise.regions import Region, region
from paramend.piecewise.rows import values
from paramend.piecewise.steps import flat, step_of
from paramend.piecewise.windows import GAP, Window, joined
from paramend.reports.progress import Meter


@dataclass(frozen=True, slots=True)
class Work:
    """One leaf to change.

    Attributes:
        row: its row of the plan.
        extent: where its bytes are.
        regions: which of its elements each call affects; empty if calls can only run together.
        ranges: the bytes that are recorded and written, as (start, stop) in the file, ascending.
        steps: how many bytes all calls together write.
    """

    row: Row
    extent: Extent
    regions: tuple[Region, ...]
    ranges: Array = field(compare=False)
    steps: int


def work_of(row: Row, extent: Extent) -> Work:
    """The work on the leaf of a row, whose bytes are in the extent."""
    spec = row.before
    if any(edit.spec(spec) != spec or edit.op.moves for edit in row.calls):  # a cast and a cast back, for example
        return Work(row, extent, (), np.array([[extent.start, extent.start + extent.nbytes]]), extent.nbytes)
    itemsize = numpy_dtype(spec.dtype).itemsize
    regions = tuple(region(spec.shape, edit.index) for edit in row.calls)
    found = [
        joined(np.sort(starts), run, itemsize)[0] for each in regions for _, starts, run in _pieces(each, itemsize)
    ]
    ranges = np.concatenate([np.empty((0, 2), np.int64), *found])
    steps = int((ranges[:, 1] - ranges[:, 0]).sum())
    if len(ranges):
        ranges = _merged(ranges[np.argsort(ranges[:, 0], kind="stable")])
    return Work(row, extent, regions, ranges + extent.start, steps)


def _merged(ranges: Array) -> Array:
    """Ascending ranges, with adjacent ones merged."""
    reach = np.maximum.accumulate(ranges[:, 1])
    cuts = np.flatnonzero(ranges[1:, 0] > reach[:-1])
    first = np.concatenate([[0], cuts + 1])
    last = np.concatenate([cuts, [len(ranges) - 1]])
    return np.stack([ranges[first, 0], reach[last]], 1)


def change(descriptor: int, source: Source, work: Work, meter: Meter) -> None:
    """Write the new elements of a leaf into an open file.

    Args:
        descriptor: the file, open for reading and writing; it holds the old elements.
        source: the source of leaves that cannot be changed piece by piece in place.
        work: what to do.
        meter: receives the number of bytes.
    """
    row, extent = work.row, work.extent
    row.damage.clear()
    for edit, place, where in zip(row.calls, row.places, work.regions, strict=bool(work.regions)):
        _change_slice(descriptor, extent, replace(edit, index=None), where, row, place, meter)
    if work.regions:
        return
    at = extent.start
    new: Iterable[Array] = values(source, row)
    if any(edit.op.moves for edit in row.calls):  # what is written may be read again
        new = list(new)
    for array in new:
        data = flat(array, Spec(array.shape, row.spec.dtype), f"{row.path}: {row.edit}").view(np.uint8).data
        put(descriptor, data, at)
        at += len(data)
        meter.advance(len(data), row.path)


def _change_slice(
    descriptor: int, extent: Extent, edit: Call, where: Region, row: Row, place: Site, meter: Meter
) -> None:
    dtype = numpy_dtype(row.before.dtype)
    inner = Spec(where.shape, row.before.dtype)
    step = None if where.last is not None else step_of(edit, inner, place, row.damage)

    def window(starts: Array, run: int) -> Window:
        return Window(descriptor, extent, dtype, starts, run)

    with np.errstate(all="ignore"):  # an overflow to inf is a valid result
        if step is not None:
            constant = edit.op.chunks and not edit.op.reads
            new = np.empty(0, dtype)
            for at, starts, run in _pieces(where, dtype.itemsize):
                piece, count = window(starts, run), len(starts) * run
                if not constant or new.size != count:
                    x = piece.read() if edit.op.reads else np.empty(count, dtype)
                    new = flat(step(x, at), Spec((count,), row.spec.dtype), f"{row.path}: {edit}")
                meter.advance(piece.write(new), row.path)
            return
        x = np.empty(where.size, dtype)
        if edit.op.reads:
            for at, starts, run in _pieces(where, dtype.itemsize):
                x[at : at + len(starts) * run] = window(starts, run).read()
        x = x.reshape(where.shape)
        made = edit.run(x, place)
        row.damage.add(of_call(edit, x, made))
        new = flat(made, inner, f"{row.path}: {edit}")
    if where.last is not None:
        chosen = where.last[np.argsort(where.starts(0, where.count)[where.last])]
        starts = where.starts(0, where.count)[chosen]
        for at in range(0, len(chosen), 1024):
            written = window(starts[at : at + 1024], 1).write(new[chosen[at : at + 1024]])
            meter.advance(written, row.path)
        return
    for at, starts, run in _pieces(where, dtype.itemsize):
        meter.advance(window(starts, run).write(new[at : at + len(starts) * run]), row.path)


def _pieces(where: Region, itemsize: int) -> Iterator[tuple[int, Array, int]]:
    return where.pieces(computing.CHUNK, GAP // itemsize)
