"""What configuration, names and shapes say of a model, family by family, as transformers builds them."""

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadCheckpoint, CannotRead
from support.tiny_models import MODELS

KEYS = ["layers", "mtp", "experts", "heads", "hidden", "mlp", "vocabulary", "ties", "parts", "groups"]
BASE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
BASE |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS, MOE = BASE | {"head_dim": 8}, {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LATENT = {"q_lora_rank": 20, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 7}
GROUPED = MOE | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
TOWERS = {
    "text_config": {k: n for k, n in BASE.items() if k != "num_key_value_heads"},
    "vision_config": TOWER | {"image_size": 16, "patch_size": 4},
}
SIDES = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 96}
SIDES |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 48, "pad_token_id": 0}
SSM = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2}
# Model type → its class, its configuration, and what is different from a model of 4 layers with the sizes of BASE.
ROWS = {
    "qwen3_5_text": ("Qwen3_5ForCausalLM", HEADS | LINEAR, {}),
    "qwen3_next": ("Qwen3NextForCausalLM", HEADS | LINEAR | MOE | {"num_experts": 4}, {}),
    "gemma3n_text": ("Gemma3nForCausalLM", HEADS | {"num_kv_shared_layers": 1}, {}),
    "gemma4_text": ("Gemma4ForCausalLM", HEADS | {"num_kv_shared_layers": 0, "global_head_dim": 8}, {}),
    "gpt_oss": ("GptOssForCausalLM", HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2}, {}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        BASE | GROUPED | LATENT | {"num_key_value_heads": 4},
        {"heads": (4, 4, 10)},
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", HEADS | GROUPED, {}),
    "minimax": ("MiniMaxForCausalLM", HEADS | {"num_local_experts": 4}, {}),
    "nemotron_h": (
        "NemotronHForCausalLM",
        HEADS | MOE | {"n_routed_experts": 4, "ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8},
        {},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4} | SSM,
        {"heads": None, "mlp": None},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 3,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "vocab_size": 96,
        },
        {"layers": 2, "heads": (4, 4, 8)},
    ),
    "whisper": ("WhisperForConditionalGeneration", SIDES, {"layers": 2, "heads": (4, 4, 8)}),
    "bart": ("BartForConditionalGeneration", SIDES, {"layers": 2, "heads": (4, 4, 8)}),
    "clip": ("CLIPModel", TOWERS, {"heads": (4, 4, 8)}),
    "siglip": ("SiglipModel", TOWERS, {"heads": (4, 4, 8)}),
    "falcon": (
        "FalconForCausalLM",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "multi_query": True},
        {"heads": (4, 1, 8), "mlp": 128},
    ),
    "olmo_hybrid": ("OlmoHybridForCausalLM", BASE | LINEAR, {}),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", HEADS | MOE | {"v_head_dim": 6, "n_routed_experts": 4}, {}),
    "bert": ("BertForMaskedLM", {k: n for k, n in BASE.items() if k != "num_key_value_heads"}, {"heads": (4, 4, 8)}),
}
_TINY = {"heads": (4, 2, 8), "hidden": 32, "mlp": 64, "layers": 3, "vocabulary": 64}
_OWN = {
    "phi": {"heads": (4, 4, 8)},
    "gpt2": {"heads": (4, 4, 8), "mlp": 128},
    "gpt_neox": {"heads": (4, 4, 8)},
    "vit": {"heads": (4, 4, 8), "vocabulary": None},
}


def on_meta(model, config):
    with torch.device("meta"):
        return getattr(transformers, model)(config)


def row(kind):
    model, says, own = ROWS[kind]
    return on_meta(model, transformers.CONFIG_MAPPING[kind](**says)), own


def sizes(found):
    heads = found["heads"] and tuple(found["heads"].values())
    return {
        "heads": heads,
        "layers": found["layers"]["count"],
        **{key: found[key] for key in ("hidden", "mlp", "vocabulary")},
    }


@pytest.mark.parametrize("kind", ROWS)
def test_families(kind):
    model, own = row(kind)
    found = pm.anatomy(model).to_dict()
    assert list(found) == KEYS and json.loads(json.dumps(found)) == found
    wanted = {"heads": (4, 2, 8), "hidden": 32, "mlp": 48, "vocabulary": 96, "layers": 4}
    assert sizes(found) == wanted | own
    layers = model.get_submodule(found["layers"]["where"])
    assert len(layers) == found["layers"]["count"] and isinstance(layers, torch.nn.ModuleList)
    told = getattr(model.config, "layer_types", None) or getattr(model.config, "layers_block_type", None)
    if told:
        assert found["layers"]["kinds"] == list(told)
    tied = dict(model.all_tied_weights_keys)
    assert (found["ties"] or {}) == tied


@pytest.mark.parametrize("family", MODELS)
def test_families_of_growth(family):
    config, model, says = MODELS[family]
    built = on_meta(model, getattr(transformers, config)(**says))
    found = pm.anatomy(built).to_dict()
    assert sizes(found) == _TINY | _OWN.get(family, {})
    assert len(built.get_submodule(found["layers"]["where"])) == 3


def test_kinds_without_a_list():
    deepseek, _ = row("deepseek_v3")
    assert pm.anatomy(deepseek).layers["kinds"] == ["dense", "sparse", "sparse", "sparse"]
    config = transformers.JambaConfig(**BASE, num_experts=2, mamba_d_state=4, attn_layer_period=2, attn_layer_offset=1)
    jamba = on_meta("JambaForCausalLM", config)
    assert pm.anatomy(jamba).layers["kinds"] == ["linear_attention", "attention"] * 2
    assert (
        pm.anatomy(on_meta("LlamaForCausalLM", transformers.LlamaConfig(**BASE))).layers["kinds"] == ["attention"] * 4
    )


def test_parts():
    clip, _ = row("clip")
    parts = pm.anatomy(clip).parts
    assert {name: part["where"] for name, part in parts.items()} == {
        "text": "text_model",
        "vision": "vision_model",
        "visual_projection": "visual_projection",
        "text_projection": "text_projection",
    }
    vision = parts["vision"]
    assert (vision["layers"]["count"], vision["hidden"], vision["mlp"], vision["vocabulary"]) == (2, 24, 40, None)
    assert vision["heads"] == {"query": 3, "key_value": 3, "head_dim": 8}
    whisper, _ = row("whisper")
    sides = pm.anatomy(whisper).parts
    assert {name: (part["layers"]["count"], part["mlp"], part["where"]) for name, part in sides.items()} == {
        "encoder": (3, 40, "model.encoder"),
        "decoder": (2, 48, "model.decoder"),
    }
    llava = transformers.LlavaConfig(text_config=BASE | {"model_type": "llama"}, vision_config=TOWERS["vision_config"])
    found = pm.anatomy(on_meta("LlavaForConditionalGeneration", llava)).to_dict()
    assert (found["hidden"], found["vocabulary"], found["layers"]["where"]) == (32, 96, "model.language_model.layers")
    assert found["parts"]["multi_modal_projector"] == {"where": "model.multi_modal_projector"}
    assert found["parts"]["vision"]["hidden"] == 24


@pytest.mark.parametrize(
    ("names", "blocks"),
    [
        (["model.layers.2.eh_proj", "model.layers.2.mlp.up_proj"], ["model.layers.2"]),
        (["model.layers.2.eh_proj", "model.layers.3.hnorm"], ["model.layers.2", "model.layers.3"]),
        (["mtp.layers.0.mlp.up_proj", "mtp.layers.1.mlp.up_proj", "mtp.fc"], ["mtp.layers.0", "mtp.layers.1"]),
        (["model.mtp_layers.0.up_proj"], ["model.mtp_layers.0"]),
        (["mtp.fc"], ["mtp"]),
    ],
)
@pytest.mark.parametrize("config", [None, {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}])
def test_blocks_that_predict_further_tokens(names, blocks, config):
    layers = [
        f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    ]
    tree = {f"{name}.weight": np.ones((4, 4)) for name in (*layers, *names)}
    found = pm.anatomy(tree, config)
    assert found.mtp == {"count": len(blocks), "where": blocks}
    assert (found.layers["count"], found.layers["where"]) == (2, "model.layers")


def test_a_part_that_sees_has_not_the_kinds_of_the_text():
    kind, block = "qwen3_5_moe", {"attn.qkv.weight": np.ones((6, 2)), "mlp.fc1.weight": np.ones((4, 2))}
    text = {"layers.0.mlp.up_proj.weight": np.ones((4, 2)), "embed_tokens.weight": np.ones((9, 2))}
    tree = {f"model.visual.blocks.{i}.{name}": value for i in range(4) for name, value in block.items()}
    tree |= {f"model.language_model.{name}": value for name, value in text.items()}
    config = {"model_type": kind, "vision_config": {"model_type": kind, "depth": 4, "hidden_size": 2}}
    config["text_config"] = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    parts = pm.anatomy(tree, config).parts
    assert (parts["vision"]["layers"]["kinds"], parts["text"]["layers"]["kinds"]) == (
        ["attention"] * 4,
        ["full_attention"],
    )


def test_names_and_shapes_alone():
    layer = {"attn": {"q_norm": {"weight": np.ones(4)}, "o_proj": {"weight": np.ones((8, 12))}}}
    layer["attn"]["k_proj"] = {"weight": np.ones((4, 8))}
    layer["mlp"] = {"gate_up_proj": {"weight": np.ones((20, 8))}, "down_proj": {"weight": np.ones((8, 10))}}
    tree = {"wte": {"weight": np.ones((50, 8))}, "h": [layer] * 3, "extra": [{"w": np.ones(1)}] * 2}
    found = pm.anatomy(tree).to_dict()
    assert found["layers"] == {"count": 3, "kinds": ["attention"] * 3, "where": "h"}
    assert found["heads"] == {"query": 3, "key_value": 1, "head_dim": 4}
    assert [found[key] for key in ("hidden", "mlp", "vocabulary", "ties", "groups", "parts")] == [
        8,
        10,
        50,
        None,
        None,
        None,
    ]


def test_nothing_is_guessed():
    assert set(pm.anatomy({"a": np.ones(3), "b": {"c": np.ones((2, 2))}}).to_dict().values()) == {None}
    two = {"left": [{"w": np.ones(2)}] * 2, "right": [{"w": np.ones(2)}] * 2}
    assert pm.anatomy(two).layers is None
    assert str(pm.anatomy(two)) == "nothing  is known of it"
    new = {"model_type": "new", "num_hidden_layers": 2, "hidden_size": 2, "num_attention_heads": 7}
    found = pm.anatomy({"x": [{"attn": {"mix": np.ones((2, 2))}}] * 2}, new)
    assert (found.heads, found.hidden, found.mlp) == ({"query": 7, "key_value": None, "head_dim": None}, 2, None)


@pytest.mark.parametrize("turn", [1, -1])
def test_widths_that_differ_are_none_of_the_model(turn):
    layers = [
        {
            "mlp": {"up_proj": {"weight": np.ones((width, 4))}},
            "self_attn": {"k_proj": {"weight": np.ones((width - 4, 4))}},
        }
        for width in (6, 8)[::turn]
    ]
    blocks = {"model": {"layers": layers}, "mtp": {"embed_tokens": {"weight": np.ones((5, 4))}}}
    tree = dict([*blocks.items(), ("embed_tokens", {"weight": np.ones((9, 4))})][::turn])
    found = pm.anatomy(tree)
    assert (found.mlp, found.vocabulary, found.hidden) == (None, 9, 4)
    found = pm.anatomy(tree, {"intermediate_size": [6, 8][::turn], "head_dim": 2, "num_attention_heads": 2})
    assert (found.mlp, found.heads) == (None, {"query": 2, "key_value": None, "head_dim": 2})


def test_flax_parameters():
    layer = {"self_attn": {"q_proj": {"kernel": np.ones((8, 12))}, "o_proj": {"kernel": np.ones((12, 8))}}}
    layer |= {"mlp": {"up_proj": {"kernel": np.ones((8, 10))}, "down_proj": {"kernel": np.ones((10, 8))}}}
    tree = {"params": {"embed_tokens": {"embedding": np.ones((50, 8))}, **{f"layers_{i}": layer for i in range(11)}}}
    found = pm.anatomy(tree, {"num_hidden_layers": 11, "num_attention_heads": 3})
    assert found.layers == {"count": 11, "kinds": ["attention"] * 11, "where": "params/layers_*"}
    assert (found.hidden, found.mlp, found.vocabulary, found.heads["head_dim"]) == (8, 10, 50, 4)


def test_configurations(tmp_path):
    tree = {"embed_tokens.weight": np.ones((9, 4), "float32"), "layers.0.fc1.weight": np.ones((6, 4), "float32")}
    nested = {"vocab_size": 9, "text_config": {"model_type": "llama", "num_hidden_layers": 1, "intermediate_size": 6}}
    (tmp_path / "m").mkdir()
    safetensors.numpy.save_file(tree, tmp_path / "m/model.safetensors")
    (tmp_path / "m/config.json").write_text(json.dumps(nested))
    for found in (
        pm.anatomy(pm.open(tmp_path / "m")),
        pm.anatomy(tree, tmp_path / "m"),
        pm.anatomy(tree, str(tmp_path / "m/config.json")),
        pm.anatomy(tree, nested),
        pm.anatomy(
            tree, transformers.GemmaConfig(num_hidden_layers=1, vocab_size=9, intermediate_size=6, hidden_size=4)
        ),
    ):
        assert (found.hidden, found.mlp, found.vocabulary, found.layers["count"]) == (4, 6, 9, 1)
    with pytest.raises(CannotRead, match=r"none/config.json"):
        pm.anatomy(tree, tmp_path / "none/config.json")
    (tmp_path / "m/config.json").write_text("{")
    with pytest.raises(BadCheckpoint):
        pm.anatomy(pm.open(tmp_path / "m"))


def test_quantised_weights_have_their_own_shapes():
    packed = {"weight_packed": np.zeros((6, 1), "int32"), "weight_scale": np.ones((6, 1), "float32")}
    layer = {"mlp": {"up_proj": packed}, "attn": {"o_proj": {"weight": np.ones((8, 12))}}}
    found = pm.anatomy({"layers": [layer] * 2}, {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 3})
    assert (found.groups, found.mlp, found.heads["head_dim"]) == ({"int4": 2}, 6, 4)


def test_the_command(tmp_path):
    model, _ = row("qwen3_next")
    model.to_empty(device="cpu").save_pretrained(tmp_path / "m")
    run = CliRunner().invoke(cli, ["show", str(tmp_path / "m"), "--anatomy", "--html", str(tmp_path / "page.html")])
    assert run.exit_code == 0, run.output
    assert "layers      count: 4, kinds: 3 linear_attention, full_attention, where: model.layers\n" in run.stdout
    page = (tmp_path / "page.html").read_text()
    assert "full_attention" in page
    run = CliRunner().invoke(cli, ["show", str(tmp_path / "m"), "--anatomy", "--json"])
    assert json.loads(run.stdout) == pm.anatomy(pm.open(tmp_path / "m")).to_dict()
    assert CliRunner().invoke(cli, ["show", str(tmp_path / "m"), "--html", "x.html"]).exit_code == 2


def test_experts():
    model, _ = row("qwen3_next")
    found = pm.anatomy(model).experts
    where = [f"model.layers.{layer}.mlp" for layer in range(4)]
    assert (found["count"], found["top_k"], found["storage"], found["where"]) == (4, 2, "fused", where)
    assert "gate/weight" in found["router"] and "shared_expert" in found["shared"]
    assert pm.anatomy(row("deepseek_v3")[0]).experts["where"] == [f"model.layers.{layer}.mlp" for layer in (1, 2, 3)]
    gaps = {f"layers.0.experts.{expert}.w1.weight": np.ones((2, 2)) for expert in (0, 2)}
    assert pm.anatomy(gaps).experts is None
