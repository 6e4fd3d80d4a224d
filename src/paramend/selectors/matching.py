"""Matching: the segments of a selector against a tree of names.

Segments are compiled once into steps. A walk over the tree carries the set of steps that may come next, and the machine
caches each (set, name) → set, so a large tree costs one dictionary look-up per node.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from paramend.leaves.paths import Label, Names, Part, labels, number_of, text_of
from paramend.selectors.grammar import AnyPieces, Atom, Either, Literal, Piece, Positions, Quoted, Segment, Star

_REMEMBERED = 100_000  # labels cached per state, so that a long-lived pattern does not keep the names of every tree

# At most 18 digits: longer runs are names, not positions, and int() of a hostile one would take forever.
_DIGITS = r"(?<![0-9])([0-9]{1,18})(?![0-9])"


@lru_cache(maxsize=4096)
def expression(atoms: tuple[Atom, ...]) -> re.Pattern[str]:
    """The regular expression of a piece, with one group for each star, choice and number."""
    return re.compile(_source(atoms), re.DOTALL)


def _source(atoms: tuple[Atom, ...]) -> str:
    """Atoms as a regular expression with one group for each star, choice and number."""
    out = []
    for atom in atoms:
        match atom:
            case Literal(text):
                out.append(re.escape(text))
            case Star():
                out.append("(.*)")
            case Either(options):
                inner = ("".join(re.escape(a.text) if isinstance(a, Literal) else ".*" for a in o) for o in options)
                out.append(f"({'|'.join(inner)})")
            case _:
                out.append(_DIGITS)
    return "".join(out)


def _test(atoms: tuple[Atom, ...]) -> Callable[[str], bool]:
    """A test of one piece. Common forms avoid a regular expression, which costs more to compile than to match."""
    match atoms:
        case ():
            return lambda text: not text
        case (Literal(exact),):
            return lambda text: text == exact
        case (Star(),):
            return lambda text: True
        case (Literal(head), Star()):
            return lambda text: text.startswith(head)
        case (Star(), Literal(tail)):
            return lambda text: text.endswith(tail)
        case (Either(options),) if all(len(o) == 1 and isinstance(o[0], Literal) for o in options):
            texts = {str(o[0].text) for o in options if isinstance(o[0], Literal)}
            return lambda text: text in texts
    return lambda text: expression(atoms).fullmatch(text) is not None


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
                steps.append(MatchStep(_test((Star(),)), repeats=True))
            case Quoted(text):
                steps += [MatchStep(_test((Literal(text_of(label)),)), exact=label) for label in labels(text)]
            case Piece(atoms):
                for at, atom in enumerate(atoms):
                    if isinstance(atom, Positions):
                        head, tail = atoms[:at], atoms[at + 1 :]
                        steps.append(MatchStep(_test(head), positions=atom, head=head, tail=tail, segment=number))
                        break
                else:
                    only = atoms[0].text if len(atoms) == 1 and isinstance(atoms[0], Literal) else None
                    steps.append(MatchStep(_test(atoms), only))
    return tuple(steps)


class Machine:
    """The steps of a pattern and the cached moves. A state is a set of steps, as bits of an int."""

    def __init__(self, steps: tuple[MatchStep, ...]) -> None:
        self.steps = steps
        self.done = 1 << len(steps)
        self.indexed = sum(1 << i for i, step in enumerate(steps) if step.positions is not None)
        self.moves: dict[int, dict[Label, int]] = {}
        self.roles: dict[int, dict[Label, _Role]] = {}  # by the segment of an indexed step
        # States that accept only one plain text: it is looked up, not searched for.
        self.wanted = {1 << i: (s.text, self.closure(1 << (i + 1))) for i, s in enumerate(steps) if s.text is not None}

    def closure(self, state: int) -> int:
        for i, step in enumerate(self.steps):
            if step.repeats and state >> i & 1:
                state |= 1 << (i + 1)
        return state

    def move(self, state: int, label: Label) -> int:
        after = 0
        for i, step in enumerate(self.steps):
            if state >> i & 1 and step.positions is None and step.takes(label):
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
    """One search: the leaves found, the subtrees that the whole pattern names, and the missing positions."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.hits: list[int] = []
        self.subtrees: list[Names] = []
        self.missing: list[Missing] = []

    def arrive(self, child: Any, state: int) -> None:
        if type(child) is not int:
            self.visit(child, state)
        elif state & self.machine.done:
            self.hits.append(child)

    def visit(self, names: Names, state: int) -> None:
        machine, hits = self.machine, self.hits
        if state & machine.done:
            self.subtrees.append(names)
        wanted = machine.wanted.get(state)
        if wanted is not None and len(names) > 16:
            for child in _named(names, wanted[0]):
                self.arrive(child, wanted[1])
            return
        moves = machine.moves.get(state)
        if moves is None or len(moves) > _REMEMBERED:
            moves = machine.moves[state] = {}
        for label, child in names.items():
            after = moves.get(label)
            if after is None:
                after = moves[label] = machine.move(state, label)
            if after:
                if type(child) is not int:
                    self.visit(child, after)
                elif after & machine.done:
                    hits.append(child)
        if state & machine.indexed:
            for i, step in enumerate(machine.steps):
                if step.positions is not None and state >> i & 1:
                    self.visit_positions(names, step, step.positions, machine.closure(1 << (i + 1)))

    def visit_positions(self, names: Names, step: MatchStep, positions: Positions, after: int) -> None:
        roles = self.machine.roles.get(step.segment)
        if roles is None or len(roles) > _REMEMBERED:
            roles = self.machine.roles[step.segment] = {}
        for family, members in _families(names, step, roles):
            numbers = sorted(members)
            chosen, missing = positions.pick(len(numbers))
            for position in chosen:
                for child in members[numbers[position]]:
                    self.arrive(child, after)
            if missing:
                everyone = tuple(child for number in numbers for child in members[number])
                self.missing += [Missing(step, item, len(numbers), family, everyone, after) for item in missing]

    def first_missing(self) -> Missing | None:
        """The first position missing among siblings that match the rest of the pattern."""
        for missing in self.missing:
            trial = MatchWalk(self.machine)
            for member in missing.members:
                trial.arrive(member, missing.after)
            if trial.hits or trial.first_missing():
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


def _families(names: Names, step: MatchStep, roles: dict[Label, _Role]) -> list[tuple[str, dict[int, list[Any]]]]:
    """The numbered families that `head[...]tail` may mean under one parent: each a name and number → children.

    `layers[...]` means the numbered children of `layers`; where there are none, the siblings `layers<number>`.
    """
    children: dict[str, dict[int, list[Any]]] = {}
    siblings: dict[str, dict[int, list[Any]]] = {}
    for label, child in names.items():
        role = roles.get(label)
        if role is None:
            role = roles[label] = _role(label, step)
        if role is _NO_ROLE:
            continue
        if role.heads and type(child) is not int:
            end = getattr(child, "layers", None)
            for inner, grandchild in child.items():
                number = number_of(text_of(inner))
                if number is not None and (end is None or number < end):
                    children.setdefault(text_of(label), {}).setdefault(number, []).append(grandchild)
        if role.number is not None:
            siblings.setdefault(role.family, {}).setdefault(role.number, []).append(child)
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

    whole = re.compile(f"(?P<head>{_source(head)})(?P<number>{_DIGITS})(?P<tail>{_source(tail)})", re.DOTALL)

    def search(text: str) -> tuple[str, int] | None:
        found = whole.fullmatch(text)
        return None if found is None else (f"{found['head']}<n>{found['tail']}", int(found["number"]))

    return search
