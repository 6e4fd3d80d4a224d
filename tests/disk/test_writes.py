"""Every write of every writer goes wrong in turn: what comes out is right, or it is the old state and an error."""

import ast
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import paramend as pm
from paramend.disk.io import put
from paramend.errors import CannotWrite

SOURCE = Path(__file__).parents[2] / "src" / "paramend"
CALLS = ("write", "pwrite", "copy_file_range", "sendfile")


# ---- one place writes ----------------------------------------------------------------------------------------------

SYSTEM = {*CALLS, "writev", "pwritev", "splice", "ioctl"}
OTHERS = {"write_text", "write_bytes", "copyfile", "copyfileobj", "copy2", "copytree", "tofile", "savez", "save_file"}
WRITES = frozenset("wax+")


def ways_to_write(source: str) -> list[str]:
    """The calls of a program that write into a file, or open one for writing."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        texts = [
            one.value for one in node.args + [each.value for each in node.keywords] if isinstance(one, ast.Constant)
        ]
        modes = [text for text in texts if type(text) is str and text and set(text) <= set("rwaxbt+")]
        if (owner in ("os", "fcntl") and name in SYSTEM) or name in OTHERS:
            found.append(name)
        elif name in ("open", "fdopen", "FileIO") and any(WRITES & set(mode) for mode in modes) and owner != "archive":
            found.append("open")
    return found


def test_one_file_writes():
    found = {
        str(file.relative_to(SOURCE)): ways
        for file in SOURCE.rglob("*.py")
        if (ways := ways_to_write(file.read_text()))
    }
    assert sorted(found.pop("disk/io.py")) == ["pwrite", "write"]
    assert sorted(found.pop("disk/copying.py")) == ["copy_file_range", "ioctl", "sendfile"]
    assert found.pop("cli/_ui.py") == ["open"]  # of /dev/null, when whoever reads the output is gone
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "os.write(1, b'')",
        "os.pwrite(1, b'', 0)",
        "path.write_text('')",
        "path.open('r+b')",
        "open(path, mode='ab')",
        "shutil.copyfile(a, b)",
        "os.fdopen(1, 'wb')",
    ],
)
def test_a_way_to_write_is_seen(source):
    assert ways_to_write(source)
    assert not ways_to_write("open(path, 'rb'), path.open(), archive.open(info, 'w'), os.open(path, os.O_WRONLY)")


def test_a_write_of_nothing_is_an_error(tmp_path, monkeypatch):
    with (tmp_path / "x").open("wb") as file:
        for name in ("write", "pwrite"):
            with monkeypatch.context() as patched:
                patched.setattr(os, name, lambda *args: 0)
                with pytest.raises(OSError, match="wrote nothing"):
                    put(file.fileno(), b"ab", 0 if name == "pwrite" else None)


# ---- every write in turn -------------------------------------------------------------------------------------------


class Faults:
    """Counts the writes of a program. The one that is asked for goes wrong, and if it lasts, all after it do."""

    def __init__(self, monkeypatch, at, how):
        self.count, self.at, self.how = 0, at, how
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name, real):
        def run(*args, **options):
            self.count += 1
            if self.count == self.at and self.how == "short":
                if name in ("write", "pwrite"):
                    return real(args[0], memoryview(args[1])[: max(len(args[1]) // 2, 1)], *args[2:])
                place = 2 if name == "copy_file_range" else 3
                return real(*args[:place], max(args[place] // 2, 1), *args[place + 1 :], **options)
            if self.count == self.at or (self.count > self.at > 0 and self.how == "lasting"):
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **options)

        return run


LEAVES = {"a.weight": (40, "float32"), "a.bias": (6, "float32"), "b.weight": (50, "float16"), "b.ids": (7, "int32")}


def tree():
    return {name: np.arange(size).astype(dtype) for name, (size, dtype) in LEAVES.items()}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A checkpoint of each format."""
    folder = tmp_path_factory.mktemp("template")
    safetensors.numpy.save_file(tree(), folder / "x.safetensors")
    torch.save({"model": {key: torch.from_numpy(value) for key, value in tree().items()}, "epoch": 3}, folder / "x.pt")
    np.savez(folder / "x.npz", **tree())
    with __import__("zipfile").ZipFile(folder / "x.npz", "a") as file:
        file.writestr("notes.txt", "hello")
    pm.save({"a": {"w": np.ones(9, "float32")}, "b": np.ones(3, "float32")}, folder / "x.msgpack")
    pm.save(tree(), folder / "x.orbax")
    for kind in ("shards", "torch shards"):
        (folder / kind).mkdir()
        names = list(LEAVES)
        weight_map = {}
        for n in range(2):
            part = {name: tree()[name] for name in names[n::2]}
            file = f"part-{n}.bin" if "torch" in kind else f"part-{n}.safetensors"
            weight_map |= dict.fromkeys(part, file)
            if "torch" in kind:
                torch.save({name: torch.from_numpy(value) for name, value in part.items()}, folder / kind / file)
            else:
                safetensors.numpy.save_file(part, folder / kind / file)
        index = "pytorch_model.bin.index.json" if "torch" in kind else "model.safetensors.index.json"
        (folder / kind / index).write_text(json.dumps({"metadata": {"total_size": 312}, "weight_map": weight_map}))
        (folder / kind / "config.json").write_text('{"a": 1}')
    (folder / "single").mkdir()
    safetensors.numpy.save_file(tree(), folder / "single" / "model.safetensors")
    pm.save({"old": np.zeros(3)}, folder / "out.safetensors")
    return folder


def edit(checkpoint):
    return pm.at(checkpoint, "**/*{w,weight}").add(1)


def inserted(checkpoint):
    return pm.insert(checkpoint, {"new": {"w": np.arange(30.0)}}, "**")[0]


def respecified(checkpoint):
    return pm.at(pm.at(edit(checkpoint), "**/{bias,b}").rename("**/x{bias,b}"), "**/{weight,w}").cast("float64")


REWRITES = {
    "safetensors": ("x.safetensors", edit, "out.safetensors", {}),
    "safetensors, a record": ("x.safetensors", edit, "out.safetensors", {"record": True}),
    "shards": ("shards", edit, "out", {}),
    "shards, an index": ("shards", respecified, "out", {}),
    "shards, a record": ("shards", edit, "out", {"record": True}),
    "shards, a leaf more": ("shards", inserted, "out", {}),
    "new shards": ("x.safetensors", edit, "out/", {"max_shard_size": "120B"}),
    "torch": ("x.pt", edit, "out.pt", {}),
    "torch, moved": ("x.pt", respecified, "out.pt", {}),
    "torch, a record": ("x.pt", edit, "out.pt", {"record": True}),
    "torch shards": ("torch shards", respecified, "out", {}),
    "npz": ("x.npz", edit, "out.npz", {}),
    "msgpack": ("x.msgpack", edit, "out.msgpack", {}),
    "to torch": ("x.safetensors", edit, "out.pt", {}),
    "to npz": ("x.safetensors", respecified, "out.npz", {}),
    "to msgpack": ("x.safetensors", edit, "out.msgpack", {}),
    "to Orbax": ("x.safetensors", edit, "out.orbax", {}),
    "Orbax, a copy": ("x.orbax", edit, "out.orbax", {}),
    "Orbax, anew": ("x.orbax", respecified, "out.orbax", {}),
}


def seen(folder):
    """All files, by their bytes; of Orbax, whose files have random names and times, and of records, what they say."""
    found = {}
    for path in (path for path in sorted(folder.iterdir()) if path.name[0] != "."):
        orbax = path.suffix == ".orbax"
        if orbax:
            found[path.name] = {name: leaf.tolist() for name, leaf in pm.load(path, nested=False).items()}
        if not path.name.endswith(".json") and pm.record(path) is not None:
            pm.verify_record(path)
            leaves = [(leaf.path, leaf.edit, leaf.sha256) for leaf in pm.record(path).leaves]
            arrays = {name: leaf.tobytes() for name, leaf in pm.load(path, nested=False).items()}
            found[path.name] = leaves, arrays
        elif path.is_file() and not path.name.endswith(".record.json"):
            found[path.name] = path.read_bytes()
        elif path.is_dir() and not orbax:
            files = (file for file in path.rglob("*") if file.is_file())
            found[path.name] = {str(file.relative_to(path)): file.read_bytes() for file in files}
    return found


def everywhere(template, tmp_path, monkeypatch, names, begin, job, how):
    """(folder, state before, right state, error or None) for each write of a job that goes wrong."""

    def run(folder, at):
        folder.mkdir()
        for name in names:
            copy = shutil.copytree if (template / name).is_dir() else shutil.copyfile
            copy(template / name, folder / name)
        begin(folder)
        before, error = seen(folder), None
        with monkeypatch.context() as patched:
            faults = Faults(patched, at, how)
            try:
                job(folder)
            except CannotWrite as caught:
                error = caught
        return before, error, faults.count

    _, error, total = run(tmp_path / "right", 0)
    assert error is None and total > 0
    right = seen(tmp_path / "right")
    for at in range(1, total + 1):
        folder = tmp_path / "run"
        before, error, _ = run(folder, at)
        yield folder, before, right, error
        shutil.rmtree(folder)


@pytest.mark.parametrize("how", ["short", "once", "lasting"])
@pytest.mark.parametrize("case", REWRITES, ids=str)
def test_a_rewrite_is_right_or_was_not_done(template, tmp_path, monkeypatch, case, how):
    name, change, out, options = REWRITES[case]
    names = [name, "out.safetensors"]

    def job(folder):
        change(pm.open(folder / name)).save(f"{folder}/{out}", force=True, **options)

    for folder, before, right, error in everywhere(
        template, tmp_path, monkeypatch, names, lambda folder: None, job, how
    ):
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        beside = error is not None and f"{out}.record.json" in str(error)  # the file is there, and its record is not
        if error is None or beside:
            assert (seen(folder).keys() if beside else seen(folder)) == (right.keys() if beside else right)
        else:
            assert "the disk is full" in str(error)
            assert seen(folder) == before
        assert error is None or how != "short"


PATCHES = {
    name: (name, edit) for name in ("x.safetensors", "shards", "x.pt", "torch shards", "x.npz", "x.msgpack", "x.orbax")
}
PATCHES |= {"shards, a leaf more": ("shards", inserted), "one file, a leaf more": ("single", inserted)}


@pytest.mark.parametrize("how", ["short", "once", "lasting"])
@pytest.mark.parametrize("case", PATCHES)
def test_a_patch_is_right_or_was_not_done(template, tmp_path, monkeypatch, case, how):
    name, change = PATCHES[case]

    def job(folder):
        pm.patch(folder / name, change)

    for folder, before, right, error in everywhere(
        template, tmp_path, monkeypatch, [name], lambda folder: None, job, how
    ):
        pm.open(folder / name).close()  # puts back what could not be put back at once
        assert visible(folder, name) == visible_of(before if error else right, name)
        assert len(pm.history(folder / name)) == (error is None)
        assert error is None or how != "short"


@pytest.mark.parametrize("how", ["short", "once", "lasting"])
@pytest.mark.parametrize("case", PATCHES)
def test_an_undo_is_right_or_is_done_by_the_next(template, tmp_path, monkeypatch, case, how):
    name, change = PATCHES[case]

    def begin(folder):
        pm.patch(folder / name, change)

    def job(folder):
        pm.undo(folder / name)

    for folder, before, right, error in everywhere(template, tmp_path, monkeypatch, [name], begin, job, how):
        pm.open(folder / name).close()
        found = visible(folder, name)
        assert found in ([visible_of(before, name)] if error else []) + [visible_of(right, name)]
        if pm.history(folder / name):
            pm.undo(folder / name)
        assert visible(folder, name) == visible_of(right, name)
        assert error is None or how != "short"


def visible(folder, name):
    return visible_of(seen(folder), name)


def visible_of(state, name):
    """The checkpoint without its undo records."""
    found = state[name]
    return {key: data for key, data in found.items() if ".undo" not in key} if isinstance(found, dict) else found
