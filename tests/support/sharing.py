"""A stand-in for a file system that shares blocks, and what the real ones say of a file."""

import errno
import fcntl
import os
import struct

from paramend.disk.copying import BLOCK

_CLONE, _FIEMAP = 0x4020940D, 0xC020660B
_SHARED = 0x2000


class Kernel:
    """Answers requests to share blocks as XFS and btrfs do: whole blocks within the source, or an error.

    Attributes:
        asked: the number of requests.
        shared: (start in the source, number of bytes, start in the target) of those that were granted.
        refuses: the number of the error with which all are refused; 0 if they are granted.
        after: if not None, how many are granted before the others are refused.
    """

    def __init__(self, monkeypatch, refuses=0, after=None):
        self.asked, self.shared, self.refuses, self.after = 0, [], refuses, after
        real = fcntl.ioctl
        monkeypatch.setattr(
            fcntl, "ioctl", lambda fd, number, *args: (self if number == _CLONE else real)(fd, number, *args)
        )

    def __call__(self, target, number, data):
        self.asked += 1
        source, start, count, at = struct.unpack("qQQQ", data)
        wrong = start % BLOCK or count % BLOCK or at % BLOCK or not count or start + count > os.fstat(source).st_size
        number = self.refuses or (errno.EINVAL if wrong or self.after == len(self.shared) else 0)
        if number:
            raise OSError(number, os.strerror(number))
        view, done = os.pread(source, count, start), 0
        while done < count:
            done += os.pwrite(target, view[done:], at + done)
        self.shared.append((start, count, at))
        return bytes(data)


def own_nbytes(path):
    """The bytes of the blocks that a file shares with no other, as the file system says."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        found = at = 0
        while True:
            # struct fiemap with room for 100 of struct fiemap_extent
            data = bytearray(struct.pack("QQIIII", at, 1 << 62, 1, 0, 100, 0) + bytes(56 * 100))
            fcntl.ioctl(file.fileno(), _FIEMAP, data)
            (count,) = struct.unpack_from("I", data, 20)
            for n in range(count):
                start, _, length, flags = struct.unpack_from("QQQ16xI", data, 32 + 56 * n)
                found += 0 if flags & _SHARED else length
                at = start + length
                if flags & 1:  # the last
                    return found
            if not count:
                return found
