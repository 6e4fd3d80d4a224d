"""The payload of a delta: positions and values, whole leaves and other files, in one safetensors file.

positions/NAME@START    uint32: which elements of the leaf change, counted from byte START of it
values/NAME@START       the new ones, or all from START on, if there are no positions
whole/NAME              a leaf that is new, or has another shape or dtype
file/NAME               a file beside the weights
"""

import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paramend.disk.copying import Copier
from paramend.disk.io import get, put, reading, write_file, writing
from paramend.errors import BadCheckpoint
from paramend.formats.jsontext import bad
from paramend.formats.safetensors import SafetensorsFile, layout
from paramend.leaves.origins.boxes import Box, select
from paramend.leaves.origins.origin import Computed, Partly
from paramend.leaves.origins.stored import Stored, Zeros
from paramend.leaves.specs import BITS, SAFETENSORS_CODES, Array, Spec, numpy_dtype
from paramend.piecewise.changes import merged
from paramend.piecewise.spool import PAGE

if TYPE_CHECKING:
    from paramend.deltas.delta import Delta
    from paramend.deltas.manifest import LeafRow

# The bytes of a leaf that are compared at once. All widths of elements divide it.
SPAN = 3 << 22


@dataclass(frozen=True, slots=True)
class Window:
    """Changes of a range of bytes."""

    start: int  # the first byte of the leaf that positions count from
    values: Array  # the new elements as bytes, or what old and new bytes differ in
    # Where the elements are, ascending, counted in elements; None if they follow each other.
    positions: Array | None = None
    xor: bool = False  # whether the values are what old and new bytes differ in

    @property
    def width(self) -> int:
        return 1 if self.positions is None else len(self.values) // max(len(self.positions), 1)

    @property
    def stop(self) -> int:
        if self.positions is None:
            return self.start + len(self.values)
        return self.start + (int(self.positions[-1]) + 1 if len(self.positions) else 0) * self.width

    def fault(self, nbytes: int, itemsize: int) -> str:
        """Why they are not changes of a leaf of so many bytes, with elements of some, or ""."""
        places = self.positions
        if places is not None:
            if len(self.values) != len(places) * self.width or self.width not in (1, itemsize):
                return f"{len(self.values):,} bytes are not the values at {len(places):,} positions"
            if (places[1:] <= places[:-1]).any():
                return "its positions do not ascend"
        if self.start % itemsize:
            return f"it begins at byte {self.start:,}, within an element"
        return f"it changes byte {self.stop - 1:,} of {nbytes:,}" if self.stop > nbytes else ""

    def put(self, buffer: Array, at: int) -> None:
        """Change bytes of the leaf, of which `at` is the first: whole elements."""
        width = self.width
        first, last = (max(at - self.start, 0) // width, max(at + len(buffer) - self.start, 0) // width)
        if self.positions is None:
            values, old = self.values[first:last], buffer[max(self.start - at, 0) :][: len(self.values[first:last])]
            old[...] = old ^ values if self.xor else values
            return
        some = slice(*np.searchsorted(self.positions, [first, last]))
        places = self.positions[some].astype(np.int64) + (self.start - at) // width
        values, old = self.values.reshape(-1, width)[some], buffer.reshape(-1, width)
        old[places] = old[places] ^ values if self.xor else values

    @property
    def pages(self) -> Array:
        if self.positions is None:
            pages = np.arange(self.start // PAGE, -(-self.stop // PAGE))
        else:
            pages = np.unique((self.positions.astype(np.int64) * self.width + self.start) // PAGE)
        return np.stack([pages, pages + 1], 1) * PAGE


class Changes:
    """All changes of a leaf, window by window: in memory is one at a time."""

    def __init__(self, windows: Callable[[], Iterator[Window]], nbytes: int) -> None:
        self._windows, self.nbytes = windows, nbytes
        self._coming: Iterator[Window] | None = None
        self._now: Window | None = None
        self._done = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Changes, (self._windows, self.nbytes)

    def put(self, buffer: Array, at: int, mask: Array | None = None) -> None:
        """Change bytes of the leaf, of which `at` is the first; those of a mask become 255. Best first to last."""
        if self._coming is None or at < self._done:
            self._coming = self._windows()
            self._now = next(self._coming, None)
        self._done = at + len(buffer)
        while self._now is not None and self._now.start < self._done:
            self._now.put(buffer, at)
            if mask is not None:
                replace(self._now, values=np.full_like(self._now.values, 255), xor=False).put(mask, at)
            if self._now.stop > self._done:
                break
            self._now = next(self._coming, None)

    @property
    def pages(self) -> Array:
        """The pages of the leaf that change, as (start, stop): adjacent ones as one."""
        found = merged(*(window.pages for window in self._windows()))
        return np.minimum(found, self.nbytes)


FILE = "delta.safetensors"


class Payload:
    """The payload of a delta that is on disk."""

    def __init__(self, path: Path, *, xor: bool = False) -> None:
        self.source, self.xor = SafetensorsFile(path), xor

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        return {entry.name: number for number, entry in enumerate(self.source.header.entries)}

    @cached_property
    def _starts(self) -> dict[str, list[int]]:
        """The name of a leaf → where its windows begin, ascending."""
        found: dict[str, list[int]] = {}
        for name in self._numbers:
            kind, _, rest = name.partition("/")
            leaf, _, start = rest.rpartition("@")
            if kind == "values":
                if not (start.isascii() and start.isdigit() and len(start) <= 18):
                    raise bad(str(self.source.path), name, "it does not end in a number of bytes")
                found.setdefault(leaf, []).append(int(start))
        return {name: sorted(starts) for name, starts in found.items()}

    @property
    def nbytes(self) -> int:
        """The bytes of all new values and positions."""
        return self.source.header.data_nbytes

    def bytes(self, name: str) -> Array | None:
        """The bytes of a tensor; None if there is none of that name."""
        number = self._numbers.get(name)
        if number is None:
            return None
        return self.source.read_range(number, 0, self.source.spec(number).size).view(np.uint8)

    def whole(self, name: str) -> Stored | None:
        number = self._numbers.get(f"whole/{name}")
        return None if number is None else Stored(self.source, number)

    def changes(self, name: str, nbytes: int, itemsize: int) -> Changes:
        return Changes(partial(self._windows, name, nbytes, itemsize), nbytes)

    def _windows(self, name: str, nbytes: int, itemsize: int) -> Iterator[Window]:
        done = 0
        for start in self._starts.get(name, ()):
            values, places = self.bytes(f"values/{name}@{start}"), self.bytes(f"positions/{name}@{start}")
            assert values is not None
            window = Window(start, values, None if places is None else places.view("<u4"), self.xor)
            fault = window.fault(nbytes, itemsize) or ("it overlaps another" if start < done else "")
            if fault:
                raise BadCheckpoint(f"{self.source.path}: {name}@{start}: {fault}; nothing was changed")
            done = window.stop
            yield window


class Table:
    """A safetensors file that grows: its header is known at the end, and its tensors are in a temporary file."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, Spec, int]] = []
        self._data = tempfile.TemporaryFile(prefix="paramend-")  # noqa: SIM115  closed by `close`

    def close(self) -> None:
        self._data.close()

    def add(self, name: str, spec: Spec, pieces: Iterable[bytes | memoryview]) -> None:
        nbytes = sum(put(self._data.fileno(), piece) for piece in pieces)
        self._entries.append((name, spec, nbytes))

    def window(self, name: str, start: int, values: Array, differ: Array, dtype: str, *, known: bool = True) -> int:
        """Add the changes of a range of bytes, as positions where they are shorter; how many elements there are.
        `differ` says of each element whether it changes; of the others, `values` has the bytes only if they are
        `known`."""
        places = np.flatnonzero(differ)
        if not len(places):
            return 0
        width = len(values) // len(differ)
        if len(places) * (4 + width) < len(values) or not (known or len(places) == len(differ)):
            self.add(f"positions/{name}@{start}", Spec(places.shape, "uint32"), [places.astype("<u4").data.cast("B")])
            values = values.reshape(-1, width)[places]
        typed = dtype in SAFETENSORS_CODES and BITS[dtype] == 8 * width
        spec = Spec((values.size // width,), dtype) if typed else Spec((values.size,), "uint8")
        self.add(f"values/{name}@{start}", spec, [values.reshape(-1).data])
        return len(places)

    def whole(self, name: str, spec: Spec, pieces: Iterable[memoryview]) -> int:
        """Add a leaf as it is; how many elements it has."""
        if spec.dtype not in SAFETENSORS_CODES and not spec.dtype.startswith("raw<"):
            return self.dense(name, spec, pieces)
        self.add(f"whole/{name}", spec, pieces)
        return spec.size

    def dense(self, name: str, spec: Spec, pieces: Iterable[memoryview]) -> int:
        """Add all bytes of a leaf as changes of it; how many elements it has."""
        start = 0
        for piece in pieces:
            self.add(f"values/{name}@{start}", Spec((len(piece),), "uint8"), [piece])
            start += len(piece)
        return spec.size

    def write(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        data = self._data
        write_file(path, layout(self._entries, metadata).to_bytes())
        with writing(path) as file:
            os.lseek(file, 0, os.SEEK_END)
            copy_all(data.fileno(), file, path)

    def finish(self, *, xor: bool) -> Payload:
        """The payload that it became, in a temporary folder, which goes with it."""
        folder = Path(tempfile.mkdtemp(prefix="paramend-delta-"))
        self.write(folder / FILE)
        payload = Payload(folder / FILE, xor=xor)
        weakref.finalize(payload.source, shutil.rmtree, folder, ignore_errors=True)
        return payload


def copy_all(source: int, target: int, path: Path) -> None:
    """Append a whole file to another."""
    for _ in Copier().copy(source, target, 0, os.fstat(source).st_size, path=path):
        pass


def digest_of(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def itemsize_of(spec: Spec) -> int:
    """The bytes of an element; 1 where elements are packed, or of a dtype that is unknown."""
    return numpy_dtype(spec.dtype).itemsize if not BITS.get(spec.dtype, 1) % 8 else 1


@dataclass(frozen=True, eq=False, repr=False)
class Patched(Computed, Partly):
    """The elements of another origin, some of them changed; by bytes where they cannot be read."""

    changes: Changes
    boxed = False  # pieces are read first to last

    @property
    def says(self) -> str:  # type: ignore[override]
        return f"{self.spec} by a delta"

    @property
    def changed(self) -> Array:
        return self.changes.pages if isinstance(self.whole, Stored) else np.array([[0, self.nbytes]])

    def data(self, start: int, stop: int, old: Callable[[], bytearray]) -> memoryview:
        return self._put(old(), start) if isinstance(self.whole, Stored) else self.raw(start, stop).data

    def _put(self, old: Any, start: int) -> memoryview:
        buffer = np.frombuffer(old, np.uint8)
        self.changes.put(buffer, start)
        return buffer.data

    def raw(self, start: int, stop: int) -> Array:
        """Some bytes: of whole elements, where they can be read."""
        whole = self.whole
        if isinstance(whole, Patched):
            found = whole.raw(start, stop)
        elif not whole.refusal:
            width = numpy_dtype(whole.spec.dtype).itemsize
            found = np.array(whole.read_range(start // width, stop // width)).view(np.uint8)
        else:
            extent = whole.extent
            assert extent is not None  # or its checksum could not be computed
            with reading(extent.path) as descriptor:
                found = np.frombuffer(get(descriptor, extent.start + start, stop - start, extent.path), np.uint8)
        self._put(found.data, start)
        return found

    def contents(self) -> Iterator[memoryview]:
        for start in range(0, self.nbytes, SPAN):
            yield self.raw(start, min(start + SPAN, self.nbytes)).data

    def read_range(self, start: int, stop: int) -> Array:
        dtype = numpy_dtype(self.spec.dtype)
        return self.raw(start * dtype.itemsize, stop * dtype.itemsize).view(dtype)

    def read_box(self, box: Box) -> Array:
        return np.array(select(self.read_range(0, self.spec.size).reshape(self.spec.shape), box))


def whole_of(delta: "Delta", row: "LeafRow") -> Patched:
    """A leaf that a delta holds whole."""
    assert row.spec is not None
    found = delta.payload.whole(row.held) or Zeros(row.spec)
    if found.spec != row.spec or row.spec.nbytes > delta.payload.nbytes:
        held = f"{delta.payload.nbytes:,} bytes" if found.spec == row.spec else str(found.spec)
        raise BadCheckpoint(f"{delta.called(row)}: the delta says {row.spec} and holds {held}")
    return Patched(found, delta.payload.changes(row.held, row.nbytes, itemsize_of(row.spec)))
