"""What configurations say of one quantised weight."""

import pytest

from paramend.anatomy.quantization import stated
from paramend.leaves.codecs.stated import Stated

UP = "model.layers.0.mlp.up_proj"
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False}
FP8 = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 64]}
TWO = {
    "quant_method": "compressed-tensors",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": INT4},
        "group_1": {"targets": ["re:.*down_proj$"], "weights": FP8},
    },
    "ignore": ["lm_head", "re:.*router"],
}
DYNAMIC = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "checkpoint_format": "gptq_v2"}
DYNAMIC["dynamic"] = {"-:.*gate": {}, "+:.*up_proj": {"bits": 8, "group_size": 32}}


@pytest.mark.parametrize(
    ("config", "module", "said"),
    [
        (None, UP, {}),
        (TWO, UP, {"method": "compressed-tensors", "bits": 4, "group": 64, "symmetric": False}),
        (TWO, "a.down_proj", {"method": "compressed-tensors", "bits": 8, "block": (128, 64)}),
        (DYNAMIC, "a.down_proj", {"method": "gptq", "bits": 4, "group": 128, "symmetric": True, "form": "gptq_v2"}),
        (DYNAMIC, UP, {"method": "gptq", "bits": 8, "group": 32, "symmetric": True, "form": "gptq_v2"}),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, UP, {"method": "awq", "bits": 4, "group": 64}),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, UP, {"method": "fp8", "block": (128, 128)}),
        ({"quant_method": "fp8", "weight_block_size": None, "bits": "4"}, UP, {"method": "fp8"}),
        ({"quant_algo": "NVFP4", "group_size": 16}, UP, {"method": "modelopt", "group": 16}),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": None}, "ignore": None}, UP, {}),
    ],
)
def test_what_is_said_of_a_weight(config, module, said):
    method = {"method": "compressed-tensors"} if config and "config_groups" in config else {}
    assert stated(config, module) == Stated(**method | said)


def test_channels_are_one_group():
    weights = {"num_bits": 8, "strategy": "channel", "group_size": None}
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"], "weights": weights}}}
    assert stated(config, UP).group == -1


@pytest.mark.parametrize(
    ("entry", "module", "ignored"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "model.lm_head2", False),
        ("model.layers.0", UP, True),
        ("model.layers.0", "model.layers.01.up_proj", False),
        ("gate", "mlp.gate_proj", False),
        ("gate", "mlp.gate", True),
        ("model.layers.*.mlp", UP, True),
        ("*up_proj*", UP, True),
        ("re:.*mlp", UP, True),
        ("re:mlp", UP, False),
        ("", UP, False),
    ],
)
@pytest.mark.parametrize("key", ["ignore", "modules_to_not_convert", "exclude_modules", "llm_int8_skip_modules"])
def test_ignore_lists(key, entry, module, ignored):
    assert stated({key: [entry], "quant_method": "fp8"}, module).ignored == (entry if ignored else "")


def test_a_module_that_dynamic_leaves_out_is_ignored():
    assert stated(DYNAMIC, "a.mlp.gate").ignored == "-:.*gate"
