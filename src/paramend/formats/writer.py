"""`Writer`: the layout of a new file in a format, known before its first byte is written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from paramend.leaves.specs import Spec


@dataclass(frozen=True, slots=True)
class Item:
    """One leaf on its way into a new file.

    Attributes:
        name: its path as plain text, keys joined by a separator.
        keys: its path key by key.
        spec: shape and dtype.
        nbytes: the number of its bytes.
        number: that of the leaf in its source.
    """

    name: str
    keys: tuple[str, ...]
    spec: Spec
    nbytes: int
    number: int = -1


class LeafBytes(NamedTuple):
    """Bytes of a leaf, in C order and little-endian.

    Attributes:
        item: the position of the leaf among those that are written.
        start: the first byte.
        stop: the one after the last.
    """

    item: int
    start: int
    stop: int


class Writer(Protocol):
    """Lays out files of one format. A format's module has one under the name `WRITER`.

    The parts of a file tell the engine its length. It lets the kernel copy what is in other files, and computes the
    rest.

    Attributes:
        seals: whether such a file holds checksums of its leaves. They are written as 0, and corrected by
            `after_patch` of the finished file.
        copies_raw: whether leaves from files of this format are copied unchanged, whatever `refusal` says of them.
    """

    seals: bool
    copies_raw: bool

    def refusal(self, spec: Spec) -> str:
        """Why the format cannot hold such a leaf, or ""."""

    def parts(self, items: Sequence[Item], metadata: Mapping[str, Any]) -> Iterator[bytes | LeafBytes]:
        """The file from its first byte to its last. The spans of a leaf come one after the other, first to last.

        Args:
            items: the leaves.
            metadata: that of the source; a writer takes what its format can hold.
        """


class FolderWriter(Protocol):
    """Writes directories of one format."""

    copies_raw: bool

    def refusal(self, spec: Spec) -> str:
        """Why the format cannot hold such a leaf, or ""."""

    def write(
        self, folder: Path, items: Sequence[Item], data: Callable[[int], Iterator[memoryview]], source: Any
    ) -> None:
        """Fill an empty folder. The engine creates it, makes it durable and gives it its name.

        Args:
            folder: the folder.
            items: the leaves.
            data: the position of a leaf → its bytes, in pieces of bounded size.
            source: where they come from; its other content is kept if it has this format.
        """
