"""The calls of modules, in float64, whatever the framework."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from paramend.errors import BadArgument
from paramend.porting.calls import calls, run
from support.numerics import assert_close

pytestmark = pytest.mark.numeric
RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 8)).astype("float32")
W, B = RNG.normal(size=(8, 8)).astype("float32"), RNG.normal(size=8).astype("float32")
WIDE = np.tanh(X.astype("float64") @ W + B) @ W + B  # the model of every framework, by arithmetic
TOLERANCE = 1e-12


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="first", dtype=jnp.bfloat16)(x)
        x = nn.Dropout(0.5)(jnp.tanh(x), deterministic=False)
        return nn.Dense(8, name="last")(x)


class Nnx(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=nnx.Rngs(0), dtype=jnp.float32) for _ in range(2)])
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        for layer in self.layers:
            layer.kernel[...], layer.bias[...] = jnp.array(W), jnp.array(B)

    def __call__(self, x):
        return self.layers[1](self.drop(jnp.tanh(self.layers[0](x))))


class Equinox(eqx.Module):
    first: eqx.nn.Linear
    rest: list

    def __init__(self):
        layer = eqx.nn.Linear(8, 8, key=jax.random.key(0))
        layer = eqx.tree_at(lambda each: (each.weight, each.bias), layer, (jnp.array(W.T), jnp.array(B)))
        self.first, self.rest = layer, [eqx.nn.Dropout(0.5), eqx.tree_at(lambda each: each.bias, layer, jnp.array(B))]

    def __call__(self, x):
        return self.rest[1](self.rest[0](jnp.tanh(self.first(x))))


def linen():
    layer = {"kernel": jnp.array(W), "bias": jnp.array(B)}
    return Linen().bind({"params": {"first": layer, "last": layer}})


def haiku():
    transformed = hk.transform(lambda x: hk.Linear(8)(jnp.tanh(hk.Linear(8)(x))))
    layer = {"w": jnp.array(W), "b": jnp.array(B)}
    return functools.partial(transformed.apply, {"linear": layer, "linear_1": layer}, None)


def torch_model():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 8))
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.copy_(torch.tensor(W.T)), layer.bias.copy_(torch.tensor(B))
    return model


MODELS = {
    "torch": (torch_model, ["0", "1", "3", ""]),
    "linen": (linen, ["first", "last", ""]),
    "nnx": (Nnx, ["layers/0", "layers/1", ""]),
    "equinox": (Equinox, ["first", "rest/1", ""]),
    "haiku": (haiku, ["linear_1", "linear"]),  # numbered as they are made: the outer one first
}


@pytest.mark.parametrize("name", MODELS)
def test_each_call_is_noted_in_float64_without_dropout(name):
    make, paths = MODELS[name]
    found = calls(make(), (X,))
    assert [call.path for call in found] == paths
    assert {array.dtype.name for call in found for array in (*call.inputs, *call.outputs)} == {"float64"}
    assert np.abs(found[0].outputs[0] - (X.astype("float64") @ W + B)).max() < TOLERANCE
    assert np.abs(found[-1].outputs[0] - WIDE).max() < TOLERANCE
    assert [call.path for call in found if call.composite] == ([""] if "" in paths else [])


@pytest.mark.parametrize("library", [np.array, torch.tensor, jnp.array])
@pytest.mark.parametrize("name", ["torch", "linen"])
def test_inputs_are_arrays_of_any_library_and_functions_run_as_they_are(name, library):
    model = MODELS[name][0]()
    for found in (run(model, library(X)), run(lambda x: {"logits": model(x), "cache": None}, [library(X)])):
        assert [call.path for call in found.calls] == MODELS[name][1]
        assert np.abs(next(iter(found.outputs.values())) - WIDE).max() < TOLERANCE
    assert list(found.outputs) == ["logits"]


@pytest.mark.parametrize("name", ["torch", "nnx", "linen"])
def test_the_model_stays_as_it_is(name):
    if name == "torch":
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(8), torch.nn.ReLU(inplace=True)).half()
        state = lambda: {key: value.clone() for key, value in model.state_dict().items()}
    elif name == "nnx":
        model = nnx.BatchNorm(8, rngs=nnx.Rngs(0), dtype=jnp.float16)
        state = lambda: nnx.to_pure_dict(nnx.state(model)) | {"dtype": np.dtype(model.dtype).num}
    else:
        one, none = jnp.ones(8), jnp.zeros(8)
        variables = {"params": {"scale": one, "bias": none}, "batch_stats": {"mean": none, "var": one}}
        model = nn.BatchNorm(use_running_average=False).bind(variables, mutable=["batch_stats"])
        state = lambda: model.variables
    before = state()
    calls(model, X)
    after = state()
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert np.array_equal(old, new) and getattr(old, "dtype", None) == getattr(new, "dtype", None)


def test_what_is_switched_on_is_switched_off_after_a_failure():
    def held():
        classes = torch.nn.Module.__call__, nnx.Linear.__call__, eqx.nn.Linear.__call__
        return *classes, jax.nn.dot_product_attention, jnp.float32, jnp.bfloat16, torch.get_default_dtype()

    before = held()
    with pytest.raises(RuntimeError, match="shapes"):
        calls(torch_model(), X[:, :3])
    assert held() == before and torch.backends.mha.get_fastpath_enabled() and jnp.ones(1).dtype == jnp.float32


def test_what_jax_compiled_during_a_run_is_not_used_after_it():
    function = jax.jit(lambda x: x.astype(jnp.float32).astype(jnp.float64))
    with jax.enable_x64(True):
        third = jnp.full((), 1 / 3)
        assert run(function, third).outputs[""] == 1 / 3
        assert float(function(third)) == np.float32(1 / 3)


def test_a_model_that_casts_to_float32_is_computed_in_float64():
    class Norm(torch.nn.Module):
        def forward(self, x):
            kept = x.to(torch.float32) + torch.zeros(8, dtype=torch.float32)
            return torch.nn.functional.softmax(kept.float(), -1, dtype=torch.float32).type_as(kept)

    found = calls(Norm(), X)[0].outputs[0]
    wide = np.exp(X.astype("float64"))
    assert np.abs(found - wide / wide.sum(-1, keepdims=True)).max() < TOLERANCE


def test_attention_of_jax_is_computed_in_float64():
    q, k, v = (RNG.normal(size=(1, 3, heads, 4)) for heads in (4, 2, 2))
    seen = np.tril(np.ones((3, 3), bool))
    scores = np.where(seen, np.einsum("bqhd,bkhd->bhqk", q, k.repeat(2, 2)) / 2, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    wanted = np.einsum("bhqk,bkhd->bqhd", weights, v.repeat(2, 2))
    mask = seen | (RNG.normal(size=(3, 3)) > 0)
    found = run(lambda *args: jax.nn.dot_product_attention(*args, None, mask, is_causal=True), (q, k, v)).outputs
    assert np.abs(found[""] - wanted).max() < TOLERANCE


def test_calls_in_a_scan_have_no_values_and_are_noted_once():
    cell = {"i": {"kernel": jnp.array(W), "bias": jnp.array(B)}, "h": {"kernel": jnp.array(W)}}
    found = calls(nn.RNN(nn.SimpleCell(8)).bind({"params": {"cell": cell}}), X[None])
    assert [call.path for call in found] == ["cell/i", "cell/h", "cell", ""]
    assert (found[2].inputs, found[2].outputs) == ((), ())
    assert found[3].outputs[0].shape == (1, 2, 8)


def test_an_in_place_layer_does_not_change_what_was_noted():
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU(inplace=True))
    identity, relu, _ = calls(model, X)
    assert (identity.outputs[0] < 0).any() and (relu.inputs[0] < 0).any() and not (relu.outputs[0] < 0).any()


def test_a_shared_layer_has_one_path_and_two_calls():
    layer = torch.nn.Linear(8, 8)
    assert [call.path for call in calls(torch.nn.Sequential(layer, layer), X)] == ["0", "0", ""]


@pytest.mark.parametrize("model", [{"w": W}, nn.Dense(3), 5])
def test_what_cannot_run_is_refused(model):
    with pytest.raises(BadArgument, match="cannot run") as caught:
        calls(model, X)
    assert "bind" in caught.value.hint


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_a_hook_computes_are_copied():
    layer = torch.nn.utils.weight_norm(torch.nn.Linear(8, 3))
    layer.weight_g.data *= 2
    wanted = layer(torch.tensor(X)).detach().numpy()
    assert_close(calls(layer, X)[0].outputs[0], wanted, terms=32, scale=20)
