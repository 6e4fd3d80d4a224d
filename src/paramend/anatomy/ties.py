"""Ties: which weights are one, as configuration and names tell it: the head that is the embedding."""

from collections.abc import Iterator, Mapping
from typing import Any

from paramend.anatomy.beside import EMBEDDINGS, HEADS, WITH_HEAD, in_layer
from paramend.anatomy.entries import words

KEY = "tie_word_embeddings"
_WEIGHTS = ("weight", "kernel", "embedding")
# What a configuration that leaves the key out means by that, in transformers.
_TIED = words("""
    albert bart bert biogpt bloom cohere cohere2 deberta deberta-v2 distilbert electra falcon falcon_mamba gemma gemma2
    gemma3 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text gpt2 gpt_bigcode gpt_neo lfm2 mamba marian mbart
    modernbert mpt mt5 opt paligemma pegasus recurrent_gemma roberta smollm3 starcoder2 t5 umt5 whisper xglm xlm-roberta
""")
_UNTIED = words("""
    arcee bamba dbrx deepseek_v2 deepseek_v3 exaone4 falcon_h1 glm glm4 glm4_moe gpt_neox gpt_oss gptj granite
    granitemoe helium jamba llama llama4_text mamba2 minimax ministral mistral mixtral mllama_text_model nemotron
    nemotron_h olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen2_vl qwen3 qwen3_5 qwen3_5_text
    qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen3_vl seed_oss stablelm
""")
# Families in which the key does nothing, or also scales what the head reads.
_FORCED = words("t5 mt5 umt5 longt5 pop2piano switch_transformers udop t5gemma nemotron_h")
# Family → the head, where it is not `lm_head`, and the bias that is one with its own.
_NAMED = {
    **dict.fromkeys(("bert", "deberta", "deberta-v2"), ("cls.predictions.decoder", "cls.predictions.bias")),
    **dict.fromkeys(("roberta", "xlm-roberta"), ("lm_head.decoder", "lm_head.bias")),
    "albert": ("predictions.decoder", "predictions.bias"),
    "biogpt": ("output_projection", ""),
    "distilbert": ("vocab_projector", ""),
    "electra": ("generator_lm_head", ""),
    "modernbert": ("decoder", ""),
    "whisper": ("proj_out", ""),
}
# The families of which it is known that the key ties the head, and where it is.
KNOWN = (_TIED | _UNTIED) - _FORCED
Pieces = tuple[str, ...]
Paths = Mapping[int, Pieces]


def said(config: Mapping[str, Any]) -> bool | None:
    """Whether a configuration says that the head is the embedding, by its key or its family; None if neither tells.

    >>> said({"model_type": "llama"}), said({"model_type": "llama", "tie_word_embeddings": True}), said({})
    (False, True, None)
    """
    told = [part[KEY] for part in _parts(config) if part.get(KEY) is not None]
    kind = config.get("model_type")
    return bool(told[0]) if told else True if kind in _TIED else False if kind in _UNTIED else None


def saying(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """A configuration that says whether the head is the embedding, wherever it says so."""
    new = {**config, KEY: tied}
    for key, part in config.items():
        if isinstance(part, Mapping) and part.get(KEY) is not None and part in _parts(config):
            new[key] = {**part, KEY: tied}
    return new


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    yield from (part for key in ("text_config", "decoder") if isinstance(part := config.get(key), Mapping))


def ties_of(config: Mapping[str, Any], paths: Paths, shared: Mapping[int, int]) -> dict[Pieces, Pieces]:
    """Path of a weight that is another → the path of that one, as far as it is known; `shared` are those known to be.

    >>> paths = {0: ("model", "embed_tokens", "weight"), 1: ("model", "norm", "weight")}
    >>> ties_of({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, paths, {})
    {('lm_head', 'weight'): ('model', 'embed_tokens', 'weight')}
    """
    if shared:
        return {paths[n]: paths[one] for n, one in shared.items() if n != one}
    tied, stored = said(config), head_of(paths) is not None
    kinds = config.get("architectures")
    whole = isinstance(kinds, list) and bool(kinds) and str(kinds[0]).endswith(WITH_HEAD)
    if tied is False or not (tied or not stored) or not (stored or whole):
        return {}
    return tiable(config, paths)


def tiable(config: Mapping[str, Any], paths: Paths) -> dict[Pieces, Pieces]:
    """The same for the weights that are others where the head is the embedding, stored or not."""
    names, head = ("shared", *EMBEDDINGS, "embeddings"), head_of(paths)
    named = {n: path for n, path in paths.items() if path[-1] in _WEIGHTS and {*path[-2:-1]} & {*names}}
    embedding = min(named, key=lambda n: (in_layer(named[n]), names.index(named[n][-2])), default=None)
    if embedding is None:
        return {}
    of, (name, bias) = paths[embedding], _NAMED.get(str(config.get("model_type")), ("lm_head", ""))
    own, other = tuple(name.split(".")), tuple(bias.split("."))
    sides = ("encoder", "decoder") if of[-2:-1] == ("shared",) else ()
    found = {(*of[:-2], side, "embed_tokens", of[-1]): of for side in sides}
    found[(*own, of[-1]) if head is None else paths[head]] = of
    return found | ({(*own, "bias"): other} if other in paths.values() else {})


def head_of(paths: Paths) -> int | None:
    """The number of the weight of the head that gives logits; None if it is not stored."""
    named = {n: path[:-1] for n, path in paths.items() if path[-1] in _WEIGHTS}
    heads = [n for n, path in named.items() if path[-2:] in (("predictions", "decoder"), ("lm_head", "decoder"))]
    heads += [n for n, path in named.items() if HEADS.intersection(path[-1:])]
    return min(heads, key=lambda n: in_layer(named[n]), default=None)
