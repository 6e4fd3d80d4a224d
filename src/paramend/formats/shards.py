"""A directory with a model in one file or several, as one source, and the index beside them: which file holds which."""

import json
import re
import stat
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramend.disk.urls import Url, opened_together
from paramend.errors import BadCheckpoint, CannotRead
from paramend.formats.files import FlatFile
from paramend.formats.jsontext import bad, json_type, parse_object
from paramend.formats.limits import shown
from paramend.formats.source import Few, Gathering, Overlapping, Source, opening
from paramend.leaves.leaves import Index, separator_of
from paramend.leaves.origins.stored import Stored
from paramend.leaves.outlines import Keys, Outline, Place, outline_of
from paramend.leaves.specs import Array
from paramend.reports import wording

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
        hint = f"open one of them: {folder / found[0]}"
        raise BadCheckpoint(f"{folder}: it holds {len(found)} models: {', '.join(found)}", hint=hint)
    return folder / found[0] if found else None


_SHARD = re.compile(r"-\d+-of-(\d+)\.")


class Shards(Gathering):
    """A directory of weight files as one `Source`. Made by `open_directory`."""

    def __init__(self, path: Path, folder: Path, files: Sequence[Source], shard_index: ShardIndex | None) -> None:
        self.path, self.folder, self.shard_index = path, folder, shard_index  # the path as the user wrote it
        self.files: tuple[Any, ...] = tuple(files)  # the weight files in order, each a source
        self.format: str = self.files[0].format
        self._homes: list[tuple[int, int]] = []
        self._few = Few()
        ties, names, where = dict[int, int](), list[str](), dict[str, int]()
        for place, file in enumerate(self.files):
            first = len(names)
            inner: dict[int, int] = {}
            for number, name in _names(file):
                other = where.setdefault(name, place)
                if other != place:
                    one = self.files[other].path
                    reason = f"it is in two files, {one.name} and {file.path.name}"
                    raise bad(str(folder), f"tensor {shown(name)}", reason, f"open one of them: {one}")
                inner[number] = first + len(inner)
                names.append(name)
                self._homes.append((place, number))
            ties |= {inner[number]: inner[one] for number, one in file.ties.items()}
        if shard_index is not None:
            self._check_index(shard_index, where)
        self.ties: Mapping[int, int] = ties
        self.index = Index.of_names(names, separator_of(names))
        self.metadata = self._together([file.metadata for file in self.files])

    def _together(self, metadata: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The metadata of the files, where all agree."""
        first, *rest = metadata
        return {key: value for key, value in first.items() if all(each.get(key) == value for each in rest)}

    def outline(self) -> Outline:
        numbers = {home: number for number, home in enumerate(self._homes)}
        found, containers = dict[Keys, Any](), dict[Keys, Any]()
        for place, file in enumerate(self.files):
            inner = outline_of(file)
            for keys, value in inner.entries:
                if type(value) is Place:
                    number = numbers[place, value.number]
                    value = value._replace(number=number, like=number)
                found.setdefault(keys, value)
            containers |= inner.containers
        return Outline([*found.items()], containers, self.format)

    def __repr__(self) -> str:
        leaves = wording.plural(len(self._homes), "leaf", "leaves")
        return f"<{self.path}: {leaves} in {wording.plural(len(self.files), 'file')}>"

    def _check_index(self, shard_index: ShardIndex, where: Mapping[str, int]) -> None:
        for name, shard in shard_index.weight_map.items():
            place = where.get(name)
            if place is None or self.files[place].path.name != shard:
                found = "" if place is None else f"; it is in {self.files[place].path.name}"
                reason = f"{shard} does not hold it{found}"
                raise bad(str(shard_index.path), f"weight_map, {shown(name)}", reason)

    def home(self, number: int) -> tuple[int, int]:
        """Which of `files` holds a leaf, and the number of the leaf in it."""
        return self._homes[number]

    def origin(self, number: int) -> Stored:
        place, inner = self._homes[number]
        return Stored(self.files[place], inner)

    def _opened(self, number: int) -> Stored:
        self._few.touch(self.files[self._homes[number][0]])
        return self.origin(number)

    @property
    def sources(self) -> Sequence[Any]:
        return self.files

    def overlaps(self, number: int) -> tuple[int, ...]:
        place, inner = self._homes[number]
        file = self.files[place]
        found = set(file.overlaps(inner)) if isinstance(file, Overlapping) else set()
        return tuple(n for n, (home, own) in enumerate(self._homes) if home == place and own in found) if found else ()

    def read(self, number: int) -> Array:
        return self._opened(number).read()

    def read_range(self, number: int, start: int, stop: int) -> Array:
        return self._opened(number).read_range(start, stop)


def open_directory(path: Path, opener: Callable[[Path], Source], weights: Callable[[str], bool]) -> Shards | None:
    """The model in a directory, or in that of an index file; None if the directory holds no weights: without an index,
    files of such names as `weights` takes."""
    folder, found = (path, None) if path.is_dir() else (path.parent, path)
    names = sorted(entry.name for entry in folder.iterdir())
    found = found or find_index(folder, names)
    shard_index = None if found is None else read_index(found)
    chosen = [name for name in names if weights(name)] if shard_index is None else shard_index.files
    if not chosen:
        return None
    if isinstance(folder, Url) and shard_index is None:
        _check_all(folder, chosen)
    missing = sorted(set(chosen) - set(names))
    if missing:
        are = wording.plural(len(missing), "file is", "files are")
        reason = f"{are} missing: {wording.listing(missing, 3)}"
        raise bad(str(found), "weight_map", reason, "copy or download the model again")
    with opening() as files:
        for place in opened_together([folder / name for name in chosen]):
            files.append(opener(place))
            files[-1].release()
        return Shards(path, folder, files, shard_index)


def _check_all(folder: Path, names: Sequence[str]) -> None:
    """Raise for some of the shards of a model without its index, which is written last."""
    counts = [int(found[1]) for name in names if (found := _SHARD.search(name))]
    if counts and len(counts) < max(counts):
        held = f"it holds {len(counts)} of {max(counts)} shards, and no index"
        why = "it is being written, or was not written to the end"
        raise BadCheckpoint(f"{folder}: {held}: {why}", hint=f"open one of them: {folder / names[0]}")


def _names(file: Source) -> Iterable[tuple[int, str]]:
    """The leaf numbers of a file, each with its name. A flat file has its names without an index."""
    if isinstance(file, FlatFile):
        return enumerate(file.names)
    return ((number, file.index.name(number)) for number in file.index.numbers)
