"""Origins at the bottom of an expression: leaves of sources, values in memory, values that are made when read."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from paramend.leaves.mapped import forget
from paramend.leaves.origins.boxes import Box, bare, contiguous, ends, select, shape_of, shifted
from paramend.leaves.origins.origin import Extent, Given, Origin
from paramend.leaves.specs import Array, Spec, numpy_dtype

# Bytes of a file that are mapped at once where a box takes a little of each row: the system maps what is around, too.
_SPAN = 16 << 20


class Stored(Origin):
    """A leaf of a source, unchanged; also the operand of an edit, which is read when the edit runs."""

    def __init__(self, source: Any, number: int) -> None:
        self.source, self.number = source, number

    def __reduce__(self) -> tuple[Any, ...]:
        return Stored, (self.source, self.number)

    @property
    def says(self) -> str:  # type: ignore[override]
        return str(self.source.index.path(self.number))

    @property
    def spec(self) -> Spec:
        found: Spec = self.source.spec(self.number)
        return found

    @property
    def ndim(self) -> int:
        return self.spec.ndim

    @property
    def nbytes(self) -> int:
        return int(self.source.nbytes(self.number))

    @property
    def bits(self) -> int:
        known, size = super().bits, self.spec.size
        return known or (self.nbytes * 8 // size if size and not self.nbytes * 8 % size else 0)

    @property
    def refusal(self) -> str:
        return str(self.source.refusal(self.number))

    @property
    def extent(self) -> Extent | None:
        found: Extent | None = self.source.extent(self.number)
        return found

    def read(self) -> Array:
        found: Array = self.source.read(self.number)
        return found

    def read_range(self, start: int, stop: int) -> Array:
        found: Array = self.source.read_range(self.number, start, stop)
        return found

    def read_box(self, box: Box) -> Array:
        shape = self.spec.shape
        run = contiguous(box, shape)
        if run is not None:
            return self.read_range(*run).reshape([len(places) for places in box])
        if hasattr(self.source, "read_box"):  # a protocol is slow to ask for, and a tile asks hundreds of times
            cover = [ends(places) for places in box]
            found = self.source.read_box(self.number, tuple(slice(*each) for each in cover))
            return select(found, tuple(shifted(places, low) for places, (low, _) in zip(box, cover, strict=True)))
        dtype, extent, inner = numpy_dtype(self.spec.dtype), self.extent, math.prod(shape[1:])
        found = np.empty(shape_of(box), dtype)
        # What is not aligned in its file is never mapped, and would be copied whole.
        array = None if extent is not None and extent.start % dtype.alignment else self.read()
        rows = max(_SPAN * shape[0] // max(self.nbytes, 1), 1)
        for at in range(0, len(box[0]), rows):
            places = box[0][at : at + rows]
            low, high = ends(places)
            band = (
                self.read_range(low * inner, high * inner).reshape(high - low, *shape[1:])
                if array is None
                else array[low:high]
            )
            bare(found)[at : at + rows] = select(bare(band), (shifted(places, low), *box[1:]))
            forget(band, 0, high - low)
        return found


class Held(Origin):
    """Values in memory."""

    says = "values in memory"
    moves = False

    def __init__(self, values: Array) -> None:
        self.values = values

    @property
    def spec(self) -> Spec:
        return Spec(self.values.shape, self.values.dtype.name)

    def read_box(self, box: Box) -> Array:
        return np.array(select(self.values, box))


class Zeros(Given):
    """Elements that are all zero."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec

    @property
    def says(self) -> str:  # type: ignore[override]
        return f"zeros({list(self.spec.shape)}, {self.spec.dtype})"

    def read_box(self, box: Box) -> Array:
        return np.zeros(shape_of(box), numpy_dtype(self.spec.dtype))


class Made(Given):
    """A leaf that is computed when it is first read, and freed when its last element has been read."""

    moves = False
    together = True

    def __init__(self, spec: Spec, make: Callable[[], Array], says: str = "values in memory") -> None:
        self._spec, self._make, self.says = spec, make, says
        self._values: Array | None = None

    def __deepcopy__(self, memo: Any) -> "Made":
        return Made(self.spec, copy.deepcopy(self._make, memo), self.says)

    def __reduce__(self) -> tuple[type["Made"], tuple[Spec, Callable[[], Array], str]]:
        # What a function of a module makes of files is made again; what comes from memory is taken along.
        make = self._make if isinstance(self._make, partial) else partial(np.asarray, self._whole())
        return Made, (self.spec, make, self.says)

    def read_range(self, start: int, stop: int) -> Array:
        found = self._whole().reshape(-1)[start:stop]
        self._free(stop >= self.spec.size)
        return found

    def read_box(self, box: Box) -> Array:
        found = np.array(select(self._whole(), box))
        self._free(all(len(places) and places[-1] == n - 1 for places, n in zip(box, self.spec.shape, strict=True)))
        return found

    def _whole(self) -> Array:
        if self._values is None:
            self._values = np.ascontiguousarray(self._make()).reshape(self.spec.shape)
        return self._values

    def _free(self, done: bool) -> None:
        if done:
            self._values = None
