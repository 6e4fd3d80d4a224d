"""Windows: what changed in a range of the bytes of a leaf, as positions and new values, or as new values alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from paramend.leaves.specs import Array
from paramend.piecewise.changes import merged
from paramend.piecewise.spool import PAGE

# The bytes of a leaf that are compared at once. All widths of elements divide it.
SPAN = 3 << 22


@dataclass(frozen=True, slots=True)
class Window:
    """Changes of a range of bytes.

    Attributes:
        start: the first byte of the leaf that positions count from.
        values: the new elements as bytes, or what old and new bytes differ in.
        positions: where the elements are, ascending, counted in elements; None if they follow each other.
        xor: whether the values are what old and new bytes differ in.
    """

    start: int
    values: Array
    positions: Array | None = None
    xor: bool = False

    @property
    def width(self) -> int:
        """The bytes of an element."""
        return 1 if self.positions is None else len(self.values) // max(len(self.positions), 1)

    @property
    def stop(self) -> int:
        """The end of the last element."""
        if self.positions is None:
            return self.start + len(self.values)
        return self.start + (int(self.positions[-1]) + 1 if len(self.positions) else 0) * self.width

    def fault(self, nbytes: int, itemsize: int) -> str:
        """Why they are not changes of a leaf of so many bytes, with elements of some, or ""."""
        places = self.positions
        if places is not None:
            if len(self.values) != len(places) * self.width or self.width not in (1, itemsize):
                return f"{len(self.values):,} bytes are not the values at {len(places):,} positions"
            if (places[1:] <= places[:-1]).any():
                return "its positions do not ascend"
        if self.start % itemsize:
            return f"it begins at byte {self.start:,}, within an element"
        return f"it changes byte {self.stop - 1:,} of {nbytes:,}" if self.stop > nbytes else ""

    def put(self, buffer: Array, at: int) -> None:
        """Change bytes of the leaf, of which `at` is the first: whole elements."""
        width = self.width
        first, last = (max(at - self.start, 0) // width, max(at + len(buffer) - self.start, 0) // width)
        if self.positions is None:
            values, old = self.values[first:last], buffer[max(self.start - at, 0) :][: len(self.values[first:last])]
            old[...] = old ^ values if self.xor else values
            return
        some = slice(*np.searchsorted(self.positions, [first, last]))
        places = self.positions[some].astype(np.int64) + (self.start - at) // width
        values, old = self.values.reshape(-1, width)[some], buffer.reshape(-1, width)
        old[places] = old[places] ^ values if self.xor else values

    @property
    def pages(self) -> Array:
        """The pages of the leaf that change, as (start, stop)."""
        if self.positions is None:
            pages = np.arange(self.start // PAGE, -(-self.stop // PAGE))
        else:
            pages = np.unique((self.positions.astype(np.int64) * self.width + self.start) // PAGE)
        return np.stack([pages, pages + 1], 1) * PAGE


class Changes:
    """All changes of a leaf, window by window: in memory is one at a time."""

    def __init__(self, windows: Callable[[], Iterator[Window]], nbytes: int) -> None:
        self._windows, self.nbytes = windows, nbytes
        self._coming: Iterator[Window] | None = None
        self._now: Window | None = None
        self._done = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Changes, (self._windows, self.nbytes)

    def put(self, buffer: Array, at: int, mask: Array | None = None) -> None:
        """Change bytes of the leaf, of which `at` is the first; those of a mask become 255. Best first to last."""
        if self._coming is None or at < self._done:
            self._coming = self._windows()
            self._now = next(self._coming, None)
        self._done = at + len(buffer)
        while self._now is not None and self._now.start < self._done:
            self._now.put(buffer, at)
            if mask is not None:
                replace(self._now, values=np.full_like(self._now.values, 255), xor=False).put(mask, at)
            if self._now.stop > self._done:
                break
            self._now = next(self._coming, None)

    @property
    def pages(self) -> Array:
        """The pages of the leaf that change, as (start, stop): adjacent ones as one."""
        found = merged(*(window.pages for window in self._windows()))
        return np.minimum(found, self.nbytes)
