"""The report of a port: which leaf was made of which, how and why, and what differs beside parameters."""

from dataclasses import dataclass, field
from typing import Any

from paramend.grafting.report import GraftReport
from paramend.mapping.layout import Layout
from paramend.reports import wording
from paramend.reports.report import Report


@dataclass(repr=False)
class PortReport(GraftReport):
    """Which leaves of the target were made of which leaves of the source, by which rule, and why these are one.

    The four lists of rows are those of a graft: `copied`, `fresh`, `mismatched`, `unused`. Paths of rows are those of
    the target, in `unused` those of the source.

    Attributes:
        layout: the map from the source to the target: it can be saved, applied to any checkpoint of the same model, and
            reversed.
        warnings: what differs beside parameters, with numbers, and what was assumed.
        unproven: the paths of the leaves whose place rests on the numbers in their names alone.
        proof: the proof that both models compute the same, if `prove=` was given.
    """

    layout: Layout | None = None
    warnings: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    proof: Any = None

    def headline(self) -> str:
        """The summary in one sentence."""
        said = super().headline().replace("graft", "port", 1)
        if self.unproven and self.proof is None and not self.refused:
            said += (
                f"; {wording.plural(len(self.unproven), 'leaf rests', 'leaves rest')} on the numbers in names alone, "
                "which follow construction and not calls: prove=(x,) proves them"
            )
        return said if self.proof is None else f"{said}; {self.proof.headline()}"

    def __str__(self) -> str:
        text = Report.__str__(self)
        warnings = "".join(f"\n  {each}" for each in self.warnings)
        return f"{text}\n\nwarnings: {len(self.warnings)}{warnings}" if warnings else text

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and numbers."""
        return super().to_dict() | {
            "warnings": list(self.warnings),
            "unproven": list(self.unproven),
            "layout": None if self.layout is None else self.layout.to_data(),
            "proof": None if self.proof is None else self.proof.to_dict(),
        }
