"""Grafts onto checkpoints: what is copied stays a reference until it is saved; the rest is made leaf by leaf."""

from dataclasses import replace
from typing import Any

from paramend.arrays.registry import to_numpy
from paramend.assembling import assemble
from paramend.checkpoints import Checkpoint
from paramend.computing import CHUNK
from paramend.formats.gathered import Made
from paramend.grafts import conversions
from paramend.grafts.engine import value_of
from paramend.grafts.plan import Move, Plan
from paramend.plans import call
from paramend.specs import Spec, kind_of


def grafted(plan: Plan) -> Checkpoint:
    """The target of a plan, a checkpoint, with what the plan moves into it; nothing is written.

    Values that change their dtype are read once now, in chunks, to count what that costs them.
    """
    target: Checkpoint = plan.target
    moves = {move.number: move for move in plan.moves}
    picks = []
    for number in target.index.numbers:
        move = moves.get(target.ties.get(number, number))
        picks.append((target.index.paths[number], (target, number) if move is None else _taken(plan, move)))
    return assemble(target, picks, ties=target.ties)


def _taken(plan: Plan, move: Move) -> Any:
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
            return plan.source.edited({move.origin: call("cast", {"dtype": ours.dtype})}), move.origin
    value_of(plan, move)  # which enters in the report what it costs
    spec = Spec(ours.shape, theirs.dtype if plan.options.dtype == "source" else ours.dtype)
    return Made(spec, lambda: to_numpy(value_of(plan, move)))


def _damage(plan: Plan, origin: int, dtype: str) -> tuple[int, int]:
    """How many values overflow in another dtype, and how many are lost in it."""
    source, spec = plan.source, plan.source.spec(origin)
    if conversions.holds(dtype, spec.dtype):
        return 0, 0
    if not isinstance(source, Checkpoint) or not source.untouched:
        return conversions.damage(source.read(origin), dtype)
    overflowed = lost = 0
    for start in range(0, spec.size, CHUNK):
        piece = source.source.read_range(origin, start, min(start + CHUNK, spec.size))
        more = conversions.damage(piece, dtype)
        overflowed, lost = overflowed + more[0], lost + more[1]
    return overflowed, lost
