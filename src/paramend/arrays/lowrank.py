"""Products of low rank, added to arrays piece by piece: no product is ever whole."""

import math
from typing import Any, NamedTuple

import numpy as np

from paramend.leaves.origins.origin import CHUNK
from paramend.leaves.specs import Array, Spec, numpy_dtype


def widened(dtype: str) -> str:
    """The dtype in which a product is added to an array of this one: float32, or float64."""
    return "float64" if dtype == "float64" else "float32"


class LowRank(NamedTuple):
    """`b @ a` as the operand of an addition: arrays of any library, also traced ones."""

    b: Any
    a: Any

    @property
    def ndim(self) -> int:
        """The number of axes of the product."""
        return max(np.ndim(self.b), np.ndim(self.a))


class Product:
    """The elements of `b @ a`, of shapes (batch, rows, rank) and (batch, rank, columns), in C order, range by range.
    They are computed in the same blocks of rows whatever the ranges are: every engine adds the same bits."""

    def __init__(self, b: Array, a: Array) -> None:
        self._b, self._a = b, a
        self._rows = max(CHUNK // max(a.shape[-1], 1), 1)
        self._block, self._at = np.empty(0, b.dtype), (-1, -1)

    def read_range(self, start: int, stop: int) -> Array:
        """Some of its elements."""
        rows, columns = self._b.shape[-2], self._a.shape[-1]
        found = [self._block[:0]]
        while start < stop:
            batch, row = divmod(start // columns, rows)
            first = row - row % self._rows
            if self._at != (batch, first):
                block = self._b[batch, first : first + self._rows] @ self._a[batch]
                self._at, self._block = (batch, first), block.reshape(-1)
            place = start - (batch * rows + first) * columns
            found.append(self._block[place : place + stop - start])
            start += found[-1].size
        return np.concatenate(found)

    def added(self, x: Array, start: int) -> Array:
        """A flat piece of an array, from its element `start` on, and the same elements of the product: rounded once."""
        wide = x.astype(self._b.dtype)
        wide -= 0 - self.read_range(start, start + x.size)  # -0.0 + 0.0 is 0.0, and -0.0 - 0.0 is -0.0
        return wide.astype(x.dtype, copy=False)


class Projection(Product):
    """What takes a direction from an array W: `-strength * r @ (r.T @ W)`, r being a unit vector along an axis. All
    elements of W are learnt, in order, before the first is read."""

    def __init__(self, spec: Spec, axis: int, unit: Array, strength: float) -> None:
        super().__init__(*[np.empty((0, 0, 0), widened(spec.dtype))] * 2)
        self._unit, self._strength = unit, strength
        # Summed up in float64: over thousands of rows, float32 would lose more than what is then subtracted.
        self._along = np.zeros((math.prod(spec.shape[:axis]), math.prod(spec.shape[axis + 1 :])))
        self._learnt, self._rest = 0, np.empty(0, numpy_dtype(spec.dtype))

    def learn(self, x: Array, start: int) -> None:
        """Take in the next elements of W, a flat piece, in blocks that do not depend on the pieces."""
        length, (slabs, columns) = len(self._unit), self._along.shape
        many, rows = (max(CHUNK // max(size, 1), 1) for size in (length * columns, columns))
        x = np.concatenate([self._rest, x]) if self._rest.size else x
        at = 0
        while at < x.size:
            slab, row = divmod(self._learnt, length)
            shape = min(many, slabs - slab), min(rows, length - row), columns
            block = x[at : at + math.prod(shape)].astype(np.float64)
            if block.size < math.prod(shape):
                break
            self._along[slab : slab + shape[0]] += self._unit[row : row + shape[1]] @ block.reshape(shape)
            at, self._learnt = at + block.size, self._learnt + shape[0] * shape[1]
        self._rest = x[at:]
        if self._learnt == slabs * length:
            self._settle()

    def _settle(self) -> None:
        """Become the product, of rank 1."""
        (slabs, columns), dtype = self._along.shape, self._b.dtype
        along, unit = self._along.astype(dtype), (-self._strength * self._unit).astype(dtype)
        if columns == 1:
            super().__init__(along.reshape(1, slabs, 1), unit.reshape(1, 1, -1))
        else:
            super().__init__(np.broadcast_to(unit.reshape(-1, 1), (slabs, len(unit), 1)), along.reshape(slabs, 1, -1))


def product_of(factors: LowRank, spec: Spec) -> Product:
    """The product to add to an array of a spec that it has the shape of."""
    batch, dtype = spec.shape[:-2], widened(spec.dtype)
    wide = [np.asarray(each).astype(dtype) for each in factors]
    whole = [np.broadcast_to(each, (*batch, *each.shape[-2:])) for each in wide]
    b, a = (each.reshape(math.prod(batch), *each.shape[-2:]) for each in whole)
    return Product(b, a)


def added_to(x: Array, product: Product) -> Array:
    """A new array: x with a product added."""
    flat = np.ascontiguousarray(x).reshape(-1)
    pieces = {at: flat[at : at + CHUNK] for at in range(0, flat.size, CHUNK)}
    if isinstance(product, Projection):
        for at, piece in pieces.items():
            product.learn(piece, at)
    found = np.empty_like(flat)
    for at, piece in pieces.items():
        found[at : at + piece.size] = product.added(piece, at)
    return found.reshape(x.shape)
