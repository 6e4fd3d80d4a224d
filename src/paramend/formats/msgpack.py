"""The format of `flax.serialization.to_bytes`: a msgpack value of nested maps that hold arrays.

Opening walks the structure and skips the bytes of arrays, which are contiguous. Neither flax nor the
msgpack package is needed.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paramend.errors import BadCheckpoint, Unsupported
from paramend.formats.files import FileSource, OpenFile
from paramend.formats.limits import MAX_PIECES, U64
from paramend.formats.msgpack_writer import ARRAY, CHUNKED, COMPLEX, SCALAR, Extension, MsgpackWriter
from paramend.formats.source import Extent, check_readable
from paramend.leaves.leaves import Index
from paramend.leaves.outlines import Outline, outline, shown
from paramend.leaves.specs import BITS, Array, Spec, numpy_dtype
from paramend.reports import wording

_MAX_DEPTH = 100
# A file of a hundred million empty lists would become a hundred million objects.
_MAX_VALUES = 4_000_000
_WINDOW = 1 << 16

WRITER = MsgpackWriter()


@dataclass(frozen=True, slots=True)
class MsgpackEntry:
    """One array of a file.

    Attributes:
        spec: shape and dtype; a dtype that only numpy has, such as str96, is "raw<str96>".
        pieces: where its bytes are, as (start, length), in order: one piece, or several for an array above 1 GB.
    """

    spec: Spec
    pieces: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """The number of its bytes in the file."""
        return sum(length for _, length in self.pieces)


class MsgpackFile(FileSource):
    r"""One file of `flax.serialization.to_bytes` or `msgpack_serialize` as `Leaves`. Opening skips the arrays.

    Arrays and numpy scalars anywhere in nested maps and lists are leaves, numbered in the order of the file. Use it as
    a context manager, or `close()` it; arrays that were read stay valid.

    Attributes:
        path: as the user gave it.
        index: the names; keys of maps and positions of lists, joined by "/".
        ties: nothing: in a file each array has one name.
        metadata: what else is in the structure, by path: numbers, text, None, lists of these, empty maps.
        arrays: of each leaf, its spec and where its bytes are.

    Raises:
        CannotRead: there is no such file, or no permission to read it.
        BadCheckpoint: it is damaged, or of another format.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "model.msgpack")
    >>> array = b"\x93\x91\x02\xa4int8\xc4\x02\x07\x08"  # shape, dtype, bytes
    >>> _ = path.write_bytes(b"\x82\xa1w\xc7" + bytes([len(array), 1]) + array + b"\xa4step\x05")
    >>> with MsgpackFile(path) as file:
    ...     print(file.index.path(0), file.spec(0), file.read(0).tolist(), file.metadata)
    w int8[2] [7, 8] {'step': 5}
    """

    format = "msgpack"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = OpenFile(path)
        self.path = self._file.path
        self.ties: Mapping[int, int] = {}
        try:
            self._structure = _Parser(self._file).root()
            walk = _Walk(self._structure, self.path)
        except BaseException:
            self.close()
            raise
        self.index, self.arrays = walk.index, walk.arrays
        self.metadata: Mapping[str, Any] = walk.others

    # ---- what is there ---------------------------------------------------------------------------------------

    def outline(self) -> Outline:
        """What is there, with true keys."""
        numbers = iter(range(len(self.arrays)))
        return outline(self._structure, lambda node: next(numbers) if type(node) is MsgpackEntry else None, self.format)

    def spec(self, number: int) -> Spec:
        """Shape and dtype of a leaf; a dtype that only numpy has, such as str96, is "raw<str96>"."""
        return self.arrays[number].spec

    def nbytes(self, number: int) -> int:
        """The bytes of a leaf in the file."""
        return self.arrays[number].nbytes

    def refusal(self, number: int) -> str:
        """Why a leaf cannot be read as an array, or ""."""
        dtype = self.spec(number).dtype
        if dtype.startswith("raw<"):
            return f"its dtype, {dtype[4:-1]!r}, is one that only numpy has: its bytes can only be copied"
        # No other format stores integers of 4 bits; for these floats other formats expect packed bytes.
        if BITS[dtype] % 8 and dtype.startswith("float"):
            return f"its values, {dtype}, of {BITS[dtype]} bits, take one byte each here, but are packed elsewhere"
        return ""

    def extent(self, number: int) -> Extent | None:
        """Where the bytes of a leaf are; None if flax split it (above 1 GB), or if its values are padded."""
        entry = self.arrays[number]
        if len(entry.pieces) != 1 or BITS.get(entry.spec.dtype, 8) % 8:
            return None
        return Extent(self.path, *entry.pieces[0])

    # ---- reading ---------------------------------------------------------------------------------------------

    def read(self, number: int) -> Array:
        """The array, read-only; memory-mapped if it is aligned and contiguous in the file.

        Raises:
            Unsupported: the dtype is one that only numpy has.
            BadCheckpoint: the file has become shorter since it was opened.
        """
        check_readable(self, number)
        entry = self.arrays[number]
        dtype = numpy_dtype(entry.spec.dtype)
        flat: Array
        if len(entry.pieces) == 1 and entry.nbytes:
            flat = np.frombuffer(self._file.map, np.uint8, entry.nbytes, entry.pieces[0][0]).view(dtype)
            if not flat.flags.aligned:
                flat = flat.copy()
        else:
            flat = self.read_range(number, 0, entry.spec.size)
        flat.flags.writeable = False
        try:
            return flat.reshape(entry.spec.shape)
        except ValueError as error:  # more axes, or longer ones around an axis of length 0, than numpy allows
            raise Unsupported(f"numpy has no array of shape {entry.spec.shape}: {error}") from error

    def read_range(self, number: int, start: int, stop: int) -> Array:
        """The elements `start` to `stop` of a leaf in C order: a new array with one axis, of bounded memory.

        Raises:
            Unsupported: the dtype is one that only numpy has.
            BadCheckpoint: the file has become shorter since it was opened.
        """
        check_readable(self, number)
        entry = self.arrays[number]
        dtype = numpy_dtype(entry.spec.dtype)
        buffer = np.empty((stop - start) * dtype.itemsize, np.uint8)
        first, at = start * dtype.itemsize, 0
        for place, length in entry.pieces:
            if first < length and at < len(buffer):
                count = min(length - first, len(buffer) - at)
                self._file.read_into(buffer[at : at + count].data, place + first)
                at += count
            first = max(first - length, 0)
        return buffer.view(dtype)


# ---- values of msgpack -----------------------------------------------------------------------------------------

_KINDS = {
    0xC4: ("bytes", 1),
    0xC5: ("bytes", 2),
    0xC6: ("bytes", 4),
    0xC7: ("ext", 1),
    0xC8: ("ext", 2),
    0xC9: ("ext", 4),
    0xD9: ("text", 1),
    0xDA: ("text", 2),
    0xDB: ("text", 4),
    0xDC: ("list", 2),
    0xDD: ("list", 4),
    0xDE: ("map", 2),
    0xDF: ("map", 4),
}
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


class _Parser:
    """The structure of a file, read forwards; the bytes of arrays are skipped."""

    def __init__(self, file: OpenFile) -> None:
        self.file = file
        self.at = 0
        self.stop = file.size
        self._window, self._base = b"", 0
        self._room = _MAX_VALUES
        self._depth = 0

    def root(self) -> Any:
        if not self.file.size:
            raise BadCheckpoint(f"{self.file.path}: byte 0: the file is empty")
        found = self._value()
        if self.at != self.file.size:
            raise self._bad(
                self.at, f"{wording.plural(self.file.size - self.at, 'byte')} after its end belong to nothing"
            )
        return found

    def _bad(self, at: int, reason: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.file.path}: byte {at:,}: {reason}")

    def _take(self, nbytes: int) -> bytes:
        """The next bytes, buffered by a window on the file."""
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
            reason = (
                "the file is cut short" if self.stop == self.file.size else "a value runs past the array that holds it"
            )
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
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._bad(start, f"maps and lists are nested more than {_MAX_DEPTH} levels deep")
        found = self._map(start, length) if kind == "map" else [self._value() for _ in range(length)]
        self._depth -= 1
        return found

    def _text(self, length: int) -> str:
        start = self.at
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._bad(start, "a string is not UTF-8") from None

    def _map(self, start: int, length: int) -> Any:
        found: dict[Any, Any] = {}
        for _ in range(length):
            here = self.at
            key = self._value()
            if type(key) not in (str, int):
                raise self._bad(here, "a key is neither text nor a whole number")
            if key in found:
                raise self._bad(here, f"the key {_shown(key)} appears twice in one map")
            found[key] = self._value()
        return self._joined(start, found) if CHUNKED in found else found

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
            raise self._bad(
                self.at, f"{wording.plural(self.stop - self.at, 'byte')} too many in the array at {start:,}"
            )
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
        shape = []
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
        elements = 1
        for axis in shape:
            elements *= axis
            if elements * 16 >= U64:
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


def _shown(key: Any) -> str:
    text = repr(key)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text):,} characters)"


# ---- the tree ------------------------------------------------------------------------------------------------


class _Walk:
    """The leaves of a structure.

    Attributes:
        index: the names.
        arrays: by number.
        others: path → what neither is nor holds an array; lists of plain values are kept whole.
    """

    def __init__(self, root: Any, path: Path) -> None:
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
                place = _shown(self._path())
                raise BadCheckpoint(f"{self._file}: {place}: the name has more than {MAX_PIECES} pieces")
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
