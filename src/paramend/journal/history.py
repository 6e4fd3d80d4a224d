"""History: patches that were made and taken back, as rows and reports."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from paramend.journal.records import Record
from paramend.reports import wording
from paramend.reports.fields import picked
from paramend.reports.report import Report
from paramend.reports.tables import aligned


@dataclass(frozen=True)
class HistoryRow:
    """One patch that can be taken back.

    Attributes:
        number: higher is later.
        time: when it was made.
        leaves: (path, edit) of each leaf that it changed.
        files: the names of the files that it changed.
        nbytes: the size of its record on disk.
    """

    number: int
    time: datetime
    leaves: tuple[tuple[str, str], ...]
    files: tuple[str, ...]
    nbytes: int

    @classmethod
    def of(cls, record: Record) -> "HistoryRow":
        """The row of a record; `BadCheckpoint` if its time is invalid."""
        head = record.head
        leaves = tuple((path, head.edits[edit]) for path, edit in head.rows)
        try:
            when = datetime.fromtimestamp(head.time, UTC)
        except (ValueError, OverflowError, OSError):
            raise record.damaged("its time is invalid") from None
        return cls(record.number, when, leaves, head.files, record.nbytes)

    @property
    def edit(self) -> str:
        """What was done, in one line: each edit with its leaves."""
        found: dict[str, list[str]] = {}
        for path, edit in self.leaves:
            found.setdefault(edit, []).append(path)
        return "; ".join(f"{edit} at {wording.listing(paths, 2)}" for edit, paths in found.items())

    def __str__(self) -> str:
        return f"{self.number}  {self.time:%Y-%m-%d %H:%M:%S} UTC  {wording.size(self.nbytes)}  {self.edit}"

    def to_dict(self) -> dict[str, Any]:
        changed = [{"path": path, "edit": edit} for path, edit in self.leaves]
        return picked(self, "number", "time") | {"changed": changed} | picked(self, "files", "nbytes")


@dataclass(frozen=True, repr=False)
class UndoReport(Report):
    """What an undo did.

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
        return self.summary

    @property
    def summary(self) -> str:
        """What was taken back, in one line."""
        what = "took back an interrupted patch of" if self.interrupted else "took back the last patch of"
        return f"{what} {self.path}: {self.undone.edit}; {wording.plural(self.left, 'patch', 'patches')} left"


def table(rows: Sequence[HistoryRow]) -> list[str]:
    """The lines of a printed history, a header first, the latest patch last."""
    if not rows:
        return ["no patches: nothing to take back"]
    cells = [(str(row.number), f"{row.time:%Y-%m-%d %H:%M:%S}", wording.size(row.nbytes), row.edit) for row in rows]
    return aligned([("", "when (UTC)", "record", "what was done"), *cells], right="rlr")
