"""Ports: a model takes the parameters of a model of another framework, layer by layer, and a report says how."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

from paramend.checkpoints.assemble import assemble
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.plan import call
from paramend.errors import PortRefused
from paramend.grafting.graft import graft_
from paramend.grafting.report import GraftReport, GraftRow
from paramend.leaves.paths import labels
from paramend.leaves.specs import AnyTree
from paramend.mapping.layout import Layout
from paramend.porting.models import Model, Unit
from paramend.porting.plan import PortPlan, Renames, Rules
from paramend.porting.proof import Proof
from paramend.porting.report import PortReport
from paramend.porting.settings import differences
from paramend.porting.trial import carried, stored, tried
from paramend.reports import wording

T = TypeVar("T")


def port(
    target: T,
    source: AnyTree,
    *,
    rename: Renames | None = None,
    rules: Rules | None = None,
    prove: Any = None,
) -> tuple[T, PortReport]:
    """The target with the parameters of a source of another framework, and a report.

    Layers are matched by name, by shape and kind, by the order of their calls where both models run, and last by the
    numbers in their names. What could be paired in several ways is refused. Values arrive in the library, on the
    device and in the dtype of the target.

    Args:
        target: a torch, NNX or Equinox module, a linen module with its variables (`module.bind(variables)`), or the
            parameters alone: linen variables, Haiku params, a state dict, an NNX State, a checkpoint from `pm.open`.
        source: the same.
        rename: source path → target path, of modules or leaves, as in `{"encoder.<n>": "block_<n>"}`. None instead of a
            path leaves it behind.
        rules: how leaves are stored, where the port cannot know: target path → steps of a layout, or rules of a layout.
        prove: inputs on which both models are run in float64, with random parameters, and compared: `(x,)` for both, or
            `{"target": (x,), "source": (y,)}`.

    Returns:
        A new tree of the target's type, and the report.

    Raises:
        PortRefused: layers have no partner, or could have several; the message lists the candidates. Nothing changed.
        BadArgument: a rule is not one, or `prove` is given and a model cannot run.

    >>> import torch
    >>> torch_model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    >>> params = {f"Dense_{i}": {"kernel": np.zeros((a, b)), "bias": np.zeros(b)} for i, (a, b) in enumerate([(3, 4), (4, 2)])}
    >>> tree, report = port(params, torch_model)
    >>> np.array_equal(tree["Dense_1"]["kernel"], torch_model[1].weight.detach().numpy().T)
    True
    >>> print(report)
    """
    plan, proof = _planned(Model(target), Model(source), rename, rules, prove)
    layout = plan.layout()
    made, told = carried(plan.target, plan.source, layout)
    return cast(T, made), _report(plan, told, layout, proof)


def port_(
    module: AnyTree, source: AnyTree, *, rename: Renames | None = None, rules: Rules | None = None, prove: Any = None
) -> PortReport:
    """The report of a port in place: a torch or NNX module takes the parameters of a source of another framework.

    Args:
        module: what to change.
        source: as in `port`.
        rename: as in `port`.
        rules: as in `port`.
        prove: as in `port`.

    Raises:
        PortRefused: as in `port`. Nothing was changed.

    >>> import torch
    >>> module = torch.nn.Linear(2, 1)
    >>> report = port_(module, {"kernel": np.array([[1.0], [2.0]]), "bias": np.array([3.0])})
    >>> module.weight.tolist(), module.bias.tolist()
    ([[1.0, 2.0]], [3.0])
    """
    plan, proof = _planned(Model(module), Model(source), rename, rules, prove)
    layout = plan.layout()
    return _report(plan, graft_(plan.target.tree, stored(plan.source, layout)), layout, proof)


def port_on_disk(target: Any, source: Checkpoint, *, rename: Renames | None = None) -> tuple[Checkpoint, PortReport]:
    """A checkpoint with the names, shapes and dtypes of a target in memory, and a report; nothing is read before it is
    saved."""
    plan, _ = _planned(Model(target), Model(source), rename, None, None)
    layout, like = plan.layout(), plan.target
    made = stored(plan.source, layout)
    numbers = {made.index.pieces(number): number for number in made.index.numbers}
    rows = []
    for number in like.leaves.index.numbers:
        here, spec = numbers.get(like.leaves.index.pieces(number)), like.spec(number)
        if here is None:
            continue
        was = made.spec(here)
        path = like.text(number)
        did = "copied" if was.dtype == spec.dtype else f"copied, cast from {was.dtype}"
        rows.append(
            (here, spec, GraftRow(path, path, spec.shape, was.shape, spec.dtype, was.dtype, did, "", spec.size))
        )
    casts = {here: call("cast", {"dtype": spec.dtype}) for here, spec, row in rows if row.did != "copied"}
    made = made.edited(casts) if casts else made
    picks = [(labels(row.path), (made, here)) for here, _, row in rows]
    return assemble(made, picks), _report(plan, GraftReport(copied=[row for *_, row in rows]), layout)


def _planned(
    target: Model, source: Model, rename: Renames | None, rules: Rules | None, inputs: Any
) -> tuple[PortPlan, Proof | None]:
    """The plan of a port without questions, and its proof.

    Raises:
        PortRefused: questions are left, or the models do not compute the same.
    """
    if inputs is None:
        plan, proof = PortPlan(target, source, rename, rules), None
    else:
        plan, proof = tried(target, source, rename, rules, inputs)
    if plan.doubtful or plan.questions or any(plan.lone):
        raise _refusal(plan)
    if proof is not None and not proof:
        report = _report(plan, GraftReport(refused=True), plan.layout(), proof)
        beside = "".join(f"\n  {each}" for each in report.warnings)
        raise PortRefused(
            f"with the same parameters the two models do not compute the same, and nothing was changed\n\n{proof}"
            + f"\n\nwhat differs beside parameters:{beside}" * bool(beside),
            report=report,
            hint="rename={...} if layers are paired wrongly; else correct the model",
        )
    return plan, proof


def _refusal(plan: PortPlan) -> PortRefused:
    blocks = ["the source cannot be ported to the target, and nothing was changed"]
    hints = []
    for ours, theirs in plan.doubtful:
        blocks.append(
            f"{wording.plural(len(ours), 'layer')} of the source fit {wording.plural(len(theirs), 'layer')} of the target in "
            f"several ways:\n  {_names(ours)}\n  {_names(theirs)}"
        )
        hints.append({_name(a): _name(b) for a, b in zip(ours, theirs, strict=False)})
    for path, (why, steps) in plan.questions.items():
        blocks.append(f"the layout of {path} is not known: {why}")
        hints.append({path: [step.to_data() for step in steps[-1]]})
    for units, said in zip(
        plan.lone, ("of the source has no place in the target", "of the target has nothing in the source"), strict=True
    ):
        if units:
            blocks.append(f"what {said}:\n" + "\n".join(f"  {_name(u)}  {_shapes(u)}" for u in units))
    renames = {old: new for found in hints for old, new in found.items() if isinstance(new, str)}
    rules = {path: steps for found in hints for path, steps in found.items() if not isinstance(steps, str)}
    said = [
        f"rename={renames}, with the right pairs" if renames else "",
        f"rules={rules}, with what is right" if rules else "",
    ]
    if not (renames or rules):
        said = ['rename={"layer/of/source": "layer/of/target"} says what goes where, None what is left behind']
    candidates = [([_name(u) for u in ours], [_name(u) for u in theirs]) for ours, theirs in plan.doubtful]
    hint = "\n      ".join(
        [each for each in said if each] + ["prove=(x,) finds it out, where both models run"] * bool(renames or rules)
    )
    report = _report(plan, GraftReport(refused=True))
    return PortRefused("\n\n".join(blocks), report=report, candidates=candidates, hint=hint)


def _name(unit: Unit) -> str:
    return "/".join(unit.path)


def _names(units: list[Unit]) -> str:
    return wording.listing([f"{_name(unit)} {_shapes(unit)}" for unit in units], 12)


def _shapes(unit: Unit) -> str:
    return ", ".join(f"{name or 'value'} {list(shape)}" for name, shape in unit.shaped[0].shapes)


def _report(plan: PortPlan, told: GraftReport, layout: Layout | None = None, proof: Proof | None = None) -> PortReport:
    """The report of a graft of stored leaves as that of the port."""
    made: dict[str, tuple[str, str, str]] = {}
    unproven = []
    for pair in plan.pairs:
        for move in pair.moves:
            rule = plan.rule(pair, move)
            sources = [plan.source.text(pair.source.leaves[name]) for name in move.sources]
            steps = " → ".join(_step_text(step) for step in rule.get("do", ()))
            for name in move.targets:
                path = plan.target.text(pair.target.leaves[name])
                note = plan.notes.get(path, "")
                made[path] = ", ".join(sources), "; ".join(filter(None, (steps, note))), pair.by
                if pair.by == "number":
                    unproven.append(path)
    rows = {name: list(getattr(told, name)) for name in ("copied", "fresh", "mismatched", "unused")}
    for place, row in enumerate(rows["copied"]):
        source, steps, by = made.get(row.path, (row.source, "", ""))
        did = "; ".join(filter(None, (steps or row.did, f"by {by}" * bool(by))))
        cast_ = "" if not steps or "cast" not in row.did else row.did.removeprefix("copied, ")
        rows["copied"][place] = replace(row, source=source, did="; ".join(filter(None, (did, cast_))))
    rows["unused"] += [_left_row(plan, number) for number in plan.left_behind()]
    if told.refused:
        rows["fresh"] = [
            _row(plan.target, n, "nothing in the source") for unit in plan.lone[1] for n in unit.leaves.values()
        ]
    both = [(pair.target.path, pair.target.module, pair.source.module) for pair in plan.pairs]
    beside = differences([row for row in both if None not in row], (plan.target.modules, plan.source.modules))
    warnings = [*beside, *(f"{path}: {note}" for path, note in plan.notes.items())]
    return PortReport(**rows, refused=told.refused, layout=layout, warnings=warnings, unproven=unproven, proof=proof)


def _left_row(plan: PortPlan, number: int) -> GraftRow:
    behind = {n for unit in plan.left for n in unit.leaves.values()}
    did = (
        "left behind by `rename`"
        if number in behind
        else "not a parameter"
        if number not in plan.source.names
        else "no such leaf in the target"
    )
    return _row(plan.source, number, did)


def _row(model: Model, number: int, did: str) -> GraftRow:
    path, spec = model.text(number), model.spec(number)
    return GraftRow(path, None, spec.shape, None, spec.dtype, None, did)


def _step_text(step: Mapping[str, Any] | str) -> str:
    if isinstance(step, str):
        return step
    ((name, args),) = step.items()
    if isinstance(args, list):
        return f"{name} {args}"
    shown = args.get("shape") or args.get("parts") or args.get("sizes")
    return f"{name} {shown}" if shown else name
