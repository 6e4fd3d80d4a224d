"""Undoing: what an undo record holds is put back, because someone asks for it or because a patch was cut short."""

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paramend.disk.io import get, get_into, put
from paramend.disk.locks import ELSEWHERE, explained, is_held, linked, locked, opened, reason
from paramend.disk.publishing import sync_folder
from paramend.errors import BadCheckpoint, Busy, CannotRead, CannotWrite, ParamendError, Unsupported
from paramend.formats.orbax.store import may_change
from paramend.formats.registry import home_of, is_tree, weight_files
from paramend.journal import claims
from paramend.journal.exchange import BACK, STAGED, check_new, put_files_back
from paramend.journal.records import (
    BUFFER,
    DONE,
    PARTIAL,
    PENDING,
    Record,
    Spans,
    State,
    checksum,
    lock_of,
    records,
    store_of,
    witness,
)
from paramend.reports import wording
from paramend.reports.progress import Meter, Progress
from paramend.reports.report import Report, Section
from paramend.reports.tables import aligned


@dataclass(frozen=True)
class HistoryRow:
    """One patch that can be taken back.

    Attributes:
        number: the higher, the later.
        time: when it was made.
        leaves: (path, edit) of each leaf that it changed.
        files: the names of the files that it changed.
        nbytes: what its record takes on disk.
    """

    number: int
    time: datetime
    leaves: tuple[tuple[str, str], ...]
    files: tuple[str, ...]
    nbytes: int

    @property
    def edit(self) -> str:
        """What was done, in one line: each edit with the leaves that it was made to."""
        found: dict[str, list[str]] = {}
        for path, edit in self.leaves:
            found.setdefault(edit, []).append(path)
        return "; ".join(f"{edit} at {wording.listing(paths, 2)}" for edit, paths in found.items())

    def __str__(self) -> str:
        return f"{self.number}  {self.time:%Y-%m-%d %H:%M:%S} UTC  {wording.size(self.nbytes)}  {self.edit}"

    def to_dict(self) -> dict[str, Any]:
        """The row as data that JSON can hold."""
        return {
            "number": self.number,
            "time": self.time.isoformat(),
            "changed": [{"path": path, "edit": edit} for path, edit in self.leaves],
            "files": list(self.files),
            "nbytes": self.nbytes,
        }


@dataclass(frozen=True, repr=False)
class UndoReport(Report):
    """What an undo has done.

    Attributes:
        path: the checkpoint.
        undone: the patch that was taken back.
        bytes_written: bytes of the checkpoint that were written.
        left: how many patches can still be taken back.
        interrupted: whether that patch had been cut short.
    """

    path: str
    undone: HistoryRow
    bytes_written: int
    left: int
    interrupted: bool = False

    def headline(self) -> str:
        """What was taken back, in one line."""
        return self.summary

    def sections(self) -> list[Section]:
        """None: what was done to which leaves stands in `undone`."""
        return []

    @property
    def summary(self) -> str:
        """What was taken back, in one line."""
        what = "took back an interrupted patch of" if self.interrupted else "took back the last patch of"
        return f"{what} {self.path}: {self.undone.edit}; {wording.plural(self.left, 'patch', 'patches')} left"

    def __str__(self) -> str:
        return self.summary

    def to_dict(self) -> dict[str, Any]:
        """The report as data that JSON can hold."""
        return {
            "path": self.path,
            "undone": self.undone.to_dict(),
            "bytes_written": self.bytes_written,
            "left": self.left,
            "interrupted": self.interrupted,
        }


def table(rows: Sequence[HistoryRow]) -> list[str]:
    """The lines of a printed history, a header first, the latest patch last.

    >>> table([])
    ['no patches: nothing to take back']
    """
    if not rows:
        return ["no patches: nothing to take back"]
    cells = [(str(row.number), f"{row.time:%Y-%m-%d %H:%M:%S}", wording.size(row.nbytes), row.edit) for row in rows]
    return aligned([("", "when (UTC)", "record", "what was done"), *cells], right="rlr")


# ---- the four functions ------------------------------------------------------------------------------------


def undo(path: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None) -> UndoReport:
    """A report of what was taken back: the last patch of a checkpoint that has not been taken back.

    If a patch was cut short before, that one is taken back, and no other.

    Args:
        path: a file or folder.
        force: whether the old bytes are put back although those places were changed since, or the file is another one
            of the same size.
        progress: called with an `Event` as bytes are written.

    Raises:
        CannotWrite: there is nothing to take back, or the file was changed or exchanged since; the message names what
            differs.
        BadCheckpoint: the undo record is damaged. Nothing was written.

    >>> import tempfile
    >>> from paramend.checkpoints.checkpoint import save
    >>> from paramend.edits.selection import at
    >>> from paramend.checkpoints.patching import patch
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"a": np.ones(2), "b": np.ones(2)}, path)
    >>> _ = patch(path, lambda t: at(t, "a").zero()), patch(path, lambda t: at(t, "b").fill(2))
    >>> report = undo(path)
    >>> report.undone.edit, report.left
    ('fill(2) at b', 1)
    """
    base = base_of(Path(path))
    _check_there(base)
    if not _has_records(base):
        raise _nothing(base)
    interrupted: HistoryRow | None = None
    with writing(base, recovers=False) as store:
        _recover_related(base)
        for found in records(store, PENDING):
            with Record(found) as record:
                interrupted, written = _row_of(record), record.spans.nbytes
                _roll_back(base, record, force=force, progress=progress)
        done = records(store, DONE)
        if interrupted is not None:
            return UndoReport(str(path), interrupted, written, len(done), interrupted=True)
        if not done:
            raise _nothing(base)
        with Record(done[-1]) as record:
            row, written = _row_of(record), record.spans.nbytes
            _undo_done(base, record, force=force, progress=progress)
        return UndoReport(str(path), row, written, len(done) - 1)


def history(path: str | os.PathLike[str]) -> list[HistoryRow]:
    """The patches of a checkpoint that can be taken back, the latest last.

    Raises:
        BadCheckpoint: an undo record is damaged.

    >>> import tempfile
    >>> from paramend.checkpoints.checkpoint import save
    >>> from paramend.edits.selection import at
    >>> from paramend.checkpoints.patching import patch
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"a": np.ones(2), "b": np.ones(2)}, path)
    >>> _ = patch(path, lambda t: at(t, "a").zero()), patch(path, lambda t: at(t, "b").fill(2))
    >>> [row.edit for row in history(path)]
    ['zero() at a', 'fill(2) at b']
    """
    base = base_of(Path(path))
    _check_there(base)
    recover(base)
    rows = []
    for found in records(store_of(base), DONE):
        with Record(found) as record:
            rows.append(_row_of(record))
    return rows


def recover(path: str | os.PathLike[str]) -> list[HistoryRow]:
    """The patches that had been cut short, now taken back; usually none. Whatever opens a checkpoint calls this first.

    Only this user's own patches on this machine are taken back unasked: anyone can lay a record beside a file. A patch
    that is still being made by another program is left alone.

    Raises:
        BadCheckpoint: an undo record is damaged or not this user's own, or the file was exchanged since. Nothing was
            written.
        CannotWrite: the old bytes cannot be put back, for want of permission for example.
    """
    base = base_of(Path(path))
    rows: list[HistoryRow] = []
    try:
        found = [(each, store_of(each)) for each in (base, *_related(base))]
    except PermissionError:  # who may not look cannot read either, and hears of it then
        return rows
    for each, store in found:
        pending = records(store, PENDING)
        if claims.read(store) is None:
            if pending and not is_held(lock_of(store)) and records(store, PENDING):
                raise _not_own(each, pending[0])
            continue
        # What was left half written takes room and does no harm: that it cannot be removed is no reason to stop.
        quiet = () if pending else (CannotWrite,)
        with contextlib.suppress(Busy, *quiet), explained(each), locked(lock_of(store), name=each):
            rows += _recover_held(each, store)
            _close(store)
    return rows


def _not_own(base: Path, record: Path) -> BadCheckpoint:
    return BadCheckpoint(
        f"{base}: {record} says that a patch was cut short, and it is not known as a patch that you made here: it may "
        "have come with the files, or from somebody else; nothing was written",
        hint=f"paramend undo {base} puts the bytes that it holds back, paramend undo {base} --drop forgets it",
    )


def drop(path: str | os.PathLike[str], *, keep: int = 0) -> list[HistoryRow | Path]:
    """What was forgotten: undo records, the oldest first, so that they take no space; the checkpoint stays as it is.

    Args:
        path: a file or folder.
        keep: how many of the latest patches can still be taken back afterwards.

    Returns:
        A row for each record, or the path of one that is damaged.

    >>> import tempfile
    >>> from paramend.checkpoints.checkpoint import save
    >>> from paramend.edits.selection import at
    >>> from paramend.checkpoints.patching import patch
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"a": np.ones(2), "b": np.ones(2)}, path)
    >>> _ = patch(path, lambda t: at(t, "a").zero()), patch(path, lambda t: at(t, "b").fill(2))
    >>> [row.edit for row in drop(path, keep=1)], [row.edit for row in history(path)]
    (['zero() at a'], ['fill(2) at b'])
    """
    base = base_of(Path(path))
    if not _has_records(base):
        return []
    gone: list[HistoryRow | Path] = []
    with writing(base, recovers=False) as store:
        with contextlib.suppress(BadCheckpoint):
            _recover_held(base, store)
        # What is pending still could not be rolled back: to forget it is the only way on.
        found = records(store, PENDING, DONE)
        for each in found[: max(len(found) - keep, 0)]:
            try:
                with Record(each) as record:
                    gone.append(_row_of(record))
            except ParamendError:
                gone.append(each)
            each.unlink()
        sync_folder(store)
    return gone


# ---- putting back ------------------------------------------------------------------------------------------


def _undo_done(base: Path, record: Record, *, force: bool, progress: Progress | None) -> None:
    """Takes back a patch that is whole, unless its places were changed since."""
    record.check()
    if record.head.whole:
        with explained(base):
            _undo_files(base, record, force=force)
        return
    files, spans = _paths(base, record), record.spans
    with explained(base), opened(files) as descriptors:
        now = [state_of(descriptor, spans, n) for n, descriptor in enumerate(descriptors)]
        _check_sizes(base, record, now)
        if not force:
            found = digests(descriptors, files, spans, len(record.head.rows))
            differ = [n for n, digest in enumerate(found) if digest != record.after[n]]
            if differ:
                rows = [record.head.rows[n][0] for n in differ if n < len(record.head.rows)]
                raise _changed_since(base, record, rows or ["its checksums"])
            others = [name for name, one, then in _by_file(record, now) if one.witness != then.witness]
            if others:
                raise CannotWrite(
                    f"{base}: {wording.listing(others)} is not the file of patch {record.number}: bytes that the patch "
                    "left alone are others now; nothing was written",
                    hint=f"paramend undo {base} --force puts the bytes from before the patch there all the same, "
                    f"paramend undo {base} --drop forgets them",
                )
        record.note(now)
        with Record(record.become_pending()) as pending:
            try:
                _write_old(base, descriptors, pending, progress)
            except KeyboardInterrupt:
                _write_old(base, descriptors, pending, None)
                _forget(pending)
                raise
            _forget(pending)


def _undo_files(base: Path, record: Record, *, force: bool) -> None:
    _check_names(base, record)
    differ = check_new(base, record)
    if differ and not force:
        raise _changed_since(base, record, differ)
    with Record(record.become_pending()) as pending:
        put_files_back(base, pending, force=force)
        _forget(pending)


def _changed_since(base: Path, record: Record, what: Sequence[str]) -> CannotWrite:
    return CannotWrite(
        f"{base}: {wording.listing(what)} changed since patch {record.number}; nothing was written",
        hint=f"paramend undo {base} --force puts the bytes from before the patch there all the same",
    )


def _recover_held(base: Path, store: Path) -> list[HistoryRow]:
    """Rolls back what was cut short of this user's own; the lock is held."""
    rows = []
    for found in records(store, PENDING):
        if claims.read(store) is None:
            raise _not_own(base, found)
        with Record(found) as record:
            if not record.is_own():
                raise _not_own(base, found)
            row = _row_of(record)
            if _roll_back(base, record):
                rows.append(row)
    return rows


def _roll_back(base: Path, record: Record, *, force: bool = False, progress: Progress | None = None) -> bool:
    """Puts the old bytes of a patch that was cut short back. False: they were all there still."""
    with explained(base):
        return put_back(base, record, force=force, progress=progress)


def put_back(
    base: Path, record: Record, *, own: bool = False, force: bool = False, progress: Progress | None = None
) -> bool:
    """Puts the old bytes of a pending record back. False: they were all there still.

    Args:
        base: the checkpoint.
        record: it is removed when all is durable.
        own: whether this very program made the patch and holds the locks.
        force: whether another file of the same size will do.
        progress: called with an `Event` as bytes are written.
    """
    record.check()
    if not own:
        _check_names(base, record)
    if record.head.whole:
        changed = put_files_back(base, record, force=force)
        _forget(record)
        return changed
    files = [_folder(base) / name for name in record.head.files]
    if own:
        with opened(files, links=True, lock=False) as descriptors:
            _write_old(base, descriptors, record, progress)
        _forget(record)
        return True
    with opened(files) as descriptors:
        now = [state_of(descriptor, record.spans, n) for n, descriptor in enumerate(descriptors)]
        _check_sizes(base, record, now)
        same = all(one.witness == then.witness for _, one, then in _by_file(record, now))
        changed = not _holds_old(descriptors, files, record)
        if changed and not same and not force:
            raise BadCheckpoint(
                f"{base}: a patch of it was cut short, and the file is not the one that was patched: it was exchanged "
                "since; nothing was written",
                hint=f"paramend undo {base} --force puts the old bytes back, "
                f"paramend undo {base} --drop forgets them (right for a file that came anew)",
            )
        if changed:
            _write_old(base, descriptors, record, progress)
        for descriptor in descriptors:
            os.fsync(descriptor)  # the old bytes may be there only because a recovery was killed before it got here
        _forget(record)
        return changed


def _holds_old(descriptors: Sequence[int], files: Sequence[Path], record: Record) -> bool:
    return all(
        get(descriptors[file], start, len(data), files[file]) == data for _, file, start, data in record.old_bytes()
    )


def _write_old(base: Path, descriptors: Sequence[int], record: Record, progress: Progress | None) -> None:
    meter = Meter(progress, record.spans.nbytes)
    try:
        for _, file, start, data in record.old_bytes():
            put(descriptors[file], data, start)
            meter.advance(len(data))
        for descriptor in descriptors:
            os.fsync(descriptor)
    except OSError as error:
        raise CannotWrite(
            f"{base}: {reason(error)}; the old bytes are back only in part. All of them are safe in {record.path}, and "
            "the next program that opens the checkpoint tries again"
        ) from error


def _forget(record: Record) -> None:
    record.path.unlink()
    sync_folder(record.path.parent)


def _check_sizes(base: Path, record: Record, now: Sequence[State]) -> None:
    for name, state, then in _by_file(record, now):
        if state.size != then.size:
            raise BadCheckpoint(
                f"{base}: {name} has {state.size:,} bytes, and {then.size:,} when it was patched: it is another file; "
                "nothing was written",
                hint=f"paramend undo {base} --drop forgets the undo records",
            )


def _by_file(record: Record, now: Sequence[State]) -> Iterator[tuple[str, State, State]]:
    """(name, how it is now, how it was) of each file."""
    return zip(record.head.files, now, record.states, strict=True)


# ---- files and folders -------------------------------------------------------------------------------------


def base_of(path: Path) -> Path:
    """The checkpoint that a path stands for: of the index of shards, its folder; of Orbax, the folder of the tree.

    >>> base_of(Path("model.safetensors"))
    PosixPath('model.safetensors')
    """
    if path.name.endswith(".index.json") and not path.is_dir():
        return path.parent
    return home_of(path)


def _folder(base: Path) -> Path:
    return base if base.is_dir() else base.parent


def name_in(base: Path, file: Path) -> str:
    """The name of a file of a checkpoint, as records have it."""
    try:
        return file.relative_to(_folder(base)).as_posix()
    except ValueError:
        raise Unsupported(f"{base}: {file} lies outside of it", hint=ELSEWHERE) from None


def _paths(base: Path, record: Record) -> list[Path]:
    """The files of a record, each one that a patch of the checkpoint can write."""
    _check_names(base, record)
    return [_folder(base) / name for name in record.head.files]


def _check_names(base: Path, record: Record) -> None:
    """Refuses a record about files that no patch of the checkpoint writes: it can say anything."""
    names = record.head.files
    if is_tree(base):
        own = {name for name in names if record.head.whole and may_change(base, name)}
    elif record.head.whole:
        own = set()
    else:
        own = weight_files(base) if base.is_dir() else {base.name}
    others = [name for name in names if name not in own]
    if others:
        raise record.damaged(f"it is about {wording.listing(others)}, and no patch of {base.name} writes there")


def _related(base: Path) -> list[Path]:
    """Checkpoints with some of the same files: the folder of a file, the files of a folder."""
    if base.is_dir():
        with contextlib.suppress(OSError):
            stores = [path.name for path in base.iterdir() if path.name.startswith(".") and path.suffix == ".undo"]
            found = [base / name[1:-5] for name in sorted(stores) if len(name) > 6]
            return [path for path in found if not path.is_dir()]  # nor "..": only files have their records beside them
        return []
    # Only a folder has its records inside, so there is no need to look at what kind of thing the parent is.
    return [base.parent] if (base.parent / ".undo").is_dir() else []


def _has_records(base: Path) -> bool:
    return any(records(store_of(each), PENDING, DONE, PARTIAL) for each in (base, *_related(base)))


def _check_there(base: Path) -> None:
    if not os.path.lexists(base):
        raise CannotRead(f"{base}: there is no such file")


def _nothing(base: Path) -> CannotWrite:
    other = [each for each in _related(base) if records(store_of(each), DONE)]
    return CannotWrite(
        f"{base}: there is nothing to take back: no patch of it has an undo record",
        hint=f"paramend undo {other[0]}, which was patched" if other else "",
    )


@contextlib.contextmanager
def writing(base: Path, *, recovers: bool = True) -> Iterator[Path]:
    """The folder of undo records, there and locked, with nothing cut short left."""
    if base.is_symlink():
        raise linked(base)
    store = store_of(base)
    with explained(base):
        try:
            store.mkdir()
        except FileExistsError:
            if store.is_symlink() or not store.is_dir():
                raise CannotWrite(f"{store} is no folder, and undo records go there; nothing was changed") from None
        else:
            sync_folder(store.parent)
        lock = locked(lock_of(store), name=base)
        with lock:
            claims.begin(store)
            try:
                if recovers:
                    _recover_related(base)
                    _recover_held(base, store)
                yield store
            finally:
                _close(store)


def _recover_related(base: Path) -> None:
    for each in _related(base):
        recover_one = store_of(each)
        if records(recover_one, PENDING):
            with locked(lock_of(recover_one), name=each):
                _recover_held(each, recover_one)
                _close(recover_one)


def check_nothing_pending(base: Path) -> None:
    """With the files locked, what is pending elsewhere belongs to a program that was killed just now."""
    for each in _related(base):
        if records(store_of(each), PENDING):
            raise Busy(f"{each}: a patch of it was cut short just now; nothing was changed", hint="try again")


@contextlib.contextmanager
def retiring(out: Path) -> Iterator[None]:
    """While it lasts a checkpoint gets its name, and when it ends without an error the records of what had it are gone.

    Raises:
        Busy: that is being patched.
    """
    base = base_of(out)
    stores = [store_of(base)] if base.is_dir() else [store_of(base), store_of(base.parent)]
    with contextlib.ExitStack() as stack:
        held = []
        for store in stores:
            if not store.is_symlink() and store.is_dir():
                try:
                    stack.enter_context(locked(lock_of(store), name=out))
                except Busy:
                    raise
                except OSError:  # records of somebody else
                    continue
                held.append(store)
        yield
        for store in held:
            with contextlib.suppress(OSError):
                _retire(store, None if store == store_of(base) else out.name)
                _close(store)


def _retire(store: Path, name: str | None) -> None:
    """Forgets all records, or those of a folder that are about a file of this name."""
    for found in records(store, DONE) if name else records(store, PENDING, DONE):
        if name:
            try:
                with Record(found) as record:
                    if name not in record.head.files:
                        continue
            except ParamendError:
                continue
        found.unlink()


def _close(store: Path) -> None:
    """Removes what a killed program left half written, and the folder if it is empty; the lock is held."""
    if not records(store, PENDING):
        claims.end(store)
    with contextlib.suppress(OSError):
        folder = os.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for name in filter(_LEFT.fullmatch, _names(folder)):
                _remove(folder, name)
            if set(_names(folder)) <= {"lock"}:
                lock_of(store).unlink(missing_ok=True)
                store.rmdir()
        finally:
            os.close(folder)


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as inside:
        return [entry.name for entry in inside]


# Records that were begun, new files that were never exchanged for old ones, and old ones that were put back in part.
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


def _row_of(record: Record) -> HistoryRow:
    head = record.head
    leaves = tuple((path, head.edits[edit]) for path, edit in head.rows)
    try:
        when = datetime.fromtimestamp(head.time, UTC)
    except (ValueError, OverflowError, OSError):
        raise record.damaged("its time makes no sense") from None
    return HistoryRow(record.number, when, leaves, head.files, record.nbytes)


# ---- what files hold


def state_of(descriptor: int, spans: Spans, file: int) -> State:
    """How an open file can be known again; `spans` are those that change, `file` is its number in them."""
    size = os.fstat(descriptor).st_size
    return State(size, witness(descriptor, size, spans, file))


def digests(descriptors: Sequence[int], files: Sequence[Path], spans: Spans, rows: int) -> list[bytes]:
    """For each row, and then for what has none, the digest of what its ranges hold now, as `DONE` frames have it."""
    found = [hashlib.sha256() for _ in range(rows + 1)]  # row -1 is the last
    buffer = memoryview(bytearray(BUFFER))
    for row, file, start, stop in spans.pieces():
        view = buffer[: stop - start]
        get_into(view, descriptors[file], start, files[file])
        found[row].update(checksum(view))
    return [digest.digest() for digest in found]


def take_back(base: Path, path: Path, error: BaseException) -> None:
    """Puts the old bytes back after something went wrong within a patch whose record was begun at this path.

    Raises:
        CannotWrite: what went wrong came from the system, or the bytes could not be put back.
    """
    try:
        try:
            _abandon(base, path)
        except KeyboardInterrupt:  # once more, from the start
            _abandon(base, path)
            raise
    except (OSError, ParamendError) as second:
        raise CannotWrite(
            f"{base}: {reason(error)}; and then the old bytes could not be put back: {reason(second)}. They are safe "
            f"in {path.parent}, and the next program that opens the checkpoint tries again",
            hint=f"paramend undo {base}",
        ) from error
    if isinstance(error, OSError) and not isinstance(error, ParamendError):
        raise CannotWrite(f"{base}: {reason(error)}; nothing was changed") from error


def _abandon(base: Path, path: Path) -> None:
    done, pending = path.with_suffix(f".{DONE}"), path.with_suffix(f".{PENDING}")
    if done.exists():  # it was marked, and then something went wrong
        done.rename(pending)
    if pending.exists():
        with Record(pending) as record:
            put_back(base, record, own=True)
    elif path.exists():
        path.unlink()
