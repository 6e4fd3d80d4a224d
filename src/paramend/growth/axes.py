"""Axes: which axes of a model each of its leaves has, as rows of names, for the families of transformers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from paramend.anatomy.beside import WITH_HEAD
from paramend.anatomy.sizes import KEYS as SIZES
from paramend.anatomy.ties import said
from paramend.errors import BadArgument, SpecMismatch, Unsupported
from paramend.leaves.leaves import Leaves
from paramend.leaves.paths import number_of
from paramend.reports import wording
from paramend.resize.widths import Use

# Axis → the keys of a configuration that hold its length. The first one counts; others of that value follow.
KEYS: Mapping[str, tuple[str, ...]] = {
    **{axis: SIZES[axis] for axis in ("mlp", "heads", "kv_heads", "vocabulary")},
    "hidden": (*SIZES["hidden"], "pooler_output_size", "word_embed_proj_dim"),
    "expert_mlp": ("moe_intermediate_size",),
    "shared_mlp": ("shared_expert_intermediate_size",),
}


def _rows(text: str) -> dict[str, str]:
    pairs = (row.split(":") for row in text.split(";"))
    return {name: axes.strip() for names, axes in pairs for name in names.split()}


# The end of a module's path, without numbers: its axes, in the order in which the weight has them: `<` before those
# that it reads from, `+` between axes in a row, `*3` where a place has as many units, `#` where a head has one. Of
# several ends the longest one counts. A row of one axis is a norm. Axes that no configuration counts stay.
_COMMON = _rows("""
    embed_tokens: vocabulary hidden; lm_head: vocabulary <hidden; score classifier qa_outputs: labels <hidden;
    input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm
    post_self_attn_layernorm post_mlp_layernorm norm: hidden;
    q_proj: heads <hidden; k_proj v_proj: kv_heads <hidden; o_proj self_attn.dense: hidden <heads;
    qkv_proj: heads+kv_heads+kv_heads <hidden; q_norm k_norm q_layernorm k_layernorm: head;
    gate_proj up_proj fc1 c_fc: mlp <hidden; down_proj fc2 c_proj: hidden <mlp; gate_up_proj: mlp+mlp <hidden
""")
_WHOLE_NORMS = _rows("q_norm: heads; k_norm: kv_heads")
_MIXTURE = _rows("""
    gate: experts <hidden; shared_expert_gate: one <hidden;
    experts.w1 experts.w3: mlp <hidden; experts.w2: hidden <mlp;
    experts.gate_up_proj: experts mlp+mlp <hidden; experts.down_proj: experts hidden <mlp
""")
_FINE = _MIXTURE | _rows("""
    shared_expert.gate_proj shared_expert.up_proj: shared_mlp <hidden; shared_expert.down_proj: hidden <shared_mlp;
    experts.gate_up_proj: experts expert_mlp+expert_mlp <hidden;
    experts.gate_proj experts.up_proj: expert_mlp <hidden; experts.down_proj: experts hidden <expert_mlp
""")
_GPT2 = _rows("""
    wte: vocabulary hidden; wpe: positions hidden; ln_1 ln_2 ln_f: hidden;
    attn.c_attn: <hidden heads+heads+heads; attn.c_proj: <heads hidden; mlp.c_fc: <hidden mlp; mlp.c_proj: <mlp hidden
""")
_NEOX = _rows("""
    embed_in: vocabulary hidden; embed_out: vocabulary <hidden; final_layer_norm: hidden;
    query_key_value: heads*3 <hidden; attention.dense: hidden <heads;
    dense_h_to_4h: mlp <hidden; dense_4h_to_h: hidden <mlp
""")
_BERT = _rows("""
    word_embeddings: vocabulary hidden; position_embeddings token_type_embeddings: positions hidden;
    LayerNorm layer_norm: hidden; query key value: heads <hidden; attention.output.dense: hidden <heads;
    intermediate.dense: mlp <hidden; output.dense: hidden <mlp;
    pooler.dense transform.dense lm_head.dense classifier.dense: hidden <hidden;
    decoder lm_head predictions: vocabulary <hidden; classifier out_proj qa_outputs seq_relationship: labels <hidden
""")
_OPT = _rows("""
    embed_positions: positions hidden; self_attn_layer_norm final_layer_norm: hidden;
    k_proj v_proj: heads <hidden; out_proj: hidden <heads
""")
_VIT = _rows("""
    embeddings.cls_token embeddings.mask_token: one one hidden; embeddings.position_embeddings: one positions hidden;
    patch_embeddings.projection: hidden channels height width; layernorm_before layernorm_after layernorm: hidden;
    q_proj k_proj v_proj query key value: heads <hidden; attention.output.dense: hidden <heads;
    intermediate.dense: mlp <hidden; output.dense: hidden <mlp; pooler.dense: hidden <hidden
""")


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models."""

    models: tuple[str, ...]  # its model types in configurations
    modules: Mapping[str, str] = field(default_factory=dict)  # rows that come before the common ones
    norm: Literal["rms", "layer"] = "rms"  # whether norms subtract the mean
    final: str = "norm"  # the norm before the head
    one: bool = False  # whether norms multiply by 1 + their gains
    rooted: bool = False  # whether embeddings are multiplied by the root of the residual width
    # Whether the size of a head is the residual width over the number of heads, whatever else is said.
    fixed: bool = False
    # Whether the residual stream itself passes through norms, so that only copies keep what these see.
    post: bool = False


_LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite", "ernie4_5", "phi3", "glm", "glm4", "seed_oss")
FAMILIES = (
    Family((*_LLAMAS, "arcee", "exaone4")),
    Family(("mixtral",), _MIXTURE),
    Family(("qwen2_moe", "qwen3_moe"), _FINE),
    Family(("olmo2", "olmo3"), _WHOLE_NORMS),
    Family(("olmoe",), {**_MIXTURE, **_WHOLE_NORMS}),
    Family(("helium",), fixed=True),
    Family(("gemma", "gemma2", "gemma3_text"), one=True, rooted=True),
    Family(("starcoder2",), norm="layer"),
    Family(("cohere",), {"q_norm": "#heads head", "k_norm": "#kv_heads head"}, norm="layer"),
    Family(("nemotron",), norm="layer", one=True),
    Family(("stablelm",), norm="layer", fixed=True),
    Family(("phi",), {"final_layernorm": "hidden"}, norm="layer", final="final_layernorm"),
    Family(("gpt2",), _GPT2, norm="layer", final="ln_f", fixed=True),
    Family(("gpt_neox",), _NEOX, norm="layer", final="final_layer_norm", fixed=True),
    Family(("bert",), _BERT, norm="layer", final="transform.LayerNorm", fixed=True, post=True),
    Family(("roberta",), _BERT, norm="layer", final="lm_head.layer_norm", fixed=True, post=True),
    Family(("opt",), _OPT, norm="layer", final="decoder.final_layer_norm", fixed=True),
    Family(("vit",), _VIT, norm="layer", final="layernorm"),
)

_LEAVES = ("weight", "bias", "kernel", "scale")


@dataclass(frozen=True)
class Axes:
    """The axes of a model and of its leaves."""

    family: Family  # its row
    sizes: Mapping[str, int]  # axis → its length, with the size of a head
    uses: Mapping[int, tuple[Use, ...]]  # number of a leaf → its axes; leaves without are left as they are
    norms: frozenset[int]  # the numbers of gains and biases of norms
    final: frozenset[int]  # those of the norm before the head
    embeddings: frozenset[int]  # the numbers of embeddings of tokens, and of heads that are tied to them
    tied: bool  # whether the head is tied to the embedding
    # The numbers of projections whose outputs pass through norms of their own, of queries and keys.
    normed: frozenset[int] = frozenset()

    @classmethod
    def of(cls, leaves: Leaves, config: Mapping[str, Any]) -> "Axes":
        """The axes by a configuration and the names of leaves."""
        family = _family(config)
        sizes = _sizes(config)
        index = leaves.index
        rows = {number: _row(family, index.pieces(number)) for number in index.numbers}
        heads = {n for n, row in rows.items() if row == "vocabulary <hidden" and index.pieces(n)[-1] != "bias"}
        words = {number for number, row in rows.items() if row == "vocabulary hidden"}
        tied = _tied(leaves, config, words, heads)
        uses: dict[int, tuple[Use, ...]] = {}
        for number, row in rows.items():
            row = "vocabulary hidden" if tied and number in heads else row
            if row is None or leaves.spec(number).kind != "float":
                _check_left(leaves, number, row, sizes)
                continue
            uses[number] = _uses(row, leaves.spec(number).ndim, index.pieces(number)[-1] == "bias", sizes)
            for axis, (use, length) in enumerate(zip(uses[number], leaves.spec(number).shape, strict=True)):
                if use.length(sizes) not in (None, length):
                    raise SpecMismatch(
                        f"axis {axis} of {index.path(number)} {leaves.spec(number)} should be {use.length(sizes):,} "
                        f"long by the configuration: {' + '.join(name for name, _ in use.parts)}"
                    )
        norms = frozenset(n for n in uses if " " not in str(rows[n]) and rows[n] != "head")
        final = frozenset(n for n in norms if _ends(index.pieces(n)[:-1], family.final))
        embeddings = frozenset(words | heads if tied else words)
        normed: frozenset[int] = frozenset()
        if any(piece.endswith(("q_norm", "q_layernorm")) for number in index.numbers for piece in index.pieces(number)):
            normed = frozenset(n for n in uses if {"q_proj", "k_proj"} & {*index.pieces(n)})
        return cls(family, sizes, uses, norms, final, embeddings, tied, normed)

    def has(self, axis: str) -> bool:
        return any(name == axis for uses in self.uses.values() for use in uses for name, _ in use.parts)


def _family(config: Mapping[str, Any]) -> Family:
    kind = config.get("model_type")
    found = next((row for row in FAMILIES if kind in row.models), None)
    if found is None:
        known = [model for row in FAMILIES for model in row.models]
        why = f"which axes a {kind!r} model has is not known; known are {', '.join(known)}"
        raise BadArgument(why, hint='a layer of any tree: pm.widen(tree, features={"params/Dense_0": 16})')
    return found


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for axis, keys in KEYS.items():
        known = [config[key] for key in keys if type(config.get(key)) is int]
        sizes |= {axis: known[0]} if known else {}
    if "hidden" not in sizes or "heads" not in sizes:
        raise BadArgument("the configuration has none of hidden_size, n_embd, num_attention_heads, n_head")
    sizes.setdefault("mlp", 4 * sizes["hidden"])  # n_inner of GPT-2
    sizes.setdefault("kv_heads", sizes["heads"])
    given = config.get("head_dim")
    return sizes | {"head": given if type(given) is int else sizes["hidden"] // sizes["heads"]}


def _ends(pieces: Sequence[str], end: str) -> bool:
    names = [piece for piece in pieces if number_of(piece) is None]
    return names[-end.count(".") - 1 :] == end.split(".")


def _row(family: Family, pieces: Sequence[str]) -> str | None:
    """The row of a leaf, by the longest end of its module's path."""
    module = pieces[:-1] if pieces[-1] in _LEAVES and len(pieces) > 1 else pieces
    names = [piece for piece in module if number_of(piece) is None]
    table = {**_COMMON, **family.modules}
    ends = (".".join(names[at:]) for at in range(max(len(names) - 3, 0), len(names)))
    return next((table[end] for end in ends if end in table), None)


def _uses(row: str, ndim: int, bias: bool, sizes: Mapping[str, int]) -> tuple[Use, ...]:
    texts = row.split()[-ndim or 9 :] if not bias else [text for text in row.split() if "<" not in text][:ndim]
    found = []
    for text in texts:
        parts = []
        for part in text.removeprefix("<").split("+"):
            name, _, times = part.partition("*")
            size = sizes["head"] if name in ("heads", "kv_heads") else 1
            parts.append((name.removeprefix("#"), int(times or 1) * size))
        found.append(Use(tuple(parts), text.startswith("<")))
    return tuple(found)


def _tied(leaves: Leaves, config: Mapping[str, Any], words: Iterable[int], heads: Iterable[int]) -> bool:
    """Whether the head is tied to the embedding: they are one leaf, or the configuration says so."""
    one = {leaves.ties.get(number, number) for number in words}
    if any(leaves.ties.get(number, number) in one for number in heads):
        return True
    told, kinds = said(config), config.get("architectures")
    with_head = str(kinds[0]).endswith(WITH_HEAD) if kinds else bool(told)
    return bool(hasattr(leaves, "path") and with_head and (told if heads else told is not False))


def _check_left(leaves: Leaves, number: int, row: str | None, sizes: Mapping[str, int]) -> None:
    """Raise for a leaf whose axes are not known, or which is not one of floats: masks and frequencies stay."""
    spec, pieces = leaves.spec(number), leaves.index.pieces(number)
    if row is not None:
        why = f"{leaves.index.path(number)} is {spec}, which cannot be widened"
        raise Unsupported(why, hint="pm.at(model, ...).cast(...) first")
    if spec.kind == "float" and pieces[-1] not in ("inv_freq", "masked_bias") and spec.ndim:
        why = f"which axes {leaves.index.path(number)} {spec} has is not known"
        raise BadArgument(why, hint=f"{wording.listing([f'{name}: {size}' for name, size in sizes.items()])} are known")
