"""Whole reads and writes: the system may take or give less than was asked for, and says so only by a count.

Every byte of an output goes through `put`, but for those that the kernel copies by itself (`paramend.disk.copying`).
"""

import errno
import os
from pathlib import Path

from paramend.errors import BadCheckpoint

Bytes = bytes | bytearray | memoryview

_STEP = 1 << 26  # some systems refuse, or cut, what is larger than 2 GB


def put(descriptor: int, data: Bytes, at: int | None = None) -> int:
    """The number of bytes written: all of them, at an offset or where the file stands.

    Raises:
        OSError: the system wrote nothing, or said why not.

    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     put(file.fileno(), b"abcd"), put(file.fileno(), b"XY", 1), bytes(get(file.fileno(), 0, 4, Path("file")))
    (4, 2, b'aXYd')
    """
    view, done = memoryview(data).cast("B"), 0
    while done < len(view):
        piece = view[done : done + _STEP]
        count = os.write(descriptor, piece) if at is None else os.pwrite(descriptor, piece, at + done)
        if count <= 0:
            raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
        done += count
    return done


def get(descriptor: int, start: int, count: int, name: Path) -> bytearray:
    """So many bytes of a file.

    Raises:
        BadCheckpoint: the file ends before.
    """
    data = bytearray(count)
    get_into(memoryview(data), descriptor, start, name)
    return data


def get_into(view: memoryview, descriptor: int, start: int, name: Path) -> None:
    """Fills memory with the bytes of a file.

    Raises:
        BadCheckpoint: the file ends before.
    """
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + _STEP]], start + done)
        if not count:
            raise shrunk(name)
        done += count


def shrunk(path: Path) -> BadCheckpoint:
    """The error for a file that lost bytes while it was being read."""
    return BadCheckpoint(f"{path}: the file became shorter while it was being read")


def write_file(path: Path, data: Bytes) -> None:
    """Writes a whole file, whatever it held before. It is not yet durable."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        put(descriptor, data)
    finally:
        os.close(descriptor)
