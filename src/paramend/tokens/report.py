"""The report of a change of vocabulary."""

from dataclasses import dataclass, field

from paramend.leaves.specs import Spec
from paramend.pages.page import Column, Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.report import Line, Section


@dataclass(frozen=True, repr=False)
class VocabularyReport(Paged):
    """What became of a vocabulary.

    Attributes:
        did: "kept", "extended", "padded" or "transplanted".
        tables: path of a table → its shape and dtype before and after.
        size: how many rows they had and have.
        ids: old number of a token → its new one, of all that stay.
        tokens: token → its number, of those that are new.
        unasked: the numbers, as they were, of tokens that stay unasked: special ones, and those that others need.
        files: what changes in the files beside the weights.
    """

    did: str
    tables: dict[str, tuple[Spec, Spec]]
    size: tuple[int, int]
    ids: dict[int, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    unasked: tuple[int, ...] = ()
    files: tuple[str, ...] = ()

    def headline(self) -> str:
        """The numbers of rows and tokens, and the files that follow."""
        before, after = self.size
        said = f"vocabulary {self.did}: {before:,} rows -> {after:,} in {wording.plural(len(self.tables), 'table')}"
        said += f", {wording.plural(len(self.tokens), 'new token')}" if self.tokens else ""
        said += f", {wording.plural(len(self.unasked), 'token')} kept unasked" if self.unasked else ""
        return "\n".join((said, *self.files))

    def sections(self) -> list[Section]:
        """The tables."""
        lines = [Line((path,), (str(old), f"-> {new}"), new.size) for path, (old, new) in self.tables.items()]
        return [Section("tables", lines)]

    def page(self) -> Page:
        """The tables as a map."""
        before, after = ([str(pair[side]) for pair in self.tables.values()] for side in (0, 1))
        columns = [Column("before", before, "text"), Column("spec", after, "text")]
        sizes = [new.size for _, new in self.tables.values()]
        return Page("vocabulary", self.headline(), [*self.tables], sizes, columns)
