"""`Tree`: any tree in memory as `Leaves`.

A tree is flattened in one of two ways. The general one walks it in Python, container by container. Trees that JAX
flattens into the same leaves (plain dicts, lists, registered classes) use JAX's compiled walk, which is several times
as fast; the order of dict keys, which that walk loses, is restored.
"""

from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import is_
from typing import Any

from paramend._optional import imported
from paramend.arrays.registry import backend, backend_of
from paramend.errors import Unsupported
from paramend.leaves.leaves import Index, tied, uncollected
from paramend.leaves.nested import unexhausted
from paramend.leaves.overlaps import overlapping, repeats, same
from paramend.leaves.rules import Codec
from paramend.leaves.specs import Spec
from paramend.trees.lookup import find_kind, is_torch_module, leaf_types
from paramend.trees.walks import Copier, Namer, Walk, labelled, rebuild, restore_order


@dataclass(slots=True)
class _Structure:
    """What all trees of a structure share."""

    index: Index
    compiled: bool = False  # whether JAX's walk yields these leaves
    copier: "Copier | None" = None  # for compiled structures of only dicts and lists, how to copy them
    torch: bool = False  # whether a leaf is a torch tensor


class _Cache(OrderedDict[Hashable, _Structure]):
    def remember(self, key: Hashable, structure: _Structure) -> _Structure:
        if len(self) >= 128:
            self.popitem(last=False)
        self[key] = structure
        return structure


_structures = _Cache()


class Tree:
    """A tree in memory."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.values: list[Any] = []  # its leaves, also those that are not arrays. A leaf's number is its position here
        self.boxes: dict[int, Any] = {}  # leaf number → the box (an NNX Variable) that holds it
        self._treedef: Any = None
        self._ties: Mapping[int, int] | None = None
        with unexhausted("the tree"):
            self._structure: _Structure = self._compiled() or self._walked()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root,)

    def _compiled(self) -> _Structure | None:
        """The structure by JAX's walk, or None if that walk sees the tree differently."""
        if not imported("jax") or type(self.root) in leaf_types or _holds_modules(self.root):
            return None
        from paramend.trees.pytree import flatten  # imports jax

        try:
            values, treedef = flatten(self.root)
            key = (_landmarks(self.root), treedef, tuple(map(type, values)))
            structure = _structures.get(key)
        except (TypeError, ValueError, SystemError):  # keys that do not sort, static fields without hash, great depth
            return None
        if structure is None:
            structure = _structures.remember(key, self._compile(values, treedef))
        if not structure.compiled:
            return None
        self.values, self._treedef = values, treedef
        return structure

    def _compile(self, values: list[Any], treedef: Any) -> _Structure:
        torch = _holds_torch(values)
        namer = Namer(Index("." if torch else "/"))
        with uncollected():
            namer.name(self.root, treedef.unflatten(range(len(values))))
        same = len(namer.numbers) == len(values) and all(map(is_, namer.leaves, map(values.__getitem__, namer.numbers)))
        if not (namer.compiled and same):
            return _Structure(namer.index)
        slots = dict(zip(namer.numbers, namer.slots, strict=True))
        return _Structure(namer.index, True, Copier(namer.inner, slots) if namer.simple else None, torch)

    def _walked(self) -> _Structure:
        walk = Walk()
        walk.flatten(self.root, ())
        self.values, self.boxes = walk.values, walk.boxes
        key = (type(self.root), *walk.tokens)
        structure = _structures.get(key)
        if structure is None:
            torch = _holds_torch(self.values)
            namer = Namer(Index("." if torch else "/"))
            with uncollected():
                namer.name(self.root, None)
            structure = _structures.remember(key, _Structure(namer.index, torch=torch))
        return structure

    @property
    def index(self) -> Index:
        """The names; shared by all trees of this structure."""
        return self._structure.index

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """What the configuration of a torch model says of its quantisation; None if it says nothing."""
        config = getattr(self.root, "config", None) if is_torch_module(self.root) else None
        found: Any = getattr(config, "quantization_config", None)
        found = found.to_dict() if hasattr(found, "to_dict") else found
        return found if isinstance(found, Mapping) else None

    @cached_property
    def codecs(self) -> Mapping[int, Codec]:
        """Number → how a leaf is decoded that holds codes and scales itself, as tensors of torchao do."""
        if not self._structure.torch:
            return {}
        from paramend.arrays.torch_codes import rule_of  # imports torch

        found = ((number, rule_of(self.values[number])) for number in self.index.numbers)
        return {number: rule for number, rule in found if rule is not None}

    @property
    def ties(self) -> Mapping[int, int]:
        if self._ties is None:
            self._ties = self._find_ties() if self.boxes or self._structure.torch else {}
        return self._ties

    def _find_ties(self) -> dict[int, int]:
        """Ties by box, and by storage of torch tensors. Arrays of JAX and numpy are values: one object at two places (a
        model and its moving average at the start) is not a tie, as inside `jit`, where the two are distinct."""
        owners: dict[int, Hashable] = {}
        torch: Any = None
        if self._structure.torch:
            from paramend.arrays import torch  # imports torch
        for number in self.index.numbers:
            value, box = self.values[number], self.boxes.get(number)
            of_torch = torch is not None and backend_of(type(value)) is torch
            if box is not None:
                owners[number] = id(box)
            elif of_torch:
                owners[number] = torch.storage(value)
        return tied(owners)

    def spec(self, number: int) -> Spec:
        value = self.values[number]
        return backend(value).spec(value)

    def nbytes(self, number: int) -> int:
        return self.spec(number).nbytes

    def refusal(self, number: int) -> str:
        return ""

    def read(self, number: int) -> Any:
        return self.values[number]

    def twins(self, number: int) -> Sequence[int]:
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
        """The same containers with other objects, one for each of `self.values`. A torch module cannot hold other
        objects: its result is a dict by state dict names. That of an NNX module is a State, and NNX Variables are left
        out."""
        if is_torch_module(self.root):
            return {self.index.path(number): values[number] for number in self.index.numbers}
        if self.boxes:
            owners = {id(self.boxes.get(number, leaf)): values[number] for number, leaf in enumerate(self.values)}
            return labelled(self.root, iter(values), owners)
        return self._rebuilt(values, dict(enumerate(values)))

    @unexhausted("the tree")
    def _rebuilt(self, values: Sequence[Any], changes: Mapping[int, Any]) -> Any:
        if self._structure.copier is not None:
            return self._structure.copier.copy(self.root, changes)
        if self._treedef is not None:
            root = self._treedef.unflatten(values)
            restore_order(self.root, root)
            return root
        owners = {id(self.boxes.get(number, self.values[number])): value for number, value in changes.items()}
        return rebuild(self.root, iter(values), owners)

    def children(self, node: Any) -> list[tuple[Any, Any]] | None:
        """The entries of a container as (key, child), None for a leaf; the key of a box's content is `ELIDED`."""
        kind = find_kind(node)
        return None if kind is None else kind.entries(node)

    def in_place(self, number: int) -> None:
        """Raise `Unsupported` for leaves that can only be replaced: immutable arrays without a box, expanded ones."""
        if number in self.boxes:
            return
        value = self.values[number]
        if not backend(value).mutable(value):
            kind = "JAX array" if backend(value).__name__.endswith(".jax") else type(value).__name__  # type: ignore[attr-defined]
            why = "this array is read-only" if kind == "ndarray" else f"a {kind} never changes"
            raise Unsupported(f"{self.index.path(number)} cannot change in place: {why}", hint=_NEW_TREE)
        memory = backend(value).memory(value)
        if memory is not None and repeats(memory[1]):
            why = "it is expanded, so that some of its elements are one"
            raise Unsupported(f"{self.index.path(number)} cannot change in place: {why}", hint=_NEW_TREE)

    def apart(self, numbers: Collection[int]) -> dict[int, int]:
        """Check that leaves can change in place alone: `Unsupported` for one that shares memory with a leaf that is not
        among them, or a part of it with any. Those that are one array lead to the first of them, by number."""
        one: dict[int, int] = {}
        if all(number in self.boxes for number in numbers):
            return one
        memories = {n: memory for n in self.index.numbers if (memory := backend(self.values[n]).memory(self.values[n]))}
        written = {twin for number in numbers for twin in self.twins(number)}
        for pair in overlapping(memories):
            if self.ties.get(pair[0], pair[0]) == self.ties.get(pair[1], pair[1]):
                continue
            first, second = self.index.ordered(pair)
            whole = same(memories[first][1], memories[second][1]) and self.spec(first) == self.spec(second)
            if whole and {first, second} <= written:
                one[second] = one.get(first, first)
            elif first in written or second in written:
                paths = self.index.path(first), self.index.path(second)
                if whole:
                    raise Unsupported(
                        f"{paths[0]} and {paths[1]} are one array, and an edit in place changes both",
                        hint=f"select both: pm.at(tree, {list(paths)}); or {_NEW_TREE}",
                    )
                raise Unsupported(
                    f"{paths[0]} and {paths[1]} share memory, and an edit in place of one changes the other",
                    hint=_NEW_TREE,
                )
        return {number: first for number, first in one.items() if number in numbers}

    def assign(self, number: int, value: Any) -> None:
        """Put a value into a leaf in place. Call `in_place` first."""
        box = self.boxes.get(number)
        if box is None:
            backend(self.values[number]).assign(self.values[number], value)
        else:
            kind = find_kind(box)
            assert kind is not None
            assert kind.assign is not None
            kind.assign(box, value)


_NEW_TREE = "the verb without the underscore returns a new tree: params = pm.at(params, ...).zero()"


def _holds_modules(root: Any) -> bool:
    """Whether the root is a module or a small container of modules: these may refer to each other in a circle, in which
    JAX's walk would exhaust the stack of the interpreter."""
    kind = find_kind(root)
    if kind is None or not kind.compiled:
        return True
    if not imported("flax.nnx") or kind.name == "pytree":
        return False
    children = kind.open(root)[1]
    return len(children) <= 16 and not all((k := find_kind(child)) is None or k.compiled for child in children)


def _landmarks(node: Any) -> tuple[Any, ...]:
    """The keys on the way to the last leaf, and those beside them if they are few. JAX's hash of a structure ignores
    keys, and its equality ignores their order; a table must distinguish them."""
    keys: list[Any] = []
    while type(node) is dict and node:
        key = next(reversed(node))
        keys.append(tuple(node) if len(node) <= 32 else key)
        node = node[key]
    return tuple(keys)


def _holds_torch(values: Sequence[Any]) -> bool:
    return any(getattr(backend_of(kind), "__name__", "").endswith(".torch") for kind in set(map(type, values)))
