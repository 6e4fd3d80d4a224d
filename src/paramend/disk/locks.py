"""Locks: one writer at a time on a file; readers are never blocked.

A lock belongs to an open file and ends with it, even if its program is killed: nothing is left to clean up.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from paramend.disk.failures import ELSEWHERE, UNSUPPORTED, check_regular, linked
from paramend.disk.io import reading, release
from paramend.errors import Busy, CannotRead, CannotWrite

_HELD = frozenset({errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK})
# EBADF: over NFS an exclusive lock needs a file that is open for writing.
_NONE_HERE = UNSUPPORTED | {errno.ENOLCK, errno.EINVAL, errno.EBADF}


def hold(descriptor: int) -> bool:
    """Whether the lock of an open file was taken: some file systems have none; `BlockingIOError` if another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise BlockingIOError(error.errno, error.strerror) from None
        if error.errno in _NONE_HERE:
            return False
        raise
    return True


def take(descriptor: int, path: Path) -> None:
    """Take the lock of an open file until it is closed; `Busy` if another writer has it."""
    try:
        taken = hold(descriptor)
    except BlockingIOError:
        hint = "try again when it is done, or write a new file: -o OUT"
        raise Busy(f"{path}: another program is writing to it; nothing was changed", hint=hint) from None
    if not taken:
        why = "its file system has no locks, so two programs could write at once"
        raise CannotWrite(f"{path}: {why}; nothing was changed", hint=ELSEWHERE)


@contextlib.contextmanager
def locked(path: Path, *, name: Path) -> Iterator[None]:
    """Hold a lock file, created if it does not exist; `Busy` says that `name` is locked if another program holds it."""
    while True:
        mode = path.parent.stat().st_mode & 0o666 | 0o600
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            take(descriptor, name)
            # The previous holder may have removed the file: a lock on a removed file keeps nobody out.
            if _is_still(descriptor, path):
                yield
                return
        finally:
            release(descriptor)


def is_held(path: Path) -> bool:
    """Whether a lock file is locked. It is neither created nor changed."""
    try:
        with reading(path, os.O_NOFOLLOW | os.O_NONBLOCK) as descriptor:
            take(descriptor, path)
    except Busy:
        return True
    except (CannotWrite, OSError):
        pass
    return False


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def opened(files: Sequence[Path], *, lock: bool = True) -> Iterator[list[int]]:
    """Descriptors of files, open for reading and writing, each with its lock."""
    with contextlib.ExitStack() as stack:
        found = []
        for file in files:
            stack.callback(release, descriptor := _open(file))
            check_regular(file, os.fstat(descriptor), shows="all of them")
            if lock:
                take(descriptor, file)
            if not os.path.samestat(os.fstat(descriptor), file.lstat()):
                raise Busy(f"{file}: another program has just replaced it; nothing was changed", hint="try again")
            found.append(descriptor)
        yield found


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CannotRead(f"{file}: there is no such file; nothing was changed") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise linked(file) from None
        raise
