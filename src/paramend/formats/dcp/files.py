"""One file of a distributed checkpoint: items one after the other, each a whole file of `torch.save`."""

import mmap
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from paramend.errors import BadCheckpoint
from paramend.formats.dcp.metadata import Chunk, Entry
from paramend.formats.files import FileSource, OpenFile
from paramend.formats.source import check_readable
from paramend.formats.torch.source import TorchFile
from paramend.leaves.leaves import Index
from paramend.leaves.origins.origin import Extent
from paramend.leaves.specs import Array, Spec

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


class DistFile(FileSource):
    """A `.distcp` file as a source of chunks. What is within an item is read when it is first used."""

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
            item = row.chunk.item
            if item.start + item.nbytes > self._file.size:
                raise BadCheckpoint(
                    f"{self.path}: it has {self._file.size:,} bytes, and {row.name} would be at "
                    f"{item.start:,} to {item.start + item.nbytes:,}",
                    hint="copy or download it again",
                )

    @cached_property
    def index(self) -> Index:  # type: ignore[override]  # messages alone need it
        return Index.of_names([f"{row.name}{list(row.chunk.offsets)}" for row in self.rows])

    def release(self) -> None:
        self._file.release()

    def hold(self) -> None:
        self._file.hold()

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
            self._extents[number] = self._moved(number, self._item(number).extent(0))
        return self._extents[number]

    def read(self, number: int) -> Array:
        check_readable(self, number)
        return super().read(number) if self.extent(number) is not None else self._item(number).read(0)

    def patched_too(self, extents: Sequence[Extent]) -> list[Extent]:
        return [
            Extent(self.path, each.start + start, each.nbytes)
            for item, start, inner in self._within(extents)
            for each in item.patched_too(inner)
        ]

    def after_patch(self, extents: Sequence[Extent]) -> list[tuple[Path, int, bytes]]:
        return [
            (self.path, at + start, data)
            for item, start, inner in self._within(extents)
            for _, at, data in item.after_patch(inner)
        ]

    def _within(self, extents: Sequence[Extent]) -> list[tuple[TensorItem, int, list[Extent]]]:
        """The items that hold these bytes, each with where it begins, and the bytes relative to that."""
        starts = [row.chunk.item.start for row in self.rows]
        found: dict[int, list[Extent]] = {}
        for each in extents:
            number = bisect_right(starts, each.start) - 1
            found.setdefault(number, []).append(Extent(self.path, each.start - starts[number], each.nbytes))
        return [(self._item(number), starts[number], inner) for number, inner in found.items()]

    def _moved(self, number: int, extent: Extent | None) -> Extent | None:
        start = self.rows[number].chunk.item.start
        return None if extent is None else Extent(self.path, start + extent.start, extent.nbytes)

    def _item(self, number: int) -> TensorItem:
        """The item of a chunk, those used last being kept; `BadCheckpoint` if it is not that tensor."""
        if number not in self._items:
            if len(self._items) >= _KEPT:
                self._items.clear()
            self._items[number] = self._opened(number)
        return self._items[number]

    def _opened(self, number: int) -> TensorItem:
        row = self.rows[number]
        item = TensorItem(Section(self._file, row.chunk.item.start, row.chunk.item.nbytes))
        found = item.tensors[0].spec if len(item.tensors) == 1 else None
        if found != row.spec:
            held = f"{len(item.tensors)} tensors" if found is None else str(found)
            raise BadCheckpoint(
                f"{self.path}: byte {row.chunk.item.start:,}: a chunk of {row.name}, {row.spec}, should be there, and "
                f"it holds {held}"
            )
        return item
