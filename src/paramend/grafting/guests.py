"""Guests: leaves of one tree among those of another, under names of their own."""

from collections.abc import Mapping
from typing import Any

from paramend.leaves.leaves import Index, Layered, Leaves
from paramend.leaves.paths import Names, text_of
from paramend.leaves.specs import Spec


class WithGuests:
    """The leaves of a tree, and some of another under the names they would have there."""

    def __init__(self, target: Leaves, guests: Mapping[int, tuple[str, ...]], source: Leaves) -> None:
        self.target, self.source = target, source
        self.first = max(target.index.numbers, default=-1) + 1
        self.ties = target.ties
        self.index = Index(target.index.separator)
        self.index.names = _copied(target.index.names)
        self.index.numbers = [*target.index.numbers, *map(self.guest, guests)]
        self.index.spans = list(target.index.spans)
        for number, name in guests.items():
            names = self.index.names
            for piece in name[:-1]:
                inner = next((child for label, child in names.items() if text_of(label) == piece), None)
                if type(inner) is not dict:
                    inner = {}
                    self.index.add(names, piece, inner)
                names = inner
            self.index.add(names, name[-1], self.guest(number))

    def guest(self, number: int) -> int:
        """The number here of a leaf of the source."""
        return self.first + number

    def spec(self, number: int) -> Spec:
        return self.target.spec(number) if number < self.first else self.source.spec(number - self.first)

    def nbytes(self, number: int) -> int:
        return self.target.nbytes(number) if number < self.first else self.source.nbytes(number - self.first)

    def refusal(self, number: int) -> str:
        return self.target.refusal(number) if number < self.first else self.source.refusal(number - self.first)

    def read(self, number: int) -> Any:
        return self.target.read(number) if number < self.first else self.source.read(number - self.first)

    def children(self, node: Any) -> list[tuple[Any, Any]] | None:
        """The entries of a container, as the target has them."""
        return self.target.children(node)


def _copied(names: Names) -> Names:
    copied = {label: child if type(child) is int else _copied(child) for label, child in names.items()}
    return Layered(copied, names.layers) if isinstance(names, Layered) else copied
