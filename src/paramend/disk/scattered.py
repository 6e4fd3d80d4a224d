"""Many short ranges of a file, read and written with few calls of the system."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paramend.disk.io import Bytes, get, get_into, put

Array = np.ndarray[Any, Any]

# Ranges with smaller gaps, a page at most, are read together: a call costs more than the bytes between them.
_NEAR = 4096
# The bytes that are read together at most, beside those of the last range.
_SPAN = 1 << 20
# Ranges of fewer bytes on average are copied by their indices, others one by one.
_SHORT = 64
# So many ranges of one leaf are written together with what is between them. The system writes whole pages anyway.
_MANY = 1 << 10


def gather(descriptor: int, ranges: Array, name: Path) -> bytearray:
    """The bytes of ranges (start, stop) of a file, one after the other; `BadCheckpoint` if it is shorter."""
    data = bytearray(int((ranges[:, 1] - ranges[:, 0]).sum()))
    view = memoryview(data)
    for at, end, group in _groups(ranges, None):
        if len(group) == 1:
            get_into(view[at:end], descriptor, int(group[0, 0]), name)
        else:
            window = get(descriptor, int(group[0, 0]), int(group[-1, 1] - group[0, 0]), name)
            _copy(memoryview(window), view[at:end], group, out=True)
    return data


def scatter(descriptor: int, ranges: Array, data: Bytes, name: Path, leaves: Array | None = None) -> None:
    """Write bytes into ranges (start, stop) of a file: the first into the first, and so on. `leaves` has the leaf of
    each range. If there are thousands, those of one leaf that are less than a page apart are written together with the
    bytes between them, which stay."""
    view = memoryview(data).cast("B")
    apart = np.flatnonzero(ranges[1:, 0] != ranges[:-1, 1]) + 1
    if len(apart) + 1 < len(ranges):  # some touch
        first = np.append(0, apart)
        ranges = np.stack([ranges[first, 0], ranges[np.append(apart, len(ranges)) - 1, 1]], 1)
        leaves = None if leaves is None else leaves[first]
    if leaves is None or len(ranges) < _MANY:
        at = 0
        for start, stop in ranges.tolist():
            at += put(descriptor, view[at : at + stop - start], start)
        return
    for at, end, group in _groups(ranges, leaves):
        if len(group) == 1:
            put(descriptor, view[at:end], int(group[0, 0]))
        else:
            window = get(descriptor, int(group[0, 0]), int(group[-1, 1] - group[0, 0]), name)
            _copy(memoryview(window), view[at:end], group, out=False)
            put(descriptor, window, int(group[0, 0]))


def _groups(ranges: Array, leaves: Array | None) -> Iterator[tuple[int, int, Array]]:
    """Ranges that are near each other and ascend: (start, stop) of their bytes among those of all, the ranges."""
    if not len(ranges):
        return
    starts, stops = ranges[:, 0], ranges[:, 1]
    apart = (starts[1:] < stops[:-1]) | (starts[1:] - stops[:-1] >= _NEAR)
    apart |= starts[1:] // _SPAN > starts[:-1] // _SPAN
    if leaves is not None:
        apart |= leaves[1:] != leaves[:-1]
    first = [0, *(np.flatnonzero(apart) + 1).tolist(), len(ranges)]
    ends = np.append(0, np.cumsum(stops - starts))[first].tolist()
    for low, high, at, end in zip(first, first[1:], ends, ends[1:], strict=False):
        yield at, end, ranges[low:high]


def _copy(window: memoryview, data: memoryview, ranges: Array, *, out: bool) -> None:
    lengths = ranges[:, 1] - ranges[:, 0]
    ends = np.cumsum(lengths)
    shift = ranges[:, 0] - ranges[0, 0] - (ends - lengths)
    if len(data) < _SHORT * len(ranges):
        indices = np.repeat(shift, lengths) + np.arange(len(data))
        here, there = np.frombuffer(window, np.uint8), np.frombuffer(data, np.uint8)
        if out:
            there[:] = here[indices]
        else:
            here[indices] = there
        return
    for at, end, off in zip((ends - lengths).tolist(), ends.tolist(), shift.tolist(), strict=True):
        if out:
            data[at:end] = window[at + off : end + off]
        else:
            window[at + off : end + off] = data[at:end]
