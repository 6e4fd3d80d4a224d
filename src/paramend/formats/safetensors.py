"""The safetensors format: a header that names every tensor and says where its bytes lie, then the bytes.

The reader is stricter than the reference where that one is lax: a name stands once. What the reference
refuses is refused here too, but for unknown dtypes: their bytes are listed and copied, never read or edited.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from paramend.errors import BadCheckpoint, RenameClash, Unsupported
from paramend.formats.files import FileSource, OpenFile
from paramend.formats.jsontext import bad, json_type, parse_object, shown
from paramend.formats.source import Extent
from paramend.leaves.leaves import Index, separator_of
from paramend.leaves.specs import BITS, FROM_SAFETENSORS, SAFETENSORS_CODES, Spec, numpy_dtype
from paramend.reports import wording

Array = np.ndarray[Any, Any]

MAX_HEADER = 100_000_000
# Names are trees of pieces; a name of a million pieces would be a tree too deep to walk.
MAX_PIECES = 200
_U64 = 2**64
_METADATA = "__metadata__"
# Under this key the metadata of a file may hold the record of how it was made.
RECORD = "paramend.record"

# What other files begin with, and what to say of them.
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file that it stands for", "git lfs pull"),
    (b"PK\x03\x04", "a zip file, as torch.save and numpy.savez write them, not safetensors", ""),
    (b"\x89HDF", "an HDF5 file, not safetensors", ""),
    (b"GGUF", "a GGUF file, not safetensors", ""),
    (b"\x1f\x8b", "compressed with gzip", "gunzip it first"),
    (b"\x80", "a Python pickle, as old versions of torch.save write it, not safetensors", ""),
    (b"<", "a web page (HTML or XML), not safetensors", "download the file itself"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: as it stands in the header.
        spec: shape and dtype; of a dtype that is unknown, such as code "I2", the dtype is "raw<I2>".
        start: where its bytes begin, counted from the end of the header.
        stop: where they end.
    """

    name: str
    spec: Spec
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """The number of its bytes in the file."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A header that keeps every rule of the format.

    Attributes:
        raw: the JSON text with its padding, as it stands in the file.
        entries: the tensors in the order of their bytes, which need not be the order of their names in `raw`.
        metadata: the strings under `__metadata__`; None if there are none.
    """

    raw: bytes
    entries: tuple[Entry, ...]
    metadata: Mapping[str, str] | None = None

    @property
    def nbytes(self) -> int:
        """The length of the header with the eight bytes that say how long it is; the data begins there."""
        return 8 + len(self.raw)

    @property
    def data_nbytes(self) -> int:
        """The number of bytes of all tensors."""
        return self.entries[-1].stop if self.entries else 0

    def to_bytes(self) -> bytes:
        """What the file begins with."""
        return len(self.raw).to_bytes(8, "little") + self.raw

    def edited(self, kept: Mapping[int, tuple[str, Spec]]) -> "Header":
        """The header of a file in which these tensors, by their places in `entries`, stay under these names and specs.

        Metadata, unknown fields and both orders stay. Where nothing changes the header stays byte for byte.

        Raises:
            RenameClash: two tensors would have one name.
            Unsupported: the format has no such dtype.

        >>> before = write_header({"w": Spec((2,), "float32"), "b": Spec((1,), "float32")})
        >>> [entry.name for entry in before.edited({1: ("bias", Spec((1,), "float32"))}).entries]
        ['bias']
        """
        if len(kept) == len(self.entries) and all(
            (entry.name, entry.spec) == kept.get(i) for i, entry in enumerate(self.entries)
        ):
            return self
        rows: dict[str, tuple[str, Any]] = {}
        before = json.loads(self.raw)
        entries: list[Entry] = []
        at = 0
        for i, entry in enumerate(self.entries):
            if i not in kept:
                continue
            name, spec = kept[i]
            row = before[entry.name]
            nbytes = entry.nbytes
            if spec != entry.spec:
                nbytes = spec.nbytes
                row |= {"dtype": _code(spec), "shape": list(spec.shape)}
            row["data_offsets"] = [at, at + nbytes]
            entries.append(Entry(name, spec, at, at + nbytes))
            rows[entry.name] = (name, row)
            at += nbytes
        table: dict[str, Any] = {}
        for old, row in before.items():
            if old == _METADATA:
                table[old] = row
            elif old in rows:
                table[_fresh(rows[old][0], table)] = rows[old][1]
        return Header(_encode(table), tuple(entries), self.metadata)


def layout(fields: Iterable[tuple[str, Spec, int]], metadata: Mapping[str, str] | None = None) -> Header:
    """The header of a new file that holds these tensors, given by name, spec and bytes, one after the other.

    Raises:
        RenameClash: two tensors have one name.
        Unsupported: the format has no such dtype.
    """
    table: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    entries: list[Entry] = []
    at = 0
    for name, spec, nbytes in fields:
        row = {"dtype": _code(spec), "shape": list(spec.shape), "data_offsets": [at, at + nbytes]}
        table[_fresh(name, table)] = row
        entries.append(Entry(name, spec, at, at + nbytes))
        at += nbytes
    return Header(_encode(table), tuple(entries), metadata)


def _fresh(name: str, table: Mapping[str, Any]) -> str:
    """The name, which must be new to the table and no name of the format's own."""
    if name == _METADATA:
        raise RenameClash(f"{_METADATA!r} is no name for a leaf: a safetensors file keeps its metadata there")
    if name in table:
        raise RenameClash(f"two leaves would have one name, {shown(name)}", hint="rename or delete one of them first")
    if name.count("/") + name.count(".") >= MAX_PIECES:
        raise RenameClash(f"{shown(name)} has more than {MAX_PIECES} pieces")
    return name


def write_header(specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None) -> Header:
    """The header of a new file that holds these tensors one after the other.

    Raises:
        Unsupported: the format has no such dtype.

    >>> write_header({"w": Spec((2, 2), "bfloat16")}).raw
    b'{"w":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}       '
    """
    return layout(((name, spec, spec.nbytes) for name, spec in specs.items()), metadata)


def annotated(raw: bytes, key: str, text: str) -> bytes:
    """The JSON text of a header with one more entry in its metadata.

    >>> annotated(b'{"__metadata__":{"format":"pt"}}', "note", "1")
    b'{"__metadata__":{"format":"pt","note":"1"}}     '
    """
    table = json.loads(raw)
    # transformers takes a file that says nothing of itself for one of torch, and asks one that says something.
    metadata = table.pop(_METADATA, None) or {"format": "pt"}
    return _encode({_METADATA: {**metadata, key: text}, **table})


def _code(spec: Spec) -> str:
    if spec.dtype.startswith("raw<"):  # bytes that are only copied, under the code that they came with
        return spec.dtype[4:-1]
    code = SAFETENSORS_CODES.get(spec.dtype)
    if code is None:
        raise Unsupported(f"a safetensors file cannot hold {spec.dtype}", hint=", ".join(SAFETENSORS_CODES))
    return code


def _encode(table: dict[str, Any]) -> bytes:
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    return text + b" " * (-len(text) % 8)  # so that the data begins aligned


# ---- reading a header --------------------------------------------------------------------------------------


def parse_header(raw: bytes, data_nbytes: int, *, file: str) -> Header:
    """The header, every rule checked.

    Args:
        raw: the JSON text.
        data_nbytes: how many bytes follow it.
        file: what messages call the file.

    Raises:
        BadCheckpoint: a rule is broken; the message names the file, the place and the reason.

    >>> parse_header(b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', 12, file="x.st")
    Traceback (most recent call last):
    paramend.errors.BadCheckpoint: x.st: data: 4 bytes after the last tensor belong to none
    """
    table = parse_object(raw, file, "header")
    metadata = _metadata(table.pop(_METADATA, None), file)
    entries = [_entry(name, row, file) for name, row in table.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    _check_cover(entries, data_nbytes, file)
    return Header(raw, tuple(entries), metadata)


def _metadata(value: Any, file: str) -> dict[str, str] | None:
    if value is None:
        return None
    if type(value) is not dict:
        raise bad(file, f"header, {_METADATA}", f"an object of strings is expected, not {json_type(value)}")
    for key, text in value.items():
        place = f"header, {_METADATA}, {shown(key)}"
        if type(text) is not str:
            raise bad(file, place, f"a string is expected, not {json_type(text)}")
    return value


def _entry(name: str, row: Any, file: str) -> Entry:
    try:  # most tensors are like one before
        code, shape, (start, stop) = row["dtype"], row["shape"], row["data_offsets"]
        spec, nbytes = _sound[(code, *shape)]
        whole = {type(start), type(stop), *map(type, shape)} == {int}
        if whole and start >= 0 and stop == start + nbytes < _U64 and name.count("/") + name.count(".") < MAX_PIECES:
            return Entry(sys.intern(name), spec, start, stop)
    except (KeyError, TypeError, ValueError):
        pass
    entry = _checked_entry(name, row, file)
    if len(_sound) < _REMEMBERED and not entry.spec.dtype.startswith("raw<"):
        _sound[(row["dtype"], *entry.spec.shape)] = entry.spec, entry.nbytes
    return entry


# The specs of tensors that kept every rule, with their bytes, by code and shape.
_sound: dict[tuple[Any, ...], tuple[Spec, int]] = {}
_REMEMBERED = 10_000


def _checked_entry(name: str, row: Any, file: str) -> Entry:
    def flaw(what: str, reason: str) -> BadCheckpoint:
        return bad(file, f"tensor {shown(name)}{what}", reason)

    if name.count("/") + name.count(".") >= MAX_PIECES:
        raise flaw("", f"the name has more than {MAX_PIECES} pieces")
    if type(row) is not dict:
        raise flaw("", f"an object is expected, not {json_type(row)}")
    missing = [field for field in ("dtype", "shape", "data_offsets") if field not in row]
    if missing:
        raise flaw("", f"{missing[0]} is missing")
    code, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if type(code) is not str:
        raise flaw(", dtype", f"a string is expected, not {json_type(code)}")
    if type(shape) is not list:
        raise flaw(", shape", f"an array is expected, not {json_type(shape)}")
    if type(offsets) is not list or len(offsets) != 2:
        raise flaw(", data_offsets", "an array of two integers is expected")
    for what, numbers in ((", shape", shape), (", data_offsets", offsets)):
        for number in numbers:
            if type(number) is not int or not 0 <= number < _U64:
                found = f"{number:,}" if type(number) is int and abs(number) < 10**30 else json_type(number)
                raise flaw(what, f"a whole number from 0 to 2**64 - 1 is expected, not {found}")
    start, stop = offsets
    if stop < start:
        raise flaw(", data_offsets", f"the end, {stop:,}, is before the start, {start:,}")
    elements = 1
    for length in shape:
        elements *= length
        if elements >= _U64:
            raise flaw(", shape", "the number of elements overflows 64 bits")
    dtype = FROM_SAFETENSORS.get(code)
    if dtype is None:
        return Entry(name, Spec(tuple(shape), f"raw<{code}>"), start, stop)
    bits = elements * BITS[dtype]
    if bits >= _U64:
        raise flaw(", shape", "the number of bits overflows 64 bits")
    if bits % 8:
        raise flaw(", shape", f"{elements:,} elements of {BITS[dtype]} bits are no whole bytes")
    if stop - start != bits // 8:
        said = f"{code} of shape ({wording.listing([*map(str, shape)], 10)})"
        takes = wording.plural(bits // 8, "byte")
        raise flaw(", data_offsets", f"{said} takes {takes}, and {start:,} to {stop:,} are {stop - start:,}")
    return Entry(name, Spec(tuple(shape), dtype), start, stop)


def _check_cover(entries: Sequence[Entry], data_nbytes: int, file: str) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    needed = max((entry.stop for entry in entries), default=0)
    if needed > data_nbytes:
        reason = f"the file is cut short: its tensors take {needed:,} bytes, and {data_nbytes:,} are there"
        raise bad(file, "data", reason, hint="copy or download it again")
    at = 0
    for before, entry in zip([None, *entries], entries, strict=False):
        if entry.start > at:
            reason = f"the bytes {at:,} to {entry.start:,} before it belong to no tensor"
            raise bad(file, f"tensor {shown(entry.name)}, data_offsets", reason)
        if entry.start < at and before is not None:
            reason = f"it begins at {entry.start:,}, within tensor {shown(before.name)}, which ends at {at:,}"
            raise bad(file, f"tensor {shown(entry.name)}, data_offsets", reason)
        at = entry.stop
    if at != data_nbytes:
        extra = wording.plural(data_nbytes - at, "byte")
        raise bad(file, "data", f"{extra} after the last tensor belong to none")


# ---- the file as leaves ------------------------------------------------------------------------------------


class SafetensorsFile(FileSource):
    """One safetensors file as `Leaves`. Opening reads the header; arrays are read when asked for.

    A leaf's number is its place in the order of the bytes. Use it as a context manager, or `close()` it;
    arrays that were read stay valid.

    Attributes:
        path: as the user gave it.
        header: names, specs, offsets and metadata.
        index: the names; its separator is "/" where the file's own names hold "/" and no ".".
        ties: nothing: in a file each tensor has one name.

    Raises:
        BadCheckpoint: there is no such file, or it is damaged, or of another format.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> header = write_header({"fc.weight": Spec((2, 1), "float32")})
    >>> _ = path.write_bytes(header.to_bytes() + np.array([1, 2], "float32").tobytes())
    >>> with SafetensorsFile(path) as file:
    ...     print(file.index.path(0), file.spec(0), file.read(0).tolist())
    fc.weight float32[2,1] [[1.0], [2.0]]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.ties: Mapping[int, int] = {}
        self._file = OpenFile(self.path, holds="*.safetensors")
        try:
            self.header = _read_header(self._file)
        except BaseException:
            self.close()
            raise

    @cached_property
    def index(self) -> Index:  # type: ignore[override]  # made when first asked for
        """The names."""
        names = self.names
        return Index.of_names(names, separator_of(names))

    @property
    def names(self) -> list[str]:
        """The names as they stand in the header, by leaf number."""
        return [entry.name for entry in self.header.entries]

    @property
    def metadata(self) -> Mapping[str, str]:
        """The strings under `__metadata__`."""
        return self.header.metadata or {}

    def release(self) -> None:
        """Gives the descriptor back to the system until a leaf is read again: of many files few need to be open."""
        self._file.release()

    def spec(self, number: int) -> Spec:
        """Shape and dtype of a leaf."""
        return self.header.entries[number].spec

    def nbytes(self, number: int) -> int:
        """The bytes of a leaf in the file, also of a dtype of unknown width."""
        return self.header.entries[number].nbytes

    def refusal(self, number: int) -> str:
        """Why a leaf cannot be read as an array, or ""."""
        dtype = self.spec(number).dtype
        if dtype.startswith("raw<"):
            return f"its dtype, {dtype[4:-1]!r}, is unknown: its bytes can only be copied"
        if BITS[dtype] % 8:
            return f"its values, {dtype}, are packed {BITS[dtype]} bits each: its bytes can only be copied"
        return ""

    def extent(self, number: int) -> Extent:
        """Where the bytes of a leaf lie."""
        entry = self.header.entries[number]
        return Extent(self.path, self.header.nbytes + entry.start, entry.nbytes)

    def read(self, number: int) -> Array:
        """The array, read-only and memory-mapped: pages are read when touched.

        Raises:
            Unsupported: the dtype is unknown or packed.
        """
        spec, entry = self.spec(number), self.header.entries[number]
        self._check_readable(number)
        if not entry.nbytes:
            return self._shaped(np.frombuffer(b"", numpy_dtype(spec.dtype)), number)
        array = np.frombuffer(self._file.map, np.uint8, entry.nbytes, self.header.nbytes + entry.start)
        array = array.view(numpy_dtype(spec.dtype))
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        return self._shaped(array, number)

    def read_range(self, number: int, start: int, stop: int) -> Array:
        """The elements `start` to `stop` of a leaf in C order: a new array with one axis, of bounded memory.

        Raises:
            Unsupported: the dtype is unknown or packed.
            BadCheckpoint: the file has become shorter since it was opened.
        """
        self._check_readable(number)
        dtype = numpy_dtype(self.spec(number).dtype)
        buffer = np.empty((stop - start) * dtype.itemsize, np.uint8)
        offset = self.header.nbytes + self.header.entries[number].start + start * dtype.itemsize
        self._file.read_into(buffer.data, offset)
        return buffer.view(dtype)

    def _check_readable(self, number: int) -> None:
        why = self.refusal(number)
        if why:
            raise Unsupported(f"{self.index.path(number)} cannot be read: {why}")

    def _shaped(self, array: Array, number: int) -> Array:
        shape = self.spec(number).shape
        try:
            return array.reshape(shape)
        except ValueError as error:  # more axes, or longer ones around an axis of length 0, than numpy has
            raise Unsupported(f"numpy has no array of shape {shape}: {error}") from error


def _read_header(opened: OpenFile) -> Header:
    file, size = str(opened.path), opened.size
    head = opened.read(0, min(size, 64))
    if size < 8:
        raise bad(
            file,
            "byte 0",
            "the file is empty" if not size else f"a file of {wording.plural(size, 'byte')} has no header",
        )
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER or length > size - 8:
        for magic, what, hint in _FOREIGN:
            if head.startswith(magic):
                raise bad(file, "byte 0", f"it is {what}", hint)
        if length > MAX_HEADER:
            raise bad(file, "byte 0", f"not a safetensors file: its header would be {length:,} bytes long")
        raise bad(
            file,
            "byte 0",
            f"the header is said to be {length:,} bytes long, and {size - 8:,} bytes follow",
            hint="copy or download it again, if it is a safetensors file",
        )
    return parse_header(opened.read(8, length), size - 8 - length, file=file)
