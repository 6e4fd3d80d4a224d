"""Exchanging: new files are made beside the undo records of a checkpoint, and then put into it, all or none."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from paramend.checkpoints.report import PatchReport
from paramend.disk.failures import check_room, explained, linked
from paramend.disk.identity import changed, check_still
from paramend.disk.locks import opened
from paramend.disk.permissions import PRIVATE
from paramend.edits.plan import Plan
from paramend.formats.gathered import Gathered
from paramend.formats.index import read_index
from paramend.formats.shards import Shards
from paramend.journal.exchange import STAGED, NewFiles
from paramend.journal.records import Moved
from paramend.journal.store import UndoStore
from paramend.journal.writer import Writer
from paramend.leaves.origins.stored import Stored
from paramend.piecewise.rows import survey
from paramend.reports import wording
from paramend.reports.progress import Progress
from paramend.rewriting.additions import parted
from paramend.rewriting.layouts import lay_in_place
from paramend.rewriting.rewrite import stage


def exchange(
    store: UndoStore,
    edits: Sequence[tuple[str, str]],
    fill: Callable[[Path], None],
    *,
    moved: Moved = (),
    private: bool = False,
) -> tuple[int, Writer]:
    """(bytes written, the record): new files replace old ones, with the lock of the store held.

    Args:
        store: the undo records of the checkpoint.
        edits: (leaf, edit) for the record.
        fill: makes the new files in a folder, each at its path in the checkpoint.
        moved: files that get another name.
        private: whether new files stay as private as they were made.
    """
    path = store.next_path()
    staged = path.with_suffix(f".{STAGED}")
    staged.mkdir(PRIVATE)
    try:
        fill(staged)
        new = NewFiles(store.base, staged, moved, private=private)
        with contextlib.closing(Writer(path, new.access)) as writer:
            try:
                return new.exchange(writer, edits), writer
            except BaseException as error:
                store.take_back(writer, None, error)
                raise
    finally:
        with contextlib.suppress(OSError):
            _remove(staged)


class Addition:
    """Leaves that come to a checkpoint in its own folder, in further files."""

    def __init__(self, store: UndoStore, plan: Plan, progress: Progress | None) -> None:
        """Lay out the new files.

        Raises:
            Unsupported: the checkpoint has no place for them.
        """
        self.store, self.plan, self.progress = store, plan, progress
        self.files, self.moved = lay_in_place(plan)
        new = {row.source for row in parted(plan)[1]}
        rows = (replace(row, added=_from(plan.leaves, row.source)) if row.source in new else row for row in plan.rows)
        self.shown = Plan(plan.leaves, tuple(rows))

    def rehearse(self) -> PatchReport:
        """The report of a dry run, after all checks that are possible before writing."""
        survey(self.shown)
        with explained(self.store.base):
            if self.store.base.is_symlink():
                raise linked(self.store.base)
            with self._replaced(lock=False):
                return PatchReport(str(self.store.base), self.shown, self._nbytes, dry_run=True)

    def carry_out(self) -> PatchReport:
        """Write, with the lock of the store held."""
        with explained(self.store.base), self._replaced(lock=True):
            self.store.check_nothing_pending()
            edits = [(row.path, row.edit) for row in self.shown.changed]
            written, record = exchange(self.store, edits, self._fill, moved=self.moved, private=True)
        return PatchReport(str(self.store.base), self.shown, written, record.nbytes, str(record.path))

    @property
    def _nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @contextlib.contextmanager
    def _replaced(self, *, lock: bool) -> Iterator[None]:
        """While it lasts, no other program writes to the files that are replaced or moved."""
        folder = base = self.store.base
        names = *(file.name for file in self.files), *(name for name, _ in self.moved)
        old = {name: (folder / name).stat().st_size for name in names if (folder / name).exists()}
        with opened([folder / name for name in old], lock=lock):
            recorded = sum(size for name, size in old.items() if name not in dict(self.moved))
            hint = f"paramend undo {base} --drop frees the space of older records"
            check_room(folder, self._nbytes + recorded + (1 << 16), f"{base}: the insertion", hint=hint)
            yield

    def _fill(self, staged: Path) -> None:
        stage(self.plan, self.files, self.store.base, staged, self.progress)
        source: Shards = self.plan.leaves.base  # type: ignore[attr-defined]
        check_still(source.stats)
        index = source.shard_index
        if index is not None and read_index(index.path).table != index.table:
            raise changed(index.path)


def _from(leaves: Any, number: int) -> str:
    """What a leaf comes from: the checkpoints that it is read from."""
    assert isinstance(leaves, Gathered)
    stored = leaves.origins[number].stored()
    return wording.listing(sorted({str(each.source.path) if isinstance(each, Stored) else "memory" for each in stored}))


def _remove(folder: Path) -> None:
    import shutil  # slow to import

    shutil.rmtree(folder, ignore_errors=True)
