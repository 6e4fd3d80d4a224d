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

    def fitted(self, factor: Array, grids: Grids) -> dict[str, Array]:
        return {"scale": factor}
