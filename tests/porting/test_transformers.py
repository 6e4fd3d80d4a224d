"""Models of transformers, tiny and random, and small models in linen that compute the same, ported there and back."""

import jax
import numpy as np
import pytest
import torch
import transformers

import paramend as pm
from support import flax_models
from support.porting import KEY, random, zeros
from support.tiny_models import make

pytestmark = pytest.mark.slow
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 6))
IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}
BERT["max_position_embeddings"] = 64


class Answer(torch.nn.Module):
    """A model that returns one of its outputs."""

    def __init__(self, model, name):
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x):
        return getattr(self.model(x), self.name)


def bert():
    return transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False)


# model of transformers, the output, linen module, input
MODELS = {
    "gpt2": (lambda: make("gpt2"), "logits", flax_models.Gpt2(), TOKENS),
    "llama": (
        lambda: make("llama", attention_bias=False, mlp_bias=False, rms_norm_eps=1e-6),
        "logits",
        flax_models.Llama(),
        TOKENS,
    ),
    "bert": (bert, "last_hidden_state", flax_models.Bert(), TOKENS),
    "vit": (lambda: make("vit", num_hidden_layers=2), "logits", flax_models.Vit(), IMAGES),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_is_proven_and_comes_back(name):
    make_model, output, linen, x = MODELS[name]
    source = Answer(random(make_model()), output)
    source.model.set_attn_implementation("eager")
    inputs = {"target": (x,), "source": (x.transpose(0, 3, 1, 2) if x.ndim == 4 else x,)}
    with jax.enable_x64(True):
        variables = jax.tree.map(zeros, jax.eval_shape(linen.init, KEY, x))
        bound, report = pm.port(linen.bind(variables), source, prove=inputs)
        again, back = pm.port(source, bound, prove={"target": inputs["source"], "source": inputs["target"]})
    assert report.proof.outputs[0].relative <= 1e-11
    assert not report.fresh and not report.unused and not report.unproven
    assert not [row for row in back.copied if "cast" in row.did]
    state, new = source.state_dict(), again.state_dict()
    assert all(new[path].numpy().tobytes() == value.numpy().tobytes() for path, value in state.items())
    returned, _ = report.layout.back(bound.variables)
    assert returned.keys() == state.keys()
