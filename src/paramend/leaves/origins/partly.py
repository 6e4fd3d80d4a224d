"""`Partly`: new values of a leaf of which only some bytes are not what they were."""

from collections.abc import Callable, Iterator

from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import Array


class Partly(Origin):
    """New values of a leaf, of which an engine that writes in place writes only what is new."""

    moves = False

    @property
    def changed(self) -> Array:
        """The bytes of the leaf that are not what they were, as (start, stop), ascending."""
        raise NotImplementedError

    def data(self, start: int, stop: int, old: Callable[[], bytearray]) -> bytes | memoryview:
        """Some bytes of the leaf; `old` reads those that it had there."""
        raise NotImplementedError

    def contents(self) -> Iterator[memoryview]:
        """All bytes, in pieces, also of what cannot be read as an array."""
        raise NotImplementedError
