"""Which quantised weights a selector means: by their own names, or by those of the leaves that they are stored in."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from paramend.anatomy.quantization import stated
from paramend.arrays.registry import to_numpy
from paramend.checkpoints.assemble import origin_of
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.errors import NoMatch, RenameClash
from paramend.leaves.described import Described
from paramend.leaves.groups import Group, groups_of, weight_name
from paramend.leaves.leaves import Editable, Index
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Held
from paramend.leaves.paths import Joined, Label, Part, text_of, write_path
from paramend.leaves.specs import Spec
from paramend.leaves.weights import Weight, weight_of
from paramend.reports import wording
from paramend.selectors.selector import SelectorLike, Text, resolve, sel


class Seen(Described):
    """Leaves in which each quantised weight is one, under its own name and with its own spec.

    Attributes:
        groups: number of a payload → its group.

    Raises:
        RenameClash: another leaf has the name of a weight.
    """

    def __init__(self, leaves: Editable) -> None:
        super().__init__(leaves)
        self._leaves = leaves
        self.groups = {group.payload: group for group in groups_of(leaves) if group.payload is not None}
        paths = dict(leaves.index.paths)
        for payload, group in self.groups.items():
            paths[payload] = labels_of(leaves, group)
            for number in group.companions:
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
        return self.weight(self.groups[number]).spec if number in self.groups else super().spec(number)

    def weight(self, group: Group) -> Weight:
        """The weight that a group is.

        Raises:
            Quantized: its scheme cannot be decoded.
            SpecMismatch: leaves and configuration disagree.
        """
        leaves = self._leaves
        says = partial(stated, getattr(leaves, "quantization", None))
        return weight_of(leaves, group, partial(origin_in, leaves), says)

    def chosen(self, selector: SelectorLike) -> list[int]:
        """The payloads of the groups that a selector means, in order, with those that are tied to them.

        The names of the weights count. Text may name what they are stored in as well: codes, or scales alone; other
        selectors the codes.

        Raises:
            NoMatch: none is meant.
        """
        selector, leaves = sel(selector), self._leaves
        payloads = {number: at for at, group in self.groups.items() for number in group.numbers}
        try:
            numbers: Iterable[int] = resolve(selector, self)
        except NoMatch:
            numbers = resolve(selector, leaves)
            payloads = payloads if isinstance(selector, Text) else {at: at for at in self.groups}
        twins = sorted({twin for number in numbers for twin in leaves.twins(number)})
        found = dict.fromkeys(payloads[number] for number in twins if number in payloads)
        if not found:
            others = list(self.groups)
            near = self.index.path(others[0]) if others else ""
            raise NoMatch(
                f"{selector!r} names {wording.plural(len(twins), 'leaf', 'leaves')}, and none is a quantised weight"
                + ("" if others else ": there is none here"),
                hint=f'"{near}"' if near else "",
            )
        return self.index.ordered(found)


def labels_of(leaves: Editable, group: Group) -> tuple[Label, ...]:
    """The path of the weight that a group is: that of its payload, under the name of the weight."""
    assert group.payload is not None
    path = leaves.index.paths[group.payload]
    return renamed(path, weight_name(text_of(path[-1]), group.scheme))


def renamed(path: tuple[Label, ...], name: str) -> tuple[Label, ...]:
    """The path of a leaf under another name beside it."""
    *above, last = path
    if text_of(last) == name:
        return path
    if isinstance(last, Part):
        return (*above, last._replace(text=name))
    return (*above, Joined(name, last.before) if isinstance(last, Joined) else name)


def origin_in(leaves: Editable, number: int) -> Origin:
    """Where the values of a leaf are: of a checkpoint nothing is read."""
    return origin_of(leaves, number) if isinstance(leaves, Checkpoint) else Held(to_numpy(leaves.read(number)))
