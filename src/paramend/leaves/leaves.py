"""`Leaves`: named arrays that can be described without being read, the one noun of selectors and engines."""

import gc
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn, Protocol, Self, runtime_checkable

from paramend.errors import Unsupported
from paramend.leaves.paths import Label, Names, Part, labels, text_of, write_piece
from paramend.leaves.specs import Spec


@contextmanager
def uncollected() -> Iterator[None]:
    """Pause the garbage collector while an index grows. An index contains no garbage, and each pass over it would cost
    as much as building it."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


class Layered(dict[Label, Any]):
    """Names of numbered layers, where the entries from number `layers` on are none: positions do not count them."""

    __slots__ = ("layers",)

    def __init__(self, names: Names, layers: int) -> None:
        super().__init__(names)
        self.layers = layers

    def __reduce__(self) -> tuple[type["Layered"], tuple[Names, int]]:
        return Layered, (dict(self), self.layers)


class Index:
    """The names of a tree's array leaves. One index serves every tree of the same structure."""

    def __init__(self, separator: str = "/") -> None:
        self.names: Names = {}  # the tree of names, label → subtree or leaf number
        self.numbers: list[int] = []  # in the order in which leaves are listed
        self.separator = separator  # between keys of a printed path: "/" for JAX trees, "." for torch ones
        self.spans: list[tuple[type, int, int]] = []  # of containers: the leaves of one are `numbers[start:stop]`
        self.found: dict[Hashable, tuple[int, ...]] = {}  # earlier matches, by selector
        # Path of numbered entries → the first number of those that are no layers; see `mark`.
        self.layers: dict[tuple[str, ...], int] = {}
        # Which leaves may be one weight together, by their names, from `leaves.groups`; None until it is asked for.
        self.near: dict[int, tuple[Any, ...]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is found out again when it is wanted."""
        kept = ("names", "numbers", "separator", "spans", "layers")
        return {name: getattr(self, name) for name in kept} | {"found": {}, "near": None}

    @classmethod
    def of_names(cls, names: Iterable[str], separator: str = ".") -> "Index":
        """The index of a flat table of names, as a checkpoint file holds."""
        index = cls(separator)
        parents: dict[str, Names] = {}
        ends: dict[str, Part] = {}  # most names end like others
        with uncollected():
            for number, name in enumerate(names):
                index.numbers.append(number)
                at = max(name.rfind("."), name.rfind("/"))
                end = name[at:]
                last = ends.get(end) or ends.setdefault(end, Part(end[1:], end[:1], True))
                parent = index._parent(name[: at + 1], parents) if at > 0 and last.text else None
                if parent is None or last in parent:
                    index.add(index.names, name, number)
                else:
                    parent[last] = number
        return index

    def _parent(self, prefix: str, known: dict[str, Names]) -> Names | None:
        """The subtree of names with this prefix, up to a separator, created if needed; None if a piece would be empty.
        Neighbours in a file share most of their names, so each subtree is looked up once."""
        below: list[int] = []  # where the pieces begin that are not yet known, last to first
        stop = len(prefix)
        while stop and prefix[:stop] not in known:
            stop = max(prefix.rfind(".", 0, stop - 1), prefix.rfind("/", 0, stop - 1)) + 1
            below.append(stop)
        found = known[prefix[:stop]] if stop else self.names
        for start, end in pairwise([*reversed(below), len(prefix)]):
            label = Part(prefix[start : end - 1], prefix[start - 1] if start else "", False)
            if not label.text:
                return None
            found = known[prefix[:end]] = found.setdefault(label, {})
        return found

    def mark(self, path: tuple[str, ...], layers: int) -> None:
        """Make the numbered entries at a path, from a number on, no layers to positions; nothing if it leads nowhere.

        >>> index = Index.of_names(["h.0.w", "h.1.w", "h.2.eh_proj"])
        >>> index.mark(("h",), 2)
        >>> from paramend.selectors.patterns import parse
        >>> parse("h[-1].**").find(index.names), parse("h.2.**").find(index.names)
        ([1], [2])
        """
        *above, last = path
        names = self.names
        for text in above:
            names = next((c for label, c in names.items() if text_of(label) == text and type(c) is not int), {})
        for label, child in names.items():
            if text_of(label) == last and type(child) is not int:
                names[label] = Layered(child, layers)
                self.layers[path] = layers
                self.found.clear()

    def add(self, names: Names, key: object, child: Any) -> None:
        """Enter a leaf number or a subtree under a key of a subtree of names."""
        if type(key) is str and key not in names and "/" not in key and "." not in key:  # nearly all keys
            names[key] = child
            return
        path = labels(key)
        for label in path[:-1]:
            inner = names.get(label)
            if inner is None or type(inner) is int:
                inner = names[label] = {}
            names = inner
        last = path[-1]
        while last in names:  # two keys with the same text, such as list position 0 and key "0"
            last = last._replace(serial=last.serial + 1) if isinstance(last, Part) else Part(last, "", True, 1)
        names[last] = child

    @cached_property
    def paths(self) -> dict[int, tuple[Label, ...]]:
        """Leaf number → labels from the root, in the order of `numbers`."""
        out: dict[int, tuple[Label, ...]] = {}
        rest: list[tuple[Names, tuple[Label, ...]]] = [(self.names, ())]
        while rest:
            names, path = rest.pop()
            for label, child in names.items():
                if type(child) is int:
                    out[child] = (*path, label)
                else:
                    rest.append((child, (*path, label)))
        return {number: out[number] for number in self.numbers}

    @cached_property
    def texts(self) -> dict[int, str]:
        """Leaf number → its path as text."""
        out: dict[int, str] = {}
        rest = [(self.names, "")]
        while rest:
            names, prefix = rest.pop()
            for label, child in names.items():
                before = (getattr(label, "before", "") or self.separator) if prefix else ""
                text = f"{prefix}{before}{write_piece(text_of(label))}"
                if type(child) is int:
                    out[child] = text
                else:
                    rest.append((child, text))
        return out

    @cached_property
    def _rank(self) -> dict[int, int] | None:
        """The position of each leaf number in `numbers`; None if these ascend."""
        ascending = all(a < b for a, b in pairwise(self.numbers))
        return None if ascending else {number: place for place, number in enumerate(self.numbers)}

    def ordered(self, numbers: Iterable[int]) -> list[int]:
        """Leaf numbers in the order in which leaves are listed."""
        return sorted(numbers) if self._rank is None else sorted(numbers, key=self._rank.__getitem__)

    def path(self, number: int) -> str:
        """The path of a leaf as text; it is a selector for that leaf."""
        return self.texts[number]

    def name(self, number: int) -> str:
        """The path of a leaf as plain text, nothing escaped: the name of a tensor in a file.

        >>> index = Index.of_names(["a*b.w"])
        >>> index.name(0), index.path(0)
        ('a*b.w', 'a\\\\*b.w')
        """
        return plain(self.paths[number], self.separator)

    def pieces(self, number: int) -> tuple[str, ...]:
        """The path of a leaf piece by piece: the same for `fc.weight` in a state dict and fc → weight in a module."""
        return tuple(map(text_of, self.paths[number]))


def plain(path: Iterable[Label], separator: str) -> str:
    """A path as plain text: keys joined by the separator, nothing escaped."""
    return separator.join(keys_of(path))


def keys_of(path: Iterable[Label]) -> tuple[str, ...]:
    """A path key by key, as the containers have it.

    >>> keys_of([*labels("mlp/~/linear_0"), *labels("w")])
    ('mlp/~/linear_0', 'w')
    """
    keys: list[str] = []
    for label in path:
        before = getattr(label, "before", "")
        if before and keys:
            keys[-1] += before + text_of(label)
        else:
            keys.append(text_of(label))
    return tuple(keys)


def labels_of(keys: Iterable[str]) -> tuple[Label, ...]:
    """The labels of the keys of a path: `keys_of` turned round."""
    return tuple(label for key in keys for label in labels(key))


class Leaves(Protocol):
    """Anything whose leaves have names and specs: a pytree, a module, a checkpoint. A leaf is known by its number.
    Numbers may have gaps: leaves that are not arrays cannot be selected."""

    @property
    def index(self) -> Index:
        """The names."""

    @property
    def ties(self) -> Mapping[int, int]:
        """Leaf number → the first number of the same leaf, for leaves with several paths."""

    def spec(self, number: int) -> Spec:
        """Shape and dtype of a leaf, without reading it."""

    def nbytes(self, number: int) -> int:
        """The number of bytes of a leaf; on disk also for a dtype of unknown width."""

    def refusal(self, number: int) -> str:
        """Why a leaf cannot be read as an array, or ""; leaves in memory always can."""

    def read(self, number: int) -> Any:
        """The array."""

    def children(self, node: Any) -> list[tuple[Any, Any]] | None:
        """The entries of a container of such trees, as (key, child); None for a leaf."""


@runtime_checkable
class Explained(Protocol):
    """Leaves that know more of a name than that it is not among them."""

    def absence(self, text: str) -> tuple[str, str] | None:
        """Why a selector finds nothing, and the path of what it means; None if that is not known."""


class Group(NamedTuple):
    """Leaves that go, and those that are made of them and come in the place of the first."""

    numbers: tuple[int, ...]  # the leaves that go
    paths: tuple[Sequence[tuple[str, int | None]], ...]  # the paths of those that come, in the form of `renames.keys`
    make: Callable[[Sequence[Any]], Sequence[Any]]  # the arrays, or the origins, of the first → those of the second
    boxed: Callable[[Any], Any] | None = None  # a box like that of the first, for those that come; None: as it is
    # Which key of the paths is a position, for which a list is made if there is none; None: no key.
    position: int | None = None


class Editable(Leaves):
    """Leaves that carry out edits: trees in memory immediately, checkpoints when they are saved. Methods return an
    edited copy; the numbers of a checkpoint's leaves stay."""

    raw = False  # whether leaves are taken as they are stored, also the codes and scales of quantised weights

    def __getstate__(self) -> dict[str, Any]:
        """Without the view of its weights, which is found out again."""
        return {name: value for name, value in vars(self).items() if name != "_weighed"}

    def twin(self) -> Self:
        """The same leaves, without the view of their weights, which refers to such a twin: a circle would keep files
        open and arrays in memory."""
        again = object.__new__(type(self))
        again.__dict__.update((name, value) for name, value in vars(self).items() if name != "_weighed")
        return again

    def as_stored(self, raw: bool = True) -> Self:
        """The same leaves, taken as they are stored or not."""
        if self.raw == raw:
            return self
        again = self.twin()
        again.raw = raw
        return again

    @property
    def patched_by(self) -> str:
        """Code that edits it in place, with `{}` for the edit; "" if the verbs that end in `_` do so."""
        return ""

    @abstractmethod
    def twins(self, number: int) -> Sequence[int]:
        """The numbers of all paths of a leaf."""

    @abstractmethod
    def fetch(self, number: int, index: Any = None) -> Any:
        """A leaf, or a slice of it, as users get it: from a file a copy, which no later patch changes."""

    @abstractmethod
    def edited(self, calls: Mapping[int, Any]) -> Any:
        """A copy with calls of ops on some leaves, each checked against its leaf."""

    @abstractmethod
    def edited_(self, calls: Mapping[int, Any]) -> None:
        """Carry out calls of ops in place."""

    @abstractmethod
    def deleted(self, numbers: Iterable[int]) -> Any:
        """A copy without some leaves, under all their paths."""

    @abstractmethod
    def moved(self, selector: Any, numbers: Iterable[int], to: str) -> Any:
        """A copy with the selected leaves under new paths."""

    @abstractmethod
    def relocated(self, moves: Mapping[int, Sequence[tuple[str, int | None]]]) -> Any:
        """A copy with some leaves under other paths, in the form of `renames.keys`."""

    @abstractmethod
    def expression(self, number: int) -> Any:
        """The origin of a leaf, edited."""

    @abstractmethod
    def computing(self, origin: Any, call: Any, *, path: str, pieces: tuple[str, ...]) -> Any:
        """The origin of values after a call of an op, which depends on a path where they are random."""

    def is_blank(self, number: int) -> bool:
        """Whether a leaf has no values here and now: it is traced, or abstract."""
        return False

    def as_given(self, values: Any, number: int) -> Any:
        """A numpy array as users get it: of the library and on the devices of a leaf."""
        return values

    @abstractmethod
    def regrouped(self, groups: Sequence[Group], *, close_up: bool = True) -> Any:
        """A copy in which groups of leaves are replaced by others; list positions close up, or must have no holes."""

    @abstractmethod
    def labelled(self, labels: Mapping[int, Any], rest: Any) -> Any:
        """The containers of the tree holding labels in place of leaves; `rest` where there is none."""


def separator_of(names: Iterable[str]) -> str:
    """The separator of keys in names: "/" where some hold "/" and none ".", else ".".

    >>> separator_of(["params/Dense_0/kernel"]), separator_of(["fc.weight", "a/b"])
    ('/', '.')
    """
    text = "\n".join(names)
    return "/" if "/" in text and "." not in text else "."


def entries(node: Any) -> list[tuple[Any, Any]] | None:
    """The entries of a dict, list or tuple as (key, child), None for anything else: `children` for files."""
    if isinstance(node, Mapping):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, list | tuple) else None


def unique(leaves: Leaves, numbers: Sequence[int]) -> tuple[int, ...]:
    """The numbers without second paths to the same leaf. Of several paths to a leaf, the first one given is kept."""
    if not leaves.ties:
        return tuple(numbers)
    first: dict[int, int] = {}
    for number in numbers:
        first.setdefault(leaves.ties.get(number, number), number)
    return tuple(first.values())


def tied(owners: Mapping[int, Hashable]) -> dict[int, int]:
    """Leaf number → the first number of the same owner, for owners of several: the ties of a tree.

    >>> tied({0: "a", 1: "b", 2: "a"})
    {0: 0, 2: 0}
    """
    first: dict[Hashable, int] = {}
    ones = {number: first.setdefault(owner, number) for number, owner in owners.items()}
    shared = {one for number, one in ones.items() if one != number}
    return {number: one for number, one in ones.items() if one in shared}


class Described:
    """What leaves are called and what they are, without values; `path` is that of their checkpoint, or ""."""

    def __init__(self, leaves: Leaves) -> None:
        self.path = str(getattr(leaves, "path", ""))
        self.ties: Mapping[int, int] = dict(leaves.ties)
        self.index = Index(leaves.index.separator)
        self.index.names, self.index.numbers = leaves.index.names, leaves.index.numbers
        self._specs = {number: leaves.spec(number) for number in leaves.index.numbers}
        self._nbytes = {number: leaves.nbytes(number) for number in leaves.index.numbers}

    def __eq__(self, other: object) -> bool:
        return self._said() == other._said() if isinstance(other, Described) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.path)

    def _said(self) -> tuple[object, ...]:
        return self.path, self.ties, self.index.texts, self._specs

    def spec(self, number: int) -> Spec:
        return self._specs[number]

    def nbytes(self, number: int) -> int:
        return self._nbytes[number]

    def refusal(self, number: int) -> str:
        return f"a report tells of {self.index.path(number)} and does not hold it"

    def read(self, number: int) -> NoReturn:
        """Refuses: the values are elsewhere."""
        raise Unsupported(self.refusal(number), hint=f'pm.open("{self.path}")' if self.path else "")

    def children(self, node: Any) -> None:
        return None
