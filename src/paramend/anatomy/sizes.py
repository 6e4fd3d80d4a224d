"""Sizes: what a configuration calls the widths and counts of a model, and where it says them."""

from collections.abc import Iterator, Mapping
from typing import Any

from paramend.anatomy.counts import EXPERTS
from paramend.anatomy.sections import part_at

Place = tuple[str, ...]
# Size → the keys that say it, the first of which counts; `{side}` is "encoder" or "decoder".
KEYS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "model_dim"),
    "mlp": ("{side}_ffn_dim", "intermediate_size", "d_ff", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "heads": ("{side}_attention_heads", "num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "kv_n_heads"),
    "head_dim": ("head_dim", "d_kv"),
    "vocabulary": ("vocab_size",),
    "layer_vocabulary": ("vocab_size_per_layer_input",),
    "experts": EXPERTS,
    "expert_mlp": ("moe_intermediate_size", "ffn_hidden_size"),
    "shared_mlp": ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "moe_k"),
}
# Sections of a section that say some of its sizes, as in DBRX.
_INNER = ("attn_config", "ffn_config")


def sizes_of(config: Mapping[str, Any], place: Place = (), side: str = "") -> dict[str, tuple[int, list[Place]]]:
    """Size → its value and the keys that say it, in the section at a place and the outer ones that repeat it.

    Sizes that are not said, and lists of different ones, are left out.

    >>> sizes_of({"vocab_size": 9, "text_config": {"vocab_size": 9, "n_embd": 4}}, ("text_config",))
    {'hidden': (4, [('text_config', 'n_embd')]), 'vocabulary': (9, [('text_config', 'vocab_size'), ('vocab_size',)])}
    """
    found: dict[str, tuple[int, list[Place]]] = {}
    places = [place[:depth] for depth in range(len(place), -1, -1)]
    for name, keys in KEYS.items():
        said = [
            (whole(part[key]), (*at, key))
            for at in places
            for part, at in _parts(config, at)
            for key in _named(keys, side)
            if key in part
        ]
        values = [(value, at) for value, at in said if value is not None]
        if values:
            found[name] = values[0][0], [at for value, at in values if value == values[0][0]]
    return found


def _named(keys: tuple[str, ...], side: str) -> list[str]:
    return [key.format(side=side) for key in keys if side or "{" not in key]


def _parts(config: Mapping[str, Any], place: Place) -> Iterator[tuple[Mapping[str, Any], Place]]:
    part = part_at(config, place)
    yield part, place
    yield from ((part[key], (*place, key)) for key in _INNER if isinstance(part.get(key), Mapping))


def whole(value: Any) -> int | None:
    """A whole number, also one that a list repeats for each layer; None for anything else."""
    if isinstance(value, list | tuple) and value and all(one == value[0] for one in value):
        value = value[0]
    return value if type(value) is int else None
