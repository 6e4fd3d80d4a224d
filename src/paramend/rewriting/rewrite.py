"""The rewriting engine: a plan carried out into a new checkpoint, in one pass and in bounded memory.

The kernel copies the bytes that stay. Leaves that change are computed in chunks. What comes out grows under a
temporary name beside its place, is made durable, and only then gets its name: whatever happens, there is the old
state or the new one, never a third.
"""

import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np

from paramend.disk.copying import WINDOW, Copier, WriteBack
from paramend.disk.io import Output, put
from paramend.disk.publishing import create_file, exists, published, reason, sync_file
from paramend.edits.plan import Plan, Row
from paramend.errors import BadCheckpoint, CannotRead, CannotWrite
from paramend.formats.files import same_file
from paramend.formats.registry import find_format, home_of
from paramend.formats.shards import stats_of
from paramend.formats.source import Extent
from paramend.formats.writer import Item
from paramend.journal.exchange import check_still
from paramend.journal.records import records_beside
from paramend.journal.undo import retiring
from paramend.leaves.leaves import Stored, keys_of
from paramend.piecewise.changes import work_of
from paramend.piecewise.chunks import laid_flat, restage
from paramend.piecewise.rows import data
from paramend.reports import wording
from paramend.reports.progress import Meter, Progress
from paramend.rewriting.files import File
from paramend.rewriting.layouts import Layout, lay_out
from paramend.rewriting.note import Note

Array = np.ndarray[Any, Any]

# Zeros of fewer bytes are written; longer runs are left out of the file, which reads the same.
_HOLE = 1 << 20
# Systems let a program hold a few hundred files open; the largest models have more.
_OPEN = 64


@dataclass(frozen=True)
class RewriteReport:
    """What a rewrite has done.

    Attributes:
        source: the checkpoint that was read.
        path: the checkpoint that was written.
        plan: the rows; its text is the table that a dry run shows.
        bytes_copied: bytes that went over as they were, the header among them where no spec changes.
        bytes_computed: bytes of the leaves that were edited.
        bytes_linked: bytes of files that got a second name instead of a copy.
        files: the files of a directory that was written.
        left_out: files of a directory that did not come along, each with the reason.
        record: where a record of what was done was written; "" if none was.
    """

    source: str
    path: str
    plan: Plan
    bytes_copied: int
    bytes_computed: int
    bytes_linked: int = 0
    files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    record: str = ""

    @property
    def summary(self) -> str:
        """What was written, in one line, and what was left out in another."""
        copied, computed = wording.size(self.bytes_copied), wording.size(self.bytes_computed)
        linked = f", {wording.size(self.bytes_linked)} linked" if self.bytes_linked else ""
        left = f"\nnot taken along: {wording.listing(self.left_out)}" if self.left_out else ""
        record = ", with a record of edits" if self.record else ""
        return f"wrote {self.path}: {computed} computed, {copied} copied{linked}{record}{left}"

    def __str__(self) -> str:
        return f"{self.plan}\n{self.summary}"

    def to_dict(self) -> dict[str, Any]:
        """The report as data that JSON can hold."""
        data: dict[str, Any] = {
            "source": self.source,
            "path": self.path,
            **self.plan.to_dict(),
            "bytes_copied": self.bytes_copied,
            "bytes_computed": self.bytes_computed,
        }
        if self.files:
            data |= {"bytes_linked": self.bytes_linked, "files": list(self.files)}
        if self.files or self.left_out:
            data["left_out"] = list(self.left_out)
        if self.record:
            data["record"] = self.record
        return data


def check_output(
    made: Plan,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    link: bool = False,
    max_shard_size: int | str | None = None,
) -> Layout:
    """The files that a rewrite will make. What could not be written is refused, as far as that is known beforehand.

    Raises:
        CannotWrite: the output exists, is the source, or has no place to go to.
        Unsupported: the format of the output cannot hold a leaf.
    """
    layout = lay_out(made, out, link=link, max_shard_size=max_shard_size)
    source: Any = made.leaves
    out = Path(out)
    found = _look(out)
    if found is not None:
        _check_other(out, found, _sources(made), folder=layout.folder)
        if layout.folder and not stat.S_ISDIR(found.st_mode):
            raise CannotWrite(f"{out} is a file, and the model needs a directory", hint="write to another name")
        if not layout.folder and stat.S_ISDIR(found.st_mode):
            raise CannotWrite(f"{out} is a directory", hint=f"{out / (Path(source.path).name or 'model.safetensors')}")
        if not layout.folder and not stat.S_ISREG(found.st_mode):
            raise CannotWrite(f"{out} is no regular file (a pipe, a device or a socket)")
    if os.path.lexists(out) and not force:
        raise exists(out)
    if layout.folder and found is not None:
        _check_replaceable(out)
    folder = out.parent
    if not folder.is_dir():
        what = "is no directory" if os.path.lexists(folder) else "does not exist"
        raise CannotWrite(f"{out}: {folder} {what}", hint="" if os.path.lexists(folder) else f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CannotWrite(f"{out}: no permission to write into {folder}", hint=f"ls -ld {folder}")
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < layout.nbytes:  # some network file systems count no blocks at all
        needed = wording.size(layout.nbytes)
        raise CannotWrite(f"{out}: {needed} are needed, and {wording.size(free)} are free in {folder}")
    return layout


def _check_other(out: Path, found: os.stat_result, sources: Sequence[Any], *, folder: bool) -> None:
    """Refuses an output that is a source, a part of it, or a directory around the first."""
    home = Path(sources[0].path)
    paths = {home, *(path for source in sources for path in stats_of(source))}
    for path in paths:
        now = _look(path)
        if now is not None and os.path.samestat(now, found):
            what = "is the file that is being read" if path != home or path.is_file() else "is what is being read"
            raise CannotWrite(f"{out} {what}", hint="write to another name, then rename it")
    if folder and home.resolve().is_relative_to(out.resolve()):
        raise CannotWrite(f"{out} holds the checkpoint that is being read", hint="write to another name")


def _check_replaceable(out: Path) -> None:
    """Refuses to replace a directory that is no checkpoint, however much force is asked for."""
    inside = sorted(path.name for path in out.iterdir())
    row = find_format(out, b"")
    if row is not None and row.folder:
        steps = [name for name in inside if name.rpartition("_")[2].isdigit()]
        if home_of(out) != out and len(steps) > 1:
            raise CannotWrite(
                f"{out} holds {len(steps)} steps, and all would be lost: {wording.listing(steps, 4)}",
                hint="write to another name",
            )
        return
    if inside and not any(name.endswith((".safetensors", ".bin", ".pt", ".pth")) for name in inside):
        raise CannotWrite(
            f"{out} is a directory that holds no checkpoint, and would be lost: {wording.listing(inside, 4)}",
            hint="write to another name",
        )


def _look(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CannotWrite(f"{path}: {reason(error)}") from None


def write(
    made: Plan,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    link: bool = False,
    max_shard_size: int | str | None = None,
    record: str | None = None,
    progress: Progress | None = None,
) -> RewriteReport:
    """A report of what was written: a plan for an opened checkpoint, carried out.

    Args:
        made: the plan.
        out: the checkpoint to write; see `lay_out` for what its name says of the format.
        force: whether `out` may exist already; it is then replaced in one step.
        link: whether files in which nothing changes get a second name instead of a copy, where the system allows it.
        max_shard_size: the most bytes of tensors in one file, such as "5GB"; the output is then a directory.
        record: what the plan was made by, as a recipe, or "": the output then carries a record of what was done.
        progress: called with an `Event` as bytes are written.

    Raises:
        CannotWrite: nothing was written; the message says why.
        BadCheckpoint: the source changed while it was being read. Nothing was written.
    """
    layout = check_output(made, out, force=force, link=link, max_shard_size=max_shard_size)
    out = Path(out)
    note = Note(made, out, layout, record)
    layout = note.layout
    run = _Run(made, progress, layout, note)
    names: tuple[str, ...] = ()
    try:
        mode = None if layout.folder else layout.files[0].mode
        with retiring(out), published(out, force=force, mode=mode) as temporary:
            if layout.format.folder:
                run.fill(temporary / layout.tree)
            for file in layout.files:
                if not layout.format.folder or not (temporary / file.name).exists():
                    run.make(file, temporary / file.name if layout.folder else temporary)
            note.finish(temporary)
            run.inputs.check()
            if layout.folder:
                made_files = (path for path in temporary.rglob("*") if path.is_file())
                names = tuple(sorted(path.relative_to(temporary).as_posix() for path in made_files))
            note.clear()
        note.publish()
    finally:
        run.inputs.close()
    path = str(Path(getattr(made.leaves, "path", "")))
    counts = run.copied, run.computed, run.linked
    return RewriteReport(path, str(out), made, *counts, names, layout.left_out, note.name)


class _Inputs:
    """The files that are read, by path: opened once, and looked at again in the end."""

    def __init__(self, sources: Iterable[Any]) -> None:
        self.seen: dict[Path, os.stat_result] = {}
        for source in sources:
            self.seen |= stats_of(source)
        self.touched: set[Path] = set()
        self._records = records_beside(self.seen, refuses=True)
        self._open: OrderedDict[Path, int] = OrderedDict()

    def descriptor(self, path: Path) -> int:
        """The descriptor of a file, open for reading."""
        if path not in self._open:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CannotRead(f"{path}: {error.strerror or error}") from None
            self._open[path] = descriptor
            now = os.fstat(descriptor)
            if not same_file(now, self.seen.setdefault(path, now)):
                raise _changed(path)
            self.touched.add(path)
            if len(self._open) > _OPEN:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(path)
        return self._open[path]

    def check(self) -> None:
        """Refuses what another program changed in the meantime."""
        if records_beside(self.seen) != self._records:  # a patch, of which times alone may not tell
            raise _changed(next(iter(self.seen)))
        for path in self.touched:
            try:
                now = os.fstat(self._open[path]) if path in self._open else path.stat()
            except OSError:
                raise _changed(path) from None
            if path in self.seen and not same_file(now, self.seen[path]):
                raise _changed(path)

    def close(self) -> None:
        """Closes the files."""
        while self._open:
            os.close(self._open.popitem()[1])


def _changed(path: Path) -> BadCheckpoint:
    return BadCheckpoint(
        f"{path}: another program changed it since it was opened; nothing was written", hint="open the checkpoint again"
    )


class _Run:
    """One rewrite at work: it makes files, and counts."""

    def __init__(self, made: Plan, progress: Progress | None, layout: Layout, note: Note) -> None:
        self.made = made
        self.note = note
        self.layout = layout
        self.source: Any = made.leaves
        self.inputs = _Inputs(_sources(made))
        self.copier = Copier()
        self.copied = self.computed = self.linked = 0
        self.meter = Meter(progress, layout.nbytes)

    def make(self, file: File, path: Path) -> None:
        """Makes one file, durable."""
        if "/" in file.name:
            path.parent.mkdir(parents=True, exist_ok=True)
        if file.link and file.origin is not None and self._link(file.origin, path):
            self.linked += file.nbytes
            return
        target = os.open(path, os.O_WRONLY | os.O_CLOEXEC) if not file.name else create_file(path, file.mode)
        try:
            if not file.pieces and self.layout.format.name != "safetensors":
                self._write_foreign(target)
            else:
                self._write_pieces(file, target, path)
            os.fsync(target)
        finally:
            os.close(target)

    def fill(self, folder: Path) -> None:
        """Writes the tree of a format that is a directory of its own, or what is not to be copied of another's."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.layout.fresh:
            self.layout.format.writer().write(folder, self._items(), self.source)
        else:
            work = [work_of(row, laid_flat(self.source, row)) for row in self.made.rows if row.calls and row.spec.size]
            restage(self.source, [each for each in work if len(each.ranges)], folder, self.meter)
            self.computed += sum(each.row.spec.nbytes for each in work)
            check_still(Path(self.source.path), self.source.stats)
        for path in folder.rglob("*"):
            if path.is_file():
                sync_file(path)

    def _link(self, origin: Path, path: Path) -> bool:
        now = origin.stat()
        if not same_file(now, self.inputs.seen.setdefault(origin, now)):
            raise _changed(origin)
        try:
            os.link(origin.resolve(), path)
        except OSError:  # another file system, or one without links: a copy does it
            return False
        self.inputs.touched.add(origin)
        return True

    def _write_pieces(self, file: File, target: int, path: Path) -> None:
        back = WriteBack(target)

        def note(count: int, at: str = "") -> None:
            back.advance(count)
            self.meter.advance(count, at)

        for piece in file.pieces:
            if isinstance(piece, bytes):
                note(put(target, piece))
            elif isinstance(piece, Row):
                self._note_reads(piece)
                for nbytes in _put_row(self.source, piece, target, self.note):
                    self.computed += nbytes
                    note(nbytes, piece.path)
            else:
                descriptor = self.inputs.descriptor(piece.path)
                for nbytes in self.copier.copy(descriptor, target, piece.start, piece.stop, path=piece.path):
                    self.copied += nbytes
                    note(nbytes)
        os.ftruncate(target, file.nbytes)  # the last leaf may have been left out as a hole
        if file.patched:
            assert file.reopen is not None
            with file.reopen(path) as new:
                for _, at, data in new.after_patch([Extent(path, start, stop - start) for start, stop in file.patched]):
                    put(target, data, at)

    def _note_reads(self, row: Row) -> None:
        for source, number in ((self.source, row.source), *((each.source, each.number) for each in _operands(row))):
            extent = source.extent(number)
            if extent is not None:
                self.inputs.touched.add(extent.path)

    # -- other formats

    def _items(self) -> list[Item]:
        items = []
        for row in self.made.rows:
            nbytes = row.spec.nbytes
            items.append(
                Item(self.made.name(row), keys_of(row.labels), row.spec, nbytes, self._chunks(row), row.source)
            )
        return items

    def _chunks(self, row: Row) -> Callable[[], Iterator[memoryview]]:
        def chunks() -> Iterator[memoryview]:
            self._note_reads(row)
            for piece in self.note.taking(row, data(self.source, row)):
                yield piece
                self.meter.advance(len(piece), row.path)
                if row.calls:
                    self.computed += len(piece)
                else:
                    self.copied += len(piece)

        return chunks

    def _write_foreign(self, target: int) -> None:
        with BufferedWriter(Output(target)) as file:
            self.layout.format.writer().write(file, self._items(), dict(self.source.metadata))


def _operands(row: Row) -> list[Stored]:
    """The leaves of other files that edits of a leaf read."""
    return [value for edit in row.calls if isinstance(value := edit.args.get("value"), Stored)]


def _sources(made: Plan) -> list[Any]:
    """What a plan reads: the checkpoint that it edits, then the files of other leaves."""
    found = [made.leaves, *(value.source for row in made.rows for value in _operands(row))]
    return list({id(source): source for source in found}.values())


def _put_row(source: Any, row: Row, target: int, note: Note) -> Iterator[int]:
    """Writes a leaf and yields the number of bytes of each step."""
    last = row.calls[-1] if row.calls else None
    if last is not None and last.op.name == "zero" and last.index is None and row.spec.nbytes >= _HOLE:
        for piece in note.taking(row, _blank(row.spec.nbytes)):
            os.lseek(target, len(piece), os.SEEK_CUR)
            yield len(piece)
        return
    for piece in note.taking(row, data(source, row)):
        yield put(target, piece)


def _blank(nbytes: int) -> Iterator[memoryview]:
    """Zeros, which take no memory while nobody looks at them."""
    window = memoryview(bytes(min(nbytes, WINDOW)))
    for at in range(0, nbytes, WINDOW):
        yield window[: nbytes - at]
