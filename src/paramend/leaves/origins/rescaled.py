"""The leaves of a group with which its weight is multiplied by a number: other scales, or blocks with other scales."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from paramend.leaves.codecs.codec import Codec
from paramend.leaves.codecs.ggml import Blocks
from paramend.leaves.codecs.scalings import powers
from paramend.leaves.origins.boxes import Box
from paramend.leaves.origins.origin import Computed, Namer, Origin
from paramend.leaves.specs import Array, numpy_dtype

_POWERS = ("uint8", "float8_e8m0fnu")


@dataclass(frozen=True, eq=False, repr=False)
class Rescaled(Computed):
    """Scales, each multiplied by a number in float32; exponents, with one added."""

    factor: float

    def read_box(self, box: Box) -> Array:
        return self.of(self.whole.read_box(box))

    def of(self, scales: Array) -> Array:
        """Scales, multiplied."""
        if self.spec.dtype in _POWERS:
            moved = scales.view(np.uint8).astype(np.int64) + round(math.log2(self.factor))
            exponents: Array = np.clip(moved, 0, 254).astype(np.uint8)
            return exponents.view(scales.dtype)
        with np.errstate(all="ignore"):
            found: Array = (scales.astype(np.float32) * np.float32(self.factor)).astype(scales.dtype)
        return found

    def takes(self) -> bool:
        """Whether every scale can be multiplied: exponents stay in their range, and nothing becomes 0 or inf."""
        for start, stop in self.whole.ranges():
            old = self.whole.read_range(start, stop)
            with np.errstate(all="ignore"):
                wanted, found = powers(old) * np.float32(self.factor), powers(self.of(old))
            right = found == wanted if self.spec.dtype in _POWERS else (found != 0) | (powers(old) == 0)
            if not (np.isfinite(found) & right).all():
                return False
        return True

    def text(self, name: Namer) -> str:
        return f"{self.whole.text(name)}.multiply({self.factor:g})"


@dataclass(frozen=True, eq=False, repr=False)
class Flipped(Computed):
    """Codes with some bits of each byte flipped, as those of their signs."""

    mask: int

    def read_box(self, box: Box) -> Array:
        found = np.array(self.whole.read_box(box), order="C")
        return (found.view(np.uint8) ^ np.uint8(self.mask)).view(numpy_dtype(self.spec.dtype))

    def text(self, name: Namer) -> str:
        return f"{self.whole.text(name)}.multiply(-1)"


@dataclass(frozen=True, eq=False, repr=False)
class Times(Computed):
    """Blocks of which the scales are multiplied by a number."""

    codec: Blocks
    factor: float

    def read_box(self, box: Box) -> Array:
        found = self.codec.times(self.whole.read_box(box), self.factor)
        assert found is not None
        return found

    def text(self, name: Namer) -> str:
        return f"{self.whole.text(name)}.multiply({self.factor:g})"


def _times(codec: Blocks, parts: Mapping[str, Origin], factor: float) -> dict[str, Origin] | None:
    """The blocks of a weight times a number, if the scales of all of them can take it; else None."""
    payload = parts["payload"]
    if not factor or any(codec.times(payload.read_range(*each), factor) is None for each in payload.ranges()):
        return None
    return {"payload": Times(payload, codec, factor)}


def rescaled(codec: Codec, parts: Mapping[str, Origin], factor: float) -> dict[str, Origin] | None:
    """The leaves that change for a weight multiplied by a number, where its scales can take it; else None. Scales of
    float32 take it to one rounding, powers of two take powers of two. A negative number flips the signs of codes, if
    they have signs."""
    if isinstance(codec, Blocks):
        return _times(codec, parts, factor)
    found: dict[str, Origin] = {}
    through = codec.scaling.through(abs(factor)) if factor and math.isfinite(factor) else None
    if through is None or (factor < 0 and not codec.codes.sign):
        return None
    role, by = through
    if by != 1:
        scales = Rescaled(parts[role], by)
        if not scales.takes():
            return None
        found[role] = scales
    if factor < 0:
        found["payload"] = Flipped(parts["payload"], codec.codes.sign | (codec.codes.sign << 4 & 0xFF))
    return found
