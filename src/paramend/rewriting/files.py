"""`File`: one file to be made, of pieces: bytes of other files, leaves to be computed, bytes that are known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramend.edits.plan import Row


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes that go over as they are.

    Attributes:
        path: the file that they are in.
        start: the first.
        stop: the one after the last.
    """

    path: Path
    start: int
    stop: int


Piece = Copy | Row | bytes


@dataclass(frozen=True, slots=True)
class File:
    """One file to be made.

    Attributes:
        name: where it goes within the directory; "" for a checkpoint that is one file.
        nbytes: how large it will be.
        mode: its permissions.
        pieces: what goes into it, first byte to last; rows are computed.
        patched: the ranges (start, stop) that differ from those of the file that it is otherwise a copy of, where the
            format keeps checksums of them.
        reopen: what opens such a file.
        origin: the file of which it is a copy, byte for byte; None if it is none.
        link: whether `origin` gets a second name instead.
    """

    name: str
    nbytes: int
    mode: int
    pieces: tuple[Piece, ...]
    origin: Path | None = None
    link: bool = False
    patched: tuple[tuple[int, int], ...] = ()
    reopen: Callable[[Path], Any] | None = None


def with_rows(path: Path, start: int, stop: int, places: Mapping[tuple[int, int], Row]) -> list[Piece]:
    """A range of bytes of a file with rows in place of some of it.

    Args:
        path: the file.
        start: the first byte.
        stop: the byte after the last.
        places: (start, stop) → row.
    """
    pieces: list[Piece] = []
    for (first, last), row in sorted(places.items(), key=lambda place: place[0]):
        if first < last:
            pieces += [Copy(path, start, first), row] if start < first else [row]
            start = last
    return [*pieces, Copy(path, start, stop)] if start < stop else pieces
