"""`init_zero_`: every weight and bias of a torch layer becomes +0.0, and nothing else about it changes."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn.utils import parametrizations, prune

from paramend.errors import Unsupported
from paramend.growth.zeroing import init_zero_

LAYERS = {
    "Linear": nn.Linear(3, 4),
    "no bias": nn.Linear(3, 4, bias=False),
    "Conv2d": nn.Conv2d(2, 3, 2, padding=1),
    "ConvTranspose1d": nn.ConvTranspose1d(2, 3, 2),
    "Bilinear": nn.Bilinear(2, 3, 4),
    "Embedding": nn.Embedding(5, 3, padding_idx=0),
    "EmbeddingBag": nn.EmbeddingBag(5, 3),
    "LayerNorm": nn.LayerNorm(4),
    "no affine": nn.LayerNorm(4, elementwise_affine=False),
    "RMSNorm": nn.RMSNorm(4),
    "GroupNorm": nn.GroupNorm(2, 4),
    "BatchNorm1d": nn.BatchNorm1d(3),
    "MultiheadAttention": nn.MultiheadAttention(4, 2),
    "LSTM": nn.LSTM(2, 3, num_layers=2, bidirectional=True),
    "GRUCell": nn.GRUCell(2, 3),
    "PReLU": nn.PReLU(),
    "TransformerEncoderLayer": nn.TransformerEncoderLayer(4, 2, 8),
    "Sequential": nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)),
    "ReLU": nn.ReLU(),
    "Dropout": nn.Dropout(),
    "Identity": nn.Identity(),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_all_parameters_become_plus_zero(name, dtype):
    layer = copy.deepcopy(LAYERS[name]).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(layer.parameters()):
            p.copy_(torch.full_like(p, [-1.0, float("nan"), float("-inf")][i % 3]))
    specs = [(id(p), p.dtype, p.device, p.shape, p.stride(), p.requires_grad) for p in layer.parameters()]
    assert init_zero_(layer) is layer
    assert [(id(p), p.dtype, p.device, p.shape, p.stride(), p.requires_grad) for p in layer.parameters()] == specs
    for p in layer.parameters():
        assert not p.detach().view(torch.uint8).any()  # every byte


def test_layer_by_layer_over_a_sequential():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(3, 1))
    for layer in model:
        init_zero_(layer)
    assert model(torch.randn(4, 2)).tolist() == [[0.0]] * 4


def test_one_layer_of_a_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = model[0].weight.detach().clone()
    init_zero_(model[1])
    assert torch.equal(model[0].weight, before)
    assert not model[1].weight.any()


def test_buffers_stay():
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(5, 3))
    before = [b.clone() for b in norm.buffers()]
    init_zero_(norm)
    assert all(map(torch.equal, norm.buffers(), before))


def test_frozen_layers_stay_frozen_and_trained_ones_train_on():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    init_zero_(model)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.is_leaf for p in model.parameters())
    (model(torch.ones(1, 2)) - 1).pow(2).sum().backward()
    optimizer.step()
    assert model[1].bias.item() != 0


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3, bias=False))
    model[1].weight = model[0].weight
    init_zero_(model[1])
    assert model[1].weight is model[0].weight
    assert not model[0].weight.any()


def test_memory_format_and_views_stay():
    layer = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    view = layer.weight.detach()[0]
    init_zero_(layer)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert not view.any()


def test_autograd_notices():
    layer = nn.Linear(2, 2)
    y = layer(layer(torch.ones(1, 2)))
    init_zero_(layer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_grad_mode_and_under_inference_mode():
    layer = nn.Linear(2, 2)
    with torch.inference_mode():
        init_zero_(layer)
    assert not layer.weight.any()


# ---- refusals --------------------------------------------------------------------------------------------------


def spectral(layer):
    return nn.utils.spectral_norm(layer)


def old_weight_norm(layer):
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


COMPUTED = {
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral norm": parametrizations.spectral_norm,
    "old weight norm": old_weight_norm,
    "old spectral norm": spectral,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", COMPUTED)
def test_computed_weights_are_refused_with_a_way_out(kind, inside):
    inner = COMPUTED[kind](nn.Linear(3, 3))
    layer = nn.Sequential(nn.Linear(3, 3), inner) if inside else inner
    before = [p.detach().clone() for p in layer.parameters()]
    with pytest.raises(Unsupported, match=r"weight of .*Linear") as caught:
        init_zero_(layer)
    assert all(map(torch.equal, layer.parameters(), before))  # refused before anything was done
    assert caught.value.hint.startswith("first ")
    exec(caught.value.hint.removeprefix("first "), {"torch": torch, "layer": layer})
    init_zero_(layer)
    assert not any(p.any() for p in layer.parameters())
    assert not layer(torch.ones(1, 3)).any()


def test_layers_without_values_are_refused():
    with pytest.raises(Unsupported, match=r"weight cannot become zero: .*meta device") as caught:
        init_zero_(nn.Linear(2, 2, device="meta"))
    assert 'layer.to_empty(device="cpu")' in caught.value.hint
    init_zero_(nn.Linear(2, 2, device="meta").to_empty(device="cpu"))
    with pytest.raises(Unsupported, match="no shape yet"):
        init_zero_(nn.LazyLinear(2))
    lazy = nn.LazyLinear(2)
    lazy(torch.ones(1, 3))
    init_zero_(lazy)


@pytest.mark.parametrize("wrong", [torch.ones(2), nn.Parameter(torch.ones(2))])
def test_a_tensor_is_no_layer(wrong):
    with pytest.raises(Unsupported, match=r"an nn.Module") as caught:
        init_zero_(wrong)
    eval(caught.value.hint, {"torch": torch, "tensor": wrong})
    assert not wrong.any()


@pytest.mark.parametrize(
    "wrong", [{"kernel": jnp.ones(2)}, nnx.Linear(2, 2, rngs=nnx.Rngs(0)), np.ones(2), None, nn.Linear, "fc"]
)
def test_what_is_no_layer(wrong):
    with pytest.raises(Unsupported, match=r"an nn.Module") as caught:
        init_zero_(wrong)
    assert 'pm.at(params, "**/Dense_0/**").zero()' in caught.value.hint
