"""Extents that files share, on file systems that have them (XFS, btrfs and others): a copy that takes no room.

Such file systems share whole blocks. So a range of bytes is shared as far as the copy keeps its place within a block.
"""

import fcntl
import os
import struct
import sys
from collections import Counter
from collections.abc import Iterable

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
