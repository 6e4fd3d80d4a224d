"""Writing an undo record: it is durable before the first byte that it covers changes."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from paramend.disk.copying import WriteBack
from paramend.disk.io import put, reading, release
from paramend.disk.permissions import Access, create_file
from paramend.disk.publishing import sync_folder
from paramend.disk.scattered import gather
from paramend.journal import claims
from paramend.journal.ranges import Ranges, State
from paramend.journal.records import COUNT, FRAME, MAGIC, PENDING, Head, Moved, Record, framed, seal_text, states_text

# (leaf, edit) for each row of a patch; what is told how many bytes were recorded.
Edits = Sequence[tuple[str, str]]
Tally = Callable[[int], None]


def new_head(edits: Edits, files: Sequence[str], *, whole: int = 0, moved: Moved = ()) -> Head:
    """The head of a record of a patch that is made now."""
    numbers: dict[str, int] = {}
    rows = tuple((path, numbers.setdefault(edit, len(numbers))) for path, edit in edits)
    return Head(time.time(), tuple(numbers), rows, tuple(files), whole, tuple(moved))


class Writer:
    """A record that is being written. Creating it creates the file."""

    def __init__(self, path: Path, access: Access) -> None:
        self.path = path
        self._descriptor = create_file(path, access.within(0o666))
        self.nbytes = 0
        self.begun = False  # whether bytes of the checkpoint may have changed
        self._digests: list[bytes] = []
        self._back = WriteBack(self._descriptor)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            release(descriptor)

    def read(self, path: Path) -> Record:
        """The record so far, which has this name, or none."""
        return Record(path, self._descriptor)

    def head(self, head: Head) -> None:
        self._put(MAGIC)
        self.frame(b"HEAD", head.to_bytes())

    def frame(self, kind: bytes, payload: bytes) -> None:
        frame = framed(kind, payload)
        self._digests.append(frame[-32:])  # its SHA-256
        self._put(frame)

    def files(self, states: Sequence[State]) -> None:
        self.frame(b"FILE", states_text(states))

    def old_bytes(self, ranges: Ranges, files: Sequence[Path], opened: Sequence[int], meter: Tally) -> None:
        """Add the bytes that the files hold now. The first ones are `opened`; the others are, one at a time, here."""
        table = np.ascontiguousarray(ranges.table, "<i8")
        head = FRAME.pack(b"SPAN", COUNT.size + table.nbytes + ranges.nbytes) + COUNT.pack(len(table))
        rows = table.reshape(-1).view(np.uint8).data
        digest = hashlib.sha256(head)
        digest.update(rows)
        self._put(head)
        self._put(rows)
        for file, batches in groupby(ranges.batches(), key=itemgetter(0)):
            there = file < len(opened)
            with nullcontext(opened[file]) if there else reading(files[file], os.O_NOFOLLOW) as descriptor:
                for _, lines in batches:
                    data = gather(descriptor, lines[:, 2:], files[file])
                    digest.update(data)
                    self._put(data)
                    meter(len(data))
        self._digests.append(digest.digest())
        self._put(self._digests[-1])

    def become(self, state: str) -> None:
        """Make all that was written durable, then rename the record to its new state."""
        os.fsync(self._descriptor)
        if state == PENDING:
            claims.seal(self.path.parent, seal_text(self.path, self._digests))
        new = self.path.with_suffix(f".{state}")
        self.path.rename(new)
        self.path = new
        sync_folder(new.parent)
        self.begun = True

    def _put(self, data: bytes | memoryview | bytearray) -> None:
        put(self._descriptor, data)
        self.nbytes += len(data)
        self._back.advance(len(data))
