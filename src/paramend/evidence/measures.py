"""Measures of a leaf's values, in one pass and in bounded memory."""

import math
from dataclasses import dataclass, fields

import numpy as np

from paramend.evidence.widening import total, widened
from paramend.leaves.specs import Array

# Elements processed at once: in float64 they fit the processor's cache.
_RUN = 1 << 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """The measures of a `StatsRow`, which tells what they are."""

    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    norm: float | None = None
    zeros: int | None = None
    nans: int | None = None
    infs: int | None = None


MEASURES = tuple(field.name for field in fields(Measures))


class Tally:
    """The measures of values that come in parts; the order of the parts does not change the result."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self.zeros = self.nans = self.infs = self.size = 0
        # For each run of finite values: their number, their sum, and the sum of squares about their mean.
        self.counts: list[int] = []
        self.sums: list[float] = []
        self.squares: list[float] = []

    def add(self, values: Array) -> None:
        """Add further values; those that are not numbers are only counted."""
        for start in range(0, values.size, _RUN):
            self._add(values[start : start + _RUN])

    def _add(self, values: Array) -> None:
        self.size += values.size
        x = widened(values)
        if x is None:
            return
        with np.errstate(all="ignore"):
            x = np.abs(x) if x.dtype.kind == "c" else x
            self.zeros += x.size - int(np.count_nonzero(x))
            low, high = float(x.min()), float(x.max())
            if not (math.isfinite(low) and math.isfinite(high)):
                numbers = x[~np.isnan(x)]
                self.nans += x.size - numbers.size
                x = numbers[np.isfinite(numbers)]
                self.infs += numbers.size - x.size
                low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (math.inf, -math.inf)
            self.low, self.high = min(self.low, low), max(self.high, high)
            if x.size:
                part = float(x.sum())
                gaps = x - part / x.size
                self.counts.append(x.size)
                self.sums.append(part)
                self.squares.append(float(np.einsum("i,i->", gaps, gaps)))

    def merge(self, other: "Tally") -> None:
        """Add what another tally has counted."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        for name in ("size", "zeros", "nans", "infs", "counts", "sums", "squares"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def measures(self) -> Measures:
        """The measures of all values so far."""
        count = sum(self.counts)
        mean = total(self.sums) / count if count else 0.0
        # Chan, Golub & LeVeque 1983: the moments of a whole from those of its parts, without cancellation.
        squares = total(
            [
                about + number * (part / number - mean) ** 2
                for number, part, about in zip(self.counts, self.sums, self.squares, strict=True)
            ]
        )
        return Measures(
            min=self.low if count + self.infs else None,
            max=self.high if count + self.infs else None,
            mean=mean if count else None,
            std=math.sqrt(squares / count) if count else None,
            norm=math.sqrt(squares + count * mean * mean) if count else None,
            zeros=self.zeros,
            nans=self.nans,
            infs=self.infs,
        )
