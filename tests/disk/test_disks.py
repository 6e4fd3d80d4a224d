"""Disks that are full, media and folders that may not be written, signals in between: the old state, nothing else."""

import contextlib
import errno
import os
import pwd
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import paramend as pm
from paramend.errors import CannotWrite

ROOT = os.geteuid() == 0
SIZE = 1 << 21


def write(path, size=100_000, leaves=3):
    safetensors.numpy.save_file({f"w{i}": np.full(size, 1.0, "float32") for i in range(leaves)}, path)
    return path


def listed(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def small_disk(folder):
    """A file system of 2 MB, where this program may mount one; else the largest file is to be small."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if not ROOT or subprocess.run(mount, capture_output=True).returncode:
        resource = pytest.importorskip("resource")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE, limits[1]))
        try:
            yield "File too large"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, old)
        return
    try:
        yield "the disk is full"
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def blind(monkeypatch):
    """A system that says there is room where there is none, as other programs may take it meanwhile."""
    disk = namedtuple("Disk", "f_blocks f_bavail f_frsize")(1, 10**9, 4096)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)


# ---- full disks ----------------------------------------------------------------------------------------------------


def test_a_rewrite_onto_a_full_disk(tmp_path, blind):
    source = write(tmp_path / "in.safetensors", 300_000)
    state = {"a": torch.ones(300_000), "b": torch.ones(300_000), "epoch": 3}
    torch.save(state, tmp_path / "in.pt")
    with small_disk(tmp_path / "disk") as why:
        write(tmp_path / "disk" / "out.safetensors", 10)
        before = listed(tmp_path / "disk")
        whole = pm.at(pm.open(source), "**").add(1)
        moved = pm.at(pm.at(pm.open(tmp_path / "in.pt"), "a").rename("c"), "b").cast("float64")
        jobs = [
            (whole, "out.safetensors", {}),
            (whole, "new.safetensors", {}),
            (pm.open(source), "copy.safetensors", {}),
            (pm.at(pm.open(source), "w0").cast("float64"), "shards", {"max_shard_size": "2.2MB"}),
            (whole, "out.pt", {}),
            (moved, "moved.pt", {}),
        ]
        for checkpoint, name, options in jobs:
            with pytest.raises(CannotWrite, match=f"{name}: {why}; nothing was written"):
                checkpoint.save(tmp_path / "disk" / name, force=True, **options)
            assert listed(tmp_path / "disk") == before
            assert not [path for path in (tmp_path / "disk").iterdir() if path.name.startswith(".")]


def test_a_patch_on_a_full_disk(tmp_path, blind):
    with small_disk(tmp_path / "disk") as why:
        path = write(tmp_path / "disk" / "x.safetensors", 140_000)
        before = listed(tmp_path / "disk")
        if why == "File too large":  # one file may not be so large, and the record of one leaf is not
            return
        with pytest.raises(CannotWrite, match=f"{why}; nothing was changed"):
            pm.patch(path, lambda t: pm.at(t, "**").add(1))
        assert listed(tmp_path / "disk") == before
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["x.safetensors"]
        pm.patch(path, lambda t: pm.at(t, "w0")[:100].add(1))  # what has room is still done
        pm.undo(path)
        assert listed(tmp_path / "disk") == before


def test_room_is_looked_for_first(tmp_path):
    source = write(tmp_path / "in.safetensors", 300_000)
    with small_disk(tmp_path / "disk") as why:
        if why == "File too large":
            return
        with pytest.raises(CannotWrite, match=r"out.safetensors needs .*, and .* are free in"):
            pm.open(source).save(tmp_path / "disk" / "out.safetensors")
        path = write(tmp_path / "disk" / "x.safetensors", 140_000)
        with pytest.raises(CannotWrite, match=r"the undo record needs .*, and .* are free"):
            pm.patch(path, lambda t: pm.at(t, "**").add(1))
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["x.safetensors"]


def test_a_disk_that_fills_up_in_the_midst_of_a_file(tmp_path, monkeypatch):
    """Half of a write goes through, and then nothing, at every write in turn."""
    source, out = write(tmp_path / "in.safetensors", 1000), tmp_path / "out.safetensors"
    write(out, 10)
    before = listed(tmp_path)
    jobs = {
        "rewrite": lambda: pm.at(pm.open(source), "**").add(1).save(out, force=True),
        "patch": lambda: pm.patch(source, lambda t: pm.at(t, "**").add(1)),
    }
    real = {name: getattr(os, name) for name in ("write", "pwrite", "copy_file_range")}
    for job in jobs.values():
        for stop in range(1, 12):
            calls = []

            def short(name, calls=calls, stop=stop):
                def run(*args, **options):
                    calls.append(name)
                    if len(calls) == stop and name != "copy_file_range":
                        return real[name](args[0], memoryview(args[1])[: max(len(args[1]) // 2, 1)], *args[2:])
                    # Old bytes that go back take no new room.
                    if len(calls) > stop and name != "pwrite":
                        raise OSError(errno.ENOSPC, "No space left on device")
                    return real[name](*args, **options)

                return run

            with monkeypatch.context() as patched:
                for name in real:
                    patched.setattr(os, name, short(name))
                try:
                    job()
                except CannotWrite as error:
                    assert "the disk is full" in str(error)
                    assert listed(tmp_path) == before
                    continue
            with contextlib.suppress(CannotWrite):
                pm.undo(source)
            write(out, 10)
            assert listed(tmp_path) == before


# ---- permissions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def others():
    """A folder of somebody who is not root, and what runs code as that somebody."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        somebody = pwd.getpwnam("nobody") if ROOT else pwd.getpwuid(os.geteuid())
        folder.chmod(0o755)
        drop = f"os.setgroups([]); os.setgid({somebody.pw_gid}); os.setuid({somebody.pw_uid})" if ROOT else ""
        preamble = f"import os, sys, paramend as pm; from pathlib import Path; pm.patch, pm.undo, pm.open; {drop}\n"

        def own():
            for path in (folder, *folder.rglob("*")):
                os.chown(path, somebody.pw_uid, somebody.pw_gid)

        def run(code):
            command = [sys.executable, "-c", preamble + textwrap.dedent(code), str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            return done.stdout

        yield folder, own, run
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)


SAID = """
    folder = Path(sys.argv[1])
    def said(job, *args, **options):
        try:
            job(*args, **options)
        except pm.errors.ParamendError as error:
            print(type(error).__name__, str(error).replace(str(folder), "FOLDER").replace("\\n", " "))
        else:
            print("done")
    edit = lambda t: pm.at(t, "w0").zero()
"""


def test_what_may_only_be_read_is_copied(others):
    folder, own, run = others
    (folder / "model").mkdir()
    write(folder / "x.safetensors", 10)
    write(folder / "model" / "model.safetensors", 10)
    (folder / "model" / "config.json").write_text("{}")
    own()
    for path in (folder / "x.safetensors", *(folder / "model").iterdir()):
        path.chmod(0o444)
    lines = run(
        textwrap.dedent(SAID)
        + """
said(edit(pm.open(folder / "x.safetensors")).save, folder / "y.safetensors")
said(edit(pm.open(folder / "model")).save, folder / "out")
"""
    ).splitlines()
    assert lines == ["done"] * 2
    assert not pm.load(folder / "y.safetensors")["w0"].any()


def test_what_may_not_be_written(others):
    folder, own, run = others
    for name in ("closed", "sealed"):
        (folder / name).mkdir()
        write(folder / name / "x.safetensors", 10)
    before = listed(folder)
    own()
    (folder / "closed").chmod(0o555)
    (folder / "sealed" / "x.safetensors").chmod(0o444)
    lines = run(
        textwrap.dedent(SAID)
        + """
assert not os.access(folder / "closed", os.W_OK)
checkpoint = pm.open(folder / "closed" / "x.safetensors")
said(pm.patch, folder / "closed" / "x.safetensors", edit)
said(pm.patch, folder / "sealed" / "x.safetensors", edit)
said(edit(checkpoint).save, folder / "closed" / "y.safetensors")
said(edit(checkpoint).save, folder / "closed" / "x.safetensors", force=True)
said(edit(checkpoint).save, folder / "sealed" / "y.safetensors")
"""
    ).splitlines()
    assert lines[0].startswith("CannotWrite FOLDER/closed/x.safetensors: Permission denied (FOLDER/closed/.x.safetens")
    assert lines[1].startswith("CannotWrite FOLDER/sealed/x.safetensors: Permission denied (FOLDER/sealed/x.safetens")
    assert all("nothing was changed" in line and "hint: write a new file instead: -o OUT" in line for line in lines[:2])
    assert lines[2].startswith("CannotWrite FOLDER/closed/y.safetensors: no permission to write into FOLDER/closed")
    assert lines[3].startswith("CannotWrite FOLDER/closed/x.safetensors is the file that is being read")
    assert lines[4] == "done"
    after = listed(folder)
    after.pop("sealed/y.safetensors")
    assert after == before


def test_what_may_not_be_read(others):
    folder, own, run = others
    for name in ("dark", "open"):
        (folder / name).mkdir()
        write(folder / name / "x.safetensors", 10)
    own()
    (folder / "dark").chmod(0)
    (folder / "open" / "x.safetensors").chmod(0)
    lines = run(
        textwrap.dedent(SAID)
        + """
said(pm.open, folder / "dark")
said(pm.open, folder / "dark" / "x.safetensors")
said(pm.open, folder / "open")
said(pm.open, folder / "open" / "x.safetensors")
said(pm.patch, folder / "open" / "x.safetensors", edit)
"""
    ).splitlines()
    assert all(line.startswith("Cannot") and "ermission" in line for line in lines), lines
    assert not (folder / "open" / ".x.safetensors.undo").exists()


# ---- media that are read only --------------------------------------------------------------------------------------


@contextlib.contextmanager
def read_only(folder):
    """The folder, mounted over itself to be read only where this program may do that; else without permissions."""
    if not ROOT or subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        folder.chmod(0o555)
        try:
            yield ROOT
        finally:
            folder.chmod(0o755)
        return
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield False
    finally:
        done = subprocess.run(["umount", folder], capture_output=True)
        if done.returncode:  # a file on it is open; what is left mounted would stop later runs when they clean up
            subprocess.run(["umount", "--lazy", folder], check=True)
        done.check_returncode()


def test_media_that_are_read_only(tmp_path):
    folder = tmp_path / "medium"
    folder.mkdir()
    path = write(folder / "x.safetensors", 10)
    before = listed(folder)
    with read_only(folder) as writable:
        if writable:
            return
        pm.at(pm.open(path), "w0").zero().save(tmp_path / "out.safetensors")
        assert pm.history(path) == []
        with pytest.raises(CannotWrite, match=r"Read-only file system|Permission denied") as error:
            pm.patch(path, lambda t: pm.at(t, "w0").zero())
        assert "nothing was changed" in str(error.value) and error.value.hint == "write a new file instead: -o OUT"
        with pytest.raises(CannotWrite, match=r"no permission to write into|Read-only file system"):
            pm.open(path).save(folder / "out.safetensors")
        with pytest.raises(CannotWrite, match="nothing to take back"):
            pm.undo(path)
        assert listed(folder) == before


# ---- signals -------------------------------------------------------------------------------------------------------


def test_signals_in_the_midst_of_calls(tmp_path):
    """Calls of the system that a signal interrupts are made again."""
    source = write(tmp_path / "in.safetensors", 3_000_000)
    torch.save({"a": torch.ones(2_000_000), "b": torch.ones(2_000_000)}, tmp_path / "in.pt")
    expected = {}
    heard = []

    def write_all(name):
        pm.at(pm.open(source), "w1").add(1).save(tmp_path / f"{name}.safetensors")
        edited = pm.at(pm.at(pm.open(tmp_path / "in.pt"), "a").add(1), "b").rename("c")
        edited.save(tmp_path / f"{name}.pt")
        pm.patch(source, lambda t: pm.at(t, "w2").add(1))
        expected[name] = [
            (tmp_path / file).read_bytes() for file in (f"{name}.safetensors", f"{name}.pt", "in.safetensors")
        ]
        pm.undo(source)

    write_all("quiet")
    old = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        write_all("noisy")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert heard and expected["quiet"] == expected["noisy"]
