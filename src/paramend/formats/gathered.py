"""`Gathered`: leaves of other checkpoints, and computed ones, under new names as one source.

A model that is assembled from others (deepened, warm-started, stacked) is a list of references: the engine copies
their bytes from file to file, as it does for an edited checkpoint.
"""

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from paramend.errors import Unsupported
from paramend.formats.source import Extent, Source
from paramend.leaves.leaves import Index, entries, uncollected
from paramend.leaves.paths import Label
from paramend.leaves.specs import BITS, Array, Spec


class Origin(Protocol):
    """Where a leaf comes from."""

    @property
    def spec(self) -> Spec:
        """Its shape and dtype."""

    @property
    def nbytes(self) -> int:
        """The number of its bytes, also for dtypes of unknown width."""

    @property
    def refusal(self) -> str:
        """Why it cannot be read as an array, or ""."""

    @property
    def extent(self) -> Extent | None:
        """Where its bytes are; None if they are not contiguous."""

    def read_range(self, start: int, stop: int) -> Array:
        """A range of its elements in C order."""


@dataclass(frozen=True, slots=True)
class Part:
    """A leaf of another source, unchanged.

    Attributes:
        source: the source.
        number: the leaf.
    """

    source: Source
    number: int

    @property
    def spec(self) -> Spec:
        return self.source.spec(self.number)

    @property
    def nbytes(self) -> int:
        return self.source.nbytes(self.number)

    @property
    def refusal(self) -> str:
        return self.source.refusal(self.number)

    @property
    def extent(self) -> Extent | None:
        return self.source.extent(self.number)

    def read_range(self, start: int, stop: int) -> Array:
        return self.source.read_range(self.number, start, stop)


class Made:
    """A leaf that is computed when it is first read, and freed when its last element has been read.

    Attributes:
        spec: what it will be.
    """

    refusal = ""
    extent = None

    def __init__(self, spec: Spec, make: Callable[[], Array]) -> None:
        self.spec = spec
        self._make = make
        self._values: Array | None = None

    def __deepcopy__(self, memo: Any) -> "Made":
        return Made(self.spec, copy.deepcopy(self._make, memo))

    def __reduce__(self) -> tuple[type["Made"], tuple[Spec, Callable[[], Array]]]:
        if isinstance(self._make, partial):  # of a function of a module
            return Made, (self.spec, self._make)
        raise Unsupported(
            f"a leaf of this checkpoint, {self.spec}, is computed from objects in memory, and cannot be pickled",
            hint="checkpoint.save(out), then pickle pm.open(out)",
        )

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    def read_range(self, start: int, stop: int) -> Array:
        values = self._values
        if values is None:
            values = self._values = np.ascontiguousarray(self._make()).reshape(-1)
        if stop >= self.spec.size:
            self._values = None
        return values[start:stop]


@dataclass(frozen=True, slots=True)
class Stacked:
    """Leaves of one spec, stacked along a new first axis.

    Attributes:
        parts: the leaves, first to last; at least one.
    """

    parts: tuple[Origin, ...]

    @property
    def spec(self) -> Spec:
        one = self.parts[0].spec
        return Spec((len(self.parts), *one.shape), one.dtype)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def refusal(self) -> str:
        return next((part.refusal for part in self.parts if part.refusal), "")

    @property
    def extent(self) -> Extent | None:
        return None

    def read_range(self, start: int, stop: int) -> Array:
        size = self.parts[0].spec.size
        found = []
        for place in range(start // size, math.ceil(stop / size)) if size else ():
            low, high = max(start - place * size, 0), min(stop - place * size, size)
            found.append(self.parts[place].read_range(low, high))
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else self.parts[0].read_range(0, 0)


@dataclass(frozen=True, slots=True)
class Taken:
    """A run of the elements of another leaf in C order, as a leaf: one layer of a stack, for example.

    Attributes:
        whole: the leaf.
        start: the first element.
        shape: the shape of the run.
    """

    whole: Origin
    start: int
    shape: tuple[int, ...]

    @property
    def spec(self) -> Spec:
        return Spec(self.shape, self.whole.spec.dtype)

    @property
    def nbytes(self) -> int:
        if self.whole.spec.dtype in BITS:
            return self.spec.nbytes
        return self.whole.nbytes * self.spec.size // max(self.whole.spec.size, 1)

    @property
    def refusal(self) -> str:
        return self.whole.refusal

    @property
    def extent(self) -> Extent | None:
        found, size = self.whole.extent, self.whole.spec.size
        if found is None or not size or self.start * found.nbytes % size:
            return None
        return Extent(found.path, found.start + self.start * found.nbytes // size, self.nbytes)

    def read_range(self, start: int, stop: int) -> Array:
        return self.whole.read_range(self.start + start, self.start + stop)


def _extents(origin: Origin) -> list[Extent] | None:
    if not isinstance(origin, Stacked):
        return None if origin.extent is None else [origin.extent]
    if BITS.get(origin.spec.dtype, 8) % 8:  # the bits of one part may end within a byte
        return None
    found: list[Extent] = []
    for part in origin.parts:
        more = _extents(part)
        if more is None:
            return None
        found += more
    return found


def _leaves_of(origins: Sequence[Origin]) -> Iterator[Origin]:
    """The origins that others are put together from."""
    rest = list(origins)
    while rest:
        origin = rest.pop()
        if isinstance(origin, Stacked):
            rest += origin.parts
        elif isinstance(origin, Taken):
            rest.append(origin.whole)
        else:
            yield origin


class Gathered:
    """Leaves from anywhere as one source.

    Attributes:
        base: the checkpoint whose directory layout, metadata and format the result has.
        texts: new contents of files beside the weights, by name, where they differ from those of `base`.
        index: the names; leaf `n` is the n-th one given.
        ties: leaf number → the first number of the same leaf.

    >>> from paramend.leaves.paths import labels
    >>> ramp = Made(Spec((2, 2), "int8"), lambda: np.arange(4, dtype="int8").reshape(2, 2))
    >>> both = Gathered(None, [(labels("w"), ramp), (labels("v"), Stacked((ramp, Taken(ramp, 0, (2, 2)))))])
    >>> both.index.path(1), both.spec(1), both.read(1)[1].tolist()
    ('v', Spec(shape=(2, 2, 2), dtype='int8'), [[0, 1], [2, 3]])
    """

    def __init__(
        self,
        base: Any,
        leaves: Iterable[tuple[Sequence[Label], Origin]],
        *,
        texts: Mapping[str, bytes] | None = None,
        ties: Mapping[int, int] | None = None,
    ) -> None:
        self.base = base
        self.texts: Mapping[str, bytes] = texts or {}
        self.ties: Mapping[int, int] = ties or {}
        self.path: Path = Path() if base is None else base.path
        self.format: str = "" if base is None else base.format
        self.metadata: Mapping[str, Any] = {} if base is None else base.metadata
        self.index = Index("/" if base is None else base.index.separator)
        self.origins: list[Origin] = []
        with uncollected():
            for path, origin in leaves:
                names = self.index.names
                for label in path[:-1]:
                    names = names.setdefault(label, {})
                names[path[-1]] = len(self.origins)
                self.index.numbers.append(len(self.origins))
                self.origins.append(origin)

    @property
    def sources(self) -> list[Any]:
        """The checkpoints that leaves come from, `base` first."""
        found = {} if self.base is None else {id(self.base): self.base}
        for origin in _leaves_of(self.origins):
            source = getattr(origin, "source", None)  # of parts, and of leaves that are edited on the way
            if source is not None:
                found.setdefault(id(source), source)
        return list(found.values())

    def formats(self, number: int) -> set[str]:
        """The formats of the files that a leaf is read from; "" among them if some of it is in memory or computed."""
        return {each.source.format if isinstance(each, Part) else "" for each in _leaves_of([self.origins[number]])}

    @property
    def stats(self) -> Mapping[Path, os.stat_result]:
        """The stat result of each file when it was opened."""
        found: dict[Path, os.stat_result] = {}
        for source in self.sources:
            found |= source.stats
        return found

    def spec(self, number: int) -> Spec:
        """Shape and dtype of a leaf."""
        return self.origins[number].spec

    def nbytes(self, number: int) -> int:
        """The number of bytes of a leaf."""
        return self.origins[number].nbytes

    def refusal(self, number: int) -> str:
        """Why a leaf cannot be read as an array, or ""."""
        return self.origins[number].refusal

    def extent(self, number: int) -> Extent | None:
        """Where the bytes of a leaf are; None if they are assembled or computed."""
        return self.origins[number].extent

    def extents(self, number: int) -> list[Extent] | None:
        """Where the bytes of a leaf are, one extent after the other; None if some are computed."""
        return _extents(self.origins[number])

    def read(self, number: int) -> Array:
        """A leaf."""
        origin = self.origins[number]
        if isinstance(origin, Part):
            return origin.source.read(origin.number)
        spec = origin.spec
        return origin.read_range(0, spec.size).reshape(spec.shape)

    def read_range(self, number: int, start: int, stop: int) -> Array:
        """A range of the elements of a leaf in C order."""
        return self.origins[number].read_range(start, stop)

    def children(self, node: Any) -> list[tuple[Any, Any]] | None:
        """The entries of a dict, list or tuple, as masks have them; None for a leaf."""
        return entries(node)

    def close(self) -> None:
        """Close the files of all sources."""
        with ExitStack() as stack:
            for source in self.sources:
                stack.callback(source.close)
