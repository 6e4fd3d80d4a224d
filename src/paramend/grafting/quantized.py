"""Quantised weights in grafts: as bytes onto the same scheme, else decoded, or encoded as the target has them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from paramend.arrays.registry import backend
from paramend.edits.decoding import keys
from paramend.edits.memory import Memory
from paramend.edits.own import Own, floats
from paramend.edits.quantized import check_values
from paramend.edits.weights import Weights, weighed
from paramend.errors import ParamendError
from paramend.grafting.options import Options
from paramend.grafting.plan import GraftPlan
from paramend.leaves.codecs.encoding import Misfit, even
from paramend.leaves.groups import Group, group_of, may_hold_groups
from paramend.leaves.leaves import Editable, Group as Regroup, Leaves
from paramend.leaves.origins.encoded import encoded
from paramend.leaves.origins.origin import Origin
from paramend.leaves.paths import Label
from paramend.leaves.weights import Weight, labels_of


def adapted(target: Any, source: Any, options: Options) -> tuple[Any, dict[str, tuple[str, Misfit]]]:
    """The source with its weights as the target stores them: codes become floats, and floats codes; and how far what
    was encoded is from what it was, by path in the source.

    Weights that both have in one scheme, with leaves of equal specs, stay as they are stored.
    """
    fits: dict[str, tuple[str, Misfit]] = {}
    if options.raw or not (may_hold_groups(target) or may_hold_groups(source)):
        return source, fits
    trees = (each if isinstance(each, Editable) else Memory(each.root) for each in (target, source))
    ours, theirs = (weighed(each, inputs=True) for each in trees)
    here = ours.groups if isinstance(ours, Weights) else {}
    there = theirs.groups if isinstance(theirs, Weights) else {}
    if not here and not there:
        return source, fits
    try:
        pairs = GraftPlan(ours, theirs, replace(options, in_place=False, unused="ok", missing="fresh")).pairs()
    except ParamendError:  # the plan of the leaves as they are stored says why
        return source, fits
    stored = theirs.stored if isinstance(theirs, Weights) else theirs
    groups: list[Regroup] = []
    for number, origin in pairs.items():
        weight = ours.weight(number) if isinstance(ours, Weights) and number in here else None
        given = theirs.weight(origin) if isinstance(theirs, Weights) and origin in there else None
        if (
            (weight is None and given is None)
            or isinstance(weight, Own)
            or (weight and given and _equal(weight, given))
        ):
            continue
        if (weight is None and _group(target, number)) or (given is None and _group(source, origin)):
            continue  # of a scheme that cannot be decoded
        spec = theirs.spec(origin)
        if weight is not None and (spec.kind != "float" or spec.shape != weight.spec.shape):
            continue
        numbers = (origin,) if given is None else given.group.numbers
        path = labels_of(stored, given.group) if given else stored.index.paths[origin]
        if weight is None:
            assert given is not None
            groups.append(Regroup(numbers, (keys(path),), partial(_floats, given)))
            continue
        misfit = Misfit(blocks=weight.codec.count)
        parts = _parts(weight, given.origin("float32") if given else theirs.expression(origin), misfit)
        paths = [keys(_beside(ours, weight, role, path)) for role in parts]
        groups.append(Regroup(numbers, tuple(paths), partial(_codes, parts)))
        for start, stop in parts["payload"].ranges():
            parts["payload"].read_range(start, stop)
        fits[theirs.index.path(origin)] = weight.codec.scheme, misfit
    if not groups:
        return source, fits
    made = stored.as_stored().regrouped(groups)
    return (made.as_stored(source.raw) if isinstance(made, Editable) else type(source)(made)), fits


def _equal(one: Weight, other: Weight | Own) -> bool:
    specs = ({role: part.spec for role, part in weight.parts.items()} for weight in (one, other))
    return one.group.scheme is other.group.scheme and next(specs) == next(specs)


def _floats(weight: Weight | Own, given: Any) -> list[Any]:
    return [floats(weight, given)]


def _codes(parts: Mapping[str, Origin], given: Any) -> list[Any]:
    """The leaves that a float leaf becomes."""
    if isinstance(given[0], Origin):
        return list(parts.values())
    return [backend(given[0]).resized(part.read(), given[0]) for part in parts.values()]


def _parts(weight: Weight, values: Origin, misfit: Misfit) -> dict[str, Origin]:
    """The leaves of a weight of the target for values, by role; those that do not depend on values stay."""
    symmetric = even(weight.codec, weight.codec.views(weight.parts))
    new = {*weight.codec.encodes, weight.codec.top} - ({"zero"} if symmetric else set())
    kept = {role: part for role, part in weight.parts.items() if role not in new}
    specs = {role: part.spec for role, part in weight.parts.items()}
    return kept | encoded(weight.codec, values, specs, kept, misfit=misfit)


def _beside(ours: Any, weight: Weight, role: str, path: tuple[Label, ...]) -> tuple[Label, ...]:
    """The path of a leaf of the target, with the module of a leaf of the source."""
    number = next(number for number in weight.group.numbers if weight.group.role(number) == role)
    depth = len(ours.stored.index.paths[weight.group.numbers[0]]) - 1
    return (*path[:-1], *ours.stored.index.paths[number][depth:])


def check_groups(plan: GraftPlan) -> None:
    """Refuse a graft that would take codes for values, or values for codes, before anything is read.

    What moves bytes alone is allowed: all leaves of a quantised weight onto all of one of the same scheme, with equal
    shapes and dtypes.
    """
    target, source = plan.target, plan.source
    if plan.options.raw or not (may_hold_groups(target) or may_hold_groups(source)):
        return
    way = f"{plan.options.call(raw=True)} takes leaves as they are stored"
    pairs = plan.pairs()
    for number, origin in pairs.items():
        ours, theirs = _group(target, number), _group(source, origin)
        if (ours or theirs) and not (ours and theirs and _alike(plan, pairs, ours, theirs)):
            of, to = source.index.path(origin), target.index.path(number)
            check_values(source, [origin], f"cannot go to {to}, {target.spec(number)}", way)
            check_values(target, [number], f"cannot take {of}, {source.spec(origin)}", way)


def _alike(plan: GraftPlan, pairs: Mapping[int, int], ours: Group, theirs: Group) -> bool:
    """Whether every leaf of one group takes the bytes of that with the same role in the other."""
    if ours.scheme is not theirs.scheme or len(ours.numbers) != len(theirs.numbers):
        return False
    whole = {move.number: move for move in plan.moves if move.meeting is None}
    for number in ours.numbers:
        unit = plan.target.ties.get(number, number)
        origin = pairs.get(unit)
        roles = {plan.source.ties.get(other, other): theirs.role(other) for other in theirs.numbers}
        if unit not in whole or origin is None or roles.get(origin) != ours.role(number):
            return False
        if plan.target.spec(unit) != plan.source.spec(origin):
            return False
    return True


def _group(leaves: Leaves, number: int) -> Group | None:
    twins = [twin for twin, one in leaves.ties.items() if one == number] or [number]
    return next((group for twin in twins if (group := group_of(leaves, twin)) is not None), None)
