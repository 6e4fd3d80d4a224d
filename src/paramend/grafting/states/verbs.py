"""Optimizer states that follow a model: by the report of a graft, or by the names of their parameters."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from paramend._optional import imported, need
from paramend.edits.subjects import barren
from paramend.errors import BadArgument, Unsupported
from paramend.grafting import engine
from paramend.grafting.numbers import Counted
from paramend.grafting.options import Options, Unused
from paramend.grafting.report import GraftReport, refuse_left
from paramend.grafting.states.widened import widened, widened_torch
from paramend.leaves.specs import AnyTree
from paramend.reports.wording import described
from paramend.resize.widths import Widths
from paramend.trees.tree import Tree

if TYPE_CHECKING:
    import torch
    from flax import nnx

T = TypeVar("T")
Carried: TypeAlias = Literal["error", "keep"]


def graft_opt_state(
    state: T,
    old_state: AnyTree,
    report: GraftReport | Widths | None = None,
    *,
    unused: Unused | None = None,
    mismatch: Carried = "error",
) -> tuple[T, GraftReport]:
    """The optimizer state with the moments of an earlier one, which follow their parameters, and a report.

    **After a graft**, by its report: the moments of a copied parameter are copied; if only the common corner was
    copied, so is theirs; if the parameter stayed fresh, or was frozen before, they are as `tx.init` made them. Counts
    go on, so schedules do too; hyperparameters of `optax.inject_hyperparams` stay those of the new state. All moments
    of a parameter are carried together or not at all.

    **After `pm.widen` or `pm.narrow`**, by its report: the parameters have the same paths, and moments the shapes of
    the new ones. They follow the gradients: of places that have k copies, first moments are divided by k and second
    ones by k², and those of what reads the copies stay, so that a step after the growth is the growth of a step, if
    rates follow `row.rate`. The first moments of new places are zero.

    **Without a report** the parameters are the same, by path: for thawing, refreezing and resuming. The earlier state
    may be that of `tx` before it was wrapped in `pm.freeze`, or of a `pm.freeze` of other leaves, or be part of another
    chain, or come from a file as dicts and lists.

    - The moments of every leaf that both have are carried bit for bit. Those that only the new state has are as
      `tx.init` made them; those that only the earlier state has are left out.
    - Counts, schedules and injected hyperparameters go on. So does the step of `until=` and `since=`; it is 0 if the
      earlier state had none.

    Args:
        state: the state to start warm, from `tx.init(params)` of the new parameters: of optax, also under `pm.freeze`,
            or an `nnx.Optimizer`.
        old_state: the state of the earlier run, of the same kind of optimizer; it may be read from a file.
        report: the report of `pm.graft`, `pm.widen` or `pm.narrow` on the parameters; None if their names are the same.
        unused: when the earlier state has moments with no place here: "error" or "ok". The default is "error" after a
            graft, and "ok" without a report.
        mismatch: without a report, when a moment does not have the shape that `tx.init` gave it: "error"; "keep" keeps
            the one that `tx.init` made.

    Returns:
        A new state, and the report, whose rows are the leaves of the state.

    Raises:
        GraftRefused: the states are of different optimizers, or the report does not cover these parameters; or moments
            are left over, and `unused="error"`.
        SpecMismatch: without a report, shapes differ; all of them are named.
        BadArgument: nothing in the earlier state belongs to this optimizer.
        Unsupported: the first argument is not an optimizer state.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.adam(1e-3)
    >>> old, new = {"a": jnp.ones(2)}, {"b": jnp.ones(2), "c": jnp.ones(3)}
    >>> _, old_state = tx.update(old, tx.init(old))
    >>> from paramend.grafting.graft import graft
    >>> params, report = graft(new, old, rename={"a": "b"})
    >>> state, report = graft_opt_state(tx.init(params), old_state, report)
    >>> state[0].mu["b"], state[0].mu["c"], int(state[0].count)
    (Array([0.1, 0.1], dtype=float32), Array([0., 0., 0.], dtype=float32), 1)
    """
    Options(unused=unused or "error")  # checks it
    if isinstance(report, Widths):
        old_state, report = widened(old_state, report), None
    if not isinstance(report, GraftReport | None):
        raise BadArgument(
            f"the third argument must be the report of a graft, and this is {described(report)}",
            hint="state, report = pm.graft_opt_state(tx.init(params), old_state)",
        )
    if report is None:
        return _by_path(state, old_state, unused or "ok", mismatch)
    if mismatch != "error":
        raise BadArgument("the report of a graft says what becomes of each shape", hint="mismatch= goes to pm.graft")
    unused = unused or "error"
    _refuse_barren(state, old_state)
    tree = Counted(state)
    from paramend.grafting.states.graft_optax import graft_state  # imports jax

    new, done = graft_state(tree, engine.leaves_of(old_state), report, unused)
    engine.refuse_abstract(tree, new, done)
    return tree.with_leaves(new), done


def _refuse_barren(*states: Any) -> None:
    """Raise for what users pass in place of an optimizer's state."""
    for state in states:
        what, meant = barren(state) if isinstance(state, tuple | str | type) else ("", "")
        if what:
            raise Unsupported(f"graft_opt_state takes states, and this is {what}", hint=f"pass {meant}")


def _by_path(state: Any, old_state: Any, unused: "Unused", mismatch: str) -> tuple[Any, GraftReport]:
    if mismatch not in ("error", "keep"):
        why = f"mismatch={mismatch!r} is neither 'error' nor 'keep'"
        raise BadArgument(why, hint='pm.graft_opt_state(state, old_state, mismatch="keep")')
    need("optax", extra="jax", to="graft an optimizer state")
    from paramend.grafting.states import carry_optax  # imports jax
    from paramend.grafting.states.moments import Survey

    _refuse_barren(state, old_state)
    tree = Tree(state)
    if hasattr(tree.root, "opt_state"):
        why = f"{described(state)} changes in place, and holds more than a state"
        raise Unsupported(why, hint="pm.graft_optimizer_(optimizer, old_optimizer)")
    survey = Survey.of(tree)
    if tree.values and not survey.roots:
        why = f"{described(state)} is not an optimizer state, as optax builds them"
        raise Unsupported(why, hint="state, report = pm.graft_opt_state(tx.init(params), old_state)")
    new, report = carry_optax.carried(state, old_state, {*survey.parameters, *survey.absent}, mismatch)
    refuse_left(report, unused)
    return new, report


def graft_optimizer_(
    optimizer: "torch.optim.Optimizer | nnx.Optimizer[Any]",
    old: "torch.optim.Optimizer | nnx.Optimizer[Any] | Mapping[str, object]",
    report: GraftReport | Widths | None = None,
    *,
    target: AnyTree | None = None,
    source: AnyTree | None = None,
    names: Sequence[str] | None = None,
    unused: Unused | None = None,
) -> GraftReport:
    """The report of a graft of a torch optimizer's state, or an `nnx.Optimizer`'s, in place.

    **Without a report** the parameters are the same: for thawing, refreezing and resuming, where `load_state_dict`
    needs the same parameters in the same groups and takes moments of any shape. Parameters of two optimizers are
    matched by identity; else by names, if both optimizers know them (`torch.optim.AdamW(model.named_parameters())`) or
    they are given; else, if neither has names, by order, in groups of equal sizes. Moments are copied bit for bit;
    other parameters start in their first step. A group takes the rate and the other hyperparameters of the earlier
    group if all its parameters come from one. L-BFGS has one history for all parameters: it is carried if these are the
    same; else it starts anew. The state of an `nnx.Optimizer` is carried by path, as `pm.graft_opt_state` carries it,
    and its step goes on.

    **After a graft**, by its report: the state of a copied parameter is copied with its step; around a common corner it
    is as the optimizer starts; and a fresh parameter has no state, so it starts with its first step. Groups with their
    hyperparameters stay those of the new optimizer. All or nothing.

    **After `pm.widen` or `pm.narrow`**, by its report, as in `pm.graft_opt_state`; hyperparameters stay the new ones.

    Args:
        optimizer: what to change, made for the parameters of the new module.
        old: the optimizer of the old module, of the same class; or its state dict, if it was made of
            `named_parameters()`; of an `nnx.Optimizer` also `nnx.state(old)`, a dict or a file of it.
        report: the report of `pm.graft_(module, old_module)`, `pm.graft`, `pm.widen` or `pm.narrow`; None if the
            parameters are the same.
        target: the new module, if the report does not know it: after pickling, or after a graft of a state dict.
            Without a report, the module that names the parameters of `optimizer`.
        source: the old module, likewise, which names those of `old` if that is an optimizer.
        names: without a report, the names of the parameters of `old`, in their order.
        unused: when `old` has moments with no place here: "error" or "ok". The default is "error" after a graft, and
            "ok" without a report.

    Returns:
        The report, whose rows are the moments: `fc.weight.exp_avg`.

    Raises:
        GraftRefused: the optimizers are of different kinds.
        SpecMismatch: without a report, moments do not have the shape of their parameter; nothing was changed.
        BadArgument: no parameters match, or it is ambiguous which do: only one side has names, or groups differ.
        Unsupported: after a graft, L-BFGS, which has one history of all parameters together; or not an optimizer.

    >>> import torch
    >>> small, big = torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> old = torch.optim.AdamW(small.parameters())
    >>> small(torch.ones(1, 2)).sum().backward()
    >>> old.step()
    >>> from paramend.grafting.graft import graft_
    >>> report = graft_(big, small, rename={"**": "0/**"})
    >>> new = torch.optim.AdamW(big.parameters(), lr=1e-4)
    >>> print(graft_optimizer_(new, old, report).headline())
    graft: 6 of 8 leaves copied, 14 of 17 parameters; 0 leaves of the source unused
    """
    Options(unused=unused or "error")  # checks it
    if isinstance(report, Widths):
        return _wider_(optimizer, old, report, (target, source), unused or "ok")
    if report is None:
        return _by_name_(optimizer, old, (target, source), names, unused or "ok")
    unused = unused or "error"
    if hasattr(optimizer, "param_groups") and not isinstance(optimizer, type):
        from paramend.grafting.states import graft_torch as adapter  # imports torch

        ends = getattr(report, "ends", None)
        new = target if target is not None or ends is None else ends.target
        earlier = source if source is not None or ends is None else ends.source
        return adapter.graft_optimizer_(optimizer, old, report, new, earlier, unused)
    tree = Counted(optimizer)
    from paramend.grafting.states.graft_optax import graft_state  # imports jax

    values, done = graft_state(tree, engine.leaves_of(old), report, unused)
    engine.put_in(tree, values)
    return done


def _by_name_(
    optimizer: Any, old: Any, modules: tuple[Any, Any], names: Sequence[str] | None, unused: Unused
) -> GraftReport:
    if imported("flax.nnx"):
        from paramend.grafting.states import carry_nnx  # imports flax

        if carry_nnx.is_optimizer(optimizer):
            return carry_nnx.carry_optimizer_(optimizer, old, unused)
    if not hasattr(optimizer, "param_groups") or isinstance(optimizer, type):
        why = f"graft_optimizer_ takes an optimizer of torch or NNX, and this is {described(optimizer)}"
        raise Unsupported(why, hint="for optax: state, report = pm.graft_opt_state(tx.init(params), old_state)")
    if not hasattr(old, "param_groups") and not (isinstance(old, dict) and {"state", "param_groups"} <= old.keys()):
        why = f"the earlier state is neither a torch optimizer nor the state dict of one, but {described(old)}"
        raise Unsupported(why, hint="pm.graft_optimizer_(optimizer, old), or old.state_dict() as it was saved")
    from paramend.grafting.states import graft_torch  # imports torch

    return graft_torch.carry_optimizer_(optimizer, old, modules, names, unused)


def _wider_(optimizer: Any, old: Any, report: Widths, modules: tuple[Any, Any], unused: Unused) -> GraftReport:
    if not hasattr(optimizer, "param_groups"):
        return _by_name_(optimizer, widened(old, report), modules, None, unused)
    ends = (None, None) if report.ends is None else (report.ends.target, report.ends.source)
    target, source = (given if given is not None else known for given, known in zip(modules, ends, strict=True))
    settings = [dict(group) for group in optimizer.param_groups]
    done = _by_name_(optimizer, widened_torch(old, report, source), (target, None), None, unused)
    for group, mine in zip(optimizer.param_groups, settings, strict=True):
        group.update(mine)
    return done
