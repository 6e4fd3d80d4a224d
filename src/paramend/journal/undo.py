"""Undoing: the bytes of an undo record are put back, on request or because a patch was cut short."""

import contextlib
import os
from pathlib import Path

from paramend.disk.urls import Url, path_of
from paramend.errors import BadCheckpoint, CannotRead, CannotWrite
from paramend.formats.files import near
from paramend.journal.history import HistoryRow, UndoReport
from paramend.journal.records import DONE, PENDING, Record
from paramend.journal.store import UndoStore
from paramend.reports.progress import Progress


def undo(path: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None) -> UndoReport:
    """The report of what was taken back: the last patch of a checkpoint that has not been taken back.

    If a patch was cut short, only that one is taken back.

    Args:
        path: a file or folder.
        force: whether to put the old bytes back even if those bytes have changed since, or the file is another one of
            the same size.
        progress: called with an `Event` as bytes are written.

    Raises:
        CannotWrite: there is nothing to take back, or the file has been changed or replaced since; the message names
            what differs.
        BadCheckpoint: the undo record is damaged. Nothing was written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = pm.save({"a": np.ones(2), "b": np.ones(2)}, path)
    >>> _ = pm.patch(path, lambda t: pm.at(t, "a").zero()), pm.patch(path, lambda t: pm.at(t, "b").fill(2))
    >>> report = undo(path)
    >>> report.undone.edit, report.left
    ('fill(2) at b', 1)
    """
    store = _store_of(path)
    if not store.has_records():
        raise _nothing(store)
    interrupted: HistoryRow | None = None
    with store.writing(recovers=False):
        store.recover_related()
        for found in store.records(PENDING):
            with Record(found) as record:
                interrupted, written = HistoryRow.of(record), record.ranges.nbytes
                store.rollback(record, force=force, progress=progress).finish()
        done = store.records(DONE)
        if interrupted is not None:
            return UndoReport(str(path), interrupted, written, len(done), interrupted=True)
        if not done:
            raise _nothing(store)
        with Record(done[-1]) as record:
            row, written = HistoryRow.of(record), record.ranges.nbytes
            store.rollback(record, force=force, progress=progress).undo()
        return UndoReport(str(path), row, written, len(done) - 1)


def history(path: str | os.PathLike[str]) -> list[HistoryRow]:
    """The patches of a checkpoint that can be taken back, the latest last.

    Raises:
        BadCheckpoint: an undo record is damaged.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = pm.save({"a": np.ones(2), "b": np.ones(2)}, path)
    >>> _ = pm.patch(path, lambda t: pm.at(t, "a").zero()), pm.patch(path, lambda t: pm.at(t, "b").fill(2))
    >>> [row.edit for row in history(path)]
    ['zero() at a', 'fill(2) at b']
    """
    store = _store_of(path)
    recover(store.base)
    rows = []
    for found in store.records(DONE):
        with Record(found) as record:
            rows.append(HistoryRow.of(record))
    return rows


def recover(path: str | os.PathLike[str]) -> list[HistoryRow]:
    """The patches that were cut short and are now taken back; usually none. Opening a checkpoint calls it.

    Only this user's own patches on this machine are taken back unasked: anyone can put a record beside a file. A patch
    that another program is still making is left alone. `BadCheckpoint` if a record is damaged or not this user's own,
    or the file has been replaced since.
    """
    if isinstance(path_of(path), Url):  # nothing in a store is changed in place
        return []
    try:
        store = UndoStore.of(path)
        stores = [store, *store.related]
    except PermissionError:  # reading the checkpoint fails too, and reports it
        return []
    return [row for each in stores for row in each.recover()]


def drop(path: str | os.PathLike[str], *, keep: int = 0) -> list[HistoryRow | Path]:
    """The undo records that were forgotten, the oldest first, to free their space: a row for each, or the path of a
    damaged one. The checkpoint stays as it is; the latest `keep` patches can still be taken back."""
    store = UndoStore.of(path)
    if not store.has_records():
        return []
    with store.writing(recovers=False):
        with contextlib.suppress(BadCheckpoint):
            store.recover_held()
        return store.drop(keep)


def _store_of(path: str | os.PathLike[str]) -> UndoStore:
    store = UndoStore.of(path)
    if not os.path.lexists(store.base):
        raise CannotRead(f"{store.base}: there is no such file", hint=near(store.base))
    return store


def _nothing(store: UndoStore) -> CannotWrite:
    other = [each for each in store.related if each.records(DONE)]
    hint = f"paramend undo {other[0].base}, which was patched" if other else ""
    return CannotWrite(f"{store.base}: there is nothing to take back: it has no undo records", hint=hint)
