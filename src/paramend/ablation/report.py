"""The report of an ablation: the score without each target."""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from paramend._optional import need
from paramend.errors import printable_lines
from paramend.pages.page import Column, Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.report import Line, Section
from paramend.reports.tables import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class AblationRow:
    """The score without one target, or without two.

    Attributes:
        name: the name of the target, or of both.
        targets: the names of the targets that were taken out.
        score: what the score function returned.
        delta: the score minus the baseline.
        leaves: how many leaves were changed.
        parameters: how many scalars.
        interaction: for two targets, the delta minus those of each alone: 0 if they act independently.
    """

    name: str
    targets: tuple[str, ...]
    score: float
    delta: float
    leaves: int
    parameters: int
    interaction: float | None = None


@dataclass(repr=False)
class AblationReport(Paged):
    """The scores of a model without each of some targets.

    Attributes:
        how: the method.
        baseline: the score of the model as it is.
        rows: one for each target, in the given order, then one for each pair.
        traces: how often JAX traced the score; None if it was called untraced.
    """

    how: str
    baseline: float
    rows: list[AblationRow] = field(default_factory=list)
    traces: int | None = None

    @property
    def ranking(self) -> list[AblationRow]:
        """The rows by how far they move the score, largest first; NaN scores come before all others."""
        return sorted(self.rows, key=lambda row: -math.inf if math.isnan(row.delta) else -abs(row.delta))

    def __getitem__(self, name: str) -> AblationRow:
        """The row of a target.

        Raises:
            KeyError: there is no such target.
        """
        found = next((row for row in self.rows if row.name == name), None)
        if found is None:
            near = wording.closest(name, [row.name for row in self.rows], limit=1)
            raise KeyError(f"{name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
        return found

    def headline(self) -> str:
        """The baseline, and the target that matters most."""
        targets = wording.plural(len(self.rows), "ablation")
        said = f"{targets} ({self.how}), baseline {self.baseline:.6g}"
        if not self.rows:
            return said
        first = self.ranking[0]
        return f"{said}; most without {first.name}: {first.delta:+.6g}"

    def sections(self) -> list[Section]:
        """The rows in the order of the ranking."""
        lines = [Line((row.name,), tuple(_cells(row)), row.parameters) for row in self.ranking]
        return [Section("targets", lines)]

    def __str__(self) -> str:
        titles = ("target", "score", "delta", "leaves", "parameters")
        pairs = any(row.interaction is not None for row in self.rows)
        table = [(*titles, *(("interaction",) if pairs else ()))]
        table += [(row.name, *_cells(row)) for row in self.ranking]
        return "\n".join([printable_lines(self.headline()), "", *aligned(table, right="lrrrrr")])

    def page(self) -> Page:
        """A bar for each target, as long as it moves the score, and a matrix of the pairs."""
        names, sizes = [row.name for row in self.rows], [row.parameters for row in self.rows]
        shown = ("delta", "interaction", "score", "leaves", "parameters")
        columns = [Column(name, [getattr(row, name) for row in self.rows]) for name in shown]
        said = {-1: "score falls", 0: "no difference", 1: "score rises"}
        groups = [said[(row.delta > 0) - (row.delta < 0)] for row in self.rows]
        ends = {row.name: place for place, row in enumerate(row for row in self.rows if len(row.targets) == 1)}
        links = [[ends[name] for name in row.targets] for row in self.rows]
        chart: Any = {"chart": "bars", "ends": list(ends), "links": links, "colour": "delta"}
        return Page(f"ablation: {self.how}", self.headline(), names, sizes, columns, groups, "effect", **chart)

    def plot(self) -> "Figure":
        """A matplotlib figure with a bar for the delta of each row, in the order of the rows.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        figures: Any = need("matplotlib.figure", extra="plot", to="plot an ablation")
        figure: Figure = figures.Figure(figsize=(7, 1.2 + 0.28 * len(self.rows)), layout="constrained")
        axes = figure.subplots()
        axes.barh([row.name for row in self.rows], [row.delta for row in self.rows], color="#4269d0")
        axes.axvline(0, color="#555555", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel(f"score minus baseline ({self.baseline:.4g})")
        axes.set_title(f"ablation: {self.how}")
        return figure


def _cells(row: AblationRow) -> list[str]:
    cells = [f"{row.score:.6g}", f"{row.delta:+.6g}", f"{row.leaves:,}", f"{row.parameters:,}"]
    return cells + ([] if row.interaction is None else [f"{row.interaction:+.6g}"])
