"""`Source`: the leaves of a file on disk, which engines copy, compute and patch by the place of their bytes.

`Writer`: the layout of a new file, known before its first byte is written.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

from paramend.errors import Unsupported
from paramend.leaves.leaves import Leaves, entries, uncollected
from paramend.leaves.origins.origin import Extent, Origin
from paramend.leaves.outlines import Outline, Place
from paramend.leaves.specs import BITS, Array, Spec


class Source(Leaves, Protocol):
    """A checkpoint file or directory, opened for reading: `Leaves` on disk. Opening reads headers only. Every format
    has a module in this folder that makes such objects."""

    path: Path

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the file holds besides its leaves, as the format has it."""

    @property
    def format(self) -> str:
        """The name of its row in the table of formats; "" for a tree in memory."""

    @property
    def stats(self) -> Mapping[Path, os.stat_result]:
        """The stat result of each of its files when it was opened."""

    def read(self, number: int) -> Array:
        """A leaf; memory-mapped and read-only where the format allows it. `Unsupported` if it cannot be read."""

    def read_range(self, number: int, start: int, stop: int) -> Array:
        """A copy of a range of the elements of a leaf in C order."""

    def extent(self, number: int) -> Extent | None:
        """Where the bytes of a leaf are; None if they are compressed, strided or split."""

    def close(self) -> None:
        """Close its files."""


class Opened:
    """What all sources are: context managers, whose arrays stay valid when they close, and containers of masks."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError

    def children(self, node: Any) -> list[tuple[Any, Any]] | None:
        """The entries of a dict, list or tuple, as masks have them; None for a leaf."""
        return entries(node)


class Gathering(Opened):
    """A source whose leaves are those of others, or are made of them."""

    def origin(self, number: int) -> Origin:
        raise NotImplementedError

    @property
    def sources(self) -> Sequence[Any]:
        raise NotImplementedError

    @property
    def stats(self) -> Mapping[Path, os.stat_result]:
        return {path: status for source in self.sources for path, status in source.stats.items()}

    def close(self) -> None:
        with ExitStack() as stack:
            for source in self.sources:
                stack.callback(source.close)

    def spec(self, number: int) -> Spec:
        return self.origin(number).spec

    def nbytes(self, number: int) -> int:
        return self.origin(number).nbytes

    def refusal(self, number: int) -> str:
        return self.origin(number).refusal

    def extent(self, number: int) -> Extent | None:
        return self.origin(number).extent

    def read(self, number: int) -> Array:
        return self.origin(number).read()

    def read_range(self, number: int, start: int, stop: int) -> Array:
        return self.origin(number).read_range(start, stop)


# ---- what only some sources can do -----------------------------------------------------------------------------


@runtime_checkable
class HoldsKeys(Protocol):
    """A file that tells typed PRNG keys from other numbers."""

    @property
    def implementations(self) -> Mapping[int, str]:
        """Leaf number → the implementation of the key whose numbers it is."""


@runtime_checkable
class Sealed(Protocol):
    """A file that holds checksums of its leaves."""

    path: Path

    def patched_too(self, extents: Sequence[Extent]) -> list[Extent]:
        """The extents that `after_patch` rewrites, for an undo record to keep."""

    def after_patch(self, extents: Sequence[Extent]) -> list[tuple[Path, int, bytes]]:
        """The writes, as (file, offset, bytes), that correct the checksums after these bytes changed."""


@runtime_checkable
class Overlapping(Protocol):
    """A file in which leaves may share bytes, as views of one storage do."""

    def overlaps(self, number: int) -> tuple[int, ...]:
        """The other leaves that share bytes with a leaf without being tied to it: an edit of one edits them too."""


@runtime_checkable
class Chunked(Protocol):
    """A checkpoint whose leaves are stored in chunks, each written as a whole."""

    names: Sequence[str]
    store: Any

    def chunks(self, number: int) -> tuple[int, ...]:
        """The shape of the chunks of a leaf."""

    def read_box(self, number: int, box: tuple[slice, ...]) -> Array:
        """The values of a leaf within a box."""

    def stage(self, folder: Path, numbers: Iterable[int]) -> Any:
        """A staging store in a folder for new chunks of some leaves."""


@runtime_checkable
class Tiled(Protocol):
    """A checkpoint whose leaves are stored in chunks over several files, each in place there."""

    def origin(self, number: int) -> Origin:
        """A leaf as an expression over its chunks."""

    def tiles(self, number: int) -> Sequence[Any]:
        """The chunks of a leaf."""


@runtime_checkable
class Relabelled(Protocol):
    """A checkpoint whose leaves get other names, or go, by a new file of metadata alone."""

    def relabelled(self, names: Mapping[int, str]) -> tuple[Path, bytes, bytes]:
        """The file of metadata, what it holds, and what it will hold: the leaves of these numbers, under these names.
        `RenameClash` if something else has one of the names."""


class Few:
    """Of many files, those that were read last: the others are released. Systems limit a process to a few hundred open
    files; the largest models have more."""

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._open: OrderedDict[int, Any] = OrderedDict()

    def touch(self, file: Any) -> None:
        self._open[id(file)] = file
        self._open.move_to_end(id(file))
        if len(self._open) > self._most:
            self._open.popitem(last=False)[1].release()


@contextmanager
def opening() -> Iterator[list[Any]]:
    """A list for files that are opened one after the other, which are closed if the block fails."""
    files: list[Any] = []
    with uncollected():
        try:
            yield files
        except BaseException:
            for file in files:
                file.close()
            raise


def check_readable(leaves: Leaves, number: int) -> None:
    """Raise `Unsupported`, with the reason, for a leaf that cannot be read as an array."""
    why = leaves.refusal(number)
    if why:
        raise Unsupported(f"{leaves.index.path(number)} cannot be read: {why}")


def padded(dtype: str) -> str:
    """Why leaves of a file with a byte for each value cannot be read, or "": other formats pack these floats. No other
    format stores integers of 4 bits."""
    if BITS[dtype] % 8 and dtype.startswith("float"):
        return f"its values, {dtype}, of {BITS[dtype]} bits, take one byte each here, but are packed elsewhere"
    return ""


@contextmanager
def in_numpy(shape: tuple[int, ...]) -> Iterator[None]:
    """Raise `Unsupported` where numpy has no array of a shape: of more axes, or longer ones around one of length 0."""
    try:
        yield
    except ValueError as error:
        raise Unsupported(f"numpy has no array of shape {shape}: {error}") from error


@dataclass(frozen=True, slots=True)
class Item:
    """One leaf on its way into a new file."""

    name: str  # its path as plain text, keys joined by a separator
    keys: tuple[str, ...]  # its path key by key
    spec: Spec
    nbytes: int
    # The position of the first of the items that are one leaf; its own if it is not tied to an earlier one.
    tied: int = -1


def outline_of_items(items: Sequence[Item]) -> Outline:
    """The outline of items alone, by their keys."""
    return Outline([(() if item.keys == ("",) else item.keys, Place(at)) for at, item in enumerate(items)])


class LeafBytes(NamedTuple):
    """Bytes of a leaf, in C order and little-endian."""

    item: int  # the position of the leaf among those that are written
    start: int  # the first byte
    stop: int  # the one after the last


Parts = Iterator[bytes | LeafBytes]
# The bytes of the leaf at a position, in pieces of bounded size.
Data = Callable[[int], Iterator[memoryview]]


class Writer:
    """Lays out files of one format. A format's module has one under the name `WRITER`. The parts of a file tell the
    engine its length. It lets the kernel copy what is in other files, and computes the rest. A format whose checkpoints
    are folders has `write` instead of `parts`: see `OrbaxWriter`."""

    copies_raw = False  # whether leaves from files of this format are copied unchanged, whatever `refusal` says of them
    flat = False  # whether a file is a table of names, without containers
    # Whether it holds checksums of its leaves: written as 0, and corrected by `after_patch` of the finished file.
    seals = False

    def refusal(self, spec: Spec) -> str:
        """Why the format cannot hold such a leaf, or ""."""
        raise NotImplementedError

    def holds(self, value: Any) -> bool:
        """Whether the format has a place for an entry that is not an array."""
        return False

    def parts(self, items: Sequence[Item], metadata: Mapping[str, Any], outline: Outline | None = None) -> Parts:
        """The file from its first byte to its last. The spans of a leaf come one after the other, first to last. Of the
        `metadata` of the source a writer takes what its format can hold; flat formats need no `outline`."""
        raise NotImplementedError
