"""Tiling: a leaf that is stored in chunks over several files, changed in place, chunk by chunk."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paramend.disk.io import put
from paramend.edits.plan import Row
from paramend.errors import Unsupported
from paramend.leaves.origins.boxes import Runs, boxes_of
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import Array, Spec, numpy_dtype
from paramend.piecewise.changes import Work, Works, merged
from paramend.piecewise.chunks import laid_flat
from paramend.piecewise.rows import clear, expression
from paramend.piecewise.spool import Spool, Spooled
from paramend.piecewise.steps import flat
from paramend.reports.progress import Meter


def tiled(source: Any, row: Row, works: Works, spool: Spool) -> list[Work]:
    """The work on a leaf, one for each chunk that changes; `Unsupported` if a chunk is not contiguous in its file. New
    values are computed now if they are not made of the elements at their places alone."""
    values = [edit.args.get("value") for edit in row.calls]
    if not isinstance(values[-1], Spooled):
        alone = expression(source, row).boxed and not any(edit.op.moves for edit in row.calls)
        row = row if alone and not any(isinstance(value, Origin) for value in values) else spool.taken(source, row)
    whole, width = works.of(row, laid_flat(source, row)), numpy_dtype(row.before.dtype).itemsize
    everywhere = whole.ranges.tolist() == [[0, whole.extent.nbytes]]
    parts = {} if everywhere else _parts(source.origin(row.source), whole.ranges // width)
    found = []
    for tile in source.tiles(row.source):
        if tile.extent is None:
            raise Unsupported(
                f"{row.path}: the bytes of a chunk of it, {tile.named}, are not contiguous, so they cannot be changed "
                "in place",
                hint=f"paramend {row.calls[0].op.name} {source.path} '{row.path}' -o OUT",
            )
        ranges = np.array([[0, tile.extent.nbytes]]) if everywhere else parts.get(id(tile), np.empty((0, 2))) * width
        if len(ranges):
            steps = int((ranges[:, 1] - ranges[:, 0]).sum())
            found.append(Work(row, tile.extent, (), ranges + tile.extent.start, steps, tile))
    return found


def _parts(origin: Origin, ranges: Array) -> dict[int, Array]:
    """The elements of each chunk, by its id, that ranges of elements of a leaf are in, as ranges."""
    first, last = ranges.T
    traced = origin.trace(Runs(first, last - first, first), 1 << 62) or ()
    rows = [(tile, np.stack([runs.starts, runs.starts + runs.lengths], 1)) for tile, runs in traced]
    return {id(tile): merged(found) for tile, found in rows if len(found)}


def change_tiles(descriptors: Mapping[Path, int], source: Any, work: Iterable[Work], meter: Meter) -> None:
    """Write the new elements of chunks into open files, in pieces of bounded size."""
    seen: set[int] = set()
    for each in work:
        origin = expression(source, each.row)
        if id(each.row) not in seen:  # what edits lose is counted over all chunks
            clear(origin)
            seen.add(id(each.row))
        for at, data in _pieces(origin, each):
            put(descriptors[each.extent.path], data, at)
            meter.advance(len(data), each.row.path)


def _pieces(origin: Origin, work: Work) -> Iterator[tuple[int, memoryview]]:
    """The new bytes of a chunk that are written, each with its place in the file."""
    row, tile, ranges = work.row, work.tile, work.ranges - work.extent.start
    assert tile is not None
    at = 0
    for start in range(0, tile.spec.size, origin.tile):
        for box in boxes_of(tile.spec.shape, start, min(start + origin.tile, tile.spec.size)):
            nbytes = int(np.prod([len(places) for places in box], dtype=np.int64)) * tile.bits // 8
            low = np.searchsorted(ranges[:, 1], at, "right")
            here = ranges[low : np.searchsorted(ranges[:, 0], at + nbytes)]
            if len(here):
                pairs = zip(box, tile.offsets, strict=True)
                values = origin.read_box(tuple(range(p[0] + offset, p[-1] + 1 + offset) for p, offset in pairs))
                data = flat(values, Spec(values.shape, row.spec.dtype), f"{row.path}: {row.edit}").view(np.uint8).data
                for first, last in np.clip(here, at, at + nbytes).tolist():
                    yield work.extent.start + first, data[first - at : last - at]
            at += nbytes
