"""Sizes: what a configuration calls the widths and counts of a model, and where it says them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from paramend.anatomy.axes import ATTENDS, Axis, is_stacked, proposed
from paramend.anatomy.counts import EXPERTS
from paramend.anatomy.sections import part_at

Place = tuple[str, ...]
Leaf = tuple[tuple[str, ...], tuple[int, ...]]  # the path of a leaf and its shape
_HEADS = ("heads", "head_dim", "kv_heads")
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


# ---- sizes by shapes ---------------------------------------------------------------------------------------------


def measured(said: Mapping[str, int], section: Mapping[str, Any], leaves: Sequence[Leaf]) -> dict[str, int]:
    """Sizes, those that the configuration does not say by the shapes of leaves; heads are those of the shapes.

    Args:
        said: the sizes that are said.
        section: the section of the configuration that says them.
        leaves: paths and shapes.
    """
    found = dict(said)
    for path, shape in leaves:
        if proposed(path) == (("vocabulary",), ("hidden",)) and len(shape) == 2:
            found.setdefault("vocabulary", shape[0])
            found.setdefault("hidden", shape[1])
    lengths: dict[Axis, list[int]] = {}
    for path, shape in leaves:
        for axis, length in _beside_hidden(path, shape, found.get("hidden", 0)):
            lengths.setdefault(axis, []).append(length)
    for name in ("mlp", "expert_mlp", "shared_mlp"):
        for axis in ((name,), (name, name)):
            if axis in lengths:
                found.setdefault(name, lengths[axis][0] // len(axis))
    attends = any(ATTENDS.search(piece) for path, _ in leaves for piece in path)
    return _with_heads(found, lengths, section) if attends else {k: n for k, n in found.items() if k not in _HEADS}


def _beside_hidden(path: Place, shape: tuple[int, ...], hidden: int) -> Iterator[tuple[Axis, int]]:
    """What the axis beside the residual width may count, and its length; queries may be gated, and tell nothing."""
    shape = shape[1:] if is_stacked(path, shape) else shape
    out, into = proposed(path)
    if len(shape) == 2 and hidden in shape and ("hidden",) in (out, into) and out != ("heads",):
        yield (into if out == ("hidden",) else out), (shape[0] if shape[1] == hidden else shape[1])
    elif out in (("heads",), ("kv_heads",)) and len(shape) == 1 and path[-1] != "bias":
        yield ("head_dim",), shape[0]  # a norm of heads


def _with_heads(sizes: dict[str, int], lengths: Mapping[Axis, list[int]], section: Mapping[str, Any]) -> dict[str, int]:
    """Sizes with those of heads as the shapes have them."""
    heads, dim, kv = (sizes.pop(name, 0) for name in _HEADS)
    inner, keys, fused = (
        lengths.get(axis, []) for axis in (("heads",), ("kv_heads",), ("heads", "kv_heads", "kv_heads"))
    )
    latent = [section.get(key) or 0 for key in ("qk_nope_head_dim", "qk_rope_head_dim")]
    if all(latent):  # keys have another size than values
        dim, kv = sum(latent), kv or heads
    elif inner or keys or fused:
        dim = dim or lengths.get(("head_dim",), [0])[0]
        heads = heads or (inner[0] // dim if dim and inner else 0)
        if heads and inner and heads * dim not in inner:
            dim = inner[0] // heads
        if dim and keys:
            kv = keys[0] // dim
        elif dim and heads and fused:
            kv = (fused[0] // dim - heads) // 2
    return sizes | {name: size for name, size in zip(_HEADS, (heads, dim, kv), strict=True) if size}
