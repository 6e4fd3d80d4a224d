"""The reader and the writer of Flax msgpack files: files of flax bit for bit, and hostile bytes."""

import random
import subprocess
import sys

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import optax
import pytest
from flax.serialization import msgpack_restore, msgpack_serialize, to_bytes

import paramend as pm
from paramend.errors import BadCheckpoint, CannotRead, RenameClash, Unsupported
from paramend.formats.msgpack import WRITER, MsgpackFile
from paramend.formats.msgpack_writer import Extension
from paramend.formats.registry import FORMATS
from paramend.formats.source import Item
from paramend.leaves.outlines import Outline, Place
from paramend.leaves.specs import Spec, numpy_dtype
from support.writing import write

MSGPACK = next(row for row in FORMATS if row.name == "msgpack")


DTYPES = ["bool", "bfloat16", "float16", "float32", "float64", "complex64", "complex128"]
DTYPES += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
DTYPES += [f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu", "e3m4", "e4m3b11fnuz")]


def save(folder, data):
    path = folder / "model.msgpack"
    path.write_bytes(data)
    return path


def pack(tree):
    """What flax writes, without jax looking at the tree: it sorts keys and takes no mixed ones."""
    return msgpack.packb(tree, default=flax.serialization._msgpack_ext_pack, strict_types=True)


def array(dtype, shape, seed=0):
    """Random bits of a dtype."""
    kind = numpy_dtype(dtype)
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * kind.itemsize, np.uint8)
    return (raw & 1 if dtype == "bool" else raw).view(kind).reshape(shape)


def flat(tree, path=()):
    if isinstance(tree, np.ndarray | np.generic):
        return {"/".join(map(str, path)): tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {name: leaf for key, child in items for name, leaf in flat(child, (*path, key)).items()}


def check(path, expected=None):
    """Everything that flax restores is found here, bit for bit."""
    raw = path.read_bytes()
    expected = flat(msgpack_restore(raw)) if expected is None else expected
    with MsgpackFile(path) as file:
        assert [file.index.name(number) for number in file.index.numbers] == list(expected)
        for number, leaf in enumerate(expected.values()):
            dtype, bits = np.dtype(leaf.dtype).name, leaf.tobytes()
            assert file.spec(number) == Spec(leaf.shape, dtype)
            assert not file.refusal(number)
            assert file.nbytes(number) == len(bits)
            found = file.read(number)
            assert (found.dtype.name, found.shape, found.tobytes()) == (dtype, leaf.shape, bits)
            assert not found.flags.writeable
            assert found.flags.aligned
            width = leaf.dtype.itemsize
            for start, stop in [(0, leaf.size), (0, 1), (1, 4), (2, leaf.size)] if leaf.size > 3 else [(0, leaf.size)]:
                assert file.read_range(number, start, stop).tobytes() == bits[start * width : stop * width]
            extent = file.extent(number)
            if extent is not None:
                assert raw[extent.start : extent.start + extent.nbytes] == bits
        return [file.extent(number) is not None for number in file.index.numbers]


def test_a_train_state(tmp_path):
    model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.Dense(2)])
    variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    state = {
        "variables": variables,
        "opt": optax.adamw(1e-3).init(variables["params"]),
        "epoch": 3,
        "layers": (1, [2.5]),
    }
    path = save(tmp_path, to_bytes(state))
    assert all(check(path))
    with MsgpackFile(path) as file:
        assert file.index.separator == "/"
        names = {file.index.path(number) for number in file.index.numbers}
        assert {"variables/params/layers_0/kernel", "opt/0/mu/layers_2/bias", "opt/0/count"} <= names
        assert file.metadata["epoch"] == 3
        assert file.metadata["layers/1/0"] == 2.5
        assert file.ties == {}
        assert repr(file) == f"<{path}: {len(names)} leaves>"
        assert file.children({"a": 1}) == [("a", 1)]
        assert file.fileno() > 0
        assert file.stat.st_size == path.stat().st_size


def test_every_dtype(tmp_path):
    tree = {dtype: [array(dtype, shape) for shape in [(3, 4), (), (0, 2), (1,)]] for dtype in DTYPES}
    assert all(check(save(tmp_path, pack(tree)), flat(tree)))


def test_other_entries(tmp_path):
    tree = {
        "int": -5,
        "big": 2**63,
        "float": 0.1,
        "complex": 1 - 2j,
        "text": "ü" * 300,
        "bytes": b"\xff" * 70_000,
        "none": None,
        "yes": True,
        "list": [1, "a", None],
        "deep": [[1], {"w": np.ones(2, "int8")}],
        "empty": {},
        "scalar": np.float32(3),
        7: np.ones(1),
        "a.b/c": {"d": np.ones(1)},
        "ext": msgpack.ExtType(9, b"abc"),
    }
    tree |= {str(n): n for n in (31, 32, 127, 128, 255, 256, 65535, 65536, 2**32, -32, -33, -128, -129, -(2**15) - 1)}
    tree["min"] = -(2**63)
    path = save(tmp_path, pack(tree))
    with MsgpackFile(path) as file:
        assert [file.index.path(n) for n in file.index.numbers] == ["deep/1/w", "scalar", "7", "a.b/c/d"]
        assert file.spec(1) == Spec((), "float32")
        assert file.read(1) == 3
        found = dict(file.metadata)
        assert found.pop("ext") == Extension(9, b"abc")
        assert found.pop("deep/0") == [1]
        leaves = ("deep", "scalar", 7, "a.b/c", "ext")
        assert found == {key: value for key, value in tree.items() if key not in leaves}


def test_an_array_alone(tmp_path):
    with MsgpackFile(save(tmp_path, msgpack_serialize(np.arange(3)))) as file:
        assert file.read(0).tolist() == [0, 1, 2]
    with MsgpackFile(save(tmp_path, msgpack_serialize({}))) as file:
        assert repr(file).endswith(": 0 leaves>")
        assert file.metadata == {}
    with MsgpackFile(save(tmp_path, msgpack_serialize("x"))) as file:
        assert file.metadata == {"": "x"}


def test_arrays_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 40)
    tree = {"a": np.arange(35.0).reshape(5, 7), "b": {"c": np.arange(11, dtype="int32"), "small": np.ones(3, "int8")}}
    tree["b"]["bf"] = jnp.arange(50, dtype="bfloat16")
    path = save(tmp_path, to_bytes(tree))
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    assert check(path) == [False, False, False, True] or check(path).count(False) == 3
    whole = np.arange(35.0)
    with MsgpackFile(path) as file:
        for start in range(35):
            for stop in range(start, 36):
                assert file.read_range(0, start, stop).tolist() == whole[start:stop].tolist()
    path = save(tmp_path, msgpack_serialize(np.arange(35.0)))
    with MsgpackFile(path) as file:
        assert file.read(0).tolist() == whole.tolist()


def test_dtypes_of_less_than_a_byte_and_of_numpy_alone(tmp_path):
    tree = {"int4": np.arange(-3, 3).astype(ml_dtypes.int4), "f4": np.ones(3, ml_dtypes.float4_e2m1fn)}
    tree |= {"text": np.array(["abc"]), "time": np.zeros(2, "M8[ns]")}
    path = save(tmp_path, pack(tree))
    with MsgpackFile(path) as file:
        assert file.spec(0) == Spec((6,), "int4")
        assert file.nbytes(0) == 6
        assert file.read(0).tolist() == [-3, -2, -1, 0, 1, 2]
        assert file.read_range(0, 1, 3).tolist() == [-2, -1]
        assert file.extent(0) is file.extent(1) is None
        assert file.spec(2) == Spec((1,), "raw<str96>")
        assert file.extent(2).nbytes == 12
        assert file.refusal(0) == ""
        for number, reason in enumerate(["4 bits", "only numpy", "only numpy"], start=1):
            assert reason in file.refusal(number)
            for read in (lambda n=number: file.read(n), lambda n=number: file.read_range(n, 0, 1)):
                with pytest.raises(Unsupported, match="cannot be read"):
                    read()


def test_shapes_that_numpy_lacks(tmp_path):
    with MsgpackFile(save(tmp_path, ext(1, [[1] * 70, "int8", b"\1"]))) as file:
        with pytest.raises(Unsupported, match="no array of shape"):
            file.read(0)
        assert file.read_range(0, 0, 1).tolist() == [1]


def test_opening_imports_no_framework(tmp_path):
    path = save(tmp_path, msgpack_serialize({"w": np.ones(2)}))
    code = "import sys; from paramend.formats.msgpack import MsgpackFile; MsgpackFile(sys.argv[1]).read(0)\n"
    code += "assert not {'jax', 'flax', 'msgpack', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, path], check=True)


def test_large_arrays_are_stepped_over(tmp_path):
    """A sparse file of 3 GB opens at once."""
    size = 3 << 30
    head = b"\x93\x91" + b"\xce" + size.to_bytes(4, "big") + b"\xa5uint8\xc6" + size.to_bytes(4, "big")
    path = save(tmp_path, b"\x82\xa1w\xc9" + (len(head) + size).to_bytes(4, "big") + b"\1" + head)
    with path.open("r+b") as raw:
        raw.seek(0, 2)
        raw.seek(size, 1)
        raw.write(b"\xa1n\5")
    with MsgpackFile(path) as file:
        assert file.spec(0) == Spec((size,), "uint8")
        assert file.metadata == {"n": 5}
        assert file.read_range(0, size - 2, size).tolist() == [0, 0]
        assert file.read(0).shape == (size,)


# ---- writing -----------------------------------------------------------------------------------------------------


def items_of(tree):
    def item(name, leaf):
        return Item(name, tuple(name.split("/")), Spec(leaf.shape, leaf.dtype.name), leaf.nbytes), leaf.tobytes()

    return [item(name, leaf) for name, leaf in flat(tree).items()]


def test_writing_what_flax_reads(tmp_path):
    arrays = {d: {"a": array(d, (3, 4)), "b": array(d, ()), "c": array(d, (0, 2))} for d in DTYPES}
    arrays |= {f"layer_{i}": {"kernel": np.full((2, 200), i, "float32")} for i in range(40)}
    path = write(tmp_path / "out.msgpack", MSGPACK, items_of(arrays))
    check(path, flat(arrays))
    readable = {key: value for key, value in arrays.items() if not key.startswith("float8")}
    restored = msgpack_restore(write(tmp_path / "out.msgpack", MSGPACK, items_of(readable)).read_bytes())
    assert list(restored) == list(readable)
    for name, leaf in flat(readable).items():
        found = flat(restored)[name]
        assert (np.dtype(found.dtype), found.shape, found.tobytes()) == (leaf.dtype, leaf.shape, leaf.tobytes())


def test_writing_arrays_in_pieces(tmp_path, monkeypatch):
    tree = {"a": np.arange(35.0).reshape(5, 7), "b": {"c": np.arange(11, dtype="int16"), "small": np.ones(3, "int8")}}
    for limit in (20, 40, 48):
        monkeypatch.setattr("paramend.formats.msgpack_writer.MAX_CHUNK", limit)
        monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", limit)
        path = write(tmp_path / "out.msgpack", MSGPACK, items_of(tree))
        check(path)
        assert {k: v.tolist() for k, v in flat(msgpack_restore(path.read_bytes())).items()} == {
            k: v.tolist() for k, v in flat(tree).items()
        }
        assert path.read_bytes().count(b"__msgpack_chunked_array__") == to_bytes(tree).count(b"__msgpack_chunked")


def test_other_entries_stay(tmp_path):
    others = {
        "int": [-5, -33, -(2**63), 0, 127, 128, 2**64 - 1],
        "float": 0.1,
        "complex": 1 - 2j,
        "text": ["ü" * n for n in (1, 15, 16, 200, 70_000)],
        "bytes": b"\xff" * 300,
        "none": None,
        "bools": [True, False],
        "long": list(range(70_000)),
        "empty": {},
        "a.b/c": {"d": 5, "w": np.ones(2)},
        "ext": msgpack.ExtType(9, b"abc"),
    }
    path = save(tmp_path, pack(others))
    with MsgpackFile(path) as file:
        items = items_of({})
        items.append((Item("a.b/c/w", ("a.b/c", "w"), Spec((2,), "float64"), 16), np.ones(2).tobytes()))
        entries = [*file.outline().entries, (("a.b/c", "w"), Place(0))]
        outline = Outline(entries[-1:] + [pair for pair in entries if type(pair[1]) is not Place], {}, "msgpack")
        out = write(tmp_path / "out.msgpack", MSGPACK, items, {"format": "pt"}, outline)
    restored = msgpack_restore(out.read_bytes())
    assert restored.pop("a.b/c")["w"].tolist() == others["a.b/c"].pop("w").tolist()
    assert others.pop("a.b/c") == {"d": 5}
    assert restored == others


def test_an_empty_map_is_filled(tmp_path):
    path = save(tmp_path, pack({"empty": {}, "full": {"n": 1, "w": np.ones(2)}, "a": np.ones(1)}))
    with pm.open(path) as file:
        assert file.metadata["empty"] == {}
        pm.at(file, "a").rename("empty/w").save(tmp_path / "out.msgpack")
        with pytest.raises(RenameClash, match="a leaf would take the place of full/n, which is 1"):
            pm.at(file, "a").rename("full/n").save(tmp_path / "never.msgpack")
    restored = msgpack_restore((tmp_path / "out.msgpack").read_bytes())
    assert restored["empty"]["w"].tolist() == [1] and restored["full"]["w"].tolist() == [1, 1]
    assert restored["full"]["n"] == 1


def test_writing_one_value(tmp_path):
    item = Item("", ("",), Spec((2,), "int8"), 2), b"ab"
    assert msgpack_restore(write(tmp_path / "out.msgpack", MSGPACK, [item]).read_bytes()).tolist() == [97, 98]
    assert msgpack_restore(write(tmp_path / "out.msgpack", MSGPACK, []).read_bytes()) == {}


def test_what_cannot_be_written():
    assert WRITER.refusal(Spec((1,), "int4"))
    assert WRITER.refusal(Spec((1,), "raw<str96>"))
    assert not WRITER.refusal(Spec((1,), "bfloat16"))
    for trees in ([{"a": np.ones(1)}, {"a": np.ones(1)}], [{"a": np.ones(1)}, {"a": {"b": np.ones(1)}}]):
        for order in (trees, trees[::-1]):
            with pytest.raises(RenameClash):
                list(WRITER.parts([item for tree in order for item, _ in items_of(tree)], {}))


# ---- hostile files -----------------------------------------------------------------------------------------------


def ext(code, parts):
    return msgpack.packb(msgpack.ExtType(code, msgpack.packb(parts)))


def pieces(**changes):
    flat = msgpack.ExtType(1, msgpack.packb([[2], "int8", b"\1\2"]))
    table = {"__msgpack_chunked_array__": True, "shape": {"0": 4}, "chunks": {"0": flat, "1": flat}} | changes
    return msgpack.packb({"w": table})


FLOAT = msgpack.ExtType(1, msgpack.packb([[1], "float32", bytes(4)]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\xc1", "no msgpack value"),
        (b"\x81\xa1w", "does not fit|cut short"),
        (b"\x81\xa5w\0", "cut short"),
        (b"\xdf\xff\xff\xff\xff" + bytes(50), "does not fit"),
        (b"\xdd\xff\xff\xff\xff" + bytes(50), "does not fit"),
        (b"\xc6\xff\xff\xff\xff" + bytes(50), "cut short"),
        (b"\xc9\xff\xff\xff\xff\1" + bytes(50), "cut short"),
        (b"\xd9\x05ab", "cut short"),
        (b"\xcb\0\0", "cut short"),
        (b"\x80\0", "after its end"),
        (b"\x82\xa1w\1\xa1w\2", "appears twice"),
        (b"\x81\xc0\1", "a key"),
        (b"\x81\xcb" + bytes(8) + b"\1", "a key"),
        (b"\xa2\xff\xfe", "UTF-8"),
        (b"\x91" * 201 + b"\1", "nested"),
        (b"\x81\xa1a" * 201 + b"\1", "nested"),
        (b"\x91" * 5000 + b"\1", "nested"),
        (ext(1, [[2], "int8"]), "of shape, dtype and bytes"),
        (ext(1, 5), "of shape, dtype and bytes"),
        (ext(1, [2, "int8", b"ab"]), "a shape is expected"),
        (ext(1, [[-2], "int8", b"ab"]), "whole numbers"),
        (ext(1, [[2.0], "int8", b"ab"]), "whole numbers"),
        (ext(1, [[True], "int8", b"a"]), "whole numbers"),
        (ext(1, [["2"], "int8", b"ab"]), "whole numbers"),
        (ext(1, [[2], 8, b"ab"]), "name of a dtype"),
        (ext(1, [[2], "i" * 200, b"ab"]), "name of a dtype"),
        (ext(1, [[2], b"\xff", b"ab"]), "ASCII"),
        (ext(1, [[2], "int8", 5]), "the bytes of an array"),
        (ext(1, [[3], "int8", b"ab"]), "takes 3 bytes, but 2"),
        (ext(1, [[3], "int4", b"ab"]), "takes 3 bytes, but 2"),
        (ext(1, [[2**63, 4], "int8", b"ab"]), "overflows"),
        (ext(1, [[2**63, 4, 0], "int8", b""]), "overflows"),
        (msgpack.packb(msgpack.ExtType(1, msgpack.packb([[1], "int8", b"a"]) + b"x")), "too many"),
        (msgpack.packb(msgpack.ExtType(1, msgpack.packb([[1], "int8", b"a"])[:-1])) + b"aa", "runs past"),
        (ext(3, [[1], "int8", b"a"]), "a scalar cannot have the shape"),
        (ext(2, [1.0]), "complex"),
        (ext(2, [1.0, "a"]), "complex"),
        (msgpack.packb({"a." * 200 + "b": FLOAT}), "pieces"),
        (pieces(shape={"0": 5}), "have 4 elements"),
        (pieces(shape={"1": 4}), "whole numbers"),
        (pieces(shape={"0": -4}), "whole numbers"),
        (pieces(shape=[4]), "nothing else"),
        (pieces(more=1), "nothing else"),
        (pieces(chunks={}), "flat pieces"),
        (pieces(chunks={"0": 1, "1": 2}), "flat pieces"),
        (pieces(chunks={"0": FLOAT, "2": FLOAT}), "flat pieces"),
        (pieces(chunks={"0": FLOAT, "1": msgpack.ExtType(1, msgpack.packb([[1], "int8", b"a"]))}), "of one dtype"),
    ],
)
def test_damaged_files(tmp_path, data, reason):
    with pytest.raises(BadCheckpoint, match=reason) as caught:
        MsgpackFile(save(tmp_path, data))
    assert "model.msgpack" in str(caught.value)


def test_many_values(tmp_path, monkeypatch):
    monkeypatch.setattr("paramend.formats.msgpack._MAX_VALUES", 1000)
    with pytest.raises(BadCheckpoint, match="more than"):
        MsgpackFile(save(tmp_path, msgpack.packb([0] * 1000)))
    with pytest.raises(CannotRead):
        MsgpackFile(tmp_path / "none")


def test_damage_is_found_or_harmless(tmp_path):
    """Bytes changed, cut out and put in at random: `BadCheckpoint`, or a file that reads."""
    tree = {"params": {"k": array("float32", (2, 3)), "b": np.float64(1)}, "step": 5, "l": [None, {"w": np.ones(1)}]}
    table = {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {"0": np.ones(1), "1": np.ones(1)}}
    path = save(tmp_path, msgpack_serialize(tree | {"big": table, "z": 1j}))
    good = path.read_bytes()
    rng = random.Random(0)
    for _ in range(2000):
        raw = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(len(raw))
            match rng.randrange(3):
                case 0:
                    raw[at] = rng.randrange(256)
                case 1:
                    raw[at : at + rng.randrange(1, 9)] = b""
                case 2:
                    raw[at:at] = rng.randbytes(rng.randrange(1, 5))
        path.write_bytes(raw)
        try:
            with MsgpackFile(path) as file:
                for number in file.index.numbers:
                    file.index.path(number)
                    if not file.refusal(number):
                        file.read(number)
                        file.read_range(number, 0, file.spec(number).size)
                        file.extent(number)
        except BadCheckpoint as error:
            assert "model.msgpack" in str(error)
        except Unsupported:
            pass
