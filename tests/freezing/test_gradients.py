"""Gradients of trained leaves alone: right, cheap, and fit for `freeze`; filters for NNX and masks for Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx
from flax.training.train_state import TrainState

from paramend.edits.selection import at
from paramend.errors import BadArgument, NoMatch, Unsupported
from paramend.freezing.freeze import HOW, freeze, nnx_filter, value_and_grad
from paramend.selectors.selector import sel
from support.numerics import assert_close
from support.slow import slow_except

WIDTH, DEPTH = 128, 6
KEYS = jax.random.split(jax.random.key(0), DEPTH)
PARAMS = {
    f"layer_{i}": {"kernel": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5, "bias": jnp.zeros(WIDTH)}
    for i, key in enumerate(KEYS)
}
X = jax.random.normal(jax.random.key(1), (32, WIDTH))
SELECTORS = {
    "first layers": "layer_[:4]/**",
    "last layers": "layer_[3:]/**",
    "all but one": sel("**") & ~sel("layer_[2]/**"),
    "biases": "**/bias",
    "one leaf": "layer_0/kernel",
}


def loss(params, x=X):
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return (x**2).mean()


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# ---- cost --------------------------------------------------------------------------------------------------------


def by_hand(tx, mask):
    """A step as one writes it with partition and stop_gradient, and its initial state."""

    def split(params):
        trained = jax.tree.map(lambda flag, p: None if flag else p, mask, params)
        frozen = jax.tree.map(lambda flag, p: p if flag else None, mask, params)
        return trained, frozen

    def combined(trained, frozen):
        frozen = jax.lax.stop_gradient(frozen)
        return jax.tree.map(lambda t, f: f if t is None else t, trained, frozen, is_leaf=lambda x: x is None)

    def step(params, state, x):
        trained, frozen = split(params)
        value, grads = jax.value_and_grad(lambda t: loss(combined(t, frozen), x))(trained)
        updates, state = tx.update(grads, state, trained)
        return combined(optax.apply_updates(trained, updates), frozen), state, value

    return step, tx.init(split(PARAMS)[0])


def ours(tx, selector, **options):
    tx, gradient = freeze(tx, selector), value_and_grad(loss, selector, **options)

    def step(params, state, x):
        value, grads = gradient(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step, tx.init(PARAMS)


def cost(step, state):
    found = jax.jit(step).lower(PARAMS, state, X).compile().cost_analysis()
    return found["flops"], found["bytes accessed"]


def nbytes(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("options", [{}, pytest.param({"zeros": True}, marks=pytest.mark.slow)], ids=["none", "zeros"])
@pytest.mark.parametrize("case", slow_except({"first layers", "one leaf"}, SELECTORS))
def test_a_step_costs_no_more_than_by_hand(case, options):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    mask = at(PARAMS, SELECTORS[case]).mask()
    (hand, hand_state), (step, state) = by_hand(tx, mask), ours(tx, SELECTORS[case], **options)
    for one, other in zip(cost(step, state), cost(hand, hand_state), strict=True):
        assert one <= other
    assert nbytes(state) == nbytes(hand_state)
    new, _, value = step(PARAMS, state, X)
    expected, _, same = hand(PARAMS, hand_state, X)
    assert bits(new) == bits(expected)
    assert bits(value) == bits(same)


def test_the_backward_pass_ends_at_the_lowest_trained_layer():
    """Six layers forward, and backward one: two products of its own, none for what lies below."""
    full = jax.jit(jax.value_and_grad(loss)).lower(PARAMS).compile().cost_analysis()["flops"]
    part = jax.jit(value_and_grad(loss, "layer_[:-1]/**")).lower(PARAMS).compile().cost_analysis()["flops"]
    product = 2 * 32 * WIDTH * WIDTH
    assert full > (3 * DEPTH - 1) * product
    assert part < (DEPTH + 1.5) * product


# ---- what comes back ---------------------------------------------------------------------------------------------


# Forward and back through 6 layers, with sums of 128 terms, and one over the 32 rows.
TERMS = 2 * DEPTH * WIDTH + 32


@pytest.mark.numeric
@pytest.mark.parametrize("case", SELECTORS)
def test_gradients_are_those_of_jax(case):
    value, grads = jax.jit(value_and_grad(loss, SELECTORS[case]))(PARAMS)
    expected, full = jax.jit(jax.value_and_grad(loss))(PARAMS)
    assert_close(value, expected, terms=TERMS)
    mask = at(PARAMS, SELECTORS[case]).mask()

    def compare(flag, grad, wanted):
        assert (grad is None) == flag
        if not flag:
            assert_close(grad, wanted, terms=TERMS)

    jax.tree.map(compare, mask, grads, full)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("with_params", [True, False])
def test_frozen_leaves_may_have_no_gradient(how, with_params):
    tx = freeze(optax.sgd(0.1, momentum=0.9), "layer_[:4]/**", how=how)
    state = tx.init(PARAMS)
    _, grads = value_and_grad(loss, "layer_[:4]/**")(PARAMS)
    if not with_params:
        if how == "exclude":
            updates, _ = tx.update(grads, state)
            assert updates["layer_0"]["kernel"] is None
            assert np.asarray(updates["layer_5"]["kernel"]).any()
        return
    for _ in range(2):
        updates, state = tx.update(grads, state, PARAMS)
    after = optax.apply_updates(PARAMS, updates)
    assert bits(after["layer_0"]) == bits(PARAMS["layer_0"])
    assert bits(after["layer_5"]) != bits(PARAMS["layer_5"])


def test_where_a_trained_leaf_has_no_gradient_nothing_is_made_up():
    tx = freeze(optax.sgd(0.1), "layer_0/**")
    _, grads = value_and_grad(loss, "layer_[:2]/**")(PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert updates["layer_1"]["kernel"] is None
    assert np.signbit(updates["layer_0"]["kernel"]).all()


def test_clipping_outside_and_accumulation():
    _, grads = value_and_grad(loss, "layer_[:4]/**")(PARAMS)
    tx = optax.chain(optax.clip_by_global_norm(1e-3), freeze(optax.adamw(0.1), "layer_[:4]/**"))
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert bits(optax.apply_updates(PARAMS, updates)["layer_0"]) == bits(PARAMS["layer_0"])
    _, full = value_and_grad(loss, "layer_[:4]/**", zeros=True)(PARAMS)
    tx = optax.MultiSteps(freeze(optax.adamw(0.1), "layer_[:4]/**"), 2)
    state = tx.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(full, state, PARAMS)
    assert np.asarray(updates["layer_5"]["bias"]).any()
    assert not np.asarray(updates["layer_0"]["bias"]).any()


def test_train_state():
    model = nn.Dense(3)
    variables = model.init(jax.random.key(0), X)
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=freeze(optax.adamw(0.1), "params/bias"))
    _, grads = value_and_grad(lambda v: (model.apply(v, X) ** 2).mean(), "params/bias")(variables)
    after = state.apply_gradients(grads=grads).params["params"]
    assert bits(after["bias"]) == bits(variables["params"]["bias"])
    assert bits(after["kernel"]) != bits(variables["params"]["kernel"])


def test_arguments():
    def loss(scale, params, *, shift):
        return scale * (params["a"] * params["b"]).sum() + shift, {"scale": scale}

    params = {"a": jnp.ones(2), "b": jnp.full(2, 3.0)}
    for argnum in (1, -1):
        gradient = value_and_grad(loss, "a", argnum=argnum, has_aux=True)
        (value, aux), grads = gradient(2.0, params, shift=1.0)
        assert (float(value), aux, grads["a"]) == (13.0, {"scale": 2.0}, None)
        assert grads["b"].tolist() == [2.0, 2.0]
    with pytest.raises(BadArgument, match="argnum=3"):
        value_and_grad(loss, "a", argnum=3)(2.0, params, shift=1.0)


def test_integers_take_no_part():
    params = {"ids": jnp.arange(2), "w": jnp.ones(2), "v": jnp.ones(2)}
    _, grads = value_and_grad(lambda p: (p["w"] * p["v"] * p["ids"]).sum(), "w")(params)
    assert grads["ids"] is None
    assert grads["w"] is None
    assert grads["v"].tolist() == [0.0, 1.0]


def test_second_derivatives_go_through():
    def outer(w):
        return value_and_grad(lambda p: (p["a"] * p["b"] ** 2).sum(), "a")({"a": w, "b": jnp.ones(2)})[1]["b"].sum()

    assert jax.grad(outer)(jnp.ones(2)).tolist() == [2.0, 2.0]


def test_one_trace():
    traces = []

    def counted(params):
        traces.append(1)
        return loss(params)

    step = jax.jit(value_and_grad(counted, "layer_0/**"))
    for _ in range(3):
        step(PARAMS)
    assert len(traces) == 1


@pytest.mark.numeric
@pytest.mark.parametrize("selector", ["layers[0]/**", lambda path, spec: path.startswith("layers/0")])
def test_equinox(selector):
    model = eqx.nn.MLP(2, 1, 4, 2, key=jax.random.key(0))

    def loss(model):
        return (jax.vmap(model)(jnp.ones((3, 2))) ** 2).mean()

    value, grads = eqx.filter_jit(value_and_grad(loss, selector))(model)
    expected, full = eqx.filter_value_and_grad(loss)(model)
    assert_close(value, expected, terms=2 * (2 + 4 + 4) + 3, scale=1)
    assert grads.layers[0].weight is None
    assert_close(grads.layers[1].weight, full.layers[1].weight, terms=2 * (2 + 4 + 4) + 3, scale=1)
    tx = freeze(optax.adamw(0.1), selector)
    updates, _ = tx.update(grads, tx.init(eqx.filter(model, eqx.is_array)), eqx.filter(model, eqx.is_array))
    after = eqx.apply_updates(model, updates)
    assert bits(after.layers[0].weight) == bits(model.layers[0].weight)
    assert bits(after.layers[1].weight) != bits(model.layers[1].weight)


def test_masks_feed_partition():
    model = eqx.nn.MLP(2, 1, 4, 2, key=jax.random.key(0))
    frozen, trained = eqx.partition(model, at(model, "layers[:-1]/**").mask())
    assert trained.layers[0].weight is None
    assert frozen.layers[-1].weight is None
    assert bits(eqx.combine(frozen, trained)) == bits(model)


# ---- NNX ---------------------------------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(3)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.norm(x)


def paths(state):
    return ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]


def test_filters():
    model = Net(nnx.Rngs(0))
    chosen = nnx_filter(model, "layers[-1]/**")
    assert paths(nnx.state(model, chosen)) == ["layers/2/bias", "layers/2/kernel"]
    _, last, rest = nnx.split(model, chosen, ...)
    assert len(paths(last)) == 2
    assert not set(paths(last)) & set(paths(rest))
    assert paths(nnx.state(model, nnx_filter(nnx.state(model), "**/mean"))) == ["norm/mean"]
    assert paths(nnx.state(model, nnx.All(nnx.Param, nnx.Not(nnx_filter(model, "layers/**"))))) == [
        "norm/bias",
        "norm/scale",
    ]
    assert repr(chosen).startswith("<function nnx_filter(pm.sel(")


def test_filters_of_classes_and_kinds():
    model = Net(nnx.Rngs(0))
    assert len(paths(nnx.state(model, nnx_filter(model, nnx.Linear)))) == 6
    assert set(paths(nnx.state(model, nnx_filter(model, nnx.BatchStat)))) == {"norm/mean", "norm/var"}


def test_a_filter_that_selects_nothing_is_an_error():
    model = Net(nnx.Rngs(0))
    with pytest.raises(NoMatch):
        nnx_filter(model, "layer[-1]/**")
    with pytest.raises(Unsupported) as caught:
        nnx_filter(PARAMS, "**")
    assert "pm.at" in caught.value.hint


def test_a_shared_variable_has_one_path_in_nnx_and_is_found_under_all():
    model = Net(nnx.Rngs(0))
    model.layers[2].kernel = model.layers[0].kernel
    for path in ("layers/0/kernel", "layers/2/kernel"):
        assert len(paths(nnx.state(model, nnx_filter(model, path)))) == 1


def test_training_with_filters_alone():
    """As the hint of `value_and_grad` says: the optimizer has never heard of the frozen Variables."""
    model = Net(nnx.Rngs(0))
    with pytest.raises(Unsupported) as caught:
        value_and_grad(loss, "layers[:2]/**")(model)
    code, _, setup = caught.value.hint.partition(" with ")

    class Pm:  # what hints call `pm`
        nnx_filter = staticmethod(nnx_filter)

    def of(model, x):
        return ((model(x) - 1) ** 2).mean()

    names = {"nnx": nnx, "pm": Pm, "model": model, "selector": "layers[:2]/**", "loss": of}
    exec(setup, names)
    gradient = eval(code, names)
    optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=names["trained"])
    before = bits(nnx.state(model.layers))

    @nnx.jit
    def step(model, optimizer, x):
        value, grads = gradient(model, x)
        optimizer.update(model, grads)
        return value

    for _ in range(2):
        step(model, optimizer, jax.random.normal(jax.random.key(0), (4, 2)))
    after = bits(nnx.state(model.layers))
    assert after[:4] == before[:4]
    assert after[4] != before[4]


# ---- errors ------------------------------------------------------------------------------------------------------


def test_nothing_selected():
    with pytest.raises(NoMatch) as caught:
        value_and_grad(loss, "Layer_0/**")(PARAMS)
    assert "layer_0/**" in caught.value.near


def test_slices_are_refused_with_a_way_out():
    with pytest.raises(Unsupported, match=r"\[:4\]") as caught:
        value_and_grad(loss, sel("layer_0/kernel")[:4])

    class Pm:
        freeze, sel = staticmethod(freeze), staticmethod(sel)

    code = caught.value.hint.partition("with ")[2].partition(" to ")[0]
    eval(code, {"pm": Pm, "tx": optax.adam(0.1)}).init(PARAMS)
