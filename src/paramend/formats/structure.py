"""The structure of a file: dicts, lists and tuples that hold leaves and plain values.

It is walked without recursion, and within a budget: a small pickle may refer to one value a million times.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from paramend.errors import BadCheckpoint
from paramend.formats.limits import MAX_PIECES, shown
from paramend.leaves.leaves import Index
from paramend.leaves.nested import MAX_DEPTH
from paramend.leaves.outlines import CONTAINERS
from paramend.leaves.paths import labels, write_path

_ATTRIBUTES = object()  # in the place of a key, on the way to the attributes of a dict


class _Frame(NamedTuple):
    """A container that is being walked: it, what is left of its entries, its names, and the pieces of its name."""

    node: Any
    entries: Iterator[tuple[Any, Any]]
    names: dict[Any, Any] | None
    pieces: int


class Walk:
    """The leaves of a structure, found in one walk that is bounded in depth and length. Containers may be in several
    places, but not within themselves."""

    kind: type  # the type of leaves
    separator: str
    shares = False  # whether one value may be in several places

    def __init__(self, root: Any, place: str, *, room: int) -> None:
        self.index = Index(self.separator)
        self.leaves: list[Any] = []  # by number
        # Path → what neither is nor holds a leaf; lists of plain values are kept whole.
        self.others: dict[str, Any] = {}
        self._place = place
        # Bounds on the number of keys on the way to entries, and on the size of all paths and plain values. A pickle
        # exceeds them if shared values are in many places, or many values under a long key.
        self._room: float = 200_000 + 4 * room if self.shares else math.inf
        self._room_of_values = 64_000_000 + 16 * room
        self._plain: dict[int, int] = {}
        self._open: list[_Frame] = []
        self._inside: set[int] = set()
        self._trail: list[Any] = []
        if type(root) is self.kind:
            self._visit({"": root})
        elif type(root) in CONTAINERS:
            self._visit(root)
        else:
            self.others[""] = root

    def _visit(self, root: Any) -> None:
        self._enter(root, self.index.names, 0)
        while self._open:
            node, entries, names, pieces = self._open[-1]
            for key, child in entries:
                self._trail.append(key)
                below = pieces + (key.count(".") + key.count("/") if type(key) is str else 0) + 1
                if below > MAX_PIECES:
                    raise self._bad(f"the name has more than {MAX_PIECES} pieces")
                if type(child) is self.kind:
                    if names is not None:
                        self._leaf(names, key, child)
                elif self._is_plain(child):
                    if names is not None:
                        self._spend(0, self._length())
                        self.others[self._path()] = child
                else:
                    self._enter(child, None if names is None else {}, below)
                    break
                self._trail.pop()
            else:
                self._leave(node, names)

    def _enter(self, node: Any, names: dict[Any, Any] | None, pieces: int) -> None:
        if id(node) in self._inside:
            raise self._bad("it contains itself")
        if len(self._open) > MAX_DEPTH:
            raise self._bad(f"containers are nested more than {MAX_DEPTH} levels deep")
        self._inside.add(id(node))
        entries = iter(node.items() if isinstance(node, dict) else enumerate(node))
        self._open.append(_Frame(node, entries, names, pieces))
        self._spend(len(node) * len(self._open))
        if type(node) is OrderedDict and vars(node):  # there are no leaves, but depth and length count
            self._trail.append(_ATTRIBUTES)
            self._enter(vars(node), None, pieces)

    def _leave(self, node: Any, names: dict[Any, Any] | None) -> None:
        self._open.pop()
        self._inside.remove(id(node))
        if not self._open:
            return
        key = self._trail.pop()
        above = self._open[-1]
        if names and above.names is not None:
            self.index.add(above.names, key, names)

    def _spend(self, keys: int, values: int = 0) -> None:
        self._room -= keys
        self._room_of_values -= values
        if self._room < 0 or self._room_of_values < 0:
            raise BadCheckpoint(f"{self._place}: {self.crowded(self._room < 0)}")

    def crowded(self, containers: bool) -> str:
        return "too many values are under long keys"

    def _is_plain(self, node: Any) -> bool:
        """Whether it is not a container, is empty, or is a list of plain values."""
        if type(node) in (str, bytes, bytearray):
            self._spend(0, len(node))
            return True
        if type(node) in (list, tuple):
            size = self._plain.get(id(node))
            if size is None:
                size = self._plain[id(node)] = self._size(node)
            self._spend(0, max(size, 0))
            return size >= 0
        return type(node) not in CONTAINERS or not (node or vars(node) if type(node) is OrderedDict else node)

    def _length(self) -> int:
        return sum(len(key) if type(key) is str else 20 for key in self._trail)

    def _leaf(self, names: dict[Any, Any], key: Any, leaf: Any) -> None:
        self._spend(0, self._length())
        number = len(self.leaves)
        self.leaves.append(leaf)
        self.index.numbers.append(number)
        self.index.add(names, key, number)

    def _path(self) -> str:
        return write_path(
            [label for key in self._trail if key is not _ATTRIBUTES for label in labels(key)], self.separator
        )

    def _bad(self, reason: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self._place}{', ' if self.shares else ': '}{shown(self._path())}: {reason}")

    def _size(self, values: Sequence[Any]) -> int:
        """How much a list of plain values holds; -1 if it holds containers or leaves."""
        if any(type(value) in CONTAINERS or type(value) is self.kind for value in values):
            return -1
        return len(values) + sum(len(value) for value in values if type(value) in (str, bytes, bytearray))
