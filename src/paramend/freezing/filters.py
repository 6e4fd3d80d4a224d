"""Selectors as filters of Flax NNX, which are functions of one path and one value.

NNX shows a filter one leaf at a time, and a selector needs them all: "the last layer" is the last of those that are
there, and "nothing matched" is known only at the end. But whoever sorts leaves by filters holds them all, and calls the
filter: so the leaves are found in the callers, under the name that NNX gives them. Where they are not found, as under
`nnx.grad`, a selector is asked about the leaf alone, if it can be.
"""

import sys
from typing import Any

from paramend.arrays.registry import backend, backend_of
from paramend.errors import BadArgument
from paramend.leaves.leaves import Index, entries
from paramend.leaves.specs import Spec
from paramend.selectors.grammar import Piece, Positions
from paramend.selectors.matching import Names
from paramend.selectors.patterns import Pattern
from paramend.selectors.selector import Both, Predicate, Regex, Rest, Selector, Text, Union, Where, resolve

Path = tuple[Any, ...]

# How far up NNX's own `All`, `Any` and `Not` may put the caller that sorts.
_DEPTH = 12
# What a selector chose of the paths sorted last, as NNX asks once for every leaf. Paths are kept, not leaves.
_chosen: dict[Selector, tuple[Any, frozenset[Path]]] = {}


def accepts(selector: Selector, path: Path, value: Any) -> bool:
    """Whether a selector, called by NNX, chooses a leaf.

    Raises:
        NoMatch: it chooses nothing of what is being sorted.
        BadArgument: it holds an index such as `[-1]` or a class, and the other leaves are not known.
    """
    flat = _being_sorted()
    if flat is None:
        return _alone(selector, path, _content(value))
    known = _chosen.get(selector)
    if known is None or known[0] is not flat.paths:
        leaves = _Sorted(flat)
        numbers = resolve(selector, leaves)
        _chosen.clear()
        known = _chosen[selector] = (flat.paths, frozenset(leaves.keys[number] for number in numbers))
    return path in known[1]


def _being_sorted() -> Any:
    frame: Any = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None:
            return None
        if "flat_state" in frame.f_locals and frame.f_globals.get("__name__", "").startswith("flax.nnx"):
            return frame.f_locals["flat_state"]
        frame = frame.f_back
    return None


class _Sorted:
    """The leaves that NNX is sorting, as `Leaves`."""

    def __init__(self, flat: Any) -> None:
        pairs = [(path, _content(value)) for path, value in flat]
        pairs = [(path, value) for path, value in pairs if backend_of(type(value)) is not None]
        self.keys = [path for path, _ in pairs]
        self.values = [value for _, value in pairs]
        self.index = Index()
        self.ties: dict[int, int] = {}
        inner: dict[Path, Names] = {(): self.index.names}
        for number, path in enumerate(self.keys):
            for size in range(1, len(path)):
                if path[:size] not in inner:
                    inner[path[:size]] = {}
                    self.index.add(inner[path[: size - 1]], path[size - 1], inner[path[:size]])
            self.index.add(inner[path[:-1]], path[-1], number)
            self.index.numbers.append(number)

    def spec(self, number: int) -> Spec:
        return backend(self.values[number]).spec(self.values[number])

    def read(self, number: int) -> Any:
        return self.values[number]

    def children(self, node: Any) -> list[tuple[Any, Any]] | None:
        return entries(node)


def _content(value: Any) -> Any:
    return value.get_raw_value() if hasattr(value, "get_raw_value") else value


def _alone(selector: Selector, path: tuple[Any, ...], value: Any) -> bool:
    library = backend_of(type(value))
    if library is None:
        return False
    match selector:
        case Union(parts=parts):
            return any(_alone(part, path, value) for part in parts)
        case Both(left=left, right=right):
            return _alone(left, path, value) and _alone(right, path, value)
        case Rest(part=part):
            return not _alone(part, path, value)
        case Where(part=part):
            return selector.fits(library.spec(value)) and _alone(part, path, value)
    index = Index()
    entry: Any = 0
    for key in reversed(path):
        names: Names = {}
        index.add(names, key, entry)
        entry = names
    index.names, index.numbers = entry, [0]
    match selector:
        case Text(pattern=pattern) if not _counts(pattern):
            return bool(pattern.find(index.names))
        case Regex(expression=expression):
            return expression.fullmatch(index.path(0)) is not None
        case Predicate(function=function):
            return bool(function(index.path(0), library.spec(value)))
    raise BadArgument(
        f"{selector!r} cannot be told from one leaf: it needs the whole model",
        hint=f"pm.nnx_filter(model, {selector!r})",
    )


def _counts(pattern: Pattern) -> bool:
    atoms = (atom for segment in pattern.segments if isinstance(segment, Piece) for atom in segment.atoms)
    return any(isinstance(atom, Positions) for atom in atoms)
