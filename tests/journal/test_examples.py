"""Examples of what the functions of journal/ give."""

import os
import tempfile
from pathlib import Path

import numpy as np

from paramend.checkpoints.patching import patch
from paramend.checkpoints.whole import save
from paramend.edits.selection import at
from paramend.journal.claims import end, read, seal
from paramend.journal.history import table
from paramend.journal.ranges import Ranges, witness
from paramend.journal.store import UndoStore
from paramend.journal.undo import drop, history


def test_read():
    store = Path(tempfile.mkdtemp())
    assert (read(store), seal(store, "1 300 abc"), read(store), end(store), read(store)) == (
        None,
        None,
        "1 300 abc",
        None,
        None,
    )


def test_witness():
    with tempfile.TemporaryFile() as file:
        ranges = Ranges(np.array([[0, 0, 2, 4]]))
        before = file.write(b"abcdef"), file.flush(), witness(file.fileno(), 6, ranges, 0)
        between = os.pwrite(file.fileno(), b"XY", 2), witness(file.fileno(), 6, ranges, 0)
        after = os.pwrite(file.fileno(), b"Z", 1), witness(file.fileno(), 6, ranges, 0)
    assert (before[2] == between[1], between[1] == after[1]) == (True, False)


def test_undo_store(capsys):
    store = UndoStore(Path("models/model.safetensors"))
    print(store.folder, store.home)
    assert capsys.readouterr().out == "models/.model.safetensors.undo models\n"


def test_drop():
    path = Path(tempfile.mkdtemp(), "model.safetensors")
    save({"a": np.ones(2), "b": np.ones(2)}, path)
    patch(path, lambda t: at(t, "a").zero()), patch(path, lambda t: at(t, "b").fill(2))
    assert ([row.edit for row in drop(path, keep=1)], [row.edit for row in history(path)]) == (
        ["zero() at a"],
        ["fill(2) at b"],
    )


def test_table():
    assert table([]) == ["no patches: nothing to take back"]


def test_undo_store_of():
    assert str(UndoStore.of("models/model.safetensors.index.json").base) == "models"
