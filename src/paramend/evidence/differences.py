"""The report of a comparison: what was added, removed, renamed, respecified, changed, and what is identical."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from paramend.evidence.distances import FIGURES, Distance
from paramend.leaves.paths import natural
from paramend.leaves.specs import Spec
from paramend.pages.page import Histogram, Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.fields import picked
from paramend.reports.report import Line, Section

DIFFERENT = ("changed", "respecified", "renamed", "removed", "added")
PARTS = (*DIFFERENT, "identical")
_MOST_ULPS = 1_000_000  # beyond, values are not near each other, and the other figures say how far apart they are
_LAST = ("near as max_ulp", "before as was", "spec")
_COLUMNS = ("relative_l2", "max_abs", "differing", "nonfinite", "cosine", *_LAST)
_HEADER = ("differ", "max abs", "rel l2", "cosine", "ulp")


@dataclass(frozen=True, slots=True)
class DiffRow(Distance):
    """What became of one leaf. The figures of leaves that were not compared are None.

    Attributes:
        path: the path in b; for a removed leaf, the path in a.
        shape: the shape in b; for a removed leaf, that in a.
        dtype: likewise.
        nbytes: likewise.
        also: the other paths of a tied leaf.
        was: the path in a of a renamed leaf, or "".
        shape_before: the shape in a of a respecified leaf, or None.
        dtype_before: likewise.
        differing: how many elements differ; None if their width is unknown.
        nonfinite: how many of these are NaN or inf on a side. The figures below leave them out.
        max_abs: the greatest |b - a|.
        relative_l2: ‖b - a‖ / ‖a‖.
        cosine: the cosine of the angle between a and b as vectors.
        max_ulp: the greatest distance in units in the last place.
        transposed: the order of axes for which b is `a.transpose(order)`, bit by bit; None if there is none.
        allowed: whether `only` selects the leaf; True without `only`.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    also: tuple[str, ...] = ()
    was: str = ""
    shape_before: tuple[int, ...] | None = None
    dtype_before: str | None = None
    transposed: tuple[int, ...] | None = None
    allowed: bool = True

    @property
    def spec(self) -> Spec:
        """Shape and dtype at `path`."""
        return Spec(self.shape, self.dtype)

    @property
    def spec_before(self) -> Spec:
        """Shape and dtype in a."""
        return self.spec if self.shape_before is None else Spec(self.shape_before, self.dtype_before or "")

    @property
    def before(self) -> str:
        """The path or the spec in a, if that is another."""
        return self.was or (str(self.spec_before) if self.shape_before else "")

    @property
    def near(self) -> int | None:
        """`max_ulp`, if values are near each other."""
        return None if self.max_ulp is None or self.max_ulp > _MOST_ULPS else self.max_ulp

    @property
    def says(self) -> str:
        """How far the values moved, in words."""
        if self.differing is None:
            return "other bytes"
        count = f"{self.differing:,} of {self.spec.size:,} values"
        if self.max_abs is not None:
            return f"{count}, by at most {self.max_abs:.6g}"
        return f"{count}, to or from NaN or inf" if self.nonfinite else count

    def to_dict(self) -> dict[str, Any]:
        """The row as data that JSON can hold, with the figures if there are any."""
        names = ["path", "also", "shape", "dtype", "nbytes", "allowed"]
        names += ["was"] * bool(self.was)
        names += ["shape_before", "dtype_before"] * (self.shape_before is not None)
        names += FIGURES if self.differing is not None else ()
        names += ["transposed"] * (self.transposed is not None)
        return picked(self, *names)


def said(kind: str, row: DiffRow) -> str:
    """What happened to a leaf in one of the lists, in words."""
    if kind == "respecified":
        return f"{row.spec_before} became {row.spec}"
    return {"removed": "gone", "added": "new", "renamed": f"renamed from {row.was}"}.get(kind, row.says)


def weight(row: DiffRow) -> tuple[float, float]:
    """The size of a change, for sorting: NaN and inf first, then by the share of the norm that moved."""
    moved = math.inf if row.nonfinite or row.relative_l2 is None else row.relative_l2
    return moved, float(row.max_abs or 0)


@dataclass(repr=False)
class DiffReport(Paged):
    """What differs between two trees, a and b. It is true if anything does.

    Every leaf of either is in exactly one of the lists; a leaf with several paths counts once.

    Attributes:
        changed: leaves of the same name and spec with other bits, the largest change first, or by path.
        respecified: leaves of the same name with another shape or dtype.
        renamed: leaves with the same bytes under another name.
        removed: leaves that only a has.
        added: leaves that only b has.
        identical: leaves that are equal bit by bit.
        only: the selector of what may differ, as text, or None.
        histograms: path of a changed leaf → the histograms of its values in a and in b, if requested.
    """

    changed: list[DiffRow] = field(default_factory=list)
    respecified: list[DiffRow] = field(default_factory=list)
    renamed: list[DiffRow] = field(default_factory=list)
    removed: list[DiffRow] = field(default_factory=list)
    added: list[DiffRow] = field(default_factory=list)
    identical: list[DiffRow] = field(default_factory=list)
    only: str | None = None
    histograms: Mapping[str, Histogram] = field(default_factory=dict)

    _data = ("only", "totals", *PARTS)
    _between = " → "

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in DIFFERENT)

    @property
    def unexpected(self) -> list[DiffRow]:
        """The rows of leaves that differ and that `only` does not select."""
        return [row for name in DIFFERENT for row in getattr(self, name) if not row.allowed]

    @property
    def expected(self) -> list[DiffRow]:
        """The rows of leaves that differ and that `only` selects; without `only`, all that differ."""
        return [row for name in DIFFERENT for row in getattr(self, name) if row.allowed]

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """Leaves, parameters and bytes in each of the lists."""
        return {
            name: {
                "leaves": len(rows),
                "parameters": sum(row.spec.size for row in rows),
                "nbytes": sum(row.nbytes for row in rows),
            }
            for name in PARTS
            for rows in [getattr(self, name)]
        }

    def headline(self) -> str:
        counts = {name: len(getattr(self, name)) for name in PARTS}
        every = sum(counts.values())
        nbytes = wording.size(sum(part["nbytes"] for part in self.totals.values()))
        if not self:
            said = f"no difference: {wording.plural(every, 'leaf is', 'leaves are')} identical, {nbytes}"
        else:
            parts = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
            differ = every - counts["identical"]
            verb = "differs" if differ == 1 else "differ"
            said = f"{differ:,} of {wording.plural(every, 'leaf', 'leaves')} {verb}: {parts}"
        if self.only is None:
            return said
        outside = len(self.unexpected)
        where = f"outside {self.only}" if outside else f"all within {self.only}" if self else f"nothing in {self.only}"
        return f"{said}; {f'{outside:,} ' * bool(outside)}{where}"

    def sections(self) -> list[Section]:
        """The parts with leaves that differ; with `only`, first those that it does not select."""
        found = []
        for allowed in (False, True):
            place = "" if self.only is None else f" within {self.only}" if allowed else f" outside {self.only}"
            for name in DIFFERENT:
                rows = [row for row in getattr(self, name) if row.allowed is allowed]
                found.append(_section(name, f"{name}{place}", rows))
        return found

    def page(self) -> Page:
        """The tree b as a map, coloured by what became of each leaf, beside the leaves that b lacks."""
        rows = [(name, row) for name in PARTS for row in getattr(self, name)]
        groups = [name if row.allowed else f"{name}, unexpected" for name, row in rows]
        found = self.histograms
        drawn = {place: found[row.path] for place, (_, row) in enumerate(rows) if row.path in found}
        shown: Any = {"groups": groups, "histograms": drawn, "of": "before → after"}
        return Page.of_rows("diff", self.headline(), [row for _, row in rows], *_COLUMNS, **shown)

    @property
    def changes(self) -> dict[str, str]:
        """What happened to each leaf that differs, in words, by path."""
        return {row.path: said(name, row) for name in DIFFERENT for row in getattr(self, name)}

    def to_dict(self) -> dict[str, Any]:
        return {"different": bool(self)} | super().to_dict()


def _section(name: str, title: str, rows: Sequence[DiffRow]) -> Section:
    lines = []
    for row in rows:
        paths = (row.path, row.was) if row.was else (row.path,)
        spec = f"{row.spec}" if row.shape_before is None else f"{row.spec_before} -> {row.spec}"
        note = "" if row.transposed is None else f"  transposed {row.transposed}"
        note += f"  also {wording.listing(row.also, 3)}" * bool(row.also)
        lines.append(Line(paths, (spec + note,), row.spec.size))
    if name not in ("changed", "respecified") or all(row.relative_l2 is None and not row.differing for row in rows):
        return Section(title, lines)
    by_path = {row.path: row for row in rows}
    return Section(title, lines, _HEADER, lambda line: _cells([by_path[path] for path in line.members]))


def _cells(rows: Sequence[DiffRow]) -> tuple[str, ...]:
    """The figures of some rows: the sums of the counts, and the worst of the others."""
    compared = [row for row in rows if row.differing is not None]
    if not compared:
        return ()
    size, differing = sum(row.spec.size for row in compared), sum(row.differing or 0 for row in compared)
    nonfinite = sum(row.nonfinite for row in compared)
    share = "all" if differing == size else f"{differing:,} of {size:,}"
    return (
        share + f" ({nonfinite:,} NaN or inf)" * bool(nonfinite),
        _shown([row.max_abs for row in compared], max),
        _shown([row.relative_l2 for row in compared], max),
        _shown([row.cosine for row in compared], min),
        _shown([row.max_ulp for row in compared], max),
    )


def _shown(values: Sequence[Any], worst: Any) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    value = worst(known)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if worst is min else f"{value:.3g}"


def arranged(rows: list[DiffRow], sort: str) -> list[DiffRow]:
    """Rows sorted: "change" puts the largest first; "path" goes by path, `layers.2` before `layers.10`."""
    rows = sorted(rows, key=lambda row: natural(row.path))
    return sorted(rows, key=weight, reverse=True) if sort == "change" else rows
