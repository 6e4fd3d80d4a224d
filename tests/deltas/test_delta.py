"""Deltas: what is different in one model makes it of another, bit for bit, and of nothing else."""

import hashlib
import json
import pickle
import random
import shutil
from itertools import pairwise
from pathlib import Path

import equinox as eqx
import flax.serialization
import haiku as hk
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx
from hypothesis import given, settings, strategies as st

import paramend as pm
from paramend.deltas import payload
from paramend.errors import BadArgument, BadCheckpoint, CannotRead, CannotWrite, UnexpectedChange, Unsupported

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:orbax")  # about itself


def nest(flat):
    tree = {}
    for name, array in flat.items():
        *above, last = name.split(".")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = array
    return tree


def orbax(flat, path):
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(path.absolute(), nest(flat))


def read_orbax(path):
    import orbax.checkpoint as ocp

    return flattened(ocp.PyTreeCheckpointer().restore(path.absolute()))


def flattened(tree, above=""):
    if not isinstance(tree, dict):
        return {above[:-1]: np.asarray(tree)}
    return {name: leaf for key, node in tree.items() for name, leaf in flattened(node, f"{above}{key}.").items()}


def tensors(flat):
    return {name: torch.from_numpy(array.copy()) for name, array in flat.items()}


# How the libraries that define the formats write and read names and arrays.
FORMATS = {
    "safetensors": (safetensors.numpy.save_file, safetensors.numpy.load_file),
    "pt": (lambda flat, path: torch.save(tensors(flat), path), lambda path: torch.load(path, weights_only=True)),
    "npz": (lambda flat, path: np.savez(path, **flat), lambda path: dict(np.load(path))),
    "msgpack": (
        lambda flat, path: path.write_bytes(flax.serialization.msgpack_serialize(nest(flat))),
        lambda path: flattened(flax.serialization.msgpack_restore(path.read_bytes())),
    ),
    "orbax": (orbax, read_orbax),
}


def same(one, two):
    one, two = ({name: np.asarray(array) for name, array in side.items()} for side in (one, two))
    assert one.keys() == two.keys()
    for name, array in one.items():
        assert (array.dtype, array.shape, array.tobytes()) == (two[name].dtype, two[name].shape, two[name].tobytes())


def content(path):
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path.parent): file.read_bytes() for file in files if ".undo" not in str(file)}


NAN = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0], "uint32").view("float32")  # two NaN, -0.0, +0.0


@st.composite
def pairs(draw, empty=True):
    """Names and arrays, and the same with some elements changed, by bits."""
    shapes = st.sampled_from([(), (1,), (7,), (5, 6), (2, 3, 4), *([(0, 3)] if empty else [])])
    kinds = st.sampled_from(["float32", "float64", "float16", "int8", "int32", "bool", "complex64"])
    before, after = {}, {}
    for name in draw(st.lists(st.sampled_from(["a.w", "a.b", "c", "d.e.f", "d.g"]), min_size=1, unique=True)):
        size = int(np.prod(shape := draw(shapes)))
        old = np.arange(size).astype(draw(kinds)).reshape(shape)
        new = old.copy()
        for place in draw(st.lists(st.integers(0, max(size - 1, 0)), max_size=4 * bool(size))):
            new.reshape(-1)[place] = draw(st.sampled_from(NAN.tolist() if old.dtype == "float32" else [0, 1, 5]))
        before[name], after[name] = old, new
    return before, after


@pytest.mark.parametrize("suffix", FORMATS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_a_delta_makes_one_file_of_another(suffix, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    before, after = data.draw(pairs(empty=suffix != "orbax"))  # which holds no empty arrays
    encoding = data.draw(st.sampled_from(["overwrite", "xor"]))
    write, read = FORMATS[suffix]
    a, b, out = (folder / f"{name}.{suffix}" for name in ("a", "b", "out"))
    write(before, a)
    write(after, b)
    found = pm.delta(a, b, encoding=encoding)
    assert bool(found) == bool(pm.diff(a, b))
    found = pm.Delta.load(found.save(folder / "D"))
    with pm.open(a) as base:
        found.apply(base).save(out)
    same(read(out), read(b))
    if suffix in ("safetensors", "pt", "msgpack"):  # which hold no times
        assert [*content(out).values()] == [*content(b).values()] or suffix == "pt"
    old = content(a)
    pm.patch(a, found.apply)
    same(read(a), read(b))
    if found:
        pm.undo(a)
        assert content(a) == old


# ---- structure ---------------------------------------------------------------------------------------------------


def models():
    before = {"a": np.arange(6.0), "b": np.ones((2, 3), "float32"), "c": np.arange(900, dtype="int32"), "d": np.ones(2)}
    after = {"a": before["a"], "b": np.ones((3, 2), "float16"), "moved": before["c"], "new": np.arange(3, dtype="int8")}
    return before, after


def test_leaves_come_go_and_change_their_name_and_spec(tmp_path):
    before, after = models()
    safetensors.numpy.save_file(before, tmp_path / "a.safetensors")
    safetensors.numpy.save_file(after, tmp_path / "b.safetensors")
    found = pm.delta(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    kinds = {
        kind: list(map(found.called, found.of_kind(kind))) for kind in ("respecified", "renamed", "added", "deleted")
    }
    assert kinds == {"respecified": ["b"], "renamed": ["moved"], "added": ["new"], "deleted": ["d"]}
    with pm.open(tmp_path / "a.safetensors") as base:
        made = found.apply(base)
        made.save(tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with pm.open(tmp_path / "out.safetensors") as outcome:
        assert found.apply(outcome) is outcome
    old = content(tmp_path / "a.safetensors")
    with pytest.raises(Unsupported):
        pm.patch(tmp_path / "a.safetensors", found.apply)
    assert content(tmp_path / "a.safetensors") == old
    for suffix in ("pt", "npz", "msgpack"):  # made for one format, applied to another
        write, read = FORMATS[suffix]
        write(before, tmp_path / f"a.{suffix}")
        with pm.open(tmp_path / f"a.{suffix}") as base:
            found.apply(base).save(tmp_path / f"out.{suffix}")
        same(read(tmp_path / f"out.{suffix}"), after)
    same(found.apply(before), after)


@pytest.mark.parametrize("encoding", ["overwrite", "xor"])
def test_names_that_change_places(encoding, tmp_path):
    before = {"x": np.arange(5.0), "y": -np.arange(5.0), "z": np.ones(3)}
    after = {"x": before["y"], "y": before["x"], "z": before["z"]}
    found = pm.delta(before, after, encoding=encoding)
    same(found.apply(before), after)
    assert found.apply(after) is after


def test_dtypes_that_numpy_or_safetensors_lack(tmp_path):
    def file(path, rows):
        table, at = {}, 0
        for name, (code, shape, data) in rows.items():
            table[name] = {"dtype": code, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        raw = json.dumps(table, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(row[2] for row in rows.values()))
        return path

    rows = {"f4": ("F4", [4, 4], bytes(range(8))), "odd": ("XY", [3], b"abcdefghi"), "w": ("F32", [2], bytes(8))}
    a = file(tmp_path / "a.safetensors", rows)
    rows |= {"f4": ("F4", [4, 4], bytes([9, *range(1, 8)])), "odd": ("XY", [3], b"abcdefghX")}
    b = file(tmp_path / "b.safetensors", rows)
    rows = {"new": ("F6_E2M3", [4], b"123"), **rows, "w": ("F4", [4], b"12")}
    c = file(tmp_path / "c.safetensors", rows)
    for after in (b, c):
        found = pm.delta(a, after)
        out = tmp_path / f"out-{after.name}"
        with pm.open(a) as base:
            found.apply(base).save(out)
        assert out.read_bytes() == after.read_bytes()
    pm.patch(a, pm.delta(a, b).apply)
    assert a.read_bytes() == b.read_bytes()
    np.savez(tmp_path / "a.npz", z=np.zeros(3, "complex128"), y=np.ones(2))
    np.savez(tmp_path / "b.npz", z=np.array([0, 1j, 0]), new=np.array([1j]), y=np.ones(2, "complex128"))
    found = pm.delta(tmp_path / "a.npz", tmp_path / "b.npz")
    found = pm.Delta.load(found.save(tmp_path / "D"))
    with pm.open(tmp_path / "a.npz") as base:
        found.apply(base).save(tmp_path / "out.npz")
    same(dict(np.load(tmp_path / "out.npz")), dict(np.load(tmp_path / "b.npz")))


def test_leaves_with_several_names(tmp_path):
    w, v = torch.arange(600.0), torch.ones(3)
    torch.save({"emb": w, "head": w, "v": v}, tmp_path / "a.pt")
    tied, untied = torch.arange(600.0), torch.arange(600.0)
    tied[7] = float("nan")
    untied[9] = -1
    torch.save({"emb": tied, "head": tied, "v": v}, tmp_path / "b.pt")
    torch.save({"emb": tied, "head": untied, "v": v}, tmp_path / "c.pt")
    for name in "bc":
        found = pm.delta(tmp_path / "a.pt", tmp_path / f"{name}.pt")
        with pm.open(tmp_path / "a.pt") as base:
            found.apply(base).save(tmp_path / f"out{name}.pt")
        made = torch.load(tmp_path / f"out{name}.pt", weights_only=True)
        same(made, torch.load(tmp_path / f"{name}.pt", weights_only=True))
        assert (made["emb"].data_ptr() == made["head"].data_ptr()) == (name == "b")
    assert pm.delta(tmp_path / "a.pt", tmp_path / "b.pt").nbytes == 4 + 4  # held once
    with pytest.raises(Unsupported, match="emb has several paths in this tree"):
        pm.delta(tmp_path / "a.pt", tmp_path / "c.pt").apply({"emb": w, "head": w, "v": v})


def trees():
    """A tree of each kind, as its library makes it."""
    forward = hk.transform(lambda x: hk.nets.MLP([3, 2])(x))
    key = jax.random.PRNGKey(0)
    return {
        "dict": {"layers": [{"w": np.ones((2, 3))}, {"w": np.zeros(3)}], "t": (np.arange(3), np.float32(2))},
        "haiku": forward.init(key, jnp.ones((1, 4))),
        "equinox": eqx.nn.MLP(2, 3, 4, 1, key=key),
        "nnx": nnx.Linear(2, 3, rngs=nnx.Rngs(0)),
        "torch": torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)),
        "state dict": torch.nn.Linear(4, 2).bfloat16().state_dict(),
    }


@pytest.mark.parametrize("kind", trees())
def test_trees_in_memory(kind, tmp_path):
    before = trees()[kind]
    floats = pm.sel("**").where(dtype="float")
    after = pm.at(before, floats).add(1) if kind != "torch" else trees()[kind]
    if kind == "torch":
        with torch.no_grad():
            after[0].weight[1, 1] = float("nan")
            after[1].running_mean[2] = 3
        before.load_state_dict(before.state_dict())
        for name, tensor in before.state_dict().items():
            tensor.copy_(after.state_dict()[name])
        before[0].weight.data[1, 1] = 0
    found = pm.Delta.load(pm.delta(before, after).save(tmp_path / "D"))
    made = found.apply(before)
    assert type(made) is type(before)
    assert not pm.diff(made, after) and pm.diff(made, before)
    if kind in ("dict", "haiku"):  # the same leaves in a file
        pm.save(before, tmp_path / "a.safetensors")
        with pm.open(tmp_path / "a.safetensors") as base:
            found.apply(base).save(tmp_path / "out.safetensors")
        assert not pm.diff(tmp_path / "out.safetensors", after)


# ---- files beside the weights ------------------------------------------------------------------------------------


def model(folder, seed, files):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for n in range(2):
        part = {f"layers.{n}.w": rng.normal(size=(8, 8)).astype("float32"), f"layers.{n}.b": np.zeros(8, "float16")}
        safetensors.numpy.save_file(part, folder / f"model-{n}.safetensors")
    table = {f"layers.{n}.{leaf}": f"model-{n}.safetensors" for n in range(2) for leaf in "wb"}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 544}, "weight_map": table})
    )
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


OLD = {"config.json": b'{"a": 1}\n', "tokenizer.model": bytes(range(256)), "merges.txt": b"x y\n", "code.py": b"1"}
NEW = {
    "config.json": b'{"a":  2}',
    "tokenizer.model": bytes(9),
    "merges.txt": b"x y\n",
    "code.py": b"2",
    "n.json": b"{}",
}


def test_files_beside_the_weights_go_along(tmp_path):
    a, b = model(tmp_path / "a", 0, OLD), model(tmp_path / "b", 1, NEW)
    found = pm.delta(a, b)
    assert {row.name for row in found.files} == {"config.json", "tokenizer.model", "n.json"}
    assert found.said == ("not in the delta: code.py, which differs",)  # a delta carries no code
    found = pm.Delta.load(found.save(tmp_path / "D"))
    with pm.open(a) as base:
        found.apply(base).save(tmp_path / "out")
    expected = {name.relative_to("b"): data for name, data in content(b).items()} | {Path("code.py"): b"1"}
    assert {name.relative_to("out"): data for name, data in content(tmp_path / "out").items()} == expected
    old = content(a)
    with pytest.raises(Unsupported, match=r"tokenizer\.model cannot change in place"):
        pm.patch(a, found.apply)
    assert content(a) == old
    (b / "tokenizer.model").write_bytes(OLD["tokenizer.model"])
    expected[Path("tokenizer.model")] = OLD["tokenizer.model"]
    pm.patch(a, pm.delta(a, b).apply)
    assert {name.relative_to("a"): data for name, data in content(a).items()} == expected
    pm.undo(a)
    assert content(a) == old
    (a / "config.json").write_bytes(b"{}")
    with pytest.raises(UnexpectedChange, match=r"config\.json is not that of the base"), pm.open(a) as base:
        found.apply(base)
    (a / "config.json").unlink()
    (a / "tokenizer.model").unlink()
    with pytest.raises(UnexpectedChange, match="is not that of the base"), pm.open(a) as base:
        found.apply(base)


def test_what_is_not_an_array_is_said(tmp_path):
    torch.save({"w": torch.ones(2), "epoch": 3}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(2), "epoch": 4}, tmp_path / "b.pt")
    assert "not in the delta: 1 entry without an array: epoch" in str(pm.delta(tmp_path / "a.pt", tmp_path / "b.pt"))
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "a.safetensors", {"step": "1"})
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "b.safetensors", {"step": "2"})
    said = pm.delta(tmp_path / "a.safetensors", tmp_path / "b.safetensors").said
    assert said == ("not in the delta: the metadata of the file: step",)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(tmp_path):
    """A base, and a delta on disk that changes one of its three leaves."""
    before = {"a": np.arange(50.0), "b": np.ones((3, 4), "float32"), "c": np.zeros(4, "int8")}
    after = before | {"a": np.where(np.arange(50) % 20 == 3, -1.0, before["a"])}
    safetensors.numpy.save_file(before, tmp_path / "a.safetensors")
    pm.delta(before, after).save(tmp_path / "D")
    return before, after, tmp_path / "a.safetensors", tmp_path / "D"


@pytest.mark.parametrize("name", "abc")
def test_another_base_is_refused(changed, name, tmp_path):
    before, _, _, folder = changed
    other = before | {name: before[name].copy()}
    other[name].reshape(-1)[-1] += 1
    path = tmp_path / "other.safetensors"
    safetensors.numpy.save_file(other, path)
    for base in (other, pm.open(path)):
        with pytest.raises(UnexpectedChange, match=rf"not the base.*\n  {name}: its bytes differ") as caught:
            pm.Delta.load(folder).apply(base)
        assert [*caught.value.changes] == [name]
    with pytest.raises(UnexpectedChange):
        pm.patch(path, pm.Delta.load(folder).apply)
    same(safetensors.numpy.load_file(path), other)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ({"a": np.arange(50.0), "b": np.ones((3, 4), "float32")}, "c: there is none"),
        ({"a": np.arange(50.0), "b": np.ones(12, "float32"), "c": np.zeros(4, "int8")}, "b: its bytes differ"),
        (
            {"a": np.arange(50.0), "b": np.ones((3, 4), "float32"), "c": np.zeros(4, "int8"), "d": NAN},
            "d: it is not in",
        ),
    ],
)
def test_a_base_with_other_leaves_is_refused(changed, base, said):
    with pytest.raises(UnexpectedChange, match=said):
        pm.Delta.load(changed[3]).apply(base)


def test_a_delta_is_applied_once(changed):
    _, after, path, folder = changed
    found = pm.Delta.load(folder)
    assert found.apply(after) is after
    pm.patch(path, found.apply)
    same(safetensors.numpy.load_file(path), after)
    assert pm.patch(path, found.apply).record is None
    assert len(pm.history(path)) == 1


@pytest.mark.parametrize("flips", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_bit_that_flips_is_found(changed, flips):
    _, _, path, folder = changed
    old, rng = path.read_bytes(), random.Random(0)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["delta.json", "delta.safetensors"]
    for _ in range(flips):
        file = rng.choice(files)
        sound = file.read_bytes()
        bad = bytearray(sound)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(BadCheckpoint):
            pm.Delta.load(folder)
        file.write_bytes(sound)
    assert pm.Delta.load(folder) and path.read_bytes() == old


def test_what_is_cut_short_or_missing_is_found(changed):
    folder = changed[3]
    with pytest.raises(CannotRead, match="no such directory"):
        pm.Delta.load(folder / "nowhere")
    for name in ("delta.safetensors", "delta.json"):
        sound = (folder / name).read_bytes()
        for data in (sound[:-1], sound[: len(sound) // 2], sound + b" ", b""):
            (folder / name).write_bytes(data)
            with pytest.raises(BadCheckpoint):
                pm.Delta.load(folder)
        (folder / name).unlink()
        with pytest.raises(BadCheckpoint):
            pm.Delta.load(folder)
        (folder / name).write_bytes(sound)


def sealed(folder, change):
    """A delta that someone else wrote: its manifest and payload changed, its digests made to fit."""
    import hashlib

    table = json.loads((folder / "delta.json").read_bytes())
    table.pop("sha256")
    payload = safetensors.numpy.load_file(folder / "delta.safetensors")
    change(table, payload)
    safetensors.numpy.save_file(payload, folder / "delta.safetensors")
    table["payload"]["sha256"] = hashlib.sha256((folder / "delta.safetensors").read_bytes()).hexdigest()
    text = json.dumps(table).encode()[1:]
    digest = hashlib.sha256(text).hexdigest()
    (folder / "delta.json").write_bytes(b'{\n"sha256":"' + digest.encode() + b'",' + text)


def positions(values):
    def change(table, payload):
        payload["positions/a@0"] = np.array(values, "uint32")

    return change


def moved(name, new):
    def change(table, payload):
        payload[new] = payload.pop(name)

    return change


def entry(**changes):
    def change(table, payload):
        table["leaves"][0] |= changes

    return change


def beside(name):
    def change(table, payload):
        table["files"].append({"name": name, "base": "", "result": "0" * 64, "nbytes": 0})

    return change


@pytest.mark.parametrize(
    "change",
    [
        positions([3, 23, 50]),
        positions([3, 23, 2**32 - 1]),
        positions([23, 3, 43]),
        positions([3, 3, 43]),
        positions([3, 43]),
        positions([]),
        moved("values/a@0", "values/a@4"),
        moved("values/a@0", "values/a@-8"),
        moved("values/a@0", "values/a@999999"),
        moved("positions/a@0", "positions/a@8"),
        entry(path=[]),
        entry(path=3),
        entry(spec=["float64", -1]),
        entry(changed=-1),
        entry(base=""),
        beside("../config.json"),
        beside("/etc/passwd.json"),
        beside("model.safetensors.index.json"),
        beside("x.py"),
        beside("notes.txt"),
        lambda table, payload: table.update(version=2),
        lambda table, payload: table.update(encoding="add"),
        lambda table, payload: table.pop("leaves"),
    ],
)
def test_a_hostile_delta_is_refused_and_nothing_is_written(changed, change, tmp_path):
    _, _, path, folder = changed
    sealed(folder, change)
    old = path.read_bytes()
    with pytest.raises((BadCheckpoint, UnexpectedChange)):
        pm.patch(path, pm.Delta.load(folder).apply)
    with pytest.raises((BadCheckpoint, UnexpectedChange)), pm.open(path) as base:
        pm.Delta.load(folder).apply(base).save(tmp_path / "out.safetensors")
    assert path.read_bytes() == old and not (tmp_path / "out.safetensors").exists()


def test_a_delta_that_is_sealed_anew_is_sound(changed):
    before, after, _, folder = changed
    sealed(folder, lambda table, payload: None)
    same(pm.Delta.load(folder).apply(before), after)


def test_where_a_delta_is_written(changed, tmp_path):
    found = pm.Delta.load(changed[3])
    with pytest.raises(CannotWrite, match="already exists"):
        found.save(tmp_path / "D")
    found.save(tmp_path / "D", force=True)
    assert pm.Delta.load(tmp_path / "D") == found
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(CannotWrite, match="not a delta"):
        found.save(tmp_path / "other", force=True)
    with pytest.raises(CannotWrite, match="does not exist"):
        found.save(tmp_path / "no" / "D")
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_choices_that_are_none():
    with pytest.raises(BadArgument, match="encoding='add'"):
        pm.delta({}, {}, encoding="add")
    with pytest.raises(BadArgument, match="'md5' is not a checksum"):
        pm.delta({"a": np.ones(1)}, {"a": np.ones(1)}, checksum="md5")


# ---- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.001, 0.02, 0.6, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_delta_is_small(share, dtype, tmp_path):
    rng = np.random.default_rng(0)
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    before = {f"layers.{n}.w": np.zeros((300, 300), dtype) for n in range(4)}
    after = {name: np.where(rng.random(array.shape) < share, 1, 0).astype(dtype) for name, array in before.items()}
    changed = sum(np.count_nonzero(array) for array in after.values())
    found = pm.delta(before, after)
    found.save(tmp_path / "D")
    size = sum(file.stat().st_size for file in (tmp_path / "D").iterdir())
    assert found.nbytes <= changed * (dtype.itemsize + 4)
    assert size - 4000 <= min(1.1 * changed * (dtype.itemsize + 4), 4 * 90_000 * dtype.itemsize)
    assert sum(row.changed for row in found.rows) in (
        changed,
        360_000,
    )  # all, where a leaf is shorter than what changes


def test_nothing_differs(tmp_path):
    before = {"a": np.ones(3), "b": NAN}
    found = pm.Delta.load(pm.delta(before, before).save(tmp_path / "D"))
    assert not found and found.nbytes == 0 and "nothing differs in 2 leaves" in str(found)
    assert found.apply(before) is before
    with pytest.raises(UnexpectedChange):
        found.apply({"a": np.zeros(3), "b": NAN})
    assert not pm.delta({}, {})


def test_a_leaf_of_many_windows(monkeypatch, tmp_path):
    monkeypatch.setattr("paramend.deltas.checksums.SPAN", 96)
    rng = np.random.default_rng(0)
    before = {"w": rng.normal(size=1000).astype("float32"), "z": rng.normal(size=501), "c": np.ones(77, "complex64")}
    after = {name: array.copy() for name, array in before.items()}
    after["w"][rng.integers(0, 1000, 90)] = NAN[0]
    after["w"][100:200] = 1
    after["z"][-1] = 0
    after["c"][::9] = 2j
    for encoding in ("overwrite", "xor"):
        found = pm.delta(before, after, encoding=encoding)
        assert len(found.payload.source.header.entries) > 60
        same(found.apply(before), after)
        safetensors.numpy.save_file(before, tmp_path / "a.safetensors")
        pm.patch(tmp_path / "a.safetensors", found.apply)
        same(safetensors.numpy.load_file(tmp_path / "a.safetensors"), after)
        shutil.rmtree(tmp_path / ".a.safetensors.undo")
    assert payload.SPAN % 48 == payload.SPAN % 4096 == 0


# ---- several -------------------------------------------------------------------------------------------------------


def versions(count, seed=0):
    """Models of which each is made of the one before."""
    rng = np.random.default_rng(seed)
    found = [{"a.w": rng.normal(size=(20, 5)).astype("float32"), "b": rng.normal(size=40).astype("float16")}]
    for _ in range(count):
        new = {name: array.copy() for name, array in found[-1].items()}
        for array in new.values():
            array.reshape(-1)[rng.integers(0, array.size, 3)] = rng.normal()
        found.append(new)
    return found


@pytest.mark.parametrize("encoding", ["overwrite", "xor"])
def test_a_chain_of_a_hundred_is_one(encoding, tmp_path):
    models = versions(100)
    chain = [pm.delta(one, two, encoding=encoding) for one, two in pairwise(models)]
    one = chain[0]
    for each in chain[1:]:
        one = one.then(each)
    assert one.nbytes <= sum(each.nbytes for each in chain)
    same(pm.Delta.load(one.save(tmp_path / "D")).apply(models[0]), models[-1])
    with pytest.raises(UnexpectedChange):
        one.apply(models[1])


def test_a_chain_with_structure(tmp_path):
    a = {"x": np.arange(600.0), "y": np.ones(3), "z": np.zeros(4), "u": np.ones(2, "int8")}
    b = {"x": a["x"].astype("float32"), "moved": a["y"], "new": np.arange(4.0), "z": np.arange(4.0), "u": a["u"] * 2}
    c = {"x": a["x"] + 1, "new": b["new"] * 2, "z": a["z"], "moved": b["moved"] * 3, "u": a["u"]}
    d = {"again": b["new"] * 2, "z": a["z"], "moved": np.ones(1)}
    steps = [pm.delta(one, two) for one, two in [(a, b), (b, c), (c, d)]]
    for last, end in ((2, c), (3, d)):
        one = steps[0]
        for each in steps[1:last]:
            one = one.then(each)
        same(one.apply(a), end)
        assert one.rows == pm.Delta.load(one.save(tmp_path / str(last))).rows
    kinds = {row.path: row.kind for row in steps[0].then(steps[1]).rows}
    assert kinds == {("x",): "changed", ("new",): "added", ("z",): "kept", ("moved",): "changed", ("u",): "kept"}
    with pytest.raises(BadArgument, match="not for the outcome of the one before"):
        steps[1].then(steps[0])
    with pytest.raises(Unsupported):
        steps[0].then(pm.delta(b, c, encoding="xor"))


def test_files_of_a_chain(tmp_path):
    a, b = model(tmp_path / "a", 0, OLD), model(tmp_path / "b", 1, NEW)
    c = model(tmp_path / "c", 2, OLD | {"config.json": b'{"a": 3}', "n.json": b"{ }"})
    one = pm.delta(a, b).then(pm.delta(b, c))
    assert {row.name for row in one.files} == {"config.json", "n.json"}
    with pm.open(a) as base:
        one.apply(base).save(tmp_path / "out")
    expected = {name.relative_to("c"): data for name, data in content(c).items()}
    assert {name.relative_to("out"): data for name, data in content(tmp_path / "out").items()} == expected


def test_deltas_one_after_the_other_in_one_go(tmp_path):
    models = versions(3)
    safetensors.numpy.save_file(models[0], tmp_path / "a.safetensors")
    chain = [pm.delta(one, two) for one, two in pairwise(models)]

    def all_of(tree):
        for each in chain:
            tree = each.apply(tree)
        return tree

    with pm.open(tmp_path / "a.safetensors") as base:
        all_of(base).save(tmp_path / "out.safetensors")
    pm.patch(tmp_path / "a.safetensors", all_of)
    same(safetensors.numpy.load_file(tmp_path / "out.safetensors"), models[-1])
    same(safetensors.numpy.load_file(tmp_path / "a.safetensors"), models[-1])


def test_an_applied_checkpoint_goes_to_other_processes(changed):
    _, after, path, folder = changed
    twin = pickle.loads(pickle.dumps(pm.Delta.load(folder).apply(pm.open(path))))
    same({name: twin[name] for name in twin}, after)


def test_a_chain_in_which_leaves_change_and_then_stay_or_get_another_name_is_one_delta():
    first = {"h": np.zeros(9, "float16"), "k": np.zeros(3)}
    second = first | {"h": np.arange(9, dtype="float16")}
    third = second | {"k": np.ones(3)}
    fourth = {"g": third["h"], "k": third["k"]}
    fifth = fourth | {"g": third["h"] + 1}
    for chain in ([first, second, third], [first, second, fourth], [first, second, fourth, fifth]):
        one, *others = (pm.delta(before, after) for before, after in pairwise(chain))
        for other in others:
            one = one.then(other)
        same(one.apply(first), chain[-1])


def test_a_delta_that_says_it_holds_terabytes_is_refused_at_once(tmp_path):
    before = {"w": np.zeros(3, "float32")}
    pm.delta(before, {"w": np.zeros(4, "float32")}).save(tmp_path / "d")
    table = json.loads((tmp_path / "d/delta.json").read_text())
    del table["sha256"]
    table["leaves"][0] |= {"spec": ["float32", 1 << 40], "held": "none"}
    text = json.dumps(table, indent=0)[1:].encode()
    (tmp_path / "d/delta.json").write_bytes(b'{\n"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'",' + text)
    with pytest.raises(BadCheckpoint, match="holds 16 bytes"):
        pm.Delta.load(tmp_path / "d").apply(before)
