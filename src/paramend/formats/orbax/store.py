"""The store of an Orbax checkpoint: its arrays, read and written chunk by chunk through tensorstore.

Each array is a zarr array, version 2 or 3, in separate folders and files, or all of them are in one OCDBT database.
tensorstore is imported on first use.
"""

import math
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from paramend._optional import need
from paramend.disk.io import write_file
from paramend.errors import BadCheckpoint, CannotRead, CannotWrite
from paramend.formats.files import OpenFile
from paramend.formats.jsontext import bad, parse_object
from paramend.formats.limits import MAX_AXES, U64, most_elements, shown
from paramend.leaves.specs import BITS, Array, Spec

Box = tuple[slice, ...]

MANIFEST = "manifest.ocdbt"
MAX_JSON = 256_000_000
# Bytes of chunks that a database buffers before it writes them and a new tree of nodes.
BATCH = 1 << 27

# How zarr 2 writes the dtypes that it shares with numpy; others are written by name.
_CODES = {"b1": "bool", "f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64", "c16": "complex128"}
_CODES |= {
    f"{kind}{bits // 8}": f"{name}{bits}" for kind, name in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)
}

# Orbax's configuration of a new database: descriptions of arrays in the nodes, chunks beside them, one manifest.
_CONFIG = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000, "manifest_kind": "single"}


@dataclass(frozen=True, slots=True)
class OrbaxEntry:
    """One array of a store, as its zarr metadata has it."""

    spec: Spec  # shape and dtype; an unknown dtype, such as "<U3", is "raw<<U3>"
    chunks: tuple[int, ...]  # the shape of a chunk, the smallest piece that can be written
    text: bytes  # the metadata as it is in the store

    @property
    def rows(self) -> int:
        """The length of a chunk along the first axis."""
        return min(self.chunks[0], max(self.spec.shape[0], 1)) if self.spec.shape else 1

    @property
    def chunk(self) -> int:
        return math.prod(self.chunks)


class Store:
    """The arrays of a folder by their names. In a `whole` store each chunk was written: a missing one is damage."""

    def __init__(self, folder: Path, *, database: bool, zarr3: bool = False, whole: bool = False) -> None:
        self.folder, self.database, self.zarr3, self.whole = folder, database, zarr3, whole

    @property
    def described(self) -> str:
        return "zarr.json" if self.zarr3 else ".zarray"

    @property
    def driver(self) -> str:
        return "zarr3" if self.zarr3 else "zarr"

    def place(self, path: str) -> dict[str, Any]:
        if self.database:
            return {"driver": "ocdbt", "base": files(self.folder), "path": path}
        return files(self.folder, path)

    def describe(self, names: Sequence[str]) -> list[OrbaxEntry]:
        texts = self._said(names) if self.database else map(self._said_beside, names)
        return [self._entry(name, text) for name, text in zip(names, texts, strict=True)]

    def names(self) -> list[str]:
        """The names of all arrays. If there are none of zarr 2, those of zarr 3."""
        tensorstore = opened("read")
        with blamed(self.folder, "the store"):
            store = tensorstore.KvStore.open(self.place("")).result()
            found = [key.decode("utf-8", "backslashreplace") for key in store.list().result()]
        self.zarr3 = not any(name.endswith("/.zarray") for name in found)
        return sorted(name.removesuffix(f"/{self.described}") for name in found if name.endswith(f"/{self.described}"))

    def open(self, name: str, title: str) -> Any:
        """An array, opened for reading; messages call it by its title."""
        spec: dict[str, Any] = {"driver": self.driver, "kvstore": self.place(f"{name}/")}
        if self.whole:
            spec["fill_missing_data_reads"] = False
        tensorstore = opened("read")
        with blamed(self.folder, title):
            return tensorstore.open(spec, open=True, read=True).result()

    def files_of(self, name: str) -> list[Path]:
        """The files that may be replaced when an array changes."""
        if self.database:
            return sorted(self.folder.glob("manifest.*"))
        return sorted(path for path in (self.folder / name).rglob("*") if path.name != self.described)

    def _said(self, names: Sequence[str]) -> Iterable[bytes]:
        tensorstore = opened("read")
        with blamed(self.folder, "the store"):
            store = tensorstore.KvStore.open(self.place("")).result()
            asked = [store.read(f"{name}/{self.described}") for name in names]
            answers = [one.result() for one in asked]
        for name, answer in zip(names, answers, strict=True):
            if answer.state != "value":
                raise BadCheckpoint(f"{self.folder}: {shown(name)}: the store has no such array")
            yield answer.value

    def _said_beside(self, name: str) -> bytes:
        # Names come from the file: none may lead out of the folder.
        if any(piece in ("", ".", "..") for piece in name.split("/")) or "\0" in name:
            raise BadCheckpoint(f"{self.folder}: {shown(name)} is not the name of an array within the folder")
        path = self.folder / name / self.described
        try:
            return content(path)
        except CannotRead:
            raise BadCheckpoint(f"{self.folder}: {shown(name)}: its folder has no {self.described}") from None

    def _entry(self, name: str, text: bytes) -> OrbaxEntry:
        file, place = str(self.folder), f"{shown(name)}/{self.described}"
        table = parse_object(text, file, place)
        shape = _shape(table.get("shape"), file, f"{place}, shape")
        if self.zarr3:
            grid = table.get("chunk_grid")
            setup = grid.get("configuration") if type(grid) is dict else None
            chunks, dtype = setup.get("chunk_shape") if type(setup) is dict else None, table.get("data_type")
        else:
            chunks, dtype = table.get("chunks"), table.get("dtype")
        chunks = _shape(chunks, file, f"{place}, chunks")
        if len(chunks) != len(shape) or not all(chunks):
            raise bad(file, place, f"chunks of shape {chunks} do not make an array of shape {shape}")
        return OrbaxEntry(Spec(shape, _dtype(dtype)), chunks, text)


# Chunks below the folder of an array, as the drivers of zarr 2 and 3 name them, and the parts of a database.
_CHUNK = re.compile(r"([0-9]+|c)([./][0-9]+)*")
_OF_DATABASE = re.compile(r"manifest\.[0-9a-z]+|d/[0-9a-z-]+")


def may_change(folder: Path, name: str) -> bool:
    """Whether a file of a store, by its name relative to the folder, is one that a change of values replaces."""
    if _OF_DATABASE.fullmatch(name):
        return True
    parts = name.split("/")
    chunked = (folder.joinpath(*parts[:n]) for n in range(1, len(parts)) if _CHUNK.fullmatch("/".join(parts[n:])))
    return any((array / said).is_file() for array in chunked for said in (".zarray", "zarr.json"))


class Stage:
    """New chunks of a store on their way into it: files in a folder, at the places that they will have in the store.
    For a new store, `store` is None and `folder` is the store.

    A database is copied on write. Its new nodes and manifest are here, so that the database itself shows the old
    state until the manifest is replaced, which is one step.
    """

    def __init__(self, store: Store | None, folder: Path, *, database: bool = True, zarr3: bool = False) -> None:
        self.folder = folder
        self.database = database if store is None else store.database
        self.driver = ("zarr3" if zarr3 else "zarr") if store is None else store.driver
        self._tensorstore = opened("write")
        self._context = self._tensorstore.Context()  # what shares it is written together
        self._arrays: dict[str, Any] = {}
        self._more: dict[str, dict[str, Any]] = {}
        self._held = 0
        self._transaction: Any = None
        if store is None:
            self._base = {"driver": "ocdbt", "base": files(folder), "config": _CONFIG, "assume_config": True}
        elif store.database:
            # Prefixes of nodes must differ, because those of a stage are looked for only in its folder.
            prefix = f"d/{secrets.token_hex(4)}-"
            for manifest in sorted(store.folder.glob("manifest.*")):
                write_file(folder / manifest.name, manifest.read_bytes())
            layers = [{"base": files(store.folder)}, {"prefix": prefix, "base": files(folder, prefix)}]
            kinds = ("btree_node", "version_tree_node", "value")
            self._base = {"driver": "ocdbt", "base": {"driver": "kvstack", "layers": layers}, "manifest": files(folder)}
            self._base |= {f"{kind}_data_prefix": prefix for kind in kinds}

    def open(self, name: str, entry: OrbaxEntry) -> None:
        """Prepare an array of the store for new chunks."""
        if not self.database:
            # The metadata stays where it is, and is not written again.
            table = parse_object(entry.text, name, "metadata")
            self._more[name] = {"open": True, "metadata": table, "assume_metadata": True}

    def create(self, name: str, spec: Spec, chunks: tuple[int, ...]) -> None:
        """Create an array without chunks, with Orbax's compression."""
        metadata: dict[str, Any] = {"shape": list(spec.shape)}
        if self.driver == "zarr":
            metadata |= {"chunks": list(chunks), "compressor": {"id": "zstd", "level": 1}}
        else:
            codecs: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}]
            codecs.append({"name": "zstd", "configuration": {"level": 3}})
            metadata |= {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}}}
            metadata |= {"codecs": codecs}
        self._more[name] = {"create": True, "metadata": metadata, "dtype": spec.dtype}
        with blamed(self.folder, name, writes=True):
            self._array(name)

    def write(self, name: str, box: Box, values: Array) -> None:
        """Write whole chunks, those at the edge as far as they are within the array."""
        with blamed(self.folder, name, writes=True):
            self._array(name)[box].write(values).result()
        self._held += values.nbytes
        if self._held >= BATCH:
            self.flush()

    def flush(self) -> None:
        transaction, self._transaction, self._held = self._transaction, None, 0
        if transaction is not None:
            self._arrays.clear()
            with blamed(self.folder, "the store", writes=True):
                transaction.commit_sync()

    def _array(self, name: str) -> Any:
        """An array, opened in the transaction that buffers a database."""
        if name not in self._arrays:
            if self.database and self._transaction is None:
                self._transaction = self._tensorstore.Transaction()
            place = {**self._base, "path": f"{name}/"} if self.database else files(self.folder, f"{name}/")
            # An omitted chunk of zeros would be read as a missing one.
            spec = {"driver": self.driver, "kvstore": place, "store_data_equal_to_fill_value": True}
            spec |= self._more.get(name, {"open": True})
            opening = self._tensorstore.open(spec, transaction=self._transaction, context=self._context)
            self._arrays[name] = opening.result()
            if "create" in spec:
                del self._more[name]
        return self._arrays[name]


def files(folder: Path, path: str = "") -> dict[str, Any]:
    """A place in a folder as a tensorstore spec."""
    return {"driver": "file", "path": f"{folder.resolve()}/{path}"}


def opened(what: str) -> ModuleType:
    """tensorstore, imported; `MissingExtra` if it is not installed."""
    return need("tensorstore", extra="orbax", to=f"{what} Orbax checkpoints")


@contextmanager
def blamed(folder: Path, what: str, *, writes: bool = False) -> Iterator[None]:
    """Raise tensorstore's errors as errors about the checkpoint: they have a dozen classes and long messages."""
    try:
        yield
    except Exception as error:
        said = str(error).partition(" [")[0].strip() or type(error).__name__
        said = said if len(said) < 400 else f"{said[:400]}..."
        told = f"{folder}: {what}: tensorstore cannot {'write' if writes else 'read'} it: {said}"
        raise (CannotWrite(f"{told}; nothing was changed") if writes else BadCheckpoint(told)) from error


def content(path: Path) -> bytes:
    """The content of a small file."""
    with closing(OpenFile(path)) as file:
        if file.size > MAX_JSON:
            raise BadCheckpoint(f"{path}: {file.size:,} bytes are too many for a JSON file")
        return file.read(0, file.size)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    return parse_object(content(path), str(path), "JSON")


def _shape(value: Any, file: str, place: str) -> tuple[int, ...]:
    if type(value) is not list or any(type(axis) is not int or not 0 <= axis < U64 for axis in value):
        raise bad(file, place, "an array of whole numbers is expected")
    if len(value) > MAX_AXES:
        raise bad(file, place, f"{len(value):,} axes are too many")
    if most_elements(value) * 16 >= U64:
        raise bad(file, place, "the number of elements overflows 64 bits")
    return tuple(value)


def _dtype(name: Any) -> str:
    if type(name) is not str:
        return "raw<struct>"
    if name in BITS:
        return name
    return _CODES.get(name[1:], f"raw<{name}>") if name[:1] in "<>|" else f"raw<{name}>"
