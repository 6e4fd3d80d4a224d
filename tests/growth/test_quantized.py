"""Identity layers of quantised weights are refused before anything changes; copies are bytes."""

import numpy as np
import pytest
import torch

import paramend as pm
from paramend.errors import Quantized


def layer():
    return {"down_proj": {"qweight": np.ones((1, 8), "int32"), "scales": np.ones((1, 8), "float16")}}


def test_an_identity_of_codes_is_refused_and_copies_are_made():
    tree = {"layers": [layer(), layer()]}
    order = pm.depth.blocks(2, count=1)
    for identity in ("down_proj/*", "down_proj/scales", ["down_proj/qweight"]):
        with pytest.raises(Quantized, match="set in an identity layer") as caught:
            pm.deepen(tree, layers="layers[*]", order=order, identity=identity)
        assert "identity=None copies layers as they are" in caught.value.hint
    assert len(pm.deepen(tree, layers="layers[*]", order=order, identity=None)[0]["layers"]) == 3


def test_a_quantised_layer_of_a_known_family_is_told_as_such():
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    tree = {f"model.layers.{n}.{name}.qweight": np.ones((1, 8), "int32") for n in range(2) for name in names}
    tree |= {name.replace("qweight", "scales"): np.ones((1, 8), "float16") for name in tree}
    tree |= {
        f"model.layers.{n}.{norm}_layernorm.weight": np.ones(8)
        for n in range(2)
        for norm in ("input", "post_attention")
    }
    with pytest.raises(Quantized, match="set in an identity layer"):
        pm.deepen(tree, order=pm.depth.blocks(2, count=1))
    assert len(pm.deepen(tree, order=[0, 0, 1])[0]) == 3 * 16


def test_in_place_a_model_stays_as_it_is():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.ones(1, 8, dtype=torch.int32))
            self.register_buffer("scales", torch.ones(1, 8))

    model = torch.nn.Sequential(Layer(), Layer())
    with pytest.raises(Quantized):
        pm.deepen_(model, layers="[*]", order=pm.depth.blocks(2, count=1), identity="scales")
    assert len(model) == 2


def test_other_leaves_of_a_quantised_layer_make_it_the_identity():
    tree = {"layers": [{**layer(), "gate": np.ones(1)}, {**layer(), "gate": np.ones(1)}]}
    made, _ = pm.deepen(tree, layers="layers[*]", order=pm.depth.blocks(2, count=1), identity="gate")
    assert sorted(float(each["gate"][0]) for each in made["layers"]) == [0, 1, 1]
