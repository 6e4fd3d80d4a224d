"""The reader of `torch.save` files: files of torch bit for bit, checksums after patches, and hostile bytes."""

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import paramend as pm
from paramend.errors import BadArgument, BadCheckpoint, CannotRead, ParamendError, RenameClash, Unsupported
from paramend.formats import zips as headers
from paramend.formats.files import OpenFile
from paramend.formats.registry import FORMATS
from paramend.formats.source import Item
from paramend.formats.torch.source import WRITER, TorchFile
from paramend.formats.zips import Archive
from paramend.leaves.origins.origin import Extent
from paramend.leaves.outlines import Place
from paramend.leaves.specs import Spec, numpy_dtype
from support.writing import write

TORCH = next(row for row in FORMATS if row.name == "torch")


# ---- files of torch ----------------------------------------------------------------------------------------------


def nested(file, leaf):
    """What a file holds, with something in the place of each leaf."""
    return file.outline().nested(lambda entry: leaf(entry.number) if isinstance(entry, Place) else entry)


def save(folder, tree, **options):
    path = folder / "model.pt"
    torch.save(tree, path, **options)
    return path


def bits(tensor):
    """The bytes of a torch tensor in C order."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def flat(tree, path=()):
    """Path → tensor, as the index should have it."""
    if isinstance(tree, torch.Tensor):
        return {".".join(map(str, path)): tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return {name: leaf for key, child in items for name, leaf in flat(child, (*path, key)).items()}


def check(path, tree=None):
    """Everything that torch.load finds is found here, bit for bit."""
    tree = torch.load(path, weights_only=True) if tree is None else tree
    expected = flat(tree)
    with TorchFile(path) as file:
        found = {file.index.path(number): number for number in file.index.numbers}
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            number = found[name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            assert file.spec(number) == Spec(tuple(tensor.shape), dtype)
            assert not file.refusal(number)
            array = file.read(number)
            assert array.dtype == numpy_dtype(dtype)
            assert array.shape == tensor.shape
            assert not array.flags.writeable
            assert array.flags.aligned
            assert array.tobytes() == bits(tensor)
            size = tensor.numel()
            assert file.nbytes(number) == size * tensor.element_size()
            assert file.read_range(number, 0, size).tobytes() == bits(tensor)
            if size > 4:
                width = tensor.element_size()
                assert file.read_range(number, 2, 4).tobytes() == bits(tensor)[2 * width : 4 * width]
            extent = file.extent(number)
            if extent is not None:
                assert extent.path == path
                assert path.read_bytes()[extent.start : extent.start + extent.nbytes] == bits(tensor)
            else:
                assert not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg()
        return found


def test_a_checkpoint_with_a_module_and_its_optimizer(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    adam = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    adam.step()
    tree = {"model": model.state_dict(), "optimizer": adam.state_dict(), "epoch": 3, "note": "ü", "best": None}
    path = save(tmp_path, tree)
    found = check(path)
    assert "model.0.weight" in found
    assert "optimizer.state.0.exp_avg" in found
    with TorchFile(path) as file:
        assert file.index.separator == "."
        assert file.ties == {}
        assert file.metadata["epoch"] == 3
        assert file.metadata["note"] == "ü"
        assert file.metadata["best"] is None
        assert file.metadata["optimizer.param_groups.0.lr"] == 0.001
        assert file.metadata["optimizer.param_groups.0.betas"] == (0.9, 0.999)
        structure = nested(file, file.spec)
        assert structure["optimizer"]["state"][0]["exp_avg"] == Spec((4, 3), "float32")
        assert type(structure["model"]) is OrderedDict
        assert structure["model"]._metadata[""] == {"version": 1}
        arrays = nested(file, file.read)
        assert arrays["model"]["2.bias"].shape == (2,)
        assert arrays["optimizer"]["param_groups"][0]["params"] == list(range(6))
        assert repr(file) == f"<{path}: {len(found)} leaves>"


DTYPES = ["bool", "uint8", "int8", "float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
DTYPES += [f"{sign}int{bits}" for sign in ("", "u") for bits in (16, 32, 64)]
DTYPES += [f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")]


def tensor(dtype, shape, seed=0):
    """Random bits of a dtype."""
    kind = getattr(torch, dtype)
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * kind.itemsize, np.uint8)
    raw = raw & 1 if dtype == "bool" else raw
    return torch.from_numpy(raw).view(kind).reshape(shape) if raw.size else torch.empty(shape, dtype=kind)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype(tmp_path, protocol):
    tree = {f"{dtype}.{n}": tensor(dtype, shape) for dtype in DTYPES for n, shape in enumerate([(3, 4), (), (0, 2)])}
    path = save(tmp_path, tree, pickle_protocol=protocol)
    assert len(check(path, tree)) == 3 * len(DTYPES)


def test_views_strides_and_ties(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    word = torch.nn.Parameter(torch.randn(5, 3))
    tree = {
        "base": base,
        "again": base,
        "same": base[:],
        "row": base[1],
        "column": base[:, 2],
        "other column": base[:, 3],
        "transposed": base.T,
        "spread": torch.ones(1).expand(3, 5),
        "empty slice": base[4:],
        "last": base[-1, -1],
        "embed": word,
        "head": word,
        "conj": torch.randn(2, dtype=torch.complex64).conj(),
        "imag": torch.randn(2, dtype=torch.complex64).conj().imag,
    }
    path = save(tmp_path, tree)
    found = check(path)
    with TorchFile(path) as file:
        ties = {file.index.path(a): file.index.path(b) for a, b in file.ties.items()}
        assert ties == {"again": "base", "same": "base", "base": "base", "head": "embed", "embed": "embed"}

        def overlaps(name):
            return {file.index.path(number) for number in file.overlaps(found[name])}

        whole = {"base", "again", "same", "transposed"}
        assert overlaps("column") == {*whole, "row"}
        assert overlaps("other column") == {*whole, "row"}
        assert overlaps("last") == whole
        assert overlaps("base") == {"row", "column", "other column", "transposed", "last"}
        assert overlaps("embed") == overlaps("spread") == overlaps("empty slice") == set()
        assert file.extent(found["row"]).nbytes == 24
        assert file.extent(found["column"]) is file.extent(found["spread"]) is file.extent(found["conj"]) is None
        assert file.read(found["spread"]).strides == (0, 0)
        assert file.read_range(found["transposed"], 3, 6).tolist() == [18, 1, 7]


def test_containers_and_plain_values(tmp_path):
    tree = {
        "list": [torch.ones(1), (torch.zeros(2), {"deep": torch.ones(3)}), 5],
        7: torch.ones(4),
        True: "yes",
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "set": {1, 2},
        "complex": 1j,
        "bytes": b"a\xff",
        "nothing": {},
        "big": 10**30,
        "negative": -(10**12),
        "storage": torch.ones(2).untyped_storage(),
    }
    path = save(tmp_path, tree)
    with TorchFile(path) as file:
        assert [file.index.path(n) for n in file.index.numbers] == ["list.0", "list.1.0", "list.1.1.deep", "7"]
        assert file.metadata["list.2"] == 5
        assert file.metadata["True"] == "yes"
        assert file.metadata["size"] == (2, 3)
        assert repr(file.metadata["dtype"]) == "torch.bfloat16"
        assert repr(file.metadata["device"]) == "torch.device('cuda', 1)"
        assert file.metadata["set"] == {1, 2}
        assert file.metadata["complex"] == 1j
        assert file.metadata["bytes"] == b"a\xff"
        assert file.metadata["nothing"] == {}
        assert file.metadata["big"] == 10**30
        assert file.metadata["negative"] == -(10**12)
        assert nested(file, file.spec)["list"][1] == (Spec((2,), "float32"), {"deep": Spec((3,), "float32")})
        assert file.children({"a": 1}) == [("a", 1)]
        assert file.children(3) is None


def test_numpy_scalars(tmp_path):
    path = save(tmp_path, {"score": np.float64(0.5), "step": np.int32(7), "w": torch.ones(1)})
    with TorchFile(path) as file:
        assert file.metadata == {"score": 0.5, "step": 7}


def test_a_tensor_alone(tmp_path):
    with TorchFile(save(tmp_path, torch.arange(3))) as file:
        assert file.read(0).tolist() == [0, 1, 2]
        assert nested(file, file.spec) == Spec((3,), "int64")
    with TorchFile(save(tmp_path, {})) as file:
        assert repr(file).endswith(": 0 leaves>")
        assert file.metadata == {}
    with TorchFile(save(tmp_path, 5)) as file:
        assert file.metadata == {"": 5}


def test_subclasses_and_attributes(tmp_path):
    marked, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(3), requires_grad=False)
    marked.note = parameter.note = "x"
    check(save(tmp_path, {"marked": marked, "parameter": parameter}))


def test_tensors_that_numpy_lacks_are_listed_and_not_read(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = {
            "quantized": torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8),
            "channels": torch.quantize_per_channel(torch.ones(2, 3), torch.ones(2), torch.zeros(2), 0, torch.quint8),
            "sparse": torch.eye(3).to_sparse(),
            "csr": torch.eye(3).to_sparse_csr(),
            "meta": torch.ones(4, device="meta"),
            "half complex": torch.ones(2, dtype=torch.complex32),
            "w": torch.ones(2),
        }
        path = save(tmp_path, tree)
    reasons = ["quantized", "quantized", "sparse", "sparse", "meta", "complex32"]
    with TorchFile(path) as file:
        for number, reason in enumerate(reasons):
            assert reason in file.refusal(number)
            for read in (lambda n=number: file.read(n), lambda n=number: file.read_range(n, 0, 1)):
                with pytest.raises(Unsupported, match="cannot be read"):
                    read()
        assert file.spec(0) == Spec((2, 3), "raw<qint8>")
        assert file.extent(0).nbytes == 6
        assert file.spec(2) == Spec((3, 3), "float32")
        assert file.nbytes(2) == 3 * 4 + 6 * 8
        assert file.extent(2) is None
        assert file.nbytes(4) == 0
        assert file.read(6).tolist() == [1, 1]


def test_shapes_that_numpy_lacks(tmp_path):
    with TorchFile(save(tmp_path, {"w": torch.ones([1] * 70)})) as file:
        assert file.spec(0).ndim == 70
        with pytest.raises(Unsupported, match="numpy has no array of shape"):
            file.read(0)


def test_arrays_outlive_the_file(tmp_path):
    with TorchFile(save(tmp_path, {"w": torch.arange(5)})) as file:
        found = file.read(0)
    with TorchFile(file.path) as closed:
        pass
    assert found.tolist() == [0, 1, 2, 3, 4]
    for read in (lambda: file.read_range(0, 0, 1), lambda: closed.read(0)):
        with pytest.raises(ValueError, match="is closed"):
            read()


def test_bytes_that_are_not_aligned_are_read_aligned(tmp_path):
    grid = torch.arange(6.0).reshape(2, 3)
    path = save(tmp_path, {"w": grid, "t": grid.T.clone().T, "h": grid.bfloat16(), "z": grid.to(torch.complex128)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("model/x", b"")
    with TorchFile(tmp_path / "new.pt") as file:
        places = {file.extent(0).start % 4, file.archive.offsets("model/data/1").start % 4}
        assert places != {0}
    check(tmp_path / "new.pt")


def test_opening_reads_little_and_closes_what_it_opens(tmp_path, monkeypatch):
    path = save(tmp_path, {f"layers.{i}.w": torch.zeros(64, 64) for i in range(1000)})
    reads = []
    real = OpenFile.read
    monkeypatch.setattr(OpenFile, "read", lambda self, start, n: reads.append(n) or real(self, start, n))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with TorchFile(path) as file:
        assert len(file.tensors) == 1000
        assert len(reads) < 12
        assert sum(reads) < 600_000 < path.stat().st_size / 20
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"PK")
    for _ in range(3):
        with pytest.raises(BadCheckpoint):
            TorchFile(bad)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_torch_is_not_imported(tmp_path):
    path = save(tmp_path, {"w": torch.ones(2, dtype=torch.bfloat16)})
    code = f"""import sys
from paramend.formats.torch.source import TorchFile
print(TorchFile({str(path)!r}).read(0), "torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[1 1] False\n"


# ---- files that are none -----------------------------------------------------------------------------------------


def test_old_files_are_refused_with_a_hint_that_works(tmp_path):
    path = save(tmp_path, {"w": torch.arange(3.0)}, _use_new_zipfile_serialization=False)
    with pytest.raises(BadCheckpoint, match="old format") as error:
        TorchFile(path)
    exec(error.value.hint, {"torch": torch})
    with TorchFile(tmp_path / "model-new.pt") as file:
        assert file.read(0).tolist() == [0, 1, 2]


def test_compressed_files_are_refused_with_a_hint_that_works(tmp_path):
    path = save(tmp_path, {"w": torch.arange(3.0)})
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    path.write_bytes(zipped(records, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(BadCheckpoint, match="compressed") as error:
        TorchFile(path)
    exec(error.value.hint, {"torch": torch})
    with TorchFile(tmp_path / "model-new.pt") as file:
        assert file.read(0).tolist() == [0, 1, 2]


def test_torchscript_is_refused_with_a_hint_that_works(tmp_path):
    path = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 1), torch.ones(1, 2)), str(path))
        with pytest.raises(BadCheckpoint, match="TorchScript") as error:
            TorchFile(path)
        exec(error.value.hint, {"torch": torch})
    with TorchFile(tmp_path / "script-new.pt") as file:
        assert [str(file.spec(n)) for n in file.index.numbers] == ["float32[1,2]", "float32[1]"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"PK\x03\x04" + bytes(60), "the end of the zip file is missing"),
        (b"PK\x05\x06" + bytes(18), "but here is none"),
        (bytes(257) + b"ustar" + bytes(300), "old format"),
        (pickle.dumps({"a": 1}, 2), "a Python pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (bytes(8) + b'{"w":', "safetensors"),
        (b"hello", "not a file of torch.save"),
    ],
)
def test_files_that_are_none(tmp_path, content, message):
    path = tmp_path / "m.pt"
    path.write_bytes(content)
    with pytest.raises(BadCheckpoint, match=message) as error:
        TorchFile(path)
    assert str(error.value).startswith(str(path))


def test_what_cannot_be_opened(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CannotRead, match="no such file") as error:
        TorchFile(tmp_path / "mdel.pt")
    assert error.value.hint == f"did you mean {tmp_path / 'model.pt'}?"
    for path, message in [
        (tmp_path, "is a directory"),
        (tmp_path / "model.pt" / "x", "cannot be opened"),
        (tmp_path / "pipe", "not a regular file"),
        ("a\0b", "cannot be opened"),
    ]:
        with pytest.raises((BadCheckpoint, CannotRead), match=message):
            TorchFile(path)


def test_a_file_that_shrinks(tmp_path):
    path = save(tmp_path, {"w": torch.zeros(1000)})
    with TorchFile(path) as file:
        start = file.extent(0).start
        os.truncate(path, start + 100)
        with pytest.raises(BadCheckpoint, match="became shorter"):
            file.read_range(0, 0, 1000)


# ---- zip tricks --------------------------------------------------------------------------------------------------


def zipped(records, **options):
    """A zip file of records name → bytes, as zipfile writes it."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", **options) as file:
        warnings.simplefilter("ignore")
        for name, data in records if isinstance(records, list) else records.items():
            file.writestr(name, data)
    return out.getvalue()


EMPTY = b"\x80\x02}."


def patched(data, *changes):
    out = bytearray(data)
    for at, new in changes:
        at %= len(out)
        out[at : at + len(new)] = new
    return bytes(out)


GOOD_ZIP = zipped({"m/data.pkl": EMPTY, "m/data/0": b"abcd"})
CENTRAL = GOOD_ZIP.index(b"PK\1\2")
SECOND = GOOD_ZIP.index(b"PK\1\2", CENTRAL + 1)
LOCAL = GOOD_ZIP.index(b"PK\3\4", 1)
END = GOOD_ZIP.index(b"PK\5\6")
# case → (file, whether all of it shows at opening, message)
ZIPS = {
    "two names": (zipped([("m/data.pkl", EMPTY), ("m/data/0", b"a"), ("m/data/0", b"b")]), "appears twice"),
    "parent": (zipped({"m/data.pkl": EMPTY, "m/../x": b""}), "not a path within the file"),
    "absolute": (zipped({"m/data.pkl": EMPTY, "/m/x": b""}), "not a path within the file"),
    "drive": (zipped({"m/data.pkl": EMPTY, "c:/x": b""}), "outside the folder 'm'"),
    "backslash": (zipped({"m/data.pkl": EMPTY, "m\\x": b""}), "not a path within the file"),
    "outside": (zipped({"m/data.pkl": EMPTY, "n/x": b""}), "outside the folder 'm'"),
    "two pickles": (zipped({"m/data.pkl": EMPTY, "n/data.pkl": EMPTY}), "here is two"),
    "no pickle": (zipped({"m/weights": EMPTY}), "here is none"),
    "no folder": (zipped({"data.pkl": EMPTY}), "here is none"),
    "compressed": (zipped({"m/data.pkl": EMPTY}, compression=zipfile.ZIP_DEFLATED), "it is compressed"),
    "big-endian": (zipped({"m/data.pkl": EMPTY, "m/byteorder": b"big"}), "only little-endian"),
    "script": (zipped({"m/data.pkl": EMPTY, "m/constants.pkl": EMPTY}), "TorchScript"),
    "code": (zipped({"m/data.pkl": EMPTY, "m/code/x.py": b""}), "TorchScript"),
    "a byte after": (GOOD_ZIP + b"x", "bytes after the end"),
    "a byte before": (patched(b"PK" + GOOD_ZIP), "not at its recorded offset"),
    "cut": (GOOD_ZIP[:-1], "end of the zip file is missing|damaged"),
    "encrypted": (patched(GOOD_ZIP, (SECOND + 8, b"\1")), "encrypted"),
    "strange flag": (patched(GOOD_ZIP, (SECOND + 8, b"\x20")), "unknown flags"),
    "another name": (patched(GOOD_ZIP, (LOCAL + 30, b"n")), "another name, 'n/data/0'"),
    "another size": (patched(GOOD_ZIP, (LOCAL + 18, b"\5")), "differ in sizes"),
    "another checksum": (patched(GOOD_ZIP, (LOCAL + 14, b"\5")), "differ in sizes or checksum"),
    "another method": (patched(GOOD_ZIP, (LOCAL + 8, b"\x08")), "differ in flags or compression"),
    "no header": (patched(GOOD_ZIP, (LOCAL, b"XX")), "no local header"),
    "bomb": (patched(GOOD_ZIP, (SECOND + 24, b"\xff\xff\xff\x7f")), "bytes would be in 4"),
    "bomb, both": (patched(GOOD_ZIP, (SECOND + 20, b"\xff\xff\xff\x7f" * 2)), "runs into the next member"),
    "too long": (patched(GOOD_ZIP, (SECOND + 20, b"\5\0\0\0\5\0\0\0")), "runs into the next member"),
    "zip64 missing": (patched(GOOD_ZIP, (SECOND + 24, b"\xff" * 4)), "zip64 field is missing"),
    "header far away": (patched(GOOD_ZIP, (SECOND + 42, b"\xff\xff\xff\x7f")), "after the end of the members"),
    "one header for two": (patched(GOOD_ZIP, (SECOND + 42, bytes(4))), "runs into the next member"),
    "too many": (patched(GOOD_ZIP, (END + 8, b"\xff\xfe\xff\xfe")), "cannot list"),
    "too few": (patched(GOOD_ZIP, (END + 8, b"\1\0\1\0")), "more than the 1 members"),
    "in parts": (patched(GOOD_ZIP, (END + 4, b"\1")), "multi-part"),
    "directory elsewhere": (patched(GOOD_ZIP, (END + 16, b"\0")), "not at its recorded offset"),
    "damaged directory": (patched(GOOD_ZIP, (SECOND, b"XX")), "damaged"),
    "damaged pickle": (patched(GOOD_ZIP, (GOOD_ZIP.index(EMPTY) + 2, b"]")), "checksum"),
    "name no UTF-8": (patched(GOOD_ZIP, (SECOND + 8, b"\0\x08"), (SECOND + 46, b"\xff")), "not UTF-8"),
}


@pytest.mark.parametrize("case", ZIPS)
def test_zip_tricks(tmp_path, case):
    data, message = ZIPS[case]
    path = tmp_path / "m.pt"
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=message) as error, TorchFile(path) as file:
        for name in file.archive.members:
            file.archive.offsets(name)
    assert str(error.value).startswith(str(path))


def test_good_zips(tmp_path):
    for data in [GOOD_ZIP, zipped([("m/", b""), ("m/data.pkl", EMPTY), ("m/data/", b"")])]:
        (tmp_path / "m.pt").write_bytes(data)
        with TorchFile(tmp_path / "m.pt") as file:
            assert nested(file, file.spec) == {}
            assert "m/" not in file.archive.members


@pytest.mark.parametrize("limit", [3, 60])
def test_zip64(tmp_path, monkeypatch, limit):
    # zipfile writes the wide fields as soon as a length or an offset passes this limit.
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    path = tmp_path / "m.pt"
    path.write_bytes(zipped({"m/data.pkl": EMPTY, "m/data/0": b"abcd" * 4, "m/data/1": b""}))
    assert b"PK\6\6" in path.read_bytes()
    with TorchFile(path) as file:
        assert file.archive.read("m/data/0") == b"abcd" * 4
        for name in file.archive.members:
            for at in file.archive.offsets(name).crcs:
                assert path.read_bytes()[at : at + 4] == zlib.crc32(file.archive.read(name)).to_bytes(4, "little")


def test_two_ends_that_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 3)
    data = zipped({"m/data.pkl": EMPTY})
    wide, end = data.index(b"PK\6\6"), data.index(b"PK\5\6")
    for changes in [((wide + 32, b"\2"),), ((end + 10, b"\2"),), ((wide + 48, b"\1"),), ((wide, b"XX"),)]:
        (tmp_path / "m.pt").write_bytes(patched(data, *changes))
        with pytest.raises(BadCheckpoint, match=r"differ|damaged|not where|multi-part|cannot list"):
            TorchFile(tmp_path / "m.pt")


# ---- patches -----------------------------------------------------------------------------------------------------


def put(path, changes):
    with path.open("r+b") as file:
        for at, data in changes:
            file.seek(at)
            file.write(data)


def rezipped(path, folder):
    """The same records as another writer lays them out: checksums in the local headers."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(folder / "re.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return folder / "re.pt"


def streamed(path, folder):
    """The same records, written to a pipe: checksums after them."""
    out = io.BytesIO()

    class Pipe(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            return out.write(data)

    with zipfile.ZipFile(path) as old, zipfile.ZipFile(Pipe(), "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    (folder / "st.pt").write_bytes(out.getvalue())
    return folder / "st.pt"


@pytest.mark.parametrize("layout", [lambda path, folder: path, rezipped, streamed])
def test_checksums_are_true_after_a_patch(tmp_path, layout):
    base = torch.arange(300_000.0)  # more than one chunk
    path = layout(save(tmp_path, {"a": base, "row": base[100:200], "b": torch.ones(3), "c": torch.zeros(0)}), tmp_path)
    with TorchFile(path) as file:
        row, b, empty = (file.extent(n) for n in (1, 2, 3))
        changed = [row, b, empty, Extent(path, row.start + 400, 8)]
        before = path.read_bytes()
        put(path, [(row.start, bytes(400)), (b.start, bytes(12)), (row.start + 400, bytes(8))])
        assert zipfile.ZipFile(path).testzip() is not None
        after = file.after_patch(changed)
        assert {(p, at, len(data)) for p, at, data in after} == {
            (e.path, e.start, e.nbytes) for e in file.patched_too(changed)
        }
        assert len(after) == 4  # two places for each of two records
        put(path, [(at, data) for _, at, data in after])
        assert zipfile.ZipFile(path).testzip() is None
        assert file.read(2).tolist() == [0, 0, 0]
    loaded = torch.load(path, weights_only=True)
    assert loaded["row"].count_nonzero() == 0
    assert loaded["a"][199] == 0
    assert loaded["a"][202] == 202
    assert loaded["a"][99] == 99
    assert torch.equal(loaded["b"], torch.zeros(3))
    check(path)
    # The opposite patch gives the file back, byte for byte.
    put(path, [(e.start, before[e.start : e.start + e.nbytes]) for e in changed])
    with TorchFile(path) as file:
        put(path, [(at, data) for _, at, data in file.after_patch(changed)])
    assert path.read_bytes() == before


def test_patches_of_what_is_no_storage(tmp_path):
    path = save(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)})
    with TorchFile(path) as file:
        a, b = file.extent(0), file.extent(1)
        for start, nbytes in [(0, 4), (a.start - 1, 4), (a.start, b.start - a.start), (path.stat().st_size - 4, 4)]:
            with pytest.raises(BadArgument, match="not within one member"):
                file.after_patch([Extent(path, start, nbytes)])
        assert file.after_patch([]) == file.after_patch([Extent(path, 0, 0)]) == []


# ---- hostile pickles ---------------------------------------------------------------------------------------------


def pickled(folder, pickle_bytes, storages=None):
    records = {"m/data.pkl": pickle_bytes} | {f"m/data/{key}": data for key, data in (storages or {}).items()}
    path = folder / "m.pt"
    path.write_bytes(zipped(records))
    return path


class Runs:
    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def ints(values):
    return b"(" + b"".join(b"\x8a\x09" + v.to_bytes(9, "little", signed=True) for v in values) + b"t"


def rebuilt(offset=0, shape=(2,), stride=(1,), count=2, key="0", kind="Float", after=b""):
    """The instructions that build a tensor."""
    reference = text("storage") + f"ctorch\n{kind}Storage\n".encode() + text(key) + text("cpu") + ints([count])[1:-1]
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((" + reference + b"tQ" + ints([offset])[1:-1] + ints(shape)
        + ints(stride) + b"\x89N" + after + b"tR"
    )  # fmt: skip


def tree_of(tensor):
    return b"\x80\x02}" + text("a.b") + tensor + b"s."


DANGEROUS = {
    "os.system": pickle.dumps({"w": Runs(os.system, "touch pwned")}, 2),
    "os.system, 4": pickle.dumps({"w": Runs(os.system, "touch pwned")}, 4),
    "eval": pickle.dumps({"w": Runs(eval, "open('pwned', 'w')")}, 2),
    "exec": pickle.dumps({"w": Runs(exec, "open('pwned', 'w')")}, 4),
    "subprocess": pickle.dumps([Runs(subprocess.check_output, ["touch", "pwned"])], 2),
    "getattr": b"\x80\x02cbuiltins\ngetattr\n(cos\nsystem\nX\x01\x00\x00\x00atR.",
    "import": b"\x80\x02c__builtin__\n__import__\nX\x02\x00\x00\x00os\x85R.",
    "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x0eos.path.exists\x93.",
    "inst": b"\x80\x02(X\x05\x00\x00\x00touchios\nsystem\n.",
    "extension": b"\x80\x02\x82\x01.",
    "object": b"\x80\x02(cos\nsystem\nX\x01\x00\x00\x00ao.",
    "new object": b"\x80\x02ccollections\nOrderedDict\n)\x81cos\nsystem\nb.",
}


@pytest.mark.parametrize("case", DANGEROUS)
def test_nothing_is_run(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    path = pickled(tmp_path, DANGEROUS[case])
    with pytest.raises(BadCheckpoint, match=r"data\.pkl, byte \d+: .*(not among the names|not allowed)"):
        TorchFile(path)
    assert not (tmp_path / "pwned").exists()


def laughs(n):
    """Tuples of tuples: 2**n entries in n steps."""
    return b"\x80\x02K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(n))


NUMBERS = bytes(8)
PICKLES = {
    "past its storage": (tree_of(rebuilt(shape=(3,))), "'a.b': it runs past its storage: it reaches byte 12 of 8"),
    "offset past it": (tree_of(rebuilt(offset=1)), "runs past its storage"),
    "stride past it": (tree_of(rebuilt(stride=(2,))), "runs past its storage"),
    "huge stride": (tree_of(rebuilt(stride=(2**62,))), "runs past its storage"),
    "negative stride": (tree_of(rebuilt(offset=1, stride=(-1,))), "strides of a tensor must be a whole number from 0"),
    "negative offset": (tree_of(rebuilt(offset=-1)), "offset of a tensor must be"),
    "negative length": (tree_of(rebuilt(shape=(-2,))), "shape of a tensor must be"),
    "overflow": (tree_of(rebuilt(shape=(2**40, 2**40), stride=(0, 0))), "overflows 64 bits"),
    "overflow and 0": (tree_of(rebuilt(shape=(2**40, 2**40, 0), stride=(0, 0, 0))), "overflows 64 bits"),
    "huge length": (tree_of(rebuilt(shape=(2**64,))), "from 0 to 2\\*\\*63"),
    "axes": (tree_of(rebuilt(shape=(2, 1))), "2 axes with 1 strides"),
    "many axes": (tree_of(rebuilt(shape=(1,) * 300, stride=(1,) * 300)), "300 axes"),
    "wrong count": (tree_of(rebuilt(count=3)), "should have 12 bytes, but its record has 8"),
    "huge count": (tree_of(rebuilt(count=2**62)), "should have"),
    "no such storage": (tree_of(rebuilt(key="../../etc")), "storage '../../etc' is not in the file"),
    "untyped": (tree_of(rebuilt(kind="Untyped", count=8)), "without a dtype"),
    "conjugate of a float": (tree_of(rebuilt(after=b"}X\x04\x00\x00\x00conj\x88s")), "does not support the conjugate"),
    "strange property": (tree_of(rebuilt(after=b"}X\x04\x00\x00\x00evil\x88s")), "unknown properties"),
    "contains itself": (b"\x80\x02}q\0X\x01\x00\x00\x00ah\x00s.", "'a': it contains itself"),
    "list in itself": (b"\x80\x02]q\0h\x00a.", "it contains itself"),
    "attribute in itself": (
        b"\x80\x02ccollections\nOrderedDict\n)Rq\0}X\x09\x00\x00\x00_metadata}X\x01\x00\x00\x00ah\x00ssb.",
        "contains itself",
    ),
    "deep": (b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", "more than 200 pieces"),
    "deep tuples": (b"\x80\x02K\x01" + b"\x85" * 100_000 + b".", "more than 200 pieces"),
    "a name too deep": (b"\x80\x02}" + text("a." * 5000) + rebuilt() + b"s.", "more than 200 pieces"),
    "laughs": (laughs(60) + b".", "in too many places"),
    "laughs as a key": (b"\x80\x02}" + laughs(60)[2:] + b"Ns.", "a tuple cannot be a key"),
    "a huge key": (b"\x80\x02}\x8a\xff" + b"\x7f" * 255 + b"Ns.", "more than 64 bits cannot be a key"),
    "a huge number": (b"\x80\x02\x8b\xff\xff\xff\x7f1.", "an integer of 2,147,483,647 bytes"),
    "a huge text": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7fa.", "ends too early"),
    "a list as a key": (b"\x80\x02}]Ns.", "a list cannot be a key"),
    "a key alone": (b"\x80\x02}(K\x01u.", "the last key has no value"),
    "over and over": (
        b"\x80\x02(" + text("x" * 1000) + b"q\0" + b"c_codecs\nencode\nh\x00\x85R" * 2000 + b"l.",
        "over and over",
    ),
    "an attribute that hides": (
        b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.",
        "cannot have the attribute 'items'",
    ),
    "no text": (b"\x80\x02X\x01\x00\x00\x00\xff.", "not UTF-8"),
    "empty": (b"", "ends too early"),
    "no end": (b"\x80\x02}", "ends too early"),
    "nothing to take": (b"\x80\x02.", "does not end with exactly one value"),
    "nothing to set": (b"\x80\x02s.", "has no operand"),
    "no mark": (b"\x80\x02u.", "no mark"),
    "never kept": (b"\x80\x02h\x05.", "value 5 is used but was never stored"),
    "a call of a value": (b"\x80\x02K\x01)R.", "an int cannot be called"),
    "a call of a constant": (b"\x80\x02ctorch\nfloat32\n)R.", "torch.float32 cannot be called"),
    "wrong arguments": (b"\x80\x02ctorch._utils\n_rebuild_tensor\n)R.", "does not take 0 arguments"),
    "another reference": (b"\x80\x02X\x01\x00\x00\x00aQ.", "other than a storage"),
    "protocol 9": (b"\x80\x09}.", "protocol 9 is unknown"),
    "a state of nothing": (b"\x80\x02}}b.", "dict takes no state"),
    "a numpy object": (
        b"\x80\x02cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00O8\x85RC\x01a\x86R.",
        "not a plain number",
    ),
}


@pytest.mark.parametrize("case", PICKLES)
def test_hostile_pickles(tmp_path, case):
    data, message = PICKLES[case]
    with pytest.raises(BadCheckpoint, match=message) as error:
        TorchFile(pickled(tmp_path, data, {"0": NUMBERS}))
    assert len(str(error.value)) < 1000


def test_good_pickles_by_hand(tmp_path):
    with TorchFile(pickled(tmp_path, tree_of(rebuilt()), {"0": np.array([1, 2], "float32").tobytes()})) as file:
        assert file.read(0).tolist() == [1, 2]
    # Repeating one element is how torch saves an expanded tensor; it costs no memory, however long.
    spread = rebuilt(shape=(2**50,), stride=(0,))
    with TorchFile(pickled(tmp_path, tree_of(spread), {"0": np.array([1, 2], "float32").tobytes()})) as file:
        assert file.read(0).shape == (2**50,)
        assert file.read_range(0, 2**49, 2**49 + 2).tolist() == [1, 1]


def test_a_container_in_two_places_gives_tied_leaves(tmp_path):
    block = {"w": torch.ones(2)}
    with TorchFile(save(tmp_path, {"a": block, "b": block})) as file:
        assert [file.index.path(n) for n in file.index.numbers] == ["a.w", "b.w"]
        assert file.ties == {0: 0, 1: 0}


# ---- mutations ---------------------------------------------------------------------------------------------------


def walk_through(path):
    """Uses all of a file."""
    with TorchFile(path) as file:
        nested(file, file.spec)
        for number in file.index.numbers:
            file.index.path(number)
            file.overlaps(number)
            extent = file.extent(number)
            if extent:
                assert 0 <= extent.start <= extent.start + extent.nbytes <= path.stat().st_size
            if not file.refusal(number):
                try:
                    found = file.read(number)
                except Unsupported:
                    continue
                found.reshape(-1)[:3].tobytes() if found.size < 10_000 else found.flat[:3].tobytes()
                file.read_range(number, 0, min(file.spec(number).size, 5))
        for name in file.archive.members:
            file.archive.offsets(name)


def seeds(folder):
    base = torch.arange(12.0).reshape(3, 4)
    tree = OrderedDict(a=base, t=base.T, h=torch.ones(2, dtype=torch.bfloat16), f=torch.ones(3).to(torch.float8_e5m2))
    tree._metadata = {"": {"version": 1}}
    tree["rest"] = {"epoch": 3, 0: [torch.zeros(2, dtype=torch.complex64).conj(), None], "lr": (0.1, True, "x")}
    tree["sparse"] = torch.eye(2).to_sparse()
    tree["parameter"] = torch.nn.Parameter(torch.ones(1))
    small = pickle.dumps({"x": [1.5, {"y": (1, 2, 3)}]}, 4)
    found = [save(folder, tree).read_bytes(), save(folder, dict(tree), pickle_protocol=4).read_bytes()]
    return [*found, zipped({"m/data.pkl": small}), zipped({"m/data.pkl": tree_of(rebuilt()), "m/data/0": NUMBERS})]


def mutated(data, rng):
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(out))
        match rng.randrange(6):
            case 0:
                out[at] = rng.randrange(256)
            case 1:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                out[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, len(out)]))
            case 3:
                del out[at : at + rng.randrange(1, 4)]
            case 4:
                out[at:at] = rng.choice(
                    [b"(", b"t", b"R", b"Q", b"b", b"q\0", b"h\0", b"\x85", b"}", b"PK\1\2", b"\xff"]
                )
            case 5:
                other = rng.randrange(len(out))
                out[at : at + 8] = out[other : other + 8]
    return bytes(out)


@pytest.mark.slow
def test_mutations_of_whole_files(tmp_path):
    rng, path = random.Random(0), tmp_path / "m.pt"
    found = seeds(tmp_path)
    refused = 0
    for _ in range(1500):
        path.write_bytes(mutated(rng.choice(found), rng))
        try:
            walk_through(path)
        except ParamendError as error:
            refused += 1
            assert type(error) is BadCheckpoint
            assert len(str(error)) < 1000
    assert refused > 500


@pytest.mark.slow
def test_mutations_of_pickles_and_directories(tmp_path):
    """Checksums and lengths are put right again, so that the damage is not caught by them."""
    rng, path = random.Random(1), tmp_path / "m.pt"
    found = []
    for data in seeds(tmp_path):
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            found.append({name: file.read(name) for name in file.namelist()})
    refused = 0
    for _ in range(2500):
        records = dict(rng.choice(found))
        name = next(name for name in records if name.endswith("data.pkl"))
        records[name] = mutated(records[name], rng)
        path.write_bytes(zipped(records))
        try:
            walk_through(path)
        except ParamendError as error:
            refused += 1
            assert type(error) is BadCheckpoint
            assert len(str(error)) < 1000
    assert 1000 < refused < 2400


# ---- writing -----------------------------------------------------------------------------------------------------


def item(keys, tensor):
    raw = bits(tensor)
    spec = Spec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    return Item(".".join(keys), tuple(keys), spec, len(raw)), raw


@pytest.mark.parametrize("wide", [0xFFFFFFFF, 500, 0])
def test_a_written_file_is_read_by_torch(tmp_path, monkeypatch, wide):
    monkeypatch.setattr(headers, "WIDE", wide)
    tree = {f"{dtype}.{n}": tensor(dtype, shape) for dtype in DTYPES for n, shape in enumerate([(3, 4), (), (0, 2)])}
    tree["large"] = torch.arange(5000)
    items = [item((name,), leaf) for name, leaf in tree.items()] + [item(("nested", "ü", "w"), torch.ones(2))]
    assert not any(WRITER.refusal(each.spec) for each, _ in items)
    path = tmp_path / "out.pt"
    write(path, TORCH, items, {"format": "pt"})
    assert zipfile.ZipFile(path).testzip() is None
    loaded = torch.load(path, weights_only=True)
    assert loaded["nested"]["ü"]["w"].tolist() == [1, 1]
    for name, leaf in tree.items():
        assert loaded[name].dtype == leaf.dtype
        assert loaded[name].shape == leaf.shape
        assert bits(loaded[name]) == bits(leaf)
    assert torch.equal(torch.load(path, weights_only=True, mmap=True)["large"], tree["large"])
    check(path, loaded)
    with TorchFile(path) as file:
        assert {file.archive.offsets(name).start % 64 for name in file.archive.members} == {0}


@pytest.mark.slow
@pytest.mark.far
def test_more_records_than_a_plain_zip_counts(tmp_path):
    path = tmp_path / "out.pt"
    items = [item((f"w{i}",), torch.ones(1)) for i in range(3)] * 22_000
    items = [(Item(str(i), (str(i),), each.spec, each.nbytes), data) for i, (each, data) in enumerate(items)]
    write(path, TORCH, items)
    with zipfile.ZipFile(path) as file:
        assert len(file.namelist()) == 66_003
    with TorchFile(path) as file:
        assert file.read(65_999).tolist() == [1]


@pytest.mark.far
@pytest.mark.slow
def test_tensors_of_more_than_4_gb(tmp_path, monkeypatch):
    crc32 = zlib.crc32
    count = 2**30 + 2**22
    large = Item("a", ("a",), Spec((count,), "float32"), 4 * count)
    monkeypatch.setattr(zlib, "crc32", lambda data, crc=0: crc if len(data) >= 1 << 20 else crc32(data, crc))
    path = write(tmp_path / "out.pt", TORCH, [(large, None), item(("b",), torch.arange(3.0))])
    with TorchFile(path) as file:
        assert file.nbytes(0) == 4 * count
        assert file.extent(1).start > 2**32
        assert file.read(1).tolist() == file.read_range(1, 0, 3).tolist() == [0, 1, 2]
        assert file.read_range(0, count - 2, count).tolist() == [0, 0]
    assert torch.load(path, weights_only=True, mmap=True)["b"].tolist() == [0, 1, 2]


def test_what_cannot_be_written():
    for dtype in ("float4_e2m1fn", "float8_e3m4", "int4", "raw<qint8>"):
        assert dtype in WRITER.refusal(Spec((2,), dtype))
    one = torch.ones(1)
    for keys in [[("a",), ("a",)], [("a",), ("a", "b")], [("a", "b"), ("a",)]]:
        with pytest.raises(RenameClash):
            list(WRITER.parts([item(path, one)[0] for path in keys], {}))


def test_archives_in_general(tmp_path):
    path = tmp_path / "x.zip"
    path.write_bytes(zipped({"a": b"x" * 100, "b": b"y" * 100}, compression=zipfile.ZIP_DEFLATED))
    archive = Archive(OpenFile(path))
    assert [(r.name, r.method, r.nbytes) for r in archive.members.values()] == [("a", 8, 100), ("b", 8, 100)]
    with pytest.raises(BadCheckpoint, match="compressed"):
        archive.read("a")


def test_an_edit_of_one_path_of_a_shared_tensor_reaches_every_path(tmp_path):
    shared = torch.ones(3)
    torch.save({"a": shared, "b": shared, "c": torch.zeros(1)}, tmp_path / "m.pt")
    for name in "ab":
        with pm.open(tmp_path / "m.pt") as checkpoint:
            edited = pm.at(checkpoint, name).fill(5.0)
            assert edited["a"].tolist() == edited["b"].tolist() == [5, 5, 5]
            edited.save(tmp_path / f"{name}.safetensors")
        assert [pm.load(tmp_path / f"{name}.safetensors")[path].tolist() for path in "ab"] == [[5, 5, 5]] * 2
