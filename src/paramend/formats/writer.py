"""`Writer`: the layout of a new file in a format, known before its first byte is written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from paramend.leaves.outlines import Outline, Place
from paramend.leaves.specs import Spec


@dataclass(frozen=True, slots=True)
class Item:
    """One leaf on its way into a new file.

    Attributes:
        name: its path as plain text, keys joined by a separator.
        keys: its path key by key.
        tied: the position of the first of the items that are one leaf; its own if it is not tied to an earlier one.
    """

    name: str
    keys: tuple[str, ...]
    spec: Spec
    nbytes: int
    tied: int = -1


def outline_of_items(items: Sequence[Item]) -> Outline:
    """The outline of items alone, by their keys."""
    return Outline([(() if item.keys == ("",) else item.keys, Place(at)) for at, item in enumerate(items)])


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
    rest. A format whose checkpoints are folders has `write` instead of `seals` and `parts`: see `OrbaxWriter`.

    Attributes:
        copies_raw: whether leaves from files of this format are copied unchanged, whatever `refusal` says of them.
        flat: whether a file is a table of names, without containers.
        seals: whether such a file holds checksums of its leaves. They are written as 0, and corrected by
            `after_patch` of the finished file.
    """

    copies_raw: bool
    flat: bool
    seals: bool

    def refusal(self, spec: Spec) -> str:
        """Why the format cannot hold such a leaf, or ""."""

    def holds(self, value: Any) -> bool:
        """Whether the format has a place for an entry that is not an array."""

    def parts(
        self, items: Sequence[Item], metadata: Mapping[str, Any], outline: Outline | None = None
    ) -> Iterator[bytes | LeafBytes]:
        """The file from its first byte to its last. The spans of a leaf come one after the other, first to last.

        Args:
            metadata: that of the source; a writer takes what its format can hold.
            outline: where the items are among containers and other entries; not needed by formats that are flat.
        """
