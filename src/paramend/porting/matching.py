"""Finding which layer of a source is which layer of a target: by name, by shape, by the order of calls, by number."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple, TypeAlias

from paramend.errors import SpecMismatch
from paramend.porting.forms import Move, Path, Shaped, moves
from paramend.porting.models import Unit

Order: TypeAlias = Mapping[Path, int]
Orders: TypeAlias = tuple[Order, Order] | None  # of both sides, where both can run


class Way(NamedTuple):
    """A way from one unit to another: the forms of both, and the rules between them."""

    source: Shaped
    target: Shaped
    moves: tuple[Move, ...]


Ways: TypeAlias = tuple[Way, ...]
Family: TypeAlias = dict[tuple[int, ...], Unit]  # units whose names differ in numbers alone, by these


@dataclass(frozen=True)
class Pair:
    """A layer of the source and the one of the target that it is."""

    source: Unit
    target: Unit
    ways: Ways  # the rules that may lead from one to the other, the likeliest first
    by: str  # what says that they are one: "name", "shape", "calls", "number", "rename"
    way: int = 0  # the place of the way that is taken

    @property
    def moves(self) -> tuple[Move, ...]:
        return self.ways[self.way].moves

    @property
    def rare(self) -> list[bool]:
        """For each way, whether it takes a weight as (in, out) without a class that says so."""
        return [_rare(way, self.source, self.target) for way in self.ways]

    def taking(self, way: int) -> "Pair":
        return replace(self, way=way)


@dataclass
class Matching:
    """What a search found."""

    pairs: list[Pair] = field(default_factory=list)  # the layers that are one
    # Layers of both sides that could be paired in several ways.
    doubtful: list[tuple[list[Unit], list[Unit]]] = field(default_factory=list)
    # The units of the source and those of the target that have no partner.
    lone: tuple[list[Unit], list[Unit]] = field(default_factory=lambda: ([], []))


def ways(source: Unit, target: Unit) -> Ways:
    """The ways from one unit to another, the likeliest first; none if they do not fit."""
    found = _ways(source.shaped, target.shaped)
    return tuple(sorted(found, key=lambda way: _rare(way, source, target))) if len(found) > 1 else found


@cache
def _ways(sources: tuple[Shaped, ...], targets: tuple[Shaped, ...]) -> Ways:
    out: list[Way] = []
    for ours in sources:
        for theirs in targets:
            if ours.key == theirs.key and (made := moves(ours, theirs)) is not None:
                out += [Way(ours, theirs, made)] if all(made != way.moves for way in out) else []
    return tuple(way for way in out if way.source.form is way.target.form) or tuple(out)


def _rare(way: Way, source: Unit, target: Unit) -> bool:
    """Whether a weight is taken as (in, out), as GPT-2 holds it, without a class that says so."""
    both = (way.source, source), (way.target, target)
    return any(shaped.form.classes == {"Conv1D"} and not unit.kind for shaped, unit in both)


def match(
    sources: Sequence[Unit], targets: Sequence[Unit], renamed: Mapping[Unit, Unit], order: Orders = None
) -> Matching:
    """The pairs of units, `renamed` as the user gave them. Where both sides can run, `order` has the place of the first
    call of each module."""
    search = _Search(order)
    for source, target in renamed.items():
        if not search.pair(source, target, "rename"):
            raise SpecMismatch(f"{source} does not fit {target}", hint='rename={"layer/of/source": "layer/of/target"}')
    search.by_name(_left(sources, search), _left(targets, search))
    search.by_kind(_left(sources, search), _left(targets, search))
    return search.result(_left(sources, search), _left(targets, search))


def _left(units: Iterable[Unit], search: "_Search") -> list[Unit]:
    return [unit for unit in units if unit not in search.taken]


class _Search:
    def __init__(self, order: Orders) -> None:
        self.order = order
        self.found = Matching()
        self.taken: set[Unit] = set()
        self._ways: dict[tuple[Unit, Unit], Ways] = {}

    def ways(self, source: Unit, target: Unit) -> Ways:
        key = source, target
        if key not in self._ways:
            self._ways[key] = ways(source, target)
        return self._ways[key]

    def pair(self, source: Unit, target: Unit, by: str) -> bool:
        """Pair two units, if they fit."""
        found = self.ways(source, target)
        if found:
            self.found.pairs.append(Pair(source, target, found, by))
            self.taken |= {source, target}
        return bool(found)

    def result(self, sources: list[Unit], targets: list[Unit]) -> Matching:
        inside = {unit for cluster in self.found.doubtful for side in cluster for unit in side}
        self.found.lone = _without(sources, inside), _without(targets, inside)
        return self.found

    def by_name(self, sources: Sequence[Unit], targets: Sequence[Unit]) -> None:
        """Pair units of one name, where the numbers of such names agree too: `fc1`, `fc2` are not `fc_0`, `fc_1`.
        Numbers that Flax and Haiku give are no names: the order of calls goes before them."""
        ours, theirs = families(sources), families(targets)
        for text, members in ours.items():
            others = theirs.get(text, {})
            if members.keys() == others.keys():
                rows = [(source, others[numbers]) for numbers, source in members.items()]
                counted = len({unit.shaped for unit, _ in rows}) < len(rows) and any(_counted(*row) for row in rows)
                for source, target in () if counted and self.order else rows:
                    self.pair(source, target, "number" if counted else "name")

    def by_kind(self, sources: Sequence[Unit], targets: Sequence[Unit]) -> None:
        """Pair units that fit no others, then those that their order tells apart."""
        keyed: dict[object, list[Unit]] = {}
        for target in targets:
            for key in {shaped.key for shaped in target.shaped}:
                keyed.setdefault(key, []).append(target)
        near: dict[Unit, list[Unit]] = {}
        for source in sources:
            some = dict.fromkeys(target for shaped in source.shaped for target in keyed.get(shaped.key, ()))
            near[source] = [target for target in some if self.ways(source, target)]
        for ours, theirs in _clusters(near):
            self._resolve(ours, theirs, "shape")

    def _resolve(self, sources: list[Unit], targets: list[Unit], by: str) -> None:
        """Pair the units of a cluster, which fit each other in several ways."""
        if len(sources) == len(targets) == 1:
            self.pair(sources[0], targets[0], by)
        elif not sources or not targets:
            return
        elif (parted := self._forced(sources, targets)) is not None:
            for ours, theirs, said in parted:
                self._resolve(ours, theirs, by if said == "shape" else said)
        elif not (self._by_calls(sources, targets) or self._by_number(sources, targets, by)):
            self.found.doubtful.append((sources, targets))

    def _forced(self, sources: list[Unit], targets: list[Unit]) -> list[tuple[list[Unit], list[Unit], str]] | None:
        """The cluster in two: a unit that fits one other alone, or those whose names share a word."""
        if len(sources) == len(targets):
            for ours, theirs, turn in ((sources, targets, 1), (targets, sources, -1)):
                for unit in ours:
                    partners = [other for other in theirs if self.ways(*(unit, other)[::turn])]
                    if len(partners) == 1:
                        one = ([unit], partners) if ours is sources else (partners, [unit])
                        return [(*one, "shape"), (_without(sources, one[0]), _without(targets, one[1]), "shape")]
        for word in sorted({word for unit in sources for word in words(unit.path)}):
            ours = [unit for unit in sources if word in words(unit.path)]
            theirs = [unit for unit in targets if word in words(unit.path)]
            if len(ours) == len(theirs) and len(ours) < max(len(sources), len(targets)):
                return [(ours, theirs, "name"), (_without(sources, ours), _without(targets, theirs), "name")]
        return None

    def _by_calls(self, sources: list[Unit], targets: list[Unit]) -> bool:
        if self.order is None or len(sources) != len(targets):
            return False
        sides = list(zip((sources, targets), self.order, strict=True))
        places = [[_called(unit.path, order) for unit in units] for units, order in sides]
        if any(None in each or len(set(each)) < len(each) for each in places):
            return False
        return self._in_order(
            *(
                [unit for _, unit in sorted(zip(each, units, strict=True), key=lambda row: row[0] or 0)]
                for each, units in zip(places, (sources, targets), strict=True)
            ),
            by="calls",
        )

    def _by_number(self, sources: list[Unit], targets: list[Unit], by: str) -> bool:
        """Pair units in the order of their numbers, if their names differ in numbers alone on both sides."""
        ours, theirs = families(sources), families(targets)
        if any(sum(map(len, side.values())) != len(units) for side, units in ((ours, sources), (theirs, targets))):
            return False  # names that occur twice
        every = [(mine, other) for mine in ours.values() for other in theirs.values() if len(mine) == len(other)]
        single = len(ours) == len(theirs) == 1
        bijections = [pair for pair in every if single or _alone(pair[0], ours, theirs)]
        if len(bijections) != len(ours) or len(ours) != len(theirs):
            return False
        done = True
        for members, others in bijections:
            rows = [[family[numbers] for numbers in sorted(family)] for family in (members, others)]
            named = by == "name" and (len(members) == 1 or members.keys() == others.keys())
            done = self._in_order(*rows, by=by if named else "number") and done
        return done

    def _in_order(self, sources: Sequence[Unit], targets: Sequence[Unit], *, by: str) -> bool:
        if not all(self.ways(*pair) for pair in zip(sources, targets, strict=True)):
            return False
        for source, target in zip(sources, targets, strict=True):
            self.pair(source, target, by)
        return True


def _counted(source: Unit, target: Unit) -> bool:
    """Whether two names agree but for numbers that Flax or Haiku gave: those of the order in which layers are made."""
    given = any(map(_AUTO, (*source.path, *target.path))) or not _HAIKU.isdisjoint((*source.leaves, *target.leaves))
    return given and source.path != target.path


def _alone(members: Family, ours: Mapping[str, Family], theirs: Mapping[str, Family]) -> bool:
    """Whether one family alone has so many members on both sides."""
    return all([len(each) for each in side.values()].count(len(members)) == 1 for side in (ours, theirs))


def _without(units: Iterable[Unit], gone: Iterable[Unit]) -> list[Unit]:
    out = set(gone)
    return [unit for unit in units if unit not in out]


def _clusters(near: Mapping[Unit, Sequence[Unit]]) -> list[tuple[list[Unit], list[Unit]]]:
    """The units that are connected by fitting each other."""
    owner: dict[Unit, int] = {}
    clusters: dict[int, tuple[list[Unit], list[Unit]]] = {}
    for place, (source, targets) in enumerate(near.items()):
        if not targets:
            continue
        joined = sorted({owner[target] for target in targets if target in owner})
        ours, theirs = [source], [target for target in targets if target not in owner]
        for old in reversed(joined):
            before = clusters.pop(old)
            ours, theirs = before[0] + ours, before[1] + theirs
        clusters[place] = ours, theirs
        owner |= dict.fromkeys(theirs, place)
    return list(clusters.values())


def _called(path: Path, order: Order) -> int | None:
    """The place of the first call of a module, or of the one that holds a parameter."""
    return next((order[path[:depth]] for depth in range(len(path), len(path) - 3, -1) if path[:depth] in order), None)


_DIGITS = re.compile(r"\d+")
_AUTO = re.compile(r"[A-Z]\w*_\d+").fullmatch
_HAIKU = {"w", "offset", "embeddings"}
_WRAPPERS = {"model", "module", "origmod", "basemodel"}
_SYNONYMS = {
    name: word
    for word, names in {
        "q": "query qproj queryproj wq toq",
        "k": "key kproj keyproj wk tok",
        "v": "value vproj valueproj wv tov",
        "o": "oproj outproj outputproj wo toout",
        "attn": "attention selfattn selfattention",
        "backward": "reverse backwardrnn",
        "forward": "forwardrnn",
        "head": "lmhead classifier logits",
        "pos": "wpe posembed posembedding positionembeddings positionembedding",
        "tok": "wte tokembeddings embedtokens wordembeddings tokenembedding",
        "cls": "clstoken classtoken",
    }.items()
    for name in names.split()
}
# Words that say what a layer is, not which.
_COMMON = {
    "dense", "linear", "conv", "norm", "layernorm", "rmsnorm", "batchnorm", "bn", "ln", "embed", "embedding", "layer",
    "layers", "block", "blocks", "cell", "rnn", "lstm", "gru", "weight", "kernel", "net",
}  # fmt: skip


def _plain(piece: str) -> tuple[str, tuple[int, ...]]:
    """A piece of a path without case, underscores and numbers, and its numbers."""
    text = _DIGITS.sub("", piece).lower().replace("_", "").replace("-", "").replace("~", "")
    numbers = tuple(map(int, _DIGITS.findall(piece)))
    return "direction" if numbers and text in ("forward", "reverse") else _SYNONYMS.get(text, text), numbers


def families(units: Iterable[Unit]) -> dict[str, Family]:
    """Units by their names without numbers, then by their numbers; names that occur twice are left out."""
    found: dict[str, dict[tuple[int, ...], list[Unit]]] = {}
    for unit in units:
        pieces = [_plain(piece) for piece in unit.path]
        text = "/".join(f"{word}#" * bool(numbers) or word for word, numbers in pieces if word not in _WRAPPERS)
        found.setdefault(text.replace("/#", "#"), {}).setdefault(
            tuple(n for _, each in pieces for n in each), []
        ).append(unit)
    for text in [text for text in found if not text.endswith("#") and f"{text}#" in found]:
        numbered = found[f"{text}#"]  # Haiku: linear, linear_1
        for numbers, members in list(found[text].items()):
            if (*numbers, 0) not in numbered:
                numbered[*numbers, 0] = members
                del found[text][numbers]
    clear = {text: each for text, each in found.items() if each and all(len(units) == 1 for units in each.values())}
    return {text: {numbers: units[0] for numbers, units in each.items()} for text, each in clear.items()}


def words(path: Path) -> set[str]:
    """The words of a path that say which layer it is."""
    found = {word for piece in path for word in (_plain(piece)[0], *re.split(r"[_\d]+|(?<=[a-z])(?=[A-Z])", piece))}
    return {_SYNONYMS.get(word.lower(), word.lower()) for word in found} - _COMMON - _WRAPPERS - {""}
