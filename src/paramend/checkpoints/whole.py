"""Whole trees: a checkpoint as nested dicts of arrays, and a tree in memory as a checkpoint."""

import importlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args, overload

import numpy as np

from paramend._optional import need
from paramend.arrays.registry import backend_of, to_numpy
from paramend.checkpoints.checkpoint import Checkpoint, copied, recover
from paramend.disk.identity import check_not_overwritten
from paramend.edits.plan import Plan
from paramend.errors import BadArgument, Unsupported
from paramend.formats.registry import open_source
from paramend.leaves.leaves import Index, keys_of, plain
from paramend.leaves.specs import AnyTree, Array, Spec
from paramend.reports import wording
from paramend.reports.progress import Progress

if TYPE_CHECKING:
    import jax
    import torch

    from paramend.rewriting.rewrite import RewriteReport

# The metadata key for the separator of keys, written where the names alone would mislead.
_SEPARATOR = "paramend.separator"


class _InMemory:
    """A tree in memory as a source."""

    format = ""
    ties: Mapping[int, int] = {}
    stats: Mapping[Path, os.stat_result] = {}

    def __init__(self, tree: Any) -> None:
        self._tree = tree
        self._last: tuple[int, Array] | None = None
        self.path = ""
        paths = tree.index.paths
        keys = {number: keys_of(path) for number, path in paths.items()}
        flat = all(len(key) == 1 for key in keys.values())
        self.index = Index(tree.index.separator if flat else _separator(tree.index.separator, keys.values()))
        self.index.names, self.index.numbers = tree.index.names, tree.index.numbers
        self.metadata = {"format": _kind(tree)}
        names = {number: plain(paths[number], self.index.separator) for number in self.index.numbers}
        split = "/" if any("/" in name for name in names.values()) else "."
        if any(tuple(names[number].split(split)) != key for number, key in keys.items()):
            self.metadata[_SEPARATOR] = "" if flat else self.index.separator
        # For formats that tell lists from dicts and hold more than arrays.
        self._lists: set[tuple[str, ...]] = set()
        self.rest: list[tuple[tuple[str | int, ...], str, Any]] = []
        self._look(tree.root, ())
        self.keys = {number: self._true(key) for number, key in keys.items()}

    def _look(self, node: Any, above: tuple[str | int, ...]) -> None:
        """Collect the lists, and what is not an array."""
        inner: Iterable[tuple[str | int, Any]] = ()
        kind = {int: "scalar", float: "scalar", str: "string", type(None): "None"}.get(type(node), "")
        if hasattr(node, "_fields"):
            inner = [(name, getattr(node, name)) for name in node._fields]
            kind, node = ("", node) if inner else ("None", None)
        elif isinstance(node, list | tuple):
            self._lists.add(tuple(map(str, above)))
            inner = enumerate(node)
            kind = "" if node else type(node).__name__.capitalize()
        elif isinstance(node, Mapping):
            inner = [(str(key), child) for key, child in node.items()]
            kind, node = ("", node) if inner else ("Dict", {})
        elif is_dataclass(node) and not isinstance(node, type):
            inner = [(f.name, getattr(node, f.name)) for f in fields(node) if f.metadata.get("pytree_node", True)]
        for key, child in inner:
            self._look(child, (*above, key))
        if kind and above:
            self.rest.append((above, kind, node))

    def _true(self, keys: tuple[str, ...]) -> tuple[str | int, ...]:
        return tuple(int(key) if keys[:at] in self._lists else key for at, key in enumerate(keys))

    def spec(self, number: int) -> Spec:
        found: Spec = self._tree.spec(number)
        return found

    def nbytes(self, number: int) -> int:
        return self.spec(number).nbytes

    def refusal(self, number: int) -> str:
        return ""

    def extent(self, number: int) -> None:
        return None

    def read(self, number: int) -> Array:
        if self._last is None or self._last[0] != number:
            self._last = number, np.ascontiguousarray(to_numpy(self._tree.read(number)))
        return self._last[1]

    def read_range(self, number: int, start: int, stop: int) -> Array:
        return self.read(number).reshape(-1)[start:stop]

    def children(self, node: Any) -> None:
        return None

    def close(self) -> None:
        pass


def _separator(natural: str, keys: Iterable[tuple[str, ...]]) -> str:
    """A separator that is in none of the keys."""
    text = "\n".join(key for path in keys for key in path)
    for separator in str(natural), "/", ".":
        if separator not in text:
            return separator
    slash, dot = (next(key for path in keys for key in path if char in key) for char in "/.")
    raise Unsupported(
        f"keys contain both separators, as {slash!r} and {dot!r} do, so names could not be split again",
        hint="rename some keys first",
    )


def _kind(tree: Any) -> str:
    """What transformers calls the library of a tree's arrays."""
    for number in tree.index.numbers[:1]:
        library = str(getattr(backend_of(type(tree.read(number))), "__name__", "")).rpartition(".")[2]
        kinds: dict[str, str] = {"torch": "pt", "jax": "flax"}
        return kinds.get(library, "np")
    return "np"


Kind: TypeAlias = Literal["numpy", "jax", "torch"]
_KINDS = get_args(Kind)


@overload
def load(
    path: str | os.PathLike[str], kind: Literal["numpy"] = ..., *, nested: Literal[False], mmap: bool = ...
) -> dict[str, Array]: ...
@overload
def load(
    path: str | os.PathLike[str], kind: Literal["jax"], *, nested: Literal[False], mmap: Literal[False] = ...
) -> "dict[str, jax.Array]": ...
@overload
def load(
    path: str | os.PathLike[str], kind: Literal["torch"], *, nested: Literal[False], mmap: Literal[False] = ...
) -> "dict[str, torch.Tensor]": ...
@overload
def load(
    path: str | os.PathLike[str], kind: Literal["numpy"] = ..., *, nested: bool = ..., mmap: bool = ...
) -> dict[str, AnyTree]: ...
@overload
def load(
    path: str | os.PathLike[str], kind: Kind, *, nested: bool = ..., mmap: Literal[False] = ...
) -> dict[str, AnyTree]: ...
def load(
    path: str | os.PathLike[str], kind: Kind = "numpy", *, nested: bool = True, mmap: bool = False
) -> dict[str, AnyTree]:
    """The arrays of a checkpoint, as nested dicts.

    They are copies, which later changes of the file do not affect. Leaves that are tied in the file are one array under
    several paths.

    Args:
        path: a file or a directory.
        kind: "numpy", "jax" or "torch".
        nested: whether names are split into keys at their separators, "/" if some name contains one, otherwise ".";
            if False, the result is a flat dict by name, as `load_state_dict` takes it.
        mmap: whether numpy arrays are read-only views of the file where the format allows it. They take no memory
            until they are read, and **a later `pm.patch` or `pm.undo` of the file changes them**.

    Raises:
        BadArgument: there is no such kind, or `mmap` is used with a kind other than numpy.
        Unsupported: a leaf cannot be read, or that library has no such dtype.
        BadCheckpoint: it is damaged, or another program wrote into it while it was read.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"fc": {"bias": np.ones(2, "float32")}}, path)
    >>> load(path)
    {'fc': {'bias': array([1., 1.], dtype=float32)}}
    """
    if kind not in _KINDS:
        near = wording.closest(kind, _KINDS, limit=1)
        raise BadArgument(f"{kind!r} is not a kind of array", hint=f'"{near[0]}"' if near else ", ".join(_KINDS))
    if mmap and kind != "numpy":
        raise BadArgument(f"mmap=True gives views of the file, and {kind} arrays are copies", hint="mmap=False")
    convert = _converter(kind)
    recover(path)
    source = open_source(path)
    try:
        paths, separator = source.index.paths, source.index.separator
        made: dict[int, Any] = {}
        for number in source.index.numbers:
            if (first := source.ties.get(number, number)) not in made:
                made[first] = convert(source.read(first) if mmap else copied(source, first))
        flat = {plain(paths[n], separator): made[source.ties.get(n, n)] for n in source.index.numbers}
        if not mmap:
            check_not_overwritten(source.stats)
        given = source.metadata.get(_SEPARATOR)
        keys = {number: keys_of(paths[number]) for number in source.index.numbers}
    finally:
        source.close()
    if not nested or given == "":
        return flat
    if all(len(key) == 1 for key in keys.values()):  # a flat table of names
        separator = given or ("/" if any("/" in name for name in flat) else ".")
        return _nested((tuple(name.split(separator)), array) for name, array in flat.items())
    return _nested(zip(keys.values(), flat.values(), strict=True))


def _nested(leaves: Iterable[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, array in leaves:
        node = tree
        for at, key in enumerate(path[:-1]):
            node = node.setdefault(key, {})
            if type(node) is not dict:
                raise Unsupported(
                    f"{'/'.join(path[: at + 1])} is a leaf, and {'/'.join(path)} would be below it",
                    hint="pm.load(path, nested=False) gives a flat dict by name",
                )
        if path[-1] in node:
            raise Unsupported(
                f"{'/'.join(path)} is a leaf, and others would be below it",
                hint="pm.load(path, nested=False) gives a flat dict by name",
            )
        node[path[-1]] = array
    return tree


def _converter(kind: str) -> Any:
    """numpy array → array of that kind."""
    if kind == "numpy":
        return lambda array: array
    need(kind, extra=kind, to=f"load {kind} arrays")
    library = importlib.import_module(f"paramend.arrays.{kind}")
    return library.from_numpy


def save(
    tree: AnyTree,
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    max_shard_size: int | str | None = None,
    progress: Progress | None = None,
) -> "RewriteReport":
    """The report of what was written: a tree in memory, or a `Checkpoint`, as a checkpoint on disk.

    The name of a leaf is its path: keys joined by "." in torch trees, by "/" in others, or by the other one where
    keys contain the first. `pm.load` returns the tree of dicts.

    Args:
        tree: any tree of arrays.
        path: the file or, with a `/` at its end or with `max_shard_size`, the directory.
        force: whether it may already exist; it is then replaced in one step.
        max_shard_size: the most bytes of tensors in one file, such as "5GB".
        progress: called with an `Event` as bytes are written.

    Raises:
        CannotWrite: the output exists, or its folder does not.
        Unsupported: two leaves would have one name, or no format can hold a leaf.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"fc": {"weight": np.ones((2, 2), "float32")}}, path)
    >>> load(path)
    {'fc': {'weight': array([[1., 1.],
           [1., 1.]], dtype=float32)}}
    """
    if isinstance(tree, Checkpoint):
        return tree.save(path, force=force, max_shard_size=max_shard_size, progress=progress)
    from paramend.rewriting.rewrite import write  # not needed to look at a checkpoint
    from paramend.trees.tree import Tree

    made = Plan.of(_InMemory(Tree(tree)))
    return write(made, path, force=force, max_shard_size=max_shard_size, progress=progress)
