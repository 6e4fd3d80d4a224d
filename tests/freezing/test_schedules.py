"""Leaves that thaw or freeze in the course of training, and slices of leaves: bitwise still, and one trace."""

import functools
import inspect
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

from paramend.errors import BadArgument, NoMatch, OutOfRange, Unsupported
from paramend.freezing.freeze import HOW, freeze
from paramend.selectors.selector import sel
from support.numerics import assert_close
from support.slow import slow_except

pytestmark = pytest.mark.slow  # many small programs to compile

RNG = np.random.default_rng(0)
PARAMS = {
    name: {"kernel": jnp.asarray(RNG.normal(size=shape), "float32"), "bias": jnp.asarray(RNG.normal(size=shape[1]))}
    for name, shape in {"a": (3, 4), "b": (4, 4), "c": (4, 2)}.items()
}
PARAMS = jax.tree.map(lambda x: x.astype("float32"), PARAMS)
CLIPPED = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.1))


def loss(params):
    x = jnp.arange(6.0).reshape(2, 3) / 6
    for name in "ab":
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return jnp.mean((x @ params["c"]["kernel"] + params["c"]["bias"]) ** 2)


GRADIENT = jax.jit(jax.grad(loss))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def run(tx, params=PARAMS, steps=6, state=None, loss_grad=GRADIENT, jit=True):
    """All parameters and states of a run, and how often its step was traced."""
    traces = []

    def step(params, state):
        traces.append(1)
        updates, state = tx.update(loss_grad(params), state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step) if jit else step
    history = [(params, tx.init(params) if state is None else state)]
    for _ in range(steps):
        history.append(compiled(*history[-1]))
    return [p for p, _ in history], [s for _, s in history], len(traces)


def assert_trained_alike(found, wanted, steps):
    """Parameters after steps of two programs: sums of 3, 4, 4 and 4 terms, their gradients, and some 20 operations."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(one, other, terms=steps * (2 * (3 + 4 + 4 + 4) + 20), scale=2)


def moved(history, *keys):
    """At which steps a leaf moved."""

    def leaf(params):
        for key in keys:
            params = params[key]
        return params

    return [bits(leaf(one)) != bits(leaf(two)) for one, two in pairwise(history)]


def moments(state):
    """The moments of Adam in a state, wherever they are."""
    return optax.tree.get(state, "mu"), optax.tree.get(state, "nu")


# ---- schedules ---------------------------------------------------------------------------------------------------

SCHEDULES = {
    "a step": ({"until": 3}, [0, 0, 0, 1, 1, 1]),
    "step 0": ({"until": 0}, [1, 1, 1, 1, 1, 1]),
    "numpy": ({"until": np.int64(3)}, [0, 0, 0, 1, 1, 1]),
    "mapping": ({"until": {"a/**": 2}}, [0, 0, 1, 1, 1, 1]),
    "function": ({"until": lambda step: step >= 3}, [0, 0, 0, 1, 1, 1]),
    "alternating": ({"until": lambda step: step % 2 == 1}, [0, 1, 0, 1, 0, 1]),
    "constant function": ({"until": lambda step: False}, [0, 0, 0, 0, 0, 0]),
    "since": ({"since": 3}, [1, 1, 1, 0, 0, 0]),
    "since, function": ({"since": lambda step: step >= 3}, [1, 1, 1, 0, 0, 0]),
    "since, mapping": ({"since": {"a/**": 4}}, [1, 1, 1, 1, 0, 0]),
    "frozen between": ({"since": 2, "until": 4}, [1, 1, 0, 0, 1, 1]),
    "trained between": ({"since": 4, "until": 2}, [0, 0, 1, 1, 0, 0]),
    "mappings": ({"since": {"a/**": 4}, "until": {"a/**": 2}}, [0, 0, 1, 1, 0, 0]),
}


@functools.cache
def scheduled(case, how):
    """A compiled run under one of the schedules."""
    return run(freeze(CLIPPED, "a/**", how=how, **SCHEDULES[case][0]))


@pytest.mark.parametrize("how", ["exclude", pytest.param("updates", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", SCHEDULES)
def test_a_leaf_moves_when_the_schedule_says_and_the_step_is_traced_once(case, how):
    _, expected = SCHEDULES[case]
    params, states, traces = scheduled(case, how)
    assert moved(params, "a", "kernel") == moved(params, "a", "bias") == list(map(bool, expected))
    assert all(moved(params, "c", "kernel"))
    assert traces == 1
    assert int(states[-1].step) == 6


@pytest.mark.numeric
@pytest.mark.parametrize("case", slow_except({"a step", "alternating", "trained between"}, SCHEDULES))
def test_without_jit_it_is_the_same(case):
    arguments, expected = SCHEDULES[case]
    tx = freeze(CLIPPED, "a/**", **arguments)
    eager, _, _ = run(tx, jit=False)
    assert moved(eager, "a", "kernel") == list(map(bool, expected))
    jitted, _, _ = scheduled(case, "exclude")
    assert_trained_alike(eager[-1], jitted[-1], 6)


@pytest.mark.parametrize("how", ["exclude", "updates"])
def test_gradual_thaw_layer_by_layer(how):
    tx = freeze(CLIPPED, "{a,b}/**", how=how, until={"b/**": 2, "a/**": 4})
    params, _, traces = run(tx)
    assert moved(params, "b", "kernel") == [False] * 2 + [True] * 4
    assert moved(params, "a", "kernel") == [False] * 4 + [True] * 2
    assert traces == 1


def test_gradients_by_schedule():
    tx = freeze(optax.trace(0.5), "a/**", how="gradients", until=1, since=2)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    state = tx.init(PARAMS)
    seen = []
    for _ in range(4):
        updates, state = jax.jit(tx.update)(ones, state)
        seen.append(float(updates["a"]["bias"][0]))
    assert seen == [0, 1, 0.5, 0.25]  # zero, a gradient, and then the momentum fades


def test_the_mapping_alone_says_which_leaves():
    params, _, _ = run(freeze(CLIPPED, until={"b/**": 1, "a/**": 3}), steps=4)
    assert moved(params, "b", "bias") == [False, True, True, True]
    assert moved(params, "a", "bias") == [False, False, False, True]
    assert all(moved(params, "c", "bias"))


def test_leaves_that_no_entry_names_stay_frozen_and_keep_no_moments():
    tx = freeze(CLIPPED, "{a,b}/**", until={"b/**": 2})
    params, states, _ = run(tx)
    assert not any(moved(params, "a", "kernel"))
    mu, nu = moments(states[0])
    assert not jax.tree.leaves((mu["a"], nu["a"]))
    assert mu["b"]["kernel"].shape == (4, 4)  # thaws some day: the state cannot grow in a compiled step


def test_the_first_entry_that_names_a_leaf_counts():
    params, _, _ = run(freeze(CLIPPED, "a/**", until={"a/kernel": 1, "a/**": 3}), steps=4)
    assert moved(params, "a", "kernel") == [False, True, True, True]
    assert moved(params, "a", "bias") == [False, False, False, True]


# ---- what the moments are at the thaw ------------------------------------------------------------------------------


@pytest.mark.numeric
def test_exclude_moments_are_as_init_makes_them_at_the_thaw():
    tx = freeze(CLIPPED, "a/**", until=3)
    params, states, _ = run(tx, steps=4)
    for state in states[:4]:
        assert bits([m["a"] for m in moments(state)]) == bits([m["a"] for m in moments(states[0])])
    mu, nu = moments(states[4])
    grads = GRADIENT(params[3])
    clip = min(1.0, 0.5 / float(optax.tree.norm(grads)))
    # a gradient of sums of 3, 4, 4 and 4 terms, clipped by a norm of 38 squares; 1 - 0.999 in float32 has lost 3 digits
    mean, square = 0.1 * clip * grads["a"]["kernel"], 0.001 * (clip * grads["a"]["kernel"]) ** 2
    assert_close(mu["a"]["kernel"], mean, terms=2 * 15 + 38 + 4)
    assert_close(nu["a"]["kernel"], square, terms=2 * (2 * 15 + 38) + 1000)
    assert int(optax.tree.get(states[4][1], "count")) == 4


def test_exclude_moments_are_held_bit_for_bit_from_freeze_to_thaw():
    _, states, _ = run(freeze(CLIPPED, "a/**", since=2, until=4), steps=5)
    held = [bits([m["a"] for m in moments(state)]) for state in states]
    assert held[1] != held[2] == held[3] == held[4] != held[5]


@pytest.mark.numeric
def test_updates_moments_run_on():
    tx = freeze(optax.adam(0.1), "a/**", how="updates", until=3)
    _, states, _ = run(tx, steps=3)
    frozen = optax.chain(optax.scale_by_adam(), optax.set_to_zero())
    assert float(jnp.abs(moments(states[3])[0]["a"]["kernel"]).max()) > 0
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    state, other = tx.init(PARAMS), frozen.init(PARAMS)
    for _ in range(2):
        _, state = tx.update(ones, state, PARAMS)
        _, other = frozen.update(ones, other)
    for one, wanted in zip(jax.tree.leaves(moments(state)), jax.tree.leaves(moments(other)), strict=True):
        assert_close(one, wanted, terms=2 * 4)  # a branch is compiled


@pytest.mark.numeric
def test_the_first_update_after_a_late_thaw_is_large():
    """As the documentation of `freeze` says of Adam: its bias correction is over by then."""
    tx = freeze(optax.adam(1.0), "a", until=2000)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    state = tx.init(params)
    state = jax.tree.map(lambda x: jnp.full_like(x, 2000) if x.dtype == jnp.int32 else x, state)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    # 0.999 is rounded, and taken to the power of 2001
    assert_close(updates["a"][0], -0.1 / 0.001**0.5 * (1 - 0.999**2001) ** 0.5, terms=2001)


# ---- as if frozen leaves were constants ----------------------------------------------------------------------------


def optimizers():
    for module in (optax, contrib):
        for name, make in sorted(vars(module).items()):
            public = inspect.isfunction(make) and not name.startswith(("_", "scale_by_"))
            if public and "learning_rate" in inspect.signature(make).parameters:
                yield name, make


# Those of `test_freezing_optax` that take more than a gradient, or compile for long.
SPECIAL = {"dpsgd", "galore", "lbfgs", "momo", "momo_adam", "sophia", "muon"}
PLAIN = {name: make for name, make in optimizers() if name not in SPECIAL}


def made(name):
    arguments = {"noisy_sgd": {"key": 0}, "schedule_free": {"base_optimizer": optax.sgd(0.1)}, "sgd": {"momentum": 0.9}}
    given = {"learning_rate": 0.1, **arguments.get(name, {})}
    if "weight_decay" in inspect.signature(PLAIN[name]).parameters:
        given["weight_decay"] = 0.1
    return optax.chain(optax.clip_by_global_norm(0.5), PLAIN[name](**given))


@pytest.mark.numeric
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of optimizers that have a successor
@pytest.mark.parametrize("name", slow_except({"adafactor", "adamw", "lion", "sgd"}, PLAIN))
def test_frozen_from_the_start_and_again_in_every_optimizer(name):
    small = {"a": PARAMS["a"]["kernel"], "c": PARAMS["c"]["kernel"]}

    def gradient(params):
        return jax.tree.map(lambda p: 2 * p - 1, params)

    tx = freeze(made(name), "a", until=2, since=4)
    params, _, _ = run(tx, small, 6, loss_grad=gradient, jit=False)
    thawed = moved(params, "a")
    assert thawed[:2] == thawed[4:] == [False, False]
    assert thawed[3]  # some, such as rprop, only look around in their first step
    alone, _, _ = run(made(name), {"c": small["c"]}, 2, loss_grad=gradient, jit=False)
    for one, other in zip(params[:3], alone, strict=True):
        assert_trained_alike(one["c"], other["c"], 2)
    assert all(moved(params, "c")[1:])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "lion", "muon", "schedule_free_adamw", "prodigy", "adan"])
def test_compiled_schedules_of_special_optimizers(name):
    make = getattr(optax, name, None) or getattr(contrib, name)
    small = {"a": PARAMS["a"]["kernel"], "c": PARAMS["c"]["kernel"]}
    tx = freeze(make(learning_rate=0.1), "a", until=1, since=2)
    params, _, traces = run(tx, small, 3, loss_grad=lambda params: jax.tree.map(lambda p: 2 * p - 1, params))
    assert moved(params, "a") == [False, True, False]
    assert traces == 1


COMPOSED = {
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(optax.adamw)(learning_rate=lambda step: 0.1 / (1 + step)),
    "multi_transform": lambda tx: optax.multi_transform(
        {"x": optax.adamw(0.1), "y": optax.sgd(0.1)}, lambda p: {key: "x" if key == "a" else "y" for key in p}
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "masked": lambda tx: optax.adamw(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "frozen": lambda tx: freeze(tx, "b/**", until=1),
}


@pytest.mark.parametrize("case", COMPOSED)
def test_composed(case):
    params, _, traces = run(freeze(COMPOSED[case](optax.adamw(0.1)), "a/**", until=1, since=2), steps=3)
    assert moved(params, "a", "kernel") == [False, True, False]
    assert all(moved(params, "c", "kernel"))
    assert traces == 1


@pytest.mark.parametrize("how", HOW)
def test_in_scan_and_vmap(how):
    tx = freeze(CLIPPED, "a/**", how=how, until=2)

    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params["a"]["bias"]

        return jax.lax.scan(step, (params, tx.init(params)), length=4)[1]

    stacked = jax.tree.map(lambda p: jnp.stack([p, p / 2]), PARAMS)
    seen = jax.jit(jax.vmap(train))(stacked)
    still = [bits(seen[:, i]) == bits(stacked["a"]["bias"]) for i in range(4)]
    assert still == [how != "gradients"] * 2 + [False] * 2


@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_sharded(axes):
    kind = getattr(jax.sharding.AxisType, axes)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, jax.P("x", "y"))
        params = {name: jax.device_put(jnp.full((8, 4), -0.0), sharding) for name in "ab"}
        tx = freeze(optax.adamw(0.1), ["a"], until=1)
        history, _, traces = run(tx, params, 2, loss_grad=lambda p: jax.tree.map(jnp.ones_like, p))
        assert moved(history, "a") == [False, True]
        assert history[-1]["a"].sharding.is_equivalent_to(sharding, 2)
        assert traces <= 2  # with explicit axes the scalars of the state find their sharding in the first step


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_on_two_devices_by_pmap():
    tx = freeze(CLIPPED, "a/**", until=1)

    def step(params, state):
        updates, state = tx.update(jax.lax.pmean(jax.grad(loss)(params), "i"), state, params)
        return optax.apply_updates(params, updates), state

    both = jax.tree.map(lambda x: jnp.stack([x, x]), (PARAMS, tx.init(PARAMS)))
    compiled = jax.pmap(step, axis_name="i")
    first = compiled(*both)
    second = compiled(*first)
    assert bits(first[0]["a"]) == bits(both[0]["a"])
    assert bits(second[0]["a"]) != bits(first[0]["a"])
    assert bits(first[0]["c"]) != bits(both[0]["c"])


def test_moments_of_another_precision():
    """A held bfloat16 moment and one updated with a float32 gradient meet in one switch."""
    params = {"a": jnp.array([-0.0, 1.0, 3.0], "bfloat16"), "b": jnp.ones(1, "bfloat16")}
    tx = freeze(optax.adam(0.1), "a", until=2)
    ones = jax.tree.map(lambda p: jnp.ones(p.shape, "float32"), params)
    history, _, _ = run(tx, params, 3, loss_grad=lambda p: ones)
    assert moved(history, "a") == [False, False, True]
    assert history[-1]["a"].dtype == "bfloat16"


def test_integers_with_void_gradients():
    params = {"ids": jnp.array([2**30 + 1, -3]), "w": jnp.ones(2), "v": jnp.ones(2)}
    grads = jax.grad(lambda p: (p["w"] * p["ids"] * p["v"]).sum(), allow_int=True)(params)
    tx = freeze(optax.identity(), ["ids", "w"], until={"w": 1})
    history, _, _ = run(tx, params, 2, loss_grad=lambda p: grads)
    assert moved(history, "ids") == [False, False]
    assert moved(history, "w") == [False, True]


def test_nnx_optimizer():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs), nnx.Linear(2, 2, rngs=rngs)])

        def __call__(self, x):
            return self.layers[1](jnp.tanh(self.layers[0](x)))

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, freeze(optax.adamw(0.1), "layers[0]/**", until=2), wrt=nnx.Param)
    traces, seen = [], [bits(model.layers[0].kernel[...])]

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        optimizer.update(model, nnx.grad(lambda model: ((model(jnp.ones((1, 2))) - 1) ** 2).sum())(model))

    for _ in range(3):
        step(model, optimizer)
        seen.append(bits(model.layers[0].kernel[...]))
    assert seen[0] == seen[1] == seen[2] != seen[3]
    assert len(traces) == 1


def test_a_step_costs_less_while_leaves_are_frozen():
    """The branch of a phase holds the work of its trained leaves alone."""
    params = {"a": jnp.ones((256, 256)), "b": jnp.ones(2)}
    tx = freeze(optax.adam(0.1), "a", until=2)
    text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    branches = text[text.index("stablehlo.case") :].split("}, {")
    assert "tensor<256x256xf32>" in branches[1]
    assert branches[0].count("sqrt") < branches[1].count("sqrt")


# ---- slices ------------------------------------------------------------------------------------------------------

STACK = {"w": jnp.asarray(RNG.normal(size=(6, 3, 4)), "float32").at[0, 0, 0].set(-0.0), "b": jnp.ones(3)}
SLICES = {
    "rows": slice(None, 4),
    "one": -1,
    "steps": slice(None, None, 2),
    "list": [0, 5],
    "another axis": (slice(None), 1),
    "the last axis": (..., slice(1, 3)),
    "two axes": (slice(0, 2), ..., 0),
    "pairs": ([0, 1], [2, 0]),
    "mask": np.arange(6) % 3 == 0,
    "all": slice(None),
    "jax array": jnp.array([1, 2]),
}


def pull(params):
    return jax.tree.map(lambda p: 2 * p - 1, params)


ADAMW = optax.adamw(0.1, weight_decay=0.1)


@functools.cache
def free():
    """A run of the stack in which nothing is frozen."""
    return run(ADAMW, STACK, 5, loss_grad=pull)[0]


def frozen_by(index):
    mask = np.zeros((6, 3, 4), bool)
    mask[np.asarray(index) if isinstance(index, jax.Array) else index] = True
    return mask


@pytest.mark.numeric
@pytest.mark.parametrize("how", ["exclude", pytest.param("updates", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", SLICES)
def test_slices_do_not_move_and_the_rest_trains_as_before(case, how):
    index, mask = SLICES[case], frozen_by(SLICES[case])
    params, _, traces = run(freeze(ADAMW, sel("w")[index], how=how), STACK, 5, loss_grad=pull)
    before, after = np.asarray(STACK["w"]), np.asarray(params[-1]["w"])
    assert after[mask].tobytes() == before[mask].tobytes()
    assert_trained_alike(after[~mask], np.asarray(free()[-1]["w"])[~mask], 5)
    assert (after[~mask] != before[~mask]).all()
    assert traces == 1


@pytest.mark.numeric
def test_frozen_slices_keep_zero_moments_and_do_not_count_in_the_norm():
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    grads = {"w": jnp.ones((6, 3, 4)).at[:4].set(1e6), "b": jnp.ones(3)}
    frozen = freeze(tx, sel("w")[:4])
    params, states, _ = run(frozen, STACK, 3, loss_grad=lambda p: grads)
    mu, nu = moments(states[-1])
    assert not np.asarray(mu["w"][:4]).any()
    assert not np.asarray(nu["w"][:4]).any()
    alone, _, _ = run(tx, {"w": STACK["w"][4:], "b": STACK["b"]}, 3, loss_grad=lambda p: {**grads, "w": grads["w"][4:]})
    assert_trained_alike({"w": params[-1]["w"][4:], "b": params[-1]["b"]}, alone[-1], 3)


def test_moments_of_slices_are_held_when_frozen_in_mid_run():
    tx = optax.adamw(0.1)
    params, states, _ = run(tx, STACK, 3, loss_grad=pull)
    frozen, later, _ = run(
        freeze(tx, sel("w")[:4]), params[-1], 2, loss_grad=pull, state=(optax.MaskedState(states[-1]))
    )
    assert bits(frozen[-1]["w"][:4]) == bits(params[-1]["w"][:4])
    for now, then in zip(moments(later[-1]), moments(states[-1]), strict=True):
        assert bits(now["w"][:4]) == bits(then["w"][:4])
        assert bits(now["w"][4:]) != bits(then["w"][4:])


def test_rows_of_a_stack_thaw_one_after_another():
    until = {sel("w")[4:]: 1, sel("w")[2:4]: 2, sel("w")[0]: 3}
    params, states, traces = run(freeze(optax.adamw(0.1), "w", until=until), STACK, 5, loss_grad=pull)
    for rows, thaw in ((slice(4, 6), 1), (slice(2, 4), 2), (slice(0, 1), 3), (slice(1, 2), 9)):
        assert moved([p["w"][rows] for p in params]) == [step >= thaw for step in range(5)]
        mu = moments(states[min(thaw, 5)])[0]["w"][rows]
        assert not np.asarray(mu).any()  # at its thaw, as init makes it
    assert traces == 1


def test_rows_are_frozen_by_and_by():
    params, _, traces = run(
        freeze(optax.adamw(0.1), sel("w")[:4], since={sel("w")[:2]: 1, "w": 3}), STACK, 5, loss_grad=pull
    )
    assert moved([p["w"][:2] for p in params]) == [True, False, False, False, False]
    assert moved([p["w"][2:4] for p in params]) == [True, True, True, False, False]
    assert all(moved([p["w"][4:] for p in params]))
    assert traces == 1


@pytest.mark.parametrize("make", [optax.adafactor, optax.lion, optax.lamb, contrib.muon, contrib.schedule_free_adamw])
def test_slices_stay_in_optimizers_that_mix_elements(make):
    params, _, _ = run(freeze(make(learning_rate=0.1), sel("w")[:4]), {"w": STACK["w"]}, 3, loss_grad=pull)
    assert not any(moved([p["w"][:4] for p in params]))
    assert all(moved([p["w"][4:] for p in params]))


def test_gradients_of_slices():
    params, _, _ = run(freeze(optax.sgd(0.1), sel("w")[:4], how="gradients"), STACK, 2, loss_grad=pull)
    assert not any(moved([p["w"][:4] for p in params]))
    params, _, _ = run(freeze(optax.adamw(0.1), sel("w")[:4], how="gradients"), STACK, 2, loss_grad=pull)
    assert all(moved([p["w"][:4] for p in params]))


def test_line_searches_see_that_a_slice_stays():
    tx = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=5))
    frozen = freeze(tx, sel("w")[:2])

    def value(p):
        return ((p["w"] - 1) ** 2).sum()

    params = {"w": jnp.zeros((4, 2))}
    state = frozen.init(params)
    loss, grads = jax.value_and_grad(value)(params)
    updates, _ = jax.jit(lambda g, s, p: frozen.update(g, s, p, value=loss, grad=g, value_fn=value))(
        grads, state, params
    )
    after = optax.apply_updates(params, updates)
    assert not np.asarray(after["w"][:2]).any()
    assert value(after) < loss


def test_a_mask_along_one_axis_is_a_small_constant():
    params = {"w": jnp.ones((1000, 1000))}
    tx = freeze(optax.sgd(0.1), sel("w")[100:200, :500])
    text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    assert len(text) < 20_000


# ---- errors ------------------------------------------------------------------------------------------------------


class HINTS:  # what hints call `pm`
    freeze, sel = staticmethod(freeze), staticmethod(sel)


@pytest.mark.parametrize("step", [-1, 1.5, True, "10", [3], int, {}, {"a/**": -1}, {"a/**": None}])
@pytest.mark.parametrize("name", ["until", "since"])
def test_what_is_no_step(name, step):
    with pytest.raises(BadArgument, match=name):
        freeze(optax.adam(0.1), "a/**", **{name: step})


def test_schedules_that_cannot_be():
    for arguments in ({"until": 3, "since": 3}, {"until": {"a/**": 3}, "since": 3}):
        with pytest.raises(BadArgument, match="both 3"):
            freeze(optax.adam(0.1), "a/**", **arguments)
    with pytest.raises(BadArgument, match="the order of functions is unknown"):
        freeze(optax.adam(0.1), "a/**", until=3, since=lambda step: step > 4)
    for arguments in ({}, {"until": 3}, {"until": {"a/**": 3}, "since": 5}):
        with pytest.raises(BadArgument, match="which leaves") as caught:
            freeze(optax.adam(0.1), **arguments)
    for hint in caught.value.hint.split(", or "):
        eval(hint, {"pm": HINTS, "tx": optax.adam(0.1)}).init({"Dense_0": {"w": jnp.ones(1)}, "b": jnp.ones(1)})


def test_a_schedule_for_leaves_that_are_not_frozen():
    with pytest.raises(BadArgument, match="selects b/bias"):
        freeze(optax.adam(0.1), "a/**", until={"b/**": 3}).init(PARAMS)
    with pytest.raises(NoMatch):
        freeze(optax.adam(0.1), "**", until={"B/**": 3}).init(PARAMS)


def test_slices_that_do_not_fit():
    with pytest.raises(OutOfRange, match=r"a/kernel: .*\(3, 4\)"):
        freeze(optax.adam(0.1), sel("a/kernel")[7]).init(PARAMS)
    with pytest.raises(NoMatch, match="no element"):
        freeze(optax.adam(0.1), sel("a/kernel")[5:]).init(PARAMS)


def test_too_many_phases():
    params = {f"l{i}": jnp.ones(1) for i in range(70)}
    until = {f"l{i}": i + 1 for i in range(70)}
    with pytest.raises(BadArgument, match="64"):
        freeze(optax.adam(0.1), until=until).init(params)
    tx = freeze(optax.sgd(0.1), until=until, how="updates")
    updates, _ = tx.update(params, tx.init(params), params)
    assert np.signbit(updates["l69"]).all()


def test_a_function_that_gives_no_bool():
    tx = freeze(optax.adam(0.1), "a/**", until=lambda step: jnp.array([True, False]))
    with pytest.raises(BadArgument, match=r"shape \(2,\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def test_a_state_that_cannot_be_split():
    tx = freeze(optax.flatten(optax.adam(0.1)), "a/**", until=3)
    with pytest.raises(Unsupported, match="cannot be split by leaf") as caught:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    hint = caught.value.hint.partition(") ")[0].replace("...", "3") + ")"
    eval(hint, {"pm": HINTS, "tx": optax.flatten(optax.adam(0.1)), "selector": "a/**"}).init(PARAMS)
