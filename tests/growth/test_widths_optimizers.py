"""Moments follow parameters that grew: a step after the growth is the growth of a step."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

import paramend as pm
from paramend.errors import BadArgument, SpecMismatch, Unsupported
from paramend.porting.float64_torch import float64
from support.tiny_models import logits, make

TINY = 1e-40  # an epsilon that is small beside gradients of any scale


def stepped(model, optimizer, family, steps):
    with float64():
        for _ in range(steps):
            optimizer.zero_grad()
            out = logits(model, family).flatten(0, -2)
            torch.nn.functional.cross_entropy(out, torch.arange(len(out)) % 64).backward()
            optimizer.step()


@pytest.mark.numeric
@pytest.mark.parametrize("asked", [{"hidden": 64, "heads": 8, "kv_heads": 4, "mlp": 128}, {"mlp": 192}], ids=str)
def test_a_step_after_the_growth_is_the_growth_of_a_step(asked):
    model = make("llama", torch.float64, attn_implementation="eager", num_hidden_layers=1)
    old = torch.optim.AdamW(model.parameters(), eps=TINY, weight_decay=0.1)
    stepped(model, old, "llama", 3)
    wide, report = pm.widen(copy.deepcopy(model), **asked)
    rates = {row.path: row.rate for row in report.rows}
    groups = [
        {"params": [p], "lr": 1e-3 * rates.get(name, 1), "weight_decay": 0.1 / rates.get(name, 1)}
        for name, p in wide.named_parameters()
    ]
    new = torch.optim.AdamW(groups, eps=TINY)
    pm.graft_optimizer_(new, old, report, source=model)
    assert {int(state["step"]) for state in new.state.values()} == {3}
    assert [group["lr"] for group in new.param_groups] == [group["lr"] for group in groups]
    stepped(model, old, "llama", 1)
    stepped(wide, new, "llama", 1)
    expected = dict(pm.widen(model, **asked)[0].named_parameters())
    live = {name for name, p in model.named_parameters() if "k_proj.bias" not in name}  # whose gradient is zero
    for name in live:
        np.testing.assert_allclose(wide.get_parameter(name).detach(), expected[name].detach(), atol=1e-11)


def regression(width):
    rng = np.random.default_rng(0)
    kernels = {"Dense_0": rng.normal(size=(3, width)), "Dense_1": rng.normal(size=(width, 2))}
    return {
        name: {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(kernel.shape[1])} for name, kernel in kernels.items()
    }


def update(tx, params, state, rates=None):
    def loss(params):
        x = jnp.tanh(jnp.linspace(-1, 1, 12).reshape(4, 3) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
        return ((x @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"] - 1) ** 2).mean()

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    if rates:
        scaled = {path: rates.get("/".join(k.key for k in path), 1) for path, _ in jax.tree.leaves_with_path(updates)}
        updates = jax.tree.map_with_path(lambda path, leaf: leaf * scaled[path], updates)
    return optax.apply_updates(params, updates), state


@pytest.mark.numeric
@pytest.mark.parametrize("wrapped", [False, True])
def test_states_of_optax_follow(wrapped):
    with jax.enable_x64(True):
        tx = optax.chain(optax.clip_by_global_norm(1e9), optax.adam(1e-2, eps=TINY))
        params = regression(4)
        state = tx.init(params)
        for _ in range(3):
            params, state = update(tx, params, state)
        tree = {"params": params} if wrapped else params
        path = "params/Dense_0" if wrapped else "Dense_0"
        wide, report = pm.widen(tree, features={path: 12})
        wide = wide["params"] if wrapped else wide
        new, _ = pm.graft_opt_state(tx.init(wide), state, report)
        assert new[1][0].mu["Dense_0"]["kernel"].shape == (3, 12)
        np.testing.assert_array_equal(new[1][0].mu["Dense_1"]["kernel"][:4], state[1][0].mu["Dense_1"]["kernel"])
        np.testing.assert_allclose(new[1][0].nu["Dense_0"]["bias"][4:8] * 9, state[1][0].nu["Dense_0"]["bias"])
        rates = {row.path.removeprefix("params/"): row.rate for row in report.rows}
        stepped_first, _ = update(tx, params, state)
        expected, _ = pm.widen({"params": stepped_first} if wrapped else stepped_first, features={path: 12})
        made, _ = update(tx, wide, new, rates)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), made, expected["params"] if wrapped else expected
        )


def test_an_optimizer_of_nnx_follows_in_place():
    net = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
    old = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
    old.update(net, nnx.grad(lambda net: net(jnp.ones(3)).sum())(net))
    before = np.asarray(old.opt_state[0].mu["layers"][0]["kernel"].get_raw_value())
    report = pm.widen_(net, features={"layers/0": 8})
    new = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)
    pm.graft_optimizer_(new, old, report)
    after = np.asarray(new.opt_state[0].mu["layers"][0]["kernel"].get_raw_value())
    np.testing.assert_allclose(after, np.tile(before / 2, 2))
    assert int(new.step.get_raw_value()) == 1
    new.update(net, nnx.grad(lambda net: net(jnp.ones(3)).sum())(net))


def test_new_places_have_no_momentum_and_second_moments_of_others():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    old = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    old.step()
    report = pm.widen_(net, features={"0": 4}, method="zero")
    new = torch.optim.Adam(net.parameters())
    pm.graft_optimizer_(new, old, report)
    state = new.state[net[0].weight]
    assert state["exp_avg"].shape == (4, 3)
    assert not state["exp_avg"][2:].any()
    assert torch.equal(state["exp_avg_sq"][2:], state["exp_avg_sq"][:2])
    net(torch.ones(1, 3)).sum().backward()
    new.step()


def test_a_narrower_model_takes_its_moments_along():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    old = torch.optim.SGD(net.named_parameters(), momentum=0.9)
    net(torch.ones(1, 3)).sum().backward()
    old.step()
    small, report = pm.narrow(net, keep={"0": [3, 1]})
    new = torch.optim.SGD(small.named_parameters(), momentum=0.9)
    pm.graft_optimizer_(new, old.state_dict(), report)
    momentum = old.state[net[1].weight]["momentum_buffer"]
    assert torch.equal(new.state[small[1].weight]["momentum_buffer"], momentum[:, [3, 1]])


def test_what_does_not_follow_is_refused():
    params = regression(4)
    wide, report = pm.widen(params, features={"Dense_0": 8})
    tx = optax.adadelta(0.1)
    with pytest.raises(Unsupported, match="how e_x of a parameter follows"):
        pm.graft_opt_state(tx.init(wide), tx.init(params), report)
    tx = optax.adafactor(0.1, min_dim_size_to_factor=1)
    with pytest.raises((SpecMismatch, Unsupported)):
        pm.graft_opt_state(tx.init(wide), tx.init(params), report)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    old = torch.optim.Adam(net.parameters())
    small, report = pm.narrow(net, keep={"0": 2})
    report.ends = None
    with pytest.raises(BadArgument, match="it has no names"):
        pm.graft_optimizer_(torch.optim.Adam(small.parameters()), old, report)
