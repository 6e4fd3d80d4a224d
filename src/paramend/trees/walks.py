"""Walks over trees: flattening one, naming its leaves, rebuilding it."""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any

from paramend.arrays.registry import backend_of
from paramend.errors import Unsupported
from paramend.leaves.leaves import Index
from paramend.leaves.nested import MAX_DEPTH
from paramend.leaves.paths import Label, labels
from paramend.trees.kind import ELIDED, Kind
from paramend.trees.lookup import DICT, EMPTY, LIST, array_types, find_kind, leaf_types


def too_deep() -> Unsupported:
    """The error for a tree that is too deep."""
    return Unsupported(f"the tree is nested more than {MAX_DEPTH} levels deep")


class Walk:
    """The general walk: the leaves, their boxes, and the tokens that identify the structure."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.boxes: dict[int, Any] = {}
        self.tokens: list[Hashable] = []

    def flatten(self, node: Any, above: tuple[int, ...], depth: int = 0) -> None:
        kind = find_kind(node)
        if kind is None:
            self.values.append(node)
            return
        if depth >= MAX_DEPTH and kind is not EMPTY:
            raise too_deep()
        if kind.replace is not None:
            if id(node) in above:  # modules may refer to each other in a circle
                return
            above = (*above, id(node))
        keys, children, static = kind.open(node)
        types = tuple(map(type, children))
        self.tokens.append((keys, static, types))
        if kind.assign is not None:
            self.boxes[len(self.values)] = node
        if leaf_types.issuperset(types):
            self.values.extend(children)
            return
        for child in children:
            self.flatten(child, above, depth + 1)


class Namer:
    """Walks a tree and writes its names; leaf numbers come from a numbered twin of the tree, or are counted."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.compiled = True  # whether the numbered twin has the same leaves as this walk
        self.simple = True  # whether all containers are dicts and lists, so that a `Copier` can copy the tree
        # For the copier, the dicts and lists of the tree, nested: (key, containers in it).
        self.inner: tuple[Any, ...] = ()
        # The leaf numbers in the order of the walk, also those of leaves that are not arrays.
        self.numbers: list[int] = []
        self.leaves: list[Any] = []  # the leaves, likewise
        self.slots: list[tuple[int, Any]] = []  # for the copier, (which container, key) of each leaf, likewise
        self.copied = 0
        self.plain: set[Any] = set()

    def name(self, root: Any, numbered: Any) -> None:
        entry, inner = self.enter(root, numbered, ())
        self.inner, self.simple = inner or (), self.simple and inner is not None
        if type(entry) is int:
            self.index.add(self.index.names, "", entry)
        else:
            self.index.names = entry or {}

    def leaf(self, node: Any, twin: Any, container: int, key: Any) -> int | None:
        number: int = len(self.numbers) if twin is None else twin
        self.numbers.append(number)
        self.leaves.append(node)
        self.slots.append((container, key))
        if backend_of(type(node)) is None:
            return None
        self.index.numbers.append(number)
        return number

    def arrays(self, node: dict[Any, Any], twin: Any, container: int) -> dict[Any, int] | None:
        """The names of a dict that holds only arrays under keys of one piece, as most dicts do; else None."""
        if not array_types.issuperset(map(type, node.values())):
            return None
        if not self.plain.issuperset(node):
            self.plain.update(key for key in node if type(key) is str and "/" not in key and "." not in key)
            if not self.plain.issuperset(node):
                return None
        count = len(self.numbers)
        numbers = list(range(count, count + len(node)) if twin is None else map(twin.__getitem__, node))
        self.numbers += numbers
        self.leaves += node.values()
        self.slots += zip(repeat(container), node, strict=False)
        self.index.numbers += numbers
        self.index.spans.append((dict, len(self.index.numbers) - len(numbers), len(self.index.numbers)))
        return dict(zip(node, numbers, strict=True))

    def enter(
        self, node: Any, twin: Any, above: tuple[int, ...], parent: int = 0, key: Any = None, depth: int = 0
    ) -> tuple[Any, tuple[Any, ...] | None]:
        """The names of the node (a leaf number, a dict of names, or None), and the containers in it."""
        kind = find_kind(node)
        if kind is None:
            return self.leaf(node, twin, parent, key), None
        if depth >= MAX_DEPTH and kind is not EMPTY:
            raise too_deep()
        if kind.replace is not None:
            if id(node) in above:
                return None, None
            above = (*above, id(node))
        if twin is not None and not kind.compiled:
            self.compiled = False
            return None, None
        copied = kind is DICT or kind is LIST
        self.simple = self.simple and (copied or kind is EMPTY)
        container, self.copied = self.copied, self.copied + copied
        if kind is DICT:
            found = self.arrays(node, twin, container)
            if found is not None:
                return found, ()
        keys, children, _ = kind.open(node)
        twins: Any = repeat(None)
        if twin is not None:
            twins = [twin[key] for key in keys] if kind is DICT else kind.open(twin)[1]
        names: Any = {}
        inner: list[Any] = []
        start = len(self.index.numbers)
        for key, child, other in zip(keys or range(len(children)), children, twins, strict=False):
            if type(child) in leaf_types:
                entry = self.leaf(child, other, container, key)
            else:
                entry, below = self.enter(child, other, above, container, key, depth + 1)
                if below is not None:
                    inner.append((key, below))
            if key is ELIDED:
                names = entry
            elif type(entry) is int or entry:
                self.index.add(names, key, entry)
        self.index.spans.append((type(node), start, len(self.index.numbers)))
        return names, tuple(inner) if copied else None


def containers(root: Any) -> Iterator[tuple[tuple[Label, ...], Any, Kind]]:
    """The containers of a tree with their kinds, each under all of its paths: the beginnings of its leaves' paths."""
    rest: list[tuple[tuple[Label, ...], Any, tuple[int, ...]]] = [((), root, ())]
    while rest:
        path, node, above = rest.pop()
        kind = find_kind(node)
        if kind is not None and id(node) not in above:
            yield path, node, kind
            rest += [
                (path if key is ELIDED else (*path, *labels(key)), child, (*above, id(node)))
                for key, child in reversed(kind.entries(node))
            ]


def rebuild(node: Any, values: Iterator[Any], owners: Mapping[int, Any]) -> Any:
    """A tree rebuilt from its leaves, in the general way."""
    kind = find_kind(node)
    if kind is None:
        return next(values)
    if kind.replace is not None:
        _skip(node, values)
        return kind.replace(node, owners)
    children = kind.open(node)[1]
    if leaf_types.issuperset(map(type, children)):
        return kind.close(node, list(islice(values, len(children))))
    return kind.close(node, [rebuild(child, values, owners) for child in children])


def _skip(node: Any, values: Iterator[Any]) -> None:
    """Take the values of the leaves of a node."""
    walk = Walk()
    walk.flatten(node, ())
    for _ in walk.values:
        next(values)


def labelled(node: Any, labels: Iterator[Any], owners: Mapping[int, Any]) -> Any:
    """The containers of a tree holding labels, without the boxes that held the leaves."""
    kind = find_kind(node)
    if kind is None:
        return next(labels)
    if kind.label is not None:
        _skip(node, labels)
        return kind.label(node, owners)
    children = [labelled(child, labels, owners) for child in kind.open(node)[1]]
    return children[0] if kind.assign is not None else kind.close(node, children)


@dataclass(frozen=True, slots=True)
class Copier:
    """Copies trees of dicts and lists by each container's `copy`, which is fast and keeps the order of keys."""

    inner: tuple[tuple[Any, Any], ...]
    slots: Mapping[int, tuple[int, Any]]

    def copy(self, root: Any, changes: Mapping[int, Any]) -> Any:
        made: list[Any] = []
        top = _copy(root, self.inner, made)
        for number, value in changes.items():
            container, key = self.slots[number]
            made[container][key] = value
        return top


def _copy(old: Any, inner: tuple[tuple[Any, Any], ...], made: list[Any]) -> Any:
    # A module-level function: a recursive closure would be a cycle, and keep its results until the next collection.
    new = old.copy()
    made.append(new)
    for key, below in inner:
        if below:
            new[key] = _copy(old[key], below, made)
        else:
            new[key] = fresh = old[key].copy()
            made.append(fresh)
    return new


def restore_order(old: Any, new: Any) -> None:
    """Put the fresh dicts of `new` into the key order of `old`."""
    kind = find_kind(old)
    if kind is None:
        return
    if kind is DICT:
        for key, child in old.items():
            if type(child) not in leaf_types:
                restore_order(child, new[key])
        if tuple(old) != tuple(new):
            items = [(key, new[key]) for key in old]
            new.clear()
            new.update(items)
    else:
        for child, fresh in zip(kind.open(old)[1], kind.open(new)[1], strict=True):
            if type(child) not in leaf_types:
                restore_order(child, fresh)
