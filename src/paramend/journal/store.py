"""`UndoStore`: the undo records of a checkpoint, and what is done with them under one lock."""

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from paramend.disk.failures import ELSEWHERE, explained, linked, reason
from paramend.disk.io import release
from paramend.disk.locks import is_held, locked
from paramend.disk.permissions import access_of, of_folder, settle
from paramend.disk.publishing import drop_spare_names, is_other, look, sync_folder
from paramend.disk.urls import Url, path_of
from paramend.errors import BadCheckpoint, Busy, CannotRead, CannotWrite, ParamendError, Unsupported
from paramend.formats.orbax.store import may_change
from paramend.formats.registry import files_of, home_of, tree_format, weight_files
from paramend.journal import claims
from paramend.journal.exchange import BACK, STAGED
from paramend.journal.history import HistoryRow
from paramend.journal.ranges import OpenRanges
from paramend.journal.records import DONE, PARTIAL, PENDING, Record, records_in
from paramend.journal.rollback import Rollback
from paramend.journal.writer import Writer
from paramend.reports import wording
from paramend.reports.progress import Progress


class UndoStore:
    """The undo records of a checkpoint: in a folder beside a file, or inside a checkpoint that is a folder. The names
    of its files are relative to `home`. With `about`, only patches of that file of a folder count."""

    def __init__(self, base: Path, *, about: str = "") -> None:
        self.base, self._about = base, about
        self.is_folder = base.is_dir()
        self.home = base if self.is_folder else base.parent
        self.folder = base / ".undo" if self.is_folder else base.with_name(f".{base.name}.undo")
        self.lock = self.folder / "lock"

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> "UndoStore":
        """The store of the checkpoint at a path: of the folder of an index; for Orbax, of the folder of the tree."""
        path = path_of(path)
        if isinstance(path, Url):
            hint = f"the same edit with `-o OUT`, or pm.open({str(path)!r}) ... .save(out)"
            raise Unsupported(f"{path}: it is in a remote store, where no checkpoint is changed in place", hint=hint)
        try:
            return cls(path.parent if path.name.endswith(".index.json") and not path.is_dir() else home_of(path))
        except PermissionError as error:
            raise CannotRead(f"{path}: {error.strerror}", hint=f"ls -ld {path.parent}") from None

    @property
    def related(self) -> "list[UndoStore]":
        """The stores of checkpoints that share files: of the folder of a file, or of the files of a folder."""
        if not self.is_folder:
            # Only a folder has `.undo` inside, so the kind of the parent need not be checked.
            return [UndoStore(self.home, about=self.base.name)] if (self.home / ".undo").is_dir() else []
        names: list[str] = []
        with contextlib.suppress(OSError):
            names = sorted(path.name for path in self.base.iterdir() if path.suffix == ".undo")
        found = [UndoStore(self.base / name[1:-5]) for name in names if name.startswith(".") and len(name) > 6]
        return [store for store in found if not store.is_folder]  # nor "..": only files have records beside them

    def records(self, *states: str) -> list[Path]:
        return records_in(self.folder, *states)

    def pending(self) -> list[Path]:
        """The records of patches that were cut short or are being made, and that count, the oldest first."""
        found = self.records(PENDING)
        return found if not self._about else [path for path in found if _is_about(path, {self._about}, unsure=True)]

    def next_path(self) -> Path:
        last = self.records(PARTIAL, PENDING, DONE)
        number = int(last[-1].stem) + 1 if last else 1
        return self.folder / f"{number:06}.{PARTIAL}"

    def has_records(self) -> bool:
        return any(store.records(PENDING, DONE, PARTIAL) for store in (self, *self.related))

    def name_of(self, file: Path) -> str:
        try:
            return file.relative_to(self.home).as_posix()
        except ValueError:
            raise Unsupported(f"{self.base}: {file} is outside of it", hint=ELSEWHERE) from None

    def rollback(
        self, record: Record, *, force: bool = False, progress: Progress | None = None, own: bool = False
    ) -> Rollback:
        """The rollback of the patch of a record. Unless this program is writing it (`own`), it cannot be trusted:
        `BadCheckpoint` if it has files that patches of the checkpoint never write."""
        names = record.head.names
        if not self.is_folder and len(names) == 1 and look(self.home / min(names)) is None:
            record.head = replace(record.head, files=(self.base.name,))  # the file was renamed, and its records with it
        others = [] if own else self._foreign(record)
        if others:
            what = wording.listing(others)
            raise record.damaged(f"it is about {what}, and no patch of {self.base.name} writes there")
        return Rollback(record, self.base, [self.home / name for name in record.head.files], force, progress)

    def _foreign(self, record: Record) -> list[str]:
        """The names of the files of a record that no patch of the checkpoint writes, or replaces."""
        head, tree = record.head, tree_format(self.base)
        written = set(head.files[: head.written])
        replaced = set(head.files[head.written :]).union(*head.moved)
        if written or (replaced and not tree):
            own = weight_files(self.base) if self.is_folder else files_of(self.base)
            written -= own
            replaced -= {name for name in own if name.endswith(".gguf")}  # of which headers may get longer
        if self.is_folder:
            mine = (lambda n: n == tree.table or may_change(self.base, n)) if tree else PUT.fullmatch
            replaced = {name for name in replaced if not mine(name)}
        return sorted(written | replaced)

    @contextlib.contextmanager
    def writing(self, *, recovers: bool = True) -> Iterator[None]:
        """While it lasts, the folder of records exists and is locked; patches that were cut short are taken back."""
        if self.base.is_symlink():
            raise linked(self.base)
        with explained(self.base):
            for file in self.base.iterdir() if self.is_folder else [self.base]:
                drop_spare_names(file)
            self._make_folder()
            with self.locked():
                claims.begin(self.folder)
                try:
                    if recovers:
                        self.recover_related()
                        self.recover_held()
                    with contextlib.suppress(OSError):
                        self._sweep()
                    yield
                finally:
                    self.close()

    def locked(self) -> contextlib.AbstractContextManager[None]:
        return locked(self.lock, name=self.base)

    def _make_folder(self) -> None:
        if os.path.lexists(self.folder):
            if self.folder.is_symlink() or not self.folder.is_dir():
                raise CannotWrite(f"{self.folder} is not a folder, and undo records belong there; nothing was changed")
            return
        status = self.base.stat()
        access = replace(access_of([status]), uid=status.st_uid)  # who may open the checkpoint looks for records
        access = access if self.is_folder else of_folder(access)
        claims.begin(self.folder)  # if this is cut short, the next one that opens the checkpoint removes the folder
        try:
            self.folder.mkdir(access.mode, exist_ok=True)  # another program may be quicker
            settle(self.folder, replace(access, asked=True))
            sync_folder(self.folder.parent)
        except OSError:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            if look(self.folder) is None:
                claims.end(self.folder)
            raise

    def close(self) -> None:
        """Remove what a killed program left half written, and the folder if it is empty, with the lock held."""
        with contextlib.suppress(OSError), contextlib.ExitStack() as last:
            if not self.records(PENDING):
                claims.clear(self.folder)
                last.callback(claims.end, self.folder)  # if this is cut short, the next one that opens it goes on
            self._sweep()
            if {path.name for path in self.folder.iterdir()} <= {"lock"}:
                self.lock.unlink(missing_ok=True)
                self.folder.rmdir()

    def _sweep(self) -> None:
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for name in filter(_LEFT.fullmatch, os.listdir(folder)):  # noqa: PTH208 - of a descriptor
                _remove(folder, name)
        finally:
            release(folder)

    def recover(self) -> list[HistoryRow]:
        """Take back this user's own patches that were cut short, unless they are still being made; `BadCheckpoint` if a
        record is damaged or not this user's own, or the file has been replaced since."""
        pending = self.pending()
        if claims.read(self.folder) is None:
            if pending and not is_held(self.lock) and self.pending():
                raise _not_own(self.base, pending[0])
            return []
        # Half-written leftovers take room but do no harm, so failing to remove them is not an error.
        quiet = () if pending else (CannotWrite,)
        rows: list[HistoryRow] = []
        with contextlib.suppress(Busy, *quiet), explained(self.base), self.locked():
            rows += self.recover_held()
            self.close()
        return rows

    def recover_held(self) -> list[HistoryRow]:
        """The same, with the lock held."""
        rows = []
        for found in self.pending():
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
        for store in self.related:
            if store.pending():
                with store.locked():
                    store.recover_held()
                    store.close()

    def check_nothing_pending(self) -> None:
        """Check, with the files locked, that no program has just been killed while it patched them."""
        for store in self.related:
            if store.pending():
                raise Busy(f"{store.base}: a patch of it was just cut short; nothing was changed", hint="try again")

    def take_back(self, writer: Writer, target: OpenRanges, error: BaseException) -> None:
        """Put the old bytes back after an error within a patch; `CannotWrite` if it came from the system."""
        try:
            if writer.begun:
                self._abandon(writer, target)
            else:
                for state in (PARTIAL, PENDING):  # if one stays, `close` sweeps it, or a recovery finds all as it was
                    with contextlib.suppress(OSError):
                        writer.path.with_suffix(f".{state}").unlink()
        except OSError as second:
            told = str(second).partition("\n")[0].removeprefix(f"{self.base}: ")
            hint = second.hint if isinstance(second, ParamendError) else ""
            raise CannotWrite(f"{self.base}: {reason(error)}; then: {told}", hint=hint) from error
        if isinstance(error, OSError) and not isinstance(error, ParamendError):
            raise CannotWrite(f"{self.base}: {reason(error)}; nothing was changed") from error

    def _abandon(self, writer: Writer, target: OpenRanges) -> None:
        # It may have been marked as done before the error, and another program may have removed it.
        names = [writer.path.with_suffix(f".{state}") for state in (PENDING, DONE)]
        with contextlib.suppress(OSError):
            names[1].rename(names[0])
        with writer.read(next(filter(os.path.lexists, names), names[0])) as record:
            self.rollback(record, own=True).restore(target)

    def drop(self, keep: int = 0) -> list[HistoryRow | Path]:
        """Forget records, the oldest first, with the lock held. A row for each, or the path of a damaged one."""
        # Pending records that cannot be rolled back are forgotten too; otherwise they would block every patch.
        found = self.records(PENDING, DONE)
        gone: list[HistoryRow | Path] = []
        for path in found[: max(len(found) - keep, 0)]:
            try:
                with Record(path) as record:
                    gone.append(HistoryRow.of(record))
            except ParamendError:
                gone.append(path)
            try:
                path.unlink()
            except OSError as error:
                count, left = wording.plural(len(gone) - 1, "undo record"), len(found) - len(gone) + 1
                told = f"forgot {count}, and {left} are left: {path}: {reason(error)}"
                raise CannotWrite(f"{self.base}: {told}; the checkpoint itself was left alone") from error
        with contextlib.suppress(OSError):
            sync_folder(self.folder)
        return gone


def records_of(files: Iterable[Path], *, refuses: bool = False) -> list[Path]:
    """The records of all patches of some files; if it `refuses`, one that is being made, or was cut short, raises."""
    names: dict[Path, set[str]] = {}
    for path in {real for file in files if not isinstance(file, Url) for real in (file, file.resolve())}:
        names.setdefault(path.parent, set()).add(path.name)
    found: list[Path] = []
    for folder, read in names.items():
        with contextlib.suppress(OSError):
            stores = {entry.name for entry in os.scandir(folder) if entry.name.endswith(".undo")}
            for name in sorted(stores & {f".{each}.undo" for each in read}):
                found += records_in(folder / name, PENDING, DONE)
            if ".undo" in stores:
                found += [
                    path for path in records_in(folder / ".undo", PENDING, DONE) if _is_about(path, read, unsure=True)
                ]
    for record in found:
        if refuses and record.suffix == f".{PENDING}":
            what = f"a patch of it is being made at this moment ({record})"
            hint = "try again when it is done"
            raise Busy(f"{record.parent.parent}: {what}; nothing was written", hint=hint)
    return sorted(found)


@contextlib.contextmanager
def retiring(out: Path) -> Iterator[None]:
    """While it lasts, a checkpoint gets its name; if another one has it in the end, the records of the old are removed.
    `Busy` if the old one is being patched; `BadCheckpoint` if it is a shard of a model whose patch was cut short, and
    that cannot be taken back unasked."""
    if isinstance(out, Url):
        yield
        return
    own = UndoStore.of(out)
    with contextlib.ExitStack() as stack:
        held = []
        for store in [own] if own.is_folder else [own, UndoStore(own.home)]:
            if not store.folder.is_symlink() and store.folder.is_dir():
                try:
                    stack.enter_context(locked(store.lock, name=out))
                except Busy:
                    if store is own or _records_about(store, {out.name}, PENDING):
                        raise
                    continue
                except OSError:  # another user's records
                    continue
                held.append(store)
                if store is not own and _records_about(store, {out.name}, PENDING):  # other files are half patched, too
                    store.recover_held()
        then = look(out)
        try:
            yield
        finally:
            for store in held if is_other(out, then) else ():
                with contextlib.suppress(OSError):
                    mine = store is own
                    for path in store.records(PENDING, DONE) if mine else _records_about(store, {out.name}, DONE):
                        path.unlink()
                    store.close()


def _records_about(store: UndoStore, names: set[str], *states: str) -> list[Path]:
    """The records of a folder that have a file of one of these names, or replaced files of a tree."""
    return [path for path in store.records(*states) if _is_about(path, names, unsure=False)]


def _is_about(path: Path, names: set[str], *, unsure: bool) -> bool:
    """Whether a record has a file of one of these names; the answer for one that is damaged or another user's."""
    try:
        with Record(path) as record:
            nested = any("/" in name for name in record.head.names)  # the files of a tree are never named alone
            return (record.head.whole and nested) or bool(names & record.head.names)
    except ParamendError:
        return unsure


def _not_own(base: Path, record: Path) -> BadCheckpoint:
    what = "a patch was cut short, and it is not known as a patch that you made here"
    why = "it may have come with the files, or from another user"
    hint = f"paramend undo {base} puts its bytes back, paramend undo {base} --drop forgets it"
    return BadCheckpoint(f"{base}: {record} says that {what}: {why}; nothing was written", hint=hint)


# The files that a patch puts whole into a folder of shards, or replaces there.
PUT = re.compile(r"[^./][^/]*\.(safetensors|json)")
# Records that were begun, new files that never replaced old ones, and old files that were put back in part.
_LEFT = re.compile(rf"[0-9]+\.({PARTIAL}|{STAGED}|{BACK})")


def _remove(folder: int, name: str) -> None:
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if status.st_uid != os.geteuid():
        return
    if stat.S_ISDIR(status.st_mode):
        import shutil  # slow to import, and rarely needed

        shutil.rmtree(name, dir_fd=folder)
    else:
        os.unlink(name, dir_fd=folder)
