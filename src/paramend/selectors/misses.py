"""Near misses: selectors that match, close to one that does not.

The search splits a pattern where it first leads nowhere and tries the repairs that a person would: another case,
another number, a typo, a key too many, a key too few, a separator where the tree has none. Cheap repairs come first,
several may be combined, and only what matches is offered.
"""

import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from heapq import heappop, heappush
from itertools import count, product

from paramend.errors import OutOfRange
from paramend.leaves.paths import Names, labels, text_of, write_path
from paramend.reports import wording
from paramend.selectors.division import acceptor, divide
from paramend.selectors.grammar import AnyPieces, Atom, Either, Literal, Number, Piece, Positions, Quoted, Segment, Star
from paramend.selectors.patterns import Pattern, parse

_SECONDS = 0.3  # the time limit of a search: on large trees a late hint is worse than a short one
_LATEST = 1.0  # and where even the first few repairs take long
_MOST = 50  # segments of a pattern, characters of a word, and words that a piece spells: beyond, nobody misspelled it
_LONGEST = 200
_WORDS = 8
_WORST = 9  # the greatest cost of a near miss
_MOST_BESIDE = 4
_DIGITS = re.compile(r"[0-9]{1,18}")

Segments = tuple[Segment, ...]


_deadline: ContextVar[float] = ContextVar("_deadline", default=math.inf)


@contextmanager
def searching(seconds: float) -> Iterator[None]:
    """Bound the time that all searches within take together, such as those for the steps of one recipe."""
    token = _deadline.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.reset(token)


def nearest(pattern: Pattern, names: Names, limit: int = 3) -> list[tuple[Pattern, int]]:
    """Patterns that match, close to one that does not, each with the number of its leaves; best first."""
    if len(pattern.segments) > _MOST or len(str(pattern)) > 10 * _LONGEST:
        return []
    return _Search(names).run(pattern.segments, limit)


class _Search:
    """One search in a tree of names, which caches what segments reach."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.begun = time.monotonic()
        self.known: dict[Segments, tuple[list[int], list[Names]]] = {(): ([], [names])}

    def reach(self, segments: Segments) -> tuple[list[int], list[Names]]:
        if segments not in self.known:
            self.known[segments] = Pattern(segments).reach(self.names)
        return self.known[segments]

    def late(self, seconds: float = _LATEST) -> bool:
        return time.monotonic() > min(self.begun + seconds, _deadline.get())

    def run(self, segments: Segments, limit: int) -> list[tuple[Pattern, int]]:
        """Patterns that match, by the cost of their repairs; if several match the same leaves, only the cheapest."""
        typed = segments
        tickets, seen = count(), set[Segments]()
        queue: list[tuple[int, int, int, Segments]] = [(0, next(tickets), 0, segments)]
        found: dict[frozenset[int], Pattern] = {}
        worst = _WORST
        while queue and len(found) < limit and not self.late(_LATEST if len(seen) < 3 else _SECONDS):
            cost, _, start, segments = heappop(queue)
            if segments in seen or cost > worst:
                continue
            seen.add(segments)
            dead = next((i for i in range(start, len(segments)) if not any(self.reach(segments[: i + 1]))), None)
            if dead is not None:
                for more, first, repaired in self.repairs(segments, dead):
                    if self.late():
                        break
                    heappush(queue, (cost + more, next(tickets), first, _tidy(repaired)))
            elif not self.reach(segments)[0]:
                heappush(queue, (cost + 1, next(tickets), len(segments), (*segments, AnyPieces())))
            elif self.is_selector(segments) and not self.is_wider(segments, typed):
                found.setdefault(frozenset(self.reach(segments)[0]), Pattern(segments))
                worst = min(worst, cost)
        return [(near, len(leaves)) for leaves, near in found.items()]

    def is_selector(self, segments: Segments) -> bool:
        """Whether the segments match without a position that is out of range."""
        try:
            return bool(Pattern(segments).find(self.names))
        except OutOfRange:
            return False

    def is_wider(self, segments: Segments, typed: Segments) -> bool:
        """Whether the segments name several leaves, because a key that was typed gave way to a wildcard; or most of a
        tree, where one leaf was typed. The few leaves beside one that does not exist are no risk."""
        count = len(self.reach(segments)[0])
        if count > _MOST_BESIDE and not any(map(_is_many, typed)) and 2 * count > len(self.reach((AnyPieces(),))[0]):
            return True
        if count < 2 or _named(segments) >= _named(typed) or not any(map(_is_wild, segments)):
            return False
        return count > _MOST_BESIDE or segments[:-1] != typed[:-1] or not segments[:-1]

    def repairs(self, segments: Segments, dead: int) -> Iterator[tuple[int, int, Segments]]:
        """Repairs of the first segment that leads nowhere: (cost, the first segment to check again, segments)."""
        before, here, after = segments[:dead], segments[dead], segments[dead + 1 :]
        places = self.reach(before)[1]
        known = list(dict.fromkeys(text_of(label) for place in places for label in place))
        any_before = bool(before) and isinstance(before[-1], AnyPieces)
        for cost, segment in _near_keys(here, known):
            yield cost, dead, (*before, segment, *after)
        for parts in _split(here, known):
            yield 2, dead, (*before, *parts, *after)
        for key in self.bridges(places, (here, *after)):
            yield 2, dead, (*before, key, here, *after)  # a key too few
        if after:
            for joined in _join(here, after[0], known):
                yield 2, dead, (*before, joined, *after[1:])
            wide = any_before or after == (AnyPieces(),)
            yield 4 if wide else 2, max(dead - 1, 0), (*before, *after)  # a key too many
            yield 5, dead, (*before, Piece((Star(),)), *after)
        if not any_before:
            yield 3, dead, (*before, AnyPieces(), here, *after)
        if before and not any_before:
            yield 4, 0, (AnyPieces(), here, *after)
            yield 6, dead, before

    def bridges(self, places: Sequence[Names], rest: Segments, limit: int = 200) -> list[Segment]:
        """The keys under which the rest of a pattern matches; an empty list if there are more than three."""
        found: dict[str, Segment] = {}
        pattern = Pattern(rest)
        for place in places[:limit]:
            for label, child in list(place.items())[:limit]:
                text = text_of(label)
                if type(child) is not int and text not in found and not self.late() and pattern.reach(child)[0]:
                    found[text] = _key(text)
        return list(found.values()) if len(found) <= 3 else []


def _is_wild(segment: Segment) -> bool:
    return isinstance(segment, AnyPieces) or segment == Piece((Star(),))


def _is_many(segment: Segment) -> bool:
    return not isinstance(segment, Quoted) and segment != Piece(
        tuple(atom for atom in getattr(segment, "atoms", ()) if isinstance(atom, Literal))
    )


def _named(segments: Segments) -> int:
    return sum(not _is_wild(segment) for segment in segments)


def _tidy(segments: Segments) -> Segments:
    """The segments with each run of `**` reduced to one."""
    any_pieces = (AnyPieces(), AnyPieces())
    return tuple(s for at, s in enumerate(segments) if segments[max(at - 1, 0) : at + 1] != any_pieces)


def _key(text: str) -> Segment:
    return Quoted(text) if "/" in text or "." in text else Piece((Literal(text),))


# ---- near keys -------------------------------------------------------------------------------------------------


def _near_keys(segment: Segment, known: Sequence[str]) -> Iterator[tuple[int, Segment]]:
    if isinstance(segment, Quoted):
        pieces = labels(segment.text)
        if len(pieces) == 1:
            yield 1, Piece((Literal(segment.text),))
        yield from ((cost + 1, _key(key)) for cost, key in _ranked(segment.text, known))
        return
    if not isinstance(segment, Piece):
        return
    yield from _other_case(segment.atoms, known)
    yield from _other_positions(segment.atoms)
    if not any(isinstance(atom, Star | Positions | Number) for atom in segment.atoms):
        words = _words(segment.atoms)
        if len(words) == 1:
            yield from ((cost, _key(key)) for cost, key in _ranked(words[0], known))
            return
        best = [pair for word in words for pair in list(_ranked(word, known))[:1]]
        if best and len(best) == len(words):
            options = tuple((Literal(key),) for key in dict.fromkeys(key for _, key in best))
            yield max(cost for cost, _ in best), Piece((Either(options),))
    elif any(isinstance(atom, Star) for atom in segment.atoms):
        yield from _near_ends(segment.atoms, known)
    else:
        yield from _near_numbered(segment.atoms, known)


def _words(atoms: Sequence[Atom]) -> list[str]:
    """The texts that literals and choices spell; none if there are too many."""
    options = list(map(_texts, atoms))
    few = math.prod(map(len, options)) <= _WORDS
    return list(map("".join, product(*options))) if few else []


def _texts(atom: Atom) -> list[str]:
    if isinstance(atom, Either):
        return ["".join(a.text for a in option if isinstance(a, Literal)) for option in atom.options]
    return [atom.text if isinstance(atom, Literal) else ""]


def _shape(text: str) -> str:
    """A key without its numbers: `Dense_0`, `Dense_1` ... have one shape."""
    return _DIGITS.sub("#", text)


def _squeezed(text: str) -> str:
    return re.sub(r"[\s_\-~/.]", "", text).casefold()


def _near_shapes(shape: str, shapes: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Similar shapes with their ranks: the same, another case, other separators, a typo."""
    if len(shape) > _LONGEST:
        return
    shapes = [found for found in shapes if abs(len(found) - len(shape)) <= max(3, len(shape) // 2)]
    ranks: dict[str, int] = {}
    for found in shapes:
        if found == shape:
            ranks[found] = 0
        elif found.casefold() == shape.casefold():
            ranks[found] = 1
        elif _squeezed(found) == _squeezed(shape) != "":
            ranks[found] = 2
    for found in wording.closest(shape, [s for s in shapes[:2000] if s not in ranks]):
        ranks[found] = 3
    yield from sorted(((rank, found) for found, rank in ranks.items()), key=lambda pair: pair[0])


def _ranked(word: str, known: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Keys like a word, each with a cost; of keys that differ only in numbers, the one with the nearest numbers."""
    groups: dict[str, list[str]] = {}
    for key in known:
        groups.setdefault(_shape(key), []).append(key)
    wanted = [int(digits) for digits in _DIGITS.findall(word)]
    for cost, shape in _near_shapes(_shape(word), groups):
        keys = groups[shape]
        key = keys[0] if len(keys) == 1 else min(keys, key=lambda key: _distance(key, wanted))
        if key != word:
            yield cost + (2 if wanted and _distance(key, wanted) else 0), key


def _distance(key: str, wanted: Sequence[int]) -> int:
    have = [int(digits) for digits in _DIGITS.findall(key)]
    return sum(abs(a - b) for a, b in zip(have, wanted, strict=False))


def _other_case(atoms: tuple[Atom, ...], known: Sequence[str]) -> Iterator[tuple[int, Segment]]:
    """The segment with its literals in the case of the keys that it then matches."""
    if len(atoms) > _MOST:
        return
    loose = tuple(map(_lowered, atoms))
    bare = tuple(Literal("") if isinstance(atom, Positions) else atom for atom in loose)  # the numbers are children
    found: dict[Segment, None] = {}
    for ways in dict.fromkeys((loose, bare)):
        accepts = acceptor(ways)
        for key in known:
            lower = _lower(key[: _LONGEST + 1])
            spans = divide(ways, lower) if len(key) <= _LONGEST and accepts(lower) else None
            if spans is not None:
                pairs = zip(atoms, spans, strict=True)
                named = (Literal(key[i:j]) if isinstance(atom, Literal | Either) else atom for atom, (i, j) in pairs)
                found[Piece.of(named)] = None
    yield from ((1, segment) for segment in list(found)[:3] if segment != Piece(atoms))


def _lowered(atom: Atom) -> Atom:
    if isinstance(atom, Either):
        return Either(tuple(tuple(map(_lowered_text, option)) for option in atom.options))
    return _lowered_text(atom) if isinstance(atom, Literal) else atom


def _lowered_text(atom: Literal | Star) -> Literal | Star:
    return Literal(_lower(atom.text)) if isinstance(atom, Literal) else atom


def _lower(text: str) -> str:
    lower = text.lower()
    return lower if len(lower) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _other_positions(atoms: tuple[Atom, ...]) -> Iterator[tuple[int, Segment]]:
    """The last position in place of missing ones, all positions in place of an empty slice."""
    for at, atom in enumerate(atoms):
        if isinstance(atom, Positions):
            slices = any(isinstance(item, tuple) for item in atom.items)
            there = Positions(((None, None, None),) if slices else (-1,))
            yield 2, Piece((*atoms[:at], there, *atoms[at + 1 :]))


def _near_numbered(atoms: tuple[Atom, ...], known: Sequence[str]) -> Iterator[tuple[int, Segment]]:
    """`Dens_[-1]` for `Dense_0`, `Dense_1`; `layer[-1]` for `layers/0`, `layers/1` or `layer_0`, `layer_1`."""
    slots: list[Atom] = []
    word = ""
    for atom in atoms:
        text = _texts(atom)[0]
        slots += [Literal(digits) for digits in _DIGITS.findall(text)]
        word += _shape(text)
        if isinstance(atom, Positions | Number):
            slots.append(atom)
            word += "#"
    shapes = dict.fromkeys(map(_shape, known))
    for cost, shape in _near_shapes(word, shapes):
        texts = shape.split("#")
        if len(texts) == len(slots) + 1:
            pairs = (pair for i, slot in enumerate(slots) for pair in (Literal(texts[i]), slot))
            yield cost, Piece.of((*pairs, Literal(texts[-1])))
    if isinstance(atoms[-1], Positions):  # the numbers may be children instead
        for cost, key in _ranked("".join(_words(atoms[:-1])), known):
            yield cost, Piece((Literal(key), atoms[-1]))
        stripped = "".join(_words(atoms[:-1])).rstrip("_-")
        if stripped in known:
            yield 2, Piece((Literal(stripped), atoms[-1]))


def _near_ends(atoms: tuple[Atom, ...], known: Sequence[str]) -> Iterator[tuple[int, Segment]]:
    """`Dense_*` for `Dens_*`, `*_proj` for `*_prj`: corrected beginnings and ends of keys."""
    match atoms:
        case (Literal(head), Star()):
            ends = (key[: len(head) + more] for key in known for more in (-1, 0, 1))
            yield from ((3, Piece((Literal(text), Star()))) for text in wording.closest(head, _some(ends)))
        case (Star(), Literal(tail)):
            ends = (key[-len(tail) - more :] for key in known for more in (-1, 0, 1) if len(tail) + more)
            yield from ((3, Piece((Star(), Literal(text)))) for text in wording.closest(tail, _some(ends)))


def _some(texts: Iterable[str], limit: int = 2000) -> list[str]:
    distinct = dict.fromkeys(text for text in texts if text)
    return list(distinct)[:limit]


def _split(segment: Segment, known: Sequence[str]) -> Iterator[Segments]:
    """`layers_0` where the tree has `layers/0`; a quoted key where the tree has several."""
    if isinstance(segment, Quoted) and len(labels(segment.text)) > 1:
        yield parse(write_path(labels(segment.text))).segments
    if not isinstance(segment, Piece) or not isinstance(segment.atoms[0], Literal):
        return
    head = segment.atoms[0].text
    for key in known:
        if key and head.startswith(key) and head != key:
            rest = Piece.of((Literal(head[len(key) :].lstrip("_-~")), *segment.atoms[1:]))
            if rest.atoms:
                yield Piece((Literal(key),)), rest


def _join(first: Segment, second: Segment, known: Sequence[str]) -> Iterator[Segment]:
    """`layers/0` where the tree has `layers_0`."""
    match first, second:
        case Piece((Literal(head),)), Piece((Literal(tail), *rest)):
            for separator in ("_", "", "-", "."):
                text = head + separator + tail
                if any(key == text or (rest and key.startswith(text)) for key in known):
                    yield Piece.of((Literal(text), *rest)) if separator != "." else Quoted(text)
        case Piece((Literal(head),)), Piece((Number() | Star(), *_) as rest):
            if any(key.startswith(f"{head}_") for key in known):
                yield Piece((Literal(f"{head}_"), *rest))
