"""Patches of very many leaves, and of very many short runs: few calls of the system, bounded memory, exact bytes."""

import os

import numpy as np
import pytest
import safetensors.numpy

import paramend as pm
from paramend.piecewise import changes


def counted(monkeypatch):
    """Counts the calls that read and write, by name."""
    found = dict.fromkeys(("pread", "preadv", "pwrite", "write"), 0)

    def wrapped(name, real):
        def run(*args):
            found[name] += 1
            return real(*args)

        return run

    for name in found:
        monkeypatch.setattr(os, name, wrapped(name, getattr(os, name)))
    return found


def names(count):
    return {f"layers.{n}.{kind}": n for n in range(count) for kind in ("w", "b")}


@pytest.mark.parametrize("edit", [("add", 1), ("zero",), ("multiply", -2.5), ("fill", 3)], ids=lambda edit: edit[0])
@pytest.mark.parametrize("selector", ["**", "**/w", "**/[!b]"], ids=["all", "every second", "a class"])
def test_small_leaves_together_are_small_leaves_one_by_one(tmp_path, monkeypatch, selector, edit):
    rng = np.random.default_rng(0)
    tree = {name: rng.normal(size=2 + n % 3).astype(("float32", "float16")[n % 2]) for name, n in names(40).items()}
    tree |= {"large.w": rng.normal(size=30_000).astype("float32"), "empty.w": np.zeros((0, 3), "float32")}
    if selector == "**/[!b]":
        selector = lambda path, spec: path.endswith("w")
    for together in (True, False):
        path = tmp_path / f"{together}.safetensors"
        safetensors.numpy.save_file(tree, path)
        with monkeypatch.context() as patched:
            if not together:
                patched.setattr(changes, "_SMALL", -1)
            report = pm.patch(path, lambda t: getattr(pm.at(t, selector), edit[0])(*edit[1:]))
        right = getattr(pm.at(tree, selector), edit[0])(*edit[1:])
        found = safetensors.numpy.load_file(path)
        assert {name: leaf.tobytes() for name, leaf in found.items()} == {
            n: leaf.tobytes() for n, leaf in right.items()
        }
        assert report.bytes_written == sum(row.spec.nbytes for row in report.plan.changed)
        pm.undo(path)
        assert safetensors.numpy.load_file(path)["large.w"].tobytes() == tree["large.w"].tobytes()


def test_values_that_depend_on_the_leaf_are_its_own(tmp_path):
    tree = {name: np.zeros(4, "float32") for name in names(10)}
    safetensors.numpy.save_file(tree, tmp_path / "x.safetensors")
    for edit in (lambda t: pm.at(t, "**").noise(1.0, seed=0), lambda t: pm.at(t, "**").add(np.arange(4, dtype="f4"))):
        pm.patch(tmp_path / "x.safetensors", edit)
        found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
        right = edit(tree)
        assert all(found[name].tobytes() == right[name].tobytes() for name in tree)
        pm.undo(tmp_path / "x.safetensors")


@pytest.mark.parametrize("index", ["stride", "column", "list", "mask", "repeated"])
@pytest.mark.parametrize("verb", ["add", "zero", "noise", "set"])
def test_scattered_runs(tmp_path, index, verb):
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(3000, 40)).astype("float32")
    flat = index in ("stride", "list", "repeated")
    leaf = whole.reshape(-1) if flat else whole
    where = {
        "stride": slice(3, None, 16),
        "column": (slice(None), 7),
        "list": rng.permutation(leaf.size)[:2500] if flat else None,
        "mask": rng.random(whole.shape) < 0.02,
        "repeated": rng.integers(0, leaf.size, 2500),
    }[index]
    if index == "mask":
        where = rng.random(3000) < 0.4
    value = rng.normal(size=leaf[where].shape).astype("float32")
    args = {"add": (0.5,), "zero": (), "noise": (0.1,), "set": (value,)}[verb]
    tree, path = {"before": np.ones(3, "float32"), "w": leaf}, tmp_path / "x.safetensors"
    safetensors.numpy.save_file(tree, path)
    before = path.read_bytes()
    pm.patch(path, lambda t: getattr(pm.at(t, "w")[where], verb)(*args))
    right = getattr(pm.at(tree, "w")[where], verb)(*args)
    found = safetensors.numpy.load_file(path)
    assert found["w"].tobytes() == right["w"].tobytes() and found["before"].tobytes() == tree["before"].tobytes()
    pm.undo(path)
    assert path.read_bytes() == before


@pytest.mark.slow
def test_twenty_thousand_leaves_take_few_calls(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({name: np.ones(4, "float32") for name in names(10_000)}, path)
    before = path.read_bytes()
    found = counted(monkeypatch)
    pm.patch(path, lambda t: pm.at(t, "**").add(1))
    assert sum(found.values()) < 100
    pm.undo(path)
    assert sum(found.values()) < 200 and path.read_bytes() == before
    pm.patch(path, lambda t: pm.at(t, "**/w").add(1))  # every second: no other leaf is written
    assert found.pop("pwrite") - 10_000 < 100 and sum(found.values()) < 300


@pytest.mark.slow
def test_two_hundred_thousand_runs_take_few_calls_and_little_memory(tmp_path, monkeypatch):
    import tracemalloc

    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"w": np.ones((200_000, 64), "float32")}, path)
    found = counted(monkeypatch)
    tracemalloc.start()
    report = pm.patch(path, lambda t: pm.at(t, "w")[:, 5].add(1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.bytes_written == 200_000 * 4 and peak < 200_000 * 250
    assert sum(found.values()) < 1000  # of 49 MB, a MB at a time, three times
    assert (safetensors.numpy.load_file(path)["w"].sum(0) == 200_000 * np.where(np.arange(64) == 5, 2, 1)).all()
    pm.undo(path)
    assert sum(found.values()) < 2000 and (safetensors.numpy.load_file(path)["w"] == 1).all()
