"""Stacks: the numbered layers under one parent that an order rearranges, found in the names of any tree."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from paramend.errors import BadArgument, NoMatch, OutOfRange
from paramend.growth.depth import Order
from paramend.leaves.leaves import Index
from paramend.leaves.paths import Names, Part, number_of, text_of, write_path, write_piece
from paramend.reports import wording
from paramend.selectors.grammar import Literal, Piece, Positions
from paramend.selectors.patterns import Pattern, parse

Pieces = tuple[str, ...]


@dataclass(frozen=True)
class Stack:
    """Numbered layers under one parent, such as `layers/0`, `layers/1` or `Dense_0`, `Dense_1`.

    Attributes:
        parent: the pieces above the numbered one.
        head: what stands before the number.
        tail: what stands after it.
        numbers: the numbers of the layers, ascending.
        after: the numbers of the siblings that follow them; these move up or down.
        step: by how much the numbers rise. Where it is more than 1, what stands between belongs to the layer before.
    """

    parent: Pieces
    head: str
    tail: str
    numbers: tuple[int, ...]
    after: tuple[int, ...] = ()
    step: int = 1

    def piece(self, number: int) -> str:
        """The numbered piece."""
        return f"{self.head}{number}{self.tail}"

    def path(self, number: int, separator: str) -> str:
        """The path of a numbered entry."""
        return write_path((*self.parent, self.piece(number)), separator)

    def number(self, text: str) -> int | None:
        """The number of an entry of that name, or None if it is none of these."""
        if not (text.startswith(self.head) and text.endswith(self.tail)):
            return None
        return number_of(text[len(self.head) : len(text) - len(self.tail)])

    def target(self, position: int) -> int:
        """The number of the new layer at a position."""
        return self.numbers[0] + position * self.step

    def moved(self, number: int, order: Order) -> list[tuple[int, int | None]]:
        """Where an entry of this number goes: (new number, which new layer it is in, None outside of them)."""
        if number < self.numbers[0]:
            return [(number, None)]
        if self.after and number >= self.after[0]:
            return [(number + (len(order) - order.of) * self.step, None)]
        layer = max(i for i, start in enumerate(self.numbers) if start <= number)
        offset = number - self.numbers[layer]
        return [(self.target(j) + offset, j) for j, source in enumerate(order.sources) if source == layer]

    def select(self, targets: Sequence[int], separator: str) -> str:
        """The leaves of some new layers, as a selector."""
        numbers = [str(self.target(target)) for target in targets]
        if self.step != 1:
            numbers = [str(self.target(target) + i) for target in targets for i in range(self.step)]
        inner = numbers[0] if len(numbers) == 1 else "{" + ",".join(numbers) + "}"
        written = "".join(write_piece(part) if part else "" for part in (self.head,))
        tail = write_piece(self.tail) if self.tail else ""
        return separator.join((*map(write_piece, self.parent), f"{written}{inner}{tail}", "**"))


def find(index: Index, text: str | None) -> list[Stack]:
    """The stacks that a selector of layers names; without one, the only stack of the tree.

    Args:
        index: the names.
        text: such as `model.layers[:]` or `params/Dense_[:-1]`.

    Raises:
        NoMatch: there are none, or without a text there are several.
        BadArgument: the text ends in no index, or chooses layers with gaps.

    >>> index = Index.of_names([f"model.layers.{i}.w" for i in range(3)])
    >>> find(index, "model.layers[:]")
    [Stack(parent=('model', 'layers'), head='', tail='', numbers=(0, 1, 2), after=(), step=1)]
    """
    if text is None:
        return [_only(index)]
    pattern = parse(text)
    *above, last = pattern.segments
    if not _indexed(last):
        raise BadArgument(
            f'layers="{text}" does not end in an index of layers',
            hint=f'layers="{text.rstrip("/.*")}[:]"; {_known(index)}',
        )
    assert isinstance(last, Piece)
    at = next(i for i, atom in enumerate(last.atoms) if isinstance(atom, Positions))
    rest = (*last.atoms[:at], *last.atoms[at + 1 :])
    if not all(isinstance(atom, Literal) for atom in rest):
        raise BadArgument(f'layers="{text}": the key before the index is written out', hint=_known(index))
    head, tail = (
        "".join(a.text for a in part if isinstance(a, Literal)) for part in (last.atoms[:at], last.atoms[at + 1 :])
    )
    positions = last.atoms[at]
    assert isinstance(positions, Positions)
    found: list[Stack] = []
    for parent, names in _parents(index, Pattern(tuple(above)) if above else None):
        for path, before, numbers in _families(names, parent, head, tail):
            found.append(_stack(path, before, tail, numbers, positions, text))
    if not found:
        raise NoMatch(f'layers="{text}" names no numbered layers', hint=_known(index))
    for one in found:
        for other in found:
            if one is not other and other.parent[: len(one.parent)] == one.parent:
                raise BadArgument(
                    f'layers="{text}" names layers within layers: {"/".join(one.parent)} and {"/".join(other.parent)}',
                    hint=_known(index),
                )
    if len({len(stack.numbers) for stack in found}) > 1:
        counts = [f"{'/'.join((*stack.parent, stack.head))} has {len(stack.numbers)}" for stack in found]
        raise BadArgument(
            f'layers="{text}" names stacks of several sizes: {wording.listing(counts)}', hint=_known(index)
        )
    return found


def _indexed(last: Any) -> bool:
    return isinstance(last, Piece) and any(isinstance(atom, Positions) for atom in last.atoms)


def _stack(parent: Pieces, head: str, tail: str, numbers: list[int], positions: Positions, text: str) -> Stack:
    chosen, missing = positions.pick(len(numbers))
    if missing:
        raise OutOfRange(
            f'layers="{text}": position {missing[0]} is out of range, there are {len(numbers)} layers',
            hint=f"[{-len(numbers)}] to [{len(numbers) - 1}] exist",
        )
    places = sorted(chosen)
    if not places or places != list(range(places[0], places[-1] + 1)):
        raise BadArgument(
            f'layers="{text}" chooses {"no layers" if not places else "layers with gaps between them"}',
            hint="the order says which layers are copied or left out; `layers` names a run of them",
        )
    picked, after = tuple(numbers[i] for i in places), tuple(numbers[places[-1] + 1 :])
    steps = {b - a for a, b in zip((*picked, *after), (*picked, *after)[1:], strict=False)}
    if len(steps) > 1:
        raise BadArgument(
            f'the numbers of layers="{text}" rise by {wording.listing(sorted(map(str, steps)))}: '
            f"{wording.listing(list(map(str, (*picked, *after))))}",
            hint="rename them first, so that they rise evenly",
        )
    return Stack(parent, head, tail, picked, after, steps.pop() if steps else 1)


def _parents(index: Index, above: Pattern | None) -> Iterator[tuple[Pieces, Names]]:
    """The subtrees that a pattern names, with their paths."""
    if above is None:
        yield (), index.names
        return
    wanted = {id(names) for names in above.reach(index.names)[1]}
    for path, names in _subtrees(index.names, ()):
        if id(names) in wanted:
            yield path, names


def _subtrees(names: Names, path: Pieces) -> Iterator[tuple[Pieces, Names]]:
    yield path, names
    for label, child in names.items():
        if type(child) is not int:
            yield from _subtrees(child, (*path, text_of(label)))


def _families(names: Names, parent: Pieces, head: str, tail: str) -> Iterator[tuple[Pieces, str, list[int]]]:
    """The numbered entries that `head[...]tail` means under one parent: children of `head`, else siblings."""
    children: set[int] = set()
    if head and not tail:
        for label, child in names.items():
            if text_of(label) == head and type(child) is not int:
                children |= {n for inner in child if (n := number_of(text_of(inner))) is not None}
    if children:
        yield (*parent, head), "", sorted(children)
        return
    probe = Stack(parent, head, tail, (0,))
    siblings = {n for label in names if (n := probe.number(text_of(label))) is not None}
    if siblings:
        yield parent, head, sorted(siblings)


def _numbered(index: Index) -> list[tuple[Pieces, list[int]]]:
    """The parents of entries that are numbers, the outermost only."""
    found: list[tuple[Pieces, list[int]]] = []
    for path, names in _subtrees(index.names, ()):
        if any(path[: len(outer)] == outer for outer, _ in found):
            continue
        numbers = sorted(
            {n for label, c in names.items() if type(c) is not int and (n := number_of(text_of(label))) is not None}
        )
        if numbers:
            found.append((path, numbers))
    return found


def _known(index: Index) -> str:
    found = [f'layers="{_written(index, path)}"' for path, _ in _numbered(index)]
    return " or ".join(found[:3]) or 'layers="params/Dense_[:-1]", the layers before the last'


def _written(index: Index, path: Pieces) -> str:
    return write_path(path, index.separator) + "[:]"


def _only(index: Index) -> Stack:
    found = _numbered(index)
    if len(found) == 1:
        path, _ = found[0]
        return find(index, _written(index, path) if path else "[:]")[0]
    names = [_written(index, path) for path, _ in found]
    raise NoMatch(
        f"which layers are meant? This tree has {wording.listing(names) if names else 'no numbered layers'}",
        hint=_known(index),
    )


def under(names: Names, path: Pieces) -> list[Names]:
    """The subtrees at a path, read piece by piece."""
    found = [names]
    for text in path:
        found = [
            child for inner in found for label, child in inner.items() if text_of(label) == text and type(child) is dict
        ]
    return found


def separator_of(index: Index, stack: Stack) -> str:
    """What stands between the keys of a stack's paths: within the names of a flat state dict, or between its keys."""
    for path in index.paths.values():
        if tuple(map(text_of, path[: len(stack.parent)])) == stack.parent and len(path) > len(stack.parent):
            label = path[len(stack.parent)]
            inner = label.before if isinstance(label, Part) else ""
            if stack.number(text_of(label)) is not None:
                return inner or index.separator
    return index.separator
