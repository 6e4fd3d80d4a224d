"""Scalings: the factors of blocks, as schemes store them."""

from dataclasses import dataclass

import numpy as np

from paramend.leaves.codecs.codec import Grids, Scaling
from paramend.leaves.specs import Array

_F32 = np.float32
_POWERS = np.array([*(2.0 ** (code - 127) for code in range(255)), np.inf], _F32)


def powers(codes: Array) -> Array:
    """2^(code - 127), float32. Code 255 is NaN in the dtype of such scales, and 2^128, inf, in integers.

    >>> powers(np.array([127, 130, 255], np.uint8)).tolist()
    [1.0, 8.0, inf]
    """
    if codes.dtype.kind in "ui":
        found: Array = _POWERS[codes.view(np.uint8)]
        return found
    return codes.astype(_F32)


@dataclass(frozen=True, slots=True)
class Plain(Scaling):
    """A scale for each block, a multiplier: floats, or powers of two."""

    def factors(self, grids: Grids) -> tuple[Array, ...]:
        scale = grids["scale"]
        return (scale.astype(_F32) if scale.dtype.kind not in "ui" else powers(scale),)


class Powers(Scaling):
    """An exponent for each block. No product on the way is too large, so that 0 stays 0 and code 255 is 2^128."""

    def factors(self, grids: Grids) -> tuple[Array, ...]:
        return (_F32(2), np.ldexp(_F32(1), grids["scale"].astype(np.int32) - 128))


@dataclass(frozen=True, slots=True)
class Twice(Scaling):
    """A scale for each block, and one for the scales, which come together first.

    Attributes:
        divides: whether the scales are divided by that of the scales, as in compressed-tensors, not multiplied.
    """

    divides: bool

    def factors(self, grids: Grids) -> tuple[Array, ...]:
        scale, top = grids["scale"].astype(_F32), grids["global"].astype(_F32)
        return (scale / top if self.divides else scale * top,)


@dataclass(frozen=True, eq=False, slots=True)
class Nested(Scaling):
    """Scales that are codes themselves, in blocks with scales of their own.

    Attributes:
        map: code → value.
        offset: what is added to all.
    """

    map: Array
    offset: float

    def factors(self, grids: Grids) -> tuple[Array, ...]:
        return (self.map[grids["scale"]] * grids["nested scale"] + _F32(self.offset),)


@dataclass(frozen=True, slots=True)
class Rows(Scaling):
    """The greatest magnitude of each row, for 127. The library multiplies by a rounded 1/127."""

    def factors(self, grids: Grids) -> tuple[Array, ...]:
        return (grids["scale"].astype(_F32), _F32(7.874015718698502e-3))
