"""`paramend port`."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

import paramend as pm
from paramend.cli.main import cli

MODELS = """
import flax.linen as nn
import numpy as np
import torch

x = np.ones((2, 4), "float32")


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.tanh(nn.Dense(4)(x)))


def variables(dtype="float32"):
    dense = {"kernel": np.zeros((4, 4), dtype), "bias": np.zeros(4, dtype)}
    return {"params": {"Dense_0": dense, "Dense_1": dense}}


def halves():
    return variables("float16")


def flax():
    return Nested().bind(variables()), (x,)


def source():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4)), (x,)


def norm():
    return torch.nn.BatchNorm1d(3)


def fails():
    raise ValueError("no such size")


def wrong():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4)), (x,)
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    (tmp_path / "models_to_port.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "models_to_port", None)
    del sys.modules["models_to_port"]
    monkeypatch.syspath_prepend(str(tmp_path))
    import models_to_port

    torch.save(models_to_port.source()[0].state_dict(), "torch.pt")
    pm.save(models_to_port.variables(), "flax.msgpack")
    yield models_to_port
    sys.modules.pop("models_to_port", None)


def run(*words, status=0):
    done = CliRunner().invoke(cli, ["port", *words])
    assert done.exit_code == status, done.output
    return done.output


def test_from_a_file_for_a_file(models, tmp_path):
    run("torch.pt", "--like", "flax.msgpack", "-o", "out.msgpack")
    want, _ = pm.port(models.variables(), models.source()[0])
    pm.verify("out.msgpack", want)
    run("out.msgpack", "--like", "torch.pt", "-o", "back.pt")
    pm.verify("back.pt", "torch.pt")


@pytest.mark.parametrize("make", ["variables", "halves"])
def test_from_a_file_for_a_function(models, make):
    said = run("torch.pt", "--like", f"models_to_port:{make}", "-o", "out.safetensors")
    assert "params/Dense_0/kernel ◄─ 0.weight" in said
    found, target = load_file("out.safetensors"), getattr(models, make)()
    want, _ = pm.port(target, models.source()[0])
    assert sorted(found) == [f"params/Dense_{i}/{name}" for i in (0, 1) for name in ("bias", "kernel")]
    for path, value in found.items():
        assert value.tobytes() == pm.at(want, path).one().tobytes()


def test_a_counter_is_not_left_out_of_a_file_unseen(models):
    ones = np.ones(3)
    pm.save({"params": {"scale": ones, "bias": ones}, "batch_stats": {"mean": ones, "var": ones}}, "norm.npz")
    said = run("norm.npz", "--like", "models_to_port:norm", "-o", "out.safetensors")
    assert "num_batches_tracked  int64[]  not a parameter" in said and "4 of 5 leaves copied" in said


def test_a_rename_and_json(models):
    data = json.loads(
        run(
            "torch.pt", "--like", "models_to_port:variables", "--rename", "0=Dense_1", "-o", "o.npz", "--json"
        ).partition("wrote")[0]
    )
    rows = {row["path"]: row["source"] for row in data["copied"]}
    assert rows["params/Dense_1/kernel"] == "0.weight"
    assert data["layout"]["rules"]


def test_a_proof_is_printed(models):
    said = run("models_to_port:source", "--like", "models_to_port:flax", "--prove", "-o", "out.safetensors")
    assert "both compute the same" in said and "Dense_1 (Dense) ◄─ 0 (Linear)" in said
    assert np.array_equal(
        load_file("out.safetensors")["params/Dense_1/kernel"], models.source()[0][0].weight.detach().numpy().T
    )
    said = run("models_to_port:wrong", "--like", "models_to_port:flax", "--prove", "-o", "no.safetensors", status=2)
    assert "do not compute the same" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["torch.pt", "--like", "models_to_port:flax", "--prove"], "torch.pt is a checkpoint"),
        (["torch.pt", "--like", "models_to_port:nothing"], "has no attribute 'nothing'"),
        (["torch.pt", "--like", "no_such_module:make"], "No module named"),
        (
            ["torch.pt", "--like", "models_to_port:fails", "-o", "o.npz"],
            "models_to_port:fails: ValueError: no such size",
        ),
        (["torch.pt", "--like", "models_to_port:x", "-o", "o.npz"], "is not callable"),
        (["models_to_port:source", "--like", "models_to_port:variables"], "-o OUT is needed"),
    ],
)
def test_what_is_refused(models, words, says):
    assert says in run(*words, status=2)


@pytest.mark.parametrize("option", [["--record"], ["--workers", "2"], ["--resume"], ["--engine", "ray"]])
def test_what_only_checkpoints_can_is_refused_for_a_model_in_memory(models, option):
    said = run("models_to_port:source", "--like", "models_to_port:flax", "-o", "out.safetensors", *option, status=2)
    assert "SOURCE is a model in memory" in said and not Path("out.safetensors").exists()
