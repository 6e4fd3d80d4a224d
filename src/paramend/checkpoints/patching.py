"""The patching engine: a plan carried out in the file itself, with an undo record that is durable first.

Only the bytes of what was chosen are written. The order is: lock; old bytes into a record, made durable; new bytes,
made durable; the record marked done. What is cut short anywhere in between is put back as it was when its user opens
the checkpoint next. `paramend.journal.records` says what a record holds.
"""

import contextlib
import errno
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.checkpoints.checkpoint import open as open_checkpoint
from paramend.disk.copying import begin_write_back
from paramend.disk.io import put
from paramend.disk.locks import explained, linked, opened
from paramend.edits.plan import Plan
from paramend.errors import BadArgument, BadCheckpoint, Busy, CannotWrite, Unsupported
from paramend.formats.shards import Shards
from paramend.formats.source import Chunked, Extent, Sealed, Source
from paramend.journal.exchange import STAGED, check_replaceable, check_still, exchange
from paramend.journal.records import DONE, PENDING, Spans, State, Writer, new_head, next_path
from paramend.journal.undo import (
    base_of,
    check_nothing_pending,
    digests,
    name_in,
    recover,
    state_of,
    take_back,
    writing,
)
from paramend.piecewise.changes import Work, change, work_of
from paramend.piecewise.chunks import laid_flat, nbytes_of, restage
from paramend.reports import wording
from paramend.reports.progress import Meter, Progress
from paramend.reports.report import Report, Section

# ---- the report -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class PatchReport(Report):
    """What a patch has done.

    Attributes:
        path: the checkpoint.
        plan: the rows; its text is the table that a dry run shows.
        bytes_written: bytes of the checkpoint that were written.
        bytes_recorded: the size of the undo record.
        record: where that is; None if nothing was written.
        dry_run: whether nothing was to be written.
    """

    path: str
    plan: Plan
    bytes_written: int
    bytes_recorded: int = 0
    record: str | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", self.plan.told())

    def headline(self) -> str:
        """What was written, in one line."""
        return self.summary

    def sections(self) -> list[Section]:
        """None: the rows are those of the plan."""
        return []

    @property
    def summary(self) -> str:
        """What was written, in one line."""
        written = f"{wording.size(self.bytes_written)} written in place"
        if self.dry_run:
            return f"dry run: {self.path} was not changed; {wording.size(self.bytes_written)} would be written in place"
        if self.record is None:
            return f"{self.path} holds nothing that would change"
        return f"patched {self.path}: {written}; to take it back: paramend undo {self.path}"

    def __str__(self) -> str:
        return f"{self.plan}\n{self.summary}"

    def to_dict(self) -> dict[str, Any]:
        """The report as data that JSON can hold."""
        return {
            "path": self.path,
            **self.plan.to_dict(),
            "dry_run": self.dry_run,
            "bytes_written": self.bytes_written,
            "bytes_recorded": self.bytes_recorded,
            "record": self.record,
        }


# ---- patching ------------------------------------------------------------------------------------------------


def patch(
    path: str | os.PathLike[str],
    edit: Callable[[Checkpoint], Checkpoint],
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PatchReport:
    """A report of what was changed: an edit made in the checkpoint's own files, all or nothing, and undoable.

    Args:
        path: a file, or a folder of shards.
        edit: takes the opened checkpoint and gives it back edited; only edits that keep shape and dtype.
        dry_run: whether to check all that can be known before writing, and write nothing.
        progress: called with an `Event` as bytes are written, first those of the undo record.

    Raises:
        NoMatch: a selector chooses nothing.
        Unsupported: the edit needs a new file; the hint is the command that writes one.
        CannotWrite: a file is read-only, has several names, is being written, or the disk is full. Nothing was changed.

    >>> import tempfile
    >>> from paramend.checkpoints.checkpoint import save
    >>> from paramend.edits.selection import at
    >>> from paramend.journal.undo import undo
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"fc": {"weight": np.ones(2, "float32"), "bias": np.ones(1, "float32")}}, path)
    >>> patch(path, lambda t: at(t, "**/weight").zero()).bytes_written
    8
    >>> np.fromfile(path, "float32")[-3:].tolist(), undo(path).left
    ([0.0, 0.0, 1.0], 0)
    """
    path = Path(path)
    base = base_of(path)
    if dry_run or not os.path.lexists(base):
        recover(base)
        with open_checkpoint(path) as checkpoint:
            return patch_plan(checkpoint.source, _edited(checkpoint, edit), dry_run=True)
    with writing(base) as store, open_checkpoint(path) as checkpoint:
        plan = _edited(checkpoint, edit)
        work = check_patch(checkpoint.source, plan)
        return _carry_out(base, store, checkpoint.source, plan, work, progress)


def _edited(checkpoint: Checkpoint, edit: Callable[[Checkpoint], Checkpoint]) -> Plan:
    found = edit(checkpoint)
    if not isinstance(found, Checkpoint) or found.source is not checkpoint.source:
        raise BadArgument(
            f"the edit gave {type(found).__name__}, and the checkpoint that it was given is expected back, edited",
            hint='pm.patch(path, lambda t: pm.at(t, "**/bias").zero())',
        )
    return found.plan


def patch_plan(source: Source, plan: Plan, *, dry_run: bool = False, progress: Progress | None = None) -> PatchReport:
    """A report of what was changed: the plan carried out in the files of its source, all or nothing.

    Args:
        source: the checkpoint that the plan was made for. What it reads afterwards is new.
        plan: only edits that keep shape and dtype.
        dry_run: whether to check all that can be known before writing, and write nothing.
        progress: called with an `Event` as bytes are written, first those of the undo record.

    Raises:
        Unsupported: the plan holds what needs a new file.
        CannotWrite: a file is read-only, has several names, is being written, or the disk is full. Nothing was changed.

    >>> import tempfile
    >>> from paramend.formats.safetensors import SafetensorsFile
    >>> from paramend.formats.safetensors_header import write_header
    >>> from paramend.leaves.specs import Spec
    >>> from paramend.edits.plan import call, plan
    >>> from paramend.journal.undo import undo
    >>> path = Path(tempfile.mkdtemp(), "model.st")
    >>> header = write_header({"fc.weight": Spec((2,), "float32"), "fc.bias": Spec((1,), "float32")})
    >>> _ = path.write_bytes(header.to_bytes() + np.ones(3, "float32").tobytes())
    >>> with SafetensorsFile(path) as file:
    ...     report = patch_plan(file, plan(file, "**/weight", call("fill", {"value": 0.5})))
    >>> report.bytes_written, np.fromfile(path, "float32")[-3:].tolist()
    (8, [0.5, 0.5, 1.0])
    >>> undo(path).left, np.fromfile(path, "float32")[-3:].tolist()
    (0, [1.0, 1.0, 1.0])
    """
    base = base_of(source.path)
    work = check_patch(source, plan)
    if dry_run:
        return _dry(base, source, plan, work)
    with writing(base) as store:
        return _carry_out(base, store, source, plan, work, progress)


# ---- what can be patched -----------------------------------------------------------------------------------


def check_patch(source: Source, plan: Plan) -> list[Work]:
    """What would be written where, if the plan can be carried out in place.

    Raises:
        Unsupported: it cannot; the message says by which command it can be done instead.
    """
    name = source.path
    for row in plan.deleted:
        hint = f"paramend delete {name} '{row.path}' -o OUT"
        raise Unsupported(f"{name}: in place only values change, and {row.path} would be deleted", hint=hint)
    work = []
    done: set[int] = set()
    for row in plan.changed:
        if row.was:
            hint = f"paramend rename {name} '{row.was}' '{row.path}' -o OUT"
            raise Unsupported(f"{name}: in place only values change, and {row.was} would be renamed", hint=hint)
        if row.spec != row.before:
            verb = next((edit.op.name for edit in row.calls if not edit.op.keeps_spec), "cast")
            hint = f"paramend {verb} {name} '{row.path}' {row.spec.dtype} -o OUT"
            raise Unsupported(f"{row.path}: in place shape and dtype stay, and {row.edit} gives {row.spec}", hint=hint)
        why = source.refusal(row.source)
        if why:
            raise Unsupported(f"{row.path} cannot take {row.edit}: {why}", hint="leave it out of the selection")
        extent = laid_flat(source, row) if isinstance(source, Chunked) else source.extent(row.source)
        if extent is None:
            raise Unsupported(
                f"{row.path}: its bytes do not lie in one piece in {name}, so they cannot be changed in place",
                hint=f"paramend {row.calls[0].op.name} {name} '{row.path}' -o OUT",
            )
        one = source.ties.get(row.source, row.source)
        if extent.nbytes and one not in done:  # a leaf with several names has a row for each
            found = work_of(row, extent)
            work += [found] if len(found.ranges) else []  # of a slice that takes nothing there is nothing to write
        done.add(one)
    if not isinstance(source, Chunked):
        _check_apart(work)
    return work


def _check_apart(work: Sequence[Work]) -> None:
    """Two leaves may share bytes without being the same leaf, as views of one storage do."""
    ends: dict[Path, Work] = {}
    for each in sorted(work, key=lambda each: each.extent.start):
        before = ends.get(each.extent.path)
        if before is not None and before.extent.start + before.extent.nbytes > each.extent.start:
            raise Unsupported(
                f"{before.row.path} and {each.row.path} share bytes, and both would change: the result would depend on "
                "which comes first",
                hint="one after the other, in two calls",
            )
        ends[each.extent.path] = each


# ---- carrying out ------------------------------------------------------------------------------------------


def _carry_out(
    base: Path, store: Path, source: Source, plan: Plan, work: Sequence[Work], progress: Progress | None
) -> PatchReport:
    if not work:  # only leaves or slices without elements
        return PatchReport(str(source.path), plan, 0)
    if isinstance(source, Chunked):
        return _carry_out_chunks(base, store, source, plan, work, progress)
    files = sorted({each.extent.path for each in work})
    with explained(base), opened(files) as descriptors:
        check_nothing_pending(base)
        _check_same(base, source, files, descriptors)
        places = {file: n for n, file in enumerate(files)}
        followers = _followers(source, work)
        spans = _spans(work, followers, places)
        states = [state_of(descriptor, spans, n) for n, descriptor in enumerate(descriptors)]
        _check_room(base, store, spans, states)
        _allocate(descriptors, spans)
        meter = Meter(progress, spans.nbytes + sum(each.steps for each in work))
        modes = (os.fstat(descriptor).st_mode for descriptor in descriptors)
        mode = reduce(operator.and_, modes, 0o666)  # a record is shown to nobody who may not see all files
        head = new_head([(each.row.path, each.row.edit) for each in work], [name_in(base, file) for file in files])
        path = next_path(store)
        with contextlib.closing(Writer(path, mode)) as writer:
            try:
                writer.frame(b"HEAD", head.to_bytes())
                writer.files(states)
                writer.spans(spans, descriptors, files, meter.advance)
                writer.become(PENDING)
                # Until here no byte of the checkpoint has changed, and from here on the record can bring it back.
                for each in work:
                    change(descriptors[places[each.extent.path]], source, each, meter)
                for file, extents in followers:
                    for name, start, data in file.after_patch(extents):
                        put(descriptors[places[name]], data, start)
                for descriptor in descriptors:
                    begin_write_back(descriptor)
                after = b"".join(digests(descriptors, files, spans, len(work)))  # while the disk is at work
                for descriptor in descriptors:
                    os.fsync(descriptor)
                writer.frame(b"DONE", after)
                writer.become(DONE)
            except BaseException as error:
                take_back(base, path, error)
                raise
            return PatchReport(str(source.path), plan, spans.nbytes, writer.nbytes, str(writer.path))


def _carry_out_chunks(
    base: Path, store: Path, source: Any, plan: Plan, work: Sequence[Work], progress: Progress | None
) -> PatchReport:
    """Chunks are not written in place: files with the new ones take the places of the old files."""
    with explained(base):
        _check_chunks(base, source, work)
        path = next_path(store)
        staged = path.with_suffix(f".{STAGED}")
        staged.mkdir()
        writer: Writer | None = None
        try:
            restage(source, work, staged, Meter(progress, sum(nbytes_of(source, each) for each in work)))
            check_still(base, source.stats)
            writer = Writer(path, 0o666 & base.stat().st_mode)
            written = exchange(base, staged, writer, [(each.row.path, each.row.edit) for each in work])
        except BaseException as error:
            take_back(base, path, error)
            raise
        finally:
            if writer is not None:
                writer.close()
            _remove(staged)
            source.forget()
        return PatchReport(str(source.path), plan, written, writer.nbytes, str(writer.path))


def _check_chunks(base: Path, source: Any, work: Sequence[Work]) -> None:
    for path in (source.path, base):
        if path.is_symlink():
            raise linked(path)
    check_still(base, source.stats)
    for file in dict.fromkeys(file for each in work for file in source.store.files_of(source.names[each.row.source])):
        if file.is_symlink() or not file.is_dir():
            check_replaceable(base, file)


def _remove(folder: Path) -> None:
    import shutil  # slow to import

    shutil.rmtree(folder, ignore_errors=True)


def _spans(work: Sequence[Work], followers: Sequence[tuple[Any, list[Extent]]], places: Mapping[Path, int]) -> Spans:
    """All ranges that will be written: those of each leaf, and then what follows from these."""
    parts = []
    for row, each in enumerate(work):
        part = np.empty((len(each.ranges), 4), np.int64)
        part[:, 0], part[:, 1], part[:, 2:] = row, places[each.extent.path], each.ranges
        parts.append(part)
    for file, extents in followers:
        found = [(-1, places[e.path], e.start, e.start + e.nbytes) for e in file.patched_too(extents)]
        parts.append(np.array(found, np.int64).reshape(-1, 4))
    return Spans(np.concatenate(parts))


def _check_same(base: Path, source: Any, files: Sequence[Path], descriptors: Sequence[int]) -> None:
    """The plan is about the files that were opened for it; others may have taken their names since."""
    stats = getattr(source, "stats", {})
    for file, descriptor in zip(files, descriptors, strict=True):
        then, now = stats.get(file), os.fstat(descriptor)
        if then is not None and (then.st_ino, then.st_size) != (now.st_ino, now.st_size):
            raise Busy(
                f"{base}: another program replaced it since it was opened; nothing was changed", hint="try again"
            )


def _check_room(base: Path, store: Path, spans: Spans, states: Sequence[State]) -> None:
    sizes = np.array([state.size for state in states])
    if (spans.table[:, 3] > sizes[spans.table[:, 1]]).any():
        raise BadCheckpoint(f"{base}: it became shorter since it was opened; nothing was changed")
    disk = os.statvfs(store)
    needed, free = spans.nbytes + spans.table.nbytes + (1 << 16), disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < needed:  # some network file systems count no blocks at all
        raise CannotWrite(
            f"{base}: the undo record needs {wording.size(needed)}, and {wording.size(free)} are free in "
            f"{store.parent}; nothing was changed",
            hint=f"paramend undo {base} --drop frees what older records take",
        )


def _allocate(descriptors: Sequence[int], spans: Spans) -> None:
    """Takes the room for holes of a sparse file before anything is recorded: a full disk is then no half way."""
    sparse = {n for n, descriptor in enumerate(descriptors) if _is_sparse(os.fstat(descriptor))}
    if not sparse or not hasattr(os, "posix_fallocate"):
        return
    for _, file, start, stop in spans:
        if file in sparse:
            try:
                os.posix_fallocate(descriptors[file], start, stop - start)
            except OSError as error:
                if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}:
                    raise


def _is_sparse(status: os.stat_result) -> bool:
    return status.st_blocks * 512 < status.st_size


def _followers(source: Any, work: Sequence[Work]) -> list[tuple[Any, list[Extent]]]:
    """The files whose format keeps something true by itself, such as checksums, with the leaves that change in each."""
    if isinstance(source, Shards):
        return [found for file in source.files for found in _followers(file, work)]
    if not isinstance(source, Sealed):
        return []
    extents = [each.extent for each in work if each.extent.path == source.path]
    return [(source, extents)] if extents else []


def _dry(base: Path, source: Any, plan: Plan, work: Sequence[Work]) -> PatchReport:
    if isinstance(source, Chunked):
        with explained(base):
            _check_chunks(base, source, work)
        return PatchReport(str(base), plan, sum(nbytes_of(source, each) for each in work), dry_run=True)
    files = sorted({each.extent.path for each in work})
    with explained(base), opened(files, lock=False):
        pass
    if base.is_symlink():
        raise linked(base)
    written = sum(int((each.ranges[:, 1] - each.ranges[:, 0]).sum()) for each in work)
    return PatchReport(str(base), plan, written, dry_run=True)
