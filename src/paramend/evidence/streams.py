"""`Stream`: the elements of a leaf, piece by piece, from memory or from a file, in buffers that are reused."""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paramend.arrays.registry import backend, to_numpy
from paramend.disk.identity import check_unchanged, status_now, unchanged
from paramend.disk.io import Readable, get_into, release, status_of
from paramend.errors import Unsupported
from paramend.formats.files import open_regular
from paramend.leaves.leaves import Leaves
from paramend.leaves.origins.origin import Extent
from paramend.leaves.specs import BITS, Array, Spec, numpy_dtype

# Bytes read at once: they fit the processor's cache. A multiple of 3, so that elements of 6 bits stay whole.
CHUNK = 3 << 17
_OPEN = 16


@dataclass(frozen=True, slots=True)
class Stream:
    """The elements of a leaf, to be read piece by piece."""

    spec: Spec  # shape and dtype of the leaf
    # The dtype of a piece; None if it holds bytes, because numpy has no such dtype or elements are packed.
    dtype: "np.dtype[Any] | None"
    size: int  # the number of elements, or of bytes where `dtype` is None
    extent: Extent | None = None  # where the bytes are, if they are contiguous in a file
    seen: Mapping[Path, os.stat_result] | None = None  # the stat results of the files when they were opened
    array: Array | None = None  # the values with one axis, if they are in memory
    source: Any = None  # the reader of ranges of elements, if there is neither an extent nor an array
    number: int = 0  # the leaf in the source

    @property
    def width(self) -> int:
        """The bytes of an element."""
        return 1 if self.dtype is None else self.dtype.itemsize

    @property
    def bits(self) -> int:
        """The bits of one element in a stream of bytes; 0 if unknown, or if pieces would cut elements."""
        bits = BITS.get(self.spec.dtype, 0)
        if not bits and self.spec.size and self.size % self.spec.size == 0:
            bits = self.size // self.spec.size * 8
        return bits if bits and 8 * CHUNK % bits == 0 else 0

    def is_at(self, other: "Stream") -> bool:
        """Whether the two are the same bytes of one file."""
        if self.extent is None or other.extent is None or self.extent.start != other.extent.start:
            return False
        one, two = ((side.seen or {}).get(side.extent.path) for side in (self, other) if side.extent)
        return one is not None and two is not None and unchanged(one, two)

    def piece(self, desk: "Desk", slot: int, start: int, stop: int) -> Array:
        """Some elements as an array with one axis, valid until the desk fills this slot again."""
        if self.array is not None:
            return self.array[start:stop]
        if self.extent is None:
            found: Array = self.source.read_range(self.number, start, stop)
            return found
        buffer = desk.read(slot, self.extent, self.seen or {}, start * self.width, stop * self.width)
        return buffer if self.dtype is None else buffer.view(self.dtype)


def stream_of(leaves: Leaves, number: int) -> Stream:
    """The stream of a leaf. A leaf with an unsaved edit is computed whole; one on a device is copied to the host.
    `Unsupported` if its values are not available."""
    spec = leaves.spec(number)
    why = hindrance(leaves, number)
    if why:
        raise Unsupported(f"{leaves.index.path(number)} cannot be read: {why}")
    home = _home(leaves, number)
    if not hasattr(home, "read_range"):
        array = to_numpy(leaves.read(number) if home is None else home.read(number))
        array = np.ascontiguousarray(array).reshape(-1)
        return Stream(spec, array.dtype, array.size, array=array)
    extent = home.extent(number)
    if home.refusal(number):
        return Stream(spec, None, home.nbytes(number), extent, home.stats)
    dtype = numpy_dtype(spec.dtype)
    if extent is None:
        return Stream(spec, dtype, spec.size, source=home, number=number)
    return Stream(spec, dtype, spec.size, extent, home.stats)


def hindrance(leaves: Leaves, number: int) -> str:
    """Why the values of a leaf are not available, not even as bytes, or ""."""
    home = _home(leaves, number)
    if home is None:
        return ""
    if hasattr(home, "read_range"):
        return home.refusal(number) if home.extent(number) is None else ""
    value = home.read(number)
    spec = home.spec(number)
    # Strings and PRNG keys are not numbers, but their bytes can be compared.
    bare = spec.kind == "other" and not spec.dtype.startswith("q") and spec.dtype != "object"
    return "" if bare else backend(value).refusal(value)


def _home(leaves: Any, number: int) -> Any:
    """The holder of the values: the file of a checkpoint, or None if the leaf is edited; else the tree."""
    home = getattr(leaves, "home", None)
    return leaves if home is None else home(number)


class Desk:
    """The buffers, one per slot, and the open files of one thread; files are closed when the desk is left. Bytes are
    copied into the buffers, not mapped, though maps are faster: the process would end with SIGBUS if another program
    truncated a file meanwhile."""

    _here = threading.local()

    def __init__(self) -> None:
        self._buffers: list[Array] = self._here.__dict__.setdefault("buffers", [])
        self._files: dict[Path, tuple[Readable, os.stat_result]] = {}

    def __enter__(self) -> "Desk":
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        try:
            if kind is None:
                for path, (descriptor, before) in self._files.items():
                    now = os.fstat(descriptor) if isinstance(descriptor, int) else status_now(path)
                    check_unchanged(path, before, now)
        finally:
            self._close()

    def _close(self) -> None:
        while self._files:
            release(self._files.popitem()[1][0])

    def read(self, slot: int, extent: Extent, seen: Mapping[Path, os.stat_result], start: int, stop: int) -> Array:
        """Some bytes of an extent."""
        while len(self._buffers) <= slot:
            self._buffers.append(np.empty(CHUNK, np.uint8))
        if len(self._buffers[slot]) < stop - start:
            self._buffers[slot] = np.empty(stop - start, np.uint8)
        buffer = self._buffers[slot][: stop - start]
        get_into(buffer.data, self._descriptor(extent.path, seen), extent.start + start, extent.path)
        return buffer

    def _descriptor(self, path: Path, seen: Mapping[Path, os.stat_result]) -> Readable:
        if path not in self._files:
            if len(self._files) >= _OPEN:
                self._close()
            descriptor = open_regular(path)
            now = status_of(descriptor)
            self._files[path] = descriptor, now
            check_unchanged(path, seen.get(path, now), now)
        return self._files[path][0]
