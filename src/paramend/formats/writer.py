"""`Writer`: what a format offers that can be written leaf by leaf into a new file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from paramend.leaves.specs import Spec


@dataclass(frozen=True, slots=True)
class Item:
    """One leaf on its way into a new file.

    Attributes:
        name: its path as plain text, keys joined by a separator.
        keys: its path key by key.
        spec: shape and dtype.
        nbytes: how many bytes `chunks` will give.
        chunks: reads or computes the leaf and gives its bytes in C order, little-endian, in pieces of bounded size.
        number: that of the leaf in its source.
    """

    name: str
    keys: tuple[str, ...]
    spec: Spec
    nbytes: int
    chunks: Callable[[], Iterator[memoryview]]
    number: int = -1


class Writer(Protocol):
    """Writes files of one format. A format's module has one under the name `WRITER`."""

    def refusal(self, spec: Spec) -> str:
        """Why the format cannot hold such a leaf, or ""."""

    def nbytes(self, items: Sequence[Item], metadata: Mapping[str, Any]) -> int:
        """How large the file will be; a little more is no harm."""

    def write(self, file: BinaryIO, items: Sequence[Item], metadata: Mapping[str, Any]) -> None:
        """Writes the whole file. The engine opens it, makes it durable and names it."""


class FolderWriter(Protocol):
    """Writes directories of one format, as `Writer` writes files."""

    def refusal(self, spec: Spec) -> str:
        """Why the format cannot hold such a leaf, or ""."""

    def write(self, folder: Path, items: Sequence[Item], source: Any) -> None:
        """Fills an empty folder. The engine makes it, makes it durable and names it.

        Args:
            folder: the folder.
            items: the leaves.
            source: where they come from; what else it says of itself goes along if it is of this format.
        """
