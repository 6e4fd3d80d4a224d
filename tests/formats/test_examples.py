"""Examples of what the functions of formats/ give."""

import io
import json
import os
import pickle
import re
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from paramend.errors import BadCheckpoint
from paramend.formats.files import OpenFile
from paramend.formats.gathered import Gathered
from paramend.formats.jsontext import parse_object
from paramend.formats.limits import shown
from paramend.formats.msgpack import MsgpackFile
from paramend.formats.msgpack_writer import MsgpackWriter
from paramend.formats.npz import NpzFile, NpzWriter
from paramend.formats.orbax.source import OrbaxCheckpoint
from paramend.formats.orbax.store import may_change
from paramend.formats.orbax.writer import chunk_shape, table_row
from paramend.formats.registry import open_source, weight_files
from paramend.formats.safetensors import SafetensorsFile, SafetensorsWriter, annotated, framed, layout, parse_header
from paramend.formats.shards import is_index, read_index
from paramend.formats.source import Item, LeafBytes
from paramend.formats.torch.foreign import foreign
from paramend.formats.torch.pickles import Flaw, Name, unpickle
from paramend.formats.torch.source import TorchFile
from paramend.formats.torch.writer import Recorder, TorchWriter, pickled
from paramend.formats.zips import Archive, ZipHeaders
from paramend.leaves.origins.moved import join
from paramend.leaves.origins.origin import Extent
from paramend.leaves.origins.stored import Held
from paramend.leaves.paths import labels
from paramend.leaves.specs import Spec


def test_open_file():
    path = Path(tempfile.mkdtemp(), "x.bin")
    path.write_bytes(b"abcdef")
    assert OpenFile(path).read(2, 3) == b"cde"


def test_gathered():
    ramp = Held(np.arange(4, dtype="int8").reshape(2, 2))
    both = Gathered(None, [(labels("w"), ramp), (labels("v"), join([ramp, ramp], 0, "stack"))])
    assert (
        repr((both.index.path(1), both.spec(1), both.read(1)[1].tolist()))
        == "('v', Spec(shape=(2, 2, 2), dtype='int8'), [[0, 1], [2, 3]])"
    )


def test_read_index():
    path = Path(tempfile.mkdtemp(), "model.safetensors.index.json")
    path.write_text('{"weight_map": {"w": "../secret"}}')
    with pytest.raises(
        BadCheckpoint, match=r".*: weight_map, 'w': '\.\./secret' is not the name of a file beside the index"
    ):
        read_index(path)


def test_msgpack_file(capsys):
    path = Path(tempfile.mkdtemp(), "model.msgpack")
    array = b"\x93\x91\x02\xa4int8\xc4\x02\x07\x08"  # shape, dtype, bytes
    path.write_bytes(b"\x82\xa1w\xc7" + bytes([len(array), 1]) + array + b"\xa4step\x05")
    with MsgpackFile(path) as file:
        print(file.index.path(0), file.spec(0), file.read(0).tolist(), file.metadata)
    assert capsys.readouterr().out == "w int8[2] [7, 8] {'step': 5}\n"


def test_msgpack_writer_parts():
    item = Item("fc/bias", ("fc", "bias"), Spec((2,), "float32"), 8)
    *_, bias = MsgpackWriter().parts([item], {})
    assert repr(bias) == "LeafBytes(item=0, start=0, stop=8)"


def test_npz_file(capsys):
    path = Path(tempfile.mkdtemp(), "model.npz")
    np.savez(path, **{"fc/kernel": np.ones((2, 1), "float32")})
    with NpzFile(path) as file:
        print(file.index.path(0), file.spec(0), file.read(0).tolist())
    assert capsys.readouterr().out == "fc/kernel float32[2,1] [[1.0], [1.0]]\n"


def test_npz_writer_parts():
    item = Item("fc/bias", ("fc", "bias"), Spec((2,), "float32"), 8)
    _, head, bias, *_ = NpzWriter().parts([item], {})
    assert (
        repr((bias, head[10:].strip()))
        == "(LeafBytes(item=0, start=0, stop=8), b\"{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }\")"
    )


def test_orbax_checkpoint(capsys):
    path = Path(tempfile.mkdtemp())
    row = {"key_metadata": [{"key": "w", "key_type": 2}], "value_metadata": {"value_type": "jax.Array"}}
    (path / "_METADATA").write_text(json.dumps({"tree_metadata": {"('w',)": row}, "use_ocdbt": False}))
    (path / "w").mkdir()
    (path / "w" / ".zarray").write_text('{"shape": [2, 3], "chunks": [2, 3], "dtype": "bfloat16"}')
    with OrbaxCheckpoint(path) as checkpoint:
        print(checkpoint.index.path(0), checkpoint.spec(0))
    assert capsys.readouterr().out == "w bfloat16[2,3]\n"


def test_may_change():
    folder = Path("state")
    assert (
        may_change(folder, "manifest.ocdbt"),
        may_change(folder, "d/12ab-34cd"),
        may_change(folder, "_METADATA"),
    ) == (True, True, False)


def test_weight_files():
    folder = Path(tempfile.mkdtemp())
    for name in ("a.safetensors", "b.safetensors", "notes.txt"):
        (folder / name).touch()
    assert sorted(weight_files(folder)) == ["a.safetensors", "b.safetensors"]


def test_open_source():
    file = Path(tempfile.mkdtemp(), "weights")
    file.write_bytes(layout([("w", Spec((2,), "int8"), 2)]).to_bytes() + bytes(2))
    assert (
        repr((open_source(file).index.path(0), open_source(file.parent).spec(0)))
        == "('w', Spec(shape=(2,), dtype='int8'))"
    )


def test_safetensors_file(capsys):
    path = Path(tempfile.mkdtemp(), "model.safetensors")
    header = layout([("fc.weight", Spec((2, 1), "float32"), 8)])
    path.write_bytes(header.to_bytes() + np.array([1, 2], "float32").tobytes())
    with SafetensorsFile(path) as file:
        print(file.index.path(0), file.spec(0), file.read(0).tolist())
    assert capsys.readouterr().out == "fc.weight float32[2,1] [[1.0], [2.0]]\n"


def test_header_edited():
    before = layout([("w", Spec((2,), "float32"), 8), ("b", Spec((1,), "float32"), 4)])
    assert [entry.name for entry in before.edited({1: ("bias", Spec((1,), "float32"))}).entries] == ["bias"]


def test_safetensors_writer_parts():
    item = Item("fc.weight", ("fc.weight",), Spec((2,), "float32"), 8)
    head, weight = SafetensorsWriter().parts([item], {})
    assert (
        repr((head[8:].strip(), weight))
        == '(b\'{"fc.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}\', LeafBytes(item=0, start=0, stop=8))'
    )


def test_unpickle():
    class Nothing:
        def names(self):
            return {}

        def foreign(self, module, name):
            raise Flaw(f"{module}.{name} is not among the names allowed")

    assert unpickle(pickle.dumps({"epoch": [1, 2]}, 2), Nothing(), file="x.pt", place="data.pkl") == {"epoch": [1, 2]}
    with pytest.raises(BadCheckpoint, match=r"x\.pt: data\.pkl, byte 2: posix\.system is not among the names allowed"):
        unpickle(pickle.dumps(os.system, 2), Nothing(), file="x.pt", place="data.pkl")


def test_recorder():
    class Words:
        def names(self):
            return {"builtins.complex": Name("builtins.complex", complex)}

    made = unpickle(pickle.dumps([1j], 2), Recorder(Words()), file="x", place="y")[0]
    assert (
        repr((made.function, made.arguments, pickle.loads(pickled([made, (2, made)]))))
        == "(builtins.complex, (0.0, 1.0), [1j, (2, 1j)])"
    )


def test_torch_file(capsys):
    path = Path(tempfile.mkdtemp(), "model.pt")
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + (
        b"0X\3\0\0\0cpuK\2tQK\0K\2\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR"
    )
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("model/data.pkl", b"\x80\2}(X\6\0\0\0weight" + tensor + b"X\5\0\0\0epochK\3u.")
        made.writestr("model/data/0", np.array([1, 2], "float32").tobytes())
    with TorchFile(path) as file:
        print(file.index.path(0), file.spec(0), file.read(0).tolist(), file.metadata)
    assert capsys.readouterr().out == "weight float32[2] [1.0, 2.0] {'epoch': 3}\n"


def test_torch_writer_parts():
    item = Item("fc.weight", ("fc.weight",), Spec((2,), "float32"), 8)
    assert (
        repr([part for part in TorchWriter().parts([item], {}) if isinstance(part, LeafBytes)])
        == "[LeafBytes(item=0, start=0, stop=8)]"
    )


def test_archive():
    path = Path(tempfile.mkdtemp(), "x.zip")
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("folder/a.txt", "hello")
    archive = Archive(OpenFile(path))
    assert (
        repr((archive.read("folder/a.txt"), archive.offsets("folder/a.txt")))
        == "(b'hello', Offsets(start=42, crcs=(14, 63)))"
    )


def test_zip_headers():
    zipped = ZipHeaders()
    data = zipped.open("a", 3, crc=0x352441C2) + b"abc" + zipped.close() + zipped.finish()
    assert (zipfile.ZipFile(io.BytesIO(data)).read("a"), len(data) == zipped.at) == (b"abc", True)


def test_zip_source_after_patch():
    path = Path(tempfile.mkdtemp(), "model.pt")
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("model/data.pkl", b"\x80\2}.")
        made.writestr("model/data/0", b"abcd")
    with TorchFile(path) as file, path.open("r+b") as raw:
        changed = Extent(path, file.archive.offsets("model/data/0").start + 1, 2)
        _ = raw.seek(changed.start), raw.write(b"XY"), raw.flush()
        for _, offset, data in file.after_patch([changed]):
            _ = raw.seek(offset), raw.write(data)
    assert zipfile.ZipFile(path).read("model/data/0") == b"aXYd"


def test_is_index():
    assert (is_index("model.safetensors.index.fp16.json"), is_index("faiss.index")) == (True, False)


def test_parse_object():
    with pytest.raises(BadCheckpoint, match=r"x\.json: index: 'a' appears twice"):
        parse_object(b'{"a": 1, "a": 2}', "x.json", "index")


def test_shown():
    assert shown("a\n") == "'a\\n'"
    assert re.fullmatch(r"'x+'\.{3} \(2,000 characters\)", shown("x" * 2000))


def test_table_row():
    assert table_row(("layers", 0), "np.ndarray", (2,))[0] == "('layers', '0')"


def test_chunk_shape():
    assert chunk_shape(Spec((3, 1 << 13, 1 << 13), "float32")) == (1, 2048, 8192)


def test_framed():
    assert framed(b"{}", 16) == b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "


def test_annotated():
    assert (
        annotated(b'{"__metadata__":{"format":"pt"}}', "note", "1")
        == b'{"__metadata__":{"format":"pt","note":"1"}}     '
    )


def test_parse_header():
    with pytest.raises(BadCheckpoint, match=r"x\.st: data: 4 bytes after the last tensor belong to no tensor"):
        parse_header(b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', 12, file="x.st")


def test_foreign():
    assert repr(foreign("argparse", "Namespace").call()) == "<argparse.Namespace, not read>"
