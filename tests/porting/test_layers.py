"""Every kind of layer, ported between torch and linen: both compute the same in float64, and the way back keeps every byte."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import paramend as pm

t = torch.nn
F64 = {"dtype": np.float64, "param_dtype": np.float64}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random(module, seed=0):
    """A torch module whose parameters and statistics are random, in evaluation mode."""
    torch.manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_() if "var" not in name else tensor.uniform_(0.5, 2)
    return module.eval()


def last(x):
    """Channels last."""
    return np.moveaxis(x, 1, -1)


def conv_padding(dilation, kernel, padding, output_padding=0):
    low = dilation * (kernel - 1) - padding
    return [(low, low + output_padding)] * 2


IMAGE = (2, 4, 6, 5)
# torch module, linen module, shape of the input as torch takes it, whether it has channels
LAYERS = {
    "linear": (t.Linear(4, 6), nn.Dense(6, **F64), (2, 4)),
    "linear-square": (t.Linear(4, 4), nn.Dense(4, **F64), (2, 4)),
    "linear-no-bias": (t.Linear(4, 4, bias=False), nn.Dense(4, use_bias=False, **F64), (2, 4)),
    "dense-general": (t.Sequential(t.Linear(4, 6), t.Unflatten(1, (3, 2))), nn.DenseGeneral((3, 2), **F64), (2, 4)),
    "conv1d": (t.Conv1d(4, 6, 3, padding=1), nn.Conv(6, (3,), **F64), (2, 4, 7)),
    "conv2d": (t.Conv2d(4, 4, 3, padding=1), nn.Conv(4, (3, 3), **F64), IMAGE),
    "conv2d-stride": (
        t.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2),
        nn.Conv(6, (3, 3), strides=2, kernel_dilation=2, padding=[(1, 1)] * 2, **F64),
        (2, 4, 9, 9),
    ),
    "conv2d-groups": (t.Conv2d(4, 8, 3, padding=1, groups=2), nn.Conv(8, (3, 3), feature_group_count=2, **F64), IMAGE),
    "conv3d": (t.Conv3d(2, 3, 2), nn.Conv(3, (2, 2, 2), padding="VALID", **F64), (1, 2, 4, 3, 3)),
    "conv-transpose": (
        t.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose(3, (3, 3), strides=(2, 2), padding=conv_padding(1, 3, 1, 1), **F64),
        IMAGE,
    ),
    "conv-transpose-out-in": (
        t.ConvTranspose2d(4, 3, 3, stride=2, padding=1),
        nn.ConvTranspose(3, (3, 3), strides=(2, 2), padding=conv_padding(1, 3, 1), transpose_kernel=True, **F64),
        IMAGE,
    ),
    "embedding": (t.Embedding(5, 4), nn.Embed(5, 4, **F64), None),
    "embedding-square": (t.Embedding(4, 4), nn.Embed(4, 4, **F64), None),
    "layer-norm": (t.LayerNorm(4), nn.LayerNorm(epsilon=1e-5, **F64), (3, 4)),
    "rms-norm": (t.RMSNorm(4, eps=1e-6), nn.RMSNorm(**F64), (3, 4)),
    "group-norm": (t.GroupNorm(2, 4), nn.GroupNorm(2, epsilon=1e-5, **F64), IMAGE),
    "batch-norm": (t.BatchNorm2d(4), nn.BatchNorm(use_running_average=True, epsilon=1e-5, **F64), IMAGE),
    "batch-norm-plain": (
        t.BatchNorm2d(4, affine=False),
        nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False, epsilon=1e-5, **F64),
        IMAGE,
    ),
    "prelu": (t.PReLU(), nn.PReLU(param_dtype=np.float64), (3, 4)),
}


def inputs(shape):
    rng = np.random.default_rng(0)
    return rng.integers(0, 4, (2, 3)) if shape is None else rng.normal(size=shape)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_the_same(name):
    module, linen, shape = LAYERS[name]
    module, x = random(module), inputs(shape)
    y = last(x) if x.ndim > 2 and shape else x
    variables = jax.tree.map(lambda leaf: leaf.astype(float), linen.init(jax.random.key(0), jnp.asarray(y)))
    want = module(torch.tensor(x)).detach().numpy()
    want = last(want) if x.ndim > 2 and shape else want

    for source in (module, module.state_dict()):
        ported, report = pm.port(variables, source)
        np.testing.assert_allclose(linen.apply(ported, y), want, rtol=0, atol=1e-11)
        assert not report.fresh
    again, _ = report.layout.back(ported)
    state = {name: value for name, value in module.state_dict().items() if "num_batches" not in name}
    assert again.keys() == state.keys()
    assert all(np.asarray(again[name]).tobytes() == state[name].numpy().tobytes() for name in state)
