"""Checkpoints that are copied, pickled, sent to other processes or closed: never another file's bytes."""

import copy
import json
import multiprocessing
import os
import pickle
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import paramend as pm
from paramend.errors import BadCheckpoint, CannotRead, ParamendError, Unsupported
from paramend.formats.files import OpenFile

MINE, OTHER = np.arange(6, dtype="float32"), np.full(6, -1.0, "float32")


def make(folder, kind):
    """A checkpoint with the leaves a and b of 6 numbers each."""
    tree = {"a": MINE, "b": MINE + 10}
    if kind == "shards":
        (folder / "x").mkdir()
        for name in tree:
            safetensors.numpy.save_file({name: tree[name]}, folder / "x" / f"{name}.safetensors")
        table = {"weight_map": {name: f"{name}.safetensors" for name in tree}}
        (folder / "x" / "model.safetensors.index.json").write_text(json.dumps(table))
        return folder / "x"
    if kind == "torch":
        torch = pytest.importorskip("torch")
        torch.save(OrderedDict({name: torch.from_numpy(value) for name, value in tree.items()}), folder / "x.pt")
        return folder / "x.pt"
    if kind in ("npz", "compressed"):
        (np.savez if kind == "npz" else np.savez_compressed)(folder / "x.npz", **tree)
        return folder / "x.npz"
    path = folder / f"x.{kind}"
    pm.save(tree, path)
    return path


KINDS = ["safetensors", "shards", "torch", "npz", "compressed", "msgpack", "orbax"]


def pickled(value):
    return pickle.loads(pickle.dumps(value))


WAYS = {"deepcopy": copy.deepcopy, "pickle": pickled, "copy": copy.copy}


@pytest.fixture(params=KINDS)
def path(request, tmp_path):
    return make(tmp_path, request.param)


def strangers(folder, count=40):
    """Files that are opened now: they take whatever descriptor numbers are free."""
    path = folder / "stranger.bin"
    path.write_bytes(OTHER.tobytes() * 1000)
    return [OpenFile(path) for _ in range(count)]


def parts(checkpoint):
    return checkpoint.read(0).tolist(), checkpoint.source.read_range(1, 2, 5).tolist()


RIGHT = MINE.tolist(), (MINE + 10)[2:5].tolist()


# ---- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("warm", [False, True])
def test_a_copy_reads_its_own_file(path, tmp_path, way, warm):
    checkpoint = pm.open(path)
    if warm:
        assert parts(checkpoint) == RIGHT
    twin = WAYS[way](checkpoint)
    others = strangers(tmp_path)
    assert parts(twin) == parts(checkpoint) == RIGHT
    assert [twin.index.path(n) for n in twin.index.numbers] == ["a", "b"] and twin.format == checkpoint.format
    assert len(others) == 40


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_each_is_closed_by_itself(path, tmp_path, way):
    checkpoint = pm.open(path)
    twin = WAYS[way](checkpoint)
    checkpoint.close()
    others = strangers(tmp_path)
    assert parts(twin) == RIGHT
    twin.close()
    del others
    again = pm.open(path)
    del WAYS[way](again).source
    assert parts(again) == RIGHT


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_refuses_another_file(path, way):
    checkpoint = pm.open(path)
    twin = WAYS[way](checkpoint)
    inside = [file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    for file in inside:
        data = file.read_bytes()
        file.unlink()
        file.with_name(f"{file.name}.new").write_bytes(data)
        file.with_name(f"{file.name}.new").rename(file)
        os.utime(file, (1, 1))
    for number in (0, 1):
        with pytest.raises(BadCheckpoint, match=r"opened; nothing was written\n\nhint: open the checkpoint again"):
            twin.read(number)
        with pytest.raises(BadCheckpoint, match="changed it since it was opened"):
            twin.source.read_range(number, 0, 2)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_of_a_file_that_is_gone(path, way):
    twin = WAYS[way](pm.open(path))
    path.rename(path.with_name("gone"))
    with pytest.raises((CannotRead, BadCheckpoint)):
        twin.read(0)


@pytest.mark.parametrize("way", WAYS)
def test_an_edited_copy_keeps_its_plan(path, tmp_path, way):
    edited = pm.at(pm.open(path), "a")[2:].fill(7)
    edited = pm.at(pm.at(edited, "b").add(np.ones(6, "float32")), "b").cast("float64")
    edited = pm.at(edited, "b").rename("c")
    twin = WAYS[way](edited)
    others = strangers(tmp_path)
    assert str(twin.plan) == str(edited.plan)
    pm.save(twin, tmp_path / "out.safetensors")
    found = pm.load(tmp_path / "out.safetensors")
    assert found["a"].tolist() == [0, 1, 7, 7, 7, 7]
    assert found["c"].dtype == "float64" and found["c"].tolist() == (MINE + 11).tolist()
    more = pm.at(twin, "a").zero()
    assert not more["a"].any() and twin["a"].any() and len(others) == 40


@pytest.mark.parametrize("way", WAYS)
def test_a_selection_is_copied_with_its_checkpoint(path, tmp_path, way):
    selection = pm.at(pm.open(path), "b")[1:3]
    twin = WAYS[way](selection)
    others = strangers(tmp_path)
    assert twin.one().tolist() == [11, 12] and twin.fill(0)["b"].tolist() == [10, 0, 0, 13, 14, 15]
    assert len(others) == 40


@pytest.mark.parametrize("way", WAYS)
def test_leaves_of_other_checkpoints_come_along(path, tmp_path, way):
    (tmp_path / "donor").mkdir()
    pm.save({"a": MINE * 2, "d": MINE}, tmp_path / "donor" / "d.safetensors")
    donor = pm.open(tmp_path / "donor" / "d.safetensors")
    target = pm.open(path)
    grafted, _ = pm.graft(target, donor, only="a", unused="ok")
    twin = WAYS[way](grafted)
    if way != "copy":
        donor.close()
        target.close()
    others = strangers(tmp_path)
    assert twin["a"].tolist() == (MINE * 2).tolist() and twin["b"].tolist() == (MINE + 10).tolist()
    assert len(others) == 40


@pytest.mark.parametrize("way", WAYS)
def test_a_gathered_checkpoint(tmp_path, way):
    layers = {f"layers.{i}.w": np.full((2, 2), i, "float32") for i in range(3)}
    pm.save(layers, tmp_path / "x.safetensors")
    deeper, _ = pm.deepen(pm.open(tmp_path / "x.safetensors"), order=[0, 1, 2, 0, 1, 2], identity=None)
    twin = WAYS[way](deeper)
    others = strangers(tmp_path)
    assert [float(twin.read(n).flat[0]) for n in twin.index.numbers] == [0, 1, 2, 0, 1, 2]
    assert len(others) == 40


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_layers(tmp_path, way, axis):
    layers = {f"layers.{i}.w": np.full((2, 2), i, "float32") for i in range(3)}
    pm.save(layers, tmp_path / "x.safetensors")
    stacked = pm.stack_layers(pm.open(tmp_path / "x.safetensors"), "layers.<n>", axis=axis)
    twin = WAYS[way](stacked)
    if way != "copy":
        stacked.close()
    others = strangers(tmp_path)
    assert (twin.read(twin.index.numbers[0]) == np.stack(list(layers.values()), axis)).all() and len(others) == 40


def test_leaves_that_are_made_of_memory_go_along(tmp_path):
    pm.save({"a": MINE, "b": MINE}, tmp_path / "x.safetensors")
    grafted, _ = pm.graft(pm.open(tmp_path / "x.safetensors"), {"a": MINE.astype("float64") * 3})
    for twin in (copy.deepcopy(grafted), pickle.loads(pickle.dumps(grafted))):
        assert twin["a"].tolist() == (MINE * 3).tolist() and twin["b"].tolist() == MINE.tolist()


def test_functions_of_a_plan(tmp_path):
    pm.save({"a": MINE}, tmp_path / "x.safetensors")
    checkpoint = pm.open(tmp_path / "x.safetensors")
    named, nameless = pm.at(checkpoint, "a").apply(np.negative), pm.at(checkpoint, "a").apply(lambda x: x * 2)
    assert pickle.loads(pickle.dumps(named))["a"].tolist() == (-MINE).tolist()
    assert copy.deepcopy(nameless)["a"].tolist() == (MINE * 2).tolist()
    with pytest.raises(
        Unsupported, match=r"cannot be pickled: a is edited by apply\(.*lambda.*\n\nhint: .*`def`.*save\(out\)"
    ):
        pickle.dumps(nameless)
    nameless.save(tmp_path / "out.safetensors")
    twin = pickle.loads(pickle.dumps(pm.open(tmp_path / "out.safetensors")))
    assert twin["a"].tolist() == (MINE * 2).tolist()


def test_a_program_that_went_to_another_folder(tmp_path, monkeypatch):
    pm.save({"a": MINE}, tmp_path / "x.safetensors")
    monkeypatch.chdir(tmp_path)
    twin = pickle.loads(pickle.dumps(pm.open("x.safetensors")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pm.save({"a": OTHER}, tmp_path / "elsewhere" / "x.safetensors")
    assert twin["a"].tolist() == MINE.tolist()


# ---- closed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
def test_what_is_closed_says_so(path, tmp_path, warm):
    checkpoint = pm.open(path)
    kept = checkpoint.read(0) if warm else MINE
    edited = pm.at(checkpoint, "a").add(1)
    checkpoint.close()
    checkpoint.close()
    others = strangers(tmp_path)
    for job in (
        lambda: checkpoint.read(0),
        lambda: checkpoint.source.read_range(1, 0, 2),
        lambda: edited["a"],
        lambda: copy.deepcopy(checkpoint).read(0),
        lambda: pickle.loads(pickle.dumps(checkpoint)).read(1),
    ):
        with pytest.raises(ParamendError, match=r"is closed\n\nhint: pm\.open\("):
            job()
    assert kept.tolist() == MINE.tolist() and len(others) == 40  # arrays that were read stay


def test_a_descriptor_is_given_back_when_nobody_reads_by_it(tmp_path):
    """Threads read while others close and open: the number of a descriptor is another file's soon."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.write_bytes(b"m" * 4096)
    other.write_bytes(b"o" * 4096)
    stop, wrong = threading.Event(), []

    def read(file):
        while not stop.is_set():
            data = file.read(0, 64)
            if data != b"m" * 64:
                wrong.append(data)

    files = [OpenFile(mine) for _ in range(3)]
    readers = [threading.Thread(target=read, args=(file,)) for file in files]
    for reader in readers:
        reader.start()
    for _ in range(2000):
        for file in files:
            file.release()
        OpenFile(other).read(0, 1)
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong


def test_a_reader_keeps_the_descriptor_that_it_reads_by(tmp_path, monkeypatch):
    (tmp_path / "mine").write_bytes(b"m" * 64)
    (tmp_path / "other").write_bytes(b"o" * 64)
    file, real, others = OpenFile(tmp_path / "mine"), os.pread, []

    def closed_in_between(number, *args):
        file.close()
        others.append(OpenFile(tmp_path / "other"))
        return real(number, *args)

    monkeypatch.setattr(os, "pread", closed_in_between)
    assert file.read(0, 8) == b"m" * 8
    count = len(list(Path("/proc/self/fd").iterdir()))
    others.clear()
    assert len(list(Path("/proc/self/fd").iterdir())) == count - 1


# ---- other processes -----------------------------------------------------------------------------------------------


def first(checkpoint):
    return checkpoint.read(0).tolist(), checkpoint.source.read_range(1, 2, 5).tolist()


def test_spawned_processes(path, tmp_path):
    checkpoint = pm.open(path)
    edited = pm.at(checkpoint, "a").apply(np.negative)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(first, (checkpoint,)) == RIGHT
        assert pool.apply(first, (edited,))[0] == (-MINE).tolist()


@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "orbax"])  # whose threads do not come along
def test_a_fork_reads_the_same_files(tmp_path, kind):
    checkpoint = pm.open(make(tmp_path, kind))
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.read(ready[0], 1)
        right = False
        try:
            right = parts(checkpoint) == RIGHT
            checkpoint.close()
        finally:
            os.write(done[1], b"y" if right else b"n")
            os._exit(0)
    twin = copy.deepcopy(checkpoint)
    checkpoint.close()
    others = strangers(tmp_path)
    os.write(ready[1], b"x")
    assert os.read(done[0], 1) == b"y"
    os.waitpid(child, 0)
    assert parts(twin) == RIGHT and len(others) == 40
    for number in (*ready, *done):
        os.close(number)
