"""`Pattern`: the text of a selector, parsed and ready to match."""

from dataclasses import dataclass, field
from functools import lru_cache

from paramend.errors import OutOfRange
from paramend.leaves.paths import Names
from paramend.selectors.grammar import Piece, Positions, Reader, Segment
from paramend.selectors.matching import Machine, MatchWalk, Missing, steps_of


@dataclass(frozen=True)
class Pattern:
    """A parsed selector: its `segments` as data. `str(pattern)` is text that parses to the same segments."""

    segments: tuple[Segment, ...]
    _machine: Machine = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_machine", Machine(steps_of(self.segments)))

    def __reduce__(self) -> tuple[type["Pattern"], tuple[tuple[Segment, ...]]]:
        return Pattern, (self.segments,)

    def __str__(self) -> str:
        return self.write("/")

    def write(self, separator: str) -> str:
        """The pattern as text, with "/" or "." between keys."""
        return separator.join(map(str, self.segments))

    def find(self, names: Names) -> list[int]:
        """The numbers of the matching leaves, ascending; `OutOfRange` holds the selector with the nearest position."""
        walk = self._walk(names)
        missing = walk.first_missing() if walk.missing else None
        if missing is not None:
            near = self._clamped(missing)
            raise OutOfRange(
                f"position {missing.item} is out of range: {missing.family} has {missing.count} numbered "
                f"{'entry' if missing.count == 1 else 'entries'} under one parent",
                hint=f"[{-missing.count}] to [{missing.count - 1}] exist; a slice may reach beyond the end",
                near=[str(near)],
            )
        return sorted(set(walk.hits))

    def reach(self, names: Names) -> tuple[list[int], list[Names]]:
        """The leaves and the subtrees that the pattern names. Missing positions are skipped."""
        walk = self._walk(names)
        return walk.hits, walk.subtrees

    def _walk(self, names: Names) -> MatchWalk:
        walk = MatchWalk(self._machine)
        walk.arrive(names, self._machine.closure(1))
        return walk

    def _clamped(self, missing: Missing) -> "Pattern":
        """The pattern with the missing positions of one index moved to the nearest ones."""
        low, high = -missing.count, missing.count - 1
        segment = self.segments[missing.step.segment]
        assert isinstance(segment, Piece)
        atoms = tuple(
            Positions(tuple(dict.fromkeys(i if isinstance(i, tuple) else min(max(i, low), high) for i in atom.items)))
            if isinstance(atom, Positions)
            else atom
            for atom in segment.atoms
        )
        before, after = self.segments[: missing.step.segment], self.segments[missing.step.segment + 1 :]
        return Pattern((*before, Piece(atoms), *after))


@lru_cache(maxsize=4096)
def parse(text: str) -> Pattern:
    """The pattern that a selector's text means; `SelectorError` points at the character that breaks the grammar."""
    return Pattern(tuple(Reader(text).segments()))
