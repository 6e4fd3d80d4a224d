"""Matching: the segments of a selector against a tree of names.

Segments are compiled once into steps. A walk over the tree carries the set of steps that may come next, and the machine
caches each (set, name) → set, so a large tree costs one dictionary look-up per node.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import getitem
from typing import Any, NamedTuple

from paramend.leaves.paths import Label, Names, Part, labels, number_of, text_of
from paramend.selectors.division import acceptor, taken
from paramend.selectors.grammar import AnyPieces, Atom, Literal, Piece, Positions, Quoted, Segment, Star

_REMEMBERED = 100_000  # labels cached per state, so that a long-lived pattern does not keep the names of every tree


@dataclass(frozen=True, slots=True)
class MatchStep:
    """What one label must satisfy."""

    accepts: Callable[[str], bool]
    text: str | None = None  # the only accepted text, if there is only one
    repeats: bool = False  # `**`: takes any number of labels
    exact: Label | None = None  # quoted keys: this label, not another with the same text
    positions: Positions | None = None
    head: tuple[Atom, ...] = ()
    tail: tuple[Atom, ...] = ()
    segment: int = 0  # the number of its segment

    def takes(self, label: Label) -> bool:
        if self.exact is not None:
            return _part(label)[:3] == _part(self.exact)[:3]
        return self.accepts(text_of(label))


def _part(label: Label) -> Part:
    return Part(label, "", closes=True) if isinstance(label, str) else label


def steps_of(segments: tuple[Segment, ...]) -> tuple[MatchStep, ...]:
    """The steps of a selector, one for each required label and one for each `**`."""
    steps: list[MatchStep] = []
    for number, segment in enumerate(segments):
        match segment:
            case AnyPieces():
                steps.append(MatchStep(acceptor((Star(),)), repeats=True))
            case Quoted(text):
                steps += [MatchStep(acceptor((Literal(text_of(label)),)), exact=label) for label in labels(text)]
            case Piece(atoms):
                for at, atom in enumerate(atoms):
                    if isinstance(atom, Positions):
                        head, tail = atoms[:at], atoms[at + 1 :]
                        steps.append(MatchStep(acceptor(head), positions=atom, head=head, tail=tail, segment=number))
                        break
                else:
                    only = atoms[0].text if len(atoms) == 1 and isinstance(atoms[0], Literal) else None
                    steps.append(MatchStep(acceptor(atoms), only))
    return tuple(steps)


class Machine:
    """The steps of a pattern and the cached moves. A state is a set of steps, as bits of an int."""

    def __init__(self, steps: tuple[MatchStep, ...]) -> None:
        self.steps = steps
        self.done = 1 << len(steps)
        self.indexed = sum(1 << i for i, step in enumerate(steps) if step.positions is not None)
        self.repeating = sum(1 << i for i, step in enumerate(steps) if step.repeats)
        self.moves: dict[int, dict[Label, int]] = {}
        self.roles: dict[int, dict[Label, _Role]] = {}  # by the segment of an indexed step
        # States that accept only one plain text: it is looked up, not searched for.
        self.wanted = {1 << i: (s.text, self.closure(1 << (i + 1))) for i, s in enumerate(steps) if s.text is not None}

    def closure(self, state: int) -> int:
        """The state with what may come next where a `**` takes nothing."""
        while (wider := state | (state & self.repeating) << 1) != state:
            state = wider
        return state

    def move(self, state: int, label: Label) -> int:
        after, rest = 0, state & ~self.indexed & (self.done - 1)
        while rest:
            i = rest.bit_length() - 1
            rest ^= 1 << i
            step = self.steps[i]
            if step.takes(label):
                after |= 1 << (i if step.repeats else i + 1)
        return self.closure(after)


@dataclass(frozen=True, slots=True)
class Missing:
    """A missing position: how many there are, in which family, and what is below its members."""

    step: MatchStep
    item: int
    count: int
    family: str
    members: tuple[Any, ...]
    after: int


class MatchWalk:
    """One search: the leaves found, the subtrees that the whole pattern names, and the missing positions. Each subtree
    is visited once, with all states that lead to it: a pattern with several `**` reaches it in many ways. In a
    `lenient` search a missing position stands for all siblings."""

    def __init__(self, machine: Machine, *, lenient: bool = False) -> None:
        self.machine = machine
        self.lenient = lenient
        self.hits: list[int] = []
        self.subtrees: list[Names] = []
        self.missing: list[Missing] = []

    def arrive(self, child: Any, state: int) -> None:
        """Search a leaf or a subtree, beginning in this state."""
        if type(child) is int:
            self.hits += [child] if state & self.machine.done else []
            return
        machine, done, hits = self.machine, self.machine.done, self.hits
        # With each subtree, the states that an index above it adds below its labels.
        rest: list[tuple[Names, int, dict[Label, int] | None]] = [(child, state, None)]
        while rest:
            names, state, added = rest.pop()
            if state & done:
                self.subtrees.append(names)
            wanted = machine.wanted.get(state)
            if wanted is not None and not added and len(names) > 16:
                for child in _named(names, wanted[0])[::-1]:
                    if type(child) is not int:
                        rest.append((child, wanted[1], None))
                    elif wanted[1] & done:
                        hits.append(child)
                continue
            moves = machine.moves.get(state)
            if moves is None or len(moves) > _REMEMBERED:
                moves = machine.moves[state] = {}
            first = len(rest)
            if added is None and not state & machine.indexed:  # as nearly always
                for label, child in names.items():
                    after = moves.get(label)
                    if after is None:
                        after = moves[label] = machine.move(state, label)
                    if after:
                        if type(child) is not int:
                            rest.append((child, after, None))
                        elif after & done:
                            hits.append(child)
            else:
                added, inner = added or {}, dict[Label, dict[Label, int]]()
                self._index(names, state, added, inner)
                for label in names if state else added:
                    child, after = names[label], moves.get(label)
                    if after is None:
                        after = moves[label] = machine.move(state, label)
                    after |= added.get(label, 0)
                    if type(child) is not int:
                        if after or label in inner:
                            rest.append((child, after, inner.get(label)))
                    elif after & done:
                        hits.append(child)
            if len(rest) > first + 1:
                rest[first:] = rest[first:][::-1]

    def _index(self, names: Names, state: int, added: dict[Label, int], inner: dict[Label, dict[Label, int]]) -> None:
        """Enter the states after each indexed step: with labels of these names, or with labels one level below."""
        machine = self.machine
        for i, step in enumerate(machine.steps):
            if step.positions is None or not state >> i & 1:
                continue
            after = machine.closure(1 << (i + 1))
            roles = machine.roles.get(step.segment)
            if roles is None or len(roles) > _REMEMBERED:
                roles = machine.roles[step.segment] = {}
            for family, members in families(names, step, roles):
                numbers = sorted(members)
                chosen, missing = step.positions.pick(len(numbers))
                if missing:
                    everyone = tuple(reduce(getitem, place, names) for number in numbers for place in members[number])
                    self.missing.append(Missing(step, missing[0], len(numbers), family, everyone, after))
                for position in range(len(numbers)) if missing and self.lenient else chosen:
                    for place in members[numbers[position]]:
                        table = added if len(place) == 1 else inner.setdefault(place[0], {})
                        table[place[-1]] = table.get(place[-1], 0) | after

    def first_missing(self) -> Missing | None:
        """The first position missing among siblings that match the rest of the pattern."""
        for missing in self.missing:
            trial = MatchWalk(self.machine, lenient=True)
            for member in missing.members:
                trial.arrive(member, missing.after)
            if trial.hits:
                return missing
        return None


def _named(names: Names, text: str) -> list[Any]:
    """The children whose labels have this text: a key, a part of one, or a further key with the same text."""
    found = [names[text]] if text in names else []
    for before, closes in (("", True), ("", False), ("/", True), ("/", False), (".", True), (".", False)):
        serial = int(before == "" and closes)  # the first such key is text, not a part
        while (label := Part(text, before, closes, serial)) in names:
            found.append(names[label])
            serial += 1
    return found


class _Role(NamedTuple):
    """What a label may be to an indexed step: `layers` with numbered children, a sibling `layers<n>`, or both."""

    heads: bool
    family: str = ""
    number: int | None = None


_NO_ROLE = _Role(False)


def _role(label: Label, step: MatchStep) -> _Role:
    text = text_of(label)
    heads = bool(step.head) and not step.tail and step.accepts(text)
    found = _sibling(step.head, step.tail)(text)
    return _Role(heads, *found) if found is not None else _Role(heads) if heads else _NO_ROLE


_Family = dict[int, list[tuple[Label, ...]]]


def families(names: Names, step: MatchStep, roles: dict[Label, _Role]) -> list[tuple[str, _Family]]:
    """The numbered families that `head[...]tail` may mean under one parent: each a name and number → places.
    `layers[...]` means the numbered children of `layers`; where there are none, the siblings `layers<number>`. What
    labels are to the step is kept in `roles`."""
    children: dict[str, _Family] = {}
    siblings: dict[str, _Family] = {}
    for label, child in names.items():
        role = roles.get(label)
        if role is None:
            role = roles[label] = _role(label, step)
        if role is _NO_ROLE:
            continue
        if role.heads and type(child) is not int:
            end = getattr(child, "layers", None)
            for inner in child:
                number = number_of(text_of(inner))
                if number is not None and (end is None or number < end):
                    children.setdefault(text_of(label), {}).setdefault(number, []).append((label, inner))
        if role.number is not None:
            siblings.setdefault(role.family, {}).setdefault(role.number, []).append((label,))
    return list((children or siblings).items())


@lru_cache(maxsize=4096)
def _sibling(head: tuple[Atom, ...], tail: tuple[Atom, ...]) -> Callable[[str], tuple[str, int] | None]:
    """A reader of `head<number>tail`: the family's name and the number, or None."""
    if all(isinstance(atom, Literal) for atom in (*head, *tail)):
        before = "".join(atom.text for atom in head if isinstance(atom, Literal))
        after = "".join(atom.text for atom in tail if isinstance(atom, Literal))
        digits_beside = number_of(before[-1:]) is not None or number_of(after[:1]) is not None

        def read(text: str) -> tuple[str, int] | None:
            if digits_beside or not (text.startswith(before) and text.endswith(after)):
                return None
            number = number_of(text[len(before) : len(text) - len(after)])
            return None if number is None else (f"{before}<n>{after}", number)

        return read

    whole = (*head, _ANY, *tail)

    def search(text: str) -> tuple[str, int] | None:
        found = taken(whole, text)
        if found is None:
            return None
        rest = iter(found)
        parts = [(atom, atom.text) if isinstance(atom, Literal) else next(rest) for atom in whole]
        number = next(part for atom, part in found if atom is _ANY)
        return "".join("<n>" if atom is _ANY else part for atom, part in parts), int(number)

    return search


_ANY = Positions(())  # stands for the number among other wildcards
