"""`Outline`: what a checkpoint holds, in order: its leaves and everything else, each with its true keys.

Names are texts, which cannot say whether `layers/0` is a position in a list, the key 0 or the key "0", or whether `a/b`
is one key or two. An outline can, so formats that hold more than a flat table of arrays are written from one.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from paramend.errors import RenameClash
from paramend.leaves.leaves import Leaves, keys_of
from paramend.leaves.nested import folded
from paramend.leaves.paths import labels, write_path

T = TypeVar("T")

# Keys from the root: text and whole numbers mostly.
Keys = tuple[Any, ...]

# The key of the content of a box.
BOXED = "value"
CONTAINERS = (dict, OrderedDict, list, tuple)


class Place(NamedTuple):
    """The place of a leaf."""

    number: int  # the leaf
    like: int = -1  # the leaf of the source that it takes after; -1 for none
    # The kind of box whose content it is, "NNX Variable" or "box" (of Flax metadata); "" for none. Orbax holds such
    # content under a further key, "value"; flax holds that of metadata so.
    boxed: str = ""
    key: str = ""  # the implementation of a typed PRNG key whose numbers the leaf is; "" for other leaves
    device: str = ""  # the device of such a key
    scalar: bool = False  # whether the leaf is a number that Orbax keeps as an array


@dataclass(frozen=True, slots=True)
class Outline:
    """What a checkpoint holds.

    >>> found = outline({"w": 1.5, "layers": [{"b": 2.5}], "step": 3}, lambda node: 0 if type(node) is float else None)
    >>> found.entries
    [(('w',), Place(number=0, ...)), (('layers', 0, 'b'), Place(number=0, ...)), (('step',), 3)]
    """

    # Keys → the `Place` of a leaf; or what is not an array: a plain value, a list of plain values, an empty container.
    entries: Sequence[tuple[Keys, Any]]
    # Keys → the container there, for lists, tuples and OrderedDicts; all others are dicts.
    containers: Mapping[Keys, Any] = field(default_factory=dict)
    format: str = ""  # the format of the file that it is of; "" for others

    @property
    def places(self) -> dict[int, tuple[Keys, Place]]:
        """Leaf number → its keys and its place."""
        return {value.number: (keys, value) for keys, value in self.entries if type(value) is Place}

    @property
    def others(self) -> list[tuple[Keys, Any]]:
        return [(keys, value) for keys, value in self.entries if type(value) is not Place]

    def nested(self, made: Callable[[Any], Any], close: Callable[[dict[Any, Any], Any], Any] | None = None) -> Any:
        """The tree; `RenameClash` if two entries have the same keys, or one would be below another.

        Args:
            made: what to put in the place of an entry.
            close: (entries by key, the container that held them; None for a dict) → the container that holds them.
        """
        tree: Any = _Node()
        for keys, value in self.entries:
            if not keys and len(self.entries) == 1:
                return made(value)
            node = tree
            for at, key in enumerate(keys[:-1]):
                node = node.setdefault(key, _Node())
                if type(node) is not _Node:
                    raise RenameClash(f"{shown(keys)} would be below {shown(keys[: at + 1])}, which is not a container")
            if not keys or keys[-1] in node:
                raise RenameClash(f"two leaves would be at {shown(keys)}", hint="rename or delete one first")
            node[keys[-1]] = made(value)
        return _closed(tree, self.containers, close or closed)


class _Node(dict[Any, Any]):
    """A container that is being filled."""


def closed(entries: dict[Any, Any], like: Any) -> Any:
    """The entries in a container of the same kind as another. A list that lacks some of its positions becomes a dict.

    >>> closed({1: "b", 0: "a"}, []), closed({"a": 1}, None)
    (['a', 'b'], {'a': 1})
    """
    if isinstance(like, list | tuple):
        if entries.keys() != set(range(len(entries))):
            return {str(at): value for at, value in entries.items()}
        return type(like)(entries[at] for at in range(len(entries)))
    if not isinstance(like, OrderedDict):
        return dict(entries)
    made = OrderedDict(entries)
    vars(made).update(vars(like))  # torch keeps the versions of modules there
    return made


def _closed(root: Any, containers: Mapping[Keys, Any], close: Callable[..., Any]) -> Any:
    def inside(entry: tuple[Keys, Any]) -> list[tuple[Keys, Any]]:
        keys, node = entry
        return [((*keys, key), child) for key, child in node.items()] if type(node) is _Node else []

    def made(entry: tuple[Keys, Any], inner: list[Any]) -> Any:
        keys, node = entry
        return close(dict(zip(node, inner, strict=True)), containers.get(keys)) if type(node) is _Node else node

    return folded(((), root), inside, made)


@runtime_checkable
class Outlined(Protocol):
    """Leaves that know more of their structure than their names say."""

    def outline(self) -> Outline:
        """What is there."""


def outline_of(source: Leaves) -> Outline:
    """The outline of a checkpoint; of a flat table of names, that table."""
    if isinstance(source, Outlined):
        return source.outline()
    paths = source.index.paths
    return Outline([(keys_of(paths[number]), Place(number)) for number in source.index.numbers])


def outline(root: Any, place: Callable[[Any], int | None], format: str = "") -> Outline:
    """The outline of nested dicts, lists and tuples; `place` gives the number of a leaf, and is asked in order."""
    entries: list[tuple[Keys, Any]] = []
    containers: dict[Keys, Any] = {}
    rest: list[tuple[Keys, Any]] = [((), root)]
    plain = once(_is_plain)
    while rest:
        keys, node = rest.pop()
        number = place(node)
        if number is not None:
            entries.append((keys, Place(number)))
        elif type(node) not in CONTAINERS or not node or plain(node):
            entries.append((keys, node))
        else:
            if type(node) is not dict:
                containers[keys] = node
            inner = node.items() if isinstance(node, dict) else enumerate(node)
            rest += reversed([((*keys, key), child) for key, child in inner])
    return Outline([] if entries == [((), {})] else entries, containers, format)


def _is_plain(node: Any) -> bool:
    """Whether it is a list of plain values, which is kept whole."""
    kinds = set(map(type, node)) if type(node) in (list, tuple) else {dict}
    return kinds.isdisjoint(CONTAINERS) and kinds <= ATOMS


# The types of plain values.
ATOMS = frozenset({int, float, bool, complex, str, bytes, type(None)})


def once(ask: Callable[[Any], T]) -> Callable[[Any], T]:
    """A function of values that is called once for each object: one list may be at thousands of places. The objects
    must outlive it."""
    known: dict[int, T] = {}

    def asked(value: Any) -> T:
        if id(value) not in known:
            known[id(value)] = ask(value)
        return known[id(value)]

    return asked


def texts(keys: Iterable[Any]) -> tuple[str, ...]:
    """Keys as texts."""
    return tuple(map(str, keys))


def shown(keys: Keys, separator: str = "/") -> str:
    """Keys as a path."""
    return write_path([label for key in keys for label in labels(key)], separator)
