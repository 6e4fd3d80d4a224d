"""`Digests`: those of leaves, taken from their bytes on their way into an output."""

import hashlib
from collections.abc import Collection, Iterator

from paramend.edits.plan import Row


class Digests:
    """The digests of the leaves that a record tells of, by number, as far as their bytes have passed."""

    def __init__(self, wanted: Collection[int] = ()) -> None:
        self.wanted = wanted
        self.found: dict[int, str] = {}

    def taking(self, row: Row, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        """The bytes of a leaf on their way into the output."""
        return self._hashed(row, pieces) if row.source in self.wanted else pieces

    def _hashed(self, row: Row, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
            yield piece
        self.found[row.source] = digest.hexdigest()
