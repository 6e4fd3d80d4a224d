"""What names, shapes and a configuration say of experts."""

import numpy as np
import pytest

from paramend.anatomy.experts import Along, experts_of
from paramend.errors import SpecMismatch
from paramend.trees.tree import Tree

E, H, INNER = 4, 3, 2


def tree(names: dict[str, tuple[int, ...]]) -> Tree:
    """A flat tree of zeros."""
    return Tree({name: np.zeros(shape, "float32") for name, shape in names.items()})


def per_expert(path: str, names: tuple[str, ...], count: int = E) -> dict[str, tuple[int, ...]]:
    return {f"{path}.{n}.{name}.weight": (INNER, H) for n in range(count) for name in names}


# Storage, the leaves of a mixture as published checkpoints name them → the axis of experts of each that has one.
LAYOUTS = {
    "mixtral": (
        "per expert",
        {"gate.weight": (E, H), **per_expert("experts", ("w1", "w2", "w3"))},
        {"gate.weight": Along(0)},
    ),
    "qwen": (
        "fused",
        {
            "gate.weight": (E, H),
            "experts.gate_up_proj": (E, 2 * INNER, H),
            "experts.down_proj": (E, H, INNER),
            "shared_expert.up_proj.weight": (E, H),
            "shared_expert_gate.weight": (1, H),
        },
        {"gate.weight": Along(0), "experts.gate_up_proj": Along(0), "experts.down_proj": Along(0)},
    ),
    "gpt-oss": (
        "gpt-oss",
        {
            "router.weight": (E, H),
            "router.bias": (E,),
            "experts.gate_up_proj_blocks": (E, INNER, 1, 16),
            "experts.gate_up_proj_scales": (E, INNER, 1),
            "experts.gate_up_proj_bias": (E, INNER),
        },
        dict.fromkeys(
            ("router.weight", "router.bias", *(f"experts.gate_up_proj_{x}" for x in ("blocks", "scales", "bias"))),
            Along(0),
        ),
    ),
    "ernie": (
        "per expert",
        {
            "gate.weight": (E, H),
            "moe_statics.e_score_correction_bias": (1, E),
            **per_expert("experts", ("up_proj",)),
        },
        {"gate.weight": Along(0), "moe_statics.e_score_correction_bias": Along(1)},
    ),
    "gemma4": (
        "fused",
        {
            "router.proj.weight": (E, E),
            "router.scale": (E,),
            "router.per_expert_scale": (E,),
            "experts.down_proj": (E, H, INNER),
            "mlp.down_proj.weight": (E, H),
        },
        {"router.proj.weight": Along(0), "router.per_expert_scale": Along(0), "experts.down_proj": Along(0)},
    ),
    "dbrx": (
        "rows",
        {"router.layer.weight": (E, H), "experts.mlp.w1": (E * INNER, H), "experts.mlp.w2": (E * INNER, H)},
        {"router.layer.weight": Along(0), "experts.mlp.w1": Along(0, INNER), "experts.mlp.w2": Along(0, INNER)},
    ),
    "granite": (
        "fused",
        {
            "router.layer.weight": (E, H),
            "input_linear.weight": (E, 2 * INNER, H),
            "output_linear.weight": (E, H, INNER),
        },
        dict.fromkeys(("router.layer.weight", "input_linear.weight", "output_linear.weight"), Along(0)),
    ),
    "switch": (
        "per expert",
        {
            "router.classifier.weight": (E, H),
            **{f"experts.expert_{n}.wi.weight": (INNER, H) for n in range(E)},
        },
        {"router.classifier.weight": Along(0)},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_has_its_axes(name):
    storage, leaves, axes = LAYOUTS[name]
    model = tree({f"model.layers.{layer}.mlp.{leaf}": shape for layer in (1, 3) for leaf, shape in leaves.items()})
    found = experts_of(model, {"num_experts": E, "model_type": name})
    assert found is not None
    assert (found.count, found.storage, found.model_type) == (E, storage, name)
    assert [block.layer for block in found.blocks] == [1, 3]
    for block in found.blocks:
        inside = {model.index.name(number).partition(".mlp.")[2]: axis for number, axis in block.along.items()}
        assert (inside, block.unknown) == (axes, ())
        own = {model.index.name(number): expert for number, expert in block.own.items()}
        assert all(f"{block.before.replace('/', '.')}{expert}." in path for path, expert in own.items())
        assert len(own) == sum("experts." in leaf and any(map(str.isdigit, leaf.split(".")[1])) for leaf in leaves)


def test_shared_experts_are_no_mixture():
    model = tree({"model.layers.0.mlp.shared_experts.up_proj.weight": (E, H), "lm_head.weight": (E, H)})
    assert experts_of(model, {"num_experts": E}) is None
    assert experts_of(tree({"blocks.0.shared_mlp.input_linear.weight": (E, H)}), {}) is None


def test_blocks_after_the_last_layer_predict():
    layer = LAYOUTS["qwen"][1]
    names = {f"model.layers.{n}.mlp.{leaf}": shape for n in (0, 1, 2) for leaf, shape in layer.items()}
    names |= {f"mtp.layers.0.mlp.{leaf}": shape for leaf, shape in layer.items()}
    config = {"n_routed_experts": E, "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    found = experts_of(tree(names), config)
    assert found is not None
    assert [(block.path[0], block.layer, block.predicts) for block in found.blocks] == [
        ("model", 0, False),
        ("model", 1, False),
        ("model", 2, True),
        ("mtp", 0, True),
    ]


def test_what_is_not_known_is_said():
    quantised = tree(
        {"0.mlp.experts.down_proj": (E, H, 2), "0.mlp.gate.weight": (E, H), "0.mlp.gate.weight_scale_inv": (1, 1)}
    )
    tabled = tree({"0.mlp.experts.down_proj": (E, H, 2), "0.mlp.gate.tid2eid": (9, 2)})
    packed = tree({"0.mlp.experts.down_proj": (E * H, 1), "0.mlp.experts.up_proj": (E, H, 2)})
    for model, name in ((quantised, "weight_scale_inv"), (tabled, "tid2eid"), (packed, "down_proj")):
        found = experts_of(model, {"num_experts": E})
        assert found is not None
        assert [model.index.pieces(number)[-1] for number in found.blocks[0].unknown] == [name]


def test_identity_experts_follow_in_the_router():
    names = {"0.mlp.experts.down_proj": (E, H, 2), "0.mlp.router.classifier.weight": (E + 2, H)}
    found = experts_of(tree(names), {"n_routed_experts": E, "zero_expert_num": 2, "moe_topk": 3})
    assert found is not None
    assert list(found.blocks[0].along.values()) == [Along(0), Along(0, 1, 2)]
    assert Along(0, 1, 2).places([3, 0], E) == [3, 0, 4, 5]
    assert found.top_k == 3


@pytest.mark.parametrize(
    ("config", "said"),
    [({"num_experts": 8}, "has 4 experts, and config.json says 8"), ({"moe_num_experts": [4, 8]}, "")],
)
def test_a_configuration_that_disagrees(config, said):
    model = tree({f"0.mlp.{leaf}": shape for leaf, shape in LAYOUTS["qwen"][1].items()})
    if not said:  # one for each part, of which none is meant
        assert experts_of(model, config).places == ()
        return
    with pytest.raises(SpecMismatch, match=said):
        experts_of(model, config)


def test_experts_that_are_missing():
    names = {f"0.mlp.experts.{n}.w1.weight": (2, 2) for n in (0, 2)}
    with pytest.raises(SpecMismatch, match="numbered 0, 2"):
        experts_of(tree(names), {})


def test_the_section_that_counts():
    config = {
        "vision_config": {"num_experts": E},
        "text_config": {"num_experts": E, "num_experts_per_tok": 2, "model_type": "qwen3_vl_moe_text"},
    }
    found = experts_of(tree({f"0.mlp.{leaf}": shape for leaf, shape in LAYOUTS["qwen"][1].items()}), config)
    assert found is not None
    assert (found.places, found.model_type, found.top_k) == ((("text_config",),), "qwen3_vl_moe_text", 2)
    assert found.to_dict() == {
        "count": E,
        "top_k": 2,
        "storage": "fused",
        "router": "gate/weight",
        "shared": "shared_expert, shared_expert_gate",
        "where": ["0.mlp"],
    }
