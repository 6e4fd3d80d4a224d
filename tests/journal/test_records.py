"""Undo records: what they say, and that a damaged one is told from a sound one before anything is written."""

import json
import os
import random
import struct

import numpy as np
import pytest
import safetensors.numpy

import paramend as pm
from paramend.checkpoints.patching import patch
from paramend.errors import BadCheckpoint, ParamendError
from paramend.journal.ranges import Ranges, witness
from paramend.journal.records import DONE, PENDING, Record
from paramend.journal.store import UndoStore
from paramend.journal.undo import drop, history, recover, undo


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.arange(6.0), "b": np.arange(4.0), "c": np.ones((3, 2000), "float32")}, path)
    return path


@pytest.fixture
def record(model):
    """A model with one patch, and the record of that."""
    patch(model, lambda t: pm.at(pm.at(t, "b").fill(2), "c")[:, 0].zero())
    (path,) = UndoStore(model).records(DONE)
    return path


def test_a_record_says_what_was_done(model, record):
    with Record(record) as found:
        assert (found.number, found.state, found.nbytes) == (1, "done", record.stat().st_size)
        assert sorted((path, found.head.edits[edit]) for path, edit in found.head.rows) == [
            ("b", "fill(2)"),
            ("c", "[:, 0] zero()"),
        ]
        assert found.head.files == ("model.safetensors",)
        found.check()
        old = {}
        for _, lines, data in found.old_bytes():
            at = 0
            for row, _, start, stop in lines.tolist():
                old[row, start] = bytes(data[at : at + stop - start])
                at += stop - start
        names = [path for path, _ in found.head.rows]
        at_b = names.index("b")
        assert [data for (row, _), data in old.items() if row == at_b] == [np.arange(4.0).tobytes()]
        assert [data for (row, _), data in old.items() if row != at_b] == [np.float32(1).tobytes()] * 3
        assert found.ranges.nbytes == 32 + 12
        (state,) = found.states
        assert state.size == model.stat().st_size
        assert len(found.after) == 3


def test_a_record_is_small_and_lies_beside_the_file(model, record):
    assert record == model.parent / ".model.safetensors.undo" / "000001.done"
    assert record.stat().st_size < 1500
    assert sorted(file.name for file in record.parent.iterdir()) == ["000001.done", "lock"]


def test_a_record_has_the_permissions_of_the_file(model):
    model.chmod(0o600)
    patch(model, lambda t: pm.at(t, "a").zero())
    assert UndoStore(model).records(DONE)[0].stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("state", [DONE, PENDING])
def test_any_damaged_byte_is_found_before_anything_is_written(model, record, state):
    sound, before = record.read_bytes(), model.read_bytes()
    path = record.with_suffix(f".{state}")
    record.rename(path)
    rng = random.Random(0)
    # What stands after DONE's start does not matter to a record that is pending: it may be cut short there.
    ends = len(sound) if state == DONE else sound.index(b"DONE")
    for at in rng.sample(range(ends), 250):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << rng.randrange(8)]) + sound[at + 1 :])
        with pytest.raises(BadCheckpoint, match="the undo record is damaged"):
            undo(model)
        assert model.read_bytes() == before


@pytest.mark.parametrize("state", [DONE, PENDING])
def test_a_record_that_is_cut_short_is_found(model, record, state):
    sound, before = record.read_bytes(), model.read_bytes()
    path = record.with_suffix(f".{state}")
    record.rename(path)
    ends = len(sound) if state == DONE else sound.index(b"DONE")
    for length in [*range(0, ends, 7), ends - 1]:
        path.write_bytes(sound[:length])
        with pytest.raises(BadCheckpoint, match=r"damaged.*\n\nhint: paramend undo PATH --drop"):
            undo(model)
        assert model.read_bytes() == before
    for action in (recover, history) if state == PENDING else (history,):
        with pytest.raises(BadCheckpoint):
            action(model)
    assert drop(model) == [path]
    assert not UndoStore(model).folder.exists() and model.read_bytes() == before


def framed(kind, payload):
    import hashlib

    data = struct.pack("<4sQ", kind, len(payload)) + payload
    return data + hashlib.sha256(data).digest()


HEAD = {"time": 0, "edits": ["zero()"], "rows": [["a", 0]], "files": ["model.safetensors"]}


@pytest.mark.parametrize(
    "change",
    [
        {"files": ["../other"]},
        {"files": ["/etc/passwd"]},
        {"files": ["model.safetensors", "other.safetensors"]},
        {"files": []},
        {"files": ["a\0b"]},
        {"rows": [["a", 7]]},
        {"rows": [["a"]]},
        {"time": "soon"},
        {"time": 1e300},
        {"edits": 3},
    ],
    ids=str,
)
def test_hostile_heads_are_refused(model, change):
    before = model.read_bytes()
    store = UndoStore(model).folder
    store.mkdir()
    files = json.dumps([{"size": len(before), "witness": ""}]).encode()
    span = struct.pack("<Q4q", 1, 0, 0, 8, 16) + b"hostile!"
    body = framed(b"HEAD", json.dumps(HEAD | change).encode()) + framed(b"FILE", files) + framed(b"SPAN", span)
    (store / "000001.done").write_bytes(b"PMUNDO1\n" + body + framed(b"DONE", bytes(64)))
    for force in (False, True):
        with pytest.raises(BadCheckpoint):
            undo(model, force=force)
    assert model.read_bytes() == before


@pytest.mark.parametrize(
    "table",
    [
        [0, 0, -8, 0],
        [0, 0, 16, 8],
        [0, 1, 8, 16],
        [1, 0, 8, 16],
        [-2, 0, 8, 16],
        [0, 0, 8, 17],
        [0, 0, 0, 2**62],
    ],
    ids=str,
)
def test_hostile_ranges_are_refused(model, table):
    before = model.read_bytes()
    store = UndoStore(model).folder
    store.mkdir()
    files = json.dumps([{"size": len(before), "witness": ""}]).encode()
    span = struct.pack("<Q4q", 1, *table) + b"hostile!"
    body = framed(b"HEAD", json.dumps(HEAD).encode()) + framed(b"FILE", files) + framed(b"SPAN", span)
    (store / "000001.done").write_bytes(b"PMUNDO1\n" + body + framed(b"DONE", bytes(64)))
    for force in (False, True):
        with pytest.raises(BadCheckpoint, match="its table of ranges is invalid"):
            undo(model, force=force)
    assert model.read_bytes() == before


def test_random_bytes_are_no_record(model):
    store = UndoStore(model).folder
    store.mkdir()
    before, rng = model.read_bytes(), random.Random(1)
    for n in range(200):
        data = rng.randbytes(rng.randrange(200))
        (store / "000001.done").write_bytes(data if n % 2 else b"PMUNDO1\n" + data)
        with pytest.raises(ParamendError):
            undo(model)
    (store / "000001.done").write_bytes(b"PMUNDO2\nfuture")
    with pytest.raises(BadCheckpoint, match="a newer Paramend wrote it"):
        undo(model)
    assert model.read_bytes() == before


def test_a_record_that_is_a_link_or_a_pipe_is_refused(model, record, tmp_path):
    before = model.read_bytes()
    record.rename(tmp_path / "elsewhere")
    record.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ParamendError):
        undo(model)
    record.unlink()
    os.mkfifo(record)
    with pytest.raises(BadCheckpoint, match="not a regular file"):
        undo(model)
    assert model.read_bytes() == before


def test_a_store_that_is_a_link_is_refused(model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    UndoStore(model).folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ParamendError, match="is not a folder"):
        patch(model, lambda t: pm.at(t, "a").zero())


def test_other_files_in_the_store_are_left_alone(model, record):
    (record.parent / "notes.txt").write_text("mine")
    (record.parent / "000002.partial").write_text("half a record")
    undo(model)
    assert [file.name for file in record.parent.iterdir() if file != record.parent / "lock"] == ["notes.txt"]


def test_numbers_go_up(model, record):
    assert UndoStore(model).next_path().name == "000002.partial"
    record.rename(record.with_name("000999.done"))
    patch(model, lambda t: pm.at(t, "a").zero())
    assert [row.number for row in history(model)] == [999, 1000]


def test_the_witness_sees_what_is_around_the_spans(tmp_path):
    path = tmp_path / "f"
    data = bytes(random.Random(0).randbytes(1 << 16))
    path.write_bytes(data)
    ranges = Ranges(np.array([[0, 0, 100, 300], [0, 0, 250, 4000], [0, 1, 0, 50], [1, 0, 9000, 60000]]))

    def seen(data):
        path.write_bytes(data)
        with path.open("rb") as file:
            return witness(file.fileno(), len(data), ranges, 0)

    before = seen(data)
    for at in (100, 299, 3999, 9000, 59999):
        assert seen(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) == before
    for at in (0, 99, 4000, 8999, 60000, 65535):
        assert seen(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]) != before
