"""What is frozen and what trains, counted."""

import json

import jax.numpy as jnp
import optax
import pytest
from torch import nn
from torch.optim import SGD, AdamW

from paramend.errors import NoMatch, Unsupported
from paramend.freezing.freeze import freeze, freeze_, frozen
from paramend.selectors.selector import sel

PARAMS = {f"layers_{i}": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)} for i in range(12)}


def test_leaves_of_every_status():
    tx = freeze(optax.adam(0.1), "layers_[:3]/**", until={"layers_1/**": 100, sel("layers_2/kernel")[:2]: 5})
    report = frozen(PARAMS, tx)
    assert [row.path for row in report.frozen] == ["layers_0/bias", "layers_0/kernel", "layers_2/bias"]
    assert [row.path for row in report.of("scheduled")] == ["layers_1/bias", "layers_1/kernel"]
    assert [row.path for row in report.of("partly")] == ["layers_2/kernel"]
    assert len(report.trained) == 18
    assert len(report.rows) == 24
    moments = 2 * 4 * (9 * 20 + 20 + 16)
    assert report.state_nbytes == moments + 2 * 4  # and two counts: of Adam, and the step


def test_printed_and_as_data():
    report = frozen(PARAMS, freeze(optax.sgd(0.1), "layers_[:-1]/**"))
    text = str(report)
    assert text.startswith("trained: 20 scalars in 2, frozen: 220 scalars in 22 of 24 leaves; optimizer state: 0 B")
    assert "layers_{0..10}/kernel  11 × float32[4,4]" in text
    data = json.loads(json.dumps(report.to_dict()))
    assert data["state_nbytes"] == 0
    assert {"path": "layers_0/bias", "shape": [4], "dtype": "float32", "status": "frozen"} in data["leaves"]


def test_torch_modules():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert frozen(model).state_nbytes is None
    freeze_(model, "0.*")
    report = frozen(model)
    assert [row.path for row in report.frozen] == ["0.weight", "0.bias"]
    assert [row.path for row in report.trained] == ["1.weight", "1.bias"]
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    model[1].weight.sum().backward()
    optimizer.step()
    assert frozen(model, optimizer).state_nbytes == 4 * 8
    freeze_(model, sel("1.weight")[:1], optimizer=optimizer)
    assert [row.path for row in frozen(model, optimizer).of("partly")] == ["1.weight"]
    assert frozen(model, AdamW(model.parameters())).state_nbytes == 0


def test_only_freeze_knows():
    for tx in (None, optax.adam(0.1)):
        with pytest.raises(Unsupported) as caught:
            frozen(PARAMS, tx)

    class Pm:  # what hints call `pm`
        freeze, frozen = staticmethod(freeze), staticmethod(frozen)

    params = {"x": {"Dense_0": {"w": jnp.ones(1)}}}
    assert eval(caught.value.hint, {"pm": Pm, "optax": optax, "params": params}).frozen
    with pytest.raises(NoMatch):
        frozen(PARAMS, freeze(optax.adam(0.1), "nothing/**"))
