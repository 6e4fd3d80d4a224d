"""The report of a change of width: which axes have another length, and what each leaf is made of."""

from dataclasses import dataclass, field
from typing import ClassVar

from paramend.leaves.specs import Spec
from paramend.pages.page import Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.report import Line, Section
from paramend.resize.widths import Widths


@dataclass(frozen=True, slots=True)
class WidthRow:
    """What became of one leaf.

    Attributes:
        path: its path.
        before: its spec.
        after: its new spec.
        rate: the factor of its values. Multiplied by it, the rate of Adam makes the steps that the old model would
            have made; a decoupled decay is divided by it. None if places have different ones.
    """

    _data: ClassVar = ("path", "before.shape as before", "after.shape as after", "rate")

    path: str
    before: Spec
    after: Spec
    rate: float | None


@dataclass(repr=False)
class WidthReport(Widths, Paged):
    """Which axes of a model have another length, and which leaves follow.

    Attributes:
        verb: "widen" or "narrow".
        sizes: axis → its old length and its new one.
        rows: the leaves that changed.
        config: descriptions of the changes to the model's configuration.
        kept: for `pm.narrow`, axis → the places that were kept, layer by layer.
    """

    _data = ("verb", "sizes", "rows", "config", "kept")

    verb: str = "widen"
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    rows: list[WidthRow] = field(default_factory=list)
    config: list[str] = field(default_factory=list)
    kept: dict[str, list[list[int]]] = field(default_factory=dict)

    def headline(self) -> str:
        """The axes with their lengths, and how many leaves follow."""
        axes = [f"{axis} {old:,} -> {new:,}" for axis, (old, new) in self.sizes.items()]
        before, after = (sum(getattr(row, side).size for row in self.rows) for side in ("before", "after"))
        leaves = wording.plural(len(self.rows), "leaf", "leaves")
        return f"{self.verb}: {wording.listing(axes) or 'nothing'}; {leaves}, {before:,} -> {after:,} parameters"

    def sections(self) -> list[Section]:
        lines = []
        for row in self.rows:
            times = "factors differ" if row.rate is None else f"times {row.rate:g}" if row.rate != 1 else ""
            lines.append(Line((row.path,), (f"{row.before} -> {row.after}", times), row.after.size))
        return [Section("changed", lines)]

    def __str__(self) -> str:
        return "\n\n".join([super().__str__(), *([f"config: {', '.join(self.config)}"] if self.config else [])])

    def page(self) -> Page:
        """The new model as a map, coloured by whether values were multiplied."""
        kinds = ["moved" if row.rate == 1 else "multiplied" for row in self.rows]
        shown = self.verb, self.headline(), self.rows
        return Page.of_rows(*shown, "before", "after", size="after.size", groups=kinds, group_title="kind")
