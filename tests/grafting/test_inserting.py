"""Leaves put into a model that lacks them: all else stays, and what comes is what its library reads back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from flax import nnx
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


@pytest.mark.parametrize("old", ["zzz.**", "other"])
def test_a_rename_of_nothing_that_comes_is_an_error(models, old):
    hf, donor, *_ = models
    with pm.open(hf) as target, pm.open(donor) as source, pytest.raises(pm.errors.NoMatch, match=old.partition(".")[0]):
        pm.insert(target, source, "mtp.**", rename={old: old.replace("zzz", "model")})


def test_the_hint_of_a_clash_is_what_is_typed(models):
    hf = models[0]
    done = CliRunner().invoke(cli, ["insert", str(hf), str(hf), "**", "-o", "out"])
    assert (done.exit_code, done.output.partition("hint: ")[2]) == (2, "--rename 'old.**=new.**'\n")


def test_all_names_of_a_leaf_come_and_stay_one(tmp_path):
    shared, own = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    torch.save({"gone": own, "own": own + 1, "a": own + 2, "b": own + 3}, tmp_path / "host.pt")
    source = {"lm.embed": shared, "lm.head": shared, "x": torch.zeros(1)}
    torch.save(source, tmp_path / "source.pt")
    inserted, _ = pm.insert({"own": own}, source, "lm.**")
    assert list(inserted) == ["own", "lm.embed", "lm.head"] and inserted["lm.embed"] is inserted["lm.head"]
    with pm.open(tmp_path / "host.pt") as host, pm.open(tmp_path / "source.pt") as donor:
        made, _ = pm.insert(pm.at(host, "gone").delete(), donor, "**")
        pm.at(made, "lm.head").fill(4).save(tmp_path / "out.pt")
        pm.part(donor, "lm.**")[0].save(tmp_path / "part.pt")
    found = torch.load(tmp_path / "out.pt")
    assert found["lm.embed"].tolist() == found["lm.head"].tolist() == [[4] * 3] * 2
    assert {name: found[name].tolist() for name in ("own", "a", "b", "x")} == {
        "own": [2, 2], "a": [3, 3], "b": [4, 4], "x": [0]
    }  # fmt: skip
    found = torch.load(tmp_path / "part.pt")
    assert found["lm.embed"].data_ptr() == found["lm.head"].data_ptr() and len(found) == 2


def test_ties_of_a_host_go_by_its_leaves_that_are_left(tmp_path):
    tied, zero = torch.ones(4), torch.zeros(4)
    torch.save({"gone": zero + 1, "x": zero + 2, "a": tied, "b": tied, "c": zero}, tmp_path / "host.pt")
    save_file({"c": np.full(4, 7, "f4")}, tmp_path / "c.safetensors")
    with pm.open(tmp_path / "host.pt") as opened, pm.open(tmp_path / "c.safetensors") as source:
        host = pm.at(pm.split(opened, "x", into=["x", "y"]), "gone").delete()
        for made in (pm.insert(host, {"z": zero.numpy()}, "z")[0], pm.graft(host, source)[0]):
            pm.at(made, "a").fill(5).save(tmp_path / "out.pt", force=True)
            found = torch.load(tmp_path / "out.pt")
            assert found["a"].tolist() == found["b"].tolist() == [5] * 4
            assert found.get("z", zero).tolist() == [0] * 4 and found["c"].tolist() in ([0] * 4, [7] * 4)


@pytest.mark.parametrize(
    ("host", "donor", "paths"),
    [
        ({"a.b": 0}, {"a": {"c": 0}}, ["a.b", "a.c"]),
        ({"a/b": 0}, {"a": {"c": 0}}, ["a/b", "a/c"]),
        ({"a": {"b": 0}}, {"a.c": 0}, ["a"]),
    ],
)
def test_keys_are_joined_as_in_the_target(host, donor, paths):
    made = pm.insert(jax.tree.map(np.float32, host), jax.tree.map(np.float32, donor), "**")[0]
    assert list(made) == paths


def test_variables_stay_what_they_are():
    ours = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    theirs = nnx.state({"norm": nnx.BatchNorm(3, rngs=nnx.Rngs(0))})
    made = pm.insert(ours, theirs, "**")[0]
    assert {name: type(made["norm"][name]) for name in ("scale", "mean")} == {"scale": nnx.Param, "mean": nnx.BatchStat}
    assert made["norm"]["scale"] is not theirs["norm"]["scale"]
