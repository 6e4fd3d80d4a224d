"""Families of models, one row each: which parameters of a layer make it the identity."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from paramend.errors import BadArgument, Unsupported
from paramend.leaves.paths import number_of
from paramend.reports import wording

Pieces = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """How a family of models names the modules of a layer, and what makes a layer the identity.

    Names of modules are relative to the layer; `*` is a number, such as that of an expert.
    """

    name: str  # its name for `identity=`
    model_types: tuple[str, ...]  # its model types in Hugging Face configurations
    # The modules whose output is added to the residual stream. Their weights become `value`, their biases 0.
    writers: tuple[str, ...]
    others: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    # The weight with which a writer returns zeros: 0, or -1 for the gain of a norm that computes (1 + w).
    value: float = 0.0
    by_name: bool = True  # whether the names alone show that `value` is right
    refused: str = ""  # why no parameters make a layer of this family the identity, or ""

    def fits(self, modules: Iterable[str]) -> bool:
        """Whether a layer with these modules is of this family: it has its projections and no unknown modules."""
        named = set(modules)
        writers = set(self.writers)
        return writers <= named and named - set(self.norms) - writers == set(self.others)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")
_BEFORE = ("input_layernorm", "post_attention_layernorm")
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_HEADS = ("self_attn.q_norm", "self_attn.k_norm")
_NORMS = (*_BEFORE, *_HEADS)
_OUT = "self_attn.o_proj"
_SUBLAYERS = (_OUT, "mlp.down_proj")
_ALL = (*_QKV, *_GATED, *_SUBLAYERS)
_GEMMA_NORMS = ("input_layernorm", "pre_feedforward_layernorm", *_HEADS)
_BERT = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
_BERT += ("attention.output.dense", "intermediate.dense", "output.dense")
_FUSED = ("mlp.gate", "mlp.experts.gate_up_proj")
_EXPERTS = ("mlp.gate", "mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
_SPARSE = ("block_sparse_moe.gate", "block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3")
_PHI_NORMS = ("input_layernorm", "self_attn.q_layernorm", "self_attn.k_layernorm")
_NEOX = ("attention.query_key_value", "mlp.dense_h_to_4h")
_VIT_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_OLD_VIT = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
_LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "gemma")
_GGUF = ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")
_VIT_NORMS = ("layernorm_before", "layernorm_after")
# Buffers that old checkpoints hold beside the weights; their names end in the name of the module.
_MASKS = ("attn", "attention", "attn.masked_bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")

FAMILIES: tuple[Family, ...] = (
    Family("llama", _LLAMAS, _SUBLAYERS, (*_QKV, *_GATED), (*_BEFORE, *_HEADS, "self_attn.rotary_emb.inv_freq")),
    # A norm comes between the projection and the residual stream. Zero projections would be the identity too, but at
    # zero the slope of a norm is gain / sqrt(eps): one optimizer step would destroy what the model computes.
    Family("olmo2", ("olmo2", "olmo3"), _AFTER, _ALL, _HEADS),
    Family("gemma2", ("gemma2", "gemma3", "gemma3_text"), _AFTER, _ALL, _GEMMA_NORMS, value=-1.0, by_name=False),
    Family("phi", ("phi",), ("self_attn.dense", "mlp.fc2"), (*_QKV, "mlp.fc1"), _PHI_NORMS),
    Family("phi3", ("phi3",), _SUBLAYERS, ("self_attn.qkv_proj", "mlp.gate_up_proj"), _BEFORE),
    Family("mixtral", ("mixtral", "qwen3_moe"), (_OUT, "mlp.experts.down_proj"), (*_QKV, *_FUSED), _NORMS),
    Family("mixtral", ("mixtral",), (_OUT, "block_sparse_moe.experts.*.w2"), (*_QKV, *_SPARSE), _BEFORE),
    Family("qwen3_moe", ("qwen3_moe",), (_OUT, "mlp.experts.*.down_proj"), (*_QKV, *_EXPERTS), _NORMS),
    Family("qwen3_moe", ("qwen3_moe",), _SUBLAYERS, (*_QKV, *_GATED), _NORMS),  # its dense layers
    Family("gpt2", ("gpt2",), ("attn.c_proj", "mlp.c_proj"), ("attn.c_attn", "mlp.c_fc"), ("ln_1", "ln_2", *_MASKS)),
    Family("gpt_neox", ("gpt_neox",), ("attention.dense", "mlp.dense_4h_to_h"), _NEOX, (*_BEFORE, *_MASKS)),
    Family("vit", ("vit",), ("attention.o_proj", "mlp.fc2"), (*_VIT_QKV, "mlp.fc1"), _VIT_NORMS),
    Family("vit", ("vit",), ("attention.output.dense", "output.dense"), (*_OLD_VIT, "intermediate.dense"), _VIT_NORMS),
    Family(
        "llama.cpp", (), ("attn_output", "ffn_down"), _GGUF, ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm")
    ),
    Family("timm_vit", (), ("attn.proj", "mlp.fc2"), ("attn.qkv", "mlp.fc1"), ("norm1", "norm2")),
    # The last norm of the branch: exact if a ReLU precedes every block, as in torchvision.
    Family("resnet", (), ("bn2",), ("conv1", "conv2"), ("bn1",)),
    Family("bottleneck", (), ("bn3",), ("conv1", "conv2", "conv3"), ("bn1", "bn2")),
    # Names do not show whether the layer is x + fc2(act(fc1(x))) or fc2(act(fc1(x))).
    Family("mlp", (), ("fc2",), ("fc1",), ("norm", "norm1", "ln"), by_name=False),
    Family(
        "bert",
        ("bert", "roberta", "electra"),
        ("output.LayerNorm",),
        _BERT,
        ("attention.output.LayerNorm",),
        refused="its layers end in a norm over the residual stream (post-LN), and no gain or bias makes that norm "
        "return its input",
    ),
)
NAMES = tuple(dict.fromkeys(family.name for family in FAMILIES))

_LEAVES = {"weight", "bias", "kernel", "scale", "running_mean", "running_var", "num_batches_tracked"}


def modules_of(leaves: Iterable[Pieces]) -> set[str]:
    """The modules of a layer from the paths of its leaves, relative to it; numbers become `*`.

    >>> sorted(modules_of([("self_attn", "o_proj", "weight"), ("mlp", "experts", "3", "w2", "weight")]))
    ['mlp.experts.*.w2', 'self_attn.o_proj']
    """
    found = set()
    for pieces in leaves:
        kept = pieces[:-1] if pieces[-1] in _LEAVES and len(pieces) > 1 else pieces
        found.add(".".join("*" if number_of(piece) is not None else piece for piece in kept))
    return found


def find(modules: set[str], model_type: str | None = None, name: str | None = None) -> Family:
    """The row for a layer with these modules, of the family that the user or the configuration names."""
    rows = [family for family in FAMILIES if family.name == name]
    if name is None:
        rows = [family for family in FAMILIES if model_type in family.model_types]
    elif not rows:
        near = wording.closest(name, NAMES, limit=1)
        why = f"{name!r} is not a known family: {', '.join(NAMES)}"
        raise BadArgument(why, hint=f'identity="{(near or NAMES)[0]}"')
    fitting = [family for family in rows or FAMILIES if family.fits(modules)]
    if not rows:
        fitting = [family for family in fitting if family.by_name or family.refused]
    for family in [*fitting, *rows]:
        if family.refused:
            raise Unsupported(
                f"a {family.name} layer cannot be made the identity: {family.refused}",
                hint="identity=None copies layers as they are; the model then computes something else",
            )
    if fitting:
        return fitting[0]
    raise BadArgument(_unknown(modules, model_type, name, rows), hint=_WAY_OUT)


_WAY_OUT = (
    'identity=["self_attn.o_proj.*", "mlp.down_proj.*"], the leaves of a layer that become zero; a dict says other '
    'values: {"post_attention_layernorm.weight": -1.0}; pm.residual_writers(block, inputs) finds them'
)


def _unknown(modules: set[str], model_type: str | None, name: str | None, rows: list[Family]) -> str:
    have = wording.listing(sorted(modules), 20)
    if rows:
        row = min(rows, key=lambda family: len(modules ^ {*family.writers, *family.others}))
        known = {*row.writers, *row.others, *row.norms}
        lacks, more = sorted({*row.writers, *row.others} - modules), sorted(modules - known)
        differs = [f"{wording.listing(lacks, 6)} is missing"] if lacks else []
        differs += [f"{wording.listing(more, 6)} is not known"] if more else []
        return f"the layers are not those of {name or model_type}: {'; '.join(differs) or have}"
    of = f" of a {model_type!r} model" if model_type else ""
    return f"it is not known which parameters make a layer{of} the identity; its modules are {have}"


def values(family: Family) -> Mapping[str, float]:
    """The leaves of a layer that make it the identity, as selectors relative to the layer, with their values."""
    found: dict[str, float] = {}
    for writer in family.writers:
        path = writer.replace(".", "/")
        # The third is a parameter without a module, as in fused experts.
        found |= {f"{path}/{{weight,kernel,scale}}": family.value, f"{path}/bias": 0.0, path: family.value}
    return found


# The modules whose weights have their inputs first, as transformers' Conv1D stores them, by model type.
_CONV1D = ("c_attn", "q_attn", "c_fc", "c_proj")
CONV1D: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"), _CONV1D
)
# Model types whose fused experts have their inputs first; PEFT knows it of all but one, whose module does not say so.
INPUTS_FIRST = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter", "llama4", "llama4_text")
UNSAID = ("llama4", "llama4_text")
# Model types whose fused gates and inputs take turns.
INTERLEAVED = ("gpt_oss",)
# The projections of an expert that a fused leaf holds one after the other, each with the names that families give it.
EXPERTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")),
    "down_proj": (("down_proj", "w2"),),
}
