"""The work of a graft: a plan that is carried out, or refused with a way out."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paramend.arrays.registry import backend
from paramend.errors import BadArgument, GraftRefused, ParamendError, Unsupported
from paramend.grafting import alignment, conversions
from paramend.grafting.options import Options
from paramend.grafting.plan import KINDS, GraftPlan, Move
from paramend.grafting.quantized import check_groups
from paramend.grafting.report import GraftReport
from paramend.leaves.leaves import Editable, Leaves
from paramend.reports import wording
from paramend.reports.report import Line, fold, table
from paramend.selectors.patterns import parse
from paramend.trees.tree import Tree


def assign(tree: Tree, new: dict[int, Any]) -> None:
    """Assign all values to their leaves; if one of them fails, restore those before it."""
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
    value = getattr(plan.source, "fetch", plan.source.read)(move.origin)
    ours, theirs = backend(leaf), backend(value)
    dtype = ours.spec(leaf).dtype
    given = theirs.spec(value).dtype
    if plan.options.dtype == "source" and dtype != given:
        leaf = ours.cast(leaf, given)
        dtype = ours.spec(leaf).dtype
        if dtype != given:
            raise Unsupported(f"{move.row.path} cannot become {given} here", hint=plan.options.call(dtype="target"))
    meeting, before = move.meeting, value
    if meeting is not None:
        value = meeting.make(value)
    move.row = replace(move.row, taken=meeting.taken if meeting else theirs.spec(value).size)
    if given != dtype or (meeting and meeting.computed):
        overflowed, lost = conversions.damage(value, dtype)
        if meeting and meeting.computed:  # new numbers near zero are no loss
            lost = conversions.damage(before, dtype)[1]
        move.row = replace(move.row, overflowed=overflowed, lost=lost)
        value = conversions.converted(value, dtype)
    if meeting is not None and meeting.into is not None and ours.abstract(leaf):
        if meeting.taken < ours.spec(leaf).size:
            raise Unsupported(f"{move.row.path} has no values around the {meeting.did}", hint=_ADVICE["abstract"])
    elif meeting is not None and meeting.into is not None:
        return ours.put(leaf, meeting.into, "set", conversions.on_host(value))
    if backend(value) is not ours:
        value = backend(value).numpy(value)
        if ours.abstract(leaf) and not hasattr(plan.source, "fetch"):  # the user's array may change later
            value = value.copy()
    return ours.like(value, leaf)


def refuse_abstract(tree: Tree, given: Mapping[int, Any], report: GraftReport) -> None:
    """Raise if leaves of a tree have no values and are given none.

    Args:
        tree: the target.
        given: the new values, by number.
        report: what became of each leaf.
    """
    left = [
        n
        for n in tree.index.numbers
        if tree.ties.get(n, n) not in given and backend(tree.read(n)).abstract(tree.read(n))
    ]
    if left:
        one, many, _ = KINDS["abstract"]
        lines = [Line((tree.index.path(number),), (str(tree.spec(number)),)) for number in left]
        title = one if len(left) == 1 else many.format(f"{len(left):,}")
        raise GraftRefused(f"{title}:\n{table(fold(lines))}", report=report, hint=_ADVICE["abstract"])


# ---- refusing --------------------------------------------------------------------------------------------------


def planned(target: Leaves, source: Leaves, options: Options) -> GraftPlan:
    """The plan of a graft.

    Raises:
        GraftRefused: the source does not fit the target.
        Quantized: codes of a quantised weight would become values, or values codes.
    """
    for tree, name in ((target, "your model"), (source, "the source")):
        if not tree.index.numbers:
            raise BadArgument(f"{name} holds no arrays", hint="pm.graft(target, source): the model first")
    plan = GraftPlan(target, source, options)
    check_groups(plan)
    if not plan.cases:
        return plan
    report = plan.report()
    blocks = ["the source does not fit your model, and nothing was changed"]
    for kind, (one, many, _) in KINDS.items():
        cases = [case for case in plan.cases if case.kind == kind]
        if cases and (kind != "nothing" or len(cases) == len(plan.cases)):
            lines = [Line(case.paths or (case.said,), (case.said,) if case.paths else ()) for case in cases]
            title = one if len(cases) == 1 else many.format(f"{len(cases):,}")
            blocks.append(f"{title}:\n{table(fold(lines))}")
    waiting = [row for row in report.fresh if row.path in plan.missed]
    if waiting and any(case.kind in ("unused", "nothing") for case in plan.cases) and options.missing == "fresh":
        lines = [Line((row.path,), (f"{row.dtype}[{','.join(map(str, row.shape))}]",)) for row in waiting]
        leaves = wording.plural(len(lines), "leaf", "leaves")
        blocks.append(f"{leaves} of your model would stay fresh:\n{table(fold(lines))}")
    ways = _ways_out(plan)
    said = [f"{way.options.call()}{_outcome(way, plan)}" for way in ways] or [_advice(plan)]
    raise GraftRefused(
        "\n\n".join(blocks), report=report, ways=[way.options.given() for way in ways], hint="\n      ".join(said)
    )


def _ways_out(plan: GraftPlan) -> list[GraftPlan]:
    """Plans that would work: with a rename that makes more names agree, and with options that allow the rest."""
    better = _better_rename(plan)
    tries = [trial for start in (better, plan) if start is not None and (trial := _allowing(start)) is not None]
    if any(len(case.ways) > 1 for case in plan.cases) and (other := _allowing(plan, 1)):
        tries.append(other)
    if not tries and plan.options.in_place:
        functional = _allowing(GraftPlan(plan.target, plan.source, replace(plan.options, in_place=False)))
        return [] if functional is None else [functional]
    return tries


def _outcome(way: GraftPlan, plan: GraftPlan) -> str:
    if way.options.in_place != plan.options.in_place:
        return " gives a new tree instead"
    return f"  # copies {wording.plural(len(way.moves), 'leaf', 'leaves')}"


def _advice(plan: GraftPlan) -> str:
    kinds = {case.kind for case in plan.cases}
    return next((text for kind, text in _ADVICE.items() if kind in kinds), _ADVICE["nothing"])


# The hint where no option helps; of several kinds the first here counts.
_ADVICE = {
    "only": "`only` selects leaves of your model: pm.at(target, selector).paths lists what a selector finds",
    "rule": "leave the rule out or correct it: pm.at(source, pattern).paths lists what a pattern finds",
    "place": "the right side of a rule is resolved in your model: pm.at(target, pattern).paths lists what is there",
    "collision": 'rename={"name/in/source": None, ...} leaves one of them behind',
    "tied": 'rename={"name/in/source": None, ...} leaves one of them behind',
    "abstract": "take the values from the source, or make them first: params = model.init(key, x)",
    "choice": "correct the selector or leave it out: pm.at(target, selector).paths lists what a selector finds",
    "resize": 'mismatch={"name/in/your/model": "keep"}, without a rule in `resize`, leaves it as it is',
    "unfit": 'rename={"name/in/source": None, ...} leaves it behind',
    "nothing": 'rename={"name/in/source/**": "name/in/your/model/**"} says what goes where',
}


def _allowing(plan: GraftPlan, choice: int = 0) -> GraftPlan | None:
    """The plan with options that allow its cases, or None if no options do.

    Args:
        plan: the plan.
        choice: which of several rules to take for a leaf that could be resized in several ways.
    """
    kinds = {case.kind for case in plan.cases} - {"nothing"}
    changes: dict[str, Any] = {}
    for kind in kinds - {"resize"}:
        if not KINDS[kind][2]:
            return None
        changes |= KINDS[kind][2][0]
    tries = [changes | way for way in KINDS["mismatch"][2]] if "mismatch" in kinds else [changes]
    stuck = [case for case in plan.cases if case.kind == "resize"]
    if stuck:
        rules = {case.paths[0]: case.ways[min(choice, len(case.ways) - 1)] for case in stuck if case.ways}
        left = [case.paths[0] for case in stuck if not case.ways]
        named = [dict.fromkeys(left, how) for how in ("overlap", "keep")] if 0 < len(left) <= _MOST_NAMED else [{}]
        tries = [trial | {"resize_of": rules, "mismatch_of": leaves} for trial in tries for leaves in named]
        tries += [changes | {"mismatch": how} for how in ("overlap", "keep")]
    for trial in tries:
        allowed = GraftPlan(plan.target, plan.source, plan.options.changed(**trial)) if trial else plan
        if not allowed.cases:
            return allowed
        if trial.get("mismatch") == "resize" and any(move.meeting and move.meeting.computed for move in allowed.moves):
            mixed = _allowing(allowed)
            if mixed is not None:
                return mixed
    return None


# Up to this many leaves are named in a proposed option.
_MOST_NAMED = 4


def _better_rename(plan: GraftPlan) -> GraftPlan | None:
    """The plan with the rename under which the most leaves agree, if they are more than without it."""
    kinds = {case.kind for case in plan.cases}
    wrong = {"only", "rule", "place", "choice", "collision"}
    if not kinds & {"unused", "missing", "abstract", "mismatch", "nothing"} or kinds & wrong:
        return None
    source, target = plan.source.index, plan.target.index
    best: GraftPlan | None = None
    for rules in alignment.propose(_shapes(plan.source), _shapes(plan.target)):
        written = {parse(a).write(source.separator): parse(b).write(target.separator) for a, b in rules.items()}
        try:
            renames = {**(plan.options.rename or {}), **written}
            trial = GraftPlan(plan.target, plan.source, plan.options.changed(rename=renames))
        except ParamendError:
            continue
        allowed = all(KINDS[case.kind][2] for case in trial.cases)
        if allowed and trial.score > (best or plan).score:
            best = trial
            if not trial.cases and not trial.missed:
                break
    return best


def _shapes(leaves: Leaves) -> dict[tuple[str, ...], tuple[int, ...]]:
    return {leaves.index.pieces(number): leaves.spec(number).shape for number in leaves.index.numbers}


def put_in(tree: Tree, new: dict[int, Any]) -> None:
    """Assign values to the leaves of a tree in place, after checking that all of them can change."""
    for number in new:
        tree.in_place(number)
    assign(tree, dict(new))


def leaves_of(tree: Any) -> Editable | Tree:
    """A checkpoint as it is, whose leaves are read one at a time; anything else as a tree in memory."""
    return tree if isinstance(tree, Editable) else Tree(tree)
