"""Scalings: the factors of blocks, as schemes store them."""

from dataclasses import dataclass

import numpy as np

from paramend.errors import Unsupported
from paramend.leaves.codecs.codec import Grids, Scaling
from paramend.leaves.specs import Array, Spec, numpy_dtype

_F32 = np.float32
_POWERS = np.array([*(2.0 ** (code - 127) for code in range(255)), np.inf], _F32)
_FP8_LIMIT = 448.0


def powers(codes: Array) -> Array:
    """2^(code - 127), float32. Code 255 is NaN in the dtype of such scales, and 2^128, inf, in integers.

    >>> powers(np.array([127, 130, 255], np.uint8)).tolist()
    [1.0, 8.0, inf]
    """
    if codes.dtype.kind in "ui":
        found: Array = _POWERS[codes.view(np.uint8)]
        return found
    return codes.astype(_F32)


def exponents(factors: Array) -> Array:
    """The codes of the least powers of two that are not below some factors; that of 1 for 0.

    >>> exponents(np.array([1, 1.5, 0.25, 0], np.float32)).tolist()
    [127, 128, 125, 127]
    """
    fraction, exponent = np.frexp(factors)
    found: Array = np.clip(np.where(fraction == 0, 127, exponent + 127 - (fraction == 0.5)), 0, 254).astype(np.uint8)
    return found


def _rounded(factors: Array, dtype: str) -> Array:
    """Factors as they are stored: 1 where all values of a block are 0, the least number where they are too small."""
    if dtype in ("uint8", "float8_e8m0fnu"):
        return exponents(factors).view(numpy_dtype(dtype))
    found: Array = np.where(factors > 0, factors, _F32(1)).astype(numpy_dtype(dtype))
    bits = found.view(f"u{found.itemsize}")
    bits[bits == 0] = 1
    return found


@dataclass(frozen=True, slots=True)
class Plain(Scaling):
    """A scale for each block, a multiplier: floats, or powers of two."""

    def factors(self, grids: Grids) -> tuple[Array, ...]:
        return (powers(grids["scale"]),)

    def fitted(self, greatest: Array, limit: float, spec: Spec, grids: Grids) -> Array:
        return _rounded(greatest / _F32(limit), spec.dtype)


class Powers(Plain):
    """An exponent for each block. No product on the way is too large, so that 0 stays 0 and code 255 is 2^128."""

    def factors(self, grids: Grids) -> tuple[Array, ...]:
        return (np.asarray(2, _F32), np.ldexp(_F32(1), grids["scale"].astype(np.int32) - 128))


@dataclass(frozen=True, slots=True)
class Twice(Scaling):
    """A scale for each block, and one for the scales, which come together first."""

    divides: bool  # the scales by that of the scales, as in compressed-tensors; else they are multiplied

    def factors(self, grids: Grids) -> tuple[Array, ...]:
        scale, top = grids["scale"].astype(_F32), grids["global"].astype(_F32)
        return (scale / top if self.divides else scale * top,)

    def fitted(self, greatest: Array, limit: float, spec: Spec, grids: Grids) -> Array:
        top = grids["global"].astype(_F32)
        wanted = self._stored(greatest / _F32(limit), top)
        if (wanted > _FP8_LIMIT * 1.04).any():
            raise Unsupported(
                f"a block needs a scale of {float(wanted.max()):.4g}, and {spec.dtype} has none above {_FP8_LIMIT:g}: "
                f"the scale of scales, {float(top.max()):.4g}, is for smaller values",
                hint="edit all weights that share it at once, such as q, k and v, or dequantise it before",
            )
        return _rounded(np.minimum(wanted, _F32(_FP8_LIMIT)), spec.dtype)

    def through(self, factor: float) -> tuple[str, float]:
        return "global", 1 / factor if self.divides else factor

    def suffices(self, top: Array, factors: Array) -> bool:
        return bool((self._stored(factors, top.astype(_F32)) <= _FP8_LIMIT * 1.04).all())

    def _stored(self, factors: Array, top: Array) -> Array:
        with np.errstate(all="ignore"):
            found: Array = factors * top if self.divides else factors / top
        return found

    def top(self, greatest: Array, limit: float) -> Array:
        greatest = np.where(greatest > 0, greatest, _F32(limit * _FP8_LIMIT))
        share = greatest / _F32(limit * _FP8_LIMIT)
        return 1 / share if self.divides else share


@dataclass(frozen=True, eq=False, slots=True)
class Nested(Scaling):
    """Scales that are codes themselves, in blocks with scales of their own."""

    map: Array  # code → value
    offset: float  # added to all

    def factors(self, grids: Grids) -> tuple[Array, ...]:
        return (self.map[grids["scale"]] * grids["nested scale"] + _F32(self.offset),)

    def through(self, factor: float) -> None:
        return None  # the offset is in a leaf of JSON

    def suffices(self, top: Array, factors: Array) -> bool:
        return bool((factors - _F32(self.offset) <= top * (self.map.max() * _F32(1.04))).all())

    def top(self, greatest: Array, limit: float) -> Array:
        found: Array = np.maximum(np.abs(greatest / _F32(limit) - _F32(self.offset)), _F32(abs(self.offset)))
        return found / _F32(self.map.max())

    def fitted(self, greatest: Array, limit: float, spec: Spec, grids: Grids) -> Array:
        above = (greatest / _F32(limit) - _F32(self.offset)) / grids["nested scale"]
        order = np.argsort(self.map, kind="stable")
        middle = (self.map[order][1:] + self.map[order][:-1]) / 2
        found: Array = order.astype(np.uint8)[np.searchsorted(middle, above)]
        return found


class Rows(Plain):
    """The greatest magnitude of each row, which code 127 stands for. The library multiplies by a rounded 1/127."""

    def factors(self, grids: Grids) -> tuple[Array, ...]:
        return (grids["scale"].astype(_F32), np.asarray(7.874015718698502e-3, _F32))

    def fitted(self, greatest: Array, limit: float, spec: Spec, grids: Grids) -> Array:
        return _rounded(greatest, spec.dtype)
