"""`Source`: the leaves of a file on disk, which engines copy, compute and patch by where their bytes lie."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from paramend.leaves.leaves import Index
from paramend.leaves.specs import Spec

Array = np.ndarray[Any, Any]


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
        path: as the user wrote it.
        index: the names.
        ties: leaf number → the first number of the same leaf, where a file says that two names are one tensor.
        metadata: what the file says of itself besides its leaves, as the format has it.
    """

    path: Path
    index: Index
    ties: Mapping[int, int]
    metadata: Mapping[str, Any]

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
        """Gives the file back."""
