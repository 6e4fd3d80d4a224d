"""Heads that are no leaves: a model whose head shares the weight of its embedding stores that weight once."""

import re
from pathlib import Path

from paramend.anatomy.sections import config_beside
from paramend.leaves.leaves import Index

# How families name the two modules that may share one weight.
_HEADS = {"lm_head", "embed_out", "proj_out", "output_projection", "vocab_projector", "pred_layer", "generator_lm_head"}
_LAST_HEADS = {"output", "decoder"}  # heads if nothing but the name of the weight follows
_EMBEDDINGS = ("embed_tokens", "wte", "shared", "word_embeddings", "tok_embeddings", "embed_in", "tokens_embed")
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "Seq2Seq")


def absent_head(text: str, index: Index, folder: Path) -> tuple[str, str] | None:
    """Why a head that was typed is not in a checkpoint, and the path of the weight that it shares; None if unknown."""
    pieces = [piece for piece in re.split(r"[./]", text) if piece and piece.strip("*")]
    head = next((piece for piece in pieces if piece in _HEADS), None)
    if head is None and len(pieces) > 1 and pieces[-2] in _LAST_HEADS:
        head = pieces[-2]
    by_name = {index.pieces(number)[-2:-1]: number for number in reversed(index.numbers)}
    shared = next((by_name[name,] for name in _EMBEDDINGS if (name,) in by_name), None)
    if head is None and pieces[-2:-1] == ["embed_tokens"] and ("shared",) in by_name:
        head, shared = "embed_tokens", by_name["shared",]  # of an encoder or a decoder
    if head is None or shared is None:
        return None
    config = config_beside(folder)
    inner, kinds = config.get("text_config"), config.get("architectures")
    tied = config.get("tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None)
    kinds = kinds if isinstance(kinds, list) and kinds else [""]
    if tied is False or (config and tied is None and not str(kinds[0]).endswith(_WITH_HEAD)):
        return None
    path = index.path(shared)
    if tied:
        return f"the {head} is tied to {path} (tie_word_embeddings in config.json)", path
    family = config.get("model_type")
    return f"the {head} is not stored, as in {f'{family} ' if family else ''}models that tie it to {path}", path
