"""Grafts onto checkpoints of formats that hold more than leaves: what is not a leaf of the graft stays as it is."""

import os

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch
from flax import linen as nn, serialization
from flax.training.train_state import TrainState

import paramend as pm
from paramend.errors import CannotWrite


@pytest.fixture
def torch_file(tmp_path):
    """What a training script saves: weights with a tie and a view, an epoch, a nested optimizer."""
    shared = torch.zeros(4, 3)
    model = {
        "emb": shared,
        "head": shared,
        "fc.weight": torch.nn.Parameter(torch.zeros(3, 4).t()),
        "fc.bias": torch.zeros(4, dtype=torch.float16),
        "rest": torch.arange(5),
    }
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.5).state_dict()
    torch.save({"model": model, "optimizer": optimizer, "epoch": 7, "tags": ["a", None]}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.mark.parametrize("kind", ["safetensors", "memory", "pt"])
def test_a_torch_file_keeps_its_structure(torch_file, tmp_path, kind):
    rng = np.random.default_rng(0)
    values = {
        "model.emb": rng.normal(size=(4, 3)).astype("float32"),
        "model.fc.weight": rng.normal(size=(4, 3)).astype("float32"),
        "model.fc.bias": np.array([1.5, 1e6, 0, 2], "float32"),
    }
    source = values
    if kind == "safetensors":
        safetensors.numpy.save_file(values, tmp_path / "s.safetensors")
        source = pm.open(tmp_path / "s.safetensors")
    if kind == "pt":
        torch.save({name: torch.from_numpy(value) for name, value in values.items()}, tmp_path / "s.pt")
        source = pm.open(tmp_path / "s.pt")
    with pm.open(torch_file) as target:
        tree, report = pm.graft(target, source)
        said = tree.save(tmp_path / "out.pt")
    assert said.left_out == ()
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert out["epoch"] == 7
    assert out["tags"] == ["a", None]
    assert out["optimizer"]["param_groups"][0]["lr"] == 0.5
    model = out["model"]
    assert model["emb"].data_ptr() == model["head"].data_ptr()
    assert model["emb"].numpy().tobytes() == values["model.emb"].tobytes()
    assert isinstance(model["fc.weight"], torch.nn.Parameter)
    assert (model["fc.weight"].detach().numpy() == values["model.fc.weight"]).all()
    assert model["fc.bias"].tolist() == [1.5, float("inf"), 0, 2]
    assert model["rest"].tolist() == [0, 1, 2, 3, 4]
    assert {row.path: row.overflowed for row in report.copied}["model.fc.bias"] == 1
    if kind != "memory":
        source.close()


def test_the_dtype_of_the_source_and_another_shape(torch_file, tmp_path):
    source = {"model": {"fc": {"weight": np.ones((4, 2), "float64"), "bias": np.full(4, 2, "bool")}}}
    with pm.open(torch_file) as target:
        tree, _ = pm.graft(target, source, dtype="source", mismatch="overlap")
        assert tree["model.fc.bias"].dtype == bool
        tree.save(tmp_path / "out.pt")
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert out["epoch"] == 7
    assert out["model"]["fc.weight"].dtype == torch.float64
    assert out["model"]["fc.weight"].tolist() == [[1, 1, 0]] * 4
    assert out["model"]["fc.bias"].tolist() == [True] * 4


def test_edits_before_and_after_stream_too(torch_file, tmp_path):
    safetensors.numpy.save_file({"e": np.ones((4, 3), "float32")}, tmp_path / "s.safetensors")
    with pm.open(torch_file) as target, pm.open(tmp_path / "s.safetensors") as source:
        source = pm.at(source, "e").multiply(3)
        tree, _ = pm.graft(pm.at(target, "model.rest").fill(9), source, rename={"e": "model.emb"})
        tree = pm.at(tree, "model.head")[0].zero()
        again, _ = pm.graft(tree, {"fc.bias": np.ones(4, "float16")}, rename={"**": "model/**"})
        again.save(tmp_path / "out.pt")
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert out["model"]["emb"].tolist() == [[0, 0, 0], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert out["model"]["rest"].tolist() == [9] * 5
    assert out["model"]["fc.bias"].tolist() == [1] * 4
    assert out["epoch"] == 7


def test_onto_another_format_the_kernel_copies(torch_file, tmp_path):
    safetensors.numpy.save_file({"model.emb": np.ones((4, 3), "float32")}, tmp_path / "s.safetensors")
    with pm.open(torch_file) as target, pm.open(tmp_path / "s.safetensors") as source:
        tree, _ = pm.graft(target, source)
        report = pm.at(tree, "model.fc.weight").delete().save(tmp_path / "out.safetensors", record=True)
        tree.save(tmp_path / "out.pt", record=True)
    assert report.bytes_computed == 0
    pm.verify_record(tmp_path / "out.safetensors")
    pm.verify_record(tmp_path / "out.pt")
    assert (pm.load(tmp_path / "out.safetensors", nested=False)["model.head"] == 1).all()


def test_a_source_that_is_written_over_or_changes_is_refused(torch_file, tmp_path):
    safetensors.numpy.save_file({"model.emb": np.ones((4, 3), "float32")}, tmp_path / "s.safetensors")
    with pm.open(torch_file) as target, pm.open(tmp_path / "s.safetensors") as source:
        tree, _ = pm.graft(target, source)
        with pytest.raises(CannotWrite, match="is the file that is being read"):
            tree.save(tmp_path / "s.safetensors", force=True)
        os.utime(tmp_path / "s.safetensors", ns=(0, 0))
        with pytest.raises(pm.errors.BadCheckpoint, match="another program changed it"):
            tree.save(tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(4)(x)))


def state(seed):
    params = MLP().init(jax.random.key(seed), jnp.ones((1, 3)))["params"]
    return TrainState.create(apply_fn=MLP().apply, params=params, tx=optax.adam(1e-3)).replace(step=5 + seed)


def test_a_train_state_in_msgpack(tmp_path):
    old, new = state(0), state(1)
    (tmp_path / "old.msgpack").write_bytes(serialization.to_bytes(old))
    (tmp_path / "new.msgpack").write_bytes(serialization.to_bytes(new))
    with pm.open(tmp_path / "new.msgpack") as target, pm.open(tmp_path / "old.msgpack") as source:
        tree, _ = pm.graft(target, source, only="params/Dense_0/**")
        report = tree.save(tmp_path / "out.msgpack")
    assert report.left_out == ()
    expected = new.replace(params=pm.graft(new.params, old.params, only="Dense_0/**")[0])
    assert (tmp_path / "out.msgpack").read_bytes() == serialization.to_bytes(expected)
    assert msgpack.unpackb((tmp_path / "out.msgpack").read_bytes(), strict_map_key=False)["step"] == 6


def test_a_train_state_in_orbax(tmp_path):
    old, new = state(0), state(1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "old", old)
        checkpointer.save(tmp_path / "new", new)
    with pm.open(tmp_path / "new") as target, pm.open(tmp_path / "old") as source:
        tree, _ = pm.graft(target, pm.at(source, "**/bias").add(1), only="params/**")
        tree.save(tmp_path / "out")
    with ocp.StandardCheckpointer() as checkpointer:
        out = checkpointer.restore(tmp_path / "out", new)
    assert out.step == 6
    assert jax.tree.structure(out) == jax.tree.structure(new)
    for name in ("Dense_0", "Dense_1"):
        assert (out.params[name]["kernel"] == old.params[name]["kernel"]).all()
        assert (out.params[name]["bias"] == old.params[name]["bias"] + 1).all()


def test_npz_keeps_its_order_and_other_arrays(tmp_path):
    np.savez(tmp_path / "t.npz", b=np.zeros(3), a=np.zeros(2), n=np.int64(3))
    with pm.open(tmp_path / "t.npz") as target:
        pm.graft(target, {"a": np.ones(2)})[0].save(tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as out:
        assert list(out) == ["b", "a", "n"]
        assert (out["a"].tolist(), out["n"].item()) == ([1, 1], 3)
