"""The manifest of a delta: what becomes of each leaf and file, as JSON, which begins with the digest of the rest."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from paramend.deltas.checksums import hasher
from paramend.deltas.payload import FILE, Payload, digest_of
from paramend.disk.io import get, reading, write_file
from paramend.errors import BadCheckpoint
from paramend.evidence.pairing import Name
from paramend.formats.jsontext import parse_object
from paramend.formats.limits import MAX_AXES, MAX_PIECES, shown
from paramend.formats.shards import is_index
from paramend.leaves.leaves import labels_of, plain
from paramend.leaves.paths import text_of
from paramend.leaves.specs import Spec

# The files beside weights that a delta takes along: configurations and what tokenizers are made of. None holds code.
BESIDE = re.compile(r"[^./\\\0][^/\\\0]*\.(json|model|jinja)|(vocab|merges)\.txt")
# The keys of a leaf, as its containers have them.
Keys = tuple[str, ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LeafRow:
    """What becomes of one leaf."""

    path: Keys | None  # its keys in the outcome; None if it is deleted
    was: Keys | None  # those in the base; None if it is added
    spec: Spec | None  # its shape and dtype in the outcome; None if it is deleted, or the delta does not say
    before: Spec | None  # those in the base; None if it is added, or the delta does not say
    base: str  # the checksum of its bytes in the base; "" if it is added, or the delta does not say
    result: str  # that in the outcome; "" if it is deleted
    changed: int = 0  # how many elements are new
    held: str = ""  # the name in the delta of what changes; "" if nothing does
    nbytes: int = 0  # the bytes of the leaf in the outcome, if something changes

    @property
    def kind(self) -> str:
        """One of "added", "deleted", "respecified", "changed", "renamed", "kept"."""
        if self.was is None or self.path is None:
            return "added" if self.was is None else "deleted"
        if self.spec != self.before:
            return "respecified"
        return "changed" if self.base != self.result else "renamed" if self.path != self.was else "kept"

    @property
    def whole(self) -> bool:
        """Whether the delta holds all of it."""
        return self.path is not None and (self.was is None or self.spec != self.before)

    def to_dict(self) -> dict[str, Any]:
        """The row as data that JSON can hold: "path" and "before" stand for what they equal in the base."""
        specs = {name: [spec.dtype, *spec.shape] for name in ("before", "spec") if (spec := getattr(self, name))}
        found: dict[str, Any] = {"path": None if self.path is None else list(self.path)}
        found |= {"was": None if self.was is None else list(self.was)} if self.was != self.path else {}
        found |= {name: spec for name, spec in specs.items() if name == "spec" or self.before != self.spec}
        more = {"changed": self.changed, "held": self.held, "nbytes": self.nbytes}
        found |= {"base": self.base} | ({"result": self.result} if self.result != self.base else {})
        return found | (more if self.held else {})


@dataclass(frozen=True, slots=True)
class FileChange:
    """What becomes of a file beside the weights: the SHA-256 in the base and in the outcome, "" where it is not."""

    name: str
    base: str
    result: str
    nbytes: int


def name_of(keys: Keys, separator: str) -> str:
    """A path as plain text."""
    return plain(labels_of(keys), separator)


def by_name(rows: Iterable[LeafRow], side: str) -> dict[Name, LeafRow]:
    """The rows by what their leaves are called on a side: "was" or "path"."""
    seen: Counter[tuple[str, ...]] = Counter()
    found: dict[Name, LeafRow] = {}
    for row in rows:
        keys: Keys | None = getattr(row, side)
        if keys is not None:
            pieces = tuple(map(text_of, labels_of(keys)))
            found[pieces, seen[pieces]] = row
            seen[pieces] += 1
    return found


NAME, VERSION = "delta.json", 1
_MOST = 1 << 29  # bytes
_AGAIN = "copy or download it again"
_SETTINGS = ("version", "checksum", "encoding", "separator")


def write(folder: Path, table: Mapping[str, Any]) -> None:
    """Write the manifest of a delta whose payload is there."""
    table = {"version": VERSION, "payload": {"file": FILE, "sha256": digest_of(folder / FILE)}, **table}
    text = json.dumps(table, ensure_ascii=False, indent=0, separators=(",", ":"))[1:].encode("utf-8", "replace")
    write_file(folder / NAME, _seal(text) + text)


def read(folder: Path) -> dict[str, Any]:
    """The attributes of a delta in a directory; `BadCheckpoint` if any bit of it is not what was written."""
    path = folder / NAME
    with reading(path) as descriptor:
        size = os.fstat(descriptor).st_size
        raw = bytes(get(descriptor, 0, min(size, _MOST), path))
    head = len(_seal(b""))
    if size > _MOST or raw[:head] != _seal(raw[head:]):
        raise BadCheckpoint(f"{path}: it is damaged: its digest is not that of its bytes", hint=_AGAIN)
    table = parse_object(raw, str(path), "delta")
    try:
        version, checksum, encoding, separator = map(table.__getitem__, _SETTINGS)
        file, digest, said = table["payload"]["file"], table["payload"]["sha256"], tuple(map(str, table["said"]))
        rows = tuple(_rows(_leaf_row, table["leaves"], path, "a leaf"))
        files = tuple(_rows(_file_row, table["files"], path, "a file beside the weights"))
    except (KeyError, TypeError) as error:
        raise BadCheckpoint(f"{path}: it is no manifest of a delta: {error!r:.200}") from None
    if version != VERSION or encoding not in ("xor", "overwrite") or separator not in ("/", ".") or file != FILE:
        raise BadCheckpoint(f"{path}: it is of a version that is unknown: another version of Paramend may read it")
    if not (folder / FILE).is_file() or digest_of(folder / FILE) != digest:
        raise BadCheckpoint(f"{folder / FILE}: it is missing, or not what was written: its digest differs", hint=_AGAIN)
    hasher(checksum)  # for its error
    found = {"rows": rows, "files": files, "checksum": checksum, "xor": encoding == "xor", "separator": separator}
    return found | {"said": said, "payload": Payload(folder / FILE, xor=encoding == "xor")}


def _seal(text: bytes) -> bytes:
    """How a manifest begins: with the digest of all that follows."""
    return b'{\n"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'",'


def _rows(read: Callable[[Any], T], listed: Any, file: Path, what: str) -> Iterator[T]:
    for data in listed:
        try:
            yield read(data)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise BadCheckpoint(f"{file}: {shown(repr(data))} does not say what becomes of {what}") from None


def _leaf_row(data: Any) -> LeafRow:
    path, spec = _keys(data["path"]), _spec(data.get("spec"))
    was = _keys(data["was"]) if "was" in data else path
    before = _spec(data["before"]) if "before" in data else spec if was is not None and "spec" in data else None
    base, held = _text(data["base"]), _text(data.get("held", ""))
    result, counts = _text(data.get("result", base)), [data.get("changed", 0), data.get("nbytes", 0)]
    sound = all(type(count) is int and count >= 0 for count in counts) and (path or was) is not None
    if not sound or (was is not None and not (base and before)) or (path is not None and not (result and spec)):
        raise ValueError
    return LeafRow(path, was, spec, before, base, result if path is not None else "", counts[0], held, counts[1])


def _file_row(data: Any) -> FileChange:
    row = FileChange(_text(data["name"]), _text(data["base"]), _text(data["result"]), int(data["nbytes"]))
    if BESIDE.fullmatch(row.name) is None or is_index(row.name):
        raise ValueError
    return row


def _text(data: Any) -> str:
    if type(data) is not str:
        raise TypeError
    return data


def _keys(data: Any) -> Keys | None:
    if data is None:
        return None
    if type(data) is not list or not 0 < len(data) <= MAX_PIECES:
        raise TypeError
    return tuple(map(_text, data))


def _spec(data: Any) -> Spec | None:
    if data is None:
        return None
    dtype, *shape = data
    if len(shape) > MAX_AXES or not all(type(length) is int and length >= 0 for length in shape):
        raise TypeError
    return Spec(tuple(shape), _text(dtype))
