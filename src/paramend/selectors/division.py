"""One piece of a selector against a text: whether it matches, and which part of the text each wildcard takes.

The time is linear in pattern × text. A regular expression would try all the ways in which stars and choices can divide
a text between them, so it serves only where there is one.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

from paramend.selectors.grammar import Atom, Either, Literal, Star

# At most 18 digits: longer runs are names, not positions, and int() of a hostile one would take forever.
_DIGITS = r"(?<![0-9])([0-9]{1,18})(?![0-9])"

# Two stars divide a text of this length in few enough ways to try them all.
_SHORT = 64

Taken = list[tuple[Atom, str]]


@lru_cache(maxsize=4096)
def acceptor(atoms: tuple[Atom, ...]) -> Callable[[str], bool]:
    """A test of one piece. Common forms need neither a table nor a regular expression, which is slow to compile."""
    match atoms:
        case ():
            return lambda text: not text
        case (Literal(exact),):
            return lambda text: text == exact
        case (Star(),):
            return lambda text: True
        case (Either(options),) if len(texts := _texts(options)) == len(options):
            return frozenset(texts).__contains__
    if Star() in atoms and all(isinstance(atom, Literal | Star) for atom in atoms):
        return _in_order(atoms)

    def accepts(text: str) -> bool:
        expression = _expression(atoms, len(text) <= _SHORT)
        if expression is not None:
            return expression.fullmatch(text) is not None
        return bool(_starts(atoms, text, 1 << len(text))[0] & 1)

    return accepts


def taken(atoms: tuple[Atom, ...], text: str) -> Taken | None:
    """Each wildcard of a piece with the text that it takes; None if the piece does not match. Wildcards on the left
    take what they can: stars as much, choices the first option."""
    expression = _expression(atoms, len(text) <= _SHORT)
    if expression is not None:
        found = expression.fullmatch(text)
        wild = [atom for atom in atoms if not isinstance(atom, Literal)]
        return None if found is None else list(zip(wild, found.groups(), strict=True))
    parts = divide(atoms, text)
    if parts is None:
        return None
    pairs = zip(atoms, parts, strict=True)
    return [(atom, text[start:stop]) for atom, (start, stop) in pairs if not isinstance(atom, Literal)]


def divide(atoms: tuple[Atom, ...], text: str) -> list[tuple[int, int]] | None:
    """Where each atom of a piece begins and ends; None if the piece does not match."""
    bounds = _divide(atoms, text, 0, 1 << len(text))
    return None if bounds is None else list(pairwise(bounds))


# ---- where there are few ways ----------------------------------------------------------------------------------


def _in_order(atoms: Sequence[Atom]) -> Callable[[str], bool]:
    """A test of literals between stars: each may stand as far left as it can."""
    parts = [""]
    for atom in atoms:
        if isinstance(atom, Literal):
            parts[-1] += atom.text
        else:
            parts.append("")
    head, *inner, tail = parts
    inner = [part for part in inner if part]
    least = len(head) + len(tail)

    def accepts(text: str) -> bool:
        if not text.startswith(head) or not text.endswith(tail) or len(text) < least:
            return False
        at, stop = len(head), len(text) - len(tail)
        for part in inner:
            at = text.find(part, at, stop)
            if at < 0:
                return False
            at += len(part)
        return True

    return accepts


@lru_cache(maxsize=4096)
def _expression(atoms: tuple[Atom, ...], short: bool) -> re.Pattern[str] | None:
    """A piece as a regular expression with a group for each wildcard; None if a text may divide in many ways."""
    choices = [atom for atom in atoms if isinstance(atom, Either)]
    if sum(isinstance(atom, Star) for atom in atoms) > 1 + short or not all(map(_distinct, choices)):
        return None
    out = []
    for atom in atoms:
        match atom:
            case Literal(text):
                out.append(re.escape(text))
            case Star():
                out.append("(.*)")
            case Either(options):
                out.append(f"({'|'.join(re.escape(text) for text in _texts(options))})")
            case _:
                out.append(_DIGITS)
    return re.compile("".join(out), re.DOTALL)


def _distinct(choice: Either) -> bool:
    """Whether at most one option can match at a place: plain texts, none of which begins another."""
    texts = sorted(_texts(choice.options))
    few = len(texts) <= 100  # a regular expression tries one after the other
    return few and len(texts) == len(choice.options) and not any(b.startswith(a) for a, b in pairwise(texts))


def _texts(options: Sequence[tuple[Literal | Star, ...]]) -> list[str]:
    return [
        "".join(atom.text for atom in option if isinstance(atom, Literal))
        for option in options
        if not any(isinstance(atom, Star) for atom in option)
    ]


# ---- sets of places --------------------------------------------------------------------------------------------

# A set of places in a text is an int: bit `n` stands for the place before character `n`.


def _starts(atoms: Sequence[Atom], text: str, ends: int) -> list[int]:
    """For each atom, the places from which it and those after it reach one of the ends; the ends come last."""
    found = [ends]
    for atom in reversed(atoms):
        found.append(_before(atom, text, found[-1]) if found[-1] else 0)
    return found[::-1]


def _before(atom: Atom, text: str, ends: int) -> int:
    """The places from which an atom reaches one of the ends."""
    if isinstance(atom, Star):
        return (1 << ends.bit_length()) - 1
    if isinstance(atom, Literal):
        return _set(_places(text, atom.text), len(text)) & ends >> len(atom.text)
    if isinstance(atom, Either):
        found = 0
        for option in atom.options:
            found |= _starts(option, text, ends)[0]
        return found
    is_end = bin(ends)[:1:-1].ljust(len(text) + 1, "0")
    return _set((start for start, stop in _numbers(text) if is_end[stop] == "1"), len(text))


def _places(text: str, part: str) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def _set(places: Iterable[int], length: int) -> int:
    """A set of places; in one go, because each step on a long int would take as long as the whole."""
    bits = bytearray(b"0") * (length + 1)
    for place in places:
        bits[-1 - place] = 49  # "1"
    return int(bits, 2)


def _numbers(text: str) -> Iterator[tuple[int, int]]:
    return (found.span() for found in re.finditer(_DIGITS, text))


def _divide(atoms: Sequence[Atom], text: str, start: int, ends: int) -> list[int] | None:
    """The places between the atoms, from a start to one of the ends; None if they do not lead there."""
    starts = _starts(atoms, text, ends)
    if not starts[0] >> start & 1:
        return None
    bounds = [start]
    for atom, after in zip(atoms, starts[1:], strict=True):
        bounds.append(_end(atom, text, bounds[-1], after))
    return bounds


def _end(atom: Atom, text: str, start: int, ends: int) -> int:
    """Where an atom that begins at a place ends: at the best of the ends that it reaches."""
    if isinstance(atom, Star):
        return ends.bit_length() - 1
    if isinstance(atom, Literal):
        return start + len(atom.text)
    if isinstance(atom, Either):
        ways = (_divide(option, text, start, ends) for option in atom.options)
        return next(bounds[-1] for bounds in ways if bounds is not None)
    return next(stop for first, stop in _numbers(text) if first == start)
