"""The format of `numpy.savez`: a zip archive with a file `.npy` for each array.

Opening reads the zip's directory and the header of each array; nothing is ever unpickled. Uncompressed arrays are
contiguous and are memory-mapped. Those of `numpy.savez_compressed` are decompressed on demand.
"""

import ast
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paramend.errors import BadCheckpoint, RenameClash
from paramend.formats.files import OpenFile
from paramend.formats.limits import MAX_AXES, MAX_PIECES, U64, is_deep, is_within, most_elements, shown
from paramend.formats.source import Item, LeafBytes, Parts, Writer, check_readable, in_numpy
from paramend.formats.zips import ALIGNMENT, STORED, Archive, Member, ZipHeaders, ZipSource
from paramend.leaves.leaves import Index, separator_of
from paramend.leaves.origins.origin import Extent
from paramend.leaves.outlines import Outline
from paramend.leaves.specs import BITS, Array, Spec, numpy_dtype
from paramend.reports import wording

MAGIC = b"\x93NUMPY"
# The dtypes that numpy can name: it saves those of ml_dtypes as void.
_NATIVE = ["bool", "float16", "float32", "float64", "complex64", "complex128"]
_NATIVE += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
DESCRS = {name: np.dtype(name).newbyteorder("<").str for name in _NATIVE}

MAX_HEADER = 1 << 16
_MAX_OTHER = 1 << 20
_DEFLATED = 8
# Deflate makes at most 258 bytes of 2 bits; a member that claims more is a bomb or damaged.
_MOST_DEFLATE = 1032
_PIECE = 1 << 18

# numpy has no names for the dtypes of ml_dtypes and saves them as void, except float8_e5m2, whose kind and width are
# unique.
_CODES = {descr[1:]: name for name, descr in DESCRS.items()} | {"f1": "float8_e5m2"}


@dataclass(frozen=True, slots=True)
class NpzEntry:
    """One array of a file."""

    name: str  # as `numpy.load` has it
    member: str  # the name of its member in the zip
    spec: Spec  # shape and dtype; a dtype that only numpy has, such as text, is "raw<U3>"
    head: int  # the bytes before the array in its member
    nbytes: int
    fortran: bool  # whether the first axis varies fastest in the file
    swapped: bool  # whether numbers are big-endian
    sealed: str  # why it cannot be read, or ""

    @property
    def straight(self) -> bool:
        """Whether the bytes in the member are those of the array in C order, little-endian."""
        return not self.fortran and not self.swapped


class NpzFile(ZipSource):
    """One file of `numpy.savez` as `Leaves`. Opening reads the zip's directory and the header of each array."""

    format = "npz"
    rows: Sequence[NpzEntry]

    def _begin(self) -> None:
        self._stream: _Stream | None = None
        _check_kind(self._file)
        self.archive = Archive(self._file)
        members = self.archive.members.values()
        for member in members:
            _check_member(self.archive, member)
        self.rows = [_entry(self.archive, member) for member in members if member.name.endswith(".npy")]
        names = [entry.name for entry in self.rows]
        # The names; its separator is "/" where the file's own names hold "/" and no ".".
        self.index = Index.of_names(names, separator_of(names))
        # What else is in the archive, by name, as bytes.
        others = [member for member in members if not member.name.endswith(".npy")]
        self.metadata: Mapping[str, Any] = {member.name: _other(self.archive, member) for member in others}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}  # a copy starts over

    def refusal(self, number: int) -> str:
        return self.rows[number].sealed

    def extent(self, number: int) -> Extent | None:
        """Where the bytes of a leaf are; None if they are compressed, big-endian, or in Fortran order."""
        entry = self.rows[number]
        place = self._place(entry) if entry.straight else None
        return None if place is None else Extent(self.path, place, entry.nbytes)

    def read(self, number: int) -> Array:
        entry = self.rows[number]
        if entry.straight:
            return super().read(number)
        check_readable(self, number)
        place = None if entry.swapped or not entry.nbytes else self._place(entry)
        flat = self._stretch(entry, 0, entry.spec.size) if place is None else self._mapped(place, entry.spec)
        flat.flags.writeable = False
        with in_numpy(entry.spec.shape):
            return flat.reshape(entry.spec.shape, order="F" if entry.fortran else "C")

    def _gathered(self, number: int, start: int, stop: int) -> Array:
        # Memory is bounded, unless the array is in Fortran order. Ranges in a row share one decompression.
        entry = self.rows[number]
        return super()._gathered(number, start, stop) if entry.fortran else self._stretch(entry, start, stop)

    def _stretch(self, entry: NpzEntry, start: int, stop: int) -> Array:
        """The elements from `start` to `stop` in the order of the file."""
        place, dtype = self._place(entry), numpy_dtype(entry.spec.dtype)
        buffer = np.empty((stop - start) * dtype.itemsize, np.uint8)
        if place is None:
            self._inflate(entry, start * dtype.itemsize, buffer.data)
        else:
            self._file.read_into(buffer.data, place + start * dtype.itemsize)
        found = buffer.view(dtype)
        return found.byteswap() if entry.swapped else found

    def _place(self, entry: NpzEntry) -> int | None:
        """The offset of the first byte of an array; None if it is compressed."""
        stored = self.archive.members[entry.member].method == STORED
        return self.archive.offsets(entry.member).start + entry.head if stored else None

    def _inflate(self, entry: NpzEntry, start: int, view: memoryview) -> None:
        if not entry.nbytes:
            return
        start += entry.head
        stream = self._stream
        if stream is None or stream.member.name != entry.member or stream.at > start:
            stream = self._stream = _Stream(self.archive, self.archive.members[entry.member])
        try:
            stream.skip(start - stream.at)
            stream.read_into(view)
            if stream.at == stream.member.nbytes:
                stream.finish()
        except BaseException:
            self._stream = None  # its position is unknown
            raise


class _Stream:
    """A compressed member, decompressed from its first byte to its last in bounded memory."""

    def __init__(self, archive: Archive, member: Member) -> None:
        self.archive, self.member = archive, member
        self.at = 0
        self._next, self._left = archive.offsets(member.name).start, member.packed
        self._inflater = zlib.decompressobj(-15)
        self._crc = 0

    def pull(self, most: int) -> bytes:
        """Up to so many bytes, and at least one."""
        while True:
            packed = self._packed()
            if not packed or self._inflater.eof:
                raise self.archive.bad(self.member.name, "it decompresses to fewer bytes than the file says")
            data = self._decompress(packed, most)
            if data:
                self.at += len(data)
                self._crc = zlib.crc32(data, self._crc)
                return data

    def read_into(self, view: memoryview) -> None:
        while view:
            data = self.pull(min(len(view), _PIECE))
            view[: len(data)] = data
            view = view[len(data) :]

    def skip(self, nbytes: int) -> None:
        while nbytes:
            nbytes -= len(self.pull(min(nbytes, _PIECE)))

    def finish(self) -> None:
        """Check that the member ends here, and that its bytes match their checksum."""
        while not self._inflater.eof:
            packed = self._packed()
            if not packed:
                raise self.archive.bad(self.member.name, "its compressed bytes are cut short")
            if self._decompress(packed, 1):
                raise self.archive.bad(self.member.name, "it decompresses to more bytes than the file says")
        if self._crc != self.member.crc:
            raise self.archive.bad(self.member.name, "its bytes do not match their checksum (CRC32)")

    def _packed(self) -> bytes:
        """Compressed bytes that were not used, or the next ones; none at the end."""
        packed = self._inflater.unconsumed_tail
        if not packed and not self._inflater.eof:
            packed = self.archive.file.read(self._next, min(self._left, _PIECE))
            self._next, self._left = self._next + len(packed), self._left - len(packed)
        return packed

    def _decompress(self, packed: bytes, most: int) -> bytes:
        try:
            return self._inflater.decompress(packed, most)
        except zlib.error as error:
            raise self.archive.bad(self.member.name, f"its compressed bytes are damaged: {error}") from None


def _check_kind(file: OpenFile) -> None:
    if not file.size:
        raise BadCheckpoint(f"{file.path}: the file is empty")
    head = file.read(0, min(8, file.size))
    if head.startswith(MAGIC):
        hint = f"numpy.savez('arrays.npz', numpy.load({str(file.path)!r}))"
        raise BadCheckpoint(f"{file.path}: it is one array of numpy.save, not a file of numpy.savez", hint=hint)
    if not head.startswith(b"PK"):
        raise BadCheckpoint(f"{file.path}: it is not a file of numpy.savez (not a zip file)")


def _check_member(archive: Archive, member: Member) -> None:
    if member.method not in (STORED, _DEFLATED):
        raise archive.bad(member.name, f"it is compressed by method {member.method}, but numpy uses only deflate")
    if member.method == _DEFLATED and member.nbytes > _MOST_DEFLATE * member.packed:
        most = "more than deflate can produce"
        raise archive.bad(member.name, f"{member.packed:,} bytes would become {member.nbytes:,}, {most}")


def _other(archive: Archive, member: Member) -> bytes:
    """The bytes of a member that is not an array: `numpy.load` returns these too."""
    if member.nbytes > _MAX_OTHER:
        raise archive.bad(member.name, f"it is not an array (.npy), and {member.nbytes:,} bytes long")
    if member.method == STORED:
        return archive.read(member.name)
    stream, buffer = _Stream(archive, member), bytearray(member.nbytes)
    stream.read_into(memoryview(buffer))
    stream.finish()
    return bytes(buffer)


def _entry(archive: Archive, member: Member) -> NpzEntry:
    name = member.name.removesuffix(".npy")
    if is_deep(name):
        raise archive.bad(member.name, f"the name has more than {MAX_PIECES} pieces")
    head = _Head(archive, member)
    prefix = head.take(8)
    if prefix[:6] != MAGIC or prefix[6] not in (1, 2, 3) or prefix[7]:
        raise archive.bad(member.name, "it does not begin like a .npy file of version 1, 2 or 3")
    width = 2 if prefix[6] == 1 else 4
    length = int.from_bytes(head.take(width), "little")
    if length > MAX_HEADER:
        raise archive.bad(member.name, f"a header of {length:,} bytes is too long")
    raw = head.take(length)
    try:
        descr, fortran, shape = _fields(raw.decode("utf-8" if prefix[6] == 3 else "latin1"))
    except ValueError as error:
        raise archive.bad(member.name, f"its header cannot be read: {error}") from None
    start = 8 + width + length
    nbytes = member.nbytes - start
    if len(shape) > MAX_AXES:
        raise archive.bad(member.name, f"its header, shape: {len(shape):,} axes are too many")
    if max((most_elements(shape), *shape)) >= U64:
        raise archive.bad(member.name, "its header, shape: the number of elements overflows 64 bits")
    dtype, swapped, sealed = _dtype(descr)
    spec = Spec(shape, dtype)
    if dtype in BITS and spec.nbytes != nbytes:
        raise archive.bad(member.name, f"{spec} takes {wording.plural(spec.nbytes, 'byte')}, but {nbytes:,} are there")
    # If at most one axis is longer than 1, both orders are the same.
    fortran = fortran and sum(axis != 1 for axis in shape) > 1
    return NpzEntry(name, member.name, spec, start, nbytes, fortran, swapped, sealed)


def _dtype(descr: Any) -> tuple[str, bool, str]:
    """The name of a dtype, whether its numbers are big-endian, and why it cannot be read."""
    if not isinstance(descr, str):
        return "raw<struct>", False, "it is a structured array: each element holds several values"
    order, code = descr[:1], descr[1:]
    known = _CODES.get(code)
    one_byte = known is not None and BITS[known] == 8
    if known is not None and (order in "<>" or (order == "|" and one_byte)):
        return known, order == ">" and not one_byte, ""
    dtype = f"raw<{code}>"
    if code[:1] == "O":
        return dtype, False, "it holds Python objects in a pickle, which is a program and is never run"
    if code[:1] == "V":
        said = "numpy saved it without the name of its dtype, as it does with bfloat16 and other dtypes of ml_dtypes"
        return dtype, False, f"{said}: its bytes can only be copied"
    return dtype, False, f"its dtype, {shown(descr)}, is one that only numpy has"


class _Head:
    """The first bytes of a member, taken in order."""

    def __init__(self, archive: Archive, member: Member) -> None:
        self.archive, self.member, self.at = archive, member, 0
        self.stream = None if member.method == STORED else _Stream(archive, member)

    def take(self, nbytes: int) -> bytes:
        if nbytes > self.member.nbytes - self.at:
            raise self.archive.bad(self.member.name, "it is cut short in the header of its array")
        if self.stream is None:
            data = self.archive.file.read(self.archive.offsets(self.member.name).start + self.at, nbytes)
        else:
            buffer = bytearray(nbytes)
            self.stream.read_into(memoryview(buffer))
            data = bytes(buffer)
        self.at += nbytes
        return data


_FIELDS = ("descr", "fortran_order", "shape")


def _fields(text: str) -> tuple[Any, bool, tuple[int, ...]]:
    """Dtype, order and shape from the header of a .npy file; `ValueError` if it is no such Python dict of constants."""
    text = re.sub(r"(?<=[0-9])L(?=[,)])", "", text.strip(" \n\0"))  # whole numbers as Python 2 wrote them
    try:
        node = ast.parse(text, mode="eval").body
        keys = [ast.literal_eval(key) for key in node.keys if key] if isinstance(node, ast.Dict) else []
        found = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ValueError("it is not a Python dict of constants") from None
    if sorted(map(str, keys)) != list(_FIELDS):
        raise ValueError(f"a dict of {wording.listing(_FIELDS)} is expected, each once")
    descr, fortran, shape = (found[name] for name in _FIELDS)
    if type(fortran) is not bool:
        raise ValueError("fortran_order is neither True nor False")
    if type(shape) is not tuple or any(type(axis) is not int or axis < 0 for axis in shape):
        raise ValueError("shape is not a tuple of whole numbers")
    if type(descr) not in (str, list, tuple):
        raise ValueError("descr does not name a dtype")
    return descr, fortran, shape


class NpzWriter(Writer):
    """Lays out files that `numpy.load` reads and maps: each leaf uncompressed, its bytes aligned. Other files of an
    archive are kept; all other metadata of a source has no place, and is left out. Each leaf needs a name of its own, a
    path within an archive."""

    seals = flat = True

    def refusal(self, spec: Spec) -> str:
        return "" if spec.dtype in DESCRS else f"numpy files cannot hold {spec.dtype}"

    def parts(self, items: Sequence[Item], metadata: Mapping[str, Any], outline: Outline | None = None) -> Parts:
        taken, read, zipped = set[str](), dict[str, Item](), ZipHeaders()
        for place, item in enumerate(items):
            _check_name(item.name, taken)
            other = read.setdefault(item.name.replace(".", "/"), item)
            if other is not item:
                both = f"{shown(other.name)} and {shown(item.name)} read the same"
                hint = "rename one of them, or save to .safetensors, .pt or .msgpack"
                raise RenameClash(f"{both}, and in a file of names nothing tells their keys apart", hint=hint)
            head = _head(item.spec)
            crc = 0 if item.nbytes else zlib.crc32(head)
            yield zipped.open(f"{item.name}.npy", len(head) + item.nbytes, crc)
            yield head
            yield LeafBytes(place, 0, item.nbytes)
            yield zipped.close()
        for name, data in metadata.items():
            if type(data) is bytes and not name.endswith(".npy"):
                _check_name(name, taken)
                yield from zipped.member(name, data)
        yield zipped.finish()


def _head(spec: Spec) -> bytes:
    """The header of an array in version 1.0 of the format, padded so that the array is aligned."""
    text = f"{{'descr': '{DESCRS[spec.dtype]}', 'fortran_order': False, 'shape': {spec.shape}, }}".encode()
    pad = -(len(MAGIC) + 4 + len(text) + 1) % ALIGNMENT
    return MAGIC + b"\1\0" + struct.pack("<H", len(text) + pad + 1) + text + b" " * pad + b"\n"


def _check_name(name: str, taken: set[str]) -> None:
    if not is_within(name) or ":" in name.partition("/")[0]:
        raise RenameClash(f"{shown(name)} is not a valid name in a zip file", hint="rename it first")
    if len(name.encode()) > 60_000:
        raise RenameClash(f"{shown(name)} is too long for a name in a zip file", hint="rename it first")
    if name in taken:
        raise RenameClash(f"two leaves would have the same name, {shown(name)}", hint="rename or delete one first")
    taken.add(name)


WRITER = NpzWriter()
