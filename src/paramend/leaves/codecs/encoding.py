"""The other way: scales, zero points and codes for new values, to the nearest."""

import math
from collections.abc import Mapping
from functools import reduce
from typing import NamedTuple

import numpy as np

from paramend.errors import Unsupported
from paramend.leaves.codecs.codec import Codec, Grids, Parts
from paramend.leaves.codecs.fields import Field, Groups
from paramend.leaves.origins.boxes import Box
from paramend.leaves.specs import Array, numpy_dtype


class Bounds(NamedTuple):
    """What scales are chosen by: for each place of their grid, of the values there.

    Attributes:
        low: the least one, or 0.
        high: the greatest one, or 0.
    """

    low: Array
    high: Array

    @property
    def greatest(self) -> Array:
        """The greatest magnitudes."""
        found: Array = np.maximum(self.high, -self.low)
        return found


def unit(codec: Codec) -> tuple[int, ...]:
    """Along each axis, how many places of the weight are encoded together at least: a block, and whole words.

    Axes of which a block has all count by their words alone.
    """
    fields = [codec.fields[role] for role in codec.encodes]
    return tuple(
        math.lcm(*(each.every[axis] or 1 for each in fields), *(_codes(each, axis) for each in fields))
        for axis in range(len(codec.spec.shape))
    )


def bounds_of(codec: Codec, values: Array, box: Box, views: Parts) -> Bounds:
    """The bounds of the values of a box, NaN left out."""
    field, groups, zero = codec.fields["scale"], codec.groups(views), np.float32(0)
    low, high = (field.reduced(each, values, box, groups) for each in (np.fmin, np.fmax))
    return Bounds(np.fmin(low, zero), np.fmax(high, zero))


def scales_for(codec: Codec, bounds: Bounds, box: Box, views: Parts, tops: Mapping[str, Array]) -> Grids:
    """Scales and zero points for the blocks of a box, as they are stored, one for each place of their grid.

    Args:
        codec: the codec.
        bounds: the bounds at these places.
        box: the box.
        views: the leaves that are known.
        tops: scales of scales.
    """
    field, there = codec.fields["scale"], codec.scales(views, box) | dict(tops)
    # Zero points that are known are those of a symmetric scheme.
    uneven = codec.zeros is not None and "zero" in codec.fields and "zero" not in views
    found = {}
    greatest = (bounds.high - bounds.low) / 2 if uneven else bounds.greatest
    found["scale"] = codec.scaling.fitted(greatest, codec.codes.limit, field.spec, there)
    if uneven and codec.zeros is not None:
        zero = codec.codes.low - bounds.low / factor_of(codec, there | found)
        found["zero"] = codec.zeros.nearest(np.minimum(zero, codec.codes.high))
    return found


def codes_for(codec: Codec, values: Array, scales: Grids, box: Box, groups: Groups) -> Array:
    """The nearest codes of the values of a box.

    Args:
        codec: the codec.
        values: the values, float32, which are computed with in place.
        scales: scales and zero points, one for each place of their grid.
        box: the box.
        groups: what `g_idx` says.

    Raises:
        Unsupported: there is no code for a value: it is not finite.
    """
    field, factor = codec.fields["scale"], factor_of(codec, scales)
    if np.isinf(values).any() or (np.isnan(values).any() and not np.isnan(codec.codes.values).any()):
        raise Unsupported(
            f"a value is not finite, and {codec.scheme} has no code for it",
            hint="set it to a finite one before, or leave the weight out",
        )
    with np.errstate(all="ignore"):
        field.apply(np.divide, values, np.where(factor == 0, np.float32(np.inf), factor), box, groups)
    if codec.zeros is not None and "zero" in scales:
        field.apply(np.add, values, codec.zeros.decode(scales["zero"]), box, groups)
    return codec.codes.nearest(values)


def factor_of(codec: Codec, grids: Grids) -> Array:
    """What the values of codes are multiplied by."""
    with np.errstate(all="ignore"):
        return reduce(np.multiply, codec.scaling.factors(grids))


def _codes(field: Field, axis: int) -> int:
    """How many places of the weight fill the words of a leaf along an axis."""
    if field.packing is None or field.packing.axis != axis:
        return 1
    return field.packing.lump(numpy_dtype(field.spec.dtype).itemsize)[0] * (field.every[axis] or 1)
