"""What a state carried over by name refuses, in any library."""

from collections.abc import Sequence

from paramend.errors import GraftRefused, SpecMismatch
from paramend.grafting.report import GraftReport
from paramend.reports import wording

_SHOWN = 16


def refuse_left(report: GraftReport, unused: str) -> None:
    """Raise if something of the earlier state is left over and must not be."""
    if report.unused and unused == "error":
        report.refused = True
        raise GraftRefused(
            f"the earlier state has leaves with no place here: {wording.listing([row.path for row in report.unused])}",
            report=report,
            hint='unused="ok" leaves it behind',
        )


def refuse_misfits(wrong: Sequence[str], hint: str) -> None:
    """Raise if moments, of which each line tells one, do not have the shapes of their parameters."""
    if wrong:
        more = [f"and {len(wrong) - _SHOWN:,} more"] if len(wrong) > _SHOWN else []
        count = wording.plural(len(wrong), "moment does", "moments do")
        raise SpecMismatch("\n  ".join([f"{count} not fit the parameters:", *wrong[:_SHOWN], *more]), hint=hint)
