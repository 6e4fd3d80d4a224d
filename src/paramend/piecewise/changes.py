"""Changing: the elements of a leaf that an edit affects, replaced in their file."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from paramend.arrays.initializers import NOWHERE, Site
from paramend.disk.io import get, put
from paramend.disk.scattered import gather, scatter
from paramend.edits.call import Call
from paramend.edits.damage import of_call
from paramend.edits.plan import Row
from paramend.formats.source import Source
from paramend.formats.tiles import Tile
from paramend.leaves.origins.origin import Extent, Partly
from paramend.leaves.specs import Array, Spec, numpy_dtype
from paramend.piecewise import steps as computing
from paramend.piecewise.edited import are_alike, is_orderless
from paramend.piecewise.regions import Region, region
from paramend.piecewise.rows import values
from paramend.piecewise.steps import Learner, flat, step_of
from paramend.reports.progress import Meter

# Runs with gaps of fewer bytes are recorded and written as one range: another range would cost more than the gap.
GAP = 64


def joined(starts: Array, run: int, itemsize: int, gap: int = GAP) -> tuple[Array, Array]:
    """The byte ranges that cover ascending runs of elements, and the range that each run is in."""
    cuts = starts[1:] - starts[:-1] - run > gap // itemsize
    first = np.flatnonzero(np.concatenate([[True], cuts]))
    last = np.concatenate([first[1:] - 1, [len(starts) - 1]])
    inside = np.concatenate([[0], np.cumsum(cuts)])
    return np.stack([starts[first], starts[last] + run], 1) * itemsize, inside


class Window:
    """Runs of elements of a leaf in a file, read and written with as few calls as there are gaps between them."""

    def __init__(
        self, descriptor: int, extent: Extent, dtype: np.dtype[Any], starts: Array, run: int, gap: int = GAP
    ) -> None:
        self.descriptor, self.extent, self.dtype, self.gap = descriptor, extent, dtype, gap
        ascending = len(starts) == 1 or bool((starts[1:] > starts[:-1]).all())
        order = None if ascending else np.argsort(starts, kind="stable")
        ranges, inside = joined(starts if order is None else starts[order], run, dtype.itemsize, gap)
        self.ranges = ranges + extent.start
        lengths = ranges[:, 1] - ranges[:, 0]
        self.nbytes = int(lengths.sum())
        self.places: Array | None = None
        self.solid = True  # no gaps between the runs
        if len(starts) > 1:
            # The offset of each run in a buffer of the concatenated ranges.
            shift = (np.cumsum(lengths) - lengths - ranges[:, 0]) // dtype.itemsize
            places = (starts if order is None else starts[order]) + shift[inside]
            self.solid = self.nbytes == len(starts) * run * dtype.itemsize
            if order is not None:
                back = np.empty_like(order)
                back[order] = np.arange(len(order))
                places = places[back]
            if order is not None or not self.solid:
                self.places = (places[:, None] + np.arange(run)).reshape(-1)

    def read(self) -> Array:
        buffer = self._load()
        return buffer if self.places is None else buffer[self.places]

    def write(self, values: Array) -> int:
        """Write the elements of the runs and return the number of bytes written."""
        if self.places is None:
            buffer = values
        else:
            buffer = np.empty(self.nbytes // self.dtype.itemsize, self.dtype) if self.solid else self._load()
            buffer[self.places] = values
        leaves = np.zeros(len(self.ranges), np.int8) if self.gap else None
        scatter(self.descriptor, self.ranges, buffer.view(np.uint8).data, self.extent.path, leaves)
        return self.nbytes

    def _load(self) -> Array:
        return np.frombuffer(gather(self.descriptor, self.ranges, self.extent.path), self.dtype)


@dataclass(frozen=True, slots=True)
class Work:
    """One leaf to change, at its extent: which of its elements each call affects (nothing if calls can only run
    together), the bytes that are recorded and written, as (start, stop) in the file, ascending, how many bytes all
    calls together write, and which chunk of the leaf is there, if it is in several."""

    row: Row
    extent: Extent
    regions: tuple[Region, ...]
    ranges: Array = field(compare=False)
    steps: int
    tile: Tile | None = None


class Works:
    """Makes the work on leaves. What leaves of one spec with the same edits have in common is computed once."""

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[tuple[Call, ...], Work]] = {}

    def of(self, row: Row, extent: Extent) -> Work:
        value = row.calls[-1].args.get("value") if row.calls else None
        if isinstance(value, Partly):
            steps = int((value.changed[:, 1] - value.changed[:, 0]).sum())
            return Work(row, extent, (), value.changed + extent.start, steps)
        key = (row.before, extent.nbytes, *map(id, row.calls))
        _, first = self._seen.get(key) or self._seen.setdefault(key, (row.calls, _work_at_0(row, extent.nbytes)))
        return Work(row, extent, first.regions, first.ranges + extent.start, first.steps)


def _work_at_0(row: Row, nbytes: int) -> Work:
    """The work on a leaf that is at the beginning of a file."""
    spec, extent = row.before, Extent(Path(), 0, nbytes)
    if any(edit.spec(spec) != spec or edit.op.moves for edit in row.calls):  # a cast and a cast back, for example
        return Work(row, extent, (), np.array([[0, nbytes]]), nbytes)
    itemsize = numpy_dtype(spec.dtype).itemsize
    regions = tuple(region(spec.shape, edit.index) for edit in row.calls)
    found = [
        joined(np.sort(starts), run, itemsize)[0] for each in regions for _, starts, run in _pieces(each, itemsize)
    ]
    steps = sum(int((each[:, 1] - each[:, 0]).sum()) for each in found)
    return Work(row, extent, regions, merged(*found), steps)


def merged(*found: Array) -> Array:
    """Ranges, (start, stop), ascending, those that touch or overlap as one."""
    ranges = np.concatenate([np.empty((0, 2), np.int64), *found])
    if not len(ranges):
        return ranges
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ranges[:, 1])
    first = np.flatnonzero(np.append(True, ranges[1:, 0] > reach[:-1]))
    return np.stack([ranges[first, 0], reach[np.append(first[1:], len(ranges)) - 1]], 1)


# Bytes of new values that are written at once, where only some change.
_SPAN = 1 << 20
# The bytes of a leaf up to which it is changed together with others like it.
_SMALL = 1 << 16
# The elements of a run below which runs all over a leaf are put in order first.
_FEW = 1 << 10


def change_all(descriptors: Mapping[Path, int], source: Source, work: Sequence[Work], meter: Meter) -> None:
    """Write the new elements of all leaves, no two of which share bytes, into open files: small leaves with the same
    edits together. The source is that of leaves that cannot be changed piece by piece in place."""
    alike: dict[Any, list[Work]] = {}
    for each in work:
        row, extent = each.row, each.extent
        if extent.nbytes > _SMALL or not each.regions or not are_alike(row.calls):
            change(descriptors[extent.path], source, each, meter)
            continue
        rest = extent.start % numpy_dtype(row.before.dtype).itemsize
        key = (extent.path, row.before.dtype, extent.nbytes, rest, *map(id, row.calls))
        alike.setdefault(key, []).append(each)
    for group in alike.values():
        _change_alike(descriptors[group[0].extent.path], group, meter)


def _change_alike(descriptor: int, group: Sequence[Work], meter: Meter) -> None:
    """Write the new elements of leaves of one dtype and size, which take the same edits."""
    row, extent = group[0].row, group[0].extent
    dtype = numpy_dtype(row.before.dtype)
    run, spec = extent.nbytes // dtype.itemsize, Spec((extent.nbytes // dtype.itemsize,), row.before.dtype)
    group = sorted(group, key=lambda each: each.extent.start)
    begins = np.array([each.extent.start for each in group])
    for each in group:
        each.row.damage.clear()
    whole = replace(extent, start=int(begins[0]))
    starts, together = (begins - begins[0]) // dtype.itemsize, max(computing.CHUNK // run, 1)
    for edit in row.calls:
        step = step_of(edit, spec, NOWHERE)
        assert step is not None
        with np.errstate(all="ignore"):  # an overflow to inf is a valid result
            for at in range(0, len(starts), together):
                # The bytes between leaves are other leaves, which are not recorded.
                window = Window(descriptor, whole, dtype, starts[at : at + together], run, gap=0)
                count = len(starts[at : at + together]) * run
                x = window.read() if edit.op.reads else np.empty(count, dtype)
                new = flat(step(x, 0), Spec((count,), row.spec.dtype), f"{row.path}: {edit}")
                _count(edit, group[at : at + together], x, new)
                meter.advance(window.write(new), row.path)


def _count(edit: Call, group: Sequence[Work], before: Array, after: Array) -> None:
    """Enter in the rows of leaves of one size, which were computed together, what their dtype could not hold."""
    losses = edit.op.losses
    if losses is None or not any(losses(before, after, edit.args)):
        return
    pairs = zip(np.split(before, len(group)), np.split(after, len(group)), strict=True)
    for each, (x, made) in zip(group, pairs, strict=True):
        each.row.damage.add(losses(x, made, edit.args))


def change(descriptor: int, source: Source, work: Work, meter: Meter) -> None:
    """Write the new elements of a leaf into an open file, which holds the old ones."""
    row, extent = work.row, work.extent
    row.damage.clear()
    calls = list(zip(row.calls, row.places, work.regions, strict=bool(work.regions)))
    deaf = [n for n, (edit, _, _) in enumerate(calls) if not edit.op.reads and edit.index is None]
    # What it replaces is not written before: its operand may be made of what is there.
    for edit, place, where in calls[deaf[-1] if deaf else 0 :]:
        _change_slice(descriptor, extent, replace(edit, index=None), where, row, place, meter)
    if work.regions:
        return
    new_values = row.calls[-1].args.get("value")
    if isinstance(new_values, Partly):
        for start, stop in (work.ranges - extent.start).tolist():
            for at in range(start, stop, _SPAN):
                end = min(at + _SPAN, stop)
                old = partial(get, descriptor, extent.start + at, end - at, extent.path)
                data = new_values.data(at, end, old)
                put(descriptor, data, extent.start + at)
                meter.advance(len(data), row.path)
        return
    at = extent.start
    new: Iterable[Array] = values(source, row)
    if any(edit.op.moves for edit in row.calls):  # what is written may be read again
        new = list(new)
    for array in new:
        new_bytes = flat(array, Spec(array.shape, row.spec.dtype), f"{row.path}: {row.edit}").view(np.uint8).data
        put(descriptor, new_bytes, at)
        at += len(new_bytes)
        meter.advance(len(new_bytes), row.path)


def _change_slice(
    descriptor: int, extent: Extent, edit: Call, where: Region, row: Row, place: Site, meter: Meter
) -> None:
    dtype = numpy_dtype(row.before.dtype)
    inner = Spec(where.shape, row.before.dtype)
    if where.last is None and is_orderless(edit):
        where = where.ascending()
    step = None if where.last is not None else step_of(edit, inner, place, row.damage)

    def window(starts: Array, run: int) -> Window:
        return Window(descriptor, extent, dtype, starts, run)

    with np.errstate(all="ignore"):  # an overflow to inf is a valid result
        # Runs all over the leaf are read and written in the order of the leaf.
        if step is not None and not (where.shuffled and where.run < _FEW):
            if isinstance(step, Learner):
                for at, starts, run in _pieces(where, dtype.itemsize):
                    step.learn(window(starts, run).read(), at)
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
            for places, starts, run in _spans(where, dtype.itemsize, None):
                x[places] = window(starts, run).read()
        x = x.reshape(where.shape)
        made = edit.run(x, place)
        row.damage.add(of_call(edit, x, made))
        new = flat(made, inner, f"{row.path}: {edit}")
    for places, starts, run in _spans(where, dtype.itemsize, where.last):
        meter.advance(window(starts, run).write(new[places]), row.path)


def _spans(where: Region, itemsize: int, chosen: Array | None) -> Iterator[tuple[Any, Array, int]]:
    """The slice, or some of its runs by number, in pieces: (places in the slice, where runs begin in the leaf, their
    length). Short runs all over a leaf come in the order of the leaf."""
    if chosen is None and not (where.shuffled and where.run < _FEW):
        for at, starts, run in _pieces(where, itemsize):
            yield slice(at, at + len(starts) * run), starts, run
        return
    begins, run = where.starts(0, where.count), where.run
    numbers = np.arange(where.count) if chosen is None else chosen
    numbers = numbers[np.argsort(begins[numbers], kind="stable")]
    together = max(computing.CHUNK // run, 1)
    for at in range(0, len(numbers), together):
        some = numbers[at : at + together]
        yield (some[:, None] * run + np.arange(run)).reshape(-1), begins[some], run


def _pieces(where: Region, itemsize: int) -> Iterator[tuple[int, Array, int]]:
    return where.pieces(computing.CHUNK, GAP // itemsize)
