"""Leaves put into a model that lacks them: all else stays, and what comes is what its library reads back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import paramend as pm
from paramend.cli.main import cli


@pytest.fixture
def models(tmp_path):
    """A model in two shards, and a donor with a prediction head."""
    (tmp_path / "hf").mkdir()
    halves = [{"model.layers.0.w": np.ones((2, 3), "f4")}, {"model.layers.1.w": np.zeros((2, 3), "f4")}]
    names = [f"model-{n:05}-of-00002.safetensors" for n in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        save_file(half, tmp_path / "hf" / name)
    table = {name: file for file, half in zip(names, halves, strict=True) for name in half}
    index = {"metadata": {"total_size": 48}, "weight_map": table}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "hf" / "config.json").write_text("{}")
    head = {"mtp.0.w": np.arange(6, dtype="f2").reshape(2, 3), "mtp.0.b": np.arange(3, dtype="i4"), "other": np.ones(1)}
    save_file(head, tmp_path / "donor.safetensors")
    return tmp_path / "hf", tmp_path / "donor.safetensors", halves[0] | halves[1], head


def test_into_a_checkpoint(models, tmp_path):
    hf, donor, old, head = models
    with pm.open(hf) as target, pm.open(donor) as source:
        pm.insert(target, source, "mtp.**", rename={"mtp.<n>.**": "model.mtp.<n+1>.**"})[0].save(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {}
    for file in set(index["weight_map"].values()):
        found |= load_file(tmp_path / "out" / file)
    right = old | {"model.mtp.1.w": head["mtp.0.w"], "model.mtp.1.b": head["mtp.0.b"]}
    assert found.keys() == right.keys() == index["weight_map"].keys()
    assert all(
        (found[name].tobytes(), found[name].dtype) == (right[name].tobytes(), right[name].dtype) for name in right
    )
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in right.values())
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_edits_and_trees_come_along(models, tmp_path):
    hf, donor, old, head = models
    with pm.open(hf) as target, pm.open(donor) as source:
        doubled = pm.at(target, "**.w").multiply(2)
        made = pm.insert(doubled, pm.at(source, "mtp.0.w").add(1), "mtp.0.w")[0]
        pm.insert(made, {"deep": {"down": jnp.ones(2)}}, "**")[0].save(tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert sorted(found) == ["deep.down", "model.layers.0.w", "model.layers.1.w", "mtp.0.w"]
    assert (found["model.layers.0.w"] == 2 * old["model.layers.0.w"]).all()
    assert (found["mtp.0.w"] == head["mtp.0.w"] + 1).all()
    assert found["deep.down"].tolist() == [1, 1]


def test_into_trees(models):
    _, donor, _, head = models
    nested = {"params": {"a": {"w": jnp.ones(2)}}}
    with pm.open(donor) as source:
        made = pm.insert(nested, source, "mtp.**", rename={"mtp.**": "params.mtp.**"})[0]
    assert list(made["params"]) == ["a", "mtp"]
    assert isinstance(made["params"]["mtp"]["0"]["w"], jax.Array)
    assert (np.asarray(made["params"]["mtp"]["0"]["w"]) == head["mtp.0.w"]).all()
    assert made["params"]["a"] is nested["params"]["a"]
    flat = {"fc.weight": torch.ones(1, 2)}
    made = pm.insert(flat, {"mtp": {"w": torch.zeros(2)}}, "**")[0]
    assert list(made) == ["fc.weight", "mtp.w"]
    assert list(flat) == ["fc.weight"]


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_what_is_there_is_never_replaced(models, where, tmp_path):
    tree = {"a": np.ones(1), "b.c": np.ones(1), "x": np.ones(1)}
    if where == "disk":
        save_file(tree, tmp_path / "t.safetensors")
        tree = pm.open(tmp_path / "t.safetensors")
    donor = {"a": np.zeros(1), "b": np.zeros(1), "x": {"y": np.zeros(1)}, "free": np.zeros(1)}
    with pytest.raises(ValueError, match="3 leaves would stand where something else does") as error:
        pm.insert(tree, donor, "**")
    assert {"a as a", "b as b"} < {line.strip() for line in str(error.value).splitlines()}
    with pytest.raises(ValueError, match="would stand"):
        pm.insert(tree, {"p": np.ones(1), "q": np.ones(1)}, "**", rename={"p": "n", "q": "n"})
    with pytest.raises(LookupError):
        pm.insert(tree, donor, "fre")
    with pytest.raises(pm.errors.Unsupported):
        pm.insert(torch.nn.Linear(1, 1), donor, "free")


def test_as_a_command(models, tmp_path):
    hf, donor, _, _ = models
    words = ["insert", str(hf), str(donor), "mtp.**", "--rename", "mtp.**=model.mtp.**", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert "2 leaves before, 4 after" in done.output
    with pm.open(tmp_path / "out") as made:
        assert {"model.mtp.0.w", "model.mtp.0.b"} < {made.index.path(n) for n in made.index.numbers}
    done = CliRunner().invoke(cli, ["insert", str(tmp_path / "out"), str(hf), "**", "-o", str(tmp_path / "no")])
    assert (done.exit_code, (tmp_path / "no").exists()) == (2, False)
    assert "model.layers.1.w as model.layers.1.w" in done.output
