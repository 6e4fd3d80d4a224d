"""Moments: the leaves of an optimizer's state that belong to parameters, found by how optax builds states.

A state is a tree of records, the named tuples of optax. A field of a record is another state, a number such as a count,
or a tree like the parameters; so the path of a leaf of such a tree ends in the path of its parameter.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from paramend.grafting.report import Path, without
from paramend.grafting.states.carry_optax import Leaf, split, without_wrappers
from paramend.leaves.paths import labels, text_of
from paramend.trees.kind import ELIDED
from paramend.trees.lookup import find_kind
from paramend.trees.tree import Tree

# Fields with trees that hold no moments: what the user set, and what a wrapper counts.
OWN = "hyperparams"
_NO_MOMENTS = frozenset({OWN, "skip_state"})


def is_record(kind: type) -> bool:
    """Whether containers of this type are records of a state."""
    if not (issubclass(kind, tuple) and hasattr(kind, "_fields")) or kind.__name__ == "MaskedNode":
        return False
    return kind.__module__.startswith("optax.") or kind.__name__.endswith("State")


@dataclass
class Survey:
    """Where a tree holds optimizer states."""

    tree: Tree
    outside: list[Path] = field(default_factory=list)  # the paths of the leaves outside optimizer states
    # Path of a field of a record → the paths of the leaves in it.
    fields: dict[Path, list[Path]] = field(default_factory=dict)
    absent: set[Path] = field(default_factory=set)  # the paths of masked parameters
    roots: list[Path] = field(default_factory=list)  # the paths of the outermost records

    @classmethod
    def of(cls, tree: Tree) -> "Survey":
        survey = cls(tree)
        survey._visit(tree.root, (), False, set())
        return survey

    def _visit(self, node: Any, path: Path, inside: bool, above: set[int]) -> None:
        kind = find_kind(node)
        if kind is None:
            return self._enter(path, [path], inside)
        if id(node) in above:
            return None
        found = is_record(type(node))
        if found and not inside:
            self.roots.append(path)
        inside = inside or found
        above = {*above, id(node)}
        below: dict[Path, Any] = {}
        for key, child in kind.entries(node):
            below[path if key is ELIDED else (*path, *map(text_of, labels(key)))] = child
        if not found and not any(_leads_to_record(child, above) for child in below.values()):
            return self._enter(path, list(_paths(node, path, self.absent, len(path), above - {id(node)})), inside)
        for here, child in below.items():
            self._visit(child, here, inside, above)
        return None

    def _enter(self, path: Path, leaves: list[Path], inside: bool) -> None:
        if inside:
            self.fields[path] = leaves
        else:
            self.outside += leaves

    def is_state(self, path: Path) -> bool:
        """Whether a path leads into one of the states or into the container of a chain."""
        return any(path[: len(root)] == root for root in self._chains)

    @cached_property
    def _chains(self) -> set[Path]:
        chains = set()
        for root in self.roots:
            while root and root[-1].isdigit():  # a place in a chain
                root = root[:-1]
            chains.add(root)
        return chains

    @property
    def parameters(self) -> dict[Path, list[Path]]:
        """Path of a parameter in the state → the paths of its moments, in the order of the state."""
        found: dict[Path, list[Path]] = {}
        for head, leaves in self.fields.items():
            for path in leaves if head[-1] not in _NO_MOMENTS else ():
                if path != head:
                    found.setdefault(path[len(head) :], []).append(path)
        return found

    def states(self, known: set[Path]) -> "States":
        """The states, for parameters known by these paths."""
        records: dict[Path, list[Path]] = {}
        for head in self.fields:
            records.setdefault(head[:-1], []).append(head)
        numbers = numbers_of(self.tree)
        found = States()
        for record, heads in records.items():
            moments = [head for head in heads if head[-1] not in _NO_MOMENTS]
            rests = [path[len(head) :] for head in moments for path in self.fields[head] if path != head]
            prefix = prefix_of(known, rests, near=record) or ()
            for head in heads:
                for path in self.fields[head]:
                    rest = path[len(head) :] if head in moments else ()
                    if path in numbers:
                        param = (*prefix, *rest) if rest else ()
                        if param and param not in known:
                            found.unknown.append(path)
                        found.add(path, head if rest else path, param, numbers[path], self.tree)
        return found


@dataclass
class States:
    """The leaves of optimizer states."""

    # The leaves, each with the path by which its parameter is known as `param`.
    leaves: list[Leaf] = field(default_factory=list)
    unknown: list[Path] = field(default_factory=list)  # the paths of moments of unknown parameters
    # Path of a leaf → the path of its field, or of the leaf itself if it is a number.
    heads: dict[Path, Path] = field(default_factory=dict)
    rests: dict[Path, Path] = field(default_factory=dict)  # path of a parameter → its path in the trees of moments
    _moments: dict[Path, set[str]] = field(default_factory=dict)

    def add(self, path: Path, head: Path, param: Path, number: int, tree: Tree) -> None:
        """Enter a leaf; `head` is the path of its field."""
        bare = without_wrappers(head)
        self.leaves.append(Leaf(path, bare[:-1], bare[-1:], param, tree.values[number], number))
        self.heads[path] = head
        if param:
            self.rests.setdefault(param, path[len(head) :])
            self._moments.setdefault(head[:-1], set()).add(head[-1])

    def add_numbers(self, tree: Tree, paths: Iterable[Path]) -> None:
        """Enter numbers from outside the states; skip arrays with axes."""
        numbers = numbers_of(tree)
        for path in paths:
            number = numbers.get(path)
            if number is not None and getattr(tree.values[number], "shape", ()) == ():
                self.add(path, path, (), number, tree)

    def kind(self, leaf: Leaf) -> frozenset[str]:
        return frozenset(self._moments.get(self.heads[leaf.path][:-1], ()))

    @property
    def kinds(self) -> dict[frozenset[str], None]:
        return {frozenset(fields): None for fields in self._moments.values()}

    @classmethod
    def of_file(cls, tree: Tree, known: set[Path], like: Survey) -> "States":
        """The states in a tree of dicts and lists, which has no records: they are where another tree has some."""
        numbers = {path: n for path, n in numbers_of(tree).items() if like.is_state(path)}
        prefix = _prefix_by_suffix(known, max(numbers, key=len, default=()))
        inner, found = without(known, prefix), cls()
        for path, number in numbers.items():
            head, param = split(path, inner)
            found.add(path, head, (*prefix, *param) if param else (), number, tree)
        return found


def numbers_of(tree: Tree) -> dict[Path, int]:
    """Path → number of every leaf of a tree; a shared leaf has one of its paths."""
    return {tree.index.pieces(number): number for number in tree.index.numbers}


def _leads_to_record(node: Any, above: set[int]) -> bool:
    kind = find_kind(node)
    if kind is None or id(node) in above:
        return False
    if is_record(type(node)):
        return True
    above = {*above, id(node)}
    return any(_leads_to_record(child, above) for child in kind.open(node)[1])


def _paths(node: Any, path: Path, absent: set[Path], depth: int, above: set[int]) -> Iterable[Path]:
    """The paths of the leaves of a node; those of masked parameters, from `depth` on, go into `absent`."""
    kind = find_kind(node)
    if kind is None:
        yield path
    elif type(node).__name__ == "MaskedNode":
        absent.add(path[depth:])
    elif id(node) not in above:
        for key, child in kind.entries(node):
            here = path if key is ELIDED else (*path, *map(text_of, labels(key)))
            yield from _paths(child, here, absent, depth, {*above, id(node)})


def prefix_of(known: set[Path], paths: Iterable[Path], near: Path = ()) -> Path | None:
    """The prefix below which most of these paths are known; of several, the one with most in common with `near`."""
    wanted = sorted(paths, key=len)[-64:]
    for rest in reversed(wanted):
        found: dict[Path, tuple[int, int]] = {}
        for path in known if rest else ():
            if path[-len(rest) :] == rest:
                prefix = path[: len(path) - len(rest)]
                below = without(known, prefix) if prefix else known
                common = next((i for i, (a, b) in enumerate(zip(prefix, near, strict=False)) if a != b), len(prefix))
                found[prefix] = (sum(other in below for other in wanted), common)
        if found:
            return max(sorted(found), key=found.__getitem__)
    return None


def _prefix_by_suffix(known: set[Path], path: Path) -> Path:
    """The prefix of the known path that shares the longest end with a path."""
    for start in range(1, len(path)):
        rest = path[start:]
        found = sorted(other[: len(other) - len(rest)] for other in known if other[-len(rest) :] == rest)
        if found:
            return found[0]
    return ()
