"""A model as its weights: each quantised one is a leaf, chosen by its own name or by those of what it is stored in."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from paramend.anatomy.documents import document_of
from paramend.anatomy.quantization import FILES, stated
from paramend.arrays.registry import to_numpy
from paramend.checkpoints.assemble import origin_of
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.errors import NoMatch, RenameClash
from paramend.leaves.described import Described
from paramend.leaves.groups import groups_of, weight_name
from paramend.leaves.leaves import Editable, Index, keys_of
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Held
from paramend.leaves.paths import Label, Part, text_of, write_path
from paramend.leaves.schemes import WEIGHTS
from paramend.leaves.specs import Spec
from paramend.leaves.weights import Weight, weight_of
from paramend.reports import wording
from paramend.selectors.selector import SelectorLike, Text, resolve, sel

# Name of a file beside the weights, what it holds → what it holds then; None if nothing.
Change = Callable[[str, dict[str, Any]], dict[str, Any] | None]


class Seen(Described):
    """Leaves in which each quantised weight is one, under its own name and with its own spec.

    Attributes:
        leaves: the leaves as they are stored.
        groups: number of a payload → its group; of what is left of one without it, the number of its first leaf.

    Raises:
        RenameClash: another leaf has the name of a weight.
    """

    def __init__(self, leaves: Editable) -> None:
        super().__init__(leaves)
        self.leaves = leaves
        self.groups = {group.numbers[0]: group for group in groups_of(leaves)}
        paths = dict(leaves.index.paths)
        for first, group in self.groups.items():
            if first == group.payload:
                paths[first] = renamed(paths[first], weight_name(text_of(paths[first][-1]), group.scheme))
            for number in group.numbers[1:]:
                paths.pop(number, None)
        self.index = Index(leaves.index.separator)
        for number, path in paths.items():
            names: Any = self.index.names
            for label in path[:-1]:
                names = names.setdefault(label, {}) if isinstance(names, dict) else names
            if not isinstance(names, dict) or names.setdefault(path[-1], number) != number:
                raise RenameClash(f"{write_path(path, self.index.separator)} is there, and is no part of that weight")
            self.index.numbers.append(number)
        for path, layers in leaves.index.layers.items():
            self.index.mark(path, layers)

    def spec(self, number: int) -> Spec:
        return self.weight(number).spec if number in self.groups else super().spec(number)

    def weight(self, payload: int) -> Weight:
        """The weight of a group; `Quantized` if it cannot be decoded, `SpecMismatch` if something disagrees."""
        says = partial(stated, getattr(self.leaves, "quantization", None))
        return weight_of(self.leaves, self.groups[payload], self.origin, says)

    def origin(self, number: int) -> Origin:
        """Where the values of a leaf are; of a checkpoint nothing is read."""
        leaves = self.leaves
        return origin_of(leaves, number) if isinstance(leaves, Checkpoint) else Held(to_numpy(leaves.read(number)))

    def chosen(self, selector: SelectorLike) -> list[int]:
        """The payloads of the groups that a selector means, in order, with those that are tied to them.

        The names of the weights count. Text may name what they are stored in as well: codes, or scales alone; other
        selectors the codes.

        Raises:
            NoMatch: none is meant.
        """
        selector = sel(selector)
        payloads = {number: at for at, group in self.groups.items() for number in group.numbers}
        try:
            numbers: Iterable[int] = resolve(selector, self)
        except NoMatch:
            numbers = resolve(selector, self.leaves)
            payloads = payloads if isinstance(selector, Text) else {at: at for at in self.groups}
        twins = {twin for number in numbers for twin in self.leaves.twins(number)}
        found = {payloads[number] for number in twins if number in payloads}
        if not found:
            near = [self.index.path(payload) for payload in self.groups][:1]
            raise NoMatch(
                f"{selector!r} names {wording.plural(len(twins), 'leaf', 'leaves')}, none of which is quantised",
                hint=f'"{near[0]}"' if near else "",
            )
        return self.index.ordered(found)

    def modules(self, numbers: Iterable[int]) -> list[str]:
        """The modules that hold some leaves, each once, as configurations name them."""
        return list(dict.fromkeys(".".join(self.index.pieces(number)[:-1]) for number in numbers))

    def floats(self, without: Iterable[int] = ()) -> list[str]:
        """The modules with a matrix of floats that is not quantised."""
        gone, spec = {*self.groups, *without}, super().spec
        some = (n for n in self.index.numbers if n not in gone and self.index.pieces(n)[-1] in WEIGHTS)
        return self.modules(n for n in some if spec(n).kind == "float" and spec(n).ndim > 1)


def renamed(path: tuple[Label, ...], name: str) -> tuple[Label, ...]:
    """The path of a leaf under another name beside it."""
    last = path[-1]
    return (*path[:-1], last._replace(text=name) if isinstance(last, Part) else name) if text_of(last) != name else path


def keys(path: tuple[Label, ...]) -> list[tuple[str, int | None]]:
    """A path in the form of `renames.keys`, whose containers are those of a leaf that it comes in the place of."""
    return [(key, depth) for depth, key in enumerate(keys_of(path))]


def followed(tree: Any, change: Change) -> tuple[Any, tuple[str, ...]]:
    """A tree; of a checkpoint, with other files beside its weights, and what is to be said of them.

    Raises:
        BadCheckpoint: one of them is damaged.
    """
    said: list[str] = []
    for name, _ in FILES:
        document = document_of(tree, name)
        if document is not None and document.text:
            values = change(name, document.values)
            new = replace(document, text=b"") if values is None else document.holding(values)
            if new.text != document.text:
                tree = tree.planned(tree.plan.beside(new))
                said += [f"{name} goes"] if values is None else [f"{name}: {each}" for each in new.changes]
    return tree, tuple(said)
