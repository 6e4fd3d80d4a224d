"""Nothing stays open, mapped, locked or half written when a verb is done, or fails; and memory does not grow."""

import contextlib
import errno
import os
import subprocess
import tempfile
import threading

import numpy as np
import pytest

import paramend as pm
from paramend.journal.store import UndoStore
from paramend.journal.undo import drop
from support.kinds import make_file, make_npz, make_shards
from support.leaks import MANY, fails, grows, leaving_nothing, without_match


@pytest.fixture
def desk(tmp_path):
    """Two models in directories, a file, and a file of numpy."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_shards(tmp_path / name)
    pm.patch(tmp_path / "two" / "model", lambda t: pm.at(t, "layers.*.bias").add(1))
    make_file(tmp_path)
    make_npz(tmp_path)
    return tmp_path


def edited(tree):
    return pm.at(tree, "layers[-1].weight").zero()


def diffed(desk):
    with pm.open(desk / "one/model") as one, pm.open(desk / "two/model") as two:
        assert pm.diff(one, two).changed


def merged(desk):
    with pm.open(desk / "one/model") as one, pm.open(desk / "two/model") as two:
        pm.merge([one, two], weights=[0.5, 0.5])[0].save(desk / "merged")


def delta(desk):
    with pm.open(desk / "one/model") as one, pm.open(desk / "two/model") as two:
        pm.delta(one, two).save(desk / "delta")
    pm.patch(desk / "one/model", pm.Delta.load(desk / "delta").apply)


def grafted(desk):
    with pm.open(desk / "one/model") as target, pm.open(desk / "model.npz") as source:
        pm.graft(target, source, only="**.bias", unused="ok")[0].save(desk / "grafted")


def saved(desk, path, out, **options):
    with pm.open(desk / path) as tree:
        edited(tree).save(desk / out, **options)


def inserted(desk):
    pm.patch(desk / "one/model", lambda t: pm.insert(t, {"more": np.ones(3, "float32")}, "**")[0])


# Verb → what it does on a desk.
VERBS = {
    "open": lambda desk: pm.open(desk / "one/model").close(),
    "load": lambda desk: pm.load(desk / "one/model"),
    "load by maps": lambda desk: pm.load(desk / "model.safetensors", mmap=True),
    "an array": lambda desk: pm.at(pm.open(desk / "model.npz"), "step").one(),
    "stats": lambda desk: pm.stats(pm.open(desk / "one/model")),
    "patch a file": lambda desk: pm.patch(desk / "model.safetensors", edited),
    "patch shards": lambda desk: pm.patch(desk / "one/model", edited),
    "patch numpy": lambda desk: pm.patch(desk / "model.npz", edited),
    "rehearse": lambda desk: pm.patch(desk / "one/model", edited, dry_run=True),
    "configure": lambda desk: pm.patch(desk / "one/model", lambda t: pm.config(t).set({"n": 5})),
    "insert": inserted,
    "undo": lambda desk: pm.undo(desk / "two/model"),
    "history": lambda desk: pm.history(desk / "two/model"),
    "drop": lambda desk: drop(desk / "two/model"),
    "save a tree": lambda desk: pm.save({"w": np.ones(3)}, desk / "tree.safetensors"),
    "save shards": lambda desk: saved(desk, "one/model", "out"),
    "save a file": lambda desk: saved(desk, "model.safetensors", "out.safetensors", record=True),
    "save by links": lambda desk: saved(desk, "one/model", "out", link=True),
    "save over it": lambda desk: saved(desk, "one/model", "two/model", force=True),
    "convert": lambda desk: saved(desk, "model.npz", "out.safetensors"),
    "verify": lambda desk: pm.verify(desk / "one/model", desk / "two/model", only="layers.*.bias"),
    "diff": diffed,
    "merge": merged,
    "delta": delta,
    "graft": grafted,
}


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_stays_of_a_verb(desk, monkeypatch, verb):
    with leaving_nothing(desk, monkeypatch):
        VERBS[verb](desk)


# ---- errors --------------------------------------------------------------------------------------------------------


def full(monkeypatch, after):
    """The disk is full after so many writes."""
    count = iter(range(after))

    def of(real):
        def write(*args, **options):
            if next(count, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        return write

    for name in ("write", "pwrite"):
        monkeypatch.setattr(os, name, of(getattr(os, name)))


def shortened(desk):
    file = desk / "one/model/model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    return desk / "one/model"


def forgotten(desk):
    next((desk / "two/model/.undo").glob("*.done")).write_bytes(b"x")
    return desk / "two/model"


def stops(event):
    raise KeyboardInterrupt


def failing(tree):
    """An edit that raises at its second leaf."""
    once = iter("x")
    return pm.at(tree, "layers.*.weight").apply(lambda x: x if next(once, None) else 1 // 0)


def at_desk(path, out, edit=edited, **options):
    """A save from a path."""
    with pm.open(path) as tree:
        edit(tree).save(out, **options)


# What goes wrong → what is done on a desk.
WRONG = {
    "a damaged shard": lambda desk: pm.open(shortened(desk)),
    "a damaged record": lambda desk: pm.undo(forgotten(desk)),
    "a wrong selector": lambda desk: pm.patch(desk / "one/model", without_match),
    "a wrong selector of a save": lambda desk: at_desk(desk / "one/model", desk / "out", without_match),
    "an edit that raises": lambda desk: pm.patch(desk / "one/model", failing),
    "an edit that raises in a save": lambda desk: at_desk(desk / "one/model", desk / "out", failing),
    "ctrl-c in a patch": lambda desk: pm.patch(desk / "one/model", edited, progress=stops),
    "ctrl-c in an undo": lambda desk: pm.undo(desk / "two/model", progress=stops),
    "ctrl-c in a save": lambda desk: at_desk(desk / "one/model", desk / "out", progress=stops),
    "an output that is there": lambda desk: at_desk(desk / "one/model", desk / "two/model"),
    "not a checkpoint": lambda desk: pm.load(desk / "one/model/config.json"),
}


@pytest.mark.parametrize("what", WRONG)
def test_nothing_stays_of_an_error(desk, monkeypatch, what):
    with leaving_nothing(desk, monkeypatch):
        assert fails(WRONG[what], desk)


@pytest.mark.parametrize("verb", ["patch shards", "insert", "save shards", "save by links", "delta", "save a tree"])
def test_nothing_stays_where_a_disk_is_full(desk, monkeypatch, verb):
    for after in (0, 1, 3):
        with leaving_nothing(desk, monkeypatch), monkeypatch.context() as limited:
            full(limited, after)
            assert fails(VERBS[verb], desk) or after


# ---- many times ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "count"), [("opens", 1000), ("errors", 100), *(pytest.param(w, 300, marks=pytest.mark.far) for w in MANY)]
)
def test_memory_does_not_grow(tmp_path, what, count):
    path = make_file(tmp_path)
    blocks, _ = grows(lambda: MANY[what](path), count)
    assert blocks < 5  # an object that stays has more


# ---- the check itself ----------------------------------------------------------------------------------------------


def left_open(path):
    return pm.open(path)


def left_mapped(path):
    return pm.load(path, mmap=True)["embed"]["weight"]


def left_locked(path):
    lock = UndoStore(path).locked()
    path.with_name(f".{path.name}.undo").mkdir()
    lock.__enter__()
    return lock


def left_at_work(path):
    event = threading.Event()
    thread = threading.Thread(target=event.wait)
    thread.start()
    return Ended(event.set, thread.join)


class Ended:
    def __init__(self, *last):
        self.last = last

    def close(self):
        for each in self.last:
            each()


def left_temporary(path):
    return tempfile.NamedTemporaryFile(dir=path.parent, prefix=".paramend-")


def left_half(path):
    path.with_name("000001.pending").touch()


def left_child(path):
    child = subprocess.Popen(["sleep", "600"])
    return Ended(child.kill, child.wait)


@pytest.mark.parametrize(
    "leak", [left_open, left_mapped, left_locked, left_at_work, left_temporary, left_half, left_child]
)
def test_what_stays_is_seen(tmp_path, monkeypatch, leak):
    path = make_file(tmp_path)
    with pytest.raises(AssertionError), leaving_nothing(tmp_path, monkeypatch):
        kept = leak(path)
    with contextlib.suppress(AttributeError):
        kept.close()
