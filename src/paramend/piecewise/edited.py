"""`Edited`: an origin with edits, which are computed as its elements are read."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from paramend.edits.plan import Row
from paramend.formats.gathered import leaf_of
from paramend.leaves.origins.boxes import Box, contiguous, select
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Stored
from paramend.leaves.specs import Array, Spec, numpy_dtype
from paramend.piecewise.rows import values


class Edited(Origin):
    """A leaf of a source with edits, which are computed piece by piece as it is read from first to last.

    Boxes with gaps are taken from the whole, which is kept until its last element has been read.

    Attributes:
        source: the source.
        row: the leaf and its edits.
    """

    refusal = ""  # a leaf that cannot be read takes no edits but those that do not read it

    def __init__(self, source: Any, row: Row) -> None:
        self.source, self.row = source, row
        self._end()

    def __reduce__(self) -> tuple[Any, ...]:
        return Edited, (self.source, self.row)

    @property
    def children(self) -> tuple[Origin, ...]:  # type: ignore[override]
        operands = (call.args.get("value") for call in self.row.calls)
        return leaf_of(self.source, self.row.source), *(each for each in operands if isinstance(each, Stored))

    @property
    def spec(self) -> Spec:
        return self.row.spec

    @property
    def extents(self) -> None:
        return None

    def __str__(self) -> str:
        return f"{self.children[0]}.{self.row.edit}"

    def _end(self) -> None:
        """Drop what is computed; the next range is computed from the first element on."""
        self._pieces: Iterator[Array] = iter(())
        self._piece = np.empty(0, numpy_dtype(self.spec.dtype))
        self._at = self.spec.size
        self._whole: Array | None = None

    def read_range(self, start: int, stop: int) -> Array:
        if start < min(self._at, stop):
            self._end()
            self._pieces, self._at = values(self.source, self.row), 0
        found = [self._piece[:0]]
        while start < stop:
            after = self._at + self._piece.size
            if start < after:
                found.append(self._piece[start - self._at : stop - self._at])
                start = after
            else:
                self._at, self._piece = after, next(self._pieces)
        if stop >= self.spec.size:
            self._end()
        return np.concatenate(found)

    def read_box(self, box: Box) -> Array:
        shape = self.spec.shape
        run = contiguous(box, shape)
        if run is not None and self._whole is None:
            return self.read_range(*run).reshape([len(places) for places in box])
        if self._whole is None:
            self._whole = self.read_range(0, self.spec.size).reshape(shape)
        found = np.array(select(self._whole, box))
        if all(len(places) and max(places) == length - 1 for places, length in zip(box, shape, strict=True)):
            self._end()
        return found
