"""Gradients with respect to the trained leaves alone: those of frozen leaves are never computed."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from paramend.errors import BadArgument, Unsupported
from paramend.freezing.places import Finder, dtype_of
from paramend.freezing.schedules import Schedule
from paramend.leaves.specs import AnyTree

P = ParamSpec("P")
R = TypeVar("R")


def value_and_grad(
    loss: Callable[P, R], schedule: Schedule, argnum: int, has_aux: bool, zeros: bool
) -> Callable[P, tuple[R, AnyTree]]:
    """The loss with its gradient, as a function of the arguments of the loss."""
    finder = Finder(schedule)

    @wraps(loss)
    def value_and_gradient(*args: Any, **kwargs: Any) -> tuple[R, AnyTree]:
        if not -len(args) <= argnum < len(args):
            raise BadArgument(
                f"argnum={argnum}, and the loss was called with {len(args)} positional arguments",
                hint="the parameters are positional: loss_and_grad(params, batch)",
            )
        params = args[argnum]
        _refuse_modules(params)
        leaves, structure = jax.tree.flatten(params)
        frozen = [not place.free for place in finder.find_again(params)]
        # Functions and counts of an Equinox module are left out, as in `eqx.filter_value_and_grad`.
        trained = [not flag and _is_inexact(leaf) for leaf, flag in zip(leaves, frozen, strict=True)]

        def of_trained(chosen: list[Any]) -> Any:
            new = iter(chosen)
            whole = structure.unflatten(
                [next(new) if flag else leaf for leaf, flag in zip(leaves, trained, strict=True)]
            )
            at = argnum % len(args)
            return loss(*args[:at], whole, *args[at + 1 :], **kwargs)

        value, found = jax.value_and_grad(of_trained, has_aux=has_aux)(
            [leaf for leaf, flag in zip(leaves, trained, strict=True) if flag]
        )
        gradients = iter(found)
        return value, structure.unflatten(
            [
                next(gradients) if flag else jnp.zeros_like(leaf) if zeros and _is_inexact(leaf) else None
                for leaf, flag in zip(leaves, trained, strict=True)
            ]
        )

    return value_and_gradient


def _is_inexact(leaf: Any) -> bool:
    numeric = hasattr(leaf, "dtype") or isinstance(leaf, float | complex)
    return numeric and bool(jnp.issubdtype(dtype_of(leaf), jnp.inexact))


def _refuse_modules(params: Any) -> None:
    if any(base.__module__.startswith("flax.nnx") and base.__name__ == "Module" for base in type(params).__mro__):
        raise Unsupported(
            f"value_and_grad takes parameters, and this is the NNX module {type(params).__name__}, which needs "
            "the transformations of NNX",
            hint="nnx.value_and_grad(loss, argnums=nnx.DiffState(0, trained)) with "
            "trained = nnx.All(nnx.Param, nnx.Not(pm.nnx_filter(model, selector)))",
        )
