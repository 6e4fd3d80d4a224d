"""The lesson on replacing one kernel."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paramend.edits.selection import at
from paramend.lessons.lesson import Case, Lesson, edited, mistake, two_widths
from paramend.lessons.witness import applied_facts, observe


def kernel_replace(seed: float, x: Any, features: float, replacement_value: float) -> jax.Array:
    """The output of a `Dense` layer whose kernel was filled with one value."""
    x = jnp.asarray(x)
    model = nn.Dense(int(features))
    params = model.init(jax.random.PRNGKey(int(seed)), x)
    params = at(params, "params/kernel").fill(float(replacement_value))
    return model.apply(params, x)


def _solved(edit: Callable[[Any, float], Any], seed: float, x: Any, features: float, value: float) -> Any:
    """The reference with another edit of the parameters."""
    x, model = jnp.asarray(x), nn.Dense(int(features))
    return model.apply(edit(model.init(jax.random.PRNGKey(int(seed)), x), value), x)


_edited = partial(edited, _solved)


def _with(params: Any, kernel: Any) -> Any:
    return {"params": {**params["params"], "kernel": kernel}}


def _filled(layer: Any, value: float) -> Any:
    return {**layer, "kernel": jnp.full_like(layer["kernel"], value)}


def _without_layer(seed: float, x: Any, features: float, value: float) -> Any:
    params = nn.Dense(int(features)).init(jax.random.PRNGKey(int(seed)), jnp.asarray(x))
    return jnp.asarray(x) @ jnp.full_like(params["params"]["kernel"], value)


def _in_place(params: Any, value: float) -> Any:
    params["params"]["kernel"] = jnp.full_like(params["params"]["kernel"], value)
    return params


def cases(rng: np.random.Generator) -> list[Case]:
    """Values that are exact in bfloat16."""

    def args(width: int) -> tuple[Any, ...]:
        x = rng.normal(size=(int(rng.integers(2, 6)), width)).astype(np.float32)
        value = float(rng.choice([-1, 1]) * rng.integers(2, 17) / 8)  # neither 0 nor 1
        return float(rng.integers(1000)), x, float(rng.integers(2, 6)), value if value != 1.0 else 1.25

    return two_widths(rng, args)


LESSON = Lesson(
    name="kernel_replace",
    reference=kernel_replace,
    cases=cases,
    observe=partial(observe, facts=applied_facts),
    mistakes=(
        _edited(
            "a scalar where an array belongs",
            "The kernel became one number. A layer checks that its kernel has the shape it was made with: "
            "fill an array of the old kernel's shape instead.",
            _with,
            lambda params, value: _with(params, jnp.array(value)),
            lambda params, value: at(params, "params/kernel").set(value),
        ),
        mistake(
            "the bias dropped or zeroed as well",
            "Only the kernel should change. Build the new dict from the old one, {**old, 'kernel': new}, "
            "so that the bias stays beside it.",
            partial(
                _solved, lambda tree, value: {"params": {"kernel": jnp.full_like(tree["params"]["kernel"], value)}}
            ),
            partial(_solved, lambda tree, value: at(at(tree, "params/kernel").fill(value), "params/bias").zero()),
            _without_layer,
        ),
        _edited(
            "every leaf replaced instead of one",
            "A map over the whole tree fills the bias too. Select the leaf by its path.",
            lambda params, value: jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params),
        ),
        _edited(
            "the outer `params` level lost",
            "Flax keeps the tree below a key for the collection: the kernel is at "
            'params["params"]["kernel"], and `apply` needs that outer level too.',
            _filled,
            lambda params, value: at(params, "kernel").fill(value),
            lambda params, value: _filled(params["params"], value),
        ),
        _edited(
            "dtype lost by full(shape)",
            "An array made from the shape alone has the default dtype, so in a bfloat16 model one kernel "
            "is suddenly wider. `full_like` keeps the old dtype.",
            lambda params, value: _with(params, jnp.full(params["params"]["kernel"].shape, value)),
            lambda params, value: _with(params, np.full(params["params"]["kernel"].shape, value)),
        ),
        _edited(
            "the original dict mutated",
            "The answer is right, but the dict that `init` returned was edited in place, so others that "
            "hold it now have other parameters. Make a new dict for each level on the path to the leaf.",
            _in_place,
        ),
    ),
)
