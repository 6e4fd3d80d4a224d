"""Averages that are rounded once: sums without an error, divided, and rounded directly to the dtype of the leaf."""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce
from operator import and_

import numpy as np

from paramend.leaves.origins.boxes import bare
from paramend.leaves.specs import Array, numpy_dtype

# dtype → the bits of its fraction, where two numbers may be too far apart for their sum to fit into a float64.
_FRACTIONS = {"bfloat16": 7, "float32": 23}
_BIAS = 127
# An element whose sum takes more than two float64 numbers: there are hardly any.
Hard = list[int]


def average(values: Sequence[Array], weights: Sequence[float], total: float, dtype: str) -> Array:
    """The weighted sum of arrays, divided by a total, in a dtype; any order of the arrays gives the same bits.

    With equal weights and their sum as the total it is the mean, and each element is the correctly rounded one (for
    dtypes up to float32; float64 has the rounding of a sum of two float64 numbers).

    >>> average([np.ones(1, "float32"), np.full(1, 2.0**-24, "float32")], [1, 1], 2, "float32").tolist()
    [0.5]
    """
    with np.errstate(all="ignore"):  # what the dtype cannot hold is inf
        if len({*weights}) == 1 and total == weights[0] * len(weights):
            short = len(values) == 2 and {dtype} == {value.dtype.name for value in values} <= {"bfloat16", "float16"}
            mean = _half(*values) if short else _mean(values, dtype)
            found, exact = rounded(mean, dtype), dtype != "float64" and bool(np.isfinite(mean).all())
        else:
            alike: dict[float, list[Array]] = {}
            for value, weight in zip(values, weights, strict=True):
                alike.setdefault(weight, []).append(value)
            sums = [weight * _sum(alike[weight])[0] for weight in sorted(alike)]
            found, exact = rounded(sum(sums[1:], sums[0]) / total, dtype), False
        if not exact and math.isclose(math.fsum(weights), total):
            keep_same(found, values)
    return found


def summed(values: Sequence[Array]) -> Array:
    """The sum of arrays, the same bits in any order: of three or more, the least elements are added first."""
    ordered = list(values) if len(values) < 3 else [value + 0 for value in values]  # -0.0 becomes 0.0
    for last in range(len(ordered) - 1, 0, -1) if len(ordered) > 2 else ():
        for at in range(last):
            low, high = ordered[at : at + 2]
            ordered[at : at + 2] = np.minimum(low, high), np.maximum(low, high)
    return sum(ordered[1:], ordered[0])


def keep_same(found: Array, values: Sequence[Array]) -> None:
    """Give elements that are the same in all arrays, and have the dtype of the result, back with their bits."""
    if len({found.dtype, *(value.dtype for value in values)}) == 1:
        first = bare(values[0])
        put(found, values[0], reduce(and_, (bare(value) == first for value in values)))


def put(found: Array, other: Array, mask: Array) -> None:
    """Put elements of another array of the same dtype where a mask is true; `np.copyto` takes ten times as long."""
    if mask.any():
        bits = bare(found)
        bits ^= (bits ^ bare(other)) & -mask.astype(bits.dtype)


def rounded(x: Array, dtype: str) -> Array:
    """Floats in another dtype, rounded once: libraries round float64 to short floats by way of float32.

    >>> x = np.array([1 + 2.0**-8 + 2.0**-40])  # just above the middle of two numbers of bfloat16
    >>> rounded(x, "bfloat16").astype(float).tolist(), x.astype(numpy_dtype("bfloat16")).astype(float).tolist()
    ([1.0078125], [1.0])
    """
    to = numpy_dtype(dtype)
    if x.dtype != np.float64 or to.kind == "f":
        return x.astype(to, copy=False)
    short = x.astype(np.float32)
    # Halfway between two short floats, none of which has more than 11 bits, if not for the error of this step.
    half = (short.view(np.uint32) & 0xFFF) == 0
    half &= short.astype(np.float64) != x
    if half.any():
        up = np.where(x[half] > short[half], np.float32(np.inf), np.float32(-np.inf))
        short[half] = np.nextafter(short[half], up)
    return short.astype(to)


def _half(one: Array, other: Array) -> Array:
    """The mean of two as float32: of 11 bits at most, they are rounded as if the sum were exact, since 24 bits are at
    least twice as many and two (Figueroa 1995)."""
    half = one.astype(np.float32)
    half *= 0.5
    rest = other.astype(np.float32)
    rest *= 0.5
    half += rest
    return half


def _mean(values: Sequence[Array], dtype: str) -> Array:
    """The mean as float64, with an odd last bit where it is not exact, so that rounding it again rounds it once."""
    count = len(values)
    total, rest, hard = _sum(values)
    mean = total / count
    if rest is None and not count & (count - 1):
        return mean
    # What division leaves, exactly: the quotient in two halves, whose products are exact.
    high = (mean.view(np.int64) & -(1 << 27)).view(np.float64)
    left = (total - high * count) - (mean - high) * count + (0.0 if rest is None else rest)
    left[~np.isfinite(left)] = 0
    closer, tail = _two_sum(mean, left / count)
    mean = np.copysign(closer, mean)  # -0.0 + 0.0 is 0.0
    if dtype == "float64":
        return mean
    odd = (tail != 0) & (mean.view(np.int64) & 1 == 0)
    mean[odd] = np.nextafter(mean[odd], np.copysign(np.inf, tail[odd]))
    for at in hard:
        exact = sum((Fraction(float(value[at])) for value in values), Fraction()) / count
        near = float(exact)
        short = exact != near and not np.float64(near).view(np.int64) & 1
        mean[at] = math.nextafter(near, math.inf if exact > near else -math.inf) if short else near
    return mean


def _sum(values: Sequence[Array]) -> tuple[Array, Array | None, Hard]:
    """The sum, what it lacks as a float64 (None if nothing), and the elements for which that is not exact either."""
    wide = [value.astype(np.float64) for value in values]
    if _fits(values):
        total = wide[0]
        for value in wide[1:]:
            total += value
        return total, None, []
    ordered = np.sort(np.stack(wide), axis=0)  # any order gives the same
    total, rest, lost = ordered[0], np.zeros(ordered.shape[1]), np.zeros(ordered.shape[1], bool)
    for value in ordered[1:]:
        total, error = _two_sum(total, value)
        rest, more = _two_sum(rest, error)
        lost |= more != 0
    new, more = _two_sum(total, rest)
    fine = np.isfinite(new)
    some = fine & (rest != 0)  # -0.0 + 0.0 is 0.0
    return np.where(some, new, total), np.where(some, more, 0), np.flatnonzero(lost & fine).tolist()


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """A sum and its error, both as floats (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


def _fits(values: Sequence[Array]) -> bool:
    """Whether any sum of elements is a float64 number."""
    if len(values) == 1:
        return True
    found = [_reach(value) for value in values]
    low, high = min(low for low, _ in found), max(high for _, high in found)
    return high - low + (len(values) - 1).bit_length() <= 53


def _reach(value: Array) -> tuple[int, int]:
    """Exponents of two: all elements are multiples of the first power, and less than the second."""
    name = value.dtype.name
    if name not in _FRACTIONS or not value.size:
        import ml_dtypes  # numpy does not know the limits of its dtypes

        limits = ml_dtypes.finfo(value.dtype)
        return math.frexp(float(limits.smallest_subnormal))[1] - 1, math.frexp(float(limits.max))[1]
    bits = bare(value)
    size = bits & bits.dtype.type(~(1 << (8 * bits.itemsize - 1)) & ((1 << 8 * bits.itemsize) - 1))
    low = int((size - bits.dtype.type(1)).min()) + 1  # 0 is left out: it becomes the greatest number
    fraction = _FRACTIONS[name]
    return max(low >> fraction, 1) - _BIAS - fraction, max(int(size.max()) >> fraction, 1) - _BIAS + 1
