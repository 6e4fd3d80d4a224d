"""GGUF files, written by the `gguf` package and read here: names, shapes, values, keys, and damage."""

import struct

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type, GGUFValueType as Kind, quants

import paramend as pm
from paramend.errors import BadCheckpoint, Unsupported
from paramend.leaves.codecs.codes import codes_of
from paramend.leaves.codecs.ggml import Blocks
from paramend.leaves.codecs.scalings import Plain
from paramend.leaves.specs import BLOCKS, Spec, numpy_dtype
from support.gguf_files import model, read, values, write


def codec(name):
    return Blocks(name, Spec((1,), "float32"), {}, codes_of("int8"), Plain())


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return model(tmp_path_factory.mktemp("gguf") / "m.gguf")


@pytest.mark.parametrize("name", BLOCKS)
def test_values_of_blocks_are_those_of_the_package_bit_for_bit(name):
    size, nbytes = BLOCKS[name]
    assert gguf.GGML_QUANT_SIZES[Type[name.upper()]] == (size, nbytes)
    raw = np.random.default_rng(1).integers(0, 256, (99, nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        right = quants.dequantize(raw, Type[name.upper()])
    found = codec(name).of(raw.view(numpy_dtype(name)))
    number = ~np.isnan(right)
    assert np.isnan(found[~number]).all()
    assert found[number].view(np.uint32).tolist() == right[number].view(np.uint32).tolist()


@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_of_zeros_is_of_positive_zeros(name):
    nbytes = BLOCKS[name][1]
    word = np.frombuffer(codec(name).zero_word.to_bytes(nbytes, "little"), np.uint8)
    assert not quants.dequantize(word[None], Type[name.upper()]).view(np.uint32).any()


def test_names_shapes_and_values(path):
    tensors, _ = read(path)
    with pm.open(path) as checkpoint:
        assert checkpoint.format == "gguf" and checkpoint.paths == [*tensors]
        for name, (kind, data) in tensors.items():
            right = values(kind, data)
            found = checkpoint[name]
            assert found.shape == right.shape and np.array_equal(found.astype(np.float32), right)
    with pm.open(path, raw=True) as stored:
        leaf = stored["blk.0.ffn_up.weight"]
        assert leaf.shape == (4, 1) and leaf.tobytes() == tensors["blk.0.ffn_up.weight"][1].tobytes()


def test_parts_of_a_weight_are_read_block_by_block(path):
    with pm.open(path) as checkpoint:
        for name in ("ffn_down", "attn_q", "attn_k"):
            whole, path = checkpoint[f"blk.1.{name}.weight"], f"blk.1.{name}.weight"
            for box in ((slice(1, 3), slice(40, 300, 7)), (slice(None), slice(250, 3, -5)), (2, slice(31, 33))):
                taken = pm.at(checkpoint, path).get()[path][box]
                assert np.array_equal(taken, whole[box])


def test_keys_have_the_types_of_the_file(tmp_path):
    given = {
        Kind.UINT8: 200,
        Kind.INT8: -3,
        Kind.UINT16: 60_000,
        Kind.INT16: -9,
        Kind.UINT32: 1 << 31,
        Kind.INT32: -7,
        Kind.FLOAT32: 0.1,
        Kind.BOOL: True,
        Kind.STRING: "grün",
        Kind.UINT64: 1 << 60,
        Kind.INT64: -1,
        Kind.FLOAT64: 0.1,
    }
    keys = [(f"x.{kind.name}", value, kind) for kind, value in given.items()]
    path = model(
        tmp_path / "m.gguf", keys=[*keys, ("x.list", [1.5, 2.5], Kind.ARRAY), ("x.texts", ["a", ""], Kind.ARRAY)]
    )
    with pm.open(path) as checkpoint:
        found = checkpoint.metadata
        for kind, value in given.items():
            there = found[f"x.{kind.name}"]
            assert there == (np.float32(value) if kind == Kind.FLOAT32 else value)
            assert kind == Kind.STRING or there.dtype.name == {"BOOL": "bool"}.get(kind.name, kind.name.lower())
        assert found["x.list"].tolist() == [1.5, 2.5] and found["x.texts"] == ["a", ""]
        checkpoint.save(tmp_path / "out.gguf")
    assert read(tmp_path / "out.gguf")[1] == read(path)[1]
    assert [f.types for f in gguf.GGUFReader(tmp_path / "out.gguf").fields.values()] == [
        f.types for f in gguf.GGUFReader(path).fields.values()
    ]


def test_a_copy_is_byte_for_byte_the_same(path, tmp_path):
    with pm.open(path) as checkpoint:
        checkpoint.save(tmp_path / "a.gguf")
        pm.at(checkpoint, "output_norm.weight").multiply(1).save(tmp_path / "b.gguf")
    assert path.read_bytes() == (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_another_alignment_and_every_float_and_integer(tmp_path):
    arrays = {f"x.{dtype}": np.arange(5).astype(dtype) for dtype in ("f2", "f4", "f8", "i1", "i2", "i4", "i8")}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(128)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    write(writer)
    with pm.open(tmp_path / "m.gguf") as checkpoint:
        for name, array in arrays.items():
            assert checkpoint[name].dtype == array.dtype and np.array_equal(checkpoint[name], array)
        pm.at(checkpoint, "x.f2").delete().save(tmp_path / "out.gguf")
    found = gguf.GGUFReader(tmp_path / "out.gguf")
    assert found.alignment == 128 and all(tensor.data_offset % 128 == 0 for tensor in found.tensors)


def old(path, out, version):
    """The file as the first version has it: counts and lengths of 32 bits. The third is as the second."""
    reader = gguf.GGUFReader(path)
    if version == 2:
        out.write_bytes(b"GGUF\2" + path.read_bytes()[5:])
        return out

    def text(value):
        return struct.pack("<I", len(value)) + value.encode()

    head = (
        struct.pack("<4sIII", b"GGUF", 1, len(reader.tensors), 1)
        + text("general.name")
        + struct.pack("<I", 8)
        + text("m")
    )
    at, data = 0, []
    for tensor in reader.tensors:
        dims = [int(n) for n in tensor.shape]
        head += text(tensor.name) + struct.pack(f"<I{len(dims)}IIQ", len(dims), *dims, tensor.tensor_type, at)
        data.append(tensor.data.tobytes() + b"\0" * (-tensor.data.nbytes % 32))
        at += len(data[-1])
    out.write_bytes(head + b"\0" * (-len(head) % 32) + b"".join(data))
    return out


@pytest.mark.parametrize("version", [1, 2])
def test_older_versions_are_read_and_written_as_the_third(path, tmp_path, version):
    with pm.open(old(path, tmp_path / "old.gguf", version)) as checkpoint, pm.open(path) as new:
        assert checkpoint.metadata["general.name"] == ("m" if version == 1 else "tiny")
        assert checkpoint.paths == new.paths
        assert all(np.array_equal(checkpoint[name], new[name]) for name in new.paths)
        pm.at(checkpoint, "output_norm.weight").delete().save(tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes()[4] == 3 and len(read(tmp_path / "out.gguf")[0]) == len(new.paths) - 1


def test_files_of_big_endian_machines_are_refused(tmp_path):
    model(tmp_path / "m.gguf", kinds={"attn_v": Type.F32}, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(BadCheckpoint, match=r"byte 4: its numbers are big-endian\n\nhint: gguf-convert-endian"):
        pm.open(tmp_path / "m.gguf")


def test_tensors_of_unknown_types_are_copied_and_never_read(tmp_path):
    path = model(tmp_path / "m.gguf", tensors={"odd": np.arange(64, dtype=np.int32)})
    raw = bytearray(path.read_bytes())
    at = raw.index(b"odd") + 3 + 4 + 8
    assert raw[at : at + 4] == struct.pack("<I", Type.I32)
    raw[at : at + 4] = struct.pack("<I", 99)
    path.write_bytes(raw)
    with pm.open(path) as checkpoint:
        assert str(checkpoint.spec(checkpoint.index.numbers[-2])) == "raw<ggml 99>[64]"
        with pytest.raises(Unsupported, match="its type, ggml 99, is unknown"):
            _ = checkpoint["odd"]
        pm.at(checkpoint, "blk.0.**").delete().save(tmp_path / "out.gguf")
    out = (tmp_path / "out.gguf").read_bytes()
    assert out[out.index(b"odd") + 15 :][:4] == struct.pack("<I", 99)
    assert np.arange(64, dtype=np.int32).tobytes() in out


def header(*, tensors=1, keys=0, body=b"", version=3):
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, keys) + body


def tensor(name=b"w", dims=(4,), kind=0, offset=0):
    return struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def key(name, kind, data=b""):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + data


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"GGUF", "byte 4: the version takes 4 bytes, and no more than 0 are there"),
        (header(version=9), "byte 4: version 9 is unknown"),
        (header(tensors=1 << 60), "byte 8: the number of tensors is 1,152,921,504,606,846,976"),
        (header(tensors=0, keys=9, body=b"\0" * 16), "byte 16: the number of keys is 9"),
        (
            header(tensors=0, keys=1, body=struct.pack("<Q", 1 << 50) + bytes(9)),
            "byte 24: the length of a key is 1,125",
        ),
        (header(tensors=0, keys=2, body=key(b"a.b", 0, b"\1") * 2), "byte 40: the key 'a.b' is there twice"),
        (header(tensors=0, keys=1, body=key(b"a." * 250, 0, b"\1")), "characters) has more than 200 pieces"),
        (header(tensors=0, keys=1, body=key(b"a.b", 77, bytes(8))), "byte 35: the value of 'a.b' has the type 77"),
        (
            header(tensors=0, keys=1, body=key(b"a.b", 7, b"\2")),
            "byte 39: the value of 'a.b' is neither true nor false",
        ),
        (
            header(tensors=0, keys=1, body=key(b"a.b", 9, struct.pack("<IQ", 8, 1 << 40))),
            "byte 43: the length of the value of 'a.b' is 1,099,511,627,776",
        ),
        (
            header(tensors=0, keys=1, body=key(b"general.alignment", 4, struct.pack("<I", 48))),
            "general.alignment is 48, and no power of two",
        ),
        (header(body=tensor(dims=(1 << 40, 1 << 40)) + bytes(99)), "tensor 'w': the number of elements overflows 64"),
        (header(body=tensor(dims=(8,), kind=8) + bytes(99)), "rows of q8_0 are of blocks of 32, and its shape is"),
        (header(body=tensor(offset=16) + bytes(199)), "tensor 'w': its offset, 16, is no multiple of 32"),
        (
            header(body=tensor(offset=32) + bytes(30)),
            "tensor 'w' takes 16 bytes from byte 96 on, and the file ends at 87",
        ),
        (header(tensors=2, body=tensor() * 2 + bytes(99)), "byte 57: tensor 'w' is there twice"),
        (
            header(tensors=2, body=tensor(dims=(16,)) + tensor(b"v", offset=32) + bytes(99)),
            "byte 57: tensor 'v' begins within 'w'",
        ),
        (header(body=struct.pack("<Q", 1) + b"w" + struct.pack("<I", 999) + bytes(99)), "999 axes are too many"),
    ],
)
def test_damage_is_told_with_its_place(tmp_path, raw, message):
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(BadCheckpoint) as caught:
        pm.open(tmp_path / "m.gguf")
    assert message in str(caught.value)


def test_every_cut_of_a_header_is_refused(path, tmp_path):
    raw = path.read_bytes()
    for length in range(0, 2400, 37):
        (tmp_path / "m.gguf").write_bytes(raw[:length])
        with pytest.raises(BadCheckpoint):
            pm.open(tmp_path / "m.gguf")
