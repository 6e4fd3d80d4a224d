"""Refusals for quantised weights: edits that would take codes for values, and changes that would part a group."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import groupby

from paramend.edits.call import Call
from paramend.errors import Quantized
from paramend.leaves.groups import Group, groups_of, may_hold_groups
from paramend.leaves.leaves import Editable, Index, Leaves, plain
from paramend.leaves.paths import labels, text_of, write_path, write_piece
from paramend.leaves.specs import Spec
from paramend.reports import wording
from paramend.reports.tables import aligned

# The new paths of leaves, from `structure.moves`.
Moved = Mapping[int, Sequence[tuple[str, int | None]]]

# How an edit of a tree in memory takes leaves as they are stored.
RAW = "pm.at(tree, selector, raw=True)"


def check_calls(leaves: Editable, calls: Mapping[int, Call]) -> None:
    """Raise `Quantized` for calls that compute or put values in a quantised weight."""
    if leaves.raw or not may_hold_groups(leaves):
        return
    taken = {number: call for number, call in calls.items() if call.coding is None}
    for said, numbers in groupby(taken, key=lambda number: str(taken[number])):
        check_values(leaves, numbers, f"cannot take {said}")


def check_values(leaves: Leaves, numbers: Iterable[int], said: str, *ways: str) -> None:
    """Raise `Quantized` for what computes or puts values, if it meets a quantised weight; nothing is read before. What
    is refused is said as a predicate of the leaf, before ways out for the hint."""
    if getattr(leaves, "raw", False) or not may_hold_groups(leaves):
        return
    chosen = list(numbers)
    found = groups_of(leaves, _with_twins(leaves, chosen))
    if not found:
        return
    inside = set(_with_twins(leaves, [number for group in found for number in group.numbers]))
    first = next(number for number in chosen if number in inside)
    group = next(group for group in found if not set(_with_twins(leaves, [first])).isdisjoint(group.numbers))
    part = next((each.says.partition(",")[0] for number, each in group.companions.items() if number == first), "")
    raise refusal(
        leaves,
        [group, *(each for each in found if each is not group)],
        f"{leaves.index.path(first)} {said}: it {f'is {part}' if part else 'holds the codes'} of a quantised weight "
        f"({group.scheme.name})",
        hints=[*_rest(leaves, chosen, inside), *ways, *as_stored(leaves, not ways)],
    )


def _with_twins(leaves: Leaves, numbers: Sequence[int]) -> list[int]:
    """The numbers, and those of all other paths of the same leaves."""
    ones = {leaves.ties[number] for number in numbers if number in leaves.ties}
    return [*numbers, *(twin for twin, one in leaves.ties.items() if one in ones)]


def check_whole(leaves: Editable, numbers: Iterable[int], did: str = "be deleted") -> None:
    """Raise `Quantized` if a part of a quantised weight would go and another stay."""
    if leaves.raw or not may_hold_groups(leaves):
        return
    gone = set(numbers)
    parted = [group for group in groups_of(leaves, gone) if not gone.issuperset(group.numbers)]
    if parted:
        left = [number for number in parted[0].numbers if number not in gone]
        way = [f"delete all of it: {_all_of(leaves, parted[0])}"] if did == "be deleted" else []
        raise refusal(
            leaves,
            parted,
            f"a part of a quantised weight ({parted[0].scheme.name}) would {did}, and "
            f"{wording.listing([leaves.index.path(number) for number in left])} would stay",
            hints=[*way, *as_stored(leaves)],
        )


def check_renamed(leaves: Editable, moves: Callable[[], Moved]) -> None:
    """Raise `Quantized` for moves that part a quantised weight; they are asked for only if there may be one."""
    if leaves.raw or not may_hold_groups(leaves):
        return
    moved = moves()
    touched = groups_of(leaves, moved)
    after = _Renamed(leaves, [number for group in touched for number in group.numbers], moved)
    now = {place: group for group in groups_of(after) for place in group.numbers}
    parted = [group for group in touched if not after.keeps(group, now)]
    if parted:
        to = wording.listing([after.index.path(after.places[number]) for number in parted[0].numbers])
        raise refusal(
            leaves,
            parted,
            f"a rename would part a quantised weight ({parted[0].scheme.name}): its leaves would be {to}",
            hints=[f"rename all of it, to names of its scheme: {_all_of(leaves, parted[0])}", *as_stored(leaves)],
        )


class _Renamed:
    """Leaves of groups under the names that they would have: names and specs, nothing to read."""

    def __init__(self, leaves: Leaves, numbers: Sequence[int], moved: Moved) -> None:
        self.quantization = getattr(leaves, "quantization", None)
        self.places = {number: place for place, number in enumerate(numbers)}
        self._specs = [leaves.spec(number) for number in numbers]
        paths = [
            tuple(label for key, _ in moved[number] for label in labels(key))
            if number in moved
            else leaves.index.paths[number]
            for number in numbers
        ]
        separator = leaves.index.separator
        self.index = Index.of_names([plain(path, separator) for path in paths], separator)

    def spec(self, place: int) -> Spec:
        return self._specs[place]

    def keeps(self, group: Group, now: Mapping[int, Group]) -> bool:
        """Whether the leaves of a group are still one, each in its role."""
        new = now.get(self.places[group.numbers[0]])
        if new is None or len(new.numbers) != len(group.numbers):
            return False
        places = [(self.places[number], group.role(number)) for number in group.numbers]
        return all(place in new.numbers and new.role(place) == role for place, role in places)


def refusal(leaves: Leaves, groups: Sequence[Group], message: str, hints: Sequence[str]) -> Quantized:
    """The error that names a quantised weight, the first of those that were met, and all its leaves."""
    group = groups[0]
    rows: list[tuple[str, ...]] = [("scheme", group.scheme.name, group.scheme.says)]
    for number in group.numbers:
        of = "payload" if number == group.payload else "companion"
        says = "" if number == group.payload else group.companions[number].says
        rows.append((of, leaves.index.path(number), str(leaves.spec(number)), says))
    rows += [("not here", role) for role in group.missing]
    paths = leaves.index.path
    said = "\n".join(f"    {line}" for line in aligned(rows))
    others = [paths(each.numbers[0]) for each in groups[1:]]
    if others:
        said += f"\n\nso {'is' if len(others) == 1 else 'are'} {wording.listing(others, 4)}"
    return Quantized(
        f"{message}\n\n{said}",
        scheme=group.scheme.name,
        payload="" if group.payload is None else paths(group.payload),
        companions=tuple(map(paths, group.companions)),
        hint="\n      ".join(hints),
    )


def as_stored(leaves: Leaves, always: bool = True) -> list[str]:
    """The way to take leaves as they are stored: of a checkpoint, and of a tree in memory if `always`."""
    path = str(getattr(leaves, "path", ""))
    opened = f"pm.open({path!r}, raw=True), or --raw on the command line," if path else RAW
    return [f"{opened} takes leaves as they are stored"] if path or always else []


def _rest(leaves: Leaves, chosen: Sequence[int], inside: Set[int]) -> list[str]:
    """The selection of the other leaves, if a dtype tells them from those of groups."""
    met = {leaves.spec(number).dtype for number in chosen if number in inside}
    rest = {leaves.spec(number).dtype for number in chosen if number not in inside}
    if len(rest) != 1 or rest & met:
        return []
    return [f'pm.sel(selector).where(dtype="{rest.pop()}") leaves quantised weights out']


def _all_of(leaves: Leaves, group: Group) -> str:
    separator = leaves.index.separator
    paths = [leaves.index.paths[number] for number in group.numbers]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    names = list(dict.fromkeys(write_piece(text_of(path[shared])) for path in paths))
    below = f"{separator}**" if any(len(path) > shared + 1 for path in paths) else ""
    above = write_path(paths[0][:shared], separator)
    one = names[0] if len(names) == 1 else f"{{{','.join(names)}}}"
    return f'"{above}{separator if above else ""}{one}{below}"'
