"""Optimizer states after a graft: moments follow their parameters, and training goes on as if it had never stopped."""

import copy
import functools
import itertools
import pickle

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax.core import FrozenDict
from flax.training.train_state import TrainState

import paramend as pm
from paramend.errors import BadArgument, GraftRefused, Unsupported
from support.numerics import assert_close, bound

pytestmark = pytest.mark.slow  # many small programs to compile

LAST = {"params/Dense_[-1]/**": "params/Dense_[-1]/**"}


class MLP(nn.Module):
    layers: int
    width: int = 4

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers - 1):
            x = nn.relu(nn.Dense(self.width)(x))
        return nn.Dense(4)(x)


def init(layers, seed=0, width=4):
    return MLP(layers, width).init(jax.random.key(seed), jnp.ones((1, 4)))


def gradients(params, step):
    """Gradients that depend on the leaf's name, its values and the step: the same for a leaf wherever it stands."""

    def of(path, leaf):
        at = jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape)
        return jnp.sin(leaf + at + step) + 0.1 * leaf

    return jax.tree_util.tree_map_with_path(of, params)


@functools.cache
def stepper(tx):
    @jax.jit
    def step(params, state, i):
        updates, state = tx.update(gradients(params, i), state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, params, state, steps, start=0):
    for i in range(start, start + steps):
        params, state = stepper(tx)(params, state, i)
    return params, state


def schedule(step):
    return 1e-2 / (1 + step)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(schedule),
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2, momentum=0.9),
    "chain": lambda: optax.chain(optax.clip(1.0), optax.scale_by_adam(), optax.trace(0.9), optax.scale(-1e-2)),
    "inject": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=schedule, weight_decay=0.1),
    "multisteps": lambda: optax.MultiSteps(optax.adamw(schedule), 2),
    "amsgrad": lambda: optax.amsgrad(1e-2),
    "partition": lambda: optax.partition(
        {"kernel": optax.adamw(schedule), "bias": optax.sgd(1e-2, momentum=0.9)},
        lambda params: pm.labels(params, {"kernel": "**/kernel", "bias": "**"}),
    ),
    "masked": lambda: optax.masked(
        optax.adamw(schedule), lambda params: pm.at(params, "**/kernel").mask(), mask_compatible_extra_args=True
    ),
    "freeze": lambda: pm.freeze(optax.adamw(schedule), "**/Dense_1/kernel"),
    "freeze updates": lambda: pm.freeze(optax.adamw(schedule), "**/Dense_1/kernel", how="updates"),
    "named": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("adam", optax.adam(schedule))),
}


TERMS = 24  # in a step: a sine, and up to 20 operations of an optimizer


def assert_trained_alike(found, wanted, steps):
    """Leaves after steps of two programs."""
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_close(one, other, terms=steps * TERMS, scale=2)


def layer(params, number):
    return jax.tree.map(np.asarray, params["params"][f"Dense_{number}"])


WAYS = [(name, "report") for name in OPTIMIZERS]
COMMON = {"adamw", "inject", "lion", "sgd"}
WAYS += [(name, how) for name in ("adamw", "inject", "partition", "freeze") for how in ("states", "whole")]


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("name", "how"),
    [way if way[0] in COMMON and way[1] == "report" else pytest.param(*way, marks=pytest.mark.slow) for way in WAYS],
)
def test_training_goes_on_as_if_it_had_never_stopped(name, how):
    tx = OPTIMIZERS[name]()
    small, big = init(3), init(5, seed=1)
    small, old_state = train(tx, small, tx.init(small), 5)
    params, report = pm.graft(big, small, rename=LAST)
    if how == "report":
        state, said = pm.graft_opt_state(tx.init(params), old_state, report)
    elif how == "states":
        state, said = pm.graft(tx.init(params), old_state, rename=LAST)
    else:
        whole = {"params": big, "opt_state": tx.init(big)}
        whole, said = pm.graft(whole, {"params": small, "opt_state": old_state}, rename=LAST)
        jax.tree.map(np.testing.assert_array_equal, params, whole["params"])
        params, state = whole["params"], whole["opt_state"]
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    assert all("hyperparameter" in row.did for row in said.unused)
    after, _ = train(tx, params, state, 5, start=5)
    never, _ = train(tx, small, old_state, 5, start=5)
    for old, new in ((0, 0), (1, 1), (2, 4)):
        assert_trained_alike(layer(after, new), layer(never, old), 5)
    # it could have failed: without the state, it does
    anew, _ = train(tx, params, tx.init(params), 5, start=5)
    other = np.abs(layer(anew, 0)["kernel"] - layer(never, 0)["kernel"]).max()
    assert other > 10 * bound("float32", terms=5 * TERMS, scale=2)


def test_fresh_leaves_start_as_init_makes_them_and_the_report_tells():
    tx = optax.adamw(1e-3)
    small, big = init(2), init(3, seed=1)
    _, old_state = train(tx, small, tx.init(small), 3)
    params, report = pm.graft(big, small)
    state, said = pm.graft_opt_state(tx.init(params), old_state, report)
    assert not state[0].mu["params"]["Dense_2"]["kernel"].any()
    assert int(state[0].count) == 3
    assert [row.path for row in said.fresh] == [
        f"0/{moment}/params/Dense_2/{leaf}" for moment in ("mu", "nu") for leaf in ("bias", "kernel")
    ]
    assert {row.did for row in said.fresh} == {"as its parameter: nothing in the source"}
    assert len(said.copied) == 9


def test_the_common_corner_of_moments():
    tx = optax.adam(1e-3)
    small, wide = init(3), init(3, seed=1, width=6)
    small, old_state = train(tx, small, tx.init(small), 3)
    params, report = pm.graft(wide, small, mismatch="overlap")
    state, said = pm.graft_opt_state(tx.init(params), old_state, report)
    again, _ = pm.graft(tx.init(params), old_state, mismatch="overlap")
    jax.tree.map(np.testing.assert_array_equal, state, again)
    mu, old = (s[0].mu["params"]["Dense_1"]["kernel"] for s in (state, old_state))
    np.testing.assert_array_equal(mu[:4, :4], old)
    assert not mu[4:].any()
    assert not mu[:, 4:].any()
    row = next(row for row in said.mismatched if row.path == "0/mu/params/Dense_1/kernel")
    assert (row.did, row.taken) == ("corner [:4, :4] copied", 16)


def test_means_of_rows_stay_fresh_when_they_are_of_other_axes():
    # Of (4, 4) the last axis counts as the longer one, of (6, 4) the first: `v_row` means something else there.
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=2)
    old, new = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 6))}, {"w": jnp.ones((6, 4)), "v": jnp.ones((4, 8))}
    _, old_state = train(tx, old, tx.init(old), 3)
    params, report = pm.graft(new, old, mismatch="overlap")
    state, said = pm.graft_opt_state(tx.init(params), old_state, report)
    assert not state[0].v_row["w"].any()
    assert not state[0].v_col["w"].any()
    np.testing.assert_array_equal(state[0].v_row["v"], old_state[0].v_row["v"])
    np.testing.assert_array_equal(state[0].v_col["v"][:6], old_state[0].v_col["v"])
    assert {row.path for row in said.fresh if "means something else" in row.did} == {
        f"0/{m}/w" for m in ("v_row", "v_col", "v")
    }


def test_states_of_adafactor_alone_do_not_say_the_shapes_of_parameters():
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=2)
    old, new = {"w": jnp.ones((4, 6))}, {"w": jnp.ones((4, 8))}
    _, old_state = train(tx, old, tx.init(old), 3)
    state, said = pm.graft(tx.init(new), old_state, mismatch="overlap")
    assert not any(leaf.any() for leaf in jax.tree.leaves((state[0].v_row, state[0].v_col)))
    assert {row.path for row in said.fresh} == {f"0/{m}/w" for m in ("v_row", "v_col", "v")}


REFUSED = [
    (optax.adam(1e-3), optax.sgd(1e-3, momentum=0.9)),
    (optax.sgd(1e-3, momentum=0.9), optax.adam(1e-3)),
    (optax.adam(1e-3), optax.lion(1e-3)),
    (optax.lion(1e-3), optax.adam(1e-3)),
    (optax.adam(1e-3), optax.sgd(1e-3)),
    (optax.sgd(1e-3, momentum=0.9), optax.sgd(1e-3)),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
@pytest.mark.parametrize("how", ["report", "states", "whole"])
def test_another_kind_of_optimizer_is_refused(number, how):
    old_tx, tx = REFUSED[number]
    params = init(2)
    _, report = pm.graft(params, params)
    new, old = tx.init(params), old_tx.init(params)
    if not jax.tree.leaves(new) and how == "states":
        return  # a state without an array is no tree to graft
    with pytest.raises(GraftRefused, match=r"another optimizer|the earlier state keeps|go nowhere"):
        if how == "report":
            pm.graft_opt_state(new, old, report)
        elif how == "states":
            pm.graft(new, old)
        else:
            pm.graft({"params": params, "opt": new}, {"params": params, "opt": old})


def test_something_more_in_the_old_state_is_left_behind_only_when_told():
    params = init(2)
    old_tx, tx = optax.chain(optax.adam(1e-3), optax.ema(0.9)), optax.chain(optax.adam(1e-3))
    _, old_state = train(old_tx, params, old_tx.init(params), 2)
    _, report = pm.graft(params, params)
    with pytest.raises(GraftRefused, match="ema") as error:
        pm.graft_opt_state(tx.init(params), old_state, report)
    assert 'unused="ok"' in error.value.hint
    state, said = pm.graft_opt_state(tx.init(params), old_state, report, unused="ok")
    np.testing.assert_array_equal(
        state[0][0].mu["params"]["Dense_0"]["bias"], old_state[0][0].mu["params"]["Dense_0"]["bias"]
    )
    assert {row.path for row in said.unused} >= {"1/ema/params/Dense_0/bias"}
    with pytest.raises(BadArgument):
        pm.graft_opt_state(tx.init(params), old_state, report, unused="no")


def test_the_report_must_tell_of_all_parameters():
    tx = optax.adam(1e-3)
    params = init(3)
    _, report = pm.graft(init(1), init(1))
    with pytest.raises(GraftRefused, match="Dense_1"):
        pm.graft_opt_state(tx.init(params), tx.init(params), report)


def test_a_report_of_variables_serves_a_state_of_their_params():
    tx = optax.adam(1e-3)
    small, big = init(2)["params"], init(3, seed=1)["params"]
    old_state = train(tx, small, tx.init(small), 3)[1]
    stats = {"batch_stats": {"mean": jnp.ones(2)}}
    variables, report = pm.graft({"params": big, **stats}, {"params": small, **stats})
    state, _ = pm.graft_opt_state(tx.init(variables["params"]), old_state, report)
    np.testing.assert_array_equal(state[0].nu["Dense_1"]["kernel"], old_state[0].nu["Dense_1"]["kernel"])


def test_hyperparameters_stay_the_new_ones_and_counts_go_on():
    make = lambda rate: optax.inject_hyperparams(optax.adamw)(learning_rate=rate)
    params = init(2)
    _, old_state = train(make(0.5), params, make(0.5).init(params), 4)
    _, report = pm.graft(params, params)
    for state, said in (
        pm.graft_opt_state(make(0.1).init(params), old_state, report),
        pm.graft(make(0.1).init(params), old_state),
    ):
        assert state.hyperparams["learning_rate"] == np.float32(0.1)
        assert int(state.count) == int(state.inner_state[0].count) == 4
        assert "hyperparams/learning_rate" in {row.path for row in said.fresh}


def test_frozen_in_the_new_run_and_thawed_in_it():
    params = init(3)
    frozen, free = pm.freeze(optax.adam(1e-2), "**/Dense_0/**"), optax.adam(1e-2)
    _, report = pm.graft(params, params)
    _, old_state = train(free, params, free.init(params), 3)
    state, said = pm.graft_opt_state(frozen.init(params), old_state, report)
    assert int(state.inner_state[0].count) == 3
    assert {row.did for row in said.unused} == {"no place for it in the new state"}
    assert len(said.unused) == 4
    back, said = pm.graft_opt_state(free.init(params), state, report)
    assert not back[0].mu["params"]["Dense_0"]["kernel"].any()
    np.testing.assert_array_equal(
        back[0].mu["params"]["Dense_1"]["kernel"], old_state[0].mu["params"]["Dense_1"]["kernel"]
    )
    assert len(said.fresh) == 4


def test_a_state_from_a_file():
    tx = optax.chain(optax.clip(1.0), optax.adamw(schedule))
    small, big = init(3), init(5, seed=1)
    small, old_state = train(tx, small, tx.init(small), 4)
    saved = flax.serialization.msgpack_restore(flax.serialization.to_bytes(old_state))
    params, report = pm.graft(big, small, rename=LAST)
    state, _ = pm.graft_opt_state(tx.init(params), saved, report)
    wanted, _ = pm.graft_opt_state(tx.init(params), old_state, report)
    jax.tree.map(np.testing.assert_array_equal, state, wanted)
    with pytest.raises(BadArgument, match="dicts and lists"):
        pm.graft(tx.init(params), saved)
    whole, _ = pm.graft({"params": big, "opt_state": tx.init(big)}, {"params": small, "opt_state": saved}, rename=LAST)
    jax.tree.map(np.testing.assert_array_equal, whole["opt_state"], wanted)


@pytest.mark.numeric
@pytest.mark.parametrize("rename", [LAST, {"Dense_[-1]/**": "Dense_[-1]/**"}, {"**/Dense_[-1]/**": "**/Dense_[-1]/**"}])
def test_train_state(rename):
    tx = optax.adamw(schedule)
    old, new = (TrainState.create(apply_fn=None, params=init(n)["params"], tx=tx) for n in (3, 5))
    for i in range(4):
        old = old.apply_gradients(grads=gradients(old.params, i))
    state, said = pm.graft(new, old, rename=rename)
    assert type(state) is TrainState
    assert state.step == 4
    np.testing.assert_array_equal(state.params["Dense_4"]["kernel"], old.params["Dense_2"]["kernel"])
    np.testing.assert_array_equal(state.opt_state[0].mu["Dense_4"]["kernel"], old.opt_state[0].mu["Dense_2"]["kernel"])
    after = state.apply_gradients(grads=gradients(state.params, 4))
    never = old.apply_gradients(grads=gradients(old.params, 4))
    assert_trained_alike(after.params["Dense_4"], never.params["Dense_2"], 1)
    assert [row.path for row in said.fresh][:2] == ["params/Dense_2/kernel", "params/Dense_2/bias"]
    assert next(iter(new.params)) == next(iter(state.params))


def test_train_state_without_anything_for_its_optimizer():
    tx = optax.adam(1e-3)
    new = TrainState.create(apply_fn=None, params=FrozenDict(init(3)["params"]), tx=tx)
    state, said = pm.graft(new, init(2, seed=1))
    assert state.opt_state[0].mu is not None
    assert not said.unused


def test_two_optimizers_in_one_tree():
    tx = optax.adam(1e-3)
    old, new = {}, {}
    for part, layers in (("g", 2), ("d", 3)):
        params = init(layers, seed=layers)
        old[part] = dict(zip(("params", "opt"), train(tx, params, tx.init(params), layers), strict=True))
        params = init(layers + 1)
        new[part] = {"params": params, "opt": tx.init(params)}
    tree, _ = pm.graft(new, old)
    for part, count in (("g", 2), ("d", 3)):
        assert int(tree[part]["opt"][0].count) == count
        for i in range(count):
            ours, theirs = (one[part]["opt"][0].nu["params"][f"Dense_{i}"]["kernel"] for one in (tree, old))
            np.testing.assert_array_equal(ours, theirs)


class Net(nnx.Module):
    def __init__(self, layers, seed=0):
        rngs = nnx.Rngs(seed)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(layers)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


@pytest.mark.numeric
def test_nnx_optimizer():
    def steps(model, optimizer, count, mask=None):
        for _ in range(count):
            grads = nnx.grad(lambda m: (m.layers[0](jnp.ones((1, 4))) ** 2).sum() + (m.layers[-1].kernel ** 2).sum())(
                model
            )
            optimizer.update(model, grads)

    def optimizer_of(model):
        return nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    old, model = Net(2), Net(3, seed=1)
    old_optimizer = optimizer_of(old)
    steps(old, old_optimizer, 3)
    report = pm.graft_(model, old, rename={"layers[-1]/**": "layers[-1]/**"})
    optimizer = optimizer_of(model)
    count = optimizer.opt_state[0].count
    functional, _ = pm.graft_opt_state(optimizer, old_optimizer, report)
    assert int(optimizer.step[...]) == 0
    assert int(functional.step[...]) == 3
    pm.graft_optimizer_(optimizer, old_optimizer, report)
    assert optimizer.opt_state[0].count is count
    assert int(optimizer.step[...]) == int(count[...]) == 3
    steps(model, optimizer, 5)
    steps(old, old_optimizer, 5)
    assert_trained_alike(model.layers[0].kernel[...], old.layers[0].kernel[...], 5)
    assert_trained_alike(model.layers[2].kernel[...], old.layers[1].kernel[...], 5)


# ---- torch --------------------------------------------------------------------------------------------------


def torch_net(*sizes, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def torch_steps(model, optimizer, count, start=0):
    for i in range(start, start + count):
        for p in model.parameters():
            at = torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape)
            p.grad = torch.sin(p.detach() + at + i)
        optimizer.step()


TORCH = {
    "Adam": {},
    "AdamW": {"amsgrad": True},
    "SGD": {"momentum": 0.9},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adagrad": {"initial_accumulator_value": 0.1},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Adafactor": {},
    "Rprop": {},
    "ASGD": {"t0": 2},
    "Adadelta": {},
}


def torch_optimizer(name, model, **kwargs):
    return getattr(torch.optim, name)(model.parameters(), lr=1e-2, **TORCH[name], **kwargs)


@pytest.mark.numeric
@pytest.mark.parametrize("name", TORCH)
def test_torch_training_goes_on(name):
    old, model = torch_net(4, 4, 4), torch_net(4, 4, 4, 4, seed=1)
    old_optimizer = torch_optimizer(name, old)
    torch_steps(old, old_optimizer, 5)
    report = pm.graft_(model, old, rename={"1.**": "2.**"})
    optimizer = torch_optimizer(name, model)
    said = pm.graft_optimizer_(optimizer, old_optimizer, report)
    assert [row.path for row in said.fresh] == ["1.weight", "1.bias"]
    assert not said.unused
    other = model[1].weight
    fresh = copy.deepcopy(other)
    alone = getattr(torch.optim, name)([fresh], lr=1e-2, **TORCH[name])
    for i in range(5):
        torch_steps(old, old_optimizer, 1, start=5 + i)
        torch_steps(model, optimizer, 1, start=5 + i)
        fresh.grad = torch.sin(fresh.detach() + torch.arange(16.0).reshape(4, 4) + 5 + i)
        alone.step()
    for a, b in ((model[0], old[0]), (model[2], old[1])):
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.bias, b.bias)
    assert_close(other, fresh, terms=5 * TERMS, scale=2)
    assert old_optimizer.state[old[0].weight] is not optimizer.state[model[0].weight]


@pytest.mark.numeric
@pytest.mark.parametrize("name", TORCH)
def test_torch_corner(name):
    old, model = torch_net(4, 4, 4), torch_net(4, 6, 4, seed=1)
    old_optimizer = torch_optimizer(name, old)
    torch_steps(old, old_optimizer, 5)
    report = pm.graft_(model, old, mismatch="overlap")
    optimizer = torch_optimizer(name, model)
    said = pm.graft_optimizer_(optimizer, old_optimizer, report)
    assert said.mismatched
    # as the optimizer itself would start: the state after a step of a gradient of zeros
    twin = copy.deepcopy(model)
    start = torch_optimizer(name, twin)
    for p in twin.parameters():
        p.grad = torch.zeros_like(p)
    start.step()
    for key, value in optimizer.state[model[0].weight].items():
        theirs = old_optimizer.state[old[0].weight][key]
        if isinstance(value, torch.Tensor) and value.ndim:
            corner = tuple(map(slice, theirs.shape))
            assert value.shape == start.state[twin[0].weight][key].shape
            assert torch.equal(value[corner], theirs)
            if value.shape[0] == 6:
                assert_close(value[4:], start.state[twin[0].weight][key][4:], terms=TERMS, scale=1)
        else:
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs))
    torch_steps(model, optimizer, 2, start=5)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_torch_dtype_and_hyperparameters_are_of_the_new_optimizer():
    old, model = torch_net(4, 4), torch_net(4, 4, seed=1).to(torch.bfloat16)
    old_optimizer = torch.optim.Adam(old.parameters(), lr=0.5)
    torch_steps(old, old_optimizer, 2)
    report = pm.graft_(model, old)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    said = pm.graft_optimizer_(optimizer, old_optimizer, report)
    state = optimizer.state[model[0].weight]
    assert state["exp_avg"].dtype == torch.bfloat16
    assert state["step"].dtype == torch.float32
    assert int(state["step"]) == 2
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert any(row.did == "copied, cast from float32" for row in said.copied)


def test_torch_modules_that_the_report_lost():
    old, model = torch_net(4, 4), torch_net(4, 4, 4, seed=1)
    old_optimizer = torch.optim.Adam(old.parameters())
    torch_steps(old, old_optimizer, 2)
    report = pickle.loads(pickle.dumps(pm.graft_(model, old)))
    optimizer = torch.optim.Adam(model.parameters())
    for known, said in (({"source": old}, "are not in the report"), ({"target": model}, "no names")):
        with pytest.raises(BadArgument, match=said) as error:
            pm.graft_optimizer_(optimizer, old_optimizer, report, **known)
        assert "target=module, source=old_module" in error.value.hint
    assert not optimizer.state
    pm.graft_optimizer_(optimizer, old_optimizer, report, target=model, source=old)
    assert int(optimizer.state[model[0].bias]["step"]) == 2


def test_torch_names_in_a_saved_state():
    old, model = torch_net(4, 4), torch_net(4, 4, 4, seed=1)
    old_optimizer = torch.optim.Adam(old.named_parameters())
    torch_steps(old, old_optimizer, 2)
    report = pm.graft_(model, old.state_dict())
    optimizer = torch.optim.Adam(model.parameters())
    pm.graft_optimizer_(optimizer, old_optimizer.state_dict(), report)
    assert torch.equal(optimizer.state[model[0].bias]["exp_avg"], old_optimizer.state[old[0].bias]["exp_avg"])
    nameless = torch.optim.Adam(old.parameters()).state_dict()
    with pytest.raises(BadArgument, match="load_state_dict"):
        pm.graft_optimizer_(optimizer, nameless, report)
    with pytest.raises(GraftRefused, match="SGD"):
        pm.graft_optimizer_(torch.optim.SGD(model.parameters()), old_optimizer.state_dict(), report)


def test_torch_functional_graft():
    old, model = torch_net(4, 4), torch_net(4, 4, 4, seed=1)
    old_optimizer = torch.optim.Adam(old.parameters())
    torch_steps(old, old_optimizer, 2)
    new, report = pm.graft(model, old)
    optimizer = torch.optim.Adam(new.parameters())
    pm.graft_optimizer_(optimizer, old_optimizer, report)
    assert len(optimizer.state) == 2


@pytest.mark.parametrize(
    ("new", "old"), [("SGD", "Adam"), ("Adam", "SGD"), ("Adamax", "Adam"), ("Adam", "LBFGS"), ("LBFGS", "LBFGS")]
)
def test_torch_other_kinds_are_refused(new, old):
    model = torch_net(4, 4)
    report = pm.graft_(torch_net(4, 4), model)
    optimizer, old_optimizer = (getattr(torch.optim, name)(model.parameters()) for name in (new, old))
    with pytest.raises((GraftRefused, Unsupported)) as error:
        pm.graft_optimizer_(optimizer, old_optimizer, report, target=model, source=model)
    assert error.value.hint


def test_torch_frozen_parameters():
    old, model = torch_net(4, 4, 4), torch_net(4, 4, 4, seed=1)
    pm.freeze_(old, "0.*")
    old_optimizer = torch.optim.Adam([p for p in old.parameters() if p.requires_grad])
    torch_steps(old, old_optimizer, 2)
    report = pm.graft_(model, old)
    optimizer = torch.optim.Adam(model.parameters())
    said = pm.graft_optimizer_(optimizer, old_optimizer, report)
    assert len(optimizer.state) == 2
    assert [row.path for row in said.fresh] == ["0.weight", "0.bias"]
    assert "nothing in the earlier state" in said.fresh[0].did


def test_torch_all_or_nothing():
    old, model = torch_net(4, 4), torch_net(4, 6, seed=1)
    old_optimizer = torch.optim.Adam(old.parameters())
    torch_steps(old, old_optimizer, 2)
    old_optimizer.state[old[0].bias]["odd"] = torch.ones(3)
    report = pm.graft_(model, old, mismatch="overlap")
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(GraftRefused, match=r"odd of 0\.bias"):
        pm.graft_optimizer_(optimizer, old_optimizer, report)
    assert not optimizer.state


def test_torch_entries_that_hyperparameters_ask_for():
    old, model = torch_net(4, 4), torch_net(4, 4, seed=1)
    report = pm.graft_(model, old)
    with_max = torch.optim.Adam(old.parameters(), amsgrad=True)
    torch_steps(old, with_max, 2)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(GraftRefused, match="max_exp_avg_sq") as error:
        pm.graft_optimizer_(optimizer, with_max, report)
    assert 'unused="ok"' in error.value.hint
    assert not optimizer.state
    said = pm.graft_optimizer_(optimizer, with_max, report, unused="ok")
    assert {row.path for row in said.unused} == {"0.weight.max_exp_avg_sq", "0.bias.max_exp_avg_sq"}
    again = torch.optim.Adam(old.parameters(), amsgrad=True)
    pm.graft_optimizer_(again, optimizer, pm.graft_(old, model))
    torch_steps(old, again, 1, start=2)
    assert again.state[old[0].weight]["max_exp_avg_sq"].any()


@pytest.mark.parametrize("wrong", [{"mu": jnp.ones(2)}, 5, jnp.ones(2)], ids=["dict", "int", "array"])
def test_what_is_no_optimizer_state(wrong):
    tx = optax.adam(1e-3)
    params, report = pm.graft({"w": jnp.ones(2)}, {"w": jnp.zeros(2)})
    for call in (pm.graft_opt_state, pm.graft_optimizer_):
        with pytest.raises(Unsupported, match="not an optimizer state") as error:
            call(wrong, tx.init(params), report)
        assert "tx.init(params)" in error.value.hint
    with pytest.raises(Unsupported, match="cannot change in place"):
        pm.graft_optimizer_(tx.init(params), tx.init(params), report)
    whole = {"params": params, "state": tx.init(params)}
    with pytest.raises(BadArgument, match="holds the parameters"):
        pm.graft_opt_state(whole, whole, report)


def test_an_opened_checkpoint_as_the_source(tmp_path):
    tx = optax.adamw(schedule)
    small, big = init(3), init(5, seed=1)
    small, old_state = train(tx, small, tx.init(small), 4)
    saved = flax.serialization.to_state_dict({"params": small, "opt_state": old_state})
    pm.save(saved, tmp_path / "run.safetensors")
    new = {"params": big, "opt_state": tx.init(big)}
    with pm.open(tmp_path / "run.safetensors") as checkpoint:
        whole, _ = pm.graft(new, checkpoint, rename=LAST)
    wanted, _ = pm.graft(new, {"params": small, "opt_state": old_state}, rename=LAST)
    jax.tree.map(np.testing.assert_array_equal, whole, wanted)
