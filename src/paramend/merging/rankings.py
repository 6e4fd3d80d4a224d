"""Rankings: which changes of some leaves are the largest, found by their bits in a few passes, in bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from paramend.leaves.specs import Array

# Bits of a magnitude that one pass tells.
_STEP = 16
# For each piece of a leaf, first to last, the magnitudes of each model, flat.
Pieces = Callable[[], Iterator[Sequence[Array]]]


class Cut(NamedTuple):
    """The first elements of a ranking: all that are greater than a number, and so many of those that equal it."""

    least: int
    equal: int
    every: bool  # whether these are all


@dataclass(eq=False)
class Ranking:
    """The elements of leaves by their magnitudes, greatest first, for each model; of equal ones the first counts more.

    Attributes:
        members: the leaves.
        places: for each model, which places of the ranking are kept: the first of them, and the one after the last.
        size: the piece size: pieces but the last of a leaf have so many elements.
    """

    members: Sequence[Pieces]
    places: Sequence[tuple[int, int]]
    size: int

    def kept(self, member: int, start: int, magnitudes: Sequence[Array]) -> list[Array]:
        """For each model, which elements of a piece of a leaf are kept."""
        found = []
        for model, (keys, (first, last)) in enumerate(zip(map(_keys, magnitudes), self.places, strict=True)):
            mask = self._among(member, start, model, last, keys)
            found.append(mask & ~self._among(member, start, model, first, keys) if first else mask)
        return found

    def _among(self, member: int, start: int, model: int, place: int, keys: Array) -> Array:
        """Which elements are before a place of the ranking."""
        if place <= 0:
            return np.zeros(keys.shape, bool)
        cut = self._cuts[model, place]
        least = keys.dtype.type(cut.least)
        if cut.every:
            every: Array = keys >= least
            return every
        mask: Array = keys > least
        left = cut.equal - int(self._before[model, place][member][start // self.size])
        if left > 0:
            mask[np.flatnonzero(keys == least)[:left]] = True
        return mask

    @cached_property
    def _cuts(self) -> dict[tuple[int, int], Cut]:
        """(model, place) → the elements before that place: a few bits more of the last one by each pass."""
        cuts: dict[tuple[int, int], Cut] = {}
        known = {(model, place): (0, place) for model, pair in enumerate(self.places) for place in pair if place > 0}
        left = width = 0
        while known:
            tables: dict[tuple[int, int], Array] = {
                (model, prefix): np.zeros(1 << _STEP, np.int64) for (model, _), (prefix, _) in known.items()
            }
            for pieces in self.members:
                for magnitudes in pieces():
                    for (model, prefix), table in tables.items():
                        keys = _keys(magnitudes[model])
                        width = 8 * keys.itemsize
                        left = left or width
                        some = keys if left == width else keys[keys >> left == prefix]
                        bits = (some >> (left - _STEP)) & 0xFFFF
                        table += np.bincount(bits.astype(np.intp), minlength=1 << _STEP)
            left -= _STEP
            for at, (prefix, rank) in list(known.items()):
                table = tables[at[0], prefix][::-1].cumsum()  # how many are as great, or greater
                bucket = int(np.searchsorted(table, rank))
                if bucket == table.size:  # there are not so many
                    prefix, rest, count = 0, 1, 1
                else:
                    before = int(table[bucket - 1]) if bucket else 0
                    prefix, rest, count = prefix << _STEP | 0xFFFF - bucket, rank - before, int(table[bucket]) - before
                known[at] = prefix, rest
                if not left or rest == count:
                    cuts[at] = Cut(prefix << left, rest, rest == count)
                    del known[at]
        return cuts

    @cached_property
    def _before(self) -> dict[tuple[int, int], list[Array]]:
        """For each place, and each leaf: how many of those that equal its number are before each piece."""
        wanted = [(at, cut) for at, cut in self._cuts.items() if not cut.every]
        counts: dict[tuple[int, int], list[list[int]]] = {at: [] for at, _ in wanted}
        totals = dict.fromkeys(counts, 0)
        for pieces in self.members:
            for at in counts:
                counts[at].append([])
            for magnitudes in pieces():
                for at, cut in wanted:
                    counts[at][-1].append(totals[at])
                    keys = _keys(magnitudes[at[0]])
                    totals[at] += int(np.count_nonzero(keys == keys.dtype.type(cut.least)))
        return {at: [np.array(each) for each in leaves] for at, leaves in counts.items()}


def _keys(magnitudes: Array) -> Array:
    """Unsigned integers in the order of floats that are not negative."""
    return magnitudes.view(f"u{magnitudes.itemsize}")
