"""Pairs of leaves of two trees: matched by name, piece by piece; tied leaves by any of their names."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from paramend.leaves.leaves import Leaves

Name = tuple[tuple[str, ...], int]


@dataclass(frozen=True, slots=True)
class Match:
    """A leaf on either side, or on both."""

    a: int | None  # its first number in the old tree; None if it was added
    b: int | None  # its first number in the new tree; None if it was removed
    path: str  # its path in the new tree; for a removed leaf, in the old one
    also: tuple[str, ...] = ()  # its other paths


def matches(old: Leaves, new: Leaves) -> list[Match]:
    """The leaves of two trees paired by name, in the order of the old tree; added leaves come last. `fc.weight` in a
    state dict is fc → weight in a module. A leaf with several paths is looked for under all of them."""
    before, after = named(old), named(new)
    kept = {_one(old, number) for name, number in before.items() if name in after}
    known = {_one(new, number) for name, number in after.items() if name in before}
    paths: dict[tuple[Any, Any], list[str]] = {}
    for name, number in before.items():
        one = _one(old, number)
        if name in after:
            paths.setdefault((one, _one(new, after[name])), []).append(new.index.path(after[name]))
        elif one not in kept:
            paths.setdefault((one, None), []).append(old.index.path(number))
    for name, number in after.items():
        if name not in before and _one(new, number) not in known:
            paths.setdefault((None, _one(new, number)), []).append(new.index.path(number))
    return [Match(a, b, first, tuple(also)) for (a, b), (first, *also) in paths.items()]


def _one(leaves: Leaves, number: int) -> int:
    return leaves.ties.get(number, number)


def named(leaves: Leaves) -> dict[Name, int]:
    """Leaf numbers by their pieces, and by a serial number among leaves with the same pieces."""
    seen: Counter[tuple[str, ...]] = Counter()
    found: dict[Name, int] = {}
    for number in leaves.index.numbers:
        pieces = leaves.index.pieces(number)
        found[pieces, seen[pieces]] = number
        seen[pieces] += 1
    return found
