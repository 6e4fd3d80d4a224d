"""Ports: a model takes the parameters of a model of another framework, layer by layer, and a report says how."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from paramend.checkpoints.assemble import assemble
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.memory import editable
from paramend.edits.plan import call
from paramend.edits.weights import Weights, weighed
from paramend.errors import PortRefused
from paramend.grafting.graft import graft_
from paramend.grafting.report import GraftReport, GraftRow
from paramend.leaves.groups import may_hold_groups
from paramend.leaves.paths import labels
from paramend.leaves.specs import AnyTree
from paramend.mapping.layout import Layout
from paramend.pages.page import Page
from paramend.porting.models import Model, Unit
from paramend.porting.plan import PortPlan, Renames, Rules
from paramend.porting.proof import Proof
from paramend.porting.settings import differences
from paramend.porting.trial import carried, stored, tried
from paramend.quantizing.dequantizing import dequantize
from paramend.reports import wording
from paramend.reports.fields import picked
from paramend.reports.report import Report

T = TypeVar("T")


@dataclass(repr=False)
class PortReport(GraftReport):
    """Which leaves of the target were made of which leaves of the source, by which rule, and why these are one.

    The four lists of rows are those of a graft: `copied`, `fresh`, `mismatched`, `unused`. Paths of rows are those of
    the target, in `unused` those of the source.

    Attributes:
        layout: the map from the source to the target: it can be saved, applied to any checkpoint of the same model, and
            reversed.
        warnings: what differs beside parameters, with numbers, and what was assumed.
        unproven: the paths of the leaves that rest on the numbers in their names alone, or on features that are taken
            to be flattened.
        proof: the proof that both models compute the same, if `prove=` was given.
    """

    layout: Layout | None = None
    warnings: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    proof: Proof | None = None

    def headline(self) -> str:
        """The summary in one sentence."""
        said = super().headline().replace("graft", "port", 1)
        if self.unproven and self.proof is None and not self.refused:
            said += (
                f"; {wording.plural(len(self.unproven), 'leaf rests', 'leaves rest')} on the numbers in names alone, "
                "which follow construction and not calls, or on an assumption: prove=(x,) proves them"
            )
        return said if self.proof is None else f"{said}; {self.proof.headline()}"

    def __str__(self) -> str:
        text = Report.__str__(self)
        warnings = "".join(f"\n  {each}" for each in self.warnings)
        return f"{text}\n\nwarnings: {len(self.warnings)}{warnings}" if warnings else text

    def page(self) -> Page:
        """The page of the graft."""
        return replace(super().page(), title="port")

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        layout = None if self.layout is None else self.layout.to_data()
        return super().to_dict() | picked(self, "warnings", "unproven") | {"layout": layout} | picked(self, "proof")


def reported(plan: PortPlan, told: GraftReport, layout: Layout | None = None, proof: Proof | None = None) -> PortReport:
    """The report of a graft of stored leaves as that of the port."""
    made: dict[str, tuple[str, str, str]] = {}
    for pair in plan.pairs:
        for move in pair.moves:
            sources = ", ".join(plan.source.text(pair.source.leaves[name]) for name in move.sources)
            steps = " → ".join(_said(step) for step in plan.rule(pair, move).get("do", ()))
            for path in (plan.target.text(pair.target.leaves[name]) for name in move.targets):
                made[path] = sources, "; ".join(filter(None, (steps, plan.notes.get(path, "")))), pair.by
    copied = []
    for row in told.copied:
        source, steps, by = made.get(row.path, (str(row.source), "", ""))
        cast = row.did.removeprefix("copied, ") * ("cast" in row.did)
        said = (steps, f"by {by}", cast) if steps else (row.did, f"by {by}")
        copied.append(replace(row, source=source, did="; ".join(filter(None, said))))
    unused = [*told.unused, *(_row(plan.source, number, _why(plan, number)) for number in plan.left_behind())]
    lone = [number for unit in plan.lone[1] for number in unit.leaves.values()]
    fresh = [*told.fresh, *(_row(plan.target, number, "nothing in the source") for number in lone)]
    both = [(pair.target.path, pair.target.module, pair.source.module) for pair in plan.pairs]
    beside = differences([row for row in both if None not in row], (plan.target.modules, plan.source.modules))
    return PortReport(
        copied,
        fresh,
        told.mismatched,
        unused,
        told.refused,
        layout=layout,
        warnings=[*beside, *(f"{path}: {note}" for path, note in plan.notes.items())],
        unproven=[path for path, (*_, by) in made.items() if not proof and (by == "number" or path in plan.assumed)],
        proof=proof,
    )


def _why(plan: PortPlan, number: int) -> str:
    if number in {n for unit in plan.left for n in unit.leaves.values()}:
        return "left behind by `rename`"
    return "no such leaf in the target" if number in plan.source.names else "not a parameter"


def _row(model: Model, number: int, did: str) -> GraftRow:
    return GraftRow.of(model.text(number), model.leaves.spec(number), did)


def _said(step: Mapping[str, Any]) -> str:
    """A step in a few words."""
    ((name, args),) = step.items()
    shown = args if isinstance(args, list) else args.get("shape") or args.get("parts") or args.get("sizes")
    return f"{name} {shown}" if shown else name


def refusal(plan: PortPlan) -> PortRefused:
    """The error for what a port does not guess, with the candidates and what to type."""
    blocks = ["the source cannot be ported to the target, and nothing was changed"]
    for ours, theirs in plan.doubtful:
        counts = wording.plural(len(ours), "layer"), wording.plural(len(theirs), "layer")
        blocks.append(f"{counts[0]} of the source fit {counts[1]} of the target in several ways:")
        blocks[-1] += f"\n  {_listed(ours)}\n  {_listed(theirs)}"
    blocks += [f"the layout of {path} is not known: {why}" for path, (why, _) in plan.questions.items()]
    places = "of the source has no place in the target", "of the target has nothing in the source"
    for units, said in zip(plan.lone, places, strict=True):
        if units:
            blocks.append(f"what {said}:\n" + "\n".join(f"  {unit}" for unit in units))
    names = [[["/".join(unit.path) for unit in units] for units in pair] for pair in plan.doubtful]
    candidates = [(ours, theirs) for ours, theirs in names]
    renames = {old: new for ours, theirs in candidates for old, new in zip(ours, theirs, strict=False)}
    rules = {path: [step.to_data() for step in ways[-1]] for path, (_, ways) in plan.questions.items()}
    hints = [f"rename={renames}, with the right pairs"] * bool(renames)
    hints += [f"rules={rules}, with what is right"] * bool(rules)
    hints += ["prove=(x,) finds it out, where both models run"] * bool(hints)
    hint = "\n      ".join(hints) or 'rename={"layer/of/source": "layer/of/target"}; None leaves it behind'
    report = reported(plan, GraftReport(refused=True))
    return PortRefused("\n\n".join(blocks), report=report, candidates=candidates, hint=hint)


def _listed(units: list[Unit]) -> str:
    return wording.listing([str(unit).replace("  ", " ") for unit in units], 12)


def port(
    target: T, source: AnyTree, *, rename: Renames | None = None, rules: Rules | None = None, prove: object = None
) -> tuple[T, PortReport]:
    """The target with the parameters of a source of another framework, and a report.

    Layers are matched by name, by shape and kind, by the order of their calls where both models run, and last by the
    numbers in their names. What could be paired in several ways is refused. Values arrive in the library, on the
    device and in the dtype of the target.

    Args:
        target: a torch, NNX or Equinox module, a linen module with its variables (`module.bind(variables)`), or the
            parameters alone: linen variables, Haiku params, a state dict, an NNX State, a checkpoint from `pm.open`.
        source: the same. Quantised weights are decoded.
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
    >>> layers = torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(4, 2, bias=False)
    >>> torch_model = torch.nn.Sequential(*layers)
    >>> shapes = {"Dense_0": (3, 4), "Dense_1": (4, 2)}
    >>> params = {name: {"kernel": np.zeros(shape, "float32")} for name, shape in shapes.items()}
    >>> tree, report = port(params, torch_model)
    >>> np.array_equal(tree["Dense_1"]["kernel"], torch_model[1].weight.detach().numpy().T)
    True
    >>> print(report)
    port: 2 of 2 leaves copied, 20 of 20 parameters; 0 leaves of the source unused
    <BLANKLINE>
    copied: 2 leaves
      Dense_0/kernel ◄─ 0.weight  float32[3,4]  transpose [1, 0]; by shape
      Dense_1/kernel ◄─ 1.weight  float32[4,2]  transpose [1, 0]; by shape
    """
    plan, proof = _planned(Model(target), _weights(source), rename, rules, prove)
    layout = plan.layout()
    made, told = carried(plan.target, plan.source, layout)
    return cast(T, made), reported(plan, told, layout, proof)


def port_(
    module: AnyTree, source: AnyTree, *, rename: Renames | None = None, rules: Rules | None = None, prove: object = None
) -> PortReport:
    """The report of a port in place: a torch or NNX module takes the parameters of a source of another framework.

    Args:
        module: what to change.
        source, rename, rules, prove: as in `port`.

    Raises:
        PortRefused: as in `port`. Nothing was changed.

    >>> import torch
    >>> module = torch.nn.Linear(2, 1)
    >>> report = port_(module, {"kernel": np.array([[1.0], [2.0]]), "bias": np.array([3.0])})
    >>> module.weight.tolist(), module.bias.tolist()
    ([[1.0, 2.0]], [3.0])
    """
    plan, proof = _planned(Model(module), _weights(source), rename, rules, prove)
    layout = plan.layout()
    return reported(plan, graft_(plan.target.tree, stored(plan.source, layout)), layout, proof)


def port_on_disk(target: Any, source: Checkpoint, *, rename: Renames | None = None) -> tuple[Checkpoint, PortReport]:
    """A checkpoint with the names, shapes and dtypes of a target in memory, and a report; nothing is read before it is
    saved."""
    plan, _ = _planned(Model(target), _weights(source), rename, None, None)
    layout, like = plan.layout(), plan.target
    made = stored(plan.source, layout)
    numbers = {made.index.pieces(number): number for number in made.index.numbers}
    rows, fresh = [], []
    for number in like.leaves.index.numbers:
        here, spec = numbers.get(like.leaves.index.pieces(number)), like.leaves.spec(number)
        path = like.text(number)
        if here is None:
            fresh.append(GraftRow.of(path, spec, "not a parameter: left out of the file"))
            continue
        was = made.spec(here)
        did = "copied" if was.dtype == spec.dtype else f"copied, cast from {was.dtype}"
        rows.append((here, spec, GraftRow.of(path, spec, did, path, was, taken=spec.size)))
    casts = {here: call("cast", {"dtype": spec.dtype}) for here, spec, row in rows if row.did != "copied"}
    made = made.edited(casts) if casts else made
    picks = [(labels(row.path), (made, here)) for here, _, row in rows]
    return assemble(made, picks), reported(plan, GraftReport([row for *_, row in rows], fresh), layout)


def _weights(source: Any) -> Model:
    """A source; where it has quantised weights, these as floats."""
    model = Model(source)
    if model.bound or not may_hold_groups(model.leaves) or not isinstance(weighed(editable(source)), Weights):
        return model
    return Model(dequantize(source, dtype="float32")[0])


def _planned(
    target: Model, source: Model, rename: Renames | None, rules: Rules | None, inputs: Any
) -> tuple[PortPlan, Proof | None]:
    """The plan of a port without questions, and its proof; `PortRefused` if the models do not compute the same."""
    if inputs is None:
        plan, proof = PortPlan(target, source, rename, rules), None
    else:
        plan, proof = tried(target, source, rename, rules, inputs)
    if plan.doubtful or plan.questions or any(plan.lone):
        raise refusal(plan)
    if proof is not None and not proof:
        report = reported(plan, GraftReport(refused=True), plan.layout(), proof)
        beside = "".join(f"\n  {each}" for each in report.warnings)
        raise PortRefused(
            f"with the same parameters the two models do not compute the same, and nothing was changed\n\n{proof}"
            + f"\n\nwhat differs beside parameters:{beside}" * bool(beside),
            report=report,
            hint="rename={...} if layers are paired wrongly; else correct the model",
        )
    return plan, proof
