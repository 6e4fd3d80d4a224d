"""Small files that would take all memory or never open, and files nested as deep as their reader's stack."""

import json
import struct
import zipfile

import msgpack
import numpy as np
import pytest
import safetensors.numpy
import torch

import paramend as pm
from paramend.errors import BadCheckpoint, ParamendError
from paramend.formats.torch.pickles import Flaw
from paramend.formats.torch.rebuilds import Tensor, TorchWords
from paramend.formats.torch.writer import pickled
from support.stacks import with_few_calls_left


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value


def pickle_of(tmp_path, data):
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", b"\x80\x02" + data + b".")
    return path


def shared(value, count):
    """A dict of one value under many keys."""
    rest = b"".join(text(b"k%d" % i) + b"h\0" for i in range(count))
    return b"}(" + text(b"first") + value + b"q\0" + rest + b"u"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (shared(b"](" + b"K\1" * 50_000 + b"e", 2000), "same values, or long keys, are in too many places"),
        (shared(text(b"x" * 100_000), 2000), "same values, or long keys, are in too many places"),
        (shared(b"](" + text(b"x" * 100_000) + b"e", 2000), "same values, or long keys, are in too many places"),
        (b"}" + text(b"k" * 450_000) + shared(b"K\1", 200) + b"s", "same values, or long keys, are in too many"),
        (b"}(" + b"".join(b"K\1J%s\x86N" % struct.pack("<i", i) for i in range(10_001)) + b"u", "keys are tuples"),
    ],
)
def test_a_small_pickle_does_not_grow(tmp_path, data, message):
    path = pickle_of(tmp_path, data)
    assert path.stat().st_size < 500_000
    with pytest.raises(BadCheckpoint, match=message):
        pm.open(path)


def test_a_value_that_is_shared_a_few_times_is_read(tmp_path):
    note = "x" * 100_000
    torch.save({"w": torch.ones(2), **{f"note {i}": note for i in range(20)}}, tmp_path / "m.pt")
    assert len(pm.open(tmp_path / "m.pt").metadata) == 20


def test_tensors_of_tensors_of_tensors_are_refused():
    part = Tensor((1,), (1,), "float32", parts=(Tensor((1,), (1,), "float32"),))
    with pytest.raises(Flaw, match="unknown kind"):
        TorchWords({}).names()["torch._utils._rebuild_nested_tensor"].call(part, part, part, part)


def test_a_long_key_over_many_values_of_msgpack(tmp_path):
    path = tmp_path / "m.msgpack"
    path.write_bytes(msgpack.packb({"k" * 5_000_000: {str(i): 1 for i in range(40)}}))
    with pytest.raises(BadCheckpoint, match="too many values are under long keys"):
        pm.open(path)


def nested_to(depth, leaf):
    tree = {"w": leaf}
    for _ in range(depth - 1):
        tree = {"a": tree}
    return tree


@pytest.mark.parametrize("suffix", ["pt", "msgpack", "npz", "safetensors", "orbax"])
def test_what_is_as_deep_as_can_be_is_read_back(tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    pm.save(nested_to(200, np.arange(3)), path)
    (leaf,) = pm.at(pm.load(path), "**/w").get().values()
    assert leaf.tolist() == [0, 1, 2]


@pytest.mark.parametrize("suffix", ["pt", "msgpack", "npz", "safetensors", "orbax"])
def test_a_reader_deep_within_calls(tmp_path, suffix):
    path = tmp_path / f"m.{suffix}"
    pm.save(nested_to(150, np.arange(3)), path)
    pm.at(pm.load(path), "**/w").get()  # imports what it needs
    for left in (400, 250, 150, 120):
        try:
            (leaf,) = with_few_calls_left(left, lambda: pm.at(pm.load(path), "**/w").get()).values()
            assert leaf.tolist() == [0, 1, 2]
        except ParamendError as error:
            assert "nested deeper than the calls that are left" in str(error)


def test_a_pickle_is_written_from_deep_within_calls():
    deep = []
    for _ in range(500):
        deep = [deep]
    assert len(with_few_calls_left(60, lambda: pickled(deep))) > 1000


SHAPE = [1] * 100_000


def safetensors_file(path):
    header = json.dumps({"w": {"dtype": "F32", "shape": SHAPE, "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def msgpack_file(path):
    array = msgpack.ExtType(1, msgpack.packb([SHAPE, "float32", bytes(4)]))
    path.write_bytes(msgpack.packb({"w": array}))


def zarr_file(path):
    (path / "w").mkdir(parents=True)
    row = {"key_metadata": [{"key": "w", "key_type": 2}], "value_metadata": {"value_type": "jax.Array"}}
    (path / "_METADATA").write_text(json.dumps({"tree_metadata": {"('w',)": row}, "use_ocdbt": False}))
    (path / "w" / ".zarray").write_text(json.dumps({"shape": SHAPE, "chunks": SHAPE, "dtype": "float32"}))


@pytest.mark.parametrize(
    ("name", "make"), [("m.safetensors", safetensors_file), ("m.msgpack", msgpack_file), ("m.orbax", zarr_file)]
)
def test_a_hundred_thousand_axes(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(BadCheckpoint, match="100,000 axes"):
        pm.open(tmp_path / name).spec(0)


def test_as_many_axes_as_a_library_may_have(tmp_path):
    safetensors.numpy.save_file({"w": np.ones([1] * 32, "float32")}, tmp_path / "m.safetensors")
    assert pm.load(tmp_path / "m.safetensors")["w"].ndim == 32


def test_an_empty_axis_beside_huge_ones(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [0, 2**31, 2**31], "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    pm.open(path).save(tmp_path / "m.orbax")
    assert pm.open(tmp_path / "m.orbax").spec(0).shape == (0, 2**31, 2**31)


def test_a_tensor_expanded_beyond_memory_is_loaded_as_a_view(tmp_path):
    torch.save({"w": torch.arange(3.0).reshape(3, 1).expand(3, 2**40)}, tmp_path / "m.pt")
    leaf = pm.load(tmp_path / "m.pt")["w"]
    assert leaf.shape == (3, 2**40)
    assert leaf[:, 2**39].tolist() == [0, 1, 2]
    torch.save({"w": torch.arange(3.0).reshape(3, 1).expand(3, 4)}, tmp_path / "small.pt")
    small = pm.load(tmp_path / "small.pt")["w"]
    small += 1
    assert small.tolist() == [[1] * 4, [2] * 4, [3] * 4]


def test_names_of_many_digits_and_of_many_numbers(tmp_path):
    names = [f"w{'1' * 5000}", f"w{'2' * 5000}"]
    names += ["a".join("2" if place == at else "1" for at in range(100)) for place in range(100)]
    for file, value in (("before", 0), ("after", 1)):
        leaves = {name: np.full(2, value, "float32") for name in names}
        safetensors.numpy.save_file(leaves, tmp_path / f"{file}.safetensors")
    report = pm.diff(tmp_path / "before.safetensors", tmp_path / "after.safetensors")
    assert names[0] in str(report)
    assert len(report.changed) == 102
    assert "layers.{0..29}.w" in str(pm.diff({f"layers.{i}.w": np.ones(1) for i in range(30)}, {}))


def test_a_folder_deeper_than_the_stack(tmp_path):
    (tmp_path / "model").mkdir()
    pm.save({"w": np.ones(2)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "/".join("d" * 300)).mkdir(parents=True)
    with pytest.raises(ParamendError, match="nested deeper than the calls that are left"):
        with_few_calls_left(150, lambda: pm.open(tmp_path / "model").save(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
