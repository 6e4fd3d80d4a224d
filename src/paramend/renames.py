"""Renames: a selector whose wildcards capture, and a target whose wildcards say where the captures go."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from paramend.errors import BadArgument, RenameClash, SelectorError
from paramend.paths import Label, Part, text_of
from paramend.patterns import AnyPieces, Either, Literal, Number, Pattern, Piece, Positions, Quoted, Segment, Star, parse
from paramend.patterns import _compiled, _source

# What a wildcard took: labels for `**`, text for `*`, an option's place for {a,b}, an int for <n> and for [...].
Captured = tuple[Label, ...] | str | int


@dataclass(frozen=True, slots=True)
class Captures:
    """What the wildcards of a selector took of one path."""

    anys: tuple[tuple[Label, ...], ...] = ()
    stars: tuple[str, ...] = ()
    choices: tuple[int, ...] = ()
    numbers: tuple[tuple[str, int], ...] = ()


def capture(pattern: Pattern, path: Sequence[Label]) -> Captures | None:
    """What the wildcards took, leftmost longest; None if the path does not match.

    An index such as `[-1]` takes any number here: whether it is the right one, `Pattern.find` has said.
    """
    return _capture(pattern.segments, tuple(path))


def _capture(segments: tuple[Segment, ...], path: tuple[Label, ...]) -> Captures | None:
    if not segments:
        return Captures() if not path else None
    first, rest = segments[0], segments[1:]
    if isinstance(first, AnyPieces):
        for taken in range(len(path), -1, -1):
            found = _capture(rest, path[taken:])
            if found is not None:
                return Captures((path[:taken], *found.anys), found.stars, found.choices, found.numbers)
        return None
    if isinstance(first, Quoted):
        size = len(Pattern((first,))._machine.steps)
        if len(path) < size or not Pattern((first,)).find(_chain(path[:size])):
            return None
        return _capture(rest, path[size:])
    if not path:
        return None
    taken = 2 if _indexes_children(first) and len(path) > 1 and text_of(path[1]).isdigit() else 1
    here = _capture_piece(first if taken == 1 else Piece(first.atoms[:-1]), text_of(path[0]))
    if here is None:
        return None
    found = _capture(rest, path[taken:])
    if found is None:
        return None
    return Captures(
        found.anys, here.stars + found.stars, here.choices + found.choices, here.numbers + found.numbers
    )


def _chain(path: Sequence[Label]) -> dict[Label, object]:
    names: object = 0
    for label in reversed(path):
        names = {label: names}
    return names  # type: ignore[return-value]


def _indexes_children(piece: Piece) -> bool:
    return len(piece.atoms) > 1 and isinstance(piece.atoms[-1], Positions)


@lru_cache(maxsize=1024)
def _expression(piece: Piece) -> re.Pattern[str]:
    return _compiled(_source(piece.atoms))


def _capture_piece(piece: Piece, text: str) -> Captures | None:
    found = _expression(piece).fullmatch(text)
    if found is None:
        return None
    stars: list[str] = []
    choices: list[int] = []
    numbers: list[tuple[str, int]] = []
    wild = [atom for atom in piece.atoms if not isinstance(atom, Literal)]
    for atom, taken in zip(wild, found.groups(), strict=True):
        match atom:
            case Star():
                stars.append(taken)
            case Either(options):
                pieces = [Piece(option) for option in options]
                choices.append(next(i for i, p in enumerate(pieces) if _expression(p).fullmatch(taken)))
            case Number(name):
                numbers.append((name, int(taken)))
    return Captures((), tuple(stars), tuple(choices), tuple(numbers))


@dataclass(frozen=True)
class Rename:
    """A rename: leaves that match `source` go to `target`.

    >>> print(rename("h_<n>/**", "layers/<n+1>/**"))
    h_<n>/** -> layers/<n+1>/**
    """

    source: Pattern
    target: Pattern

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"

    def of(self, path: Sequence[Label]) -> tuple[Label | Pattern, ...] | None:
        """The new path, or None if this one does not match.

        Segments of the target with an index such as `[-1]` come back as patterns, to be resolved in the tree that the
        path is for.
        """
        found = capture(self.source, path)
        return None if found is None else self._fill(found)

    def _fill(self, found: Captures) -> tuple[Label | Pattern, ...]:
        anys, stars, choices = iter(found.anys), iter(found.stars), iter(found.choices)
        numbers = dict(found.numbers)
        out: list[Label | Pattern] = []
        for segment in self.target.segments:
            match segment:
                case AnyPieces():
                    out += next(anys)
                case Quoted(text):
                    out.append(Pattern((segment,)) if "/" in text or "." in text else text)
                case Piece(atoms):
                    filled: list[Literal | Positions] = []
                    for atom in atoms:
                        match atom:
                            case Literal() | Positions():
                                filled.append(atom)
                            case Star():
                                filled.append(Literal(next(stars)))
                            case Either(options):
                                option = options[next(choices)]
                                texts = (part.text if isinstance(part, Literal) else next(stars) for part in option)
                                filled.append(Literal("".join(texts)))
                            case Number(name, factor, shift):
                                value = factor * numbers[name] + shift
                                if value < 0:
                                    raise RenameClash(f"{self}: {atom} is {value} where {name} is {numbers[name]}")
                                filled.append(Literal(str(value)))
                    if any(isinstance(atom, Positions) for atom in filled):
                        out.append(Pattern((Piece(tuple(filled)),)))
                    else:
                        out.append("".join(atom.text for atom in filled if isinstance(atom, Literal)))
        return tuple(out)


def rename(source: str, target: str, *, indexed: bool = False) -> Rename:
    """A checked rename.

    Args:
        source: a selector.
        target: the new path, with the wildcards of the source.
        indexed: whether the target may hold an index such as `[-1]`, resolved in another tree.

    Raises:
        SelectorError: one of the texts breaks the grammar.
        BadArgument: the wildcards of the two sides do not agree.
    """
    rule = Rename(parse(source), parse(target))
    have, want = _wildcards(rule.source), _wildcards(rule.target)
    for kind, name in (("anys", "**"), ("stars", "*")):
        if have[kind] != want[kind]:
            raise BadArgument(
                f"{target!r} has {want[kind]} × `{name}`, and {source!r} has {have[kind]}",
                hint="each wildcard of the source stands once in the target, in the same order",
            )
    if have["choices"] != want["choices"]:
        raise BadArgument(
            f"the choices {{...}} of {source!r} and {target!r} do not pair up", hint='"{q,k}/w" -> "{query,key}/w"'
        )
    unknown = set(want["numbers"]) - set(have["numbers"])
    if unknown or len(set(have["numbers"])) != len(have["numbers"]):
        at = target.find("<") if unknown else source.find("<")
        text = target if unknown else source
        raise SelectorError(
            "this number is captured nowhere in the source" if unknown else "a number is captured twice",
            text=text,
            span=(max(at, 0), text.find(">", at) + 1),
            hint='"h/<n>/**" -> "layers/<n>/**"',
        )
    for atom in (a for s in rule.source.segments if isinstance(s, Piece) for a in s.atoms):
        if isinstance(atom, Number) and (atom.factor, atom.shift) != (1, 0):
            raise BadArgument(f"{source!r}: {atom} reckons, and a source only captures", hint=f"<{atom.name}>")
    if want["indices"] and not indexed:
        raise BadArgument(f"{target!r}: a new path cannot hold an index {want['indices'][0]}", hint="<n> of the source")
    return rule


def _wildcards(pattern: Pattern) -> dict[str, list[object]]:
    found: dict[str, list[object]] = {"anys": [], "stars": [], "choices": [], "numbers": [], "indices": []}

    def visit(atom: object) -> None:
        match atom:
            case Star():
                found["stars"].append(None)
            case Either(options):
                found["choices"].append(len(options))
            case Number(name):
                found["numbers"].append(name)
            case Positions():
                found["indices"].append(atom)

    for segment in pattern.segments:
        if isinstance(segment, AnyPieces):
            found["anys"].append(None)
        for atom in getattr(segment, "atoms", ()):
            visit(atom)
    return found


def joined(path: Sequence[Label], separator: str) -> tuple[str, ...]:
    """The keys that labels make: parts stay in the key that they were parts of.

    >>> joined(["net", Part("~", "/", False), Part("linear_0", "/", True), "w"], "/")
    ('net/~/linear_0', 'w')
    """
    keys: list[str] = []
    for label in path:
        if isinstance(label, Part) and label.before and keys:
            keys[-1] += label.before + label.text
        else:
            keys.append(text_of(label))
    return tuple(keys)
