"""Schedules: families whose configurations tell the kind of a layer from its number where no list does, one row each.

The rules and the numbers they start from are those of the configuration classes of transformers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

SLIDING, FULL, LINEAR, INDEXED = "sliding_attention", "full_attention", "linear_attention", "indexed_attention"
DENSE, SPARSE = "dense", "sparse"


@dataclass(frozen=True, slots=True)
class Schedule:
    """One rule that tells kinds of layers from their numbers."""

    rule: Callable[..., Any]  # (layer, number of layers, *values of `numbers`) → its kind
    # The keys that the rule reads, with their values if they are left out; `a|b` are two names of one.
    numbers: Mapping[str, Any] = field(default_factory=dict)
    # The list in which the configuration takes the kinds instead, one for each layer; "" if it takes none.
    written: str = ""
    unless: tuple[str, ...] = ()  # keys that replace the rule where they are given
    numbered: bool = False  # whether that list holds the numbers of the layers whose kind is true
    side: str = ""  # "encoder" or "decoder", for the layers of one side; "" for all

    def values(self, part: Mapping[str, Any]) -> list[Any]:
        """What the configuration says for the numbers of the rule."""
        given = ([part[name] for name in names.split("|") if part.get(name) is not None] for names in self.numbers)
        return [next(iter(each), default) for each, default in zip(given, self.numbers.values(), strict=True)]

    def kinds(self, part: Mapping[str, Any], n: int) -> list[Any] | None:
        """The kind of each of n layers; None if a list or another key tells them."""
        if any(part.get(name) for name in (*self.unless, *([self.written] if self.written else []))):
            return None
        values = self.values(part)
        return [self.rule(layer, n, *values) for layer in range(n)]

    def _free(self, part: Mapping[str, Any]) -> list[bool]:
        """Which of the numbers may change: if a list can say the kinds, only those that are given."""
        return [not self.written or any(name in part for name in names.split("|")) for names in self.numbers]

    def solved(
        self, part: Mapping[str, Any], kinds: Sequence[Any], sources: Sequence[int] = ()
    ) -> dict[str, int] | None:
        """Numbers with which the rule gives these kinds, near those that are there; else None. Lists follow sources.

        >>> Schedule(lambda i, n, first: i >= first, {"first_k_dense_replace": 1}).solved({}, [False, False, True])
        {'first_k_dense_replace': 2}
        """
        n, before = len(kinds), self.values(part)
        now = [[value[source] for source in sources] if isinstance(value, list) else value for value in before]
        choices = [
            [value, *(other for other in range(n + 2) if other != value)] if free and type(value) is int else [value]
            for value, free in zip(now, self._free(part), strict=True)
        ]
        for values in product(*choices):
            try:
                if all(self.rule(layer, n, *values) == kind for layer, kind in enumerate(kinds)):
                    break
            except ZeroDivisionError:
                continue
        else:
            return None
        changed: dict[str, Any] = {}
        for names, value, old in zip(self.numbers, values, now, strict=True):
            if value != old:
                given = [name for name in names.split("|") if name in part]
                changed[given[0] if given else names.split("|")[0]] = value
        return changed


def _every(one: str, rest: str) -> Callable[..., str]:
    """Layers p - 1, 2p - 1 ... are `one`, all others `rest`."""
    return lambda i, n, p: one if p and (i + 1) % p == 0 else rest


def _each(p: int, one: str, rest: str) -> Callable[..., str]:
    """The same for a p that no key says."""
    return lambda i, n: one if (i + 1) % p == 0 else rest


def _every_and_last(i: int, n: int, p: int = 6, rest: str = SLIDING) -> str:
    return FULL if (i + 1) % p == 0 or i == n - 1 else rest


def _first_of(i: int, n: int, p: int = 4) -> str:
    return FULL if i % p == 0 else SLIDING


def _dense_before(i: int, n: int, k: int = 1, step: int | list[int] = 1) -> str:
    return SPARSE if i >= k and (step[i] if isinstance(step, list) else i % step == 0) else DENSE


def _beyond(i: int, n: int, window: int | None, first: int) -> str:
    return SLIDING if window is not None and i >= first else FULL


def _phased(i: int, n: int, p: int, at: int) -> bool | None:
    return i % p == at if at < p else None


def _prefixed(i: int, n: int, k: int, first: int, p: int) -> str:
    """The first k layers have a period of their own."""
    return FULL if ((i - k + 1) % p if i >= k else (i + 1) % first) == 0 else SLIDING


def _backward_rope(theta: float) -> Schedule:
    def rule(i: int, n: int, rope: Mapping[str, Any]) -> float:
        return 0 if (n - 1 - i) % 4 == 0 else rope.get("rope_theta", theta)

    return Schedule(rule, {"rope_parameters": {}}, "layer_rope_theta")


def _types(rule: Callable[..., Any], /, *unless: str, **numbers: Any) -> Schedule:
    return Schedule(rule, numbers, "layer_types", unless)


def _mlps(rule: Callable[..., Any], /, *unless: str, **numbers: Any) -> Schedule:
    return Schedule(rule, numbers, "mlp_layer_types", unless)


def _told(rule: Callable[..., Any], /, side: str = "", **numbers: Any) -> Schedule:
    return Schedule(rule, numbers, side=side)


_PATTERN_4 = _types(_every(FULL, SLIDING), sliding_window_pattern=4)
_HALVES = _types(_each(2, FULL, SLIDING))
_FIRST_DENSE = _mlps(_dense_before)
_DENSE_1 = _mlps(_dense_before, first_k_dense_replace=1)
_DENSE = _mlps(_dense_before, first_k_dense_replace=3)
_DENSE_EVERY = _mlps(_dense_before, first_k_dense_replace=1, moe_layer_freq=1)
_TOLD_DENSE = _told(_dense_before, first_k_dense_replace=0, moe_layer_freq=1)
_CROSSED = _told(lambda i, n, p: i % p == 0, cross_attention_frequency=2)
_WINDOWED = _types(
    lambda i, n, use, window, first: _beyond(i, n, window if use else None, first),
    use_sliding_window=False,
    sliding_window=4096,
    max_window_layers=28,
)
_LATE_WINDOWED = replace(_WINDOWED, numbers={**_WINDOWED.numbers, "max_window_layers": 80})
_INDEXERS = Schedule(
    lambda i, n, freq, skip: "full" if max(i - skip + 1, 0) % max(freq, 1) == 0 else "shared",
    {"index_topk_freq": 1, "index_skip_topk_offset": 2},
    "indexer_types",
    ("index_topk_pattern",),
)
_BACKWARD = _types(lambda i, n: FULL if (n - 1 - i) % 4 == 0 else SLIDING)
_WINDOW_VISION = _types(lambda i, n: _every_and_last(i, n, 4, "window_attention"))
_LINEAR_EVERY = Schedule(_every(FULL, LINEAR), {"full_attention_interval": 4}, "layer_types")
_GEMMA3 = _types(_every(FULL, SLIDING), **{"sliding_window_pattern|_sliding_window_pattern": 6})
_ROPELESS = Schedule(lambda i, n, p: int((i + 1) % p != 0) if p else 1, {"no_rope_layer_interval": 4}, "no_rope_layers")
_HYBRID_SIX = _types(lambda i, n: "hybrid" if (i + 1) % 6 == 0 else "hybrid_sliding", "local_layer_ids")
_HUNYUAN4 = Schedule(lambda i, n: "full" if not i or (i - 1) % 4 == 0 else "shared", {}, "indexer_types")

# Model types → their schedules.
_ROWS: Mapping[str, tuple[Schedule, ...]] = {
    "afmoe": (_types(_every(FULL, SLIDING), global_attn_every_n_layers=4), _told(_dense_before, num_dense_layers=1)),
    "axk1 axk2": (_DENSE_EVERY,),
    "bailing_hybrid": (_types(_every(FULL, LINEAR), layer_group_size=6), _mlps(_dense_before, first_k_dense_replace=2)),
    "beam": (_types(_every_and_last), _mlps(lambda i, n: DENSE if i < 3 else SPARSE)),
    "blip_2_qformer instructblip_qformer instructblipvideo_qformer": (_CROSSED,),
    "cohere2 exaone4": (_PATTERN_4,),
    "cohere2_moe": (
        _types(_prefixed, first_k_dense_replace=0, prefix_dense_sliding_window_pattern=1, sliding_window_pattern=4),
        _mlps(_dense_before, first_k_dense_replace=0),
    ),
    "cwm granite_swa granitemoe_swa": (_types(_first_of),),
    "deepseek_ocr2_encoder qwen2 qwen2_5_omni_talker qwen2_5_omni_text qwen3": (_WINDOWED,),
    "deepseek_v2": (_TOLD_DENSE,),
    "deepseek_v3": (_told(_dense_before, first_k_dense_replace=3, moe_layer_freq=1),),
    "deepseek_v32": (_DENSE,),
    "deepseek_v4": (
        _types(
            lambda i, n: "heavily_compressed_attention" if i < 2 or not i % 2 else "compressed_sparse_attention",
            "compress_ratios",
        ),
        _mlps(lambda i, n, k: "hash_moe" if i < k else "moe", num_hash_layers=3),
    ),
    "diffusion_gemma_text gemma4_text gemma4_unified_text": (_types(_every_and_last),),
    "dots1": (_types(_beyond, sliding_window=4096, max_window_layers=62), _TOLD_DENSE),
    "dots3_note_text": (
        _types(
            lambda i, n, dsa, use: (INDEXED if dsa else FULL) if not use or i < 2 or i % 4 == 1 else SLIDING,
            use_dsa=True,
            use_sliding_window=True,
        ),
        _DENSE_EVERY,
    ),
    "embedding_gemma2_text": (_types(_every_and_last, sliding_window_pattern=6),),
    "ernie4_5_moe": (
        _told(
            lambda i, n, p, first, last: (i + 1) % p == 0 and first <= i <= (n - 1 if last == -1 else last),
            moe_layer_interval=1,
            moe_layer_start_index=1,
            moe_layer_end_index=-1,
        ),
    ),
    "ernie4_5_vl_moe_text glm4_moe_lite hy_v3 laguna": (_FIRST_DENSE,),
    "exaone_moe": (_PATTERN_4, _DENSE_1),
    "flint": (
        _types(lambda i, n: FULL if i < 2 or i % 4 == 1 or i == n - 1 else SLIDING),
        Schedule(lambda i, n: i < 2, {}, "mlp_only_layers", numbered=True),
    ),
    "gemma2 gpt_oss t5_gemma_module vaultgemma": (_HALVES,),
    "gemma3 gemma3_text t5gemma2_decoder t5gemma2_text": (_GEMMA3,),
    "gemma3n_text": (
        _types(_each(5, FULL, SLIDING)),
        Schedule(lambda i, n: 0.95 if n > 10 and i < 10 else 0.0, {}, "activation_sparsity_pattern"),
    ),
    "glm4_moe glm4v_moe_text": (_told(_dense_before, first_k_dense_replace=1),),
    "glm5_next_text": (
        _types(lambda i, n: LINEAR if i % 4 != 3 else INDEXED),
        _mlps(lambda i, n: DENSE if i < 3 else SPARSE),
        _INDEXERS,
    ),
    "glm_moe_dsa": (_DENSE, _INDEXERS),
    "hy_v4 hy_v4_vl_text": (_FIRST_DENSE, _HUNYUAN4),
    "inkling2_text": (_HYBRID_SIX, _told(lambda i, n, p: i % p == 0, n_layers_per_attn_res_block=6)),
    "inkling_text": (_HYBRID_SIX, _mlps(_dense_before, dense_mlp_idx=0)),
    "jamba": (
        _told(_phased, attn_layer_period=8, attn_layer_offset=4),
        _told(_phased, expert_layer_period=2, expert_layer_offset=1),
    ),
    "kimi_linear": (_types(lambda i, n: FULL if i and i % 4 == 0 else LINEAR, "linear_attn_config"), _DENSE_1),
    "kolibri1": (_types(_each(5, FULL, SLIDING)),),
    "lara_mini": (_types(lambda i, n: (LINEAR, SLIDING, LINEAR, FULL, SLIDING)[i % 5]),),
    "lfm2": (_types(lambda i, n: FULL, "full_attn_idxs"),),
    "lfm2_moe": (_told(_dense_before, num_dense_layers=2),),
    "lfm3": (_types(lambda i, n: FULL if i % 4 == 2 else SLIDING if i and i % 4 == 0 else "conv"),),
    "lfm3_vl_vision": (_types(lambda i, n: "conv" if i < 2 or i % 2 else FULL),),
    "llama4_text": (
        _ROPELESS,
        Schedule(lambda i, n, p: (i + 1) % p == 0, {"interleave_moe_layer_step": 1}, "moe_layers", numbered=True),
    ),
    "mimo_v2_flash": (_types(lambda i, n: FULL if not i or (i + 1) % 6 == 0 else SLIDING), _FIRST_DENSE),
    "minimax": (_types(_each(2, LINEAR, FULL)),),
    "mistral_large4_text": (_ROPELESS, _DENSE_1, _INDEXERS),
    "modernbert modernbert-decoder": (_types(_first_of, global_attn_every_n_layers=3),),
    "muse_glimmer_text": (_BACKWARD, _backward_rope(10000.0)),
    "muse_glimmer_vision muse_spark_vision": (_WINDOW_VISION,),
    "muse_spark_text": (_BACKWARD, _backward_rope(500000.0)),
    "nllb-moe": tuple(
        _told(lambda i, n, p: p > 0 and (i + 1) % p == 0, side, **{f"{side}_sparse_step": 4})
        for side in ("encoder", "decoder")
    ),
    "olmo3": (_types(_each(4, FULL, SLIDING)),),
    "olmo_hybrid": (_types(lambda i, n: FULL if i % 4 == 3 or (n < 4 and i == n - 1) else LINEAR),),
    "qwen2_5_vl_text qwen2_vl_text": (_LATE_WINDOWED,),
    "qwen2_moe": (
        _types(
            lambda i, n, use, last: SLIDING if use and not i % 2 and i < last else FULL,
            use_sliding_window=False,
            max_window_layers=28,
        ),
    ),
    "qwen3_5_moe_text qwen3_5_text qwen3_next": (_LINEAR_EVERY,),
    "qwen3_omni_moe_talker_code_predictor": (_types(_beyond, sliding_window=None, max_window_layers=28),),
    "qwen4_exp_text": (Schedule(_every(INDEXED, LINEAR), {"full_attention_interval": 4}, "layer_types"),),
    "recurrent_gemma": (Schedule(lambda i, n: "attention" if (i + 1) % 3 == 0 else "recurrent", {}, "block_types"),),
    "sapiens2": (
        _told(
            lambda i, n, first, last: i < first or i >= n - last,
            num_first_full_attention_layers=8,
            num_last_full_attention_layers=8,
        ),
    ),
    "smollm3": (_ROPELESS,),
    "step3p5": (_mlps(lambda i, n: DENSE if i < 3 else SPARSE, "moe_layers_enum"),),
    "switch_transformers": tuple(
        _told(lambda i, n, k: k > 0 and (i % (n // k) == 1 or n // k == 1), side, **{f"num_sparse_{side}_layers": 3})
        for side in ("encoder", "decoder")
    ),
    "ultrabert": (_types(_each(3, FULL, SLIDING)),),
    "unlimited_ocr_text": (_DENSE_1,),
}
SCHEDULES: Mapping[str, tuple[Schedule, ...]] = {name: row for names, row in _ROWS.items() for name in names.split()}

# Families in which the last layer is of full attention, whatever the configuration says.
LAST_FULL = ("gemma4_text", "gemma4_unified_text", "diffusion_gemma_text", "embedding_gemma2_text")
# Key → the schedule of a family that is not above, if its configuration has this key.
COMMON: Mapping[str, Schedule] = {
    "first_k_dense_replace": _TOLD_DENSE,
    "num_dense_layers": _told(_dense_before, num_dense_layers=0),
    "leading_dense_block_count": _told(_dense_before, leading_dense_block_count=0),
    "nextn_predict_layers": _told(lambda i, n, k: i >= n - k, nextn_predict_layers=0),
}


def schedules_of(part: Mapping[str, Any], model_type: str | None, side: str = "") -> list[Schedule]:
    """The schedules that hold for the layers that a section counts."""
    known = SCHEDULES.get(str(model_type), SCHEDULES.get(f"{model_type}_text"))
    if known is not None:
        return [one for one in known if one.side in ("", side)]
    return [one for key, one in COMMON.items() if type(part.get(key)) is int]
