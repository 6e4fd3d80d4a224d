"""The work of a graft: a plan that is carried out, or refused with a way out."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from paramend.arrays import losses
from paramend.arrays.registry import backend, to_numpy
from paramend.edits.subjects import barren
from paramend.errors import BadArgument, GraftRefused, Unsupported
from paramend.grafting import ways
from paramend.grafting.numbers import Counted, counts
from paramend.grafting.options import KINDS, Options, listed
from paramend.grafting.plan import GraftPlan, Move, abstract
from paramend.grafting.quantized import check_groups
from paramend.grafting.report import GraftReport
from paramend.leaves.leaves import Editable, Leaves
from paramend.leaves.origins.boxes import Box, ends
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import kind_of, numpy_dtype
from paramend.reports import wording
from paramend.reports.report import Line, fold, table
from paramend.trees.tree import Tree


def assign(tree: Tree, new: dict[int, Any]) -> None:
    """Assign all values to their leaves; if one of them fails, restore those before it."""
    for number, first in tree.apart(new).items():
        why = f"{tree.index.path(first)} and {tree.index.path(number)} are one array, which cannot take two values"
        raise Unsupported(why, hint="pm.graft returns a new tree: params, report = pm.graft(params, source)")
    old: dict[int, Any] = {}
    try:
        for number in list(new):
            leaf = tree.values[number]
            before = leaf if backend(leaf).abstract(leaf) else backend(leaf).like(leaf, leaf)
            tree.assign(number, new.pop(number))
            old[number] = before
    except BaseException:
        for number, value in old.items():
            tree.assign(number, value)
        raise


def values(plan: GraftPlan) -> dict[int, Any]:
    """The new leaves by number; what overflows or is lost is entered in the rows of the moves."""
    return {move.number: value_of(plan, move) for move in plan.moves}


def value_of(plan: GraftPlan, move: Move) -> Any:
    """The new value of a leaf; what overflows or is lost is entered in the row of the move."""
    leaf = plan.target.read(move.number)
    origin = _parts(plan, move, leaf)
    if origin is not None:
        return _filled(plan, move, leaf, origin)
    value = getattr(plan.source, "fetch", plan.source.read)(move.origin)
    if move.number in counts(plan.target) and not isinstance(losses.on_host(value), np.ndarray | np.generic):
        move.row = replace(move.row, taken=1)
        return value  # traced
    ours, theirs = backend(leaf), backend(value)
    given = theirs.spec(value).dtype
    leaf = _wanted(plan, move, leaf, given)
    dtype = ours.spec(leaf).dtype
    meeting, before = move.meeting, value
    if meeting is not None:
        value = meeting.make(value)
    move.row = replace(move.row, taken=meeting.taken if meeting else theirs.spec(value).size)
    if given != dtype or (meeting and meeting.computed):
        overflowed, lost = losses.damage(value, dtype)
        if meeting and meeting.computed:  # new numbers near zero are no loss
            lost = losses.damage(before, dtype)[1]
        move.row = replace(move.row, overflowed=overflowed, lost=lost)
        value = _converted(value, dtype)
    if meeting is not None and meeting.into is not None and ours.abstract(leaf):
        if meeting.taken < ours.spec(leaf).size:
            raise Unsupported(f"{move.row.path} has no values around the {meeting.did}", hint=ways.ADVICE["abstract"])
    elif meeting is not None and meeting.into is not None:
        return ours.put(leaf, meeting.into, "set", losses.on_host(value))
    if backend(value) is not ours:
        value = to_numpy(value)
        if ours.abstract(leaf) and not hasattr(plan.source, "fetch"):  # the user's array may change later
            value = value.copy()
    return ours.like(value, leaf)


def _wanted(plan: GraftPlan, move: Move, leaf: Any, given: str) -> Any:
    """The leaf in the dtype that the new value has, if the source has it in this one."""
    library = backend(leaf)
    if plan.options.dtype == "source" and library.spec(leaf).dtype != given:
        leaf = library.cast(leaf, given)
        if library.spec(leaf).dtype != given:
            raise Unsupported(f"{move.row.path} cannot become {given} here", hint=plan.options.call(dtype="target"))
    return leaf


def _filled(plan: GraftPlan, move: Move, leaf: Any, origin: Origin) -> Any:
    """A leaf whose parts are read and cast, each on its own."""
    leaf = _wanted(plan, move, leaf, origin.spec.dtype)
    dtype = backend(leaf).spec(leaf).dtype
    found: dict[tuple[tuple[int, int], ...], tuple[int, int]] = {}  # devices may hold the same part

    def read(box: Box) -> Any:
        part = origin.read_box(box)
        found[tuple(map(ends, box))] = losses.damage(part, dtype)
        return _converted(part, dtype)

    value = backend(leaf).filled(leaf, read)
    overflowed, lost = (sum(counts) for counts in zip((0, 0), *found.values(), strict=True))
    move.row = replace(move.row, taken=origin.spec.size, overflowed=overflowed, lost=lost)
    return value


def _parts(plan: GraftPlan, move: Move, leaf: Any) -> Origin | None:
    """Where the parts of a leaf that is spread over devices are read, each on its own; None: it is read whole."""
    fits = move.meeting is None and plan.target.spec(move.number).shape == plan.source.spec(move.origin).shape
    if not fits or isinstance(plan.source, Tree) or not isinstance(plan.source, Editable):
        return None
    origin: Origin = plan.source.expression(move.origin)
    return origin if origin.boxed and backend(leaf).parted(leaf) else None


def _converted(value: Any, dtype: str) -> Any:
    """An array in another dtype: of its own library for floats and complex numbers, else of numpy."""
    if kind_of(dtype) in ("float", "complex"):
        with np.errstate(over="ignore"):
            return backend(value).cast(value, dtype)
    # A torch Parameter cannot hold integers; on the host it is a plain array.
    with np.errstate(invalid="ignore"):
        return losses.on_host(value).astype(numpy_dtype(dtype))


def refuse_abstract(tree: Tree, given: Mapping[int, Any], report: GraftReport) -> None:
    """Raise if leaves of a tree have no values and are given none."""
    units = ((n, tree.ties.get(n, n)) for n in tree.index.numbers)
    left = [n for n, unit in units if unit not in given and abstract(tree, n)]
    if left:
        lines = [Line((tree.index.path(number),), (str(tree.spec(number)),)) for number in left]
        raise GraftRefused(listed("abstract", lines), report=report, hint=ways.ADVICE["abstract"])


def planned(target: Leaves, source: Leaves, options: Options) -> GraftPlan:
    """The plan of a graft."""
    for tree, name in ((target, "your model"), (source, "the source")):
        if len(tree.index.numbers) == len(counts(tree)):
            what, meant = barren(tree.root) if isinstance(tree, Tree) else ("", "")
            why = f"{name} holds no arrays{what and f': it is {what}'}"
            raise BadArgument(why, hint=f"pass {meant}" if meant else "pm.graft(target, source): the model first")
    plan = GraftPlan(target, source, options)
    check_groups(plan)
    if not plan.cases:
        return plan
    plan, found, hint = ways.out_of(plan)
    report = plan.report()
    blocks = ["the source does not fit your model, and nothing was changed"]
    for kind in KINDS:
        cases = [case for case in plan.cases if case.kind == kind]
        if cases and (kind != "nothing" or len(cases) == len(plan.cases)):
            lines = [Line(case.paths or (case.said,), (case.said,) if case.paths else ()) for case in cases]
            blocks.append(listed(kind, lines))
    waiting = [row for row in report.fresh if row.path in plan.missed]
    if waiting and any(case.kind in ("unused", "nothing") for case in plan.cases) and options.missing == "fresh":
        lines = [Line((row.path,), (f"{row.dtype}[{','.join(map(str, row.shape))}]",)) for row in waiting]
        leaves = wording.plural(len(lines), "leaf", "leaves")
        blocks.append(f"{leaves} of your model would stay fresh:\n{table(fold(lines))}")
    raise GraftRefused("\n\n".join(blocks), report=report, ways=found, hint=hint)


def put_in(tree: Counted, new: dict[int, Any]) -> None:
    """Assign values to the leaves of a tree in place, after checking that all of them can change."""
    for number in new:
        tree.in_place(number)
    numbers = {number: new.pop(number) for number in tree.counts & new.keys()}
    assign(Tree(tree.root) if tree.counts else tree, new)
    for number, value in numbers.items():
        tree.assign(number, value)


def leaves_of(tree: Any) -> Editable | Counted:
    """A checkpoint as it is, whose leaves are read one at a time; anything else as a tree in memory."""
    return tree if isinstance(tree, Editable) else Counted(tree)
