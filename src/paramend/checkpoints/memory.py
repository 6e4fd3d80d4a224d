"""`InMemory`: a tree in memory as a source, which formats are written from."""

import os
import reprlib
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paramend.arrays.origins import made
from paramend.arrays.registry import backend, backend_of
from paramend.errors import BadArgument, Unsupported
from paramend.formats.source import Gathering
from paramend.leaves.leaves import Index, tied
from paramend.leaves.origins.origin import Origin
from paramend.leaves.outlines import ATOMS, Keys, Outline, Place, once
from paramend.leaves.paths import Joined, Names, Part, labels
from paramend.trees.kind import ELIDED
from paramend.trees.lookup import find_kind

# The metadata key for the separator of keys, written where the names alone would mislead.
SEPARATOR = "paramend.separator"


class InMemory(Gathering):
    """A tree in memory as a source. A torch module in it stands for its state dict.

    With `flat` it is written into a table of names, from which keys must be told apart again; with `keys` typed PRNG
    keys are written as their numbers, as Orbax does; with `joined` names that `pm.load` has split are one key again, as
    torch and tables of names have them. `BadArgument` if it is a value that is no tree, `Unsupported` if keys contain
    both separators, so that names could not be split again.

    >>> source = InMemory({"fc": {"weight": np.ones(2, "int8")}, "step": 3})
    >>> source.index.path(0), source.spec(0), source.outline().others
    ('fc/weight', Spec(shape=(2,), dtype='int8'), [(('step',), 3)])
    """

    format = ""
    stats: Mapping[Path, os.stat_result] = {}

    def __init__(self, tree: Any, *, flat: bool = False, keys: bool = False, joined: bool = True) -> None:
        self.path = Path()
        self._keys, self._joined = keys, joined
        self._leaves: list[Any] = []
        self._made: list[Origin] = []
        self._paths: list[tuple[str, ...]] = []
        self._entries: list[tuple[Keys, Any]] = []
        self._containers: dict[Keys, Any] = {}
        self._owners: list[Hashable] = []
        self._marks: list[str] = []
        self._plain = once(lambda node: ATOMS.issuperset(map(type, node)))
        self._visit(tree, (), (), ())
        if not self._leaves and [keys for keys, _ in self._entries] == [()]:
            _check_tree(tree)
            self._entries.clear()
        self.ties: Mapping[int, int] = self._tied()
        self.metadata = {"format": _library(self._leaves)}
        self.index = self._named(flat=flat)

    def _visit(self, node: Any, keys: Keys, path: tuple[str, ...], above: tuple[int, ...], box: Any = None) -> None:
        """Enter what a node holds: at its keys, in which names that were split are whole, and at its path."""
        kind = find_kind(node)
        if kind is not None and kind.name == "torch module":
            node = node.state_dict()
            kind = find_kind(node)
        if kind is None:
            self._enter(node, keys, path, box)
            return
        if kind.replace is not None:
            if id(node) in above:  # modules may refer to each other in a circle
                return
            above = (*above, id(node))
        if type(node) in (list, tuple):
            if self._plain(node):
                self._entries.append((keys, node))
                return
            self._containers[keys] = type(node)()
        names, children, _ = kind.open(node)
        empty = _NOTHING if children or kind.replace is not None else _empty(node)
        if empty is not _NOTHING:
            self._entries.append((keys, empty))
            return
        if isinstance(node, OrderedDict):
            self._containers[keys] = node
        mark = next((name.before for name in names if type(name) is Joined), "")
        self._marks += [mark] if mark else []
        for name, child in zip(names or range(len(children)), children, strict=True):
            if name is ELIDED:
                self._visit(child, keys, path, above, node)
            elif mark and keys and self._joined:
                self._visit(child, (*keys[:-1], f"{keys[-1]}{mark}{name}"), (*path, str(name)), above)
            else:
                self._visit(child, (*keys, _key(name)), (*path, str(name)), above)

    def _enter(self, value: Any, keys: Keys, path: tuple[str, ...], box: Any) -> None:
        if backend_of(type(value)) is None:
            self._entries.append((keys, value))
            return
        kind = None if box is None else find_kind(box)
        number, place = len(self._leaves), Place(len(self._leaves), boxed="" if kind is None else kind.name)
        if self._keys and is_key(value):
            from paramend.arrays import jax  # imports jax

            key, device, value = jax.key_numbers(value)
            place = place._replace(key=key, device=device)
        self._entries.append((keys, place))
        self._leaves.append(value)
        self._made.append(made(value, backend(value).numpy))
        self._paths.append(path or ("",))
        self._owners.append(_owner(value, box) or number)

    def _tied(self) -> dict[int, int]:
        """Leaf number → the first number of the same torch storage or NNX Variable, for those with several paths."""
        return tied(dict(enumerate(self._owners)))

    def _named(self, *, flat: bool) -> Index:
        """The names. In a table of names, their separator is in none of the keys, so that they can be split again."""
        single = all(len(path) == 1 for path in self._paths)
        separator = self._marks[0] if self._marks else "." if self.metadata["format"] == "pt" else "/"
        if flat and not single:
            separator = _separator(separator, self._paths)
        index = Index(separator)
        names: list[str] = []
        for keys, place in self._entries:
            if type(place) is Place:
                inner, *rest = index.names, *(keys or ("",))
                for key in rest[:-1]:
                    inner = _below(inner, key)
                index.add(inner, rest[-1], place.number)
                index.numbers.append(place.number)
        names = [index.name(number) for number in index.numbers]
        split = "/" if any("/" in name for name in names) else "."
        if any(tuple(name.split(split)) != path for name, path in zip(names, self._paths, strict=True)):
            self.metadata[SEPARATOR] = "" if single else separator
        return index

    def outline(self) -> Outline:
        return Outline(self._entries, self._containers)

    def origin(self, number: int) -> Origin:
        return self._made[number]

    def nbytes(self, number: int) -> int:
        return self.spec(number).nbytes

    def close(self) -> None:
        """Nothing is open."""


_NOTHING = object()


def is_key(value: Any) -> bool:
    """Whether it is an array of typed PRNG keys."""
    return str(getattr(value, "dtype", "")).startswith("key<")


def _check_tree(tree: Any) -> None:
    if tree is None or find_kind(tree) is None:
        state = hasattr(tree, "state_dict")
        raise BadArgument(
            f"{reprlib.repr(tree)} ({type(tree).__name__}) is not a tree of arrays",
            hint="its .state_dict()" if state else "pm.save(tree, path)",
        )


def _empty(node: Any) -> Any:
    """An empty container as an entry; `_NOTHING` for a class without leaves, which says what it is."""
    if node is None or type(node) in (list, tuple, OrderedDict) or hasattr(node, "_fields"):
        return node
    return {} if isinstance(node, Mapping) else _NOTHING


def _key(name: Any) -> Any:
    """A key as formats have it: plain text, a number, or a tuple of these; any other as text."""
    if isinstance(name, np.integer):
        return int(name)
    plain = all(type(part) in ATOMS for part in (name if type(name) is tuple else (name,)))
    return name if plain else str(name)


def _owner(value: Any, box: Any) -> Hashable | None:
    """What makes two leaves one: the Variable that holds both, or the storage of a torch tensor."""
    kind = find_kind(box)
    if box is not None and kind is not None and kind.assign is not None:
        return "box", id(box)
    if _library([value]) == "pt":
        from paramend.arrays import torch  # imports torch

        return "torch", torch.storage(value)
    return None


def _below(names: Names, key: object) -> Names:
    """The subtree of names for a key that has others below it, made if it is needed."""
    for label in labels(key):
        while type(names.setdefault(label, {})) is not dict:  # a leaf whose key reads the same
            label = label._replace(serial=label.serial + 1) if isinstance(label, Part) else Part(label, "", True, 1)
        names = names[label]
    return names


def _separator(natural: str, paths: Iterable[tuple[str, ...]]) -> str:
    text = "\n".join(key for path in paths for key in path)
    for separator in natural, "/", ".":
        if separator not in text:
            return separator
    slash, dot = (next(key for path in paths for key in path if char in key) for char in "/.")
    raise Unsupported(
        f"keys contain both separators, as {slash!r} and {dot!r} do, so names could not be split again",
        hint="rename some keys first, or save to a format that holds keys: .pt, .msgpack",
    )


def _library(leaves: Iterable[Any]) -> str:
    """What transformers calls the library of the first of some arrays."""
    for leaf in leaves:
        library = str(getattr(backend_of(type(leaf)), "__name__", "")).rpartition(".")[2]
        kinds: dict[str, str] = {"torch": "pt", "jax": "flax"}
        return kinds.get(library, "np")
    return "np"
