"""`OrbaxWriter`: writes Orbax checkpoints that Orbax restores, chunk by chunk through tensorstore, without Orbax."""

import base64
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paramend.disk.io import write_file
from paramend.errors import RenameClash
from paramend.formats.orbax.store import Box, Stage, content, read_json
from paramend.formats.orbax.tree import STRINGS, TREE, Keys, table_row
from paramend.formats.writer import Item
from paramend.leaves.specs import BITS, Spec, numpy_dtype

# The most bytes of a chunk, which is in memory at once.
MAX_CHUNK = 1 << 26
STEP = "_CHECKPOINT_METADATA"
_SHARDING = "_sharding"
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
# The dtypes of other formats for which tensorstore has no name, or which it pads to whole bytes.
_NAMELESS = frozenset({"uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e4m3"})


class OrbaxWriter:
    """Writes directories that `StandardCheckpointer` and `PyTreeCheckpointer` restore, with or without a target.

    An edited Orbax checkpoint keeps its layout (database or folders, version of zarr), kinds of leaves, shardings,
    empty containers and texts. Other leaves are written as numpy arrays: Orbax restores these anywhere, and onto
    devices if the target says so.
    """

    copies_raw = False

    def refusal(self, spec: Spec) -> str:
        """Why the format cannot hold such a leaf, or ""."""
        if spec.dtype not in BITS or spec.dtype in _NAMELESS:
            return f"Orbax cannot hold {spec.dtype}"
        return ""

    def write(
        self, folder: Path, items: Sequence[Item], data: Callable[[int], Iterator[memoryview]], source: Any
    ) -> None:
        """Fill an empty folder with a checkpoint.

        Raises:
            MissingExtra: tensorstore is not installed.
            RenameClash: two leaves would have the same name in the store.
            CannotWrite: the files cannot be written, for example because the disk is full.
        """
        base = getattr(source, "base", source)  # the checkpoint that the leaves were gathered around
        orbax = getattr(base, "format", "") == "orbax"
        database, zarr3 = (base.store.database, base.store.zarr3) if orbax else (True, False)
        olds = _numbers(items, source, base)
        rest = base.walk.rest if orbax else getattr(base, "rest", ())
        keys, others = _true_keys(items, olds, base, [key for key, _, _ in rest])
        names = _names(keys)
        stage = Stage(None, folder, database=database, zarr3=zarr3)
        for place, (name, item) in enumerate(zip(names, items, strict=True)):
            chunks = chunk_shape(item.spec)
            stage.create(name, item.spec, chunks)
            for box, values in _cut(item.spec, data(place), chunks):
                stage.write(name, box, values)
        kinds = ["np.ndarray" if old is None or not orbax else base.walk.kinds[old] for old in olds]
        rows = dict(table_row(key, kind, item.spec.shape) for key, kind, item in zip(keys, kinds, items, strict=True))
        texts: dict[str, str] = {}
        whole = set(keys)
        taken = {other[:at] for other in keys for at in range(len(other) + 1)}
        for key, (_, kind, value) in zip(others, rest, strict=True):
            # Entries that are not arrays stay, unless leaves were moved to their place, or below it.
            if key in taken or any(key[:at] in whole for at in range(len(key))):
                continue
            name = ".".join(map(str, key))
            if kind == "scalar":
                array = np.asarray(value)
                stage.create(name, Spec((), array.dtype.name), ())
                stage.write(name, (), array)
            elif kind == "string":
                texts[name] = value
            title, row = table_row(key, kind, () if kind == "scalar" else None)
            rows[title] = row
        stage.flush()
        table = {"tree_metadata": rows, "use_ocdbt": database, "use_zarr3": zarr3}
        table |= {"store_array_data_equal_to_fill_value": True}
        table |= {"custom_metadata": base.walk.custom if orbax else None}
        _put(folder / TREE, table)
        if texts:
            _put(folder / STRINGS, texts)
        if orbax:
            self._carry(base, folder, zip(olds, names, strict=True))
        else:
            now = time.time_ns()
            said = {"item_handlers": _HANDLER, "metrics": {}, "performance_metrics": {}, "custom_metadata": {}}
            _put(folder / STEP, said | {"init_timestamp_nsecs": now, "commit_timestamp_nsecs": now})
        write_file(folder / "commit_success.txt", b"Checkpoint commit was successful")

    def _carry(self, base: Any, folder: Path, names: Iterable[tuple[int | None, str]]) -> None:
        """Copy the shardings and the metadata of the checkpoint from another Orbax checkpoint."""
        if (base.folder / _SHARDING).is_file():
            old = read_json(base.folder / _SHARDING)
            found = {_code(name): old.get(_code(base.names[number])) for number, name in names if number is not None}
            _put(folder / _SHARDING, {code: text for code, text in found.items() if text is not None})
        if (base.folder / STEP).is_file():
            write_file(folder / STEP, content(base.folder / STEP))


def chunk_shape(spec: Spec) -> tuple[int, ...]:
    """The shape of the largest chunks of bounded size that are contiguous in C order: a leaf is written first to last.

    >>> chunk_shape(Spec((3, 1 << 13, 1 << 13), "float32"))
    (1, 2048, 8192)
    """
    room = MAX_CHUNK // numpy_dtype(spec.dtype).itemsize
    found: list[int] = []
    for length in reversed(spec.shape):
        found.append(max(min(length, room), 1))
        room = room // found[-1] if found[-1] >= length else 1
    return tuple(reversed(found))


def _cut(
    spec: Spec, pieces: Iterator[memoryview], chunks: tuple[int, ...]
) -> Iterator[tuple[Box, np.ndarray[Any, Any]]]:
    """The values of a leaf chunk by chunk, each with its box."""
    dtype, rest = numpy_dtype(spec.dtype), memoryview(b"")
    grid = [range(0, length, chunk) for length, chunk in zip(spec.shape, chunks, strict=True)]
    for corner in np.ndindex(*map(len, grid)) if spec.size else ():
        starts = [axis[n] for axis, n in zip(grid, corner, strict=True)]
        box = tuple(
            slice(start, min(start + chunk, length))
            for start, chunk, length in zip(starts, chunks, spec.shape, strict=True)
        )
        values = np.empty([part.stop - part.start for part in box], dtype)
        view, at = values.reshape(-1).view(np.uint8).data, 0
        while at < len(view):
            rest = rest if len(rest) else next(pieces)
            count = min(len(view) - at, len(rest))
            view[at : at + count] = rest[:count]
            rest, at = rest[count:], at + count
        yield box, values
    next(pieces, None)  # at its end it checks how much it yielded


def _numbers(items: Sequence[Item], source: Any, base: Any) -> list[int | None]:
    """The number of each leaf in the source, or in the base that the source was gathered around; None if in neither."""
    if source is base:
        return [item.number for item in items]
    known = {tuple(map(str, keys)): number for number, keys in enumerate(getattr(base, "keys", ()))}
    return [known.get(item.keys) for item in items]


def _true_keys(
    items: Sequence[Item], olds: Sequence[int | None], base: Any, rest: Sequence[Keys]
) -> tuple[list[Keys], list[Keys]]:
    """The keys of leaves and other entries, with whole numbers for positions in lists where the source has lists."""
    if not hasattr(base, "keys"):
        return list(map(tuple, _nested(items, base.metadata.get("paramend.separator")))), list(rest)
    lists = {tuple(map(str, keys[:at])) for keys in (*_all(base.keys), *rest) for at in _places(keys)}
    found: list[list[str | int]] = []
    for item, old in zip(items, olds, strict=True):
        was: Keys = () if old is None else base.keys[old]
        moved = tuple(map(str, was)) != item.keys and bool(_places(was))
        keys = item.keys
        found.append(
            [int(key) if _is_position(key) and (moved or keys[:at] in lists) else key for at, key in enumerate(keys)]
        )
    # A list needs all its positions, and no other keys.
    everything = [*found, *map(list, rest)]
    inside: dict[tuple[str, ...], set[str | int]] = {}
    for path in everything:
        for at, key in enumerate(path):
            inside.setdefault(tuple(map(str, path[:at])), set()).add(key)
    for path in everything:
        for at, key in enumerate(path):
            around = inside[tuple(map(str, path[:at]))]
            if type(key) is int and around != set(range(len(around))):
                path[at] = str(key)
    done = [tuple(path) for path in everything]
    return done[: len(found)], done[len(found) :]


def _places(keys: Keys) -> list[int]:
    """The places in a path that are positions in lists."""
    return [at for at, key in enumerate(keys) if type(key) is int]


def _all(keys: Any) -> Iterable[Keys]:
    return keys.values() if isinstance(keys, dict) else keys


def _nested(items: Sequence[Item], given: Any) -> list[list[str | int]]:
    """The keys of leaves; those of a flat table of names as `pm.load` splits them."""
    names = [item.keys[0] for item in items]
    if given == "" or any(len(item.keys) > 1 for item in items):
        return [list(item.keys) for item in items]
    split = given or ("/" if any("/" in name for name in names) else ".")
    found: list[list[str | int]] = [list(name.split(split)) for name in names]
    whole = set(map(tuple, found))
    if any(tuple(keys[:at]) in whole for keys in found for at in range(len(keys))):
        return [[name] for name in names]
    return found


def _is_position(key: str) -> bool:
    return key.isdigit() and key.isascii() and len(key) < 19 and (key == "0" or key[0] != "0")


def _names(keys: Sequence[Keys]) -> list[str]:
    names: dict[str, Keys] = {}
    for key in keys:
        name = ".".join(map(str, key))
        if name in names:
            raise RenameClash(
                f"{'/'.join(map(str, key))} and {'/'.join(map(str, names[name]))} are both named {name} in Orbax"
            )
        names[name] = key
    return list(names)


def _code(name: str) -> str:
    return base64.b64encode(name.encode()).decode()


def _put(path: Path, table: dict[str, Any]) -> None:
    write_file(path, json.dumps(table).encode())
