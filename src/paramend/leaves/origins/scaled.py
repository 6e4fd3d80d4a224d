"""Elements of another origin times factors that are products of one number for each place along each axis."""

from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import numpy as np

from paramend.leaves.origins.boxes import Box
from paramend.leaves.origins.origin import Computed, Namer
from paramend.leaves.specs import Array, Spec, numpy_dtype

# A number, and for each axis one number for each place; None for ones.
Term: TypeAlias = tuple[float, tuple[Array | None, ...]]


@dataclass(frozen=True, eq=False, repr=False)
class Scaled(Computed):
    """The elements times the sum of some terms, computed in float32, of float64 in float64, and rounded once."""

    terms: tuple[Term, ...]
    shift: float = 0.0  # added before and taken away after: 1 for gains that their norm adds to 1

    def read_box(self, box: Box) -> Array:
        stored = self.whole.read_box(box)
        wide = numpy_dtype("float64" if stored.dtype.itemsize == 8 else "float32")
        factors = (reduce(np.multiply, _vectors(term, box)).astype(wide) for term in self.terms)
        found = stored.astype(wide)
        if self.shift:
            np.add(found, self.shift, out=found)
        np.multiply(found, reduce(np.add, factors), out=found)
        if self.shift:
            np.subtract(found, self.shift, out=found)
        return found.astype(stored.dtype, copy=False)

    def text(self, name: Namer) -> str:
        return f"scaled({self.whole.text(name)})"


def _vectors(term: Term, box: Box) -> list[Array]:
    """The factors of a term, each along its axis."""
    number, axes = term
    found = [np.asarray(number)]
    for axis, (each, places) in enumerate(zip(axes, box, strict=True)):
        if each is not None:
            shape = [-1 if at == axis else 1 for at in range(len(axes))]
            found.append(each[np.asarray(places, np.int64)].reshape(shape))
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Mean(Computed):
    """The mean along an axis, at each of some places of it."""

    axis: int
    count: int

    @property
    def spec(self) -> Spec:
        shape = self.whole.spec.shape
        return Spec((*shape[: self.axis], self.count, *shape[self.axis + 1 :]), self.whole.spec.dtype)

    def read_box(self, box: Box) -> Array:
        axis = self.axis
        found = self.whole.read_box((*box[:axis], range(self.whole.spec.shape[axis]), *box[axis + 1 :]))
        means = found.mean(axis, keepdims=True, dtype=np.float64).astype(found.dtype)
        return np.repeat(means, len(box[axis]), axis)

    def text(self, name: Namer) -> str:
        return f"mean({self.whole.text(name)}, axis={self.axis})"
