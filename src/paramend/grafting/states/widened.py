"""Earlier states of optimizers as if the model had always been as wide as it is now: moments follow its gradients."""

from collections.abc import Mapping
from typing import Any

from paramend.errors import BadArgument, Unsupported
from paramend.grafting.numbers import Counted
from paramend.leaves.leaves import Editable
from paramend.resize.widths import Growth, Widths
from paramend.trees.tree import Tree

# Moments that grow with the gradient, and with its square. Those of other names may be either, or grow with the steps.
_FIRST = {"mu", "m", "trace", "momentum", "exp_avg", "momentum_buffer", "exp_inf", "grad_avg", "grads", "acc"}
_SECOND = {"nu", "nu_max", "v", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "sum_of_squares", "e_g"}


def widened(state: Any, report: Widths) -> Any:
    """A state of optax, or of an `nnx.Optimizer`, with moments of the shapes of the new parameters."""
    from paramend.grafting.states.carry_optax import split  # imports jax

    if hasattr(state, "opt_state"):  # an nnx.Optimizer
        return {"opt_state": widened(state.opt_state, report), "step": state.step}
    if isinstance(state, Editable):
        state = {state.index.name(number): state.read(number) for number in state.index.numbers}
    _check(report)
    growths = {path[1:]: each for path, each in report.growths.items() if path[0] == "params"} | report.growths
    tree = Counted(state)
    made = {}
    for number in tree.index.numbers:
        head, param = split(tree.index.pieces(number), set(growths))
        if param:
            made[number] = _moment(head[-1] if head else "", tree.read(number), growths[param])
    return Tree(state).with_leaves(made)


def widened_torch(old: Any, report: Widths, module: Any) -> dict[str, Any]:
    """The state dict of a torch optimizer, with names, and with moments of the shapes of the new parameters."""
    from paramend.grafting.states.graft_torch import (
        entries,
        names_of,  # imports torch
    )

    _check(report)
    groups = old["param_groups"] if isinstance(old, Mapping) else old.param_groups
    names = names_of(groups, module)
    if not names:
        why = "it is unknown which parameters the earlier state belongs to: it has no names"
        raise BadArgument(why, hint="pm.graft_optimizer_(optimizer, old, report, source=old_module)")
    states: dict[int, dict[str, Any]] = {}
    places = iter(range(len(names)))
    numbers = [[next(places) for _ in group["params"]] for group in groups]
    pairs = zip(groups, numbers, strict=True)
    named = [{**group, "params": mine, "param_names": [names[place] for place in mine]} for group, mine in pairs]
    for place, entry in enumerate(entries(old)):
        grown = report.growths.get(tuple(str(names[place]).split(".")))
        states[place] = {key: _moment(key, value, grown) for key, value in entry.state.items()}
    return {"state": states, "param_groups": named}


def _check(report: Widths) -> None:
    if report.moved:
        raise Unsupported(
            "layers are left out, so that leaves have other paths",
            hint="pm.deepen leaves layers out by itself: its report has `rename` for pm.graft_opt_state",
        )


def _moment(name: str, value: Any, grown: Growth | None) -> Any:
    """A moment of a parameter that grew; what has another shape than the parameter had stays as it is."""
    if grown is None or not grown.shape or tuple(getattr(value, "shape", ())) != grown.shape:
        return value
    if name not in _FIRST | _SECOND:
        why = f"how {name} of a parameter follows when that grows is not known"
        raise Unsupported(why, hint="start a new optimizer; its first steps are larger")
    return grown.moment(value, squared=name in _SECOND)
