"""Leaves that moved: the same bytes under another name."""

from collections.abc import Sequence
from itertools import product

from paramend.evidence.comparisons import Comparer, Pair
from paramend.evidence.streams import Desk, hindrance, stream_of
from paramend.leaves.leaves import Leaves
from paramend.leaves.paths import common
from paramend.leaves.specs import Spec

_SAMPLE = 1 << 10  # elements
# With more candidates than this, names are not compared: leaves are paired in order.
_MANY = 250_000

Side = tuple[Leaves, int]


def moves(old: Leaves, gone: Sequence[int], new: Leaves, come: Sequence[int], comparer: Comparer) -> dict[int, int]:
    """The removed leaves that were added again with the same spec and bytes, as old number → new number. Where several
    hold the same bytes, as zero biases do, those whose names have most in common are paired."""
    groups: dict[tuple[Spec, bytes], list[Side]] = {}
    specs = {old.spec(number) for number in gone} & {new.spec(number) for number in come}
    for leaves, numbers in ((old, gone), (new, come)):
        for number in numbers:
            spec = leaves.spec(number)
            if spec in specs and spec.size and not hindrance(leaves, number):
                groups.setdefault((spec, _sample(leaves, number)), []).append((leaves, number))
    found: dict[int, int] = {}
    waiting = [group for group in groups.values() if _both(group, old, new)]
    while waiting:
        # In each round the first leaf of every group is compared with the others; those that agree form a class.
        pairs = [(place, side) for place, group in enumerate(waiting) for side in group[1:]]
        agree = comparer.equal([Pair(*waiting[place][0], *side) for place, side in pairs])
        classes = [[group[0]] for group in waiting]
        rest: list[list[Side]] = [[] for _ in waiting]
        for (place, side), same in zip(pairs, agree, strict=True):
            (classes if same else rest)[place].append(side)
        for members in classes:
            sides = [[number for leaves, number in members if leaves is tree] for tree in (old, new)]
            found |= _paired(old, sides[0], new, sides[1])
        waiting = [group for group in rest if _both(group, old, new)]
    return found


def _both(group: Sequence[Side], old: Leaves, new: Leaves) -> bool:
    sides = [leaves for leaves, _ in group]
    return any(side is old for side in sides) and any(side is new for side in sides)


def _sample(leaves: Leaves, number: int) -> bytes:
    """Some of the bytes of a leaf: leaves that differ here need not be compared."""
    stream = stream_of(leaves, number)
    places = (0,) if stream.source is not None else (0, stream.size // 2, max(stream.size - _SAMPLE, 0))
    with Desk() as desk:
        pieces = [stream.piece(desk, 0, at, min(at + _SAMPLE, stream.size)).tobytes() for at in places]
    return b"".join(pieces)


def _paired(old: Leaves, gone: list[int], new: Leaves, come: list[int]) -> dict[int, int]:
    if len(gone) * len(come) > _MANY:
        return dict(zip(gone, come, strict=False))
    found: dict[int, int] = {}
    taken: set[int] = set()
    names = {(id(tree), n): tree.index.pieces(n) for tree, numbers in ((old, gone), (new, come)) for n in numbers}
    scores = {(a, b): _likeness(names[id(old), a], names[id(new), b]) for a, b in product(gone, come)}
    for a, b in sorted(scores, key=lambda pair: scores[pair], reverse=True):
        if a not in found and b not in taken:
            found[a] = b
            taken.add(b)
    return found


def _likeness(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[int, int]:
    """How many pieces two names have in common at the end, and in total.

    >>> _likeness(("h", "0", "ln", "w"), ("layers", "0", "ln", "w")), _likeness(("a", "w"), ("w", "b"))
    ((3, 3), (0, 1))
    """
    return len(common([one[::-1], other[::-1]])), len(set(one) & set(other))
