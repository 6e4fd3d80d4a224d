"""What a patch did, as a report; and the files of checkpoints, for reports that tell of them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.disk.urls import path_of
from paramend.edits.plan import Outcome, Plan
from paramend.reports import wording
from paramend.reports.fields import picked


@dataclass(frozen=True, repr=False)
class PatchReport(Outcome):
    """What a patch did.

    Attributes:
        path: the checkpoint.
        plan: the rows; its text is the table of a dry run.
        bytes_written: bytes of the checkpoint that were written.
        bytes_recorded: the size of the undo record.
        record: its path; None if nothing was written.
        dry_run: whether this was a dry run, which writes nothing.
    """

    path: str
    plan: Plan
    bytes_written: int
    bytes_recorded: int = 0
    record: str | None = None
    dry_run: bool = False

    @property
    def summary(self) -> str:
        """What was written, in one line."""
        damage = f"; {self.plan.damage}" if self.plan.damage else ""
        written = f"{wording.size(self.bytes_written)} written in place{damage}"
        if self.dry_run:
            would = f"{wording.size(self.bytes_written)} would be written in place"
            return f"dry run: {self.path} was not changed; {would}{damage}"
        if self.record is None:
            return f"{self.path} has nothing to change"
        return f"patched {self.path}: {written}; to take it back: paramend undo {self.path}"

    def to_dict(self) -> dict[str, Any]:
        written = picked(self, "dry_run", "bytes_written", "bytes_recorded", "record")
        return picked(self, "path") | self.plan.to_dict() | written


def read_by(tree: Any) -> list[Path]:
    """The path of a checkpoint, unless it is the working directory, and the files that it is read from; none for a tree
    in memory."""
    if not isinstance(tree, Checkpoint):
        return []
    path = path_of(tree.source.path)
    return [*([path] if path.name else ()), *tree.source.stats]
