"""Histograms of leaves, or of pairs of leaves in the same bins: read twice, in bounded memory."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from paramend.evidence.measures import widened
from paramend.evidence.reading import Span, looked
from paramend.evidence.streams import Desk, Stream
from paramend.leaves.specs import Array
from paramend.pages.page import Histogram

BINS = 48


def histograms(streams: Mapping[str, tuple[Stream, ...]], bins: int = BINS) -> dict[str, Histogram]:
    """The histograms of the finite values of some leaves, with bins of equal width; leaves without such values are left
    out. Each leaf has a stream, or two of one size to compare."""
    names = list(streams)
    bounds = [(math.inf, -math.inf)] * len(names)
    for span, (low, high) in looked(enumerate(streams.values()), _bounds):
        bounds[span.index] = min(bounds[span.index][0], low), max(bounds[span.index][1], high)
    counts = {
        place: [np.zeros(bins, np.int64) for _ in streams[name]]
        for place, name in enumerate(names)
        if bounds[place][0] <= bounds[place][1]
    }

    def count(span: Span, desk: Desk) -> list[Array]:
        found = [np.zeros(bins, np.int64) for _ in span.streams]
        for pieces in span.pieces(desk):
            for into, piece in zip(found, pieces, strict=True):
                into += np.histogram(_finite(piece), bins, _widened(*bounds[span.index]))[0]
        return found

    tasks = ((place, streams[names[place]]) for place in counts)
    for span, parts in looked(tasks, count):
        for into, part in zip(counts[span.index], parts, strict=True):
            into += part
    return {names[place]: _histogram(bounds[place], found) for place, found in counts.items()}


def _bounds(span: Span, desk: Desk) -> tuple[float, float]:
    low, high = math.inf, -math.inf
    for pieces in span.pieces(desk):
        for piece in pieces:
            values = _finite(piece)
            if values.size:
                low, high = min(low, float(values.min())), max(high, float(values.max()))
    return low, high


def _finite(piece: Array) -> Array:
    """The finite values of a piece; of complex ones, their absolute values."""
    values = widened(piece)
    if values is None:
        return np.empty(0)
    values = np.abs(values) if values.dtype.kind == "c" else values
    found: Array = values[np.isfinite(values)]
    return found


def _widened(low: float, high: float) -> tuple[float, float]:
    """The range of the bins, widened if there is only one value."""
    return (low, high) if low < high else (low - 0.5 * max(1.0, abs(low)), high + 0.5 * max(1.0, abs(high)))


def _histogram(bounds: tuple[float, float], counts: Sequence[Array]) -> Histogram:
    before, *after = (found.tolist() for found in counts)
    return Histogram(*_widened(*bounds), before, after[0] if after else None)
