"""`narrow` keeps the same places of an axis in every leaf that has it, and leaves are equal to the bit."""

import numpy as np
import pytest
import torch

import paramend as pm
from paramend.errors import BadArgument, SpecMismatch
from paramend.porting.float64_torch import float64
from support.slow import slow_except
from support.tiny_models import kind, logits, make

# What a layer of each family writes from its hidden units and from its heads, and the axis by which it reads them.
READERS = {
    "llama": ("mlp.down_proj", "self_attn.o_proj", 1),
    "qwen3": ("mlp.down_proj", "self_attn.o_proj", 1),
    "phi": ("mlp.fc2", "self_attn.dense", 1),
    "phi3": ("mlp.down_proj", "self_attn.o_proj", 1),
    "gpt2": ("mlp.c_proj", "attn.c_proj", 0),
    "mixtral": ("mlp.experts.down_proj", "self_attn.o_proj", -1),
    "vit": ("mlp.fc2", "attention.o_proj", 1),
}


def silenced(model, module, axis, places):
    """The model with weights of zero where a layer reads some places."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith((module, f"{module}.weight")):
                weight.index_fill_(axis % weight.ndim, torch.tensor(places), 0.0)
    return model


@pytest.mark.numeric
@pytest.mark.parametrize("family", slow_except({"llama", "gpt2"}, READERS))
@torch.no_grad()
def test_a_model_without_units_is_the_one_where_they_are_not_read(family, tmp_path):
    changes = {"attn_implementation": "eager", "num_hidden_layers": 2}
    model = make(family, torch.float64, **(changes if family != "gpt2" else {"attn_implementation": "eager"}))
    model.config._experts_implementation = "eager"
    mlp, heads, axis = READERS[family]
    size = 128 if family == "gpt2" else 64
    kept = np.random.default_rng(0).permutation(size)[: size // 2].tolist()
    asked = {"mlp": kept}
    if family != "gpt2":
        asked["kv_heads" if family not in ("phi", "vit") else "heads"] = [1]
    small, report = pm.narrow(model, asked)
    silenced(model, mlp, axis, [place for place in range(size) if place not in kept])
    if family != "gpt2":
        width = 16 if "kv_heads" in asked else 8
        silenced(model, heads, axis, [place for place in range(32) if place // width != 1])
    small.save_pretrained(tmp_path)
    again = kind(family).from_pretrained(tmp_path).eval()
    again.config._attn_implementation = again.config._experts_implementation = "eager"
    with float64():
        before = logits(model, family)
        assert (logits(small, family) - before).abs().max() <= 1e-11
        if "vit" not in family:
            assert (logits(again, family) - before).abs().max() <= 1e-11
    assert report.kept["mlp"][0] == kept


def test_places_stay_to_the_bit_and_in_their_order():
    model = make("llama", torch.bfloat16)
    small, report = pm.narrow(model, {"hidden": [5, 3, 30], "vocabulary": list(range(60)), "layers": [2, 0]})
    assert torch.equal(
        small.model.layers[0].self_attn.q_proj.weight, model.model.layers[2].self_attn.q_proj.weight[:, [5, 3, 30]]
    )
    assert torch.equal(small.model.embed_tokens.weight, model.model.embed_tokens.weight[:60, [5, 3, 30]])
    assert small.lm_head.weight.shape == (60, 3)
    assert (small.config.hidden_size, small.config.head_dim, small.config.vocab_size) == (3, 8, 60)
    assert (small.config.num_hidden_layers, len(small.model.layers)) == (2, 2)
    assert report.sizes == {"hidden": (32, 3), "vocabulary": (64, 60), "layers": (3, 2)}
    same, report = pm.narrow(model, {"mlp": 64})
    assert same.model.layers[0].mlp.up_proj.weight.equal(model.model.layers[0].mlp.up_proj.weight)


def test_norms_and_scores_choose_layer_by_layer():
    model = make("llama")
    with torch.no_grad():
        for n, layer in enumerate(model.model.layers):
            layer.mlp.up_proj.weight[10 * n : 10 * n + 4] *= 100
            layer.self_attn.v_proj.weight[8 * (n % 2) : 8 * (n % 2) + 8] *= 100
    _, report = pm.narrow(model, {"mlp": np.int64(4), "heads": 2})
    assert report.kept["mlp"] == [[10 * n + i for i in range(4)] for n in range(3)]
    assert report.kept["kv_heads"] == [[0], [1], [0]]
    assert report.kept["heads"] == [[0, 1], [2, 3], [0, 1]]
    scores = np.zeros((3, 64))
    scores[[0, 1, 2], [7, 8, 9]] = 1
    small, report = pm.narrow(model, {"mlp": 1}, by={"mlp": scores})
    assert report.kept["mlp"] == [[7], [8], [9]]
    assert torch.equal(small.model.layers[1].mlp.gate_proj.weight, model.model.layers[1].mlp.gate_proj.weight[[8]])
    _, report = pm.narrow(model, {"heads": 2, "hidden": 2}, by={"heads": torch.eye(4)[3], "hidden": np.arange(32)})
    assert (report.kept["heads"], report.kept["hidden"]) == ([[2, 3]] * 3, [[30, 31]])
    _, report = pm.narrow(model, {"layers": 2}, by={"layers": [1, 0, 2]})
    assert report.kept["layers"] == [[0, 2]]


@pytest.mark.parametrize(
    ("keep", "error", "says"),
    [
        ({"heads": 3}, BadArgument, "not whole groups of 2"),
        ({"heads": [0, 1, 2]}, BadArgument, "break groups"),
        ({"heads": [1, 0]}, BadArgument, "break groups"),
        ({"heads": 2, "kv_heads": 1}, BadArgument, "with their groups"),
        ({"mlp": 65}, BadArgument, "cannot stay"),
        ({"mlp": [1, 1]}, BadArgument, "twice"),
        ({"mlp": [64]}, BadArgument, "not one of 64"),
        ({"mlp": []}, BadArgument, "neither a number nor"),
        ({"mlp": [[1], [2]]}, SpecMismatch, "2 lists of places"),
        ({"expert_mlp": 1}, BadArgument, "no such axis"),
        ({}, BadArgument, "takes axes"),
    ],
    ids=str,
)
def test_what_cannot_stay_is_refused(keep, error, says):
    with pytest.raises(error, match=says):
        pm.narrow(make("llama"), keep)
