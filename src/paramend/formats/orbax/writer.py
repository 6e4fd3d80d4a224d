"""`OrbaxWriter`: writes Orbax checkpoints that Orbax restores, chunk by chunk through tensorstore, without Orbax."""

import base64
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paramend.disk.io import write_file
from paramend.errors import RenameClash, Unsupported
from paramend.formats.orbax.store import Box, Stage, content, read_json
from paramend.formats.source import Data, Item, Writer
from paramend.leaves.outlines import BOXED, CONTAINERS, Outline, Place
from paramend.leaves.specs import BITS, Array, Spec, numpy_dtype

# The most bytes of a chunk, which is in memory at once.
MAX_CHUNK = 1 << 26
Keys = tuple[str | int, ...]
TREE, STRINGS, STEP = "_METADATA", "_strings.json", "_CHECKPOINT_METADATA"
# A folder of tables of what arrays are besides numbers; for keys, under this name, the implementation.
ARRAYS, KEY = "array_metadatas", "random_key_impl"
_SHARDING = "_sharding"
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
# What Orbax calls entries that are not arrays; the others are "scalar".
_KINDS = {type(None): "None", str: "string", dict: "Dict", OrderedDict: "Dict", list: "List", tuple: "Tuple"}
# The dtypes of other formats for which tensorstore has no name, or which it pads to whole bytes.
_NAMELESS = frozenset({"uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e4m3"})


class OrbaxWriter(Writer):
    """Writes directories that `StandardCheckpointer` and `PyTreeCheckpointer` restore, with or without a target.

    An edited Orbax checkpoint keeps its layout (database or folders, version of zarr), kinds of leaves, shardings,
    empty containers and texts. Other leaves are written as numpy arrays: Orbax restores these anywhere, and onto
    devices if the target says so.
    """

    def refusal(self, spec: Spec) -> str:
        return f"Orbax cannot hold {spec.dtype}" if spec.dtype not in BITS or spec.dtype in _NAMELESS else ""

    def holds(self, value: Any) -> bool:
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, list | tuple):
            return all(map(self.holds, value))
        if type(value) is int:
            return -(1 << 63) <= value < 1 << 63
        return type(value) in (bool, float, str, type(None)) or (type(value) in CONTAINERS and not value)

    def write(self, folder: Path, items: Sequence[Item], data: Data, outline: Outline, base: Any) -> None:
        """Fill an empty folder with a checkpoint. The engine creates it, makes it durable and gives it its name. The
        layout of `base` is kept, if it has this format."""
        orbax = getattr(base, "format", "") == "orbax"
        database, zarr3 = (base.store.database, base.store.zarr3) if orbax else (True, False)
        given = "" if orbax else base.metadata.get("paramend.separator")
        entries = _entries(outline, self.holds) if orbax else _split(_entries(outline, self.holds), given)
        if all(type(value) in _KINDS for _, value in entries):
            raise Unsupported("Orbax checkpoints hold at least one array or number", hint="a .msgpack file")
        stage = Stage(None, folder, database=database, zarr3=zarr3)
        rows, texts, places = dict[str, Any](), dict[str, str](), list[tuple[Place, str]]()
        names = _names([keys for keys, _ in entries])
        for name, (keys, value) in zip(names, entries, strict=True):
            if type(value) is Place:
                item, chunks = items[value.number], chunk_shape(items[value.number].spec)
                stage.create(name, item.spec, chunks)
                for box, values in _cut(item.spec, data(value.number), chunks):
                    stage.write(name, box, values)
                old = base.walk.kinds[value.like] if orbax and value.like >= 0 else "np.ndarray"
                kind, shape = "jax.Array" if value.key else old, item.spec.shape
                places.append((value, name))
            else:
                kind, shape = _KINDS.get(type(value), "scalar"), None
                if kind == "scalar":
                    array, shape = np.asarray(value), ()
                    stage.create(name, Spec((), array.dtype.name), ())
                    stage.write(name, (), array)
                elif kind == "string":
                    texts[name] = value
            title, row = table_row(keys, kind, shape)
            rows[title] = row
        stage.flush()
        table = {"tree_metadata": rows, "use_ocdbt": database, "use_zarr3": zarr3}
        table |= {"store_array_data_equal_to_fill_value": True}
        table |= {"custom_metadata": base.walk.custom if orbax else None}
        _put(folder / TREE, table)
        if texts:
            _put(folder / STRINGS, texts)
        _put_keys(folder, [(place, name, items[place.number].spec) for place, name in places if place.key])
        if orbax:
            self._carry(base, folder, [(place.like, name) for place, name in places if place.like >= 0])
        else:
            now = time.time_ns()
            said = {"item_handlers": _HANDLER, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
            _put(folder / STEP, said | {"init_timestamp_nsecs": now, "commit_timestamp_nsecs": now})
        write_file(folder / "commit_success.txt", b"Checkpoint commit was successful")

    def _carry(self, base: Any, folder: Path, names: Iterable[tuple[int, str]]) -> None:
        if (base.folder / _SHARDING).is_file():
            old = read_json(base.folder / _SHARDING)
            found = {_code(name): old.get(_code(base.names[number])) for number, name in names}
            _put(folder / _SHARDING, {code: text for code, text in found.items() if text is not None})
        if (base.folder / STEP).is_file():
            write_file(folder / STEP, content(base.folder / STEP))


def chunk_shape(spec: Spec) -> tuple[int, ...]:
    """The shape of the largest chunks of bounded size that are contiguous in C order, in which a leaf is written."""
    room = MAX_CHUNK // numpy_dtype(spec.dtype).itemsize
    found: list[int] = []
    for length in reversed(spec.shape):
        found.append(max(min(length, room), 1))
        room = room // found[-1] if found[-1] >= length else 1
    return tuple(reversed(found))


def _cut(spec: Spec, pieces: Iterator[memoryview], chunks: tuple[int, ...]) -> Iterator[tuple[Box, Array]]:
    dtype, rest = numpy_dtype(spec.dtype), memoryview(b"")
    grid = [range(0, length, chunk) for length, chunk in zip(spec.shape, chunks, strict=True)]
    for corner in np.ndindex(*map(len, grid)) if spec.size else ():
        starts = [axis[n] for axis, n in zip(grid, corner, strict=True)]
        stops = [min(start + chunk, length) for start, chunk, length in zip(starts, chunks, spec.shape, strict=True)]
        box = tuple(map(slice, starts, stops))
        values = np.empty([part.stop - part.start for part in box], dtype)
        view, at = values.reshape(-1).view(np.uint8).data, 0
        while at < len(view):
            rest = rest if len(rest) else next(pieces)
            count = min(len(view) - at, len(rest))
            view[at : at + count] = rest[:count]
            rest, at = rest[count:], at + count
        yield box, values
    next(pieces, None)  # at its end it checks how much it yielded


def _put_keys(folder: Path, keys: Sequence[tuple[Place, str, Spec]]) -> None:
    """Say of the numbers of typed PRNG keys what they are. Orbax makes keys of them only where it knows a device."""
    rows = []
    for place, name, spec in keys:
        shape = list(spec.shape)
        rows.append({"param_name": name, "write_shape": shape, "chunk_shape": shape, "ext_metadata": {KEY: place.key}})
    if rows:
        (folder / ARRAYS).mkdir()
        _put(folder / ARRAYS / "process_0", {"array_metadatas": [{"array_metadata": row} for row in rows]})
    devices = {name: place.device for place, name, _ in keys if place.device}
    if devices:
        single = {"sharding_type": "SingleDeviceSharding"}
        found = {_code(name): json.dumps(single | {"device_str": device}) for name, device in devices.items()}
        _put(folder / _SHARDING, found)


def _entries(outline: Outline, holds: Callable[[Any], bool]) -> list[tuple[Keys, Any]]:
    """The entries as Orbax has them: whole numbers in lists alone, the content of a box under its own key."""
    lists = {keys for keys, node in outline.containers.items() if isinstance(node, list | tuple)}
    found: list[tuple[Keys, Any]] = []
    for keys, value in outline.entries:
        path: Keys = tuple(key if type(key) is int and keys[:at] in lists else str(key) for at, key in enumerate(keys))
        if type(value) is Place:
            found.append(((*path, BOXED) if value.boxed else path, value))
        elif holds(value):
            found += _spread(path, value)
    return found


def _spread(keys: Keys, value: Any) -> list[tuple[Keys, Any]]:
    """A value that is not an array, one entry for each in a list."""
    if isinstance(value, list | tuple) and value:
        return [pair for at, each in enumerate(value) for pair in _spread((*keys, at), each)]
    return [(keys, None if isinstance(value, tuple) and hasattr(value, "_fields") else value)]


def _split(entries: list[tuple[Keys, Any]], given: Any) -> list[tuple[Keys, Any]]:
    """The entries with the names of a flat table split as `pm.load` splits them."""
    names = [str(keys[0]) for keys, value in entries if type(value) is Place and len(keys) == 1]
    if given == "" or any(len(keys) > 1 for keys, value in entries if type(value) is Place):
        return entries
    separator = given or ("/" if any("/" in name for name in names) else ".")
    found = [(tuple(str(keys[0]).split(separator)) if type(value) is Place else keys, value) for keys, value in entries]
    whole = {keys for keys, _ in found}
    return entries if any(keys[:at] in whole for keys in whole for at in range(len(keys))) else found


def _names(keys: Sequence[Keys]) -> list[str]:
    names: dict[str, Keys] = {}
    for key in keys:
        name = ".".join(map(str, key))
        if name in names:
            both = " and ".join("/".join(map(str, each)) for each in (key, names[name]))
            raise RenameClash(f"{both} are both named {name} in Orbax")
        names[name] = key
    return list(names)


def _code(name: str) -> str:
    return base64.b64encode(name.encode()).decode()


def _put(path: Path, table: dict[str, Any]) -> None:
    write_file(path, json.dumps(table).encode())


def table_row(keys: Keys, kind: str, shape: tuple[int, ...] | None) -> tuple[str, dict[str, Any]]:
    """The title and row of a leaf, as Orbax writes them; without a shape, those of an entry that is not an array."""
    value: dict[str, Any] = {"value_type": kind, "skip_deserialize": shape is None and kind != "string"}
    if shape is not None and kind != "scalar":
        value["write_shape"] = list(shape)
    listed = [{"key": str(key), "key_type": 1 if type(key) is int else 2} for key in keys]
    return str(tuple(map(str, keys))), {"key_metadata": listed, "value_metadata": value}
