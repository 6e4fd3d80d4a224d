"""Copies of byte ranges from file to file by the kernel, written back to the disk as they go.

Extents are shared on file systems that can (XFS, btrfs and others), in whole blocks: such a copy takes no room. So a
range is shared as far as its copy keeps its place within a block.
"""

import ctypes
import errno
import fcntl
import os
import stat
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from paramend.disk.failures import UNSUPPORTED
from paramend.disk.io import Readable, get, put, shrunk

# The block of nearly all such file systems. Where it is larger, the system refuses, and bytes are copied.
BLOCK = 4096
# Shorter runs are written: to share one takes the system as long, and cuts both files into small extents.
_LEAST = 4 * BLOCK
# Of Linux; Python has it under this name from 3.12 on.
_CLONE = getattr(fcntl, "FICLONERANGE", 0x4020940D)


def shareable(start: int, stop: int, at: int) -> tuple[int, int]:
    """The bytes of a range, as (start, stop), that its copy, which begins `at` a byte of its own file, can share: whole
    blocks, or none, as (stop, stop).

    >>> shareable(100, 50_000, 100 + 5 * BLOCK), shareable(100, 50_000, 101)
    ((4096, 49152), (50000, 50000))
    """
    low, high = -(-start // BLOCK) * BLOCK, stop // BLOCK * BLOCK
    return (low, high) if (start - at) % BLOCK == 0 and high - low >= _LEAST else (stop, stop)


def best_start(ranges: Iterable[tuple[int, int, int]], least: int, step: int) -> int:
    """Where a section of a file should begin so that most of its bytes can be shared: the first such place from `least`
    on, in steps of a divisor of the block. Ranges are (start, stop, where the copy begins within the section)."""
    gains = Counter({least % BLOCK: 0})
    for start, stop, at in ranges:
        low, high = shareable(start, stop, start)
        if (start - at - least) % step == 0:
            gains[(start - at) % BLOCK] += high - low
    return least + min((-gain, (place - least) % BLOCK) for place, gain in gains.items())[1]


def share(source: int, target: int, start: int, count: int) -> bool:
    """Append whole blocks of a file to another by sharing them; False, with nothing done, if the system refuses."""
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _CLONE, struct.pack("qQQQ", source, start, count, os.lseek(target, 0, os.SEEK_CUR)))
    except OSError:  # whatever the reason, a copy comes instead, and meets it again if it is a disk that is full
        return False
    os.lseek(target, count, os.SEEK_CUR)
    return True


# Bytes that the kernel copies at once: between windows, progress is reported and Ctrl-C takes effect.
WINDOW = 1 << 25
_BUFFER = 1 << 20


class Copier:
    """Appends ranges of files to other files in the fastest way that works here; a failed way is not tried again."""

    def __init__(self) -> None:
        self.shared = 0  # of the bytes copied so far, those that a source and its copy share
        self._apart: set[Path] = set()  # sources whose bytes cannot be shared
        self._ways = [way for call, way in _WAYS.items() if hasattr(os, call)]

    def copy(self, source: Readable, target: int, start: int, stop: int, *, path: Path) -> Iterator[int]:
        """Append bytes, shared where they can be, and yield the number of each step; `BadCheckpoint` for too few."""
        if not isinstance(source, int):
            for at in range(start, stop, _BUFFER):
                yield put(target, get(source, at, min(_BUFFER, stop - at), path))
            return
        low = high = stop
        if path not in self._apart and is_regular(target):
            low, high = shareable(start, stop, os.lseek(target, 0, os.SEEK_CUR))
        yield from self._copied(source, target, start, low, path)
        while low < high:
            count = min(high - low, WINDOW)
            if not share(source, target, low, count):
                self._apart.add(path)
                break
            low, self.shared = low + count, self.shared + count
            yield count
        yield from self._copied(source, target, low, stop, path)

    def _copied(self, source: int, target: int, start: int, stop: int, path: Path) -> Iterator[int]:
        while start < stop:
            count = self._step(source, target, start, min(stop - start, WINDOW), path)
            start += count
            yield count

    def _step(self, source: int, target: int, start: int, count: int, path: Path) -> int:
        while True:
            try:
                copied = self._ways[0](source, target, start, count)
            except OSError as error:
                if len(self._ways) == 1 or error.errno not in _NOT_THIS_WAY:
                    raise
            else:
                if copied:
                    return copied
                if len(self._ways) == 1:
                    raise shrunk(path)
            # Some file systems refuse, and some report 0 bytes where there are bytes: try the next way.
            del self._ways[0]


# Across file systems, on old kernels and on special file systems.
_NOT_THIS_WAY = UNSUPPORTED | {errno.EXDEV, errno.EINVAL, errno.EPERM, errno.EBADF, errno.ENOTSOCK, errno.EOVERFLOW}


# The call of the system that each needs → the way, the fastest first.
_WAYS: dict[str, Callable[[int, int, int, int], int]] = {
    "copy_file_range": lambda source, target, start, n: os.copy_file_range(source, target, n, offset_src=start),
    "sendfile": lambda source, target, start, count: os.sendfile(target, source, start, count),
    "pread": lambda source, target, start, count: put(target, os.pread(source, min(count, _BUFFER), start)),
}


def is_regular(target: int) -> bool:
    """Whether a descriptor is that of a file, not of a pipe to a remote store."""
    return stat.S_ISREG(os.fstat(target).st_mode)


_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4


class WriteBack:
    """Write-back of a growing file to the disk, window by window, so that the final sync has little left to do. Without
    it, a large copy fills the memory with dirty pages. Where the system lacks the call, it does nothing."""

    def __init__(self, target: int, start: int = 0) -> None:
        self._target, self._regular = target, is_regular(target)
        self._done = self._begun = self._at = start

    def advance(self, count: int) -> None:
        self._at += count
        if self._at - self._begun < WINDOW:
            return
        sync = _sync_file_range()
        if sync is None or not self._regular:
            return
        # Start writing the last window, then wait for the one before it, whose pages are no longer needed.
        sync(self._target, self._begun, self._at - self._begun, _WRITE)
        if self._begun > self._done:
            length = self._begun - self._done
            sync(self._target, self._done, length, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            os.posix_fadvise(self._target, self._done, length, os.POSIX_FADV_DONTNEED)
            self._done = self._begun
        self._begun = self._at


def begin_write_back(descriptor: int) -> None:
    """Start writing the dirty pages of a file without waiting, so that the sync that must follow is short."""
    sync = _sync_file_range()
    if sync is not None:
        sync(descriptor, 0, 0, _WRITE)  # to the end


@cache
def _sync_file_range() -> Any:
    """The system call, or None. Its errors do not matter: the final sync reports what went wrong."""
    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (AttributeError, OSError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call if hasattr(os, "posix_fadvise") else None
