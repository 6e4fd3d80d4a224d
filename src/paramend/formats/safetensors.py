"""Safetensors files: a header that names every tensor and says where its bytes are, then the bytes.

The reader is stricter than the reference: a name appears once. What the reference refuses is refused here too, except
unknown dtypes: their tensors are listed and copied, never read or edited.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paramend.errors import BadCheckpoint, RenameClash, Unsupported
from paramend.formats.files import FOREIGN, FlatFile, OpenFile
from paramend.formats.jsontext import bad, json_type, parse_object
from paramend.formats.limits import MAX_AXES, MAX_PIECES, U64, is_deep, most_elements, shown
from paramend.formats.source import Item, LeafBytes, Parts, Writer
from paramend.leaves.leaves import uncollected
from paramend.leaves.origins.origin import Extent
from paramend.leaves.outlines import Outline
from paramend.leaves.specs import BITS, FROM_SAFETENSORS, SAFETENSORS_CODES, Spec
from paramend.reports import wording

MAX_HEADER = 100_000_000
_METADATA = "__metadata__"
# The key in the metadata of a file under which the record of how it was made is kept.
RECORD = "paramend.record"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file."""

    name: str  # as it is in the header
    spec: Spec  # shape and dtype; an unknown dtype, such as code "I2", is "raw<I2>"
    start: int  # where its bytes begin, counted from the end of the header
    stop: int  # where they end

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A valid header."""

    raw: bytes  # the JSON text with its padding, as it is in the file
    # The tensors in the order of their bytes, which need not be the order of their names in `raw`.
    entries: tuple[TensorEntry, ...]
    metadata: Mapping[str, str] | None = None  # the strings under `__metadata__`; None if there are none

    @property
    def nbytes(self) -> int:
        """The length of the header, including the eight bytes that hold its length; the data begins there."""
        return 8 + len(self.raw)

    @property
    def data_nbytes(self) -> int:
        return self.entries[-1].stop if self.entries else 0

    def to_bytes(self) -> bytes:
        return framed(self.raw, self.nbytes)

    def edited(self, kept: Mapping[int, tuple[str, Spec]]) -> "Header":
        """The header of a file that keeps these tensors, by position in `entries`, under these names and specs.
        Metadata, unknown fields and both orders are kept. If nothing changes the header is byte for byte the same."""
        if kept == {i: (entry.name, entry.spec) for i, entry in enumerate(self.entries)}:
            return self
        rows: dict[str, tuple[str, Any]] = {}
        before, entries, at = json.loads(self.raw), list[TensorEntry](), 0
        for i, (name, spec) in sorted(kept.items()):
            entry = self.entries[i]
            row, nbytes = before[entry.name], entry.nbytes
            if spec != entry.spec:
                nbytes = spec.nbytes
                row |= {"dtype": _code(spec), "shape": list(spec.shape)}
            row["data_offsets"] = [at, at + nbytes]
            entries.append(TensorEntry(name, spec, at, at + nbytes))
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
    """The header of a new file that holds these tensors one after the other, given by name, spec and number of bytes.

    Raises:
        RenameClash: two tensors have the same name.
        Unsupported: the format lacks a dtype.

    >>> layout([("w", Spec((2, 2), "bfloat16"), 8)]).raw
    b'{"w":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}       '
    """
    table: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    entries, at = list[TensorEntry](), 0
    for name, spec, nbytes in fields:
        row = {"dtype": _code(spec), "shape": list(spec.shape), "data_offsets": [at, at + nbytes]}
        table[_fresh(name, table)] = row
        entries.append(TensorEntry(name, spec, at, at + nbytes))
        at += nbytes
    return Header(_encode(table), tuple(entries), metadata)


def _fresh(name: str, table: Mapping[str, Any]) -> str:
    """The name, after checking that it is new to the table and not reserved by the format."""
    if name == _METADATA:
        raise RenameClash(f"{_METADATA!r} cannot be the name of a leaf: a safetensors file keeps its metadata under it")
    if name in table:
        raise RenameClash(f"two leaves would have the same name, {shown(name)}", hint="rename or delete one first")
    if is_deep(name):
        raise RenameClash(f"{shown(name)} has more than {MAX_PIECES} pieces")
    return name


def framed(raw: bytes, nbytes: int) -> bytes:
    """The first `nbytes` bytes of a file: the length of the header, its JSON text, and spaces, as the format allows."""
    return (nbytes - 8).to_bytes(8, "little") + raw.ljust(nbytes - 8)


def annotated(raw: bytes, key: str, text: str) -> bytes:
    """The JSON text of a header with one more entry in its metadata."""
    table = json.loads(raw)
    # transformers assumes torch if a file has no metadata, and requires "format" if it has some.
    metadata = table.pop(_METADATA, None) or {"format": "pt"}
    return _encode({_METADATA: {**metadata, key: text}, **table})


def _code(spec: Spec) -> str:
    if spec.dtype.startswith("raw<"):  # bytes that are only copied keep their code
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
    """The header, validated."""
    table = parse_object(raw, file, "header", flat=True)
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


def _entry(name: str, row: Any, file: str) -> TensorEntry:
    try:  # most tensors have the code and shape of an earlier one
        code, shape, (start, stop) = row["dtype"], row["shape"], row["data_offsets"]
        spec, nbytes = _sound[(code, *shape)]
        whole = {type(start), type(stop), *map(type, shape)} == {int}
        if whole and start >= 0 and stop == start + nbytes < U64 and not is_deep(name):
            return TensorEntry(sys.intern(name), spec, start, stop)
    except (KeyError, TypeError, ValueError):
        pass
    entry = _checked_entry(name, row, file)
    if len(_sound) < _REMEMBERED and not entry.spec.dtype.startswith("raw<"):
        _sound[(row["dtype"], *entry.spec.shape)] = entry.spec, entry.nbytes
    return entry


# The specs of valid tensors, with their number of bytes, by code and shape.
_sound: dict[tuple[Any, ...], tuple[Spec, int]] = {}
_REMEMBERED = 10_000


def _checked_entry(name: str, row: Any, file: str) -> TensorEntry:
    def flaw(what: str, reason: str) -> BadCheckpoint:
        return bad(file, f"tensor {shown(name)}{what}", reason)

    if is_deep(name):
        raise flaw("", f"the name has more than {MAX_PIECES} pieces")
    if type(row) is not dict:
        raise flaw("", f"an object is expected, not {json_type(row)}")
    for field in ("dtype", "shape", "data_offsets"):
        if field not in row:
            raise flaw("", f"{field} is missing")
    code, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
    if type(code) is not str:
        raise flaw(", dtype", f"a string is expected, not {json_type(code)}")
    if type(shape) is not list:
        raise flaw(", shape", f"an array is expected, not {json_type(shape)}")
    if type(offsets) is not list or len(offsets) != 2:
        raise flaw(", data_offsets", "an array of two integers is expected")
    if len(shape) > MAX_AXES:
        raise flaw(", shape", f"{len(shape):,} axes are too many")
    for what, numbers in ((", shape", shape), (", data_offsets", offsets)):
        for number in numbers:
            if type(number) is not int or not 0 <= number < U64:
                found = f"{number:,}" if type(number) is int and abs(number) < 10**30 else json_type(number)
                raise flaw(what, f"a whole number from 0 to 2**64 - 1 is expected, not {found}")
    start, stop = offsets
    if stop < start:
        raise flaw(", data_offsets", f"the end, {stop:,}, is before the start, {start:,}")
    if most_elements(shape) >= U64:
        raise flaw(", shape", "the number of elements overflows 64 bits")
    dtype = FROM_SAFETENSORS.get(code)
    if dtype is None:
        return TensorEntry(name, Spec(tuple(shape), f"raw<{code}>"), start, stop)
    elements = math.prod(shape)
    bits = elements * BITS[dtype]
    if bits >= U64:
        raise flaw(", shape", "the number of bits overflows 64 bits")
    if bits % 8:
        raise flaw(", shape", f"{elements:,} elements of {BITS[dtype]} bits do not fill whole bytes")
    if stop - start != bits // 8:
        said = f"{code} of shape ({wording.listing([*map(str, shape)], 10)})"
        takes = wording.plural(bits // 8, "byte")
        raise flaw(", data_offsets", f"{said} takes {takes}, but {start:,} to {stop:,} are {stop - start:,}")
    return TensorEntry(name, Spec(tuple(shape), dtype), start, stop)


def _check_cover(entries: Sequence[TensorEntry], data_nbytes: int, file: str) -> None:
    """Every byte of the data belongs to exactly one tensor."""
    needed = max((entry.stop for entry in entries), default=0)
    if needed > data_nbytes:
        reason = f"the file is cut short: its tensors take {needed:,} bytes, but {data_nbytes:,} are there"
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
        raise bad(file, "data", f"{extra} after the last tensor belong to no tensor")


# ---- writing -------------------------------------------------------------------------------------------------


class SafetensorsWriter(Writer):
    """Lays out files that `safetensors` reads. Of the metadata, only strings are kept."""

    copies_raw = flat = True

    def refusal(self, spec: Spec) -> str:
        if spec.dtype not in SAFETENSORS_CODES:
            return f"safetensors files cannot hold {spec.dtype}"
        why = f"safetensors files pack {spec.dtype}, {BITS[spec.dtype]} bits each; here its values are not packed"
        return why if BITS[spec.dtype] % 8 else ""

    def parts(self, items: Sequence[Item], metadata: Mapping[str, Any], outline: Outline | None = None) -> Parts:
        texts = {key: value for key, value in metadata.items() if isinstance(key, str) and isinstance(value, str)}
        yield layout(((item.name, item.spec, item.nbytes) for item in items), texts or None).to_bytes()
        for place, item in enumerate(items):
            yield LeafBytes(place, 0, item.nbytes)


WRITER = SafetensorsWriter()

_FOREIGN = (
    *FOREIGN,
    (b"PK\x03\x04", "a zip file, as torch.save and numpy.savez write them, not safetensors", ""),
    (b"\x80", "a Python pickle, as old versions of torch.save write it, not safetensors", ""),
)


class SafetensorsFile(FlatFile):
    """One safetensors file as `Leaves`. Opening reads the header; arrays are read on demand. A leaf's number is its
    position in the order of the bytes."""

    format = "safetensors"
    holds = "*.safetensors"

    def _begin(self) -> None:
        self.header = _read_header(self._file)
        self.rows = self.header.entries

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.header.metadata or {}

    def refusal(self, number: int) -> str:
        dtype = self.spec(number).dtype
        if dtype.startswith("raw<"):
            return f"its dtype, {dtype[4:-1]!r}, is unknown: its bytes can only be copied"
        if BITS[dtype] % 8:
            return f"its {dtype} values are packed, {BITS[dtype]} bits each: its bytes can only be copied"
        return ""

    def extent(self, number: int) -> Extent:
        entry = self.header.entries[number]
        return Extent(self.path, self.header.nbytes + entry.start, entry.nbytes)


@uncollected()
def _read_header(opened: OpenFile) -> Header:
    file, size = str(opened.path), opened.size
    head = opened.read(0, min(size, 64))
    if size < 8:
        held = f"a file of {wording.plural(size, 'byte')} has no header" if size else "the file is empty"
        raise bad(file, "byte 0", held)
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER or length > size - 8:
        for magic, what, hint in _FOREIGN:
            if head.startswith(magic) and head[8:].lstrip()[:1] != b"{":  # else the length only looks like one
                raise bad(file, "byte 0", f"it is {what}", hint)
        if length > MAX_HEADER:
            raise bad(file, "byte 0", f"not a safetensors file: its header would be {length:,} bytes long")
        reason = f"the header should be {length:,} bytes long, but only {size - 8:,} bytes follow"
        raise bad(file, "byte 0", reason, "copy or download it again, if it is a safetensors file")
    return parse_header(opened.read(8, length), size - 8 - length, file=file)
