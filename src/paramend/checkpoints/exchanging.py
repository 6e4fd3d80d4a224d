"""Exchanging: a patch is recorded and made, all or nothing; new files are made beside the records before."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from paramend.anatomy.documents import Document
from paramend.checkpoints.report import PatchReport
from paramend.disk.failures import check_room, explained, linked
from paramend.disk.identity import changed, check_still
from paramend.disk.locks import opened
from paramend.disk.permissions import PRIVATE, access_of
from paramend.edits.plan import Plan
from paramend.formats.gathered import Gathered
from paramend.formats.shards import read_index
from paramend.journal.exchange import STAGED, NewFiles
from paramend.journal.ranges import OpenRanges, Ranges
from paramend.journal.records import DONE, Moved
from paramend.journal.store import UndoStore
from paramend.journal.writer import Writer
from paramend.leaves.origins.stored import Stored
from paramend.piecewise.rows import survey
from paramend.reports import wording
from paramend.reports.progress import Progress
from paramend.rewriting.arrangement import base_of
from paramend.rewriting.layouts import lay_in_place
from paramend.rewriting.rewrite import stage
from paramend.rewriting.shards import parted


@contextlib.contextmanager
def staged(
    store: UndoStore,
    fill: Callable[[Path], None] | None,
    documents: Sequence[Document],
    moved: Moved = (),
    *,
    private: bool = False,
) -> Iterator[NewFiles]:
    """New files that will take the places of others, with the lock of the store held; in the end, none is left.

    `fill` makes them in a folder, each at its path in the checkpoint; None if there are none. Those that are documents
    must be as they were read. Files that are `moved` get another name; new ones that are `private` stay as private as
    they were made.
    """
    if fill is None:
        yield NewFiles(store.base, None)
        return
    folder = store.next_path().with_suffix(f".{STAGED}")
    folder.mkdir(PRIVATE)
    try:
        fill(folder)
        new = NewFiles(store.base, folder, moved, private=private)
        for document in documents:
            if document.own:  # of a file that is checked as a source
                continue
            now = document.file.read_bytes() if os.path.lexists(document.file) else b""
            if now != document.before:
                raise changed(document.file)
        yield new
    finally:
        import shutil  # slow to import

        with contextlib.suppress(OSError):  # also of closing, which it does not ignore
            shutil.rmtree(folder, ignore_errors=True)


def carried_out(
    store: UndoStore,
    edits: Sequence[tuple[str, str]],
    new: NewFiles,
    target: OpenRanges,
    change: Callable[[], None],
    progress: Callable[[int], None],
) -> Writer:
    """The record of a patch, which has been made: all of it, or nothing, with the lock of the store held.

    New files take the places of others, and `change` writes to those of `target`, in place; `progress` receives the
    number of bytes recorded.
    """
    there = [*map(os.fstat, target.descriptors), *filter(None, new.then)]  # who may read all may read the record
    access = access_of(there) if target.files else new.access
    with contextlib.closing(Writer(store.next_path(), access)) as writer:
        try:
            new.sync()
            new.record(writer, edits, target, [store.name_of(file) for file in target.files], progress)
            # Up to here nothing in the checkpoint has changed; from here on the record can restore it.
            if target.files:
                change()
                after = b"".join(target.digests(len(edits)))  # while the disk writes
            new.exchange()
            target.sync()
            if target.files:
                writer.frame(b"DONE", after)
            target.check_named("the patch was taken back in the file that was there")
            writer.become(DONE)
        except BaseException as error:
            store.take_back(writer, target, error)
            raise
        return writer


class Addition:
    """Files of a checkpoint that are made anew in its own folder: further ones, for leaves that come to it, or those
    whose headers get longer. `Unsupported` without a place for leaves."""

    def __init__(self, store: UndoStore, plan: Plan, progress: Progress | None) -> None:
        self.store, self.plan, self.progress = store, plan, progress
        self.files, self.moved = lay_in_place(plan)
        self._nbytes = sum(file.nbytes for file in self.files)
        new = {row.source for row in parted(plan)[1]} if isinstance(plan.leaves, Gathered) else set()
        rows = (replace(row, added=_from(plan.leaves, row.source)) if row.source in new else row for row in plan.rows)
        self.shown = replace(plan, rows=tuple(rows))

    def rehearse(self) -> PatchReport:
        survey(self.shown)
        with explained(self.store.base):
            if self.store.base.is_symlink():
                raise linked(self.store.base)
            with self._replaced(lock=False):
                return PatchReport(str(self.store.base), self.shown, self._nbytes, dry_run=True)

    def carry_out(self) -> PatchReport:
        with explained(self.store.base), self._replaced(lock=True):
            self.store.check_nothing_pending()
            edits = [(row.path, row.edit) for row in self.shown.changed]
            edits += [(change.file, str(change)) for change in self.shown.configured]
            with staged(self.store, self._fill, self.plan.texts, self.moved, private=True) as new:
                none = OpenRanges((), (), Ranges(np.empty((0, 4), np.int64)))
                record = carried_out(self.store, edits, new, none, lambda: None, lambda count: None)
        return PatchReport(str(self.store.base), self.shown, self._nbytes, record.nbytes, str(record.path))

    @contextlib.contextmanager
    def _replaced(self, *, lock: bool) -> Iterator[None]:
        """While it lasts, no other program writes to the files that are replaced or moved."""
        folder, base = self.store.home, self.store.base
        names = *(file.name for file in self.files), *(name for name, _ in self.moved)
        old = {name: (folder / name).stat().st_size for name in names if (folder / name).exists()}
        with opened([folder / name for name in old], lock=lock):
            recorded = sum(size for name, size in old.items() if name not in dict(self.moved))
            hint = f"paramend undo {base} --drop frees the space of older records"
            check_room(folder, self._nbytes + recorded + (1 << 16), f"{base}: the insertion", hint=hint)
            yield

    def _fill(self, staged: Path) -> None:
        stage(self.plan, self.files, self.store.home, staged, self.progress)
        source = base_of(self.plan)
        check_still(source.stats)
        index = getattr(source, "shard_index", None)
        if index is not None and read_index(index.path).table != index.table:
            raise changed(index.path)


def _from(leaves: Any, number: int) -> str:
    """What a leaf comes from: the checkpoints that it is read from."""
    assert isinstance(leaves, Gathered)
    stored = leaves.origins[number].stored()
    return wording.listing(sorted({str(each.source.path) if isinstance(each, Stored) else "memory" for each in stored}))
