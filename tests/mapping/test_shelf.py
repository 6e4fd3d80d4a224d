"""The layouts of other tools: what is made is what the other tool's own code takes, and the way back is exact."""

import re
from functools import partial

import numpy as np
import optax
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import paramend as pm
from paramend.cli.main import cli
from paramend.testing import assert_identical

SMALL = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 16,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMAS = ("llama", "qwen2", "qwen3")
IMAGES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES |= {"image_size": 8, "patch_size": 4}


def equal(found, right):
    return found.keys() == right.keys() and all(torch.equal(found[name], right[name]) for name in right)


def saved(module, folder):
    """The files of a module whose parameters all differ."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    module.eval().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def languages(family, folder):
    config = transformers.AutoConfig.for_model(family, **SMALL)
    return saved(transformers.AutoModelForCausalLM.from_config(config), folder)


def on_disk(layout, folder, out, back=False, **numbers):
    with pm.open(folder) as model:
        (layout.back if back else layout.to)(model, **numbers)[0].save(out)
    return load_file(out / "model.safetensors")


# ---- Megatron-core -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LLAMAS)
def test_megatron_cuts_its_fused_leaves_into_those_of_transformers(tmp_path, family):
    """As its `get_query_key_value_tensors` and the gated unit of its `MLP` cut what fused layers return."""
    files = languages(family, tmp_path / "hf")
    layout = pm.layout("hf_to_megatron_llama")
    found = on_disk(layout, tmp_path / "hf", tmp_path / "mcore")
    width = files["model.layers.0.self_attn.q_proj.weight"].shape[0] // 4
    for n in range(2):
        here, there = f"model.layers.{n}", f"decoder.layers.{n}"
        for end in ("weight", "bias") if family == "qwen2" else ("weight",):
            fused = found.pop(f"{there}.self_attention.linear_qkv.{end}")
            mixed = fused.reshape(2, (4 // 2 + 2) * width, *fused.shape[1:])  # [ng, (np/ng + 2) * hn, in]
            cut = torch.split(mixed, [4 // 2 * width, width, width], dim=1)
            for name, part in zip("qkv", cut, strict=True):
                assert torch.equal(part.reshape(-1, *fused.shape[1:]), files[f"{here}.self_attn.{name}_proj.{end}"])
        gate, up = torch.chunk(found.pop(f"{there}.mlp.linear_fc1.weight"), 2, dim=0)
        assert torch.equal(gate, files[f"{here}.mlp.gate_proj.weight"])
        assert torch.equal(up, files[f"{here}.mlp.up_proj.weight"])
        same = {
            "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
            "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
            "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
            "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        } | (
            {f"self_attention.{x}_layernorm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
            if "3" in family
            else {}
        )
        for megatron, hf in same.items():
            assert torch.equal(found.pop(f"{there}.{megatron}"), files[f"{here}.{hf}"])
    assert torch.equal(found.pop("embedding.word_embeddings.weight"), files["model.embed_tokens.weight"])
    assert torch.equal(found.pop("decoder.final_layernorm.weight"), files["model.norm.weight"])
    assert torch.equal(found.pop("output_layer.weight"), files["lm_head.weight"])
    assert not found
    assert equal(on_disk(layout, tmp_path / "mcore", tmp_path / "back", back=True), files)
    tree, _ = layout.to(files, **HEADS)
    assert equal(layout.back(tree, **HEADS)[0], files)
    local, _ = pm.layout("hf_to_megatron_llama_local").to(files, **HEADS)
    assert local.keys() - tree.keys() == {
        f"decoder.layers.{n}.{name}.weight" for n in range(2) for name in ("input_layernorm", "pre_mlp_layernorm")
    }


# ---- llama.cpp -----------------------------------------------------------------------------------------------------

# As `gguf-py` names the leaves of a block.
BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}
AROUND = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name):
    module, _, end = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", module)
    return f"blk.{layer[1]}.{BLOCK[layer[2]]}.{end}" if layer else f"{AROUND[module]}.{end}"


def permuted(weights, heads):
    """What its converter does to q and k of a Llama."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2)


@pytest.mark.parametrize("family", LLAMAS)
def test_llama_cpp_has_its_names_and_the_rows_that_its_kernels_rotate(tmp_path, family):
    files = languages(family, tmp_path / "hf")
    layout = pm.layout(f"hf_to_llama_cpp_{family}")
    found = on_disk(layout, tmp_path / "hf", tmp_path / "cpp")
    right = {gguf_name(name): leaf for name, leaf in files.items()}
    for n in range(2) if family == "llama" else ():
        for name, heads in (("q", 4), ("k", 2)):
            weights = right[f"blk.{n}.attn_{name}.weight"]
            right[f"blk.{n}.attn_{name}.weight"] = permuted(weights, heads).reshape(weights.shape)
    assert equal(found, right)
    assert equal(on_disk(layout, tmp_path / "cpp", tmp_path / "back", back=True), files)
    for other in (each for each in LLAMAS if each != family):
        with pytest.raises((ValueError, LookupError), match=r"no rule takes|takes nothing|matches"):
            pm.layout(f"hf_to_llama_cpp_{other}").to(files, **(HEADS if other == "llama" else {}))


# ---- timm and open_clip --------------------------------------------------------------------------------------------


def taken(model, name):
    return model.pop(f"{name}.weight"), model.pop(f"{name}.bias")


def attention(x, weight, bias, heads):
    """As timm's `Attention` takes its fused projection apart."""
    rows, length, width = x.shape
    qkv = F.linear(x, weight, bias).reshape(rows, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    return qkv.unbind(0)


def timm_logits(model, x):
    """The forward pass of timm's `VisionTransformer`; every name that it reads is taken out."""
    pair = partial(taken, model)
    x = F.conv2d(x, *pair("patch_embed.proj"), stride=4).flatten(2).transpose(1, 2)
    x = torch.cat([model.pop("cls_token").expand(len(x), -1, -1), x], 1) + model.pop("pos_embed")
    for n in range(2):
        y = F.layer_norm(x, (8,), *pair(f"blocks.{n}.norm1"), eps=1e-12)
        mixed = F.scaled_dot_product_attention(*attention(y, *pair(f"blocks.{n}.attn.qkv"), 2))
        x = x + F.linear(mixed.transpose(1, 2).reshape(x.shape), *pair(f"blocks.{n}.attn.proj"))
        y = F.gelu(F.linear(F.layer_norm(x, (8,), *pair(f"blocks.{n}.norm2"), eps=1e-12), *pair(f"blocks.{n}.mlp.fc1")))
        x = x + F.linear(y, *pair(f"blocks.{n}.mlp.fc2"))
    x = F.layer_norm(x, (8,), *pair("norm"), eps=1e-12)[:, 0]
    return F.linear(x, *pair("head")) if "head.weight" in model else x


@pytest.mark.parametrize("name", ["hf_to_timm_vit", "hf_to_timm_vit_backbone"])
def test_timm_computes_the_same_from_a_vit(tmp_path, name):
    config = transformers.ViTConfig(**IMAGES, num_labels=3)
    headed = not name.endswith("backbone")
    module = transformers.ViTForImageClassification(config) if headed else transformers.ViTModel(config, False)
    files = saved(module, tmp_path / "hf")
    layout = pm.layout(name)
    found = on_disk(layout, tmp_path / "hf", tmp_path / "timm")
    assert equal(on_disk(layout, tmp_path / "timm", tmp_path / "back", back=True), files)
    images = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        right = module(images).logits if headed else module(images).last_hidden_state[:, 0]
        assert torch.allclose(timm_logits(found, images), right, atol=1e-5)
    assert not found
    assert equal(pm.layout("vit_4_to_5").to(files)[0], dict(module.state_dict()))


def clip_tower(model, prefix, x, mask=None):
    pair = partial(taken, model)
    for n in range(2):
        at = f"{prefix}transformer.resblocks.{n}"
        y = F.layer_norm(x, (8,), *pair(f"{at}.ln_1"))
        q, k, v = F.linear(y, model.pop(f"{at}.attn.in_proj_weight"), model.pop(f"{at}.attn.in_proj_bias")).chunk(3, -1)
        q, k, v = (each.reshape(*x.shape[:2], 2, -1).transpose(1, 2) for each in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape)
        x = x + F.linear(mixed, *pair(f"{at}.attn.out_proj"))
        y = F.gelu(F.linear(F.layer_norm(x, (8,), *pair(f"{at}.ln_2")), *pair(f"{at}.mlp.c_fc")))
        x = x + F.linear(y, *pair(f"{at}.mlp.c_proj"))
    return x


def open_clip_embeds(model, images, tokens):
    """The two towers of open_clip's `CLIP`; every name that they read is taken out."""
    pair = partial(taken, model)
    x = F.conv2d(images, model.pop("visual.conv1.weight"), stride=4).flatten(2).transpose(1, 2)
    x = torch.cat([model.pop("visual.class_embedding").expand(len(x), 1, -1), x], 1)
    x = F.layer_norm(x + model.pop("visual.positional_embedding"), (8,), *pair("visual.ln_pre"))
    x = F.layer_norm(clip_tower(model, "visual.", x), (8,), *pair("visual.ln_post"))
    image = x[:, 0] @ model.pop("visual.proj")
    x = F.embedding(tokens, model.pop("token_embedding.weight")) + model.pop("positional_embedding")
    x = clip_tower(model, "", x, torch.full((5, 5), -torch.inf).triu_(1))
    x = F.layer_norm(x, (8,), *pair("ln_final"))
    text = x[torch.arange(len(x)), tokens.argmax(-1)] @ model.pop("text_projection")
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def test_open_clip_computes_the_same_from_a_clip(tmp_path):
    words = {
        "vocab_size": 11,
        "max_position_embeddings": 5,
        "eos_token_id": 10,
        "bos_token_id": 9,
        "hidden_act": "gelu",
    }
    text = {
        key: value for key, value in IMAGES.items() if "size" not in key or key in ("hidden_size", "intermediate_size")
    }
    images = IMAGES | {"hidden_act": "gelu"}
    config = transformers.CLIPConfig(text_config=text | words, vision_config=images, projection_dim=6)
    module = transformers.CLIPModel(config)
    files = saved(module, tmp_path / "hf")
    layout = pm.layout("hf_to_open_clip_clip")
    found = on_disk(layout, tmp_path / "hf", tmp_path / "open")
    assert equal(on_disk(layout, tmp_path / "open", tmp_path / "back", back=True), files)
    assert torch.equal(found.pop("logit_scale"), files["logit_scale"])
    pixels, tokens = torch.randn(2, 3, 8, 8), torch.tensor([[9, 1, 2, 3, 10], [9, 4, 10, 0, 0]])
    with torch.inference_mode():
        right = module(input_ids=tokens, pixel_values=pixels)
        image, said = open_clip_embeds(found, pixels, tokens)
    assert torch.allclose(image, right.image_embeds, atol=1e-5)
    assert torch.allclose(said, right.text_embeds, atol=1e-5)
    assert not found


# ---- MaxText -------------------------------------------------------------------------------------------------------


def test_maxtext_takes_its_layers_from_axis_1_at_any_prefix():
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return rng.normal(size=shape)

    def decoder(of):
        numbered = [f"{name}_{n}" for name, count in of.items() for n in range(count)]
        layers = {name: {"mlp": {"wo": {"kernel": leaf(3, 4)}}, "norm": {"scale": leaf(3)}} for name in numbered}
        return {"params": {"decoder": layers | {"decoder_norm": {"scale": leaf(3)}}}}

    moments = optax.ScaleByAdamState(np.zeros((), np.int32), decoder({"layers": 11}), decoder({"layers": 11}))
    params = decoder({"layers": 11})
    state = {"params": params, "opt_state": (moments, optax.EmptyState())}
    layout = pm.layout("maxtext_unrolled_to_scanned")
    found, _ = layout.to(state)
    for tree, whole in ((found["params"], params), (found["opt_state"][0].nu, moments.nu)):
        scanned, layers = tree["params"]["decoder"], whole["params"]["decoder"]
        assert scanned.keys() == {"layers", "decoder_norm"}
        for n in range(11):  # what its `force_unroll` does
            kernel, layer = scanned["layers"]["mlp"]["wo"]["kernel"], layers[f"layers_{n}"]
            assert (np.take(kernel, n, axis=1) == layer["mlp"]["wo"]["kernel"]).all()
            assert (np.take(scanned["layers"]["norm"]["scale"], n, axis=1) == layer["norm"]["scale"]).all()
    again, _ = layout.back(found)
    assert_identical(again, state)
    deep = decoder({"dense_layers": 1, "moe_layers": 2})
    scanned = layout.to(deep)[0]["params"]["decoder"]
    assert scanned["moe_layers"]["mlp"]["wo"]["kernel"].shape == (3, 2, 4)
    assert scanned["dense_layers"]["norm"]["scale"].shape == (3, 1)
    with pytest.raises(LookupError, match="no rule takes anything"):
        layout.to({"params": {"encoder": {"layers_0": np.ones(3)}}})


# ---- the steps that need numbers -----------------------------------------------------------------------------------

ROPE = {"from": "q", "to": "q", "do": [{"rope": {"axis": 1, "heads": "num_attention_heads", "rotary_dim": 4}}]}
GROUP = {"from": ["q", "k", "v"], "to": "qkv", "do": [{"group_qkv": {"heads": 4, "kv_heads": 2}}]}


def test_only_the_rotary_part_of_a_head_is_put_in_turns():
    x = np.arange(24).reshape(2, 12)
    layout = pm.Layout([ROPE])
    found, _ = layout.to({"q": x}, num_attention_heads=2)
    assert found["q"].tolist() == x[:, [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]].tolist()
    assert layout.back(found, num_attention_heads=2)[0]["q"].tolist() == x.tolist()
    assert pm.Layout.of(layout.to_data()) == layout
    inverse = pm.Layout([{"from": "q", "to": "q", "do": [{"unrope": ROPE["do"][0]["rope"]}]}])
    assert inverse.to(found, num_attention_heads=2)[0]["q"].tolist() == x.tolist()


@pytest.mark.parametrize(
    ("rule", "shapes", "numbers", "says"),
    [
        (
            ROPE,
            {"q": (2, 12)},
            {},
            "there is no config.json that says num_attention_heads\n\nhint: .*num_attention_heads=8",
        ),
        (ROPE, {"q": (2, 12)}, {"num_attention_heads": 5}, "q: rope: axis 1 of .* does not hold 5 heads"),
        (ROPE, {"q": (2, 12)}, {"num_attention_heads": 4}, "heads of 3 places do not have 4"),
        (ROPE, {"q": (2, 12)}, {"num_attention_heads": 0}, "num_attention_heads is 0"),
        (ROPE, {"q": (2, 12)}, {"num_attention_heads": True}, "num_attention_heads is True"),
        (
            ROPE,
            {"q": (2, 12)},
            {"num_atention_heads": 2},
            "no step names 'num_atention_heads'\n\nhint: num_attention_heads",
        ),
        (GROUP, {"q": (8, 3), "k": (4, 3), "v": (4, 3)}, {"heads": 4}, "no step names 'heads'"),
        (GROUP, {"q": (8, 3), "k": (8, 3), "v": (8, 3)}, {}, "do not hold 2 heads of 2"),
        (GROUP, {"q": (6, 3), "k": (4, 3), "v": (4, 3)}, {}, "an axis of 6 does not hold 4 heads"),
        (GROUP, {"q": (8, 3), "k": (4, 2), "v": (4, 3)}, {}, "do not fit"),
        (
            GROUP | {"do": [{"group_qkv": {"heads": 4, "kv_heads": 3}}]},
            dict.fromkeys("qkv", (8, 3)),
            {},
            "3 groups do not divide 4",
        ),
        (
            GROUP | {"from": ["q", "k"]},
            {"q": (8, 3), "k": (4, 3)},
            {},
            "takes the paths of q, k and v, and there are 2",
        ),
    ],
)
def test_heads_that_do_not_fit_are_refused(rule, shapes, numbers, says):
    with pytest.raises(ValueError, match=says):
        pm.Layout([rule]).to({name: np.zeros(shape) for name, shape in shapes.items()}, **numbers)


@pytest.mark.parametrize("heads", ["4 heads", 2.0, None, [4], True, 0, -2])
def test_a_count_is_a_whole_number_or_a_name(heads):
    with pytest.raises(ValueError, match="heads cannot be"):
        pm.Layout([{"from": "q", "to": "q", "do": [{"rope": {"heads": heads}}]}])


def test_groups_along_an_inner_axis(tmp_path):
    counts = {"heads": 4, "kv_heads": 2, "axis": 1}
    tree = {name: torch.arange(6 * size).reshape(3, size, 2) for name, size in (("q", 4), ("k", 2), ("v", 2))}
    layout = pm.Layout([GROUP | {"do": [{"group_qkv": counts}]}])
    save_file(tree, tmp_path / "m.safetensors")
    with pm.open(tmp_path / "m.safetensors") as model:
        new, report = layout.to(model)
        new.save(tmp_path / "out.safetensors")
    assert "concat(reshape(q, [3, 2, 2, 2]), reshape(k, [3, 2, 1, 2])" in report.rows[0].origin
    found = load_file(tmp_path / "out.safetensors")
    right = [("q", 0), ("q", 1), ("k", 0), ("v", 0), ("q", 2), ("q", 3), ("k", 1), ("v", 1)]
    assert torch.equal(found["qkv"], torch.stack([tree[name][:, row] for name, row in right], 1))
    apart = pm.Layout([{"from": "qkv", "to": ["q", "k", "v"], "do": [{"ungroup_qkv": counts}]}])
    assert equal(apart.to(found)[0], tree)
    assert equal(layout.back(found)[0], tree)


@pytest.mark.parametrize("step", ["split", "deal", {"ungroup_qkv": {"heads": 2, "kv_heads": 1}}])
def test_what_cuts_one_leaf_takes_one_path(step):
    layout = pm.Layout([{"from": ["a", "b"], "to": ["q", "k", "v"], "do": [step]}])
    with pytest.raises(ValueError, match="takes one path, and there are 2"):
        layout.to({"a": np.zeros(6), "b": np.zeros(6)})


QKV = pm.Layout([GROUP | {"do": [{"group_qkv": {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}}]}])


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        ('{"num_attention_heads": 4, "num_key_value_heads": 2}', (8, 4)),
        ('{"num_attention_heads": 4}', (8, 8)),
        ('{"num_attention_heads": 4, "num_key_value_heads": null}', (8, 8)),
        ('{"text_config": {"num_attention_heads": 4, "num_key_value_heads": 1}}', (8, 2)),
    ],
)
def test_numbers_are_read_beside_the_checkpoint(tmp_path, config, rows):
    q, k = rows
    tree = {"q": torch.randn(q, 3), "k": torch.randn(k, 3), "v": torch.randn(k, 3)}
    save_file(tree, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pm.open(path) as model:
            assert QKV.to(model)[0]["qkv"].shape == (q + 2 * k, 3)
            with pytest.raises(ValueError, match="5 groups do not divide"):
                QKV.to(model, num_key_value_heads=5)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "there is no config.json that says num_attention_heads"),
        ('{"hidden_size": 8}', "config.json has no num_attention_heads"),
        ('{"num_attention_heads": "4"}', "num_attention_heads is '4'"),
        ("[", "config.json"),
        ("[4]", "holds a list, not an object"),
    ],
)
def test_numbers_that_no_configuration_says(tmp_path, config, says):
    save_file({name: torch.zeros(8, 3) for name in "qkv"}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pm.open(tmp_path) as model, pytest.raises(ValueError, match=says):
        QKV.to(model)


def test_numbers_as_options(tmp_path):
    tree = {"q": torch.randn(8, 3), "k": torch.randn(4, 3), "v": torch.randn(4, 3)}
    save_file(tree, tmp_path / "m.safetensors")
    QKV.save(tmp_path / "qkv.yaml")
    words = ["layout", tmp_path / "qkv.yaml", tmp_path / "m.safetensors", "-o", tmp_path / "out.safetensors"]

    def run(*more, status):
        done = CliRunner().invoke(cli, list(map(str, [*words, *more])))
        assert done.exit_code == status, done.output
        return done.output

    assert "--set num_attention_heads=8" in run(status=2).partition("hint:")[2]
    assert "is not NAME=NUMBER" in run("--set", "num_attention_heads", status=2)
    heads = ("--set", "num_attention_heads=4", "--set", "num_key_value_heads=2")
    assert "qkv ◄─ reshape(concat(reshape(q, [2, 4, 3]), reshape(k, [2, 2, 3])" in run(*heads, "--dry-run", status=0)
    run(*heads, status=0)
    found = load_file(tmp_path / "out.safetensors")["qkv"]
    order = [tree["q"][:4], tree["k"][:2], tree["v"][:2], tree["q"][4:], tree["k"][2:], tree["v"][2:]]
    assert torch.equal(found, torch.cat(order))


@pytest.mark.parametrize("name", [name for name in pm.layouts() if name.endswith(("_llama", "_llama_local"))])
def test_a_model_with_the_names_of_another_is_refused(tmp_path, name):
    save_file({"model.embed_tokens.weight": torch.zeros(8, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    with pm.open(tmp_path) as model, pytest.raises(ValueError, match=r"is for .*llama.*, and config.json says gemma"):
        pm.layout(name).to(model)
