"""The report of a graft: which leaves were copied and which not."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from paramend.errors import GraftRefused, SpecMismatch
from paramend.leaves.codecs.encoding import Misfit
from paramend.leaves.specs import Spec
from paramend.pages.page import Page
from paramend.pages.paged import Paged
from paramend.reports import wording
from paramend.reports.ends import Ends
from paramend.reports.report import Line, Section
from paramend.selectors.grammar import Literal, Piece, Quoted
from paramend.selectors.patterns import parse

PARTS = ("copied", "fresh", "mismatched", "unused")


@dataclass(frozen=True, slots=True)
class GraftRow:
    """What became of one leaf.

    Attributes:
        path: the path in the target; for an unused leaf, the path in the source.
        source: the path in the source, or None for a leaf that received nothing.
        shape: the shape of the leaf at `path`.
        source_shape: the shape of the source leaf, or None.
        dtype: the dtype that the leaf at `path` had.
        source_dtype: the dtype of the source leaf, or None.
        did: what was done, in words.
        fit: how different shapes were fitted: "corner", "center", "tile" or "resize"; "" if they were not.
        taken: how many scalars came from the source.
        overflowed: how many finite values became inf, NaN or another number, because the dtype cannot hold them.
        lost: how many values became zero, or lost their fraction, because the dtype is too coarse.
    """

    path: str
    source: str | None
    shape: tuple[int, ...]
    source_shape: tuple[int, ...] | None
    dtype: str
    source_dtype: str | None
    did: str
    fit: str = ""
    taken: int = 0
    overflowed: int = 0
    lost: int = 0

    @classmethod
    def of(
        cls,
        path: str,
        spec: Spec,
        did: str,
        source: str | None = None,
        theirs: Spec | None = None,
        *,
        fit: str = "",
        taken: int = 0,
    ) -> "GraftRow":
        """The row of a leaf of some spec, and of the leaf of the source that it meets, if there is one."""
        shape, dtype = (None, None) if theirs is None else (theirs.shape, theirs.dtype)
        return cls(path, source, spec.shape, shape, spec.dtype, dtype, did, fit, taken)

    @property
    def spec(self) -> Spec:
        """The shape and the dtype of the leaf at `path`."""
        return Spec(self.shape, self.dtype)

    @property
    def size(self) -> int:
        """The number of scalars of the leaf at `path`."""
        return self.spec.size

    @property
    def origin(self) -> str:
        """The path in the source, or ""."""
        return self.source or ""

    @property
    def outcome(self) -> str:
        """What was done, and what the dtype could not hold."""
        said = [
            self.did,
            f"{self.overflowed:,} overflow" * bool(self.overflowed),
            f"{self.lost:,} lost" * bool(self.lost),
        ]
        return "; ".join(filter(None, said))


@dataclass(repr=False)
class GraftReport(Paged):
    """Which leaves of the target were copied and which not, and which leaves of the source went nowhere.

    Every leaf of the target is in exactly one of `copied`, `fresh` and `mismatched`; every leaf of the source is the
    `source` of a row in `copied` or `mismatched`, or is in `unused`. A leaf with several paths counts once, under the
    first of them.

    Attributes:
        copied: leaves whose values come from the source.
        fresh: leaves that stayed as they were.
        mismatched: leaves for which the source has another shape.
        unused: leaves of the source that went nowhere.
        refused: whether the graft was refused: then nothing was changed, and the rows say what would have become of
            each leaf.
        ends: the two models of the graft, as long as they are alive, for `pm.graft_optimizer_`.
        encoded: floats of the source that became codes: path in the source → the scheme, and how far the codes are off.
    """

    _data = ("refused", "totals", *PARTS)

    copied: list[GraftRow] = field(default_factory=list)
    fresh: list[GraftRow] = field(default_factory=list)
    mismatched: list[GraftRow] = field(default_factory=list)
    unused: list[GraftRow] = field(default_factory=list)
    refused: bool = False
    ends: Ends | None = field(default=None, compare=False)
    encoded: dict[str, tuple[str, Misfit]] = field(default_factory=dict, compare=False)

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """The number of leaves, parameters and parameters taken from the source, for each part."""
        found: dict[str, dict[str, int]] = {}
        for name in PARTS:
            rows = {row.path: row for row in reversed(getattr(self, name))}.values()
            sizes = {"leaves": len(rows), "parameters": sum(row.size for row in rows)}
            found[name] = sizes | {"taken": sum(row.taken for row in rows)}
        return found

    def headline(self) -> str:
        totals = self.totals
        ours = [totals[name] for name in ("copied", "fresh", "mismatched")]
        leaves, size = sum(one["leaves"] for one in ours), sum(one["parameters"] for one in ours)
        taken = sum(one["taken"] for one in ours)
        unused = totals["unused"]["leaves"]
        if self.refused:
            return f"graft refused, nothing was changed; {totals['copied']['leaves']:,} of {leaves:,} leaves have a fit"
        return (
            f"graft: {totals['copied']['leaves']:,} of {wording.plural(leaves, 'leaf', 'leaves')} copied, {taken:,} of "
            f"{wording.plural(size, 'parameter')}; {wording.plural(unused, 'leaf', 'leaves')} of the source unused"
        )

    def sections(self) -> list[Section]:
        codes = [Line((path,), (f"{scheme}, {fit}",)) for path, (scheme, fit) in self.encoded.items()]
        return [
            *(Section(name, [_line(row) for row in getattr(self, name)]) for name in PARTS),
            Section("encoded", codes),
        ]

    def page(self) -> Page:
        """The target as a map, coloured by what became of each leaf, beside the unused leaves of the source."""
        rows = [(name, row) for name in PARTS for row in getattr(self, name)]
        columns = "origin as source", "outcome as did", "spec", "taken", "overflowed", "lost"
        shown = "graft", self.headline(), [row for _, row in rows]
        return Page.of_rows(*shown, *columns, groups=[name for name, _ in rows], group_title="part")

    def to_dict(self) -> dict[str, Any]:
        encoded = {path: {"scheme": scheme, **fit.to_dict()} for path, (scheme, fit) in self.encoded.items()}
        return super().to_dict() | ({"encoded": encoded} if encoded else {})


def _line(row: GraftRow) -> Line:
    spec = row.spec
    source = None if row.source_shape is None else Spec(row.source_shape, row.source_dtype or "")
    both = str(spec) if source in (None, spec) else f"{spec} ◄─ {source}"
    paths = (row.path,) if row.source in (None, row.path) else (row.path, str(row.source))
    return Line(paths, (both, row.outcome), spec.size)


_SHOWN = 16


def refuse_left(report: GraftReport, unused: str) -> None:
    """Raise if something of the earlier state is left over and must not be."""
    if report.unused and unused == "error":
        report.refused = True
        why = f"the earlier state has leaves with no place here: {wording.listing([row.path for row in report.unused])}"
        raise GraftRefused(why, report=report, hint='unused="ok" leaves it behind')


def refuse_misfits(wrong: Sequence[str], hint: str) -> None:
    """Raise if moments, of which each line tells one, do not have the shapes of their parameters."""
    if wrong:
        more = [f"and {len(wrong) - _SHOWN:,} more"] if len(wrong) > _SHOWN else []
        count = wording.plural(len(wrong), "moment does", "moments do")
        raise SpecMismatch("\n  ".join([f"{count} not fit the parameters:", *wrong[:_SHOWN], *more]), hint=hint)


Path = tuple[str, ...]

_special = re.compile(r'[*{}\[\]<>,"\\]').search
_pieces = re.compile(r"[/.]").split


@dataclass(frozen=True, slots=True)
class Link:
    """Where the values of one parameter came from."""

    source: Path | None  # the path of the parameter that it continues, or None if it does not continue one
    corner: bool  # whether it continues only in the common corner
    did: str  # what was done, in words
    shape: tuple[int, ...]
    source_shape: tuple[int, ...] | None


class Links:
    """What a report says about each parameter."""

    def __init__(self, report: GraftReport) -> None:
        self.targets: dict[Path, Link] = {}  # path in the target → its link
        for corner, rows in ((False, report.copied), (True, report.mismatched), (False, report.fresh)):
            for row in rows:
                # What the other ways to fit a shape mean for a moment is not known here.
                known = None if corner and row.fit != "corner" else row.source
                source = None if known is None else pieces_of(known)
                link = Link(source, corner, row.did, row.shape, row.source_shape)
                self.targets.setdefault(pieces_of(row.path), link)
        theirs = (*report.copied, *report.mismatched, *report.unused)
        self.sources = {pieces_of(row.source) for row in theirs if row.source is not None}  # the paths in the source


def without(paths: Iterable[Path], prefix: Path) -> set[Path]:
    """The paths below a prefix, without it."""
    return {path[len(prefix) :] for path in paths if path[: len(prefix)] == prefix}


def pieces_of(text: str) -> Path:
    """The pieces of a path as reports write it.

    >>> pieces_of("params/Dense_0/kernel"), pieces_of('a\\\\*b."x/y"')
    (('params', 'Dense_0', 'kernel'), ('a*b', 'x/y'))
    """
    if text and not _special(text):
        return tuple(_pieces(text))
    out: list[str] = []
    for segment in parse(text).segments if text else ():
        if isinstance(segment, Quoted):
            out.append(segment.text)
        elif isinstance(segment, Piece):
            out.append("".join(atom.text for atom in segment.atoms if isinstance(atom, Literal)))
    return tuple(out)
