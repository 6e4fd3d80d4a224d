"""The selector grammar: text to segments and back.

selector  :=  segment (("/" | ".") segment)*
segment   :=  "**"                     any number of pieces, including none
           |  '"' text '"'             exactly this one key
           |  atom+                    one piece
atom      :=  text | "\\" char         a literal
           |  "*"                      anything within the piece
           |  "{" atoms ("," atoms)* "}"
           |  "[" position ("," position)* "]"     int, slice or `*` for all, once in a segment
           |  "<" name ">"             a number, captured; in the target of a rename also <n+1>, <2*n>
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from paramend.errors import SelectorError
from paramend.leaves.paths import escaped, in_quotes, labels


@dataclass(frozen=True, slots=True)
class Literal:
    """Text that matches itself."""

    text: str

    def __str__(self) -> str:
        return escaped(self.text)


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
        missing = [item for item in self.items if isinstance(item, int) and not -count <= item < count]
        return set(self.among(count)), missing

    def among(self, count: int) -> list[int]:
        """The positions chosen among `count`, in the order written."""
        out: dict[int, None] = {}
        for item in self.items:
            if isinstance(item, tuple):
                out |= dict.fromkeys(range(*slice(*item).indices(count)))
            elif -count <= item < count:
                out[item % count] = None
        return list(out)


Atom = Literal | Star | Either | Number | Positions
A = TypeVar("A", bound=Atom)


@dataclass(frozen=True, slots=True)
class AnyPieces:
    """`**`: any number of pieces, including none."""

    def __str__(self) -> str:
        return "**"


@dataclass(frozen=True, slots=True)
class Quoted:
    """`"a/b"`: exactly this one key."""

    text: str

    def __str__(self) -> str:
        return in_quotes(self.text)


@dataclass(frozen=True, slots=True)
class Piece:
    """Atoms that match one piece."""

    atoms: tuple[Atom, ...]

    @classmethod
    def of(cls, atoms: Iterable[Atom]) -> "Piece":
        """The piece of atoms, adjacent literals joined and empty ones left out, as the parser returns it."""
        return cls(merged(atoms))

    def __str__(self) -> str:
        return "".join(map(str, self.atoms))


Segment = AnyPieces | Quoted | Piece


_PLAIN = re.compile(r'[^*{}\[\]<>,"\\/.]+')
_INT = re.compile("-?[0-9]{1,18}")
_MOST_KEYS = 1000  # of a selector; names in files have a fifth of it
_MOST_SLICES = 100  # in one index: each costs as much as there are siblings
_CAPTURE = re.compile(r"<(?:([0-9]{1,18})\*)?([A-Za-z_]\w*)([+-][0-9]{1,18})?>")


class Reader:
    """Reads one selector from left to right; every error points at its place."""

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
        keys = 0
        while True:
            start, found = self.at, self.segment()
            yield found
            keys += len(labels(found.text)) if isinstance(found, Quoted) else 1
            if keys > _MOST_KEYS:
                raise self.fail(f"a selector has at most {_MOST_KEYS:,} keys", start, self.at)
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
            atoms.append(atom)
        piece = Piece.of(atoms)
        if not piece.atoms:
            hint = 'an empty key is written ""; a separator stands only between keys'
            raise self.fail("a key is missing here", start, start + 1, hint)
        if any("/" in text or "." in text for atom in piece.atoms for text in _literals(atom)):
            if len(piece.atoms) == 1 and isinstance(only := piece.atoms[0], Literal):
                return Quoted(only.text)
            raise self.fail("an escaped separator cannot stand beside wildcards", start, self.at)
        return piece

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
                options.append(merged(option))
                option = []
                self.at += 1
                if char == "}":
                    return Either(tuple(options))
            else:
                option.append(self.simple())

    def positions(self) -> Positions:
        start = self.at
        close = self.text.find("]", start)
        stop = next((i for i in range(start, len(self.text)) if self.text[i] in "/."), len(self.text))
        if close < 0 or close > stop:
            raise self.fail("expected ']' to close the index opened here", start, stop)
        items: list[int | tuple[int | None, int | None, int | None]] = []
        at, slices = start + 1, 0
        for text in self.text[start + 1 : close].split(","):
            parts = [part.strip() for part in (":" if text.strip() == "*" else text).split(":", 3)]
            if parts == [""] or len(parts) > 3 or not all(not part or _INT.fullmatch(part) for part in parts):
                raise self.fail(
                    "an index is an int or a slice", at, at + max(len(text), 1), hint="[-1], [:2], [0,3] or [4:8:2]"
                )
            first, second, third = (int(part) if part else None for part in (*parts, "", "")[:3])
            if len(parts) > 1:
                if third == 0:
                    raise self.fail("a slice cannot step by 0", at, at + len(text))
                slices += 1
                if slices > _MOST_SLICES:
                    raise self.fail(f"an index has at most {_MOST_SLICES} slices", at, at + len(text))
                items.append((first, second, third))
            elif first is not None:
                items.append(first)
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


def merged(atoms: Iterable[A]) -> tuple[A, ...]:
    """Atoms with adjacent literals joined and empty ones left out."""
    out: list[Any] = []
    for atom in atoms:
        if isinstance(atom, Literal) and out and isinstance(last := out[-1], Literal):
            out[-1] = Literal(last.text + atom.text)
        elif atom != Literal(""):
            out.append(atom)
    return tuple(out)


def around_captures(text: str) -> list[str]:
    """The parts of a text between its captured numbers; one part if there are none.

    >>> around_captures("layers/<n>/**"), around_captures("head")
    (['layers/', '/**'], ['head'])
    """
    parts, at = [], 0
    for found in _CAPTURE.finditer(text):
        parts.append(text[at : found.start()])
        at = found.end()
    return [*parts, text[at:]]


def captures_of(text: str) -> list[str]:
    """The names of the captured numbers in a text, in order."""
    return [found[2] for found in _CAPTURE.finditer(text)]


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
