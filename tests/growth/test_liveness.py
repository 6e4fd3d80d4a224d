"""Which parameters receive a gradient, and which make a block the identity."""

import copy

import jax
import jax.numpy as jnp
import pytest
import torch
import transformers
from torch import nn

import paramend as pm
from paramend.errors import BadArgument, NoMatch, Unsupported
from support.tiny_models import FAMILIES, make


def regression(model):
    torch.manual_seed(1)
    x = torch.randn(16, 4)
    return ((model(x) - x.flip(1)) ** 2).mean()


class Gated(nn.Module):
    """ReZero: x + gate * F(x)."""

    def __init__(self, gate=0.0, last=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.gate = nn.Linear(4, 8), nn.Linear(8, 4), nn.Parameter(torch.tensor(gate))
        with torch.no_grad():
            for parameter in self.b.parameters():
                parameter.mul_(last)

    def forward(self, x):
        return x + self.gate * self.b(torch.relu(self.a(x)))


def test_what_is_behind_a_zero_comes_alive_at_the_second_step():
    report = pm.check_live(Gated(), regression)
    assert report.at(1) == ["gate"]
    assert set(report.at(2)) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert not report.dead
    assert "5 leaves alive, 0 dead after 2 steps" in str(report)


def test_two_zeros_are_dead():
    model = Gated(last=0.0)
    before = copy.deepcopy(model.state_dict())
    report = pm.check_live(model, regression, steps=4)
    assert {row.path for row in report.dead} == set(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert report.to_dict()["dead"] == [row.path for row in report.dead]


def test_new_layers_are_alive():
    model = nn.ModuleDict({"blocks": nn.ModuleList(Gated(1.0) for _ in range(2))})
    report = pm.deepen_(model, order=pm.depth.blocks(2, count=1), identity="b.*")

    def loss(model):
        return regression(nn.Sequential(*model["blocks"]))

    live = pm.check_live(model, loss, report.new)
    assert live.at(1) == ["blocks.2.b.weight", "blocks.2.b.bias"]
    assert set(live.at(2)) == {"blocks.2.gate", "blocks.2.a.weight", "blocks.2.a.bias"}
    dead = pm.deepen(model, order=pm.depth.blocks(3, count=1), identity=["b.*", "gate"])[0]
    assert len(pm.check_live(dead, loss, "blocks[-1]/**").dead) == 5


def test_parameters_of_jax():
    def loss(p):
        return jnp.sum((jnp.ones(3) + p["gate"] * jnp.tanh(p["w"])) ** 2)

    params = {"gate": jnp.zeros(()), "w": jnp.ones(3), "count": jnp.zeros((), int)}
    report = pm.check_live(params, loss)
    assert (report.at(1), report.at(2)) == (["gate"], ["w"])
    with pytest.raises(BadArgument, match="steps=0 is not"):
        pm.check_live(params, loss, steps=0)
    with pytest.raises(NoMatch):
        pm.check_live(params, loss, "x")


def test_frozen_parameters_are_not_asked():
    model = Gated()
    model.a.requires_grad_(False)
    assert {row.path for row in pm.check_live(model, regression).rows} == {"gate", "b.weight", "b.bias"}


# ---- residual writers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_trying_finds_what_the_table_says(family):
    model = make(family)
    before = copy.deepcopy(model.state_dict())
    example = torch.randn(2, 3, 16, 16) if family == "vit" else torch.randint(2, 64, (2, 12))
    found = pm.residual_writers(model, example)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # The dense and the sparse layers of Qwen3-MoE differ: the first is the one that was tried.
    order = pm.depth.splice(3, at=1)
    _, by_trial = pm.deepen(model, order=order, identity=found)
    _, by_table = pm.deepen(model, order=order)
    assert by_trial.layers[1].set == by_table.layers[1].set


def test_blocks_of_any_kind():
    x = torch.randn(3, 4)
    assert pm.residual_writers(Gated(1.0), x, layers="") in ({"gate": 0.0}, {"b.weight": 0.0, "b.bias": 0.0})
    norm = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(Unsupported, match="no residual connection"):
        pm.residual_writers(norm, x, layers="")
    with pytest.raises(BadArgument, match="did not call"):
        pm.residual_writers(_Idle(), x)


class _Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        return x


def test_post_norm_has_none():
    config = transformers.BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    with pytest.raises(Unsupported, match="post-LN"):
        pm.residual_writers(transformers.BertModel(config), {"input_ids": torch.ones(1, 4, dtype=torch.long)})


def test_functions_of_jax():
    def block(params, x):
        hidden = jax.nn.relu(x @ params["Dense_0"]["kernel"])
        return x + hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]

    params = {
        "Dense_0": {"kernel": jnp.ones((4, 8))},
        "Dense_1": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)},
    }
    assert pm.residual_writers(block, jnp.ones((2, 4)), params=params) == {"Dense_1/kernel": 0.0, "Dense_1/bias": 0.0}
    with pytest.raises(Unsupported):
        pm.residual_writers(lambda params, x: x @ params["w"], jnp.ones((2, 4)), params={"w": jnp.ones((4, 4))})
    with pytest.raises(BadArgument, match="torch model, or a function"):
        pm.residual_writers(params, jnp.ones(4))
