"""`Origin`: where the values of a leaf come from, an expression over stored leaves."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TypeAlias

import numpy as np

from paramend.leaves.names import Unread
from paramend.leaves.origins.boxes import Box, Runs, boxes_of
from paramend.leaves.specs import WIDTHS, Array, Spec, numpy_dtype

# Elements read or computed at once: they fit into the CPU cache; whole tensors are two to three times slower.
CHUNK = 1 << 18
# Bytes read at once where the last axis moves: the runs that a tile takes from the file are long enough then.
TILE = 24 << 20
# Shorter runs, on average, are read and put together; longer ones are left to the kernel.
PAGE = 4096
_MOST = 1 << 22


@dataclass(frozen=True, slots=True)
class Extent:
    """Where the contiguous bytes of a leaf are in a file; C order, little-endian."""

    path: Path
    start: int
    nbytes: int


# What an origin without children is called in a text.
Namer: TypeAlias = Callable[["Origin"], str]


class Origin(Unread, ABC):
    """Where a leaf comes from: its spec is known without data, its elements are read box by box. An origin never
    changes. Its text is the expression, as dry runs and records show it. One without children is a leaf of a source, or
    made; `says` is what it is called in a text."""

    children: tuple["Origin", ...] = ()
    says: str = ""

    @property
    @abstractmethod
    def spec(self) -> Spec:
        """Its shape and dtype."""

    @abstractmethod
    def read_box(self, box: Box) -> Array:
        """The elements at some places, axis by axis: an array of the shape of the box."""

    def text(self, name: Namer) -> str:
        """The expression, which `read_origin` reads."""
        return name(self)

    def __str__(self) -> str:
        return self.text(attrgetter("says"))

    def __repr__(self) -> str:
        return f"<{self} {self.spec}>"

    @property
    def refusal(self) -> str:
        """Why it cannot be read as an array, or ""."""
        return next((child.refusal for child in self.children if child.refusal), "")

    @property
    def moves(self) -> bool:
        """Whether its elements are zeros and those of leaves of sources, with their bits: its text then says all."""
        return all(child.moves for child in self.children)

    @property
    def together(self) -> bool:
        """Whether other leaves are computed along with it, which is done best in one place."""
        return any(child.together for child in self.children)

    @property
    def boxed(self) -> bool:
        """Whether its boxes can be read in any order, in memory that is bounded by a box."""
        return all(child.boxed for child in self.children)

    @property
    def bits(self) -> int:
        """The bits of one element, also for dtypes of unknown width; 0 if they are not all of one width."""
        return WIDTHS.get(self.spec.dtype) or next((child.bits for child in self.children if child.bits), 0)

    @property
    def nbytes(self) -> int:
        """The number of its bytes, also for dtypes of unknown width."""
        return (self.spec.size * self.bits + 7) // 8

    @property
    def tile(self) -> int:
        """About how many elements are best read at once."""
        return max((child.tile for child in self.children), default=CHUNK)

    @property
    def extent(self) -> Extent | None:
        """Where its bytes are; None if they are not contiguous in one file."""
        found = self.extents if self.children else None
        return found[0] if found is not None and len(found) == 1 else None

    @cached_property
    def extents(self) -> list[Extent] | None:
        """Where its bytes are, one extent after the other; None if some are computed, or lie in many short runs."""
        if not self.spec.size or not self.bits:
            return None
        most = _MOST if self.refusal else min(max(self.nbytes // PAGE, 1024), _MOST)
        one = np.zeros(1, np.int64)
        traced = self.trace(Runs(one, one + self.spec.size, one), most)
        return None if traced is None else _extents(traced)

    def trace(self, runs: Runs, most: int) -> list[tuple["Origin", Runs]] | None:
        """The runs of stored leaves that some runs of its elements are; None if there are more than `most`."""
        return [(self, runs)]

    def stored(self) -> Iterator["Origin"]:
        """The origins at the bottom of the expression: leaves of sources, values in memory, made ones."""
        rest: list[Origin] = [self]
        while rest:
            origin = rest.pop()
            rest += reversed(origin.children)
            if not origin.children:
                yield origin

    def read_range(self, start: int, stop: int) -> Array:
        """A range of its elements in C order."""
        found = [self.read_box(box).reshape(-1) for box in boxes_of(self.spec.shape, start, stop)]
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.empty(0, numpy_dtype(self.spec.dtype))

    def read(self) -> Array:
        """All of it."""
        return self.read_range(0, self.spec.size).reshape(self.spec.shape)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Ranges of elements, first to last, that are best read one by one: whole rows where they are short."""
        step = inner = 1
        for length in reversed(self.spec.shape):
            inner *= length
            if 0 < inner <= self.tile:
                step = inner
        step *= max(self.tile // step, 1)
        for start in range(0, self.spec.size, step):
            yield start, min(start + step, self.spec.size)


class Given(Origin):
    """An origin whose spec is given."""

    _spec: Spec

    @property
    def spec(self) -> Spec:
        return self._spec


class Unstored(Origin):
    """An origin whose bytes are computed, and in no file."""

    moves = False
    extents = None


@dataclass(frozen=True, eq=False, repr=False)
class OfOne(Origin):
    """An origin that is made of another."""

    whole: Origin

    @property
    def children(self) -> tuple[Origin, ...]:  # type: ignore[override]
        return (self.whole,)


@dataclass(frozen=True, eq=False, repr=False)
class OfParts(Origin):
    """An origin that is made of several."""

    parts: tuple[Origin, ...]

    @property
    def children(self) -> tuple[Origin, ...]:  # type: ignore[override]
        return self.parts


class Computed(Unstored, OfOne):
    """Elements that are computed from those of another origin, box by box; its spec, unless a kind says otherwise."""

    @property
    def spec(self) -> Spec:
        return self.whole.spec


class Partly(Unstored):
    """New values of a leaf, of which an engine that writes in place writes only what is not what it was."""

    @property
    def changed(self) -> Array:
        """The bytes of the leaf that are not what they were, as (start, stop), ascending."""
        raise NotImplementedError

    def data(self, start: int, stop: int, old: Callable[[], bytearray]) -> bytes | memoryview:
        """Some bytes of the leaf; `old` reads those that it had there."""
        raise NotImplementedError

    def contents(self) -> Iterator[memoryview]:
        """All bytes, in pieces, also of what cannot be read as an array."""
        raise NotImplementedError


def _extents(traced: Sequence[tuple[Origin, Runs]]) -> list[Extent] | None:
    """The bytes of runs of stored leaves, in order, those that follow each other as one."""
    files: dict[Path, int] = {}
    rows = []
    for origin, runs in traced:
        where, bits = origin.extent, origin.bits
        if where is None or (runs.starts * bits % 8).any() or (runs.lengths * bits % 8).any():
            return None
        file = files.setdefault(where.path, len(files))
        starts = runs.starts * bits // 8 + where.start
        rows.append(np.stack([runs.at, np.full_like(starts, file), starts, starts + runs.lengths * bits // 8]))
    table = np.concatenate(rows, 1)
    _, file, start, stop = table[:, np.argsort(table[0], kind="stable")]
    new = np.flatnonzero(np.concatenate([[True], (file[1:] != file[:-1]) | (start[1:] != stop[:-1])]))
    last = np.concatenate([new[1:] - 1, [len(file) - 1]])
    paths = list(files)
    rows_found = zip(file[new].tolist(), start[new].tolist(), stop[last].tolist(), strict=True)
    return [Extent(paths[place], first, end - first) for place, first, end in rows_found]
