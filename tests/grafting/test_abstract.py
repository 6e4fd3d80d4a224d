"""Grafts onto trees of shapes: what `jax.eval_shape` gives, and torch modules on the meta device."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
from flax import linen as nn, nnx
from flax.training.train_state import TrainState

import paramend as pm
from paramend.errors import GraftRefused


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(4, param_dtype=jnp.bfloat16)(x)))


X = jnp.ones((1, 3))
PARAMS = MLP().init(jax.random.key(0), X)
ABSTRACT = jax.eval_shape(MLP().init, jax.random.key(0), X)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(one, jax.Array)
        assert one.dtype == other.dtype
        assert one.weak_type == other.weak_type
        assert np.array_equal(one, other)


@pytest.mark.parametrize("source", ["memory", "numpy", "safetensors", "orbax"])
def test_a_checkpoint_goes_into_the_shapes_of_a_model(tmp_path, source):
    if source == "memory":
        given = PARAMS
    elif source == "numpy":
        given = jax.tree.map(np.asarray, PARAMS)
    elif source == "safetensors":
        pm.save(PARAMS, tmp_path / "m.safetensors")
        given = pm.open(tmp_path / "m.safetensors")
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "m", PARAMS)
        given = pm.open(tmp_path / "m")
    tree, report = pm.graft(ABSTRACT, given)
    same(tree, PARAMS)
    assert len(report.copied) == 4


@pytest.mark.parametrize("abstract", [True, False])
def test_what_was_given_may_change_afterwards(abstract):
    """The memory of an array of numpy may become that of one of JAX, where it happens to be aligned."""
    given = {str(n): np.ones((1 << 16) + n, "float32") for n in range(8)}
    target = {name: jnp.zeros(value.shape) for name, value in given.items()}
    tree, _ = pm.graft(jax.eval_shape(lambda: target) if abstract else target, given)
    for value in given.values():
        value[:] = 5
    assert all((value == 1).all() for value in tree.values())


def test_dtypes_and_sharding():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    target = {"w": jax.ShapeDtypeStruct((4,), jnp.bfloat16, sharding=sharding)}
    tree, report = pm.graft(target, {"w": np.array([1, 1e9, 1e-45, 3], "float32")})
    assert tree["w"].sharding == sharding
    assert tree["w"].dtype == jnp.bfloat16
    assert report.copied[0].did == "copied, cast from float32"
    tree, _ = pm.graft(target, {"w": jnp.ones(4)}, dtype="source")
    assert tree["w"].sharding == sharding
    assert tree["w"].dtype == jnp.float32


def test_each_abstract_leaf_must_get_a_value():
    lacking = {"params": {"Dense_0": PARAMS["params"]["Dense_0"]}}
    with pytest.raises(GraftRefused) as refused:
        pm.graft(ABSTRACT, lacking)
    assert "2 leaves of your model have no values, and would get none" in str(refused.value)
    assert "params/Dense_1/kernel  bfloat16[3,4], nothing in the source" in str(refused.value)
    assert "model.init" in refused.value.hint
    with pytest.raises(GraftRefused, match="outside `only`"):
        pm.graft(ABSTRACT, PARAMS, only="**/Dense_0/**")


def test_a_rename_that_fills_all_is_proposed():
    with pytest.raises(GraftRefused) as refused:
        pm.graft(ABSTRACT, PARAMS["params"])
    assert 'rename={"**": "params/**"}' in refused.value.hint
    (way, *_) = refused.value.ways
    same(pm.graft(ABSTRACT, PARAMS["params"], **way)[0], PARAMS)


def test_shapes_that_differ():
    target = {"pos_embed": jax.ShapeDtypeStruct((1, 9, 4), "float32")}
    source = {"pos_embed": np.random.default_rng(0).normal(size=(1, 4, 4)).astype("float32")}
    for how, said in (("keep", "nothing to keep"), ("overlap", "nothing around the corner")):
        with pytest.raises(GraftRefused, match=said):
            pm.graft(target, source, mismatch=how)
    rule = {"pos_embed": pm.resize.positions()}
    tree, _ = pm.graft(target, source, resize=rule)
    expected, _ = pm.graft({"pos_embed": jnp.zeros((1, 9, 4))}, source, resize=rule)
    assert np.array_equal(tree["pos_embed"], expected["pos_embed"])
    smaller = {"pos_embed": jax.ShapeDtypeStruct((1, 2, 4), "float32")}
    tree, _ = pm.graft(smaller, source, mismatch="overlap")  # the corner fills it
    assert np.array_equal(tree["pos_embed"], source["pos_embed"][:, :2])
    tree, _ = pm.graft(target, source, place={"pos_embed": "tile"})
    assert tree["pos_embed"].shape == (1, 9, 4)


def test_an_abstract_source_has_nothing_to_give():
    with pytest.raises(GraftRefused, match="in the source it is abstract"):
        pm.graft(PARAMS, ABSTRACT)


@pytest.mark.numeric
def test_nnx_modules_and_states(tmp_path):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    abstract = nnx.eval_shape(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    pm.save(nnx.state(model), tmp_path / "m.safetensors")
    with pm.open(tmp_path / "m.safetensors") as source:
        made, _ = pm.graft(abstract, source)
        state, _ = pm.graft(nnx.state(abstract), source)
        assert isinstance(abstract.kernel.get_value(), jax.ShapeDtypeStruct)  # as it was
        pm.graft_(abstract, source)
    for one in (made, abstract, nnx.merge(nnx.graphdef(model), state)):
        assert np.array_equal(one(X), model(X))


def test_a_train_state():
    def create(key):
        params = MLP().init(key, X)["params"]
        return TrainState.create(apply_fn=MLP().apply, params=params, tx=TX)

    TX = optax.adam(1e-3)
    old = create(jax.random.key(1)).replace(step=jnp.asarray(3))
    abstract = jax.eval_shape(create, jax.random.key(0))
    tree, _ = pm.graft(abstract, old)
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(old), strict=True):
        assert np.array_equal(one, other)
    state, _ = pm.graft_opt_state(abstract.opt_state, old.opt_state, pm.graft(old.params, old.params)[1])
    assert np.array_equal(state[0].mu["Dense_0"]["kernel"], old.opt_state[0].mu["Dense_0"]["kernel"])
    _, fresh = pm.graft({**old.params, "new": jnp.zeros(2)}, old.params)
    with pytest.raises(GraftRefused, match="2 leaves of your model have no values"):
        pm.graft_opt_state(jax.eval_shape(TX.init, {**old.params, "new": jnp.zeros(2)}), old.opt_state, fresh)
    without = old.replace(opt_state=optax.sgd(1e-3).init(old.params))
    with pytest.raises(GraftRefused):
        pm.graft(abstract, without)
    with pytest.raises(GraftRefused):
        pm.graft(abstract, {"params": old.params})


@pytest.mark.parametrize("of", ["module", "state dict"])
def test_torch_on_the_meta_device(tmp_path, of):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).bfloat16()
    meta = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).bfloat16().to("meta")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with pm.open(tmp_path / "m.pt") as source:
        if of == "module":
            made, _ = pm.graft(meta, source)
        else:
            tree, _ = pm.graft(meta.state_dict(), source)
            made = meta
            made.load_state_dict(tree, assign=True)
    for name, value in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], value)
        assert made.state_dict()[name].device.type == "cpu"
    assert made[0].weight.requires_grad


def test_a_meta_module_has_no_room_in_place():
    source = torch.nn.Linear(3, 2).state_dict()
    meta = torch.nn.Linear(3, 2, device="meta")
    with pytest.raises(GraftRefused) as refused:
        pm.graft_(meta, source)
    assert refused.value.hint == "pm.graft(target, source) gives a new tree instead"
    made, _ = pm.graft(meta, source)
    assert torch.equal(made.weight, source["weight"])
    room = meta.to_empty(device="cpu")
    pm.graft_(room, source)
    assert torch.equal(room.weight, source["weight"])


MEASURE = """
import json, sys, threading, time
import jax, jax.numpy as jnp
import paramend as pm

target = {f"layers_{i}": jax.ShapeDtypeStruct((2048, 4096), jnp.float32) for i in range(8)}
jnp.zeros(4).block_until_ready()
small, _ = pm.graft({"layers_0": jax.ShapeDtypeStruct((2,), "float32")}, {"layers_0": jnp.ones(2)})
def anonymous():
    said = open("/proc/self/status").read()
    return int(said.split("RssAnon:")[1].split()[0]) >> 10
idle, seen, done = anonymous(), [], threading.Event()
def watch():
    while not done.is_set():
        seen.append(anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
with pm.open(sys.argv[1]) as source:
    tree, _ = pm.graft(target, source)
jax.block_until_ready(tree)
seen.append(anonymous())  # the watcher of a busy machine may have missed the end
done.set()
thread.join()
total = float(sum(x.sum() for x in tree.values()))
print(json.dumps({"over": max(seen) - idle, "sum": total}))
"""


@pytest.mark.slow
def test_a_restore_costs_the_model_and_a_leaf(tmp_path):
    """256 MiB in 8 leaves."""
    tree = {f"layers_{i}": np.full((2048, 4096), i, "float32") for i in range(8)}
    pm.save(tree, tmp_path / "m.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "m.safetensors"], capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout)
    assert said["sum"] == 28 * 2048 * 4096
    assert 200 < said["over"] <= 256 + 2 * 32
