"""The plan of a graft: which leaf goes where, from names and specs alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paramend.arrays.registry import backend
from paramend.errors import BadArgument, NoMatch, OutOfRange, ParamendError, RenameClash, SpecMismatch, Unsupported
from paramend.grafting import layouts, mismatches
from paramend.grafting.mismatches import Meeting
from paramend.grafting.numbers import COUNTERS, WithGuests, beside_state, counts
from paramend.grafting.options import BY_LEAF, Case, Options, quoted
from paramend.grafting.report import PARTS, GraftReport, GraftRow
from paramend.leaves.leaves import Leaves
from paramend.leaves.specs import Spec
from paramend.reports import wording
from paramend.resize import detection
from paramend.selectors.patterns import parse
from paramend.selectors.renames import pieces, rename as parse_rename
from paramend.selectors.selector import resolve, slice_of
from paramend.trees.tree import Tree


@dataclass(slots=True)
class Move:
    """The move of one value from a leaf of the source to a leaf of the target, both by number."""

    row: GraftRow
    number: int
    origin: int
    meeting: Meeting | None = None

    @property
    def part(self) -> str:
        return "copied" if self.meeting is None else "mismatched"


class GraftPlan:
    """Which leaf goes where, from names and specs alone."""

    def __init__(self, target: Any, source: Leaves, options: Options) -> None:
        self.target, self.source, self.options = target, source, options
        self.cases: list[Case] = []  # the reasons against it
        self.moves: list[Move] = []  # what is to be done
        # The rows of the report that do not belong to a move, by its four parts.
        self.rows: dict[str, list[GraftRow]] = {name: [] for name in PARTS}
        self.missed: set[str] = set()  # the paths of the target for which the source has nothing
        inside = self._selected("only", options.only, "only")
        self._inside = set(_units(target)) if inside is None else inside
        self._by_leaf = {name: self._choices(name) for name in BY_LEAF}
        self._dropped: set[int] = set()
        self._crowded: set[int] = set()
        self.names = self._new_names()  # the name in the target of every leaf of the source that is not left behind
        self._arrivals, self.strays = self._meet(self.names)  # strays of the source have no place in the target
        self._crossed = self._other_layouts()
        # Leaf of the target → the leaf of the source that fits once its axes are permuted, and how.
        self.orders: dict[int, tuple[int, tuple[int, ...]]] = {}
        used: set[int] = set()
        for number in _units(target):
            if number in self._arrivals or number not in counts(target) or beside_state(target, number):
                used |= self._decide(number)
        self._leave_behind(used)
        if not self.moves and not any(case.kind in ("only", "rule", "place") for case in self.cases):
            self._case("nothing", (), "a graft that copies nothing is a mistake, whatever the options allow")

    def _selected(self, option: str, selector: Any, kind: str, prefix: str = "") -> set[int] | None:
        """The leaves of the target that a selector in an option finds; None, and a case, if there are none."""
        if slice_of(selector)[1] is not None:
            raise BadArgument(f"{option}={getattr(self.options, option)!r}: a graft takes whole leaves, not slices")
        try:
            return {_unit(self.target, number) for number in resolve(selector, self.target)}
        except NoMatch as error:
            self._case(kind, (), f"{prefix}{_in_one_line(error)}")
            return None

    def _choices(self, name: str) -> dict[int, Any]:
        """The choice of an option for each leaf of the target; if several selectors match one, the first counts."""
        given = getattr(self.options, name)
        if not isinstance(given, Mapping):
            return dict.fromkeys(_units(self.target), given) if name == "mismatch" else {}
        found: dict[int, Any] = {}
        for selector, choice in given.items():
            numbers = self._selected(name, selector, "choice", f"{name}: ") or ()
            found = dict.fromkeys(numbers, choice) | found
        return found

    def _new_names(self) -> dict[int, tuple[str, ...]]:
        """The name in the target of every leaf of the source that is not left behind."""
        index = self.source.index
        found: dict[int, tuple[str, ...] | None] = {}
        for old, new in (self.options.rename or {}).items():
            rule = f"{quoted(old)}: {'None' if new is None else quoted(new)}"
            checked = None if new is None else parse_rename(old, new, indexed=True)
            try:
                resolve(old, self.source)  # for its error, which names near misses
                paths = None if checked is None else checked.over(index)
            except (NoMatch, RenameClash) as error:
                self._case("rule", (), f"{rule}: {_in_one_line(error)}")
                continue
            hits = parse(old).find(index.names) if paths is None else list(paths)
            fresh = [number for number in hits if number not in found]
            if not fresh:
                self._case("rule", (), f"{rule}: the rules before it take all of its leaves")
            for number in fresh:
                try:
                    found[number] = None if paths is None else pieces(paths[number], self.target.index.names)
                except OutOfRange as error:
                    found[number] = None
                    self._case("place", (index.path(number),), _in_one_line(error))
        self._dropped = {_unit(self.source, number) for number, name in found.items() if name is None}
        names: dict[int, tuple[str, ...]] = {}
        for number in index.numbers:
            name = found.get(number, index.pieces(number))
            if name is not None:
                names[number] = name
        return names

    def _meet(self, names: Mapping[int, tuple[str, ...]]) -> tuple[dict[int, list[int]], list[int]]:
        """The source leaves that arrive at each leaf of the target, and those that arrive nowhere."""
        places: dict[tuple[str, ...], list[int]] = {}
        for number in self.target.index.numbers:
            places.setdefault(self.target.index.pieces(number), []).append(number)
        guests: dict[tuple[str, ...], list[int]] = {}
        for number, name in names.items():
            guests.setdefault(name, []).append(number)
        arrivals: dict[int, list[int]] = {}
        strays: list[int] = []
        for name, numbers in guests.items():
            here = places.get(name, [])
            numbers = [number for number in numbers if self._takes_part(number, here)]
            if not numbers:
                continue
            if not here:
                strays += numbers
            elif len(here) > 1 and len(here) != len(numbers):
                alike = wording.listing([self.target.index.path(number) for number in here])
                self._case("place", self._source_paths(numbers), f"{len(here)} leaves there have this name: {alike}")
                self._crowded |= {_unit(self.source, number) for number in numbers}
            elif len(here) == 1 and len({_unit(self.source, number) for number in numbers}) > 1:
                origins = wording.listing(self._source_paths(numbers))
                self._case("collision", (self.target.index.path(here[0]),), f"from {origins}")
                self._crowded |= {_unit(self.source, number) for number in numbers}
                arrivals.setdefault(_unit(self.target, here[0]), []).append(numbers[0])
            else:
                for place, number in zip(here, numbers, strict=False):
                    arrivals.setdefault(_unit(self.target, place), []).append(number)
        return arrivals, strays

    def _takes_part(self, guest: int, here: Sequence[int]) -> bool:
        """Whether a leaf of the source is to arrive: a Python number only where it counts, or where an array is."""
        if guest not in counts(self.source):
            return True
        if len(here) != 1:
            return False
        place = here[0]
        if place not in counts(self.target):
            return bool(self.target.spec(place).shape == ())
        known = self.target.index.pieces(place)[-1] in COUNTERS
        return known or beside_state(self.target, place) or beside_state(self.source, guest)

    def _other_layouts(self) -> set[int]:
        """The leaves of the target for which a weight arrives at a kernel or the reverse, by their names; none, if the
        shapes of some of these pairs prove that they are stored alike, and those of none the contrary."""
        found, alike, across = set(), False, False
        for number, (guest, *_) in self._arrivals.items():
            ours, theirs = self.target.spec(number), self.source.spec(guest)
            names = self.target.index.pieces(number), self.source.index.pieces(guest)
            if max(ours.ndim, theirs.ndim) > 1 and layouts.crossed(*names):
                alike = alike or layouts.proves(ours, theirs)
                across = across or bool(layouts.transposing(ours, theirs))
                if not layouts.proves(ours, theirs):
                    found.add(number)
        return set() if alike and not across else found

    def _source_paths(self, numbers: Iterable[int]) -> tuple[str, ...]:
        return tuple(self.source.index.path(number) for number in numbers)

    def _case(self, kind: str, paths: tuple[str, ...], said: str = "") -> None:
        self.cases.append(Case(kind, paths, said))

    def pairs(self) -> dict[int, int]:
        """The leaf of the source for each leaf of the target that would change."""
        kept = {row.path for row in self.rows["mismatched"] if row.did == "kept"}
        inside = (number for number in self._arrivals if number in self._inside)
        changing = (number for number in inside if self.target.index.path(number) not in kept)
        return {number: _unit(self.source, self._arrivals[number][0]) for number in changing}

    def _decide(self, number: int) -> set[int]:
        """The source leaves that a leaf of the target uses, after deciding what becomes of it."""
        path, spec = self.target.index.path(number), self.target.spec(number)
        arrived: dict[int, int] = {}
        for guest in self._arrivals.get(number, ()):
            arrived.setdefault(_unit(self.source, guest), guest)
        if not arrived or number not in self._inside:
            outside = number not in self._inside
            did = "outside `only`" if outside else "nothing in the source"
            self.rows["fresh"].append(GraftRow.of(path, spec, did))
            if abstract(self.target, number):
                self._case("abstract", (path,), f"{spec}, {did}")
            elif not outside:
                self.missed.add(path)
                if self.options.missing == "error":
                    self._case("missing", (path,), str(spec))
            return set()
        first, *others = arrived
        for other in others:
            if not _equal(self.source, first, other):
                both = f"{self.source.index.path(first)} and {self.source.index.path(other)}"
                self._case("tied", (path,), f"from {both}, which differ")
        part = self._pair(number, first, path, spec)
        origin = self.source.index.path(first)
        for other in others:
            said, name = f"equals {origin}, and both are one here", self.source.index.path(other)
            self.rows[part].append(GraftRow.of(path, spec, said, name, self.source.spec(other)))
        return set(arrived)

    def _pair(self, number: int, origin: int, path: str, spec: Spec) -> str:
        """The part of the report for a leaf of the target and the one that arrives, after deciding what is done."""
        theirs = self.source.spec(origin)
        name = self.source.index.path(origin)
        both = (path,) if name == path else (path, name)
        did, meeting = self._shape(number, origin, both, spec, theirs)
        fit = "" if meeting is None else meeting.kind
        row = GraftRow.of(path, spec, did, name, theirs, fit=fit)
        if did in ("kept", "differs"):
            self.rows["mismatched"].append(row)
            return "mismatched"
        row = replace(row, did=self._dtype(row, spec, theirs, number))
        why = self._unfit(number, origin, spec, theirs)
        if why:
            self._case("unfit", both, why)
        self.moves.append(Move(row, number, origin, meeting))
        return self.moves[-1].part

    def _shape(
        self, number: int, origin: int, both: tuple[str, ...], spec: Spec, theirs: Spec
    ) -> tuple[str, Meeting | None]:
        """What is done with a leaf by its shape, in words, and how the two meet where shapes differ."""
        rule = self._by_leaf["resize"].get(number)
        said = f"your model {spec}, the source {theirs}"
        keeps = spec.shape != theirs.shape and self._by_leaf["mismatch"].get(number) == "keep"
        if number in self._crossed and not keeps:
            why = layouts.said(self.target.index.pieces(number), spec, theirs)
            self._case("layout", both, f"{said}: {why}")
            if spec.ndim == theirs.ndim:
                self.orders[number] = origin, layouts.axes(self.target.index.pieces(number), spec, theirs)
            return "differs", None
        if spec.shape == theirs.shape and not (rule and rule.acts(theirs.shape, spec.shape)):
            return "copied", None
        place = self._by_leaf["place"].get(number)
        how = "resize" if rule else "overlap" if place else self._by_leaf["mismatch"].get(number)
        if how == "keep" and abstract(self.target, number):
            self._case("abstract", both, f"{said}: there is nothing to keep")
            return "differs", None
        if how == "keep":
            return "kept", None
        path = self.target.index.pieces(number)
        try:
            if how == "resize":
                meeting = mismatches.resizing(rule, path, theirs, spec)
            elif how == "overlap":
                default = self.options.place if isinstance(self.options.place, str) else "corner"
                meeting = mismatches.overlapping(place or default, theirs.shape, spec.shape)
            else:
                order = layouts.transposing(spec, theirs)
                self._case("transposed" if order else "mismatch", both, said)
                if order:
                    self.orders[number] = origin, order
                return "differs", None
            if meeting.into is not None and meeting.taken < spec.size and abstract(self.target, number):
                self._case("abstract", both, f"{said}: there is nothing around the {meeting.did}")
                return "differs", None
        except SpecMismatch as error:
            if how == "overlap":
                self._case("mismatch", both, f"{said}: {_sentence(error)}")
            else:
                others = detection.ways(path, theirs, spec, rule)
                self.cases.append(Case("resize", both, f"{said}: {_sentence(error)}", others))
            return "differs", None
        return meeting.did, meeting

    def _dtype(self, row: GraftRow, spec: Spec, theirs: Spec, number: int) -> str:
        if spec.dtype == theirs.dtype or (number in counts(self.target) and spec.kind == theirs.kind):
            return row.did
        if self.options.dtype == "error":
            self._case("dtype", (row.path, str(row.source)), f"your model {spec}, the source {theirs}")
        if self.options.dtype == "source":
            if self.options.in_place and number not in self.target.boxes:
                self._case("unfit", (row.path,), f"it cannot become {theirs.dtype} in place")
            return f"{row.did}, now {theirs.dtype}"
        return f"{row.did}, cast from {theirs.dtype}"

    def _unfit(self, number: int, origin: int, spec: Spec, theirs: Spec) -> str:
        """Why a value cannot be moved from one leaf to the other, or ""."""
        if "other" in (spec.kind, theirs.kind) and spec.dtype != theirs.dtype:
            return f"{theirs.dtype} cannot become {spec.dtype}"
        if theirs.kind == "complex" != spec.kind and self.options.dtype == "target":
            return f"{theirs.dtype} would lose its imaginary part as {spec.dtype}"
        as_it_is = spec == theirs and not isinstance(self.target, Tree) and not isinstance(self.source, Tree)
        as_it_is |= self._alike(number, origin)
        for leaves, leaf, said in ((self.target, number, "in your model "), (self.source, origin, "in the source ")):
            empty = abstract(leaves, leaf)
            if empty and leaves is self.target:
                continue
            reason = "" if (spec.dtype.startswith("key<") and not empty) or as_it_is else _refusal(leaves, leaf)
            if reason:
                return said + reason
        if self.options.in_place:
            if abstract(self.target, number) and number not in self.target.boxes:
                return "it has no values to change in place"
            try:
                self.target.in_place(number)
            except Unsupported as error:
                return str(error).partition("\n")[0]
        return ""

    def _alike(self, number: int, origin: int) -> bool:
        """Whether both leaves are tensors that hold codes and scales in one way."""
        if number not in getattr(self.target, "codecs", {}) or origin not in getattr(self.source, "codecs", {}):
            return False
        from paramend.arrays.torch_codes import alike  # both are tensors of torch

        return alike(self.source.read(origin), self.target.read(number))

    def _leave_behind(self, used: set[int]) -> None:
        """Enter the leaves of the source that no leaf of the target uses."""
        minded = {_unit(self.source, number) for number in self._minded(self.strays, self.names)}
        for number in _units(self.source):
            if number in used or number in counts(self.source):
                continue
            path, spec = self.source.index.path(number), self.source.spec(number)
            if number in self._dropped:
                did = "left behind by `rename`"
            elif number in self._crowded:
                did = "its place is taken"
            elif number not in minded:
                did = "outside `only`"
            else:
                did = "no such leaf in your model"
                if self.options.unused == "error":
                    self._case("unused", (path,), str(spec))
            self.rows["unused"].append(GraftRow.of(path, spec, did, path, spec))

    def _minded(self, strays: Sequence[int], names: Mapping[int, tuple[str, ...]]) -> Sequence[int]:
        """Those strays whose names `only` would select if your model had them; the others need no place."""
        if not strays or (isinstance(self.options.only, str) and self.options.only == "**"):
            return strays
        both = WithGuests(self.target, {number: names[number] for number in strays}, self.source)
        try:
            chosen = set(resolve(self.options.only, both))
        except ParamendError:  # such as a tree of bools, which says nothing about them
            return strays
        return [number for number in strays if both.guest(number) in chosen]

    @property
    def score(self) -> tuple[int, int]:
        """How good the plan is: how many leaves are copied whole, then how few cases there are."""
        return sum(move.meeting is None for move in self.moves), -len(self.cases)

    def report(self) -> GraftReport:
        """The report of the moves so far, in the order of the trees."""
        places = {self.target.index.path(number): i for i, number in enumerate(_units(self.target))}
        moved = {name: [move.row for move in self.moves if move.part == name] for name in PARTS}
        rows = {name: moved[name] + self.rows[name] for name in PARTS}
        for name in ("copied", "fresh", "mismatched"):
            rows[name].sort(key=lambda row: places[row.path])
        return GraftReport(rows["copied"], rows["fresh"], rows["mismatched"], rows["unused"], refused=bool(self.cases))


def _sentence(error: ParamendError) -> str:
    """What an error says, without its hint."""
    return str(error).partition("\n\nhint:")[0]


def _in_one_line(error: ParamendError) -> str:
    """What an error says, with its hint, without line breaks."""
    said = _sentence(error)
    return " ".join(f"{said}{'; ' * bool(error.hint)}{error.hint}".split())


def _unit(leaves: Leaves, number: int) -> int:
    """The number that represents a leaf with several paths."""
    return leaves.ties.get(number, number)


def _units(leaves: Leaves) -> list[int]:
    return [number for number in leaves.index.numbers if _unit(leaves, number) == number]


def abstract(leaves: Leaves, number: int) -> bool:
    """Whether a leaf is a shape and a dtype without values. Leaves of a checkpoint have values."""
    if not isinstance(leaves, Tree):
        return False
    leaf = leaves.read(number)
    return backend(leaf).abstract(leaf)


def _refusal(leaves: Leaves, number: int) -> str:
    """Why arithmetic on a leaf makes no sense, or ""; a leaf of a checkpoint is not read for this."""
    if not isinstance(leaves, Tree):
        return leaves.refusal(number)
    leaf = leaves.read(number)
    return backend(leaf).refusal(leaf)


def _equal(leaves: Leaves, one: int, other: int) -> bool:
    if leaves.spec(one) != leaves.spec(other):
        return False
    a, b = leaves.read(one), leaves.read(other)
    try:
        return bool(backend(a).numpy(a).tobytes() == backend(b).numpy(b).tobytes())
    except TypeError:  # traced: the values are not known yet
        return False
