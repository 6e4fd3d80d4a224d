"""The format of `flax.serialization.to_bytes`: a msgpack value of nested maps that hold arrays.

Opening walks the structure and skips the bytes of arrays, which are contiguous. Neither flax nor the
msgpack package is needed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from paramend.formats.files import FileSource
from paramend.formats.msgpack_parser import MsgpackEntry, Parser
from paramend.formats.msgpack_writer import MsgpackWriter
from paramend.formats.source import padded
from paramend.formats.structure import Walk
from paramend.leaves.origins.origin import Extent
from paramend.leaves.outlines import Outline, outline
from paramend.leaves.specs import BITS, Array, numpy_dtype

WRITER = MsgpackWriter()


class MsgpackFile(FileSource):
    """One file of `flax.serialization.to_bytes` or `msgpack_serialize` as `Leaves`. Opening skips the arrays. Arrays
    and numpy scalars anywhere in nested maps and lists are leaves, numbered in the order of the file."""

    format = "msgpack"
    rows: Sequence[MsgpackEntry]

    def _begin(self) -> None:
        self._structure = Parser(self._file).root()
        walk = _Walk(self._structure, str(self.path), room=self._file.size)
        self.index, self.rows = walk.index, walk.leaves  # the names; keys of maps and positions of lists, joined by "/"
        # What else is in the structure, by path: numbers, text, None, lists of these, empty maps.
        self.metadata: Mapping[str, Any] = walk.others

    def outline(self) -> Outline:
        numbers = iter(range(len(self.rows)))
        return outline(self._structure, lambda node: next(numbers) if type(node) is MsgpackEntry else None, self.format)

    def refusal(self, number: int) -> str:
        dtype = self.spec(number).dtype
        if dtype.startswith("raw<"):
            return f"its dtype, {dtype[4:-1]!r}, is one that only numpy has: its bytes can only be copied"
        return padded(dtype)

    def extent(self, number: int) -> Extent | None:
        """Where the bytes of a leaf are; None if flax split it (above 1 GB), or if its values are padded."""
        entry = self.rows[number]
        if len(entry.pieces) != 1 or BITS.get(entry.spec.dtype, 8) % 8:
            return None
        return Extent(self.path, *entry.pieces[0])

    def _gathered(self, number: int, start: int, stop: int) -> Array:
        dtype = numpy_dtype(self.spec(number).dtype)
        buffer = np.empty((stop - start) * dtype.itemsize, np.uint8)
        first, at = start * dtype.itemsize, 0
        for place, length in self.rows[number].pieces:
            if first < length and at < len(buffer):
                count = min(length - first, len(buffer) - at)
                self._file.read_into(buffer[at : at + count].data, place + first)
                at += count
            first = max(first - length, 0)
        return buffer.view(dtype)


class _Walk(Walk):
    kind, separator = MsgpackEntry, "/"
