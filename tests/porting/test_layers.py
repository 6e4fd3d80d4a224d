"""Every kind of layer, ported from torch: both compute the same in float64, and the way back keeps every byte."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import paramend as pm
from support.porting import KEY, compact, random, zeros
from support.slow import slow_except

t = torch.nn
F64 = {"dtype": np.float64, "param_dtype": np.float64}
RNGS = nnx.Rngs(0)
weight_norm = torch.nn.utils.parametrizations.weight_norm


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


class Recurrent(t.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0]


class SelfAttention(t.Module):
    def __init__(self, **given):
        super().__init__()
        self.attn = t.MultiheadAttention(4, 2, batch_first=True, **given)

    def forward(self, x):
        return self.attn(x, x, x)[0]


class Tied(t.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.fc, self.head = t.Embedding(7, 4), t.Linear(4, 4), t.Linear(4, 7, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, x):
        return self.head(self.fc(self.wte(x)))


class Shared(t.Module):
    def __init__(self):
        super().__init__()
        self.first = t.Linear(4, 4)
        self.again = self.first
        self.last = t.Linear(4, 3)

    def forward(self, x):
        return self.last(self.again(torch.tanh(self.first(x))))


def tied(x):
    table = nn.Embed(7, 4, **F64)
    return table.attend(nn.Dense(4, **F64)(table(x)))


def shared(x):
    first = nn.Dense(4, **F64)
    return nn.Dense(3, **F64)(first(nn.tanh(first(x))))


def both_ways(x):
    for _ in range(2):
        x = nn.Bidirectional(nn.RNN(nn.LSTMCell(5, **F64)), nn.RNN(nn.LSTMCell(5, **F64)))(x)
    return x


class NnxRecurrent(nnx.Module):
    def __init__(self, cell):
        self.rnn = nnx.RNN(cell, rngs=RNGS)

    def __call__(self, x):
        return self.rnn(x)


def attended(query, key, value, **_):
    """That of NNX computes in float32."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


class EqxRecurrent(eqx.Module):
    cell: eqx.Module

    def __call__(self, xs):
        def step(state, x):
            new = self.cell(x, state)
            return new, new[0] if isinstance(new, tuple) else new

        state = jnp.zeros(5)
        return jax.lax.scan(step, (state, state) if isinstance(self.cell, eqx.nn.LSTMCell) else state, xs)[1]


class EqxAttention(eqx.Module):
    attn: eqx.Module

    def __call__(self, x):
        return self.attn(x, x, x)


def spread(kernel, padding, more=0):
    """The padding of a transposed convolution in Flax."""
    return [(kernel - 1 - padding, kernel - 1 - padding + more)] * 2


N64 = {"param_dtype": np.float64, "rngs": RNGS}
IMAGE, LINE, TOKENS = (2, 4, 6, 5), (2, 3, 4), None
UP = {"strides": (2, 2), "padding": spread(3, 1)}
BIASED = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
# Each makes a torch module, a JAX module, and the shape of the input as torch takes it.
LAYERS = {
    "linear": lambda: (t.Linear(4, 6), nn.Dense(6, **F64), (2, 4)),
    "linear square": lambda: (t.Linear(4, 4), nn.Dense(4, **F64), (2, 4)),
    "linear without bias": lambda: (t.Linear(4, 4, bias=False), nn.Dense(4, use_bias=False, **F64), (2, 4)),
    "dense general": lambda: (
        t.Sequential(t.Linear(4, 6), t.Unflatten(1, (3, 2))),
        nn.DenseGeneral((3, 2), **F64),
        (2, 4),
    ),
    "conv 1d": lambda: (t.Conv1d(4, 6, 3, padding=1), nn.Conv(6, (3,), **F64), (2, 4, 7)),
    "conv 2d": lambda: (t.Conv2d(4, 4, 3, padding=1), nn.Conv(4, (3, 3), **F64), IMAGE),
    "conv 2d with strides": lambda: (
        t.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2),
        nn.Conv(6, (3, 3), strides=2, kernel_dilation=2, padding=[(1, 1)] * 2, **F64),
        (2, 4, 9, 9),
    ),
    "conv 2d of groups": lambda: (
        t.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.Conv(8, (3, 3), feature_group_count=2, **F64),
        IMAGE,
    ),
    "conv 3d": lambda: (t.Conv3d(2, 3, 2), nn.Conv(3, (2, 2, 2), padding="VALID", **F64), (1, 2, 4, 3, 3)),
    "conv transpose": lambda: (
        t.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose(3, (3, 3), strides=(2, 2), padding=spread(3, 1, 1), **F64),
        IMAGE,
    ),
    "conv transpose (out, in)": lambda: (
        t.ConvTranspose2d(4, 3, 3, stride=2, padding=1),
        nn.ConvTranspose(3, (3, 3), transpose_kernel=True, **UP, **F64),
        IMAGE,
    ),
    "embedding": lambda: (t.Embedding(4, 4), nn.Embed(4, 4, **F64), TOKENS),
    "layer norm": lambda: (t.LayerNorm(4), nn.LayerNorm(epsilon=1e-5, **F64), (3, 4)),
    "rms norm": lambda: (t.RMSNorm(4, eps=1e-6), nn.RMSNorm(**F64), (3, 4)),
    "group norm": lambda: (t.GroupNorm(2, 4), nn.GroupNorm(2, epsilon=1e-5, **F64), IMAGE),
    "batch norm": lambda: (t.BatchNorm2d(4), nn.BatchNorm(use_running_average=True, epsilon=1e-5, **F64), IMAGE),
    "batch norm without parameters": lambda: (
        t.BatchNorm2d(4, affine=False),
        nn.BatchNorm(use_running_average=True, use_scale=False, use_bias=False, epsilon=1e-5, **F64),
        IMAGE,
    ),
    "prelu": lambda: (t.PReLU(), nn.PReLU(param_dtype=np.float64), (3, 4)),
    "attention": lambda: (SelfAttention(), compact(lambda x: nn.MultiHeadDotProductAttention(2, **F64)(x)), LINE),
    "attention without biases": lambda: (
        SelfAttention(bias=False),
        compact(lambda x: nn.MultiHeadDotProductAttention(2, use_bias=False, **F64)(x)),
        LINE,
    ),
    "lstm": lambda: (Recurrent(t.LSTM(4, 5, batch_first=True)), nn.RNN(nn.LSTMCell(5, **F64)), LINE),
    "lstm, both ways, two layers": lambda: (
        Recurrent(t.LSTM(4, 5, 2, bidirectional=True, batch_first=True)),
        compact(both_ways),
        LINE,
    ),
    "gru": lambda: (Recurrent(t.GRU(4, 5, batch_first=True)), nn.RNN(nn.GRUCell(5, **F64)), LINE),
    "rnn": lambda: (
        Recurrent(t.RNN(4, 5, batch_first=True)),
        compact(lambda x: nn.RNN(nn.SimpleCell(5, **F64))(x)),
        LINE,
    ),
    "weight norm": lambda: (
        weight_norm(t.Linear(4, 3)),
        nn.WeightNorm(nn.Dense(3, **F64), epsilon=0, param_dtype=np.float64),
        (2, 4),
    ),
    "weight norm of a convolution": lambda: (
        weight_norm(t.Conv1d(4, 3, 3, padding=1)),
        compact(lambda x: nn.WeightNorm(nn.Conv(3, (3,), **F64), epsilon=0, param_dtype=np.float64)(x)),
        (2, 4, 5),
    ),
    "tied head": lambda: (Tied(), compact(tied), TOKENS),
    "shared layer": lambda: (Shared(), compact(shared), (2, 4)),
    "nnx: linear": lambda: (t.Linear(4, 4), nnx.Linear(4, 4, **N64), (2, 4)),
    "nnx: einsum": lambda: (t.Linear(4, 4), nnx.Einsum("bi,io->bo", (4, 4), (4,), **N64), (2, 4)),
    "nnx: einsum (out, in)": lambda: (t.Linear(4, 4), nnx.Einsum("bi,oi->bo", (4, 4), (4,), **N64), (2, 4)),
    "nnx: conv": lambda: (
        t.Conv2d(4, 6, 3, padding=1, groups=2),
        nnx.Conv(4, 6, (3, 3), feature_group_count=2, **N64),
        IMAGE,
    ),
    "nnx: conv transpose": lambda: (
        t.ConvTranspose2d(4, 4, 3, 2, 1),
        nnx.ConvTranspose(4, 4, (3, 3), **UP, **N64),
        IMAGE,
    ),
    "nnx: conv transpose (out, in)": lambda: (
        t.ConvTranspose2d(4, 4, 3, 2, 1),
        nnx.ConvTranspose(4, 4, (3, 3), transpose_kernel=True, **UP, **N64),
        IMAGE,
    ),
    "nnx: embedding": lambda: (t.Embedding(4, 4), nnx.Embed(4, 4, **N64), TOKENS),
    "nnx: layer norm": lambda: (t.LayerNorm(4), nnx.LayerNorm(4, epsilon=1e-5, **N64), (3, 4)),
    "nnx: group norm": lambda: (t.GroupNorm(2, 4), nnx.GroupNorm(4, num_groups=2, epsilon=1e-5, **N64), IMAGE),
    "nnx: attention": lambda: (
        SelfAttention(),
        nnx.MultiHeadAttention(2, 4, decode=False, attention_fn=attended, **N64),
        LINE,
    ),
    "nnx: lstm": lambda: (Recurrent(t.LSTM(4, 5, batch_first=True)), NnxRecurrent(nnx.LSTMCell(4, 5, **N64)), LINE),
    "nnx: optimised lstm": lambda: (
        Recurrent(t.LSTM(4, 5, batch_first=True)),
        NnxRecurrent(nnx.OptimizedLSTMCell(4, 5, **N64)),
        LINE,
    ),
    "nnx: rnn": lambda: (
        Recurrent(t.RNN(4, 5, batch_first=True)),
        NnxRecurrent(nnx.SimpleCell(4, 5, dtype=np.float64, **N64)),
        LINE,
    ),
    "equinox: linear": lambda: (t.Linear(4, 4), eqx.nn.Linear(4, 4, key=KEY), (2, 4)),
    "equinox: conv": lambda: (
        t.Conv2d(4, 6, 3, padding=1, groups=2),
        eqx.nn.Conv2d(4, 6, 3, padding=1, groups=2, key=KEY),
        IMAGE,
    ),
    "equinox: conv transpose": lambda: (
        t.ConvTranspose2d(4, 4, 3, 2, 1, 1),
        eqx.nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, key=KEY),
        IMAGE,
    ),
    "equinox: layer norm": lambda: (t.LayerNorm(4), eqx.nn.LayerNorm(4), (3, 4)),
    "equinox: group norm": lambda: (t.GroupNorm(2, 4), eqx.nn.GroupNorm(2, 4), IMAGE),
    "equinox: lstm": lambda: (
        Recurrent(t.LSTM(4, 5, batch_first=True)),
        EqxRecurrent(eqx.nn.LSTMCell(4, 5, key=KEY)),
        LINE,
    ),
    "equinox: gru": lambda: (
        Recurrent(t.GRU(4, 5, batch_first=True)),
        EqxRecurrent(eqx.nn.GRUCell(4, 5, key=KEY)),
        LINE,
    ),
    "equinox: attention": lambda: (
        SelfAttention(),
        EqxAttention(eqx.nn.MultiheadAttention(2, 4, key=KEY, **BIASED)),
        LINE,
    ),
}


def inputs(shape):
    rng = np.random.default_rng(0)
    return rng.integers(0, 4, (2, 3)) if shape is TOKENS else rng.normal(size=shape)


COMPILED = [name for name in LAYERS if any(word in name for word in ("lstm", "gru", "rnn"))]  # scans


@pytest.mark.parametrize("name", slow_except({"lstm"} | {*LAYERS} - {*COMPILED}, LAYERS))
def test_a_layer_computes_the_same(name):
    module, other, shape = LAYERS[name]()
    module, x = random(module), inputs(shape)
    channels = shape is not TOKENS and (len(shape) > 3 or "conv" in name) and "equinox" not in name
    y = np.moveaxis(x, 1, -1) if channels else x
    want = module(torch.tensor(x)).detach().numpy()
    want = np.moveaxis(want, 1, -1) if channels else want
    linen = isinstance(other, nn.Module)
    target = jax.tree.map(zeros, jax.eval_shape(other.init, KEY, y)) if linen else other
    ported, report = pm.port(target, module)
    pm.verify(ported, pm.port(target, module.state_dict())[0])

    if linen:
        got = other.apply(ported, y)
    else:
        got = jax.vmap(ported)(y) if isinstance(ported, eqx.Module) else ported(jnp.asarray(y))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)
    assert not [row for row in report.fresh if "rngs" not in row.path]

    state = {path: value.numpy() for path, value in module.state_dict().items() if "num_batches" not in path}
    back = pm.port(module, ported)[0].state_dict()
    summed = {path for path in state if "bias_ih" in path or "bias_hh" in path}
    assert summed == {path for path, value in state.items() if back[path].numpy().tobytes() != value.tobytes()}
    if linen:
        again, _ = report.layout.back(ported)
        assert again.keys() == state.keys()
        assert all(np.asarray(again[path]).tobytes() == state[path].tobytes() for path in state.keys() - summed)
