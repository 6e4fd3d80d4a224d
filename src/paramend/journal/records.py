"""Undo records: what a file held before it was changed in place, on disk, checked and durable.

docs/undo-records.md has their format. Anything in a file that does not fit it is damage, and nothing is written then.
"""

import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from paramend.disk.failures import reason
from paramend.disk.io import durable, get, get_into, put, release
from paramend.disk.publishing import sync_folder
from paramend.errors import BadCheckpoint, CannotRead, CannotWrite
from paramend.journal import claims
from paramend.journal.ranges import BUFFER, Array, Ranges, State

MAGIC = b"PMUNDO1\n"
PARTIAL, PENDING, DONE = "partial", "pending", "done"
_NAME = re.compile(r"([0-9]{6,18})\.(partial|pending|done)")
FRAME = struct.Struct("<4sQ")
COUNT = struct.Struct("<Q")
_DIGEST = 32
# HEAD and FILE frames are read into memory: our records have no larger ones.
_MAX_TEXT = 1 << 30
# (old name, new name) of files that get another name.
Moved = Sequence[tuple[str, str]]


def records_in(folder: Path, *states: str) -> list[Path]:
    """The records in a folder that are in these states, the oldest first; `CannotRead` without permission to look."""
    found: list[tuple[int, Path]] = []
    try:
        for path in () if folder.is_symlink() else folder.iterdir():  # our folders are never links
            match = _NAME.fullmatch(path.name)
            if match and match[2] in states:
                found.append((int(match[1]), path))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except PermissionError:
        closed = folder if os.access(folder.parent, os.R_OK | os.X_OK) else folder.parent
        why = ", so it is not known whether a patch was cut short" if closed == folder else ""
        raise CannotRead(f"{closed}: no permission to read it{why}", hint=f"ls -ld {closed}") from None
    return [path for _, path in sorted(found)]


@dataclass(frozen=True)
class Head:
    """What was done, when and to which files. `edits` has each edit once, `rows` the path of each leaf that changed,
    and the number of its edit. The last `whole` of the files, which are relative to the folder of the checkpoint, were
    replaced whole; those `moved` got another name."""

    time: float
    edits: tuple[str, ...]
    rows: tuple[tuple[str, int], ...]
    files: tuple[str, ...]
    whole: int = 0
    moved: Moved = ()

    @property
    def written(self) -> int:
        """How many of the files, the first ones, were written in place."""
        return len(self.files) - self.whole

    @property
    def names(self) -> set[str]:
        return {*self.files, *(name for pair in self.moved for name in pair)}

    def to_bytes(self) -> bytes:
        data = {"time": self.time, "edits": self.edits, "rows": self.rows, "files": self.files}
        if self.whole:
            data["whole"] = True if self.whole == len(self.files) else self.whole
        if self.moved:
            data["moved"] = self.moved
        return json.dumps(data, separators=(",", ":")).encode()


def seal_text(path: Path, digests: Sequence[bytes]) -> str:
    """The text that identifies a record: its number, the number of its frames and a digest of their digests."""
    return f"{int(path.stem)} {len(digests)} {hashlib.sha256(b''.join(digests)).hexdigest()}"


def framed(kind: bytes, payload: bytes) -> bytes:
    """A frame, with the digest at its end."""
    frame = FRAME.pack(kind, len(payload)) + payload
    return frame + hashlib.sha256(frame).digest()


def states_text(states: Sequence[State]) -> bytes:
    """How files are recognized, as the payload of a frame."""
    rows = [{"size": state.size, "witness": state.witness} for state in states]
    return json.dumps(rows, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class _Frame:
    kind: bytes
    start: int  # of the payload
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length + _DIGEST


class Record:
    """A written record, opened for reading: under its name, or by a descriptor, if it may have lost its name. `head` is
    checked at once, old bytes by `check`; `BadCheckpoint` if it is damaged, or not a record."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        self.number = int(path.stem)
        self.state = path.suffix[1:]
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._descriptor = os.open(path, flags) if descriptor is None else os.dup(descriptor)
        except OSError as error:
            raise CannotRead(f"{path}: {error.strerror}") from None
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise self.damaged("it is not a regular file")  # noqa: TRY301
            self.nbytes = status.st_size
            self._frames = self._read_frames()
            self.head = self._read_head()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            release(descriptor)

    def damaged(self, reason: str) -> BadCheckpoint:
        hint = "paramend undo PATH --drop forgets all undo records of PATH"
        return BadCheckpoint(f"{self.path}: the undo record is damaged: {reason}; nothing was written", hint=hint)

    @cached_property
    def states(self) -> tuple[State, ...]:
        """The last states of the files that were recorded before old bytes were put back."""
        for frame in reversed(self._frames):
            if frame.kind == b"FILE":
                rows = self._json(frame)
                try:
                    found = tuple(State(int(row["size"]), str(row["witness"])) for row in rows)
                except (TypeError, KeyError, ValueError):
                    raise self.damaged("its list of files is invalid") from None
                if len(found) == len(self.head.files):
                    return found
        raise self.damaged("it has no states of the files")

    @cached_property
    def ranges(self) -> Ranges:
        frame = self._frames[2]
        (count,) = COUNT.unpack(get(self._descriptor, frame.start, COUNT.size, self.path))
        if count > (frame.length - COUNT.size) // 32:
            raise self.damaged("its table of ranges is cut short")
        data = get(self._descriptor, frame.start + COUNT.size, count * 32, self.path)
        table = np.frombuffer(data, "<i8").reshape(count, 4)
        row, file, start, stop = table.T
        sound = (row >= -1) & (row < len(self.head.rows)) & (file >= 0) & (file < len(self.head.files))
        sound &= (start >= 0) & (start <= stop) & (stop - start <= frame.length)  # so the sum cannot overflow
        if not sound.all() or COUNT.size + table.nbytes + sum((stop - start).tolist()) != frame.length:
            raise self.damaged("its table of ranges is invalid")
        return Ranges(table)

    def check(self) -> None:
        """Read the whole record; `BadCheckpoint` if a digest differs."""
        if not (self.ranges and self._fits(self._frames[2])):  # a fault of the table is told first
            raise self.damaged("the old bytes do not match their checksum")

    def old_bytes(self) -> Iterator[tuple[int, Array, memoryview]]:
        """(file, lines of the table, bytes) of each batch; all batches share one buffer."""
        at = self._frames[2].start + COUNT.size + self.ranges.table.nbytes
        buffer = memoryview(bytearray(BUFFER))
        for file, lines in self.ranges.batches():
            view = buffer[: int((lines[:, 3] - lines[:, 2]).sum())]
            get_into(view, self._descriptor, at, self.path)
            yield file, lines, view
            at += len(view)

    @cached_property
    def after(self) -> list[bytes]:
        """The digests of the new bytes of each row, then of what the format maintains, in a record that is done."""
        return self._done(int(self.head.whole > 0), len(self.head.rows) + 1)

    @cached_property
    def new_files(self) -> list[bytes]:
        """The digest of each file that is replaced whole, as it becomes."""
        return self._done(0, self.head.whole) if self.head.whole else []

    def _done(self, place: int, count: int) -> list[bytes]:
        frames = [frame for frame in self._frames if frame.kind == b"DONE"]
        if len(frames) <= place:
            raise self.damaged("it is cut short")
        data = self._payload(frames[place])
        if len(data) != _DIGEST * count:
            raise self.damaged("the digests of the new bytes are incomplete")
        return [bytes(data[at : at + _DIGEST]) for at in range(0, len(data), _DIGEST)]

    def note(self, states: Sequence[State]) -> None:
        """Add the current states of the files, durably."""
        with durable(self.path) as descriptor:
            end = self._frames[-1].stop
            os.ftruncate(descriptor, end)  # removes a note that was cut short
            put(descriptor, framed(b"FILE", states_text(states)), end)
        self.nbytes = os.fstat(self._descriptor).st_size
        self._frames = self._read_frames()
        self.__dict__.pop("states", None)

    def become_pending(self) -> None:
        """Note that old bytes are about to be written: if this is cut short, another program finishes it. If it cannot
        be noted, `OSError`: the record is done as before. If it cannot be noted for good, `CannotWrite`: it is pending
        all the same."""
        claims.seal(self.path.parent, seal_text(self.path, [self._digest_of(frame) for frame in self._frames]))
        done, pending = self.path, self.path.with_suffix(f".{PENDING}")
        done.rename(pending)
        try:
            sync_folder(pending.parent)
        except OSError as error:
            try:
                pending.rename(done)
            except OSError:
                what = "this undo has begun, and the next program of yours that opens the checkpoint finishes it"
                raise CannotWrite(f"{pending}: {reason(error)}; {what}") from error
            raise
        self.path, self.state = pending, PENDING

    def is_own(self) -> bool:
        """Whether this user made it pending here, as it is, provided that `check` passes. Frames added since then are
        ignored."""
        said = claims.read(self.path.parent) or ""
        match = re.fullmatch(r"[0-9]+ ([0-9]{1,9}) [0-9a-f]{64}", said)
        if match is None:
            return False
        self._frames = self._frames[: int(match[1])]
        return said == seal_text(self.path, [self._digest_of(frame) for frame in self._frames])

    def _digest_of(self, frame: _Frame) -> bytes:
        return bytes(get(self._descriptor, frame.stop - _DIGEST, _DIGEST, self.path))

    def _read_frames(self) -> list[_Frame]:
        head = os.pread(self._descriptor, len(MAGIC), 0)
        if head != MAGIC:
            newer = head[:6] == MAGIC[:6] and len(head) == len(MAGIC)
            raise self.damaged("a newer Paramend wrote it" if newer else "it does not begin like one")
        found: list[_Frame] = []
        at = len(MAGIC)
        while at < self.nbytes:
            raw = os.pread(self._descriptor, FRAME.size, at)
            if len(raw) < FRAME.size:
                break
            kind, length = FRAME.unpack(raw)
            frame = _Frame(kind, at + FRAME.size, length)
            if kind not in {b"HEAD", b"FILE", b"SPAN", b"DONE"} or frame.stop > self.nbytes:
                break
            # There are many old bytes; `check` reads them when they are needed.
            if (length > _MAX_TEXT or not self._fits(frame)) if kind != b"SPAN" else length < COUNT.size:
                break
            found.append(frame)
            at = frame.stop
        kinds = [frame.kind for frame in found]
        needed = [b"HEAD", b"FILE", b"SPAN"] + [b"DONE"] * (self.state == DONE)
        if kinds[: len(needed)] != needed or b"SPAN" in kinds[3:]:
            raise self.damaged(f"the frame at byte {at:,} is missing, cut short or does not match its checksum")
        return found

    def _fits(self, frame: _Frame) -> bool:
        digest = hashlib.sha256()
        start = frame.start - FRAME.size
        stop = frame.stop - _DIGEST
        for at in range(start, stop, BUFFER):
            digest.update(get(self._descriptor, at, min(BUFFER, stop - at), self.path))
        return digest.digest() == get(self._descriptor, stop, _DIGEST, self.path)

    def _payload(self, frame: _Frame) -> bytearray:
        return get(self._descriptor, frame.start, frame.length, self.path)

    def _json(self, frame: _Frame) -> Any:
        try:
            return json.loads(self._payload(frame))
        except (ValueError, RecursionError):
            raise self.damaged(f"the {frame.kind.decode()} frame is not JSON") from None

    def _read_head(self) -> Head:
        data = self._json(self._frames[0])
        try:
            head = Head(
                float(data["time"]),
                tuple(map(str, data["edits"])),
                tuple((str(path), int(edit)) for path, edit in data["rows"]),
                tuple(map(str, data["files"])),
                len(data["files"]) if data.get("whole") is True else int(data.get("whole", 0)),
                tuple((str(old), str(new)) for old, new in data.get("moved", ())),
            )
        except (TypeError, KeyError, ValueError):
            raise self.damaged("its head is invalid") from None
        rows = all(0 <= edit < len(head.edits) for _, edit in head.rows)
        wholes = 0 <= head.whole <= len(head.files) and bool(head.whole) >= bool(head.moved)
        if not rows or not head.files or not wholes:
            raise self.damaged("its head is invalid")
        for name in head.names:
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\0" in name:
                raise self.damaged(f"it names a file outside the checkpoint: {name!r}")
        return head
