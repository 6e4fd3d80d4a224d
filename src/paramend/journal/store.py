"""`UndoStore`: the undo records of a checkpoint, and all that is done with them under one lock."""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from paramend.disk.failures import ELSEWHERE, explained, linked, reason
from paramend.disk.locks import is_held, locked
from paramend.disk.publishing import sync_folder
from paramend.errors import BadCheckpoint, Busy, CannotWrite, ParamendError, Unsupported
from paramend.formats.orbax.store import may_change
from paramend.formats.registry import home_of, is_tree, weight_files
from paramend.journal import claims
from paramend.journal.exchange import BACK, STAGED
from paramend.journal.history import HistoryRow
from paramend.journal.records import DONE, PARTIAL, PENDING, Record, records_in
from paramend.journal.rollback import Rollback
from paramend.reports import wording
from paramend.reports.progress import Progress


class UndoStore:
    """The undo records of a checkpoint: beside a file in a folder of their own, of a folder in one inside it.

    Attributes:
        base: the checkpoint, a file or a folder.
        home: the folder that the names of its files are relative to.
        folder: where the records are. It need not exist.
        lock: the file in it that is locked while one writes there.

    >>> store = UndoStore(Path("models/model.safetensors"))
    >>> print(store.folder, store.home)
    models/.model.safetensors.undo models
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self.is_folder = base.is_dir()
        self.home = base if self.is_folder else base.parent
        self.folder = base / ".undo" if self.is_folder else base.with_name(f".{base.name}.undo")
        self.lock = self.folder / "lock"

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> "UndoStore":
        """The store of what a path stands for: of an index, its folder; of Orbax, the folder of the tree.

        >>> print(UndoStore.of("models/model.safetensors.index.json").base)
        models
        """
        path = Path(path)
        if path.name.endswith(".index.json") and not path.is_dir():
            return cls(path.parent)
        return cls(home_of(path))

    @property
    def related(self) -> "list[UndoStore]":
        """Those of checkpoints with some of the same files: of the folder of a file, of the files of a folder."""
        if not self.is_folder:
            # Only a folder has its records inside, so there is no need to look at what kind of thing the parent is.
            return [UndoStore(self.home)] if (self.home / ".undo").is_dir() else []
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = sorted(path.name for path in self.base.iterdir() if path.suffix == ".undo")
        found = [UndoStore(self.base / name[1:-5]) for name in names if name.startswith(".") and len(name) > 6]
        return [store for store in found if not store.is_folder]  # nor "..": only files have records beside them

    # ---- records ---------------------------------------------------------------------------------------------

    def records(self, *states: str) -> list[Path]:
        """The records in these states, the oldest first.

        Raises:
            CannotRead: there is no permission to look.
        """
        return records_in(self.folder, *states)

    def next_path(self) -> Path:
        """The name of a record that is about to be written."""
        last = self.records(PARTIAL, PENDING, DONE)
        number = int(last[-1].stem) + 1 if last else 1
        return self.folder / f"{number:06}.{PARTIAL}"

    def has_records(self) -> bool:
        """Whether there are any, here or in related stores."""
        return any(store.records(PENDING, DONE, PARTIAL) for store in (self, *self.related))

    def name_of(self, file: Path) -> str:
        """The name of a file of the checkpoint, as records have it."""
        try:
            return file.relative_to(self.home).as_posix()
        except ValueError:
            raise Unsupported(f"{self.base}: {file} lies outside of it", hint=ELSEWHERE) from None

    def rollback(
        self, record: Record, *, force: bool = False, progress: Progress | None = None, own: bool = False
    ) -> Rollback:
        """What takes back the patch of a record.

        Args:
            record: the record.
            force: whether the old bytes are put back although others are there.
            progress: called with an `Event` as bytes are written.
            own: whether this very program is writing it; other records can say anything.

        Raises:
            BadCheckpoint: the record is about files that no patch of the checkpoint writes.
        """
        names = record.head.files
        others = [] if own else sorted(set(names) - self._may_write(record))
        if others:
            what = wording.listing(others)
            raise record.damaged(f"it is about {what}, and no patch of {self.base.name} writes there")
        return Rollback(record, self.base, [self.home / name for name in names], force, progress)

    def _may_write(self, record: Record) -> set[str]:
        """The names, of the files of a record, that a patch of the checkpoint can write."""
        if is_tree(self.base):
            return {name for name in record.head.files if record.head.whole and may_change(self.base, name)}
        if record.head.whole:
            return set()
        return weight_files(self.base) if self.is_folder else {self.base.name}

    # ---- one writer at a time --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self, *, recovers: bool = True) -> Iterator[None]:
        """The folder of records, there and locked, with nothing cut short left.

        Raises:
            Busy: another program is writing.
        """
        if self.base.is_symlink():
            raise linked(self.base)
        with explained(self.base):
            self._make_folder()
            with self.locked():
                claims.begin(self.folder)
                try:
                    if recovers:
                        self.recover_related()
                        self.recover_held()
                    yield
                finally:
                    self.close()

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """The lock of the store."""
        return locked(self.lock, name=self.base)

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir()
        except FileExistsError:
            if self.folder.is_symlink() or not self.folder.is_dir():
                raise CannotWrite(
                    f"{self.folder} is not a folder, and undo records go there; nothing was changed"
                ) from None
        else:
            sync_folder(self.folder.parent)

    def close(self) -> None:
        """Removes what a killed program left half written, and the folder if it is empty; the lock is held."""
        if not self.records(PENDING):
            claims.end(self.folder)
        with contextlib.suppress(OSError):
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                for name in filter(_LEFT.fullmatch, _names(folder)):
                    _remove(folder, name)
                if set(_names(folder)) <= {"lock"}:
                    self.lock.unlink(missing_ok=True)
                    self.folder.rmdir()
            finally:
                os.close(folder)

    # ---- what was cut short ----------------------------------------------------------------------------------

    def recover(self) -> list[HistoryRow]:
        """Takes back this user's own patches that were cut short, unless they are still being made.

        Raises:
            BadCheckpoint: a record is damaged or not this user's own, or the file was exchanged since.
        """
        pending = self.records(PENDING)
        if claims.read(self.folder) is None:
            if pending and not is_held(self.lock) and self.records(PENDING):
                raise _not_own(self.base, pending[0])
            return []
        # What was left half written takes room and does no harm: that it cannot be removed is no reason to stop.
        quiet = () if pending else (CannotWrite,)
        rows: list[HistoryRow] = []
        with contextlib.suppress(Busy, *quiet), explained(self.base), self.locked():
            rows += self.recover_held()
            self.close()
        return rows

    def recover_held(self) -> list[HistoryRow]:
        """The same; the lock is held."""
        rows = []
        for found in self.records(PENDING):
            if claims.read(self.folder) is None:
                raise _not_own(self.base, found)
            with Record(found) as record:
                if not record.is_own():
                    raise _not_own(self.base, found)
                row = HistoryRow.of(record)
                if self.rollback(record).finish():
                    rows.append(row)
        return rows

    def recover_related(self) -> None:
        """The same in related stores, each locked for it."""
        for store in self.related:
            if store.records(PENDING):
                with store.locked():
                    store.recover_held()
                    store.close()

    def check_nothing_pending(self) -> None:
        """With the files locked, what is pending elsewhere belongs to a program that was killed just now."""
        for store in self.related:
            if store.records(PENDING):
                raise Busy(f"{store.base}: a patch of it was cut short just now; nothing was changed", hint="try again")

    def take_back(self, path: Path, error: BaseException) -> None:
        """Puts the old bytes back after something went wrong within a patch whose record was begun at this path.

        Raises:
            CannotWrite: what went wrong came from the system, or the bytes could not be put back.
        """
        try:
            try:
                self._abandon(path)
            except KeyboardInterrupt:  # once more, from the start
                self._abandon(path)
                raise
        except (OSError, ParamendError) as second:
            raise CannotWrite(
                f"{self.base}: {reason(error)}; and then the old bytes could not be put back: {reason(second)}. They "
                f"are safe in {path.parent}, and the next program that opens the checkpoint tries again",
                hint=f"paramend undo {self.base}",
            ) from error
        if isinstance(error, OSError) and not isinstance(error, ParamendError):
            raise CannotWrite(f"{self.base}: {reason(error)}; nothing was changed") from error

    def _abandon(self, path: Path) -> None:
        done, pending = path.with_suffix(f".{DONE}"), path.with_suffix(f".{PENDING}")
        if done.exists():  # it was marked, and then something went wrong
            done.rename(pending)
        if pending.exists():
            with Record(pending) as record:
                self.rollback(record, own=True).abandon()
        elif path.exists():
            path.unlink()

    # ---- forgetting ------------------------------------------------------------------------------------------

    def drop(self, keep: int = 0) -> list[HistoryRow | Path]:
        """Forgets records, the oldest first; the lock is held. A row for each, or the path of one that is damaged."""
        # What is pending and cannot be rolled back has to be forgotten, or nothing goes on.
        found = self.records(PENDING, DONE)
        gone: list[HistoryRow | Path] = []
        for path in found[: max(len(found) - keep, 0)]:
            try:
                with Record(path) as record:
                    gone.append(HistoryRow.of(record))
            except ParamendError:
                gone.append(path)
            path.unlink()
        sync_folder(self.folder)
        return gone


@contextlib.contextmanager
def retiring(out: Path) -> Iterator[None]:
    """While it lasts a checkpoint gets its name, and when it ends without an error the records of what had it are gone.

    Raises:
        Busy: that is being patched.
    """
    own = UndoStore.of(out)
    with contextlib.ExitStack() as stack:
        held = []
        for store in [own] if own.is_folder else [own, UndoStore(own.home)]:
            if not store.folder.is_symlink() and store.folder.is_dir():
                try:
                    stack.enter_context(locked(store.lock, name=out))
                except Busy:
                    raise
                except OSError:  # records of somebody else
                    continue
                held.append(store)
        yield
        for store in held:
            with contextlib.suppress(OSError):
                for path in store.records(PENDING, DONE) if store is own else _about(store, out.name):
                    path.unlink()
                store.close()


def _about(store: UndoStore, name: str) -> list[Path]:
    """The records of a folder that are about a file of this name."""
    found = []
    for path in store.records(DONE):
        with contextlib.suppress(ParamendError), Record(path) as record:
            found += [path] if name in record.head.files else []
    return found


def _not_own(base: Path, record: Path) -> BadCheckpoint:
    return BadCheckpoint(
        f"{base}: {record} says that a patch was cut short, and it is not known as a patch that you made here: it may "
        "have come with the files, or from somebody else; nothing was written",
        hint=f"paramend undo {base} puts the bytes that it holds back, paramend undo {base} --drop forgets it",
    )


# Records that were begun, new files that were never exchanged for old ones, and old ones that were put back in part.
_LEFT = re.compile(rf"[0-9]+\.({PARTIAL}|{STAGED}|{BACK})")


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as inside:
        return [entry.name for entry in inside]


def _remove(folder: int, name: str) -> None:
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if status.st_uid != os.geteuid():
        return
    if stat.S_ISDIR(status.st_mode):
        import shutil  # slow to import, and rarely needed

        shutil.rmtree(name, dir_fd=folder)
    else:
        os.unlink(name, dir_fd=folder)
