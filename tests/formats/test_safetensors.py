"""The reader of safetensors headers: every rule, the files of the reference, and hostile bytes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.flax
import safetensors.numpy
import safetensors.torch
from hypothesis import given, settings, strategies as st

from paramend.errors import BadCheckpoint, CannotRead, ParamendError, Unsupported
from paramend.formats.safetensors import SafetensorsFile, parse_header
from paramend.leaves.specs import SAFETENSORS_CODES, Spec
from support.writing import write_header

# ---- files of the reference ------------------------------------------------------------------------------------

DTYPES = [name for name in SAFETENSORS_CODES if not name.startswith(("float4", "float6"))]


def array(dtype, shape, seed=0):
    """Random bits of a dtype."""
    kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    bits = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * kind.itemsize, np.uint8)
    return (bits & 1 if dtype == "bool" else bits).view(kind).reshape(shape)


def test_every_dtype_of_the_reference_reads_back_bit_for_bit(tmp_path):
    tree = {f"{dtype}.{n}": array(dtype, shape) for dtype in DTYPES for n, shape in enumerate([(3, 4), (), (0, 2)])}
    safetensors.numpy.save_file(tree, tmp_path / "m.safetensors", metadata={"format": "np", "ü": "\n"})
    with SafetensorsFile(tmp_path / "m.safetensors") as file:
        assert file.header.metadata == {"format": "np", "ü": "\n"}
        found = {file.index.path(n): n for n in file.index.numbers}
        assert found.keys() == tree.keys()
        for name, expected in tree.items():
            number = found[name]
            assert file.spec(number) == Spec(expected.shape, expected.dtype.name)
            got = file.read(number)
            assert got.dtype == expected.dtype and got.shape == expected.shape
            assert got.tobytes() == expected.tobytes()
            assert not got.flags.writeable
            assert file.read_range(number, 0, expected.size).tobytes() == expected.tobytes()
            if expected.size > 5:
                assert file.read_range(number, 2, 5).tobytes() == expected.reshape(-1)[2:5].tobytes()


def test_files_of_torch_and_flax(tmp_path):
    import jax.numpy as jnp
    import torch

    safetensors.torch.save_file({"fc.weight": torch.arange(6.0).reshape(2, 3).bfloat16()}, tmp_path / "t.safetensors")
    safetensors.flax.save_file({"params/fc/kernel": jnp.arange(6.0).reshape(3, 2)}, tmp_path / "f.safetensors")
    with SafetensorsFile(tmp_path / "t.safetensors") as file:
        assert file.read(0).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert file.index.path(0) == "fc.weight"
        assert file.index.separator == "."
    with SafetensorsFile(tmp_path / "f.safetensors") as file:
        assert file.read(0).tolist() == [[0, 1], [2, 3], [4, 5]]
        assert file.index.separator == "/"


def test_numbers_follow_the_bytes_not_the_names(tmp_path):
    text = '{"b":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    with SafetensorsFile(write(tmp_path, text.encode(), b"\x05\x06")) as file:
        assert [file.index.path(n) for n in file.index.numbers] == ["a", "b"]
        assert [file.read(n).tolist() for n in file.index.numbers] == [[5], [6]]


def test_arrays_outlive_the_file(tmp_path):
    safetensors.numpy.save_file({"a": np.arange(5.0)}, tmp_path / "m.safetensors")
    with SafetensorsFile(tmp_path / "m.safetensors") as file:
        found = file.read(0)
    assert found.tolist() == [0, 1, 2, 3, 4]


def test_bytes_that_are_not_aligned_are_read_aligned(tmp_path):
    text = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} '
    assert len(text) % 4
    with SafetensorsFile(write(tmp_path, text, np.array([1, 2], "float32").tobytes())) as file:
        assert file.read(0).flags.aligned
        assert file.read(0).tolist() == [1, 2]
        assert file._file._map is None  # whose pages would stay in memory


@pytest.mark.parametrize(("dtype", "nbytes"), [("F4", 2), ("F6_E2M3", 3), ("I2", 7)])
def test_packed_and_unknown_dtypes_are_listed_and_not_read(tmp_path, dtype, nbytes):
    text = json.dumps({"w": {"dtype": dtype, "shape": [4], "data_offsets": [0, nbytes]}}).encode()
    with SafetensorsFile(write(tmp_path, text, bytes(nbytes))) as file:
        assert file.nbytes(0) == nbytes
        assert file.spec(0).shape == (4,)
        for read in (lambda: file.read(0), lambda: file.read_range(0, 0, 1)):
            with pytest.raises(Unsupported, match="w cannot be read"):
                read()


def test_an_unknown_dtype_never_passes_for_a_known_one(tmp_path):
    text = json.dumps({"w": {"dtype": "float32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    with SafetensorsFile(write(tmp_path, text, bytes(4))) as file:
        assert file.spec(0).dtype == "raw<float32>"
        with pytest.raises(Unsupported):
            file.read(0)


def test_shapes_that_numpy_lacks(tmp_path):
    text = json.dumps({"w": {"dtype": "U8", "shape": [1] * 70, "data_offsets": [0, 1]}}).encode()
    with SafetensorsFile(write(tmp_path, text, b"\x07")) as file:
        assert file.spec(0).ndim == 70
        with pytest.raises(Unsupported, match="numpy has no array of shape"):
            file.read(0)


# ---- headers -----------------------------------------------------------------------------------------------------


def write(folder, text, data=b"", length=None):
    path = folder / "m.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="U8", shape=(4,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


HUGE = 2**64
GOOD = {
    "plain": ({"w": entry()}, 4),
    "empty": ({}, 0),
    "no tensors, metadata": ({"__metadata__": {"a": "b"}}, 0),
    "null metadata": ({"__metadata__": None, "w": entry()}, 4),
    "unknown fields": ({"w": entry(more={"deep": [1.5, None, True]})}, 4),
    "a scalar": ({"w": entry(shape=(), offsets=(0, 1))}, 1),
    "nothing at the start": ({"z": entry(shape=(0, 3), offsets=(0, 0)), "w": entry()}, 4),
    "nothing at the end": ({"w": entry(), "z": entry(shape=(0,), offsets=(4, 4))}, 4),
    "two nothings in one place": ({"y": entry(shape=(0,), offsets=(0, 0)), "z": entry(shape=(0,), offsets=(0, 0))}, 0),
    "F4": ({"w": entry("F4", (8,))}, 4),
    "strange names": (
        {"../../etc": entry(), "": entry(shape=(0,), offsets=(4, 4)), "a\0b": entry("U8", (0,), (4, 4))},
        4,
    ),
    "nothing, however wide": ({"w": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}, 0),
}
BAD = {
    "hole": ({"w": entry(offsets=(1, 5))}, 5, "belong to no tensor"),
    "hole between": ({"v": entry(), "w": entry(offsets=(5, 9))}, 9, "the bytes 4 to 5 before it belong to no tensor"),
    "overlap": ({"v": entry(), "w": entry(offsets=(2, 6))}, 6, "within tensor 'v'"),
    "alias": ({"v": entry(), "w": entry()}, 4, "within tensor 'v'"),
    "trailing byte": ({"w": entry()}, 5, "1 byte after the last tensor"),
    "cut short": ({"w": entry()}, 3, "cut short"),
    "data and no tensor": ({}, 1, "1 byte after"),
    "nothing in the wrong place": ({"w": entry(), "z": entry(shape=(0,), offsets=(2, 2))}, 4, "within tensor"),
    "nothing beyond the end": ({"w": entry(), "z": entry(shape=(0,), offsets=(9, 9))}, 4, "cut short"),
    "too few bytes": ({"w": entry(shape=(5,))}, 4, "takes 5 bytes, but 0 to 4 are 4"),
    "half a byte": ({"w": entry("F4", (3,), (0, 2))}, 2, "do not fill whole bytes"),
    "reversed": ({"w": entry(offsets=(4, 0))}, 4, "before the start"),
    "negative length": ({"w": entry(shape=(-4,))}, 4, "shape: a whole number from 0"),
    "negative twice": ({"w": entry(shape=(-2, -2))}, 4, "shape: a whole number from 0"),
    "float length": ({"w": entry(shape=(4.0,))}, 4, "not a number with a point"),
    "bool length": ({"w": entry(shape=(True, 4))}, 4, "not a bool"),
    "text length": ({"w": entry(shape=("4",))}, 4, "not a string"),
    "float offset": ({"w": entry(offsets=(0, 4.0))}, 4, "data_offsets"),
    "bool offset": ({"w": entry(shape=(1,), offsets=(False, True))}, 1, "data_offsets"),
    "huge length": ({"w": entry(shape=(HUGE,))}, 4, "2\\*\\*64"),
    "huge length and 0": ({"w": entry(shape=(HUGE, 0), offsets=(0, 0))}, 0, "2\\*\\*64"),
    "overflow": ({"w": entry(shape=(2**32, 2**32))}, 4, "overflows"),
    "overflow, then 0": ({"w": entry(shape=(2**40, 2**40, 0), offsets=(0, 0))}, 0, "overflows"),
    "overflow of bits": ({"w": entry("F64", (2**59,))}, 4, "overflows"),
    "huge offset": ({"w": entry(offsets=(0, HUGE))}, 4, "data_offsets"),
    "three offsets": ({"w": entry(offsets=(0, 2, 4))}, 4, "two integers"),
    "no dtype": ({"w": {"shape": [4], "data_offsets": [0, 4]}}, 4, "dtype is missing"),
    "no shape": ({"w": {"dtype": "U8", "data_offsets": [0, 4]}}, 4, "shape is missing"),
    "dtype no text": ({"w": entry(dtype=8)}, 4, "a string is expected, not an integer"),
    "dtype null": ({"w": entry(dtype=None)}, 4, "not null"),
    "shape no array": ({"w": {**entry(), "shape": {"0": 4}}}, 4, "not an object"),
    "tensor no object": ({"w": [entry()]}, 4, "not an array"),
    "metadata no object": ({"__metadata__": "x", "w": entry()}, 4, "object of strings"),
    "metadata of numbers": ({"__metadata__": {"epoch": 3}, "w": entry()}, 4, "'epoch': a string is expected"),
    "lone surrogate": ({"a\ud800": entry()}, 4, "surrogate"),
    "lone surrogate in metadata": ({"__metadata__": {"a": "\udc00"}, "w": entry()}, 4, "surrogate"),
    "a name too deep": ({"a." * 5000 + "w": entry()}, 4, "more than 200 pieces"),
    "a list": ([entry()], 4, "a JSON object is expected"),
}
ROW = b'{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
BAD_TEXT = {
    "no text": (b"", "not JSON"),
    "not UTF-8": (b'{"\xff":' + ROW + b"}", "byte 2: the text is not UTF-8"),
    "a BOM": (b"\xef\xbb\xbf{}", "not JSON"),
    "name twice": (b'{"w":' + ROW + b',"w":' + ROW + b"}", "'w' appears twice"),
    "name twice, escaped": (b'{"w":' + ROW + b',"\\u0077":' + ROW + b"}", "'w' appears twice"),
    "field twice": (b'{"w":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', "'dtype' appears twice"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', "appears twice"),
    "NaN": (b'{"w":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', "NaN is not a JSON number"),
    "infinity": (b'{"w":{"dtype":"U8","shape":[1e999],"data_offsets":[0,4]}}', "too large"),
    "minus 0": (b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[-0,4]}}', "a whole number"),
    "surrogate in an unknown field": (b'{"w":{"\\udc00":1,' + ROW[1:] + b"}", "surrogate"),
    "comment": (b'{"w":' + ROW + b"} // x", "not JSON"),
    "control character": (b'{"w\n":' + ROW + b"}", "not JSON"),
    "deep": (b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "a number without end": (b'{"w":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', "m.st: "),
}


@pytest.mark.parametrize("case", GOOD)
def test_good_headers(case):
    table, data = GOOD[case]
    raw = json.dumps(table).encode()
    header = parse_header(raw, data, file="m.st")
    assert header.data_nbytes == data
    assert {e.name for e in header.entries} == table.keys() - {"__metadata__"}
    safetensors.deserialize(len(raw).to_bytes(8, "little") + raw + bytes(data))  # the reference agrees


@pytest.mark.parametrize("case", BAD)
def test_bad_headers(case):
    table, data, message = BAD[case]
    raw = json.dumps(table).encode()
    with pytest.raises(BadCheckpoint, match=message) as error:
        parse_header(raw, data, file="m.st")
    assert str(error.value).startswith("m.st: ")
    if case != "a name too deep":
        with pytest.raises(safetensors.SafetensorError):  # the reference agrees
            safetensors.deserialize(len(raw).to_bytes(8, "little") + raw + bytes(data))


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text(case):
    raw, message = BAD_TEXT[case]
    with pytest.raises(BadCheckpoint, match=message):
        parse_header(raw, 4, file="m.st")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\x01", "a file of 1 byte has no header"),
        (bytes(8), "not JSON"),
        (b"\xff" * 8, "not a safetensors file"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "not a safetensors file"),
        ((3).to_bytes(8, "little") + b"{}", "should be 3 bytes long, but only 2 bytes follow"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(60), "zip file"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x80\x02}q\x00X\x01\x00\x00", "pickle"),
        (b"<!DOCTYPE html><html></html>", "web page"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CannotRead, match="no such file") as error:
        SafetensorsFile(tmp_path / "mdel.safetensors")
    assert error.value.hint == f"did you mean {tmp_path / 'model.safetensors'}?"
    with pytest.raises(BadCheckpoint, match="is a directory") as error:
        SafetensorsFile(tmp_path)
    assert error.value.hint == str(tmp_path / "model.safetensors")
    for path, message in [
        (tmp_path / "model.safetensors" / "x", "cannot be opened: Not a directory"),
        (tmp_path / "pipe", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        ("a\0b", "cannot be opened"),
        ("x" * 5000, "cannot be opened"),
    ]:
        with pytest.raises((BadCheckpoint, CannotRead), match=message):
            SafetensorsFile(path)


def test_a_file_without_permission(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CannotRead, match="no permission to read it"):
        SafetensorsFile(tmp_path / "m.safetensors")


def test_no_descriptor_is_left_open(tmp_path):
    good = write(tmp_path, b"{}")
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    for _ in range(5):
        SafetensorsFile(good).close()
    bad = write(tmp_path, b"{")
    for _ in range(5):
        with pytest.raises(BadCheckpoint):
            SafetensorsFile(bad)
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before


# ---- writing headers ---------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__")
SPECS = st.builds(Spec, st.lists(st.integers(0, 3), max_size=3).map(tuple), st.sampled_from(DTYPES))


@given(st.dictionaries(NAMES, SPECS, max_size=5), st.none() | st.dictionaries(NAMES, NAMES, max_size=3))
@settings(max_examples=100, deadline=None)
def test_a_written_header_reads_back_and_the_reference_takes_it(specs, metadata):
    header = write_header(specs, metadata)
    assert len(header.to_bytes()) % 8 == 0
    assert parse_header(header.raw, header.data_nbytes, file="m.st") == header
    # numpy cannot hold the widest shapes, but the reference only counts.
    safetensors.deserialize(header.to_bytes() + bytes(header.data_nbytes))


def test_a_header_after_a_cast_keeps_orders_metadata_and_unknown_fields():
    text = (
        b'{"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16],"note":"\xc3\xbc"},"__metadata__":{"k":"v"},'
        b'"u":{"dtype":"I2","shape":[9],"data_offsets":[16,19]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    )
    before = parse_header(text, 19, file="m.st")
    kept = {place: (entry.name, entry.spec) for place, entry in enumerate(before.entries)}
    assert before.edited(kept) is before
    after = before.edited(kept | {0: (kept[0][0], Spec((2,), "bfloat16"))})
    assert parse_header(after.raw, 15, file="m.st") == after
    table = json.loads(after.raw)
    assert list(table) == ["b", "__metadata__", "u", "a"]
    assert table["b"] == {"dtype": "F32", "shape": [2], "data_offsets": [4, 12], "note": "ü"}
    assert table["a"] == {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}
    assert table["u"]["data_offsets"] == [12, 15]


# ---- hostile bytes -----------------------------------------------------------------------------------------------

SEEDS = [json.dumps(table).encode() for table, _ in GOOD.values()] + [
    text for text, _ in BAD_TEXT.values() if len(text) < 999
]
TOKENS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"-",
    b"0",
    b"1",
    b"99999999999999999999",
    b"1e5",
    b"0.5",
    b"true",
    b"null",
]
TOKENS += [
    b'"w"',
    b'"dtype"',
    b'"F32"',
    b'"BOOL"',
    b'"shape"',
    b'"data_offsets"',
    b"\\ud800",
    b"\\u0000",
    b"\xff",
    b"\x00",
    b"NaN",
]
TOKENS += [b"[0,4]", b"[]", b"[4]", b'"__metadata__"', b"{}", b" ", b"\n", b"/" * 300]


def mutated(rng):
    """A header damaged at a few places."""
    text = bytearray(rng.choice(SEEDS))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 8])):
        at, upto = rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)
        match rng.randrange(6):
            case 0:
                text[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                text[at:at] = rng.choice(TOKENS)
            case 2:
                del text[at : at + rng.randrange(1, 6)]
            case 3:
                text[at:at] = text[min(at, upto) : max(at, upto)]
            case 4:
                text[at : at + 1] = b"%d" % rng.choice([0, 1, 2, 3, 4, 8, 2**31, 2**63, 2**64])
            case 5:
                other = rng.choice(SEEDS)
                text[at:] = other[rng.randrange(len(other) + 1) :]
    return bytes(text)


def test_hostile_headers_give_one_kind_of_error_and_nothing_that_the_reference_refuses(tmp_path):
    rng = random.Random(0)
    taken = refused = 0
    for _ in range(6000):
        raw, data = mutated(rng), rng.choice([0, 4, 4, 4, 1, 8])
        try:
            header = parse_header(raw, data, file="m.st")
        except ParamendError as error:
            refused += 1
            assert type(error) is BadCheckpoint
            assert len(str(error)) < 1000
            continue
        taken += 1
        if not any(entry.spec.dtype.startswith("raw<") for entry in header.entries):
            safetensors.deserialize(len(raw).to_bytes(8, "little") + raw + bytes(data))  # or it raises
    assert taken > 100
    assert refused > 3000


def test_hostile_files(tmp_path):
    rng = random.Random(1)
    path = tmp_path / "m.safetensors"
    for _ in range(300):
        raw = mutated(rng)
        length = rng.choice([len(raw), len(raw), len(raw) - 1, len(raw) + 1, 0, 2**32, 2**63, 2**64 - 1]) % 2**64
        content = bytearray(length.to_bytes(8, "little") + raw + bytes(4))
        path.write_bytes(content[: rng.choice([len(content), len(content), 3, 7, 8, 12])])
        try:
            with SafetensorsFile(path) as file:
                for number in file.index.numbers:
                    file.index.path(number)
                    if not file.refusal(number) and file.spec(number).ndim < 60:
                        file.read(number)
        except BadCheckpoint:
            pass


def test_opening_a_huge_sparse_file_reads_only_its_header(tmp_path):
    count = 2**40  # 4 TB of float32
    header = write_header({"w": Spec((count,), "float32"), "b": Spec((1,), "float32")})
    path = tmp_path / "m.safetensors"
    path.write_bytes(header.to_bytes())
    try:
        os.truncate(path, header.nbytes + header.data_nbytes)
    except OSError:
        pytest.skip("this file system has no files of 4 TB")
    code = f"""from paramend.formats.safetensors import SafetensorsFile
file = SafetensorsFile({str(path)!r})
print(file.spec(0), file.read(1))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"float32[{count}] [0.]\n"


@pytest.mark.parametrize("length", [0x80, 0x3C, 0x4B50])
def test_a_cut_file_is_not_taken_for_one_of_another_kind(tmp_path, length):
    """The length of the header may begin like a pickle, a web page or a zip file."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[2]')
    with pytest.raises(BadCheckpoint, match=f"the header should be {length:,} bytes long, but only 31 bytes follow"):
        SafetensorsFile(path)
