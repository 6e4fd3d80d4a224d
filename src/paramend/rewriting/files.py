"""`File`: one file to write, as pieces: bytes of other files, leaves to compute, known bytes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramend.disk.copying import best_start
from paramend.edits.plan import Plan, Row
from paramend.formats.registry import Format, format_of
from paramend.formats.safetensors import MAX_HEADER, RECORD, SafetensorsWriter, framed
from paramend.formats.source import Item, LeafBytes, Tiled
from paramend.leaves.leaves import keys_of
from paramend.leaves.origins.origin import Extent, Origin
from paramend.leaves.origins.stored import Stored
from paramend.leaves.specs import BITS
from paramend.piecewise.rows import expression
from paramend.rewriting.arrangement import arranged, base_of


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of a file that are copied unchanged."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Computed:
    """Bytes of a leaf that is edited, or not contiguous in a file."""

    row: Row
    start: int
    stop: int


Piece = Copy | Computed | bytes


@dataclass(frozen=True, slots=True)
class File:
    """One file to write, at a path within the directory; "" for a checkpoint of a single file.

    The pieces are its content, first byte to last; those of a leaf come one after the other. `origin` is the file that
    it copies byte for byte, or becomes a hard link to. The checksums of the `patched` ranges (start, stop) are not yet
    correct in the format; `reopen` opens the file to correct them.
    """

    name: str
    nbytes: int
    pieces: tuple[Piece, ...]
    origin: Path | None = None
    link: bool = False
    patched: tuple[tuple[int, int], ...] = ()
    reopen: Callable[[Path], Any] | None = None


def fresh_file(made: Plan, rows: Sequence[Row], form: Format, name: str) -> File:
    """A new file in a format, with these rows."""
    source = base_of(made)
    metadata = dict(source.metadata)
    own = format_of(source)
    if form.name == "gguf":
        from paramend.rewriting.keys import keys_of  # most programs use no GGUF files

        metadata = keys_of(made)
    elif source.format == "gguf":  # its keys are a configuration
        metadata = {}
    if own is not None and own is not form and own.framework:
        metadata = {"format": own.framework, **metadata}  # transformers requires it
    if name:
        metadata.pop(RECORD, None)  # a directory keeps its record in a separate file
    writer = form.writer()
    outline = None if writer.flat else arranged(made, rows)
    pieces, ranges, nbytes = laid(made, rows, writer.parts(items_of(made, rows), metadata, outline))
    head = pieces[0]
    if isinstance(writer, SafetensorsWriter) and isinstance(head, bytes):
        return with_header(name, head[8:], pieces[1:])
    patched = tuple(ranges) if writer.seals else ()
    return File(name, nbytes, pieces, patched=patched, reopen=form.open)


def with_header(name: str, raw: bytes, pieces: Sequence[Piece]) -> File:
    """A new safetensors file, with this JSON text as its header, which is padded so that most of what is copied keeps
    its place within a block.

    The bytes do not depend on the file system: whoever copies the file to one that shares blocks has the benefit.
    """
    start = best_start(((copy.start, copy.stop, at) for copy, at in placed(pieces)), 8 + len(raw), step=8)
    head = framed(raw, start if start <= 8 + MAX_HEADER else 8 + len(raw))
    return File(name, sum(map(nbytes_in, (head, *pieces))), (head, *pieces))


def placed(pieces: Iterable[Piece]) -> Iterator[tuple[Copy, int]]:
    """The ranges that are copied, each with the place of its copy among the bytes of all pieces."""
    at = 0
    for piece in pieces:
        if isinstance(piece, Copy):
            yield piece, at
        at += nbytes_in(piece)


def nbytes_in(piece: Piece) -> int:
    """The number of bytes of a piece."""
    return len(piece) if isinstance(piece, bytes) else piece.stop - piece.start


def items_of(made: Plan, rows: Sequence[Row]) -> list[Item]:
    """The leaves of some rows on their way into a new file. Of tied leaves, the first one counts."""
    first: dict[Any, int] = {}
    items = []
    for at, row in enumerate(rows):
        one = made.leaves.ties.get(row.source, row.source), *map(id, row.calls)
        items.append(
            Item(made.name(row), keys_of(row.labels), row.spec, nbytes_of(made, row), first.setdefault(one, at))
        )
    return items


def ordered(made: Plan, form: Format) -> list[Row]:
    """The rows in the order of a new file; in a format without padding, ordered so that each is aligned."""
    if form.padded or format_of(base_of(made)) is form:
        return list(made.rows)
    return sorted(made.rows, key=lambda row: -BITS.get(row.spec.dtype, 8))


def laid(
    made: Plan, rows: Sequence[Row], parts: Iterable[bytes | Copy | LeafBytes]
) -> tuple[tuple[Piece, ...], list[tuple[int, int]], int]:
    """The pieces of a file, adjacent ones that stay as one, the ranges of its leaves, and its length, from its
    parts."""
    pieces: list[Piece] = []
    ranges: list[tuple[int, int]] = []
    at = 0
    for part in parts:
        if isinstance(part, bytes):
            pieces += [part] if part else []
            at += len(part)
            continue
        if isinstance(part, LeafBytes):
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


def _span(made: Plan, row: Row, span: LeafBytes) -> list[Copy | Computed]:
    """Some bytes of a leaf, copied if they are in a file, else computed."""
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
    """Where the bytes of a leaf are, including one that is set to a leaf of another file; None if computed."""
    origin = expression(made.leaves, row)
    if isinstance(origin, Stored) and isinstance(origin.source, Tiled):
        origin = origin.source.origin(origin.number)
    if origin.children:
        return origin.extents
    extent = origin.extent  # also of a dtype whose elements differ in width
    return None if extent is None else [extent]


def with_rows(path: Path, start: int, stop: int, places: Mapping[tuple[int, int], Row]) -> list[Piece]:
    """A range of bytes of a file with rows in place of some of them: (start, stop) → row."""
    pieces: list[Piece] = []
    for (first, last), row in sorted(places.items(), key=lambda place: place[0]):
        if first < last:
            pieces += [Copy(path, start, first)] if start < first else []
            pieces.append(Computed(row, 0, last - first))
            start = last
    return [*pieces, Copy(path, start, stop)] if start < stop else pieces


def nbytes_of(made: Plan, row: Row) -> int:
    """The number of bytes that a leaf will have, also for a dtype of unknown width."""
    return row.spec.nbytes if row.spec.dtype in BITS else expression(made.leaves, row).nbytes


def operands(row: Row) -> list[Stored]:
    """The leaves of files that edits of a leaf read beside it."""
    values = (value for edit in row.calls if isinstance(value := edit.args.get("value"), Origin))
    return [each for value in values for each in value.stored() if isinstance(each, Stored)]


def sources(made: Plan) -> list[Any]:
    """The sources of a plan: the checkpoint that it edits, then the files of other leaves."""
    found = [made.leaves, *(value.source for row in made.rows for value in operands(row))]
    return list({id(source): source for source in found}.values())


def copied_file(path: Path, size: int, name: str, *, link: bool = False) -> File:
    """A file as it is, under a name."""
    return File(name, size, (Copy(path, 0, size),) if size else (), path, link)


def text_file(name: str, text: bytes) -> File:
    """A file of known bytes."""
    return File(name, len(text), (text,))
