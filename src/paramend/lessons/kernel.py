"""The lesson on replacing one kernel."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paramend.edits.selection import at
from paramend.lessons.lesson import Case, Lesson, Mistake
from paramend.lessons.witness import applied_facts, observe

TEXT = """
The problem. Initialise `nn.Dense(features)` with `PRNGKey(seed)` on `x`, give every
entry of its kernel the value `replacement_value`, leave its bias alone, and return the
output for `x`, of shape (N, features). `seed` and `features` arrive as floats. The
answer can be checked by hand: y[n, j] = value * x[n].sum() + bias[j].

The idea. A model's parameters are a tree of arrays: {"params": {"kernel": ..., "bias":
...}}. An edit makes a new tree in which one leaf is replaced and all others are the
same objects.

The pitfall. The new kernel must be an array of the old one's shape and dtype, at the
old path, below "params", with the bias still beside it. And others may hold the tree
from `init`: change a copy, not the dict itself.
"""

WAY = """
The Paramend way.

    params = pm.at(params, "params/kernel").fill(value)
"""


def kernel_replace(seed: float, x: Any, features: float, replacement_value: float) -> jax.Array:
    """The output of a `Dense` layer whose kernel was filled with one value."""
    x = jnp.asarray(x)
    model = nn.Dense(int(features))
    params = model.init(jax.random.PRNGKey(int(seed)), x)
    params = at(params, "params/kernel").fill(float(replacement_value))
    return model.apply(params, x)


def _start(seed: float, x: Any, features: float) -> tuple[nn.Dense, Any, jax.Array]:
    model = nn.Dense(int(features))
    return model, model.init(jax.random.PRNGKey(int(seed)), jnp.asarray(x)), jnp.asarray(x)


def _float(seed: float, x: Any, features: float, value: float) -> Any:
    model, params, x = _start(seed, x, features)
    return model.apply({"params": {**params["params"], "kernel": value}}, x)


def _scalar(seed: float, x: Any, features: float, value: float) -> Any:
    model, params, x = _start(seed, x, features)
    return model.apply({"params": {**params["params"], "kernel": jnp.array(value)}}, x)


def _scalar_set(seed: float, x: Any, features: float, value: float) -> Any:
    model, params, x = _start(seed, x, features)
    return model.apply(at(params, "params/kernel").set(value), x)


def _bias_dropped(seed: float, x: Any, features: float, value: float) -> Any:
    model, params, x = _start(seed, x, features)
    return model.apply({"params": {"kernel": jnp.full_like(params["params"]["kernel"], value)}}, x)


def _bias_forgotten(seed: float, x: Any, features: float, value: float) -> Any:
    _, params, x = _start(seed, x, features)
    return x @ jnp.full_like(params["params"]["kernel"], value)


def _bias_zeroed(seed: float, x: Any, features: float, value: float) -> Any:
    model, params, x = _start(seed, x, features)
    kernel, bias = params["params"]["kernel"], params["params"]["bias"]
    return model.apply({"params": {"kernel": jnp.full_like(kernel, value), "bias": jnp.zeros_like(bias)}}, x)


def _all_filled(seed: float, x: Any, features: float, value: float) -> Any:
    model, params, x = _start(seed, x, features)
    return model.apply(jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params), x)


def _inner_read(seed: float, x: Any, features: float, value: float) -> Any:
    model, params, x = _start(seed, x, features)
    return model.apply({**params, "kernel": jnp.full_like(params["kernel"], value)}, x)


def _inner_selected(seed: float, x: Any, features: float, value: float) -> Any:
    model, params, x = _start(seed, x, features)
    return model.apply(at(params, "kernel").fill(value), x)


def _inner_applied(seed: float, x: Any, features: float, value: float) -> Any:
    model, params, x = _start(seed, x, features)
    inner = params["params"]
    return model.apply({**inner, "kernel": jnp.full_like(inner["kernel"], value)}, x)


def _dtype_lost(seed: float, x: Any, features: float, value: float) -> Any:
    model, params, x = _start(seed, x, features)
    kernel = jnp.full(params["params"]["kernel"].shape, value)
    return model.apply({"params": {**params["params"], "kernel": kernel}}, x)


def _numpy_dtype(seed: float, x: Any, features: float, value: float) -> Any:
    model, params, x = _start(seed, x, features)
    kernel = np.full(params["params"]["kernel"].shape, value)
    return model.apply({"params": {**params["params"], "kernel": kernel}}, x)


def _mutated(seed: float, x: Any, features: float, value: float) -> Any:
    model, params, x = _start(seed, x, features)
    params["params"]["kernel"] = jnp.full_like(params["params"]["kernel"], value)
    return model.apply(params, x)


def cases(rng: np.random.Generator) -> list[Case]:
    """An ordinary model and one in bfloat16, of different widths, so that they share no compiled program."""

    def args(width: int) -> tuple[Any, ...]:
        x = rng.normal(size=(int(rng.integers(2, 6)), width)).astype(np.float32)
        value = float(rng.choice([-1, 1]) * rng.integers(2, 17) / 8)  # exact in bfloat16, and neither 0 nor 1
        return float(rng.integers(1000)), x, float(rng.integers(2, 6)), value if value != 1.0 else 1.25

    odd, even = args(int(rng.choice([3, 5, 7]))), args(int(rng.choice([2, 4, 6])))
    return [Case(odd), Case(even, note="the model's parameters are bfloat16", half=True)]


LESSON = Lesson(
    name="kernel_replace",
    title="Replace one kernel, keep its bias",
    text=TEXT,
    way=WAY,
    reference=kernel_replace,
    cases=cases,
    observe=partial(observe, facts=applied_facts),
    mistakes=(
        Mistake(
            "a scalar where an array belongs",
            "The kernel became one number. A layer checks that its kernel has the shape it was made with: "
            "fill an array of the old kernel's shape instead.",
            (_float, _scalar, _scalar_set),
        ),
        Mistake(
            "the bias dropped or zeroed as well",
            "Only the kernel should change. Build the new dict from the old one, {**old, 'kernel': new}, "
            "so that the bias stays beside it.",
            (_bias_dropped, _bias_forgotten, _bias_zeroed),
        ),
        Mistake(
            "every leaf replaced instead of one",
            "A map over the whole tree fills the bias too. Select the leaf by its path.",
            (_all_filled,),
        ),
        Mistake(
            "the outer `params` level lost",
            "Flax keeps the tree below a key for the collection: the kernel is at "
            'params["params"]["kernel"], and `apply` needs that outer level too.',
            (_inner_read, _inner_selected, _inner_applied),
        ),
        Mistake(
            "dtype lost by full(shape)",
            "An array made from the shape alone has the default dtype, so in a bfloat16 model one kernel "
            "is suddenly wider. `full_like` keeps the old dtype.",
            (_dtype_lost, _numpy_dtype),
        ),
        Mistake(
            "the original dict mutated",
            "The answer is right, but the dict that `init` returned was edited in place, so others that "
            "hold it now have other parameters. Make a new dict for each level on the path to the leaf.",
            (_mutated,),
        ),
    ),
)
