"""Programs that die at a chosen call of the system, and machines whose power fails there."""

import contextlib
import os
import random
import shutil
from pathlib import Path

import pytest


def within(name, folder):
    """The path of a name in an open folder."""
    return Path(name) if folder is None else Path(f"/proc/self/fd/{folder}").readlink() / name


class Crash(BaseException):
    """The machine stops here."""


class Machine:
    """Runs a function until a chosen call of the system, where the program dies; then nothing can be done any more.

    With `power`, what was not made durable is lost in part, as when the power fails: writes that no fsync of the file
    followed, and names that no fsync of the folder followed.
    """

    CALLS = (
        "open",
        "write",
        "pwrite",
        "fsync",
        "rename",
        "unlink",
        "mkdir",
        "rmdir",
        "truncate",
        "ftruncate",
        "posix_fallocate",
    )

    def __init__(self, monkeypatch, stop, *, torn=False, power=None):
        self.stop, self.torn, self.power, self.count, self.dead = stop, torn, power, 0, False
        self.unsynced, self.names = {}, []
        self.real = {name: getattr(os, name) for name in self.CALLS}
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.wrapped(name))

    def wrapped(self, name):
        real = self.real[name]

        def run(*args, **options):
            if self.dead:
                raise Crash
            self.count += name != "open"
            if self.count == self.stop and name != "open":
                self.dead = True
                if self.torn and name in ("write", "pwrite") and len(args[1]) > 1:
                    half = memoryview(args[1])[: len(args[1]) // 2]
                    self.note(name, (args[0], half, *args[2:]), options)
                    real(args[0], half, *args[2:])
                raise Crash
            self.note(name, args, options)
            return real(*args, **options)

        return run

    def note(self, name, args, options):
        if self.power is None:
            return
        if name in ("write", "pwrite"):
            key = os.fstat(args[0])
            at = args[2] if name == "pwrite" else os.lseek(args[0], 0, os.SEEK_CUR)
            file = str(Path(f"/proc/self/fd/{args[0]}").readlink())
            with Path(file).open("rb") as now:
                now.seek(at)
                old = now.read(len(args[1]))
            self.unsynced.setdefault(key.st_ino, []).append((at, old))
        elif name == "fsync":
            status = os.fstat(args[0])
            folder = str(Path(f"/proc/self/fd/{args[0]}").readlink())
            self.unsynced.pop(status.st_ino, None)
            self.names = [(where, back) for where, back in self.names if where != folder]
        elif name == "rename":
            old, new = args[0], within(args[1], options.get("dst_dir_fd"))
            replaced = new.read_bytes() if new.is_file() else None

            def back():
                self.real["rename"](new, old)
                if replaced is not None:
                    new.write_bytes(replaced)

            self.names.append((str(new.parent), back))
        elif name == "unlink":
            file = within(args[0], options.get("dir_fd"))
            data = file.read_bytes()
            self.names.append((str(file.parent), lambda: file.write_bytes(data)))
        elif name == "rmdir":
            gone = within(args[0], options.get("dir_fd"))
            if not any(gone.iterdir()):
                self.names.append((str(gone.parent), lambda: self.real["mkdir"](gone)))

    def lose(self, folder):
        """The power fails."""
        rng = random.Random(self.power)
        for file in Path(folder).rglob("*"):
            for at, old in reversed(self.unsynced.get(file.lstat().st_ino, [])):
                if rng.random() < 0.5:
                    with file.open("r+b") as now:
                        now.seek(at)
                        now.write(old)
        kept = rng.randrange(len(self.names) + 1)
        for _, back in reversed(self.names[kept:]):
            back()


def crash_everywhere(tmp_path, make, action, check, **how):
    """Runs the action, stopped before each call of the system in turn, and checks what is left after recovery."""
    template = tmp_path / "template"
    template.mkdir()
    name = make(template)
    for step in range(1, 500):
        folder = tmp_path / f"step{step}"
        shutil.copytree(template, folder)
        with pytest.MonkeyPatch.context() as monkeypatch:
            machine = Machine(monkeypatch, step, **how)
            with contextlib.suppress(Crash):
                action(folder / name)
        if machine.power is not None:
            machine.lose(folder)
        check(folder / name, machine.dead)
        shutil.rmtree(folder)
        if not machine.dead:
            return step
    raise AssertionError("it never ended")
