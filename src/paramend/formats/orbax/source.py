"""Orbax directories: arrays in a zarr store, and `_METADATA`, which describes their tree.

Opening reads the JSON only. Arrays are read by tensorstore, which is imported on first use; so are specs if
the store is OCDBT, one database of all arrays. orbax itself is not needed.
"""

import math
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from paramend.disk.identity import check_still
from paramend.disk.urls import path_of
from paramend.errors import BadCheckpoint, CannotRead
from paramend.formats.files import closed
from paramend.formats.orbax.store import MANIFEST, Box, OrbaxEntry, Stage, Store, blamed, read_json
from paramend.formats.orbax.tree import TREE, OrbaxWalk
from paramend.formats.orbax.writer import OrbaxWriter
from paramend.formats.source import Opened, check_readable, padded
from paramend.leaves.outlines import Outline
from paramend.leaves.specs import Array, Spec, numpy_dtype
from paramend.reports import wording

_STEP = "_CHECKPOINT_METADATA"
# The least number of elements to read at once: smaller requests cost more than their bytes.
_BLOCK = 1 << 20
_EVERY = "store_array_data_equal_to_fill_value"

WRITER = OrbaxWriter()


class OrbaxCheckpoint(Opened):
    """An Orbax checkpoint as `Leaves`: of `StandardCheckpointer`, `PyTreeCheckpointer`, or a `CheckpointManager`. In
    the folder of a manager the latest step is opened."""

    format = "orbax"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path_of(path)
        self.ties: Mapping[int, int] = {}  # nothing: in a checkpoint each array has one name
        self._closed = False
        self._drop()
        try:
            self.folder, self.steps = _find(self.path)  # the folder within it that holds the tree
            table = read_json(self.folder / TREE) if (self.folder / TREE).is_file() else None
        except FileNotFoundError:
            raise CannotRead(f"{self.path}: there is no such directory") from None
        except OSError as error:
            if isinstance(error, CannotRead):
                raise
            raise CannotRead(f"{self.path}: it cannot be read: {error.strerror or error}") from None
        database = (self.folder / MANIFEST).is_file()
        if table is not None and table.get("use_ocdbt") and not database:
            why = f"{MANIFEST} is missing: the checkpoint was not finished, or not copied completely"
            raise BadCheckpoint(f"{self.folder}: {why}")
        # A missing chunk is a sign of damage only if every chunk was written.
        zarr3, whole = (bool(table and table.get(key)) for key in ("use_zarr3", _EVERY))
        self.store = Store(self.folder, database=database, zarr3=zarr3, whole=whole)
        self.walk = walk = OrbaxWalk(self.folder, table if table is not None else self._listed())
        self.index, self.names = walk.index, walk.names
        # What else is in the tree, by path: text, None, empty containers; and custom metadata under "custom_metadata".
        self.metadata: Mapping[str, Any] = walk.others
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stores": {}, "_block": None}  # a copy reopens them

    def __repr__(self) -> str:
        step = f", step {self.steps[-1]} of {wording.listing([*map(str, self.steps)], 10)}" if self.steps else ""
        return f"<{self.path}: {wording.plural(len(self.names), 'leaf', 'leaves')}{step}>"

    def close(self) -> None:
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        self._stores: dict[int, Any] = {}
        self._block: tuple[int, int, Array] | None = None  # what was read last

    @property
    def implementations(self) -> Mapping[int, str]:
        return self.walk.implementations

    def outline(self) -> Outline:
        entries = self.walk.entries
        lists: dict[Any, Any] = {k[:at]: [] for k, _ in entries for at, key in enumerate(k) if type(key) is int}
        return Outline([] if entries == [((), {})] else entries, lists, self.format)

    def spec(self, number: int) -> Spec:
        """Shape and dtype of a leaf. The first call reads those of all leaves, of OCDBT with tensorstore."""
        return self._arrays[number].spec

    def nbytes(self, number: int) -> int:
        return self.spec(number).nbytes

    def refusal(self, number: int) -> str:
        dtype = self.spec(number).dtype
        if dtype.startswith("raw<"):
            return f"its dtype, {dtype[4:-1]!r}, is unknown"
        return padded(dtype)

    def extent(self, number: int) -> None:
        """None: the bytes in a store are compressed and chunked."""

    def read(self, number: int) -> Array:
        check_readable(self, number)
        array = self._fetch(number, ...)
        array.flags.writeable = False
        return array

    def read_range(self, number: int, start: int, stop: int) -> Array:
        """The elements `start` to `stop` of a leaf in C order: a new array with one axis. Whole chunks of the store are
        decompressed, and the last ones are kept, so that consecutive ranges share one pass. Memory is bounded by the
        rows that a chunk spans."""
        check_readable(self, number)
        spec, step = self.spec(number), self._arrays[number].rows
        inner = math.prod(spec.shape[1:]) if spec.shape else 1
        if stop <= start:
            return np.empty(0, numpy_dtype(spec.dtype))
        rows = max(_BLOCK // inner // step, 1) * step
        parts = []
        for first in range(start // inner // rows * rows, -(-stop // inner), rows):
            block = self._flat(number, first, min(first + rows, spec.shape[0] if spec.shape else 1))
            parts.append(block[max(start - first * inner, 0) : stop - first * inner])
        return np.concatenate(parts)

    def chunks(self, number: int) -> tuple[int, ...]:
        return self._arrays[number].chunks

    def read_box(self, number: int, box: Box) -> Array:
        check_readable(self, number)
        return self._fetch(number, box)

    def forget(self) -> None:
        """Forget what was read, after files were replaced."""
        self._drop()
        # The stat results of the table, and of a database's manifest, when they were opened.
        self.stats = {path: path.stat() for path in (self.folder / TREE, self.folder / MANIFEST) if path.is_file()}

    def stage(self, folder: Path, numbers: Iterable[int]) -> Stage:
        """A stage for new chunks of some leaves, in files in a folder that are then moved to the same places here."""
        stage = Stage(self.store, folder)
        for number in numbers:
            stage.open(self.names[number], self._arrays[number])
        return stage

    @cached_property
    def _arrays(self) -> list[OrbaxEntry]:
        self._check_open()
        return self.store.describe(self.names)

    def _listed(self) -> dict[str, Any]:
        """A table made from the names of all arrays, for a store without one: dots separate keys."""
        rows = {}
        for name in self.store.names():
            keys = [{"key": key, "key_type": 2} for key in name.split(".")]
            rows[name] = {"key_metadata": keys, "value_metadata": {"value_type": "jax.Array"}}
        return {"tree_metadata": rows}

    def _check_open(self) -> None:
        if self._closed:
            raise closed(self.path)
        check_still(self.stats)

    def _store(self, number: int) -> Any:
        if number not in self._stores:
            self._stores[number] = self.store.open(self.names[number], self.index.path(number))
        return self._stores[number]

    def _fetch(self, number: int, where: Any) -> Array:
        self._check_open()
        spec = self.spec(number)
        box = () if where is ... else where if isinstance(where, tuple) else (where,)
        elements = math.prod([part.stop - part.start for part in box]) * math.prod(spec.shape[len(box) :])
        self._check_room(number, elements)
        store = self._store(number)
        with blamed(self.folder, self.index.path(number)):
            array: Array = np.asarray(store[where].read(order="C").result())
        if array.dtype.name != spec.dtype:
            raise BadCheckpoint(f"{self.folder}: {self.index.path(number)}: it reads as {array.dtype.name}")
        return array

    def _check_room(self, number: int, elements: int) -> None:
        """Raise if memory lacks room for so many elements or for one chunk: tensorstore would end the process."""
        entry = self._arrays[number]
        width = numpy_dtype(entry.spec.dtype).itemsize
        for nbytes in (elements * width, entry.chunk * width):
            try:
                np.empty(nbytes, np.uint8)
            except (MemoryError, ValueError):
                what = f"{self.folder}: {self.index.path(number)}"
                raise BadCheckpoint(f"{what}: {nbytes:,} bytes at once are more than fit in memory") from None

    def _flat(self, number: int, first: int, stop: int) -> Array:
        """Some rows of an array as one axis; those read last are kept."""
        if self._block is None or self._block[:2] != (number, first):
            self._block = None  # so that two are never held at once
            where = slice(first, stop) if self.spec(number).shape else ...
            self._block = (number, first, self._fetch(number, where).reshape(-1))
        return self._block[2]


def home(path: Path) -> Path:
    """The folder that holds the tree of a checkpoint, where its undo records are; the path itself if there is none."""
    try:
        return _find(path)[0]
    except (OSError, BadCheckpoint):
        return path


def _find(path: Path) -> tuple[Path, tuple[int, ...]]:
    """The folder that holds the tree, and the steps of a manager."""
    if not path.is_dir():
        path.stat()
        raise BadCheckpoint(f"{path}: it is a file, but an Orbax checkpoint is a directory")
    found = _item(path)
    if found is not None:
        return found, ()
    steps: dict[int, Path] = {}
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        last = entry.name.rpartition("_")[2]
        if last.isdigit() and last.isascii() and len(last) < 19 and entry.is_dir():
            steps[int(last)] = path / entry.name
    for number in sorted(steps, reverse=True):
        found = _item(steps[number])
        if found is not None:
            return found, tuple(step for step in sorted(steps) if step <= number)
    inside = [entry.name for entry in os.scandir(path)]
    held = f"it holds {wording.listing(sorted(inside), 4)}" if inside else "it is empty"
    raise BadCheckpoint(f"{path}: it holds no Orbax tree ({TREE} or {MANIFEST}): {held}")


def _item(path: Path) -> Path | None:
    """The folder that holds the tree: this one, or the only one in a step that does."""
    if _holds_tree(path):
        return path
    inner = [path / entry.name for entry in os.scandir(path) if entry.is_dir()] if (path / _STEP).is_file() else []
    if not inner and _holds_tree(path / "default"):
        return path / "default"
    trees = sorted(folder for folder in inner if _holds_tree(folder))
    if len(trees) > 1:
        names = wording.listing([folder.name for folder in trees])
        raise BadCheckpoint(f"{path}: it holds {len(trees)} trees: {names}", hint=f"open one of them: {trees[0]}")
    return trees[0] if trees else None


def _holds_tree(path: Path) -> bool:
    return (path / TREE).is_file() or (path / MANIFEST).is_file()
