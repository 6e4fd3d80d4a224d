"""Fields: a stored leaf of a group as a grid of codes or scales over the weight, and how codes are packed in words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from paramend.leaves.origins.boxes import Box, Places, evenly
from paramend.leaves.origins.moved import reshape
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import Array, Spec, numpy_dtype

# Axis of the weight → for each of its places, the place of the grid, where no regular block says it: `g_idx`.
Groups: TypeAlias = Mapping[int, Array]


@dataclass(frozen=True, slots=True)
class Packing:
    """Several codes in a word.

    Attributes:
        axis: the axis along which they are packed.
        bits: of one code.
        order: where each code of a word stands, from the lowest bits up; empty for one after the other.
    """

    axis: int
    bits: int
    order: tuple[int, ...] = ()

    def lump(self, itemsize: int) -> tuple[int, int]:
        """The smallest number of codes that fill words, and of words."""
        width = 8 * itemsize
        words = self.bits // math.gcd(self.bits, width)
        return words * width // self.bits, words

    def unpack(self, words: Array) -> Array:
        """The codes, as uint8. There are as many words along the axis as fill lumps.

        >>> Packing(0, 4).unpack(np.array([0x87654321], np.uint32)).tolist()
        [1, 2, 3, 4, 5, 6, 7, 8]
        """
        if self.axis == words.ndim - 1 and words.itemsize > 1 and not self.order and 8 % self.bits == 0:
            words = np.ascontiguousarray(words).view(np.uint8)  # the same codes in fewer steps
        words = words.view(f"u{words.itemsize}")
        codes, count = self.lump(words.itemsize)
        lumps = words.shape[self.axis] // count
        before, after = words.shape[: self.axis], words.shape[self.axis + 1 :]
        grouped = words.reshape(*before, lumps, count, *after)
        found = np.empty((*before, lumps, codes, *after), np.uint8)
        ahead = (slice(None),) * (self.axis + 1)
        for code in range(codes):
            place, shift = self._place(code, words.itemsize)
            value = grouped[(*ahead, place)] >> shift
            if shift + self.bits > 8 * words.itemsize:  # its upper bits are in the next word
                value = value | grouped[(*ahead, place + 1)] << (8 * words.itemsize - shift)
            found[(*ahead, code)] = value & ((1 << self.bits) - 1)
        return found.reshape(*before, lumps * codes, *after)

    def pack(self, codes: Array, dtype: np.dtype[np.generic]) -> Array:
        """The words of codes, which fill lumps."""
        each, count = self.lump(dtype.itemsize)
        lumps = codes.shape[self.axis] // each
        before, after = codes.shape[: self.axis], codes.shape[self.axis + 1 :]
        grouped = codes.reshape(*before, lumps, each, *after).astype(f"u{dtype.itemsize}")
        found = np.zeros((*before, lumps, count, *after), grouped.dtype)
        ahead = (slice(None),) * (self.axis + 1)
        for code in range(each):
            place, shift = self._place(code, dtype.itemsize)
            found[(*ahead, place)] |= grouped[(*ahead, code)] << shift
            if shift + self.bits > 8 * dtype.itemsize:
                found[(*ahead, place + 1)] |= grouped[(*ahead, code)] >> (8 * dtype.itemsize - shift)
        return found.reshape(*before, lumps * count, *after).view(dtype)

    def _place(self, code: int, itemsize: int) -> tuple[int, int]:
        """The word of a lump that holds a code, and the bits below it."""
        if self.order:
            return code // len(self.order), self.order[code % len(self.order)] * self.bits
        return divmod(code * self.bits, 8 * itemsize)


@dataclass(frozen=True, slots=True)
class Field:
    """A stored leaf as a grid: an axis for each one of the weight, a place for each block of it.

    Attributes:
        spec: that of the stored leaf, with the axes of the grid.
        every: the number of places of the weight, along each axis, that share one of the grid; 0 where all do.
        packing: how its codes are packed; None for a word each.
    """

    spec: Spec
    every: tuple[int, ...]
    packing: Packing | None = None

    def view(self, origin: Origin) -> Origin:
        """The leaf with the axes of the grid."""
        return reshape(origin, self.spec.shape)

    def places(self, box: Box, groups: Groups | None = None) -> Box:
        """The places of the grid that a box of the weight needs, each once."""
        return tuple(_needed(places, every, (groups or {}).get(axis)) for axis, (places, every) in self._axes(box))

    def words(self, grid: Box) -> Box:
        """The words of the stored leaf that hold places of the grid."""
        if self.packing is None:
            return grid
        axis, (codes, count) = self.packing.axis, self._lump()
        lumps = _needed(grid[axis], codes, None)
        if count > 1:
            words = (np.asarray(lumps)[:, None] * count + np.arange(count)).reshape(-1)
            lumps = evenly(words[words < self.spec.shape[axis]])  # the last lump may be cut
        return (*grid[:axis], lumps, *grid[axis + 1 :])

    def read(self, origin: Origin, box: Box, groups: Groups | None = None) -> Array:
        """What each place of a box of the weight has: an array that broadcasts to the box.

        Args:
            origin: the stored leaf, with the axes of the grid.
            box: the box.
            groups: the places of the grid for axes that `g_idx` tells of.
        """
        grid = self.places(box, groups)
        found = self.codes(origin.read_box(self.words(grid)), grid)
        for axis, (places, every) in self._axes(box):
            found = _spread(found, axis, places, every, grid[axis], (groups or {}).get(axis))
        return found

    def codes(self, words: Array, grid: Box) -> Array:
        """The codes at places of the grid, of the words that hold them."""
        if self.packing is None:
            return words
        axis, (codes, count) = self.packing.axis, self._lump()
        found = self.packing.unpack(_filled(words, axis, count))
        places = grid[axis]
        if isinstance(places, range) and places.step == 1:
            first = places.start % codes
            return found[(slice(None),) * axis + (slice(first, first + len(places)),)]
        lumps = _needed(places, codes, None)
        at = np.searchsorted(lumps, np.asarray(places) // codes) * codes + np.asarray(places) % codes
        return np.take(found, at, axis)

    def pack(self, codes: Array) -> Array:
        """The words of codes, from the first of a lump on; what is left of the last word is filled with zeros."""
        dtype = numpy_dtype(self.spec.dtype)
        if self.packing is None:
            return codes.view(dtype) if codes.dtype == np.uint8 and dtype.itemsize == 1 else codes.astype(dtype)
        axis = self.packing.axis
        packed = self.packing.pack(_filled(codes, axis, self._lump()[0]), dtype)
        words = -(-codes.shape[axis] * self.packing.bits // (8 * dtype.itemsize))
        return packed[(slice(None),) * axis + (slice(words),)]

    def _lump(self) -> tuple[int, int]:
        assert self.packing is not None
        return self.packing.lump(numpy_dtype(self.spec.dtype).itemsize)

    def _axes(self, box: Box) -> Sequence[tuple[int, tuple[Places, int]]]:
        return list(enumerate(zip(box, self.every, strict=True)))


def _needed(places: Places, every: int, group: Array | None) -> Places:
    """The blocks that some places are in, each once, in order."""
    if not len(places):
        return range(0)
    if group is not None:
        return evenly(np.unique(group[np.asarray(places)]))
    if not every:
        return range(1)
    if isinstance(places, range) and places.step == 1:
        return places if every == 1 else range(places.start // every, (places[-1]) // every + 1)
    return evenly(np.unique(np.asarray(places) // every))


def _spread(found: Array, axis: int, places: Places, every: int, grid: Places, group: Array | None) -> Array:
    """For each place what its block has; one block for all is left to broadcasting."""
    if len(grid) <= 1:
        return found
    if group is None and isinstance(places, range) and places.step == 1:
        if every == 1:
            return found
        first = places.start % every
        return np.repeat(found, every, axis)[(slice(None),) * axis + (slice(first, first + len(places)),)]
    at = group[np.asarray(places)] if group is not None else np.asarray(places) // every
    return np.take(found, np.searchsorted(grid, at), axis)


def _filled(array: Array, axis: int, count: int) -> Array:
    """With zeros behind along an axis, so that a count divides its length."""
    rest = -array.shape[axis] % count
    if not rest:
        return array
    return np.pad(array, [(0, rest if at == axis else 0) for at in range(array.ndim)])
