"""`Combined`: a leaf with products of two narrow matrices added to it, computed piece by piece and rounded once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from paramend.leaves.origins.boxes import Box, contiguous, select, shape_of
from paramend.leaves.origins.origin import CHUNK, Given, Namer, Origin, Unstored
from paramend.leaves.specs import Array, Spec, numpy_dtype

# A leaf as matrices, in C order: how many there are, their rows, their columns.
View: TypeAlias = tuple[int, int, int]
# BLAS computes no more multiplications than these in the thread that asks; in several it may wait long for the others.
_ALONE, _FEW = 1 << 18, 8
# For each pass what is taken from the elements of a tile, and what they are multiplied by then: -0.0 + 0.0 is 0.0, and
# -0.0 - 0.0 is -0.0, so that what nothing is added to keeps its bits.
_Terms: TypeAlias = list[tuple[Array, Array | None]]


@dataclass(frozen=True, eq=False)
class Product:
    """`scale * u[n] @ v[n]` for each of n matrices of a leaf, at some of their rows and columns."""

    scale: float  # the factor
    u: Origin  # of shape (n, rows, rank)
    v: Origin  # of shape (n, rank, columns)
    first: int = 0  # the number of the first matrix
    rows: range | None = None  # the rows that it is added to; None for all
    columns: range | None = None  # the columns; None for all
    magnitude: Origin | None = None  # the norms that these rows, or columns, have afterwards; None if they keep theirs
    along: int = 0  # what the norms are those of: 0 for rows, 1 for columns

    @property
    def children(self) -> tuple[Origin, ...]:
        """What it is made of."""
        return (self.u, self.v, *(() if self.magnitude is None else (self.magnitude,)))

    def text(self, name: Namer) -> str:
        """The leaves of the product, as a dry run shows them."""
        leaves = [name(next(each.stored())) for each in self.children]
        return f"{self.scale:g} * {' @ '.join(leaves[:2])}{' with norms '.join(['', *leaves[2:]])}"


class _Ready:
    """A product whose matrices have been read. `gain` is what its rows or columns are multiplied by afterwards."""

    def __init__(self, product: Product, view: View, wide: np.dtype[Any]) -> None:
        self.product, self.along = product, product.along
        self.u, self.v = (each.read().astype(wide) for each in (product.u, product.v))
        self.scale = wide.type(product.scale)
        self.rows = range(view[1]) if product.rows is None else product.rows
        every = range(view[2]) if product.columns is None else product.columns
        self.columns = slice(every.start, every.stop, every.step)
        self.squares = np.zeros(self.v.shape[2] if self.along else self.u.shape[1], np.float64)
        self.gain: Array | None = None

    def measure(self, wide: np.dtype[Any]) -> None:
        """Make the gain of the sums of squares. What is all zero has no direction, and stays zero."""
        assert self.product.magnitude is not None
        norms = np.sqrt(self.squares).astype(wide)
        magnitude = self.product.magnitude.read().reshape(-1).astype(wide)
        self.gain = np.divide(magnitude, norms, out=np.ones_like(norms), where=norms > 0)


class Combined(Unstored, Given):
    """A leaf with products added, in float32, or float64 if that is a dtype of it; then it is rounded once. Products
    come in passes. Those of one are added together; then rows and columns get the norms that it wants, which are
    measured on the leaf with the products of this pass alone. By default the leaf is viewed as one matrix, and keeps
    its dtype."""

    tile = 4 * CHUNK  # so many are computed while those before are written

    def __init__(
        self, base: Origin, passes: Sequence[Sequence[Product]], view: View | None = None, dtype: str = ""
    ) -> None:
        shape = base.spec.shape
        self.base, self.passes = base, tuple(map(tuple, passes))
        self.view: View = view or (1, base.spec.size // max(shape[-1], 1), shape[-1]) if shape else (1, 1, 1)
        self._spec = Spec(shape, dtype or base.spec.dtype)
        self._wide = np.dtype("float64" if "float64" in (self._spec.dtype, base.spec.dtype) else "float32")
        self._forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return Combined, (self.base, self.passes, self.view, self._spec.dtype)

    def _forget(self) -> None:
        """Drop what was read of the products; it is read again for the next range."""
        self._ready: list[list[_Ready]] | None = None
        self._last: tuple[int, _Terms] = (-1, [])

    @property
    def children(self) -> tuple[Origin, ...]:  # type: ignore[override]
        return self.base, *(child for each in self.passes for product in each for child in product.children)

    def text(self, name: Namer) -> str:
        products = [product.text(name) for each in self.passes for product in each]
        more = [f"{len(products) - 2:,} more products"] if len(products) > 2 else []
        return " + ".join((self.base.text(name), *products[:2], *more))

    def read_box(self, box: Box) -> Array:
        shape = self.spec.shape
        run = contiguous(box, shape)
        if run is not None:
            return self.read_range(*run).reshape(shape_of(box))
        found, inner = np.empty(shape_of(box), numpy_dtype(self.spec.dtype)), self.spec.size // shape[0]
        for at, row in enumerate(box[0]):
            whole = self.read_range(int(row) * inner, (int(row) + 1) * inner)
            found[at] = select(whole.reshape(shape[1:]), box[1:])
        return found

    def read_range(self, start: int, stop: int) -> Array:
        dtype, size = numpy_dtype(self.spec.dtype), self._height * self.view[2]
        found = np.empty(stop - start, dtype)
        with np.errstate(all="ignore"):  # an overflow to inf is a valid result
            for tile in range(start // size, -(-stop // size)) if start < stop else ():
                low, high = max(start, tile * size), min(stop, (tile + 1) * size)
                here = slice(low - tile * size, high - tile * size)
                terms = self._terms(tile)  # first: what is read of the base may be overwritten next
                wide = self.base.read_range(low, high).astype(self._wide)
                for less, gain in terms:
                    wide -= less[here]
                    if gain is not None:
                        wide *= gain[here]
                found[low - start : high - start] = wide.astype(dtype, copy=False)
        if stop >= self.spec.size:
            self._forget()
        return found

    @property
    def _height(self) -> int:
        """The rows of a tile, which is computed as a whole whatever is asked for: so its bits are always the same."""
        return max(CHUNK // max(self.view[2], 1), 1)

    def _terms(self, tile: int) -> _Terms:
        ready, (last, terms) = self._ready, self._last  # another thread may read other tiles
        if ready is None:
            ready = [[_Ready(product, self.view, self._wide) for product in each] for each in self.passes]
            for each in ready:
                self._measure(each)
            self._ready = ready
        if last != tile:
            terms = [((0 - self._added(each, tile)).reshape(-1), self._gain(each, tile)) for each in ready]
            self._last = tile, terms
        return terms

    def _rows(self, tile: int) -> range:
        """The rows of a tile, counted through all matrices."""
        return range(self.view[0] * self.view[1])[tile * self._height : (tile + 1) * self._height]

    def _met(self, ready: _Ready, tile: int) -> Iterator[tuple[int, slice, slice]]:
        """Where a product meets a tile: the number of its matrix, rows of the tile, rows of the product."""
        rows, height, mine, every = self._rows(tile), self.view[1], ready.product.first, ready.rows
        for number in range(max(rows[0] // height, mine), min(rows[-1] // height + 1, mine + len(ready.u))):
            above = rows[0] - number * height  # the first row of the tile, counted in the matrix
            low = max(-(-(above - every.start) // every.step), 0)
            high = min(-(-(min(above + len(rows), height) - every.start) // every.step), len(every))
            if low < high:
                at = every.start + low * every.step - above
                yield number - mine, slice(at, at + (high - low - 1) * every.step + 1, every.step), slice(low, high)

    def _added(self, each: Sequence[_Ready], tile: int) -> Array:
        shape = len(self._rows(tile)), self.view[2]
        found: Array | None = None
        for ready in each:
            for number, here, there in self._met(ready, tile):
                product = _product(ready.u[number, there], ready.v[number])
                product *= ready.scale
                if found is None and product.shape == shape:  # nearly always, and all of it
                    found = product
                    continue
                found = np.zeros(shape, self._wide) if found is None else found
                found[here, ready.columns] += product
        return np.zeros(shape, self._wide) if found is None else found

    def _gain(self, each: Sequence[_Ready], tile: int) -> Array | None:
        if all(ready.gain is None for ready in each):
            return None
        found = np.ones((len(self._rows(tile)), self.view[2]), self._wide)
        for ready in each:
            for _, here, there in self._met(ready, tile) if ready.gain is not None else ():
                assert ready.gain is not None
                found[here, ready.columns] *= ready.gain if ready.along else ready.gain[there, None]
        return found.reshape(-1)

    def _measure(self, each: Sequence[_Ready]) -> None:
        """Measure the norms of the rows and columns that get others."""
        wanted = [ready for ready in each if ready.product.magnitude is not None]
        size = self._height * self.view[2]
        for tile in range(-(-self.spec.size // size)) if wanted else ():
            start = tile * size
            base = self.base.read_range(start, min(start + size, self.spec.size)).astype(self._wide)
            whole = base.reshape(-1, self.view[2]) + self._added(each, tile)
            for ready in wanted:
                for _, here, there in self._met(ready, tile):
                    squares = np.square(whole[here, ready.columns], dtype=np.float64)
                    ready.squares[slice(None) if ready.along else there] += squares.sum(0 if ready.along else 1)
        for ready in wanted:
            ready.measure(self._wide)


def _product(u: Array, v: Array) -> Array:
    """u @ v, in blocks of a few rows and as many columns as one thread computes."""
    (rows, rank), columns = u.shape, v.shape[1]
    found, width, whole = np.empty((rows, columns), u.dtype), max(_ALONE // (_FEW * rank), 1), rows - rows % _FEW
    for at in range(0, columns, width):
        some = slice(at, at + width)
        blocks = found[:whole].reshape(-1, _FEW, columns)[:, :, some]
        np.matmul(u[:whole].reshape(-1, _FEW, rank), v[:, some], out=blocks)
        np.matmul(u[whole:], v[:, some], out=found[whole:, some])
    return found
