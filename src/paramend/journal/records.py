"""Undo records: what a file held before it was changed in place, on disk, checked and durable.

Where records live: beside a file `model.safetensors` in the folder `.model.safetensors.undo`; of a checkpoint that is a
folder, in `.undo` inside it. A record is one file whose name is its number and its state:

    000003.partial   being written; no byte of the checkpoint has changed because of it; may be thrown away
    000003.pending   durable; bytes may have changed; the next program of its user puts the old ones back
    000003.done      the change is whole and durable; `undo` takes back the one with the highest number

`.partial` becomes `.pending` and that `.done` by renaming, so each step is atomic. `undo` makes `.done` into `.pending`
again before it writes: an interrupted undo is finished, not reverted. `lock` in the same folder is held meanwhile.
Before a record becomes pending, `paramend.journal.claims` notes elsewhere by which digests its frames can be known: one
without such a note is not believed when a checkpoint is opened, only when its user asks for it.

The format, version 1. All numbers are little-endian. Eight bytes `PMUNDO1\\n`, then frames one after the other:

    4 bytes    kind: HEAD, FILE, SPAN or DONE
    8 bytes    length of the payload, unsigned
    payload
    32 bytes   SHA-256 of kind, length and payload

    HEAD   first and once. JSON: {"time": seconds since 1970, "edits": [text], "rows": [[leaf, edit number]],
           "files": [[path relative to the checkpoint's folder]]}
           With "whole": true the files were exchanged whole for others. SPANs are then all of a file, sizes are -1
           where there was none, and DONE, which comes before the record is pending, has one digest for each new file.
    FILE   JSON: [{"size", "witness"}], one for each file, as it was when the frame was written; the last such
           frame counts. The witness is the SHA-256 of samples of bytes that no span covers; of files that were
           exchanged whole the first has one, of the other files that could have been.
    SPAN   old bytes: a count (8 bytes), so many quadruples of signed 8-byte integers (row, file, start, stop), row -1
           being what a format keeps true by itself, such as checksums; then the bytes start to stop of each.
           It is durable before the first byte that it covers changes.
    DONE   last, but for FILE frames that undo adds: for each row and then for row -1, the SHA-256 of the checksums of
           its new bytes: CRC-32 (4 bytes), one for each range, or for each MiB of a longer one.

The first three, HEAD, FILE and SPAN, were whole before the record was pending, and DONE before it was done; what comes
after these may be cut short and then does not count. Anything else that does not fit is damage: `BadCheckpoint`, and
nothing is written.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from paramend.disk.copying import WriteBack
from paramend.disk.io import get, get_into, put
from paramend.disk.publishing import sync_folder
from paramend.errors import BadCheckpoint, Busy, CannotRead
from paramend.journal import claims
from paramend.leaves.specs import Array

MAGIC = b"PMUNDO1\n"
# Bytes that are read and written at once.
BUFFER = 1 << 20
PARTIAL, PENDING, DONE = "partial", "pending", "done"
_NAME = re.compile(r"([0-9]{6,18})\.(partial|pending|done)")
_FRAME = struct.Struct("<4sQ")
_COUNT = struct.Struct("<Q")
_DIGEST = 32
# Of a file with more free bytes than the first, so many samples of so many bytes are its witness.
_WITNESSED, _SAMPLES, _SAMPLE = 1 << 22, 128, 4096
# HEAD and FILE frames are held in memory: no record of ours has larger ones.
_MAX_TEXT = 1 << 30


def store_of(path: Path) -> Path:
    """The folder of the undo records of a checkpoint, which need not exist.

    >>> print(store_of(Path("models/model.safetensors")))
    models/.model.safetensors.undo
    """
    return path / ".undo" if path.is_dir() else path.with_name(f".{path.name}.undo")


def lock_of(store: Path) -> Path:
    """The lock file of a folder of records."""
    return store / "lock"


def records(store: Path, *states: str) -> list[Path]:
    """The records of a folder in these states, the oldest first.

    Raises:
        CannotRead: there is no permission to look.
    """
    found: list[tuple[int, Path]] = []
    try:
        for path in () if store.is_symlink() else store.iterdir():  # no store of ours is a link
            match = _NAME.fullmatch(path.name)
            if match and match[2] in states:
                found.append((int(match[1]), path))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except PermissionError:
        folder = store if os.access(store.parent, os.R_OK | os.X_OK) else store.parent
        why = ", so nobody can say whether a patch was cut short" if folder == store else ""
        raise CannotRead(f"{folder}: no permission to read it{why}", hint=f"ls -ld {folder}") from None
    return [path for _, path in sorted(found)]


def records_beside(files: Iterable[Path], *, refuses: bool = False) -> list[Path]:
    """The records of all patches of some files, and of the folders that these lie in.

    Args:
        files: the files.
        refuses: whether one that is being made, or was cut short, is an error.

    Raises:
        Busy: there is such a one.
    """
    found = []
    for folder in {path.parent for path in files}:
        with contextlib.suppress(OSError):
            stores = [Path(entry.path) for entry in os.scandir(folder) if entry.name.endswith(".undo")]
            found += [record for store in stores for record in records(store, PENDING, DONE)]
    for record in found:
        if refuses and record.suffix == f".{PENDING}":
            raise Busy(
                f"{record.parent.parent}: a patch of it is being made at this moment ({record}); nothing was written",
                hint="try again when it is done",
            )
    return sorted(found)


def next_path(store: Path) -> Path:
    """The name of a record that is about to be written."""
    last = records(store, PARTIAL, PENDING, DONE)
    number = int(last[-1].stem) + 1 if last else 1
    return store / f"{number:06}.{PARTIAL}"


# ---- what a record says ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class State:
    """How a file can be known again.

    Attributes:
        size: in bytes.
        witness: the digest of samples of bytes that stay.
    """

    size: int
    witness: str


@dataclass(frozen=True)
class Head:
    """What was done, when, to which files.

    Attributes:
        time: seconds since 1970.
        edits: each edit once, as text.
        rows: for each leaf that changed its path and the number of its edit.
        files: the files that changed, relative to the folder of the checkpoint.
        whole: whether they were exchanged for others.
    """

    time: float
    edits: tuple[str, ...]
    rows: tuple[tuple[str, int], ...]
    files: tuple[str, ...]
    whole: bool = False

    def to_bytes(self) -> bytes:
        """As it stands in a record."""
        data = {"time": self.time, "edits": self.edits, "rows": self.rows, "files": self.files}
        if self.whole:
            data["whole"] = True
        return json.dumps(data, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Spans:
    """Byte ranges of files: a table of (row, file, start, stop), one line each.

    Attributes:
        table: int64, four columns.
    """

    table: Array

    @property
    def nbytes(self) -> int:
        """The number of bytes covered."""
        return int((self.table[:, 3] - self.table[:, 2]).sum())

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        for at in range(0, len(self.table), 1 << 14):
            yield from self.table[at : at + (1 << 14)].tolist()

    def pieces(self) -> Iterator[tuple[int, int, int, int]]:
        """The same, no line longer than a buffer."""
        for row, file, start, stop in self:
            for at in range(start, stop, BUFFER):
                yield row, file, at, min(at + BUFFER, stop)


def witness(descriptor: int, size: int, spans: Spans, file: int) -> str:
    """The digest of samples of a file's bytes, taken where no span lies: it stays while these are changed.

    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     spans = Spans(np.array([[0, 0, 2, 4]]))
    ...     before = file.write(b"abcdef"), file.flush(), witness(file.fileno(), 6, spans, 0)
    ...     between = os.pwrite(file.fileno(), b"XY", 2), witness(file.fileno(), 6, spans, 0)
    ...     after = os.pwrite(file.fileno(), b"Z", 1), witness(file.fileno(), 6, spans, 0)
    >>> before[2] == between[1], between[1] == after[1]
    (True, False)
    """
    own = spans.table[spans.table[:, 1] == file]
    own = own[np.argsort(own[:, 2], kind="stable")]
    starts = np.concatenate([np.zeros(1, np.int64), np.maximum.accumulate(own[:, 3])])
    lengths = np.concatenate([own[:, 2], np.full(1, size, np.int64)]) - starts
    starts, lengths = starts[lengths > 0], lengths[lengths > 0]
    ends = np.cumsum(lengths)
    total = int(lengths.sum())
    if total > _WITNESSED:  # windows evenly laid over what is free; the first holds the header
        places = np.linspace(0, total - _SAMPLE, _SAMPLES).astype(np.int64)
        gaps = np.searchsorted(ends, places, "right")
        starts = starts[gaps] + places - (ends - lengths)[gaps]
        lengths = np.minimum(_SAMPLE, ends[gaps] - places)
    digest = hashlib.sha256()
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        for at in range(start, start + length, BUFFER):
            digest.update(os.pread(descriptor, min(BUFFER, start + length - at), at))
    return digest.hexdigest()


# ---- writing -----------------------------------------------------------------------------------------------


def checksum(data: bytes | bytearray | memoryview) -> bytes:
    """What stands for a piece of bytes in a digest. It takes a fifth of the time of SHA-256."""
    return zlib.crc32(data).to_bytes(4, "little")


class Descriptors(Protocol):
    """Open files by number."""

    def __getitem__(self, file: int, /) -> int:
        """The descriptor of a file."""


class Writer:
    """A record that is being written. The file is made when this is."""

    def __init__(self, path: Path, mode: int) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, mode)
        self.nbytes = 0
        self._digests: list[bytes] = []
        self._back = WriteBack(self._descriptor)
        self._put(MAGIC)

    def close(self) -> None:
        """Gives the file back."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def frame(self, kind: bytes, payload: bytes) -> None:
        """Adds a short frame."""
        framed = _FRAME.pack(kind, len(payload)) + payload
        self._put(framed)
        self._end(hashlib.sha256(framed))

    def files(self, states: Sequence[State]) -> None:
        """Adds how the files are now."""
        self.frame(b"FILE", _states_text(states))

    def spans(
        self, spans: Spans, descriptors: Descriptors, names: Sequence[Path], heard: Callable[[int], None]
    ) -> None:
        """Adds the bytes that the files hold now."""
        table = np.ascontiguousarray(spans.table, "<i8")
        head = _FRAME.pack(b"SPAN", _COUNT.size + table.nbytes + spans.nbytes) + _COUNT.pack(len(table))
        rows = table.reshape(-1).view(np.uint8).data
        digest = hashlib.sha256(head)
        digest.update(rows)
        self._put(head)
        self._put(rows)
        # Thousands of short ranges need not be thousands of writes.
        buffer, filled = memoryview(bytearray(BUFFER)), 0
        for _, file, start, stop in spans.pieces():
            count = stop - start
            if filled + count > BUFFER:
                self._put(buffer[:filled])
                filled = 0
            piece = buffer[filled : filled + count]
            get_into(piece, descriptors[file], start, names[file])
            digest.update(piece)
            filled += count
            heard(count)
        self._put(buffer[:filled])
        self._end(digest)

    def become(self, state: str) -> None:
        """Makes all that was written durable, and then gives the record a name that says so."""
        self.sync()
        if state == PENDING:
            claims.seal(self.path.parent, _seal_text(self.path, self._digests))
        new = self.path.with_suffix(f".{state}")
        self.path.rename(new)
        self.path = new
        sync_folder(new.parent)

    def sync(self) -> None:
        """Makes all that was written durable."""
        os.fsync(self._descriptor)

    def _end(self, digest: "hashlib._Hash") -> None:
        self._digests.append(digest.digest())
        self._put(self._digests[-1])

    def _put(self, data: bytes | memoryview | bytearray) -> None:
        put(self._descriptor, data)
        self.nbytes += len(data)
        self._back.advance(len(data))


def _seal_text(path: Path, digests: Sequence[bytes]) -> str:
    """What a record can be known by: its number, and how many frames it has with which digests."""
    return f"{int(path.stem)} {len(digests)} {hashlib.sha256(b''.join(digests)).hexdigest()}"


def _states_text(states: Sequence[State]) -> bytes:
    rows = [{"size": state.size, "witness": state.witness} for state in states]
    return json.dumps(rows, separators=(",", ":")).encode()


def new_head(edits: Sequence[tuple[str, str]], files: Sequence[str], *, whole: bool = False) -> Head:
    """The head of a record of what is done now: (leaf, edit) for each row."""
    numbers: dict[str, int] = {}
    rows = tuple((path, numbers.setdefault(edit, len(numbers))) for path, edit in edits)
    return Head(time.time(), tuple(numbers), rows, tuple(files), whole)


# ---- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Frame:
    kind: bytes
    start: int  # of the payload
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length + _DIGEST


class Record:
    """A record that was written before, opened for reading. `head` is checked at once, old bytes by `check`.

    Attributes:
        path: of the record.
        number: the higher, the later.
        state: "pending" or "done".
        nbytes: its size.
        head: what was done.

    Raises:
        BadCheckpoint: it is damaged, or no record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = int(path.stem)
        self.state = path.suffix[1:]
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            raise CannotRead(f"{path}: {error.strerror}") from None
        try:
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise self.damaged("it is no regular file")  # noqa: TRY301
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
        """Gives the file back."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def damaged(self, reason: str) -> BadCheckpoint:
        """The error for a record that does not keep the format."""
        return BadCheckpoint(
            f"{self.path}: the undo record is damaged: {reason}; nothing was written",
            hint="paramend undo PATH --drop forgets all undo records of PATH",
        )

    @cached_property
    def states(self) -> tuple[State, ...]:
        """How the files were when they were seen last before old bytes went back."""
        for frame in reversed(self._frames):
            if frame.kind == b"FILE":
                rows = self._json(frame)
                try:
                    found = tuple(State(int(row["size"]), str(row["witness"])) for row in rows)
                except (TypeError, KeyError, ValueError):
                    raise self.damaged("what it says of the files makes no sense") from None
                if len(found) == len(self.head.files):
                    return found
        raise self.damaged("it does not say how the files were")

    @cached_property
    def spans(self) -> Spans:
        """All ranges that are recorded."""
        frame = self._frames[2]
        (count,) = _COUNT.unpack(get(self._descriptor, frame.start, _COUNT.size, self.path))
        if count > (frame.length - _COUNT.size) // 32:
            raise self.damaged("its table of ranges is cut short")
        data = get(self._descriptor, frame.start + _COUNT.size, count * 32, self.path)
        table = np.frombuffer(data, "<i8").reshape(count, 4)
        row, file, start, stop = table.T
        sound = (row >= -1) & (row < len(self.head.rows)) & (file >= 0) & (file < len(self.head.files))
        sound &= (start >= 0) & (start <= stop) & (stop - start <= frame.length)  # so that the sum cannot overflow
        if not sound.all() or _COUNT.size + table.nbytes + sum((stop - start).tolist()) != frame.length:
            raise self.damaged("its table of ranges makes no sense")
        return Spans(table)

    def check(self) -> None:
        """Reads all of the record.

        Raises:
            BadCheckpoint: a digest does not fit.
        """
        frame = self._frames[2]
        digest = hashlib.sha256(get(self._descriptor, frame.start - _FRAME.size, _FRAME.size + _COUNT.size, self.path))
        digest.update(np.ascontiguousarray(self.spans.table).reshape(-1).view(np.uint8).data)
        for _, _, _, data in self.old_bytes():
            digest.update(data)
        if digest.digest() != self._digest_of(frame):
            raise self.damaged("the old bytes do not fit their checksums")

    def old_bytes(self) -> Iterator[tuple[int, int, int, memoryview]]:
        """(row, file, start, bytes), no piece longer than a buffer, which the next piece fills again."""
        at = self._frames[2].start + _COUNT.size + self.spans.table.nbytes
        buffer = memoryview(bytearray(BUFFER))
        for row, file, start, stop in self.spans.pieces():
            view = buffer[: stop - start]
            get_into(view, self._descriptor, at, self.path)
            yield row, file, start, view
            at += stop - start

    @cached_property
    def after(self) -> list[bytes]:
        """The digests of the new bytes of each row and of what the format keeps true, of a record that is done; of
        files that were exchanged whole, those of each file."""
        for frame in self._frames:
            if frame.kind == b"DONE":
                data = self._payload(frame)
                if len(data) != _DIGEST * (len(self.head.files) if self.head.whole else len(self.head.rows) + 1):
                    raise self.damaged("the digests of the new bytes are incomplete")
                return [bytes(data[at : at + _DIGEST]) for at in range(0, len(data), _DIGEST)]
        raise self.damaged("it is cut short")

    def note(self, states: Sequence[State]) -> None:
        """Adds how the files are now, durably."""
        payload = _states_text(states)
        framed = _FRAME.pack(b"FILE", len(payload)) + payload
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            end = self._frames[-1].stop
            os.ftruncate(descriptor, end)  # a note that was cut short
            put(descriptor, framed + hashlib.sha256(framed).digest(), end)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def become_pending(self) -> Path:
        """Its new path: old bytes are about to be written, and whoever is cut short, another finishes."""
        with Record(self.path) as noted:  # with what was added to it
            claims.seal(self.path.parent, _seal_text(self.path, [noted._digest_of(frame) for frame in noted._frames]))
        new = self.path.with_suffix(f".{PENDING}")
        self.path.rename(new)
        sync_folder(new.parent)
        return new

    def is_own(self) -> bool:
        """Whether this user made it pending here, as it is, if `check` is content with its old bytes.

        What was added to it since then does not count any more.
        """
        said = claims.read(self.path.parent) or ""
        match = re.fullmatch(r"[0-9]+ ([0-9]{1,9}) [0-9a-f]{64}", said)
        if match is None:
            return False
        self._frames = self._frames[: int(match[1])]
        return said == _seal_text(self.path, [self._digest_of(frame) for frame in self._frames])

    # -- how

    def _digest_of(self, frame: _Frame) -> bytes:
        return bytes(get(self._descriptor, frame.stop - _DIGEST, _DIGEST, self.path))

    def _read_frames(self) -> list[_Frame]:
        head = os.pread(self._descriptor, len(MAGIC), 0)
        if head != MAGIC:
            newer = head[:6] == MAGIC[:6] and len(head) == len(MAGIC)
            raise self.damaged("a newer Paramend wrote it" if newer else "it does not begin as one")
        found: list[_Frame] = []
        at = len(MAGIC)
        while at < self.nbytes:
            raw = os.pread(self._descriptor, _FRAME.size, at)
            if len(raw) < _FRAME.size:
                break
            kind, length = _FRAME.unpack(raw)
            frame = _Frame(kind, at + _FRAME.size, length)
            if kind not in {b"HEAD", b"FILE", b"SPAN", b"DONE"} or frame.stop > self.nbytes:
                break
            # Old bytes are many, and `check` reads them when they are needed.
            if (length > _MAX_TEXT or not self._fits(frame)) if kind != b"SPAN" else length < _COUNT.size:
                break
            found.append(frame)
            at = frame.stop
        kinds = [frame.kind for frame in found]
        needed = [b"HEAD", b"FILE", b"SPAN"] + [b"DONE"] * (self.state == DONE)
        if kinds[: len(needed)] != needed or b"SPAN" in kinds[3:]:
            raise self.damaged(f"byte {at:,} is where a frame ends or does not fit its checksum")
        return found

    def _fits(self, frame: _Frame) -> bool:
        digest = hashlib.sha256()
        start = frame.start - _FRAME.size
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
            raise self.damaged(f"the {frame.kind.decode()} frame is no JSON") from None

    def _read_head(self) -> Head:
        data = self._json(self._frames[0])
        try:
            head = Head(
                float(data["time"]),
                tuple(map(str, data["edits"])),
                tuple((str(path), int(edit)) for path, edit in data["rows"]),
                tuple(map(str, data["files"])),
                data.get("whole") is True,
            )
        except (TypeError, KeyError, ValueError):
            raise self.damaged("its head makes no sense") from None
        if not all(0 <= edit < len(head.edits) for _, edit in head.rows) or not head.files:
            raise self.damaged("its head makes no sense")
        for name in head.files:
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\0" in name:
                raise self.damaged(f"it names a file outside the checkpoint: {name!r}")
        return head
