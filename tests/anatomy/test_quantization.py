"""What configurations say of one quantised weight."""

import json

import ml_dtypes
import numpy as np
import pytest

import paramend as pm
from paramend.anatomy.quantization import renamed, stated
from paramend.leaves.codecs.codec import Stated

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


LISTED = ["lm_head", "model.layers.1.mlp", "gate", "re:.*norm$", "visual.blocks"]
NAMES = {
    "lm_head": "lm_head",
    "model.layers.1.mlp.up": "text.layers.1.ffn.up",
    "model.layers.1.mlp.down": "text.layers.1.ffn.down",
    "model.layers.1.moe.gate": "text.layers.1.moe.router",
    "model.norm": "text.final",
    "model.layers.0.mlp.up": "text.layers.0.mlp.up",
}


def test_lists_of_modules_have_their_new_names():
    config = {"quant_method": "compressed-tensors", "ignore": LISTED}
    config["config_groups"] = {"a": {"targets": ["Linear", "model.layers.0.mlp.up"], "weights": INT4}}
    new = renamed("config.json", {"quantization_config": config}, NAMES)["quantization_config"]
    kept = ["lm_head", "text.layers.1.ffn", "gate", "re:.*norm$", "visual.blocks"]
    assert new["ignore"] == [*kept, "text.layers.1.moe.router", "text.final"]
    assert new["config_groups"]["a"]["targets"] == ["Linear", "text.layers.0.mlp.up"]
    for old, now in NAMES.items():
        assert bool(stated(config, old).ignored) == bool(stated(new, now).ignored)


def test_patterns_of_gptqmodel_get_new_names_beside_them():
    config = {"quant_method": "gptq", "dynamic": {"-:.*gate": {}}}
    new = renamed("config.json", {"quantization_config": config}, NAMES)["quantization_config"]
    assert stated(new, "text.layers.1.moe.router").ignored and not stated(new, "text.layers.1.ffn.up").ignored


def test_a_rename_and_a_part_of_a_checkpoint_take_the_lists_along(tmp_path):
    codes = {"weight": np.ones((4, 4), ml_dtypes.float8_e4m3fn), "weight_scale_inv": np.ones((1, 1), "float32")}
    leaves = {f"model.up.{name}": leaf for name, leaf in codes.items()} | {"model.gate.weight": np.ones((4, 4), "f4")}
    pm.save(leaves, tmp_path / "model.safetensors")
    config = {"quant_method": "fp8", "modules_to_not_convert": ["model.gate"]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pm.open(tmp_path) as checkpoint:
        pm.at(checkpoint, "model.**").rename("text.model.**").save(tmp_path / "a")
        pm.part(checkpoint, "**", rename={"model.**": "**"})[0].save(tmp_path / "b")
        layout = pm.Layout([{"from": "model.**", "to": "net.**"}], name="net")
        layout.to(checkpoint)[0].save(tmp_path / "d")
        pm.part(checkpoint, "model.up.weight", rename={"model.up.weight": "x.weight"})[0].save(tmp_path / "c")
    lists = [json.loads((tmp_path / out / "config.json").read_text())["quantization_config"] for out in "abd"]
    assert [each["modules_to_not_convert"] for each in lists] == [["text.model.gate"], ["gate"], ["net.gate"]]
    with pm.open(tmp_path / "c", raw=True) as stored:
        assert sorted(stored.paths) == ["x.weight", "x.weight_scale_inv"]


def test_floats_that_are_inserted_join_the_list(tmp_path):
    leaves = {"up.weight": np.ones((4, 4), ml_dtypes.float8_e4m3fn), "up.weight_scale_inv": np.ones((1, 1), "f4")}
    pm.save(leaves, tmp_path / "model.safetensors")
    config = {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pm.open(tmp_path) as model:
        floats, codes = {"mtp.weight": np.ones((4, 4), "f4")}, {f"x.{name}": leaf for name, leaf in leaves.items()}
        pm.insert(pm.insert(model, floats, "**")[0], codes, "x.up.weight")[0].save(tmp_path / "out")
    with pm.open(tmp_path / "out") as made:
        assert made.paths == ["up.weight", "mtp.weight", "x.up.weight"]
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert found["modules_to_not_convert"] == ["lm_head", "mtp"]
