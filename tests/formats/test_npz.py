"""The reader and the writer of `numpy.savez` files: bit for bit, in bounded memory, and hostile bytes."""

import io
import random
import subprocess
import sys
import tracemalloc
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest

from paramend.errors import BadArgument, BadCheckpoint, CannotRead, ParamendError, RenameClash, Unsupported
from paramend.formats.npz import WRITER, NpzFile
from paramend.formats.registry import FORMATS
from paramend.formats.source import Item
from paramend.leaves.origins.origin import Extent
from paramend.leaves.specs import Spec, numpy_dtype
from support.writing import write

NPZ = next(row for row in FORMATS if row.name == "npz")


DTYPES = ["bool", "float16", "float32", "float64", "complex64", "complex128"]
DTYPES += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
SAVERS = [np.savez, np.savez_compressed]


def save(folder, saver=np.savez, **arrays):
    path = folder / "model.npz"
    saver(path, **arrays)
    return path


def array(dtype, shape, seed=0):
    """Random bits of a dtype."""
    kind = numpy_dtype(dtype)
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * kind.itemsize, np.uint8)
    return (raw & 1 if dtype == "bool" else raw).view(kind).reshape(shape)


def check(path):
    """Everything that numpy.load finds is found here, bit for bit."""
    loaded = np.load(path)
    raw = path.read_bytes()
    with NpzFile(path) as file:
        names = [name for name in loaded.files if isinstance(loaded[name], np.ndarray)]
        assert [file.index.name(number) for number in file.index.numbers] == names
        for number, name in enumerate(names):
            expected = loaded[name]
            expected = expected.astype(expected.dtype.newbyteorder("<"))
            bits = expected.tobytes()
            assert file.spec(number) == Spec(expected.shape, expected.dtype.name)
            assert file.nbytes(number) == len(bits)
            assert not file.refusal(number)
            found = file.read(number)
            assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, bits)
            assert not found.flags.writeable
            assert found.flags.aligned
            assert file.read_range(number, 0, expected.size).tobytes() == bits
            width = expected.dtype.itemsize
            for start, stop in [(0, 2), (2, 5), (3, 4), (1, 6)] if expected.size > 5 else []:
                assert file.read_range(number, start, stop).tobytes() == bits[start * width : stop * width]
            extent = file.extent(number)
            if extent is not None:
                assert raw[extent.start : extent.start + extent.nbytes] == bits
        return [file.extent(number) is not None for number in file.index.numbers]


@pytest.mark.parametrize("saver", SAVERS)
def test_every_dtype(tmp_path, saver):
    arrays = {f"{dtype}/{n}": array(dtype, shape) for dtype in DTYPES for n, shape in enumerate([(3, 4), (), (0, 2)])}
    straight = check(save(tmp_path, saver, **arrays))
    assert straight == [saver is np.savez] * len(arrays)


@pytest.mark.parametrize("saver", SAVERS)
def test_orders(tmp_path, saver):
    grid = np.arange(24.0).reshape(2, 3, 4)
    path = save(
        tmp_path,
        saver,
        c=grid,
        fortran=np.asfortranarray(grid),
        transposed=grid.T,
        row=np.asfortranarray(grid[:1, :, :1]),
        big=grid.astype(">f8"),
        big_fortran=np.asfortranarray(grid.astype(">i2")),
        big_byte=np.arange(3, dtype=">i1"),
    )
    straight = check(path)
    if saver is np.savez:
        assert straight == [True, False, False, True, False, False, True]


def test_names(tmp_path):
    path = save(tmp_path, **{"params/Dense_0/kernel": np.ones(1), "params/Dense_0/bias": np.ones(2)})
    with NpzFile(path) as file:
        assert (file.index.separator, file.index.path(1)) == ("/", "params/Dense_0/bias")
        assert file.metadata == file.ties == {}
        assert file.children({"a": 1}) == [("a", 1)]
        assert repr(file) == f"<{path}: 2 leaves>"
        assert file.fileno() > 0
        assert file.stat.st_size == path.stat().st_size
    with NpzFile(save(tmp_path, **{"fc.weight": np.ones(1), "ü a.npy": np.ones(2), "a/b": np.ones(3)})) as file:
        assert [file.index.name(n) for n in range(3)] == ["fc.weight", "ü a.npy", "a/b"]
    with NpzFile(save(tmp_path)) as file:
        assert repr(file).endswith(": 0 leaves>")
    np.savez(path, np.ones(3))
    with NpzFile(path) as file:
        assert file.index.path(0) == "arr_0"


def test_what_else_lies_in_the_archive_is_metadata(tmp_path):
    path = save(tmp_path, w=np.ones(2))
    with zipfile.ZipFile(path, "a") as made:
        made.writestr("README", "hello")
        made.writestr("packed.json", "{}" * 100, compress_type=zipfile.ZIP_DEFLATED)
    with NpzFile(path) as file:
        assert file.metadata == {"README": b"hello", "packed.json": b"{}" * 100}
        assert len(file.index.numbers) == 1
    with zipfile.ZipFile(path, "a") as made:
        made.writestr("big", bytes(2 << 20))
    with pytest.raises(BadCheckpoint, match="not an array"):
        NpzFile(path)


def test_old_versions_of_the_header(tmp_path):
    path = tmp_path / "old.npz"
    with zipfile.ZipFile(path, "w") as made:
        for version in ((1, 0), (2, 0), (3, 0)):
            data = io.BytesIO()
            np.lib.format.write_array(data, np.arange(3), version=version)
            made.writestr(f"v{version[0]}.npy", data.getvalue())
        made.writestr("python2.npy", npy("{'descr': '<i8', 'fortran_order': False, 'shape': (3L,)}", bytes(24)))
        made.writestr("spaces.npy", npy(" {\n'shape':(3 , 1),\"descr\":'<i8' ,'fortran_order':True,}", bytes(24)))
    with NpzFile(path) as file:
        assert [file.read(n).tolist() for n in range(3)] == [[0, 1, 2]] * 3
        assert file.spec(3) == Spec((3,), "int64")
        assert file.spec(4) == Spec((3, 1), "int64")


def test_what_numpy_alone_has_is_listed_and_not_read(tmp_path):
    arrays = {
        "objects": np.array([{"a": 1}], object),
        "text": np.array(["abc"]),
        "bytes": np.array([b"abc"]),
        "struct": np.zeros(2, [("a", "<f4"), ("it's", "<i2", (2,))]),
        "time": np.zeros(2, "M8[ns]"),
        "long": np.zeros(2, np.longdouble),
        "bfloat16": np.arange(3, dtype=ml_dtypes.bfloat16),
        "fp8": np.arange(3, dtype=ml_dtypes.float8_e4m3fn),
        "e5m2": np.arange(3, dtype=ml_dtypes.float8_e5m2),
    }
    path = save(tmp_path, **arrays)
    with NpzFile(path) as file:
        dtypes = [file.spec(n).dtype for n in file.index.numbers]
        assert dtypes[:8] == [f"raw<{c}>" for c in ("O", "U3", "S3", "struct", "M8[ns]", "f16", "V2", "V1")]
        reasons = ["pickle", "only numpy", "only numpy", "structured", "only numpy", "only numpy", "bfloat16"]
        for number, reason in enumerate([*reasons, "only be copied"]):
            assert reason in file.refusal(number)
            for read in (lambda n=number: file.read(n), lambda n=number: file.read_range(n, 0, 1)):
                with pytest.raises(Unsupported, match="cannot be read"):
                    read()
        extent = file.extent(6)
        assert path.read_bytes()[extent.start :][: extent.nbytes] == arrays["bfloat16"].tobytes()
        assert file.nbytes(6) == 6
        assert file.spec(8) == Spec((3,), "float8_e5m2")
        assert file.read(8).tobytes() == arrays["e5m2"].tobytes()


def test_reading_is_bounded(tmp_path):
    big = np.zeros(1 << 24, "float32")
    path = save(tmp_path, np.savez_compressed, big=big, small=np.ones(1))
    tracemalloc.start()
    with NpzFile(path) as file:
        for start in range(0, big.size, 1 << 18):
            assert not file.read_range(0, start, start + (1 << 18)).any()
        assert file.read_range(0, 5, 7).tolist() == [0, 0]
        assert file.read_range(1, 0, 1) == 1
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_patch_keeps_checksums_true(tmp_path):
    path = save(tmp_path, a=np.arange(4.0), b=np.arange(3, dtype="int8"))
    with NpzFile(path) as file, path.open("r+b") as raw:
        extent = file.extent(0)
        changed = Extent(path, extent.start + 8, 16)
        places = file.patched_too([changed])
        raw.seek(changed.start)
        raw.write(np.array([7.0, 8.0]).tobytes())
        raw.flush()
        written = file.after_patch([changed])
        assert [(path, place.start) for place in places] == [(name, at) for name, at, _ in written]
        for _, at, data in written:
            raw.seek(at)
            raw.write(data)
        with pytest.raises(BadArgument):
            file.patched_too([Extent(path, 0, 4)])
    assert zipfile.ZipFile(path).testzip() is None
    assert np.load(path)["a"].tolist() == [0, 7, 8, 3]


def test_opening_imports_no_framework(tmp_path):
    path = save(tmp_path, w=np.ones(2))
    code = "import sys; from paramend.formats.npz import NpzFile; NpzFile(sys.argv[1]).read(0)\n"
    code += "assert not {'jax', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, path], check=True)


# ---- writing -----------------------------------------------------------------------------------------------------


def item(name, data):
    data = np.asarray(data)
    return Item(name, tuple(name.split("/")), Spec(data.shape, data.dtype.name), data.nbytes), data.tobytes()


def test_writing_every_dtype(tmp_path):
    arrays = {f"{d}/{n}": array(d, shape) for d in DTYPES for n, shape in enumerate([(3, 4), (), (0, 2), (7,)])}
    items = [item(name, data) for name, data in arrays.items()]
    path = tmp_path / "out.npz"
    metadata = {"note": "left out", "README": b"kept"}
    write(path, NPZ, items, metadata)
    assert zipfile.ZipFile(path).testzip() is None
    assert all(check(path))
    loaded = np.load(path)
    assert loaded.files == [*arrays, "README"]
    for name, data in arrays.items():
        assert (loaded[name].dtype, loaded[name].shape, loaded[name].tobytes()) == (
            data.dtype,
            data.shape,
            data.tobytes(),
        )
    with NpzFile(path) as file:
        assert not any(file.extent(number).start % 64 for number in file.index.numbers)
        assert file.metadata == {"README": b"kept"}
    assert write(tmp_path / "again.npz", NPZ, items, metadata).read_bytes() == path.read_bytes()


def test_what_cannot_be_written():
    assert "bfloat16" in WRITER.refusal(Spec((1,), "bfloat16"))
    assert WRITER.refusal(Spec((1,), "float8_e5m2"))
    assert not WRITER.refusal(Spec((1,), "float16"))
    for names in (["w", "w"], ["a/../b"], ["/a"], ["a//b"], [""], ["a\\b"], ["a:0"], ["x" * 70_000]):
        with pytest.raises(RenameClash):
            list(WRITER.parts([item(name, np.ones(1))[0] for name in names], {}))


# ---- hostile files -----------------------------------------------------------------------------------------------


def npy(header, data=b"", version=1, length=None):
    encoded = header if isinstance(header, bytes) else header.encode("latin1")
    size = (len(encoded) if length is None else length).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + encoded + data


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"", "cut short"),
        (b"\x93NUMPX\1\0" + bytes(10), "does not begin"),
        (npy(GOOD, bytes(8), version=4), "does not begin"),
        (npy(GOOD, bytes(8), length=500), "cut short"),
        (npy(GOOD, bytes(8), version=2, length=1 << 31), "too long"),
        (npy(GOOD, bytes(7)), "takes 8 bytes, but 7"),
        (npy(GOOD, bytes(9)), "takes 8 bytes, but 9"),
        (npy(GOOD + "+ 1", bytes(8)), "header"),
        (npy("{'descr': '<f4', 'shape': (2,)}", bytes(8)), "header"),
        (npy("{'descr': '<f4', 'fortran_order': 0, 'shape': (2,)}", bytes(8)), "fortran_order"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2)}", bytes(8)), "shape"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': [2]}", bytes(8)), "shape"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}", bytes(8)), "shape"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}", bytes(8)), "shape"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2**2,)}", bytes(8)), "header"),
        (npy("{'descr': 5, 'fortran_order': False, 'shape': (2,)}", bytes(8)), "descr"),
        (npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**64 - 1}, {2**64 - 1})}}"), "overflow"),
        (npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {2**64})}}"), "overflow"),
        (npy("{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", bytes(8)), "each once"),
        (npy("[" * 60_000), "header"),
        (npy("__import__('os').system('true')"), "header"),
        (npy(b"\xff\xfe", version=3), "header"),
        (npy("{**{}, 'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", bytes(8)), "header"),
        (npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'9' * 5000},)}}"), "header"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), ('a',): 1}", bytes(8)), "header"),
        (npy("{'descr' '<f4'}"), "header"),
        (npy("{'descr': '<f4' 5}"), "header"),
        (npy("{'descr': ]}"), "header"),
    ],
)
def test_damaged_arrays(tmp_path, record, reason):
    path = tmp_path / "bad.npz"
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", method) as made:
            made.writestr("w.npy", record)
        with pytest.raises(BadCheckpoint, match=r"w\.npy") as caught:
            NpzFile(path)
        assert reason in str(caught.value)


def test_other_files(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(CannotRead):
        NpzFile(path)
    for content, reason in [(b"", "empty"), (b"hello", "not a zip"), (b"PK\3\4", "cut short")]:
        path.write_bytes(content)
        with pytest.raises(BadCheckpoint, match=reason):
            NpzFile(path)
    np.save(path.with_suffix(".npy"), np.ones(2))
    with pytest.raises(BadCheckpoint, match=r"one array of numpy\.save"):
        NpzFile(path.with_suffix(".npy"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as made:
        made.writestr("w.npy", npy(GOOD, bytes(8)))
    with pytest.raises(BadCheckpoint, match="method 14"):
        NpzFile(path)
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("a." * 300 + ".npy", npy(GOOD, bytes(8)))
    with pytest.raises(BadCheckpoint, match="pieces"):
        NpzFile(path)


def deflated(path, data, claimed, crc=None):
    """A file with one compressed record that claims a length and a checksum."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("w.npy", data)
        info = made.infolist()[0]
        old = (info.CRC, info.compress_size, info.file_size)
    new = (zlib.crc32(data) if crc is None else crc, old[1], claimed)
    pack = b"".join(n.to_bytes(4, "little") for n in old), b"".join(n.to_bytes(4, "little") for n in new)
    raw = path.read_bytes()
    assert raw.count(pack[0]) == 2
    path.write_bytes(raw.replace(*pack))
    return path


def test_bombs(tmp_path):
    head = npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000,)}")
    path = tmp_path / "bomb.npz"
    # More bytes than were declared.
    with NpzFile(deflated(path, head + bytes(3_000_000), len(head) + 1_000_000)) as file:
        with pytest.raises(BadCheckpoint, match="more bytes"):
            file.read(0)
        with pytest.raises(BadCheckpoint, match="more bytes"):
            file.read_range(0, 0, 1_000_000)
        assert file.read_range(0, 0, 10).tolist() == [0] * 10
    # Fewer.
    with (
        NpzFile(deflated(path, head + random.Random(0).randbytes(10_000), len(head) + 1_000_000)) as file,
        pytest.raises(BadCheckpoint, match="fewer"),
    ):
        file.read(0)
    # A length that no compressed bytes can have.
    with pytest.raises(BadCheckpoint, match="deflate"):
        NpzFile(deflated(path, head + bytes(1_000_000), 1 << 31))
    # Another checksum.
    with (
        NpzFile(deflated(path, head + bytes(1_000_000), len(head) + 1_000_000, crc=5)) as file,
        pytest.raises(BadCheckpoint, match="checksum"),
    ):
        file.read(0)


def test_shapes_that_numpy_lacks(tmp_path):
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as made:
        shape = (1,) * 70
        made.writestr("w.npy", npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}", bytes(4)))
    with NpzFile(path) as file:
        with pytest.raises(Unsupported, match="no array of shape"):
            file.read(0)
        assert file.read_range(0, 0, 1).tolist() == [0]


@pytest.mark.parametrize("saver", SAVERS)
def test_damage_is_found_or_harmless(tmp_path, saver):
    """Bytes changed, cut out and put in at random: `BadCheckpoint`, or a file that reads."""
    path = save(
        tmp_path, saver, a=array("float32", (5, 3)), b=np.asfortranarray(np.ones((3, 2), "int8")), c=np.ones(())
    )
    good = path.read_bytes()
    rng = random.Random(0)
    for _ in range(1000):
        raw = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(len(raw))
            match rng.randrange(4):
                case 0:
                    raw[at] = rng.randrange(256)
                case 1:
                    raw[at : at + rng.randrange(1, 9)] = b""
                case 2:
                    raw[at:at] = rng.randbytes(rng.randrange(1, 5))
                case 3:
                    raw[at : at + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\0\0\0\x80"])
        path.write_bytes(raw)
        try:
            with NpzFile(path) as file:
                for number in file.index.numbers:
                    if not file.refusal(number):
                        file.read(number)
                        file.read_range(number, 0, file.spec(number).size)
                        file.extent(number)
        except (BadCheckpoint, Unsupported) as error:
            assert isinstance(error, ParamendError)
            assert "model.npz" in str(error) or isinstance(error, Unsupported)


def test_a_colon_is_part_of_a_name(tmp_path):
    path = tmp_path / "tf.npz"
    np.savez(path, **{"dense/kernel:0": np.ones(2, np.float32)})
    with NpzFile(path) as file:
        assert file.read(0).tolist() == [1.0, 1.0]
