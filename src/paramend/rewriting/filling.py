"""`Filler`: the bytes of files that are written: copied by the kernel, computed in chunks, or known."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from paramend.disk.copying import WINDOW, Copier, WriteBack, is_regular
from paramend.disk.identity import changed, check_unchanged, status_now
from paramend.disk.io import Readable, get, put, release, status_of
from paramend.disk.urls import Url
from paramend.edits.plan import Plan, Row
from paramend.errors import CannotRead
from paramend.journal.store import records_of
from paramend.piecewise.rows import data, expression
from paramend.reports.progress import Meter
from paramend.rewriting.files import Computed, Piece, sources


class Digests:
    """The digests of the leaves that a record tells of, by number, as far as their bytes have passed."""

    def __init__(self, wanted: Collection[int] = ()) -> None:
        self.wanted = wanted
        self.found: dict[int, str] = {}

    def taking(self, row: Row, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        """The bytes of a leaf on their way into the output."""
        return self._hashed(row, pieces) if row.source in self.wanted else pieces

    def _hashed(self, row: Row, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
            yield piece
        self.found[row.source] = digest.hexdigest()


# Shorter runs of zero bytes are written; longer ones become holes in the file, which read the same.
_HOLE = 1 << 20
# Systems limit a process to a few hundred open files; the largest models have more.
_OPEN = 64
_STEP = 1 << 20


class Filler:
    """Fills files with their pieces. Digests that a record wants are taken from the bytes of leaves as they pass."""

    def __init__(self, made: Plan, digests: Digests, meter: Meter) -> None:
        self.source: Any = made.leaves
        self.inputs = Inputs(sources(made))
        self.digests, self.meter, self.copier = digests, meter, Copier()
        self.copied = self.computed = 0  # bytes

    @property
    def counts(self) -> tuple[int, int, int]:
        """The bytes copied, those computed, and those of the copied ones that are shared."""
        return self.copied, self.computed, self.copier.shared

    def fill(self, pieces: Sequence[Piece], target: int, *, fresh: bool = True, hashed: Any = None) -> None:
        """Write the pieces at the position of a file, `fresh` if it holds nothing there yet, and begin to write them to
        the disk. `hashed` is a digest that takes all bytes."""
        at = os.lseek(target, 0, os.SEEK_CUR) if is_regular(target) else 0
        back = WriteBack(target, at)
        flow = _Flow(self.source, self.digests, fresh=fresh and is_regular(target), hashed=hashed)
        for piece in pieces:
            name = ""
            if isinstance(piece, bytes):
                counts: Iterable[int] = [put(target, piece)]
            elif isinstance(piece, Computed):
                counts, name = flow.put(piece, target), piece.row.path
                self.computed += piece.stop - piece.start
            else:
                descriptor = self.inputs.descriptor(piece.path)
                counts = self.copier.copy(descriptor, target, piece.start, piece.stop, path=piece.path)
                self.copied += piece.stop - piece.start
            for count in counts:
                if hashed is not None and not isinstance(piece, Computed):
                    take_in(hashed, target, at, at + count)
                at += count
                back.advance(count)
                self.meter.advance(count, name)


def take_in(hashed: Any, descriptor: int, start: int, stop: int) -> None:
    """Add a range of a file to a digest."""
    for at in range(start, stop, _STEP):
        hashed.update(get(descriptor, at, min(_STEP, stop - at), Path()))


class Inputs:
    """The files that are read, by path: opened once, and checked again at the end."""

    def __init__(self, sources: Iterable[Any]) -> None:
        self.seen: dict[Path, os.stat_result] = {}
        for source in sources:
            self.seen |= source.stats
        self.touched: set[Path] = set()
        self._weights = list(self.seen)
        self._records = records_of(self._weights, refuses=True)
        self._open: OrderedDict[Path, Readable] = OrderedDict()

    def descriptor(self, path: Path) -> Readable:
        if path not in self._open:
            try:
                descriptor = path.opened() if isinstance(path, Url) else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except CannotRead:
                raise
            except OSError as error:
                raise CannotRead(f"{path}: {error.strerror or error}") from None
            self._open[path] = descriptor
            now = status_of(descriptor)
            check_unchanged(path, self.seen.setdefault(path, now), now)
            self.touched.add(path)
            if len(self._open) > _OPEN:
                release(self._open.popitem(last=False)[1])
        self._open.move_to_end(path)
        return self._open[path]

    def check(self) -> None:
        if records_of(self._weights) != self._records:  # a patch, which times alone may not show
            raise changed(next(iter(self.seen)))
        for path in self.touched:
            held = self._open.get(path)
            now = os.fstat(held) if isinstance(held, int) else status_now(path)
            check_unchanged(path, self.seen.get(path, now), now)

    def close(self) -> None:
        while self._open:
            release(self._open.popitem()[1])


class _Flow:
    """The bytes of computed leaves, which a format may want span by span."""

    def __init__(self, source: Any, digests: Digests, *, fresh: bool, hashed: Any) -> None:
        self._source, self._digests, self._fresh, self._hashed = source, digests, fresh, hashed
        self._row: Row | None = None
        self._chunks: Iterator[memoryview] = iter(())
        self._rest = memoryview(b"")

    def put(self, piece: Computed, target: int) -> Iterator[int]:
        """Write a span and yield the number of bytes of each step. The spans of a leaf come first to last."""
        row, left = piece.row, piece.stop - piece.start
        last = row.calls[-1] if row.calls else None
        hole = last is not None and last.op.name == "zero" and last.index is None and row.spec.nbytes >= _HOLE
        hole = hole and self._fresh
        if self._row is not row or not piece.start:
            chunks = _blank(row.spec.nbytes) if hole else data(expression(self._source, row))
            self._row, self._chunks, self._rest = row, self._digests.taking(row, chunks), memoryview(b"")
        while left:
            self._rest = self._rest if len(self._rest) else next(self._chunks)
            count = min(left, len(self._rest))
            part = self._rest[:count]
            if self._hashed is not None:
                self._hashed.update(part)
            yield os.lseek(target, count, os.SEEK_CUR) and count if hole else put(target, part)
            self._rest = self._rest[count:] if count < len(self._rest) else memoryview(b"")  # which frees a tile
            left -= count
        if piece.stop == row.spec.nbytes:
            next(self._chunks, None)  # its end confirms that all was taken


def _blank(nbytes: int) -> Iterator[memoryview]:
    """Zeros, which take no memory until they are read."""
    window = memoryview(bytes(min(nbytes, WINDOW)))
    for at in range(0, nbytes, WINDOW):
        yield window[: nbytes - at]
