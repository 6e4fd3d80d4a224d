"""What configuration, names and shapes say of a model, family by family, as transformers builds them."""

import json

import pytest
import torch
import transformers

import paramend as pm
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
    tied = {name: of for name, of in model.all_tied_weights_keys.items()}
    assert (found["ties"] or {}) == tied


@pytest.mark.parametrize("family", MODELS)
def test_families_of_growth(family):
    config, model, says = MODELS[family]
    built = on_meta(model, getattr(transformers, config)(**says))
    found = pm.anatomy(built).to_dict()
    assert sizes(found) == _TINY | _OWN.get(family, {})
    assert len(built.get_submodule(found["layers"]["where"])) == 3
