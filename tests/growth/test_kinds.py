"""Models whose configurations tell the kinds of layers by their numbers: logits of what transformers loads.

The reference is the model in memory with its list of layers reordered, which needs no configuration of ours.
"""

import copy
import json

import pytest
import torch
import transformers

import paramend as pm
from paramend.errors import Unsupported
from support.tiny_models import settled

transformers.utils.logging.set_verbosity_error()
pytestmark = [pytest.mark.slow, pytest.mark.numeric]
BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 3}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False}
PERIODS = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
LATENT |= {
    "head_dim": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
LLAMA4 = {"interleave_moe_layer_step": 2, "attention_chunk_size": 4, "no_rope_layer_interval": 2}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 2}
LINEAR = {f"linear_{name}": 2 for name in ("num_key_heads", "num_value_heads", "conv_kernel_dim")}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
# family → (configuration, what it says, keys that older files leave out, layers)
MODELS = {
    "cohere2": ("Cohere2", WINDOW | {"sliding_window_pattern": 2}, ["layer_types"], 5),
    "olmo3": ("Olmo3", WINDOW, ["layer_types"], 5),
    "gpt_oss": ("GptOss", WINDOW | EXPERTS, ["layer_types"], 5),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}, ["layer_types", "no_rope_layers"], 5),
    "exaone4": ("Exaone4", WINDOW | {"sliding_window_pattern": 2}, ["layer_types"], 5),
    "qwen3_next": ("Qwen3Next", EXPERTS | LINEAR | {"shared_expert_intermediate_size": 16}, ["layer_types"], 5),
    "lfm2": ("Lfm2", {"full_attn_idxs": [1, 3]}, ["layer_types"], 5),
    "minimax": ("MiniMax", EXPERTS | {"block_size": 4}, ["layer_types"], 5),
    "mllama": ("MllamaText", {"cross_attention_layers": [1, 3]}, [], 5),
    "llama4": ("Llama4Text", EXPERTS | LLAMA4, ["layer_types", "no_rope_layers", "moe_layers"], 5),
    "jamba": ("Jamba", MAMBA | PERIODS | EXPERTS, [], 4),
    "ernie4_5_moe": ("Ernie4_5_Moe", EXPERTS | ERNIE, [], 5),
    "deepseek_v3": ("DeepseekV3", EXPERTS | LATENT, [], 5),
    "modernbert": ("ModernBert", {"global_attn_every_n_layers": 2, "local_attention": 4}, ["layer_types"], 5),
}
ORDERS = {"drop": [0, 2, 3, 4], "stack": [0, 1, 2, 3, 4] * 2}
# No numbers give these orders their kinds, and the families take no lists; ModernBERT has no norm in its first layer.
REFUSED = {("jamba", 3), ("ernie4_5_moe", 10), ("deepseek_v3", 10), ("modernbert", 10)}


def logits(model):
    torch.manual_seed(3)
    tokens = torch.randint(3, 64, (2, 9))
    more = {"cross_attention_states": torch.randn(2, 3, 32)} if "Mllama" in type(model).__name__ else {}
    with torch.no_grad():
        return model(tokens, **({} if "Bert" in type(model).__name__ else {"use_cache": False}), **more).logits


def reordered(model, order):
    """The model with its layers in an order, and its lists too."""
    new = copy.deepcopy(model)
    inner = new.get_submodule("model") if hasattr(new, "model") else new
    inner.layers = torch.nn.ModuleList([inner.layers[source] for source in order])
    for key in ("layer_types", "no_rope_layers", "layers_block_type"):
        held = vars(new.config).get(key)
        if held is not None:
            setattr(new.config, key, [held[source] for source in order])
    numbers = vars(new.config).get("cross_attention_layers")
    if numbers is not None:
        new.config.cross_attention_layers = [place for place, source in enumerate(order) if source in numbers]
        inner.cross_attention_layers = new.config.cross_attention_layers
    new.config.num_hidden_layers = len(order)
    return new


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", MODELS)
def test_logits(family, order, tmp_path):
    name, says, left_out, n = MODELS[family]
    order = [source for source in ORDERS[order] if source < n]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**BASE | {"num_hidden_layers": n} | says)
    kind = getattr(transformers, f"{name}ForMaskedLM" if "Bert" in name else f"{name.removesuffix('Text')}ForCausalLM")
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({key: one for key, one in json.loads(file.read_text()).items() if key not in left_out}))
    model = settled(kind.from_pretrained(tmp_path / "model", attn_implementation="eager"))
    with pm.open(tmp_path / "model") as checkpoint:
        try:
            pm.deepen(checkpoint, layers="model.layers[*]", order=order)[0].save(tmp_path / "out")
        except Unsupported:
            assert (family, len(order)) in REFUSED
            return
    assert (family, len(order)) not in REFUSED
    loaded, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    assert torch.equal(logits(settled(loaded)), logits(reordered(model, order)))
