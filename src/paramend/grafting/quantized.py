"""Quantised weights in grafts: their leaves go together onto the same scheme, or not at all."""

from collections.abc import Mapping

from paramend.edits.quantized import check_values
from paramend.grafting.plan import GraftPlan
from paramend.leaves.groups import Group, group_of, may_hold_groups
from paramend.leaves.leaves import Leaves


def check_groups(plan: GraftPlan) -> None:
    """Refuse a graft that would take codes for values, or values for codes, before anything is read.

    What moves bytes alone is allowed: all leaves of a quantised weight onto all of one of the same scheme, with equal
    shapes and dtypes.

    Raises:
        Quantized: a leaf of either side is a part of a quantised weight, and they do not go together.
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
    """The group of a leaf, under any of its paths."""
    twins = [twin for twin, one in leaves.ties.items() if one == number] or [number]
    return next((group for twin in twins if (group := group_of(leaves, twin)) is not None), None)
