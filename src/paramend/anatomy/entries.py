"""Entries: what a configuration says layer by layer, in lists, texts, numbers and names, which follows moved layers."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from paramend.anatomy.sections import COUNTS


def words(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


# Lists with one entry for each layer. Others are recognised by the words below and their length.
LISTS = words("""
    layer_types mlp_layer_types layers_block_type indexer_types attn_type_list block_configs no_rope_layers
    sparse_layers moe_layer_freq hybrid_layer_pattern num_query_heads num_kv_heads ffn_multipliers attn_layers
    attention_layers attention_window compress_ratios layer_rope_theta activation_sparsity_pattern
    intermediate_size num_attention_heads num_key_value_heads sliding_windows sparse_attention_freq
    head_count head_count_kv feed_forward_length
""")
# Lists whose length is another matter, although they may have that of the layers.
OTHERS = words("""
    mlp_multipliers ssm_multipliers mtp_layers_block_type mtp_layer_types mtp_mlp_layer_types
    moe_intermediate_size moe_num_experts moe_k mlp_ratios mlp_ratio depths time_step_limit vision_feature_layer
    out_features out_indices stage_names return_idx block_types pattern conv_residual_weights
    feed_forward_residual_weights pos_att_type block_out_channels down_block_types up_block_types layers_per_block
    transformer_layers_per_block attention_head_dim qkv_multipliers relative_bias_args kernel_list
    target_layer_ids encode_proj_layers pretrained_window_sizes
""")
# Lists that are repeated until every layer has an entry.
CYCLES = frozenset({"block_types", "layer_pattern", "layer_types_pattern"})
# Lists of the numbers of special layers. Others are recognised by their ascending numbers and the words below.
NUMBERS = words("""
    mlp_only_layers moe_layers full_attention_layers attn_layer_indices attn_layer_idx full_attn_idxs
    cross_attention_layers hybrid_layer_ids global_attn_indexes fullatt_block_indexes window_block_indexes
    window_block_indices global_attention_blocks local_layer_ids rope_scaling_layers
    layers_to_transform dual_attention_layers subsample_layers moe_layer_indices
""")
FROM_ONE = frozenset({"full_attn_layers", "kda_layers", "ple_layer_ids"})  # numbers from 1
# Numbers of layers whose outputs are read, one after the other.
READ = frozenset({"intermediate_layers_indices", "deepstack_visual_indexes"})
# Dicts whose keys are numbers of layers.
KEYED = frozenset({"pruned_heads", "per_layer_config"})
# Sections that name modules.
NAMING = frozenset({"quantization_config", "compression_config", "quantization"})

_LAYERED = re.compile(
    r"layer|block|attn|attention|mlp|ffn|moe|expert|head|window|indexer|pattern|freq|multiplier|rope|type|hybrid|ratio|rotary|limits"
)
_NUMBERED = re.compile(r"(?:layers|blocks|idxs|indexes|indices|ids|numbers)$")
_NUMBERED_TEXT = re.compile(r"\d+(?:, ?\d+)+")
_TEXTS = re.compile(r"pattern|layer|block|hybrid")
_OWN = {"model_type", *COUNTS}  # a part that counts its own layers
_ELSEWHERE = re.compile(r"rope_.*|id2label|label2id|task_specific_params|.*generation.*|tokenizer.*")
_LONGER = re.compile(r"layer|types|configs|ratios")  # readers take their first entries
_NEVER = re.compile(r"token|axes|section|resolution|architectures|pinpoints|label")
_HARDLY = re.compile(
    r"_ids?$|size|stride|kernel|dim|channel|mean|std|shape|name|factor|range|limit|dilation|quantile|lang"
)
# A list under an unknown name that is as long as the layers are many is hardly so by chance from this number on.
_MANY = 5


def entries(part: Mapping[str, Any], n: int, blocks: int = 0) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where a section speaks of its n layers one by one, and how: "list", "numbers", "from one", "read", "keyed", ...

    Lists may have entries at the end for so many blocks after the last layer.

    >>> dict(entries({"num_hidden_layers": 3, "attn_type_list": [0, 1, 1], "moe_layers": [1]}, 3))
    {('attn_type_list',): 'list', ('moe_layers',): 'numbers'}
    """
    for key, value in part.items():
        if key.startswith("mtp_"):  # of blocks, which stay as they are
            continue
        if isinstance(value, Mapping):
            if key in KEYED:
                yield (key,), "keyed"
            elif not (key in NAMING or _ELSEWHERE.fullmatch(key) or value.keys() & _OWN):
                yield from (((key, *inner), how) for inner, how in entries(value, n, blocks))
            continue
        how = _how(key, value, n, blocks)
        if how:
            yield (key,), how


def _how(key: str, value: Any, n: int, blocks: int) -> str:
    if isinstance(value, str):
        if _NUMBERED_TEXT.fullmatch(value) and _LAYERED.search(key):
            return "numbers"
        return "list" if len(value) == n > 1 and _TEXTS.search(key) and key != "model_type" else ""
    if not isinstance(value, list | tuple) or not value:
        return ""
    if key in FROM_ONE:
        return "from one"
    if key in READ:
        return "read" if all(type(one) is int and -n <= one < n for one in value) else ""
    if key in CYCLES and all(isinstance(one, str) for one in value):
        return "list" if len(value) == n else "cycle"
    whole = n <= len(value) <= n + blocks
    if key in LISTS and (whole or (len(value) > n and _LONGER.search(key))):
        return "list"
    if key in NUMBERS:
        return "numbers"
    if key in OTHERS:
        return ""
    ascending = all(type(one) is int for one in value) and all(a < b for a, b in pairwise(value))
    if ascending and value[0] >= 0 and value[-1] < n and _NUMBERED.search(key) and _LAYERED.search(key):
        return "numbers"
    if not whole:
        return ""
    if _NEVER.search(key):
        return ""
    return "list" if _LAYERED.search(key) else "unknown" if n >= _MANY and not _HARDLY.search(key) else ""


def entry_of(value: Any, how: str, layer: int) -> Any:
    """What an entry says of one layer."""
    if how == "keyed":
        return value.get(layer, value.get(str(layer)))
    if isinstance(value, str) and how == "numbers":
        return layer in map(int, value.split(","))
    if how in ("numbers", "from one", "read"):
        return layer + (how == "from one") in value
    return value[layer % len(value)] if how == "cycle" else value[layer]


def moved(value: Any, how: str, sources: Sequence[int], n: int) -> Any:
    """An entry for the layers of an order.

    >>> moved("MAM", "list", (0, 1, 1, 2), 3), moved([1, 3], "from one", (2, 0, 0), 3)
    ('MAAM', [1, 2, 3])
    """
    if how == "keyed":
        kept = {key: one for key, one in value.items() if not 0 <= int(key) < n}
        text = any(isinstance(key, str) for key in value)
        for target, source in enumerate(sources):
            one = entry_of(value, how, source)
            if one is not None:
                kept[str(target) if text else target] = one
        return kept
    if isinstance(value, str) and how == "numbers":
        return ",".join(map(str, moved([int(text) for text in value.split(",")], how, sources, n)))
    if how == "read":  # the last copy of each; a layer that is gone is an IndexError
        places = [[target for target, source in enumerate(sources) if source == number % n] for number in value]
        return [place[-1] for place in places]
    if how in ("numbers", "from one"):
        one = int(how == "from one")
        value = [number + n if number < 0 else number for number in value]
        more = [number + len(sources) - n for number in value if number - one >= n]  # of blocks after the last layer
        return [target + one for target, source in enumerate(sources) if source + one in value] + more
    new = [entry_of(value, how, source) for source in sources]
    if isinstance(value, str):
        return "".join(new) + value[n:]
    return new if how == "cycle" else [*new, *value[n:]]


class Names:
    """Names of modules in a configuration, such as those that stay unquantised, with the numbers of layers in them.

    `to` says for each old number the new ones.

    >>> names = Names(("model", "layers"), {0: [0], 1: [1, 2], 2: [3]})
    >>> names.moved(["lm_head", "model.layers.1.mlp", "model.layers.2"])
    ['lm_head', 'model.layers.1.mlp', 'model.layers.2.mlp', 'model.layers.3']
    """

    def __init__(self, where: Sequence[str], to: Mapping[int, Sequence[int]]) -> None:
        self._where, self.to = where, to
        above = re.escape(where[-1]) if where else ""
        self._number = re.compile(rf"(?P<before>(?:^|.*[^\w]){above}(?:\\\.|[./]))(?P<number>\d+)(?!\d)", re.DOTALL)
        self.groups = re.compile(rf"(?:^|[^\w]){above}\\?\.(?:\(|\[(?!0-9))")

    def number(self, text: str) -> int | None:
        """The number of the layer that a name is about; None if it is about no single one."""
        found = self._number.match(text) if self._where else None
        if found is None or self._other(text):
            return None
        number = int(found["number"])
        return number if number in self.to else None

    def _other(self, text: str) -> bool:
        """Whether a name belongs to another part of the model that has layers of the same name."""
        words = ("vision", "visual", "audio", "speech", "encoder", "decoder")
        pieces = re.split(r"[./\\]+", text)
        return any(
            any(word in piece for piece in pieces) != any(word in piece for piece in self._where) for word in words[:4]
        ) or any(word in pieces and word not in self._where for word in words[4:])

    def told(self, value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                yield from (str(key), *self.told(inner))
        elif isinstance(value, list | tuple):
            for inner in value:
                yield from self.told(inner)

    def moved(self, value: Any) -> Any:
        """A value in which names follow their layers."""
        if isinstance(value, Mapping):
            return {new: self.moved(inner) for key, inner in value.items() for new in self._names(key)}
        if isinstance(value, list | tuple):
            found: list[Any] = []
            for inner in value:
                new = self._names(inner) if isinstance(inner, str) else [self.moved(inner)]
                found += [one for one in new if one not in found or one == inner]
            return found
        return value

    def _names(self, text: Any) -> list[Any]:
        number = self.number(text) if isinstance(text, str) else None
        if number is None:
            return [text]
        found = self._number.match(text)
        assert found is not None
        return [f"{found['before']}{new}{text[found.end() :]}" for new in self.to[number]]
