"""Orbax directories: arrays in a zarr store, and `_METADATA`, which says what tree they are the leaves of.

Opening reads the JSON only. Arrays go through tensorstore, which is imported when the first is asked for; so do specs
where the store is OCDBT, one database of all arrays. orbax itself is not needed.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from paramend import _text
from paramend._optional import need
from paramend.errors import BadCheckpoint, CannotRead, Unsupported
from paramend.formats.files import OpenFile
from paramend.formats.jsontext import bad, parse_object, shown
from paramend.leaves import Index, entries
from paramend.paths import labels, write_path
from paramend.specs import BITS, Spec, numpy_dtype

Array = np.ndarray[Any, Any]

MAX_JSON = 256_000_000
# Keys from the root to a leaf, the pieces of dotted names counted: trees deeper than this cannot be walked.
MAX_PIECES = 200
_U64 = 2**64
_TREE, _STORE, _STEP = "_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA"
# Elements that are read at once at least: a request each would cost more than the bytes.
_BLOCK = 1 << 20

# How zarr 2 writes the dtypes that it shares with numpy; others have their names.
_CODES = {"b1": "bool", "f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64", "c16": "complex128"}
_CODES |= {
    f"{kind}{bits // 8}": f"{name}{bits}" for kind, name in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)
}

_EMPTY: dict[str, Callable[[], Any]] = {"None": lambda: None, "Dict": dict, "List": list, "Tuple": tuple}


@dataclass(frozen=True, slots=True)
class Entry:
    """One array of a store, as its zarr metadata has it.

    Attributes:
        spec: shape and dtype; of a dtype that is unknown, such as "<U3", the dtype is "raw<<U3>".
        rows: how far a chunk of the store reaches along the first axis.
        chunk: how many elements one has.
    """

    spec: Spec
    rows: int
    chunk: int


class OrbaxCheckpoint:
    """An Orbax checkpoint as `Leaves`: of `StandardCheckpointer`, `PyTreeCheckpointer`, or a `CheckpointManager`.

    Of the folder of a manager the latest step is opened. Use it as a context manager, or `close()` it; arrays that were
    read stay valid.

    Attributes:
        path: as the user gave it.
        folder: the folder within it that holds the tree.
        steps: the steps in the folder of a manager, ascending; the last one was opened.
        index: the names; keys of dicts and positions of lists, joined by "/".
        ties: nothing: in a checkpoint each array has one name.
        keys: of each leaf its path by true keys: text in dicts, whole numbers in lists.
        metadata: what else is in the tree, by path: text, None, empty containers; and the user's own metadata under
            "custom_metadata".

    Raises:
        CannotRead: there is no such directory, or no permission to read it.
        BadCheckpoint: it is damaged, holds several trees, or none.

    >>> import json, tempfile
    >>> path = Path(tempfile.mkdtemp())
    >>> row = {"key_metadata": [{"key": "w", "key_type": 2}], "value_metadata": {"value_type": "jax.Array"}}
    >>> _ = (path / "_METADATA").write_text(json.dumps({"tree_metadata": {"('w',)": row}, "use_ocdbt": False}))
    >>> (path / "w").mkdir()
    >>> _ = (path / "w" / ".zarray").write_text('{"shape": [2, 3], "chunks": [2, 3], "dtype": "bfloat16"}')
    >>> with OrbaxCheckpoint(path) as checkpoint:
    ...     print(checkpoint.index.path(0), checkpoint.spec(0))
    w bfloat16[2,3]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.ties: Mapping[int, int] = {}
        self._closed = False
        self._stores: dict[int, Any] = {}
        self._block: tuple[int, int, Array] | None = None
        try:
            self.folder, self.steps = _find(self.path)
            table = _json(self.folder / _TREE) if (self.folder / _TREE).is_file() else None
        except FileNotFoundError:
            raise CannotRead(f"{self.path}: there is no such directory") from None
        except OSError as error:
            if isinstance(error, CannotRead):
                raise
            raise CannotRead(f"{self.path}: it cannot be read: {error.strerror or error}") from None
        self._database = (self.folder / _STORE).is_file()
        if table is not None and table.get("use_ocdbt") and not self._database:
            raise BadCheckpoint(
                f"{self.folder}: {_STORE} is missing: the checkpoint was not finished, or not copied whole"
            )
        self._zarr3 = bool(table and table.get("use_zarr3"))
        # Only where every chunk was written is one that is missing a sign of damage.
        self._whole = bool(table and table.get("store_array_data_equal_to_fill_value"))
        walk = _Walk(self.folder, table) if table is not None else _Walk(self.folder, self._listed())
        self.index, self.keys, self._names = walk.index, walk.keys, walk.names
        self.metadata: Mapping[str, Any] = walk.others

    def __repr__(self) -> str:
        step = f", step {self.steps[-1]} of {_text.listing([*map(str, self.steps)], 10)}" if self.steps else ""
        return f"<{self.path}: {_text.plural(len(self.keys), 'leaf', 'leaves')}{step}>"

    def __enter__(self) -> "OrbaxCheckpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the files back to the system."""
        self._closed = True
        self._stores.clear()
        self._block = None

    # ---- what is there ---------------------------------------------------------------------------------------

    def spec(self, number: int) -> Spec:
        """Shape and dtype of a leaf. The first call reads those of all leaves.

        Raises:
            MissingExtra: the store is OCDBT, and tensorstore is not installed.
            BadCheckpoint: an array is missing, or damaged.
        """
        return self._arrays[number].spec

    def nbytes(self, number: int) -> int:
        """The bytes of a leaf, decompressed."""
        return self.spec(number).nbytes

    def refusal(self, number: int) -> str:
        """Why a leaf cannot be read as an array, or ""."""
        dtype = self.spec(number).dtype
        if dtype.startswith("raw<"):
            return f"its dtype, {dtype[4:-1]!r}, is unknown"
        # Integers of 4 bits go nowhere else; of these floats other formats expect packed bytes.
        if BITS[dtype] % 8 and dtype.startswith("float"):
            return f"its values, {dtype}, of {BITS[dtype]} bits, take a byte each here and less in other formats"
        return ""

    def extent(self, number: int) -> None:
        """None: bytes in a store are compressed, and in several pieces."""

    # ---- reading ---------------------------------------------------------------------------------------------

    def read(self, number: int) -> Array:
        """The array, read-only, decompressed into memory.

        Raises:
            MissingExtra: tensorstore is not installed.
            Unsupported: the dtype is unknown.
            BadCheckpoint: a piece is missing or damaged.
        """
        self._check_readable(number)
        array = self._fetch(number, ...)
        array.flags.writeable = False
        return array

    def read_range(self, number: int, start: int, stop: int) -> Array:
        """The elements `start` to `stop` of a leaf in C order: a new array with one axis.

        Whole chunks of the store are decompressed, and the last ones are kept, so that ranges that follow each other
        cost one pass together. Memory is bounded by the rows that a chunk spans.

        Raises:
            MissingExtra: tensorstore is not installed.
            Unsupported: the dtype is unknown.
            BadCheckpoint: a piece is missing or damaged.
        """
        self._check_readable(number)
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

    def children(self, node: Any) -> list[tuple[Any, Any]] | None:
        """The entries of a dict, list or tuple, of which masks for a checkpoint are made; None for a leaf."""
        return entries(node)

    # ---- behind the scenes -----------------------------------------------------------------------------------

    @property
    def _tensorstore(self) -> ModuleType:
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        return need("tensorstore", extra="orbax", to="read Orbax checkpoints")

    def _kvstore(self, path: str) -> dict[str, Any]:
        """What tensorstore calls a place in the store."""
        root = f"{self.folder.resolve()}/"
        if self._database:
            return {"driver": "ocdbt", "base": {"driver": "file", "path": root}, "path": path}
        return {"driver": "file", "path": root + path}

    @cached_property
    def _arrays(self) -> list[Entry]:
        """What the store says of each array."""
        texts = self._said() if self._database else map(self._said_beside, self._names)
        return [self._entry(name, text) for name, text in zip(self._names, texts, strict=True)]

    @property
    def _described(self) -> str:
        return "zarr.json" if self._zarr3 else ".zarray"

    def _said(self) -> Iterable[bytes]:
        tensorstore = self._tensorstore
        with _Blame(self.folder, "the store"):
            store = tensorstore.KvStore.open(self._kvstore("")).result()
            asked = [store.read(f"{name}/{self._described}") for name in self._names]
            answers = [one.result() for one in asked]
        for name, answer in zip(self._names, answers, strict=True):
            if answer.state != "value":
                raise BadCheckpoint(f"{self.folder}: {shown(name)}: the store has no such array")
            yield answer.value

    def _said_beside(self, name: str) -> bytes:
        # Names come from the file: none may lead out of the folder.
        if any(piece in ("", ".", "..") for piece in name.split("/")) or "\0" in name:
            raise BadCheckpoint(f"{self.folder}: {shown(name)} is no name of an array within a folder")
        path = self.folder / name / self._described
        try:
            return _content(path)
        except CannotRead:
            raise BadCheckpoint(f"{self.folder}: {shown(name)}: its folder has no {self._described}") from None

    def _entry(self, name: str, text: bytes) -> Entry:
        file, place = str(self.folder), f"{shown(name)}/{self._described}"
        table = parse_object(text, file, place)
        shape = _shape(table.get("shape"), file, f"{place}, shape")
        if self._zarr3:
            grid = table.get("chunk_grid")
            setup = grid.get("configuration") if type(grid) is dict else None
            chunks, dtype = setup.get("chunk_shape") if type(setup) is dict else None, table.get("data_type")
        else:
            chunks, dtype = table.get("chunks"), table.get("dtype")
        chunks = _shape(chunks, file, f"{place}, chunks")
        if len(chunks) != len(shape) or not all(chunks):
            raise bad(file, place, f"chunks of shape {chunks} do not make an array of shape {shape}")
        known = _dtype(dtype)
        rows = min(chunks[0], max(shape[0], 1)) if shape else 1
        return Entry(Spec(shape, known), rows, math.prod(chunks))

    def _listed(self) -> dict[str, Any]:
        """A table of all arrays of a store that has none, by their names in it: what lies between dots are keys."""
        tensorstore = self._tensorstore
        with _Blame(self.folder, "the store"):
            store = tensorstore.KvStore.open(self._kvstore("")).result()
            found = [key.decode("utf-8", "backslashreplace") for key in store.list().result()]
        names = [name.removesuffix("/.zarray") for name in found if name.endswith("/.zarray")]
        if not names:
            names = [name.removesuffix("/zarr.json") for name in found if name.endswith("/zarr.json")]
            self._zarr3 = True
        rows = {}
        for name in sorted(names):
            keys = [{"key": key, "key_type": 2} for key in name.split(".")]
            rows[name] = {"key_metadata": keys, "value_metadata": {"value_type": "jax.Array"}}
        return {"tree_metadata": rows}

    def _store(self, number: int) -> Any:
        store = self._stores.get(number)
        if store is None:
            place = self._kvstore(f"{self._names[number]}/")
            spec: dict[str, Any] = {"driver": "zarr3" if self._zarr3 else "zarr", "kvstore": place}
            if self._whole:
                spec["fill_missing_data_reads"] = False
            tensorstore = self._tensorstore
            with _Blame(self.folder, self.index.path(number)):
                store = self._stores[number] = tensorstore.open(spec, open=True, read=True).result()
        return store

    def _fetch(self, number: int, where: Any) -> Array:
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        spec = self.spec(number)
        elements = spec.size if where is ... else (where.stop - where.start) * math.prod(spec.shape[1:])
        self._check_room(number, elements)
        store = self._store(number)
        with _Blame(self.folder, self.index.path(number)):
            array: Array = np.asarray(store[where].read(order="C").result())
        if array.dtype.name != spec.dtype:
            raise BadCheckpoint(f"{self.folder}: {self.index.path(number)}: it reads as {array.dtype.name}")
        return array

    def _check_room(self, number: int, elements: int) -> None:
        """Whether there is memory for so many elements and for one chunk: tensorstore ends the process if not."""
        entry = self._arrays[number]
        width = numpy_dtype(entry.spec.dtype).itemsize
        for count in (elements, entry.chunk):
            try:
                np.empty(count * width, np.uint8)
            except (MemoryError, ValueError):
                what = f"{self.folder}: {self.index.path(number)}"
                raise BadCheckpoint(f"{what}: {count * width:,} bytes at once are more than the memory holds") from None

    def _flat(self, number: int, first: int, stop: int) -> Array:
        """Some rows of an array as one axis; those that were read last are at hand."""
        if self._block is None or self._block[:2] != (number, first):
            self._block = None  # so that there are never two
            where = slice(first, stop) if self.spec(number).shape else ...
            self._block = (number, first, self._fetch(number, where).reshape(-1))
        return self._block[2]

    def _check_readable(self, number: int) -> None:
        why = self.refusal(number)
        if why:
            raise Unsupported(f"{self.index.path(number)} cannot be read: {why}")


class _Blame:
    """Tells errors of tensorstore as those of the checkpoint: it has a dozen classes for them, and long messages."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            said = str(error).partition(" [")[0].strip() or type(error).__name__
            said = said if len(said) < 400 else f"{said[:400]}..."
            raise BadCheckpoint(f"{self.folder}: {self.what}: tensorstore cannot read it: {said}") from error


# ---- where the tree is ---------------------------------------------------------------------------------------


def _find(path: Path) -> tuple[Path, tuple[int, ...]]:
    """The folder that holds the tree, and the steps that a manager has there."""
    if not path.is_dir():
        path.stat()
        raise BadCheckpoint(f"{path}: it is a file, and an Orbax checkpoint is a directory")
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
    held = f"it holds {_text.listing(sorted(inside), 4)}" if inside else "it is empty"
    raise BadCheckpoint(f"{path}: there is no tree of Orbax in it ({_TREE} or {_STORE}): {held}")


def _item(path: Path) -> Path | None:
    """The folder that holds the tree: this one, or the only one in a step that does."""
    if _holds_tree(path):
        return path
    inner = [path / entry.name for entry in os.scandir(path) if entry.is_dir()] if (path / _STEP).is_file() else []
    if not inner and _holds_tree(path / "default"):
        return path / "default"
    trees = sorted(folder for folder in inner if _holds_tree(folder))
    if len(trees) > 1:
        names = _text.listing([folder.name for folder in trees])
        raise BadCheckpoint(f"{path}: it holds {len(trees)} trees: {names}", hint=f"open one of them: {trees[0]}")
    return trees[0] if trees else None


def _holds_tree(path: Path) -> bool:
    return (path / _TREE).is_file() or (path / _STORE).is_file()


def _content(path: Path) -> bytes:
    file = OpenFile(path)
    try:
        if file.size > MAX_JSON:
            raise BadCheckpoint(f"{path}: {file.size:,} bytes of JSON are too many")
        return file.read(0, file.size)
    finally:
        file.close()


def _json(path: Path) -> dict[str, Any]:
    return parse_object(_content(path), str(path), "JSON")


def _shape(value: Any, file: str, place: str) -> tuple[int, ...]:
    if type(value) is not list or any(type(axis) is not int or not 0 <= axis < _U64 for axis in value):
        raise bad(file, place, "an array of whole numbers is expected")
    elements = 1
    for axis in value:
        elements *= axis
        if elements * 16 >= _U64:
            raise bad(file, place, "the number of elements overflows 64 bits")
    return tuple(value)


def _dtype(name: Any) -> str:
    if type(name) is not str:
        return "raw<struct>"
    if name in BITS:
        return name
    return _CODES.get(name[1:], f"raw<{name}>") if name[:1] in "<>|" else f"raw<{name}>"


# ---- the tree ------------------------------------------------------------------------------------------------


class _Walk:
    """The leaves that a table of metadata lists.

    Attributes:
        index: the names.
        keys: by number, the path of a leaf by true keys.
        names: by number, what the store calls it.
        others: path → what is no array.
    """

    def __init__(self, folder: Path, table: Mapping[str, Any]) -> None:
        self.file = str(folder / _TREE)
        self.index = Index("/")
        self.keys: list[tuple[str | int, ...]] = []
        self.names: list[str] = []
        self.others: dict[str, Any] = {}
        rows = table.get("tree_metadata")
        if type(rows) is not dict:
            raise bad(self.file, "tree_metadata", "an object is expected")
        texts = _json(folder / "_strings.json") if (folder / "_strings.json").is_file() else {}
        tree: dict[str | int, Any] = {}
        for title, row in rows.items():
            keys, kind = self._row(title, row)
            name = ".".join(map(str, keys))
            if kind == "string" and type(texts.get(name)) is str:
                self._other(keys, texts[name])
            elif kind in _EMPTY or row["value_metadata"].get("skip_deserialize"):
                self._other(keys, _EMPTY.get(kind, dict)())
            else:
                self._leaf(tree, keys, title)
                self.names.append(name)
        self._enter(tree, self.index.names)
        if table.get("custom_metadata") is not None:
            self.others["custom_metadata"] = table["custom_metadata"]

    def _row(self, title: str, row: Any) -> tuple[tuple[str | int, ...], str]:
        place = f"tree_metadata, {shown(title)}"
        keys, value = (row.get("key_metadata"), row.get("value_metadata")) if type(row) is dict else (None, None)
        if type(keys) is not list or type(value) is not dict or type(value.get("value_type")) is not str:
            raise bad(self.file, place, "key_metadata and value_metadata with a value_type are expected")
        found: list[str | int] = []
        for key in keys:
            text, kind = (key.get("key"), key.get("key_type")) if type(key) is dict else (None, None)
            if type(text) is not str or kind not in (1, 2):
                raise bad(
                    self.file, f"{place}, key_metadata", "a key of type 1 (of a list) or 2 (of a dict) is expected"
                )
            if kind == 1 and not (text.isdigit() and text.isascii() and len(text) < 19):
                raise bad(self.file, f"{place}, key_metadata", f"{shown(text)} is no position in a list")
            found.append(int(text) if kind == 1 else text)
        if sum(key.count(".") + key.count("/") + 1 if type(key) is str else 1 for key in found) > MAX_PIECES:
            raise bad(self.file, place, f"the name has more than {MAX_PIECES} pieces")
        return tuple(found), value["value_type"]

    def _leaf(self, tree: dict[str | int, Any], keys: tuple[str | int, ...], title: str) -> None:
        *outer, last = keys or ("",)  # a tree that is one array
        for key in outer:
            tree = tree.setdefault(key, {})
            if type(tree) is not dict:
                break
        if type(tree) is not dict or last in tree:
            raise bad(self.file, f"tree_metadata, {shown(title)}", "another leaf has its path, or a part of it")
        number = tree[last] = len(self.keys)
        self.keys.append(keys)
        self.index.numbers.append(number)

    def _enter(self, tree: Mapping[str | int, Any], names: dict[Any, Any]) -> None:
        for key, child in tree.items():
            if type(child) is dict:
                inner: dict[Any, Any] = {}
                self._enter(child, inner)
                self.index.add(names, key, inner)
            else:
                self.index.add(names, key, child)

    def _other(self, keys: tuple[str | int, ...], value: Any) -> None:
        self.others[write_path([label for key in keys for label in labels(key)], "/")] = value
