"""Locks: one writer at a time on a file, told apart from readers, who are never stopped.

A lock belongs to an open file and ends with it, also when its program is killed: nothing is left to clean up.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from paramend.errors import CannotWrite

_HELD = frozenset({errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK})
_NONE_HERE = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL})


class Busy(CannotWrite):
    """Another program is writing; nothing was changed."""

    code = "busy"


def take(descriptor: int, path: Path) -> None:
    """Takes the lock of an open file, or says who cannot have it. It ends when the file is closed.

    Args:
        descriptor: the open file.
        path: what messages call it.

    Raises:
        Busy: another writer has it.
        CannotWrite: there are no locks on this file system.
    """
    import fcntl  # not everywhere; what only reads runs without it

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise Busy(
                f"{path}: another program is writing to it; nothing was changed",
                hint="try again when it is done, or write a new file: -o OUT",
            ) from None
        if error.errno in _NONE_HERE:
            raise CannotWrite(
                f"{path}: its file system has no locks, so two programs could write at once; nothing was changed",
                hint="write a new file instead: -o OUT",
            ) from None
        raise


@contextlib.contextmanager
def locked(path: Path, *, name: Path) -> Iterator[None]:
    """A lock file, made if need be and held for a while.

    Args:
        path: the lock file.
        name: what messages call the thing that is locked.

    Raises:
        Busy: another writer has it.

    >>> import tempfile
    >>> lock = Path(tempfile.mkdtemp(), "lock")
    >>> with locked(lock, name=Path("model.st")), locked(lock, name=Path("model.st")):
    ...     pass
    Traceback (most recent call last):
    paramend.locks.Busy: model.st: another program is writing to it; nothing was changed
    <BLANKLINE>
    hint: try again when it is done, or write a new file: -o OUT
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            take(descriptor, name)
            # Whoever had it before may have removed the file with the folder: a lock on that one keeps nobody out.
            if _is_still(descriptor, path):
                yield
                return
        finally:
            os.close(descriptor)


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
