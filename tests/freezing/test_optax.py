"""Frozen leaves stay bit for bit, and all others train as if the frozen ones were constants: in optax."""

import functools
import inspect
import subprocess
import sys
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx, struct
from flax.core import FrozenDict
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax import contrib

from paramend.errors import BadArgument, NoMatch, SelectorError, Unsupported
from paramend.freezing import optax as adapter
from paramend.freezing.freeze import HOW, freeze
from paramend.selectors.selector import sel
from support.numerics import assert_close
from support.slow import slow_except

pytestmark = pytest.mark.slow  # many small programs to compile

RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"kernel": RNG.normal(size=(3, 4)).astype("f4"), "bias": np.array([-0.0, 0.0, 1.0, -2.0], "f4")},
    "b": {"kernel": RNG.normal(size=(4, 2)).astype("f4"), "bias": np.ones(2, "f4")},
}
PARAMS = jax.tree.map(jnp.asarray, PARAMS)


def loss(params):
    x = jnp.arange(6.0).reshape(2, 3) / 6
    hidden = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"])
    return jnp.mean((hidden @ params["b"]["kernel"] + params["b"]["bias"]) ** 2)


def loss_of_rest(b):
    return loss({"a": PARAMS["a"], "b": b})


@functools.cache
def gradient(loss):
    return jax.jit(jax.value_and_grad(loss))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def assert_trained_alike(found, wanted, steps):
    """Parameters after steps of two programs: sums of 3, 4 and 4 terms, their gradients, and some 20 operations."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(one, other, terms=steps * (2 * (3 + 4 + 4) + 20), scale=2)


def train(tx, params, loss=loss, steps=5, state=None, wrap=lambda step: step, examples=False, **extra):
    state = tx.init(params) if state is None else state

    def step(params, state):
        value, grads = gradient(loss)(params)
        given = {name: {"value": value, "grad": grads, "fn": loss}[kind] for name, kind in extra.items()}
        if examples:
            grads = jax.tree.map(lambda g: jnp.stack([g, g]), grads)
        updates, state = tx.update(grads, state, params, **given)
        return optax.apply_updates(params, updates), state

    step = wrap(step)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


# ---- every optimizer -------------------------------------------------------------------------------------------


def optimizers(module):
    for name, make in sorted(vars(module).items()):
        public = inspect.isfunction(make) and not name.startswith(("_", "scale_by_"))
        if public and "learning_rate" in inspect.signature(make).parameters:
            yield name, make


ARGUMENTS = {
    "dpsgd": {"l2_norm_clip": 1.0, "noise_multiplier": 0.1, "seed": 0},
    "galore": {"rank": 2},
    "noisy_sgd": {"key": 0},
    "schedule_free": {"base_optimizer": optax.sgd(0.1)},
    "sgd": {"momentum": 0.9},
}
EXTRA = {
    "lbfgs": {"value": "value", "grad": "grad", "value_fn": "fn"},
    "momo": {"value": "value"},
    "momo_adam": {"value": "value"},
    "sophia": {"obj_fn": "fn"},
}
COMPILED = {"galore", "lbfgs", "muon", "sophia"}  # loops inside: cheaper to compile than to walk
MAIN = [(name, make) for name, make in optimizers(optax) if name != "lbfgs"]
COMMON = {"adafactor", "adamw", "lion", "sgd"}
OPTIMIZERS = [*MAIN, ("lbfgs", optax.lbfgs), *optimizers(contrib)]


def made(name, make):
    """The optimizer, with decay and clipping where it takes them."""
    arguments = {"learning_rate": 0.1, **ARGUMENTS.get(name, {})}
    if "weight_decay" in inspect.signature(make).parameters:
        arguments["weight_decay"] = 0.1
    tx = make(**arguments)
    return tx if name in ("dpsgd", "lbfgs") else optax.chain(optax.clip_by_global_norm(0.5), tx)


def way(name):
    return {
        "wrap": jax.jit if name in COMPILED else lambda step: step,
        "examples": name == "dpsgd",
        **EXTRA.get(name, {}),
    }


@pytest.mark.numeric
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of optimizers that have a successor
@pytest.mark.parametrize(("name", "make"), slow_except(COMMON, OPTIMIZERS))
def test_excluded_leaves_are_constants_to_every_optimizer(name, make):
    after, _ = train(freeze(made(name, make), "a/**"), PARAMS, **way(name))
    alone, _ = train(made(name, make), PARAMS["b"], loss_of_rest, **way(name))
    assert bits(after["a"]) == bits(PARAMS["a"])
    assert bits(after["b"]) != bits(PARAMS["b"])
    assert_trained_alike(after["b"], alone, 5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "make"), slow_except(COMMON, MAIN))
def test_leaves_frozen_in_mid_run_stop_at_once_in_every_optimizer(name, make):
    tx = made(name, make)
    params, state = train(tx, PARAMS, steps=3, **way(name))
    after, moved_on = train(freeze(tx, "a/**", how="updates"), params, state=state, steps=2, **way(name))
    assert bits(after["a"]) == bits(params["a"])
    assert bits(after["b"]) != bits(params["b"])
    assert jax.tree.structure(moved_on) == jax.tree.structure(state)  # the state of tx itself


def test_the_matrix_holds_the_optimizers():
    assert {"adam", "adamw", "adafactor", "lion", "lbfgs", "sgd", "muon", "schedule_free_adamw"} <= {
        name for name, _ in OPTIMIZERS
    }


# ---- what each way means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tx", [optax.adamw(0.1, weight_decay=0.1), optax.add_decayed_weights(0.1)])
def test_zeroed_gradients_leave_weight_decay(tx):
    after, _ = train(freeze(tx, "a/**", how="gradients"), PARAMS)
    assert bits(after["a"]["kernel"]) != bits(PARAMS["a"]["kernel"])


def test_zeroed_gradients_leave_momentum():
    tx = optax.adam(0.1)
    params, state = train(tx, PARAMS, steps=3)
    after, _ = train(freeze(tx, "a/**", how="gradients"), params, state=state)
    assert float(jnp.abs(after["a"]["kernel"] - params["a"]["kernel"]).max()) > 0.05


def test_zeroed_gradients_suffice_where_there_is_neither():
    after, _ = train(freeze(optax.sgd(0.1), "a/**", how="gradients"), PARAMS)
    assert bits(after["a"]) == bits(PARAMS["a"])
    assert bits(after["b"]) != bits(PARAMS["b"])


def test_zeroed_gradients_are_zero_where_they_were_nan():
    grads = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
    tx = freeze(optax.identity(), "a/**", how="gradients")
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert bits(updates["a"]) == bits(jax.tree.map(jnp.zeros_like, PARAMS["a"]))


def held(state):
    """Path → bytes of the moments in an optimizer state."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.ndim)


def test_moments_are_kept_for_trained_leaves_only():
    tx = optax.adam(0.1)
    full, part = held(tx.init(PARAMS)), held(tx.init(PARAMS["b"]))
    sizes = [held(freeze(tx, "a/**", how=how).init(PARAMS)) for how in ("exclude", "updates", "gradients")]
    assert sizes == [part, full, full]


@pytest.mark.numeric
def test_what_clipping_inside_sees():
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    huge = {"a": jax.tree.map(lambda g: g * 1e6, grads["a"]), "b": grads["b"]}

    def trained(how, grads):
        tx = freeze(optax.clip_by_global_norm(1.0), "a/**", how=how)
        return tx.update(grads, tx.init(PARAMS), PARAMS)[0]["b"]["bias"]

    alone = optax.clip_by_global_norm(1.0).update(grads["b"], optax.EmptyState())[0]["bias"]
    np.testing.assert_array_equal(trained("exclude", huge), alone)
    np.testing.assert_array_equal(trained("gradients", huge), alone)
    assert trained("updates", huge)[0] < 1e-5
    broken = {"a": jax.tree.map(lambda g: g * jnp.nan, grads["a"]), "b": grads["b"]}
    np.testing.assert_array_equal(trained("exclude", broken), alone)


def test_moments_run_on_or_fade():
    grads = jax.tree.map(jnp.ones_like, PARAMS)

    def moment(how):
        tx = freeze(optax.trace(0.5), "a/**", how=how)
        return tx.update(grads, tx.init(PARAMS), PARAMS)[1].trace["a"]["bias"][0]

    assert moment("updates") == 1.0
    assert moment("gradients") == 0.0


@pytest.mark.parametrize("how", HOW)
def test_all_may_be_frozen(how):
    after, _ = train(freeze(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "**", how=how), PARAMS)
    assert bits(after) == bits(PARAMS)


def test_the_ways_are_the_adapter_s():
    assert tuple(adapter._WAYS) == HOW


# ---- the traps of today's idioms, so that we notice when optax changes -------------------------------------------


def test_masked_alone_adds_the_raw_gradient():
    mask = {"a": False, "b": True}
    tx = optax.masked(optax.sgd(0.1), mask)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS), PARAMS)
    assert updates["a"]["bias"][0] == 1.0


def test_set_to_zero_ahead_of_adamw_moves():
    tx = optax.chain(optax.masked(optax.set_to_zero(), {"a": True, "b": False}), optax.adamw(0.1, weight_decay=0.1))
    after, _ = train(tx, PARAMS)
    assert bits(after["a"]) != bits(PARAMS["a"])


def test_set_to_zero_flips_the_sign_of_minus_zero():
    params = {"a": jnp.array([-0.0])}
    tx = optax.set_to_zero()
    after = optax.apply_updates(params, tx.update(params, tx.init(params))[0])
    assert not np.signbit(after["a"])[0]


# ---- bits ------------------------------------------------------------------------------------------------------


def step_of(tx, state, grads):
    def step(params):
        return optax.apply_updates(params, tx.update(grads, state, params)[0])

    return step


@pytest.mark.parametrize("how", ["exclude", "updates"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "complex64"])
def test_every_ordinary_bit_pattern_stays(dtype, how):
    special = [-0.0, 0.0, np.inf, -np.inf, np.nan, 1.0, -1e-4, 3e4]
    with jax.enable_x64(dtype == "float64"):
        params = {"a": jnp.array(special, dtype), "b": jnp.ones(1)}
        if dtype == "complex64":
            params["a"] = jnp.array([complex(x, y) for x in special for y in special], dtype)
        tx = freeze(optax.adamw(0.1), "a", how=how)
        step = step_of(tx, tx.init(params), jax.tree.map(jnp.ones_like, params))
        assert bits(step(params)["a"]) == bits(params["a"])
        assert bits(jax.jit(step)(params)["a"]) == bits(params["a"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_a_compiled_step_every_bit_pattern_stays(dtype):
    params = {"a": jnp.asarray(np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))), "b": jnp.ones(1)}
    tx = freeze(optax.adamw(0.1), "a")
    step = jax.jit(step_of(tx, tx.init(params), jax.tree.map(jnp.ones_like, params)))
    assert bits(step(params)["a"]) == bits(params["a"])


def test_the_compiled_step_does_not_touch_a_frozen_leaf():
    params = {"a": jnp.ones(1000), "b": jnp.ones(2)}
    tx = freeze(optax.sgd(0.1), "a")
    step = jax.jit(step_of(tx, tx.init(params), jax.tree.map(jnp.ones_like, params)))
    assert "f32[1000]{0} add" not in step.lower(params).compile().as_text()


def test_mixed_precision():
    params = {"a": jnp.array([-0.0, 1.0, 3.0], "bfloat16"), "b": jnp.ones(1, "bfloat16")}
    grads = jax.tree.map(lambda p: jnp.ones(p.shape, "float32"), params)
    tx = freeze(optax.adam(0.1), sel("**").where(dtype="bfloat16") & sel("a"))
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
    assert updates["a"].dtype == "float32"
    assert bits(optax.apply_updates(params, updates)["a"]) == bits(params["a"])
    # The gradients alone do not show which parameters were bfloat16; `init` saw them.
    updates, state = tx.update(grads, state)
    assert np.signbit(updates["a"]).all()
    assert not updates["a"].any()


@pytest.mark.parametrize("how", HOW)
def test_integers_with_void_gradients_can_be_frozen(how):
    params = {"ids": jnp.array([2**30 + 1, -3]), "on": jnp.array([True, False]), "w": jnp.ones(2)}

    def loss(params):
        return (params["w"] * params["ids"] * params["on"]).sum()

    grads = jax.grad(loss, allow_int=True)(params)
    tx = freeze(optax.identity(), ["ids", "on"], how=how)
    updates, _ = tx.update(grads, tx.init(params), params)
    if how == "gradients":
        assert updates["ids"].dtype == jax.dtypes.float0
    else:
        after = optax.apply_updates(params, updates)
        assert bits([after["ids"], after["on"]]) == bits([params["ids"], params["on"]])
    updates, _ = tx.update(grads, tx.init(params))
    assert updates["ids"].dtype == jax.dtypes.float0


def test_prng_keys_have_no_arithmetic():
    params = {"key": jax.random.key(0), "w": jnp.ones(2)}
    grads = {"key": np.zeros((), jax.dtypes.float0), "w": jnp.ones(2)}
    tx = freeze(optax.sgd(0.1), "key")
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["key"].dtype == jax.dtypes.float0


# ---- containers ------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: dict
    second: list


@struct.dataclass
class Record:
    w: jax.Array
    rest: tuple
    name: str = struct.field(pytree_node=False, default="x")


ONE, TWO, THREE = (jnp.full(2, value) for value in (1.0, 2.0, 3.0))
TREES = {
    "dict, unsorted": ({"z": {"w": ONE}, "a": {"w": TWO}}, "z/w", lambda t: t["z"]),
    "FrozenDict": (FrozenDict({"z": {"w": ONE}, "a": {"w": TWO}}), "z/*", lambda t: t["z"]),
    "named tuple and list": (Pair({"w": ONE}, [TWO, THREE]), "second[-1]", lambda t: t.second[1]),
    "struct dataclass": (Record(ONE, (TWO, THREE)), "rest/0", lambda t: t.rest[0]),
    "separators in keys": ({"mlp/~/linear_0": {"w": ONE}, "b": TWO}, "mlp/~/linear_0/w", lambda t: t["mlp/~/linear_0"]),
    "None": ({"a": None, "b": ONE, "c": TWO}, "b", lambda t: t["b"]),
    "one array": (ONE, "**", lambda t: t),
    "one object at two places": ({"a": ONE, "b": ONE}, "a", lambda t: t["a"]),
    "boxed": (
        {"d": {"kernel": nn.Partitioned(ONE, names=("x",)), "bias": TWO}},
        "d/kernel",
        lambda t: t["d"]["kernel"],
    ),
}


@pytest.mark.parametrize("how", ["exclude", "updates"])
@pytest.mark.parametrize("case", TREES)
def test_containers(case, how):
    params, selector, frozen = TREES[case]
    tx = freeze(optax.adamw(0.1), selector, how=how)
    state = tx.init(params)
    step = step_of(tx, state, jax.tree.map(jnp.ones_like, params))
    for after in (step(params), jax.jit(step)(params)):
        assert jax.tree.structure(after) == jax.tree.structure(params)
        assert bits(frozen(after)) == bits(frozen(params))
        moved = sum(one != other for one, other in zip(bits(after), bits(params), strict=True))
        assert moved == len(jax.tree.leaves(params)) - 1


def test_python_numbers_are_parameters():
    params = {"a": 1.0, "b": 2.0}
    tx = freeze(optax.sgd(0.1), "a")
    updates, _ = tx.update({"a": 3.0, "b": 4.0}, tx.init(params), params)
    assert optax.apply_updates(params, updates)["a"] == 1.0
    assert float(updates["b"]) == pytest.approx(-0.4)


def test_linen_train_state():
    model = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(1)])
    x = jnp.ones((4, 2))
    variables = model.init(jax.random.key(0), x)
    tx = freeze(optax.adamw(0.1), "params/layers_[0]/**")
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=tx)

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=jax.grad(lambda v: (state.apply_fn(v, x) ** 2).mean())(state.params))

    after = step(step(state)).params["params"]
    assert bits(after["layers_0"]) == bits(variables["params"]["layers_0"])
    assert bits(after["layers_2"]) != bits(variables["params"]["layers_2"])


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.out = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.out(self.norm(x))


@pytest.mark.parametrize("how", ["exclude", "updates"])
@pytest.mark.parametrize("selector", ["layers[0]/**", sel("**").where(ndim=2) & sel("layers[0]/**")])
def test_nnx_optimizer(selector, how):
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, freeze(optax.adamw(0.1), selector, how=how), wrt=nnx.Param)
    frozen, trained = bits(model.layers[0].kernel[...]), bits(model.layers[1].kernel[...])
    x = jax.random.normal(jax.random.key(0), (4, 2))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: ((model(x) - 1) ** 2).mean())(model))

    for _ in range(3):
        step(model, optimizer)
    assert bits(model.layers[0].kernel[...]) == frozen
    assert bits(model.layers[1].kernel[...]) != trained


def test_nnx_variables_may_be_chosen_by_kind():
    """`init` sees Variables and `update` pure arrays: what was chosen holds."""
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, freeze(optax.adamw(0.1), sel(nnx.Param) & sel("layers/**")), wrt=nnx.Param)
    before = bits(nnx.state(model.layers)), bits(nnx.state(model.out))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: model(jnp.ones((2, 2))).sum())(model))

    step(model, optimizer)
    assert bits(nnx.state(model.layers)) == before[0]
    assert bits(nnx.state(model.out)) != before[1]


def test_nnx_state_by_hand():
    model = Net(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    tx = freeze(optax.adam(0.1), "out/**")
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params))
    assert not np.asarray(updates["out"]["kernel"][...]).any()
    assert np.asarray(updates["layers"][0]["kernel"][...]).all()


@pytest.mark.parametrize("selector", ["layers[0]/**", eqx.nn.Linear, "**/weight", lambda path, spec: spec.ndim == 2])
def test_equinox_modules(selector):
    # The module itself can be called and holds functions; its filtered form has None in their place.
    model = eqx.nn.MLP(2, 1, 4, 2, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_array)
    grads = eqx.filter_jit(eqx.filter_grad(lambda model: model(jnp.ones(2)).sum()))(model)
    tx = freeze(optax.adam(0.1), selector)
    state = tx.init(params)
    for given in (model, params, None):
        updates, _ = tx.update(grads, state, given)
        after = eqx.apply_updates(model, updates)
        assert bits(after.layers[0].weight) == bits(model.layers[0].weight)
        stays = selector in ("layers[0]/**", eqx.nn.Linear)
        assert (bits(after.layers[0].bias) == bits(model.layers[0].bias)) == stays
        assert (bits(after.layers[-1].weight) == bits(model.layers[-1].weight)) == (selector != "layers[0]/**")


# ---- inside and outside other transformations ----------------------------------------------------------------------


def first(tx, steps=3):
    after, _ = train(tx, PARAMS, steps=steps)
    return after


def schedule(step):
    return 0.1 / (1 + step)


COMPOSED = {
    "chain outside": lambda how: optax.chain(optax.clip(1.0), freeze(optax.adamw(0.1), "a/**", how=how)),
    "schedule": lambda how: freeze(optax.adamw(schedule), "a/**", how=how),
    "multi_transform inside": lambda how: freeze(
        optax.multi_transform({"x": optax.adamw(0.1), "y": optax.sgd(0.1)}, lambda p: jax.tree.map(lambda _: "x", p)),
        "a/**",
        how=how,
    ),
    "multi_transform outside": lambda how: optax.multi_transform(
        {"x": freeze(optax.adamw(0.1), "a/kernel", how=how), "y": freeze(optax.adamw(0.1), "a/bias", how=how)},
        {"a": {"kernel": "x", "bias": "y"}, "b": {"kernel": "x", "bias": "y"}},
    ),
    "inject_hyperparams inside": lambda how: freeze(
        optax.inject_hyperparams(optax.adamw)(learning_rate=schedule), "a/**", how=how
    ),
    "inject_hyperparams outside": lambda how: optax.inject_hyperparams(
        lambda rate: freeze(optax.adamw(rate), "a/**", how=how)
    )(rate=0.1),
    "MultiSteps inside": lambda how: freeze(optax.MultiSteps(optax.adamw(0.1), 2), "a/**", how=how),
    "apply_if_finite": lambda how: freeze(optax.apply_if_finite(optax.adamw(0.1), 3), "a/**", how=how),
    "masked inside": lambda how: freeze(
        optax.adamw(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)), "a/**", how=how
    ),
    "two": lambda how: freeze(freeze(optax.adamw(0.1), "a/kernel", how=how), "a/bias", how=how),
}


@pytest.mark.parametrize("how", ["exclude", pytest.param("updates", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", COMPOSED)
def test_composed(case, how):
    after = first(COMPOSED[case](how))
    assert bits(after["a"]) == bits(PARAMS["a"])
    assert bits(after["b"]["kernel"]) != bits(PARAMS["b"]["kernel"])


def test_multi_steps_outside():
    # Between the steps MultiSteps itself adds 0.0: no leaf moves, only the sign of a -0.0 is not its concern.
    after = first(optax.MultiSteps(freeze(optax.adamw(0.1), "a/**"), 2), steps=4)
    np.testing.assert_array_equal(after["a"]["kernel"], PARAMS["a"]["kernel"])
    assert bits(after["b"]["kernel"]) != bits(PARAMS["b"]["kernel"])


def test_masked_outside():
    # What is masked away is not there, so it cannot be named.
    tx = optax.masked(freeze(optax.adamw(0.1), "b/bias"), {"a": False, "b": True})
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS), PARAMS)
    assert not updates["b"]["bias"].any()
    with pytest.raises(NoMatch):
        optax.masked(freeze(optax.adamw(0.1), "a/bias"), {"a": False, "b": True}).init(PARAMS)


@pytest.mark.parametrize("how", HOW)
def test_extra_arguments_reach_the_optimizer(how):
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    tx = freeze(optax.GradientTransformationExtraArgs(lambda params: (), update), "a/**", how=how)
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=3.0)
    assert seen == {"value": 3.0}
    plain = freeze(optax.sgd(0.1), "a/**", how=how)
    plain.update(PARAMS, plain.init(PARAMS), PARAMS, value=3.0)  # and none reach one that takes none


@pytest.mark.numeric
@pytest.mark.parametrize("how", ["exclude", "gradients"])  # with "updates" the search believes that all leaves move
def test_line_searches(how):
    def loss(params):
        return ((params["a"] * params["b"] - 1) ** 2).sum()

    a, b = jnp.full(2, 2.0), jnp.full(2, 3.0)
    tx = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=5))
    told = {"wrap": jax.jit, "value": "value", "grad": "grad", "value_fn": "fn"}
    after, _ = train(freeze(tx, "a", how=how), {"a": a, "b": b}, loss, **told)
    alone, _ = train(tx, b, lambda b: loss({"a": a, "b": b}), **told)
    assert bits(after["a"]) == bits(a)
    assert_trained_alike(after["b"], alone, 5)
    assert bits(alone) != bits(b)


def test_map_params_over_the_state():
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    for how in HOW:
        tx = freeze(optax.adam(0.1), "a", how=how)
        marked = optax.tree.map_params(tx, lambda _: "leaf", tx.init(params), transform_non_params=lambda _: "count")
        leaves = jax.tree.leaves(marked)
        assert leaves.count("leaf") == (2 if how == "exclude" else 4)
        assert leaves.count("count") == 1


# ---- inside JAX ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_one_trace(how):
    tx = freeze(optax.adamw(0.1), "a/**", how=how)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(1)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(4):
        params, state = step(params, state)
    assert len(traces) == 1
    assert (bits(params["a"]) == bits(PARAMS["a"])) == (how != "gradients")


@pytest.mark.numeric
def test_init_in_jit_and_steps_in_scan():
    tx = freeze(optax.adamw(0.1), "a/**")

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=4)[0][0]

    scanned, looped = run(PARAMS), first(tx, steps=4)
    assert bits(scanned["a"]) == bits(PARAMS["a"])
    assert_trained_alike(scanned["b"], looped["b"], 4)


def test_vmapped_over_models():
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), PARAMS)
    tx = freeze(optax.adamw(0.1), "a/**")
    after = jax.jit(jax.vmap(lambda params: train(tx, params, steps=1)[0]))(stacked)
    assert bits(after["a"]) == bits(stacked["a"])


def test_a_state_from_elsewhere_needs_no_init():
    state = freeze(optax.adamw(0.1), "a/**").init(PARAMS)
    tx = freeze(optax.adamw(0.1), "a/**")
    for params in (None, PARAMS):
        if params is not None:
            updates, _ = tx.update(PARAMS, state, params)
            assert not any(map(np.any, jax.tree.leaves(updates["a"])))
    updates, _ = freeze(optax.sgd(0.1), "a/**").update(PARAMS, freeze(optax.sgd(0.1), "a/**").init(PARAMS))
    assert not any(map(np.any, jax.tree.leaves(updates["a"])))


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_sharding_stays(axes):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axes, axes))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
        params = {name: jax.device_put(jnp.full((8, 4), -0.0), sharding) for name in "ab"}
        tx = freeze(optax.adamw(0.1), "a")
        step = step_of(tx, tx.init(params), jax.tree.map(jnp.ones_like, params))
        for after in (step(params), jax.jit(step)(params)):
            assert after["a"].sharding.is_equivalent_to(sharding, 2)
            assert bits(after["a"]) == bits(params["a"])


# ---- selectors and errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "selector",
    [
        "a/**",
        ["a/kernel", "a/bias"],
        sel("**") & ~sel("b/**"),
        __import__("re").compile("a/.*"),
        lambda path, spec: path.startswith("a/"),
        {"a": True, "b": False},
    ],
)
def test_selectors_of_every_kind(selector):
    after = first(freeze(optax.adamw(0.1), selector), steps=2)
    assert bits(after["a"]) == bits(PARAMS["a"])
    assert bits(after["b"]["kernel"]) != bits(PARAMS["b"]["kernel"])


@pytest.mark.parametrize("how", HOW)
def test_nothing_selected_is_an_error_at_init(how):
    tx = freeze(optax.adam(0.1), "A/**", how=how)
    with pytest.raises(NoMatch) as caught:
        tx.init(PARAMS)
    assert "a/**" in caught.value.near
    with pytest.raises(NoMatch):
        freeze(optax.adam(0.1), lambda path, spec: False, how=how).init(PARAMS)


def test_a_broken_selector_is_an_error_at_once():
    with pytest.raises(SelectorError):
        freeze(optax.adam(0.1), "a/[")


def test_a_class_needs_modules():
    with pytest.raises(NoMatch, match="do not keep module classes") as caught:
        freeze(optax.adam(0.1), nnx.Linear).init(PARAMS)
    assert caught.value.hint == 'select by path, such as "a/bias"'


@pytest.mark.parametrize(("how", "meant"), [("Exclude", "exclude"), ("gradient", "gradients"), (None, "exclude")])
def test_unknown_how(how, meant):
    with pytest.raises(BadArgument, match="'exclude', 'updates', 'gradients'") as caught:
        freeze(optax.adam(0.1), "a/**", how=how)
    tx = optax.adam(0.1)
    frozen = eval(caught.value.hint, {"pm": HINTS, "tx": tx, "selector": "a/**"})
    frozen.init(PARAMS)
    assert f'how="{meant}"' in caught.value.hint


class HINTS:  # what hints call `pm`
    freeze, sel = staticmethod(freeze), staticmethod(sel)


@pytest.mark.parametrize("wrong", [PARAMS, "adam", optax.adam, None, optax.GradientTransformation, nnx.Optimizer])
def test_no_transformation(wrong):
    with pytest.raises(Unsupported, match="optax transformation") as caught:
        freeze(wrong, "**/Dense_0/**")
    tx = eval(caught.value.hint, {"pm": HINTS, "optax": optax})
    tx.init({"params": {"Dense_0": {"kernel": jnp.ones(2)}, "Dense_1": {"kernel": jnp.ones(2)}}})


def test_no_framework_is_imported_before_it_is_needed():
    code = (
        "import sys; from paramend.freezing.freeze import freeze, freeze_, unfreeze_;"
        "print(sorted({'jax', 'optax', 'torch', 'flax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
