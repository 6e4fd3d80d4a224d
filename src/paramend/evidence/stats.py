"""`stats`: statistics of the values of a tree's leaves, in memory or on disk."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from paramend.checkpoints.checkpoint import open as open_checkpoint
from paramend.checkpoints.report import read_by
from paramend.edits.memory import Memory
from paramend.edits.weights import weighed
from paramend.evidence.histograms import histograms as histograms_of
from paramend.evidence.measures import Measures, Tally
from paramend.evidence.reading import Span, looked
from paramend.evidence.spectra import spectrum
from paramend.evidence.statistics import StatsReport, StatsRow
from paramend.evidence.streams import Desk, hindrance, stream_of
from paramend.leaves.leaves import Editable, Leaves
from paramend.leaves.rules import Codec
from paramend.leaves.specs import AnyTree
from paramend.reports.progress import Meter, Progress
from paramend.selectors.selector import SelectorLike, resolve


def stats(
    tree: AnyTree,
    selector: SelectorLike = "**",
    *,
    spectral: bool | SelectorLike = False,
    histograms: bool = False,
    codec: Codec | None = None,
    progress: Progress | None = None,
) -> StatsReport:
    """Statistics of the values of the selected leaves: a report that prints as a table, with repeated layers folded.

    For each leaf: min, max, mean, std, L2 norm, and how many values are zero, NaN and infinite, computed in float64.
    Mean, std and norm are those of the finite values. Files are read in pieces on two threads, in bounded memory.

    Args:
        tree: a tree of any kind, a checkpoint from `pm.open`, or the path of one.
        selector: which leaves.
        spectral: whether leaves of floats with two or more axes are analysed as matrices too; or a selector for those.
            The output units are the first axis in torch trees (whose paths contain "."), the last in others; all other
            axes are flattened into one, as for a convolution. Adds the spectral norm, to a relative error of 1e-6, the
            stable rank ‖A‖² / σ₁², and the number of output units whose weights are all 0. A matrix of more than 8 Mi
            elements is read once for each of some ten to thirty passes, in bounded memory.
        histograms: whether the values are read twice more, for the histograms of the report's page.
        codec: a `pm.Codec`, by which leaves that stand beside each other are one weight.
        progress: called with an `Event` as bytes are read.

    Returns:
        A `StatsReport`: `leaves` is a list of rows, `totals` has the figures of all leaves together.

    Raises:
        NoMatch: nothing is selected.
        CannotRead: a path does not exist.

    >>> params = {"fc": {"kernel": np.array([[3.0, 0.0], [0.0, 4.0]]), "bias": np.array([0.0, np.nan])}}
    >>> report = stats(params, spectral=True)
    >>> row = report.leaves[0]
    >>> row.path, row.norm, round(row.spectral_norm, 6), round(row.stable_rank, 6)
    ('fc/kernel', 5.0, 4.0, 1.5625)
    >>> print(stats(params, "**/bias"))
    1 leaf, 2 parameters, 16 B; norm 0, 1 NaN
    <BLANKLINE>
    values: 1 leaf
      path     spec        min  max  mean  std  norm  zeros  nans  infs
      fc/bias  float64[2]  0    0    0     0    0     1      1     0
    """
    if isinstance(tree, str | os.PathLike):
        with open_checkpoint(tree) as checkpoint:
            return stats(checkpoint, selector, spectral=spectral, histograms=histograms, codec=codec, progress=progress)
    leaves = weighed(tree if isinstance(tree, Editable) else Memory(tree), inputs=True, rule=codec)
    numbers = resolve(selector, leaves)
    matrices = _matrices(leaves, numbers, spectral)
    found = measured(leaves, numbers, Meter(progress, sum(leaves.nbytes(number) for number in numbers)))
    report = StatsReport([_row(leaves, number, found[number], number in matrices) for number in numbers])
    if histograms:
        read = [number for number in numbers if not isinstance(found[number], str)]
        report.histograms = histograms_of({leaves.index.path(n): (stream_of(leaves, n),) for n in read})
    report.tells_of(read_by(leaves))
    return report


def measured(leaves: Any, numbers: Sequence[int], meter: Meter) -> dict[int, Measures | str]:
    """The measures of each leaf, or the reason why its values are not available or not numbers."""
    found: dict[int, Measures | str] = {number: _obstacle(leaves, number) for number in numbers}
    tallies = {number: Tally() for number, why in found.items() if not why}
    tasks = ((number, (stream_of(leaves, number),)) for number in tallies)
    for span, tally in looked(tasks, _tally):
        tallies[span.index].merge(tally)
        meter.advance(span.nbytes, leaves.index.path(span.index))
    return found | {number: tally.measures() for number, tally in tallies.items()}


def _obstacle(leaves: Leaves, number: int) -> str:
    why = hindrance(leaves, number) or leaves.refusal(number)
    spec = leaves.spec(number)
    return why or (f"{spec.dtype} is not a number" if spec.kind == "other" else "")


def _tally(span: Span, desk: Desk) -> Tally:
    tally = Tally()
    for (piece,) in span.pieces(desk):
        tally.add(piece)
    return tally


def _row(leaves: Editable, number: int, measures: Measures | str, matrix: bool) -> StatsRow:
    spec, first = leaves.spec(number), leaves.index.path(number)
    also = [path for twin in leaves.twins(number) if (path := leaves.index.path(twin)) != first]
    row = StatsRow(first, spec.shape, spec.dtype, leaves.nbytes(number), tuple(also))
    if isinstance(measures, str):
        return replace(row, unread=measures)
    row = replace(row, **asdict(measures))
    if not matrix:
        return row
    found = spectrum(stream_of(leaves, number), out_first=leaves.index.separator == ".")
    rank = (row.norm / found.spectral_norm) ** 2 if row.norm and found.spectral_norm else None
    return replace(row, spectral_norm=found.spectral_norm, stable_rank=rank, dead=found.dead, units=found.units)


def _matrices(leaves: Editable, numbers: Sequence[int], wanted: Any) -> set[int]:
    if wanted is False:
        return set()
    chosen = set(numbers) if wanted is True else set(resolve(wanted, leaves)) & set(numbers)
    specs = {number: leaves.spec(number) for number in chosen}
    return {
        number for number, spec in specs.items() if spec.ndim > 1 and spec.size and spec.kind in ("float", "complex")
    }
