"""Chunking: leaves that are stored in chunks, changed chunk by chunk, so that memory is bounded by a few chunks.

The new chunks are written to staged files. The caller replaces the old files, or publishes a new checkpoint.
"""

import math
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paramend.disk.urls import path_of
from paramend.edits.plan import Row
from paramend.leaves.origins.origin import Extent
from paramend.leaves.specs import Array, Spec, numpy_dtype
from paramend.piecewise.changes import Work, change
from paramend.piecewise.rows import expression
from paramend.piecewise.steps import flat
from paramend.reports.progress import Meter

Box = tuple[slice, ...]


def laid_flat(source: Any, row: Row) -> Extent:
    """The extent of a leaf if it were contiguous in a separate file."""
    return Extent(path_of(source.path), 0, row.before.size * numpy_dtype(row.before.dtype).itemsize)


def restage(source: Any, work: Sequence[Work], folder: Path, meter: Meter) -> None:
    """Write the chunks that edits change, with their new values, into files in a folder, at the same places as in that
    of the checkpoint, which stays as it is. The work is as if each leaf were in a separate file."""
    stage = source.stage(folder, [each.row.source for each in work])
    for each in work:
        for box, values in _new_chunks(source, each, folder):
            stage.write(source.names[each.row.source], box, values)
            meter.advance(values.nbytes, each.row.path)
    stage.flush()


def touched(source: Any, work: Work) -> list[Box]:
    """The chunks that an edit affects, in order, as slices of the leaf."""
    shape, chunks = work.row.before.shape, source.chunks(work.row.source)
    runs = work.ranges // numpy_dtype(work.row.before.dtype).itemsize
    return [
        tuple(
            slice(place * chunk, min((place + 1) * chunk, length))
            for place, chunk, length in zip(cell, chunks, shape, strict=True)
        )
        for cell in cells(runs, shape, chunks).tolist()
    ]


def nbytes_of(source: Any, work: Work) -> int:
    """The number of bytes of the chunks that an edit affects, as arrays."""
    width = numpy_dtype(work.row.before.dtype).itemsize
    return sum(width * math.prod(part.stop - part.start for part in box) for box in touched(source, work))


def cells(runs: Array, shape: tuple[int, ...], chunks: tuple[int, ...]) -> Array:
    """The chunks that hold some elements, as places in the grid of chunks, one row each, ascending. The elements are
    runs, (start, stop) in C order, one row each.

    >>> cells(np.array([[5, 7], [14, 18]]), (3, 6), (2, 3)).tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    grid = [-(-length // chunk) for length, chunk in zip(shape, chunks, strict=True)]
    found = [np.zeros((min(len(runs), 1) if not shape else 0, len(shape)), np.int64)]
    # Rows of `rest` are (places along the axes so far ..., start, stop), relative to these places.
    rest = np.asarray(runs, np.int64)
    for axis, chunk in enumerate(chunks):
        inner = math.prod(shape[axis + 1 :])
        place, start, stop = rest[:, :-2], rest[:, -2], rest[:, -1]
        first, last = start // inner, -(-stop // inner)  # rows, in part or whole
        whole_first, whole_last = -(-start // inner), stop // inner
        whole = whole_first < whole_last
        low, high = whole_first[whole] // chunk, -(-whole_last[whole] // chunk)
        found.append(_expanded(place[whole], low, high, grid[axis + 1 :]))
        alone = (first == last - 1) & ~whole
        head = (start % inner > 0) & ~alone
        tail = (stop % inner > 0) & ~alone
        row = first[alone]
        parts = [
            (place[alone], row // chunk, start[alone] - row * inner, stop[alone] - row * inner),
            (place[head], first[head] // chunk, start[head] % inner, np.full(head.sum(), inner)),
            (place[tail], whole_last[tail] // chunk, np.zeros(tail.sum(), np.int64), stop[tail] % inner),
        ]
        rest = np.concatenate([np.column_stack(part) for part in parts])
        rest = np.unique(rest, axis=0)
    return np.unique(np.concatenate(found), axis=0)


def _expanded(place: Array, low: Array, high: Array, grid: Sequence[int]) -> Array:
    """All chunks at these places, from `low` to `high` along the next axis, and anywhere along the axes after it."""
    counts = high - low
    along = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
    outer = np.unique(np.column_stack([np.repeat(place, counts, axis=0), along]), axis=0)
    inner = np.indices(grid).reshape(len(grid), math.prod(grid)).T
    return np.column_stack([np.repeat(outer, len(inner), axis=0), np.tile(inner, (len(outer), 1))])


def _new_chunks(source: Any, work: Work, folder: Path) -> Iterator[tuple[Box, Array]]:
    row, boxes = work.row, touched(source, work)
    row.damage.clear()
    dtype = numpy_dtype(row.before.dtype)
    origin = expression(source, row)
    if origin.boxed:
        for box in boxes:
            x = origin.read_box(tuple(range(part.start, part.stop) for part in box))
            yield box, flat(x, Spec(x.shape, row.spec.dtype), f"{row.path}: {row.edit}").reshape(x.shape)
        return
    # Edits that depend on the order of the elements run on a temporary file in which they are in order; only the
    # affected chunks take space in it.
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(work.extent.nbytes)
        for box in boxes:
            _mapped(file, dtype, row)[box] = source.read_box(row.source, box)
        change(file.fileno(), source, work, Meter(None, 0))
        for box in boxes:
            yield box, np.array(_mapped(file, dtype, row)[box])


def _mapped(file: Any, dtype: np.dtype[Any], row: Row) -> Array:
    # Each map, and with it the memory, is freed after one chunk.
    return np.frombuffer(mmap.mmap(file.fileno(), 0), dtype).reshape(row.before.shape)
