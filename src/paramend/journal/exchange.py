"""Exchange: whole files of a checkpoint replaced by new ones, and the old ones put back.

This is how formats change whose files are never written in place, such as copy-on-write databases. The new files are
complete and durable in a folder beside the undo records before the first of them is renamed into place.
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

from paramend.disk.failures import ELSEWHERE, linked
from paramend.disk.io import get_into, put
from paramend.disk.publishing import sync_file, sync_folder
from paramend.errors import BadCheckpoint, CannotWrite
from paramend.formats.orbax.store import MANIFEST, may_change
from paramend.journal.ranges import BUFFER, Ranges, State, checksum
from paramend.journal.records import DONE, PENDING, Record
from paramend.journal.writer import Writer, new_head

STAGED, BACK = "new", "back"


def exchange(base: Path, staged: Path, writer: Writer, edits: Sequence[tuple[str, str]]) -> int:
    """The number of bytes of the new files, all files of a folder, which replace those of a checkpoint.

    Args:
        base: the folder of the checkpoint.
        staged: the folder with the new files, each at its path in the checkpoint.
        writer: the writer of the record, which is begun here and done when this ends.
        edits: (leaf, edit) for the record.
    """
    names = [path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()]
    # The manifest of a database comes last: it puts the other files into effect.
    names.sort(key=lambda name: (os.path.lexists(base / name), name))
    whole = WholeFiles(base, names)
    whole.check()
    for name in names:
        sync_file(staged / name)
    for folder in [staged, *(path for path in staged.rglob("*") if path.is_dir())]:
        sync_folder(folder)
    sizes = [file.lstat().st_size if os.path.lexists(file) else -1 for file in whole.files]
    rows = [(-1, n, 0, size) for n, size in enumerate(sizes) if size >= 0]
    ranges = Ranges(np.array(rows, np.int64).reshape(-1, 4))
    writer.frame(b"HEAD", new_head(edits, names, whole=True).to_bytes())
    seen = whole.witness_of_rest()
    writer.files([State(size, "" if n else seen) for n, size in enumerate(sizes)])
    with contextlib.closing(_OneOpen(whole.files)) as descriptors:
        writer.old_bytes(ranges, descriptors, whole.files, lambda count: None)
    writer.frame(b"DONE", b"".join(WholeFiles(staged, names).digests()))
    written = sum((staged / name).stat().st_size for name in names)
    writer.become(PENDING)
    # Up to here nothing in the checkpoint has changed; from here on the record can restore it.
    for name, file, size in zip(names, whole.files, sizes, strict=True):
        if size >= 0:
            (staged / name).chmod(stat.S_IMODE(file.lstat().st_mode))
        file.parent.mkdir(parents=True, exist_ok=True)
        (staged / name).rename(file)
    whole.sync()
    writer.become(DONE)
    return written


class WholeFiles:
    """Files of a checkpoint that a patch replaces, or has replaced, whole.

    Attributes:
        base: the folder of the checkpoint.
        names: the names of the files, relative to it.
        files: their paths.
    """

    def __init__(self, base: Path, names: Sequence[str]) -> None:
        self.base, self.names = base, names
        self.files = [base / name for name in names]

    def check(self) -> None:
        """Raise if one of them must not be replaced: see `check_replaceable`."""
        for file in self.files:
            check_replaceable(self.base, file)

    def digests(self) -> list[bytes]:
        """The digest of the content of each, as in a record."""
        return [_digest_of(file) for file in self.files]

    def changed_since(self, record: Record) -> list[str]:
        """The names of those that no longer hold what the patch of a record wrote."""
        self.check()
        differ = [name for name, now, new in zip(self.names, self.digests(), record.after, strict=True) if now != new]
        return differ or ([] if self._rest_is_same(record) else ["what the patch left alone"])

    def put_back(self, record: Record, *, force: bool = False) -> bool:
        """Replace the new files of a pending record by the old ones. False if all the old ones are still there.

        Raises:
            BadCheckpoint: a file holds neither the old nor the new content, and `force` is False.
        """
        self.check()
        new, old, now = record.after, _old_digests(record), self.digests()
        strange = [name for n, name in enumerate(self.names) if now[n] not in (new[n], old[n])]
        wanted = {n for n in range(len(self.names)) if now[n] != old[n]}
        if wanted and not strange and not self._rest_is_same(record):
            strange = ["the checkpoint"]
        if strange and not force:
            raise BadCheckpoint(
                f"{self.base}: a patch of it was cut short, and {strange[0]} is not the one that was patched: it has "
                "been replaced since; nothing was written",
                hint=f"paramend undo {self.base} --force puts the old bytes back, "
                f"paramend undo {self.base} --drop forgets them (right for a new download)",
            )
        scratch = record.path.with_suffix(f".{BACK}")
        for n, pieces in groupby(record.old_bytes(), key=lambda piece: piece[1]):
            if n in wanted:
                _write_file(scratch, (data for _, _, _, data in pieces))
                self._take_place(scratch, self.names[n])
        for n in sorted(wanted):
            if not record.states[n].size:
                _write_file(scratch, ())
                self._take_place(scratch, self.names[n])
        # Only now: whatever remains of the old state never needed these.
        for n in sorted(wanted):
            if record.states[n].size < 0:
                self._take_away(self.names[n])
        self.sync()
        return bool(wanted)

    def sync(self) -> None:
        """Make the names durable, including those of folders that were created for them."""
        folders = {self.base}
        for file in self.files:
            folders |= {folder for folder in file.parents if folder.is_relative_to(self.base)}
        for folder in folders:
            if folder.is_dir():
                sync_folder(folder)

    def witness_of_rest(self) -> str:
        """The digest of what a patch leaves alone: names and sizes of the other chunks, and samples of their bytes.

        "" for a database: its manifest, which is among the replaced files, identifies it.
        """
        if MANIFEST in self.names:
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
        return digest.hexdigest()

    def _rest_is_same(self, record: Record) -> bool:
        return self.witness_of_rest() == record.states[0].witness

    def _take_place(self, file: Path, name: str) -> None:
        with _folder_of(self.base, name, make=True) as (folder, last):
            with contextlib.suppress(FileNotFoundError):
                file.chmod(stat.S_IMODE(os.stat(last, dir_fd=folder, follow_symlinks=False).st_mode))
            os.rename(file, last, dst_dir_fd=folder)

    def _take_away(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), _folder_of(self.base, name) as (folder, last):
            os.unlink(last, dir_fd=folder)
        above, _, _ = name.rpartition("/")
        if above:
            with contextlib.suppress(OSError), _folder_of(self.base, above) as (folder, last):
                os.rmdir(last, dir_fd=folder)  # fails if the folder is not empty


def check_replaceable(base: Path, file: Path) -> None:
    """Check that a file can be replaced.

    Raises:
        CannotWrite: it is a link, read-only, or not a regular file. Nothing was changed.
    """
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
    if not stat.S_ISREG(status.st_mode):
        raise CannotWrite(f"{file} is not a regular file; nothing was changed")
    if status.st_nlink > 1:
        raise CannotWrite(
            f"{file} has {status.st_nlink} names (hard links), and a change would show under only one of them; "
            "nothing was changed",
            hint=ELSEWHERE,
        )
    for path in file, file.parent:
        if not os.access(path, os.W_OK):
            raise CannotWrite(f"{base}: no permission to write ({path}); nothing was changed", hint=ELSEWHERE)


# ---- files -------------------------------------------------------------------------------------------------


class _OneOpen:
    """Files by number, with only the last one open for reading: there may be more than a system can open at once."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._now, self._descriptor = -1, -1

    def __getitem__(self, file: int) -> int:
        if file != self._now:
            self.close()
            self._descriptor = os.open(self._files[file], os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self._now = file
        return self._descriptor

    def close(self) -> None:
        descriptor, self._descriptor, self._now = self._descriptor, -1, -1
        if descriptor >= 0:
            os.close(descriptor)


def _pieces(path: Path) -> Iterator[memoryview]:
    """The pieces of a file, which share one buffer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        size = os.fstat(descriptor).st_size
        buffer = memoryview(bytearray(min(BUFFER, size)))
        for start in range(0, size, BUFFER):
            view = buffer[: min(BUFFER, size - start)]
            get_into(view, descriptor, start, path)
            yield view
    finally:
        os.close(descriptor)


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


def _old_digests(record: Record) -> list[bytes]:
    found = [_ABSENT if state.size < 0 else hashlib.sha256() for state in record.states]
    for _, file, _, data in record.old_bytes():
        digest = found[file]
        if isinstance(digest, bytes):
            raise record.damaged("it holds bytes of a file that did not exist")
        digest.update(checksum(data))
    return [digest if isinstance(digest, bytes) else digest.digest() for digest in found]


def _write_file(path: Path, pieces: Iterator[memoryview] | tuple[()]) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for piece in pieces:
            put(descriptor, piece)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _folder_of(base: Path, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
    """(descriptor of the folder of a file of a checkpoint, the last part of its name).

    It is opened part by part, so that no link leads out of the checkpoint, even one that is created meanwhile.
    """
    *above, last = name.split("/")
    descriptor = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in above:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=descriptor)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inner = os.open(part, flags, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor, last
    finally:
        os.close(descriptor)
