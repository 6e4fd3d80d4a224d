"""Distances between two arrays, in one pass and in bounded memory."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from paramend.evidence.measures import total, widened
from paramend.leaves.specs import BITS, Array, kind_of

# Elements processed at once: in float64 they fit the processor's cache.
_RUN = 1 << 15
_UNSIGNED = frozenset({"float8_e8m0fnu"})  # floats without a sign


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far apart two arrays of one shape are, computed in float64: the figures of a `DiffRow`, which describes them.

    Elements of two dtypes differ if their values do. `relative_l2` is inf if the old values are 0, and `cosine` is None
    if one side is 0. `max_abs` is exact for integers; None if no finite element differs, or they are not numbers.
    `max_ulp` is the number of floats of the dtype between, plus one; 0 between -0.0 and +0.0; None if not floats.
    """

    differing: int | None = None
    nonfinite: int = 0
    max_abs: float | int | None = None
    relative_l2: float | None = None
    cosine: float | None = None
    max_ulp: int | None = None


FIGURES = tuple(field.name for field in fields(Distance))


class Gap:
    """The distance of values that come in parts; the order of the parts does not change the result."""

    def __init__(self) -> None:
        self.differing: int | None = 0
        self.nonfinite = 0
        self.max_abs: float | int | None = None
        self.max_ulp: int | None = None
        # Sums of squares of equal values, and of the others before, after and of their differences; then sums of the
        # products of the others.
        self.same: list[float] = []
        self.old: list[float] = []
        self.new: list[float] = []
        self.moved: list[float] = []
        self.dots: list[float] = []

    def add(self, a: Array, b: Array) -> None:
        """Add further elements: flat arrays of one length. If their dtypes differ, values are compared."""
        with np.errstate(all="ignore"):
            for start in range(0, a.size, _RUN):
                self._add(a[start : start + _RUN], b[start : start + _RUN])

    def add_opaque(self, a: Array, b: Array, bits: int) -> None:
        """Add further bytes of elements that are not numbers to numpy; `bits` is 0 if their width is unknown."""
        if not bits:
            self.differing = None
        elif self.differing is not None:
            flags = np.unpackbits(np.bitwise_xor(a, b), bitorder="little")
            self.differing += int(np.count_nonzero(flags[: flags.size // bits * bits].reshape(-1, bits).any(axis=1)))

    def merge(self, other: "Gap") -> None:
        """Add what another gap has seen."""
        unknown = self.differing is None or other.differing is None
        self.differing = None if unknown else (self.differing or 0) + (other.differing or 0)
        self.nonfinite += other.nonfinite
        self.max_abs = _larger(self.max_abs, other.max_abs)
        self.max_ulp = _larger(self.max_ulp, other.max_ulp)
        for name in ("same", "old", "new", "moved", "dots"):
            getattr(self, name).extend(getattr(other, name))

    def distance(self) -> Distance:
        """The distance of all elements so far."""
        seen = Distance(differing=self.differing, nonfinite=self.nonfinite, max_abs=self.max_abs, max_ulp=self.max_ulp)
        if self.max_abs is None:
            return seen
        old, new = (math.sqrt(total([*self.same, *part])) for part in (self.old, self.new))
        moved = math.sqrt(total(self.moved))
        dot = total([*self.same, *self.dots])
        cosine = max(-1.0, min(1.0, dot / old / new)) if old and new else None
        relative = moved / old if old else math.inf if moved else 0.0
        return replace(seen, relative_l2=relative, cosine=cosine)

    def _add(self, a: Array, b: Array) -> None:
        one = a.dtype == b.dtype
        differ = _differ(a, b) if one else None
        count = -1 if differ is None else int(np.count_nonzero(differ))
        x = widened(a)
        if x is None:
            self.differing = None if self.differing is None or count < 0 else self.differing + count
            return
        if not count:
            self.same.append(_squares(x))
            return
        y = widened(b)
        assert y is not None  # two dtypes are compared only if both are numeric
        if differ is None:
            differ = ~((x == y) | (np.isnan(x) & np.isnan(y)))
            count = int(np.count_nonzero(differ))
        self.differing = (self.differing or 0) + count
        sums = _product(x, x), _product(y, y)
        if not (math.isfinite(sums[0]) and math.isfinite(sums[1])):  # NaN, inf, or squares beyond float64
            finite = np.isfinite(x) & np.isfinite(y)
            self.nonfinite += int(np.count_nonzero(differ & ~finite))
            x, y, a, b, differ = x[finite], y[finite], a[finite], b[finite], differ[finite]
            sums = _product(x, x), _product(y, y)
        if not differ.any():
            self.same.append(sums[0])
            return
        gaps = np.subtract(y, x)
        self.old.append(sums[0])
        self.new.append(sums[1])
        self.dots.append(_product(x, y))
        self.moved.append(_product(gaps, gaps))
        kind = kind_of(a.dtype.name)
        exact = one and kind in ("int", "bool")
        self.max_abs = _larger(self.max_abs, _integer_gap(a, b) if exact else float(np.abs(gaps).max()))
        if one and kind == "float":
            self.max_ulp = _larger(self.max_ulp, int(ulps(a, b).max()))


def _differ(a: Array, b: Array) -> Array:
    found: Array = np.not_equal(bits(a), bits(b))
    if found.ndim > 1:
        found = np.asarray(found.any(axis=1))
    return found


def bits(x: Array) -> Array:
    """The elements of a flat array as unsigned integers; as one row of bytes each if no integer is as wide."""
    width = x.dtype.itemsize
    x = np.ascontiguousarray(x)
    if width in (1, 2, 4, 8):
        return x.view(f"u{width}")
    return x.view(np.uint8).reshape(-1, width) if width else np.zeros((x.size, 0), np.uint8)


def ulps(a: Array, b: Array) -> Array:
    """How many steps from one float to the next separate floats of one dtype without NaN. Floats are in the order of
    their bits, read as sign and magnitude."""
    name, width = a.dtype.name, 8 * a.dtype.itemsize
    x, y = bits(a), bits(b)
    lift = width - BITS[name]  # a float of 4 bits has its sign there
    if name not in _UNSIGNED:
        x, y = (_ordered(side.view(f"i{width // 8}") << lift, width) for side in (x, y))
    # The difference of signed integers wraps around to the right value as an unsigned integer.
    found = np.subtract(np.maximum(x, y), np.minimum(x, y)).view(f"u{width // 8}")
    return found >> lift if lift else found


def _ordered(bits: Array, width: int) -> Array:
    """Sign and magnitude as two's complement: integers in the order of the floats."""
    sign = bits >> (width - 1)
    found: Array = (bits ^ (sign & ((1 << (width - 1)) - 1))) - sign
    return found


def _product(x: Array, y: Array) -> float:
    """The real part of the inner product. Unlike BLAS, einsum does not start threads."""
    return float(np.einsum("i,i->", x, y.conj() if y.dtype.kind == "c" else y).real)


def _squares(x: Array) -> float:
    """The sum of the squares of the finite values."""
    found = _product(x, x)
    if math.isfinite(found):
        return found
    x = x[np.isfinite(x)]
    return _product(x, x)


def _integer_gap(a: Array, b: Array) -> int:
    if a.dtype.num >= 256 or a.dtype.kind == "b":  # bools, and the narrow integers of ml_dtypes
        a, b = a.astype(np.int64), b.astype(np.int64)
    gaps = np.where(b > a, b - a, a - b)  # wraps around to the right value as an unsigned integer
    return int(gaps.view(f"u{gaps.dtype.itemsize}").max())


def _larger(one: Any, other: Any) -> Any:
    return other if one is None else one if other is None else max(one, other)
