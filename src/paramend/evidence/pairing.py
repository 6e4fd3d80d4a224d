"""Pairs of leaves of two trees: matched by name, piece by piece; tied leaves by any of their names."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from paramend.errors import BadArgument, NoMatch, ParamendError
from paramend.leaves.leaves import Leaves
from paramend.selectors.messages import count_of
from paramend.selectors.selector import Both, Rest, Selector, SelectorLike, Union, Where, resolve, sel

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


def chosen(selector: SelectorLike, old: Leaves, new: Leaves) -> tuple[set[int], set[int]]:
    """The leaves that a selector finds on either side, by their first numbers."""
    missing: tuple[list[ParamendError | None], list[ParamendError | None]] = ([], [])
    first, second = (_found(sel(selector), leaves, errors) for leaves, errors in zip((old, new), missing, strict=True))
    for one, other in zip(*missing, strict=True):
        if one is not None and other is not None:
            raise one
    if not first and not second:
        raise NoMatch(f"{selector!r} matches none of {count_of(old.index)}, nor of {count_of(new.index)}")
    return first, second


def _found(selector: Selector, leaves: Leaves, errors: list[ParamendError | None]) -> set[int]:
    """The leaves found in one tree. Each part without others adds to `errors` why it finds nothing, or None."""
    match selector:
        case Union():
            return set().union(*(_found(part, leaves, errors) for part in selector.parts))
        case Both():
            return _found(selector.left, leaves, errors) & _found(selector.right, leaves, errors)
        case Rest():
            every = {leaves.ties.get(number, number) for number in leaves.index.numbers}
            return every - _found(selector.part, leaves, errors)
        case Where():
            return {n for n in _found(selector.part, leaves, errors) if selector.fits(leaves.spec(n))}
    try:
        numbers, error = resolve(selector, leaves), None
    except (NoMatch, BadArgument) as caught:  # a tree of bools may fit only one side
        numbers, error = (), caught
    errors.append(error)
    return {leaves.ties.get(number, number) for number in numbers}
