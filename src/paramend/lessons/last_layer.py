"""The lesson on zeroing the last layer's kernel."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paramend.edits.selection import at
from paramend.lessons.lesson import Case, Lesson, edited, two_widths
from paramend.lessons.witness import applied_facts, observe


class Stack(nn.Module):
    """Dense layers with relu between them, the last one with a bias of ones or of other values."""

    num_layers: int
    features: int
    bias_init: Any = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.num_layers - 1):
            x = nn.relu(nn.Dense(self.features)(x))
        return nn.Dense(self.features, bias_init=self.bias_init)(x)


def zero_last_layer(seed: float, x: Any, num_layers: float, features: float) -> jax.Array:
    """The output of a network whose last kernel was zeroed: its last bias, which is ones."""
    x = jnp.asarray(x)
    model = Stack(int(num_layers), int(features))
    params = model.init(jax.random.PRNGKey(int(seed)), x)
    params = at(params, "params/Dense_[-1]/kernel").zero()
    return model.apply(params, x)


def _solved(edit: Callable[[Any, int], Any], seed: float, x: Any, num_layers: float, features: float) -> Any:
    """The reference with another edit of the parameters."""
    x, model = jnp.asarray(x), Stack(int(num_layers), int(features))
    return model.apply(edit(model.init(jax.random.PRNGKey(int(seed)), x), int(num_layers)), x)


_edited = partial(edited, _solved)


def _with(params: Any, name: str, **leaves: Any) -> Any:
    return {"params": {**params["params"], name: {**params["params"][name], **leaves}}}


def _zeroed(layers: Any, name: str, into: str = "") -> Any:
    """The layers with one made of zeros and the bias of `name`."""
    return {**layers, into or name: {**layers[name], "kernel": jnp.zeros_like(layers[name]["kernel"])}}


def _without_bias(params: Any, n: int) -> Any:
    kernel = params["params"][f"Dense_{n - 1}"]["kernel"]
    return {"params": {**params["params"], f"Dense_{n - 1}": {"kernel": jnp.zeros_like(kernel)}}}


def _in_place(params: Any, n: int) -> Any:
    layer = params["params"][f"Dense_{n - 1}"]
    layer["kernel"] = jnp.zeros_like(layer["kernel"])
    return params


def _shape(params: Any, n: int) -> tuple[int, ...]:
    return params["params"][f"Dense_{n - 1}"]["kernel"].shape  # type: ignore[no-any-return]


def cases(rng: np.random.Generator) -> list[Case]:
    """Three layers or more: the first, the last and the one before it are three different layers."""

    def args(width: int) -> tuple[Any, ...]:
        x = rng.normal(size=(int(rng.integers(2, 6)), width)).astype(np.float32)
        return float(rng.integers(1000)), x, float(rng.integers(3, 6)), float(rng.integers(3, 6))

    return two_widths(rng, args)


LESSON = Lesson(
    name="zero_last_layer",
    reference=zero_last_layer,
    cases=cases,
    observe=partial(observe, facts=applied_facts),
    mistakes=(
        _edited(
            "off by one in the layer name",
            "Layers are numbered from zero, so the last of N is Dense_<N-1>: Dense_<N> does not exist (and "
            "is silently added if written to), Dense_<N-2> is the one before.",
            lambda params, n: {"params": _zeroed(params["params"], f"Dense_{n}")},
            lambda params, n: {"params": _zeroed(params["params"], f"Dense_{n - 1}", into=f"Dense_{n}")},
            lambda params, n: at(params, f"params/Dense_{n}/kernel").zero(),
            lambda params, n: at(params, f"params/Dense_[{n}]/kernel").zero(),
            lambda params, n: at(params, f"params/Dense_{n - 2}/kernel").zero(),
        ),
        _edited(
            "the first layer zeroed instead of the last",
            "Dense_0 is the layer that reads x. The last one is at position -1.",
            lambda params, n: at(params, "params/Dense_0/kernel").zero(),
        ),
        _edited(
            "the bias dropped or zeroed as well",
            "Only the kernel should become zero. The bias of the last layer is what the answer shows: it "
            "must stay ones.",
            lambda params, n: at(params, "params/Dense_[-1]/**").zero(),
            _without_bias,
        ),
        _edited(
            "a scalar where an array belongs",
            "The kernel became the number 0.0. A layer checks that its kernel has the shape it was made "
            "with: use `zeros_like` of the old kernel.",
            lambda params, n: _with(params, f"Dense_{n - 1}", kernel=0.0),
            lambda params, n: at(params, "params/Dense_[-1]/kernel").set(0.0),
        ),
        _edited(
            "the outer `params` level lost",
            'Flax keeps the layers below a key for the collection: params["params"]["Dense_0"], and '
            "`apply` needs that outer level too.",
            lambda params, n: _zeroed(params, f"Dense_{n - 1}"),
            lambda params, n: at(params, f"Dense_{n - 1}/kernel").zero(),
            lambda params, n: at(params["params"], "Dense_[-1]/kernel").zero(),
        ),
        _edited(
            "dtype lost by zeros(shape)",
            "Zeros made from the shape alone have the default dtype, so in a bfloat16 model one kernel is "
            "suddenly wider. `zeros_like` keeps the old dtype.",
            lambda params, n: _with(params, f"Dense_{n - 1}", kernel=jnp.zeros(_shape(params, n))),
            lambda params, n: _with(params, f"Dense_{n - 1}", kernel=np.zeros(_shape(params, n))),
        ),
        _edited(
            "every kernel replaced instead of one",
            "With all kernels zero the output is still ones, but the network lost what it had learned; "
            "with all leaves zero the output is zero. Only the last kernel should change.",
            lambda params, n: at(params, "**/kernel").zero(),
            lambda params, n: jax.tree.map(jnp.zeros_like, params),
        ),
        _edited(
            "`dense_0` for `Dense_0`",
            "Flax names a layer after its class, with a capital letter. Reading another spelling fails; "
            "writing to it adds a layer that nothing reads.",
            lambda params, n: {"params": _zeroed(params["params"], f"dense_{n - 1}")},
            lambda params, n: {"params": _zeroed(params["params"], f"Dense_{n - 1}", into=f"dense_{n - 1}")},
            lambda params, n: at(params, f"params/dense_{n - 1}/kernel").zero(),
        ),
        _edited(
            "the original dict mutated",
            "The answer is right, but the dict that `init` returned was edited in place, so others that "
            "hold it now have other parameters. Make a new dict for each level on the path to the leaf.",
            _in_place,
        ),
    ),
)
