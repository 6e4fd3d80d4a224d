"""Ties: which weights are one, as configuration and names tell it: the head that is the embedding."""

from collections.abc import Mapping
from typing import Any

from paramend.anatomy.beside import EMBEDDINGS, HEADS, WITH_HEAD
from paramend.anatomy.entries import words

KEY = "tie_word_embeddings"
_WEIGHTS = ("weight", "kernel", "embedding")
# What a configuration that leaves the key out means by that, in transformers.
_TIED = words(
    """
    albert bart bert biogpt bloom cohere cohere2 deberta deberta-v2 distilbert electra falcon falcon_mamba gemma gemma2
    gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gpt2 gpt_bigcode gpt_neo lfm2 mamba marian mbart
    modernbert mpt mt5 opt paligemma pegasus recurrent_gemma roberta smollm3 starcoder2 t5 umt5 whisper xglm xlm-roberta
    zamba zamba2
    """
)
_UNTIED = words(
    """
    arcee bamba dbrx deepseek_v2 deepseek_v3 exaone4 falcon_h1 glm glm4 glm4_moe gpt_neox gpt_oss gptj granite
    granitemoe helium jamba llama llama4 llama4_text mamba2 minimax ministral mistral mixtral mllama_text_model nemotron
    nemotron_h olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_text
    qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen3_vl seed_oss stablelm
    """
)
# Heads with names of their own; others are `lm_head.weight`.
_NAMED = {
    "whisper": "proj_out.weight",
    "gpt_neox": "embed_out.weight",
    **dict.fromkeys(("bert", "electra"), "cls.predictions.decoder.weight"),
    **dict.fromkeys(("roberta", "xlm-roberta"), "lm_head.decoder.weight"),
}


def said(config: Mapping[str, Any]) -> bool | None:
    """Whether a configuration says that the head is the embedding, by its key or its family; None if neither tells.

    >>> said({"model_type": "llama"}), said({"model_type": "llama", "tie_word_embeddings": True}), said({})
    (False, True, None)
    """
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        if part.get(KEY) is not None:
            return bool(part[KEY])
    kind = config.get("model_type")
    return True if kind in _TIED else False if kind in _UNTIED else None


def ties_of(
    config: Mapping[str, Any], paths: Mapping[int, tuple[str, ...]], shared: Mapping[int, int], separator: str
) -> dict[str, str] | None:
    """Path of a weight that is another → the path of that one; None if there are none, or it is not known.

    Args:
        config: the configuration; {} if there is none.
        paths: number → path of each leaf.
        shared: number → the first number of the same leaf, where leaves are known to be one.
        separator: that between the keys of paths.

    >>> paths = {0: ("model", "embed_tokens", "weight"), 1: ("model", "norm", "weight")}
    >>> ties_of({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, paths, {}, ".")
    {'lm_head.weight': 'model.embed_tokens.weight'}
    """
    found = {separator.join(paths[n]): separator.join(paths[one]) for n, one in shared.items() if n != one}
    embedding, head = embedding_of(paths), head_of(paths)
    if shared or embedding is None:
        return found or None
    to, tied = separator.join(paths[embedding]), said(config)
    if head is not None:
        return {separator.join(paths[head]): to} if tied else None
    kinds = config.get("architectures")
    if tied is False or not isinstance(kinds, list) or not kinds or not str(kinds[0]).endswith(WITH_HEAD):
        return None
    if paths[embedding][-2] == "shared":
        found = {separator.join((side, "embed_tokens", "weight")): to for side in ("encoder", "decoder")}
    return {**found, _NAMED.get(str(config.get("model_type")), "lm_head.weight"): to}


def embedding_of(paths: Mapping[int, tuple[str, ...]]) -> int | None:
    """The number of the embedding of tokens; that of the text model, if there are several."""
    named = {name: n for n, path in [*paths.items()][::-1] for name in path[-2:-1] if path[-1] in _WEIGHTS}
    return next((named[name] for name in EMBEDDINGS if name in named), None)


def head_of(paths: Mapping[int, tuple[str, ...]]) -> int | None:
    """The number of the weight of the head that gives logits; None if it is not stored."""
    ends = (("predictions", "decoder"), ("lm_head", "decoder"))
    named = [n for n, path in paths.items() if path[-1] in _WEIGHTS]
    inner = [n for n in named if paths[n][-3:-1] in ends]
    return next(iter([*inner, *(n for n in named if HEADS.intersection(paths[n][-2:-1]))]), None)
