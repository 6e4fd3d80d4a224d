"""The lesson on freezing the first layer for one step."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paramend.edits.selection import at
from paramend.lessons.lesson import Case, Lesson, edited, mistake
from paramend.lessons.observation import Observation
from paramend.lessons.witness import Picture, Witness, candidates, layer_names, observe, same


class Regressor(nn.Module):
    """Eight hidden units and one output."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(1)(x)


class Reversed(nn.Module):
    """The same layers in one expression, which creates the outer one first, so that it is `Dense_0`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(1)(nn.relu(nn.Dense(8)(x)))


def freeze_first_dense(seed: float, x: Any, y: Any, lr: float) -> jax.Array:
    """The loss, and the norm of the frozen kernel after and before one step of the other layer."""
    x, y = jnp.asarray(x), jnp.asarray(y)
    model = Regressor()
    params = model.init(jax.random.PRNGKey(int(seed)), x)

    def mean_square(params: Any) -> jax.Array:
        return jnp.mean((model.apply(params, x)[:, 0] - y) ** 2)

    loss, grads = jax.value_and_grad(mean_square)(params)
    grads = at(grads, "params/Dense_0/**").zero()
    stepped = jax.tree.map(lambda p, g: p - lr * g, params, grads)
    return jnp.stack([loss, _norm(stepped), _norm(params)])


def _norm(params: Any) -> jax.Array:
    return jnp.linalg.norm(at(params, "params/Dense_0/kernel").one())


def _start(seed: float, x: Any, y: Any, kind: type[nn.Module] = Regressor) -> tuple[Any, Callable[[Any], Any]]:
    x, y, model = jnp.asarray(x), jnp.asarray(y), kind()
    params = model.init(jax.random.PRNGKey(int(seed)), x)
    return params, lambda params: jnp.mean((model.apply(params, x)[:, 0] - y) ** 2)


def _sgd(params: Any, grads: Any, lr: float) -> Any:
    return jax.tree.map(lambda p, g: p - lr * g, params, grads)


def _as_it_is(tree: Any) -> Any:
    return tree


def _zeroed(tree: Any) -> Any:
    return at(tree, "params/Dense_0/**").zero()


def _solved(
    edit: Callable[[Any], Any],
    seed: float,
    x: Any,
    y: Any,
    lr: float,
    *,
    kind: type[nn.Module] = Regressor,
    before: Callable[[Any], Any] = _as_it_is,
    between: Callable[[Any], Any] = _as_it_is,
    after: Callable[[Any], Any] = _as_it_is,
) -> Any:
    """The reference with another edit of the gradients, of another model, or with edits of the parameters."""
    params, mean_square = _start(seed, x, y, kind)
    params = before(params)
    loss, grads = jax.value_and_grad(mean_square)(params)
    stepped = after(_sgd(between(params), edit(grads), lr))
    return jnp.stack([loss, _norm(stepped), _norm(params)])


_edited = partial(edited, _solved)


def _zero_layer(layers: Any, name: str, into: str = "") -> Any:
    return {**layers, into or name: jax.tree.map(jnp.zeros_like, layers[name])}


def _zero_where(chosen: Callable[[tuple[str, ...]], bool]) -> Callable[[Any], Any]:
    def leaf(path: Any, grad: jax.Array) -> jax.Array:
        return jnp.zeros_like(grad) if chosen(tuple(key.key for key in path)) else grad

    return partial(jax.tree_util.tree_map_with_path, leaf)


def _without_bias(grads: Any) -> Any:
    kernel = grads["params"]["Dense_0"]["kernel"]
    return {"params": {**grads["params"], "Dense_0": {"kernel": jnp.zeros_like(kernel)}}}


def _zeroed_before(seed: float, x: Any, y: Any, lr: float) -> Any:
    params, mean_square = _start(seed, x, y)
    zeroed = _zeroed(params)
    loss, grads = jax.value_and_grad(mean_square)(zeroed)
    return jnp.stack([loss, _norm(_sgd(zeroed, grads, lr)), _norm(params)])


def _norms_after(seed: float, x: Any, y: Any, lr: float) -> Any:
    params, mean_square = _start(seed, x, y)
    loss, grads = jax.value_and_grad(mean_square)(params)
    params = _sgd(params, _zeroed(grads), lr)
    return jnp.stack([loss, _norm(params), _norm(params)])


def _updates_zeroed(seed: float, x: Any, y: Any, lr: float) -> Any:
    params, mean_square = _start(seed, x, y)
    loss, grads = jax.value_and_grad(mean_square)(params)
    stepped = jax.tree.map(jnp.add, params, _zeroed(jax.tree.map(lambda g: -lr * g, grads)))
    return jnp.stack([loss, _norm(stepped), _norm(params)])


def _table_of_errors(seed: float, x: Any, y: Any, lr: float) -> Any:
    x, y = jnp.asarray(x), jnp.asarray(y)
    model = Regressor()
    params = model.init(jax.random.PRNGKey(int(seed)), x)
    loss, grads = jax.value_and_grad(lambda params: jnp.mean((model.apply(params, x) - y) ** 2))(params)
    return jnp.stack([loss, _norm(_sgd(params, _zeroed(grads), lr)), _norm(params)])


def _in_place(seed: float, x: Any, y: Any, lr: float) -> Any:
    params, mean_square = _start(seed, x, y)
    loss, grads = jax.value_and_grad(mean_square)(params)
    grads, before = _zeroed(grads), _norm(params)
    for name, layer in params["params"].items():
        for leaf in layer:
            layer[leaf] -= lr * grads["params"][name][leaf]
    return jnp.stack([loss, _norm(params), before])


def step_facts(witness: Witness, seen: Observation) -> dict[str, str]:
    """Which leaves moved in the step, if the tree was seen whose kernel has the norm that was returned."""
    if not witness.handed or np.shape(seen.result) != (3,):
        return {}
    before = witness.handed[-1].picture
    names = layer_names(before)
    kernel = next((path for path, name in names.items() if name == "layer 0 kernel"), None)
    after = float(np.asarray(seen.result)[1])

    def fits(leaves: Picture) -> bool:
        if kernel is None or leaves.keys() != before.keys() or isinstance(leaves[kernel], jax.core.Tracer):
            return False
        norm = float(np.linalg.norm(np.asarray(leaves[kernel], np.float32)))
        return math.isclose(norm, after, rel_tol=1e-4) or (math.isnan(norm) and math.isnan(after))

    stepped = next(candidates(witness, fits), None)
    if stepped is None:
        return {}
    return {
        f"{names[path]} in the step": "stayed" if kept else "moved"
        for path, leaf in before.items()
        if (kept := same(leaf, stepped[path])) is not None
    }


def cases(rng: np.random.Generator) -> list[Case]:
    """An ordinary step, and the same step with an infinite learning rate."""
    count, width = int(rng.integers(4, 8)), int(rng.integers(2, 6))
    x = rng.normal(size=(count, width)).astype(np.float32)
    y = rng.normal(size=count).astype(np.float32)
    seed, lr = float(rng.integers(1000)), float(rng.uniform(0.02, 0.2))
    infinite = "lr is infinite: where a gradient is zero, infinity times zero gives nan"
    return [Case((seed, x, y, lr)), Case((seed, x, y, math.inf), note=infinite)]


LESSON = Lesson(
    name="freeze_first_dense",
    reference=freeze_first_dense,
    cases=cases,
    observe=partial(observe, facts=step_facts),
    unseen="The three numbers do not show whether the bias of Dense_0 stayed and Dense_1 moved. That is "
    "checked on the tree after the step, if `solve` holds that tree in a variable or passes it to a "
    "function, outside of `jit`.",
    mistakes=(
        _edited(
            "off by one in the layer name",
            "Layers are numbered from zero: the first is Dense_0. If the gradients of Dense_1 are zero, Dense_0 moves.",
            lambda grads: at(grads, "params/Dense_1/**").zero(),
        ),
        mistake(
            "the layers made inside out",
            "A layer gets its number when it is created. In nn.Dense(1)(nn.relu(nn.Dense(8)(x))) Python "
            "creates the outer layer first, so Dense_0 is the last layer. Give each layer its own line.",
            partial(_solved, _zeroed, kind=Reversed),
        ),
        _edited(
            "`dense_0` for `Dense_0`",
            "Flax names a layer after its class, with a capital letter. Reading another spelling fails; "
            "comparing paths with it is never true, so nothing is frozen.",
            lambda grads: {"params": _zero_layer(grads["params"], "dense_0", into="Dense_0")},
            lambda grads: at(grads, "params/dense_0/**").zero(),
            lambda grads: {"params": _zero_layer(grads["params"], "Dense_0", into="dense_0")},
            _zero_where(lambda path: "dense_0" in path),
        ),
        _edited(
            "the outer `params` level lost",
            'Gradients have the paths of the parameters: grads["params"]["Dense_0"]. Reading without the '
            "outer level fails; comparing paths without it is never true, so nothing is frozen.",
            lambda grads: _zero_layer(grads, "Dense_0"),
            lambda grads: at(grads, "Dense_0/**").zero(),
            lambda grads: {**grads, "Dense_0": _zero_layer(grads["params"], "Dense_0")["Dense_0"]},
            _zero_where(lambda path: path[0] == "Dense_0"),
        ),
        _edited(
            "the bias dropped or left to move",
            "The layer is its kernel and its bias. Zero both gradients, and keep both in the tree.",
            lambda grads: at(grads, "params/Dense_0/kernel").zero(),
            _without_bias,
        ),
        _edited(
            "every kernel replaced instead of one",
            "More than Dense_0 was frozen: the gradient of Dense_1 was made zero too, so the step teaches nothing.",
            lambda grads: at(grads, "**/kernel").zero(),
            lambda grads: jax.tree.map(jnp.zeros_like, grads),
        ),
        _edited(
            "a scalar where an array belongs",
            "One number instead of a layer's gradients: the two trees no longer have the same structure. "
            "Zero each leaf.",
            lambda grads: {"params": {**grads["params"], "Dense_0": 0.0}},
            lambda grads: {"params": {**grads["params"], "Dense_0": jnp.zeros(())}},
        ),
        mistake(
            "the parameter zeroed instead of its gradient",
            "Zeroing the layer's parameters erases the layer. Zeroing their gradients keeps them where they are.",
            _zeroed_before,
            partial(_solved, _as_it_is, before=_zeroed),
            partial(_solved, _as_it_is, between=_zeroed),
            partial(_solved, _as_it_is, after=_zeroed),
        ),
        mistake(
            "the norm taken after the step",
            "Both norms come from the parameters after the step, so they would be equal even if the layer "
            "had moved. Take norm_before from the old parameters.",
            _norms_after,
        ),
        mistake(
            "updates zeroed where gradients were asked",
            "With an infinite lr the layer did not move, so no zero gradient went through the step: the "
            "updates were made zero, the layer was left out of the step, or norm_after was taken before "
            "it. For plain gradient descent the numbers agree; with an optimizer that uses the size of "
            "all gradients (a global clip) they do not.",
            _updates_zeroed,
        ),
        mistake(
            "the prediction not squeezed",
            "A prediction of shape (N, 1) minus a y of shape (N,) broadcasts to (N, N), and the loss is "
            "the mean of all of it.",
            _table_of_errors,
        ),
        mistake(
            "the original dict mutated",
            "The numbers are right, but the dict that `init` returned was updated in place: the old "
            "parameters are gone. `jax.tree.map` makes a new tree.",
            _in_place,
        ),
    ),
)
