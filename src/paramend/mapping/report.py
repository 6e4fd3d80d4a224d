"""What became of leaves that were made of others, put into a model or taken out of one."""

from dataclasses import dataclass
from typing import Any, ClassVar

from paramend.leaves.origins.texts import shortened
from paramend.leaves.specs import Spec
from paramend.reports import wording
from paramend.reports.fields import picked
from paramend.reports.report import Line, Report, Section


@dataclass(frozen=True)
class Moved:
    """A leaf that was made, or came from elsewhere.

    Attributes:
        path: its path.
        spec: its shape and dtype.
        origin: what it is made of, as an expression.
        sources: the paths of the leaves that its rule took; its old path.
    """

    _data: ClassVar = ("path", "spec.dtype", "spec.shape", "origin", "sources")

    path: str
    spec: Spec
    origin: str
    sources: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class LayoutReport(Report):
    """What a layout did with a tree, or `pm.insert`, `pm.part` or `pm.fold`.

    Attributes:
        layout: the name of the layout; "insert", "part" or "fold".
        rows: the leaves that were made, put in or taken out.
        kept: the paths of the leaves that stayed as they were; of a part, of those that were left out.
        did: what was done to the rows and to those kept.
        said: what else is to be said, line by line.
    """

    layout: str
    rows: tuple[Moved, ...]
    kept: tuple[str, ...]
    did: tuple[str, str] = ("made", "kept")
    said: tuple[str, ...] = ()

    def headline(self) -> str:
        """How many leaves became how many."""
        (did, rest), made = self.did, wording.plural(len(self.rows), "leaf", "leaves")
        of = f" of {len({path for row in self.rows for path in row.sources}):,}" if did == "made" else ""
        return "\n".join((f"{self.layout or 'layout'}: {made} {did}{of}, {len(self.kept):,} {rest}", *self.said))

    def sections(self) -> list[Section]:
        made = [Line((row.path, shortened(row.origin)), (str(row.spec),), row.spec.size) for row in self.rows]
        return [Section(self.did[0], made), Section(self.did[1], [Line((path,)) for path in self.kept])]

    def to_dict(self) -> dict[str, Any]:
        did, rest = self.did
        return picked(self, "layout", f"rows as {did}", f"kept as {rest.replace(' ', '_')}", "said?")
