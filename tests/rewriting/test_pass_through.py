"""What is not chosen goes through every engine as it is: unknown and packed dtypes, nothing at all, order, metadata."""

import json
import os

import numpy as np
import pytest
import torch

import paramend as pm
from paramend.errors import BadCheckpoint, Unsupported
from paramend.formats import shards as shards_module, zips
from paramend.formats.torch import source as pt

# name → (dtype, shape, bytes); neither the names nor the dtypes are in an order that a writer would choose
LEAVES = {
    "z.packed": ("F4", [2, 8], bytes(range(8))),
    "b.unknown": ("X7_NEW", [3, 5], b"sevenodd bytes!"),
    "a.weight": ("F32", [2, 2], np.arange(4, dtype="float32").tobytes()),
    "m.nothing": ("BF16", [0, 4], b""),
    "c.fp8": ("F8_E4M3", [3], b"\x7f\x80\xff"),
    "a.nan": ("F16", [2], b"\x01\x7e\xff\xff"),
    "s.scalar": ("I64", [], (7).to_bytes(8, "little")),
}
METADATA = {"format": "pt", "note": "ü", "quant": '{"bits": 4}'}


def header(names, order, *, pad=" " * 5):
    at, offsets = 0, {}
    for name in names:  # the order of the bytes
        offsets[name] = [at, at + len(LEAVES[name][2])]
        at += len(LEAVES[name][2])
    rows = {
        name: {"data_offsets": offsets[name], "shape": LEAVES[name][1], "dtype": LEAVES[name][0], "extra": {"of": name}}
        for name in order  # the order of the header is another
    }
    return json.dumps({"__metadata__": METADATA, **rows}).encode() + pad.encode()


def write(path, names=tuple(LEAVES)):
    text = header(names, list(reversed(names)))
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(LEAVES[name][2] for name in names))


def look(path):
    """Header rows, in their order, and bytes by name, in theirs."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    metadata = table.pop("__metadata__", None)
    data = {}
    for name, row in sorted(table.items(), key=lambda each: (each[1]["data_offsets"], each[0])):
        start, stop = row["data_offsets"]
        data[name] = raw[8 + length + start : 8 + length + stop]
    return metadata, table, data


@pytest.fixture(params=["file", "shards"])
def model(request, tmp_path):
    if request.param == "file":
        write(tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"
    folder = tmp_path / "model"
    folder.mkdir()
    names = list(LEAVES)
    for n in range(2):
        write(folder / f"model-{n}.safetensors", names[n * 4 : n * 4 + 4])
    weight_map = {name: f"model-{i // 4}.safetensors" for i, name in enumerate(names)}
    index = {"metadata": {"total_size": sum(len(leaf[2]) for leaf in LEAVES.values()), "by": "me"}, "kept": [1]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **index}))
    (folder / "README.md").write_text("hello")
    os.mkfifo(folder / "pipe")
    return folder


def shards(path):
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def everything(path):
    rows, data = {}, {}
    for shard in shards(path):
        metadata, found, held = look(shard)
        assert metadata == METADATA
        rows |= found
        data |= held
    return rows, data


EDITS = {
    "nothing": (lambda t: t, {}),
    "zero": (lambda t: pm.at(t, "a.weight").zero(), {"a.weight": bytes(16)}),
    "cast": (lambda t: pm.at(t, "a.weight").cast("float64"), {"a.weight": np.arange(4.0).tobytes()}),
    "delete": (lambda t: pm.at(t, "s.scalar").delete(), {"s.scalar": None}),
    "rename": (lambda t: pm.at(t, "b.unknown").rename("q.unknown"), {}),
    "fp8": (lambda t: pm.at(t, "c.fp8").zero(), {"c.fp8": bytes(3)}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_save_keeps_all_else(model, tmp_path, edit):
    before_rows, before = everything(model)
    change, expected = EDITS[edit]
    out = tmp_path / f"out{model.suffix}"
    report = change(pm.open(model)).save(out)
    rows, data = everything(out)
    renamed = {"b.unknown": "q.unknown"} if edit == "rename" else {}
    wanted = {renamed.get(name, name): expected.get(name, held) for name, held in before.items()}
    wanted = {name: held for name, held in wanted.items() if held is not None}
    assert data == wanted and list(data) == list(wanted)  # also the order of the bytes
    kept = [renamed.get(name, name) for name in before_rows if renamed.get(name, name) in wanted]
    assert list(rows) == kept  # and that of the header
    for old, row in before_rows.items():
        new = rows.get(renamed.get(old, old))
        if new is not None:
            same = {"shape", "extra"} | ({"dtype"} if edit != "cast" or old != "a.weight" else set())
            assert {key: row[key] for key in same} == {key: new[key] for key in same}
    if edit == "nothing":
        assert [shard.read_bytes() for shard in shards(out)] == [shard.read_bytes() for shard in shards(model)]
    if model.is_dir():
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["kept"] == [1] and index["metadata"]["by"] == "me"
        assert index["metadata"]["total_size"] == sum(map(len, data.values()))
        assert set(index["weight_map"]) == set(data)
        assert (out / "README.md").read_text() == "hello"
        assert report.left_out == ("pipe (not a regular file)",)


def test_a_patch_keeps_all_else(model):
    before = {path.name: path.read_bytes() for path in shards(model)}
    pm.patch(model, lambda t: pm.at(pm.at(t, "a.weight").zero(), "c.fp8").fill(1))
    _, data = everything(model)
    assert data == {name: leaf[2] for name, leaf in LEAVES.items()} | {"a.weight": bytes(16), "c.fp8": b"\x38" * 3}
    pm.undo(model)
    assert {path.name: path.read_bytes() for path in shards(model)} == before


def test_other_shards_and_one_file_hold_the_same_bytes(model, tmp_path):
    pm.open(model).save(tmp_path / "small", max_shard_size=16)
    _, data = everything(tmp_path / "small")
    assert data == {name: leaf[2] for name, leaf in LEAVES.items()}
    pm.open(tmp_path / "small").save(tmp_path / "one.safetensors")
    metadata, rows, data = look(tmp_path / "one.safetensors")
    assert data == {name: leaf[2] for name, leaf in LEAVES.items()} and metadata == METADATA
    assert {name: (row["dtype"], row["shape"]) for name, row in rows.items()} == {
        name: leaf[:2] for name, leaf in LEAVES.items()
    }


@pytest.mark.parametrize("name", ["z.packed", "b.unknown"])
def test_what_has_no_values_here_takes_no_edit(model, tmp_path, name):
    for change in (lambda t: pm.at(t, name).zero(), lambda t: pm.at(t, name).cast("float32")):
        with pytest.raises(Unsupported, match=f"{name} cannot take .*: its bytes can only be copied"):
            change(pm.open(model)).save(tmp_path / "out")
        with pytest.raises(Unsupported, match=name):
            pm.patch(model, change)
    assert not (tmp_path / "out").exists()


def test_headers_pickles_and_directories_are_of_bounded_length(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes((10**8 + 1).to_bytes(8, "little") + b"{")
    os.truncate(tmp_path / "x.safetensors", 3 * 10**8)  # sparse
    with pytest.raises(BadCheckpoint, match="its header would be 100,000,001 bytes long"):
        pm.open(tmp_path / "x.safetensors")
    torch.save({"w": torch.ones(1)}, tmp_path / "x.pt")
    monkeypatch.setattr(pt, "MAX_PICKLE", 10)
    with pytest.raises(BadCheckpoint, match=r"x/data.pkl': a pickle of .* bytes is too long"):
        pm.open(tmp_path / "x.pt")
    monkeypatch.setattr(zips, "MAX_DIRECTORY", 10)
    with pytest.raises(BadCheckpoint, match=r"its central directory would be .* bytes long"):
        pm.open(tmp_path / "x.pt")


def test_indexes_are_of_bounded_length(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_MAX", 10)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "x.safetensors"}}')
    with pytest.raises(BadCheckpoint, match="index: an index of 38 bytes is too large"):
        pm.open(tmp_path)
