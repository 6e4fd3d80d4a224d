"""Rollback: the old bytes of a patch are put back into its files, from its record."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from paramend.disk.failures import explained, reason
from paramend.disk.io import put
from paramend.disk.locks import opened
from paramend.disk.publishing import sync_folder
from paramend.errors import BadCheckpoint, CannotWrite
from paramend.journal.exchange import WholeFiles
from paramend.journal.ranges import OpenRanges, State
from paramend.journal.records import Record
from paramend.reports import wording
from paramend.reports.progress import Meter, Progress


@dataclass(frozen=True)
class Rollback:
    """A patch to take back.

    Attributes:
        record: the record of the patch, which is removed once the old bytes are durable.
        base: the checkpoint.
        files: the files of the record, by number.
        force: whether to put the old bytes back even over other bytes, or into another file of the same size.
        progress: called with an `Event` as bytes are written.
    """

    record: Record
    base: Path
    files: Sequence[Path]
    force: bool = False
    progress: Progress | None = None

    def undo(self) -> None:
        """Take back a complete patch.

        Raises:
            CannotWrite: its bytes have changed since. Nothing was written.
        """
        self.record.check()
        with explained(self.base):
            if self.record.head.whole:
                whole = WholeFiles(self.base, self.record.head.files)
                differ = whole.changed_since(self.record)
                if differ and not self.force:
                    raise self._changed_since(differ)
                with Record(self.record.become_pending()) as pending:
                    whole.put_back(pending, force=self.force)
                    _forget(pending)
                return
            with self._opened() as target:
                now = target.states()
                self._check_sizes(now)
                if not self.force:
                    self._check_new(target, now)
                self.record.note(now)
                with Record(self.record.become_pending()) as pending:
                    replace(self, record=pending)._put_old_and_forget(target)

    def finish(self) -> bool:
        """Take back a patch that was cut short. False if all the old bytes are still there.

        Raises:
            BadCheckpoint: the file is not the one that was patched. Nothing was written.
        """
        self.record.check()
        with explained(self.base):
            if self.record.head.whole:
                return self._put_files_back()
            with self._opened() as target:
                now = target.states()
                self._check_sizes(now)
                same = all(one.witness == then.witness for _, one, then in self._by_file(now))
                changed = not target.hold(self.record.old_bytes())
                if changed and not same and not self.force:
                    raise BadCheckpoint(
                        f"{self.base}: a patch of it was cut short, and the file is not the one that was patched: it "
                        "has been replaced since; nothing was written",
                        hint=f"paramend undo {self.base} --force puts the old bytes back, "
                        f"paramend undo {self.base} --drop forgets them (right for a new download)",
                    )
                if changed:
                    self._put_old(target)
                target.sync()  # a recovery may have put them back and been killed before it got here
                _forget(self.record)
                return changed

    def abandon(self) -> None:
        """Take back a patch that this program is making, with the locks held."""
        self.record.check()
        if self.record.head.whole:
            self._put_files_back()
            return
        with opened(self.files, links=True, lock=False) as descriptors:
            self._put_old(OpenRanges(self.files, descriptors, self.record.ranges))
        _forget(self.record)

    def _put_files_back(self) -> bool:
        changed = WholeFiles(self.base, self.record.head.files).put_back(self.record, force=self.force)
        _forget(self.record)
        return changed

    @contextlib.contextmanager
    def _opened(self) -> Iterator[OpenRanges]:
        with opened(self.files) as descriptors:
            yield OpenRanges(self.files, descriptors, self.record.ranges)

    def _put_old_and_forget(self, target: OpenRanges) -> None:
        try:
            self._put_old(target)
        except (KeyboardInterrupt, SystemExit):
            replace(self, progress=None)._put_old(target)
            _forget(self.record)
            raise
        _forget(self.record)

    def _put_old(self, target: OpenRanges) -> None:
        meter = Meter(self.progress, self.record.ranges.nbytes)
        try:
            for _, file, start, data in self.record.old_bytes():
                put(target.descriptors[file], data, start)
                meter.advance(len(data))
            target.sync()
        except OSError as error:
            raise CannotWrite(
                f"{self.base}: {reason(error)}; the old bytes were put back only in part. All of them are in "
                f"{self.record.path}, and the next program that opens the checkpoint tries again"
            ) from error

    # ---- what is there now -----------------------------------------------------------------------------------

    def _by_file(self, now: Sequence[State]) -> Iterator[tuple[str, State, State]]:
        """(name, current state, recorded state) of each file."""
        return zip(self.record.head.files, now, self.record.states, strict=True)

    def _check_sizes(self, now: Sequence[State]) -> None:
        for name, state, then in self._by_file(now):
            if state.size != then.size:
                raise BadCheckpoint(
                    f"{self.base}: {name} has {state.size:,} bytes, and had {then.size:,} when it was patched: it is "
                    "another file; nothing was written",
                    hint=f"paramend undo {self.base} --drop forgets the undo records",
                )

    def _check_new(self, target: OpenRanges, now: Sequence[State]) -> None:
        """Raise if the files do not hold what the patch wrote, or are not the files that were patched."""
        rows = self.record.head.rows
        found = target.digests(len(rows))
        differ = [n for n, digest in enumerate(found) if digest != self.record.after[n]]
        if differ:
            raise self._changed_since([rows[n][0] for n in differ if n < len(rows)] or ["its checksums"])
        others = [name for name, one, then in self._by_file(now) if one.witness != then.witness]
        if others:
            raise CannotWrite(
                f"{self.base}: {wording.listing(others)} is not the file of patch {self.record.number}: bytes that the "
                "patch left alone have changed; nothing was written",
                hint=f"paramend undo {self.base} --force puts the bytes from before the patch there anyway, "
                f"paramend undo {self.base} --drop forgets them",
            )

    def _changed_since(self, what: Sequence[str]) -> CannotWrite:
        return CannotWrite(
            f"{self.base}: {wording.listing(what)} changed since patch {self.record.number}; nothing was written",
            hint=f"paramend undo {self.base} --force puts the bytes from before the patch there anyway",
        )


def _forget(record: Record) -> None:
    record.path.unlink()
    sync_folder(record.path.parent)
