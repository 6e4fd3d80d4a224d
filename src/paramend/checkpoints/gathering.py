"""Gathering: the plan of a checkpoint whose leaves come from anywhere, with the edits that each brings along."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from paramend.anatomy.documents import Document
from paramend.edits.call import Call, Moves, explained
from paramend.edits.plan import Plan, Row
from paramend.errors import RenameClash, Unsupported
from paramend.formats.gathered import Gathered, leaf_of
from paramend.leaves.leaves import Group, plain, tied
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.texts import shortened
from paramend.leaves.paths import Label, labels, write_path
from paramend.piecewise.rows import expression
from paramend.reports import wording

# A leaf of the result: its path, its origin, and the row with the edits that come on top; None if there are none.
Leaf = tuple[Sequence[Label], Origin, Row | None]


def gathered(base: Any, leaves: Sequence[Leaf], *, texts: tuple[Document, ...] = (), ties: Mapping[int, int]) -> Plan:
    """The plan of a checkpoint of leaves from anywhere, with format, metadata and sidecars of `base`, and the files
    beside the weights that change. Ties are place among the leaves → the first place of the same leaf, for leaves with
    several paths."""
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
    """The ties of a result, in which each leaf has places: those tied stay tied if each path is taken once."""
    return tied({there[0]: ties[number] for number, there in places.items() if number in ties and len(there) == 1})


def regrouped(plan: Plan, groups: Sequence[Group]) -> Plan:
    """The plan in which groups of leaves are replaced by others."""
    places: dict[int, list[Leaf]] = {number: [] for group in groups for number in group.numbers}
    rows = plan.by_number
    for group in groups:
        origins = [expression(plan.leaves, rows[number]) for number in group.numbers]
        for path, origin in zip(group.paths, group.make(origins), strict=True):
            places[group.numbers[0]].append((tuple(label for key, _ in path for label in labels(key)), origin, None))
    return replaced(plan, places, "into=, paths that are free")


def moved(plan: Plan, calls: Mapping[int, Call]) -> Plan:
    """The plan with calls that move elements of leaves that cannot be read, whose bytes are copied; `SpecMismatch` if a
    call does not fit its leaf, `Unsupported` as in `replaced`."""
    places: dict[int, list[Leaf]] = {}
    for number, call in calls.items():
        for row in map(plan.by_number.__getitem__, plan.twins(number)):
            explained(row.path, call.spec, row.spec)
            origin = cast(Moves, call.op.moves)(expression(plan.leaves, row), call.args)
            places[row.source] = [(row.labels, origin, None)]
    return replaced(plan, places, "")


def replaced(plan: Plan, places: Mapping[int, Sequence[Leaf]], hint: str) -> Plan:
    """The plan with other leaves in the places of some; `RenameClash` if two would have one path, or that of a
    container of others, `Unsupported` if one is made of others that cannot be read, and not of their whole bytes."""
    for path, origin, _ in itertools.chain.from_iterable(places.values()):
        if origin.refusal and origin.spec.size and not origin.extents:
            name = write_path(path, plan.index.separator)
            raise Unsupported(
                f"{name} cannot be made of {shortened(str(origin))}: {origin.refusal}",
                hint="what moves whole rows copies bytes: axis=0",
            )
    index, rows = plan.index, plan.by_number
    leaves: list[Leaf] = []
    kept: dict[int, list[int]] = {}
    batches: list[int] = []  # what stays comes from -1: bitsandbytes has names below those of other leaves
    for number in index.numbers:
        if number in places:
            leaves += places[number]
        else:
            kept[number] = [len(leaves)]
            leaves.append((index.paths[number], leaf_of(plan.leaves, number), rows[number]))
        batches += [number if number in places else -1] * (len(leaves) - len(batches))
    names = [plain(path, index.separator) for path, _, _ in leaves]
    inside: dict[str, set[int]] = {}
    for (path, _, _), batch in zip(leaves, batches, strict=True):
        for depth in range(1, len(path)):
            inside.setdefault(plain(path[:depth], index.separator), set()).add(batch)
    clashes = [name for name, count in Counter(names).items() if count > 1]
    clashes += [name for name, one in zip(names, batches, strict=True) if inside.get(name, {one}) != {one}]
    if clashes:
        raise RenameClash(
            f"{wording.plural(len(clashes), 'leaf', 'leaves')} would collide with others: "
            f"{wording.listing(clashes, 4)}",
            hint=hint,
        )
    made = gathered(plan.leaves, leaves, texts=plan.texts, ties=ties_of(plan.leaves.ties, kept))
    for path, layers in index.layers.items():
        made.leaves.index.mark(path, layers)
    return made
