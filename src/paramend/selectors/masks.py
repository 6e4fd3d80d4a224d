"""Masks: trees of bools, of the same structure as a tree or a prefix of it, as its leaves at which they are true."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from paramend.arrays.registry import backend_of
from paramend.errors import BadArgument
from paramend.leaves.leaves import Leaves
from paramend.leaves.paths import labels, text_of, write_path
from paramend.reports import wording
from paramend.trees.kind import ELIDED


def masked(tree: Any, leaves: Leaves) -> set[int]:
    """The numbers of the leaves at which a tree of bools is true; `BadArgument` if it does not fit them."""
    flags = dict(_flags(tree, leaves))
    found: set[int] = set()
    used: set[tuple[str, ...]] = set()
    places = {number: _place(leaves.index.pieces(number), flags) for number in leaves.index.numbers}
    # A State of NNX has a shared Variable once.
    reached = {leaves.ties.get(number, number) for number, place in places.items() if place is not None}
    for number, place in places.items():
        if place is None and leaves.ties.get(number, number) in reached:
            continue
        if place is None:
            raise BadArgument(
                f"the tree of bools has nothing at {leaves.index.path(number)}",
                hint='pm.at(tree, "**").mask() has the right structure',
            )
        used.add(place)
        if flags[place]:
            found.add(number)
    extra = [path for path in flags if path not in used and flags[path]]
    if extra:
        raise BadArgument(f"the tree of bools has {write_path(extra[0])}, which is not a leaf of this tree")
    return found


def _place(path: tuple[str, ...], flags: Mapping[tuple[str, ...], bool]) -> tuple[str, ...] | None:
    return next((path[:i] for i in range(len(path), -1, -1) if path[:i] in flags), None)


def _flags(tree: Any, leaves: Leaves) -> Iterator[tuple[tuple[str, ...], bool]]:
    rest: list[tuple[Any, tuple[str, ...], tuple[int, ...]]] = [(tree, (), ())]
    while rest:
        node, path, above = rest.pop()
        if isinstance(node, bool | np.bool_):
            yield path, bool(node)
            continue
        if id(node) in above:  # modules may refer to each other in a cycle
            continue
        children = leaves.children(node)
        if children is None:
            where, array = write_path(path) or "its root", backend_of(type(node)) is not None
            bools = "the tree comes first, then the selector; of arrays of bools, say which leaves: .any()"
            raise BadArgument(
                f"a tree of bools holds bools, and this one has {_described(node)} at {where}",
                hint=bools if array else "",
            )
        for key, child in reversed(children):
            below = path if key is ELIDED else (*path, *map(text_of, labels(key)))
            rest.append((child, below, (*above, id(node))))


def _described(node: Any) -> str:
    """A value in a message, without its elements if it is an array."""
    library = backend_of(type(node))
    if library is not None:
        return f"an array, {library.spec(node)},"
    return repr(node) if isinstance(node, str | int | float | complex | None) else wording.described(node)
