"""`Writer`: the layout of a new file in a format, known before its first byte is written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from paramend.leaves.outlines import Outline, Place
from paramend.leaves.specs import Spec


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
