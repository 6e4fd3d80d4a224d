"""`Decoded`: the values of a quantised weight, computed from the leaves of its group as they are read."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from paramend.leaves.codecs.codec import Codec
from paramend.leaves.origins.boxes import Box, shape_of
from paramend.leaves.origins.origin import Namer, Origin, Unstored
from paramend.leaves.specs import Array, Spec, numpy_dtype

# Elements that are put together while those before are written.
_TILE = 1 << 22
# Elements that are computed together.
_CACHED = 1 << 17


@dataclass(frozen=True, eq=False, repr=False)
class Decoded(Unstored):
    """The values of a weight with the axes that it is stored with; `decoded` gives it as its model has it."""

    codec: Codec
    parts: Mapping[str, Origin]  # role → leaf of the group, with the axes of the weight
    dtype: str  # to which values, computed in float32, are rounded once

    @property
    def children(self) -> tuple[Origin, ...]:  # type: ignore[override]
        return tuple(self.parts.values())

    @property
    def spec(self) -> Spec:
        return Spec(self.codec.spec.shape, self.dtype)

    @property
    def bits(self) -> int:
        return 8 * numpy_dtype(self.dtype).itemsize

    @property
    def tile(self) -> int:
        return max(_TILE, *(child.tile for child in self.children))

    def read_box(self, box: Box) -> Array:
        shape = shape_of(box)
        if not shape:
            return self.codec.decode(self.parts, box).astype(numpy_dtype(self.dtype))
        found = np.empty(shape, numpy_dtype(self.dtype))
        if not found.size:
            return found
        if "scale" not in self.codec.fields:  # blocks, which hold their scales
            with np.errstate(all="ignore"):
                return self.codec.decode(self.parts, box).astype(found.dtype)
        codec, groups = self.codec, self.codec.groups(self.parts)
        codes, terms = codec.stored_codes(self.parts, box), codec.terms(codec.scales(self.parts, box))
        # Rows of the first axis with more than one place, as many as stay in the CPU cache.
        axis = next((axis for axis, length in enumerate(shape) if length > 1), 0)
        rows = max(_CACHED * shape[axis] // found.size, 1)
        every, places, ahead = codec.fields["scale"].every[axis], box[axis], (slice(None),) * axis
        if axis in groups or not isinstance(places, range) or places.step != 1:
            rows = shape[axis]
        with np.errstate(all="ignore"):  # what the dtype cannot hold is inf, as in the library
            for start in range(0, shape[axis], rows):
                here = (*ahead, slice(start, start + rows))
                some = (*box[:axis], places[start : start + rows], *box[axis + 1 :])
                blocks = slice(None)
                if every and rows < shape[axis]:
                    first = places[0] // every
                    blocks = slice(some[axis][0] // every - first, some[axis][-1] // every - first + 1)
                few = [(ufunc, term[(*ahead, blocks)] if term.size > 1 else term) for ufunc, term in terms]
                found[here] = codec.computed(codes[here], few, some, groups)
        return found

    def text(self, name: Namer) -> str:
        parts = ", ".join(part.text(name) for part in self.parts.values())
        return f"decode({self.codec.scheme}, {parts})"


def decoded(codec: Codec, parts: Mapping[str, Origin], dtype: str = "") -> Origin:
    """A quantised weight as its model has it, of leaves by role, in a dtype, by default that of the library."""
    stored = Decoded(codec, codec.views(parts), dtype or codec.spec.dtype)
    return codec.weight(stored)
