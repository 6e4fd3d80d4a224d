"""A checkpoint is read like a dict, and knows of heads that are tied and not stored."""

import json

import numpy as np
import pytest

import paramend as pm
from paramend.errors import NoMatch

NAMES = [f"model.layers.{n}.{part}.weight" for n in range(4) for part in ("mlp", "self_attn", "input_norm")]
NAMES += ["model.embed_tokens.weight", "model.norm.weight"]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    pm.save({name: np.full((2, 2), n, "f4") for n, name in enumerate(NAMES)}, path / "model.safetensors")
    return path


def test_a_checkpoint_is_read_like_a_dict(folder):
    checkpoint = pm.open(folder)
    stored = pm.load(folder, nested=False)
    assert list(checkpoint) == checkpoint.paths == checkpoint.keys() == list(stored)
    assert len(checkpoint) == len(stored)
    assert "model.norm.weight" in checkpoint and "model/norm/weight" in checkpoint
    for absent in ("model.norm", "**", "model.norm.*", "lm_head.weight", "", 3, None):
        assert absent not in checkpoint
    for pairs in (dict(checkpoint), dict(checkpoint.items()), dict(zip(checkpoint, checkpoint.values(), strict=True))):
        assert {name: leaf.tolist() for name, leaf in pairs.items()} == {k: v.tolist() for k, v in stored.items()}
    edited = pm.at(pm.at(checkpoint, "model.norm.weight").delete(), "**.mlp.weight").zero()
    assert "model.norm.weight" not in edited and len(list(edited)) == len(stored) - 1
    assert not dict(edited.items())["model.layers.1.mlp.weight"].any()


@pytest.mark.parametrize("form", ["npz", "pt", "msgpack", "orbax"])
def test_every_format_is(form, tmp_path):
    pm.save({"a": {"b": np.ones(2)}, "c": np.zeros(1)}, tmp_path / f"m.{form}")
    checkpoint = pm.open(tmp_path / f"m.{form}")
    assert sorted(checkpoint) == sorted(pm.at(checkpoint, "**").paths)
    assert "a/b" in checkpoint and "a.b" in checkpoint and "a" not in checkpoint
    assert {path.replace(".", "/"): leaf.tolist() for path, leaf in checkpoint.items()} == {"a/b": [1, 1], "c": [0]}


def test_dir_shows_what_users_call(folder):
    shown = {name for name in dir(pm.open(folder)) if not name.startswith("_")}
    assert {"keys", "items", "paths", "save", "close", "plan", "metadata"} <= shown
    assert not shown & {"edited", "edited_", "twins", "ties", "fetch", "labelled", "moved", "index", "children"}


TIED = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}
WHY = {
    "the lm_head is tied to model.embed_tokens.weight (tie_word_embeddings in config.json)": [
        TIED,
        {"text_config": {"tie_word_embeddings": True}},
    ],
    "the lm_head is not stored, as in gemma models that tie it to model.embed_tokens.weight": [
        {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]},
    ],
    "the lm_head is not stored, as in models that tie it to model.embed_tokens.weight": [None, [1], {}],
    "": [{**TIED, "tie_word_embeddings": False}, {"model_type": "llama", "architectures": ["LlamaModel"]}],
}


@pytest.mark.parametrize(
    "selector", ["lm_head.weight", "lm_head.*", "lm_head.**", "**.lm_head.weight", "lm_head/weight"]
)
@pytest.mark.parametrize("why", WHY, ids=["tied", "family", "unknown", "not tied"])
def test_a_head_that_is_not_stored_is_no_reason_to_offer_all_weights(folder, why, selector):
    for config in WHY[why]:
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        for path in (folder, folder / "model.safetensors"):
            with pytest.raises(NoMatch) as caught:
                pm.at(pm.open(path), selector).zero()
            assert why in str(caught.value)
            assert "**.weight" not in str(caught.value)
            if why:
                assert caught.value.near == ("model.embed_tokens.weight",)
                assert '"model.embed_tokens.weight" is the weight of both' in caught.value.hint
            assert all(len(pm.at(pm.open(path), near)) == 1 for near in caught.value.near)


def test_a_head_that_was_deleted_is_not_called_tied(folder):
    pm.save({"lm_head.weight": np.ones(1), "embed_tokens.weight": np.ones(1)}, folder / "whole.safetensors")
    edited = pm.at(pm.open(folder / "whole.safetensors"), "lm_head.weight").delete()
    with pytest.raises(NoMatch) as caught:
        pm.at(edited, "lm_head.weight")
    assert "tie" not in str(caught.value)


@pytest.mark.parametrize(
    ("head", "embedding"),
    [
        ("lm_head.weight", "transformer.wte.weight"),
        ("proj_out.weight", "model.decoder.embed_tokens.weight"),
        ("output_projection.weight", "biogpt.embed_tokens.weight"),
        ("decoder.weight", "model.embeddings.tok_embeddings.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("lm_head/kernel", "model/embed_tokens/embedding"),
    ],
)
def test_heads_of_other_families(tmp_path, head, embedding):
    pm.save({embedding: np.ones(1), "x.weight": np.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    with pytest.raises(NoMatch, match="is tied to") as caught:
        pm.at(pm.open(tmp_path / "model.safetensors"), head)
    assert caught.value.near == (pm.at(pm.open(tmp_path / "model.safetensors"), embedding).paths[0],)


def test_rows_and_calls_print_in_a_line(folder):
    edited = pm.at(pm.at(pm.open(folder), "**.mlp.weight").set(np.ones((2, 2), "f4")), "**.norm.weight").apply(abs)
    assert repr(edited.plan) == "<plan: 5 of 14 leaves change>"
    assert all(len(repr(row)) < 120 and "lambda" not in repr(row) for row in edited.plan.rows)
    assert repr(edited.plan.changed[0]) == "<model.layers.0.mlp.weight: float32[2,2], set(float32[2,2])>"
    assert repr(edited.plan.changed[0].calls) == "(<call set(float32[2,2])>,)"
