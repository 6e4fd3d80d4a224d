"""The verbs of freezing. The adapter for a framework is imported after checking that the framework is there."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeAlias, TypeVar, get_args

from paramend._optional import need
from paramend.errors import BadArgument, Unsupported
from paramend.freezing.report import FreezeReport, FrozenReport
from paramend.freezing.schedules import When, read_schedule
from paramend.leaves.specs import AnyTree
from paramend.reports import wording
from paramend.reports.wording import described
from paramend.resize.rules import code
from paramend.selectors.selector import SelectorLike, sel, slice_of
from paramend.selectors.slices import write_index
from paramend.trees.lookup import is_torch_module

if TYPE_CHECKING:
    import optax
    import torch
    from flax import nnx

P = ParamSpec("P")
R = TypeVar("R")
How: TypeAlias = Literal["exclude", "updates", "gradients"]
# The path of a Variable, and the Variable.
Filter: TypeAlias = Callable[[tuple[Any, ...], Any], bool]
HOW = get_args(How)


def freeze(
    tx: "optax.GradientTransformation",
    selector: SelectorLike | None = None,
    *,
    how: How = "exclude",
    until: When | None = None,
    since: When | None = None,
) -> "optax.GradientTransformationExtraArgs":
    """A transformation that trains as `tx` does and does not move the selected parameters.

    The selector is resolved against the parameters when `init` is called, and the same leaves stay frozen in
    every `update`. It does not control what follows it in a chain: make `freeze` the outermost.

    | how | a frozen leaf | its moments | its gradient, when `tx` clips by the global norm |
    |---|---|---|---|
    | `"exclude"` | never moves | are not kept | does not count |
    | `"updates"` | never moves | run on | counts |
    | `"gradients"` | moves, if `tx` decays weights or carries momentum | fade | counts as zero |

    With `until=` leaves are thawed during training, as in gradual unfreezing (ULMFiT, arXiv:1801.06146), and with
    `since=` they are frozen during training. The step is a counter in the optimizer state, so one compiled step
    serves the whole schedule. A leaf that will thaw has its moments from the start; `docs/freezing.md` says what they
    are at the thaw, and what the counts of Adam, which run on for all leaves alike, mean for its first update.

    A slice, as in `pm.sel("layers/mlp/wo/kernel")[:4]`, freezes those elements of each leaf. They do not move, and
    with "exclude" their gradients are zero to `tx` and their moments do not change. `tx` still sees the whole leaf:
    what it computes over a leaf, such as a trust ratio or row statistics, counts all elements.

    Args:
        tx: an optax transformation, such as `optax.adamw(1e-3)`.
        selector: text such as `"**/Dense_0/**"`, or anything that `pm.sel` takes, also a slice. A module
            class needs parameters that are modules (Equinox); a dict of parameters has no classes. May be left
            out when a mapping of `until` or `since` selects the leaves.
        how: what freezing means, from the table. "updates" keeps the moments warm for a later thaw; with it
            and with "gradients" the optimizer state is that of `tx`.
        until: when the leaves thaw: 1000 freezes the updates 0 to 999. Or a function of the step, which thaws them
            while it is true. Or a mapping of selectors to either; if several select a leaf, the first counts, and
            a leaf that none selects stays frozen.
        since: when the leaves are frozen, in the same ways: 1000 trains in the updates 0 to 999. With
            `since=100, until=200` the updates 100 to 199 are frozen; with `since=200, until=100` all but these.

    Returns:
        A transformation whose `update` passes extra arguments on to `tx`. The updates of frozen leaves are
        -0.0, because x + -0.0 is x for every x, but x + 0.0 turns -0.0 into 0.0. A gradient may be None
        where a leaf is frozen. With a schedule the state is `(step, inner_state)`.

    Raises:
        NoMatch: from `init`, a selector matches none of the parameters.
        BadArgument: `how` is not one of the three; `until` or `since` have no steps, or from `init`, they select leaves
            that the selector does not, or, with "exclude", make more than 64 phases.
        OutOfRange: from `init`, a slice does not fit a leaf.
        Unsupported: `tx` is not an optax transformation; or from `init`, all that is selected are statistics and the
            like, which the model moves itself in its forward pass, whatever the optimizer; or from `update`, with
            "exclude" and a schedule, the state of `tx` cannot be split by leaf (`optax.flatten`).

    >>> import jax.numpy as jnp, optax
    >>> params = {"Dense_0": {"kernel": jnp.ones(2)}, "Dense_1": {"kernel": jnp.ones(2)}}
    >>> tx = freeze(optax.adamw(0.5), "Dense_0/**")
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> new = optax.apply_updates(params, updates)
    >>> new["Dense_0"]["kernel"].tolist(), bool((new["Dense_1"]["kernel"] < 1).all())
    ([1.0, 1.0], True)

    >>> tx = freeze(optax.sgd(0.5), until={"Dense_0/**": 1})
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(params, state, params)
    ...     print(updates["Dense_0"]["kernel"])
    [-0. -0.]
    [-0.5 -0.5]
    """
    if how not in HOW:
        near = wording.closest(how, HOW, 1) if isinstance(how, str) else []
        raise BadArgument(
            f"how={how!r} is not one of {', '.join(map(repr, HOW))}",
            hint=f'pm.freeze(tx, selector, how="{(near or HOW)[0]}")',
        )
    if isinstance(tx, type) or not all(callable(getattr(tx, verb, None)) for verb in ("init", "update")):
        raise Unsupported(
            f"freeze takes an optax transformation, which has `init` and `update`; this is {described(tx)}",
            hint=f"pm.freeze_(module, {code(selector)})"
            if is_torch_module(tx)
            else 'pm.freeze(optax.adamw(1e-3), "**/Dense_0/**")',
        )
    schedule = read_schedule(selector, until, since)
    need("optax", extra="jax", to="freeze")
    from paramend.freezing import optax as adapter  # imports jax

    return adapter.freeze(tx, schedule, how)


def frozen(subject: AnyTree, tx: "optax.GradientTransformation | torch.optim.Optimizer | None" = None) -> FrozenReport:
    """A report of what is frozen and what trains, by subtree, with the bytes of optimizer state.

    Running statistics, counts of random keys and the like, which the forward pass moves and no optimizer, are listed
    by themselves, selected or not: to hold those, use them as in evaluation (`use_running_average=True`).

    Args:
        subject: JAX parameters, or a torch module.
        tx: the transformation that `freeze` made; for a torch module its optimizer, or None.

    Returns:
        A report: `str(report)` is a table, `report.frozen` and `report.trained` are lists of rows with `.path` and
        `.spec`, `report.state_nbytes` is a number.

    Raises:
        NoMatch: the selector of `tx` matches none of the parameters.
        Unsupported: JAX parameters without the transformation that `freeze` made, which alone knows what is frozen.

    >>> import jax.numpy as jnp, optax
    >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3))}, "Dense_1": {"kernel": jnp.ones((3, 1))}}
    >>> print(frozen(params, freeze(optax.sgd(0.1, momentum=0.9), "Dense_0/**")))
    trained: 3 scalars in 1, frozen: 6 scalars in 1 of 2 leaves; optimizer state: 12 B
    <BLANKLINE>
    trained: 1 leaf
      Dense_1/kernel  float32[3,1]
    <BLANKLINE>
    frozen: 1 leaf
      Dense_0/kernel  float32[2,3]
    """
    if is_torch_module(subject):
        from paramend.freezing import torch  # imports torch

        return torch.frozen(subject, tx)
    if not hasattr(getattr(tx, "init", None), "finder"):
        raise Unsupported(
            "parameters do not tell what is frozen: the transformation that freeze made, the outermost one, does",
            hint='pm.frozen(params, pm.freeze(optax.adamw(1e-3), "**/Dense_0/**"))',
        )
    from paramend.freezing import optax  # imports jax

    return optax.frozen(subject, tx)


def value_and_grad(
    loss: Callable[P, R], frozen: SelectorLike, *, argnum: int = 0, has_aux: bool = False, zeros: bool = False
) -> Callable[P, tuple[R, AnyTree]]:
    """A function that returns the loss and its gradient with respect to the parameters that are not frozen.

    As `jax.value_and_grad`, but frozen leaves are constants: their gradients are not computed or stored, and the
    backward pass ends where nothing trained is below.

    The gradient has the containers of the parameters, with None at frozen leaves. `pm.freeze(tx, frozen)` takes it
    as it is; so do `jax.tree.map` over the gradient, `optax.clip_by_global_norm`, `eqx.apply_updates`. A function of
    gradient and parameters together, such as `optax.MultiSteps` around `pm.freeze`, needs `zeros=True`.

    Args:
        loss: a function that returns a scalar.
        frozen: text such as `"**/Dense_0/**"`, or anything that `pm.sel` takes, except a slice. It is resolved
            against the parameters at the first call with leaves of these names and shapes.
        argnum: which positional argument holds the parameters.
        has_aux: whether the loss returns `(value, aux)`.
        zeros: zeros at frozen leaves instead of None. Compiled in one step with the update they cost nothing.

    Raises:
        NoMatch: when called, the selector matches none of the parameters.
        BadArgument: `argnum` is not one of the arguments.
        Unsupported: the selector is a slice, because a leaf cannot be differentiated in part; or when called, the
            parameters are an NNX module.

    >>> import jax.numpy as jnp
    >>> params = {"Dense_0": jnp.array(2.0), "Dense_1": jnp.array(3.0)}
    >>> value, gradient = value_and_grad(lambda p: p["Dense_0"] * p["Dense_1"], "Dense_0")(params)
    >>> float(value), gradient["Dense_0"], float(gradient["Dense_1"])
    (6.0, None, 2.0)
    """
    whole, index = slice_of(sel(frozen))
    if index is not None:
        raise Unsupported(
            f"value_and_grad takes whole leaves, and {sel(frozen)!r} selects a slice [{write_index(index)}] of each: "
            "a gradient is of the whole array",
            hint=f"jax.value_and_grad(loss), with pm.freeze(tx, {sel(frozen)!r}) to freeze the slice",
        )
    need("jax", extra="jax", to="differentiate")
    from paramend.freezing import gradients as adapter  # imports jax

    return adapter.value_and_grad(loss, read_schedule(whole, None, None), argnum, has_aux, zeros)


def nnx_filter(model: "nnx.Module | nnx.State[Any, Any]", selector: SelectorLike) -> Filter:
    """An NNX filter that is true for the selected Variables of this model.

    NNX calls a filter with one Variable at a time, which does not tell which layer is the last, or that nothing
    matched. So the selector is resolved against the model first. The filter works wherever NNX takes one:
    `nnx.state`, `nnx.split`, `nnx.Optimizer(wrt=...)`, `nnx.DiffState`, within `nnx.All`, `nnx.Any` and `nnx.Not`.

    Args:
        model: an NNX module, or a State of one.
        selector: text such as `"layers[-1]/**"`, or anything that `pm.sel` takes, except a slice.

    Raises:
        NoMatch: the selector matches nothing, where NNX would return an empty State.
        Unsupported: the model is not an NNX module or State.

    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(0)))
    >>> [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx_filter(model, "layers[-1]/**")))]
    [('layers', 1, 'bias'), ('layers', 1, 'kernel')]
    """
    need("flax.nnx", extra="jax", to="filter")
    from paramend.freezing import nnx  # imports flax

    return nnx.nnx_filter(model, selector)


def freeze_(
    module: "torch.nn.Module",
    selector: SelectorLike,
    *,
    optimizer: "torch.optim.Optimizer | None" = None,
    norm_stats: bool = True,
    keep_state: bool = False,
) -> FreezeReport:
    """The report of the leaves of a torch module that were frozen in place: it is also the list of their paths.

    Parameters get `requires_grad=False`, and their `.grad` becomes None, so an optimizer that already holds them skips
    them, whatever its momentum and decay.

    Buffers have no gradients: the forward pass moves them, in train mode. Those that are selected stay as they are,
    until `unfreeze_`; when only weight and bias are selected, the buffers still move.

    - With running statistics, selected by `"bn1.**"` or `"**"`, a normalization layer normalizes in train mode too;
      and spectral norm divides by the norm that its vectors give.
    - Of other buffers, such as a codebook that is a moving average, the forward pass of the module, or of one within
      it, gets copies. What code outside of a forward pass assigns to a buffer stays assigned.

    A slice, as in `pm.sel("embed.weight")[:100]`, is frozen in the steps of `optimizer=`: its gradient is zero there,
    and changes of the step to it are undone, bit for bit. The rest of the tensor trains on.

    Classes, modes and state dicts stay as they are.

    Args:
        module: a `torch.nn.Module`.
        selector: text such as `"encoder.**"`, or anything that `pm.sel` takes.
        optimizer: the optimizer in use, when freezing during a run: it drops the moments of frozen leaves. L-BFGS,
            which keeps one history of curvature for all parameters, drops all of it; otherwise it would go on moving
            frozen parameters. Needed for slices, which are frozen for this optimizer object and not for copies of it.
        norm_stats: whether selected running statistics are held; if not, they are not in the report.
        keep_state: whether the optimizer keeps the moments for a later thaw.

    Raises:
        NoMatch: the selector matches nothing.
        BadArgument: a tied parameter is selected by some but not all of its names; the optimizer does not hold the
            selected parameters.
        OutOfRange: the slice does not fit.
        Unsupported: not a torch module, or a slice without an optimizer.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> freeze_(model, "{0,1}.{weight,bias}")
    ['0.weight', '0.bias', '1.weight', '1.bias']
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['2.weight', '2.bias']
    """
    _check_torch(module, selector, "freeze_")
    from paramend.freezing import torch as adapter  # imports torch

    return adapter.freeze_(module, *slice_of(sel(selector)), optimizer, norm_stats, keep_state)


def unfreeze_(
    module: "torch.nn.Module", selector: SelectorLike, *, optimizer: "torch.optim.Optimizer | None" = None
) -> FreezeReport:
    """The report of the leaves of a torch module that were thawed in place: it is also the list of their paths.

    A parameter that `freeze_` froze gets the `requires_grad` that it had before. One that `freeze_` never saw gets
    `requires_grad=True`, whoever froze it. A normalization layer updates its running statistics again, in train mode,
    if one of them is selected.

    Args:
        module: a `torch.nn.Module`.
        selector: text such as `"encoder.layers[-1].**"`, or anything that `pm.sel` takes. A slice is thawed as it
            was frozen; whole leaves with all their slices.
        optimizer: the optimizer in whose steps slices are frozen.

    Raises:
        NoMatch: the selector matches nothing.
        Unsupported: not a torch module, or a slice without an optimizer.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> report = freeze_(model, "**")
    >>> print(unfreeze_(model, "1.*"))
    thawed: 2 leaves
    <BLANKLINE>
    thawed: 2 leaves
      1.weight  float32[1,2]
      1.bias    float32[1]
    """
    _check_torch(module, selector, "unfreeze_")
    from paramend.freezing import torch as adapter  # imports torch

    return adapter.unfreeze_(module, *slice_of(sel(selector)), optimizer)


def _check_torch(module: object, selector: SelectorLike, verb: str) -> None:
    if not is_torch_module(module):
        raise Unsupported(
            f"{verb} takes a torch module, which changes in place; this is {described(module)}",
            hint=f"pm.{verb}(module, selector): the module first"
            if is_torch_module(selector)
            else f"in JAX wrap the optimizer: tx = pm.freeze(optax.adamw(1e-3), {code(selector)})",
        )
