"""Blocks that predict further tokens, numbered after the last layer, are no layers to positions, deepen and drop."""

import copy
import json
import pickle

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import NoMatch, OutOfRange

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
NAMES += ("mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")


def model(folder, *, nested=False, blocks=1, layers=3, **says):
    folder.mkdir()
    tensors = {
        f"model.layers.{i}.{name}.weight": np.full(4, i, "float32") for i in range(layers + blocks) for name in NAMES
    }
    for i in range(layers, layers + blocks):
        tensors |= {
            f"model.layers.{i}.{name}.weight": np.full(4, i, "float32") for name in ("eh_proj", "enorm", "hnorm")
        }
    safetensors.numpy.save_file(tensors | {"lm_head.weight": np.ones((2, 4), "float32")}, folder / "model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": layers, "num_nextn_predict_layers": blocks, **says}
    (folder / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    return folder


def up(tree, selector):
    return pm.at(tree, f"{selector}.mlp.up_proj.*").paths


def path(*numbers):
    return [f"model.layers.{number}.mlp.up_proj.weight" for number in numbers]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocks", [1, 2])
def test_positions_count_layers(tmp_path, nested, blocks):
    checkpoint = pm.open(model(tmp_path / "model", nested=nested, blocks=blocks))
    for tree in (checkpoint, copy.deepcopy(checkpoint), pickle.loads(pickle.dumps(checkpoint))):
        assert up(tree, "model.layers[-1]") == path(2)
        assert up(tree, "model.layers[*]") == up(tree, "**.layers[:]") == path(0, 1, 2)
        assert up(tree, "model.layers.*") == path(*range(3 + blocks))
        assert up(tree, "model.layers.3") == path(3)
        with pytest.raises(OutOfRange, match="3 numbered entries"):
            up(tree, "model.layers[3]")
    assert up(pm.at(checkpoint, "model.layers.0.**").delete(), "model.layers[-1]") == path(2)
    renamed = pm.at(checkpoint, "model.layers[-1].**").rename("last.**")
    assert [name for name in renamed.index.texts.values() if name.endswith("up_proj.weight") and "last" in name] == [
        "last.mlp.up_proj.weight"
    ]


def test_a_patch_counts_the_same(tmp_path):
    folder = model(tmp_path / "model")
    pm.patch(folder, lambda tree: pm.at(tree, "model.layers[-1].mlp.up_proj.*").zero())
    values = pm.load(folder, nested=False)
    assert not values[path(2)[0]].any()
    assert values[path(3)[0]].all()


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1, 2], [2]], ids=str)
@pytest.mark.parametrize("blocks", [1, 2])
def test_blocks_stay_at_the_end(tmp_path, order, blocks):
    told = {"quantization_config": {"ignore": ["model.layers.3.eh_proj", "model.layers.1.mlp"]}}
    with pm.open(model(tmp_path / "model", blocks=blocks, **told)) as checkpoint:
        made, report = pm.deepen(checkpoint, order=order)
        assert up(made, "model.layers[-1]") == path(len(order) - 1)
        made.save(tmp_path / "out")
    values, n = pm.load(tmp_path / "out", nested=False), len(order)
    expected = [*order, *range(3, 3 + blocks)]
    assert [values[path(number)[0]][0] for number in range(n + blocks)] == expected
    assert [number for number in range(n + blocks) if f"model.layers.{number}.enorm.weight" in values] == list(
        range(n, n + blocks)
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (n, blocks)
    ignored = [f"model.layers.{n}.eh_proj", *(f"model.layers.{j}.mlp" for j, i in enumerate(order) if i == 1)]
    assert config["quantization_config"]["ignore"] == ignored
    assert up(pm.open(tmp_path / "out"), "model.layers[-1]") == path(n - 1)
    assert report.config[0] == f"num_hidden_layers: 3 -> {n}"


def test_the_command_drops_the_last_layer(tmp_path):
    folder = model(tmp_path / "model")
    result = CliRunner().invoke(cli, ["deepen", str(folder), "--drop", "-1", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert sorted(pm.load(tmp_path / "out", nested=False)[name][0] for name in path(0, 1, 2)) == [0, 1, 3]


def test_numbers_that_are_not_those_of_layers_and_blocks_are_all_counted(tmp_path):
    folder = model(tmp_path / "model")
    for says in ({"num_hidden_layers": 4}, {"num_hidden_layers": 2}, {}, [], "{"):
        (folder / "config.json").write_text(json.dumps(says) if says != "{" else '{"num_nextn_predict_layers":')
        assert up(pm.open(folder), "model.layers[-1]") == path(3)


@pytest.mark.parametrize("config", [{"num_hidden_layers": 2}, {"text_config": {"num_hidden_layers": 2}}])
def test_the_layers_need_no_name_where_a_configuration_counts_them(tmp_path, config):
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    beside = ["mtp.layers.0.mlp.up_proj", *(f"visual.blocks.{i}.up_proj" for i in range(3))]
    (tmp_path / "m").mkdir()
    tensors = {f"{name}.weight": np.ones(2, "float32") for name in (*names, *beside)}
    safetensors.numpy.save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(NoMatch, match="ambiguous"):
        pm.deepen(pm.open(tmp_path / "m"), order=[0, 1, 1], identity=None)
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    deeper, _ = pm.deepen(pm.open(tmp_path / "m"), order=[0, 1, 1], identity=None)
    assert set(deeper) == {*tensors, "model.layers.2.mlp.up_proj.weight"}
    assert pm.anatomy(deeper).mtp == {"count": 1, "where": ["mtp.layers.0"]}
