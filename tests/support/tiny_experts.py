"""Tiny random mixtures of experts of transformers families."""

import torch
import transformers

from support.slow import slow_except

COUNT = 8
BASE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
_LOCAL = {"num_local_experts": COUNT, "num_experts_per_tok": 2}
_OWN = {"num_experts": COUNT, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_ROUTED = {
    "n_routed_experts": COUNT,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "n_group": 2,
    "topk_group": 1,
}
_LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
_LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_ERNIE = {"moe_num_experts": COUNT, "moe_k": 2, "moe_intermediate_size": 8, "moe_layer_start_index": 0}
_GEMMA4 = {
    "num_experts": COUNT,
    "top_k_experts": 2,
    "moe_intermediate_size": 8,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "global_head_dim": 8,
    "num_global_key_value_heads": 1,
}
_NEMOTRON = {"layers_block_type": ["moe", "attention"], "moe_shared_expert_intermediate_size": 8}

# family → (stem of its classes, what the configuration says)
FAMILIES = {
    "mixtral": ("Mixtral", _LOCAL),
    "qwen2_moe": ("Qwen2Moe", _OWN | {"shared_expert_intermediate_size": 8, "norm_topk_prob": False}),
    "qwen3_moe": ("Qwen3Moe", _OWN | {"norm_topk_prob": True, "mlp_only_layers": [0], "num_hidden_layers": 3}),
    "olmoe": ("Olmoe", {"num_experts": COUNT, "num_experts_per_tok": 2}),
    "gpt_oss": ("GptOss", _LOCAL | {"sliding_window": 8}),
    "deepseek_v2": ("DeepseekV2", _ROUTED | _LATENT | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3", _ROUTED | _LATENT),
    "glm4_moe": ("Glm4Moe", _ROUTED | {"n_group": 1, "norm_topk_prob": False}),
    "ernie4_5_moe": ("Ernie4_5_Moe", _ERNIE | {"moe_layer_end_index": 1}),
    "minimax_m2": ("MiniMaxM2", _LOCAL),
    "granitemoe": ("GraniteMoe", _LOCAL),
    "gemma4_text": ("Gemma4Text", _GEMMA4),
    "llama4_text": ("Llama4Text", _LOCAL | {"num_experts_per_tok": 1, "intermediate_size_mlp": 16}),
    "hunyuan_v1_moe": ("HunYuanMoEV1", {"num_experts": COUNT, "moe_topk": 2, "moe_intermediate_size": 8}),
    "nemotron_h": ("NemotronH", _ROUTED | _NEMOTRON | {"n_group": 1, "num_hidden_layers": 2}),
    "qwen3_next": ("Qwen3Next", _OWN | _LINEAR | {"shared_expert_intermediate_size": 8}),
}
CASES = slow_except({"mixtral", "deepseek_v3"}, FAMILIES)


def make(family, dtype=torch.float64, **changes):
    """A model of a family, in evaluation mode, whose parameters and buffers of routers are random."""
    stem, says = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{stem}Config")(**BASE | says | changes)
    made = getattr(transformers, f"{stem.removesuffix('Text')}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for name, value in made.state_dict().items():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape) * (0.1 if "norm" in name else 0.3))
    return made


TOKENS = torch.randint(2, 30, (2, 7), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits
