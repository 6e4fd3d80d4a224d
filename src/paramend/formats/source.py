"""`Source`: the leaves of a file on disk, which engines copy, compute and patch by where their bytes lie."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from paramend.errors import Unsupported
from paramend.leaves.leaves import Index
from paramend.leaves.specs import Array, Spec


@dataclass(frozen=True, slots=True)
class Extent:
    """Where the bytes of a leaf lie, one after the other, in C order, little-endian.

    Attributes:
        path: the file.
        start: the first byte, from the beginning of the file.
        nbytes: how many.
    """

    path: Path
    start: int
    nbytes: int


class Source(Protocol):
    """A checkpoint file, or a directory that is one, opened for reading: `Leaves` that lie on disk.

    Opening reads headers only. Every format is one file of this folder that makes such objects.

    Attributes:
        format: the name of its row in the table of formats; "" of a tree in memory.
        path: as the user wrote it.
        stats: what the system said of each of its files when it was opened.
        index: the names.
        ties: leaf number → the first number of the same leaf, where a file says that two names are one tensor.
        metadata: what the file says of itself besides its leaves, as the format has it.
    """

    path: Path
    ties: Mapping[int, int]

    @property
    def index(self) -> Index:
        """The names."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the file says of itself besides its leaves, as the format has it."""

    @property
    def format(self) -> str:
        """The name of its row in the table of formats."""

    @property
    def stats(self) -> Mapping[Path, os.stat_result]:
        """What the system said of each of its files when it was opened."""

    def spec(self, number: int) -> Spec:
        """Shape and dtype of a leaf."""

    def nbytes(self, number: int) -> int:
        """Bytes of a leaf on disk, also of dtypes of unknown width."""

    def refusal(self, number: int) -> str:
        """Why a leaf cannot be read as an array, or ""."""

    def read(self, number: int) -> Array:
        """A leaf; memory-mapped and read-only where the format allows it."""

    def read_range(self, number: int, start: int, stop: int) -> Array:
        """A copy of some elements of a leaf, counted in C order."""

    def extent(self, number: int) -> Extent | None:
        """Where the bytes of a leaf lie; None if they are compressed, strided or split."""

    def children(self, node: Any) -> list[tuple[Any, Any]] | None:
        """The entries of a container, for trees of bools as selectors: `leaves.entries`."""

    def close(self) -> None:
        """Closes its files."""


# ---- what some sources can do besides --------------------------------------------------------------------------


@runtime_checkable
class Sealed(Protocol):
    """A file that holds checksums of its leaves."""

    path: Path

    def patched_too(self, extents: Sequence[Extent]) -> list[Extent]:
        """The bytes that `after_patch` will have rewritten, so that an undo record can keep them."""

    def after_patch(self, extents: Sequence[Extent]) -> list[tuple[Path, int, bytes]]:
        """What to write, as (file, offset, bytes), so that checksums are true after these bytes changed."""


@runtime_checkable
class Chunked(Protocol):
    """A checkpoint whose leaves are stored in chunks, each a value that is written whole."""

    names: Sequence[str]
    store: Any

    def chunks(self, number: int) -> tuple[int, ...]:
        """The lengths of a chunk of a leaf."""

    def read_box(self, number: int, box: tuple[slice, ...]) -> Array:
        """The values of a leaf within a box."""

    def stage(self, folder: Path, numbers: Iterable[int]) -> Any:
        """A store in a folder that takes new chunks of some leaves."""


@runtime_checkable
class Flat(Protocol):
    """A file that is a table of names, and has them without making an index."""

    @property
    def names(self) -> Sequence[str]:
        """The names, by leaf number."""


@runtime_checkable
class Released(Protocol):
    """A file whose descriptor can be closed until a leaf is read again: of many files few need to be open."""

    def release(self) -> None:
        """Closes the descriptor."""


def check_readable(source: Source, number: int) -> None:
    """Refuses a leaf that cannot be read as an array.

    Raises:
        Unsupported: it cannot; the message says why.
    """
    why = source.refusal(number)
    if why:
        raise Unsupported(f"{source.index.path(number)} cannot be read: {why}")
