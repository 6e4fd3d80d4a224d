"""Measures of many leaves, in one pass on two threads."""

from collections.abc import Sequence
from typing import Any

from paramend.evidence.measures import Measures, Tally
from paramend.evidence.reading import Span, looked
from paramend.evidence.streams import Desk, hindrance, stream_of
from paramend.leaves.leaves import Leaves
from paramend.reports.progress import Meter


def measured(leaves: Any, numbers: Sequence[int], meter: Meter) -> dict[int, Measures | str]:
    """The measures of each leaf, or the reason why its values are not available or not numbers.

    >>> import numpy as np
    >>> from paramend.trees.tree import Tree
    >>> tree = Tree([np.array([3.0, 4.0]), np.array(["a"])])
    >>> found = measured(tree, [0, 1], Meter(None, 0))
    >>> found[0].norm, found[1]
    (5.0, 'str32 is not a number')
    """
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
