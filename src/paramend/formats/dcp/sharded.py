"""Sharded checkpoints as `HuggingFaceStorageWriter` of torch writes them: each rank has safetensors files of its parts.

`__metadata__` says under DCP_SHARDING_INFO where the tensors of a file begin in the whole ones. That is all: only newer
files tell how large these are, so a part at an end that is missing may not show.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from paramend.errors import BadCheckpoint
from paramend.formats.dcp.source import Assembled
from paramend.formats.jsontext import parse_object
from paramend.formats.limits import shown
from paramend.formats.source import Few, release
from paramend.formats.tiles import Tile, assembled
from paramend.leaves.leaves import uncollected
from paramend.leaves.specs import Spec

_INFO = "DCP_SHARDING_INFO"
_NAME = re.compile(r"shard-(\d{5,9})-model-(\d{5,9})-of-(\d{5,9})\.safetensors")


class ShardedModel(Assembled):
    """A directory of such files as one model, of whole tensors. Written anew, it is a plain model."""

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
    files: list[Any] = []
    try:
        with uncollected():
            for name in names:
                files.append(opener(path / name))
                release(files[-1])
            return ShardedModel(path, files)
    except BaseException:
        for file in files:
            file.close()
        raise


def _check_all(path: Path, names: Iterable[str]) -> None:
    """Raise if files of some rank, or all ranks' parts of a file of the whole model, are missing: for the first one."""
    numbers = [tuple(map(int, match.groups())) for name in names if (match := _NAME.fullmatch(name))]
    ranks, places = {rank for rank, _, _ in numbers}, {place for _, place, _ in numbers}
    for what, there, count in (
        ("shard-{:05}", ranks, max(ranks)),
        ("model-{:05}", places, max(count for *_, count in numbers)),
    ):
        missing = next((number for number in range(1, count + 1) if number not in there), None)
        if missing is not None:
            raise BadCheckpoint(
                f"{path}: no file is named {what.format(missing)}: a part of the checkpoint is missing",
                hint="copy or download the checkpoint again",
            )


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
