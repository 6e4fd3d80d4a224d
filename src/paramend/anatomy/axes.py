"""Axes: what each axis of a leaf counts (the residual width, heads, the vocabulary ...), by the names of modules.

Names say what an axis may be, and sizes whether it is: an axis of another length is of no known kind.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from paramend.anatomy.beside import EMBEDDINGS, HEADS
from paramend.leaves.paths import number_of

# What lies along an axis: sizes of `sizes.KEYS`, one after the other, each in units of equal length; () is unknown.
# A fused projection of queries, keys and values has ("heads", "kv_heads", "kv_heads"), each head head_dim rows.
Axis: TypeAlias = tuple[str, ...]
_R, _H, _K, _M, _V, _E = (("hidden",), ("heads",), ("kv_heads",), ("mlp",), ("vocabulary",), ("experts",))


def _rows(*rows: tuple[str, Axis, Axis]) -> dict[str, tuple[Axis, Axis]]:
    return {name: (out, into) for names, out, into in rows for name in names.split()}


# Module → what its outputs and its inputs count.
_ANYWHERE = _rows(
    ("q_proj query q wq q_b_proj sinks", _H, _R),
    ("k_proj key k wk v_proj value v wv kv_b_proj", _K, _R),
    ("qkv_proj qkv query_key_value c_attn Wqkv", (*_H, *_K, *_K), _R),
    ("o_proj", _R, _H),
    ("gate_proj up_proj fc1 w1 w3 c_fc wi wi_0 wi_1 dense_h_to_4h", _M, _R),
    ("gate_up_proj", (*_M, *_M), _R),
    ("down_proj fc2 w2 dense_4h_to_h", _R, _M),
    ("gate router e_score_correction_bias", _E, _R),
    (" ".join((*EMBEDDINGS, *HEADS, "embeddings", "token_embedding", "decoder")), _V, _R),
    ("embed_tokens_per_layer", ("layer_vocabulary",), ()),
    ("wpe embed_positions position_embedding position_embeddings token_type_embeddings cls_token", (), _R),
    ("class_embedding patch_embedding projection", _R, ()),
    ("in_proj in_proj_qkvz in_proj_ba in_proj_qkv in_proj_z in_proj_a in_proj_b output_gate", (), _R),
    ("q_a_proj kv_a_proj_with_mqa shared_expert_gate classifier score", (), _R),
    ("out_proj", _R, ()),
)
# The same for names that mean something else in attention.
_ATTENTION = _rows(("o out_proj dense c_proj wo proj", _R, _H), ("in_proj", (*_H, *_K, *_K), _R))
_OTHERS = _rows(("c_proj wo", _R, _M))
ATTENDS = re.compile(r"attn|attention|^q_proj$", re.IGNORECASE)
_NORM = re.compile(r"norm|^ln_|layrnorm", re.IGNORECASE)
_HEAD_NORM = re.compile(r"^(q|k|query|key)_(layer)?norm$")
_INSIDE = {"weight", "kernel", "bias", "scale", "embedding"}  # leaves of a module; others are named like one
# Families whose projections are stored (in, out), as Conv1D does.
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder")


def axes_of(
    path: Sequence[str], shape: Sequence[int], sizes: Mapping[str, int], *, transposed: bool = False
) -> tuple[Axis, ...]:
    """What each axis of a leaf counts.

    Args:
        path: the pieces of its path.
        shape: its shape.
        sizes: those of the model that are known, by the names of `sizes.KEYS`.
        transposed: whether projections are stored (in, out).

    >>> sizes = {"hidden": 8, "heads": 4, "kv_heads": 2, "head_dim": 2, "mlp": 6}
    >>> axes_of(("attn", "qkv_proj", "weight"), (16, 8), sizes)
    (('heads', 'kv_heads', 'kv_heads'), ('hidden',))
    >>> axes_of(("mlp", "down_proj", "kernel"), (6, 8), sizes), axes_of(("norm", "scale"), (8,), sizes)
    ((('mlp',), ('hidden',)), (('hidden',),))
    """
    out, into = proposed(path)
    inner = list(shape)
    stacked = is_stacked(path, shape)
    front: tuple[Axis, ...] = ((_E if sizes.get("experts") == inner.pop(0) else ()),) if stacked else ()
    if len(inner) == 1:
        return (*front, _fitting(out or into, inner[0], sizes if path[-1] != "sinks" else {**sizes, "head_dim": 1}))
    if len(inner) < 2:
        return (*front, *((),) * len(inner))
    between = ((),) * (len(inner) - 2)
    ways = [(out, *between, into), (into, *between, out)]
    if path[-1] == "kernel" or (transposed and out != _V):
        ways.reverse()
    fitted = [tuple(map(_fitting, way, inner, [sizes] * len(inner))) for way in ways]
    return (*front, *max(fitted, key=lambda way: sum(map(bool, way))))


def is_stacked(path: Sequence[str], shape: Sequence[int]) -> bool:
    """Whether the first axis of a leaf counts experts."""
    return "experts" in path and len(shape) > (1 if path[-1].endswith("bias") else 2)


def _module(path: Sequence[str]) -> str:
    """The name of the module that a leaf is of."""
    last = path[-1]
    if last not in _INSIDE or len(path) < 2:
        return last if last in _ANYWHERE else last.removesuffix("_bias")
    return path[-2] if number_of(path[-2]) is None or len(path) < 3 else path[-3]


def proposed(path: Sequence[str]) -> tuple[Axis, Axis]:
    """What the outputs and the inputs of a leaf's module may count, by its name."""
    module, attends = _module(path), any(map(ATTENDS.search, path[:-2]))
    found = (_ATTENTION if attends else _OTHERS).get(module) or _ANYWHERE.get(module)
    if module == "dense" and not attends:  # as BERT has it
        found = {"intermediate": (_M, _R), "output": (_R, _M), "transform": (_R, _R)}.get(
            path[-3] if len(path) > 2 else ""
        )
    if _HEAD_NORM.match(module):
        found = (_H if module[0] == "q" else _K), ()
    elif found is None and _NORM.search(module):
        found = _R, ()
    elif found is None and path[-1] == "bias":
        found = _V, ()  # of a head whose bias is a leaf of its own
    wide = (
        "expert_mlp"
        if "experts" in path
        else "shared_mlp"
        if any("shared_expert" in piece for piece in path)
        else "mlp"
    )
    out, into = (tuple(wide if name == "mlp" else name for name in axis) for axis in found or ((), ()))
    return out, into


def _fitting(axis: Axis, length: int, sizes: Mapping[str, int]) -> Axis:
    """An axis, if its length is that of what it may count."""
    if not axis or any(not sizes.get(name) for name in axis):
        return ()
    units, rest = divmod(length, sum(sizes[name] for name in axis))
    if axis[0] in ("heads", "kv_heads"):
        return axis if units and not rest and not units % sizes.get("head_dim", 1) else ()
    return axis if not rest and (units == 1 or (units == 2 and axis in (_M, ("expert_mlp",)))) else ()
