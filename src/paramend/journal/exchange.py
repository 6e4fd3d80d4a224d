"""Exchange: whole files of a checkpoint replaced by new ones, and the old ones put back.

This is how formats change whose files are never written in place, such as copy-on-write databases, how a folder of
shards gets one more, and how texts beside weights change. The new files are complete and durable in a folder beside the
undo records before the first of them is renamed into place.
"""

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from paramend.disk.failures import ELSEWHERE, check_regular, linked
from paramend.disk.identity import changed, check_unchanged
from paramend.disk.io import durable, get_into, put, reading, release
from paramend.disk.permissions import PRIVATE, Access, access_of, reach, settle
from paramend.disk.publishing import sync_file, sync_folder
from paramend.errors import CannotWrite
from paramend.formats.orbax.store import MANIFEST, may_change
from paramend.journal.ranges import BUFFER, OpenRanges, Ranges, State, checksum, checksums, witness
from paramend.journal.records import PENDING, Moved, Record
from paramend.journal.writer import Edits, Tally, Writer, new_head
from paramend.reports.progress import Meter

STAGED, BACK = "new", "back"
_AS_IT_IS = os.O_NOFOLLOW | os.O_NONBLOCK  # neither what a link leads to, nor waiting for a pipe


class NewFiles:
    """New files that are about to replace those of a checkpoint, staged in a folder, each at its path in the
    checkpoint. The manifest of a database, or the index of shards, comes last among the names: it puts the other files
    into effect."""

    def __init__(self, base: Path, staged: Path | None, moved: Moved = (), *, private: bool = False) -> None:
        """Look at what they replace; without a folder, there are none. With `private`, those that replace nothing stay
        as private as they are."""
        self.staged, self._private = staged or base, private
        inside = staged.rglob("*") if staged else ()
        names = [path.relative_to(self.staged).as_posix() for path in inside if path.is_file()]
        self.base = home = base if base.is_dir() else base.parent
        self.names = sorted(names, key=lambda name: (os.path.lexists(home / name), name))
        self.old = WholeFiles(base, self.names, moved)
        self.old.check()
        self.then = [file.lstat() if os.path.lexists(file) else None for file in self.old.files]

    @property
    def nbytes(self) -> int:
        return sum((self.staged / name).stat().st_size for name in self.names)

    @property
    def access(self) -> Access:
        folder = self.base.stat()
        found = [status for status in self.then if status is not None]
        return access_of(found or [folder]).within(reach(folder))

    def record(self, writer: Writer, edits: Edits, target: OpenRanges, names: Sequence[str], meter: Tally) -> None:
        """Write a record, with (leaf, edit) for each row, up to where it is pending: from then on it can restore all
        files, also those of `target`, which are written in place; until then none changes."""
        states = target.states()
        writer.head(new_head(edits, [*names, *self.names], whole=len(self.names), moved=self.old.moved))
        sizes = [-1 if status is None else status.st_size for status in self.then]
        seen = self.old.witness_of_rest() if self.names else ""
        writer.files([*states, *(State(size, "" if n else seen) for n, size in enumerate(sizes))])
        rows = [(-1, len(names) + n, 0, size) for n, size in enumerate(sizes) if size >= 0]
        ranges = Ranges(np.concatenate([target.ranges.table, np.array(rows, np.int64).reshape(-1, 4)]))
        writer.old_bytes(ranges, [*target.files, *self.old.files], target.descriptors, meter)
        if self.names:
            writer.frame(b"DONE", b"".join(WholeFiles(self.staged, self.names).digests()))
        writer.become(PENDING)

    def exchange(self) -> None:
        for name, file, then in zip(self.names, self.old.files, self.then, strict=True):
            self._replace(name, file, then)
        for old, new in self.old.moved:
            if os.path.lexists(self.base / new):
                raise changed(self.base / new)
            (self.base / old).rename(self.base / new)
        self.old.sync()

    def sync(self) -> None:
        for name in self.names:
            sync_file(self.staged / name)
        for folder in [self.staged, *(path for path in self.staged.rglob("*") if path.is_dir())] if self.names else ():
            sync_folder(folder)

    def _replace(self, name: str, file: Path, then: os.stat_result | None) -> None:
        if (then is not None) != os.path.lexists(file):
            raise changed(file)
        if then is None:
            for folder in reversed([file.parent, *file.parent.parents]):  # as open as that of the checkpoint
                if folder.is_relative_to(self.base) and not folder.is_dir():
                    folder.mkdir(PRIVATE)
                    settle(folder, access_of([folder.parent.stat()]))
            new = self.staged / name
            access = access_beside(file)
            settle(new, access.within(new.stat().st_mode) if self._private else access)
        else:
            check_unchanged(file, then, file.lstat())
            settle(self.staged / name, access_of([then], then))
        (self.staged / name).rename(file)


def access_beside(file: Path) -> Access:
    """The access of a new file of a checkpoint: what the files beside it all allow, or else its folder."""
    with os.scandir(file.parent) as inside:
        found = [each.stat(follow_symlinks=False) for each in inside if each.is_file(follow_symlinks=False)]
    return access_of(found or [file.parent.stat()]).within(0o666)


class WholeFiles:
    """Files of a checkpoint that a patch replaces, or has replaced, whole; `first` is the number of the first of them
    in records. Files that are `moved` get another name once the others are in place; their content stays."""

    def __init__(self, base: Path, names: Sequence[str], moved: Moved = (), first: int = 0) -> None:
        self.alone = not base.is_dir()  # a checkpoint that is a file, and not all that is beside it
        self.base = base.parent if self.alone else base
        self.names, self.moved, self.first = names, moved, first
        self.files = [self.base / name for name in names]

    def check(self) -> None:
        for file in (*self.files, *(self.base / name for pair in self.moved for name in pair)):
            check_replaceable(self.base, file)

    def digests(self) -> list[bytes]:
        return [_digest_of(file) for file in self.files]

    def changed_since(self, record: Record) -> list[str]:
        """The names of those that no longer hold what the patch of a record wrote."""
        self.check()
        both = zip(self.names, self.digests(), record.new_files, strict=True)
        differ = [name for name, now, new in both if now != new]
        differ += [name for name, there in self._there() if there != (name in dict(self.moved).values())]
        return differ or ([] if self._rest_is_same(record) else ["what the patch left alone"])

    def compared(self, record: Record) -> tuple[bool, str]:
        """(whether a file is not the old one of a pending record, the first that is neither old nor new)."""
        self.check()
        new, old, now = record.new_files, self._old_digests(record), self.digests()
        strange = [name for n, name in enumerate(self.names) if now[n] not in (new[n], old[n])]
        changed = now != old or any(there != (name in dict(self.moved)) for name, there in self._there())
        if changed and not strange and not self._rest_is_same(record):
            strange = ["the checkpoint"]
        return changed, "".join(strange[:1])

    def put_back(self, record: Record, meter: Meter, *, force: bool) -> list[str]:
        """Replace the new files of a pending record by the old ones, durably. Files that are neither, which another
        program put there, are replaced only with `force`; the names of those that were left alone are returned."""
        self.check()
        new, old, now = record.new_files, self._old_digests(record), self.digests()
        states = record.states[self.first :]
        wanted = {n for n in range(len(self.names)) if now[n] != old[n] and (force or now[n] == new[n])}
        left = [name for n, name in enumerate(self.names) if now[n] != old[n] and n not in wanted]
        for before, after in self.moved:  # first: readers that look for the old name see the old state again
            there = [os.path.lexists(self.base / name) for name in (before, after)]
            if there == [False, True]:
                (self.base / after).rename(self.base / before)
            elif there != [True, False]:
                left.append(before)
        scratch = record.path.with_suffix(f".{BACK}")
        for n, batches in groupby(record.old_bytes(), key=lambda batch: batch[0] - self.first):
            if n in wanted:
                _write_file(scratch, (data for _, _, data in batches))
                meter.advance(states[n].size)
                self._take_place(scratch, self.names[n])
        for n in sorted(wanted):
            if not states[n].size:
                _write_file(scratch, ())
                self._take_place(scratch, self.names[n])
        # Only now: whatever remains of the old state never needed these.
        for n in sorted(wanted):
            if states[n].size < 0:
                self._take_away(self.names[n])
        self.sync()
        return left

    def sync(self) -> None:
        """Make the names durable, including those of folders that were created for them."""
        folders = {self.base}
        for file in self.files:
            folders |= {folder for folder in file.parents if folder.is_relative_to(self.base)}
        for folder in folders:
            if folder.is_dir():
                sync_folder(folder)

    def witness_of_rest(self) -> str:
        """The digest of what a patch leaves alone: names and sizes of the other chunks, and samples of their bytes. ""
        for a file, and for a database: its manifest, which is among the replaced files, identifies it."""
        if MANIFEST in self.names or self.alone:
            return ""
        mine, rest = set(self.names), []
        for folder, _, inside in os.walk(self.base):
            for file in inside:
                name = Path(folder, file).relative_to(self.base).as_posix()
                if name not in mine and may_change(self.base, name):
                    rest.append(name)
        rest.sort()
        digest = hashlib.sha256()
        for name in rest:
            digest.update(f"{name}\0{(self.base / name).lstat().st_size}\0".encode("utf-8", "surrogateescape"))
        for n in dict.fromkeys(np.linspace(0, len(rest) - 1, 128).astype(int).tolist() if rest else []):
            for piece in _pieces(self.base / rest[n]):
                digest.update(piece)
                break
        for before, after in self.moved:
            digest.update(_witness_of(self.base / (after if os.path.lexists(self.base / after) else before)))
        return digest.hexdigest()

    def _there(self) -> list[tuple[str, bool]]:
        return [(name, os.path.lexists(self.base / name)) for pair in self.moved for name in pair]

    def _rest_is_same(self, record: Record) -> bool:
        return not self.names or self.witness_of_rest() == record.states[self.first].witness

    def _old_digests(self, record: Record) -> list[bytes]:
        found = [_ABSENT if state.size < 0 else hashlib.sha256() for state in record.states[self.first :]]
        for file, lines, data in record.old_bytes():
            digest = found[file - self.first] if file >= self.first else None
            if isinstance(digest, bytes):
                raise record.damaged("it holds bytes of a file that did not exist")
            if digest is not None:
                digest.update(checksums(lines, data))
        return [digest if isinstance(digest, bytes) else digest.digest() for digest in found]

    def _take_place(self, file: Path, name: str) -> None:
        with _folder_of(self.base, name, make=True) as (folder, last):
            try:
                now = os.stat(last, dir_fd=folder, follow_symlinks=False)
                settle(file, access_of([now], now))
            except FileNotFoundError:
                settle(file, access_beside(self.base / name))
            os.rename(file, last, dst_dir_fd=folder)

    def _take_away(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), _folder_of(self.base, name) as (folder, last):
            os.unlink(last, dir_fd=folder)
        above, _, _ = name.rpartition("/")
        if above:
            with contextlib.suppress(OSError), _folder_of(self.base, above) as (folder, last):
                os.rmdir(last, dir_fd=folder)  # fails if the folder is not empty


def check_replaceable(base: Path, file: Path) -> None:
    """Raise if a file cannot be replaced: it is a link, read-only, or not a regular file."""
    folder = file.parent
    while folder != base and folder != folder.parent:
        if folder.is_symlink():
            raise linked(folder)
        folder = folder.parent
    try:
        status = file.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode):
        raise linked(file)
    check_regular(file, status, shows="only one of them")
    for path in file, file.parent:
        if not os.access(path, os.W_OK):
            raise CannotWrite(f"{base}: no permission to write ({path}); nothing was changed", hint=ELSEWHERE)


def _pieces(path: Path) -> Iterator[memoryview]:
    with reading(path, _AS_IT_IS) as descriptor:
        size = os.fstat(descriptor).st_size
        buffer = memoryview(bytearray(min(BUFFER, size)))
        for start in range(0, size, BUFFER):
            view = buffer[: min(BUFFER, size - start)]
            get_into(view, descriptor, start, path)
            yield view


_ABSENT = bytes(32)


def _digest_of(path: Path) -> bytes:
    """The digest of the content of a file, as in a record; zeros if there is no such file."""
    digest = hashlib.sha256()
    try:
        for piece in _pieces(path):
            digest.update(checksum(piece))
    except FileNotFoundError:
        return _ABSENT
    except OSError as error:
        if error.errno not in {errno.ELOOP, errno.EISDIR, errno.ENXIO}:
            raise
        return b"no file"
    return digest.digest()


def _witness_of(path: Path) -> bytes:
    """The size of a file and the digest of samples of it; nothing if there is none."""
    with contextlib.suppress(FileNotFoundError), reading(path, _AS_IT_IS) as descriptor:
        none = Ranges(np.empty((0, 4), np.int64))
        size = os.fstat(descriptor).st_size
        return f"{size}\0{witness(descriptor, size, none, 0, path)}".encode()
    return b""


def _write_file(path: Path, pieces: Iterator[memoryview] | tuple[()]) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    with durable(path, os.O_CREAT | os.O_EXCL) as descriptor:
        for piece in pieces:
            put(descriptor, piece)


@contextlib.contextmanager
def _folder_of(base: Path, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
    """(descriptor of the folder of a file of a checkpoint, the last part of its name). It is opened part by part, so
    that no link leads out of the checkpoint, even one that is created meanwhile."""
    *above, last = name.split("/")
    descriptor = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in above:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, os.fstat(descriptor).st_mode & 0o777, dir_fd=descriptor)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inner = os.open(part, flags, dir_fd=descriptor)
            release(descriptor)
            descriptor = inner
        yield descriptor, last
    finally:
        release(descriptor)
