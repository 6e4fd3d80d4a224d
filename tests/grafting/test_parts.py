"""Leaves taken out as a model of their own: their bytes, their names, and the configuration of the part."""

import json

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from flax import nnx
from safetensors.numpy import load_file, save_file

import paramend as pm
from paramend.cli.main import cli

CONFIG = """{
  "architectures": ["LlavaForConditionalGeneration"],
  "dtype": "bfloat16",
  "model_type": "llava",
  "text_config": {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "rms_norm_eps": 1E-6,
    "torch_dtype": "float32"
  },
  "tie_word_embeddings": false,
  "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 2}
}
"""
TEXT = {
    "language_model.model.embed_tokens.weight": (5, 3),
    "language_model.model.layers.0.w": (3, 3),
    "language_model.model.norm.weight": (3,),
}
HEAD = {"language_model.lm_head.weight": (5, 3)}
REST = {"vision_tower.encoder.layers.0.w": (2,), "vision_tower.encoder.layers.1.w": (2,), "connector.w": (2, 3)}


def make(folder, shards, config=CONFIG):
    """A model in shards with random bytes, beside a configuration and a tokenizer."""
    folder.mkdir()
    chance, table, found = np.random.default_rng(0), {}, {}
    for n, shapes in enumerate(shards, 1):
        leaves = {name: chance.integers(0, 9, shape, "i2").view("f2") for name, shape in shapes.items()}
        file = f"model-{n:05}-of-{len(shards):05}.safetensors"
        save_file(leaves, folder / file)
        table |= dict.fromkeys(leaves, file)
        found |= leaves
    index = {"metadata": {"total_size": sum(leaf.nbytes for leaf in found.values())}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").write_text("{}")
    return found


def written(folder):
    """The leaves of a checkpoint, read by the reference reader, after a look at its index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {name: leaf for file in folder.glob("*.safetensors") for name, leaf in load_file(file).items()}
    assert found.keys() == index["weight_map"].keys()
    assert {file.name for file in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in found.values())
    return {name: leaf.tobytes() for name, leaf in found.items()}


def test_the_text_model_with_its_configuration(tmp_path):
    leaves = make(tmp_path / "hf", [TEXT | REST, HEAD])
    with pm.open(tmp_path / "hf") as model:
        report = pm.part(model, "language_model.**", rename={"language_model.**": "**"})[0].save(tmp_path / "out")
    right = {name.removeprefix("language_model."): leaf for name, leaf in leaves.items() if name in TEXT | HEAD}
    assert written(tmp_path / "out") == {name: leaf.tobytes() for name, leaf in right.items()}
    assert (tmp_path / "out" / "config.json").read_text() == (
        '{\n  "model_type": "llama",\n  "num_hidden_layers": 1,\n  "rms_norm_eps": 1E-6,\n'
        '  "architectures": [\n    "LlamaForCausalLM"\n  ],\n  "dtype": "bfloat16",\n'
        '  "tie_word_embeddings": false\n}\n'
    )
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert report.said == ("config.json: text_config becomes the configuration, of a LlamaForCausalLM",)
    assert (report.bytes_computed, pm.load(tmp_path / "out", nested=False).keys()) == (0, right.keys())


def test_shards_that_stay_whole_are_linked(tmp_path):
    make(tmp_path / "hf", [TEXT, HEAD | REST])
    words = ["part", str(tmp_path / "hf"), "language_model.**", "--link", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0 and "7 leaves before, 4 after" in done.output
    name = "model-00001-of-00002.safetensors"
    assert (tmp_path / "out" / name).samefile(tmp_path / "hf" / name)
    assert written(tmp_path / "out").keys() == {*TEXT, *HEAD}
    # The names are not those of the class, which is said.
    assert "--rename 'language_model.model.**=model.**' --rename 'language_model.lm_head.**=lm_head.**'" in (
        " ".join(done.output.split())
    )


@pytest.mark.parametrize(
    ("selector", "config", "classes", "tied", "says"),
    [
        ("language_model.model.**", {}, ["LlamaModel"], False, "its head, language_model.lm_head.weight, is not taken"),
        ("language_model.**", {"tie_word_embeddings": True}, ["LlamaForCausalLM"], True, "of a LlamaForCausalLM"),
        ("language_model.**", {"tie_word_embeddings": None}, ["LlamaForCausalLM"], False, "of a LlamaForCausalLM"),
        ("language_model.**", {"text_config": {"model_type": "odd"}}, None, False, "no class is known"),
        (
            "language_model.**",
            {"text_config": {"model_type": "qwen2_vl_text"}},
            ["Qwen2VLTextModel"],
            False,
            "no class of qwen2_vl_text with a head",
        ),
        (
            "language_model.**",
            {"text_config": {"model_type": "odd", "architectures": ["OddForCausalLM"]}},
            ["OddForCausalLM"],
            False,
            "of a OddForCausalLM",
        ),
        ("vision_tower.**", {}, ["CLIPVisionModel"], None, "vision_config becomes"),
        ("**.layers.0.**", {}, ["LlavaForConditionalGeneration"], False, "stays that of the whole model"),
    ],
)
def test_what_is_derived_and_what_is_said(tmp_path, selector, config, classes, tied, says):
    data = json.loads(CONFIG)
    data["text_config"] |= config.pop("text_config", {})
    data = {key: value for key, value in (data | config).items() if value is not None}
    make(tmp_path / "hf", [TEXT | HEAD | REST], json.dumps(data))
    with pm.open(tmp_path / "hf") as model:
        report = pm.part(model, selector)[0].save(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (found.get("architectures"), found.get("tie_word_embeddings")) == (classes, tied)
    assert any(says in line for line in report.said), report.said
    assert found["dtype"] == "bfloat16" and "torch_dtype" not in found


def test_a_single_file_has_no_configuration_and_says_so(tmp_path):
    make(tmp_path / "hf", [TEXT | HEAD | REST])
    with pm.open(tmp_path / "hf") as model:
        report = pm.part(model, "language_model.**")[0].save(tmp_path / "out.safetensors")
    assert report.said[-1] == "config.json changes, and is not written beside a single file"
    assert load_file(tmp_path / "out.safetensors").keys() == (TEXT | HEAD).keys()


@pytest.mark.parametrize("inner", [True, False])
def test_a_head_that_is_not_stored_is_tied(tmp_path, inner):
    """Where the two configurations differ, what is stored decides."""
    data = json.loads(CONFIG)
    data["text_config"]["tie_word_embeddings"] = inner
    data |= {"quantization_config": {"quant_method": "x"}, "eos_token_id": 2}
    make(tmp_path / "hf", [TEXT | REST], json.dumps(data))
    with pm.open(tmp_path / "hf") as model:
        found = pm.config(pm.part(model, "language_model.**")[0])
        assert found["tie_word_embeddings"] == inner
        assert found["architectures"] == ["LlamaForCausalLM" if inner else "LlamaModel"]
        assert (found["quantization_config"], found["eos_token_id"]) == ({"quant_method": "x"}, 2)


def test_in_memory_it_is_like_the_model():
    leaf = np.ones(2)
    assert pm.part({"a": {"w": leaf, "b": leaf}, "c": [leaf, leaf]}, "c[1]")[0]["c"][0] is leaf
    state = nnx.state(nnx.Dict(a=nnx.Linear(2, 2, rngs=nnx.Rngs(0)), b=nnx.Param(jnp.ones(2))))
    made = pm.part(state, "a.**", rename={"a.**": "**"})[0]
    assert isinstance(made, nnx.State) and sorted(made) == ["bias", "kernel"]
    module = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 2))
    made = pm.part(module, "1.**", rename={"1.**": "fc.**"})[0]
    assert made["fc.weight"] is module[1].weight and list(made) == ["fc.weight", "fc.bias"]
    net = eqx.nn.Linear(2, 2, key=np.array([0, 1], "u4"))
    assert list(pm.part(net, "weight")[0]) == ["weight"]
    tied = torch.ones(2)
    assert list(pm.part({"emb": tied, "head": tied}, "emb")[0]) == ["emb"]


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_clashes_are_listed_and_weights_stay_whole(tmp_path, where):
    tree = {"a": np.ones(1), "b": np.ones(1), "c": np.ones(1)}
    tree |= {"q.weight_packed": np.ones((4, 1), "i4"), "q.weight_scale": np.ones((4, 1), "f2")}
    tree["q.weight_shape"] = np.array([4, 8])
    if where == "disk":
        save_file(tree, tmp_path / "t.safetensors")
        tree = pm.open(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="2 leaves would stand where something else does") as error:
        pm.part(tree, ["a", "b", "c"], rename={"a": "n", "b": "n.x"})
    assert {"a as n", "b as n.x"} <= {line.strip().replace("/", ".") for line in str(error.value).splitlines()}
    with pytest.raises(pm.errors.Quantized):
        pm.part(tree, "q.weight_packed")
    with pytest.raises(pm.errors.Quantized):
        pm.part(tree, "q.**", rename={"q.weight_scale": "other"})
    with pytest.raises(LookupError):
        pm.part(tree, "nothing")
    if where == "disk":
        pm.part(tree, "q.**", rename={"q.**": "deep.q.**"})[0].save(tmp_path / "out.safetensors", record=True)
        assert sorted(load_file(tmp_path / "out.safetensors")) == [
            f"deep.q.weight_{n}" for n in ("packed", "scale", "shape")
        ]
        assert pm.record(tmp_path / "out.safetensors").deleted == ("a", "b", "c")
        words = ["part", str(tmp_path / "t.safetensors"), "[ab]", "--rename", "a=b", "-o", str(tmp_path / "no")]
        assert CliRunner().invoke(cli, [*words[:2], "{a,b}", *words[3:]]).exit_code == 2
        assert not (tmp_path / "no").exists()


def test_from_a_torch_file_with_ties(tmp_path):
    shared = torch.ones(2, 2)
    torch.save({"emb": shared, "head": shared, "rest": torch.zeros(1)}, tmp_path / "m.pt")
    pm.part(pm.open(tmp_path / "m.pt"), "emb", rename={"emb": "w"})[0].save(tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(found) == ["w"] and found["w"].equal(shared)


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "num_hidden_layers": 2, "pad_token_id": 0}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llava", "Gemma3"])
def test_transformers_loads_it_and_computes_the_same(tmp_path, family):
    import transformers

    text = SMALL | {"model_type": "llama"} if family == "Llava" else SMALL | {"head_dim": 8, "sliding_window": 4}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8, "patch_size": 4}
    vision |= {"intermediate_size": 64} | ({"model_type": "clip_vision_model"} if family == "Llava" else {})
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "hf", max_shard_size="60KB")
    with pm.open(tmp_path / "hf") as whole:
        pm.part(whole, "language_model.**", rename={"language_model.**": "**"})[0].save(tmp_path / "out")
    made, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and made.dtype == torch.bfloat16
    ids = torch.arange(3, 27).reshape(2, 12)
    loaded = type(model).from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert torch.equal(made.eval()(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_reports_say_what_came_what_was_taken_and_what_stays():
    tree, report = pm.insert({"a": np.ones(1)}, {"b": {"w": np.zeros((2, 3), "f4")}}, "**", rename={"b.**": "c.d.**"})
    assert tree["c"]["d"]["w"].shape == (2, 3)
    assert report.to_dict() == {
        "layout": "insert",
        "inserted": [{"path": "c/d/w", "dtype": "float32", "shape": [2, 3], "origin": "b/w", "sources": ["b/w"]}],
        "kept": ["a"],
    }
    rest, report = pm.part(tree, "c.**", rename={"c.d.**": "**"})
    assert list(rest) == ["w"]
    assert ([row.path for row in report.rows], report.kept) == (["w"], ("a",))
    assert "1 leaf taken, 1 left out" in str(report)
