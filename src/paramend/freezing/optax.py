"""Freezing in optax: a transformation wrapped so that chosen leaves stay where they are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from paramend.errors import NoMatch
from paramend.selectors import Held, Selector, resolve
from paramend.trees.registry import Tree

# The extra arguments by which optax optimizers are handed the loss itself: functions of the parameters.
_LOSSES = ("value_fn", "obj_fn")


def freeze(tx: Any, selector: Selector, how: str) -> Any:
    """The transformation `tx` with the selected leaves frozen in one of the three ways."""
    return _WAYS[how](optax.with_extra_args_support(tx), _Frozen(selector))


class _Frozen:
    """Which leaves are frozen.

    What `init` finds holds for every update of leaves with the same names and shapes: gradients need not
    have the dtypes, nor the pure arrays of an NNX module the classes, that a selector asks about.
    """

    def __init__(self, selector: Selector) -> None:
        self._selector = selector
        self._known: dict[Any, list[bool]] = {}

    def find(self, params: Any) -> Any:
        """A tree of bools with the containers of the parameters; resolved anew.

        Raises:
            NoMatch: nothing is selected.
        """
        tree, structure, places = _named(params)
        return structure.unflatten(self._resolve(tree, structure, places))

    def find_again(self, updates: Any, params: Any) -> Any:
        """A tree of bools with the containers of the updates, the same as at `init`."""
        tree, structure, places = _named(updates)
        flags = self._known.get(_key(tree))
        if flags is None:  # a state from elsewhere: `init` was not called here
            flags = self._resolve(*(_named(params) if params is not None else (tree, structure, places)))
        return structure.unflatten(flags)

    def _resolve(self, tree: Tree, structure: Any, places: dict[int, int]) -> list[bool]:
        flags = [False] * structure.num_leaves
        try:
            chosen = resolve(self._selector, tree)
        except NoMatch as error:
            if not isinstance(self._selector, Held):
                raise
            raise NoMatch(
                f"{str(error).partition(chr(10))[0]}; an optimizer sees the parameters, and of Flax models these "
                "keep no module classes",
                hint=f'select by path, such as "{tree.index.path(tree.index.numbers[0])}"',
            ) from None
        for number in chosen:
            flags[places[id(tree.values[number])]] = True
        self._known[_key(tree)] = flags
        return flags


def _named(params: Any) -> tuple[Tree, Any, dict[int, int]]:
    """The leaves with their names, the structure, and the place of each leaf in JAX's order.

    A spec stands in for each leaf. So numbers that Python holds are leaves here, as they are to JAX, and one
    array at two places is two parameters, as it is to an optimizer, and as it would be under `jit`.
    """
    leaves, structure = jax.tree.flatten(params)
    specs = [_spec(leaf) for leaf in leaves]
    return Tree(structure.unflatten(specs)), structure, {id(spec): place for place, spec in enumerate(specs)}


def _spec(leaf: Any) -> Any:
    if hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex):
        return jax.ShapeDtypeStruct(jnp.shape(leaf), _dtype(leaf))
    return leaf


def _key(tree: Tree) -> Any:
    return tuple((tree.index.pieces(number), tree.values[number].shape) for number in tree.index.numbers)


def _exclude(tx: Any, frozen: _Frozen) -> Any:
    """Only the other leaves exist for `tx`."""

    def trained(mask: Any) -> Any:
        # Gradients among the extra arguments are cut to the trained leaves, too.
        return optax.masked(tx, jax.tree.map(lambda flag: not flag, mask), mask_compatible_extra_args=True)

    def init(params: Any) -> Any:
        mask = jax.tree.map(lambda _: False, params) if _is_stand_in(params) else frozen.find(params)
        return trained(mask).init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        params = _fitted(params, updates)
        mask = frozen.find_again(updates, params)
        for name in extra.keys() & _LOSSES if params is not None else ():
            extra[name] = _completed(extra[name], mask, params)
        updates, state = trained(mask).update(updates, state, params, **extra)
        return _still(mask, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _keep_updates(tx: Any, frozen: _Frozen) -> Any:
    """All leaves exist for `tx`; what it would do to the frozen ones is dropped."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        params = _fitted(params, updates)
        mask = frozen.find_again(updates, params)
        updates, state = tx.update(updates, state, params, **extra)
        return _still(mask, updates, params), state

    return optax.GradientTransformationExtraArgs(_checked_init(tx, frozen), update)


def _zero_gradients(tx: Any, frozen: _Frozen) -> Any:
    """All leaves exist for `tx`, which sees no gradient of the frozen ones."""

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        params = _fitted(params, updates)
        mask = frozen.find_again(updates, params)
        if "grad" in extra:  # line searches are told the gradient once more
            extra["grad"] = _zeroed(mask, extra["grad"])
        return tx.update(_zeroed(mask, updates), state, params, **extra)

    return optax.GradientTransformationExtraArgs(_checked_init(tx, frozen), update)


_WAYS: dict[str, Callable[[Any, _Frozen], Any]] = {
    "exclude": _exclude,
    "updates": _keep_updates,
    "gradients": _zero_gradients,
}


def _checked_init(tx: Any, frozen: _Frozen) -> Callable[[Any], Any]:
    def init(params: Any) -> Any:
        if not _is_stand_in(params):
            frozen.find(params)
        return tx.init(params)

    return init


def _is_stand_in(params: Any) -> bool:
    """Whether `optax.tree.map_params` asks for the state of one nameless tree instead of parameters."""
    return type(params).__name__ == "_ParamsPlaceholder"


def _fitted(params: Any, updates: Any) -> Any:
    """The parameters with None where the updates have None: an Equinox module may come with its functions."""
    if params is None or jax.tree.structure(params) == jax.tree.structure(updates):
        return params
    return jax.tree.map(lambda u, p: None if u is None else p, updates, params, is_leaf=lambda u: u is None)


def _completed(loss: Callable[..., Any], mask: Any, params: Any) -> Callable[..., Any]:
    """The loss as a function of parameters from which the frozen leaves were cut."""

    def completed(trained: Any, *args: Any, **kwargs: Any) -> Any:
        return loss(jax.tree.map(lambda flag, t, p: p if flag else t, mask, trained, params), *args, **kwargs)

    return completed


def _zeroed(mask: Any, gradients: Any) -> Any:
    return jax.tree.map(lambda flag, g: jnp.zeros_like(g) if flag and not _is_void(g) else g, mask, gradients)


def _still(mask: Any, updates: Any, params: Any) -> Any:
    """The updates, with nothing to add to the frozen leaves."""
    if params is None:
        return jax.tree.map(lambda flag, u: _nothing(u, u) if flag else u, mask, updates)
    return jax.tree.map(lambda flag, u, p: _nothing(u, p) if flag else u, mask, updates, params)


def _nothing(update: Any, param: Any) -> Any:
    """What leaves a parameter as it is when added: x + -0.0 is x for every x, and -0.0 + 0.0 is 0.0.

    Of the parameter's shape, because gradients may still have an axis of examples.
    """
    if jnp.issubdtype(_dtype(param), jnp.inexact):
        minus_zero = complex(-0.0, -0.0) if jnp.issubdtype(_dtype(update), jnp.complexfloating) else -0.0
        return jnp.full_like(param, minus_zero, dtype=_dtype(update))
    # The gradient of an integer is a float0, which optax cannot add to anything: an integer zero it can.
    return update if _is_void(param) else jnp.zeros_like(param)


def _is_void(x: Any) -> bool:
    """Whether it is of a dtype without arithmetic: float0, the gradient of an integer, or a PRNG key."""
    dtype = _dtype(x)
    return bool(dtype == jax.dtypes.float0 or jnp.issubdtype(dtype, jax.dtypes.extended))


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
