"""The manifest of a delta: its rows as JSON, which begins with the digest of all that follows."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paramend.deltas.checksums import hasher
from paramend.deltas.payload import FILE, Payload, digest_of
from paramend.deltas.rows import BESIDE, FileChange, Keys, LeafRow
from paramend.disk.io import get, reading, write_file
from paramend.errors import BadCheckpoint
from paramend.formats.index import is_index
from paramend.formats.jsontext import parse_object
from paramend.formats.limits import MAX_AXES, MAX_PIECES, shown
from paramend.leaves.specs import Spec

NAME, VERSION = "delta.json", 1
_MOST = 1 << 29  # bytes
_AGAIN = "copy or download it again"


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
        version, checksum, encoding, separator = (
            table[key] for key in ("version", "checksum", "encoding", "separator")
        )
        file, digest, said = table["payload"]["file"], table["payload"]["sha256"], tuple(map(str, table["said"]))
        rows = tuple(_leaf_row(data, str(path)) for data in table["leaves"])
        files = tuple(_file_row(data, str(path)) for data in table["files"])
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


def _leaf_row(data: Any, file: str) -> LeafRow:
    try:
        path, spec = _keys(data["path"]), _spec(data.get("spec"))
        was = _keys(data["was"]) if "was" in data else path
        before = _spec(data["before"]) if "before" in data else spec if was is not None and "spec" in data else None
        base, held = _text(data["base"]), _text(data.get("held", ""))
        result, counts = _text(data.get("result", base)), [data.get("changed", 0), data.get("nbytes", 0)]
        sound = all(type(count) is int and count >= 0 for count in counts) and (path or was) is not None
        sound = sound and (was is None or bool(base and before)) and (path is None or bool(result and spec))
    except (KeyError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise BadCheckpoint(f"{file}: {shown(repr(data))} does not say what becomes of a leaf")
    return LeafRow(path, was, spec, before, base, result if path is not None else "", counts[0], held, counts[1])


def _file_row(data: Any, file: str) -> FileChange:
    try:
        row = FileChange(_text(data["name"]), _text(data["base"]), _text(data["result"]), int(data["nbytes"]))
        sound = BESIDE.fullmatch(row.name) is not None and not is_index(row.name)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise BadCheckpoint(f"{file}: {shown(repr(data))} does not say what becomes of a file beside the weights")
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
