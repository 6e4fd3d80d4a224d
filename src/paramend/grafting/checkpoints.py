"""Grafts onto checkpoints: a copied leaf stays a reference until it is saved; the rest is made leaf by leaf.

A safetensors file holds only leaves: the result is assembled from those of both. Files of other formats hold more than
leaves and have a structure: there a graft is an edit that sets leaves to those of the source.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from paramend.arrays import losses
from paramend.arrays.registry import to_numpy
from paramend.checkpoints.assemble import exchanged, origin_of
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.plan import call
from paramend.formats.gathered import Gathered
from paramend.grafting.engine import value_of
from paramend.grafting.plan import GraftPlan, Move
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Made, Stored
from paramend.leaves.paths import labels
from paramend.leaves.specs import Array, Spec, kind_of
from paramend.piecewise.steps import CHUNK


def grafted(plan: GraftPlan) -> Checkpoint:
    """The target of a plan, a checkpoint, with the values that the plan moves into it; nothing is written.

    Values that change their dtype are read once now, in chunks, to count those that overflow or are lost.
    """
    target: Checkpoint = plan.target
    if _holds_more(plan):
        return _edited(target, {move.number: _taken(plan, move) for move in plan.moves})
    taken = {move.number: _taken(plan, move) for move in plan.moves}
    units = {number: target.ties.get(number, number) for number in target.index.numbers}
    return exchanged(target, {number: taken[unit] for number, unit in units.items() if unit in taken})


def _holds_more(plan: GraftPlan) -> bool:
    """Whether the target is of a format that holds more than leaves, and every leaf that moves can be read."""
    target: Checkpoint = plan.target
    if isinstance(target.source, Gathered) or target.format in ("", "safetensors"):
        return False
    if any(target.refusal(move.number) or plan.source.refusal(move.origin) for move in plan.moves):
        return False
    # A complex leaf cannot be cast, not even to make room.
    return plan.options.dtype != "source" or all(target.spec(m.number).kind != "complex" for m in plan.moves)


def _edited(target: Checkpoint, taken: Mapping[int, Origin | tuple[Any, int]]) -> Checkpoint:
    """The target with leaves set to the taken ones, which are read when they are written."""
    origins = {number: origin_of(*each) if isinstance(each, tuple) else each for number, each in taken.items()}
    operands = Gathered(None, ((labels(str(number)), origin) for number, origin in origins.items()))
    others = {n: call("cast", {"dtype": o.spec.dtype}) for n, o in origins.items() if o.spec != target.spec(n)}
    made = target.as_stored()  # that its quantised weights stay together was checked
    made = made.edited(others) if others else made
    made = made.edited({n: call("set", {"value": Stored(operands, at)}) for at, n in enumerate(origins)})
    return made.as_stored(target.raw)


def _taken(plan: GraftPlan, move: Move) -> Origin | tuple[Any, int]:
    """Where the new values come from."""
    ours, theirs = plan.target.spec(move.number), plan.source.spec(move.origin)
    keeps = ours.dtype == theirs.dtype or plan.options.dtype == "source"
    if move.meeting is None and (keeps or kind_of(ours.dtype) in ("float", "complex")):
        move.row = replace(move.row, taken=theirs.size)
        if keeps:
            return plan.source, move.origin
        overflowed, lost = _damage(plan, move.origin, ours.dtype)
        move.row = replace(move.row, overflowed=overflowed, lost=lost)
        if isinstance(plan.source, Checkpoint):
            cast = call("cast", {"dtype": ours.dtype})
            return plan.source.as_stored().edited({move.origin: cast}), move.origin
    value_of(plan, move)  # enters in the report what overflows or is lost
    spec = Spec(ours.shape, theirs.dtype if plan.options.dtype == "source" else ours.dtype)
    if isinstance(plan.source, Checkpoint):  # by name, so that it is read anew where it is pickled to
        return Made(spec, partial(_value, plan, move))
    return Made(spec, lambda: _value(plan, move))


def _value(plan: GraftPlan, move: Move) -> Array:
    return to_numpy(value_of(plan, move))


def _damage(plan: GraftPlan, origin: int, dtype: str) -> tuple[int, int]:
    """How many values overflow in another dtype, and how many are lost in it."""
    source, spec = plan.source, plan.source.spec(origin)
    if losses.holds(dtype, spec.dtype):
        return 0, 0
    if not isinstance(source, Checkpoint) or not source.untouched:
        return losses.damage(source.read(origin), dtype)
    overflowed = lost = 0
    for start in range(0, spec.size, CHUNK):
        piece = source.source.read_range(origin, start, min(start + CHUNK, spec.size))
        more = losses.damage(piece, dtype)
        overflowed, lost = overflowed + more[0], lost + more[1]
    return overflowed, lost
