"""The index of a sharded model: which file holds which tensor, as Hugging Face writes it beside the shards."""

import json
import re
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramend.errors import BadCheckpoint, CannotRead
from paramend.formats.jsontext import bad, json_type, parse_object
from paramend.formats.limits import shown

SUFFIX = ".index.json"
# That of a variant, such as `model.safetensors.index.fp16.json`.
_VARIANT = re.compile(r".+\.(?:safetensors|bin)\.index\.[A-Za-z0-9_]+\.json")
_MAX = 100_000_000


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The index of a model."""

    path: Path
    weight_map: Mapping[str, str]  # tensor → the name of a file beside the index
    table: Mapping[str, Any]  # the whole content of the file

    @property
    def files(self) -> list[str]:
        """The names of the shards, sorted."""
        return sorted(set(self.weight_map.values()))

    def to_bytes(self, weight_map: Mapping[str, str], *, nbytes: int, size: int) -> bytes:
        """The text of an index for other tensors, of so many bytes and scalars; everything else in the file stays."""
        metadata = dict(self.table.get("metadata") or {})
        metadata["total_size"] = nbytes
        if "total_parameters" in metadata:
            metadata["total_parameters"] = size
        if dict(weight_map) == dict(self.weight_map) and metadata == self.table.get("metadata"):
            return self.path.read_bytes()
        return index_text({**self.table, "metadata": metadata, "weight_map": dict(weight_map)})


def is_index(name: str) -> bool:
    """Whether a file of this name is the index of a model."""
    return name.endswith(SUFFIX) or _VARIANT.fullmatch(name) is not None


def index_name(stem: str) -> str:
    """The name of the index of safetensors files with this name before their numbers.

    >>> index_name("adapter_model"), index_name("diffusion_pytorch_model.fp16")
    ('adapter_model.safetensors.index.json', 'diffusion_pytorch_model.safetensors.index.fp16.json')
    """
    name, dot, variant = stem.partition(".")
    return f"{name}.safetensors.index{dot}{variant}.json"


def index_text(table: Mapping[str, Any]) -> bytes:
    """An index as JSON text, in the layout of Hugging Face."""
    return json.dumps(table, indent=2, ensure_ascii=False).encode() + b"\n"


def read_index(path: Path) -> ShardIndex:
    """The index of a model, validated: all shards are in its folder; `BadCheckpoint` says where a rule is broken."""
    file = str(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise BadCheckpoint(f"{path}: it is not a regular file")
        if status.st_size > _MAX:
            raise bad(file, "index", f"an index of {status.st_size:,} bytes is too large")
        raw = path.read_bytes()
    except OSError as error:
        raise CannotRead(f"{path}: it cannot be read: {error.strerror or error}") from None
    table = parse_object(raw, file, "index")
    weight_map = table.get("weight_map")
    if type(weight_map) is not dict:
        found = "it is missing" if weight_map is None else f"an object is expected, not {json_type(weight_map)}"
        raise bad(file, "weight_map", found)
    if type(table.get("metadata", {})) not in (dict, type(None)):
        raise bad(file, "metadata", f"an object is expected, not {json_type(table['metadata'])}")
    if not weight_map:
        raise bad(file, "weight_map", "it lists no tensors")
    sound: set[str] = set()
    for name, shard in weight_map.items():
        if type(shard) is not str:
            raise bad(file, f"weight_map, {shown(name)}", f"a file name is expected, not {json_type(shard)}")
        if shard in sound:
            continue
        if shard in ("", ".", "..") or any(char in "/\\:" or not char.isprintable() for char in shard):
            reason = f"{shown(shard)} is not the name of a file beside the index"
            raise bad(file, f"weight_map, {shown(name)}", reason)
        sound.add(shard)
    # Each name is in a shard too, and each shard in many rows: interned, they are in memory once.
    table["weight_map"] = {sys.intern(name): sys.intern(shard) for name, shard in weight_map.items()}
    return ShardIndex(path, table["weight_map"], table)


def find_index(folder: Path, names: Iterable[str]) -> Path | None:
    """The index in a folder of these files; None if there is none, `BadCheckpoint` for several of unusual names."""
    found = sorted(filter(is_index, names))
    for usual in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if usual in found:
            return folder / usual
    safe = [name for name in found if ".safetensors.index." in name]
    found = safe or found
    if len(found) > 1:
        raise BadCheckpoint(
            f"{folder}: it holds {len(found)} models: {', '.join(found)}", hint=f"open one of them: {folder / found[0]}"
        )
    return folder / found[0] if found else None
