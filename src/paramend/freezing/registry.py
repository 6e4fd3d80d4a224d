"""The verbs of freezing. The adapter for the subject's framework is opened once that framework is there."""

import importlib
from typing import TYPE_CHECKING, Any

from paramend import _text
from paramend._optional import need
from paramend.errors import BadArgument, Unsupported
from paramend.selectors import sel, slice_of, write_index
from paramend.trees.kinds import is_torch_module

if TYPE_CHECKING:
    import optax

HOW = ("exclude", "updates", "gradients")


def freeze(tx: Any, selector: Any, *, how: str = "exclude") -> "optax.GradientTransformationExtraArgs":
    """A transformation that trains as `tx` does and leaves the selected parameters where they are.

    The selector is resolved against the parameters when `init` is called, and the same leaves stay frozen in
    every `update`. What comes after it in a chain is not under its control: make `freeze` the outermost.

    | how | a frozen leaf | its moments | its gradient, when `tx` clips by the global norm |
    |---|---|---|---|
    | `"exclude"` | never moves | are not kept | does not count |
    | `"updates"` | never moves | run on | counts |
    | `"gradients"` | moves, if `tx` decays weights or carries momentum | fade | counts as zero |

    Args:
        tx: an optax transformation, such as `optax.adamw(1e-3)`.
        selector: text such as `"**/Dense_0/**"`, or anything that `pm.sel` takes, except a slice. A module
            class needs parameters that are modules (Equinox); a dict of parameters knows no classes.
        how: what freezing means, from the table. "updates" keeps the moments warm for a later thaw; with it
            and with "gradients" the optimizer state is that of `tx`.

    Returns:
        A transformation whose `update` hands extra arguments on to `tx`. The updates of frozen leaves are
        -0.0, because x + -0.0 is x for every x, where x + 0.0 turns -0.0 into 0.0.

    Raises:
        NoMatch: from `init`, the selector matches none of the parameters.
        BadArgument: `how` is none of the three.
        Unsupported: `tx` is no optax transformation, or the selector names slices.

    >>> import jax.numpy as jnp, optax
    >>> params = {"Dense_0": {"kernel": jnp.ones(2)}, "Dense_1": {"kernel": jnp.ones(2)}}
    >>> tx = freeze(optax.adamw(0.5), "Dense_0/**")
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> new = optax.apply_updates(params, updates)
    >>> new["Dense_0"]["kernel"].tolist(), bool((new["Dense_1"]["kernel"] < 1).all())
    ([1.0, 1.0], True)
    """
    if how not in HOW:
        near = _text.closest(how, HOW, 1) if isinstance(how, str) else []
        raise BadArgument(
            f"how={how!r} is none of {', '.join(map(repr, HOW))}",
            hint=f'pm.freeze(tx, selector, how="{(near or HOW)[0]}")',
        )
    if isinstance(tx, type) or not all(callable(getattr(tx, verb, None)) for verb in ("init", "update")):
        raise Unsupported(
            f"freeze takes an optax transformation, which has `init` and `update`; this is {_described(tx)}",
            hint=_torch_hint(selector) if is_torch_module(tx) else 'pm.freeze(optax.adamw(1e-3), "**/Dense_0/**")',
        )
    whole, index = slice_of(sel(selector))
    if index is not None:
        raise Unsupported(
            f"freeze takes whole leaves, and {sel(selector)!r} names a slice [{write_index(index)}] of each",
            hint=f"pm.freeze(tx, {whole!r}) freezes them whole",
        )
    need("optax", extra="jax", to="freeze")
    adapter: Any = importlib.import_module("paramend.freezing.optax")
    return adapter.freeze(tx, whole, how)


def freeze_(module: Any, selector: Any) -> list[str]:
    """The paths of the chosen leaves of a torch module, after they were frozen in place.

    Parameters get `requires_grad=False`, and their `.grad` becomes None, so that an optimizer that holds them
    already, with whatever momentum and decay, passes over them.

    When running statistics of a normalization layer are chosen, by `"bn1.**"` or `"**"`, that layer
    normalizes with them and does not update them, in train mode too, until `unfreeze_`. When only its weight
    and bias are chosen, the statistics move on. Other buffers take no gradients: nothing is done to them.

    L-BFGS keeps one history of curvature for all its parameters, and in mid-run that would go on moving the
    frozen ones: clear it, `optimizer.state.clear()`.

    Classes, modes and state dicts stay as they are. Tied parameters are frozen under all their names.

    Args:
        module: a `torch.nn.Module`.
        selector: text such as `"encoder.**"`, or anything that `pm.sel` takes, except a slice.

    Raises:
        NoMatch: the selector matches nothing.
        Unsupported: no torch module, or the selector names slices.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    >>> freeze_(model, "{0,1}.{weight,bias}")
    ['0.weight', '0.bias', '1.weight', '1.bias']
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['2.weight', '2.bias']
    """
    return _torch(module, selector, "freeze_").freeze_(module, selector)  # type: ignore[no-any-return]


def unfreeze_(module: Any, selector: Any) -> list[str]:
    """The paths of the chosen leaves of a torch module, after they were made trainable in place.

    Every chosen parameter gets `requires_grad=True`, whoever froze it. A normalization layer updates its
    running statistics again, in train mode, as soon as one of them is chosen.

    Args:
        module: a `torch.nn.Module`.
        selector: text such as `"encoder.layers[-1].**"`, or anything that `pm.sel` takes, except a slice.

    Raises:
        NoMatch: the selector matches nothing.
        Unsupported: no torch module, or the selector names slices.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> paths = freeze_(model, "**")
    >>> unfreeze_(model, "1.*")
    ['1.weight', '1.bias']
    """
    return _torch(module, selector, "unfreeze_").unfreeze_(module, selector)  # type: ignore[no-any-return]


def _torch(module: Any, selector: Any, verb: str) -> Any:
    """The adapter for a torch module, after the arguments were looked at."""
    if not is_torch_module(module):
        raise Unsupported(
            f"{verb} takes a torch module, which changes in place; this is {_described(module)}",
            hint=f"in JAX the optimizer is told: tx = pm.freeze(optax.adamw(1e-3), {_written(selector)})",
        )
    whole, index = slice_of(sel(selector))
    if index is not None:
        raise Unsupported(
            f"{verb} takes whole leaves, as requires_grad is of the whole tensor, and {sel(selector)!r} "
            f"names a slice [{write_index(index)}] of each",
            hint=f"pm.{verb}(module, {whole!r}) takes them whole",
        )
    return importlib.import_module("paramend.freezing.torch")


def _described(subject: Any) -> str:
    kind = subject if isinstance(subject, type) else type(subject)
    what = "the class" if isinstance(subject, type) else "a"
    return f"{what} {kind.__module__}.{kind.__qualname__}".replace(" builtins.", " ")


def _torch_hint(selector: Any) -> str:
    return f"pm.freeze_(module, {_written(selector)})"


def _written(selector: Any) -> str:
    return f'"{selector}"' if isinstance(selector, str) else repr(selector)
