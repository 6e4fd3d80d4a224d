"""Checkpoints assembled from leaves of others: every byte where a plain dict of arrays would have it."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

import paramend as pm
from paramend.anatomy.documents import Document
from paramend.checkpoints.assemble import assemble
from paramend.edits.memory import Memory
from paramend.edits.plan import Plan
from paramend.leaves.leaves import Index
from paramend.leaves.origins.moved import join, reshape, take
from paramend.leaves.origins.stored import Made, Stored
from paramend.leaves.paths import labels
from paramend.leaves.specs import Spec
from paramend.rewriting.files import Copy
from paramend.rewriting.layouts import lay_out


def path_of(name):
    return tuple(label for key in name.split(".") for label in labels(key))


def flat(origin, start, stop):
    """A run of elements in C order."""
    return take(reshape(origin, (origin.spec.size,)), range(start, stop), 0)


def number_of(tree, name):
    return next(n for n in tree.index.numbers if tree.index.name(n) == name)


@pytest.fixture
def model(tmp_path):
    """Four layers in two shards, as transformers writes them, with a config beside."""
    folder = tmp_path / "model"
    folder.mkdir()
    rng = np.random.default_rng(0)
    tree = {f"layers.{i}.{n}": rng.normal(size=(3, 4)).astype(ml_dtypes.bfloat16) for i in range(4) for n in "ab"}
    tree["head"] = rng.normal(size=5).astype("float32")
    weight_map = {}
    for place, half in enumerate((list(tree)[:4], list(tree)[4:]), 1):
        name = f"model-{place:05}-of-00002.safetensors"
        safetensors.numpy.save_file({key: tree[key] for key in half}, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(half, name)
    index = {"metadata": {"total_size": sum(a.nbytes for a in tree.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"num_hidden_layers": 4}')
    (folder / "tokenizer.json").write_text("{}")
    return folder, tree


def bits(tree):
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in tree.items()}


def document(name, text):
    return Document(Path(name), b"", text)


def test_layers_taken_twice_come_out_as_copies_beside_a_new_config(model, tmp_path):
    folder, tree = model
    with pm.open(folder) as source:
        order = [0, 1, 1, 2, 3, 3]
        wanted = {f"layers.{to}.{n}": f"layers.{old}.{n}" for to, old in enumerate(order) for n in "ab"}
        wanted["head"] = "head"
        picks = [(path_of(new), (source, number_of(source, old))) for new, old in wanted.items()]
        made = assemble(source, picks, texts=[document("config.json", b'{"num_hidden_layers": 6}')])
        pm.at(made, "layers[-1]/b").zero().save(tmp_path / "out")
    expected = {new: tree[old] for new, old in wanted.items()} | {"layers.5.b": np.zeros_like(tree["layers.3.b"])}
    assert bits(pm.load(tmp_path / "out", nested=False)) == bits(expected)
    assert (tmp_path / "out" / "config.json").read_text() == '{"num_hidden_layers": 6}'
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
    assert set(index["weight_map"]) == set(expected)
    for name, shard in index["weight_map"].items():  # read by the reference reader
        with safetensors.safe_open(tmp_path / "out" / shard, "np") as file:
            assert file.metadata() == {"format": "pt"}
            assert file.get_tensor(name).tobytes() == expected[name].tobytes()


def test_what_stays_is_copied_by_the_kernel(model, tmp_path):
    folder, _ = model
    with pm.open(folder) as source:
        made = assemble(source, [(path_of(f"x.{n}"), (source, n)) for n in source.index.numbers])
        pieces = [piece for file in lay_out(made.plan, tmp_path / "out").files for piece in file.pieces]
        assert all(isinstance(piece, Copy | bytes) for piece in pieces)
        report = made.save(tmp_path / "out.safetensors")
    assert report.bytes_computed == 0


def test_leaves_of_every_kind_of_origin(model, tmp_path):
    folder, tree = model
    other = tmp_path / "other.pt"
    torch.save({"w": torch.arange(6.0).reshape(2, 3).t(), "step": 3}, other)
    memory = Memory({"fresh": np.full((2, 2), 7, "int8")})
    with pm.open(folder) as source, pm.open(other) as second:
        layer = [Stored(source.source, number_of(source, f"layers.{i}.a")) for i in range(4)]
        stack = join(layer, 0, "stack")
        made = assemble(
            source,
            [
                (path_of("strided"), (second, 0)),
                (path_of("memory"), (memory, 0)),
                (path_of("stack"), stack),
                (path_of("layer"), reshape(flat(layer[2], 4, 12), (2, 4))),
                (path_of("inner"), flat(stack, 18, 30)),
                (path_of("made"), Made(Spec((3,), "float32"), lambda: np.arange(3, dtype="float32"))),
            ],
        )
        assert made["stack"].shape == (4, 3, 4)
        made.save(tmp_path / "out.safetensors")
    whole = np.stack([tree[f"layers.{i}.a"] for i in range(4)])
    assert bits(safetensors.numpy.load_file(tmp_path / "out.safetensors")) == bits(
        {
            "strided": np.arange(6, dtype="float32").reshape(2, 3).T.copy(),
            "memory": np.full((2, 2), 7, "int8"),
            "stack": whole,
            "layer": tree["layers.2.a"][1:],
            "inner": whole.reshape(-1)[18:30],
            "made": np.arange(3, dtype="float32"),
        }
    )


def test_edits_planned_before_go_along_and_assemblies_can_be_assembled(model):
    folder, tree = model
    with pm.open(folder) as source:
        edited = pm.at(source, "**/a").multiply(2).edited({})
        once = assemble(edited, [(path_of(f"one.{n}"), (edited, n)) for n in (0, 1)], texts=[document("a.txt", b"a")])
        twice = assemble(
            once, [(path_of("two"), (once, 0)), (path_of("three"), (once, 1))], texts=[document("b.txt", b"b")]
        )
        names = [source.index.name(n) for n in (0, 1)]
        for path, name in zip(("two", "three"), names, strict=True):
            expected = tree[name] * 2 if name.endswith("a") else tree[name]
            assert twice[path].tobytes() == expected.astype(tree[name].dtype).tobytes()
        assert twice.source.base is source.source
        assert [each.text for each in twice.texts] == [b"a", b"b"]
        assert len(twice.source.sources) == 1


def test_ties_stay_where_each_path_is_taken_once(tmp_path):
    shared = torch.ones(3)
    torch.save({"a": shared, "b": shared, "c": torch.zeros(1)}, tmp_path / "m.pt")
    with pm.open(tmp_path / "m.pt") as source:
        a, b, c = (number_of(source, name) for name in "abc")
        tied = assemble(source, [(path_of("x"), (source, a)), (path_of("y"), (source, b)), (path_of("z"), (source, c))])
        assert pm.at(tied, "x").fill(5.0)["y"].tolist() == [5, 5, 5]
        copies = assemble(source, [(path_of("x"), (source, a)), (path_of("y"), (source, a))])
        assert pm.at(copies, "x").fill(5.0)["y"].tolist() == [1, 1, 1]


def test_the_index_of_an_assembly_is_that_of_its_names(model):
    folder, _ = model
    with pm.open(folder) as source:
        made = assemble(source, [(path_of(source.index.name(n)), (source, n)) for n in source.index.numbers])
        same = Index.of_names([source.index.name(n) for n in source.index.numbers])
        assert [made.index.path(n) for n in made.index.numbers] == [same.path(n) for n in same.numbers]
        assert Plan.of(made.source).changed == ()
