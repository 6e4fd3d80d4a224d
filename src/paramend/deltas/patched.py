"""`Patched`: a leaf in which a delta changes some elements, read piece by piece."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from paramend.deltas.payload import itemsize_of
from paramend.deltas.rows import LeafRow
from paramend.deltas.windows import SPAN, Changes
from paramend.disk.io import get, reading
from paramend.errors import BadCheckpoint
from paramend.leaves.origins.boxes import Box, select
from paramend.leaves.origins.origin import Computed, Partly
from paramend.leaves.origins.stored import Stored, Zeros
from paramend.leaves.specs import Array, numpy_dtype

if TYPE_CHECKING:
    from paramend.deltas.delta import Delta


@dataclass(frozen=True, eq=False, repr=False)
class Patched(Computed, Partly):
    """The elements of another origin, some of them changed; by bytes where they cannot be read."""

    changes: Changes
    boxed = False  # pieces are read first to last

    @property
    def says(self) -> str:  # type: ignore[override]
        return f"{self.spec} by a delta"

    @property
    def changed(self) -> Array:
        return self.changes.pages if isinstance(self.whole, Stored) else np.array([[0, self.nbytes]])

    def data(self, start: int, stop: int, old: Callable[[], bytearray]) -> memoryview:
        return self._put(old(), start) if isinstance(self.whole, Stored) else self.raw(start, stop).data

    def _put(self, old: Any, start: int) -> memoryview:
        buffer = np.frombuffer(old, np.uint8)
        self.changes.put(buffer, start)
        return buffer.data

    def raw(self, start: int, stop: int) -> Array:
        """Some bytes: of whole elements, where they can be read."""
        whole = self.whole
        if isinstance(whole, Patched):
            found = whole.raw(start, stop)
        elif not whole.refusal:
            width = numpy_dtype(whole.spec.dtype).itemsize
            found = np.array(whole.read_range(start // width, stop // width)).view(np.uint8)
        else:
            extent = whole.extent
            assert extent is not None  # or its checksum could not be computed
            with reading(extent.path) as descriptor:
                found = np.frombuffer(get(descriptor, extent.start + start, stop - start, extent.path), np.uint8)
        self._put(found.data, start)
        return found

    def contents(self) -> Iterator[memoryview]:
        """All bytes, in pieces."""
        for start in range(0, self.nbytes, SPAN):
            yield self.raw(start, min(start + SPAN, self.nbytes)).data

    def read_range(self, start: int, stop: int) -> Array:
        dtype = numpy_dtype(self.spec.dtype)
        return self.raw(start * dtype.itemsize, stop * dtype.itemsize).view(dtype)

    def read_box(self, box: Box) -> Array:
        return np.array(select(self.read_range(0, self.spec.size).reshape(self.spec.shape), box))


def whole_of(delta: "Delta", row: LeafRow) -> Patched:
    """A leaf that a delta holds whole."""
    assert row.spec is not None
    found = delta.payload.whole(row.held) or Zeros(row.spec)
    if found.spec != row.spec or row.spec.nbytes > delta.payload.nbytes:
        held = f"{delta.payload.nbytes:,} bytes" if found.spec == row.spec else str(found.spec)
        raise BadCheckpoint(f"{delta.called(row)}: the delta says {row.spec} and holds {held}")
    return Patched(found, delta.payload.changes(row.held, row.nbytes, itemsize_of(row.spec)))
