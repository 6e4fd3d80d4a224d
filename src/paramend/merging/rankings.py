"""Rankings: which changes of some leaves are the largest, found in a pass or two, in bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from paramend.leaves.origins.reduced import abreast
from paramend.leaves.specs import Array

# The magnitudes of each model in some pieces of a leaf, flat, by their numbers.
Pieces = Callable[[range], Iterator[Sequence[Array]]]
# (model, place) → the least and the greatest key between which the one at that place is looked for, and both in a pass.
_Spans = dict[tuple[int, int], tuple[int, int]]
# Pieces of a leaf, of all leaves, and about how many keys a first guess is made from, and how far off it may be.
_PIECES, _ALL, _KEYS, _OFF = 8, 512, 1 << 17, 0.005
# Different keys between the bounds that are held, and parts that bounds are divided into if there are more.
_HELD, _PARTS = 1 << 18, 12


class Cut(NamedTuple):
    """The first elements of a ranking: all whose key is greater than one, and of those that have it the first so many.
    How many have it before each piece of each leaf."""

    key: int
    equal: int
    before: Sequence[Array]


class Member(NamedTuple):
    """A leaf: its magnitudes, the number of its elements, and of its pieces."""

    pieces: Pieces
    size: int
    total: int


@dataclass(eq=False)
class Ranking:
    """The elements of leaves by their magnitudes, for each model the greatest first, equal ones in order."""

    members: Sequence[Member]
    # For each model, which places of the ranking are kept: the first of them, and the one after the last.
    places: Sequence[tuple[int, int]]

    def kept(self, member: int, piece: int, magnitudes: Sequence[Array]) -> list[Array]:
        found = []
        for model, (keys, (first, last)) in enumerate(zip(map(_keys, magnitudes), self.places, strict=True)):
            mask = self._among(member, piece, model, last, keys)
            found.append(mask & ~self._among(member, piece, model, first, keys) if first else mask)
        return found

    def _among(self, member: int, piece: int, model: int, place: int, keys: Array) -> Array:
        """Which elements are before a place of the ranking."""
        if not 0 < place < self._size:
            return np.full(keys.shape, place > 0)
        cut = self.cuts[model, place]
        key = keys.dtype.type(cut.key)
        left = cut.equal - int(cut.before[member][piece])
        if left <= 0:
            return np.asarray(keys > key)
        mask: Array = keys >= key
        equal = np.flatnonzero(keys == key)
        mask[equal[left:]] = False
        return mask

    @cached_property
    def _size(self) -> int:
        return sum(member.size for member in self.members)

    @cached_property
    def cuts(self) -> dict[tuple[int, int], Cut]:
        found: dict[tuple[int, int], Cut] = {}
        spans = self._guesses()
        while spans:
            spans = self._passed(spans, found)
        return found

    def _guesses(self) -> _Spans:
        """Between which keys those at all places are likely to be, by a part of the elements."""
        most = min(_PIECES, max(_ALL // len(self.members), 1))
        chosen = [range(0, member.total, max(-(-member.total // most), 1)) for member in self.members]
        pieces = sum(map(len, chosen))
        step = max(self._size // max(sum(member.total for member in self.members), 1) * pieces // _KEYS, 1)
        sample: list[list[Array]] = [[] for _ in self.places]
        shares: list[Array] = []
        for member, numbers in zip(self.members, chosen, strict=True):
            some = [[_keys(each)[::step].copy() for each in piece] for piece in member.pieces(numbers)]
            for piece in some:
                for known, new in zip(sample, piece, strict=True):
                    known.append(new)
            taken = sum(piece[0].size for piece in some)
            shares += [np.full(piece[0].size, member.size / taken) for piece in some]
        spans: _Spans = {}
        for model, places in enumerate(self.places):
            keys, share = np.concatenate(sample[model]), np.concatenate(shares)
            order = np.argsort(keys)[::-1]
            ranks = share[order].cumsum()
            for place in places:
                if 0 < place < self._size:
                    off = _OFF * self._size
                    high, low = np.searchsorted(ranks, [place - off, place + off])
                    spans[model, place] = (
                        int(keys[order[low]]) if low < len(order) else 0,
                        int(keys[order[high]]) if place > off else int(np.iinfo(keys.dtype).max),
                    )
        return spans

    def _passed(self, spans: _Spans, found: dict[tuple[int, int], Cut]) -> _Spans:
        """Read all elements once. What is found goes to the cuts; for the rest, the bounds between which it must be."""
        above, held = dict.fromkeys(spans, 0), dict.fromkeys(spans, 0)
        tables = {at: np.zeros(1 << _PARTS, np.int64) for at in spans}
        shifts = {at: max((last - low).bit_length() - _PARTS, 0) for at, (low, last) in spans.items()}
        seen: dict[tuple[int, int], list[list[tuple[Array, Array]]]] = {at: [] for at in spans}
        for member in self.members:
            for at in spans:
                seen[at].append([])
            for within in abreast(partial(_within, spans), member.pieces(range(member.total))):
                for (at, (low, _)), (greater, some, counts) in zip(spans.items(), within, strict=True):
                    above[at] += greater
                    parts = (some - some.dtype.type(low)) >> some.dtype.type(shifts[at])
                    tables[at] += np.bincount(parts.astype(np.intp), counts, 1 << _PARTS).astype(np.int64)
                    held[at] += some.size
                    if held[at] <= _HELD:
                        seen[at][-1].append((some, counts))
                    else:
                        seen[at] = [[] for _ in seen[at]]
        rest: _Spans = {}
        for at, (low, last) in spans.items():
            rank, table = at[1] - above[at], tables[at][::-1].cumsum()
            if rank <= 0:
                rest[at] = last + 1, (1 << 64) - 1 if last >= 1 << 32 else (1 << 32) - 1
            elif rank > table[-1]:
                rest[at] = 0, low - 1
            elif held[at] <= _HELD:
                found[at] = _cut(rank, seen[at])
            else:
                start = low + (len(table) - 1 - int(np.searchsorted(table, rank)) << shifts[at])
                rest[at] = start, min(start + (1 << shifts[at]) - 1, last)
        return rest


def _within(spans: _Spans, magnitudes: Sequence[Array]) -> list[tuple[int, Array, Array]]:
    """For all bounds: how many elements of a piece are greater; the keys between the bounds, and how often each is."""
    found = []
    for (model, _), (low, last) in spans.items():
        keys = _keys(magnitudes[model])
        greater = keys > keys.dtype.type(last)
        some, counts = np.unique(keys[(keys >= keys.dtype.type(low)) & ~greater], return_counts=True)
        found.append((int(np.count_nonzero(greater)), some, counts))
    return found


def _cut(rank: int, seen: Sequence[Sequence[tuple[Array, Array]]]) -> Cut:
    """The element of a rank, of the keys in each piece of each leaf, with their counts."""
    pieces = [piece for leaf in seen for piece in leaf]
    keys, counts = (np.concatenate(each) for each in zip(*pieces, strict=True))
    order = np.argsort(keys)[::-1]
    ranks = counts[order].cumsum()
    key = keys[order[np.searchsorted(ranks, rank)]]
    before, total = [], 0
    for leaf in seen:
        here = [int(counts[keys == key].sum()) for keys, counts in leaf]
        before.append(total + np.cumsum([0, *here]))
        total += sum(here)
    return Cut(int(key), rank - int(counts[keys > key].sum()), before)


def _keys(magnitudes: Array) -> Array:
    """Unsigned integers in the order of floats that are not negative."""
    return magnitudes.view(f"u{magnitudes.itemsize}")
