"""The lesson on zeroing the last layer's kernel."""

# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

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
The problem. A network has `num_layers` layers `nn.Dense(features)` with relu between
them, and the last one is made with `bias_init=nn.initializers.ones`. Initialise it with
`PRNGKey(seed)` on `x`, make the last kernel zero, keep the last bias, and return the
output for `x`, of shape (N, features). All counts arrive as floats. With a zero kernel
the output is the bias, so every number of the answer is one.

The idea. Flax numbers the layers in the order of their creation, from `Dense_0`, so the
last one is `Dense_<num_layers - 1>`.

The pitfall. Counting from one goes past the end. A dict takes any key without an
error: a kernel written to `Dense_<num_layers>` or to `dense_2` is added, never read,
and nothing is zeroed. And zeroing every kernel also returns ones, from a network that
lost all it had learned.
"""

WAY = """
The Paramend way. A position in brackets counts the numbered layers that exist, and a
path that matches nothing is an error.

    params = pm.at(params, "params/Dense_[-1]/kernel").zero()
"""


class Stack(nn.Module):
    """Dense layers with relu between them, the last one with a bias of ones."""

    num_layers: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.num_layers - 1):
            x = nn.relu(nn.Dense(self.features)(x))
        return nn.Dense(self.features, bias_init=nn.initializers.ones)(x)


def zero_last_layer(seed: float, x: Any, num_layers: float, features: float) -> jax.Array:
    """The output of a network whose last kernel was zeroed: its last bias, which is ones."""
    x = jnp.asarray(x)
    model = Stack(int(num_layers), int(features))
    params = model.init(jax.random.PRNGKey(int(seed)), x)
    params = at(params, "params/Dense_[-1]/kernel").zero()
    return model.apply(params, x)


def _start(seed: float, x: Any, num_layers: float, features: float) -> tuple[Any, Any, jax.Array, int]:
    model = Stack(int(num_layers), int(features))
    x = jnp.asarray(x)
    return model, model.init(jax.random.PRNGKey(int(seed)), x), x, int(num_layers)


def _with_layer(params: Any, name: str, layer: Any) -> Any:
    return {"params": {**params["params"], name: layer}}


def _read_past(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    layer = params["params"][f"Dense_{n}"]
    return model.apply(_with_layer(params, f"Dense_{n}", {**layer, "kernel": jnp.zeros_like(layer["kernel"])}), x)


def _added_past(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    layer = params["params"][f"Dense_{n - 1}"]
    return model.apply(_with_layer(params, f"Dense_{n}", {**layer, "kernel": jnp.zeros_like(layer["kernel"])}), x)


def _selected_past(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    return model.apply(at(params, f"params/Dense_{n}/kernel").zero(), x)


def _position_past(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    return model.apply(at(params, f"params/Dense_[{n}]/kernel").zero(), x)


def _one_early(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    return model.apply(at(params, f"params/Dense_{n - 2}/kernel").zero(), x)


def _first(*args: Any) -> Any:
    model, params, x, _ = _start(*args)
    return model.apply(at(params, "params/Dense_0/kernel").zero(), x)


def _bias_zeroed(*args: Any) -> Any:
    model, params, x, _ = _start(*args)
    return model.apply(at(params, "params/Dense_[-1]/**").zero(), x)


def _bias_dropped(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    kernel = params["params"][f"Dense_{n - 1}"]["kernel"]
    return model.apply(_with_layer(params, f"Dense_{n - 1}", {"kernel": jnp.zeros_like(kernel)}), x)


def _scalar(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    name = f"Dense_{n - 1}"
    return model.apply(_with_layer(params, name, {**params["params"][name], "kernel": 0.0}), x)


def _scalar_set(*args: Any) -> Any:
    model, params, x, _ = _start(*args)
    return model.apply(at(params, "params/Dense_[-1]/kernel").set(0.0), x)


def _inner_read(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    name = f"Dense_{n - 1}"
    layer = {**params[name], "kernel": jnp.zeros_like(params[name]["kernel"])}
    return model.apply({**params, name: layer}, x)


def _inner_selected(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    return model.apply(at(params, f"Dense_{n - 1}/kernel").zero(), x)


def _inner_applied(*args: Any) -> Any:
    model, params, x, _ = _start(*args)
    return model.apply(at(params["params"], "Dense_[-1]/kernel").zero(), x)


def _dtype_lost(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    layer = params["params"][f"Dense_{n - 1}"]
    return model.apply(_with_layer(params, f"Dense_{n - 1}", {**layer, "kernel": jnp.zeros(layer["kernel"].shape)}), x)


def _numpy_dtype(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    layer = params["params"][f"Dense_{n - 1}"]
    return model.apply(_with_layer(params, f"Dense_{n - 1}", {**layer, "kernel": np.zeros(layer["kernel"].shape)}), x)


def _every_kernel(*args: Any) -> Any:
    model, params, x, _ = _start(*args)
    return model.apply(at(params, "**/kernel").zero(), x)


def _every_leaf(*args: Any) -> Any:
    model, params, x, _ = _start(*args)
    return model.apply(jax.tree.map(jnp.zeros_like, params), x)


def _wrong_case_read(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    name = f"dense_{n - 1}"
    layer = params["params"][name]
    return model.apply(_with_layer(params, name, {**layer, "kernel": jnp.zeros_like(layer["kernel"])}), x)


def _wrong_case_added(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    layer = params["params"][f"Dense_{n - 1}"]
    new = {**layer, "kernel": jnp.zeros_like(layer["kernel"])}
    return model.apply(_with_layer(params, f"dense_{n - 1}", new), x)


def _wrong_case_selected(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    return model.apply(at(params, f"params/dense_{n - 1}/kernel").zero(), x)


def _mutated(*args: Any) -> Any:
    model, params, x, n = _start(*args)
    layer = params["params"][f"Dense_{n - 1}"]
    layer["kernel"] = jnp.zeros_like(layer["kernel"])
    return model.apply(params, x)


def cases(rng: np.random.Generator) -> list[Case]:
    """An ordinary model and one in bfloat16, of different widths, so that they share no compiled program."""

    def args(width: int) -> tuple[Any, ...]:
        x = rng.normal(size=(int(rng.integers(2, 6)), width)).astype(np.float32)
        # With three layers or more, the first, the last and the one before it are three different layers.
        return float(rng.integers(1000)), x, float(rng.integers(3, 6)), float(rng.integers(3, 6))

    odd, even = args(int(rng.choice([3, 5, 7]))), args(int(rng.choice([2, 4, 6])))
    return [Case(odd), Case(even, note="the model's parameters are bfloat16", half=True)]


LESSON = Lesson(
    name="zero_last_layer",
    title="Zero the last kernel, keep its bias",
    text=TEXT,
    way=WAY,
    reference=zero_last_layer,
    cases=cases,
    observe=partial(observe, facts=applied_facts),
    mistakes=(
        Mistake(
            "off by one in the layer name",
            "Layers are numbered from zero, so the last of N is Dense_<N-1>: Dense_<N> does not exist (and "
            "is silently added if written to), Dense_<N-2> is the one before.",
            (_read_past, _added_past, _selected_past, _position_past, _one_early),
        ),
        Mistake(
            "the first layer zeroed instead of the last",
            "Dense_0 is the layer that reads x. The last one is at position -1.",
            (_first,),
        ),
        Mistake(
            "the bias dropped or zeroed as well",
            "Only the kernel should become zero. The bias of the last layer is what the answer shows: it "
            "must stay ones.",
            (_bias_zeroed, _bias_dropped),
        ),
        Mistake(
            "a scalar where an array belongs",
            "The kernel became the number 0.0. A layer checks that its kernel has the shape it was made "
            "with: use `zeros_like` of the old kernel.",
            (_scalar, _scalar_set),
        ),
        Mistake(
            "the outer `params` level lost",
            'Flax keeps the layers below a key for the collection: params["params"]["Dense_0"], and '
            "`apply` needs that outer level too.",
            (_inner_read, _inner_selected, _inner_applied),
        ),
        Mistake(
            "dtype lost by zeros(shape)",
            "Zeros made from the shape alone have the default dtype, so in a bfloat16 model one kernel is "
            "suddenly wider. `zeros_like` keeps the old dtype.",
            (_dtype_lost, _numpy_dtype),
        ),
        Mistake(
            "every kernel replaced instead of one",
            "With all kernels zero the output is still ones, but the network lost what it had learned; "
            "with all leaves zero the output is zero. Only the last kernel should change.",
            (_every_kernel, _every_leaf),
        ),
        Mistake(
            "`dense_0` for `Dense_0`",
            "Flax names a layer after its class, with a capital letter. Reading another spelling fails; "
            "writing to it adds a layer that nothing reads.",
            (_wrong_case_read, _wrong_case_added, _wrong_case_selected),
        ),
        Mistake(
            "the original dict mutated",
            "The answer is right, but the dict that `init` returned was edited in place, so others that "
            "hold it now have other parameters. Make a new dict for each level on the path to the leaf.",
            (_mutated,),
        ),
    ),
)
