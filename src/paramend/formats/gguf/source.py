"""GGUF files as leaves: keys with values, then where each tensor is, then their bytes.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes the format. Versions 1 to 3 are read, and 3 is
written; files of big-endian machines are refused.
"""

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from paramend.errors import BadArgument, BadCheckpoint, RenameClash
from paramend.formats.files import FlatFile, OpenFile
from paramend.formats.gguf.keys import SPLIT, Cursor, alignment, as_json, written
from paramend.formats.limits import MAX_AXES, MAX_PIECES, U64, is_deep, most_elements, shown
from paramend.formats.shards import Shards
from paramend.formats.source import Item, LeafBytes, Parts, Writer, opening
from paramend.leaves.leaves import uncollected
from paramend.leaves.origins.origin import Extent
from paramend.leaves.outlines import Outline
from paramend.leaves.specs import BLOCKS, Spec
from paramend.reports import wording

MAGIC = b"GGUF"
# Runs of the types of ggml, each from its first number on.
_RUNS = {
    0: "float32 float16 q4_0 q4_1",
    6: "q5_0 q5_1 q8_0",
    10: "q2_k q3_k q4_k q5_k q6_k",
    16: "iq2_xxs iq2_xs iq3_xxs iq1_s iq4_nl iq3_s iq2_s iq4_xs int8 int16 int32 int64 float64 iq1_m bfloat16",
    34: "tq1_0 tq2_0",
    39: "mxfp4 nvfp4",
}
GGML = {number: name for first, names in _RUNS.items() for number, name in enumerate(names.split(), first)}
_NUMBERS = {name: number for number, name in GGML.items()}
# What ggml has room for.
_AXES, _NAME = 4, 63
_PART = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """One tensor of a file."""

    name: str
    spec: Spec  # as it is stored: an element may be a block; an unknown type is "raw<ggml 99>"
    start: int  # the place of its first byte in the file
    nbytes: int
    at: int  # the place of what the header says of it


class GgufFile(FlatFile):
    """One GGUF file as `Leaves`. Opening reads the header."""

    format = "gguf"
    holds = "*.gguf"
    rows: Sequence[GgufEntry]
    metadata: Mapping[str, Any]  # the values by key, whose numbers have the types of numpy that are those of the file
    start: int  # where the bytes of tensors begin

    @uncollected()
    def _begin(self) -> None:
        self.metadata, self.rows, self.start = _read_header(self._file)

    @property
    def configuration(self) -> bytes:
        """What the file says of its model, as JSON."""
        return as_json(self.metadata)

    def refusal(self, number: int) -> str:
        dtype = self.spec(number).dtype
        return f"its type, {dtype[4:-1]}, is unknown: its bytes can only be copied" if dtype.startswith("raw<") else ""

    def extent(self, number: int) -> Extent:
        return Extent(self.path, self.rows[number].start, self.rows[number].nbytes)


class GgufParts(Shards):
    """A model in several GGUF files, the first of which says what it is."""

    def __init__(self, path: Path, files: Sequence[GgufFile]) -> None:
        super().__init__(path, path.parent, files, None)

    def _together(self, metadata: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return {key: value for key, value in metadata[0].items() if not key.startswith(SPLIT)}

    @property
    def configuration(self) -> bytes:
        return as_json(self.metadata)


def open_gguf(path: Path) -> GgufFile | GgufParts:
    """A GGUF file; of a model in several, whichever was named, all of them.

    Raises:
        BadCheckpoint: a file is damaged or missing, or is a part of something else.
    """
    first = GgufFile(path)
    count = first.metadata.get(f"{SPLIT}count", 1)
    if not isinstance(count, np.integer) or count < 2:
        return first
    with opening() as files:
        files.append(first)
        files += [GgufFile(part) for part in _parts(path, int(count)) if part != path]
        files.sort(key=lambda file: file.path.name)
        _check_parts(path, files)
        return GgufParts(files[0].path, files)


def _parts(path: Path, count: int) -> list[Path]:
    """The files of a model, by the name of one of them."""
    found = _PART.fullmatch(path.name)
    if found is None or int(found["count"]) != count:
        hint = f"its name was one such as model-00001-of-{count:05}.gguf"
        raise BadCheckpoint(
            f"{path}: it is one of {count} files of a model, and its name does not say which", hint=hint
        )
    parts = [path.with_name(f"{found['stem']}-{no:05}-of-{count:05}.gguf") for no in range(1, count + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        are = wording.plural(len(missing), "file is", "files are")
        raise BadCheckpoint(f"{path}: {are} missing: {wording.listing(missing, 3)}", hint="download the whole model")
    return parts


def _check_parts(path: Path, files: Sequence[GgufFile]) -> None:
    for place, file in enumerate(files):
        said = [file.metadata.get(f"{SPLIT}{key}") for key in ("no", "count")]
        if said != [place, len(files)]:
            why = f"split.no and split.count are {said[0]} and {said[1]}, and its name says otherwise"
            raise BadCheckpoint(f"{file.path}: {why}")
        file.release()
    total, there = files[0].metadata.get(f"{SPLIT}tensors.count"), sum(len(file.rows) for file in files)
    if total not in (None, there):
        raise BadCheckpoint(f"{path}: its files hold {there:,} tensors, and split.tensors.count is {total}")


def _read_header(file: OpenFile) -> tuple[dict[str, Any], list[GgufEntry], int]:
    """The keys, the tensors, and where the bytes of tensors begin."""
    cursor = Cursor(file)
    if cursor.take(4, "the magic number") != MAGIC:
        raise cursor.bad("it is not a GGUF file", 0)
    version = cursor.u32("the version")
    if version not in (1, 2, 3):
        swapped = version and not version & 0xFFFF
        reason = "its numbers are big-endian" if swapped else f"version {version} is unknown"
        hint = f"gguf-convert-endian {file.path} little" if swapped else "versions 1, 2 and 3 can be read"
        raise BadCheckpoint(f"{file.path}: byte 4: {reason}", hint=hint)
    cursor.wide = version > 1
    tensors = cursor.count("the number of tensors", 24 if cursor.wide else 20)
    keys = cursor.count("the number of keys", 9)
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        at, key = cursor.at, cursor.text("a key")
        if key in metadata:
            raise cursor.bad(f"the key {shown(key)} is there twice", at)
        if is_deep(key):
            raise cursor.bad(f"the key {shown(key)} has more than {MAX_PIECES} pieces", at)
        metadata[key] = cursor.value(f"the value of {shown(key)}")
    try:
        step = alignment(metadata)
    except BadArgument as error:
        raise cursor.bad(str(error).partition("\n")[0]) from None
    infos = [_read_info(cursor) for _ in range(tensors)]
    start = -(-cursor.at // step) * step
    return metadata, _placed(cursor, infos, start, step), start


# Where the header says it, the name of a tensor, its shape, the number of its type, its offset.
_Info = tuple[int, str, tuple[int, ...], int, int]


def _read_info(cursor: Cursor) -> _Info:
    at, name = cursor.at, cursor.text("the name of a tensor")
    what = f"tensor {shown(name)}"
    if is_deep(name):
        raise cursor.bad(f"{what}: the name has more than {MAX_PIECES} pieces", at)
    axes = cursor.u32(f"{what}, axes")
    if axes > MAX_AXES:
        raise cursor.bad(f"{what}: {axes:,} axes are too many", cursor.at - 4)
    width = 8 if cursor.wide else 4
    data = cursor.take(width * axes, f"{what}, its shape")
    dims = [int.from_bytes(data[place : place + width], "little") for place in range(0, len(data), width)]
    return at, name, tuple(reversed(dims)), cursor.u32(f"{what}, its type"), cursor.u64(f"{what}, its offset")


def _placed(cursor: Cursor, infos: Sequence[_Info], first: int, step: int) -> list[GgufEntry]:
    """The tensors with their places; `BadCheckpoint` if one is not in the file, or two are in one place."""
    size, entries, names = cursor.file.size, [], set()
    stops = sorted({offset for *_, offset in infos} | {max(size - first, 0)})
    following = dict(pairwise(stops))
    for at, name, shape, kind, offset in infos:
        what, dtype = f"tensor {shown(name)}", GGML.get(kind, f"raw<ggml {kind}>")
        if name in names:
            raise cursor.bad(f"{what} is there twice", at)
        names.add(name)
        if max((most_elements(shape), *shape), default=0) >= U64:
            raise cursor.bad(f"{what}: the number of elements overflows 64 bits", at)
        if dtype in BLOCKS:
            values = BLOCKS[dtype][0]
            if not shape or shape[-1] % values:
                said = f"{what}: rows of {dtype} are of blocks of {values}, and its shape is {list(shape)}"
                raise cursor.bad(said, at)
            shape = (*shape[:-1], shape[-1] // values)
        spec = Spec(shape, dtype)
        nbytes = spec.nbytes if kind in GGML else max(following.get(offset, 0) - offset, 0)
        if offset % step:
            raise cursor.bad(f"{what}: its offset, {offset:,}, is no multiple of {step}", at)
        if first + offset + nbytes > size:
            there = f"{nbytes:,} bytes from byte {first + offset:,} on, and the file ends at {size:,}"
            raise cursor.bad(f"{what} takes {there}", at)
        entries.append(GgufEntry(name, spec, first + offset, nbytes, at))
    used = sorted((each for each in entries if each.nbytes), key=lambda each: each.start)
    for one, two in pairwise(used):
        if one.start + one.nbytes > two.start:
            raise cursor.bad(f"tensor {shown(two.name)} begins within {shown(one.name)}", two.at)
    return entries


class GgufWriter(Writer):
    """Lays out files of version 3. Other metadata than keys with a dot has no place, and is left out."""

    copies_raw = flat = True

    def refusal(self, spec: Spec) -> str:
        if spec.dtype not in _NUMBERS:
            return f"GGUF cannot hold {spec.dtype}"
        return f"ggml has no tensor of {spec.ndim} axes" if spec.ndim > _AXES else ""

    def parts(self, items: Sequence[Item], metadata: Mapping[str, Any], outline: Outline | None = None) -> Parts:
        yield header(items, metadata)
        step = alignment(metadata)
        for place, item in enumerate(items):
            yield LeafBytes(place, 0, item.nbytes)
            yield b"\0" * (-item.nbytes % step)


def header(items: Sequence[Item], metadata: Mapping[str, Any]) -> bytes:
    """What stands before the tensors, with its padding."""
    keys = {key: value for key, value in metadata.items() if "." in key}
    step, at, taken = alignment(keys), 0, set[str]()
    head = [MAGIC, struct.pack("<IQQ", 3, len(items), len(keys)), *(written(*each) for each in keys.items())]
    for item in items:
        head.append(_info(item, taken, at))
        at += item.nbytes + -item.nbytes % step
    data = b"".join(head)
    return data + b"\0" * (-len(data) % step)


def _info(item: Item, taken: set[str], offset: int) -> bytes:
    name, spec = item.name.encode("utf-8", "surrogateescape"), item.spec
    if item.name in taken or not name:
        raise RenameClash(f"two leaves would have the same name, {shown(item.name)}", hint="rename or delete one first")
    if len(name) > _NAME:
        raise RenameClash(f"{shown(item.name)} is too long: ggml has names of {_NAME} bytes", hint="rename it first")
    taken.add(item.name)
    shape, kind = spec.shape, _NUMBERS.get(spec.dtype)
    if spec.dtype in BLOCKS:
        shape = (*shape[:-1], shape[-1] * BLOCKS[spec.dtype][0])
    number = int(spec.dtype[len("raw<ggml ") : -1]) if kind is None else kind
    dims = struct.pack(f"<{spec.ndim}Q", *reversed(shape))
    head = struct.pack("<Q", len(name)) + name + struct.pack("<I", spec.ndim)
    return head + dims + struct.pack("<IQ", number, offset)


WRITER = GgufWriter()
