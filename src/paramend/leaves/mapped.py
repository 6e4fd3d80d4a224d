"""Arrays whose memory is a file: pages that were read can be given back to the system."""

import mmap
from typing import Any

import numpy as np

from paramend.leaves.specs import Array

_AROUND = 1 << 16  # the fault-around of Linux


def mapping(array: Array) -> tuple[mmap.mmap, int] | None:
    """The read-only mapping that holds an array, and the offset of the array; None if there is none."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    base = base.obj if isinstance(base, memoryview) else base
    # A writable mapping may hold values that are not in the file.
    if not isinstance(base, mmap.mmap) or not memoryview(base).readonly or not hasattr(mmap, "MADV_DONTNEED"):
        return None
    origin = np.frombuffer(base, np.uint8).__array_interface__["data"][0]
    return base, array.__array_interface__["data"][0] - origin


def forget(array: Array, start: int, stop: int) -> None:
    """Give back the pages of some rows of a contiguous array in a file; they are read again when they are wanted."""
    found = mapping(array) if array.flags.c_contiguous and array.nbytes else None
    if found is not None:
        pages, at = found
        row = array.nbytes // len(array)
        give_back(pages, at + start * row, (stop - start) * row)


def give_back(pages: mmap.mmap, start: int, nbytes: int) -> None:
    """Give back the pages of a range of bytes of a mapping, and those around it that the system mapped with them."""
    first = max(start - _AROUND, 0)
    first -= first % mmap.PAGESIZE
    pages.madvise(mmap.MADV_DONTNEED, first, min(start + nbytes + _AROUND, len(pages)) - first)
