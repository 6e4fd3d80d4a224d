"""Kinds of layers told by numbers: each row against the configuration class of transformers."""

import inspect

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from paramend.anatomy.layers import BOUND, followed
from paramend.anatomy.moves import Move
from paramend.anatomy.schedules import SCHEDULES
from paramend.errors import Unsupported

N = 13
ORDERS = {
    "last": [*range(12)],
    "first": [*range(1, 13)],
    "twice": [*range(13)] * 2,
    "some": [0, 0, 1, 3, 4, 5, 5, 6, 9, 9, 10, 11, 12, 12],
}
# These tell more than the kind of one layer, or numbers of layers.
NOT_KINDS = {"kv_sharing_modes", "kv_source_layers", "full_attn_idxs", "stage_names"}


def kinds(says):
    """The lists with an entry for each layer that the class derives or computes; numbers of layers as flags."""
    kind = CONFIG_MAPPING[says["model_type"]]
    config, n = kind(**{key: value for key, value in says.items() if key != "model_type"}), says["num_hidden_layers"]
    computed = [name for name, _ in inspect.getmembers(kind, lambda one: isinstance(one, property))]
    found = config.to_dict() | {name: getattr(config, name) for name in computed if name in ("layer_types",)}
    found |= {name: getattr(config, name) for name in computed if name.startswith("layers_")}
    for key in ("moe_layers", "mlp_only_layers"):
        if key in found:
            found[key] = [layer in (found[key] or []) for layer in range(n)]
    return {key: list(v) for key, v in found.items() if isinstance(v, list | tuple) and len(v) == n} | {
        key: v for key, v in found.items() if key in ("moe_layers", "mlp_only_layers")
    }


def outcome(says, order):
    return followed(says, Move(("model", "layers"), order, N))[0]


MORE = ({}, {"use_sliding_window": True, "max_window_layers": 5}, {"sliding_window_pattern": 3}, {"moe_layer_freq": 2})


# Their defaults have embeddings with columns for each layer, and layers that read the cache of others.
PER_LAYER = ("gemma3n_text", "gemma4_text", "embedding_gemma2_text")


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in SCHEDULES if name in CONFIG_MAPPING and name not in BOUND])
def test_layers_keep_their_kinds(family):
    shared = {"model_type": family, "num_hidden_layers": N}
    shared |= {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0} if family in PER_LAYER else {}
    moved = 0
    for more in MORE:
        old = kinds(shared | more)
        for order in ORDERS.values():
            try:
                new = kinds(outcome(shared | more, order))
            except Unsupported:
                continue
            moved += 1
            for key in old.keys() - NOT_KINDS:
                assert new[key] == [old[key][source] for source in order], (key, more, order)
    assert moved


@pytest.mark.parametrize(
    ("family", "order"),
    [
        ("jamba", [0, *range(13)]),
        ("deepseek_v3", [*range(13)] * 2),
        ("ernie4_5_moe", [*range(13)] * 2),
        ("afmoe", [*range(13)] * 2),
        ("nllb-moe", [1, *range(13)]),
    ],
)
def test_what_no_numbers_say_is_refused(family, order):
    says = {"model_type": family, "num_hidden_layers": N, "is_encoder_decoder": family == "nllb-moe"}
    where = ("model", "decoder", "layers") if family == "nllb-moe" else ("model", "layers")
    says |= {"decoder_layers": N} if family == "nllb-moe" else {}
    with pytest.raises(Unsupported, match="no numbers give"):
        followed(says, Move(where, order, N))
