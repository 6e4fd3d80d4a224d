"""Rows of tokens that are new: what they are made of."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from paramend.arrays.registry import backend, to_numpy
from paramend.edits import hands
from paramend.leaves.origins.boxes import Box, select, shape_of
from paramend.leaves.origins.moved import take
from paramend.leaves.origins.origin import CHUNK, Computed, Namer, Origin
from paramend.leaves.origins.stored import Held
from paramend.leaves.specs import Array, Spec, numpy_dtype

# A new row: the old ones that it is a sum of, and with which weights; its values, where they fit; None: the mean.
Mix: TypeAlias = tuple[Sequence[int], Sequence[float]] | Array | None


@dataclass(frozen=True, eq=False, repr=False)
class Mixed(Computed):
    """Rows that are weighted sums of others, added in float64."""

    axis: int
    mixes: tuple[Mix, ...]
    count: int  # of the rows, from the first on, that the mean is of

    @property
    def spec(self) -> Spec:
        shape, axis = self.whole.spec.shape, self.axis
        return Spec((*shape[:axis], len(self.mixes), *shape[axis + 1 :]), self.whole.spec.dtype)

    @cached_property
    def mean(self) -> Array:
        first = take(self.whole, range(self.count), self.axis)
        step = max(CHUNK * self.count // max(first.spec.size, 1), 1)
        shape = self.whole.spec.shape
        total = np.zeros((*shape[: self.axis], *shape[self.axis + 1 :]))
        for start in range(0, self.count, step):
            some = take(first, range(start, min(start + step, self.count)), self.axis)
            total += some.read().astype(np.float64).sum(self.axis)
        return np.asarray(total / max(self.count, 1))

    def _row(self, mix: Mix) -> Array:
        if mix is None or isinstance(mix, np.ndarray):
            return mix if mix is not None and mix.shape == self.mean.shape else self.mean
        numbers, weights = mix
        if max(numbers, default=0) >= self.whole.spec.shape[self.axis]:  # of a table that lacks the last tokens
            return self.mean
        rows = take(self.whole, np.asarray(numbers, np.int64), self.axis).read().astype(np.float64)
        return np.asarray(np.tensordot(np.asarray(weights, np.float64), rows, (0, self.axis)))

    def read_box(self, box: Box) -> Array:
        rows = [self._row(self.mixes[place]) for place in box[self.axis]]
        if not rows:
            return np.empty(shape_of(box), numpy_dtype(self.spec.dtype))
        found = np.stack(rows, self.axis).astype(numpy_dtype(self.spec.dtype))
        return select(found, (*box[: self.axis], range(len(rows)), *box[self.axis + 1 :]))

    def text(self, name: Namer) -> str:
        return f"mixed({self.whole.text(name)}, {len(self.mixes)})"


@dataclass(frozen=True)
class Rows:
    """The rows of a new table."""

    places: Sequence[int]  # for each the old one that it is; from the number of old ones on, it is a new one
    mixes: Sequence[Mix] = ()  # what the new ones are made of
    count: int = 0  # as in `Mixed`

    def trivial(self, rows: int) -> bool:
        return not self.mixes and list(self.places) == list(range(rows))


def arranged(x: Any, axis: int, rows: Rows) -> Any:
    """A table, which is an array or an origin, with other rows along an axis.

    >>> table = np.array([[1.0, 3.0], [3.0, 5.0], [0.0, 9.0]])
    >>> arranged(table, 0, Rows([1, 3, 4], [None, ([0, 2], [0.5, 0.5])], 2)).tolist()
    [[3.0, 5.0], [2.0, 4.0], [0.5, 6.0]]
    """
    if rows.mixes:
        new = Mixed(x if isinstance(x, Origin) else Held(to_numpy(x)), axis, tuple(rows.mixes), rows.count)
        x = hands.join([x, new if isinstance(x, Origin) else backend(x).beside(new.read(), x)], axis, "concat")
    return hands.take(x, np.asarray(rows.places, np.int64), axis)
