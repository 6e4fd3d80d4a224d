"""Stacks of layers: models in one form give the same outputs from the parameters of the other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given, settings, strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import paramend as pm
from paramend.errors import BadArgument, NoMatch, RenameClash, SpecMismatch, Unsupported
from support.numerics import assert_close

X = jnp.linspace(-1, 1, 8).reshape(2, 4)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(4)(nn.LayerNorm()(x)), None


class Scanned(nn.Module):
    layers: int
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=self.layers)
        return nn.Dense(2)(scan(name="layers")(x, None)[0])


class Unrolled(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            x, _ = Block(name=f"layers_{i}")(x)
        return nn.Dense(2)(x)


def assert_same_outputs(found, wanted, layers):
    """Of each block a mean and a variance over 4 values and a product of as many terms, and the head at the end."""
    assert_close(found, wanted, terms=layers * 12 + 4, scale=4)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.numeric
@pytest.mark.parametrize("axis", [0, 1])
def test_linen_scan(axis):
    scanned, unrolled = Scanned(3, axis), Unrolled(3)
    variables = unrolled.init(jax.random.key(0), X)
    like = scanned.init(jax.random.key(1), X)
    for stacked in (
        pm.stack_layers(variables, "params/layers_<n>", axis=axis),
        pm.stack_layers(variables, "params/layers_<n>", like=like),
    ):
        assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, like)
        assert_same_outputs(scanned.apply(stacked, X), unrolled.apply(variables, X), 3)
        back = pm.unstack_layers(stacked, "params/layers", into="params/layers_<n>", axis=axis)
        same(back, variables)
        same(pm.unstack_layers(stacked, "params/layers", into="params/layers_<n>", like=variables), variables)
        assert stacked["params"]["Dense_0"]["kernel"] is variables["params"]["Dense_0"]["kernel"]
    assert list(stacked["params"]) == ["layers", "Dense_0"]
    assert list(back["params"]) == list(variables["params"])


@pytest.mark.numeric
def test_a_deeper_scanned_model_starts_from_an_unrolled_one():
    small = Unrolled(2).init(jax.random.key(0), X)
    big = Scanned(4).init(jax.random.key(1), X)
    params, report = pm.graft(big, pm.stack_layers(small, "params/layers_<n>"), mismatch="overlap")
    kernel = params["params"]["layers"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kernel[1], small["params"]["layers_1"]["Dense_0"]["kernel"])
    np.testing.assert_array_equal(kernel[2:], big["params"]["layers"]["Dense_0"]["kernel"][2:])
    assert report.mismatched[0].did.startswith("corner [:2")
    # layers that do nothing change nothing
    params = pm.at(params, "params/layers/Dense_0/*")[2:].zero()
    assert_same_outputs(Scanned(4).apply(params, X), Unrolled(2).apply(small, X), 4)


class NBlock(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return x + self.norm(self.linear(x))


class NUnrolled(nnx.Module):
    def __init__(self, layers, rngs):
        self.layers = nnx.List([NBlock(rngs) for _ in range(layers)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class NStacked(nnx.Module):
    def __init__(self, layers, rngs):
        @nnx.split_rngs(splits=layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return NBlock(rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        return run(x, self.layers)


@pytest.mark.numeric
def test_nnx_stacks():
    unrolled, stacked = NUnrolled(3, nnx.Rngs(0)), NStacked(3, nnx.Rngs(1))
    state = pm.stack_layers(nnx.state(unrolled), "layers/<n>")
    assert isinstance(state["layers"]["linear"]["kernel"], nnx.Param)
    nnx.update(stacked, state)
    assert_same_outputs(stacked(X), unrolled(X), 3)
    back = pm.unstack_layers(nnx.state(stacked), "layers", into="layers/<n>")
    same(back, nnx.state(unrolled))
    fresh = NUnrolled(3, nnx.Rngs(2))
    nnx.update(fresh, back)
    np.testing.assert_array_equal(fresh(X), unrolled(X))  # the same program on the same values
    report = pm.graft_(NStacked(3, nnx.Rngs(3)), state)
    assert len(report.copied) == 6
    with pytest.raises(Unsupported, match="fixed by its class"):
        pm.stack_layers(unrolled, "layers/<n>")


def test_torch_state_dicts_and_their_names():
    net = torch.nn.Sequential(*(torch.nn.Linear(3, 3, dtype=torch.bfloat16) for _ in range(12)))
    state = {f"model.layers.{name}": value for name, value in net.state_dict().items()} | {"head": torch.ones(2)}
    stacked = pm.stack_layers(state, "model.layers.<n>")
    assert list(stacked) == ["model.layers.weight", "model.layers.bias", "head"]
    assert stacked["model.layers.weight"].dtype == torch.bfloat16
    assert torch.equal(stacked["model.layers.weight"][11], net[11].weight)
    back = pm.unstack_layers(stacked, "model.layers", into="model.layers.<n>")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert back["head"] is state["head"]
    assert pm.stack_layers(state, "model.layers.<n>", axis=-1)["model.layers.weight"].shape == (3, 3, 12)
    with pytest.raises(Unsupported, match="fixed by its class"):
        pm.stack_layers(net, "<n>", into="layers")


def test_lists_frozen_dicts_and_dtypes():
    tree = FrozenDict(
        {"enc": {"layers": [{"w": np.full(2, i, ml_dtypes.bfloat16)} for i in range(11)]}, "z": np.ones(1)}
    )
    stacked = pm.stack_layers(tree, "enc/layers/<n>")
    assert type(stacked) is FrozenDict
    assert stacked["enc"]["layers"]["w"].dtype == ml_dtypes.bfloat16
    assert stacked["enc"]["layers"]["w"][:, 0].tolist() == list(range(11))
    back = pm.unstack_layers(stacked, "enc/layers", into="enc/layers/<n>")
    same(back, tree)
    assert list(pm.stack_layers(tree, "enc/layers/<n>", into="blocks")) == ["blocks", "z"]


@pytest.mark.numeric
def test_moments_of_an_optimizer():
    params = Unrolled(3).init(jax.random.key(0), X)
    tx = optax.adamw(1e-3)
    _, state = tx.update(params, tx.init(params), params)
    scanned = pm.stack_layers(params, "params/layers_<n>")
    moments = pm.stack_layers(state, "**/layers_<n>")
    assert jax.tree.structure(moments) == jax.tree.structure(tx.init(scanned))
    _, wanted = tx.update(scanned, tx.init(scanned), scanned)
    same(moments, wanted)
    same(pm.unstack_layers(moments, "**/layers", into="**/layers_<n>"), state)
    masked = optax.masked(tx, pm.at(params, "**/kernel").mask())
    with pytest.raises(Unsupported, match="MaskedNode") as error:
        pm.stack_layers(masked.init(params), "**/layers_<n>")
    assert "graft_opt_state" in error.value.hint


def test_several_stacks_of_different_depth():
    tree = {
        side: {f"layer_{i}": {"w": np.full(2, i)} for i in range(n)} for side, n in (("encoder", 2), ("decoder", 3))
    }
    stacked = pm.stack_layers(tree, "*/layer_<n>", into="*/layers")
    assert {side: stacked[side]["layers"]["w"].shape for side in stacked} == {"encoder": (2, 2), "decoder": (3, 2)}
    same(pm.unstack_layers(stacked, "*/layers", into="*/layer_<n>"), tree)


def test_shardings_stay():
    mesh = jax.make_mesh((1,), ("m",))
    leaf = jax.device_put(jnp.ones((4, 6)), NamedSharding(mesh, PartitionSpec(None, "m")))
    stacked = pm.stack_layers({"h_0": leaf, "h_1": leaf}, "h_<n>", axis=1)["h"]
    assert stacked.sharding.spec == PartitionSpec(None, None, "m")
    assert stacked.shape == (4, 2, 6)


def test_boxes_stay_and_name_their_axes():
    init = nn.with_partitioning(nn.initializers.ones, (None, "m"))
    tree = {f"h_{i}": nn.Dense(4, kernel_init=init).init(jax.random.key(0), X)["params"] for i in range(2)}
    stacked = pm.stack_layers(tree, "h_<n>")
    assert stacked["h"]["kernel"].names == (None, None, "m")
    same(pm.unstack_layers(stacked, "h", into="h_<n>"), tree)


def test_under_jit():
    tree = {"h_0": jnp.zeros(2), "h_1": jnp.ones(2)}
    stacked = jax.jit(lambda t: pm.stack_layers(t, "h_<n>"))(tree)
    assert stacked["h"].tolist() == [[0, 0], [1, 1]]
    same(jax.jit(lambda t: pm.unstack_layers(t, "h", into="h_<n>"))(stacked), tree)


W = np.ones((2, 2), "float32")


@pytest.mark.parametrize(
    ("tree", "layers", "error", "said"),
    [
        ({"h_0": {"w": W}, "h_2": {"w": W}}, "h_<n>", BadArgument, "numbered 0, 2"),
        ({"h_1": {"w": W}}, "h_<n>", BadArgument, "numbered 1"),
        ({"h_0": {"w": W}, "h_1": {"w": W, "b": W}}, "h_<n>", BadArgument, "b is not in layer 0"),
        ({"h_0": {"w": W}, "h_1": {"w": W[0]}}, "h_<n>", SpecMismatch, r"float32\[2,2\] in layer 0, float32\[2\] in"),
        ({"h_0": {"w": W}, "h_1": {"w": W.astype("int8")}}, "h_<n>", SpecMismatch, "int8"),
        ({"h_0": {"w": W}}, "layer_<n>", NoMatch, "matches none"),
        ({"params": {"h_0": {"w": W}}}, "h_<n>", NoMatch, "matches none"),
        ({"h_0": {"w": W}}, "h_0", BadArgument, "the number of a layer"),
        ({"h_0": {"w": W}}, "h_<n>_<m>", BadArgument, "2 numbers"),
        ({"0": {"w": W}}, "<n>", BadArgument, "is not a path"),
        ({"h_0": {"w": W}, "h": W}, "h_<n>", RenameClash, "is a leaf"),
        ({"h_0": {"w": W, "x": None}}, "h_<n>", Unsupported, "h_0/x is a NoneType"),
    ],
)
def test_what_cannot_be_stacked(tree, layers, error, said):
    with pytest.raises(error, match=said) as caught:
        pm.stack_layers(tree, layers)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("tree", "options", "error", "said"),
    [
        ({"h": {"w": W, "b": np.ones(3)}}, {"into": "h_<n>"}, BadArgument, "2 in h/w; 3 in h/b"),
        ({"h": {"w": W, "b": np.ones(())}}, {"into": "h_<n>"}, BadArgument, "axis=0 is not an axis of h/b"),
        ({"h": {"w": W}}, {"into": "layers"}, BadArgument, "no numbers"),
        ({"h": {"w": W}}, {"into": "h_<n+1>"}, BadArgument, "does arithmetic"),
        ({"h": {"w": W}, "h_1": W}, {"into": "h_<n>"}, RenameClash, "is a leaf"),
        ({"h": {"w": W[:0]}}, {"into": "h_<n>"}, BadArgument, "without layers"),
        ({"h": {"w": W}}, {"into": "h_<n>", "like": {"h_0": {"w": W[0]}}}, BadArgument, "several axes"),
        ({"h": {"w": W}}, {"into": "h_<n>", "like": {"h_0": {"b": W[0]}}}, BadArgument, "not in `like`"),
        ({"h": {"w": W}}, {"into": "h_<n>", "like": {"h_0": {"w": np.ones(5)}}}, BadArgument, "no axis fits"),
    ],
)
def test_what_cannot_be_unstacked(tree, options, error, said):
    with pytest.raises(error, match=said) as caught:
        pm.unstack_layers(tree, "h", **options)
    assert caught.value.hint


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(1, 3), min_size=0, max_size=3), st.data())
def test_unstacking_undoes_stacking(layers, shape, data):
    axis = data.draw(st.integers(-len(shape) - 1, len(shape)))
    values = np.arange(layers * int(np.prod(shape))).reshape(layers, *shape)
    tree = {"x": np.ones(1), **{f"h_{i}": {"w": {"v": values[i]}} for i in range(layers)}}
    stacked = pm.stack_layers(tree, "h_<n>", axis=axis)
    np.testing.assert_array_equal(stacked["h"]["w"]["v"], np.stack(list(values), axis))
    same(pm.unstack_layers(stacked, "h", into="h_<n>", axis=axis), tree)
