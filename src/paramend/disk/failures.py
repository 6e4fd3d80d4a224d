"""Failures: why the system refuses to write, as errors of the library."""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from paramend.errors import CannotWrite, ParamendError
from paramend.reports import wording

# What a part of the work says of itself may not hold of the whole.
_NOTHING = re.compile("; nothing was (changed|written)$")

# What is reported where a system or a file system lacks a call.
UNSUPPORTED = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})

ELSEWHERE = "write a new file instead: -o OUT"


@contextlib.contextmanager
def explained(base: Path) -> Iterator[None]:
    """Raise errors of the system as errors of the library."""
    try:
        yield
    except ParamendError:
        raise
    except OSError as error:
        hint = ELSEWHERE if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS} else ""
        where = f" ({error.filename})" if error.filename else ""
        raise CannotWrite(f"{base}: {reason(error)}{where}; nothing was changed", hint=hint) from error


def reason(error: BaseException) -> str:
    """Why something failed, in a few words."""
    words = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
    if isinstance(error, OSError) and not isinstance(error, ParamendError):
        return words.get(error.errno or 0) or error.strerror or str(error)
    return _NOTHING.sub("", str(error).split("\n", maxsplit=1)[0]) or type(error).__name__


def linked(path: Path) -> CannotWrite:
    """The error for a symbolic link."""
    what = "a symbolic link, as in a hub cache, and its target may be shared"
    return CannotWrite(f"{path} is {what}; nothing was changed", hint=ELSEWHERE)


def check_regular(file: Path, status: os.stat_result, *, shows: str) -> None:
    """Raise `CannotWrite` for what is no regular file, or has other names: a change of it `shows` under them."""
    if not stat.S_ISREG(status.st_mode):
        raise CannotWrite(f"{file} is not a regular file; nothing was changed")
    if status.st_nlink > 1:
        what = f"{file} has {status.st_nlink} names (hard links), and a change would show under {shows}"
        raise CannotWrite(f"{what}; nothing was changed", hint=ELSEWHERE)


def check_room(folder: Path, nbytes: int, what: str, *, hint: str = "") -> None:
    """Raise `CannotWrite` if a disk has too little room."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if disk.f_blocks and free < nbytes:  # some network file systems report no blocks at all
        there = f"{wording.size(free)} are free in {folder}"
        raise CannotWrite(f"{what} needs {wording.size(nbytes)}, and {there}; nothing was written", hint=hint)
