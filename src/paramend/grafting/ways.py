"""Ways out of a refused graft: options, renames and code that would work, each tried before it is proposed."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from paramend.errors import ParamendError
from paramend.grafting import alignment, layouts
from paramend.grafting.numbers import counts
from paramend.grafting.options import KINDS, Case, quoted
from paramend.grafting.plan import GraftPlan, abstract
from paramend.leaves.leaves import Leaves
from paramend.leaves.paths import write_path
from paramend.reports import wording
from paramend.selectors.patterns import parse
from paramend.trees.tree import Tree


def out_of(plan: GraftPlan) -> tuple[GraftPlan, list[dict[str, Any]], str]:
    """The plan that says best what is against the graft, the options that would work, and the hint."""
    better = _better_rename(plan)
    starts = [start for start in (better, plan) if start is not None]
    plan = next((trial for start in starts if (trial := _meeting(start)) is not None), plan)
    if any(case.kind == "layout" for case in plan.cases):
        return plan, [], "\n      ".join(_transposed(plan))
    ways = _ways_out(plan, better)
    said = []
    for way in ways:
        copies = f"  # copies {wording.plural(len(way.moves), 'leaf', 'leaves')}"
        same = way.options.in_place == plan.options.in_place
        said.append(f"{way.options.call()}{copies if same else ' gives a new tree instead'}")
    said = [*(_transposed(plan) if plan.orders else []), *said] or [_advice(plan)]
    return plan, [way.options.given() for way in ways], "\n      ".join(said)


def _ways_out(plan: GraftPlan, better: GraftPlan | None) -> list[GraftPlan]:
    """Plans that would work: with a rename that makes more names agree, and with options that allow the rest."""
    tries = [trial for start in (better, plan) if start is not None and (trial := _allowing(start)) is not None]
    if any(len(case.ways) > 1 for case in plan.cases) and (other := _allowing(plan, 1)):
        tries.append(other)
    if _is_head(plan) and (other := _allowing(plan, ways=_OF_LAYERS)):
        tries.append(other)
    if not tries and plan.options.in_place:
        functional = _allowing(GraftPlan(plan.target, plan.source, replace(plan.options, in_place=False)))
        return [] if functional is None else [functional]
    return tries


def _advice(plan: GraftPlan) -> str:
    kinds = {case.kind for case in plan.cases}
    if isinstance(plan.source, Tree) and all(abstract(plan.source, n) for n in plan.source.index.numbers):
        return "pm.graft(target, source): first the model that starts warm, then the one that it starts from"
    return next((text for kind, text in ADVICE.items() if kind in kinds), ADVICE["nothing"])


# The hint where no option helps; of several kinds the first here counts.
ADVICE = {
    "only": "`only` selects leaves of your model: pm.at(target, selector).paths lists what a selector finds",
    "rule": "leave the rule out or correct it: pm.at(source, pattern).paths lists what a pattern finds",
    "place": "the right side of a rule is resolved in your model: pm.at(target, pattern).paths lists what is there",
    "collision": 'rename={"name/in/source": None, ...} leaves one of them behind',
    "tied": 'rename={"name/in/source": None, ...} leaves one of them behind',
    "abstract": "take the values from the source, or make them first: params = model.init(key, x)",
    "layout": "pm.at(source, path).one() is the array: give it the axes of your model, and graft {path: array}",
    "choice": "correct the selector or leave it out: pm.at(target, selector).paths lists what a selector finds",
    "resize": 'mismatch={"name/in/your/model": "keep"}, without a rule in `resize`, leaves it as it is',
    "unfit": 'rename={"name/in/source": None, ...} leaves it behind',
    "nothing": 'rename={"name/in/source/**": "name/in/your/model/**"} says what goes where',
}


_OF_LAYERS = KINDS["mismatch"][2]


def _allowing(plan: GraftPlan, choice: int = 0, ways: Sequence[dict[str, str]] = ()) -> GraftPlan | None:
    """The plan with options that allow its cases, or None if no options do: `choice` of several rules to resize a leaf,
    `ways` for shapes that differ, in the order in which they are tried."""
    ways = ways or (_OF_LAYERS[::-1] if _is_head(plan) else _OF_LAYERS)
    kinds = {case.kind for case in plan.cases} - {"nothing"}
    changes: dict[str, Any] = {}
    for kind in kinds - {"resize"}:
        if not KINDS[kind][2]:
            return None
        changes |= KINDS[kind][2][0]
    tries = [changes | way for way in ways] if "mismatch" in kinds and "transposed" not in kinds else [changes]
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
    arrays = (number for number in leaves.index.numbers if number not in counts(leaves))
    return {leaves.index.pieces(number): leaves.spec(number).shape for number in arrays}


def _is_head(plan: GraftPlan) -> bool:
    """Whether all shapes that differ are those of one layer with another number of outputs, such as classes."""
    cases = [case for case in plan.cases if case.kind == "mismatch"]
    rows = {row.path: row for row in plan.rows["mismatched"]}
    return len({case.paths[0].rpartition(plan.target.index.separator)[0] for case in cases}) == 1 and all(
        _other_outputs(case, rows[case.paths[0]].shape, rows[case.paths[0]].source_shape or ()) for case in cases
    )


def _other_outputs(case: Case, new: tuple[int, ...], old: tuple[int, ...]) -> bool:
    name = case.paths[0].split("/")[-1].split(".")
    differ = [axis for axis, (a, b) in enumerate(zip(new, old, strict=False)) if a != b]
    outputs = len(new) - 1 if layouts.outputs_last(name) else 0
    return len(new) == len(old) and differ == [outputs] and not _TABLE.search(case.paths[0])


# Tables of a row for each token or position, which grow by rows.
_TABLE = re.compile(r"emb|wte|wpe|pos|token|vocab|lm_head|shared", re.IGNORECASE)


def _meeting(plan: GraftPlan) -> GraftPlan | None:
    """The plan in which weights of the source that go nowhere meet kernels of the target that get nothing, if any."""
    target, source = plan.target.index, plan.source.index
    missed = {target.pieces(number) for number in target.numbers if target.path(number) in plan.missed}
    rules = {}
    for number in plan.strays:
        name = plan.names[number]
        twins = [(*name[:-1], last) for last in ("kernel", "w", "weight")]
        twin = next((path for path in twins if path in missed and layouts.crossed(path, name)), None)
        if twin is not None:
            rules[source.path(number)] = write_path(twin, target.separator)
    if not rules:
        return None
    options = plan.options.changed(rename={**rules, **(plan.options.rename or {})})
    trial = GraftPlan(plan.target, plan.source, options)
    return trial if any(case.kind == "layout" for case in trial.cases) else None


def _transposed(plan: GraftPlan) -> list[str]:
    """Code that grafts the rest, and then those leaves whose axes are in another order."""
    if not plan.orders:
        return [ADVICE["layout"]]
    target, source = plan.target, plan.source
    made = [
        f"{quoted(target.index.path(number))}: pm.at(source, {quoted(source.index.path(guest))}).one()"
        + layouts.code(order, source, guest)
        for number, (guest, order) in plan.orders.items()
    ]
    shown = made[:_MOST_NAMED] + ["..."] * (len(made) > _MOST_NAMED)
    alike = all(target.spec(number).shape == source.spec(guest).shape for number, (guest, _) in plan.orders.items())
    remark = "  # without the transposition, if your source stores it as your model does" * alike
    orders = plan.orders.items()
    fits = all(layouts.permuted(source.spec(g).shape, order) == target.spec(n).shape for n, (g, order) in orders)
    last = "kernels)" if fits else 'kernels, mismatch="keep")'
    taken = {guest for guest, _ in plan.orders.values()}
    left = _left_behind(plan, taken)
    rest = {old: new for old, new in (plan.options.rename or {}).items() if _finds(plan, old) - taken}
    trial = GraftPlan(target, source, plan.options.changed(rename={**left, **rest}))
    allowed = _allowing(trial) if trial.moves else None
    lines = [f"kernels = {{{', '.join(shown)}}}{remark}"]
    if plan.options.in_place:
        return [*lines, *([allowed.options.call()] if allowed else []), f"pm.graft_(module, {last}"]
    if allowed is None:
        return [*lines, f"tree, report = pm.graft(target, {last}"]
    return [*lines, f"tree, report = {allowed.options.call()}", f"tree, report = pm.graft(tree, {last}"]


def _left_behind(plan: GraftPlan, taken: set[int]) -> dict[str, str | None]:
    ends = dict.fromkeys(f"**/{plan.source.index.pieces(number)[-1]}" for number in sorted(taken))
    if len(taken) > _MOST_NAMED and set().union(*(_finds(plan, end) for end in ends)) == taken:
        return dict.fromkeys(ends)
    return {plan.source.index.path(number): None for number in sorted(taken)}


def _finds(plan: GraftPlan, pattern: str) -> set[int]:
    return set(parse(pattern).find(plan.source.index.names))
