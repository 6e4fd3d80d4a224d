"""A file on disk, opened for reading only: ranges of its bytes, a memory map, its stat result."""

import mmap
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from paramend.disk.identity import check_unchanged
from paramend.disk.io import Readable, get, get_into, release, status_of
from paramend.disk.urls import Url, path_of
from paramend.errors import BadArgument, BadCheckpoint, CannotRead
from paramend.formats.source import Opened, check_readable, in_numpy
from paramend.leaves.leaves import Index, separator_of
from paramend.leaves.origins.origin import Extent
from paramend.leaves.specs import Array, Spec, numpy_dtype
from paramend.reports import wording

_SMALL = 1 << 20
_UNRESERVED = getattr(mmap, "MAP_NORESERVE", 0x4000)  # that of Linux, which Python names since 3.13

# How files begin that no format here is, what they are, and a hint.
FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "git lfs pull"),
    (b"\x89HDF", "an HDF5 file", ""),
    (b"\x1f\x8b", "compressed with gzip", "gunzip it first"),
    (b"<", "a web page (HTML or XML)", "download the file itself"),
)


class OpenFile:
    """A regular file, open for reading, and its `stat` then. `close()` it; maps that were handed out stay valid. A
    copy, pickled or not, opens the file again by its path when it is first read, and refuses any other file."""

    def __init__(self, path: str | os.PathLike[str], *, holds: str = "") -> None:
        self.path = path_of(path)
        self._closed = False
        self._map: mmap.mmap | None = None
        self._handle: _Handle | None = _Handle(open_regular(self.path, holds=holds))
        self._kept: _Handle | None = None
        self._place = self.path.absolute()  # the program may go to another folder
        self.stat = status_of(self._handle.number)

    def __getstate__(self) -> dict[str, Any]:
        # A descriptor means nothing in another process, and is soon reused for another file in this one.
        return {**self.__dict__, "_handle": None, "_kept": None, "_map": None}

    @property
    def size(self) -> int:
        return self.stat.st_size

    def close(self) -> None:
        self._closed = True
        self._map = self._kept = None
        self.release()

    def release(self) -> None:
        """Close the descriptor until the file is read again: of many files only a few need to be open."""
        self._handle = self._kept

    def hold(self) -> None:
        """Keep the descriptor until the file is closed: whoever changes the file goes on reading it."""
        self._kept = self._held()

    def fileno(self) -> int:
        number = self._held().number
        assert isinstance(number, int), "only files of this machine are changed in place"
        return number

    def read(self, start: int, nbytes: int) -> bytes:
        """Bytes of the file, exactly as many as requested; `BadCheckpoint` if it has become shorter."""
        handle = self._held()
        if isinstance(handle.number, int):
            piece = os.pread(handle.number, min(nbytes, _SMALL), start)
            if len(piece) == nbytes:  # nearly always
                return piece
        return bytes(get(handle.number, start, nbytes, self.path))

    def read_into(self, view: memoryview, start: int) -> None:
        handle = self._held()
        get_into(view, handle.number, start, self.path)

    @property
    def map(self) -> mmap.mmap:
        """The whole file as memory: pages are read when touched. That of a remote one only has addresses."""
        number, found = self._held().number, self._map
        if found is None and isinstance(number, int):
            found = self._map = mmap.mmap(number, 0, access=mmap.ACCESS_READ)
        elif found is None:
            found = self._map = mmap.mmap(-1, self.size, mmap.MAP_PRIVATE | _UNRESERVED, mmap.PROT_READ)
        return found

    def memory(self, start: int, nbytes: int) -> tuple[Any, int]:
        """Memory that has some bytes of the file, and where in it they begin: the map, or what was fetched."""
        if isinstance(self._held().number, int):
            return self.map, start
        buffer = np.empty(nbytes, np.uint8)
        self.read_into(buffer.data, start)
        return buffer.data.toreadonly(), 0

    def _held(self) -> "_Handle":
        """The open descriptor. A reader keeps it alive, so a thread that closes the file need not wait."""
        if self._closed:
            raise closed(self.path)
        handle = self._handle
        if handle is None:
            handle = _Handle(open_regular(self._place))
            check_unchanged(self.path, self.stat, status_of(handle.number))
            self._handle = handle
        return handle


class _Handle:
    """A descriptor, closed when its last holder drops it: only then may its number be reused for another file."""

    __slots__ = ("number",)

    def __init__(self, number: Readable) -> None:
        self.number = number

    def __del__(self, close: Callable[[Readable], None] = release) -> None:
        close(self.number)


def closed(path: Path) -> BadArgument:
    """The error for reading a closed file."""
    return BadArgument(f"{path} is closed", hint=f'pm.open("{path}")')


class Row(Protocol):
    """What a file says of a leaf."""

    @property
    def spec(self) -> Spec:
        """Shape and dtype."""

    @property
    def nbytes(self) -> int:
        """The number of bytes in the file."""


class FileSource(Opened):
    """What sources over a single file share. Use one as a context manager, or `close()` it; its arrays stay valid."""

    index: Index
    ties: Mapping[int, int] = {}  # nothing, for formats in which each leaf has one name
    rows: Sequence[Row]  # of each leaf, its spec and where its bytes are
    holds = ""  # the pattern of such files, which the hint for a directory names

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = OpenFile(path, holds=self.holds)
        self.path = self._file.path  # as the user gave it
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{self.path}: {wording.plural(len(self.index.numbers), 'leaf', 'leaves')}>"

    @property
    def stat(self) -> os.stat_result:
        return self._file.stat

    @property
    def stats(self) -> Mapping[Path, os.stat_result]:
        return {self.path: self.stat}

    def close(self) -> None:
        self._file.close()

    def fileno(self) -> int:
        return self._file.fileno()

    def release(self) -> None:
        """Close the descriptor, if the file can be opened again when a leaf is read."""

    def hold(self) -> None:
        """Keep the descriptor from now on: whoever changes the file goes on reading it."""

    def spec(self, number: int) -> Spec:
        return self.rows[number].spec

    def nbytes(self, number: int) -> int:
        return self.rows[number].nbytes

    def refusal(self, number: int) -> str:
        raise NotImplementedError

    def extent(self, number: int) -> Extent | None:
        raise NotImplementedError

    def read(self, number: int) -> Array:
        """The array, read-only; memory-mapped where its bytes are in the file as they are, and aligned."""
        check_readable(self, number)
        spec, extent = self.spec(number), self.extent(number)
        mapped = extent is not None and extent.nbytes
        flat = self._mapped(extent.start, spec) if extent and mapped else self.read_range(number, 0, spec.size)
        flat.flags.writeable = False
        with in_numpy(spec.shape):
            return flat.reshape(spec.shape)

    def read_range(self, number: int, start: int, stop: int) -> Array:
        """The elements `start` to `stop` of a leaf in C order: a new array with one axis, of bounded memory."""
        check_readable(self, number)
        extent, dtype = self.extent(number), numpy_dtype(self.spec(number).dtype)
        if extent is None:
            return self._gathered(number, start, stop)
        buffer = np.empty((stop - start) * dtype.itemsize, np.uint8)
        self._file.read_into(buffer.data, extent.start + start * dtype.itemsize)
        return buffer.view(dtype)

    def _gathered(self, number: int, start: int, stop: int) -> Array:
        return self.read(number).flat[start:stop]

    def _mapped(self, start: int, spec: Spec) -> Array:
        dtype = numpy_dtype(spec.dtype)
        if not start % dtype.alignment:
            memory, at = self._file.memory(start, spec.nbytes)
            return np.frombuffer(memory, np.uint8, spec.nbytes, at).view(dtype)
        buffer = np.empty(spec.nbytes, np.uint8)  # a copy out of the map would leave its pages in memory
        self._file.read_into(buffer.data, start)
        return buffer.view(dtype)


class FlatFile(FileSource):
    """A file that is a table of names, whose descriptor may be closed until it is read again."""

    rows: Sequence[Any]  # with a `name` each

    @property
    def names(self) -> list[str]:
        return [row.name for row in self.rows]

    @cached_property
    def index(self) -> Index:  # type: ignore[override]  # made on first use
        names = self.names
        return Index.of_names(names, separator_of(names))

    def release(self) -> None:
        self._file.release()

    def hold(self) -> None:
        self._file.hold()


def open_regular(path: Path, *, holds: str = "") -> Readable:
    """A regular file, opened for reading; the hint for a directory names files that it `holds`."""
    if isinstance(path, Url):
        return path.opened()
    # O_NONBLOCK: without it, opening a named pipe waits forever.
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise CannotRead(f"{path}: there is no such file", hint=near(path)) from None
    except PermissionError:
        raise CannotRead(f"{path}: no permission to read it", hint=f"ls -l {path}") from None
    except (OSError, ValueError) as error:
        raise CannotRead(f"{path}: it cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if not stat.S_ISDIR(mode):
        raise BadCheckpoint(f"{path}: it is not a regular file (it is a pipe, a device or a socket)")
    inside = sorted(path.glob(holds)) if holds else []
    more = f" or one of {len(inside) - 1} more" if inside[1:] else ""
    raise BadCheckpoint(f"{path}: it is a directory, not a file", hint=f"{inside[0]}{more}" if inside else "")


def open_bytes(path: Path) -> IO[bytes]:
    """A small file, to be read from its beginning; the one of a store is fetched whole."""
    found: IO[bytes] = path.open("rb") if isinstance(path, Url) else os.fdopen(open_regular(path), "rb")  # type: ignore[arg-type]
    return found


def near(path: Path) -> str:
    """The hint for a missing file: one beside it with a similar name, or that the folder is missing too."""
    try:
        names = [other.name for other in path.parent.iterdir() if not other.name.startswith(".")]
    except (OSError, ValueError):
        return "" if _is_there(path.parent) else f"there is no directory {path.parent} either"
    found = wording.closest(path.name, names, limit=1)
    return f"did you mean {path.parent / found[0]}?" if found else ""


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a name, or with a zero byte in it
        return True
