"""What a patch did, as a report."""

from dataclasses import dataclass, replace
from typing import Any

from paramend.edits.plan import Plan
from paramend.errors import printable_lines
from paramend.pages.page import Page
from paramend.pages.paged import Paged
from paramend.reports import wording


@dataclass(frozen=True, repr=False)
class PatchReport(Paged):
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", self.plan.told())

    def headline(self) -> str:
        """What was written, in one line."""
        return self.summary

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

    def page(self) -> Page:
        """The page of the plan, with what was written."""
        return replace(self.plan.page(), headline=self.summary)

    def __str__(self) -> str:
        return f"{self.plan}\n{printable_lines(self.summary)}"

    def to_dict(self) -> dict[str, Any]:
        """The report as data that JSON can hold."""
        return {
            "path": self.path,
            **self.plan.to_dict(),
            "dry_run": self.dry_run,
            "bytes_written": self.bytes_written,
            "bytes_recorded": self.bytes_recorded,
            "record": self.record,
        }
