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
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from paramend.deltas.windows import Changes, Window
from paramend.disk.copying import Copier
from paramend.disk.io import put, write_file, writing
from paramend.errors import BadCheckpoint
from paramend.formats.jsontext import bad
from paramend.formats.safetensors import SafetensorsFile
from paramend.formats.safetensors_header import layout
from paramend.leaves.origins.stored import Stored
from paramend.leaves.specs import BITS, SAFETENSORS_CODES, Array, Spec, numpy_dtype

FILE = "delta.safetensors"


class Payload:
    """The payload of a delta that is on disk."""

    def __init__(self, path: Path, *, xor: bool = False) -> None:
        self.source, self.xor = SafetensorsFile(path), xor

    @cached_property
    def _numbers(self) -> dict[str, int]:
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
        """A leaf that is there as it is; None if it is not."""
        number = self._numbers.get(f"whole/{name}")
        return None if number is None else Stored(self.source, number)

    def changes(self, name: str, nbytes: int, itemsize: int) -> Changes:
        """The changes of a leaf of so many bytes, whose elements have so many."""
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
        """Give back its room."""
        self._data.close()

    def add(self, name: str, spec: Spec, pieces: Iterable[bytes | memoryview]) -> None:
        """Add a tensor."""
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
        """Write the file."""
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
