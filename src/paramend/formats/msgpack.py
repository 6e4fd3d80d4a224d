"""The format of `flax.serialization.to_bytes`: a msgpack value of nested maps that hold arrays.

Opening walks the structure and skips the bytes of arrays, which are contiguous. Neither flax nor the
msgpack package is needed.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paramend.errors import BadCheckpoint
from paramend.formats.files import FileSource, OpenFile
from paramend.formats.limits import MAX_AXES, U64, most_elements, shown
from paramend.formats.msgpack_writer import ARRAY, CHUNKED, COMPLEX, SCALAR, Extension, MsgpackWriter
from paramend.formats.source import padded
from paramend.formats.structure import Walk
from paramend.leaves.nested import MAX_DEPTH
from paramend.leaves.origins.origin import Extent
from paramend.leaves.outlines import Outline, outline
from paramend.leaves.specs import BITS, Array, Spec, numpy_dtype
from paramend.reports import wording

# A file of a hundred million empty lists would become a hundred million objects.
_MAX_VALUES = 4_000_000
_WINDOW = 1 << 16


@dataclass(frozen=True, slots=True)
class MsgpackEntry:
    """One array of a file."""

    spec: Spec  # shape and dtype; a dtype that only numpy has, such as str96, is "raw<str96>"
    # Where its bytes are, as (start, length), in order: one piece, or several for an array above 1 GB.
    pieces: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(length for _, length in self.pieces)


# By the first byte of a value: what it is, and the width of its length.
_SIZED, _COUNTED = ((0xC4, "bytes"), (0xC7, "ext"), (0xD9, "text")), ((0xDC, "list"), (0xDE, "map"))
_KINDS = {first + step: (kind, 1 << step) for first, kind in _SIZED for step in range(3)}
_KINDS |= {first + step: (kind, 2 << step) for first, kind in _COUNTED for step in range(2)}
_NUMBERS = dict(enumerate((">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), 0xCA))
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


@dataclass(slots=True)
class _Open:
    """A map or a list of which some entries are still to be read; `key` is that of the next value of a map."""

    start: int
    held: Any
    left: int
    key: Any = None

    def take(self, value: Any) -> None:
        if type(self.held) is dict:
            self.held[self.key] = value
        else:
            self.held.append(value)


class Parser:
    """The structure of a file, read forwards; the bytes of arrays are skipped."""

    def __init__(self, file: OpenFile) -> None:
        self.file = file
        self.at = 0
        self.stop = file.size
        self._window, self._base = b"", 0
        self._room = _MAX_VALUES

    def root(self) -> Any:
        if not self.file.size:
            raise BadCheckpoint(f"{self.file.path}: byte 0: the file is empty")
        found = self._value()
        if self.at != self.file.size:
            left = wording.plural(self.file.size - self.at, "byte")
            raise self._bad(self.at, f"{left} after its end belong to nothing")
        return found

    def _bad(self, at: int, reason: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.file.path}: byte {at:,}: {reason}")

    def _take(self, nbytes: int) -> bytes:
        start = self.at
        self._skip(nbytes)
        low = start - self._base
        if low < 0 or low + nbytes > len(self._window):
            if nbytes > _WINDOW:
                return self.file.read(start, nbytes)
            self._window, self._base = self.file.read(start, min(_WINDOW, self.file.size - start)), start
            low = 0
        return self._window[low : low + nbytes]

    def _skip(self, nbytes: int) -> None:
        if nbytes > self.stop - self.at:
            whole = self.stop == self.file.size
            reason = "the file is cut short" if whole else "a value runs past the array that holds it"
            raise self._bad(self.at, f"{reason}: {wording.plural(nbytes, 'byte')} should follow")
        self.at += nbytes

    def _head(self) -> tuple[str, Any]:
        """What comes next: a kind and its length, or "value" and the value."""
        start = self.at
        first = self._take(1)[0]
        if first < 0x80:
            return "value", first
        if first < 0x90:
            return "map", first & 0x0F
        if first < 0xA0:
            return "list", first & 0x0F
        if first < 0xC0:
            return "text", first & 0x1F
        if first >= 0xE0:
            return "value", first - 256
        if first in _CONSTANTS:
            return "value", _CONSTANTS[first]
        if first in _NUMBERS:
            form = _NUMBERS[first]
            return "value", struct.unpack(form, self._take(struct.calcsize(form)))[0]
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        if first in _KINDS:
            kind, width = _KINDS[first]
            return kind, int.from_bytes(self._take(width), "big")
        raise self._bad(start, f"no msgpack value begins with {first:#04x}")

    def _value(self) -> Any:
        open_: list[_Open] = []
        found = self._begin(open_)
        while open_:
            top = open_[-1]
            if found is not top:
                top.take(found)
            if top.left:
                top.left -= 1
                if type(top.held) is dict:
                    top.key = self._key(top.held)
                found = self._begin(open_)
            else:
                open_.pop()
                joined = type(top.held) is dict and CHUNKED in top.held
                found = self._joined(top.start, top.held) if joined else top.held
        return found

    def _begin(self, open_: list["_Open"]) -> Any:
        start = self.at
        kind, length = self._head()
        self._room -= 1
        if self._room < 0:
            raise self._bad(start, f"there are more than {_MAX_VALUES:,} values")
        if kind == "value":
            return length
        if kind == "text":
            return self._text(length)
        if kind == "bytes":
            return self._take(length)
        if kind == "ext":
            return self._extension(length)
        # Each entry takes at least one byte: no list is longer than the file.
        if length * (2 if kind == "map" else 1) > self.stop - self.at:
            raise self._bad(start, f"a {kind} of {length:,} entries does not fit into the rest of the file")
        if len(open_) >= MAX_DEPTH:
            raise self._bad(start, f"maps and lists are nested more than {MAX_DEPTH} levels deep")
        open_.append(_Open(start, {} if kind == "map" else [], length))
        return open_[-1]

    def _text(self, length: int) -> str:
        start = self.at
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._bad(start, "a string is not UTF-8") from None

    def _key(self, held: dict[Any, Any]) -> str | int:
        here = self.at
        key = self._begin([])
        if type(key) not in (str, int):
            raise self._bad(here, "a key is neither text nor a whole number")
        if key in held:
            raise self._bad(here, f"the key {shown(key) if type(key) is str else key} appears twice in one map")
        found: str | int = key
        return found

    def _extension(self, length: int) -> Any:
        code = int.from_bytes(self._take(1), "big", signed=True)
        if code not in (ARRAY, COMPLEX, SCALAR):
            return Extension(code, self._take(length))
        start, outer = self.at, self.stop
        if length > self.stop - self.at:
            self._skip(length)
        self.stop = start + length
        found = self._complex() if code == COMPLEX else self._array()
        if self.at != self.stop:
            left = wording.plural(self.stop - self.at, "byte")
            raise self._bad(self.at, f"{left} too many in the array at {start:,}")
        if code == SCALAR and isinstance(found, MsgpackEntry) and found.spec.shape:
            raise self._bad(start, f"a scalar cannot have the shape {found.spec.shape}")
        self.stop = outer
        return found

    def _complex(self) -> complex:
        start = self.at
        if self._head() != ("list", 2):
            raise self._bad(start, "a complex number of two parts is expected")
        parts = [self._head() for _ in range(2)]
        if any(kind != "value" or type(part) not in (int, float) for kind, part in parts):
            raise self._bad(start, "a complex number of two numbers is expected")
        return complex(parts[0][1], parts[1][1])

    def _array(self) -> MsgpackEntry:
        start = self.at
        if self._head() != ("list", 3):
            raise self._bad(start, "an array of shape, dtype and bytes is expected")
        kind, ndim = self._head()
        if kind != "list" or ndim > self.stop - self.at:
            raise self._bad(start, "a shape is expected")
        shape = list[int]()
        for _ in range(ndim):
            kind, axis = self._head()
            if kind != "value" or type(axis) is not int or axis < 0:
                raise self._bad(start, "a shape of whole numbers is expected")
            shape.append(axis)
        kind, length = self._head()
        if kind not in ("text", "bytes") or length > 100:
            raise self._bad(start, "the name of a dtype is expected")
        try:
            dtype = self._take(length).decode("ascii")
        except UnicodeDecodeError:
            raise self._bad(start, "the name of the dtype is not ASCII") from None
        kind, length = self._head()
        if kind not in ("text", "bytes"):
            raise self._bad(start, "the bytes of an array are expected")
        place = self.at
        self._skip(length)
        spec = self._spec(start, tuple(shape), dtype)
        # A dtype of less than 8 bits takes one byte per value, as in numpy's memory.
        takes = spec.size * max(BITS.get(spec.dtype, 0) // 8, 1)
        if spec.dtype in BITS and takes != length:
            raise self._bad(start, f"{spec} takes {wording.plural(takes, 'byte')}, but {length:,} are there")
        return MsgpackEntry(spec, ((place, length),))

    def _spec(self, start: int, shape: tuple[int, ...], dtype: str) -> Spec:
        if len(shape) > MAX_AXES:
            raise self._bad(start, f"a shape of {len(shape):,} axes")
        if most_elements(shape) * 16 >= U64:
            raise self._bad(start, "the number of elements overflows 64 bits")
        return Spec(shape, dtype if dtype in BITS else f"raw<{dtype}>")

    def _joined(self, start: int, table: dict[Any, Any]) -> MsgpackEntry:
        """The array that flax split: a map of shape and pieces."""
        shape, chunks = table.get("shape"), table.get("chunks")
        if set(table) != {CHUNKED, "shape", "chunks"} or type(shape) is not dict or type(chunks) is not dict:
            raise self._bad(start, "an array in chunks has the keys shape and chunks, and nothing else")
        axes = [shape.get(str(i)) for i in range(len(shape))]
        pieces = [chunks.get(str(i)) for i in range(len(chunks))]
        if any(type(axis) is not int or axis < 0 for axis in axes):
            raise self._bad(start, "a shape of whole numbers, by position, is expected")
        flat = [piece for piece in pieces if type(piece) is MsgpackEntry and len(piece.spec.shape) == 1]
        if not flat or len(flat) != len(pieces) or len({piece.spec.dtype for piece in flat}) != 1:
            raise self._bad(start, "flat pieces of one dtype, by position, are expected")
        spec = self._spec(start, tuple(axis for axis in axes if axis is not None), "")
        spec = Spec(spec.shape, flat[0].spec.dtype)
        size = sum(piece.spec.size for piece in flat)
        if spec.size != size:
            raise self._bad(start, f"the pieces of {spec} have {wording.plural(size, 'element')}")
        return MsgpackEntry(spec, tuple(place for piece in flat for place in piece.pieces))


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
