"""Links: where the values of each parameter came from, according to the report of a graft."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from paramend.grafting.report import GraftReport
from paramend.selectors.grammar import Literal, Piece, Quoted
from paramend.selectors.patterns import parse

Path = tuple[str, ...]

_special = re.compile(r'[*{}\[\]<>,"\\]').search
_pieces = re.compile(r"[/.]").split


@dataclass(frozen=True, slots=True)
class Link:
    """Where the values of one parameter came from."""

    source: Path | None  # the path of the parameter that it continues, or None if it does not continue one
    corner: bool  # whether it continues only in the common corner
    did: str  # what was done, in words
    shape: tuple[int, ...]
    source_shape: tuple[int, ...] | None


class Links:
    """What a report says about each parameter."""

    def __init__(self, report: GraftReport) -> None:
        self.targets: dict[Path, Link] = {}  # path in the target → its link
        for corner, rows in ((False, report.copied), (True, report.mismatched), (False, report.fresh)):
            for row in rows:
                # What the other ways to fit a shape mean for a moment is not known here.
                known = None if corner and row.fit != "corner" else row.source
                source = None if known is None else pieces_of(known)
                link = Link(source, corner, row.did, row.shape, row.source_shape)
                self.targets.setdefault(pieces_of(row.path), link)
        theirs = (*report.copied, *report.mismatched, *report.unused)
        self.sources = {pieces_of(row.source) for row in theirs if row.source is not None}  # the paths in the source


def without(paths: Iterable[Path], prefix: Path) -> set[Path]:
    """The paths below a prefix, without it."""
    return {path[len(prefix) :] for path in paths if path[: len(prefix)] == prefix}


def pieces_of(text: str) -> Path:
    """The pieces of a path as reports write it.

    >>> pieces_of("params/Dense_0/kernel"), pieces_of('a\\\\*b."x/y"')
    (('params', 'Dense_0', 'kernel'), ('a*b', 'x/y'))
    """
    if text and not _special(text):
        return tuple(_pieces(text))
    out: list[str] = []
    for segment in parse(text).segments if text else ():
        if isinstance(segment, Quoted):
            out.append(segment.text)
        elif isinstance(segment, Piece):
            out.append("".join(atom.text for atom in segment.atoms if isinstance(atom, Literal)))
    return tuple(out)
