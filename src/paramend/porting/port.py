"""Ports: a model takes the parameters of a model of another framework, layer by layer, and a report says how."""

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
from paramend.porting.models import Model
from paramend.porting.plan import PortPlan, Renames, Rules
from paramend.porting.proof import Proof
from paramend.porting.report import PortReport, refusal, reported
from paramend.porting.trial import carried, stored, tried
from paramend.quantizing.dequantizing import dequantize

T = TypeVar("T")


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
