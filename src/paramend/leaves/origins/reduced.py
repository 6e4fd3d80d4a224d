"""`Reduced`: a leaf made of the leaves of several models, which are read side by side, piece by piece."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from paramend.leaves.origins.boxes import Box, contiguous, select, shape_of
from paramend.leaves.origins.origin import Namer, OfParts, Unstored
from paramend.leaves.specs import Array, Spec, numpy_dtype

X = TypeVar("X")
Y = TypeVar("Y")
_THREADS = min(os.cpu_count() or 1, 4)
# Elements that are computed together: their intermediate values stay in the CPU cache.
BAND = 1 << 17
# Elements that are computed while those before are written.
_TILE = 1 << 20
# The allocator of glibc gives freed memory back to the system, which costs more than all arithmetic here, up to twice
# the size of the largest block that was freed.
_block = np.empty(24 << 20, np.uint8)
del _block


class Reduction(Protocol):
    """What becomes of the elements of several leaves at the same places."""

    @property
    def align(self) -> int:
        """Elements are computed in pieces that begin at multiples of this; 1 if their places do not matter."""

    @property
    def elementwise(self) -> bool:
        """Whether an element depends on nothing but those at its place, nor on this place."""

    def prepare(self) -> None:
        """Find out what must be known of whole leaves before any element can be computed."""

    def compute(self, values: Sequence[Array], start: int) -> Array:
        """New elements from those of each part, flat; the first of them is element `start` of the leaf."""

    def text(self, parts: Sequence[str]) -> str:
        """The expression."""


def abreast(work: Callable[[X], Y], items: Iterable[X]) -> Iterator[Y]:
    """What work makes of items, in their order, by a few threads; the items are made by this one, a few ahead."""
    waiting: deque[Future[Y]] = deque()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="paramend") as pool:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * _THREADS:
                yield waiting.popleft().result()
        yield from (each.result() for each in waiting)


@dataclass(frozen=True, eq=False, repr=False)
class Reduced(Unstored, OfParts):
    """The elements of several leaves of one shape, reduced to one each."""

    how: Reduction
    dtype: str

    @property
    def spec(self) -> Spec:
        return Spec(self.parts[0].spec.shape, self.dtype)

    @property
    def bits(self) -> int:
        return 8 * numpy_dtype(self.dtype).itemsize

    @property
    def boxed(self) -> bool:
        return self.how.align == 1 and super().boxed

    @property
    def tile(self) -> int:
        return max(_TILE, self.how.align)

    def ranges(self) -> Iterator[tuple[int, int]]:
        step = self.tile - self.tile % self.how.align
        for start in range(0, self.spec.size, step):
            yield start, min(start + step, self.spec.size)

    def read_range(self, start: int, stop: int) -> Array:
        found = np.empty(stop - start, numpy_dtype(self.dtype))
        if start >= stop:
            return found
        align = self.how.align
        step, size = (align, self.spec.size) if align > 1 else (BAND, stop)

        def compute(piece: tuple[int, list[Array]]) -> None:
            at, values = piece
            new = self.how.compute(values, at)
            low, high = max(at, start), min(at + new.size, stop)
            found[low - start : high - start] = new[low - at : high - at]

        self.how.prepare()
        starts = range(start - start % align, stop, step)
        for _ in abreast(
            compute, ((at, [part.read_range(at, min(at + step, size)) for part in self.parts]) for at in starts)
        ):
            pass
        return found

    def read_box(self, box: Box) -> Array:
        shape, run = shape_of(box), contiguous(box, self.spec.shape)
        if run is not None:
            return self.read_range(*run).reshape(shape)
        if self.how.align > 1:
            return np.array(select(self.read(), box))
        found = np.empty(shape, numpy_dtype(self.dtype))
        axis = next((axis for axis, length in enumerate(shape) if length > 1), 0)
        rows = max(BAND * shape[axis] // max(found.size, 1), 1)
        for at in range(0, shape[axis], rows):
            some = (*box[:axis], box[axis][at : at + rows], *box[axis + 1 :])
            new = self.how.compute([part.read_box(some).reshape(-1) for part in self.parts], 0)
            found[(slice(None),) * axis + (slice(at, at + rows),)] = new.reshape(shape_of(some))
        return found

    def text(self, name: Namer) -> str:
        return self.how.text([part.text(name) for part in self.parts])
