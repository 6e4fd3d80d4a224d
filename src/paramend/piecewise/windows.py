"""`Window`: short runs of elements in a file, read and written with as few calls as there are gaps between them."""

from typing import Any

import numpy as np

from paramend.disk.scattered import gather, scatter
from paramend.leaves.origins.origin import Extent
from paramend.leaves.specs import Array

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
