"""The selector grammar: text to `Pattern` and back, and matching a pattern against a tree of names.

    selector  :=  segment (("/" | ".") segment)*
    segment   :=  "**"                     any number of pieces, also none
               |  '"' text '"'             exactly this one key
               |  atom+                    one piece
    atom      :=  text | "\\" char         a literal
               |  "*"                      anything within the piece
               |  "{" atoms ("," atoms)* "}"
               |  "[" position ("," position)* "]"     int or slice, once in a segment
               |  "<" name ">"             a number, captured; in the target of a rename also <n+1>, <2*n>

A pattern is compiled once into steps; matching walks the tree of names with the set of steps that may come next,
and remembers each (set, name) → set it has met, so that a large tree costs one dictionary look-up a node.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from paramend.errors import OutOfRange, SelectorError
from paramend.paths import SPECIAL, Label, Part, labels, number_of, text_of

# A tree of names: label → subtree, or → the number of a leaf.
Names = dict[Label, Any]


@dataclass(frozen=True, slots=True)
class Literal:
    """Text that stands for itself."""

    text: str

    def __str__(self) -> str:
        return "".join("\\" + char if char in SPECIAL else char for char in self.text)


@dataclass(frozen=True, slots=True)
class Star:
    """`*`: any text within one piece."""

    def __str__(self) -> str:
        return "*"


@dataclass(frozen=True, slots=True)
class Either:
    """`{a,b}`: one of several texts."""

    options: tuple[tuple["Literal | Star", ...], ...]

    def __str__(self) -> str:
        return "{" + ",".join("".join(map(str, option)) for option in self.options) + "}"


@dataclass(frozen=True, slots=True)
class Number:
    """`<n>`: a captured number; `<2*n+1>` in a target is `factor * n + shift`."""

    name: str
    factor: int = 1
    shift: int = 0

    def __str__(self) -> str:
        factor = f"{self.factor}*" if self.factor != 1 else ""
        shift = f"{self.shift:+d}" if self.shift else ""
        return f"<{factor}{self.name}{shift}>"


@dataclass(frozen=True, slots=True)
class Positions:
    """`[-1]`, `[:2]`, `[0,3]`: Python positions among numbered siblings."""

    items: tuple[int | tuple[int | None, int | None, int | None], ...]

    def __str__(self) -> str:
        return "[" + ",".join(map(_write_position, self.items)) + "]"

    def pick(self, count: int) -> tuple[set[int], list[int]]:
        """The positions chosen among `count`, and the integers that are out of range."""
        chosen: set[int] = set()
        missing: list[int] = []
        for item in self.items:
            if isinstance(item, tuple):
                chosen.update(range(*slice(*item).indices(count)))
            elif -count <= item < count:
                chosen.add(item % count)
            else:
                missing.append(item)
        return chosen, missing


Atom = Literal | Star | Either | Number | Positions


@dataclass(frozen=True, slots=True)
class AnyPieces:
    """`**`: any number of pieces, also none."""

    def __str__(self) -> str:
        return "**"


@dataclass(frozen=True, slots=True)
class Quoted:
    """`"a/b"`: exactly this one key."""

    text: str

    def __str__(self) -> str:
        escaped = self.text.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'


@dataclass(frozen=True, slots=True)
class Piece:
    """Atoms that match one piece."""

    atoms: tuple[Atom, ...]

    def __str__(self) -> str:
        return "".join(map(str, self.atoms))


Segment = AnyPieces | Quoted | Piece


# ---- text to pattern -------------------------------------------------------------------------------------------

_PLAIN = re.compile(r'[^*{}\[\]<>,"\\/.]+')
_INT = "-?[0-9]{1,18}"
_CAPTURE = re.compile(r"<(?:([0-9]{1,18})\*)?([A-Za-z_]\w*)([+-][0-9]{1,18})?>")
_POSITION = re.compile(rf"\s*({_INT})?\s*(?:(:)\s*({_INT})?\s*(?:(:)\s*({_INT})?\s*)?)?")


class _Reader:
    """Reads one selector from left to right; every complaint knows its place."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fail(self, message: str, start: int, stop: int | None = None, hint: str = "") -> SelectorError:
        span = (start, max(self.at + 1 if stop is None else stop, start + 1))
        return SelectorError(message, text=self.text, span=span, hint=hint)

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def segments(self) -> Iterator[Segment]:
        if not self.text:
            raise self.fail("the selector is empty", 0, hint='"**" selects every leaf')
        while True:
            yield self.segment()
            if self.at == len(self.text):
                return
            self.at += 1  # a segment ends only at a separator or at the end

    def segment(self) -> Segment:
        start = self.at
        if self.peek() == '"':
            return self.quoted()
        if self.text.startswith("**", start):
            self.at += 2
            if self.peek() not in ("", "/", "."):
                raise self.fail("`**` stands alone between separators", start, hint="`*` matches within one key")
            return AnyPieces()
        atoms: list[Atom] = []
        while self.peek() not in ("", "/", "."):
            here = self.at
            atom = self.atom()
            if isinstance(atom, Positions) and any(isinstance(a, Positions) for a in atoms):
                raise self.fail("one key takes one index", here, self.at, hint="[0,3] or [1:4] picks several")
            if isinstance(atom, Literal) and atoms and isinstance(atoms[-1], Literal):
                atom = Literal(atoms.pop().text + atom.text)  # type: ignore[union-attr]
            atoms.append(atom)
        if not atoms:
            raise self.fail(
                "a key is missing here",
                start,
                start + 1,
                hint='an empty key is written ""; a separator stands only between keys',
            )
        if any("/" in text or "." in text for atom in atoms for text in _literals(atom)):
            if len(atoms) == 1 and isinstance(atoms[0], Literal):
                return Quoted(atoms[0].text)
            raise self.fail("an escaped separator cannot stand beside wildcards", start, self.at)
        return Piece(tuple(atoms))

    def quoted(self) -> Quoted:
        start = self.at
        out: list[str] = []
        self.at += 1
        while self.peek() != '"':
            if self.peek() == "\\":
                self.at += 1
            if not self.peek():
                raise self.fail("expected '\"' to close the quote opened here", start, len(self.text))
            out.append(self.peek())
            self.at += 1
        self.at += 1
        if self.peek() not in ("", "/", "."):
            raise self.fail("a quoted key stands alone between separators", start)
        return Quoted("".join(out))

    def atom(self) -> Atom:
        char, start = self.peek(), self.at
        if char == "{":
            return self.either()
        if char == "[":
            return self.positions()
        if char == "<":
            return self.number()
        if char in "}]>":
            opening = {"}": "{", "]": "[", ">": "<"}[char]
            raise self.fail(
                f"'{char}' closes nothing: no '{opening}' before it", start, hint=f"\\{char} is the character"
            )
        if char in ',"':
            raise self.fail(f"'{char}' has no meaning here", start, hint=f"\\{char} is the character itself")
        return self.simple()

    def simple(self) -> Literal | Star:
        char, start = self.peek(), self.at
        if char == "*":
            self.at += 1
            if self.peek() == "*":
                raise self.fail("`**` stands alone between separators", start, hint="`*` matches within one key")
            return Star()
        if char == "\\":
            if start + 1 == len(self.text):
                raise self.fail("a backslash ends the selector", start, hint="\\\\ is a backslash")
            self.at += 2
            return Literal(self.text[start + 1])
        found = _PLAIN.match(self.text, start)
        assert found  # every special character was handled above
        self.at = found.end()
        return Literal(found.group())

    def either(self) -> Either:
        start = self.at
        options: list[tuple[Literal | Star, ...]] = []
        option: list[Literal | Star] = []
        self.at += 1
        while True:
            char = self.peek()
            if char in ("", "/", "."):
                raise self.fail("expected '}' to close the choice opened here", start, self.at or 1)
            if char in '{[<]>"':
                raise self.fail(f"'{char}' cannot stand inside {{...}}", self.at, hint="write two selectors in a list")
            if char in ",}":
                options.append(tuple(option))
                option = []
                self.at += 1
                if char == "}":
                    return Either(tuple(options))
            else:
                piece = self.simple()
                if isinstance(piece, Literal) and option and isinstance(option[-1], Literal):
                    piece = Literal(option.pop().text + piece.text)  # type: ignore[union-attr]
                option.append(piece)

    def positions(self) -> Positions:
        start = self.at
        close = self.text.find("]", start)
        stop = next((i for i in range(start, len(self.text)) if self.text[i] in "/."), len(self.text))
        if close < 0 or close > stop:
            raise self.fail("expected ']' to close the index opened here", start, stop)
        items: list[int | tuple[int | None, int | None, int | None]] = []
        at = start + 1
        for text in self.text[start + 1 : close].split(","):
            found = _POSITION.fullmatch(text)
            if not found or not text.strip():
                raise self.fail(
                    "an index is an int or a slice",
                    at,
                    at + max(len(text), 1),
                    hint="[-1], [:2], [0,3] or [4:8:2]",
                )
            first, colon, second, _, third = found.groups()
            if not colon:
                items.append(int(first))
            else:
                if third is not None and int(third) == 0:
                    raise self.fail("a slice cannot step by 0", at, at + len(text))
                a, b, c = (None if part is None else int(part) for part in (first, second, third))
                items.append((a, b, c))
            at += len(text) + 1
        self.at = close + 1
        return Positions(tuple(items))

    def number(self) -> Number:
        start = self.at
        found = _CAPTURE.match(self.text, start)
        if not found:
            close = self.text.find(">", start)
            raise self.fail(
                "a captured number is written <n>",
                start,
                close + 1 if close > 0 else len(self.text),
                hint="layers/<n>/**",
            )
        self.at = found.end()
        factor, name, shift = found.groups()
        return Number(name, int(factor or 1), int(shift or 0))


def _literals(atom: Atom) -> Iterator[str]:
    if isinstance(atom, Literal):
        yield atom.text
    elif isinstance(atom, Either):
        yield from (part.text for option in atom.options for part in option if isinstance(part, Literal))


def _write_position(item: int | tuple[int | None, int | None, int | None]) -> str:
    if isinstance(item, int):
        return str(item)
    start, stop, step = ("" if part is None else str(part) for part in item)
    return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"


# ---- matching --------------------------------------------------------------------------------------------------

_REMEMBERED = 100_000  # labels a state remembers, lest a pattern that lives long hold the names of every tree it met

# At most 18 digits: longer runs are names, not positions, and int() of a hostile one would take for ever.
_DIGITS = r"(?<![0-9])([0-9]{1,18})(?![0-9])"


@lru_cache(maxsize=4096)
def _compiled(source: str) -> re.Pattern[str]:
    return re.compile(source, re.DOTALL)


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
    """A test of one piece. The common forms need no regular expression, whose compilation costs more than a match."""
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
    return lambda text: _compiled(_source(atoms)).fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class _Step:
    """What one label must satisfy."""

    accepts: Callable[[str], bool]
    text: str | None = None  # the only text that is accepted, if there is only one
    repeats: bool = False  # `**`: stays for any number of labels
    exact: Label | None = None  # quoted keys: this label, not one that reads the same
    positions: Positions | None = None
    head: tuple[Atom, ...] = ()
    tail: tuple[Atom, ...] = ()
    segment: int = 0  # the number of the segment that the step is of

    def takes(self, label: Label) -> bool:
        if self.exact is not None:
            return _part(label)[:3] == _part(self.exact)[:3]
        return self.accepts(text_of(label))


def _part(label: Label) -> Part:
    return Part(label, "", closes=True) if isinstance(label, str) else label


def _steps(segments: tuple[Segment, ...]) -> tuple[_Step, ...]:
    steps: list[_Step] = []
    for number, segment in enumerate(segments):
        match segment:
            case AnyPieces():
                steps.append(_Step(_test((Star(),)), repeats=True))
            case Quoted(text):
                steps += [_Step(_test((Literal(text_of(label)),)), exact=label) for label in labels(text)]
            case Piece(atoms):
                for at, atom in enumerate(atoms):
                    if isinstance(atom, Positions):
                        head, tail = atoms[:at], atoms[at + 1 :]
                        steps.append(_Step(_test(head), positions=atom, head=head, tail=tail, segment=number))
                        break
                else:
                    only = atoms[0].text if len(atoms) == 1 and isinstance(atoms[0], Literal) else None
                    steps.append(_Step(_test(atoms), only))
    return tuple(steps)


class _Machine:
    """The steps of a pattern and the moves met so far. A state is a set of steps, as bits of an int."""

    def __init__(self, steps: tuple[_Step, ...]) -> None:
        self.steps = steps
        self.done = 1 << len(steps)
        self.indexed = sum(1 << i for i, step in enumerate(steps) if step.positions is not None)
        self.moves: dict[int, dict[Label, int]] = {}
        self.roles: dict[int, dict[Label, _Role]] = {}  # by the segment of an indexed step
        # States in which one plain text is wanted and nothing else: it is looked up, not searched for.
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
class _Missing:
    """A position that is not there: how many there are, in which family, and what hangs below its members."""

    step: _Step
    item: int
    count: int
    family: str
    members: tuple[Any, ...]
    after: int


class _Walk:
    """One search: the leaves found, the subtrees that the whole pattern names, the positions that were not there."""

    def __init__(self, machine: _Machine) -> None:
        self.machine = machine
        self.hits: list[int] = []
        self.subtrees: list[Names] = []
        self.missing: list[_Missing] = []

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

    def visit_positions(self, names: Names, step: _Step, positions: Positions, after: int) -> None:
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
                self.missing += [_Missing(step, item, len(numbers), family, everyone, after) for item in missing]

    def first_missing(self) -> _Missing | None:
        """The first position missing among siblings that match the rest of the pattern."""
        for missing in self.missing:
            trial = _Walk(self.machine)
            for member in missing.members:
                trial.arrive(member, missing.after)
            if trial.hits or trial.first_missing():
                return missing
        return None


def _named(names: Names, text: str) -> list[Any]:
    """The children whose labels read so: a key, a part of one, or a further key that reads the same."""
    found = [names[text]] if text in names else []
    for before, closes in (("", True), ("", False), ("/", True), ("/", False), (".", True), (".", False)):
        serial = int(before == "" and closes)  # the first such key is no part, but text
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


def _role(label: Label, step: _Step) -> _Role:
    text = text_of(label)
    heads = bool(step.head) and not step.tail and step.accepts(text)
    found = _sibling(step.head, step.tail)(text)
    return _Role(heads, *found) if found is not None else _Role(heads) if heads else _NO_ROLE


def _families(names: Names, step: _Step, roles: dict[Label, _Role]) -> list[tuple[str, dict[int, list[Any]]]]:
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
            for inner, grandchild in child.items():
                number = number_of(text_of(inner))
                if number is not None:
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

    def search(text: str) -> tuple[str, int] | None:
        found = _compiled(f"(?P<head>{_source(head)})(?P<number>{_DIGITS})(?P<tail>{_source(tail)})").fullmatch(text)
        return None if found is None else (f"{found['head']}<n>{found['tail']}", int(found["number"]))

    return search


@dataclass(frozen=True)
class Pattern:
    """A parsed selector.

    Attributes:
        segments: what the text says, as data. `str(pattern)` is text that parses to the same segments.
    """

    segments: tuple[Segment, ...]
    _machine: _Machine = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_machine", _Machine(_steps(self.segments)))

    def __str__(self) -> str:
        return self.write("/")

    def write(self, separator: str) -> str:
        """The pattern as text, with "/" or "." between keys."""
        return separator.join(map(str, self.segments))

    def find(self, names: Names) -> list[int]:
        """The numbers of the matching leaves of a tree of names, ascending.

        Raises:
            OutOfRange: an integer position does not exist where the rest of the pattern matches; `near` holds the
                selector with the nearest position that does.
        """
        walk = self._walk(names)
        missing = walk.first_missing() if walk.missing else None
        if missing is not None:
            near = self._clamped(missing)
            raise OutOfRange(
                f"position {missing.item} is out of range: {missing.family} has {missing.count} numbered "
                f"{'entry' if missing.count == 1 else 'entries'} under one parent",
                hint=f"[{-missing.count}] to [{missing.count - 1}] exist; a slice may reach beyond the end",
                near=[str(near)],
            )
        return sorted(set(walk.hits))

    def reach(self, names: Names) -> tuple[list[int], list[Names]]:
        """The leaves and the subtrees that the pattern names. Positions that are not there are passed over."""
        walk = self._walk(names)
        return walk.hits, walk.subtrees

    def _walk(self, names: Names) -> _Walk:
        walk = _Walk(self._machine)
        walk.visit(names, self._machine.closure(1))
        return walk

    def _clamped(self, missing: _Missing) -> "Pattern":
        """The pattern with a missing position moved to the nearest one."""
        nearest = -missing.count if missing.item < 0 else missing.count - 1
        segment = self.segments[missing.step.segment]
        assert isinstance(segment, Piece)
        atoms = tuple(
            Positions(tuple(nearest if item == missing.item else item for item in atom.items))
            if isinstance(atom, Positions)
            else atom
            for atom in segment.atoms
        )
        before, after = self.segments[: missing.step.segment], self.segments[missing.step.segment + 1 :]
        return Pattern((*before, Piece(atoms), *after))


@lru_cache(maxsize=4096)
def parse(text: str) -> Pattern:
    """The pattern that a selector's text means.

    Raises:
        SelectorError: the text breaks the grammar; the message points at the character.

    >>> str(parse("model.layers[-1].{q,k}_proj.weight"))
    'model/layers[-1]/{q,k}_proj/weight'
    >>> parse("Dense_[-1/kernel")
    Traceback (most recent call last):
    paramend.errors.SelectorError: expected ']' to close the index opened here
    <BLANKLINE>
        Dense_[-1/kernel
              ~~^
    """
    return Pattern(tuple(_Reader(text).segments()))
