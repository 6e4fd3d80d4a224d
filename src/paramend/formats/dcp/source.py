"""Distributed checkpoints of torch as sources: each tensor is its global array, put together when it is read."""

import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from paramend.disk.urls import path_of
from paramend.errors import BadCheckpoint
from paramend.formats.dcp.metadata import (
    METADATA,
    SUFFIX,
    Chunk,
    Entry,
    Manifest,
    metadata_bytes,
    read_manifest,
    relabelled,
)
from paramend.formats.dcp.writer import DcpWriter
from paramend.formats.files import FlatFile, OpenFile
from paramend.formats.jsontext import parse_object
from paramend.formats.limits import shown
from paramend.formats.source import Few, Gathering, check_readable, opening
from paramend.formats.tiles import Tile, assembled
from paramend.formats.torch.pickles import Foreign
from paramend.formats.torch.source import TorchFile
from paramend.leaves.leaves import Index, separator_of
from paramend.leaves.origins.boxes import Box
from paramend.leaves.origins.origin import Extent, Origin
from paramend.leaves.outlines import Keys, Outline, Place
from paramend.leaves.specs import Array, Spec
from paramend.reports import wording

_KEPT = 64


class Section(OpenFile):
    """Some bytes of an open file, as a file."""

    def __init__(self, whole: OpenFile, start: int, nbytes: int) -> None:
        self._whole, self._start, self._nbytes = whole, start, nbytes
        self.path, self.stat = whole.path, whole.stat

    @property
    def size(self) -> int:
        return self._nbytes

    def close(self) -> None:
        """Nothing: the file stays open."""

    def read(self, start: int, nbytes: int) -> bytes:
        if start + nbytes > self._nbytes:
            raise BadCheckpoint(f"{self.path}: an item of {self._nbytes:,} bytes ends too early")
        return self._whole.read(self._start + start, nbytes)

    def memory(self, start: int, nbytes: int) -> tuple[Any, int]:
        return self._whole.memory(self._start + start, nbytes)

    @property
    def map(self) -> mmap.mmap:
        return memoryview(self._whole.map)[self._start : self._start + self._nbytes]  # type: ignore[return-value]


class TensorItem(TorchFile):
    """One item: a file of `torch.save` that holds one tensor. Places are relative to its first byte."""

    def __init__(self, section: Section) -> None:
        self._file, self.path = section, section.path
        self._begin()


class ItemRow(NamedTuple):
    """A chunk as `.metadata` has it."""

    name: str
    entry: Entry
    chunk: Chunk

    @property
    def spec(self) -> Spec:
        return Spec(self.chunk.sizes, self.entry.spec.dtype)

    @property
    def nbytes(self) -> int:
        return (self.spec.size * self.entry.tensor.bits + 7) // 8


class DistFile(FlatFile):
    """A `.distcp` file as a source of chunks: items one after the other, each a whole file of `torch.save`, which is
    read when it is first used."""

    format = "dcp"
    rows: Sequence[ItemRow]

    def __init__(self, path: Path, rows: Sequence[ItemRow]) -> None:
        self.rows = sorted(rows, key=lambda row: row.chunk.item.start)
        self._extents: dict[int, Extent | None] = {}
        self._items: dict[int, TensorItem] = {}
        super().__init__(path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_items": {}}

    def _begin(self) -> None:
        for row in self.rows:
            start, stop = row.chunk.item.start, row.chunk.item.start + row.chunk.item.nbytes
            if stop > self._file.size:
                reason = f"it has {self._file.size:,} bytes, and {row.name} would be at {start:,} to {stop:,}"
                raise BadCheckpoint(f"{self.path}: {reason}", hint="copy or download it again")

    @cached_property
    def index(self) -> Index:  # type: ignore[override]  # messages alone need it
        return Index.of_names([f"{row.name}{list(row.chunk.offsets)}" for row in self.rows])

    def refusal(self, number: int) -> str:
        row = self.rows[number]
        if row.chunk.item.transforms:
            return f"its bytes went through an extension, {', '.join(row.chunk.item.transforms)}, which is not known"
        dtype = row.spec.dtype
        return f"its dtype, {dtype[4:-1]}, has no counterpart in numpy" if dtype.startswith("raw<") else ""

    def extent(self, number: int) -> Extent | None:
        if self.rows[number].chunk.item.transforms:
            return None
        if number not in self._extents:
            inner = self._item(number).extent(0)
            start = self.rows[number].chunk.item.start
            self._extents[number] = inner and replace(inner, start=inner.start + start)
        return self._extents[number]

    def read(self, number: int) -> Array:
        check_readable(self, number)
        return super().read(number) if self.extent(number) is not None else self._item(number).read(0)

    def patched_too(self, extents: Sequence[Extent]) -> list[Extent]:
        found = ((start, each) for item, start, inner in self._within(extents) for each in item.patched_too(inner))
        return [replace(each, start=each.start + start) for start, each in found]

    def after_patch(self, extents: Sequence[Extent]) -> list[tuple[Path, int, bytes]]:
        found = ((start, each) for item, start, inner in self._within(extents) for each in item.after_patch(inner))
        return [(path, at + start, data) for start, (path, at, data) in found]

    def _within(self, extents: Sequence[Extent]) -> list[tuple[TensorItem, int, list[Extent]]]:
        """The items that hold these bytes, each with where it begins, and the bytes relative to that."""
        starts = [row.chunk.item.start for row in self.rows]
        found: dict[int, list[Extent]] = {}
        for each in extents:
            number = bisect_right(starts, each.start) - 1
            found.setdefault(number, []).append(Extent(self.path, each.start - starts[number], each.nbytes))
        return [(self._item(number), starts[number], inner) for number, inner in found.items()]

    def _item(self, number: int) -> TensorItem:
        """The item of a chunk, those used last being kept; `BadCheckpoint` if it is not that tensor."""
        if number in self._items:
            return self._items[number]
        row = self.rows[number]
        place = row.chunk.item
        item = TensorItem(Section(self._file, place.start, place.nbytes))
        found = item.tensors[0].spec if len(item.tensors) == 1 else None
        if found != row.spec:
            held = f"it holds {f'{len(item.tensors)} tensors' if found is None else found}"
            reason = f"a chunk of {row.name}, {row.spec}, should be there, and {held}"
            raise BadCheckpoint(f"{self.path}: byte {place.start:,}: {reason}")
        if len(self._items) >= _KEPT:
            self._items.clear()
        self._items[number] = item
        return item


WRITER = DcpWriter()
_AGAIN = "copy or download the checkpoint again"


class Assembled(Gathering):
    """A source whose leaves are put together from chunks in several files."""

    format = ""
    ties: Mapping[int, int] = {}

    def __init__(self, path: Path, files: Sequence[Any], leaves: Mapping[str, Origin]) -> None:
        self.path = self.folder = path
        self.files = tuple(files)
        self._origins = list(leaves.values())
        self.index = Index.of_names(leaves, separator_of(leaves))

    def __repr__(self) -> str:
        leaves = wording.plural(len(self._origins), "leaf", "leaves")
        return f"<{self.path}: {leaves} in {wording.plural(len(self.files), 'file')}>"

    @property
    def sources(self) -> Sequence[Any]:
        return self.files

    def origin(self, number: int) -> Origin:
        return self._origins[number]

    def tiles(self, number: int) -> list[Tile]:
        return [each for each in self.origin(number).stored() if isinstance(each, Tile)]

    def read_box(self, number: int, box: tuple[slice, ...]) -> Array:
        """The elements of a leaf within a box."""
        places: Box = tuple(range(part.start, part.stop) for part in box)
        return self.origin(number).read_box(places)


class DcpCheckpoint(Assembled):
    """A directory of `torch.distributed.checkpoint` as `Leaves`: `.metadata`, and files of chunks."""

    format = "dcp"
    steps = ()

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = path_of(path)
        if not (path / METADATA).is_file():
            why = f"{METADATA} is missing: the checkpoint was not finished, or not copied completely"
            raise BadCheckpoint(f"{path}: {why}")
        with closing(OpenFile(path / METADATA)) as file, opening() as files:
            self.manifest: Manifest = read_manifest(file)
            self._own = {file.path: file.stat}
            _open_files(path, self.manifest, files)
            super().__init__(path, files, dict(_leaves(path, files, self.manifest)))
        # What else is there, by name: its bytes are not read.
        self.metadata: Mapping[str, Any] = {
            name: Foreign(f"{item.nbytes:,} bytes") for name, item in self.manifest.objects.items()
        }

    @property
    def stats(self) -> Mapping[Path, os.stat_result]:
        return {**self._own, **super().stats}

    def outline(self) -> Outline:
        """What is there, at its place in the nested state dict."""
        paths = self.manifest.paths
        found = [(name, Place(number)) for number, name in enumerate(self.manifest.tensors)]
        entries: list[tuple[Keys, Any]] = [
            (paths.get(name, (name,)), value) for name, value in [*found, *self.metadata.items()]
        ]
        lists: dict[Keys, Any] = {k[:at]: [] for k, _ in entries for at, key in enumerate(k) if type(key) is int}
        return Outline(entries, lists, self.format)

    @property
    def objects(self) -> set[Path]:
        """The files that hold what is not a tensor."""
        return {self.path / item.file for item in self.manifest.objects.values()}

    def relabelled(self, names: Mapping[int, str]) -> tuple[Path, bytes, bytes]:
        old = list(self.manifest.tensors)
        found = relabelled(self.manifest, {old[number]: name for number, name in names.items()})
        return self.path / METADATA, (self.path / METADATA).read_bytes(), metadata_bytes(found)


def _open_files(path: Path, manifest: Manifest, files: list[DistFile]) -> None:
    rows: dict[str, list[ItemRow]] = {}
    for name, entry in manifest.tensors.items():
        for chunk in entry.chunks:
            rows.setdefault(chunk.item.file, []).append(ItemRow(name, entry, chunk))
    for item in manifest.objects.values():
        rows.setdefault(item.file, [])
    missing = sorted(name for name in rows if not (path / name).is_file())
    if missing:
        there = wording.plural(len(missing), "file is", "files are")
        raise BadCheckpoint(f"{path}: {there} missing: {wording.listing(missing, 3)}", hint=_AGAIN)
    for name, mine in rows.items():
        files.append(DistFile(path / name, mine))
        files[-1].release()


def _leaves(path: Path, files: Sequence[DistFile], manifest: Manifest) -> Iterator[tuple[str, Origin]]:
    few = Few()
    homes = {id(row.chunk): (file, number) for file in files for number, row in enumerate(file.rows)}
    for name, entry in manifest.tensors.items():
        tiles = [Tile(*homes[id(chunk)], chunk.offsets, str(chunk), few) for chunk in entry.chunks]
        yield name, assembled(entry.spec, tiles, f"{path}: {name}")


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a distributed checkpoint, whole or not."""
    try:
        with (path / METADATA).open("rb") as file:
            return file.read(1) == b"\x80" or any(path.glob(f"*{SUFFIX}"))
    except OSError:
        return any(path.glob(f"*{SUFFIX}"))


def home(path: Path) -> Path:
    """The folder of a checkpoint, where its undo records are: itself."""
    return path


_INFO = "DCP_SHARDING_INFO"
_NAME = re.compile(r"shard-(\d{5,9})-model-(\d{5,9})-of-(\d{5,9})\.safetensors")


class ShardedModel(Assembled):
    """A directory that `HuggingFaceStorageWriter` of torch wrote, as one model of whole tensors. Each rank has files of
    its parts, whose `__metadata__` says under DCP_SHARDING_INFO where these begin in the whole ones. Only newer files
    tell how large those are, so a part at an end that is missing may not show. Written anew, it is a plain model."""

    format = "safetensors"
    shard_index = None

    def __init__(self, path: Path, files: Iterable[Any]) -> None:
        files, few = tuple(files), Few()
        parts: dict[str, list[Tile]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            info = _info(file)
            for number, name in enumerate(file.names):
                offsets, shape, logical = _place(file, info, name, file.spec(number))
                parts.setdefault(logical, []).append(Tile(file, number, offsets, f"in {file.path.name}", few))
                if shape is not None and shapes.setdefault(logical, shape) != shape:
                    raise BadCheckpoint(f"{file.path}: {shown(logical)} has another shape than in other files")
        leaves = {name: _whole(path, name, tiles, shapes.get(name)) for name, tiles in parts.items()}
        super().__init__(path, files, leaves)
        self.metadata: Mapping[str, Any] = {"format": "pt"}


def is_sharded(names: Iterable[str]) -> bool:
    """Whether the files of a directory are those of a sharded checkpoint."""
    return any(map(_NAME.fullmatch, names))


def open_sharded(path: Path, opener: Callable[[Path], Any]) -> ShardedModel:
    """The model in a directory of such files. `BadCheckpoint` if files are missing, as far as they tell."""
    names = sorted(entry.name for entry in path.iterdir() if _NAME.fullmatch(entry.name))
    _check_all(path, names)
    with opening() as files:
        for name in names:
            files.append(opener(path / name))
            files[-1].release()
        return ShardedModel(path, files)


def _check_all(path: Path, names: Iterable[str]) -> None:
    """Raise if files of some rank, or all ranks' parts of a file of the whole model, are missing."""
    numbers = [tuple(map(int, match.groups())) for name in names if (match := _NAME.fullmatch(name))]
    ranks, places = {rank for rank, _, _ in numbers}, {place for _, place, _ in numbers}
    most = max(count for *_, count in numbers)
    for what, there, count in (("shard-{:05}", ranks, max(ranks)), ("model-{:05}", places, most)):
        missing = next((number for number in range(1, count + 1) if number not in there), None)
        if missing is not None:
            said = f"no file is named {what.format(missing)}: a part of the checkpoint is missing"
            raise BadCheckpoint(f"{path}: {said}", hint=_AGAIN)


def _info(file: Any) -> dict[str, Any]:
    text = file.metadata.get(_INFO)
    if text is None:
        raise BadCheckpoint(f"{file.path}: __metadata__ has no {_INFO}, which says where its tensors begin")
    return parse_object(text.encode(), str(file.path), _INFO)


def _place(file: Any, info: dict[str, Any], name: str, spec: Spec) -> tuple[tuple[int, ...], Any, str]:
    """Where a tensor of a file begins in the whole one, the shape of that one, if it is told, and its name."""
    said = info.get(name)
    said = said if type(said) is dict else {}
    offsets: Any = said.get("saved_offsets")
    shape, logical = said.get("shape"), said.get("logical_fqn", name)
    for each in (offsets, shape) if shape is not None else (offsets,):
        if type(each) is not list or len(each) != spec.ndim or any(type(n) is not int or n < 0 for n in each):
            raise BadCheckpoint(f"{file.path}: {_INFO} has no offsets or a false shape for {shown(name)}")
    if type(logical) is not str:
        raise BadCheckpoint(f"{file.path}: {_INFO} has a name that is not text for {shown(name)}")
    return tuple(offsets), None if shape is None else tuple(shape), logical


def _whole(path: Path, name: str, tiles: list[Tile], shape: tuple[int, ...] | None) -> Any:
    dtypes = {tile.spec.dtype for tile in tiles}
    if len(dtypes) > 1 or len({tile.spec.ndim for tile in tiles}) > 1:
        raise BadCheckpoint(f"{path}: {name}: its parts have several dtypes or numbers of axes")
    if shape is None:
        shape = tuple(max(ends) for ends in zip(*(tile.ends for tile in tiles), strict=True))
    one = {(tile.offsets, tile.spec.shape): tile for tile in reversed(tiles)}  # what several ranks wrote, alike
    return assembled(Spec(shape, dtypes.pop()), list(one.values())[::-1], f"{path}: {name}")
