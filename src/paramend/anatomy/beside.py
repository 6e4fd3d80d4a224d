"""What the configuration beside the weights says of them: blocks after the layers, tied heads.

A damaged one says nothing here: whoever needs it reports it.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from paramend.anatomy.sections import MTP, config_beside, counted
from paramend.formats.source import Source
from paramend.leaves.leaves import Index
from paramend.leaves.paths import Names, number_of, text_of

# How families name the two modules that may share one weight.
HEADS = {"lm_head", "embed_out", "proj_out", "output_projection", "vocab_projector", "pred_layer", "generator_lm_head"}
_LAST_HEADS = {"output", "decoder"}  # heads if nothing but the name of the weight follows
EMBEDDINGS = (
    *("embed_tokens", "wte", "shared", "word_embeddings", "tok_embeddings", "embed_in", "tokens_embed", "token_embd"),
)
WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "Seq2Seq")


def in_layer(path: tuple[str, ...]) -> bool:
    """Whether a path leads into a layer or a block: those that predict further tokens hold copies of tables."""
    return any(number_of(piece) is not None or piece in MTP for piece in path)


def mark_blocks(source: Source, path: Path) -> None:
    """Mark the blocks among the numbered layers of a checkpoint, so that positions such as `[-1]` do not count them."""
    own = getattr(source, "configuration", None)
    config = config_beside(path) if own is None else json.loads(own)
    for layers, blocks in dict.fromkeys(counted(config)):
        for place in list(_places(source.index.names, (), layers, blocks)):
            source.index.mark(place, layers)


def _places(names: Names, path: tuple[str, ...], layers: int, blocks: int) -> Iterator[tuple[str, ...]]:
    numbers: set[int] = set()
    for label, child in names.items():
        if type(child) is not int:
            text = text_of(label)
            number = number_of(text)
            if number is None:
                yield from _places(child, (*path, text), layers, blocks)
            else:
                numbers.add(number)
    if path and {layers - 1, layers} <= numbers and max(numbers) < layers + blocks:
        yield path


def absent_head(text: str, index: Index, path: Path) -> tuple[str, str] | None:
    """Why a head that was typed is not in a checkpoint, and the path of the weight that it shares; None if unknown."""
    pieces = [piece for piece in re.split(r"[./]", text) if piece and piece.strip("*")]
    head = next((piece for piece in pieces if piece in HEADS), None)
    if head is None and len(pieces) > 1 and pieces[-2] in _LAST_HEADS:
        head = pieces[-2]
    by_name: dict[tuple[str, ...], int] = {}
    for number in sorted(index.numbers, key=lambda number: in_layer(index.pieces(number))):
        by_name.setdefault(index.pieces(number)[-2:-1], number)
    shared = next((by_name[name,] for name in EMBEDDINGS if (name,) in by_name), None)
    if head is None and pieces[-2:-1] == ["embed_tokens"] and ("shared",) in by_name:
        head, shared = "embed_tokens", by_name["shared",]  # of an encoder or a decoder
    if head is None or shared is None:
        return None
    config = config_beside(path)
    inner, kinds = config.get("text_config"), config.get("architectures")
    tied = config.get("tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None)
    kinds = kinds if isinstance(kinds, list) and kinds else [""]
    if tied is False or (config and tied is None and not str(kinds[0]).endswith(WITH_HEAD)):
        return None
    weight = index.path(shared)
    if tied:
        return f"the {head} is tied to {weight} (tie_word_embeddings in config.json)", weight
    family = config.get("model_type")
    return f"the {head} is not stored, as in {f'{family} ' if family else ''}models that tie it to {weight}", weight
