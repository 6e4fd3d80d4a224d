"""Elements of another origin times factors that are products of one number for each place along each axis."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from paramend.leaves.origins.boxes import Box, shape_of
from paramend.leaves.origins.origin import Namer, Origin
from paramend.leaves.specs import Array, Spec

# A number, and for each axis one number for each place; None for ones.
Term: TypeAlias = tuple[float, tuple[Array | None, ...]]


@dataclass(frozen=True, eq=False, repr=False)
class Scaled(Origin):
    """The elements times the sum of some terms, computed in float32, of float64 in float64, and rounded once.

    Attributes:
        shift: what is added before and taken away after: 1 for gains that their norm adds to 1.
    """

    whole: Origin
    terms: tuple[Term, ...]
    shift: float = 0.0
    moves = False

    @property
    def children(self) -> tuple[Origin, ...]:  # type: ignore[override]
        return (self.whole,)

    @property
    def spec(self) -> Spec:
        return self.whole.spec

    def read_box(self, box: Box) -> Array:
        stored = self.whole.read_box(box)
        found = stored.astype(np.float64 if stored.dtype.itemsize == 8 else np.float32)
        found += self.shift
        if len(self.terms) == 1:
            for factor in _factors(self.terms[0], box, found.dtype):
                found *= factor
        else:
            sums = np.zeros(shape_of(box), found.dtype)
            for term in self.terms:
                product: Array = np.ones((), found.dtype)
                for factor in _factors(term, box, found.dtype):
                    product = product * factor
                sums += product
            found *= sums
        found -= self.shift
        return found.astype(stored.dtype, copy=False)

    def trace(self, runs: object, most: int) -> None:
        """None: the bytes are computed."""

    def text(self, name: Namer) -> str:
        return f"scaled({self.whole.text(name)})"


def _factors(term: Term, box: Box, dtype: np.dtype) -> Sequence[Array]:  # type: ignore[type-arg]
    number, axes = term
    found = [np.asarray(number, dtype)] if number != 1 else []
    for axis, each in enumerate(axes):
        if each is not None:
            places = box[axis]
            some = each[places.start : places.stop] if isinstance(places, range) and places.step == 1 else each[places]
            found.append(some.astype(dtype).reshape([-1 if n == axis else 1 for n in range(len(axes))]))
    return found


@dataclass(frozen=True, eq=False, repr=False)
class Mean(Origin):
    """The mean along an axis, at each of some places of it."""

    whole: Origin
    axis: int
    count: int
    moves = False

    @property
    def children(self) -> tuple[Origin, ...]:  # type: ignore[override]
        return (self.whole,)

    @property
    def spec(self) -> Spec:
        shape = self.whole.spec.shape
        return Spec((*shape[: self.axis], self.count, *shape[self.axis + 1 :]), self.whole.spec.dtype)

    def read_box(self, box: Box) -> Array:
        axis = self.axis
        found = self.whole.read_box((*box[:axis], range(self.whole.spec.shape[axis]), *box[axis + 1 :]))
        means = found.mean(axis, keepdims=True, dtype=np.float64).astype(found.dtype)
        return np.repeat(means, len(box[axis]), axis)

    def trace(self, runs: object, most: int) -> None:
        """None: the bytes are computed."""

    def text(self, name: Namer) -> str:
        return f"mean({self.whole.text(name)}, axis={self.axis})"
