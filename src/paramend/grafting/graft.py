"""Grafts: a model starts from the leaves of another, and a report says which is which.

A graft is planned from names and specs; if nothing stands against it, every new value is made; only then does anything
change. So a refused graft changes nothing.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from paramend.errors import Unsupported
from paramend.leaves.leaves import Editable
from paramend.trees.tree import Tree

if TYPE_CHECKING:
    from paramend.grafting.options import Dtype, Mismatch, Missing, Place, Renames, Unused
    from paramend.grafting.report import GraftReport
    from paramend.resize.rules import Resize

T = TypeVar("T")


def graft(
    target: T,
    source: Any,
    *,
    rename: "Renames | None" = None,
    only: Any = "**",
    mismatch: "Mismatch | Mapping[Any, Mismatch]" = "error",
    place: "Place | Mapping[Any, Place]" = "corner",
    resize: "Mapping[Any, Resize] | None" = None,
    unused: "Unused" = "error",
    missing: "Missing" = "fresh",
    dtype: "Dtype" = "target",
) -> "tuple[T, GraftReport]":
    """The target with the values of the source where their names agree, and the report of it.

    Names are compared piece by piece: `fc.weight` in a state dict is fc → weight in a module. Values arrive in the
    library, on the device, in the sharding, container and (unless told otherwise) dtype of the target; tied leaves stay
    tied.

    Args:
        target: the tree to start warm: nested dicts, Flax, NNX, Equinox or torch modules, train states, state dicts; or
            a checkpoint as `pm.open` gives it: then a checkpoint comes back, to be written by its `.save(out)`. Leaves
            may be abstract, as `jax.eval_shape(model.init, ...)`, `nnx.eval_shape` or torch's meta device give them:
            then each must get its values from the source, and memory holds the model once.
        source: the tree to start from, of any of these kinds, or a checkpoint as `pm.open` gives it.
        rename: source pattern → target path, as in `{"h/<n>/**": "layers/<n>/**"}`. Of several rules that match a leaf
            the first counts; a leaf that none matches keeps its name. All names change at once, so that rules may
            rotate or swap. An index counts in the tree on whose side it stands:
            `{"Dense_[-1]/**": "Dense_[-1]/**"}` takes the last layer to the last. None instead of a path leaves a
            source leaf behind, on purpose.
        only: a selector over the target. Other leaves stay as they are, and source leaves for them are left behind.
        mismatch: when shapes differ: "error"; "keep" leaves the target's leaf as it is; "overlap" copies what both have
            room for and leaves the rest as it is; "resize" makes a value of the target's shape by the rule of
            `pm.resize` that the leaf's name and shapes speak for, and refuses where they leave doubt. Or selector →
            one of these, for leaves of the target: the first that matches counts, and other leaves are as by "error".
        place: where leaves overlap: in the "corner" where indices begin; in the "center", the smaller half of an odd
            difference before; or as a "tile" that is repeated to fill the target. Or selector → one of these, which
            asks for "overlap" there.
        resize: selector → rule of `pm.resize`, which asks for "resize" there. It comes before `place` and `mismatch`.
        unused: when a source leaf goes nowhere: "error" or "ok".
        missing: when a target leaf has no source: "fresh" leaves it as it is; "error".
        dtype: when dtypes differ: "target" converts to the target's, and values that overflow or are lost are counted;
            "source" takes the source's dtype over; "error".

    Returns:
        A new tree of the target's type, and the report. Leaves that were not grafted are the same objects.

    Raises:
        GraftRefused: the two do not fit, nothing at all would be copied, or an abstract leaf would get no values; every
            case is listed, and `report` on the error tells of every leaf. Nothing was changed.

    >>> small = {"Dense_0": {"kernel": np.ones((2, 2))}, "Dense_1": {"kernel": np.full((2, 1), 5.0)}}
    >>> big = {f"Dense_{i}": {"kernel": np.zeros((2, 1 if i == 2 else 2))} for i in range(3)}
    >>> tree, report = graft(big, small, rename={"Dense_[-1]/**": "Dense_[-1]/**"})
    >>> tree["Dense_2"]["kernel"].ravel()
    array([5., 5.])
    >>> print(report)
    graft: 2 of 3 leaves copied, 6 of 10 parameters; 0 leaves of the source unused
    <BLANKLINE>
    copied: 2 leaves
      Dense_0/kernel                    float64[2,2]  copied
      Dense_2/kernel ◄─ Dense_1/kernel  float64[2,1]  copied
    <BLANKLINE>
    fresh: 1 leaf
      Dense_1/kernel  float64[2,2]  nothing in the source
    """
    work = _work()
    tree, leaves = _leaves(target), _leaves(source)
    options = work.Options(rename, only, mismatch, place, resize, unused, missing, dtype)
    done = _with_states(tree, leaves, options)
    if done is not None:
        return tree.with_leaves(done.values), done.report
    plan = work.planned(tree, leaves, options)
    if not isinstance(tree, Tree):
        return importlib.import_module("paramend.grafting.checkpoints").grafted(plan), plan.report()
    new, report = tree.with_leaves(work.values(plan)), plan.report()
    report.ends = work.Ends(new, source)
    return new, report


def graft_(
    module: Any,
    source: Any,
    *,
    rename: "Renames | None" = None,
    only: Any = "**",
    mismatch: "Mismatch | Mapping[Any, Mismatch]" = "error",
    place: "Place | Mapping[Any, Place]" = "corner",
    resize: "Mapping[Any, Resize] | None" = None,
    unused: "Unused" = "error",
    missing: "Missing" = "fresh",
    dtype: "Dtype" = "target",
) -> "GraftReport":
    """The report of a graft in place: a torch or NNX module, or a tree of numpy arrays, takes values of the source.

    Parameters stay the objects that they are, so that optimizers go on working. All or nothing: on an error the module
    is as it was.

    Args:
        module: what to change.
        source: the tree to start from, of any kind.
        rename: as in `graft`.
        only: as in `graft`.
        mismatch: as in `graft`.
        place: as in `graft`.
        resize: as in `graft`.
        unused: as in `graft`.
        missing: as in `graft`.
        dtype: as in `graft`.

    Raises:
        GraftRefused: the two do not fit; every case is listed. Nothing was changed.

    >>> weights = {"w": np.zeros(2)}
    >>> report = graft_(weights, {"w": np.ones(2)})
    >>> weights["w"], [row.path for row in report.copied]
    (array([1., 1.]), ['w'])
    """
    work = _work()
    if isinstance(module, Editable):
        raise Unsupported(
            "the files of a checkpoint are not grafted in place",
            hint="tree, report = pm.graft(target, source); tree.save(out)",
        )
    tree, leaves = Tree(module), _leaves(source)
    options = work.Options(rename, only, mismatch, place, resize, unused, missing, dtype, in_place=True)
    done = _with_states(tree, leaves, options)
    if done is not None:
        _assign(tree, done.values)
        return done.report  # type: ignore[no-any-return]
    plan = work.planned(tree, leaves, options)
    work.assign(tree, work.values(plan))
    report: GraftReport = plan.report()
    report.ends = work.Ends(module, source)
    return report


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
    >>> params, report = graft(new, old, rename={"a": "b"})
    >>> state, report = graft_opt_state(tx.init(params), old_state, report)
    >>> state[0].mu["b"], state[0].mu["c"], int(state[0].count)
    (Array([0.1, 0.1], dtype=float32), Array([0., 0., 0.], dtype=float32), 1)
    """
    _work().Options(unused=unused)  # checks it
    tree = Tree(state)
    done = importlib.import_module("paramend.grafting.states.graft_optax").graft_state(
        tree, _leaves(old_state), report, unused
    )
    _work().refuse_abstract(tree, done.values, done.report)
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
    >>> report = graft_(big, small, rename={"**": "0/**"})
    >>> new = torch.optim.AdamW(big.parameters(), lr=1e-4)
    >>> print(graft_optimizer_(new, old, report).headline())
    graft: 6 of 8 leaves copied, 14 of 17 parameters; 0 leaves of the source unused
    """
    _work().Options(unused=unused)  # checks it
    if hasattr(optimizer, "param_groups") and not isinstance(optimizer, type):
        adapter = importlib.import_module("paramend.grafting.states.graft_torch")
        ends = getattr(report, "ends", None)
        new = target if target is not None or ends is None else ends.target
        earlier = source if source is not None or ends is None else ends.source
        return adapter.graft_optimizer_(optimizer, old, report, new, earlier, unused)  # type: ignore[no-any-return]
    tree = Tree(optimizer)
    done = importlib.import_module("paramend.grafting.states.graft_optax").graft_state(
        tree, _leaves(old), report, unused
    )
    _assign(tree, done.values)
    return done.report  # type: ignore[no-any-return]


def _with_states(tree: Any, source: Any, options: Any) -> Any:
    """What a graft comes to where there are optimizer states in both trees; else None."""
    if isinstance(tree, Tree) and any(
        start < stop and issubclass(kind, tuple) and kind.__module__.startswith("optax.")
        for kind, start, stop in tree.index.spans
    ):
        done = importlib.import_module("paramend.grafting.states.graft_optax").graft_whole(tree, source, options)
        if done is not None:
            _work().refuse_abstract(tree, done.values, done.report)
        return done
    return None


def _assign(tree: Tree, values: dict[int, Any]) -> None:
    for number in values:
        tree.in_place(number)
    _work().assign(tree, dict(values))


def _leaves(tree: Any) -> Any:
    """A checkpoint is leaves already, each read when its turn comes; anything else is a tree in memory."""
    return tree if isinstance(tree, Editable) else Tree(tree)


def _work() -> Any:
    """Opened when first asked for: most programs graft nothing, and all pay for imports."""
    return importlib.import_module("paramend.grafting.engine")
