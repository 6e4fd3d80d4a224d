"""Rollback: the old bytes of a patch are put back into its files, from its record."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from paramend.disk.failures import explained, reason
from paramend.disk.locks import opened
from paramend.disk.publishing import sync_folder
from paramend.disk.scattered import scatter
from paramend.errors import BadCheckpoint, Busy, CannotWrite
from paramend.journal.exchange import WholeFiles
from paramend.journal.ranges import OpenRanges, Ranges, State
from paramend.journal.records import PENDING, Record
from paramend.reports import wording
from paramend.reports.progress import Meter, Progress

_BACK = "the old bytes were put back into the file that was there"


@dataclass(frozen=True)
class Rollback:
    """A patch to take back, from its record, which is removed once the old bytes are durable. With `force`, the old
    bytes go even over other bytes, or into another file of the same size."""

    record: Record
    base: Path
    files: Sequence[Path]
    force: bool = False
    progress: Progress | None = None

    def undo(self) -> None:
        """Take back a complete patch; `CannotWrite` if its bytes have changed since, or if the system refuses."""
        self.record.check()
        with explained(self.base), self._target() as target:
            now = target.states()
            self._check_sizes(now)
            differ = self._whole.changed_since(self.record)
            if differ and not self.force:
                raise self._changed_since(differ)
            if target.files and not self.force:
                self._check_new(target, now)
            if target.files:
                self.record.note([*now, *self.record.states[len(now) :]])
            self.record.become_pending()
            self.restore(target)
            target.check_named(_BACK)

    def finish(self) -> bool:
        """Take back a patch that was cut short. False if all the old bytes are still there; `BadCheckpoint` if the file
        is not the one that was patched, and nothing was written."""
        self.record.check()
        with explained(self.base), self._target() as target:
            changed = self._is_changed(target)
            if changed:
                self.restore(target)
                target.check_named(_BACK)
            else:
                target.sync()  # a recovery may have put them back and been killed before it got here
                self._whole.sync()
                self._forget()
            return changed

    @contextlib.contextmanager
    def _target(self) -> Iterator[OpenRanges]:
        files = self.files[: self.record.head.written]
        with opened(files) as descriptors:
            table = self.record.ranges.table
            yield OpenRanges(files, descriptors, Ranges(table[table[:, 1] < len(files)]))

    @property
    def _whole(self) -> WholeFiles:
        head = self.record.head
        return WholeFiles(self.base, head.files[head.written :], head.moved, head.written)

    def _is_changed(self, target: OpenRanges) -> bool:
        """Whether the files of a pending record lack the old bytes; `BadCheckpoint` if they are not those patched."""
        now = target.states()
        self._check_sizes(now)
        changed, strange = self._whole.compared(self.record)
        changed = changed or not target.hold(self.record.old_bytes())
        if not all(one.witness == then.witness for _, one, then in self._by_file(now)):
            strange = strange or "the file"
        if changed and strange and not self.force:
            why = f"{strange} is not the one that was patched: it has been replaced since"
            forgets = f"paramend undo {self.base} --drop forgets them (right for a new download)"
            raise BadCheckpoint(
                f"{self.base}: a patch of it was cut short, and {why}; nothing was written",
                hint=f"{self._forced} puts the old bytes back, {forgets}",
            )
        return changed

    @property
    def _forced(self) -> str:
        return f"paramend undo {self.base} --force"

    def restore(self, target: OpenRanges) -> None:
        """Put the old bytes back, durably, into open files and those that were replaced, and remove the record."""
        left: list[str] = []
        try:
            try:
                left = self._put_old(target)
            except OSError:
                raise
            except BaseException:  # Ctrl-C, or an error of `progress`: once more, from the start
                replace(self, progress=None)._put_old(target)
                self._forget()
                raise
        except OSError as error:
            path, hint = self.record.path, f"paramend undo {self.base}"
            where = f"All of them are in {path}"
            if not os.path.lexists(path):
                where, hint = "Another program has removed the undo record", ""
            elif path.suffix == f".{PENDING}":
                where += ", and the next program of yours that opens the checkpoint tries again"
            else:
                hint += " --force"
            told = f"{self.base}: {reason(error)}; the old bytes were put back only in part. {where}"
            raise CannotWrite(told, hint=hint) from error
        self._forget()
        if left:
            what = f"another program replaced {wording.listing(left)} meanwhile, and that was left alone"
            raise Busy(f"{self.base}: {what}; elsewhere the old bytes are back", hint="try again")

    def _put_old(self, target: OpenRanges) -> list[str]:
        """Put the old bytes back; the names of files that were left alone, because another program replaced them."""
        meter = Meter(self.progress, self.record.ranges.nbytes)
        for file, lines, data in self.record.old_bytes() if target.files else ():
            if file < len(target.files):
                scatter(target.descriptors[file], lines[:, 2:], data, target.files[file], lines[:, 0])
                meter.advance(len(data))
        target.sync()
        return self._whole.put_back(self.record, meter, force=self.force) if self.record.head.whole else []

    def _forget(self) -> None:
        path = self.record.path
        try:
            path.unlink(missing_ok=True)
            sync_folder(path.parent)
        except FileNotFoundError:  # another program removed the records
            pass
        except OSError as error:
            told = f"the old bytes are back in place, but the undo record {path} could not be removed"
            hint = f"paramend undo {self.base} --drop"
            raise CannotWrite(f"{self.base}: {told}: {reason(error)}", hint=hint) from error

    def _by_file(self, now: Sequence[State]) -> Iterator[tuple[str, State, State]]:
        head = self.record.head
        return zip(head.files[: head.written], now, self.record.states[: head.written], strict=True)

    def _check_sizes(self, now: Sequence[State]) -> None:
        for name, state, then in self._by_file(now):
            if state.size != then.size:
                what = f"{name} has {state.size:,} bytes, and had {then.size:,} when it was patched: it is another file"
                hint = f"paramend undo {self.base} --drop forgets the undo records"
                raise BadCheckpoint(f"{self.base}: {what}; nothing was written", hint=hint)

    def _check_new(self, target: OpenRanges, now: Sequence[State]) -> None:
        """Raise if the files do not hold what the patch wrote, or are not the files that were patched."""
        rows = self.record.head.rows
        found = target.digests(len(rows))
        differ = [n for n, digest in enumerate(found) if digest != self.record.after[n]]
        if differ:
            raise self._changed_since([rows[n][0] for n in differ if n < len(rows)] or ["its checksums"])
        others = [name for name, one, then in self._by_file(now) if one.witness != then.witness]
        if others:
            what = f"{wording.listing(others)} is not the file of patch {self.record.number}"
            hint = f"{self._forced} puts the bytes from before the patch there anyway, "
            raise CannotWrite(
                f"{self.base}: {what}: bytes that the patch left alone have changed; nothing was written",
                hint=f"{hint}paramend undo {self.base} --drop forgets them",
            )

    def _changed_since(self, what: Sequence[str]) -> CannotWrite:
        told = f"{wording.listing(what)} changed since patch {self.record.number}; nothing was written"
        hint = f"{self._forced} puts the bytes from before the patch there anyway"
        return CannotWrite(f"{self.base}: {told}", hint=hint)
