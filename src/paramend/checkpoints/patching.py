"""The patching engine: a plan carried out in the file itself, with an undo record that is durable first.

Only the bytes of the selected leaves are written. The order is: lock; old bytes into a record, made durable; new bytes,
made durable; the record marked done. If it is cut short anywhere in between, the old bytes are put back when its user
next opens the checkpoint. `paramend.journal.records` describes the records.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paramend.anatomy.documents import Document
from paramend.checkpoints.checkpoint import Checkpoint, checkpoint_at, open as open_checkpoint
from paramend.checkpoints.exchanging import Addition, carried_out, staged
from paramend.checkpoints.report import PatchReport
from paramend.disk.copying import begin_write_back
from paramend.disk.failures import ELSEWHERE, check_room, explained, linked
from paramend.disk.identity import check_still, check_unchanged
from paramend.disk.io import put, write_file
from paramend.disk.locks import opened
from paramend.disk.urls import path_of
from paramend.edits.plan import Plan
from paramend.errors import BadArgument, BadCheckpoint, Unsupported
from paramend.formats.gathered import Gathered
from paramend.formats.source import Chunked, Gathering, Overlapping, Relabelled, Sealed, Source, Tiled
from paramend.journal.exchange import NewFiles, WholeFiles, check_replaceable
from paramend.journal.ranges import OpenRanges, Ranges
from paramend.journal.store import PUT, UndoStore
from paramend.journal.writer import Writer
from paramend.leaves.leaves import uncollected
from paramend.leaves.origins.origin import Extent, Partly
from paramend.piecewise.changes import Work, Works, change_all
from paramend.piecewise.chunks import laid_flat, nbytes_of, restage
from paramend.piecewise.rows import survey
from paramend.piecewise.spool import Spool
from paramend.piecewise.tiling import change_tiles, tiled
from paramend.reports import wording
from paramend.reports.progress import Meter, Progress
from paramend.rewriting.files import operands


def patch(
    path: str | os.PathLike[str],
    edit: Callable[[Checkpoint], Checkpoint],
    *,
    dry_run: bool = False,
    raw: bool = False,
    progress: Progress | None = None,
) -> PatchReport:
    """The report of what was changed: an edit made in the checkpoint's own files, all or nothing, and undoable.

    Args:
        path: a file, or a folder of shards.
        edit: takes the opened checkpoint and returns it edited; only edits that keep shape and dtype, and `pm.insert`
            into a folder of safetensors files: what comes goes into further files.
        dry_run: whether to check all that can be known before writing, and write nothing.
        raw: as in `open`.
        progress: called with an `Event` as bytes are written, first those of the undo record.

    Raises:
        NoMatch: a selector matches nothing.
        Unsupported: the edit needs a new file; the hint is the command that writes one.
        CannotWrite: a file is read-only, has several names, is being written, or the disk is full. Nothing was changed.

    >>> import tempfile
    >>> from paramend.checkpoints.whole import save
    >>> from paramend.edits.selection import at
    >>> from paramend.journal.undo import undo
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"fc": {"weight": np.ones(2, "float32"), "bias": np.ones(1, "float32")}}, path)
    >>> patch(path, lambda t: at(t, "**/weight").zero()).bytes_written
    8
    >>> np.fromfile(path, "float32")[-3:].tolist(), undo(path).left
    ([0.0, 0.0, 1.0], 0)
    """
    path = path_of(path)
    store = UndoStore.of(path)
    if dry_run or not os.path.lexists(store.base):
        with open_checkpoint(path, raw=raw) as checkpoint:
            return _change(store, checkpoint.source, _edited(checkpoint, edit), None).rehearse()
    with store.writing(), checkpoint_at(path, raw=raw) as checkpoint:  # what was cut short has been taken back
        plan = _edited(checkpoint, edit)
        return _change(store, checkpoint.source, plan, progress).carry_out()


def _edited(checkpoint: Checkpoint, edit: Callable[[Checkpoint], Checkpoint]) -> Plan:
    found = edit(checkpoint)
    source = found.source if isinstance(found, Checkpoint) else None
    if (source.base if isinstance(source, Gathered) else source) is not checkpoint.source:
        raise BadArgument(
            f"the edit function must return the edited checkpoint; it returned {type(found).__name__}",
            hint='pm.patch(path, lambda t: pm.at(t, "**/bias").zero())',
        )
    return found.plan


def _change(store: UndoStore, source: Source, plan: Plan, progress: Progress | None) -> "_Patch | Addition":
    if isinstance(plan.leaves, Gathered):
        return Addition(store, plan, progress)
    head = _head(plan, source) if any(document.own for document in plan.texts) else None
    if head is not None and not head.data:
        with contextlib.closing(Spool()) as spool:
            check_patch(source, plan, spool)
        return Addition(store, plan, progress)
    return _Patch(store, source, plan, progress, head)


@dataclass(frozen=True)
class _Head:
    """A new header of a file, as long as the old one; empty if there is none of its length."""

    path: Path
    data: bytes

    def patched_too(self, extents: Sequence[Extent]) -> list[Extent]:
        return [Extent(self.path, 0, len(self.data))]

    def after_patch(self, extents: Sequence[Extent]) -> list[tuple[Path, int, bytes]]:
        return [(self.path, 0, self.data)]


def _head(plan: Plan, source: Any) -> _Head | None:
    """The header of the file with the configuration of a model, if that changes."""
    from paramend.rewriting import gguf, keys  # most programs use no GGUF files

    return _Head(*gguf.new_head(plan, source)) if keys.document_in(plan) is not None else None


@uncollected()
def check_patch(source: Source, plan: Plan, spool: Spool) -> list[Work]:
    """What would be written where, if the plan can be carried out in place; `Unsupported` says what can do it else.

    New values of quantised weights, of which several leaves are made, are computed into the spool.
    """
    name = source.path
    relabelled = isinstance(source, Relabelled)
    for row in () if relabelled else plan.deleted:
        hint = f"paramend delete {name} '{row.path}' -o OUT"
        raise Unsupported(f"{name}: only values can change in place, and {row.path} would be deleted", hint=hint)
    work = []
    works, chunked = Works(), isinstance(source, Chunked)
    done: set[int] = set()
    for row in plan.changed:
        if row.was and not relabelled:
            hint = f"paramend rename {name} '{row.was}' '{row.path}' -o OUT"
            raise Unsupported(f"{name}: only values can change in place, and {row.was} would be renamed", hint=hint)
        if row.spec != row.before:
            verb = next((edit.op.name for edit in row.calls if not edit.op.keeps_spec), "cast")
            hint = f"paramend {verb} {name} '{row.path}' {row.spec.dtype} -o OUT"
            message = f"{row.path}: shape and dtype cannot change in place, and {row.edit} gives {row.spec}"
            raise Unsupported(message, hint=hint)
        if not row.calls:
            continue
        why = source.refusal(row.source)
        if why and not isinstance(row.calls[-1].args.get("value"), Partly):  # which changes bytes
            raise Unsupported(f"{row.path} cannot take {row.edit}: {why}", hint="leave it out of the selection")
        extent = laid_flat(source, row) if chunked else source.extent(row.source)
        if extent is None and isinstance(source, Tiled):
            work += tiled(source, row, works, spool) if row.spec.size else []
            continue
        if extent is None:
            raise Unsupported(
                f"{row.path}: its bytes are not contiguous in {name}, so they cannot be changed in place",
                hint=f"paramend {row.calls[0].op.name} {name} '{row.path}' -o OUT",
            )
        one = source.ties.get(row.source, row.source)
        if extent.nbytes and one not in done:  # a leaf with several names has a row for each
            coded = any(edit.coding is not None and edit.op.name == "set" for edit in row.calls)
            found = works.of(spool.taken(source, row) if coded else row, extent)
            work += [found] if len(found.ranges) else []  # an empty slice writes nothing
        done.add(one)
    _check_apart(source, work)
    return work


def _check_apart(source: Source, work: Sequence[Work]) -> None:
    """Raise if a leaf that changes shares bytes with another one without being the same leaf: views of one storage."""
    if not isinstance(source, Overlapping):
        return
    for each in work:
        others = source.overlaps(each.row.source)
        if others:
            call = each.row.calls[0]
            typed = "".join(f" {value}" for value in call.args.values() if isinstance(value, int | float | str))
            paths = [source.index.path(other) for other in others]
            raise Unsupported(
                f"{each.row.path} shares bytes of {source.path} with {wording.listing(paths, 3)}: a change in place of "
                "one changes the other",
                hint=f"paramend {call.op.name} {source.path} '{each.row.path}'{typed} -o OUT",
            )


class _Patch:
    def __init__(
        self, store: UndoStore, source: Any, plan: Plan, progress: Progress | None, head: _Head | None
    ) -> None:
        self.store, self.source, self.plan, self.progress, self.head = store, source, plan, progress, head
        self.spool = Spool()
        try:
            self.work = check_patch(source, plan, self.spool)
        except BaseException:
            self.spool.close()
            raise
        self.chunked = isinstance(source, Chunked)
        files = {each.extent.path for each in self.work} | ({head.path} if head else set())
        self.files = [] if self.chunked else sorted(files)
        self.documents = [each for each in plan.texts if each.text != each.before and not each.own]
        for document in self.documents:
            if not (document.text and PUT.fullmatch(document.name)):  # an undo record of it would not be believed
                self.spool.close()
                raise Unsupported(f"{document.file} cannot change in place", hint=ELSEWHERE)
        if plan.restructured:  # a source that takes that in place
            self.documents.append(Document(*source.relabelled({row.source: plan.name(row) for row in plan.rows})))
        known: dict[Any, str] = {}  # many leaves take the same calls
        self.rows = list({each.row.source: each.row for each in self.work}.values())
        rows = {row.source: row for row in plan.changed} if isinstance(source, Tiled) else {}  # values may be spooled
        said = ((row, tuple(map(id, row.calls))) for row in (rows.get(row.source, row) for row in self.rows))
        self.edits = [(row.path, known.get(key) or known.setdefault(key, row.edit)) for row, key in said]
        self.edits += [(row.path, row.edit) for row in plan.changed if row.was and not row.calls]
        self.edits += [(row.path, "deleted") for row in plan.deleted]
        self.edits += [(change.file, str(change)) for change in plan.configured]

    def rehearse(self) -> PatchReport:
        """The report of a dry run, after all checks that are possible before writing."""
        survey(self.plan)
        base = self.store.base
        with explained(base):
            WholeFiles(base, [document.name for document in self.documents]).check()
            if self.chunked:
                self._check_chunks()
                written = sum(nbytes_of(self.source, each) for each in self.work)
            else:
                with opened(self.files, lock=False):
                    pass
                if base.is_symlink():
                    raise linked(base)
                written = sum(int((each.ranges[:, 1] - each.ranges[:, 0]).sum()) for each in self.work)
        self.spool.close()
        written += sum(len(document.text) for document in self.documents) + len(self.head.data if self.head else b"")
        return PatchReport(str(base), self.plan, written, dry_run=True)

    def carry_out(self) -> PatchReport:
        if not self.work and not self.documents and not self.head:  # only leaves or slices without elements
            self.spool.close()
            return PatchReport(str(self.source.path), self.plan, 0)
        try:
            fill = self._fill if self.chunked or self.documents else None
            with explained(self.store.base), staged(self.store, fill, self.documents) as new:
                written, record = self._write(new)
        finally:
            self.spool.close()
            if self.chunked:
                with contextlib.suppress(OSError):
                    self.source.forget()
        return PatchReport(str(self.source.path), self.plan, written, record.nbytes, str(record.path))

    def _write(self, new: NewFiles) -> tuple[int, Writer]:
        """(bytes written, the record): files are written in place, and new ones take the places of others."""
        with opened(self.files) as descriptors:
            self.store.check_nothing_pending()
            self._check_same(descriptors)
            followers = _followers(self.source, self.work) + ([(self.head, [])] if self.head else [])
            target = OpenRanges(self.files, descriptors, self._ranges(followers))
            self._check_room(target)
            target.allocate()
            written = target.ranges.nbytes + new.nbytes
            old = target.ranges.nbytes + sum(len(document.before) for document in self.documents)
            meter = Meter(None if self.chunked else self.progress, old + sum(each.steps for each in self.work))
            record = carried_out(
                self.store, self.edits, new, target, lambda: self._change(target, followers, meter), meter.advance
            )
            return written, record

    def _change(self, target: OpenRanges, followers: "list[_Follower]", meter: Meter) -> None:
        descriptors = dict(zip(target.files, target.descriptors, strict=True))
        if any(operands(row) for row in self.plan.changed):  # which may be made of what is in these files
            for file in self.source.sources if isinstance(self.source, Gathering) else ():
                if file.path in descriptors:
                    file.hold()
        change_all(descriptors, self.source, [each for each in self.work if each.tile is None], meter)
        change_tiles(descriptors, self.source, [each for each in self.work if each.tile is not None], meter)
        for file, extents in followers:
            for name, start, data in file.after_patch(extents):
                put(descriptors[name], data, start)
        for descriptor in target.descriptors:
            begin_write_back(descriptor)

    def _ranges(self, followers: "list[_Follower]") -> Ranges:
        """All ranges that will be written: those of each leaf, then checksums and the like."""
        if not self.files:
            return Ranges(np.empty((0, 4), np.int64))
        places = {file: n for n, file in enumerate(self.files)}
        counts = [len(each.ranges) for each in self.work]
        numbers = {row.source: number for number, row in enumerate(self.rows)}
        rows = np.repeat([numbers[each.row.source] for each in self.work], counts)
        files = np.repeat([places[each.extent.path] for each in self.work], counts)
        found = [np.empty((0, 2), np.int64), *(each.ranges for each in self.work)]
        parts = [np.column_stack([rows, files, np.concatenate(found)]).astype(np.int64)]
        for file, extents in followers:
            too = [(-1, places[e.path], e.start, e.start + e.nbytes) for e in file.patched_too(extents)]
            parts.append(np.array(too, np.int64).reshape(-1, 4))
        return Ranges(np.concatenate(parts))

    def _check_same(self, descriptors: Sequence[int]) -> None:
        """Check that the files are those that the plan was made for; others may have taken their names since."""
        stats = self.source.stats
        for file, descriptor in zip(self.files, descriptors, strict=True):
            now = os.fstat(descriptor)
            check_unchanged(file, stats.get(file, now), now)

    def _check_room(self, target: OpenRanges) -> None:
        base, ranges = self.store.base, target.ranges
        sizes = np.array([os.fstat(descriptor).st_size for descriptor in target.descriptors])
        if (ranges.table[:, 3] > sizes[ranges.table[:, 1]]).any():
            raise BadCheckpoint(f"{base}: it has become shorter since it was opened; nothing was changed")
        needed = ranges.nbytes + ranges.table.nbytes + (1 << 16)
        hint = f"paramend undo {base} --drop frees the space of older records"
        check_room(self.store.folder.parent, needed, f"{base}: the undo record", hint=hint)

    def _fill(self, folder: Path) -> None:
        """Make the files that will take the places of others: chunks, which are not written in place, and texts."""
        if self.chunked:
            self._check_chunks()
            nbytes = sum(nbytes_of(self.source, each) for each in self.work)
            restage(self.source, self.work, folder, Meter(self.progress, nbytes))
            check_still(self.source.stats)
        for document in self.documents:
            write_file(folder / document.name, document.text)

    def _check_chunks(self) -> None:
        source = self.source
        for path in (source.path, self.store.base):
            if path.is_symlink():
                raise linked(path)
        check_still(source.stats)
        names = [source.names[each.row.source] for each in self.work]
        for file in dict.fromkeys(file for name in names for file in source.store.files_of(name)):
            if file.is_symlink() or not file.is_dir():
                check_replaceable(self.store.base, file)


# A file whose format maintains derived bytes, such as checksums, with the leaves that change in it.
_Follower = tuple[Any, list[Extent]]


def _followers(source: Any, work: Sequence[Work]) -> list[_Follower]:
    if isinstance(source, Gathering):
        return [found for file in source.sources for found in _followers(file, work)]
    if not isinstance(source, Sealed):
        return []
    extents = [each.extent for each in work if each.extent.path == source.path]
    return [(source, extents)] if extents else []
