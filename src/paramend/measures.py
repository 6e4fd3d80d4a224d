"""Measures of a leaf's values, in one pass and in bounded memory."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Measures:
    """What the values of a leaf are like, reckoned in float64. Of complex values, their absolute values.

    Attributes:
        min: the least value that is no NaN; None if there is none.
        max: the greatest value that is no NaN; None if there is none.
        mean: of the finite values; None if there are none.
        std: the standard deviation of the finite values, by their number, not less one; None if there are none.
        zeros: how many values are 0.
        nans: how many are NaN.
        infs: how many are infinite.
    """

    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    zeros: int
    nans: int
    infs: int

    def to_dict(self) -> dict[str, Any]:
        """The measures by name."""
        return {name: getattr(self, name) for name in self.__slots__}


def measure(chunks: Iterable[Array]) -> Measures:
    """The measures of all values in some arrays, which are looked at one at a time.

    >>> found = measure([np.array([0.0, 1.0, np.nan]), np.array([2, 3], "int8")])
    >>> found.min, found.max, found.mean, found.zeros, found.nans
    (0.0, 3.0, 1.5, 1, 1)
    >>> measure([]).mean is None
    True
    """
    low, high = math.inf, -math.inf
    count = zeros = nans = infs = 0
    mean = squares = 0.0
    with np.errstate(all="ignore"):
        for chunk in chunks:
            x = (np.abs(chunk) if np.iscomplexobj(chunk) else chunk).astype(np.float64)
            zeros += x.size - int(np.count_nonzero(x))
            numbers = x[~np.isnan(x)]
            nans += x.size - numbers.size
            if numbers.size:
                low, high = min(low, float(numbers.min())), max(high, float(numbers.max()))
            x = numbers[np.isfinite(numbers)]
            infs += numbers.size - x.size
            if not x.size:
                continue
            # Chan, Golub & LeVeque 1983: the moments of a whole from those of its parts, without cancellation.
            part = float(x.mean())
            shift, both = part - mean, count + x.size
            squares += float(np.square(x - part).sum()) + shift * shift * count * x.size / both
            mean += shift * x.size / both
            count = both
    return Measures(
        min=low if count + infs else None,
        max=high if count + infs else None,
        mean=mean if count else None,
        std=math.sqrt(squares / count) if count else None,
        zeros=zeros,
        nans=nans,
        infs=infs,
    )
