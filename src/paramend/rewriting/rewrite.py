"""The rewriting engine: a plan carried out into a new checkpoint, in one pass and in bounded memory.

The kernel copies the bytes that stay. Leaves that change are computed in chunks. The output is written under a
temporary name beside its place, made durable, and only then renamed: whatever happens, there is the old state or
the new one, never a third.
"""

import os
import stat
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from paramend.disk.identity import check_still, check_unchanged
from paramend.disk.io import put, release, writing
from paramend.disk.permissions import Access, create_file, settle
from paramend.disk.publishing import look, published, sync_file
from paramend.disk.uploads import Staging
from paramend.disk.urls import path_of
from paramend.edits.plan import Outcome, Plan, Row
from paramend.formats.registry import DEFAULT, SUFFIXES, format_for
from paramend.journal.store import retiring
from paramend.leaves.nested import unexhausted
from paramend.leaves.origins.origin import Extent
from paramend.piecewise.changes import Works
from paramend.piecewise.chunks import laid_flat, restage
from paramend.piecewise.rows import data, expression
from paramend.reports import wording
from paramend.reports.fields import picked
from paramend.reports.progress import Meter, Progress
from paramend.rewriting.accesses import Accesses
from paramend.rewriting.arrangement import arranged, base_of
from paramend.rewriting.crews import ALONE, Crew, carried_out
from paramend.rewriting.files import File, items_of
from paramend.rewriting.filling import Filler
from paramend.rewriting.jobs import Done, Job, Order, Task, jobs_of, learn
from paramend.rewriting.layouts import Layout
from paramend.rewriting.manifest import Manifest
from paramend.rewriting.note import Note
from paramend.rewriting.output import check_output
from paramend.rewriting.wishes import How


@dataclass(frozen=True, repr=False)
class RewriteReport(Outcome):
    """What a rewrite has done.

    Attributes:
        source: the checkpoint that was read.
        path: the checkpoint that was written.
        plan: the rows; its text is the table that a dry run shows.
        bytes_copied: bytes copied unchanged, including the header if no spec changes.
        bytes_computed: bytes of the leaves that were edited.
        bytes_linked: bytes of files that were hard-linked instead of copied.
        bytes_shared: of the bytes copied, those that the file system shares with a source, which take no room.
        files: the files of a directory that was written.
        left_out: files of a directory that were not copied, each with the reason.
        record: where a record of what was done was written; "" if none was.
        said: what is to be said of files beside the weights, such as what a configuration still counts.
        format: the format that was written.
    """

    source: str
    path: str
    plan: Plan
    bytes_copied: int
    bytes_computed: int
    bytes_linked: int = 0
    bytes_shared: int = 0
    files: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    record: str = ""
    said: tuple[str, ...] = ()
    format: str = ""

    @property
    def summary(self) -> str:
        """What was written, in one line, with the format if the name does not say it; what was left out, and is to be
        said of other files, in further ones."""
        moved = f"{wording.size(self.bytes_computed)} computed, {wording.size(self.bytes_copied)} copied"
        moved += f" ({wording.size(self.bytes_shared)} of them shared)" if self.bytes_shared else ""
        linked = f", {wording.size(self.bytes_linked)} linked" if self.bytes_linked else ""
        left = f"\nnot copied: {wording.listing(self.left_out)}" if self.left_out else ""
        said = "".join(f"\n{line}" for line in self.said)
        record = ", with a record of edits" if self.record else ""
        damage = f"; {self.plan.damage}" if self.plan.damage else ""
        named = format_for(Path(self.path))
        form = "" if named is not None and named.name == self.format else f", as {self.format}"
        return f"wrote {self.path}: {moved}{linked}{form}{record}{damage}{left}{said}"

    def to_dict(self) -> dict[str, Any]:
        counts = ["bytes_copied", "bytes_computed", "bytes_shared", *["bytes_linked"] * bool(self.files), "files?"]
        left = "left_out" if self.files else "left_out?"
        found = picked(self, "source", "path", "format") | self.plan.to_dict()
        return found | picked(self, *counts, left, "said?", "record?")


@unexhausted("the checkpoint")
def write(
    made: Plan,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    record: str | None = None,
    progress: Progress | None = None,
    crew: Crew = ALONE,
    **how: Unpack[How],
) -> RewriteReport:
    """Write a plan for an opened checkpoint into a new one, and report what was written: see `Checkpoint.save`.
    `record` is the recipe of the plan, or "", if the output carries a record. If it raises, nothing was written."""
    crew.check()
    layout = check_output(made, out, force=force, resume=crew.resume, **how)
    out = path_of(out)
    asked, note = layout, Note(made, out, layout, record)
    layout = note.layout
    run = _Run(made, out, progress, layout, note)
    names: tuple[str, ...] = ()
    # A directory of a format whose writer fills it is one job, of this process.
    manifest = None if crew.alone or layout.format.folder else Manifest.of(made, out, asked, layout, record)
    try:
        access = run.accesses.of_folder() if layout.folder else run.accesses.of_file(layout.files[0])
        resumes = manifest.takes_up if crew.resume and manifest is not None else None
        publishing = published(out, force=force, access=access, folder=layout.folder, resumes=resumes)
        with retiring(out), note.beside(run.accesses), publishing as temporary:
            if layout.format.folder:
                run.fill(temporary / layout.tree)
            if manifest is not None:
                run.make_by(crew, manifest, temporary)
            for file in layout.files if manifest is None else ():
                if not layout.format.folder or not (temporary / file.name).exists():
                    run.make(file, temporary / file.name if layout.folder else temporary)
            note.finish(temporary, run.accesses)
            run.inputs.check()
            if layout.folder:
                made_files = (path for path in temporary.rglob("*") if path.is_file())
                sent = temporary.upload.sent if isinstance(temporary, Staging) and temporary.upload else ()
                names = tuple(sorted({*sent, *(path.relative_to(temporary).as_posix() for path in made_files)}))
                for inner in (inner for inner in temporary.rglob("*") if inner.is_dir()):
                    settle(inner, run.accesses.of_folder(inner.relative_to(temporary).as_posix()))
            note.clear()
    finally:
        run.inputs.close()
        if manifest is not None:
            manifest.close()
    path = str(path_of(getattr(made.leaves, "path", "")))
    counts = run.filler.copied, run.filler.computed, run.linked, run.filler.copier.shared
    return RewriteReport(
        path, str(out), made, *counts, names, layout.left_out, note.name, layout.said, layout.format.name
    )


def stage(made: Plan, files: Sequence[File], home: Path, folder: Path, progress: Progress | None) -> None:
    """Make some of the files of a plan in a folder, durably, on their way to one that is there: their home."""
    layout = Layout(tuple(files), True, DEFAULT)
    run = _Run(made, home, progress, layout, Note(made, home, layout, None))
    try:
        for file in files:
            run.make(file, folder / file.name)
        run.inputs.check()
    finally:
        run.inputs.close()


class _Run:
    def __init__(self, made: Plan, out: Path, progress: Progress | None, layout: Layout, note: Note) -> None:
        self.made, self.out = made, out
        self.layout, self.note = layout, note
        self.source: Any = made.leaves
        self.meter = Meter(progress, layout.nbytes)
        self.filler = Filler(made, note.digests, self.meter)
        self.inputs = self.filler.inputs
        self.accesses = Accesses(made, out, folder=layout.folder)
        self.inputs.seen = {**self.accesses.read, **self.inputs.seen}
        self.linked = 0

    def make(self, file: File, path: Path) -> None:
        if "/" in file.name:
            path.parent.mkdir(parents=True, exist_ok=True)
        read = self.accesses.read_for(file)
        access = self.accesses.of_file(file, read)
        if file.link and file.origin is not None and self._link(file.origin, path, access):
            self.linked += file.nbytes
            return
        self.inputs.touched |= read
        if isinstance(path, Staging) and path.name.endswith(SUFFIXES) and not file.patched and not self.note.seals:
            with path.streamed(file.nbytes) as target:
                self.filler.fill(file.pieces, target)
            return
        target = create_file(path, access) if file.name else os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            self.filler.fill(file.pieces, target)
            os.ftruncate(target, file.nbytes)  # the last leaf may have been left out as a hole
            _complete(file, target, path, access)
        finally:
            release(target)

    def make_by(self, crew: Crew, manifest: Manifest, temporary: Path) -> None:
        """Make all files job by job, but for what was done before."""
        manifest.begin(temporary)
        begun: list[tuple[File, Path, Access]] = []
        jobs: list[Job] = []
        tasks: list[Task] = []
        for file in self.layout.files:
            path = temporary / file.name if self.layout.folder else temporary
            path.parent.mkdir(parents=True, exist_ok=True)
            read = self.accesses.read_for(file)
            access = self.accesses.of_file(file, read)
            if file.link and file.origin is not None:
                path.unlink(missing_ok=True)
                if self._link(file.origin, path, access):
                    self.linked += file.nbytes
                    continue
            self.inputs.touched |= read
            parts = jobs_of(self.made, file)
            fresh = _begin(file, path, access, known=any(map(manifest.known, parts)))
            for number, job in enumerate(parts, len(jobs)):
                done = None if fresh else manifest.known(job)
                tasks.append(Task(number, "" if done is None else done.sha256, fresh))
            jobs += parts
            begun.append((file, path, access))
        if self.layout.folder:
            _drop_others(temporary, {file.name for file in self.layout.files})
        order = Order.of(self.made, jobs, self.filler.digests.wanted, temporary, far=crew.engine != "processes")
        for job, done in carried_out(order, tasks, crew, manifest, self.out):
            self._enter(job, done)
        for file, path, access in begun:
            with writing(path) as target:
                _complete(file, target, path, access)

    def _enter(self, job: Job, done: Done) -> None:
        """Take over what is known of a job that is done."""
        self.filler.copied += done.copied
        self.filler.computed += done.computed
        self.filler.copier.shared += done.shared
        self.filler.digests.found |= done.leaves
        rows = job.rows
        for row in rows:
            if row.source in done.measured:
                learn(row, done.measured[row.source])
        self.meter.advance(job.stop - job.start, rows[-1].path if rows else "")

    def fill(self, folder: Path) -> None:
        """Write the tree of a checkpoint that is a directory, or the changed chunks of a copied one."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.layout.fresh:
            rows = self.made.rows
            items, outline = items_of(self.made, rows), arranged(self.made, rows)
            writer = self.layout.format.writer()
            writer.write(folder, items, lambda place: self._data(rows[place]), outline, base_of(self.made))
        else:
            works, some = Works(), (row for row in self.made.rows if row.calls and row.spec.size)
            work = [works.of(row, laid_flat(self.source, row)) for row in some]
            if work:
                restage(self.source, [each for each in work if len(each.ranges)], folder, self.meter)
            self.filler.computed += sum(each.row.spec.nbytes for each in work)
            check_still(self.source.stats)
        for path in folder.rglob("*"):
            if path.is_file():
                settle(path, self.accesses.of_chunks((Path(self.layout.tree) / path.relative_to(folder)).as_posix()))
                sync_file(path)

    def _link(self, origin: Path, path: Path, access: Access) -> bool:
        now = origin.stat()
        if stat.S_IMODE(now.st_mode) & ~access.mode:  # what it replaces is more private
            return False
        check_unchanged(origin, self.inputs.seen.setdefault(origin, now), now)
        try:
            os.link(origin.resolve(), path)
        except OSError:  # another file system, or one without links: copy instead
            return False
        self.inputs.touched.add(origin)
        return True

    def _data(self, row: Row) -> Iterator[memoryview]:
        """The bytes of a leaf for a format that writes directories."""
        self.inputs.touched |= self.accesses.read_by(row)
        for piece in self.filler.digests.taking(row, data(expression(self.source, row))):
            yield piece
            self.meter.advance(len(piece), row.path)
            if row.calls:
                self.filler.computed += len(piece)
            else:
                self.filler.copied += len(piece)


def _begin(file: File, path: Path, access: Access, *, known: bool) -> bool:
    """Make a file in its full length, unless it is there and some of its content is known. Whether it is empty."""
    status = look(path)
    kept = known and status is not None and stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    if file.name and not kept:
        path.unlink(missing_ok=True)
        release(create_file(path, access))
    else:
        settle(path, replace(access, mode=access.mode | 0o600))
    with writing(path) as target:
        if not kept:
            os.ftruncate(target, 0)
        os.ftruncate(target, file.nbytes)
    return not kept


def _complete(file: File, target: int, path: Path, access: Access) -> None:
    """Correct the checksums of a file that is otherwise whole, and make it durable."""
    if file.patched:
        assert file.reopen is not None
        with file.reopen(path) as new:
            places = [Extent(path, start, stop - start) for start, stop in file.patched]
            for _, at, data in list(new.after_patch(places)):  # which takes long, and to write them does not
                put(target, data, at)
    if file.name:
        settle(target, access)
    os.fsync(target)


def _drop_others(folder: Path, names: Set[str]) -> None:
    """Remove files of an earlier run that are not among those to make."""
    for path in folder.rglob("*"):
        if not path.is_dir() and path.relative_to(folder).as_posix() not in names:
            path.unlink()
