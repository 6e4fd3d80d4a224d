"""Optimizer states carried over: thawed, frozen again, resumed from files, between chains."""

import functools
import inspect

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn, nnx
from optax import contrib

import paramend as pm
from paramend.errors import BadArgument, GraftRefused, SpecMismatch, Unsupported
from paramend.freezing.freeze import freeze
from paramend.selectors.selector import sel
from support.nnx import pure
from support.numerics import assert_close
from support.slow import slow_except

pytestmark = pytest.mark.slow  # many small programs to compile

PARAMS = {
    "a": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.ones(4)},
    "b": {"kernel": jnp.arange(8.0).reshape(4, 2), "bias": jnp.ones(2)},
}
ADAM = optax.adamw(0.1)


def carried(tx, params, state, **options):
    """The state of `tx` for these parameters, in which everything goes on that an earlier state has."""
    return pm.graft_opt_state(tx.init(params), state, **options)[0]


def pull(params):
    return jax.tree.map(lambda p: 2 * p - 1, params)


def train(tx, params=PARAMS, state=None, steps=3):
    state = tx.init(params) if state is None else state
    for _ in range(steps):
        updates, state = tx.update(pull(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def bits(tree):
    leaves = jax.tree.leaves(tree)
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.extended) else x).tobytes()
        for x in leaves
    ]


@functools.cache
def trained(form):
    """A run in one of the forms."""
    return train(FORMS[form]())


def moments(state):
    return optax.tree.get(state, "mu"), optax.tree.get(state, "nu")


def count(state):
    return int(optax.tree.get(state, "count", filtering=lambda path, _: "Adam" in str(path)))


# ---- forms ---------------------------------------------------------------------------------------------------------

FORMS = {
    "plain": lambda: ADAM,
    "a frozen": lambda: freeze(ADAM, "a/**"),
    "b frozen": lambda: freeze(ADAM, "b/**"),
    "updates": lambda: freeze(ADAM, "a/**", how="updates"),
    "scheduled": lambda: freeze(ADAM, "a/**", until=2),
    "slices": lambda: freeze(ADAM, sel("a/kernel")[:1]),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), ADAM),
    "frozen in a chain": lambda: optax.chain(optax.clip(1.0), optax.identity(), freeze(ADAM, "a/**")),
    "chain frozen": lambda: freeze(optax.chain(optax.clip_by_global_norm(1.0), ADAM), "a/**"),
    "schedule": lambda: freeze(optax.adamw(lambda step: 0.1 / (1 + step)), "a/**"),
    "hyperparameters": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.1),
    "partition": lambda: optax.partition({"on": ADAM, "off": optax.set_to_zero()}, {"a": "off", "b": "on"}),
    "two parts": lambda: optax.partition({"x": ADAM, "y": ADAM}, {"a": "x", "b": "y"}),
    "accumulated": lambda: optax.MultiSteps(ADAM, 1),
    "apply_if_finite": lambda: optax.apply_if_finite(freeze(ADAM, "a/**"), 3),
}


@pytest.mark.parametrize("new", FORMS)
@pytest.mark.parametrize("old", FORMS)
def test_moments_and_counts_go_from_form_to_form(old, new):
    params, state = trained(old)
    tx = FORMS[new]()
    gone_on = carried(tx, params, state)
    fresh = tx.init(params)
    assert jax.tree.structure(gone_on) == jax.tree.structure(fresh)
    for mine, theirs, init in zip(all_moments(gone_on), all_moments(state), all_moments(fresh), strict=True):
        for path, value in mine.items():
            assert bits(value) == bits(theirs.get(path, init[path]))
    # The count of a schedule that the earlier optimizer did not have starts at 0.
    assert set(counts(gone_on)) <= ({0, 3} if new in ("schedule", "hyperparameters") else {3})
    if "plain" in (old, new):
        train(tx, params, gone_on, 1)


def all_moments(state):
    """The moments by path in the parameters, of all records in a state."""
    found = ({}, {})
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        for name, moments in zip(("mu", "nu"), found, strict=True):
            if name in names:
                moments["/".join(names[names.index(name) + 1 :])] = leaf
    return found


def counts(state):
    found = jax.tree_util.tree_flatten_with_path(state)[0]
    return sorted({int(leaf) for path, leaf in found if getattr(path[-1], "name", "") == "count"})


def test_thawed_by_hand_it_crashes():
    """The fact that `graft_opt_state` without a report is there for."""
    _, state = train(freeze(ADAM, "a/**"))
    with pytest.raises((TypeError, ValueError, AttributeError)):
        ADAM.update(pull(PARAMS), state, PARAMS)


def test_thaw_refreeze_and_thaw_again():
    params, state = train(freeze(ADAM, "a/**"))
    assert bits(params["a"]) == bits(PARAMS["a"])
    params, state = train(ADAM, params, carried(ADAM, params, state))
    again = freeze(ADAM, "b/**")
    before = params
    params, state = train(again, params, carried(again, params, state))
    assert bits(params["b"]) == bits(before["b"])
    assert bits(params["a"]) != bits(before["a"])
    thawed = carried(ADAM, params, state)
    assert count(thawed) == 9
    assert not np.asarray(moments(thawed)[0]["b"]["kernel"]).any()
    train(ADAM, params, thawed)


@pytest.mark.numeric
def test_trained_leaves_go_on_as_if_nothing_had_happened():
    """Frozen, carried and thawed: the other leaves are where they are without any of it."""
    params, state = train(freeze(ADAM, "a/**"))
    params, _ = train(ADAM, params, carried(ADAM, params, state))
    alone, _ = train(ADAM, PARAMS["b"], steps=6)
    for one, other in zip(jax.tree.leaves(params["b"]), jax.tree.leaves(alone), strict=True):
        assert_close(one, other, terms=6 * 20)


def test_the_step_of_a_schedule_goes_on():
    tx = freeze(ADAM, "a/**", until=4)
    params, state = train(tx)
    other = freeze(optax.chain(optax.clip(1.0), ADAM), "a/**", until=4)
    new = carried(other, params, state)
    assert int(new.step) == 3
    params, after = train(other, params, new, 1)
    assert bits(params["a"]) == bits(PARAMS["a"])
    params, _ = train(other, params, after, 1)
    assert bits(params["a"]) != bits(PARAMS["a"])
    assert int(carried(tx, params, train(ADAM)[1]).step) == 0  # a state without a schedule has no step


def test_schedules_and_hyperparameters_go_on():
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=lambda step: 0.1 / (1 + step))
    params, state = train(tx)
    frozen = freeze(tx, "a/**")
    new = carried(frozen, params, state)
    assert int(new.inner_state.count) == 3
    assert_close(new.inner_state.hyperparams["learning_rate"], 0.1 / 3, terms=2)
    rate = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda step: -0.1 / (1 + step)))
    params, state = train(rate, steps=4)
    assert counts(carried(freeze(optax.chain(optax.clip(1.0), rate), "a/**"), params, state)) == [4]


def test_an_optimizer_over_new_leaves_starts_them_fresh():
    params, state = train(ADAM)
    grown = {**params, "c": {"kernel": jnp.ones((2, 2))}}
    new = carried(ADAM, grown, state)
    assert bits(moments(new)[0]["a"]) == bits(moments(state)[0]["a"])
    assert not np.asarray(moments(new)[0]["c"]["kernel"]).any()
    shrunk = {"b": params["b"]}
    new = carried(ADAM, shrunk, state)
    assert bits(moments(new)) == bits([m["b"] for m in moments(state)])


def optimizers():
    for module in (optax, contrib):
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
EVERY = dict(optimizers())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of optimizers that have a successor
@pytest.mark.parametrize("name", EVERY)
def test_every_optimizer_frozen_and_thawed(name):
    tx = EVERY[name](learning_rate=0.1, **ARGUMENTS.get(name, {}))
    state = jax.tree.map(mark, tx.init(PARAMS))
    frozen = freeze(tx, "a/**")
    part = carried(frozen, PARAMS, state)
    for leaf, init in zip(jax.tree.leaves(part), jax.tree.leaves(frozen.init(PARAMS)), strict=True):
        assert bits(leaf) == bits(mark(init))  # all is carried
    whole = carried(tx, PARAMS, part)
    assert jax.tree.structure(whole) == jax.tree.structure(state)
    kept = sum(
        bits(one) == bits(other) for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True)
    )
    assert kept >= len(jax.tree.leaves(part))


def mark(x):
    """Another value than `init` makes, the same for all."""
    if jnp.issubdtype(x.dtype, jax.dtypes.extended) or x.dtype == bool:
        return x
    return jnp.full_like(x, 7)


def test_params_of_other_containers():
    boxed = {"d": {"kernel": nn.Partitioned(jnp.ones(2), names=("x",)), "bias": jnp.ones(1)}}
    ones = jax.tree.map(jnp.ones_like, boxed)
    _, state = ADAM.update(ones, ADAM.init(boxed), boxed)
    raw = flax.serialization.to_state_dict(state)
    new = carried(freeze(ADAM, "d/bias"), boxed, raw)
    assert bits(moments(new)[0]["d"]["kernel"]) == bits(moments(state)[0]["d"]["kernel"])
    one = jnp.ones(3)
    _, state = ADAM.update(one, ADAM.init(one), one)
    assert bits(carried(optax.chain(optax.clip(1.0), ADAM), one, state)) == bits(state)
    flat = {"mlp/~/linear_0": {"w": one}, "mlp/~/linear_1": {"w": one}}
    _, state = ADAM.update(flat, ADAM.init(flat), flat)
    assert bits(carried(ADAM, flat, state)) == bits(state)


def test_nnx_optimizer():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, freeze(ADAM, "kernel"), wrt=nnx.Param)
    grads = nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model)
    optimizer.update(model, grads)
    thawed = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    state = pure(optimizer.opt_state)
    new = carried(ADAM, pure(nnx.state(model, nnx.Param)), state)
    jax.tree.map(
        lambda variable, value: variable.set_raw_value(value),
        thawed.opt_state,
        new,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
    assert int(thawed.opt_state[0].count[...]) == 1
    assert np.asarray(thawed.opt_state[0].mu["bias"][...]).all()
    thawed.update(model, grads)


# ---- files ---------------------------------------------------------------------------------------------------------


def through_msgpack(state, folder):
    path = folder / "state.msgpack"
    path.write_bytes(flax.serialization.msgpack_serialize(flax.serialization.to_state_dict(state)))
    return flax.serialization.msgpack_restore(path.read_bytes())


def through_msgpack_with_target(state, folder):
    return flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, state), flax.serialization.to_bytes(state))


def through_orbax(state, folder):
    checkpointer = ocp.PyTreeCheckpointer()
    checkpointer.save(folder / "state", state)
    return checkpointer.restore(folder / "state")


def through_orbax_with_target(state, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", jax.tree.map(jnp.zeros_like, state))


FILES = [through_msgpack, through_msgpack_with_target, through_orbax, through_orbax_with_target]


@pytest.mark.filterwarnings("ignore")  # of Orbax
@pytest.mark.parametrize("through", FILES)
@pytest.mark.parametrize(
    "form",
    slow_except({"a frozen", "scheduled"}, ["a frozen", "scheduled", "chain frozen", "hyperparameters", "partition"]),
)
def test_saved_while_frozen_and_thawed_after_loading(through, form, tmp_path):
    params, state = trained(form)
    loaded = through(state, tmp_path)
    for name in ("plain", "a frozen", "scheduled", form):
        tx = FORMS[name]()
        one, other = carried(tx, params, loaded), carried(tx, params, state)
        assert jax.tree.structure(one) == jax.tree.structure(other)
        assert bits(one) == bits(other)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(one))
        went_on, expected = train(tx, params, one, 2)[0], train(tx, params, other, 2)[0]
        assert bits(went_on) == bits(expected)


def test_what_comes_from_a_file_goes_where_the_parameters_are():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    params = {"a": jax.device_put(jnp.ones(8), sharding)}
    state = flax.serialization.to_state_dict(jax.device_get(ADAM.init(params)))
    assert moments(carried(ADAM, params, state))[0]["a"].sharding.is_equivalent_to(sharding, 1)


def test_under_jit():
    params, state = train(freeze(ADAM, "a/**"))
    compiled = jax.jit(lambda params, state: carried(ADAM, params, state))(params, state)
    assert bits(compiled) == bits(carried(ADAM, params, state))


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_moments_of_another_shape_are_refused_with_their_paths():
    params, state = train(ADAM)
    wider = {**params, "b": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    with pytest.raises(SpecMismatch) as caught:
        carried(ADAM, wider, state)
    for path in ("0/mu/b/kernel", "0/nu/b/kernel", "0/mu/b/bias"):
        assert f"{path} is [" in str(caught.value)
    assert "[4, 2] in the earlier state, and [4, 3] is needed" in str(caught.value)

    class Pm:  # what hints call `pm`
        graft_opt_state = staticmethod(pm.graft_opt_state)

    kept = eval(
        caught.value.hint.partition(" starts")[0],
        {"pm": Pm, "tx": ADAM, "params": wider, "state": ADAM.init(wider), "old_state": state},
    )[0]
    assert not np.asarray(moments(kept)[0]["b"]["kernel"]).any()
    assert bits(moments(kept)[0]["a"]) == bits(moments(state)[0]["a"])
    assert count(kept) == 3


def test_other_kinds_of_numbers_are_refused():
    params, state = train(ADAM)
    broken = jax.tree.map(lambda x: x.astype(jnp.int32), state)
    with pytest.raises(SpecMismatch, match="of kind int"):
        carried(ADAM, params, broken)


def test_a_state_of_something_else():
    for wrong in (train(optax.sgd(0.1, momentum=0.9))[1], {}, {"weights": jnp.ones(3)}):
        with pytest.raises(BadArgument, match="nothing in this state"):
            carried(ADAM, PARAMS, wrong)
    assert carried(optax.sgd(0.1), PARAMS, ()) == optax.sgd(0.1).init(PARAMS)  # has no state at all


def test_arguments():
    with pytest.raises(BadArgument, match="the third argument must be the report"):
        pm.graft_opt_state(ADAM, PARAMS, ADAM.init(PARAMS))
    with pytest.raises(Unsupported, match="not an optimizer state"):
        pm.graft_opt_state(PARAMS, ADAM.init(PARAMS))
    with pytest.raises(BadArgument, match="neither"):
        carried(ADAM, PARAMS, ADAM.init(PARAMS), mismatch="skip")


def test_the_report_says_what_went_on_and_what_did_not():
    params, old = train(freeze(ADAM, "b/**"))
    state, report = pm.graft_opt_state(ADAM.init(params), old)
    assert {row.path for row in report.copied} == {
        "0/count",
        *(f"0/{m}/a/{n}" for m in ("mu", "nu") for n in ("bias", "kernel")),
    }
    assert {row.path for row in report.fresh} == {f"0/{m}/b/{n}" for m in ("mu", "nu") for n in ("bias", "kernel")}
    assert not report.unused
    _, report = pm.graft_opt_state(freeze(ADAM, "b/**").init(params), state)
    assert {row.path for row in report.unused} == {f"0/{m}/b/{n}" for m in ("mu", "nu") for n in ("bias", "kernel")}
    with pytest.raises(GraftRefused, match="no place here") as caught:
        pm.graft_opt_state(freeze(ADAM, "b/**").init(params), state, unused="error")
    assert len(caught.value.report.unused) == 4
