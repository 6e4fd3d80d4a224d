"""Measures of a leaf's values, in one pass and in bounded memory, and the values as float64 that they are made of."""

import math
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import numpy as np

from paramend.leaves.specs import Array, kind_of


@cache
def _values(dtype: np.dtype[Any]) -> Array:
    """The value of each bit pattern of a dtype of one byte."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)


def widened(x: Array) -> Array | None:
    """The same values as float64, or as complex128 if they are complex; None if they are not numbers."""
    kind = kind_of(x.dtype.name)
    if kind == "other":
        return None
    if kind == "complex":
        with np.errstate(invalid="ignore"):
            return x.astype(np.complex128, copy=False)
    if x.dtype.itemsize == 1 and x.dtype.num >= 256:  # the conversion of ml_dtypes is several times slower
        return _values(x.dtype).take(x.view(np.uint8))
    with np.errstate(invalid="ignore"):
        if x.dtype.name == "bfloat16":
            x = x.astype(np.float32)
        return x.astype(np.float64, copy=False)


def total(parts: list[float]) -> float:
    """The sum of some numbers, rounded once, so independent of their order."""
    try:
        return math.fsum(parts)
    except (OverflowError, ValueError):  # beyond float64, or inf - inf
        with np.errstate(all="ignore"):
            return float(np.sum(parts))


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
