"""What a layout did with a tree."""

from dataclasses import dataclass
from typing import Any

from paramend.leaves.origins.texts import shortened
from paramend.leaves.specs import Spec
from paramend.reports import wording
from paramend.reports.report import Line, Report, Section


@dataclass(frozen=True)
class Moved:
    """A leaf that was made.

    Attributes:
        path: its path.
        spec: its shape and dtype.
        origin: what it is made of, as an expression.
        sources: the paths of the leaves that its rule took.
    """

    path: str
    spec: Spec
    origin: str
    sources: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class LayoutReport(Report):
    """What a layout did with a tree.

    Attributes:
        layout: the name of the layout.
        rows: the leaves that were made.
        kept: the paths of the leaves that stayed as they were.
    """

    layout: str
    rows: tuple[Moved, ...]
    kept: tuple[str, ...]

    def headline(self) -> str:
        """How many leaves became how many."""
        taken = len({path for row in self.rows for path in row.sources})
        made = wording.plural(len(self.rows), "leaf", "leaves")
        return f"{self.layout or 'layout'}: {made} made of {taken:,}, {len(self.kept):,} kept"

    def sections(self) -> list[Section]:
        """The leaves that were made, and those that stayed."""
        made = [Line((row.path, shortened(row.origin)), (str(row.spec),), row.spec.size) for row in self.rows]
        return [Section("made", made), Section("kept", [Line((path,)) for path in self.kept])]

    def to_dict(self) -> dict[str, Any]:
        """The report as data that JSON can hold."""
        rows = [
            {"path": row.path, "dtype": row.spec.dtype, "shape": list(row.spec.shape), "origin": row.origin}
            | {"sources": list(row.sources)}
            for row in self.rows
        ]
        return {"layout": self.layout, "made": rows, "kept": list(self.kept)}
