"""What a command that is stopped says of its output. Each looks at the disk at the end, so that it is true."""

from collections.abc import Sequence
from pathlib import Path

from paramend.journal.records import DONE, PENDING
from paramend.journal.store import UndoStore
from paramend.reports import wording


class Outputs:
    """Files and folders that a command writes, each in one step."""

    def __init__(self, paths: Sequence[Path], *, resumes: bool = False) -> None:
        self._resumes = resumes
        self.before = {path: _state(path) for path in paths}

    @property
    def written(self) -> list[Path]:
        return [path for path, state in self.before.items() if _state(path) != state]

    def __call__(self) -> str:
        done = self.written
        left = [str(path) for path in self.before if path not in done]
        if not done:
            old = [str(path) for path, state in self.before.items() if state is not None]
            stay = "are as they were" if old[1:] else "is as it was"
            more = "; --resume goes on from what was made" if self._resumes else ""
            return f"nothing was written{f'; {wording.listing(old)} {stay}' if old else ''}{more}"
        names = wording.listing(list(map(str, done)))
        if not left:
            return f"{names} had been written in full"
        return f"{len(done)} of {wording.plural(len(self.before), 'output')} had been written: {names}; not " + (
            wording.listing(left)
        )


class _Journal:
    def __init__(self, path: Path) -> None:
        self.path, self.store = path, UndoStore.of(path)
        self.done = self.store.records(DONE)
        self.pending = self.store.records(PENDING)


class Patched(_Journal):
    """A checkpoint whose own files change."""

    def __call__(self) -> str:
        now = _Journal(self.path)
        if now.pending:
            return (
                f"{self.path} has been changed in part; its old bytes are in {now.pending[0]}, and the next command "
                "that opens it puts them back"
            )
        if set(now.done) - set(self.done):
            return f"{self.path} had been changed in full; to take it back: paramend undo {self.path}"
        return f"nothing was changed: {self.path} has its old bytes"


class Undone(_Journal):
    """A checkpoint whose last patch is taken back."""

    def __call__(self) -> str:
        now = _Journal(self.path)
        if now.pending:
            return (
                f"{self.path} has its old bytes only in part; all are in {now.pending[0]}, and the next command that "
                "opens it puts them back"
            )
        if len(now.done) < len(self.done) or self.pending:
            return f"the last patch of {self.path} had been taken back in full"
        return f"nothing was changed: no patch of {self.path} was taken back"


class Dropped(_Journal):
    """A checkpoint whose undo records are deleted."""

    def __call__(self) -> str:
        before, now = (len(each.done) + len(each.pending) for each in (self, _Journal(self.path)))
        return f"{before - now} of {wording.plural(before, 'undo record')} of {self.path} had been deleted"


class Filled:
    """A folder that a command puts files into."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, _files(folder)

    def __call__(self) -> str:
        done = [path.name for path, state in _files(self.folder).items() if self.before.get(path) != state]
        files = wording.plural(len(done), "file")
        return f"{files} had been written to {self.folder}: {wording.listing(done)}" if done else "nothing was written"


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    one = (status.st_dev, status.st_ino)
    return one if path.is_dir() else (*one, status.st_size, status.st_mtime_ns)


def _files(folder: Path) -> dict[Path, tuple[int, ...] | None]:
    return {path: _state(path) for path in sorted(folder.iterdir())} if folder.is_dir() else {}
