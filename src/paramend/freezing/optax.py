"""Freezing in optax: a transformation wrapped so that selected leaves do not move."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from paramend.errors import NoMatch
from paramend.freezing.phases import Phases, passed_at
from paramend.freezing.places import Finder, FrozenPlace, dtype_of, moved_by_model, named
from paramend.freezing.report import FrozenReport, FrozenRow
from paramend.freezing.schedules import Schedule
from paramend.freezing.shares import Shares

# The extra arguments that pass the loss itself to optax optimizers: functions of the parameters.
_LOSSES = ("value_fn", "obj_fn")


class FreezeState(NamedTuple):
    """The state of a transformation that freezes by a schedule."""

    step: Any  # how many updates there have been
    inner_state: Any  # the state of what was wrapped


def freeze(tx: Any, schedule: Schedule, how: str) -> Any:
    """The transformation `tx` with leaves frozen in one of the three ways, as the schedule says."""
    finder = Finder(schedule)
    inner = _WAYS[how](optax.with_extra_args_support(tx), finder)

    def init(params: Any) -> Any:
        if not _is_stand_in(params):
            finder.find(params)
        state = inner.init(params)
        return FreezeState(jnp.zeros([], jnp.int32), state) if schedule.timed else state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, params = _matched(updates, params, finder)
        places = finder.find_again(updates, params)
        if not schedule.timed:
            return inner.update(updates, state, params, extra, places, None)
        new, inner_state = inner.update(updates, state.inner_state, params, extra, places, state.step)
        return new, FreezeState(optax.safe_increment(state.step), inner_state)

    init.finder = finder  # type: ignore[attr-defined]  # for reports
    return optax.GradientTransformationExtraArgs(init, update)


def frozen(params: Any, tx: Any) -> FrozenReport:
    """The report of what is frozen by `tx`, which `freeze` made."""
    finder: Finder = tx.init.finder
    names, _, numbers = named(params)
    places = finder.find_again(params)
    moving = moved_by_model(names)
    rows = []
    for number in names.index.numbers:
        place = places[numbers[id(names.values[number])]]
        partly = "partly" if place.partial else "scheduled"
        status = "trained" if place.free else "frozen" if place.always else partly
        status = "moving" if number in moving else status
        rows.append(FrozenRow(names.index.path(number), names.spec(number), status))
    state = jax.tree.leaves(_state_of(tx, params, {numbers[id(names.values[number])] for number in moving}))
    return FrozenReport(tuple(rows), sum(leaf.size * leaf.dtype.itemsize for leaf in state))


def _state_of(tx: Any, params: Any, moving: set[int]) -> Any:
    """The specs of the state for the parameters without those that the model moves itself."""
    leaves, structure = jax.tree.flatten(params)
    trained = structure.unflatten([None if place in moving else leaf for place, leaf in enumerate(leaves)])
    try:
        return jax.eval_shape(tx.init, trained)
    except NoMatch:  # one of several selectors is for the others alone
        return jax.eval_shape(tx.init, params)


class _Way(NamedTuple):
    """One meaning of freezing: its `init`, and its `update`, which also takes the places and the step."""

    init: Callable[[Any], Any]
    update: Callable[..., Any]


# ---- the three ways ---------------------------------------------------------------------------------------


def _exclude(tx: Any, finder: Finder) -> _Way:
    """Freezing in which only the other leaves exist for `tx`. A leaf that will thaw has its moments from the start,
    since the state of one compiled step cannot grow. While the leaf is frozen they are put aside: `tx` is given the
    state that it would have without the leaf."""
    shares = Shares(lambda flags: _trained(tx, flags))

    def init(params: Any) -> Any:
        if _is_stand_in(params):
            return _trained(tx, jax.tree.map(lambda _: False, params)).init(params)
        places = finder.find_again(params)
        Phases.of(places)  # too many are refused here
        return _trained(tx, _tree([place.always for place in places], params)).init(params)

    def update(updates: Any, state: Any, params: Any, extra: Any, places: list[FrozenPlace], step: Any) -> Any:
        like = updates if params is None else params
        passed = passed_at(step)
        partly = [_when(place, passed) if place.partial else False for place in places]
        sliced = any(place.partial for place in places)
        given = _zeroed(_tree(partly, updates), updates) if sliced else updates
        if sliced and "grad" in extra:
            extra = {**extra, "grad": _zeroed(_tree(partly, updates), extra["grad"])}

        def run(gone: tuple[bool, ...]) -> Any:
            flags = _tree(list(gone), updates)
            told = dict(extra)
            either = [whole or part for whole, part in zip(gone, partly, strict=True)]
            for name in told.keys() & _LOSSES if params is not None else ():
                told[name] = _of_all(told[name], _tree(either, updates), params)
            share = shares.of(gone, always, like)
            new, inner = _trained(tx, flags).update(given, share.cut(state), params, **told)
            return _still(flags, new, params), share.join(state, inner)

        always = tuple(place.always for place in places)
        new, after = Phases.of(places).run(run, places, passed, (updates, state))
        if sliced:
            after = shares.held(places, partly, always, like, state, after)
            new = _still(_tree(partly, updates), new, params)
        return new, after

    return _Way(init, update)


def _keep_updates(tx: Any, finder: Finder) -> _Way:
    """Freezing in which all leaves exist for `tx`, and its updates of the frozen ones are dropped."""

    def update(updates: Any, state: Any, params: Any, extra: Any, places: list[FrozenPlace], step: Any) -> Any:
        now = _tree(_now(places, step), updates)
        updates, state = tx.update(updates, state, params, **extra)
        return _still(now, updates, params), state

    return _Way(tx.init, update)


def _zero_gradients(tx: Any, finder: Finder) -> _Way:
    """Freezing in which all leaves exist for `tx`, with gradients of zero for the frozen ones."""

    def update(updates: Any, state: Any, params: Any, extra: Any, places: list[FrozenPlace], step: Any) -> Any:
        now = _tree(_now(places, step), updates)
        if "grad" in extra:  # line searches take the gradient as an argument too
            extra = {**extra, "grad": _zeroed(now, extra["grad"])}
        return tx.update(_zeroed(now, updates), state, params, **extra)

    return _Way(tx.init, update)


_WAYS: dict[str, Callable[[Any, Finder], _Way]] = {
    "exclude": _exclude,
    "updates": _keep_updates,
    "gradients": _zero_gradients,
}


def _trained(tx: Any, gone: Any) -> Any:
    # Gradients among the extra arguments are cut to the trained leaves too.
    return optax.masked(tx, jax.tree.map(lambda flag: not flag, gone), mask_compatible_extra_args=True)


# ---- what is frozen now -----------------------------------------------------------------------------------


def _now(places: list[FrozenPlace], step: Any) -> list[Any]:
    """Whether each leaf is frozen: a bool, traced or not, or an array with one for each element."""
    passed = passed_at(step)
    return [_when(place, passed) for place in places]


def _when(place: FrozenPlace, passed: Any) -> Any:
    if place.free:
        return False
    window = place.window
    if window is not None:
        return window.holds(passed)
    now: Any = False
    for region, piece in reversed(place.pieces):
        inside: Any = True
        for mask in region:
            inside = inside & jnp.asarray(mask)
        now = jnp.where(inside, piece.holds(passed), now)
    return now


# ---- trees ------------------------------------------------------------------------------------------------


def _tree(leaves: list[Any], like: Any) -> Any:
    return jax.tree.structure(like).unflatten(leaves)


def _is_stand_in(params: Any) -> bool:
    """Whether these are the placeholder of `optax.tree.map_params` and not parameters."""
    return type(params).__name__ == "_ParamsPlaceholder"


def _is_absent(update: Any) -> bool:
    return update is None or isinstance(update, optax.MaskedNode)


def _matched(updates: Any, params: Any, finder: Finder) -> tuple[Any, Any]:
    """Updates and parameters of one structure. Parameters become None where there is neither array nor update, as for
    the functions of an Equinox module, and what the updates have where there is no update. Frozen leaves without a
    gradient get updates of zero that nothing reads."""
    if params is None or jax.tree.structure(params) == jax.tree.structure(updates):
        return updates, params
    params = jax.tree.map(
        lambda u, p: None if _is_absent(u) and not hasattr(p, "dtype") else p, updates, params, is_leaf=_is_absent
    )
    places = _tree(finder.find_again(params), params)

    def complete(update: Any, param: Any, place: Any) -> Any:
        frozen = isinstance(place, FrozenPlace) and not place.free
        return jnp.zeros_like(param) if _is_absent(update) and frozen else update

    updates = jax.tree.map(complete, updates, params, places, is_leaf=_is_absent)
    return updates, jax.tree.map(lambda u, p: u if _is_absent(u) else p, updates, params, is_leaf=_is_absent)


def _of_all(loss: Callable[..., Any], frozen: Any, params: Any) -> Callable[..., Any]:
    """The loss as a function of parameters without the frozen leaves."""

    return lambda trained, *args, **kwargs: loss(jax.tree.map(_where, frozen, params, trained), *args, **kwargs)


def _where(now: Any, frozen: Any, trained: Any) -> Any:
    """One of two values of a leaf, or elements of both, by what is frozen now."""
    return trained if now is False else frozen if now is True else jnp.where(now, frozen, trained)


def _zeroed(now: Any, gradients: Any) -> Any:
    """The gradients, with zero where frozen, even for NaN."""
    return jax.tree.map(
        lambda now, g: g if now is False or is_void(g) else _where(now, jnp.zeros_like(g), g), now, gradients
    )


def _still(now: Any, updates: Any, params: Any) -> Any:
    """The updates, with those of frozen elements adding nothing."""
    return jax.tree.map(
        lambda now, u, p: u if now is False else _where(is_void(u) or now, _nothing(u, p), u),
        now,
        updates,
        updates if params is None else params,
    )


def _nothing(update: Any, param: Any) -> Any:
    """An update that leaves a parameter as it is: x + -0.0 is x for every x, but -0.0 + 0.0 is 0.0. It has the
    parameter's shape, because gradients may still have an axis of examples."""
    if jnp.issubdtype(dtype_of(param), jnp.inexact):
        minus_zero = complex(-0.0, -0.0) if jnp.issubdtype(dtype_of(update), jnp.complexfloating) else -0.0
        return jnp.full_like(param, minus_zero, dtype=dtype_of(update))
    # The gradient of an integer is a float0, which optax cannot add; an integer zero it can.
    return update if is_void(param) else jnp.zeros_like(param)


def is_void(x: Any) -> bool:
    """Whether the dtype has no arithmetic: float0 (the gradient of an integer) or a PRNG key."""
    dtype = dtype_of(x)
    return bool(dtype == jax.dtypes.float0 or jnp.issubdtype(dtype, jax.dtypes.extended))
