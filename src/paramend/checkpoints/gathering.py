"""Gathering: the plan of a checkpoint whose leaves come from anywhere, with the edits that each brings along."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from paramend.anatomy.documents import Document
from paramend.edits.plan import Plan, Row
from paramend.errors import RenameClash
from paramend.formats.gathered import Gathered, leaf_of
from paramend.leaves.leaves import Group, plain, tied
from paramend.leaves.origins.origin import Origin
from paramend.leaves.paths import Label, labels
from paramend.piecewise.rows import expression
from paramend.reports import wording

# A leaf of the result: its path, its origin, and the row with the edits that come on top; None if there are none.
Leaf = tuple[Sequence[Label], Origin, Row | None]


def gathered(base: Any, leaves: Sequence[Leaf], *, texts: tuple[Document, ...] = (), ties: Mapping[int, int]) -> Plan:
    """The plan of a checkpoint of leaves from anywhere.

    Args:
        base: the source that gives format, metadata and sidecars.
        texts: the files beside the weights that change.
        ties: place among the leaves → the first place of the same leaf, for leaves with several paths.
    """
    under = base.base if isinstance(base, Gathered) else base
    source = Gathered(under, ((path, origin) for path, origin, _ in leaves), ties=ties)
    made = replace(Plan.of(source), texts=texts)
    if not any(row is not None and row.calls for _, _, row in leaves):
        return made
    rows = (
        mine if row is None else replace(mine, spec=row.spec, calls=row.calls, places=row.places)
        for mine, (_, _, row) in zip(made.rows, leaves, strict=True)
    )
    return replace(made, rows=tuple(rows))


def ties_of(ties: Mapping[int, int], places: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """The ties of a result: leaves that were tied stay tied if each path is taken once."""
    return tied({there[0]: ties[number] for number, there in places.items() if number in ties and len(there) == 1})


def labels_of(path: Sequence[tuple[str, int | None]]) -> tuple[Label, ...]:
    """The labels of a path in the form of `renames.keys`."""
    return tuple(label for key, _ in path for label in labels(key))


def regrouped(plan: Plan, groups: Sequence[Group]) -> Plan:
    """The plan in which groups of leaves are replaced by others.

    Raises:
        RenameClash: something is already at a new path.
    """
    places: dict[int, list[Leaf]] = {number: [] for group in groups for number in group.numbers}
    rows = plan.by_number
    for group in groups:
        origins = [expression(plan.leaves, rows[number]) for number in group.numbers]
        made = zip(group.paths, group.make(origins), strict=True)
        places[group.numbers[0]] += [(labels_of(path), origin, None) for path, origin in made]
    return replaced(plan, places, "into=, paths that are free")


def replaced(plan: Plan, places: Mapping[int, Sequence[Leaf]], hint: str) -> Plan:
    """The plan with some leaves replaced by others.

    Args:
        places: leaf number → the leaves in its place.
        hint: what to do if paths clash.

    Raises:
        RenameClash: two leaves would have one path, or one would have the path of a container of others.
    """
    index, rows = plan.index, plan.by_number
    leaves: list[Leaf] = []
    kept: dict[int, list[int]] = {}
    for number in index.numbers:
        if number in places:
            leaves += places[number]
        else:
            kept[number] = [len(leaves)]
            leaves.append((index.paths[number], leaf_of(plan.leaves, number), rows[number]))
    names = [plain(path, index.separator) for path, _, _ in leaves]
    inside = {plain(path[:depth], index.separator) for path, _, _ in leaves for depth in range(1, len(path))}
    clashes = [name for name, count in Counter(names).items() if count > 1 or name in inside]
    if clashes:
        raise RenameClash(
            f"{wording.plural(len(clashes), 'leaf', 'leaves')} would collide with others: "
            f"{wording.listing(clashes, 4)}",
            hint=hint,
        )
    return gathered(plan.leaves, leaves, texts=plan.texts, ties=ties_of(plan.leaves.ties, kept))
