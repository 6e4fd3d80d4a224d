"""Sizes: the widths and counts of a model, by its configuration and the shapes of its leaves."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from paramend.anatomy.beside import EMBEDDINGS, in_layer
from paramend.anatomy.entries import words
from paramend.leaves.paths import number_of

# Size → the keys that say it, the first of which counts; `{side}` is "encoder" or "decoder".
KEYS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "d_model", "n_embd", "embed_dim", "emb_dim", "dim", "model_dim", "embedding_length"),
    "mlp": (
        *("{side}_ffn_dim", "intermediate_size", "d_ff", "ffn_dim", "n_inner", "ffn_hidden_size"),
        "feed_forward_length",
    ),
    "heads": (
        *("{side}_attention_heads", "num_{side}_attention_heads", "num_attention_heads"),
        *("n_head", "n_heads", "num_heads", "attention_heads", "head_count"),
    ),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "head_count_kv"),
    "head_dim": ("head_dim", "d_kv", "kv_channels", "key_length"),
    "vocabulary": ("vocab_size",),
}
# Sections of a section that say some of its sizes, as in DBRX and in GGUF.
_INNER = ("attn_config", "ffn_config", "attention")
# Modules by what they have beside the residual width, in attention; in any module; outside of attention.
_MODULES = {
    ("outputs", True): words("o out_proj dense c_proj wo proj"),
    ("fused", True): words("qkv_proj qkv query_key_value c_attn Wqkv in_proj"),
    ("outputs", None): words("o_proj"),
    ("keys", None): words("k_proj key k wk v_proj value v wv"),
    ("wide", False): words("gate_proj up_proj fc1 w1 w3 c_fc wi wi_0 wi_1 dense_h_to_4h intermediate"),
    ("wide twice", False): words("gate_up_proj"),
}
_ATTENDS = re.compile(r"attn|attention|^q_proj$", re.IGNORECASE)
_OF_HEADS = re.compile(r"(?:q|k|query|key)_(?:layer)?norm")


class Leaf(NamedTuple):
    """The path of a leaf, piece by piece, and its shape."""

    path: tuple[str, ...]
    shape: tuple[int, ...]


def sizes_of(section: Mapping[str, Any], leaves: Iterable[Leaf], side: str = "") -> dict[str, int]:
    """Size → its value, by a section of a configuration or, if that does not say it, by shapes. Heads follow shapes.

    >>> layer = {"self_attn.o_proj": (8, 12), "self_attn.k_proj": (4, 8), "mlp.up_proj": (20, 8)}
    >>> leaves = [Leaf((*name.split("."), "weight"), shape) for name, shape in layer.items()]
    >>> sizes_of({"hidden_size": 8, "num_attention_heads": 3}, leaves)
    {'hidden': 8, 'mlp': 20, 'heads': 3, 'head_dim': 4, 'kv_heads': 1}
    """
    leaves = list(leaves)
    found = dict(_said(section, side))
    tables = [leaf for leaf in leaves if len(leaf.shape) == 2 and {*EMBEDDINGS} & {*leaf.path[-2:-1]}]
    if tables:
        vocabulary, hidden = min(tables, key=lambda leaf: in_layer(leaf.path)).shape
        found = {"vocabulary": vocabulary, "hidden": hidden} | found
    lengths: dict[str, list[int]] = {}
    for leaf in leaves:
        for name, length in _lengths(leaf, found.get("hidden", 0)):
            lengths.setdefault(name, []).append(length)
    if wide := _only([*lengths.get("wide", ()), *(length // 2 for length in lengths.get("wide twice", ()))]):
        found.setdefault("mlp", wide)
    heads = {name: found.pop(name, 0) for name in ("heads", "head_dim", "kv_heads")}
    attends = any(_ATTENDS.search(piece) for leaf in leaves for piece in leaf.path)
    return found | {name: size for name, size in _heads(section, lengths, **heads).items() if size and attends}


def _said(section: Mapping[str, Any], side: str) -> Iterator[tuple[str, int]]:
    parts = [section, *(section[key] for key in _INNER if isinstance(section.get(key), Mapping))]
    for name, keys in KEYS.items():
        values = (_whole(part.get(key.format(side=side))) for part in parts for key in keys)
        if (value := next((value for value in values if value is not None), None)) is not None:
            yield name, value


def _whole(value: Any) -> int | None:
    """A whole number, also one that a list repeats for each layer; None for anything else."""
    if isinstance(value, list | tuple) and value and all(one == value[0] for one in value):
        value = value[0]
    return value if type(value) is int else None


def _lengths(leaf: Leaf, hidden: int) -> Iterator[tuple[str, int]]:
    """What the axis beside the residual width may be, and its length."""
    path = [piece for piece in leaf.path if piece not in ("weight", "kernel") and number_of(piece) is None]
    module, shape = path[-1] if path else "", leaf.shape[-2:]
    attends = any(map(_ATTENDS.search, path[:-1]))
    if module == "dense" and not attends:  # as BERT has it
        module = path[-2] if len(path) > 1 else ""
    if _OF_HEADS.fullmatch(module) and len(shape) == 1:
        yield "of heads", shape[0]
    elif len(shape) == 2 and hidden in shape:
        for (name, where), modules in _MODULES.items():
            if module in modules and where in (attends, None):
                yield name, shape[0] if shape[1] == hidden else shape[1]


def _heads(
    section: Mapping[str, Any], lengths: Mapping[str, list[int]], heads: int, head_dim: int, kv_heads: int
) -> dict[str, int]:
    """How many heads there are, and their size, as the shapes have them."""
    inner, keys, fused = (lengths.get(name, []) for name in ("outputs", "keys", "fused"))
    latent = [section.get(key) or 0 for key in ("qk_nope_head_dim", "qk_rope_head_dim")]
    if all(latent) or section.get("v_head_dim"):  # keys have another size than values
        return {"heads": heads, "head_dim": sum(latent) or head_dim, "kv_heads": kv_heads or heads}
    dim = head_dim or lengths.get("of heads", [0])[0]
    if inner and not heads:
        heads = _only(inner) // dim if dim else 0
    elif inner and heads * dim not in inner:
        dim = _only(inner) // heads
    if keys and kv_heads * dim not in keys:
        kv_heads = _only(keys) // dim if dim else 0
    elif dim and heads and fused and (heads + 2 * kv_heads) * dim not in fused and not keys:
        kv_heads = max(_only(fused) // dim - heads, 0) // 2
    return {"heads": heads, "head_dim": dim, "kv_heads": kv_heads}


def _only(lengths: Sequence[int]) -> int:
    """The one that all are; 0 if layers differ."""
    return lengths[0] if len({*lengths}) == 1 else 0
