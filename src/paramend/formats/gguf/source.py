"""GGUF files as leaves: keys with values, then where each tensor is, then their bytes.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md describes the format. Versions 1 to 3 are read, and 3 is
written; files of big-endian machines are refused.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from paramend.errors import BadArgument, BadCheckpoint
from paramend.formats.files import FileSource, OpenFile
from paramend.formats.gguf.keys import SPLIT, Cursor, alignment, as_json
from paramend.formats.gguf.writer import GGML, MAGIC, GgufWriter
from paramend.formats.limits import MAX_AXES, MAX_PIECES, U64, most_elements, shown
from paramend.formats.shards import Shards
from paramend.leaves.leaves import Index, separator_of, uncollected
from paramend.leaves.origins.origin import Extent
from paramend.leaves.specs import BLOCKS, Spec
from paramend.reports import wording

WRITER = GgufWriter()
_PART = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """One tensor of a file."""

    name: str
    spec: Spec  # as it is stored: an element may be a block; an unknown type is "raw<ggml 99>"
    start: int  # the place of its first byte in the file
    nbytes: int
    at: int  # the place of what the header says of it


class GgufFile(FileSource):
    """One GGUF file as `Leaves`. Opening reads the header."""

    format = "gguf"
    rows: Sequence[GgufEntry]
    metadata: Mapping[str, Any]  # the values by key, whose numbers have the types of numpy that are those of the file
    start: int  # where the bytes of tensors begin

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, holds="*.gguf")

    @uncollected()
    def _begin(self) -> None:
        self.metadata, self.rows, self.start = _read_header(self._file)

    @cached_property
    def index(self) -> Index:  # type: ignore[override]  # made on first use
        return Index.of_names(self.names, separator_of(self.names))

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.rows]

    @property
    def configuration(self) -> bytes:
        """What the file says of its model, as JSON."""
        return as_json(self.metadata)

    def release(self) -> None:
        self._file.release()

    def hold(self) -> None:
        self._file.hold()

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
        """What the first file says of the model, as JSON."""
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
    files = [first]
    try:
        files += [GgufFile(part) for part in _parts(path, int(count)) if part != path]
        files.sort(key=lambda file: file.path.name)
        _check_parts(path, files)
        return GgufParts(files[0].path, files)
    except BaseException:
        for file in files:
            file.close()
        raise


def _parts(path: Path, count: int) -> list[Path]:
    """The files of a model, by the name of one of them."""
    found = _PART.fullmatch(path.name)
    if found is None or int(found["count"]) != count:
        raise BadCheckpoint(
            f"{path}: it is one of {count} files of a model, and its name does not say which",
            hint=f"its name was one such as model-00001-of-{count:05}.gguf",
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
            raise BadCheckpoint(
                f"{file.path}: split.no and split.count are {said[0]} and {said[1]}, and its name says otherwise"
            )
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
        if key.count(".") >= MAX_PIECES:
            raise cursor.bad(f"the key {shown(key)} has more than {MAX_PIECES} pieces", at)
        metadata[key] = cursor.value(f"the value of {shown(key)}")
    try:
        step = alignment(metadata)
    except BadArgument as error:
        raise cursor.bad(str(error).partition("\n")[0]) from None
    infos = [_read_info(cursor) for _ in range(tensors)]
    start = -(-cursor.at // step) * step
    return metadata, _placed(cursor, infos, start, step), start


def _read_info(cursor: Cursor) -> tuple[int, str, tuple[int, ...], int, int]:
    at, name = cursor.at, cursor.text("the name of a tensor")
    what = f"tensor {shown(name)}"
    if name.count("/") + name.count(".") >= MAX_PIECES:
        raise cursor.bad(f"{what}: the name has more than {MAX_PIECES} pieces", at)
    axes = cursor.u32(f"{what}, axes")
    if axes > MAX_AXES:
        raise cursor.bad(f"{what}: {axes:,} axes are too many", cursor.at - 4)
    width = 8 if cursor.wide else 4
    data = cursor.take(width * axes, f"{what}, its shape")
    dims = [int.from_bytes(data[place : place + width], "little") for place in range(0, len(data), width)]
    return at, name, tuple(reversed(dims)), cursor.u32(f"{what}, its type"), cursor.u64(f"{what}, its offset")


def _placed(
    cursor: Cursor, infos: Sequence[tuple[int, str, tuple[int, ...], int, int]], first: int, step: int
) -> list[GgufEntry]:
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
                raise cursor.bad(
                    f"{what}: rows of {dtype} are of blocks of {values}, and its shape is {list(shape)}", at
                )
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
