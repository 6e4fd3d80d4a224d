"""`File`: one file to be made, of pieces: bytes of other files, leaves to be computed, bytes that are known."""

import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramend.edits.plan import Plan, Row
from paramend.formats.gathered import Gathered
from paramend.formats.registry import Format, format_of
from paramend.formats.safetensors_header import RECORD
from paramend.formats.source import Extent
from paramend.formats.writer import Item, Span
from paramend.leaves.leaves import Stored, keys_of
from paramend.leaves.specs import BITS


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


@dataclass(frozen=True, slots=True)
class Computed:
    """Bytes of a leaf that is edited, or that does not lie in a file as it is.

    Attributes:
        row: the leaf.
        start: the first byte of it.
        stop: the one after the last.
    """

    row: Row
    start: int
    stop: int


Piece = Copy | Computed | bytes


@dataclass(frozen=True, slots=True)
class File:
    """One file to be made.

    Attributes:
        name: where it goes within the directory; "" for a checkpoint that is one file.
        nbytes: how large it will be.
        mode: its permissions.
        pieces: what goes into it, first byte to last. The pieces of one leaf follow each other.
        patched: the ranges (start, stop) whose checksums, which the format keeps, are not yet true.
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


def fresh_file(made: Plan, rows: Sequence[Row], form: Format, name: str) -> File:
    """A new file of a format, of these rows."""
    source = base_of(made)
    metadata = dict(source.metadata)
    own = format_of(source)
    if own is not None and own is not form and own.framework:
        metadata = {"format": own.framework, **metadata}  # transformers asks for it
    if name:
        metadata.pop(RECORD, None)  # a directory keeps its record in a file
    writer = form.writer()
    items = [Item(made.name(r), keys_of(r.labels), r.spec, nbytes_of(made, r), r.source) for r in rows]
    pieces, ranges, nbytes = laid(made, rows, writer.parts(items, metadata))
    patched = tuple(ranges) if writer.seals else ()
    return File(name, nbytes, mode_of(made.leaves), pieces, patched=patched, reopen=form.open)


def ordered(made: Plan, form: Format) -> list[Row]:
    """The rows in the order in which a new file has them: in one without padding so that each begins aligned."""
    if form.padded or format_of(base_of(made)) is form:
        return list(made.rows)
    return sorted(made.rows, key=lambda row: -BITS.get(row.spec.dtype, 8))


def laid(
    made: Plan, rows: Sequence[Row], parts: Iterable[bytes | Copy | Span]
) -> tuple[tuple[Piece, ...], list[tuple[int, int]], int]:
    """The pieces of a file, the ranges in which its leaves lie, and its length. Neighbours that stay are one piece.

    Args:
        made: the plan.
        rows: the leaves, as the spans count them.
        parts: the file from its first byte to its last.
    """
    pieces: list[Piece] = []
    ranges: list[tuple[int, int]] = []
    at = 0
    for part in parts:
        if isinstance(part, bytes):
            pieces += [part] if part else []
            at += len(part)
            continue
        if isinstance(part, Span):
            found = _span(made, rows[part.item], part)
            ranges += [(at, at + part.stop - part.start)] if part.start < part.stop else []
        else:
            found = [part]
        for piece in found:
            last = pieces[-1] if pieces else None
            if (
                isinstance(last, Copy)
                and isinstance(piece, Copy)
                and (last.path, last.stop) == (piece.path, piece.start)
            ):
                pieces[-1] = Copy(last.path, last.start, piece.stop)
            else:
                pieces.append(piece)
        at += part.stop - part.start
    return tuple(pieces), ranges, at


def _span(made: Plan, row: Row, span: Span) -> list[Copy | Computed]:
    """Some bytes of a leaf, from where they lie if they lie anywhere."""
    if span.start >= span.stop:
        return []
    extents = _extents(made, row)
    if extents is None:
        return [Computed(row, span.start, span.stop)]
    found: list[Copy | Computed] = []
    at = 0
    for extent in extents:
        start, stop = max(span.start - at, 0), min(span.stop - at, extent.nbytes)
        if start < stop:
            found.append(Copy(extent.path, extent.start + start, extent.start + stop))
        at += extent.nbytes
    return found


def _extents(made: Plan, row: Row) -> list[Extent] | None:
    """Where the bytes of a leaf lie, also of one that is set to a leaf of another file; None if they are computed."""
    source: Any = made.leaves
    number = row.source
    if row.calls:
        value = set_to(row)
        if value is None:
            return None
        source, number = value.source, value.number
    if isinstance(source, Gathered):
        return source.extents(number)
    extent = source.extent(number)
    return None if extent is None else [extent]


def set_to(row: Row) -> Stored | None:
    """The leaf of another file that the last edit of a leaf sets it to, if it does."""
    edit = row.calls[-1]
    value = edit.args.get("value")
    return value if edit.op.name == "set" and edit.index is None and isinstance(value, Stored) else None


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
            pieces += [Copy(path, start, first)] if start < first else []
            pieces.append(Computed(row, 0, last - first))
            start = last
    return [*pieces, Copy(path, start, stop)] if start < stop else pieces


# ---- what the files of a plan have in common -------------------------------------------------------------------


def base_of(made: Plan) -> Any:
    """The checkpoint that the result takes after."""
    return made.leaves.base if isinstance(made.leaves, Gathered) else made.leaves


def nbytes_of(made: Plan, row: Row) -> int:
    """The bytes that a leaf will have, also of a dtype of unknown width."""
    source: Any = made.leaves
    return row.spec.nbytes if row.calls or row.spec.dtype in BITS else source.nbytes(row.source)


def mode_of(source: Any) -> int:
    """The permissions that a new file takes from a source."""
    for status in source.stats.values():
        return stat.S_IMODE(status.st_mode)
    try:
        return stat.S_IMODE(Path(source.path).stat().st_mode) & 0o666
    except OSError:  # a tree in memory
        return 0o666


def text_file(name: str, text: bytes, mode: int) -> File:
    """A file of known bytes."""
    return File(name, len(text), mode, (text,))
