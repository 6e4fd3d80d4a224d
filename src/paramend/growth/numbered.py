"""Numbered layers under one parent, which an order rearranges, found in the names of any tree."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from paramend.checkpoints.anatomy import anatomy
from paramend.errors import BadArgument, NoMatch
from paramend.growth.depth import Order
from paramend.leaves.leaves import Index, Leaves
from paramend.leaves.paths import Label, Names, Part, text_of, write_piece
from paramend.reports import wording
from paramend.selectors.layers import Notation, Numbered, Pieces, candidates, known, layers_of
from paramend.selectors.patterns import parse


@dataclass(frozen=True)
class Layers(Numbered):
    """Numbered layers under one parent, such as `layers/0`, `layers/1` or `Dense_0`, `Dense_1`; `numbers` ascend."""

    # The numbers of the siblings that follow them and are renumbered; `blocks` are the last of them.
    after: tuple[int, ...] = ()
    # The difference of consecutive numbers. If it is more than 1, entries between belong to the layer before.
    step: int = 1
    before: tuple[int, ...] = ()  # the numbers of the siblings before them

    def target(self, position: int) -> int:
        return self.numbers[0] + position * self.step

    def whole(self, order: Order) -> tuple[list[int], int]:
        """For each layer of the outcome, with those before and after these, the old one; and how many there were."""
        start, stop = len(self.before), len(self.before) + order.of
        n = stop + len(self.after) - len(self.blocks)
        return [*range(start), *(start + source for source in order.sources), *range(stop, n)], n

    def moved(self, number: int, order: Order) -> list[tuple[int, int | None]]:
        """Where an entry of this number goes: (new number, the new layer that it is in, None outside of layers)."""
        if number < self.numbers[0]:
            return [(number, None)]
        if self.after and number >= self.after[0]:
            return [(number + (len(order) - order.of) * self.step, None)]
        layer = max(i for i, start in enumerate(self.numbers) if start <= number)
        offset = number - self.numbers[layer]
        return [(self.target(j) + offset, j) for j, source in enumerate(order.sources) if source == layer]

    def select(self, targets: Sequence[int], separator: str) -> str:
        numbers = [self.digits(self.target(target) + i) for target in targets for i in range(self.step)]
        inner = numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}"
        head, tail = (part and write_piece(part) for part in (self.head, self.tail))
        return separator.join((*map(write_piece, self.parent), f"{head}{inner}{tail}", "**"))


def find(leaves: Leaves, text: str | None) -> list[Layers]:
    """The layers that a text names, grouped by parent; without a text, the only layers of the tree.

    >>> from paramend.edits.memory import Memory
    >>> tree = Memory({"layers": [{"w": np.ones(2)} for _ in range(3)]})
    >>> find(tree, "layers[*]") == find(tree, "layers/<n>/**") == find(tree, None)
    True
    """
    index = leaves.index
    if text is None:
        text = _only(leaves)
    said, numbered = layers_of(index, text)
    found = [_layers(said, one) for one in numbered]
    for one in found:
        for other in found:
            if one.place(other.parent) is not None:
                why = f'layers="{text}" names layers within layers: {"/".join(one.parent)} and {"/".join(other.parent)}'
                raise BadArgument(why, hint=known(index))
    if len({len(one.numbers) for one in found}) > 1:
        counts = [f"{'/'.join((*one.parent, one.head))} has {len(one.numbers)}" for one in found]
        why = f'layers="{text}" matches different numbers of layers: {wording.listing(counts)}'
        raise BadArgument(why, hint=known(index))
    return found


def _layers(said: Notation, found: Numbered) -> Layers:
    places, numbers = said.pick(found), found.numbers
    if not places or places != list(range(places[0], places[-1] + 1)):
        run = f"[{places[0]}:{places[-1] + 1}]" if places else "[*]"
        raise BadArgument(
            f'layers="{said.text}" selects {"no layers" if not places else "layers with gaps between them"}: `layers` '
            "must select consecutive ones; the order says which of them are copied or left out",
            hint=f'layers="{said.with_index(run)}"',
        )
    picked, after = tuple(numbers[i] for i in places), (*numbers[places[-1] + 1 :], *found.blocks)
    steps = {b - a for a, b in zip((*picked, *after), (*picked, *after)[1:], strict=False)}
    if len(steps) > 1:
        raise BadArgument(
            f'the numbers of layers="{said.text}" rise by {wording.listing(sorted(map(str, steps)))}: '
            f"{wording.listing(list(map(str, (*picked, *after))))}",
            hint="rename the layers first, so that their numbers rise evenly",
        )
    step = steps.pop() if steps else 1
    before = numbers[: places[0]]
    return Layers(found.parent, found.head, found.tail, picked, found.width, found.blocks, after, step, before)


def _only(leaves: Leaves) -> str:
    """The text of the only layers of a tree. Lists come first; siblings such as `Dense_0` must have equal specs."""
    index = leaves.index
    found = candidates(index)
    lists = [one for one in found if not one.head]
    if len(lists) > 1:
        body = anatomy(leaves).body  # beside the layers may be towers, and blocks that predict further tokens
        if body.config and body.stack is not None and not body.side:
            lists = [one for one in lists if one == body.stack.run]
    names = [one.written(index.separator) for one in lists or found]
    if len(names) != 1:
        raise NoMatch(
            f"`layers` is ambiguous: this tree has {wording.listing(names)}"
            if names
            else "this tree has no numbered layers",
            hint=known(index),
        )
    if not lists:
        _check_alike(leaves, found[0], names[0])
    return names[0]


def _check_alike(leaves: Leaves, found: Numbered, text: str) -> None:
    """Refuse siblings of different specs, as the first and the last Dense layer of a network often have."""
    specs: dict[int, dict[Pieces, str]] = {number: {} for number in found.numbers}
    for number in leaves.index.numbers:
        pieces = leaves.index.pieces(number)
        place = found.place(pieces)
        if place in specs:
            specs[place][pieces[len(found.parent) + 1 :]] = str(leaves.spec(number))
    layers = list(specs.values())
    if all(layer == layers[0] for layer in layers):
        return
    start, stop = _longest(layers)
    if stop - start > 1:
        text = text.replace("[*]", f"[{start or ''}:{stop - len(layers) or ''}]")
    why = f"`layers` is ambiguous: {wording.plural(len(layers), 'sibling')} {found.head}<n> are not alike"
    raise BadArgument(why, hint=f'layers="{text}"')


def _longest(layers: Sequence[object]) -> tuple[int, int]:
    """Where the longest run of equal entries starts and ends."""
    sizes = [len(list(run)) for _, run in groupby(layers)]
    place = sizes.index(max(sizes))
    return sum(sizes[:place]), sum(sizes[: place + 1])


def under(names: Names, path: Pieces) -> list[Names]:
    """The subtrees at a path, read piece by piece."""
    found = [names]
    for text in path:
        children = [child for inner in found for label, child in inner.items() if text_of(label) == text]
        found = [child for child in children if type(child) is not int]
    return found


def separator_of(index: Index, layers: Layers) -> str:
    """The separator in the paths of the layers: that within the names of a flat state dict, or between keys."""
    for path in index.paths.values():
        if layers.place(tuple(map(text_of, path))) is not None:
            label = path[len(layers.parent)]
            return (label.before if isinstance(label, Part) else "") or index.separator
    return index.separator


def layer(index: Index, run: Layers, number: int) -> tuple[str, list[Names]]:
    """The path of a layer as text, and the names below it."""
    return run.path(number, separator_of(index, run)), under(index.names, (*run.parent, run.piece(number)))


def leaves_below(names: Iterable[Names]) -> list[int]:
    """The numbers of the leaves below some names."""
    every = parse("**")
    return [number for inner in names for number in every.find(inner)]


def place_in(runs: Iterable[Layers], path: Pieces) -> tuple[Layers, int] | None:
    """The layers that a path leads into, and its number there; None outside of all."""
    for layers in runs:
        number = layers.place(path)
        if number is not None:
            return layers, number
    return None


def shared(leaves: Leaves, runs: Sequence[Layers]) -> set[int]:
    """The leaves, by their first number, that have paths both inside a layer and outside of it."""
    where: dict[int, set[object]] = {}
    for number, first in leaves.ties.items():
        place = place_in(runs, leaves.index.pieces(number))
        layer: object = None
        if place is not None and place[1] >= place[0].numbers[0]:
            layers, found = place
            layer = layers.parent, layers.head, max(n for n in (*layers.numbers, *layers.after) if n <= found)
        where.setdefault(first, set()).add(layer)
    return {first for first, layers in where.items() if len(layers) > 1}


def renumbered(path: Sequence[Label], at: int, text: str) -> tuple[Label, ...]:
    """A path with one piece replaced."""
    label = path[at]
    new: Label = label._replace(text=text) if isinstance(label, Part) else text
    return (*path[:at], new, *path[at + 1 :])
