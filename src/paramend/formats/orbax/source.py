"""Orbax directories: arrays in a zarr store, and `_METADATA`, a table with the keys and the kind of each.

Opening reads the JSON only. Arrays are read by tensorstore, which is imported on first use; so are specs if
the store is OCDBT, one database of all arrays. orbax itself is not needed.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from paramend.disk.identity import check_still
from paramend.disk.urls import path_of
from paramend.errors import BadCheckpoint, CannotRead
from paramend.formats.files import closed
from paramend.formats.jsontext import bad
from paramend.formats.limits import MAX_PIECES, shown
from paramend.formats.orbax.store import MANIFEST, Box, OrbaxEntry, Stage, Store, blamed, read_json
from paramend.formats.orbax.writer import ARRAYS, KEY, STEP, STRINGS, TREE, Keys, OrbaxWriter
from paramend.formats.source import Opened, check_readable, padded
from paramend.leaves.leaves import Index
from paramend.leaves.outlines import BOXED, Outline, Place, shown as shown_keys
from paramend.leaves.specs import Array, Spec, numpy_dtype
from paramend.reports import wording

# The least number of elements to read at once: smaller requests cost more than their bytes.
_BLOCK = 1 << 20
_EVERY = "store_array_data_equal_to_fill_value"
_EMPTY: dict[str, Callable[[], Any]] = {"None": lambda: None, "Dict": dict, "List": list, "Tuple": tuple}

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


class OrbaxWalk:
    """The leaves that a table of metadata lists."""

    def __init__(self, folder: Path, table: Mapping[str, Any]) -> None:
        self.file = str(folder / TREE)
        self.index = Index("/")
        # Keys → the place of a leaf, or an entry that is not an array. The key "value" of a box is left out.
        self.entries: list[tuple[Keys, Any]] = []
        # By number, the implementation of a typed PRNG key whose numbers a leaf is.
        self.implementations: dict[int, str] = {}
        self.names: list[str] = []  # by number, the name of a leaf in the store
        # By number, Orbax's name for the kind of a leaf: "jax.Array", "np.ndarray", "scalar" ...
        self.kinds: list[str] = []
        self.others: dict[str, Any] = {}  # path → an entry that is not an array
        rows = table.get("tree_metadata")
        if type(rows) is not dict:
            raise bad(self.file, "tree_metadata", "an object is expected")
        texts = read_json(folder / STRINGS) if (folder / STRINGS).is_file() else {}
        found: list[tuple[str, Keys, str, Any]] = []
        for title, row in rows.items():
            keys, kind = self._row(title, row)
            value: Any = _LEAF
            if kind == "string" and type(texts.get(".".join(map(str, keys)))) is str:
                value = texts[".".join(map(str, keys))]
            elif kind in _EMPTY or row["value_metadata"].get("skip_deserialize"):
                value = _EMPTY.get(kind, dict)()
            found.append((title, keys, kind, value))
        boxed = _boxes(found, rows)
        implementations = _implementations(folder)
        tree: dict[str | int, Any] = {}
        for title, keys, kind, value in found:
            if value is not _LEAF:
                self.entries.append((keys, value))
                self.others[shown_keys(keys)] = value
                continue
            own, name, number = keys[:-1] if keys in boxed else keys, ".".join(map(str, keys)), len(self.names)
            self._leaf(tree, own, title, number)
            box = "NNX Variable" if keys in boxed else ""
            place = Place(number, number, box, implementations.get(name, ""), scalar=kind == "scalar")
            self.implementations |= {number: place.key} if place.key else {}
            self.entries.append((own, place))
            self.names.append(name)
            self.kinds.append(kind)
        self._enter(tree, self.index.names)
        self.custom = table.get("custom_metadata")  # the user's metadata, or None
        if self.custom is not None:
            self.others["custom_metadata"] = self.custom

    def _row(self, title: str, row: Any) -> tuple[Keys, str]:
        place = f"tree_metadata, {shown(title)}"
        keys, value = (row.get("key_metadata"), row.get("value_metadata")) if type(row) is dict else (None, None)
        if type(keys) is not list or type(value) is not dict or type(value.get("value_type")) is not str:
            raise bad(self.file, place, "key_metadata and value_metadata with a value_type are expected")
        found: list[str | int] = []
        for key in keys:
            text, kind = (key.get("key"), key.get("key_type")) if type(key) is dict else (None, None)
            if type(text) is not str or kind not in (1, 2):
                reason = "a key of type 1 (of a list) or 2 (of a dict) is expected"
                raise bad(self.file, f"{place}, key_metadata", reason)
            if kind == 1 and not (text.isdigit() and text.isascii() and len(text) < 19):
                raise bad(self.file, f"{place}, key_metadata", f"{shown(text)} is not a position in a list")
            found.append(int(text) if kind == 1 else text)
        if sum(key.count(".") + key.count("/") + 1 if type(key) is str else 1 for key in found) > MAX_PIECES:
            raise bad(self.file, place, f"the name has more than {MAX_PIECES} pieces")
        return tuple(found), value["value_type"]

    def _leaf(self, tree: dict[str | int, Any], keys: Keys, title: str, number: int) -> None:
        *outer, last = keys or ("",)  # a tree that is a single array
        for key in outer:
            tree = tree.setdefault(key, {})
            if type(tree) is not dict:
                break
        if type(tree) is not dict or last in tree:
            raise bad(self.file, f"tree_metadata, {shown(title)}", "another leaf has its path, or part of it")
        tree[last] = number
        self.index.numbers.append(number)

    def _enter(self, tree: Mapping[str | int, Any], names: dict[Any, Any]) -> None:
        for key, child in tree.items():
            if type(child) is dict:
                inner: dict[Any, Any] = {}
                self._enter(child, inner)
                self.index.add(names, key, inner)
            else:
                self.index.add(names, key, child)


_LEAF = object()


def _boxes(found: list[tuple[str, Keys, str, Any]], rows: Mapping[str, Any]) -> set[Keys]:
    """The leaves that are the content of boxes: all leaves but counters are the only entry, "value", of a dict. Orbax
    writes the Variables of an `nnx.state` so; the names of the module end at the Variable."""
    inside = Counter(keys[:at] for _, keys, _, _ in found for at in {len(keys) - 1} if keys)
    leaves = {title: keys for title, keys, kind, value in found if value is _LEAF}
    boxes = {keys for keys in leaves.values() if len(keys) > 1 and keys[-1] == BOXED and inside[keys[:-1]] == 1}
    others = {title for title, keys in leaves.items() if keys not in boxes}
    others = {title for title in others if rows[title]["value_metadata"].get("write_shape") != []}
    return set() if any(kind != "scalar" for title, _, kind, _ in found if title in others) else boxes


def _implementations(folder: Path) -> dict[str, str]:
    """The implementation of each typed PRNG key, by the name of its numbers in the store."""
    found: dict[str, str] = {}
    for path in sorted((folder / ARRAYS).glob("process_*")):
        rows = read_json(path).get("array_metadatas")
        for row in rows if type(rows) is list else ():
            said = row.get("array_metadata") if type(row) is dict else None
            name, more = (said.get("param_name"), said.get("ext_metadata")) if type(said) is dict else (None, None)
            if type(name) is str and type(more) is dict and type(more.get(KEY)) is str:
                found[name] = more[KEY]
    return found


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
    inner = [path / entry.name for entry in os.scandir(path) if entry.is_dir()] if (path / STEP).is_file() else []
    if not inner and _holds_tree(path / "default"):
        return path / "default"
    trees = sorted(folder for folder in inner if _holds_tree(folder))
    if len(trees) > 1:
        names = wording.listing([folder.name for folder in trees])
        raise BadCheckpoint(f"{path}: it holds {len(trees)} trees: {names}", hint=f"open one of them: {trees[0]}")
    return trees[0] if trees else None


def _holds_tree(path: Path) -> bool:
    return (path / TREE).is_file() or (path / MANIFEST).is_file()
