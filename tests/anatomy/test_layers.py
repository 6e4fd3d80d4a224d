"""Configurations follow their layers: counts, lists, texts, numbers and names; what cannot be said is refused."""

import pytest

from paramend.anatomy.layers import followed, renamed
from paramend.anatomy.moves import Move
from paramend.anatomy.sections import sections_of
from paramend.errors import BadArgument, Unsupported

WHERE = ("model", "layers")


def after(says, order, n, where=WHERE, **options):
    return followed(says, Move(where, order, n, **options))[0]


def test_lists_follow_and_everything_else_stays():
    config = {
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "c"],
        "no_rope_layers": [1, 0, 1],
        "mlp_only_layers": [1],
        "architectures": ["X"],
        "eos_token_id": [1, 2, 3],
        "rope_scaling": {"short_factor": [1, 2, 3]},
    }
    new, said = followed(config, Move(WHERE, (0, 1, 1, 2), 3))
    assert new == config | {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "b", "c"],
        "no_rope_layers": [1, 0, 0, 1],
        "mlp_only_layers": [1, 2],
    }
    assert len(said) == 4
    assert config["num_hidden_layers"] == 3


# key → what it says of layers 0 to 3, and of 0, 2, 3, 3
ENTRIES = {
    "indexer_types": (["full", "shared", "full", "shared"], ["full", "full", "shared", "shared"]),
    "attn_type_list": ([0, 0, 1, 0], [0, 1, 0, 0]),
    "block_configs": ([{"i": i} for i in range(4)], [{"i": i} for i in (0, 2, 3, 3)]),
    "num_query_heads": ([1, 2, 3, 4], [1, 3, 4, 4]),
    "ffn_multipliers": ([0.5, 1.0, 1.5, 2.0], [0.5, 1.5, 2.0, 2.0]),
    "full_attn_idxs": ([1, 3], [2, 3]),
    "hybrid_override_pattern": ("M-M*", "MM**"),
    "moe_layer_freq": ([0, 1, 1, 1], [0, 1, 1, 1]),
    "cross_attention_layers": ([2], [1]),
    "my_attn_indices": ([0, 2], [0, 1]),
    "some_layer_kinds": (["a", "b", "c", "d"], ["a", "c", "d", "d"]),
    "moe_layers_enum": ("1,2", "1"),
    "pruned_heads": ({"1": [0], "3": [1]}, {"2": [1], "3": [1]}),
    "linear_attn_config": (
        {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 4},
        {"full_attn_layers": [3, 4], "kda_layers": [1, 2], "head_dim": 4},
    ),
    "full_attention_layers": ([-1], [2, 3]),
    "attention_types": ([[["global", "local"], 2]], [[["global", "global", "local", "local"], 1]]),
    "block_types": (["r", "r", "a"], ["r", "a", "r", "r"]),
}


@pytest.mark.parametrize("key", ENTRIES)
@pytest.mark.parametrize("nested", [False, True])
def test_entries(key, nested):
    before, expected = ENTRIES[key]
    says = {"model_type": "x", "num_hidden_layers": 4, key: before}
    config = {"model_type": "y", "text_config": says, "vision_config": {"num_hidden_layers": 2}} if nested else says
    new = after(config, [0, 2, 3, 3], 4)
    assert (new["text_config"] if nested else new)[key] == expected


def test_entries_of_blocks_after_the_layers_stay_last():
    says = {"model_type": "x", "num_hidden_layers": 3, "layer_types": ["a", "b", "c", "mtp"], "moe_layers": [1, 3]}
    new = after(says, [0, 2], 3, blocks=1)
    assert new["layer_types"] == ["a", "c", "mtp"]
    assert new["moe_layers"] == [2]


def test_a_list_of_unknown_meaning_is_refused_until_its_value_is_given():
    says = {"num_hidden_layers": 6, "mystery": [1, 2, 3, 4, 5, 7]}
    with pytest.raises(Unsupported, match="mystery with 6 entries") as raised:
        after(says, [0, 1], 6)
    assert "config={'mystery'" in raised.value.hint
    assert after(says, [0, 1], 6, given={"mystery": [9]})["mystery"] == [9]


@pytest.mark.parametrize(
    "says",
    [
        {"moe_every_n_layers": 2},
        {"global_attention_interval": 2},
        {"sliding_window_pattern": "LG"},
        {"moe_frequency": 2},
        {"num_first_dense_layers": 1},
        {"sharing_period": 2},
        {"kv_interval": 2},
        {"global_layers": 1},
    ],
    ids=str,
)
def test_numbers_of_unknown_families(says):
    """They are refused where an order would change kinds, and only there."""
    says = {"model_type": "unheard", "num_hidden_layers": 4, **says}
    (key, value) = list(says.items())[-1]
    with pytest.raises(Unsupported, match=key):
        after(says, [1, 2, 3], 4)
    if not key.endswith("_layers") or "every" in key:
        assert after(says, [0, 1, 2, 3, 0, 1], 4)["num_hidden_layers"] == 6
    assert after(says, [0, 1, 2], 4)[key] == value
    assert after(says, [1, 2, 3], 4, given={key: 7})[key] == 7


def test_a_given_key_of_a_part_that_is_not_there():
    with pytest.raises(BadArgument, match="no part 'text'"):
        after({"num_hidden_layers": 2}, [0], 2, given={"text.a": 1})
    nested = {"text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]}}
    assert after(nested, [0], 2, given={"text_config.layer_types": ["x"]})["text_config"]["layer_types"] == ["x"]
    assert after(nested, [0], 2, given={"layer_types": ["x"]})["text_config"]["layer_types"] == ["x"]


def test_numbers_that_are_of_other_things_stay():
    says = {"rope_interval": 2, "time_step": 2, "num_adapter_layers": 1, "max_period": 2, "num_experts_per_tok": 2}
    says |= {"model_type": "unheard", "num_hidden_layers": 4}
    assert after(says, [1, 2, 3], 4) == says | {"num_hidden_layers": 3}


def test_names_of_modules_follow():
    told = {
        "modules_to_not_convert": ["lm_head", "model.layers.0", "model.layers.2.mlp", "vision_model.layers.2.mlp"],
        "ignore": [r"re:.*layers\.2\.mlp.*", "model.layers.12"],
        "dynamic": {r"-:model\.layers\.1\..*": {}},
    }
    new = after({"num_hidden_layers": 3, "quantization_config": told}, [0, 2, 2], 3)["quantization_config"]
    assert new == {
        "modules_to_not_convert": [
            "lm_head", "model.layers.0", "model.layers.1.mlp", "model.layers.2.mlp", "vision_model.layers.2.mlp",
        ],
        "ignore": [r"re:.*layers\.1\.mlp.*", r"re:.*layers\.2\.mlp.*", "model.layers.12"],
        "dynamic": {},
    }  # fmt: skip
    with pytest.raises(Unsupported, match=r"layers\\\\.\(0\|1\)"):
        after({"num_hidden_layers": 3, "quantization_config": {"ignore": [r"re:layers\.(0|1)\."]}}, [0, 2], 3)
    adapter = {"layers_to_transform": [0, 2], "rank_pattern": {"layers.2.q_proj": 4}, "target_modules": ["q_proj"]}
    assert renamed(adapter, Move(WHERE, (2, 0, 2), 3)) == {
        "layers_to_transform": [0, 1, 2],
        "rank_pattern": {"layers.0.q_proj": 4, "layers.2.q_proj": 4},
        "target_modules": ["q_proj"],
    }


def test_lists_that_a_rule_reads_follow_before_its_numbers_are_sought():
    says = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "moe_layer_freq": [0, 1, 0, 1],
    }
    new = after(says, [0, 2, 1, 3, 3], 4)
    assert (new["moe_layer_freq"], new["first_k_dense_replace"]) == ([0, 0, 1, 1, 1], 1)


def test_features_of_other_parts_are_told():
    config = {"vision_feature_layer": -2, "vision_config": {"num_hidden_layers": 3}}
    said = followed(config, Move(("model", "vision_tower", "layers"), [0, 2], 3))[1]
    assert said[0] == "vision_config.num_hidden_layers: 3 -> 2"
    assert "vision_feature_layer: -2, not changed" in said[1]


def test_lists_of_blocks_stay():
    says = {"num_hidden_layers": 2, "mtp_hybrid_override_pattern": "*E", "mtp_layer_types": ["a", "b"]}
    assert after(says, [1], 2) == says | {"num_hidden_layers": 1}
    longer = {"num_hidden_layers": 2, "layer_types": ["a", "b", "c"]}
    assert after(longer, [1], 2)["layer_types"] == ["b", "c"]


def test_lists_that_are_as_long_by_chance_stay():
    says = {"eos_token_id": [1, 2, 3, 4, 5], "conv_dim": [1] * 5, "rope_axes_dim": [2] * 5, "image_mean": [0] * 5}
    assert after({"num_hidden_layers": 5, **says}, [1, 2], 5) == {"num_hidden_layers": 2, **says}


def test_layers_that_are_read_stay_as_many():
    says = {"num_hidden_layers": 4, "intermediate_layers_indices": [1, -1]}
    assert after(says, [0, 1, 1, 3], 4)["intermediate_layers_indices"] == [2, 3]
    with pytest.raises(Unsupported, match="has not all"):
        after(says, [0, 2, 3], 4)


def test_parts_that_count_their_own_layers_stay():
    vision = {"depth": 3, "fullatt_block_indexes": [0, 2], "layer_types": ["a", "b", "c"]}
    says = {"num_hidden_layers": 3, "vision_config": vision, "audio": {"model_type": "x", "moe_layers": [0]}}
    assert after(says, [0], 3) == says | {"num_hidden_layers": 1}


def test_a_part_for_images_is_not_of_the_family_of_the_text():
    config = {
        "model_type": "gemma3",
        "vision_config": {"num_hidden_layers": 7},
        "text_config": {"num_hidden_layers": 7},
    }
    assert "layer_types" not in after(config, [6], 7, ("vision_tower", "layers"))["vision_config"]
    assert after(config, [0, 5], 7)["text_config"]["layer_types"] == ["sliding_attention", "full_attention"]


def test_stages_of_a_backbone():
    says = {"stage_names": ["stem", "stage1", "stage2", "stage3"], "num_hidden_layers": 3}
    read = {"out_features": ["stem", "stage2", "stage3"], "out_indices": [0, 2, 3]}
    new = after(says | read, [0, 1, 1, 2, 2], 3)
    assert new["stage_names"][-1] == "stage5"
    assert (new["out_features"], new["out_indices"]) == (["stem", "stage3", "stage5"], [0, 3, 5])
    assert after(says | {"out_indices": [3]}, [0, 1], 3)["out_indices"] == [2]
    with pytest.raises(Unsupported, match="out_features"):
        after(says | read, [0, 2], 3)
    assert after(says | read, [0, 2], 3, given=read)["out_features"] == read["out_features"]


def test_an_interval_of_experts_is_written_out():
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]}
    new = after(config, (0, 1, 2, 3, 3), 4)
    assert (new["decoder_sparse_step"], new["mlp_only_layers"]) == (1, [0, 1, 2])


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "divided by i"),
        ({"model_type": "diffllama"}, "differential attention"),
        ({"model_type": "minimax"}, "decay"),
        ({"model_type": "gemma3n_text"}, "num_kv_shared_layers=15"),
        (
            {
                "model_type": "gemma4_text",
                "hidden_size_per_layer_input": 0,
                "layer_types": ["full_attention", "full_attention", "x"],
            },
            "the last layer",
        ),
        ({"model_type": "gemma4_text"}, "hidden_size_per_layer_input=256"),
        ({"qkv_multipliers": [0.5, 1.0]}, "interpolated"),
        ({"kv_source_layers": [0, 0, 2]}, "cache of others"),
    ],
    ids=str,
)
def test_scales_by_number_are_refused(says, why):
    with pytest.raises(Unsupported, match=why):
        after({"num_hidden_layers": 3, **says}, [0, 2], 3)
    assert after({"num_hidden_layers": 3, **says}, [0, 1, 2], 3)["num_hidden_layers"] == 3


# ---- leaves and places -------------------------------------------------------------------------------------------


def leaves(*names):
    return [{(name,): (2,) for name in layer.split()} for layer in names]


def test_the_leaves_of_a_layer_must_be_those_of_its_place():
    says = {"num_hidden_layers": 4}
    alternating = leaves("w", "w gate", "w", "w gate")
    with pytest.raises(Unsupported, match=r"layer 2 of model/layers would become layer 1.*less: gate"):
        after(says, [0, 2, 3], 4, leaves=alternating)
    assert after(says, [0, 1, 0, 1], 4, leaves=alternating)
    assert after(says, [0, 2, 3], 4, leaves=alternating, given={})
    kinds = says | {"layer_types": ["a", "b", "a", "b"]}
    assert after(kinds, [0, 2, 3], 4, leaves=alternating)["layer_types"] == ["a", "a", "b"]
    shapes = [{("w",): (size,)} for size in (2, 2, 3)]
    with pytest.raises(Unsupported, match="other shapes: w"):
        after({"num_hidden_layers": 3}, [0, 2, 1], 3, leaves=shapes)


@pytest.mark.parametrize(("end", "order"), [(0, [0, 2, 2, 1, 3]), (-1, [1, 1, 0, 5])])
def test_the_first_or_the_last_layer_may_be_of_its_own_kind(end, order):
    told = [{("w",): (2,)} for _ in range(6)]
    told[end] = {("w",): (2,), ("norm",): (2,)}
    says = {"num_hidden_layers": 6, "layer_types": ["a", "b", "a", "b", "a", "a"]}
    assert after(says, order, 6, leaves=told)
    for wrong in ([1, 2, 3] if end == 0 else [0, 1, 2], [*range(6)] * 2):
        with pytest.raises(Unsupported, match="norm"):
            after(says, wrong, 6, leaves=told)
    few = says | {"num_hidden_layers": 4, "layer_types": ["a", "b", "b", "a"]}
    with pytest.raises(Unsupported, match=r"norm|kinds of their own"):  # either end may be the odd one
        after(few, [1, 2, 3], 4, leaves=[told[0], told[1], told[2], told[-1]])


def test_what_all_layers_read_in_the_first_one_stays_there():
    t5 = {"is_encoder_decoder": True, "num_layers": 3}
    told = leaves("relative_attention_bias w", "w", "w")
    where = ("encoder", "block")
    with pytest.raises(Unsupported, match="must stay first"):
        after(t5, [1, 2], 3, where, leaves=told)
    assert after(t5, [0, 2], 3, where, leaves=told)["num_layers"] == 2
    assert after(t5, [0, 1, 2] * 2, 3, where, leaves=told)["num_layers"] == 6


# ---- sections ----------------------------------------------------------------------------------------------------


def test_the_part_that_counts_these_layers():
    config = {"vision_config": {"num_hidden_layers": 2}, "text_config": {"num_hidden_layers": 3}}
    new, said = followed(config, Move((), range(3), 3, given={}))
    assert (new, said) == (config, [])
    new, said = followed(config, Move((), [0, 1, 2] * 2, 3))
    assert new == {"vision_config": {"num_hidden_layers": 2}, "text_config": {"num_hidden_layers": 6}}
    assert said == ["text_config.num_hidden_layers: 3 -> 6"]
    two = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"depth": 3}}
    assert sections_of(two, 3, ("model", "language_model", "layers")) == [("text_config",)]
    assert sections_of(two, 3, ("model", "layers")) == [("text_config",)]
    assert sections_of(two, 3, ("model", "visual", "blocks")) == [("vision_config",)]
    assert sections_of(two, 3) == []
    assert sections_of({"num_hidden_layers": 3, **two}, 3, ("model", "visual", "blocks")) == [("vision_config",)]
    assert sections_of({"num_hidden_layers": 3, **two}, 3, ("model", "layers")) == [(), ("text_config",)]


def test_encoders_and_decoders_are_counted_apart():
    stack = [0, 1, 2] * 2
    t5 = {"is_encoder_decoder": True, "num_layers": 3}
    assert after(t5, stack, 3, ("encoder", "block"))["num_layers"] == 6
    new = after(t5, stack, 3, ("decoder", "block"))
    assert (new["num_layers"], new["num_decoder_layers"]) == (3, 6)
    bart = {"is_encoder_decoder": True, "encoder_layers": 3, "decoder_layers": 3, "num_hidden_layers": 3}
    assert after(bart, stack, 3, ("model", "decoder", "layers")) == bart | {"decoder_layers": 6}
    new = after(bart, stack, 3, ("model", "encoder", "layers"))
    assert new == bart | {"encoder_layers": 6, "num_hidden_layers": 6}
