"""Quantised weights are known by the names and specs of their leaves, and nothing else is taken for one."""

import json
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

import paramend as pm
from paramend.leaves.groups import group_of, groups_of, methods_of
from paramend.leaves.schemes import SCHEMES
from paramend.trees.tree import Tree
from support.quantized import F8, LAYOUTS, stored, write


def told(leaves):
    """Scheme → {role: paths} of each group."""
    return [
        (group.scheme.name, {leaves.index.path(number): group.role(number) for number in group.numbers})
        for group in groups_of(leaves)
    ]


def nested(tree):
    """The tree with its names split into dicts, except where a leaf lies above another."""
    out = {}
    for name, value in tree.items():
        node = out
        *above, last = name.split(".", 5) if name.startswith("model.layers") else name.split(".")
        for key in above:
            node = node.setdefault(key, {})
        node[last] = value
    return out


@pytest.mark.parametrize("who", LAYOUTS, ids=" ".join)
def test_a_layout_is_known_on_disk_and_in_memory(who, tmp_path):
    tree = stored(LAYOUTS[who])
    first, *others = [name for name in tree if name != "model.norm.weight"]
    for leaves in (pm.open(write(tmp_path / "m.safetensors", tree)), Tree(tree), Tree(nested(tree))):
        ((scheme, roles),) = told(leaves)
        roles = {path.replace("/", "."): role for path, role in roles.items()}
        assert scheme == who[0]
        assert roles[first] == "payload" and set(roles) == {first, *others}
        assert len(set(roles.values())) == len(roles), "each companion has a role of its own"


def test_every_scheme_has_a_layout():
    assert {row.name for row in SCHEMES} - {"fp8", "packed", "bnb-4bit"} == {scheme for scheme, _ in LAYOUTS}


@pytest.mark.parametrize(
    ("tree", "scheme"),
    [
        ({"weight": (F8, (8, 8)), "weight_scale": ("float32", (3, 3, 3))}, "fp8"),
        ({"qweight": ("uint8", (8, 4)), "scales": ("float16", (8, 1))}, "packed"),
        ({"weight": ("uint8", (32, 1)), "weight.absmax": ("float32", (1,))}, "bnb-4bit"),
        ({"qweight": ("int32", (4, 8))}, "gptq"),
        ({"weight_packed": ("int32", (8, 2))}, "int4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_half_known_is_known_to_be_quantised(tree, scheme):
    assert [name for name, _ in told(Tree(stored(tree)))] == [scheme]


PLAIN = {
    "a scale of a layer": {"weight": ("float32", (8, 8)), "scales": ("float32", (8,)), "scale": ("float32", (8,))},
    "a scale beside floats": {"weight": ("float32", (8, 8)), "weight_scale": ("float32", (8, 1))},
    "its inverse": {"weight": ("bfloat16", (8, 8)), "weight_scale_inv": ("float32", (1, 1))},
    "weight norm": {"weight_g": ("float32", (8, 1)), "weight_v": ("float32", (8, 8)), "bias": ("float32", (8,))},
    "ids and counters": {"position_ids": ("int64", (1, 8)), "step": ("int32", ()), "num_batches": ("int64", ())},
    "images": {"image": ("uint8", (8, 8, 3)), "image_scale": ("float32", ()), "mask": ("int8", (8, 8))},
    "float8 alone": {"weight": (F8, (8, 8)), "bias": ("float32", (8,))},
    "scales of keys and values": {"k_scale": ("float32", ()), "v_scale": ("float32", ()), "q_scale": ("float32", ())},
    "a norm": {"scale": ("float32", (8,)), "bias": ("float32", (8,)), "kernel": ("float32", (8, 8))},
    "fp8 training": {
        "kernel": ("float32", (8, 8)),
        "kernel_scale": ("float32", (1,)),
        "input_scale": ("float32", (1,)),
    },
    "blocks": {"num_blocks": ("uint8", (4,)), "mask_packed": ("uint8", (8,)), "attn_scales": ("float32", (4,))},
    "an index": {"indices": ("int32", (8,)), "codes": ("int32", (8,)), "codebooks": ("float32", (8, 8))},
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_no_group_is_left_alone(name, tmp_path):
    tree = stored(PLAIN[name])
    opened = pm.open(write(tmp_path / "m.safetensors", tree, {"model_type": "llama"}))
    for leaves in (Tree(tree), Tree(nested(tree)), opened):
        assert told(leaves) == []
    edited = pm.at(opened, "**").zero()
    assert all((np.asarray(edited[path]).astype("float64") == 0).all() for path in pm.at(opened, "**").paths)


def test_experts_and_dense_layers_of_one_model_are_groups_of_their_own():
    tree = stored(LAYOUTS["fp8-block", "fused experts"], "layers.0.experts", norm=False)
    tree |= stored(LAYOUTS["fp8-tensor", "compressed-tensors"], "layers.0.q_proj", norm=False)
    tree |= {"layers.0.attn.k_scale": np.ones((), "float32"), "layers.0.router.weight": np.ones((2, 4), "float32")}
    assert [scheme for scheme, _ in told(Tree(tree))] == ["fp8-block", "fp8-tensor"]


def test_a_weight_whose_scale_is_in_another_shard_is_one_weight(tmp_path):
    tree = stored(LAYOUTS["fp8-block", "DeepSeek-V3"])
    names = {}
    for n, (name, values) in enumerate(tree.items(), 1):
        file = f"model-{n:05}-of-{len(tree):05}.safetensors"
        write(tmp_path / file, {name: values})
        names[name] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    ((scheme, roles),) = told(pm.open(tmp_path))
    assert scheme == "fp8-block" and list(roles.values()) == ["payload", "scale"]


def test_layers_before_a_block_that_predicts_tokens_hold_groups_as_others_do():
    tree = stored(LAYOUTS["int4", "compressed-tensors"], "layers.0.up_proj", norm=False)
    tree |= stored(LAYOUTS["int4", "compressed-tensors"], "layers.1.eh_proj", norm=False)
    leaves = Tree(tree)
    leaves.index.mark(("layers",), 1)
    assert [scheme for scheme, _ in told(leaves)] == ["int4", "int4"]


def test_groups_of_modules_of_every_framework():
    class Layer(eqx.Module):
        weight: jax.Array
        weight_scale: jax.Array

    class Dense(nnx.Module):
        def __init__(self):
            self.kernel = nnx.Param(jnp.ones((4, 8), jnp.int8))
            self.scale = nnx.Param(jnp.ones(8))

    class Model(torch.nn.Module):
        """As transformers loads it with bitsandbytes: scales are no leaves, and the configuration tells."""

        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(2, 2)
            self.fc.weight = torch.nn.Parameter(torch.ones(8, 1, dtype=torch.uint8), requires_grad=False)
            to_dict = {"quant_method": "bitsandbytes", "load_in_4bit": True}.copy
            self.config = SimpleNamespace(quantization_config=SimpleNamespace(to_dict=to_dict))

    layer = Layer(jnp.ones((4, 8), jnp.int8), jnp.ones((4, 1)))
    schemes = [[scheme for scheme, _ in told(Tree(each))] for each in (layer, Dense(), nnx.state(Dense()), Model())]
    assert schemes == [["int8"], ["int8"], ["int8"], ["bnb-4bit"]]
    with pytest.raises(pm.errors.Quantized, match="not here  scale"):
        pm.at(Model(), "**").zero_()


def test_boxes_of_one_value_are_leaves():
    params = {"fc": {"kernel": {"value": np.ones((4, 8), "int8")}, "scale": {"value": np.ones(8)}}}
    assert told(Tree(params)) == [("int8", {"fc/kernel/value": "payload", "fc/scale/value": "scale"})]
    assert not pm.at(params, "**/kernel/value").zero()["fc"]["kernel"]["value"].any()
    renamed = pm.at(params, "fc/**").rename("dense/**")
    assert pm.at(renamed, "**").paths == ["dense/kernel/value"]
    assert renamed["dense"]["scale"]["value"] is params["fc"]["scale"]["value"]


def test_a_list_of_one_scale_is_a_scale():
    params = {"kernel": {"qvalue": np.ones((4, 8), "int8"), "scale": [np.ones((1, 8), "float32")]}}
    assert told(Tree(params)) == [("aqt", {"kernel/qvalue": "payload", "kernel/scale/0": "scale"})]


# ---- the configuration -------------------------------------------------------------------------------------------

ONE_SHARD = {
    "model.layers.0.mlp.up_proj.weight": np.ones((4, 4), ml_dtypes.float8_e4m3fn),
    "model.layers.0.mlp.down_proj.weight_scale_inv": np.ones((1, 1), "float32"),
    "model.layers.0.self_attn.k_scale": np.ones((), "float32"),
    "model.layers.0.mlp.gate.weight": np.ones((4, 4), ml_dtypes.bfloat16),
    "model.embed_tokens.weight": np.ones((4, 4), ml_dtypes.bfloat16),
}


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        {"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}},
    ],
)
def test_a_shard_whose_scales_are_in_another_is_known_by_the_configuration(config, tmp_path):
    opened = pm.open(write(tmp_path / "model-00001-of-00002.safetensors", ONE_SHARD, config))
    groups = groups_of(opened)
    held = {opened.index.path(number): group.missing for group in groups for number in group.numbers}
    assert held == {
        "model.layers.0.mlp.up_proj.weight": ("scale",),
        "model.layers.0.mlp.down_proj.weight_scale_inv": ("payload",),
    }
    (tmp_path / "config.json").unlink()
    assert groups_of(pm.open(tmp_path / "model-00001-of-00002.safetensors")) == []


@pytest.mark.parametrize("method", ["fp8", "compressed-tensors", "modelopt", "gptq", "awq", "bitsandbytes", "mxfp4"])
def test_a_module_that_was_left_as_it_is_has_no_group_whatever_the_configuration_says(method, tmp_path):
    layer = (
        PLAIN["a scale beside floats"]
        | PLAIN["scales of keys and values"]
        | PLAIN["a norm"]
        | PLAIN["ids and counters"]
    )
    config = {"quantization_config": {"quant_method": method}}
    opened = pm.open(
        write(tmp_path / "m.safetensors", stored({**layer, "lm_head.weight": ("bfloat16", (4, 4))}), config)
    )
    assert methods_of(opened.quantization) == {method} and told(opened) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"quantization_config": 3}', '{"quantization_config": {}}', "[" * 9999])
def test_a_configuration_that_says_nothing_is_no_error(text, tmp_path):
    file = write(tmp_path / "m.safetensors", ONE_SHARD)
    (tmp_path / "config.json").write_text(text)
    assert (
        pm.at(pm.open(file), "**.up_proj.weight").zero()["model.layers.0.mlp.up_proj.weight"].tolist() == [[0] * 4] * 4
    )


def test_files_in_place_of_a_configuration(tmp_path):
    file = write(tmp_path / "m.safetensors", ONE_SHARD)
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert {group.scheme.name for group in groups_of(pm.open(file))} == {"fp8-tensor"}
    (tmp_path / "hf_quant_config.json").unlink()
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "desc_act": false}')
    opened = pm.open(file)
    assert methods_of(opened.quantization) == {"gptq"} and groups_of(opened) == []
    alone = {"a.scales": np.ones((1, 8), "float16"), "b.scales": np.ones(8, "float16"), "b.weight": np.ones((8, 8))}
    assert told(pm.open(write(tmp_path / "model-00001-of-00002.safetensors", alone))) == [
        ("gptq", {"a.scales": "scale"})
    ]


def test_groups_are_found_at_once_in_a_model_of_many_layers():
    layout = LAYOUTS["fp8-block", "compressed-tensors"]
    one = stored(layout, "x", norm=False)
    tree = {name.replace("x", f"layers.{n}.fc"): value for n in range(2000) for name, value in one.items()}
    leaves = Tree(tree)
    assert len(groups_of(leaves)) == 2000
    assert group_of(leaves, leaves.index.numbers[-1]).payload == leaves.index.numbers[-2]
