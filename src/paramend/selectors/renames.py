"""Renames: a selector whose wildcards capture, and a target whose wildcards say where the captures go.

A rename is applied to a whole tree of names at once, not leaf by leaf: so rotations and swaps work, and `[-1]` means
the last one in this tree.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from paramend.errors import BadArgument, OutOfRange, RenameClash, SelectorError
from paramend.leaves.leaves import Index
from paramend.leaves.paths import Label, Names, labels, text_of, write_path
from paramend.selectors.division import taken
from paramend.selectors.grammar import AnyPieces, Either, Literal, Number, Piece, Positions, Quoted, Segment, Star
from paramend.selectors.matching import families, steps_of
from paramend.selectors.nesting import PathStep, Tables, Word, closes, nest, opens, pair
from paramend.selectors.patterns import Pattern, parse


class Pick(NamedTuple):
    """A piece with an index, for the tree that a path is for, and which of its positions it takes; None for the one."""

    piece: Piece
    which: int | None


W = TypeVar("W")
NewPath = tuple[PathStep | Pick, ...]
# A path as the keys that it is made of, each with the depth in the old path of the container that it was in.
Keys = Sequence[tuple[str, int | None]]


@dataclass(frozen=True)
class Rename:
    """A rename: leaves that match `source` go to `target`. Made by `rename`, which checks that the two agree.

    >>> print(rename("h_<n>/**", "layers/<n+1>/**"))
    h_<n>/** -> layers/<n+1>/**
    """

    source: Pattern
    target: Pattern

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"

    def over(self, index: Index, only: Collection[int] | None = None) -> dict[int, NewPath]:
        """The new paths of the leaves of a tree that match, or `only` of some of them, by leaf number."""
        tables = Tables(index)
        return {number: writer.path(tables) for number, writer in self._writers(index, only)}

    def texts(self, index: Index) -> dict[int, tuple[str, ...]]:
        """The pieces of the new paths of the leaves of a tree that match, in no keys, by leaf number; see `over`.

        >>> rename("h.<n>.w", "<n>/layers.w").texts(Index.of_names(["h.0.w", "h.1.w"]))
        {0: ('0', 'layers', 'w'), 1: ('1', 'layers', 'w')}
        """
        return {number: writer.texts() for number, writer in self._writers(index, None)}

    def _writers(self, index: Index, only: Collection[int] | None) -> Iterator[tuple[int, "_Writer"]]:
        reader = _Reader(self.source.segments, index.names)
        for number in index.ordered(self.source.find(index.names)):
            if only is not None and number not in only:
                continue
            path = index.paths[number]
            spans = reader.split(path)
            if spans is not None:
                yield number, _Writer(self, path, spans, reader)


def captures(target: str) -> bool:
    """Whether a target has wildcards, which take what those of a selector match; else it is the path of one leaf.

    >>> captures("layers/<n+1>/w"), captures("layers[-1]/w")
    (True, False)
    """
    return any(char in target for char in "*{<")


def rename(source: str, target: str, *, indexed: bool = False) -> Rename:
    """A checked rename.

    Args:
        source: a selector.
        target: the new path, with the wildcards of the source: `*`, `**` and `{a,b}` in the same order, `<n>` by
            name, also as `<n+1>` or `<2*n>`.
        indexed: whether the target may hold an index such as `[-1]`, a position in another tree. If the source has an
            index too, their positions pair up in the order written: `layers[-2:]` with `layers[0,1]`.

    Raises:
        SelectorError: one of the texts breaks the grammar.
        BadArgument: the wildcards of the two sides do not agree.
    """
    rule = Rename(parse(source), parse(target))
    kinds: tuple[tuple[str, type], ...] = (("**", AnyPieces), ("*", Star))
    for name, kind in kinds:
        here, there = len(_of(rule.source, kind)), len(_of(rule.target, kind))
        if here != there:
            raise BadArgument(
                f"{target!r} has {there} × `{name}`, and {source!r} has {here}",
                hint="repeat each wildcard of the source once in the target, in the same order",
            )
    if list(map(_shape_of, _of(rule.source, Either))) != list(map(_shape_of, _of(rule.target, Either))):
        raise BadArgument(
            f"the choices {{...}} of {source!r} and {target!r} do not pair up", hint='"{q,k}/w" -> "{query,key}/w"'
        )
    numbers, positions = _of(rule.source, Number), _of(rule.target, Positions)
    first = {atom.name: i for i, atom in reversed(list(enumerate(numbers)))}
    unknown = [atom for atom in _of(rule.target, Number) if atom.name not in first]
    twice = [atom for i, atom in enumerate(numbers) if first[atom.name] < i]
    if unknown or twice:
        text, atom = (target, unknown[0]) if unknown else (source, twice[0])
        at = max(text.find(str(atom)) if unknown else text.rfind(str(atom)), 0)
        raise SelectorError(
            "this number is captured nowhere in the source" if unknown else "this number is captured twice",
            text=text,
            span=(at, text.find(">", at) + 1),
            hint='"h/<n>/**" -> "layers/<n>/**"',
        )
    for atom in numbers:
        if (atom.factor, atom.shift) != (1, 0):
            raise BadArgument(f"{source!r}: {atom} is arithmetic, and a source only captures", hint=f"<{atom.name}>")
    if positions and not indexed:
        raise BadArgument(f"{target!r}: a new path cannot hold an index {positions[0]}", hint="<n> of the source")
    return rule


def pieces(path: NewPath, names: Names | None = None) -> tuple[str, ...]:
    """The pieces of a new path; picks are looked up in the names of the tree that it is for, which may lack it."""
    out: list[str] = []
    for step in path:
        if isinstance(step, PathStep):
            out += map(text_of, labels(step.text))
        else:
            out += _look_up(step, names or {}, out)
    return tuple(out)


def keys(path: NewPath) -> list[tuple[str, int | None]]:
    """The keys of a new path without picks, each with the depth in the old path of the container that it was in.

    >>> keys((PathStep("net", None, 0), PathStep("~", "/", 0), PathStep("linear_0", "/", 0), PathStep("w", None, 1)))
    [('net/~/linear_0', 0), ('w', 1)]
    """
    out: list[tuple[str, int | None]] = []
    for step in path:
        assert isinstance(step, PathStep)
        if step.before is None:
            out.append((step.text, step.depth))
        else:
            out[-1] = (out[-1][0] + step.before + step.text, step.depth)
    return out


class _Reader:
    """Splits paths of one tree of names into the labels that each segment of a pattern takes, leftmost longest."""

    def __init__(self, segments: tuple[Segment, ...], names: Names) -> None:
        self.segments = segments
        self.names = names
        self._places: dict[tuple[int, Piece], dict[tuple[Label, ...], int]] = {}
        self.captured = cache(_captured)  # the same few texts are in most paths
        wild = [segment for segment in segments if isinstance(segment, AnyPieces)]
        single = len(wild) + sum(isinstance(segment, Piece) and not _indexed(segment) for segment in segments)
        self._one_way = len(wild) < 2 and single == len(segments)

    def split(self, path: tuple[Label, ...]) -> tuple[tuple[int, int], ...] | None:
        """For each segment, the range of labels that it takes; None if the path does not match."""
        if self._one_way:
            return self._split_one_way(path)
        parents = [self.names]
        for label in path[:-1]:
            parents.append(parents[-1][label])

        # Each (segment, place) is tried once: the segments after it end the same way, however it was reached.
        tried: set[tuple[int, int]] = set()
        ways: list[tuple[int, int, tuple[Any, ...]]] = [(0, 0, ())]
        while ways:
            at, place, trail = ways.pop()
            if at == len(self.segments) and place == len(path):
                return _unrolled(trail)
            if at == len(self.segments) or (at, place) in tried:
                continue
            tried.add((at, place))
            segment = self.segments[at]
            if isinstance(segment, AnyPieces):
                ways.append((at + 1, place, (trail, place)))
                ways += [(at, place + 1, trail)] if place < len(path) else []
            else:
                stops = [place + size for size in self._sizes(segment, path, place, parents)]
                ways += [(at + 1, stop, (trail, stop)) for stop in reversed(stops)]
        return None

    def _split_one_way(self, path: tuple[Label, ...]) -> tuple[tuple[int, int], ...] | None:
        """The same where each segment takes one label, but for at most one `**`."""
        singles = sum(isinstance(segment, Piece) for segment in self.segments)
        left = len(path) - singles
        if left < 0 or (left and singles == len(self.segments)):
            return None
        stops = [0]
        for segment in self.segments:
            at = stops[-1]
            if isinstance(segment, Piece) and self.captured(segment, text_of(path[at])) is None:
                return None
            stops.append(at + (1 if isinstance(segment, Piece) else left))
        return tuple(pairwise(stops))

    def _sizes(self, segment: Quoted | Piece, path: tuple[Label, ...], at: int, parents: list[Names]) -> Sequence[int]:
        """How many labels a segment may take from here, most first."""
        if at == len(path):
            return ()
        if isinstance(segment, Quoted):
            wanted = labels(segment.text)
            ends = path[at : at + len(wanted)]
            same = [text_of(label) for label in ends] == [text_of(label) for label in wanted]
            return (len(wanted),) if same and opens(ends[0]) and closes(ends[-1]) else ()
        if _indexed(segment):
            places = self.places(parents[at], segment)
            return [size for size in (2, 1) if path[at : at + size] in places]
        return (1,) if self.captured(segment, text_of(path[at])) is not None else ()

    def places(self, names: Names, piece: Piece) -> dict[tuple[Label, ...], int]:
        """The labels that a piece with an index takes under one parent → which of the positions each is."""
        key = (id(names), piece)
        if key not in self._places:
            self._places[key] = _positions(names, piece)
        return self._places[key]


def _unrolled(trail: tuple[Any, ...]) -> tuple[tuple[int, int], ...]:
    stops = []
    while trail:
        trail, stop = trail
        stops.append(stop)
    return tuple(pairwise((0, *reversed(stops))))


def _indexed(piece: Piece) -> bool:
    return any(isinstance(atom, Positions) for atom in piece.atoms)


class _Captured(NamedTuple):
    """What the wildcards of a piece take of a text."""

    stars: list[str]  # the texts of `*`, in order
    choices: list[tuple[int, list[str]]]  # for each `{a,b}` the option that it is, and the texts of the stars within
    numbers: dict[str, str]  # the digits of `<n>`, by name


def _captured(piece: Piece, text: str) -> _Captured | None:
    """What a piece captures; None if the text does not match."""
    found = taken(piece.atoms, text)
    if found is None:
        return None
    captured = _Captured([], [], {})
    for atom, part in found:
        if isinstance(atom, Star):
            captured.stars.append(part)
        elif isinstance(atom, Either):
            options = ((i, taken(option, part)) for i, option in enumerate(atom.options))
            which, inner = next((i, inner) for i, inner in options if inner is not None)
            captured.choices.append((which, [star for _, star in inner]))
        elif isinstance(atom, Number):
            captured.numbers[atom.name] = part
    return captured


def _positions(names: Names, piece: Piece) -> dict[tuple[Label, ...], int]:
    """The labels at the positions that a piece names under one parent, and which position each is. As in a selector:
    `layers[...]` means the numbered children of `layers`; where there are none, the siblings `layers<number>`."""
    (step,) = steps_of((piece,))
    assert step.positions is not None
    out: dict[tuple[Label, ...], int] = {}
    for _, members in families(names, step, {}):
        numbers = sorted(members)
        for which, position in enumerate(step.positions.among(len(numbers))):
            out.update(dict.fromkeys(members[numbers[position]], which))
    return out


def _look_up(pick: Pick, names: Names, above: Sequence[str]) -> list[str]:
    parents = [names]
    for text in above:
        parents = [
            child
            for parent in parents
            for label, child in parent.items()
            if text_of(label) == text and type(child) is not int
        ]
    found = [(place, which) for parent in parents for place, which in _positions(parent, pick.piece).items()]
    chosen = sorted({tuple(map(text_of, place)) for place, which in found if pick.which in (None, which)})
    if len(chosen) == 1:
        return list(chosen[0])
    where = "/".join((*above, str(pick.piece)))
    if not chosen:
        there = len({which for _, which in found})
        asked = "" if pick.which is None or not there else f" number {pick.which + 1}, only {there}"
        raise OutOfRange(f"there is no {where}{asked}")
    raise OutOfRange(f"{where} names {len(chosen)} keys, and the source has no index to pair them with")


class _Writer:
    """Fills the target of a rename with what the source captured in one path."""

    def __init__(
        self, rule: Rename, path: tuple[Label, ...], spans: Sequence[tuple[int, int]], reader: _Reader
    ) -> None:
        self.rule = rule
        self.old = path
        self.took = _Captured([], [], {})
        self.whiches: list[int] = []
        # The path is split into runs between the `**`: run, `**`, run, `**`, run.
        self.runs: list[tuple[int, int]] = []
        self.anys: list[tuple[int, int]] = []
        names, walked, begin = reader.names, 0, 0
        for segment, (start, stop) in zip(rule.source.segments, spans, strict=True):
            while walked < start:
                names, walked = names[path[walked]], walked + 1
            if isinstance(segment, AnyPieces):
                self.runs.append((begin, start))
                self.anys.append((start, stop))
                begin = stop
            elif isinstance(segment, Piece):
                self._capture(segment, start, stop, names, reader)
        self.runs.append((begin, len(path)))

    def _capture(self, piece: Piece, start: int, stop: int, names: Names, reader: _Reader) -> None:
        if _indexed(piece):
            self.whiches.append(reader.places(names, piece)[self.old[start:stop]])
        if stop - start == 2:  # the index takes the label below
            piece = Piece(piece.atoms[:-1])
        found = reader.captured(piece, text_of(self.old[start]))
        if found is not None:
            self.took.stars.extend(found.stars)
            self.took.choices.extend(found.choices)
            self.took.numbers.update(found.numbers)

    def _filled(self) -> list[list[str | Pick | Quoted]]:
        """The new pieces of each run."""
        stars, choices, whiches = iter(self.took.stars), iter(self.took.choices), iter(self.whiches)
        runs: list[list[str | Pick | Quoted]] = [[]]
        for segment in self.rule.target.segments:
            match segment:
                case AnyPieces():
                    runs.append([])
                case Quoted():
                    runs[-1].append(segment)
                case Piece(atoms):
                    filled: list[Literal | Positions] = []
                    for atom in atoms:
                        match atom:
                            case Literal() | Positions():
                                filled.append(atom)
                            case Star():
                                filled.append(Literal(next(stars)))
                            case Either(options):
                                which, inner = next(choices)
                                filled += _fill(options[which], inner)
                            case Number():
                                filled.append(Literal(self._reckon(atom)))
                    if any(isinstance(atom, Positions) for atom in filled):
                        runs[-1].append(Pick(Piece(tuple(filled)), next(whiches, None)))
                    else:
                        runs[-1].append("".join(atom.text for atom in filled if isinstance(atom, Literal)))
        return runs

    def texts(self) -> tuple[str, ...]:
        """The pieces of the new path, which has no picks."""
        out: list[str] = []
        for place, run in enumerate(self._filled()):
            for new in run:
                assert not isinstance(new, Pick)
                out += map(text_of, labels(new.text if isinstance(new, Quoted) else new))
            out += map(text_of, self.old[slice(*self.anys[place])] if place < len(self.anys) else ())
        return tuple(out)

    def path(self, tables: Tables) -> NewPath:
        joints = tables.joints(self.old)
        words: list[Word] = []
        picks: dict[int, Pick] = {}
        for place, run in enumerate(self._filled()):
            texts = [new if isinstance(new, str) else new.text if isinstance(new, Quoted) else "" for new in run]
            origins = pair(self.old, joints, range(*self.runs[place]), texts)
            for new, text, origin in zip(run, texts, origins, strict=True):
                if isinstance(new, Pick):
                    picks[len(words)] = new
                words.append(Word(text, origin, isinstance(new, Quoted)))
            kept = range(*self.anys[place]) if place < len(self.anys) else ()
            words += [Word(text_of(self.old[at]), at) for at in kept]
        if not words:
            raise RenameClash(f"{self.rule}: {write_path(self.old)} would have no name left")
        steps = nest(words, self.old, joints)
        return tuple(picks.get(at, step) for at, step in enumerate(steps))

    def _reckon(self, atom: Number) -> str:
        text = self.took.numbers[atom.name]
        value = atom.factor * int(text) + atom.shift
        if value < 0:
            raise RenameClash(f"{self.rule}: {atom} is {value} where {atom.name} is {text}")
        if (atom.factor, atom.shift) == (1, 0):
            return text
        return str(value).zfill(len(text) if text.startswith("0") else 0)


def _fill(option: tuple[Literal | Star, ...], stars: Sequence[str]) -> list[Literal]:
    taken = iter(stars)
    return [atom if isinstance(atom, Literal) else Literal(next(taken)) for atom in option]


def _of(pattern: Pattern, kind: type[W]) -> list[W]:
    """The wildcards of one kind in a side of a rename."""
    parts = (part for segment in pattern.segments for part in (segment, *getattr(segment, "atoms", ())))
    return [part for part in parts if isinstance(part, kind)]


def _shape_of(either: Either) -> list[int]:
    """The number of stars in each option: options pair up in order, and so do their stars."""
    return [sum(isinstance(atom, Star) for atom in option) for option in either.options]
