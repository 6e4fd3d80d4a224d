"""Jobs: a rewrite cut into ranges of its files, plain data from which any process makes their bytes."""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from paramend.disk.copying import BLOCK, begin_write_back
from paramend.disk.io import release
from paramend.edits.plan import Plan, Row
from paramend.leaves.codecs.encoding import Misfit
from paramend.piecewise.rows import expression
from paramend.reports.progress import Meter
from paramend.rewriting.files import Computed, Copy, File, Piece, nbytes_in
from paramend.rewriting.filling import Digests, Filler, take_in

# About how many bytes a job makes, if leaves are computed in it, and if they are copied.
_COMPUTED, _COPIED = 16 << 20, 64 << 20
# What was found out while a row was computed: how many values overflowed and were lost, and for each misfit of an
# encoded weight how many blocks are new, and its bands.
Measured: TypeAlias = list[list[Any]]


@dataclass(frozen=True, slots=True)
class Job:
    """A range of a file that is made in one go, and the pieces that it consists of."""

    name: str
    start: int
    stop: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> list[Row]:
        """The rows that are computed."""
        found = {id(piece.row): piece.row for piece in self.pieces if isinstance(piece, Computed)}
        return list(found.values())


@dataclass(frozen=True, slots=True)
class Task:
    """A job that is to be done."""

    number: int
    known: str  # the digest that it has if it was done before, or ""
    fresh: bool  # whether its file holds nothing yet


@dataclass(frozen=True, slots=True)
class Done:
    """What is known of a job that is done."""

    sha256: str  # of its bytes
    leaves: Mapping[int, str]  # number → digest, of the leaves that a record wants
    measured: Mapping[int, Measured]  # number → what was found out while a row was computed
    copied: int  # bytes copied unchanged
    computed: int  # bytes of leaves that were edited
    shared: int  # of those that were copied, bytes that the file system shares with a source
    kept: bool = False  # whether its bytes were there already; then nothing else is known


@dataclass(frozen=True, slots=True)
class Order:
    """The jobs of a rewrite, and what whoever does them must know."""

    made: Plan  # of the rows that are computed
    jobs: tuple[Job, ...]
    recorded: frozenset[int]  # the numbers of the leaves whose digests a record wants
    place: Path  # where the files are being made: a folder, or the only file
    folder: Path  # that paths start in
    far: bool  # whether other machines make them, which must not keep what they have written to themselves

    @classmethod
    def of(cls, made: Plan, jobs: Sequence[Job], recorded: Collection[int], place: Path, *, far: bool) -> "Order":
        """The order of the jobs of a plan."""
        rows = {row.source: row for job in jobs for row in job.rows}
        part = replace(made, rows=tuple(rows.values()), deleted=(), texts=())
        return cls(part, tuple(jobs), frozenset(recorded), place.absolute(), Path.cwd(), far)


class Hand:
    """Does jobs, one after the other, in files that are there, in their full length."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._filler = Filler(order.made, Digests(order.recorded), Meter(None, 0))

    def do(self, task: Task) -> Done:
        """Make the bytes of a job, unless they are there."""
        job, filler = self._order.jobs[task.number], self._filler
        target = os.open(self._order.place / job.name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if task.known:
                there = hashlib.sha256()
                take_in(there, target, job.start, job.stop)
                if there.hexdigest() == task.known:
                    return Done(task.known, {}, {}, 0, 0, 0, kept=True)
            before, hashed = filler.counts, hashlib.sha256()
            os.lseek(target, job.start, os.SEEK_SET)
            filler.fill(job.pieces, target, fresh=task.fresh, hashed=hashed)
            os.fsync(target) if self._order.far else begin_write_back(target)
        finally:
            release(target)
        found, rows = filler.digests.found, job.rows
        leaves = {row.source: found.pop(row.source) for row in rows if row.source in found}
        measured = {row.source: measured_of(row) for row in rows if row.calls}
        copied, computed, shared = (after - was for was, after in zip(before, filler.counts, strict=True))
        return Done(hashed.hexdigest(), leaves, measured, copied, computed, shared)

    def close(self) -> None:
        """Close the files that were read."""
        self._filler.inputs.close()


def jobs_of(made: Plan, file: File) -> list[Job]:
    """The jobs of a file: ranges that begin with a leaf, or within bytes that are copied. It is one job if leaves are
    computed along with each other, which is done best in one place."""
    pieces = file.pieces
    rows = {id(piece.row): piece.row for piece in pieces if isinstance(piece, Computed)}
    whole = any(expression(made.leaves, row).together for row in rows.values())
    jobs: list[Job] = []
    start, at, weight = 0, 0, 0.0
    some: list[Piece] = []
    begun = whole
    for piece in pieces if whole else _cut(pieces):
        if weight >= 1 and not begun:
            jobs.append(Job(file.name, start, at, tuple(some)))
            start, weight, some = at, 0.0, []
        some.append(piece)
        at += nbytes_in(piece)
        weight += nbytes_in(piece) / (_COMPUTED if isinstance(piece, Computed) else _COPIED)
        if isinstance(piece, Computed) and not whole:  # the spans of a leaf may have other bytes between them
            begun = piece.stop < piece.row.spec.nbytes
    return [*jobs, Job(file.name, start, at, tuple(some))] if some else jobs


def _cut(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """The pieces, long copies cut where a block of the source begins: blocks can be shared."""
    for piece in pieces:
        if not isinstance(piece, Copy):
            yield piece
            continue
        start = piece.start
        while start < piece.stop:
            stop = min((start + _COPIED) // BLOCK * BLOCK, piece.stop)
            yield Copy(piece.path, start, stop)
            start = stop


# ---- what is found out on the way --------------------------------------------------------------------------------


def _misfits(row: Row) -> list[Misfit]:
    return [call.coding.misfit for call in row.calls if call.coding is not None and call.coding.misfit is not None]


def measured_of(row: Row) -> Measured:
    """What was found out while a row was computed, as data that JSON can hold."""
    bands = ([int(each.new), [[list(at), list(band)] for at, band in each.bands.items()]] for each in _misfits(row))
    return [[int(row.damage.overflowed), int(row.damage.lost)], *bands]


def learn(row: Row, measured: Measured) -> None:
    """Enter into a row what was found out elsewhere while it was computed."""
    (row.damage.overflowed, row.damage.lost), *rest = measured
    for misfit, (new, bands) in zip(_misfits(row), rest, strict=True):
        misfit.new = max(misfit.new, new)
        misfit.bands.update({tuple(at): tuple(band) for at, band in bands})
