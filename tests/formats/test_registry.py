"""Which format a path is of, and what is said of paths that are of none; directories read strictly."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings, strategies as st

import paramend as pm
from paramend.errors import BadCheckpoint, CannotRead, ParamendError
from paramend.formats.registry import FORMATS, find_format, format_for, format_of, open_source
from paramend.formats.shards import read_index


def save(path, *names):
    safetensors.numpy.save_file({name: np.ones(2, "float32") for name in names}, path)


def index(folder, weight_map, **more):
    path = folder / "model.safetensors.index.json"
    path.write_text(weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map} | more))
    return path


# ---- by content --------------------------------------------------------------------------------------------------


def test_a_format_is_told_by_content_not_by_suffix(tmp_path):
    save(tmp_path / "model.bin", "w")
    assert format_of(open_source(tmp_path / "model.bin")).name == "safetensors"
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    np.savez(tmp_path / "a.npz", w=np.ones(2))
    for name, wanted in [("model.safetensors", "torch"), ("a.npz", "npz")]:
        head = (tmp_path / name).read_bytes()[:64]
        assert find_format(tmp_path / name, head).name == wanted


LONG = "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"
ARRAY = np.arange(2, dtype="float32")


def npy(array=ARRAY):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def zipped(path, records, method=zipfile.ZIP_STORED):
    """A zip file of records; one that is a `ZipInfo` may have extra fields, one that is text is written as it comes."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in records:
            file.writestr(name, data, method)
    return path


def described(name, extra):
    info = zipfile.ZipInfo(name)
    info.extra = extra
    return info


@pytest.mark.parametrize(
    "records",
    [
        [(f"{LONG}.npy", npy())],
        [(f"{'x' * length}.npy", npy()) for length in range(20, 40)],
        [("archive/data.pkl.npy", npy())],
        [("x/data.pkl/y.npy", npy())],
        [("readme.txt", b"hello"), ("w.npy", npy())],
        [("x/data.pkl", b"hello"), ("w.npy", npy())],
        [("größe/κ/核.npy", npy()), ("b.npy", npy())],
        [(described("w.npy", b"FB\x08\0" + bytes(8)), npy()), ("v.npy", npy())],
    ],
    ids=["long name", "every length", "data.pkl", "folder data.pkl", "text first", "pickle first", "letters", "extra"],
)
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", ["w.npz", "w", "w.pt", "w.safetensors"])
def test_whatever_numpy_reads_is_npz(tmp_path, records, method, name):
    path = zipped(tmp_path / name, records, method)
    with np.load(path) as theirs, open_source(path) as ours:
        assert format_of(ours).name == "npz"
        arrays = {key: theirs[key] for key in theirs.files if key + ".npy" in theirs.zip.namelist()}
        found = {ours.index.name(number): ours.read(number) for number in ours.index.numbers}
    assert found.keys() == arrays.keys() and all((found[key] == arrays[key]).all() for key in arrays)


def test_a_long_name_saved_by_numpy_and_by_us(tmp_path):
    np.savez(tmp_path / "theirs.npz", **{LONG: ARRAY})
    np.savez_compressed(tmp_path / "packed.npz", **{LONG: ARRAY})
    pm.save({LONG: ARRAY}, tmp_path / "ours.npz")
    for path in tmp_path.iterdir():
        assert pm.load(path, nested=False)[LONG].tolist() == np.load(path)[LONG].tolist() == [0, 1]


def test_zip64_npz(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    zipped(tmp_path / "w", [(f"{LONG}.npy", npy())])
    assert format_of(open_source(tmp_path / "w")).name == "npz"
    assert np.load(tmp_path / "w")[LONG].tolist() == [0, 1]


def test_an_empty_npz(tmp_path):
    np.savez(tmp_path / "e.npz")
    assert np.load(tmp_path / "e.npz").files == []
    opened = open_source(tmp_path / "e.npz")
    assert format_of(opened).name == "npz" and not opened.index.numbers


@pytest.mark.parametrize("name", [f"{LONG.replace('/', '_')}.pt", "größe 核.pt", "x.npz", "x.safetensors", "x"])
def test_whatever_torch_saves_is_torch(tmp_path, name):
    torch = pytest.importorskip("torch")
    state = {"w": torch.ones(2)}
    torch.save(state, tmp_path / name)
    with zipfile.ZipFile(tmp_path / name) as old:
        records = [(record, old.read(record)) for record in reversed(old.namelist())]
    (tmp_path / "backwards").mkdir()
    zipped(tmp_path / "backwards" / name, records)  # data.pkl comes last
    again = io.BytesIO((tmp_path / "backwards" / name).read_bytes())  # torch believes some suffixes
    assert torch.load(again)["w"].tolist() == [1, 1]
    for path in (tmp_path / name, tmp_path / "backwards" / name):
        opened = open_source(path)
        assert format_of(opened).name == "torch" and opened.read(0).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [
        ("x.zip", [("readme.txt", b"hello")], "one member data.pkl in a folder, but here is none"),
        ("x.pt", [("readme.txt", b"hello")], "one member data.pkl in a folder, but here is none"),
        ("x.pt", [], "one member data.pkl in a folder, but here is none"),
        ("x.pt", [("a/b/data.pkl", b"hello")], "one member data.pkl in a folder, but here is none"),
    ],
)
def test_a_zip_file_without_a_checkpoint(tmp_path, name, records, message):
    with pytest.raises(BadCheckpoint, match=message):
        open_source(zipped(tmp_path / name, records))


@pytest.mark.parametrize("name", ["x", "x.npz", "x.pt", "x.safetensors"])
def test_a_zip_file_that_is_cut_short_says_so(tmp_path, name):
    whole = zipped(tmp_path / name, [(f"{LONG}.npy", npy())]).read_bytes()
    (tmp_path / name).write_bytes(whole[:-30])
    with pytest.raises(BadCheckpoint, match="the end of the zip file is missing"):
        open_source(tmp_path / name)


def test_a_single_array_of_flax(tmp_path):
    flax = pytest.importorskip("flax.serialization")
    for size in (2, 100, 40_000):
        (tmp_path / "x").write_bytes(flax.to_bytes(np.arange(size)))
        opened = open_source(tmp_path / "x")
        assert format_of(opened).name == "msgpack" and (opened.read(0) == np.arange(size)).all()


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\xc7\x02\x05ab", None),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", None),
        (b"\x81\xa6params\x81", "msgpack"),
        (b"\xde\x00\x10\xa1a", "msgpack"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}   ", "safetensors"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00 {}", "safetensors"),
        (b"GGUF\x03\x00\x00\x00", "gguf"),
        (b"hello", None),
    ],
)
def test_first_bytes(tmp_path, head, name):
    row = find_format(tmp_path / "x", head)
    assert (row and row.name) == name


def test_every_row_is_true():
    for row in FORMATS:
        assert format_for(Path("x" + row.suffixes[0])) is row
        assert getattr(getattr(row.module, row.reader.partition(":")[2]), "format", row.name) == row.name
        assert hasattr(row.module, "WRITER"), row.name


def test_opening_imports_no_framework(tmp_path):
    save(tmp_path / "a.safetensors", "w")
    code = "import sys; from paramend.formats.registry import open_source; open_source(sys.argv[1])\n"
    code += "assert not {'jax', 'torch', 'flax', 'safetensors', 'zipfile'} & sys.modules.keys(), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# ---- of no format ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x", b"", "the file is empty"),
        ("x.safetensors", b"", "the file is empty"),
        ("x", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("x", b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        ("x", b"<!doctype html>", "a web page"),
        ("x", b"hello world, this is text", "are those of a known format"),
        ("x.safetensors", b"hello world, this is text", "its header would be"),
        ("x.safetensors", b"\xff\x00\x00\x00\x00\x00\x00\x00{", "bytes long, but only 1 bytes follow"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadCheckpoint, match=message) as error:
        open_source(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_what_is_not_there(tmp_path):
    save(tmp_path / "model.safetensors", "w")
    (tmp_path / ".modle.safetensors.undo").mkdir()  # nearer, and no model
    with pytest.raises(CannotRead, match=r"no such file or directory\n\nhint: did you mean .*/model\.safetensors\?"):
        open_source(tmp_path / "modle.safetensors")
    with pytest.raises(CannotRead, match="there is no directory"):
        open_source(tmp_path / "no" / "x")
    with pytest.raises(CannotRead):
        open_source(tmp_path / "model.safetensors" / "x")
    with pytest.raises(CannotRead):
        open_source(tmp_path / "x\0y")


def test_directories_without_a_checkpoint(tmp_path):
    with pytest.raises(BadCheckpoint, match="without a checkpoint: it is empty"):
        open_source(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "inner").mkdir()
    save(tmp_path / "inner" / "model.safetensors", "w")
    with pytest.raises(BadCheckpoint, match=r"it holds inner, notes\.txt\n\nhint: .*/inner$"):
        open_source(tmp_path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(BadCheckpoint, match="not a regular file"):
        open_source(tmp_path / "pipe.safetensors")


def test_a_directory_without_permission(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    for call in ("scandir", "listdir"):
        monkeypatch.setattr(os, call, refuse)
    with pytest.raises(CannotRead, match="Permission denied"):
        open_source(tmp_path)


def test_one_file_without_a_suffix_in_a_directory(tmp_path):
    save(tmp_path / "weights", "w")
    assert open_source(tmp_path).index.path(0) == "w"


# ---- directories ---------------------------------------------------------------------------------------------------


def test_the_index_file_opens_the_model(tmp_path):
    save(tmp_path / "a.safetensors", "x", "y")
    save(tmp_path / "b.safetensors", "z")
    path = index(tmp_path, {"x": "a.safetensors", "y": "a.safetensors", "z": "b.safetensors"})
    for opened in (open_source(path), open_source(tmp_path)):
        assert [opened.index.path(n) for n in opened.index.numbers] == ["x", "y", "z"]


def test_tied_tensors_and_those_that_the_index_forgets(tmp_path):
    save(tmp_path / "a.safetensors", "x", "y")
    save(tmp_path / "other.safetensors", "x")  # no part of the model
    index(tmp_path, {"x": "a.safetensors"})
    assert len(open_source(tmp_path).index.numbers) == 2


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ("[]", "a JSON object is expected"),
        ("{", "the text is not JSON"),
        ("", "the text is not JSON"),
        ('{"weight_map": {"x": "a.safetensors", "x": "a.safetensors"}}', "'x' appears twice"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"weight_map": {"x": "a.safetensors"}, "metadata": {"total_size": NaN}}', "NaN is not a JSON number"),
        ('{"weight_map": {"x": "a.safetensors"}, "metadata": []}', "metadata: an object is expected, not an array"),
        ("{}", "weight_map: it is missing"),
        ({}, "it lists no tensors"),
        ({"x": 1}, "weight_map, 'x': a file name is expected, not an integer"),
        ({"x": "../a.safetensors"}, "is not the name of a file beside the index"),
        ({"x": "/etc/passwd"}, "is not the name of a file beside the index"),
        ({"x": "sub/a.safetensors"}, "is not the name of a file beside the index"),
        ({"x": "..\\a.safetensors"}, "is not the name of a file beside the index"),
        ({"x": "C:a"}, "is not the name of a file beside the index"),
        ({"x": ".."}, "is not the name of a file beside the index"),
        ({"x": ""}, "is not the name of a file beside the index"),
        ({"x": "a\0b"}, "is not the name of a file beside the index"),
        ({"x": "gone.safetensors"}, "1 file is missing: gone.safetensors"),
        ({"nope": "a.safetensors"}, "weight_map, 'nope': a.safetensors does not hold it"),
        ({"z": "a.safetensors", "x": "b.safetensors"}, "it is in b.safetensors"),
        ({"x": "a.safetensors", "y": "b.safetensors"}, "does not hold it"),
    ],
)
def test_a_hostile_index(tmp_path, weight_map, message):
    save(tmp_path / "a.safetensors", "x")
    save(tmp_path / "b.safetensors", "z")
    index(tmp_path, weight_map)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BadCheckpoint) as error:
        open_source(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_tensor_in_two_files(tmp_path):
    save(tmp_path / "a.safetensors", "x", "y")
    save(tmp_path / "b.safetensors", "x")
    with pytest.raises(BadCheckpoint, match=r"tensor 'x': it is in two files, a\.safetensors and b\.safetensors"):
        open_source(tmp_path)
    index(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"})
    with pytest.raises(BadCheckpoint, match="is in two files"):
        open_source(tmp_path)


def test_several_models_in_one_directory(tmp_path):
    for kind in ("fp16", "fp32"):
        (tmp_path / f"diffusion.{kind}.safetensors.index.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match="it holds 2 models"):
        open_source(tmp_path)
    save(tmp_path / "a.safetensors", "x")
    index(tmp_path, {"x": "a.safetensors"})
    assert open_source(tmp_path).index.path(0) == "x"


def test_a_damaged_shard_is_named(tmp_path):
    save(tmp_path / "a.safetensors", "x")
    save(tmp_path / "b.safetensors", "y")
    os.truncate(tmp_path / "b.safetensors", 70)
    with pytest.raises(BadCheckpoint, match=r"b\.safetensors: data: the file is cut short"):
        open_source(tmp_path)


def test_shards_give_their_descriptors_back(tmp_path):
    for i in range(100):
        save(tmp_path / f"{i:03}.safetensors", f"w{i}")
    opened = open_source(tmp_path)
    count = len(list(Path("/proc/self/fd").iterdir()))
    for number in opened.index.numbers:
        assert opened.read_range(number, 0, 2).tolist() == [1, 1]
    assert len(list(Path("/proc/self/fd").iterdir())) <= count + 64
    opened.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == count


def test_a_shard_that_was_replaced_since(tmp_path):
    save(tmp_path / "a.safetensors", "x")
    opened = open_source(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    save(tmp_path / "a.safetensors", "x")
    os.utime(tmp_path / "a.safetensors", (1, 1))
    with pytest.raises(BadCheckpoint, match="another program changed it since it was opened"):
        opened.read(0)


# ---- whatever the bytes ------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        '{"weight_map": {"x": "a.safetensors"}}',
        '"metadata"',
        "null",
        "..",
        "/",
        "\\u0000",
        "\\ud800",
        "[" * 50,
        "{",
        "}",
        ":",
        ",",
        "1e999",
        "-0",
        '"x"',
    ]
)


@given(st.lists(PIECES, max_size=6).map("".join), st.binary(max_size=20))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_errors_of_our_own_come_out(tmp_path, text, noise):
    save(tmp_path / "a.safetensors", "x")
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text.encode(errors="surrogatepass") + noise)
    (tmp_path / "weights").write_bytes(noise)
    for opener in (read_index, open_source):
        for target in (path, tmp_path / "weights"):
            with contextlib.suppress(ParamendError):
                opener(target)


def test_zip_files_of_neither_kind(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(ParamendError):
        open_source(tmp_path / "x.zip")


# ---- the docs ----------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
TABLE = re.compile(r"<!-- formats -->\n(.*?)<!-- /formats -->", re.DOTALL)


def formats_table() -> str:
    rows = [
        "| format | what it is | read | written | patched | kept besides leaves |",
        "|---|---|---|---|---|---|",
    ]
    for row in FORMATS:
        read = f"with `paramend[{row.extra}]`" if row.extra else "yes"
        rows.append(f"| {row.name} | {row.says} | {read} | yes | yes | {row.keeps} |")
    return "\n".join(rows)


def test_the_table_of_formats_is_true():
    found = TABLE.search(PAGE.read_text())
    assert found and found[1] == formats_table() + "\n", f"run `python {Path(__file__).relative_to(PAGE.parents[1])}`"


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: f"<!-- formats -->\n{formats_table()}\n<!-- /formats -->", PAGE.read_text()))
