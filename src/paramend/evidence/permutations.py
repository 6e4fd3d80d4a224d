"""Permutations of axes: whether a leaf is another one transposed, checked element by element in bounded memory."""

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from itertools import permutations, product

import numpy as np

from paramend.disk.urls import Url
from paramend.evidence.comparisons import Pair
from paramend.evidence.distances import bits
from paramend.evidence.streams import Stream
from paramend.formats.files import OpenFile
from paramend.leaves.specs import Array

_AXES = 4  # with more axes, orders are not tried
_TILE = 512
_PROBES = 64
_LIMIT = 64 << 20  # bytes of a leaf that is read whole where its file cannot be mapped


def transposed(pair: Pair) -> tuple[int, ...] | None:
    """An order of axes, not that of a, for which b is `a.transpose(order)`, bit for bit; None if there is none."""
    one, two = pair.old.spec(pair.a), pair.new.spec(pair.b)
    ndim = len(one.shape)
    if one.dtype != two.dtype or sorted(one.shape) != sorted(two.shape) or not 2 <= ndim <= _AXES or not one.size:
        return None
    same = tuple(range(ndim))
    orders = [
        order
        for order in sorted(permutations(same), reverse=True)
        if order != same and tuple(one.shape[axis] for axis in order) == two.shape
    ]
    if not orders:
        return None
    streams = pair.streams()
    if streams[0].dtype is None or not streams[0].dtype.itemsize:
        return None
    views = [_View(stream) for stream in streams]
    arrays = [view.array for view in views if view.array is not None]
    if len(arrays) < 2:
        return None
    for order in orders:
        a, b = arrays[0].transpose(order), arrays[1]
        if _agree(a, b) and all(_same_tile(a[tile], b[tile], views) for tile in _tiles(b.shape, order)):
            return order
    return None


class _View:
    """The values of a stream as an array: those of a file are mapped, and their pages released tile by tile."""

    def __init__(self, stream: Stream) -> None:
        self.array: Array | None = None
        self._map: mmap.mmap | None = None
        flat = stream.array
        if stream.extent is not None:
            if isinstance(stream.extent.path, Url) and stream.extent.nbytes > _LIMIT:
                return
            with contextlib.closing(OpenFile(stream.extent.path)) as file:
                memory, start = file.memory(stream.extent.start, stream.extent.nbytes)
            self._map = memory if isinstance(memory, mmap.mmap) else None
            flat = np.frombuffer(memory, np.uint8, stream.extent.nbytes, start).view(stream.dtype)
        elif flat is None and stream.size * stream.width <= _LIMIT:
            flat = stream.source.read_range(stream.number, 0, stream.size)
        if flat is not None:
            self.array = flat.reshape(stream.spec.shape)

    def forget(self) -> None:
        """Let the system reclaim the pages that were read."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _agree(a: Array, b: Array) -> bool:
    """Whether two arrays of one shape agree at some places."""
    draw = np.random.default_rng(0)
    places = tuple(draw.integers(0, length, _PROBES) for length in b.shape)
    return bool((bits(a[places]) == bits(b[places])).all())


def _tiles(shape: tuple[int, ...], order: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Parts of b that touch few pages of either side: its first and last axes and the last one of a are cut."""
    cut = {len(shape) - 1, order.index(len(shape) - 1), 0}
    steps = [
        [slice(at, at + _TILE) for at in range(0, length, _TILE)] if axis in cut else [slice(None)]
        for axis, length in enumerate(shape)
    ]
    return product(*steps)


def _same_tile(a: Array, b: Array, views: Sequence[_View]) -> bool:
    same = bool((bits(a.reshape(-1)) == bits(b.reshape(-1))).all())
    for view in views:
        view.forget()
    return same
