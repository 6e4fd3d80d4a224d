"""The report of the statistics of leaves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from paramend.evidence.measures import MEASURES, Measures
from paramend.leaves.specs import Spec
from paramend.pages.page import Histogram, Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.fields import picked
from paramend.reports.report import Line, Section

_LEAF = ("path", "shape", "dtype", "nbytes", "also", "unread")
_SPECTRAL = ("spectral_norm", "stable_rank", "dead", "units")


@dataclass(frozen=True, slots=True)
class StatsRow(Measures):
    """Statistics of the values of one leaf, computed in float64; of complex values, those of their absolute values.

    Attributes:
        path: the path.
        shape: the shape.
        dtype: the dtype.
        nbytes: the bytes.
        also: the other paths of a tied leaf.
        unread: why the values could not be read, or "".
        min: the least value that is not NaN; None if all are NaN.
        max: the greatest value that is not NaN; None if all are NaN.
        mean: the mean of the finite values; None if no value is finite.
        std: the standard deviation of the finite values, divided by their number.
        norm: the L2 norm of the finite values.
        zeros: how many values are 0.
        nans: how many are NaN.
        infs: how many are infinite.
        spectral_norm: the greatest singular value of the leaf as a matrix, if requested.
        stable_rank: the square of norm / spectral_norm: at most the rank, and less where few directions dominate.
        dead: how many output units have only weights of 0, if requested.
        units: how many output units there are, if requested.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    also: tuple[str, ...] = ()
    unread: str = ""
    spectral_norm: float | None = None
    stable_rank: float | None = None
    dead: int | None = None
    units: int | None = None

    @property
    def spec(self) -> Spec:
        """Shape and dtype."""
        return Spec(self.shape, self.dtype)

    @property
    def finite(self) -> int:
        """How many values are finite."""
        return 0 if self.zeros is None else self.spec.size - (self.nans or 0) - (self.infs or 0)

    def to_dict(self) -> dict[str, Any]:
        names = (*_LEAF, *MEASURES, *(_SPECTRAL if self.units is not None else ()))
        return picked(self, *names)


@dataclass(repr=False)
class StatsReport(Paged):
    """Statistics of the values of a tree's leaves.

    Attributes:
        leaves: a row for each leaf, in the order of the tree; a leaf with several paths counts once.
        histograms: path → the histogram of the leaf, if requested.
    """

    _data = ("totals", "leaves")

    leaves: list[StatsRow] = field(default_factory=list)
    histograms: Mapping[str, Histogram] = field(default_factory=dict)

    @property
    def totals(self) -> dict[str, Any]:
        """The figures of all leaves together: `leaves`, `parameters` and `nbytes`, and the measures."""
        return {
            "leaves": len(self.leaves),
            "parameters": sum(row.spec.size for row in self.leaves),
            "nbytes": sum(row.nbytes for row in self.leaves),
            **together(self.leaves),
        }

    def headline(self) -> str:
        totals = self.totals
        odd = [f"{totals[name]:,} {said}" for name, said in (("nans", "NaN"), ("infs", "inf")) if totals[name]]
        norm = "-" if totals["norm"] is None else f"{totals['norm']:.4g}"
        return (
            f"{wording.plural(totals['leaves'], 'leaf', 'leaves')}, "
            f"{wording.plural(totals['parameters'], 'parameter')}, {wording.size(totals['nbytes'])}; "
            f"norm {norm}, {', '.join(odd) or 'all finite'}"
        )

    def sections(self) -> list[Section]:
        """The leaves that could be read, and those that could not."""
        by_path = {row.path: row for row in self.leaves}
        read = Section.of("values", [row for row in self.leaves if not row.unread], "spec")
        unread = Section.of("unread", [row for row in self.leaves if row.unread], "spec", "unread", size="")
        spectral = any(row.units is not None for row in self.leaves)
        columns = (*MEASURES, *(("spectral norm", "stable rank", "dead") if spectral else ()))

        def cells(line: Line) -> tuple[str, ...]:
            rows = [by_path[path] for path in line.members]
            found = together(rows)
            return (*(shown(found[name]) for name in MEASURES), *(_spectral(rows) if spectral else ()))

        return [replace(read, columns=columns, cells=cells), unread]

    def page(self) -> Page:
        """The tree as a map, coloured by norm."""
        names = [
            *sorted(MEASURES, key="norm".__ne__),
            *(_SPECTRAL if any(row.units is not None for row in self.leaves) else ()),
        ]
        found = self.histograms
        drawn = {place: found[row.path] for place, row in enumerate(self.leaves) if row.path in found}
        return Page.of_rows("stats", self.headline(), self.leaves, *names, "spec", histograms=drawn, colour="norm")


def together(rows: Sequence[StatsRow]) -> dict[str, Any]:
    """The measures of several leaves as if they were one."""
    full = [row for row in rows if row.mean is not None and row.std is not None and row.norm is not None]
    count = sum(row.finite for row in full)
    mean = math.fsum(row.finite * (row.mean or 0.0) / count for row in full) if full else None
    lows, highs = ([value for row in rows if (value := getattr(row, name)) is not None] for name in ("min", "max"))
    found: dict[str, Any] = {"min": min(lows, default=None), "max": max(highs, default=None), "mean": mean}
    squares = (row.finite * ((row.std or 0.0) ** 2 + ((row.mean or 0.0) - (mean or 0.0)) ** 2) for row in full)
    found["std"] = math.sqrt(math.fsum(squares) / count) if full else None
    found["norm"] = math.hypot(*(row.norm or 0.0 for row in full)) if full else None
    return found | {name: sum(getattr(row, name) or 0 for row in rows) for name in ("zeros", "nans", "infs")}


def _spectral(rows: Sequence[StatsRow]) -> tuple[str, str, str]:
    """The greatest norm, the least stable rank and all dead units of several matrices, as cells."""
    asked = [row for row in rows if row.units is not None]
    norms = [row.spectral_norm for row in asked if row.spectral_norm is not None]
    ranks = [row.stable_rank for row in asked if row.stable_rank is not None]
    dead = f"{sum(row.dead or 0 for row in asked):,} of {sum(row.units or 0 for row in asked):,}" if asked else "-"
    return shown(max(norms, default=None)), shown(min(ranks, default=None)), dead


def shown(value: float | int | None) -> str:
    """A figure as a cell of a table."""
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
