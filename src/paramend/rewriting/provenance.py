"""Records: what was done to a checkpoint, kept with it as data that can be read back and checked against its bytes.

Where a record is: for a safetensors file, in its header, under the key `paramend.record` of `__metadata__`; for a
directory, in the file `paramend.record.json` in it; for any other file, in `<name>.record.json` beside it. It is JSON:

    version    of this schema: 1
    paramend   the version that wrote it
    time       when it was written, as ISO 8601 in UTC
    source     the name of what was edited, without its folder
    recipe     the recipe that was carried out, as YAML; "" if there was none
    config     what changed in files beside the weights, if anything did: {"file", "key", "before", "after"}
    leaves     what was written: {"path", "dtype", "shape", "sha256", "edit"}; also "was", if it had another path, and
               "origin", if only bytes moved: what it is made of, as an expression that `read_origin` reads, in which
               leaves of other files than the source stand after the name of theirs. Where that is long, it is in
               "origin" alone, and "edit" is ""
    deleted    the deleted paths
    earlier    the records that the source carried, oldest first, each of this schema without `earlier`

The digest is that of the bytes of the leaf in C order, little-endian: the same in every format. A record is read only
on request: a damaged one does not keep a checkpoint from being opened.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paramend.anatomy.documents import Change
from paramend.disk.publishing import there
from paramend.disk.urls import path_of
from paramend.errors import Unsupported
from paramend.formats.files import open_bytes
from paramend.formats.jsontext import bad, json_type, parse_object
from paramend.formats.limits import shown
from paramend.formats.registry import format_of, open_source
from paramend.formats.safetensors import RECORD, SafetensorsFile
from paramend.formats.shards import Shards
from paramend.journal.undo import recover
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.texts import shortened
from paramend.leaves.specs import Spec
from paramend.piecewise.rows import data
from paramend.reports.fields import picked
from paramend.reports.progress import Meter
from paramend.reports.report import Line, Report, Section

FILE = f"{RECORD}.json"
VERSION = 1
# Longer texts are not our records: a header may have 100 MB.
MAX_BYTES = 1 << 26
# The most characters of all expressions of a record; leaves beyond are recorded by their digests alone.
MAX_TEXT = 1 << 24
_DIGEST = re.compile("[0-9a-f]{64}")
_READ = 1 << 20


@dataclass(frozen=True, slots=True)
class RecordedLeaf:
    """One leaf that was written.

    Attributes:
        path: its path in the file.
        spec: its shape and dtype.
        sha256: the digest of its bytes.
        edit: what was done.
        was: its earlier path, if that differs.
        origin: what it is made of, as an expression; "" if some of it was computed, or it is a leaf of the source.
    """

    path: str
    spec: Spec
    sha256: str
    edit: str
    was: str = ""
    origin: str = ""

    def to_dict(self) -> dict[str, Any]:
        edit = "" if self.origin and self.edit == shortened(self.origin) else self.edit
        found = picked(self, "path", "spec.dtype", "spec.shape", "sha256")
        return found | {"edit": edit} | picked(self, "was?", "origin?")


@dataclass(frozen=True, repr=False)
class EditRecord(Report):
    """What was done to a checkpoint, according to its record.

    Attributes:
        paramend: the version that wrote it.
        time: when it was written.
        source: the name of what was edited.
        leaves: what was written.
        deleted: the deleted paths.
        config: what changed in files beside the weights.
        recipe: the recipe that was carried out, or "".
        earlier: the records of earlier edits, oldest first.
    """

    _data = ("paramend", "time", "source", "recipe", "leaves", "deleted", "config?", "earlier?")

    paramend: str
    time: datetime
    source: str
    leaves: tuple[RecordedLeaf, ...]
    deleted: tuple[str, ...] = ()
    recipe: str = ""
    config: tuple[Change, ...] = ()
    earlier: "tuple[EditRecord, ...]" = ()

    def headline(self) -> str:
        """When it was written, from what, by which version."""
        return f"{self.time:%Y-%m-%d %H:%M:%S} UTC: written from {self.source} by Paramend {self.paramend}"

    def sections(self) -> list[Section]:
        """The leaves that were written, and those that were deleted."""
        deleted = Section("deleted", [Line((path,)) for path in self.deleted])
        return [Section.of("edited", self.leaves, "spec", "edit", size=""), deleted]

    def to_dict(self) -> dict[str, Any]:
        return {"version": VERSION} | super().to_dict()

    def __str__(self) -> str:
        own = "\n".join([super().__str__(), *(f"\n{change.file}: {change}" for change in self.config)])
        own += f"\n\nrecipe:\n{self.recipe}" if self.recipe else ""
        return "\n\n".join([*map(str, self.earlier), own])

    @property
    def standing(self) -> dict[str, RecordedLeaf]:
        """The expected leaves by path: the latest entry for each leaf in all of the records."""
        found: dict[str, RecordedLeaf] = {}
        known: dict[str, str] = {}
        for each in (*self.earlier, self):
            own = {leaf.path: leaf for leaf in each.leaves}
            for path in (*each.deleted, *(leaf.was for leaf in each.leaves), *own):
                found.pop(path if path in found else known.get(alike(path), path), None)
            found |= own
            known |= {alike(path): path for path in own}
        return found


def record(path: str | os.PathLike[str]) -> EditRecord | None:
    """The record that a checkpoint carries of how it was made; None if it carries none.

    Args:
        path: a file or a directory.

    Raises:
        BadCheckpoint: the checkpoint or its record is damaged.
        CannotRead: there is no such file.

    >>> import tempfile
    >>> import numpy as np
    >>> from paramend.checkpoints.checkpoint import open
    >>> from paramend.checkpoints.whole import save
    >>> from paramend.edits.selection import at
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = save({"a": np.ones(2), "b": np.ones(2)}, folder / "model.safetensors")
    >>> _ = at(open(folder / "model.safetensors"), "a").zero().save(folder / "new.safetensors", record=True)
    >>> [(leaf.path, leaf.edit) for leaf in record(folder / "new.safetensors").leaves]
    [('a', 'zero()')]
    """
    recover(path)
    with contextlib.closing(open_source(path)) as source:
        return record_of(source)


def record_of(source: Any) -> EditRecord | None:
    """The record of an opened checkpoint; None if it carries none, `BadCheckpoint` if it is damaged."""
    text, place = text_of(source), sidecar(source)
    file = str(place if place is not None and there(place) else source.path)
    return None if text is None else parse(text, file)


def alike(name: str) -> str:
    """A name normalized across formats: `/` and `.` are the same separator."""
    return name.replace("/", ".")


def sidecar(source: Any) -> Path | None:
    """The file that would hold the record of a checkpoint; None if it has no such file."""
    if isinstance(source, Shards):
        return source.folder / FILE
    row = format_of(source)
    if row is None or isinstance(source, SafetensorsFile):
        return None
    return path_of(source.path) / FILE if row.folder else beside(path_of(source.path))


def beside(path: Path) -> Path:
    """The file that would hold the record of a file beside it."""
    return path.with_name(f"{path.name}.record.json")


def text_of(source: Any) -> bytes | None:
    """The text of the record of an opened checkpoint; None if it carries none, `BadCheckpoint` if it is too long."""
    place = sidecar(source)
    if place is not None and there(place):
        with open_bytes(place) as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise bad(str(place), "record", f"more than {MAX_BYTES:,} bytes are too many")
        return text
    held = source.metadata.get(RECORD)
    return held.encode() if isinstance(held, str) else None


_KINDS = {str: "a string", int: "an integer", list: "an array", dict: "an object"}


def parse(text: bytes, file: str) -> EditRecord:
    """The record in a JSON text, validated; messages call its file by the given name.

    >>> parse(b'{"version": 1}', "paramend.record.json")
    Traceback (most recent call last):
    paramend.errors.BadCheckpoint: paramend.record.json: record: 'paramend' is missing
    """
    table = parse_object(text, file, "record")

    def field(row: Any, place: str, key: str, kind: type, default: Any = None) -> Any:
        if type(row) is not dict:
            raise bad(file, place, f"an object is expected, not {json_type(row)}")
        if key not in row and default is not None:
            return default
        if key not in row:
            raise bad(file, place, f"{key!r} is missing")
        if type(row[key]) is not kind:
            raise bad(file, f"{place}, {key!r}", f"{_KINDS[kind]} is expected, not {json_type(row[key])}")
        return row[key]

    def leaf(row: Any, place: str) -> RecordedLeaf:
        path, dtype, sha256, edit = (field(row, place, key, str) for key in ("path", "dtype", "sha256", "edit"))
        shape = field(row, place, "shape", list)
        if not all(type(length) is int and length >= 0 for length in shape):
            raise bad(file, f"{place}, 'shape'", "whole numbers are expected")
        if _DIGEST.fullmatch(sha256) is None:
            raise bad(file, f"{place}, 'sha256'", f"64 hexadecimal digits are expected, not {shown(sha256)}")
        was, origin = (field(row, place, key, str, "") for key in ("was", "origin"))
        return RecordedLeaf(path, Spec(tuple(shape), dtype), sha256, edit or shortened(origin), was, origin)

    def change(row: Any, place: str) -> Change:
        sides = (json.dumps(row[side], ensure_ascii=False) if side in row else None for side in ("before", "after"))
        return Change(field(row, place, "file", str), field(row, place, "key", str), *sides)

    def one(row: Any, place: str) -> EditRecord:
        version = field(row, place, "version", int)
        if version != VERSION:
            raise bad(file, f"{place}, 'version'", f"{version} is unknown: another version of Paramend may read it")
        said = field(row, place, "time", str)
        try:
            time = datetime.fromisoformat(said).astimezone(UTC)
        except (ValueError, OverflowError):
            raise bad(file, f"{place}, 'time'", f"{shown(said)} is not an ISO 8601 time") from None
        deleted = field(row, place, "deleted", list)
        if not all(type(path) is str for path in deleted):
            raise bad(file, f"{place}, 'deleted'", "strings are expected")
        return EditRecord(
            paramend=field(row, place, "paramend", str),
            time=time,
            source=field(row, place, "source", str),
            leaves=tuple(leaf(each, f"{place}, leaf {n}") for n, each in enumerate(field(row, place, "leaves", list))),
            deleted=tuple(deleted),
            recipe=field(row, place, "recipe", str, ""),
            config=tuple(change(each, f"{place}, 'config'") for each in field(row, place, "config", list, [])),
        )

    field(table, "record", "version", int)
    field(table, "record", "paramend", str)
    earlier = field(table, "record", "earlier", list, [])
    return replace(
        one(table, "record"), earlier=tuple(one(each, f"record, earlier {n}") for n, each in enumerate(earlier))
    )


def contents(origin: Origin) -> Iterator[memoryview]:
    """The bytes of a leaf, in pieces: in C order, little-endian."""
    if not origin.refusal:
        yield from data(origin)
        return
    extents = origin.extents if origin.children else [origin.extent]
    if extents is None or None in extents:
        raise Unsupported(f"{origin} cannot be read: {origin.refusal}")
    for extent in filter(None, extents):
        with extent.path.open("rb") as file:
            file.seek(extent.start)
            for at in range(0, extent.nbytes, _READ):
                yield memoryview(file.read(min(_READ, extent.nbytes - at)))


def digest_of(pieces: Iterable[memoryview], meter: Meter | None = None) -> str:
    """The SHA-256 of bytes in pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
        if meter is not None:
            meter.advance(len(piece))
    return digest.hexdigest()
