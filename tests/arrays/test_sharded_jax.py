"""JAX arrays over eight devices of one process, and over the devices of two processes that cannot see each other's."""

import json
import os
import socket
import subprocess
import sys

import pytest
from tests.support.processes import run_two

PROGRAM = """
import json, os, re, sys, tracemalloc, warnings
several = len(sys.argv) > 1
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 if several else 8}"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import paramend as pm

if several:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[1]))
mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
full = np.arange(1, 65, dtype=np.float32).reshape(16, 4)
two = np.array([[1, 2, 3, 4], [4, 5, 6, 7]], np.float32)

# verb: (edit, whether its compiled program moves elements, None if the compiler decides, the spec after it)
here, both = False, P("a", "b")
EDITS = {
    "zero": (lambda s: s.zero(), here, both),
    "fill": (lambda s: s.fill(2.5), here, both),
    "set": (lambda s: s.set(full[::-1]), here, both),
    "set an array of JAX": (lambda s: s.set(jnp.asarray(full[::-1])), here, both),
    "add": (lambda s: s.add(np.ones(4, np.float32)), here, both),
    "add a product": (lambda s: s.add((np.ones((16, 2)), np.ones((2, 4)))), here, both),
    "project_out": (lambda s: s.project_out([0, 0, 1, 0]), True, both),
    "multiply": (lambda s: s.multiply(2), here, both),
    "clip": (lambda s: s.clip(2, 9), here, both),
    "cast": (lambda s: s.cast("bfloat16"), here, both),
    "apply": (lambda s: s.apply(lambda x: x * 2), here, both),
    "noise": (lambda s: s.noise(0.1, seed=3), here, both),
    "noise of a key": (lambda s: s.noise(0.1, seed=jax.random.key(2)), here, both),
    "reinit": (lambda s: s.reinit("lecun_normal"), here, both),
    "permute": (lambda s: s.permute(list(range(16))[::-1], axis=0), True, both),
    "transpose": (lambda s: s.transpose([1, 0]), here, P("b", "a")),
    "reshape": (lambda s: s.reshape((16, 2, 2)), here, both),
    "rows": (lambda s: s[1:4].zero(), None, both),
    "last row": (lambda s: s[-1].fill(7.0), None, both),
    "a column": (lambda s: s[:, 1].multiply(3), None, both),
    "backwards": (lambda s: s[::-2, 1:3].add(full[:8, :2]), None, both),
    "reversed": (lambda s: s[::-1].set(full), None, both),
    "listed rows": (lambda s: s[np.array([4, 0])].set(two), None, both),
    "a mask": (lambda s: s[full > 40].fill(0.0), None, both),
}
MOVES = "all-gather|all-reduce|all-to-all|collective-permute"


def cut(spec, values=full):
    return jax.make_array_from_callback(values.shape, NamedSharding(mesh, spec), lambda index: values[index])


def host(x):
    return process_allgather(x, tiled=True) if several else np.asarray(x)


for name, (edit, moves, after) in EDITS.items():
    wanted = np.asarray(edit(pm.at({"w": jax.device_put(full, jax.local_devices()[0])}, "w"))["w"])
    for spec in (both,) if several else (both, P("a"), P()):
        result = edit(pm.at({"w": cut(spec)}, "w"))["w"]
        assert host(result).tobytes() == wanted.tobytes() and result.dtype == wanted.dtype, (name, spec)
        if spec == both:
            expected = NamedSharding(mesh, after)
            assert result.sharding.is_equivalent_to(expected, result.ndim), (name, result.sharding)
    if not several and moves is not None:
        compiled = jax.jit(lambda x: edit(pm.at({"w": x}, "w"))["w"]).lower(cut(both)).compile()
        assert bool(re.search(MOVES, compiled.as_text())) == moves, (name, set(re.findall(MOVES, compiled.as_text())))


def tree(make, scale=1.0):
    layers = {str(i): {"w": make(full * np.float32(scale) + i)} for i in range(3)}
    return {"layers": layers, "head": make(full * np.float32(scale))}


def spread(values):
    return cut(both, values)


def first(result):
    return result[0] if isinstance(result, tuple) else result


def single(values):
    return jax.device_put(values, jax.local_devices()[0])


TREES = {
    "graft": lambda t, u: pm.graft(t, u),
    "graft halves": lambda t, u: pm.graft(t, pm.at(u, "**").cast("float16")),
    "graft numpy": lambda t, u: pm.graft(t, tree(np.array, 3.0)),
    "deepen": lambda t, u: pm.deepen(t, order=[0, 1, 1, 2]),
    "stack": lambda t, u: pm.stack_layers(t, "layers/[*]"),
    "merge": lambda t, u: pm.merge([t, u]),
    "quantize": lambda t, u: pm.quantize(t, "layers/*/w", scheme="int8", simulate=True),
}
for name, verb in TREES.items():
    wanted = first(verb(tree(single), tree(single, 2.0)))
    result = first(verb(tree(spread), tree(spread, 2.0)))
    for leaf, value in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        expected = NamedSharding(mesh, both if leaf.ndim == 2 else P(None, "a", "b"))
        assert host(leaf).tobytes() == np.asarray(value).tobytes(), name
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), (name, leaf.sharding)
assert pm.verify(tree(spread), pm.at(tree(spread), "head").zero(), only="head") == ["head"]
assert str(pm.stats(tree(spread))) == str(pm.stats(tree(single)))

# Axes that become longer stay cut where the devices divide the new length.
pair = {"Dense_0": {"kernel": full[:8], "bias": full[0]}, "Dense_1": {"kernel": full[:4]}}
terms = {"Dense_0": {"lora_a": np.ones((8, 1), np.float32), "lora_b": full[:1]}}
places = ("Dense_0", "kernel"), ("Dense_0", "bias"), ("Dense_1", "kernel")
MODELS = {
    "widen to 6": (lambda t: pm.widen(t, features={"Dense_0": 6}), (P("a", "b"), P(), P(None, "b"))),
    "widen to 8": (lambda t: pm.widen(t, features={"Dense_0": 8}), (P("a", "b"), P("a"), P("a", "b"))),
    "fold": (lambda t: pm.fold(t, terms), None),
    "extract": (lambda t: pm.fold(t, pm.extract(pm.at(t, "Dense_0/kernel").multiply(2), t, rank=1)[0]), None),
    "linear": (lambda t: pm.merge([t, pm.at(t, "**").multiply(3)], weights=[1, 3]), None),
    "slerp": (lambda t: pm.merge([t, pm.at(t, "**").add(3)], "slerp", t=0.25), None),
    "overlap": (lambda t: pm.graft(t, jax.tree.map(lambda x: np.ones((2, *x.shape[1:])), t), mismatch="overlap"), None),
}
for name, (verb, specs) in MODELS.items():
    wanted = first(verb(jax.tree.map(single, pair)))
    result = first(verb(jax.tree.map(lambda x: cut(both if x.ndim == 2 else P("a"), x), pair)))
    for (layer, role), spec in zip(places, specs or (both, P("a"), both)):
        leaf = result[layer][role]
        assert host(leaf).tobytes() == np.asarray(wanted[layer][role]).tobytes(), (name, layer, role)
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), (name, leaf.sharding)

# What a dtype cannot hold is counted: of several processes each counts its half, once for all devices.
half = np.full((16, 4), 300, np.float16)
LOSSES = {
    "all": (lambda s: s.multiply(300), 64),
    "a spread array": (lambda s: s.multiply(cut(P("b", "a"), half)), 64),
    "columns": (lambda s: s[:, 1:].multiply(np.array([[1, 300, 300]])), 32),
    "a mask": (lambda s: s[full % 8 > 3].add(np.full(32, 65500)), 32),
    "cast": (lambda s: s.cast("int8"), 64),
}
for name, (edit, count) in LOSSES.items():
    for spec in both, P("a"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            edit(pm.at({"w": cut(spec, half)}, "w"))
        said = [str(each.message) for each in caught if each.category.__name__ == "ValuesLost"]
        wanted = f": {count // (1 + several)} values overflow (w)" + ", of those in this process" * several
        assert len(said) == 1 and said[0].endswith(wanted), (name, said)

folder = os.environ["FOLDER"]
if several:
    try:
        pm.save(tree(spread), f"{folder}/{jax.process_index()}.safetensors")
    except TypeError as error:
        print(json.dumps(str(error)))
else:
    from paramend.leaves.origins.stored import Stored

    large = np.arange(1 << 22, dtype=np.float32).reshape(1 << 11, 1 << 11)
    for spec in both, P(None, ("b", "a")), P("b"):
        leaf = cut(spec, large)
        tracemalloc.start()
        pm.save({"w": leaf}, f"{folder}/{len(os.listdir(folder))}.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 8e6 and leaf._npy_value is None  # it has 16 MB
        tracemalloc.stop()
    for file in os.listdir(folder):
        with pm.open(f"{folder}/{file}") as saved:
            assert np.array_equal(saved["w"], large)
    pm.save({"w": spread(full)}, f"{folder}/w.safetensors")
    read, boxes = Stored.read_box, []
    Stored.read_box = lambda self, box: boxes.append(tuple(map(len, box))) or read(self, box)
    with pm.open(f"{folder}/w.safetensors") as source:
        result, _ = pm.graft({"w": spread(full * 0)}, source)
    assert np.array_equal(result["w"], full) and set(boxes) == {(4, 2)} and result["w"].sharding == cut(both).sharding
    with pm.open(f"{folder}/w.safetensors") as source:
        result, report = pm.graft({"w": cut(P("a"), half)}, pm.at(source, "w").multiply(2048))
    wanted = full * 2048
    assert result["w"].dtype == np.float16 and np.array_equal(result["w"], np.where(full < 32, wanted, np.inf))
    assert [row.overflowed for row in report.copied] == [33]
    print(json.dumps("done"))
"""


@pytest.mark.far
@pytest.mark.slow
def test_eight_devices(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    environment = {**os.environ, "FOLDER": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == "done"


@pytest.mark.far
@pytest.mark.slow
def test_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("FOLDER", str(tmp_path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for printed in run_two(PROGRAM, port):
        assert "process_allgather" in json.loads(printed.splitlines()[-1])
    assert not list(tmp_path.iterdir())
