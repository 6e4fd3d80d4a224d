"""Whole reads and writes: the system may read or write less than it was asked to, and reports only a count.

Every byte of an output goes through `put`, except those that the kernel copies (`paramend.disk.copying`).
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from paramend.errors import BadCheckpoint

Bytes = bytes | bytearray | memoryview


class Remote(Protocol):
    """An object in a remote store, open for reading, where a descriptor is expected."""

    @property
    def stat(self) -> os.stat_result:
        """What `os.fstat` says of a file."""

    def read_into(self, view: memoryview, start: int) -> None:
        """Fill a view with bytes from an offset."""

    def close(self) -> None:
        """Drop what was fetched."""


Readable = int | Remote

_STEP = 1 << 26  # some systems refuse or truncate more than 2 GB


def put(descriptor: int, data: Bytes, at: int | None = None) -> int:
    """The number of bytes written: all, at an offset or the position of the file; `OSError` if the system refused."""
    view, done = memoryview(data).cast("B"), 0
    while done < len(view):
        piece = view[done : done + _STEP]
        count = os.write(descriptor, piece) if at is None else os.pwrite(descriptor, piece, at + done)
        if count <= 0:
            raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
        done += count
    return done


def get(descriptor: Readable, start: int, count: int, name: Path) -> bytearray:
    """`count` bytes of a file; `BadCheckpoint` if it is shorter."""
    data = bytearray(count)
    get_into(memoryview(data), descriptor, start, name)
    return data


def get_into(view: memoryview, descriptor: Readable, start: int, name: Path) -> None:
    """Fill a buffer with bytes of a file; `BadCheckpoint` if it is shorter."""
    if not isinstance(descriptor, int):
        descriptor.read_into(view, start)
        return
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + _STEP]], start + done)
        if not count:
            raise shrunk(name)
        done += count


def shrunk(path: Path) -> BadCheckpoint:
    """The error for a file that became shorter while it was being read."""
    return BadCheckpoint(f"{path}: the file became shorter while it was being read")


def release(descriptor: Readable, system: Any = os, ignoring: Any = contextlib.suppress) -> None:
    """Close a file that was only read, or whose content is durable: what the system says then changes nothing."""
    with ignoring(OSError):  # arguments: as Python ends, names of modules are gone before what they opened
        system.close(descriptor) if isinstance(descriptor, int) else descriptor.close()


def status_of(descriptor: Readable) -> os.stat_result:
    """What the system, or a store, says of an open file."""
    return os.fstat(descriptor) if isinstance(descriptor, int) else descriptor.stat


@contextlib.contextmanager
def reading(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """The descriptor of a file or a folder, open for reading; a new one is private."""
    descriptor = os.open(path, os.O_CLOEXEC | flags, 0o600)
    try:
        yield descriptor
    finally:
        release(descriptor)


def writing(path: Path, flags: int = 0) -> contextlib.AbstractContextManager[int]:
    """The descriptor of a file, open for writing."""
    return reading(path, os.O_WRONLY | os.O_NOFOLLOW | flags)


@contextlib.contextmanager
def durable(path: Path, flags: int = 0) -> Iterator[int]:
    """The descriptor of a file, open for writing, whose content is durable in the end."""
    with writing(path, flags) as descriptor:
        yield descriptor
        os.fsync(descriptor)


def write_file(path: Path, data: Bytes) -> None:
    """Write a whole file, over whatever it held before. It is not yet durable."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        put(descriptor, data)
    finally:
        os.close(descriptor)
