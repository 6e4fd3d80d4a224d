"""The state of an `nnx.Optimizer` carried over from an earlier one, in place."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from paramend.errors import Unsupported
from paramend.freezing.places import dtype_of
from paramend.grafting.numbers import Counted
from paramend.grafting.report import GraftReport, GraftRow, refuse_left
from paramend.grafting.states.carry_optax import carried
from paramend.grafting.states.moments import Survey
from paramend.leaves.leaves import Editable
from paramend.leaves.specs import Spec
from paramend.reports.wording import described


def is_optimizer(optimizer: Any) -> bool:
    """Whether this is an optimizer of NNX."""
    return isinstance(optimizer, nnx.Optimizer)


def carry_optimizer_(optimizer: Any, old: Any, unused: str) -> GraftReport:
    """The report, after the optimizer has taken over what the earlier one has under the same names."""
    survey = Survey.of(Counted(optimizer.opt_state))
    state, step = _parts(old)
    new, report = carried(optimizer.opt_state, state, {*survey.parameters, *survey.absent}, "error")
    refuse_left(report, unused)
    ours = optimizer.step.get_raw_value()
    if step is None:
        report.fresh.append(GraftRow.of("step", Spec((), str(ours.dtype)), "nothing in the earlier state"))
    else:
        step = step.get_raw_value() if isinstance(step, nnx.Variable) else step
        mine, theirs = Spec((), str(ours.dtype)), Spec((), str(dtype_of(step)))
        optimizer.step.set_raw_value(jnp.asarray(step, ours.dtype))
        report.copied.append(GraftRow.of("step", mine, "copied", "step", theirs, taken=1))
    jax.tree.map(
        lambda variable, value: variable.set_raw_value(value.get_raw_value()),
        optimizer.opt_state,
        new,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    return report


def _parts(old: Any) -> tuple[Any, Any]:
    """The state of optax in an earlier optimizer, its State or a file of it; and the step, if it is there."""
    if isinstance(old, nnx.Optimizer):
        return old.opt_state, old.step
    if isinstance(old, Editable):
        found = {old.index.pieces(number): old.read(number) for number in old.index.numbers}
        inner = {"/".join(path[1:]): value for path, value in found.items() if path[0] == "opt_state"}
        return inner or {"/".join(path): value for path, value in found.items()}, found.get(("step",))
    if isinstance(old, nnx.State | Mapping):
        return (old["opt_state"], old.get("step")) if "opt_state" in old else (old, None)
    if isinstance(old, tuple):
        return old, None
    raise Unsupported(
        f"the earlier state is neither an nnx.Optimizer nor the state of one, but {described(old)}",
        hint="pm.graft_optimizer_(optimizer, old_optimizer), or nnx.state(old_optimizer) as it was saved",
    )
