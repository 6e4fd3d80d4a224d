"""The report of a change of vocabulary."""

from dataclasses import dataclass, field
from typing import Any

from paramend.leaves.specs import Spec
from paramend.pages.page import Column, Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.report import Line, Section


@dataclass(frozen=True, slots=True)
class TableRow:
    """A table: its path, and its shape and dtype before and after."""

    path: str
    before: Spec
    spec: Spec


@dataclass(frozen=True, repr=False)
class VocabularyReport(Paged):
    """What became of a vocabulary.

    Attributes:
        did: "kept", "extended", "padded" or "transplanted".
        rows: the tables, in the order of the tree.
        size: how many rows they had and have.
        ids: old number of a token → its new one, of all that stay.
        tokens: token → its number, of those that are new.
        unasked: the numbers, as they were, of tokens that stay unasked: special ones, and those that others need.
        files: what changes in the files beside the weights.
    """

    did: str
    rows: tuple[TableRow, ...]
    size: tuple[int, int]
    ids: dict[int, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    unasked: tuple[int, ...] = ()
    files: tuple[str, ...] = ()

    def headline(self) -> str:
        """The numbers of rows and tokens, and the files that follow."""
        before, after = self.size
        said = f"vocabulary {self.did}: {before:,} rows -> {after:,} in {wording.plural(len(self.rows), 'table')}"
        said += f", {wording.plural(len(self.tokens), 'new token')}" if self.tokens else ""
        said += f", {wording.plural(len(self.unasked), 'token')} kept unasked" if self.unasked else ""
        return "\n".join((said, *self.files))

    def sections(self) -> list[Section]:
        """The tables."""
        rows = [Line((row.path,), (str(row.before), f"-> {row.spec}"), row.spec.size) for row in self.rows]
        return [Section("tables", rows)]

    def page(self) -> Page:
        """The tables as a map."""
        specs = [Column(name, [str(getattr(row, name)) for row in self.rows], "text") for name in ("before", "spec")]
        sizes = [row.spec.size for row in self.rows]
        return Page("vocabulary", self.headline(), [row.path for row in self.rows], sizes, specs)

    def to_dict(self) -> dict[str, Any]:
        """The report as data that JSON can hold."""
        rows = [{"path": row.path, "before": str(row.before), "spec": str(row.spec)} for row in self.rows]
        ids = {str(old): new for old, new in self.ids.items()}
        data = {"did": self.did, "tables": rows, "size": list(self.size), "ids": ids, "tokens": self.tokens}
        return data | {"unasked": list(self.unasked), "files": list(self.files)}
