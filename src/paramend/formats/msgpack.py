"""The format of `flax.serialization.to_bytes`: a msgpack value of nested maps that hold arrays.

Opening walks the structure and skips the bytes of arrays, which are contiguous. Neither flax nor the
msgpack package is needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paramend.errors import BadCheckpoint
from paramend.formats.files import FileSource
from paramend.formats.limits import MAX_PIECES
from paramend.formats.msgpack_parser import MsgpackEntry, Parser, shown_key
from paramend.formats.msgpack_writer import MsgpackWriter
from paramend.formats.source import padded
from paramend.leaves.leaves import Index
from paramend.leaves.origins.origin import Extent
from paramend.leaves.outlines import Outline, outline, shown
from paramend.leaves.specs import BITS, Array, numpy_dtype

WRITER = MsgpackWriter()


class MsgpackFile(FileSource):
    r"""One file of `flax.serialization.to_bytes` or `msgpack_serialize` as `Leaves`. Opening skips the arrays.

    Arrays and numpy scalars anywhere in nested maps and lists are leaves, numbered in the order of the file. Use it as
    a context manager, or `close()` it; arrays that were read stay valid.

    Attributes:
        index: the names; keys of maps and positions of lists, joined by "/".
        metadata: what else is in the structure, by path: numbers, text, None, lists of these, empty maps.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "model.msgpack")
    >>> array = b"\x93\x91\x02\xa4int8\xc4\x02\x07\x08"  # shape, dtype, bytes
    >>> _ = path.write_bytes(b"\x82\xa1w\xc7" + bytes([len(array), 1]) + array + b"\xa4step\x05")
    >>> with MsgpackFile(path) as file:
    ...     print(file.index.path(0), file.spec(0), file.read(0).tolist(), file.metadata)
    w int8[2] [7, 8] {'step': 5}
    """

    format = "msgpack"
    rows: Sequence[MsgpackEntry]

    def _begin(self) -> None:
        self._structure = Parser(self._file).root()
        walk = _Walk(self._structure, self.path, room=self._file.size)
        self.index, self.rows = walk.index, walk.arrays
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


# ---- the tree ------------------------------------------------------------------------------------------------


class _Walk:
    """The leaves of a structure.

    Attributes:
        others: path → what neither is nor holds an array; lists of plain values are kept whole.
    """

    def __init__(self, root: Any, path: Path, *, room: int) -> None:
        self._room = 64_000_000 + 16 * room  # for the characters of all paths: many values may be under a long key
        self.index = Index("/")
        self.arrays: list[MsgpackEntry] = []
        self.others: dict[str, Any] = {}
        self._file = path
        self._trail: list[Any] = []
        if type(root) is MsgpackEntry:
            self._visit({"": root}, self.index.names, 0)
        elif type(root) in (dict, list) and root:
            self._visit(root, self.index.names, 0)
        elif type(root) is not dict:
            self.others[""] = root

    def _visit(self, node: Any, names: dict[Any, Any], pieces: int) -> None:
        for key, child in node.items() if type(node) is dict else enumerate(node):
            self._trail.append(key)
            below = pieces + (key.count(".") + key.count("/") if type(key) is str else 0) + 1
            if below > MAX_PIECES:
                place = shown_key(self._path())
                raise BadCheckpoint(f"{self._file}: {place}: the name has more than {MAX_PIECES} pieces")
            self._room -= sum(len(key) if type(key) is str else 20 for key in self._trail)
            if self._room < 0:
                raise BadCheckpoint(f"{self._file}: too many values are under long keys")
            if type(child) is MsgpackEntry:
                number = len(self.arrays)
                self.arrays.append(child)
                self.index.numbers.append(number)
                self.index.add(names, key, number)
            elif _is_plain(child):
                self.others[self._path()] = child
            else:
                inner: dict[Any, Any] = {}
                self._visit(child, inner, below)
                if inner:
                    self.index.add(names, key, inner)
            self._trail.pop()

    def _path(self) -> str:
        return shown(tuple(self._trail))


def _is_plain(node: Any) -> bool:
    """Whether it is not a container, is an empty one, or is a list of plain values."""
    if type(node) is list:
        return not any(type(child) in (dict, list, MsgpackEntry) for child in node)
    return type(node) is not dict or not node
