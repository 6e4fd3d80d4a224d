"""Fields: a stored leaf of a group as a grid of codes or scales over the weight, and how codes are packed in words."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from paramend.leaves.origins.boxes import Box, Places, evenly
from paramend.leaves.origins.moved import reshape
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import Array, Spec, numpy_dtype

# Axis of the weight → for each of its places, the place of the grid, where no regular block says it: `g_idx`.
Groups: TypeAlias = Mapping[int, Array]
NO_GROUPS: Groups = {}


@dataclass(frozen=True, slots=True)
class Packing:
    """Several codes in a word."""

    axis: int  # the axis along which they are packed
    bits: int  # of one code
    # Where each code of a word stands, from the lowest bits up; empty for one after the other.
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
        lumps, width = words.shape[self.axis] // count, 8 * words.itemsize
        before, after = words.shape[: self.axis], words.shape[self.axis + 1 :]
        grouped = np.moveaxis(words.reshape(*before, lumps, count, *after), self.axis + 1, 0)
        found: Array = np.empty((*before, lumps, codes, *after), np.uint8)
        by_code = np.moveaxis(found, self.axis + 1, 0)
        for code in range(codes):
            place, shift = self._place(code, width)
            value = grouped[place] >> shift
            if shift + self.bits > width:  # its upper bits are in the next word
                value = value | grouped[place + 1] << (width - shift)
            by_code[code] = value & ((1 << self.bits) - 1)
        return found.reshape(*before, lumps * codes, *after)

    def pack(self, codes: Array, dtype: np.dtype[np.generic]) -> Array:
        """The words of codes, which fill lumps."""
        each, count = self.lump(dtype.itemsize)
        lumps, width = codes.shape[self.axis] // each, 8 * dtype.itemsize
        before, after = codes.shape[: self.axis], codes.shape[self.axis + 1 :]
        by_code = np.moveaxis(codes.reshape(*before, lumps, each, *after), self.axis + 1, 0)
        found: Array = np.zeros((*before, lumps, count, *after), f"u{dtype.itemsize}")
        grouped = np.moveaxis(found, self.axis + 1, 0)
        for code in range(each):
            place, shift = self._place(code, width)
            value = by_code[code].astype(found.dtype)
            grouped[place] |= value << shift
            if shift + self.bits > width:
                grouped[place + 1] |= value >> (width - shift)
        return found.reshape(*before, lumps * count, *after).view(dtype)

    def _place(self, code: int, width: int) -> tuple[int, int]:
        """The word of a lump that holds a code, and the bits below it."""
        if self.order:
            return code // len(self.order), self.order[code % len(self.order)] * self.bits
        return divmod(code * self.bits, width)


@dataclass(frozen=True, slots=True)
class Field:
    """A stored leaf as a grid: an axis for each one of the weight, a place for each block of it."""

    spec: Spec  # that of the stored leaf, with the axes of the grid
    # The number of places of the weight, along each axis, that share one of the grid; 0 where all do.
    every: tuple[int, ...]
    packing: Packing | None = None  # how its codes are packed; None for a word each

    def view(self, origin: Origin) -> Origin:
        """The leaf with the axes of the grid."""
        return reshape(origin, self.spec.shape)

    def places(self, box: Box, groups: Groups = NO_GROUPS) -> Box:
        """The places of the grid that a box of the weight needs, each once."""
        return tuple(
            _needed(places, every, groups.get(axis))
            for axis, (places, every) in enumerate(zip(box, self.every, strict=True))
        )

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

    def read(self, origin: Origin, box: Box, groups: Groups = NO_GROUPS) -> Array:
        """What each place of a box of the weight has: an array that broadcasts to the box."""
        grid = self.places(box, groups)
        return self.spread(self.codes(origin.read_box(self.words(grid)), grid), box, groups)

    def spread(self, found: Array, box: Box, groups: Groups = NO_GROUPS) -> Array:
        """For each place of a box what its place of the grid has; one for all of an axis is left to broadcasting."""
        for axis, (places, every) in enumerate(zip(box, self.every, strict=True)):
            found = _spread(found, axis, places, every, groups.get(axis))
        return found

    def reduced(self, ufunc: np.ufunc, values: Array, box: Box, groups: Groups = NO_GROUPS) -> Array:
        """The values of a box taken together for each place of the grid, by a ufunc such as `np.maximum`."""
        for axis, (places, every) in enumerate(zip(box, self.every, strict=True)):
            if every == 1 and axis not in groups:
                continue
            if axis not in groups and isinstance(places, range) and places.step == 1 and places:
                values = _reduced(ufunc, values, axis, every or len(places), places[0] % (every or 1))
                continue
            at = _at(places, every, groups.get(axis))
            if (np.diff(at) < 0).any():
                order = np.argsort(at, kind="stable")
                at, values = at[order], np.take(values, order, axis)
            values = ufunc.reduceat(values, np.flatnonzero(np.diff(at, prepend=-1)), axis)
        return values

    def apply(self, ufunc: np.ufunc, values: Array, grid: Array, box: Box, groups: Groups = NO_GROUPS) -> None:
        """Compute with each value of a box and what its place of the grid has, in place."""
        if grid.size <= 1:
            ufunc(values, grid, out=values)
            return
        places, every, last = box[-1], self.every[-1], len(box) - 1
        regular = last not in groups and isinstance(places, range) and places.step == 1 and every > 1
        if not regular or grid.shape[-1] == 1 or not len(places) or places[0] % every:
            ufunc(values, self.spread(grid, box, groups), out=values)
            return
        for axis in range(last):
            grid = _spread(grid, axis, box[axis], self.every[axis], groups.get(axis))
        whole = len(places) // every
        blocks = values[..., : whole * every].reshape(*values.shape[:-1], whole, every)
        ufunc(blocks, grid[..., :whole, None], out=blocks)
        rest = values[..., whole * every :]
        if rest.size:
            ufunc(rest, grid[..., whole:], out=rest)

    def first(self, box: Box, groups: Groups = NO_GROUPS) -> Box:
        """For each place of the grid that a box needs, one place of the weight."""
        found: list[Places] = []
        for axis, (places, every) in enumerate(zip(box, self.every, strict=True)):
            if axis not in groups and isinstance(places, range) and places.step == 1 and places:
                start = places.start // every * every if every else 0
                found.append(range(start, places.stop, every) if every else places[:1])
                continue
            _, at = np.unique(_at(places, every, groups.get(axis)), return_index=True)
            found.append(np.asarray(places)[at])
        return tuple(found)

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
        chosen: Array = np.take(found, at, axis)
        return chosen

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


def _at(places: Places, every: int, group: Array | None) -> Array:
    """The block that each place is in."""
    if group is not None and every:
        found: Array = group[np.asarray(places)]
        return found
    return np.asarray(places) // every if every else np.zeros(len(places), np.int64)


def _needed(places: Places, every: int, group: Array | None) -> Places:
    """The blocks that some places are in, each once, in order."""
    if not len(places):
        return range(0)
    if group is None and isinstance(places, range) and places.step == 1:
        return range(places.start // every, places[-1] // every + 1) if every else range(1)
    return evenly(np.unique(_at(places, every, group)))


def _spread(found: Array, axis: int, places: Places, every: int, group: Array | None) -> Array:
    """For each place what its block has."""
    if found.shape[axis] <= 1:
        return found
    if group is None and isinstance(places, range) and places.step == 1:
        if every == 1:
            return found
        if axis == found.ndim - 1:
            first = places.start % every
            return np.repeat(found, every, axis)[..., first : first + len(places)]
    at = _at(places, every, group)
    spread: Array = np.take(found, np.searchsorted(np.unique(at), at), axis)
    return spread


def _reduced(ufunc: np.ufunc, values: Array, axis: int, every: int, into: int) -> Array:
    """Blocks of places that follow each other, each taken together, where the first one starts inside its block."""
    ahead, length = (slice(None),) * axis, values.shape[axis]
    first = min(-into % every, length)
    stop = first + (length - first) // every * every
    middle = values[(*ahead, slice(first, stop))]
    blocks = middle.reshape(*values.shape[:axis], -1, every, *values.shape[axis + 1 :])
    found = [ufunc.reduce(blocks, axis + 1)] if stop > first else []
    ends = [part for part in (values[(*ahead, slice(first))], values[(*ahead, slice(stop, None))]) if part.shape[axis]]
    found += [ufunc.reduce(part, axis, keepdims=True) for part in ends]
    if first and len(found) > 1:
        found.insert(0, found.pop(-len(ends)))
    joined: Array = found[0] if len(found) == 1 else np.concatenate(found, axis)
    return joined


def _filled(array: Array, axis: int, count: int) -> Array:
    """With zeros behind along an axis, so that a count divides its length."""
    rest = -array.shape[axis] % count
    if not rest:
        return array
    return np.pad(array, [(0, rest if at == axis else 0) for at in range(array.ndim)])
