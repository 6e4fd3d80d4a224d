"""Numbers: what a graft carries besides arrays, such as the step of a train state.

To a selector a Python number is no leaf, for it may as well be a setting. To a graft it is a leaf without axes where
the other tree has an array in its place, and where it counts something.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paramend.errors import Unsupported
from paramend.grafting.report import pieces_of
from paramend.leaves.leaves import Index, Layered, Leaves, uncollected
from paramend.leaves.paths import Names, text_of
from paramend.leaves.specs import Spec
from paramend.trees.lookup import find_kind
from paramend.trees.tree import Tree
from paramend.trees.walks import Namer


class WithGuests:
    """The leaves of a tree, and some of another under the names they would have there."""

    def __init__(self, target: Leaves, guests: Mapping[int, tuple[str, ...]], source: Leaves) -> None:
        self.target, self.source = target, source
        self.first = max(target.index.numbers, default=-1) + 1
        self.ties = target.ties
        self.index = Index(target.index.separator)
        self.index.names = _copied(target.index.names)
        self.index.numbers = [*target.index.numbers, *map(self.guest, guests)]
        self.index.spans = list(target.index.spans)
        for number, name in guests.items():
            names = self.index.names
            for piece in name[:-1]:
                inner = next((child for label, child in names.items() if text_of(label) == piece), None)
                if type(inner) is not dict:
                    inner = {}
                    self.index.add(names, piece, inner)
                names = inner
            self.index.add(names, name[-1], self.guest(number))

    def guest(self, number: int) -> int:
        return self.first + number

    def spec(self, number: int) -> Spec:
        return self.target.spec(number) if number < self.first else self.source.spec(number - self.first)

    def nbytes(self, number: int) -> int:
        return self.target.nbytes(number) if number < self.first else self.source.nbytes(number - self.first)

    def refusal(self, number: int) -> str:
        return self.target.refusal(number) if number < self.first else self.source.refusal(number - self.first)

    def read(self, number: int) -> Any:
        return self.target.read(number) if number < self.first else self.source.read(number - self.first)

    def children(self, node: Any) -> list[tuple[Any, Any]] | None:
        return self.target.children(node)


def _copied(names: Names) -> Names:
    copied = {label: child if type(child) is int else _copied(child) for label, child in names.items()}
    return Layered(copied, names.layers) if isinstance(names, Layered) else copied


# The names of numbers that count: of two settings of other names, a graft leaves the target's as it is.
COUNTERS = frozenset(
    ("step", "global_step", "train_step", "current_step", "epoch", "current_epoch", "global_epoch", "iteration", "iter")
) | {"count", "counter", "num_updates", "num_batches_tracked", "samples_seen", "tokens_seen"}
_NUMBERS = (int, float)


class Counted(Tree):
    """A tree in memory in which Python numbers outside of modules are leaves too."""

    def __init__(self, root: Any) -> None:
        super().__init__(root)
        self._named = super().index
        self._holders: dict[int, tuple[Any, Any]] = {}
        self.counts: frozenset[int] = frozenset()  # the numbers of these leaves
        # Those that stand beside the state of an optimizer: whatever their names, they belong to the run.
        self.beside: frozenset[int] = frozenset()
        if any(type(value) in _NUMBERS for value in self.values):
            namer = _Namer(Index(self._named.separator))
            with uncollected():
                namer.name(root, None if self._treedef is None else self._treedef.unflatten(range(len(self.values))))
            self._named, self.counts, self.beside = namer.index, frozenset(namer.found), frozenset(namer.beside)
            self._holders = namer.found

    @property
    def index(self) -> Index:
        return self._named

    def spec(self, number: int) -> Spec:
        return _spec(self.values[number]) if number in self.counts else super().spec(number)

    def read(self, number: int) -> Any:
        value = self.values[number]
        return np.asarray(value, self.spec(number).dtype) if number in self.counts else value

    def bare(self, number: int) -> Any:
        return self.values[number]

    def in_place(self, number: int) -> None:
        """Raise for leaves that can only be replaced."""
        if number not in self.counts:
            super().in_place(number)
        elif number not in self.boxes and not isinstance(self._holders[number][0], dict | list):
            kind = type(self.values[number]).__name__
            why = f"{self.index.path(number)} cannot change in place: a Python {kind} never does, nor what holds it"
            raise Unsupported(why, hint="pm.graft returns a new tree: tree, report = pm.graft(target, source)")

    def assign(self, number: int, value: Any) -> None:
        if number not in self.counts or number in self.boxes:
            super().assign(number, _number(value) if number in self.counts else value)
        else:
            holder, key = self._holders[number]
            holder[key] = _number(value)

    def with_leaves(self, changes: Mapping[int, Any]) -> Any:
        """A new tree in which these leaves are replaced; numbers are numbers again."""
        return super().with_leaves({n: _number(v) if n in self.counts else v for n, v in changes.items()})

    def _rebuilt(self, values: Sequence[Any], changes: Mapping[int, Any]) -> Any:
        if self._structure.copier is None:  # `changes` are by identity there, and equal numbers are one object
            changes = {number: value for number, value in changes.items() if number not in self.counts}
        return super()._rebuilt(values, changes)


@dataclass
class _Level:
    """A container on the way: the numbers in it, and whether the state of an optimizer is below it."""

    node: Any
    numbers: list[int] = field(default_factory=list)
    holds_state: bool = False


class _Namer(Namer):
    """Names numbers too, except those within modules, which are settings."""

    def __init__(self, index: Index) -> None:
        super().__init__(index)
        # The leaf numbers of the numbers, with the container that holds each, and its key there.
        self.found: dict[int, tuple[Any, Any]] = {}
        self.beside: list[int] = []  # those of numbers in containers that also hold the state of an optimizer
        self._modules = 0
        self._levels = [_Level(None)]

    def enter(self, node: Any, *rest: Any, **more: Any) -> Any:
        """The names of the node."""
        kind = find_kind(node)
        inside = kind is not None and kind.replace is not None
        self._modules += inside
        self._levels.append(_Level(node))
        try:
            return super().enter(node, *rest, **more)
        finally:
            self._modules -= inside
            level = self._levels.pop()
            if level.holds_state:
                self.beside += level.numbers
            if self._levels and (level.holds_state or is_state(type(node))):
                self._levels[-1].holds_state = True

    def leaf(self, node: Any, twin: Any, container: int, key: Any) -> int | None:
        """The number of a leaf that has a name."""
        number = super().leaf(node, twin, container, key)
        if number is None and type(node) in _NUMBERS and not self._modules:
            number = self.numbers[-1]
            self.found[number] = self._levels[-1].node, key
            self._levels[-1].numbers.append(number)
            self.index.numbers.append(number)
        return number


class _FromFile(WithGuests):
    """The leaves of a checkpoint, and numbers that its file holds besides them."""

    def __init__(self, checkpoint: Any, names: Mapping[int, tuple[str, ...]], numbers: Counted) -> None:
        super().__init__(checkpoint, names, numbers)
        self._checkpoint, self._numbers = checkpoint, numbers
        self.counts = frozenset(map(self.guest, names))  # the leaf numbers of the numbers

    def __getattr__(self, name: str) -> Any:
        if name == "target":
            raise AttributeError(name)
        return getattr(self.target, name)  # what else a checkpoint has

    def fetch(self, number: int) -> Any:
        return self.read(number) if number in self.counts else self._checkpoint.fetch(number)

    def bare(self, number: int) -> Any:
        return self._numbers.bare(number - self.first) if number in self.counts else self.target.read(number)


def counts(leaves: Leaves) -> frozenset[int]:
    """The leaf numbers of Python numbers."""
    found: frozenset[int] = getattr(leaves, "counts", frozenset())
    return found


def beside_state(leaves: Leaves, number: int) -> bool:
    """Whether a Python number stands beside the state of an optimizer."""
    return bool(number in getattr(leaves, "beside", ()))


def is_state(kind: type) -> bool:
    """Whether containers of this type belong to a state of optax."""
    return issubclass(kind, tuple) and kind.__module__.startswith("optax.")


def with_numbers(source: Any, target: Leaves) -> Any:
    """A checkpoint with the numbers in its file for which a tree in memory may have a place."""
    wanted = {target.index.pieces(n)[-1] for n in target.index.numbers if target.spec(n).shape == ()}
    names = {pieces_of(path): value for path, value in source.metadata.items() if type(value) in _NUMBERS}
    names = {path: value for path, value in names.items() if path[-1:] and path[-1] in wanted}
    if not names:
        return source
    numbers = Counted(list(names.values()))
    return _FromFile(source, dict(zip(numbers.index.numbers, names, strict=True)), numbers)


def left_in_file(target: Any, source: Any) -> dict[str, Any]:
    """The counters in the file of a target that the source has too, by path: a file keeps them as they are."""
    if isinstance(source, Tree):
        theirs = {source.index.pieces(number) for number in counts(source)}
    else:
        theirs = {pieces_of(path) for path, value in source.metadata.items() if type(value) in _NUMBERS}
    ours = {path: value for path, value in target.metadata.items() if type(value) in _NUMBERS}
    return {path: value for path, value in ours.items() if (at := pieces_of(path)) in theirs and at[-1] in COUNTERS}


def _spec(value: float) -> Spec:
    """What an array of a number would be, as JAX has it if it fits."""
    if type(value) is float:
        return Spec((), "float64")
    return Spec((), "int32" if -(2**31) <= value < 2**31 else "int64")


def _number(value: Any) -> Any:
    """An array without axes as a Python number; a traced one as it is."""
    try:
        return value.item() if isinstance(value, np.ndarray | np.generic) else value
    except ValueError:
        return value
