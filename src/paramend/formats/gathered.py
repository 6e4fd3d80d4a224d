"""`Gathered`: leaves of other checkpoints, and computed ones, under new names as one source.

A model that is assembled from others (deepened, warm-started, stacked) is a list of references: the engine copies
their bytes from file to file, as it does for an edited checkpoint.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from paramend.formats.source import Gathering
from paramend.leaves.leaves import Index, uncollected
from paramend.leaves.origins.origin import Extent, Origin
from paramend.leaves.origins.stored import Stored
from paramend.leaves.paths import Label

Named = tuple[Sequence[Label], Origin]  # where a leaf gets its name, and where it comes from


class Gathered(Gathering):
    """Leaves from anywhere as one source."""

    def __init__(self, base: Any, leaves: Iterable[Named], *, ties: Mapping[int, int] | None = None) -> None:
        self.base = base  # the checkpoint whose directory layout, metadata and format the result has
        self.ties: Mapping[int, int] = ties or {}
        self.path: Path = Path() if base is None else base.path
        self.format: str = "" if base is None else base.format
        self.metadata: Mapping[str, Any] = {} if base is None else base.metadata
        self.index = Index("/" if base is None else base.index.separator)  # the names; leaf `n` is the n-th one given
        self.origins: list[Origin] = []
        with uncollected():
            for path, origin in leaves:
                names = self.index.names
                for label in path[:-1]:
                    names = names.setdefault(label, {})
                names[path[-1]] = len(self.origins)
                self.index.numbers.append(len(self.origins))
                self.origins.append(origin)

    def origin(self, number: int) -> Origin:
        return self.origins[number]

    def made(self, number: int) -> Origin | str:
        """What a leaf is made of; "" if it is the one that `base` has under its path."""
        origin = self.origins[number]
        if not isinstance(origin, Stored):
            return origin
        if origin.source is not self.base:
            return f"{origin.source.path.name}:{origin}"
        return origin if origin.says != self.index.path(number) else ""

    @property
    def sources(self) -> list[Any]:
        """The checkpoints that leaves come from, `base` first."""
        found = {} if self.base is None else {id(self.base): self.base}
        for origin in self.origins:
            for each in origin.stored():
                if isinstance(each, Stored):
                    found.setdefault(id(each.source), each.source)
        return list(found.values())

    def extents(self, number: int) -> list[Extent] | None:
        """Where the bytes of a leaf are, one extent after the other; None if some are computed."""
        return self.origins[number].extents

    def ranges(self, number: int) -> Iterator[tuple[int, int]]:
        """Ranges of the elements of a leaf, first to last, that are best read one by one."""
        return self.origins[number].ranges()


def leaf_of(source: Any, number: int) -> Origin:
    """The origin of a leaf of a source: what it was gathered from, or the leaf itself."""
    found: Origin = source.origins[number] if isinstance(source, Gathered) else Stored(source, number)
    return found
