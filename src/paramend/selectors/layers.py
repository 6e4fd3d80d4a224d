"""The layers of a model in every notation: `layers[*]`, `layers/<n>/**`, `layers_<n>`, `Dense_[:-1]`."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from paramend.errors import BadArgument, NoMatch, OutOfRange
from paramend.leaves.leaves import Index
from paramend.leaves.paths import Names, natural, number_of, text_of, write_path, write_piece
from paramend.selectors.grammar import (
    AnyPieces,
    Literal,
    Number,
    Piece,
    Positions,
    Segment,
    Star,
    around_captures,
    captures_of,
)
from paramend.selectors.messages import separator_in
from paramend.selectors.nesting import PathStep
from paramend.selectors.patterns import Pattern, parse
from paramend.selectors.renames import rename

Pieces = tuple[str, ...]

ALL = Positions(((None, None, None),))


@dataclass(frozen=True)
class Numbered:
    """Numbered entries under one parent, such as `layers/0`, `layers/1` or `Dense_0`, `Dense_1`."""

    parent: Pieces  # the pieces above the numbered one
    head: str  # the text before the number
    tail: str  # the text after it
    numbers: tuple[int, ...]  # the numbers of the entries, ascending
    width: int = 0  # the number of digits if numbers are padded with zeros, else 0
    # The numbers of the entries after them that are no layers, such as those that predict further tokens.
    blocks: tuple[int, ...] = ()

    def piece(self, number: int) -> str:
        return f"{self.head}{self.digits(number)}{self.tail}"

    def digits(self, number: int) -> str:
        return f"{number:0{self.width}d}"

    def path(self, number: int, separator: str) -> str:
        return write_path((*self.parent, self.piece(number)), separator)

    def number(self, text: str) -> int | None:
        """The number of the entry of that name, or None if there is no such entry."""
        if not (text.startswith(self.head) and text.endswith(self.tail)):
            return None
        return number_of(text[len(self.head) : len(text) - len(self.tail)])

    def place(self, path: Pieces) -> int | None:
        """The number of the entry that a path leads to or into, or None."""
        depth = len(self.parent)
        return self.number(path[depth]) if len(path) > depth and path[:depth] == self.parent else None

    def written(self, separator: str) -> str:
        """All of these entries, as a text that `notation` takes."""
        keys = [*map(write_piece, self.parent)]
        if self.head or self.tail:
            keys.append("".join((self.head and write_piece(self.head), "[*]", self.tail and write_piece(self.tail))))
        else:
            keys = [*keys[:-1], f"{keys[-1]}[*]"] if keys else ["[*]"]
        return separator.join(keys)


@dataclass(frozen=True)
class Notation:
    """A text that names layers, parsed."""

    text: str
    above: tuple[Segment, ...]  # the segments before the one with the number
    head: str  # the text before the number in its key
    tail: str  # the text after it
    positions: Positions  # which of the numbered entries are meant
    captured: bool  # whether the number is written `<n>`: then it may not be a separate key below `head`

    def find(self, names: Names) -> list[Numbered]:
        """The numbered entries that are meant, with all their siblings; may be empty."""
        parents = _parents(names, Pattern(self.above) if self.above else None)
        return [found for parent, inner in parents for found in _families(inner, parent, self)]

    def pick(self, found: Numbered) -> list[int]:
        """The positions of the layers that are meant among numbered entries; `OutOfRange` if one is missing."""
        count = len(found.numbers)
        chosen, missing = self.positions.pick(count)
        if missing:
            raise OutOfRange(
                f'"{self.text}": position {missing[0]} is out of range, there are {count} layers',
                hint=f"[{-count}] to [{count - 1}] exist",
            )
        return sorted(chosen)

    def with_index(self, index: str) -> str:
        """The text with another index, such as `[1:-1]`."""
        at = max(self.text.rfind("["), self.text.rfind("<"))
        stop = self.text.find("]" if self.text[at] == "[" else ">", at) + 1
        return f"{self.text[:at]}{index}{self.text[stop:]}"

    def with_number(self, found: Numbered) -> str:
        """The same layers with a captured number, as in renames: `layers[*]` becomes `layers/<n>` or `layers<n>`."""
        if self.captured:
            return without_rest(self.text)
        keys = [*map(str, self.above)]
        if found.head or not self.head:
            keys.append(f"{self.head and write_piece(self.head)}<n>{self.tail and write_piece(self.tail)}")
        else:
            keys += [write_piece(self.head), "<n>"]
        return "/".join(keys)


def without_rest(text: str) -> str:
    """A text without a final `/**`, which names everything in a layer."""
    stop = len(text)
    while text.endswith(("/**", ".**"), 0, stop):
        stop -= 3
    return text[:stop]


def notation(text: str) -> Notation | None:
    """A text that names layers, parsed; None if its last key, ignoring `**`, holds no number.

    >>> notation("model.layers.<n>.**").head, notation("Dense_[:-1]").head, notation("Dense_0")
    ('', 'Dense_', None)
    """
    *above, last = parse(without_rest(text)).segments
    atoms = last.atoms if isinstance(last, Piece) else ()
    at = next((i for i, atom in enumerate(atoms) if isinstance(atom, Positions | Number)), None)
    if at is None or not all(isinstance(atom, Literal) for atom in (*atoms[:at], *atoms[at + 1 :])):
        return None
    head, tail = ("".join(a.text for a in part if isinstance(a, Literal)) for part in (atoms[:at], atoms[at + 1 :]))
    number = atoms[at]
    positions = number if isinstance(number, Positions) else ALL
    return Notation(text, tuple(above), head, tail, positions, isinstance(number, Number))


def layers_of(index: Index, text: str) -> tuple[Notation, list[Numbered]]:
    """The notation of a text, and the numbered entries that it means; `BadArgument` or `NoMatch` if it means none."""
    said = notation(text)
    if said is None:
        why = f'layers="{text}" does not end in a key with the number of a layer'
        raise BadArgument(why, hint=hint_of(index, text))
    found = said.find(index.names)
    if not found:
        raise NoMatch(f'layers="{text}" names no numbered layers', hint=hint_of(index))
    return said, found


def candidates(index: Index) -> list[Numbered]:
    """The outermost numbered subtrees of a tree: keys that are numbers, then siblings such as `Dense_0`."""
    return [*_children(index.names), *_siblings(index.names)]


def known(index: Index) -> str:
    """The layers that a tree has, as a hint: code that works."""
    found = [f'layers="{one.written(index.separator)}"' for one in candidates(index)]
    return " or ".join(found[:3]) or 'pm.at(tree, "**").paths  # all paths'


def spelled(index: Index, text: str) -> dict[str, tuple[str, ...]]:
    """A text filled in with each combination of captured numbers that exists → the numbers; in numeric order.

    >>> spelled(Index.of_names(["h.0.w", "h.1.w", "h.1.b"]), "h.<n>.w")
    {'h.0.w': ('0',), 'h.1.w': ('1',)}
    """
    names = captures_of(text)
    rule = rename(text, "/".join((*(f"<{name}>" for name in names), text)), indexed=True)
    found = {
        tuple(step.text for step in path[: len(names)] if isinstance(step, PathStep))
        for path in rule.over(index).values()
    }
    parts = around_captures(text)
    filled: dict[str, tuple[str, ...]] = {}
    for numbers in sorted(found, key=lambda numbers: [*map(int, numbers)]):
        filled[parts[0] + "".join(n + part for n, part in zip(numbers, parts[1:], strict=True))] = numbers
    return filled


def whole(index: Index, text: str) -> str:
    """A text as a selector of leaves: `**` is appended if it names subtrees, as `layers[*]` does."""
    pattern = parse(text)
    hits, subtrees = pattern.reach(index.names)
    return f"{text}{separator_in(text, index)}**" if subtrees and not hits else text


def starred(index: Index, text: str) -> str | None:
    """A text such as `block_*/**` with `<n>` for its star, if that matches the numbers of several layers; else None."""
    *above, last = parse(without_rest(text)).segments
    if not isinstance(last, Piece) or sum(isinstance(atom, Star) for atom in last.atoms) != 1:
        return None
    atoms = tuple(Number("n") if isinstance(atom, Star) else atom for atom in last.atoms)
    star, number = (Pattern((*above, piece, AnyPieces())) for piece in (last, Piece(atoms)))
    found = number.find(index.names)
    if not found or set(found) != set(star.find(index.names)):
        return None
    written = number.write(separator_in(text, index))
    return written if len(spelled(index, written)) > 1 else None


def hint_of(index: Index, text: str = "") -> str:
    """The layers that a text may mean, or else all layers: code that works."""
    base = without_rest(text).rstrip("/.*")
    if base:
        for near in (f"{base}[*]", f"{base}_[*]"):
            try:
                said = notation(near)
            except ValueError:
                continue
            if said is not None and said.find(index.names):
                return f'layers="{near}"'
    return known(index)


def _parents(names: Names, above: Pattern | None) -> Iterator[tuple[Pieces, Names]]:
    if above is None:
        yield (), names
        return
    wanted = {id(inner) for inner in above.reach(names)[1]}
    for path, inner in _subtrees(names, ()):
        if id(inner) in wanted:
            yield path, inner


def _subtrees(names: Names, path: Pieces) -> Iterator[tuple[Pieces, Names]]:
    rest = [(path, names)]
    while rest:
        path, names = rest.pop()
        yield path, names
        rest += [((*path, text_of(label)), child) for label, child in names.items() if type(child) is not int][::-1]


def _families(names: Names, parent: Pieces, said: Notation) -> Iterator[Numbered]:
    """The numbered entries that a notation means under one parent: for `head[...]` the children of `head`, else the
    siblings `head<number>`."""
    if said.head and not said.tail and not said.captured:
        holders = [c for label, c in names.items() if text_of(label) == said.head and type(c) is not int]
        children = _numbered((*parent, said.head), "", "", *_told(holders))
        if children is not None:
            yield children
            return
    end = None if said.head or said.tail else getattr(names, "layers", None)
    siblings = _numbered(parent, said.head, said.tail, map(text_of, names), end)
    if siblings is not None:
        yield siblings


def _told(holders: list[Names]) -> tuple[Iterable[str], int | None]:
    """The names below holders of numbered entries, and the first number of those that are no layers."""
    ends = [end for holder in holders if (end := getattr(holder, "layers", None)) is not None]
    return (text_of(label) for holder in holders for label in holder), min(ends, default=None)


def _numbered(parent: Pieces, head: str, tail: str, texts: Iterable[str], end: int | None = None) -> Numbered | None:
    """The entries among these names of the form `head<number>tail`; None if there are none."""
    inner = (t[len(head) : len(t) - len(tail)] for t in texts if t.startswith(head) and t.endswith(tail))
    found = {number: text for text in inner if (number := number_of(text)) is not None}
    if not found:
        return None
    padded = max((len(text) for text in found.values() if text[0] == "0" != text), default=0)
    numbers = sorted(found)
    layers = [number for number in numbers if end is None or number < end]
    return Numbered(parent, head, tail, tuple(layers), padded, tuple(numbers[len(layers) :]))


def _children(names: Names) -> list[Numbered]:
    found: dict[Pieces, Numbered] = {}
    for path, inner in _subtrees(names, ()):
        if any(path[:depth] in found for depth in range(len(path) + 1)):
            continue
        subtrees = (text_of(label) for label, child in inner.items() if type(child) is not int)
        one = _numbered(path, "", "", subtrees, getattr(inner, "layers", None))
        if one is not None:
            found[path] = one
    return list(found.values())


_SIBLING = re.compile(r"(.*[^0-9])[0-9]{1,18}", re.DOTALL)


def _siblings(names: Names) -> Iterator[Numbered]:
    """The families of two or more siblings whose names end in a number, except those within others or within lists."""
    rest: list[tuple[Pieces, Names]] = [((), names)]
    while rest:
        path, names = rest.pop()
        inner = {text_of(label): child for label, child in names.items() if type(child) is not int}
        heads: dict[str, list[str]] = {}
        for text in inner:
            if match := _SIBLING.fullmatch(text):
                heads.setdefault(match[1], []).append(text)
        families = {head: texts for head, texts in heads.items() if len(set(map(natural, texts))) > 1}
        yield from (one for head, texts in families.items() if (one := _numbered(path, head, "", texts)))
        within = {text for texts in families.values() for text in texts}
        rest += [
            ((*path, text), child) for text, child in inner.items() if number_of(text) is None and text not in within
        ][::-1]
