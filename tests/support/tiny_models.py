"""Tiny random models of every family, whose norms, gains and biases are random too."""

import torch
import transformers

from support.slow import slow_except

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 64}
VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
HEADS = BASE | {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# family → (configuration, model, what the configuration says)
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", BASE | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", HEADS | {"sliding_window": 4}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        BASE | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", HEADS),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", HEADS),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", HEADS | {"sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", HEADS | {"sliding_window": 4, "sliding_window_pattern": 2}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", BASE),
    "phi": ("PhiConfig", "PhiForCausalLM", BASE | {"num_key_value_heads": 4}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", BASE),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", BASE | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", HEADS | EXPERTS | {"decoder_sparse_step": 2}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2 | {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", BASE),
    "vit": ("ViTConfig", "ViTForImageClassification", VIT | {"image_size": 16, "patch_size": 4}),
}


FAMILIES = slow_except({"llama", "olmo2", "gpt2"}, MODELS)


def make(family, dtype=torch.float32, **changes):
    """A model of a family, in evaluation mode."""
    config, model, says = MODELS[family]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**says | changes))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    return made.to(dtype).eval()


def kind(family):
    return getattr(transformers, MODELS[family][1])


def loaded(family, folder):
    """The model of a folder, in evaluation mode, each parameter in memory of its own.

    As transformers gives them, parameters lie in the mapped file, at odd addresses, and on some processors a product
    of matrices rounds otherwise there.
    """
    return settled(kind(family).from_pretrained(folder))


def settled(model):
    """The model in evaluation mode, each parameter copied to where torch would put it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def logits(model, family):
    generator = torch.Generator().manual_seed(1)
    if family == "vit":
        return model(torch.randn(2, 3, 16, 16, generator=generator).to(model.dtype)).logits
    return model(torch.randint(2, 64, (2, 12), generator=generator)).logits


def generated(model):
    prompt = torch.randint(2, 64, (2, 5), generator=torch.Generator().manual_seed(2))
    return model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True)
