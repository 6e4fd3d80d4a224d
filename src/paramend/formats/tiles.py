"""Tiles: a tensor that is stored in chunks, as one expression over them."""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

from paramend.errors import BadCheckpoint, Unsupported
from paramend.formats.source import Few
from paramend.leaves.origins.boxes import Box
from paramend.leaves.origins.moved import Joined
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Stored, Zeros
from paramend.leaves.specs import Array, Spec

_TRIES = 10_000


class Tile(Stored):
    """A chunk of a leaf: a leaf of one of many files, of which a few are open. `offsets` is where it is in the whole,
    `named` what messages call it."""

    def __init__(self, source: Any, number: int, offsets: tuple[int, ...], named: str, few: Few) -> None:
        super().__init__(source, number)
        self.offsets, self.named, self.few = offsets, named, few

    def __reduce__(self) -> tuple[Any, ...]:
        return Tile, (self.source, self.number, self.offsets, self.named, self.few)

    @property
    def ends(self) -> tuple[int, ...]:
        """One after its last element, by axis."""
        return tuple(map(sum, zip(self.offsets, self.spec.shape, strict=True)))

    @property
    def box(self) -> Box:
        return tuple(map(range, self.offsets, self.ends))

    def read(self) -> Array:
        self.few.touch(self.source)
        return super().read()

    def read_range(self, start: int, stop: int) -> Array:
        self.few.touch(self.source)
        return super().read_range(start, stop)


def assembled(spec: Spec, tiles: Sequence[Tile], what: str) -> Origin:
    """The tensor that chunks make up; `BadCheckpoint` if some overlap, or are missing."""
    full = [tile for tile in tiles if tile.spec.size]
    if not spec.size:
        return next((tile for tile in tiles if tile.spec.shape == spec.shape), Zeros(spec))
    found = _joined((0,) * spec.ndim, spec.shape, full)
    if found is None:
        raise _flaw(spec.shape, full, what)
    return found


def _joined(low: tuple[int, ...], high: tuple[int, ...], tiles: Sequence[Tile]) -> Origin | None:
    """What fills a box, cut along one axis after the other; None if the tiles do not fill it, each place once."""
    if len(tiles) == 1:
        return tiles[0] if (tiles[0].offsets, tiles[0].ends) == (low, high) else None
    for axis in range(len(low)):
        groups, reach = list[list[Tile]](), low[axis]
        for tile in sorted(tiles, key=lambda tile: tile.offsets[axis]):
            if not groups or tile.offsets[axis] >= reach:
                groups.append([])
            groups[-1].append(tile)
            reach = max(reach, tile.ends[axis])
        if len(groups) > 1:
            cuts = [*(group[0].offsets[axis] for group in groups), high[axis]]
            parts = [
                _joined((*low[:axis], a, *low[axis + 1 :]), (*high[:axis], b, *high[axis + 1 :]), group)
                for group, (a, b) in zip(groups, pairwise(cuts), strict=True)
            ]
            whole = cuts[0] == low[axis] and None not in parts
            return Joined(tuple(part for part in parts if part is not None), axis, "concat") if whole else None
    return None


def _flaw(shape: tuple[int, ...], tiles: Sequence[Tile], what: str) -> BadCheckpoint | Unsupported:
    """Why chunks do not make up a tensor."""
    for tile in tiles:
        if any(end > length for end, length in zip(tile.ends, shape, strict=True)):
            return BadCheckpoint(f"{what}: its chunk {tile.named} is not within its shape, {list(shape)}")
    edges = [sorted({0, *(tile.offsets[axis] for tile in tiles), *(tile.ends[axis] for tile in tiles)} - {length})
             for axis, length in enumerate(shape)]  # fmt: skip
    for _, corner in zip(range(_TRIES), product(*edges), strict=False):
        here = [tile for tile in tiles if all(at in places for at, places in zip(corner, tile.box, strict=True))]
        if not here:
            names = f"{'; '.join(tile.named for tile in tiles[:4]) or 'none'}{'; ...' if tiles[4:] else ''}"
            why = f"a file or a part of the checkpoint is missing (its chunks: {names})"
            told = f"{what}: no chunk holds its element at {list(corner)}: {why}"
            return BadCheckpoint(told, hint="copy or download the checkpoint again")
        if here[1:]:
            return BadCheckpoint(f"{what}: its chunks {here[0].named} and {here[1].named} overlap")
    return Unsupported(f"{what}: its {len(tiles):,} chunks do not result from cuts along its axes")
