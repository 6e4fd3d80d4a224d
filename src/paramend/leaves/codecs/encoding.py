"""The other way: scales, zero points and codes for new values, to the nearest."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from paramend.errors import Unsupported
from paramend.leaves.codecs.codec import Codec, Grids, Parts
from paramend.leaves.codecs.fields import Field, Groups
from paramend.leaves.origins.boxes import Box, whole
from paramend.leaves.specs import Array, numpy_dtype
from paramend.reports import wording

# Differences are measured in so many places at once, which stay in the cache of a processor.
_STEP = 1 << 15


class Bounds(NamedTuple):
    """What scales are chosen by: for each place of their grid, of the values there."""

    low: Array  # the least one, or 0
    high: Array  # the greatest one, or 0
    changed: Array  # whether one is not as it was

    @property
    def greatest(self) -> Array:
        """The greatest magnitudes."""
        found: Array = np.maximum(self.high, -self.low)
        return found


@dataclass(slots=True)
class Misfit:
    """How far codes are from the values that they are for, measured band by band."""

    # Where a band begins → the squares of its values, those of the differences, the greatest difference, and how many
    # blocks have new values.
    bands: dict[tuple[int, ...], tuple[float, float, float, int]] = field(default_factory=dict)
    blocks: int = 0  # how many blocks there are
    new: int = 0  # how many have new values, where bands do not hold whole blocks

    def measure(self, at: tuple[int, ...], wanted: Array, found: Array, new: int) -> None:
        """Enter a band, once or again."""
        wanted, found, sums = wanted.reshape(-1), found.reshape(-1), [(0.0, 0.0, 0.0)]
        with np.errstate(all="ignore"):
            for start in range(0, wanted.size, _STEP):
                part = slice(start, start + _STEP)
                wide, gap = wanted[part].astype(np.float64), (found[part] - wanted[part]).astype(np.float64)
                if not np.isfinite(gap).all():  # NaN as asked is right
                    right = np.isnan(wide) & np.isnan(found[part])
                    wide[right] = gap[right] = 0
                # What BLAS does with `@` waits for other threads.
                norm, off = (float(np.einsum("i,i->", each, each)) for each in (wide, gap))
                sums.append((norm, off, float(np.abs(gap).max())))
        squares, gaps, most = zip(*sums, strict=True)
        self.bands[at] = math.fsum(squares), math.fsum(gaps), max(most), new

    @property
    def changed(self) -> int:
        """How many blocks have new values."""
        return self.new or sum(band[3] for band in self.bands.values())

    @property
    def relative_l2(self) -> float | None:
        """The norm of the differences as a share of that of the values; None before anything is measured."""
        squares, gaps = (math.fsum(band[place] for band in self.bands.values()) for place in (0, 1))
        return (math.sqrt(gaps / squares) if squares else 0.0) if self.bands else None

    @property
    def max_abs(self) -> float | None:
        """The greatest difference; None likewise."""
        return max((band[2] for band in self.bands.values()), default=None)

    def __str__(self) -> str:
        if self.relative_l2 is None:
            return ""
        blocks = f"{self.changed:,} of {wording.plural(self.blocks, 'block')}"
        return f"{blocks}, relative L2 {self.relative_l2:.3g}, max {self.max_abs:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """What a report holds of it."""
        found = {"relative_l2": self.relative_l2, "max_abs": self.max_abs} if self.bands else {}
        return {**found, "blocks": self.blocks, "blocks_encoded": self.changed}


def finite(codec: Codec, views: Parts) -> bool:
    """Whether all scales are finite."""
    return "scale" not in codec.fields or bool(
        np.isfinite(factor_of(codec, codec.scales(views, whole(codec.spec.shape)))).all()
    )


def unit(codec: Codec) -> tuple[int, ...]:
    """Along each axis, how many places of the weight are encoded together at least: a block, and whole words. Axes of
    which a block has all count by their words alone."""
    fields = [codec.fields[role] for role in codec.encodes]
    return tuple(
        math.lcm(*(each.every[axis] or 1 for each in fields), *(_codes(each, axis) for each in fields))
        for axis in range(len(codec.spec.shape))
    )


def bounds_of(codec: Codec, values: Array, changed: Array | None, box: Box, views: Parts) -> Bounds:
    """The bounds of the values of a box, NaN left out."""
    field, groups, zero = codec.fields["scale"], codec.groups(views), np.float32(0)
    low, high = (field.reduced(each, values, box, groups) for each in (np.fmin, np.fmax))
    new = np.ones((), np.bool_) if changed is None else field.reduced(np.logical_or, changed, box, groups)
    return Bounds(np.fmin(low, zero), np.fmax(high, zero), new)


def even(codec: Codec, views: Parts) -> bool:
    """Whether a weight is symmetric: it has no zero points, or all of them are in the middle of the codes."""
    if codec.zeros is None or "zero" not in codec.fields:
        return True
    if "zero" not in views:
        return False
    zeros = codec.zeros.decode(codec.scales({"zero": views["zero"]}, whole(codec.spec.shape))["zero"])
    return bool((zeros == middle(codec)).all())


def middle(codec: Codec) -> int:
    """The zero point of a symmetric scheme."""
    return math.ceil((codec.codes.low + codec.codes.high) / 2)


def scales_for(
    codec: Codec, bounds: Bounds, box: Box, views: Parts, tops: Mapping[str, Array], *, keep: bool, even: bool
) -> Grids:
    """Scales and zero points for the blocks of a box, as they are stored, one for each place of their grid. Those of
    blocks without changes are kept; `keep` keeps all that are finite. `tops` are scales of scales where they are new,
    too; `even` says that no zero points depend on values."""
    field, there = codec.fields["scale"], codec.scales(views, box) | dict(tops)
    if keep and np.isfinite(factor_of(codec, there)).all():
        return {}
    found: dict[str, Array] = {}
    limit = codec.codes.limit
    greatest = bounds.greatest if even else (bounds.high - bounds.low) / 2
    if even and "payload" in views:  # of an edit no value is beyond the last codes, which are -8 and 7
        zero = middle(codec) if "zero" in codec.fields else 0
        limit = codec.codes.high - zero
        greatest = np.maximum(bounds.high, bounds.low * np.float32(limit / (codec.codes.low - zero)))
    if not even and codec.zeros is not None:  # the first version of GPTQ has no zero point of 0
        codes = codec.codes.high - max(codec.zeros.low, codec.codes.low)
        greatest = np.maximum(greatest, bounds.high * np.float32(limit / codes))
    found["scale"] = codec.scaling.fitted(greatest, limit, field.spec, there)
    if not even and codec.zeros is not None:
        lowest = codec.codes.low - bounds.low / factor_of(codec, there | found)
        found["zero"] = codec.zeros.nearest(np.minimum(lowest, codec.codes.high))
    if "scale" not in views:
        return found
    factor = factor_of(codec, there | found)
    wrong, why = ~np.isfinite(factor), "make finite values: those that are there, or the scales of scales, are not"
    if codec.top == "nested scale":  # what is added to all of them stays
        share = factor * np.float32(limit) / np.where(greatest > 0, greatest, np.float32(np.inf))
        wrong, why = wrong | ((greatest > 0) & ~((share > 0.8) & (share < 4))), "are near enough to those of the values"
    if (bounds.changed & wrong).any():
        way = "dequantise the weight, edit it, and quantise it again"
        raise Unsupported(f"no scales of {codec.scheme} {why}", hint=way)
    new = bounds.changed & ~np.isfinite(factor_of(codec, there)) if keep else bounds.changed
    return {role: _where(new, each, there[role]) for role, each in found.items()}


def codes_for(codec: Codec, values: Array, scales: Grids, box: Box, groups: Groups) -> Array:
    """The nearest codes of the values of a box, float32, which are computed with in place; `Unsupported` if there is no
    code for one: it is not finite, or it is 0."""
    field, factor = codec.fields["scale"], factor_of(codec, scales)
    if np.isinf(values).any() or (np.isnan(values).any() and not np.isnan(codec.codes.values).any()):
        raise Unsupported(
            f"a value is not finite, and {codec.scheme} has no code for it",
            hint="dequantise the weight, and edit it then",
        )
    with np.errstate(all="ignore"):
        field.apply(np.divide, values, np.where(factor == 0, np.float32(np.inf), factor), box, groups)
    if codec.zeros is not None and "zero" in scales:
        zero = codec.zeros.decode(scales["zero"])
        beyond = zero > codec.codes.high
        if beyond.any() and (field.spread(beyond, box, groups) & (values == 0)).any():
            raise Unsupported(
                f"a zero point is {zero.max():g}, and codes of {codec.scheme} end at {codec.codes.high:g}: none is 0",
                hint="dequantise the weight, edit it, and quantise it again",
            )
        field.apply(np.add, values, zero, box, groups)
    return codec.codes.nearest(values)


def factor_of(codec: Codec, grids: Grids) -> Array:
    """What the values of codes are multiplied by."""
    with np.errstate(all="ignore"):
        return reduce(np.multiply, codec.scaling.factors(grids))


def _where(new: Array, one: Array, other: Array) -> Array:
    """`np.where` for dtypes that it does not know."""
    bits = f"u{one.itemsize}"
    found: Array = np.where(new, one.view(bits), other.view(bits)).view(one.dtype)
    return found


def _codes(field: Field, axis: int) -> int:
    """How many places of the weight fill the words of a leaf along an axis."""
    if field.packing is None or field.packing.axis != axis:
        return 1
    return field.packing.lump(numpy_dtype(field.spec.dtype).itemsize)[0] * (field.every[axis] or 1)
