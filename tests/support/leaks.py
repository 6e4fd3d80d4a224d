"""What a program still has when it is done: descriptors, maps, threads, children, locks, temporaries, notes.

PYTHONPATH=src:tests python tests/support/leaks.py 2000      whether memory grows with opens, errors, patches
"""

import contextlib
import fcntl
import gc
import os
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

import paramend as pm
from paramend.errors import ParamendError
from paramend.journal.undo import drop
from support.kinds import make_file

# What a killed or careless writer leaves: temporaries, halves of undo records.
LEFT = (".tmp", ".partial", ".pending", ".new", ".back", ".old")


def descriptors():
    """Where descriptors lead, each with its number."""
    found = set()
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add((int(entry.name), str(Path(entry.path).readlink())))
    return found


def held(*folders):
    """Descriptors and maps of files in folders, or of files that have no name any more."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    maps = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    places = {f"map of {path}" for path in maps} | {f"descriptor {number} of {path}" for number, path in descriptors()}
    return {each for each in places if each.endswith("(deleted)") or any(f" {folder}/" in each for folder in folders)}


def children():
    tasks = Path("/proc/self/task").glob("*/children")
    return {child for task in tasks for child in task.read_text().split()}


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith(("paramend", "Thread-"))}


def locked(folder):
    """The files of a folder whose lock another program could not take."""
    found = set()
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.add(path)
    return found


@contextlib.contextmanager
def leaving_nothing(folder, monkeypatch):
    """Check that what runs in here has nothing left of a folder but the files that it wrote."""
    with tempfile.TemporaryDirectory(prefix="temporary-") as name, monkeypatch.context() as places:
        temporary = Path(name).resolve()
        state = temporary / "state"
        places.setattr(tempfile, "tempdir", str(temporary))
        places.setenv("TMPDIR", str(temporary))
        places.setenv("XDG_STATE_HOME", str(state))

        def now():
            return held(folder, temporary), children(), threads()

        before = now()
        yield
        after = now()
        if not all(new <= old for new, old in zip(after, before, strict=True)):
            gc.collect()  # an error that somebody keeps has the frames that it went through
            after = now()
        assert [new - old for new, old in zip(after, before, strict=True)] == [set(), set(), set()]
        assert not locked(folder)
        left = [path for path in folder.rglob("*") if path.name.endswith(LEFT) or path.name.startswith(".paramend-")]
        assert not left
        assert not [path for path in temporary.rglob("*") if path.is_file()]


# ---- many times ----------------------------------------------------------------------------------------------------


def fails(action, *arguments):
    """Whether it fails; what it raised is not kept."""
    try:
        action(*arguments)
    except (ParamendError, OSError, ArithmeticError, KeyboardInterrupt):
        return True
    return False


def without_match(tree):
    return pm.at(tree, "no such leaf").zero()


def patched(path):
    return pm.patch(path, lambda t: pm.at(t, "embed.weight").add(np.float32(1)))


def patches(path):
    """Records come and go too."""
    if "000050" in patched(path).record:
        drop(path)


MANY = {
    "opens": lambda path: pm.open(path).close(),
    "arrays": lambda path: pm.at(pm.open(path), "step").one(),
    "errors": lambda path: fails(pm.patch, path, without_match),
    "patches": patches,
    "undos": lambda path: (patched(path), pm.undo(path)),
}


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grows(action, count):
    """How many blocks of memory, and bytes of the process, stay of each call once what is kept for good is there."""
    for _ in range(60):
        action()
    gc.collect()
    blocks, nbytes, then = sys.getallocatedblocks(), resident(), descriptors()
    for _ in range(count):
        action()
    gc.collect()
    assert len(descriptors() - then) <= 1  # that by which they are counted
    return (sys.getallocatedblocks() - blocks) / count, (resident() - nbytes) / count


if __name__ == "__main__":
    for what, call in MANY.items():
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_STATE_HOME"] = f"{folder}/state"
            file, number = make_file(Path(folder)), int(sys.argv[1])
            kept, grown = grows(lambda call=call, file=file: call(file), number)
            print(f"{what}: {number} times: {kept:.2f} blocks and {grown:.0f} bytes stay of each")
            assert kept < 1 and grown < 8192
