"""`Tree`: any tree in memory as `Leaves`, by the kinds of its containers.

A tree is taken apart in one of two ways. The general one walks it in Python, container by container. Trees that JAX
takes apart into the same leaves (plain dicts, lists, registered classes) go through JAX's compiled walk, which is several
times as fast; what that walk forgets, the order of dict keys, is put back.
"""

import importlib
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, repeat
from typing import Any

import numpy as np

from paramend._optional import imported
from paramend.arrays.registry import backend, backend_of
from paramend.containers import ELIDED, Kind
from paramend.errors import Unsupported
from paramend.leaves import Index
from paramend.specs import Spec
from paramend.trees import builtin

# Adapters in the order of asking; each is opened once the user has imported its framework.
_ADAPTERS = (("torch", "module"), ("flax", "nnx"))

_kinds: dict[type, Kind] = dict(builtin.EXACT)
_leaf_types: set[type] = {np.ndarray, int, float, bool, complex, str, bytes}


def find_kind(node: Any) -> Kind | None:
    """How to open a node, or None for a leaf."""
    kind = type(node)
    return None if kind in _leaf_types else _kinds.get(kind) or _ask_adapters(kind, node)


def _ask_adapters(kind: type, node: Any) -> Kind | None:
    """Types that a framework may still register later are asked for anew each time."""
    if backend_of(kind) is not None:
        _leaf_types.add(kind)
        return None
    if isinstance(node, type):
        return None
    found: Kind | None = None
    for framework, adapter in _ADAPTERS:
        if found is None and imported(framework):
            found = importlib.import_module(f"paramend.trees.{adapter}").kind_of(kind)
    if found is None and imported("jax") and not (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        found = importlib.import_module("paramend.trees.pytree").kind_of(kind, node)
    found = found or builtin.kind_of(kind)
    if found is not None:
        _kinds[kind] = found
    return found


# ---- structures ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Structure:
    """What all trees of one structure share.

    Attributes:
        index: the names.
        compiled: whether JAX's walk gives these leaves.
        copier: for compiled structures of dicts and lists alone, how to copy them.
        torch: whether some leaf is a torch tensor.
    """

    index: Index
    compiled: bool = False
    copier: "_Copier | None" = None
    torch: bool = False


class _Cache(OrderedDict[Hashable, Any]):
    """The structures met last."""

    def remember(self, key: Hashable, structure: Any) -> Any:
        if len(self) >= 128:
            self.popitem(last=False)
        self[key] = structure
        return structure


_structures = _Cache()


class Tree:
    """A tree in memory.

    Attributes:
        root: the tree as the user gave it.
        values: its leaves, also those that are no arrays. A leaf's number is its place here.
        boxes: leaf number → the box (an NNX Variable) that holds it.
    """

    def __init__(self, root: Any) -> None:
        self.root = root
        self.values: list[Any] = []
        self.boxes: dict[int, Any] = {}
        self._treedef: Any = None
        self._structure: _Structure = self._compiled() or self._walked()

    def _compiled(self) -> _Structure | None:
        """The structure by JAX's own walk, or None if that would take another view of the tree."""
        known = _kinds.get(type(self.root))
        if not imported("jax") or type(self.root) in _leaf_types or (known is not None and not known.compiled):
            return None
        pytree = importlib.import_module("paramend.trees.pytree")
        try:
            values, treedef = pytree.flatten(self.root)
            key = (_landmarks(self.root), treedef, tuple(map(type, values)))
            structure = _structures.get(key)
        except (TypeError, ValueError, RecursionError):  # keys that do not sort, static fields that do not hash, circles
            return None
        if structure is None:
            structure = _structures.remember(key, self._compile(values, treedef))
        if not structure.compiled:
            return None
        self.values, self._treedef = values, treedef
        return structure  # type: ignore[no-any-return]

    def _compile(self, values: list[Any], treedef: Any) -> _Structure:
        namer = _Namer(Index("." if _holds_torch(values) else "/"), values)
        if not namer.name(self.root, treedef.unflatten(range(len(values)))):
            return _Structure(namer.index)
        copier = _Copier(namer.inner, namer.slots) if namer.simple else None
        return _Structure(namer.index, compiled=True, copier=copier, torch=_holds_torch(values))

    def _walked(self) -> _Structure:
        walk = _Walk()
        walk.flatten(self.root, ())
        self.values, self.boxes = walk.values, walk.boxes
        key = (type(self.root), *walk.tokens)
        structure = _structures.get(key)
        if structure is None:
            torch = _holds_torch(self.values)
            namer = _Namer(Index("." if torch else "/"), self.values)
            namer.name(self.root, None)
            structure = _structures.remember(key, _Structure(namer.index, torch=torch))
        return structure  # type: ignore[no-any-return]

    @property
    def index(self) -> Index:
        """The names; shared by all trees of this structure."""
        return self._structure.index

    @cached_property
    def ties(self) -> Mapping[int, int]:
        """Leaf number → the first number of the same leaf, for leaves with several paths."""
        numbers = self.index.numbers
        ids: list[Any] = list(map(id, self.values))
        for number, box in self.boxes.items():
            ids[number] = id(box)
        if self._structure.torch:
            torch_backend = importlib.import_module("paramend.arrays.torch")
            for number in numbers:
                if isinstance(self.values[number], torch_backend.TYPES):
                    ids[number] = torch_backend.storage(self.values[number])
        if len(numbers) == len(ids) == len(set(ids)):
            return {}
        first: dict[Any, int] = {}
        for number in numbers:
            first.setdefault(ids[number], number)
        shared = {one for number in numbers if (one := first[ids[number]]) != number}
        # numpy hands out the same scalar objects at will: they tie nothing
        shared = {number for number in shared if not isinstance(self.values[number], np.generic)}
        return {number: one for number in numbers if (one := first[ids[number]]) in shared} if shared else {}

    def spec(self, number: int) -> Spec:
        """Shape and dtype of a leaf."""
        value = self.values[number]
        return backend(value).spec(value)

    def read(self, number: int) -> Any:
        """The leaf itself."""
        return self.values[number]

    def twins(self, number: int) -> Sequence[int]:
        """The numbers of all paths of a leaf."""
        one = self.ties.get(number) if self.ties else None
        return (number,) if one is None else [n for n, o in self.ties.items() if o == one]

    def with_leaves(self, changes: Mapping[int, Any]) -> Any:
        """A new tree of the same containers in which these leaves are replaced, under all their paths."""
        if self.ties:
            changes = {twin: value for number, value in changes.items() for twin in self.twins(number)}
        values = list(self.values)
        for number, value in changes.items():
            values[number] = value
        return self._rebuilt(values, changes)

    def mapped(self, values: Sequence[Any]) -> Any:
        """The same containers holding other things, one for each of `self.values`.

        A torch module cannot hold other things: of it, a dict by state dict names.
        """
        kind = find_kind(self.root)
        if kind is not None and kind.name == "torch module":
            return {self.index.path(number): values[number] for number in self.index.numbers}
        return self._rebuilt(values, dict(enumerate(values)))

    def _rebuilt(self, values: Sequence[Any], changes: Mapping[int, Any]) -> Any:
        if self._structure.copier is not None:
            return self._structure.copier.copy(self.root, changes)
        if self._treedef is not None:
            root = self._treedef.unflatten(values)
            _restore_order(self.root, root)
            return root
        owners = {id(self.boxes.get(number, self.values[number])): value for number, value in changes.items()}
        return _rebuild(self.root, iter(values), owners)

    def children(self, node: Any) -> list[tuple[Any, Any]] | None:
        """The entries of a container as (key, child), None for a leaf; the key of a box's content is `ELIDED`."""
        kind = find_kind(node)
        if kind is None:
            return None
        keys, children, _ = kind.open(node)
        return list(zip(keys or range(len(children)), children, strict=True))

    def in_place(self, number: int) -> None:
        """Refuses leaves that can only be replaced.

        Raises:
            Unsupported: an array that never changes, outside of a box.
        """
        value = self.values[number]
        if number not in self.boxes and not backend(value).mutable(value):
            raise Unsupported(
                f"{self.index.path(number)} cannot change in place: this {type(value).__name__} never changes",
                hint="the verb without the underscore returns a new tree: params = pm.at(params, ...).zero()",
            )

    def assign(self, number: int, value: Any) -> None:
        """Puts a value into a leaf, in place. `in_place` has been asked before."""
        box = self.boxes.get(number)
        if box is None:
            backend(self.values[number]).assign(self.values[number], value)
        else:
            assign = _kinds[type(box)].assign
            assert assign is not None
            assign(box, value)


def _landmarks(node: Any) -> tuple[Any, ...]:
    """The keys on the way to the last leaf: JAX's hash of a structure leaves keys out, and a table needs them apart."""
    keys = []
    while type(node) is dict and node:
        key = next(reversed(node))
        keys.append(key)
        node = node[key]
    return tuple(keys)


def _holds_torch(values: Sequence[Any]) -> bool:
    return any(getattr(backend_of(kind), "__name__", "").endswith(".torch") for kind in set(map(type, values)))


# ---- walks -----------------------------------------------------------------------------------------------------


class _Walk:
    """The general walk: the leaves, their boxes, and the tokens that tell this structure from others."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.boxes: dict[int, Any] = {}
        self.tokens: list[Hashable] = []

    def flatten(self, node: Any, above: tuple[int, ...]) -> None:
        kind = find_kind(node)
        if kind is None:
            self.values.append(node)
            return
        if kind.replace is not None:
            if id(node) in above:  # modules may refer to each other in a circle
                return
            above = (*above, id(node))
        keys, children, static = kind.open(node)
        types = tuple(map(type, children))
        self.tokens.append((keys, static, types))
        if kind.assign is not None:
            self.boxes[len(self.values)] = node
        if _leaf_types.issuperset(types):
            self.values.extend(children)
            return
        for child in children:
            self.flatten(child, above)


class _Namer:
    """Walks a tree and writes its names; leaf numbers are read off a numbered twin of the tree, or counted.

    Attributes:
        compiled: whether the leaves of the numbered twin are those of the tree.
        simple: whether all containers are dicts and lists, so that a `_Copier` can copy the tree.
        inner: for the copier, the dicts and lists of the tree, nested: (key, those in it).
        slots: for the copier, leaf number → (which of those containers, key).
    """

    def __init__(self, index: Index, values: Sequence[Any]) -> None:
        self.index = index
        self.values = values
        self.count = 0
        self.compiled = True
        self.simple = True
        self.inner: tuple[Any, ...] = ()
        self.slots: list[tuple[int, Any]] = [(0, None)] * len(values)
        self.copied = 0

    def name(self, root: Any, numbered: Any) -> bool:
        """Writes the index; whether the leaves are those that the numbered twin has."""
        entry, inner = self.enter(root, numbered, ())
        self.inner, self.simple = inner or (), self.simple and inner is not None
        if type(entry) is int:
            self.index.add(self.index.names, "", entry)
        else:
            self.index.names = entry or {}
        return self.compiled and self.count == len(self.values)

    def leaf(self, node: Any, twin: Any, container: int, key: Any) -> int | None:
        number: int = self.count if twin is None else twin
        self.count += 1
        self.compiled = self.compiled and self.values[number] is node
        self.slots[number] = (container, key)
        if backend_of(type(node)) is None:
            return None
        self.index.numbers.append(number)
        return number

    def enter(
        self, node: Any, twin: Any, above: tuple[int, ...], parent: int = 0, key: Any = None
    ) -> tuple[Any, tuple[Any, ...] | None]:
        """What the node is called by (a leaf number, a dict of names, or None), and the containers in it."""
        kind = find_kind(node)
        if kind is None:
            return self.leaf(node, twin, parent, key), None
        if kind.replace is not None:
            if id(node) in above:
                return None, None
            above = (*above, id(node))
        if twin is not None and not kind.compiled:
            self.compiled = False
            return None, None
        copied = kind is builtin.DICT or kind is builtin.LIST
        self.simple = self.simple and (copied or kind is builtin.EMPTY)
        container, self.copied = self.copied, self.copied + copied
        keys, children, _ = kind.open(node)
        twins: Any = repeat(None)
        if twin is not None:
            twins = [twin[key] for key in keys] if kind is builtin.DICT else kind.open(twin)[1]
        names: Any = {}
        inner: list[Any] = []
        start = len(self.index.numbers)
        for key, child, other in zip(keys or range(len(children)), children, twins, strict=False):
            if type(child) in _leaf_types:
                entry = self.leaf(child, other, container, key)
            else:
                entry, below = self.enter(child, other, above, container, key)
                if below is not None:
                    inner.append((key, below))
            if key is ELIDED:
                names = entry
            elif type(entry) is int or entry:
                self.index.add(names, key, entry)
        self.index.spans.append((type(node), start, len(self.index.numbers)))
        return names, tuple(inner) if copied else None


def _rebuild(node: Any, values: Iterator[Any], owners: Mapping[int, Any]) -> Any:
    """The general way to put a tree together again."""
    kind = find_kind(node)
    if kind is None:
        return next(values)
    if kind.replace is not None:
        walk = _Walk()
        walk.flatten(node, ())
        for _ in walk.values:
            next(values)
        return kind.replace(node, owners)
    children = kind.open(node)[1]
    if _leaf_types.issuperset(map(type, children)):
        return kind.close(node, list(islice(values, len(children))))
    return kind.close(node, [_rebuild(child, values, owners) for child in children])


@dataclass(frozen=True, slots=True)
class _Copier:
    """Copies trees of dicts and lists: each container by its own `copy`, which is fast and keeps the order of keys."""

    inner: tuple[tuple[Any, Any], ...]
    slots: Sequence[tuple[int, Any]]

    def copy(self, root: Any, changes: Mapping[int, Any]) -> Any:
        """A copy of the containers with some leaves replaced."""
        made: list[Any] = []

        def visit(old: Any, inner: tuple[tuple[Any, Any], ...]) -> Any:
            new = old.copy()
            made.append(new)
            for key, below in inner:
                if below:
                    new[key] = visit(old[key], below)
                else:
                    new[key] = fresh = old[key].copy()
                    made.append(fresh)
            return new

        top = visit(root, self.inner)
        for number, value in changes.items():
            container, key = self.slots[number]
            made[container][key] = value
        return top


def _restore_order(old: Any, new: Any) -> None:
    """Gives the fresh dicts of `new` the key order of `old`."""
    kind = find_kind(old)
    if kind is None:
        return
    if kind is builtin.DICT:
        for key, child in old.items():
            if type(child) not in _leaf_types:
                _restore_order(child, new[key])
        if tuple(old) != tuple(new):
            items = [(key, new[key]) for key in old]
            new.clear()
            new.update(items)
    else:
        for child, fresh in zip(kind.open(old)[1], kind.open(new)[1], strict=True):
            if type(child) not in _leaf_types:
                _restore_order(child, fresh)
