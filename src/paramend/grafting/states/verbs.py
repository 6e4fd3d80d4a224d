"""Optimizer states that follow a model: by the report of a graft, or by the names of their parameters."""

from collections.abc import Sequence
from typing import Any, TypeVar

from paramend._optional import need
from paramend.errors import BadArgument, Unsupported
from paramend.grafting import engine
from paramend.grafting.options import Options, Unused
from paramend.grafting.report import GraftReport
from paramend.reports.wording import described
from paramend.trees.tree import Tree

T = TypeVar("T")


def graft_opt_state(
    state: T, old_state: Any, report: "GraftReport", *, unused: "Unused" = "error"
) -> "tuple[T, GraftReport]":
    """The optimizer state with the moments of an earlier one, which follow their parameters, and the report of it.

    Where a parameter was copied, its moments are; where the common corner was, theirs is; where it stayed fresh, or was
    frozen before, they are as `tx.init` made them. Counts go on, so that schedules do; hyperparameters of
    `optax.inject_hyperparams` stay those of the new state. All moments of a parameter are carried together or not at
    all.

    A count goes on for fresh parameters too: Adam then no longer corrects their young moments, and their first update
    is (1 - b1) / sqrt(1 - b2) times the rate: 3.2 times it for b2=0.999, 0.4 times for b2=0.95.

    Args:
        state: the state to start warm, as `tx.init(params)` makes it for the new parameters: of optax, also under
            `pm.freeze`, or an `nnx.Optimizer`.
        old_state: the state of the earlier run: of the same kind of optimizer, also read from a file.
        report: what `pm.graft` said of the parameters.
        unused: when the earlier state keeps moments for which there is no place: "error" or "ok".

    Returns:
        A new state, and the report, whose rows are the leaves of the state.

    Raises:
        GraftRefused: the states are of different optimizers, or the report does not tell of these parameters.
        Unsupported: the first argument is no optimizer state.

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
    Options(unused=unused)  # checks it
    tree = Tree(state)
    from paramend.grafting.states.graft_optax import graft_state  # imports jax

    done = graft_state(tree, engine.leaves_of(old_state), report, unused)
    engine.refuse_abstract(tree, done.values, done.report)
    return tree.with_leaves(done.values), done.report


def graft_optimizer_(
    optimizer: Any,
    old: Any,
    report: "GraftReport",
    *,
    target: Any = None,
    source: Any = None,
    unused: "Unused" = "error",
) -> "GraftReport":
    """The report of a graft of a torch optimizer's state, or an `nnx.Optimizer`'s, in place.

    The state of a copied parameter is copied with its step; around a common corner it is as the optimizer starts; and
    a fresh parameter has no state, so that it has a first step of its own. Groups with their hyperparameters stay those
    of the new optimizer. All or nothing.

    Args:
        optimizer: what to change, made for the parameters of the new module.
        old: the optimizer of the old module, of the same class; or its state dict, if it was made of
            `named_parameters()`.
        report: what `pm.graft_(module, old_module)` or `pm.graft` said.
        target: the new module, where the report does not know it: after pickling, or after a graft of a state dict.
        source: the old module, likewise.
        unused: when `old` keeps moments for which there is no place: "error" or "ok".

    Returns:
        The report, whose rows are the moments: `fc.weight.exp_avg`.

    Raises:
        GraftRefused: the optimizers are of different kinds.
        BadArgument: nobody can say which parameters are meant.
        Unsupported: L-BFGS, whose one history is of all parameters together; or no optimizer.

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
    Options(unused=unused)  # checks it
    if hasattr(optimizer, "param_groups") and not isinstance(optimizer, type):
        from paramend.grafting.states import graft_torch as adapter  # imports torch

        ends = getattr(report, "ends", None)
        new = target if target is not None or ends is None else ends.target
        earlier = source if source is not None or ends is None else ends.source
        return adapter.graft_optimizer_(optimizer, old, report, new, earlier, unused)
    tree = Tree(optimizer)
    from paramend.grafting.states.graft_optax import graft_state  # imports jax

    done = graft_state(tree, engine.leaves_of(old), report, unused)
    engine.put_in(tree, done.values)
    return done.report


def carry_opt_state(tx: Any, params: Any, state: Any, *, mismatch: str = "error") -> Any:
    """The state of `tx` for these parameters, in which everything goes on that an earlier state has.

    For thawing, refreezing and resuming: the earlier state may be that of `tx` before it was wrapped in
    `pm.freeze`, or of a `pm.freeze` of other leaves, or be part of another chain, or come from a file as dicts
    and lists.

    - The moments of every leaf that both have are carried bit for bit, by path.
    - The moments of a leaf that the earlier state does not have (None or a `MaskedNode`) are as `tx.init` makes them.
    - Counts, schedules and injected hyperparameters go on. So does the step of `until=` and `since=`; in a state
      that had none, it is 0.
    - What only the earlier state has is left out.

    A moment belongs to the record of fields that it is in, wherever that stands in a chain: where `mu`, `nu` and
    `count` are together, as in Adam, in one place of each state.

    Args:
        tx: the transformation to go on with.
        params: the parameters to go on with.
        state: an earlier state of the same kind of optimizer.
        mismatch: when a moment does not have the shape that `tx.init` gives it: "error"; "keep" keeps what
            `tx.init` made.

    Raises:
        SpecMismatch: shapes differ; all of them are named.
        BadArgument: nothing in the state belongs to this optimizer, or `mismatch` is neither of the two.

    >>> import jax.numpy as jnp, optax
    >>> params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    >>> adam = optax.adam(0.1)
    >>> from paramend.freezing.freeze import freeze
    >>> frozen = freeze(adam, "a")
    >>> _, state = frozen.update(params, frozen.init(params), params)
    >>> thawed = carry_opt_state(adam, params, state)
    >>> thawed[0].count.tolist(), thawed[0].mu["a"].tolist(), bool((thawed[0].mu["b"] > 0).all())
    (1, [0.0, 0.0], True)
    """
    if isinstance(tx, type) or not all(callable(getattr(tx, verb, None)) for verb in ("init", "update")):
        raise Unsupported(
            f"carry_opt_state takes an optax transformation, which has `init` and `update`; this is {described(tx)}",
            hint="pm.carry_opt_state(tx, params, state)",
        )
    if mismatch not in ("error", "keep"):
        raise BadArgument(
            f"mismatch={mismatch!r} is neither 'error' nor 'keep'",
            hint='pm.carry_opt_state(tx, params, state, mismatch="keep")',
        )
    need("optax", extra="jax", to="carry an optimizer state")
    from paramend.grafting.states import carry_optax  # imports jax

    return carry_optax.carry_opt_state(tx, params, state, mismatch)


def carry_optimizer_(optimizer: Any, old: Any, *, module: Any = None, names: Sequence[str] | None = None) -> Any:
    """The same torch optimizer, after it took over what an earlier one has for its parameters.

    For thawing, refreezing and resuming, where `load_state_dict` asks for the same parameters in the same groups and
    takes moments of any shape. Moments of the parameters that both have are copied bit for bit; the others start in
    their first step. A group takes the rate and the other hyperparameters of the earlier group, if all its parameters
    come from one. L-BFGS has one history for all parameters: it is carried if these are the same, or else starts anew.

    Args:
        optimizer: the optimizer to go on with.
        old: an earlier optimizer of the same class, or its state dict. Parameters of an optimizer are matched by
            identity; else by names, if the optimizers know them (`torch.optim.AdamW(model.named_parameters())`) or
            they are given; else by their order, if there are as many.
        module: the module that names the parameters of `optimizer`.
        names: the names of the parameters of `old`, in their order.

    Raises:
        SpecMismatch: moments do not have the shape of their parameter; nothing was changed.
        BadArgument: nothing belongs together, or nobody can say what does.
        Unsupported: no torch optimizer.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    >>> old = torch.optim.AdamW(model[1].parameters(), lr=0.5)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> old.step()
    >>> new = carry_optimizer_(torch.optim.AdamW(model.parameters()), old)
    >>> [int(state["step"]) for state in new.state.values()], new.param_groups[0]["lr"]
    ([1, 1], 0.5)
    """
    if not hasattr(optimizer, "param_groups") or isinstance(optimizer, type):
        raise Unsupported(
            f"carry_optimizer_ takes a torch optimizer, and this is {described(optimizer)}",
            hint="of optax, pm.carry_opt_state(tx, params, state)",
        )
    if not hasattr(old, "param_groups") and not (isinstance(old, dict) and {"state", "param_groups"} <= old.keys()):
        raise Unsupported(
            f"the earlier state is neither a torch optimizer nor the state dict of one, but {described(old)}",
            hint="pm.carry_optimizer_(optimizer, old), or old.state_dict() as it was saved",
        )
    from paramend.grafting.states import carry_torch  # imports torch

    return carry_torch.carry_optimizer_(optimizer, old, module, names)
