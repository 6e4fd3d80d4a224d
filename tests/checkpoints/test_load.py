"""What is read of a checkpoint is the reader's own: no later patch shows in it, and memory holds the model once."""

import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import torch
from flax import serialization

import paramend as pm
from paramend.errors import BadArgument, Unsupported

TREE = {"a": np.arange(1, 7, dtype="float32").reshape(2, 3), "b": np.ones(2, "float32"), "s": np.array(3, "float32")}


def write_safetensors(path):
    safetensors.numpy.save_file(TREE, path)


def write_torch(path):
    torch.save({name: torch.from_numpy(np.array(value)) for name, value in TREE.items()}, path)


def write_npz(path):
    with path.open("wb") as file:
        np.savez(file, **TREE)


def write_msgpack(path):
    path.write_bytes(serialization.msgpack_serialize(TREE))


def write_orbax(path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, TREE)


FORMATS = [write_safetensors, write_torch, write_npz, write_msgpack, write_orbax]
READ = {
    "load": lambda path: pm.load(path),
    "load, jax": lambda path: pm.load(path, "jax"),
    "load, torch": lambda path: pm.load(path, "torch"),
    "load, flat": lambda path: pm.load(path, nested=False),
    "[]": lambda path: {name: pm.open(path)[name] for name in TREE},
    "get": lambda path: pm.at(pm.open(path), "**").get(),
    "iteration": lambda path: dict(pm.at(pm.open(path), "**")),
    "one": lambda path: {name: pm.at(pm.open(path), name).one() for name in TREE},
    "slice": lambda path: {"a": pm.at(pm.open(path), "a")[:].one(), "b": pm.at(pm.open(path), "b")[0:].get()["b"]},
    "graft": lambda path: pm.graft(jax.tree.map(np.zeros_like, TREE), pm.open(path))[0],
}


@pytest.mark.parametrize("how", READ)
@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_a_patch_does_not_show_in_what_was_read_before(write, how, tmp_path):
    path = tmp_path / "model"
    write(path)
    found = READ[how](path)
    before = {name: np.asarray(value).copy() for name, value in found.items()}
    pm.patch(path, lambda tree: pm.at(tree, "**").zero())
    for name, value in found.items():
        assert np.asarray(value).tobytes() == before[name].tobytes() == TREE[name].tobytes()
    assert not pm.load(path)["a"].any()


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_arrays_of_numpy_can_be_written_to(write, tmp_path):
    write(tmp_path / "model")
    tree = pm.load(tmp_path / "model")
    with pm.open(tmp_path / "model") as checkpoint:
        got = pm.at(checkpoint, "**").get()
    for found in (tree, got):
        for value in found.values():
            assert value.flags.writeable
            value[...] = 7
    assert np.array_equal(pm.load(tmp_path / "model")["a"], TREE["a"])


def test_mmap_gives_views_which_a_patch_changes(tmp_path):
    write_safetensors(tmp_path / "m.safetensors")
    found = pm.load(tmp_path / "m.safetensors", mmap=True)
    assert not found["a"].flags.writeable
    pm.patch(tmp_path / "m.safetensors", lambda tree: pm.at(tree, "a").zero())
    assert not found["a"].any()
    for kind in ("jax", "torch"):
        with pytest.raises(BadArgument, match="mmap=True gives views") as caught:
            pm.load(tmp_path / "m.safetensors", kind, mmap=True)
        assert pm.load(tmp_path / "m.safetensors", kind, **eval(f"dict({caught.value.hint})"))


def test_tied_leaves_are_loaded_once(tmp_path):
    weight = torch.ones(3, 2)
    torch.save({"embed.weight": weight, "head.weight": weight}, tmp_path / "m.pt")
    for kind in ("numpy", "torch"):
        found = pm.load(tmp_path / "m.pt", kind)
        assert found["embed"]["weight"] is found["head"]["weight"]


VERBS = {"zero": (), "fill": (0.5,), "add": (1,), "multiply": (2,), "noise": (0.1,), "reinit": ("lecun_normal",)}


@pytest.mark.parametrize(("verb", "args"), VERBS.items())
@pytest.mark.parametrize("index", [None, 0])
def test_verbs_in_place_name_the_patch_that_does_it(verb, args, index, tmp_path):
    write_safetensors(tmp_path / "m.safetensors")
    if (verb, index) == ("reinit", 0):
        index = slice(0, 2)
    with pm.open(tmp_path / "m.safetensors") as checkpoint:
        chosen = pm.at(checkpoint, "**/a") if index is None else pm.at(checkpoint, "**/a")[index]
        with pytest.raises(Unsupported, match=f"{verb}_ cannot edit an opened checkpoint in place") as caught:
            getattr(chosen, f"{verb}_")(*args)
        wanted = getattr(chosen, verb)(*args)["a"]
    eval(caught.value.hint, {"pm": pm})
    assert np.array_equal(pm.load(tmp_path / "m.safetensors")["a"], wanted)


def test_a_recipe_in_place_names_the_patch_too(tmp_path):
    write_safetensors(tmp_path / "m.safetensors")
    recipe = pm.Recipe([{"zero": "a"}])
    with pm.open(tmp_path / "m.safetensors") as checkpoint, pytest.raises(Unsupported) as caught:
        recipe.apply_(checkpoint)
    eval(caught.value.hint, {"pm": pm, "recipe": recipe})
    assert not pm.load(tmp_path / "m.safetensors")["a"].any()


# ---- memory ------------------------------------------------------------------------------------------------------

PEAK = """
import re, sys
from pathlib import Path
import paramend as pm

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1000

pm.load(sys.argv[2])
before = peak()
tree = pm.load(sys.argv[1], mmap=sys.argv[3] == "mmap")
print(peak() - before)
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".msgpack"])
def test_memory_holds_the_model_once(suffix, tmp_path):
    """64 MB in four leaves of 16 MB: the model and at most one leaf; views take next to nothing."""
    big = {f"w{i}": np.ones(4_000_000, "float32") for i in range(4)}
    pm.save(big, tmp_path / f"big{suffix}")
    pm.save({"w": np.ones(1, "float32")}, tmp_path / f"small{suffix}")

    def grown(how):
        files = [str(tmp_path / f"{name}{suffix}") for name in ("big", "small")]
        command = [sys.executable, "-c", PEAK, *files, how]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert 60 < grown("own") < 64 + 20
    if suffix == ".safetensors":
        assert grown("mmap") < 4
