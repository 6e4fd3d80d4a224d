"""Train states of Flax and archives of numpy, written by these, edited here, and read by these again."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from flax.training.train_state import TrainState

import paramend as pm


def state(dtype="float32"):
    model = nn.Sequential([nn.Dense(4, param_dtype=dtype), nn.relu, nn.Dense(2, param_dtype=dtype)])
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    made = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(1e-3))
    return made.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))


def same(a, b):
    leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(leaves, others, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_train_state_goes_through(tmp_path, dtype):
    before = state(dtype)
    path = tmp_path / "state.msgpack"
    path.write_bytes(serialization.to_bytes(before))
    expected = before.replace(params=pm.at(before.params, "layers_[-1]/kernel").zero())
    report = pm.at(pm.open(path), "params/layers_[-1]/kernel").zero().save(tmp_path / "out.msgpack")
    assert report.left_out == ()
    same(serialization.from_bytes(before, (tmp_path / "out.msgpack").read_bytes()), expected)
    pm.patch(path, lambda t: pm.at(t, "params/layers_[-1]/kernel").zero())
    assert path.read_bytes() == (tmp_path / "out.msgpack").read_bytes()
    same(serialization.from_bytes(before, path.read_bytes()), expected)
    pm.undo(path)
    same(serialization.from_bytes(before, path.read_bytes()), before)


def test_a_train_state_of_another_structure(tmp_path):
    before = state()
    path, out = tmp_path / "state.msgpack", tmp_path / "out.msgpack"
    path.write_bytes(serialization.to_bytes(before))
    moved = pm.at(pm.open(path), "params/layers_<n>/**").rename("params/dense_<n>/**")
    report = pm.at(pm.at(moved, "opt_state/0/nu/**").cast("bfloat16"), "opt_state/0/mu/**").delete().save(out)
    found = serialization.msgpack_restore(out.read_bytes())
    whole = serialization.msgpack_restore(path.read_bytes())
    assert found["step"] == whole["step"] == 1
    assert report.left_out == ()
    assert sorted(found["params"]) == ["dense_0", "dense_2"]
    same(found["params"]["dense_2"], whole["params"]["layers_2"])
    assert "mu" not in found["opt_state"]["0"] or not jax.tree.leaves(found["opt_state"]["0"]["mu"])
    assert found["opt_state"]["0"]["nu"]["layers_0"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("saver", [np.savez, np.savez_compressed])
def test_an_archive_of_numpy(tmp_path, saver):
    arrays = {"a/kernel": np.arange(6.0).reshape(2, 3), "a/bias": np.asfortranarray(np.ones((3, 2), "float16"))}
    arrays |= {
        "n": np.array(3),
        "flag": np.array([True, False]),
        "none": np.zeros((0, 2)),
        "c": np.ones(2, "complex64"),
    }
    saver(tmp_path / "x.npz", **arrays)
    for name, edit, expected in [
        ("value", lambda t: pm.at(t, "a/kernel").add(1), arrays | {"a/kernel": arrays["a/kernel"] + 1}),
        ("cast", lambda t: pm.at(t, "a/kernel").cast("float16"), arrays | {"a/kernel": arrays["a/kernel"].astype("e")}),
        ("gone", lambda t: pm.at(t, "a/bias").delete(), {k: v for k, v in arrays.items() if k != "a/bias"}),
        ("moved", lambda t: pm.at(t, "n").rename("m"), {("m" if k == "n" else k): v for k, v in arrays.items()}),
    ]:
        report = edit(pm.open(tmp_path / "x.npz")).save(tmp_path / f"{name}.npz")
        assert report.left_out == ()
        with np.load(tmp_path / f"{name}.npz") as found:
            assert set(found.files) == set(expected)
            for key, array in expected.items():
                assert found[key].dtype == array.dtype and np.array_equal(found[key], array), key
