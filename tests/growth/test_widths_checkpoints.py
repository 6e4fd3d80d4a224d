"""`widen` and `narrow` on checkpoints: nothing is computed before they are saved, and the files say what modules do."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadArgument, Quantized, SpecMismatch, Unsupported
from support.tiny_models import kind, make

SAID = {"hidden": 64, "heads": 8, "kv_heads": 4, "mlp": 96}


def saved(folder, family="llama", shards=None, **changes):
    model = make(family, **changes)
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_files_hold_what_the_module_does(family, tmp_path):
    model = saved(tmp_path / "old", family, "40kB", tie_word_embeddings=True)
    said = SAID if family == "llama" else {"hidden": 64, "heads": 8}
    with pm.open(tmp_path / "old") as checkpoint:
        lazy, report = pm.widen(checkpoint, **said)
        assert lazy.plan.configured
        lazy.save(tmp_path / "new")
    again = kind(family).from_pretrained(tmp_path / "new")
    wide, in_memory = pm.widen(model, **said)
    for name, value in wide.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    told = {"_name_or_path", "dtype", "transformers_version"}
    said, known = (one.config.to_dict() for one in (again, wide))
    assert {key: said[key] for key in said.keys() - told} == {key: known[key] for key in known.keys() - told}
    assert {row.path for row in report.rows} <= {row.path for row in in_memory.rows}
    assert torch.equal(again.lm_head.weight, again.get_input_embeddings().weight)


def test_a_head_that_the_family_ties_counts_as_tied(tmp_path):
    model = saved(tmp_path / "old", "gemma", tie_word_embeddings=True)
    config = json.loads((tmp_path / "old/config.json").read_text())
    (tmp_path / "old/config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "tie_word_embeddings"})
    )
    pm.widen(pm.open(tmp_path / "old"), hidden=64)[0].save(tmp_path / "new")
    norm = pm.widen(model, hidden=64)[0].model.norm.weight
    assert np.array_equal(load_file(tmp_path / "new/model.safetensors")["model.norm.weight"], norm.detach().numpy())


def test_zero_scales_what_norms_add(tmp_path):
    saved(tmp_path / "old")
    eps = json.loads((tmp_path / "old/config.json").read_text())["rms_norm_eps"]
    pm.widen(pm.open(tmp_path / "old"), hidden=40, method="zero")[0].save(tmp_path / "new")
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert (config["rms_norm_eps"], config["hidden_size"], config["head_dim"]) == (eps * 0.8, 40, 8)


def test_a_narrow_checkpoint_holds_the_same_bits(tmp_path):
    saved(tmp_path / "old", dtype=torch.bfloat16)
    small, report = pm.narrow(pm.open(tmp_path / "old"), {"mlp": 8, "kv_heads": [1], "layers": [2, 1]})
    small.save(tmp_path / "new")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("old", "new"))
    for number, layer in enumerate((2, 1)):
        there, here = f"model.layers.{layer}.mlp.up_proj.weight", f"model.layers.{number}.mlp.up_proj.weight"
        assert new[here].tobytes() == old[there][report.kept["mlp"][layer]].tobytes()
    assert kind("llama").from_pretrained(tmp_path / "new").config.num_key_value_heads == 1


def test_a_checkpoint_of_a_plain_tree_grows_by_features(tmp_path):
    path = tmp_path / "model.npz"
    params = {"Dense_0": {"kernel": np.ones((3, 2), "float32")}, "Dense_1": {"kernel": np.ones((2, 1), "float32")}}
    pm.save(params, path)
    wide, _ = pm.widen(pm.open(path), features={"Dense_0": 3})
    wide.save(tmp_path / "new.npz")
    assert pm.load(tmp_path / "new.npz")["Dense_1"]["kernel"].ravel().tolist() == [0.5, 1, 0.5]


def test_what_is_not_known_is_refused_before_anything_is_written(tmp_path):
    saved(tmp_path)
    checkpoint = pm.open(tmp_path)
    with pytest.raises(BadArgument, match="no such axis"):
        pm.narrow(checkpoint, {"expert_mlp": 4})
    with pytest.raises(Unsupported, match="not a multiple of 32"):
        pm.widen(checkpoint, hidden=48)
    with pytest.raises(BadArgument, match=r"which axes model\.extra"):
        pm.widen(pm.insert(checkpoint, {"model.extra.weight": np.ones((3, 3))}, "**")[0], mlp=128)
    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"intermediate_size": 64', '"intermediate_size": 63'))
    with pytest.raises(SpecMismatch, match="should be 63 long"):
        pm.widen(pm.open(tmp_path), mlp=128)
    config.write_text(text.replace('"model_type": "llama"', '"model_type": "lama"'))
    with pytest.raises(BadArgument, match="'lama' model"):
        pm.widen(pm.open(tmp_path), mlp=128)
    config.unlink()
    with pytest.raises(BadArgument, match="no configuration"):
        pm.widen(pm.open(tmp_path), mlp=128)


def test_recipes_and_commands_do_the_same(tmp_path):
    saved(tmp_path / "old")
    recipe = pm.Recipe([{"widen": {"mlp": 96}}, {"narrow": {"kv_heads": [1], "layers": 2}}])
    recipe.apply(pm.open(tmp_path / "old")).save(tmp_path / "new")
    run = CliRunner().invoke
    assert run(cli, ["widen", str(tmp_path / "old"), "--mlp", "96", "-o", str(tmp_path / "wide")]).exit_code == 0
    asked = ["narrow", str(tmp_path / "wide"), "--kv-heads", "1,", "--layers", "2", "-o", str(tmp_path / "small")]
    assert run(cli, asked).exit_code == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("new", "small"))
    assert one.keys() == other.keys()
    assert all(value.tobytes() == other[name].tobytes() for name, value in one.items())
    np.savez(tmp_path / "scores.npz", mlp=np.arange(64.0))
    asked = ["narrow", str(tmp_path / "old"), "--mlp", "2", "--by", str(tmp_path / "scores.npz"), "--dry-run", "--json"]
    assert json.loads(run(cli, asked).stdout)["kept"]["mlp"] == [[62, 63]] * 3
    step = {"narrow": {"mlp": 2, "by": str(tmp_path / "scores.npz")}}
    chosen = pm.Recipe([step]).apply(pm.open(tmp_path / "old"))["model.layers.0.mlp.up_proj.weight"]
    assert (chosen == pm.open(tmp_path / "old")["model.layers.0.mlp.up_proj.weight"][62:]).all()
    np.savez(tmp_path / "old.npz", **{"a/kernel": np.ones((2, 2)), "b/kernel": np.ones((2, 1))})
    asked = ["widen", str(tmp_path / "old.npz"), "--feature", "a=4", "-o", str(tmp_path / "wide.npz")]
    assert run(cli, asked).exit_code == 0
    assert np.load(tmp_path / "wide.npz")["b/kernel"].shape == (4, 1)
    back = pm.Recipe([{"narrow": {"features": {"a": 2}}}]).apply(pm.open(tmp_path / "wide.npz"))
    assert back["b/kernel"].shape == (2, 1)
    for wrong in (["--mlp", "x"], ["--feature", "a"], ["--method", "copy", "--mlp", "96"], []):
        assert run(cli, ["widen", str(tmp_path / "old"), *wrong, "--dry-run"]).exit_code == 2
    with pytest.raises(pm.errors.BadRecipe, match="not a multiple"):
        pm.Recipe([{"widen": {"hidden": 33}}]).apply(pm.open(tmp_path / "old"))


def test_quantised_weights_are_refused(tmp_path):
    tree = {"fc": {"weight_packed": np.zeros((1, 1), "int32"), "weight_scale": np.ones((1, 1), "float32")}}
    pm.save(tree, tmp_path / "model.safetensors")
    for model in (tree, pm.open(tmp_path / "model.safetensors")):
        with pytest.raises(Quantized, match="part of a quantised weight"):
            pm.widen(model, features={"fc": 16})
