"""`widen` on layers of plain trees and modules: the next layer reads what grew, and nothing else changes."""

import copy

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import paramend as pm
from paramend.errors import BadArgument, NoMatch, Unsupported

METHODS = ("tile", "split", "zero")


def perceptron():
    """A net of torch with norms that see features one by one, and one that sees them all."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 6)]
    net = torch.nn.Sequential(*layers, torch.nn.LayerNorm(6), torch.nn.GELU(), torch.nn.Linear(6, 3)).double()
    with torch.no_grad():
        for tensor in (*net.parameters(), net[1].running_mean):
            tensor.add_(torch.randn_like(tensor) * 0.3)
    return net.eval()


def difference(one, other, x):
    return float((one(x) - other(x)).abs().max())


@pytest.mark.numeric
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [13, 16])
@torch.no_grad()
def test_a_layer_of_a_torch_module_grows(method, size):
    net, x = perceptron(), torch.randn(4, 5, dtype=torch.float64)
    before = copy.deepcopy(net)
    wide, report = pm.widen(net, features={"0": size}, method=method)
    assert difference(wide, before, x) <= 1e-14
    assert difference(net, before, x) == 0
    assert (wide[0].out_features, wide[1].num_features, wide[3].in_features) == (size, size, size)
    assert wide[6].weight is net[6].weight
    held = dict(net.named_parameters())
    assert str(pm.widen_(net, features={"0": size}, method=method)) == str(report)
    assert difference(net, wide, x) == 0
    assert {id(p) for p in net.parameters()} == set(map(id, held.values()))


@pytest.mark.numeric
@torch.no_grad()
def test_a_norm_over_all_features_sees_what_it_saw_or_it_is_refused():
    net, x = perceptron(), torch.randn(4, 5, dtype=torch.float64)
    wide, _ = pm.widen(net, features={"0": 9, "3": 18})
    assert difference(wide, net, x) <= 1e-14
    assert wide[4].normalized_shape == (18,)
    for size, method in ((9, "tile"), (12, "zero")):
        with pytest.raises(Unsupported, match="norms run over the whole"):
            pm.widen(net, features={"3": size}, method=method)


@pytest.mark.numeric
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_channels_grow_through_norms_and_into_a_flat_layer(training):
    torch.manual_seed(0)
    convolutions = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 3)]
    net = torch.nn.Sequential(*convolutions, torch.nn.Flatten(), torch.nn.Linear(20, 3)).double().train(training)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    wide, _ = pm.widen(net, features={"0": 7, "3": 11})
    assert difference(wide, net, x) <= 1e-14
    assert (wide[0].out_channels, wide[3].in_channels, wide[3].out_channels, wide[5].in_features) == (7, 7, 11, 44)


class Net(nn.Module):
    """A net of Flax whose norms have no numbers in common with the layers."""

    hidden: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 2), param_dtype=jnp.float64)(x)
        x = nn.Dense(self.hidden, param_dtype=jnp.float64)(x.reshape(len(x), -1))
        x = nn.tanh(nn.LayerNorm(param_dtype=jnp.float64)(x))
        return nn.Dense(3, param_dtype=jnp.float64)(x)


@pytest.mark.numeric
def test_flax_parameters_grow_and_the_order_of_keys_does_not_matter():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(2, 3, 3, 1))
        params = Net(6).init(jax.random.key(0), x)
        params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # its keys are in the order of the alphabet then
        wide, report = pm.widen(params, features={"params/Dense_0": 12})
        assert wide["params"]["LayerNorm_0"]["scale"].shape == (12,)
        np.testing.assert_allclose(Net(12).apply(wide, x), Net(6).apply(params, x), atol=1e-14)
        assert wide["params"]["Conv_0"]["kernel"] is params["params"]["Conv_0"]["kernel"]
        again, _ = pm.widen(wide, features={"params/Conv_0": 4})
        assert report.sizes == {"params/Dense_0": (6, 12)}
        assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, wide)


def test_the_reader_is_the_next_number():
    shapes = {f"Dense_{n}": (2, 2) for n in (1, 10, 2, 0)}
    params = {name: {"kernel": np.ones(shape, "float32")} for name, shape in shapes.items()}
    wide, report = pm.widen(params, features={"Dense_2": np.int64(4)})
    assert [row.path for row in report.rows] == ["Dense_10/kernel", "Dense_2/kernel"]
    assert wide["Dense_10"]["kernel"].shape == (4, 2)
    with pytest.raises(BadArgument, match="last layer"):
        pm.widen(params, features={"Dense_10": 4})


def test_batch_statistics_in_their_own_collection_follow():
    layer = {"kernel": np.ones((2, 3)), "bias": np.ones(3)}
    params = {"Dense_0": layer, "BatchNorm_0": {"scale": np.ones(3)}, "Dense_1": {"kernel": np.ones((3, 1))}}
    wide, _ = pm.widen({"params": params, "batch_stats": {"BatchNorm_0": {"mean": np.arange(3.0)}}},
                       features={"params/Dense_0": 5})  # fmt: skip
    assert wide["batch_stats"]["BatchNorm_0"]["mean"].tolist() == [0, 1, 2, 0, 1]
    assert wide["params"]["Dense_1"]["kernel"].ravel().tolist() == [0.5, 0.5, 1, 0.5, 0.5]


def test_modules_of_nnx_and_equinox_tell_their_new_sizes():
    net, x = nnx.Sequential(nnx.Linear(5, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 3, rngs=nnx.Rngs(1))), jnp.ones(5)
    before = net(x)
    wide, _ = pm.widen(net, features={"layers/0": 20})
    assert (wide.layers[0].out_features, wide.layers[1].in_features, net.layers[0].out_features) == (20, 20, 8)
    np.testing.assert_allclose(wide(x), before, rtol=1e-5)
    pm.widen_(net, features={"layers/0": 20}, method="zero")
    np.testing.assert_allclose(net(x), before, rtol=1e-5)
    assert net.layers[1].kernel.shape == (20, 3)
    tower = eqx.nn.MLP(5, 3, 8, 2, key=jax.random.key(0))
    wider, _ = pm.widen(tower, features={"layers/0": 12})
    assert (wider.layers[0].out_features, tower.layers[0].out_features) == (12, 8)
    np.testing.assert_allclose(wider(x), tower(x), rtol=1e-5)


def test_what_is_not_known_is_asked_for_or_refused():
    dense = {"kernel": np.ones((2, 2)), "bias": np.ones(2)}
    params = {f"Dense_{n}": dense for n in range(3)} | {f"Scale_{n}": {"scale": np.ones(2)} for n in (5, 6, 7)}
    with pytest.raises(BadArgument, match="it is not known which of Scale_5") as caught:
        pm.widen(params, features={"Dense_0": 4})
    assert "Scale_5" in caught.value.hint
    wide, _ = pm.widen(params, features={"Dense_0": 4, "Scale_6": 4})
    assert [wide[name]["scale"].shape for name in ("Scale_5", "Scale_6")] == [(2,), (4,)]
    with pytest.raises(NoMatch):
        pm.widen(params, features={"Dense_9": 4})
    with pytest.raises(Unsupported, match="does not read as many"):
        pm.widen({"Dense_0": dense, "Dense_1": {"kernel": np.ones((3, 2))}}, features={"Dense_0": 4})
    with pytest.raises(BadArgument, match="less than 2"):
        pm.widen(params, features={"Dense_0": 1, "Scale_5": 1})
    for wrong in ({}, {"features": {"Dense_0": 4}, "mlp": 8}, {"features": {"Dense_0": 4.0}}):
        with pytest.raises(BadArgument):
            pm.widen(params, **wrong)
    with pytest.raises(BadArgument, match="no configuration"):
        pm.widen(params, mlp=8)
    with pytest.raises(BadArgument, match="not one of tile"):
        pm.widen(params, features={"Dense_0": 4, "Scale_5": 4}, method="copy")
    with pytest.raises(Unsupported, match="in place"):
        pm.widen_(params, features={"Dense_0": 4})


@pytest.mark.numeric
@torch.no_grad()
def test_layers_of_torch_that_store_their_axes_otherwise_grow_too_or_are_refused():
    torch.manual_seed(0)
    tables = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 2)).double()
    wide, _ = pm.widen(tables, features={"0": 6})
    assert (wide[0].embedding_dim, wide[0].num_embeddings) == (6, 5)
    assert difference(wide, tables, torch.arange(5)) <= 1e-14
    up = torch.nn.Sequential(torch.nn.ConvTranspose1d(3, 4, 2), torch.nn.ReLU(), torch.nn.Conv1d(4, 2, 2)).double()
    wide, _ = pm.widen(up, features={"0": 7})
    assert (wide[0].in_channels, wide[0].out_channels, wide[2].in_channels) == (3, 7, 7)
    assert difference(wide, up, torch.randn(2, 3, 5, dtype=torch.float64)) <= 1e-14
    grouped = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1, groups=2), torch.nn.Conv1d(4, 4, 1))
    normed = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1), torch.nn.GroupNorm(2, 4), torch.nn.Conv1d(4, 4, 1))
    recurrent = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GRU(4, 4), torch.nn.Linear(4, 4))
    for net in (grouped, normed, recurrent):
        with pytest.raises(Unsupported, match="is not known"):
            pm.widen(net, features={"0": 8})


def test_new_places_differ_from_all_others_though_they_are_made_of_few():
    params = {"a": {"kernel": np.random.default_rng(0).normal(size=(16, 2))}, "b": {"kernel": np.ones((2, 1))}}
    wide, _ = pm.widen(params, features={"a": 12}, method="zero")
    kernel = wide["a"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :2], params["a"]["kernel"])
    alike = np.abs(np.corrcoef(kernel.T)) - np.eye(12)
    assert alike.max() < 0.99999
    assert 0.3 < (kernel[:, 2:] ** 2).mean() / (kernel[:, :2] ** 2).mean() < 3
    assert wide["b"]["kernel"].ravel().tolist() == [1, 1] + [0] * 10
