"""Grafts of JAX optimizer states: moments follow their parameters, counts go on, hyperparameters stay.

The structure tells which leaves are moments; the report of the graft of the parameters tells where they come from. All
moments of one parameter in one record (`mu` and `nu` of Adam) are carried together or not at all.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from paramend.arrays.registry import backend
from paramend.errors import BadArgument, GraftRefused, Unsupported
from paramend.grafting.engine import planned, values
from paramend.grafting.mismatches import overlapping
from paramend.grafting.numbers import Counted
from paramend.grafting.options import Options
from paramend.grafting.plan import GraftPlan, Move
from paramend.grafting.report import PARTS, GraftReport, GraftRow, Link, Links, Path
from paramend.grafting.states.carry_optax import Leaf, Sources
from paramend.grafting.states.moments import OWN, States, Survey, numbers_of, prefix_of
from paramend.leaves.paths import write_path
from paramend.leaves.specs import Spec
from paramend.reports import wording
from paramend.selectors.patterns import parse
from paramend.trees.tree import Tree

_ANEW = "tx.init(params) starts anew"


Grafted: TypeAlias = tuple[dict[int, Any], GraftReport]  # the new leaves by number, and the report


def graft_state(target: Counted, source: Any, report: GraftReport, unused: str) -> Grafted:
    """A state whose moments follow the parameters as the report of their graft says."""
    source = _read(source)
    work = _Work(target, source, Survey.of(target), Survey.of(source))
    if not work.ours.roots:
        why = f"{wording.described(target.root)} is not an optimizer state, as optax or NNX build them"
        raise Unsupported(why, hint="state, report = pm.graft_opt_state(tx.init(params), old_state, report)")
    if work.holds_parameters:
        why = "this holds the parameters as well as the optimizer's state"
        raise BadArgument(why, hint="pm.graft(state, old_state, rename=...) grafts both")
    return work.follow(Links(report), Options(unused=unused), work.ours.outside, work.theirs.outside)


def graft_whole(target: Counted, source: Any, options: Options) -> Grafted | None:
    """A graft of a tree with optimizer states in it, or None if the source has nothing for these."""
    ours = Survey.of(target)
    typed = isinstance(source, Tree) and Survey.of(source).fields
    if not typed and not any(ours.is_state(source.index.pieces(number)) for number in source.index.numbers):
        return None
    source = _read(source)
    work = _Work(target, source, ours, Survey.of(source))
    if not work.holds_parameters:
        return work.follow(Links(work.report_of_moments(options)), options, work.ours.outside, work.theirs.outside)
    plan = work.plan_of_rest(options)
    new, report = values(plan), plan.report()
    numbers = numbers_of(target)
    places = {number: numbers[plan.target.index.pieces(number)] for number in plan.target.index.numbers}
    states, told = work.follow(Links(report), options, (), ())
    for name in PARTS:
        getattr(report, name).extend(getattr(told, name))
    return {places[n]: value for n, value in new.items()} | states, report


@dataclass
class _Pair:
    """A leaf of the new state, the one of the old state that it continues, and why it stays as it is, or ""."""

    leaf: Leaf
    origin: Leaf | None
    why: str


@dataclass
class _Moves:
    """The part of a plan that `engine.values` carries out."""

    target: Any
    source: Any
    options: Options
    moves: list[Move] = field(default_factory=list)


class _Work:
    """Two trees with optimizer states in them."""

    def __init__(self, target: Counted, source: Counted, ours: Survey, theirs: Survey) -> None:
        self.target, self.source, self.ours, self.theirs = target, source, ours, theirs
        # From a file a state comes as dicts and lists at the place of ours.
        self.from_file = not theirs.fields and any(map(ours.is_state, theirs.outside))

    @property
    def holds_parameters(self) -> bool:
        """Whether the target holds the parameters too; where the states have no moments, any array with axes is one."""
        if self.ours.parameters:
            return prefix_of(set(self.ours.outside), self.ours.parameters) is not None
        return any(self.target.spec(number).shape for number in self.arrays(self.target, self.ours).values())

    def report_of_moments(self, options: Options) -> GraftReport:
        """The report of a graft of the parameters, made from their moments, since the parameters are not here."""
        if self.from_file:
            raise BadArgument(
                "the source is not the state of an optimizer, but dicts and lists: it is unknown which of its leaves "
                "belong to which parameters",
                hint="tree, report = pm.graft(params, old_params); pm.graft_opt_state(state, old_state, report)",
            )
        ours, theirs = _stand_ins(self.target, self.ours), _stand_ins(self.source, self.theirs)
        shapes = {path: value.shape for path, value in (*ours.items(), *theirs.items())}
        for survey, found in ((self.ours, ours), (self.theirs, theirs)):
            for path in sorted(survey.absent - found.keys()):  # frozen ones count too: `Dense_[-1]` may be one of them
                found[path] = np.broadcast_to(np.zeros((), "float32"), shapes.get(path, ()))
        if not ours or not theirs:
            return GraftReport()
        report: GraftReport = planned(_flat(ours), _flat(theirs), replace(options, in_place=False)).report()
        return report

    def plan_of_rest(self, options: Options) -> GraftPlan:
        """The plan of a graft of everything outside the states; rules may be written for the parameters alone."""
        both = (self.target, self.ours), (self.source, self.theirs)
        rest, other = (_flat_part(tree, self.arrays(tree, survey)) for tree, survey in both)
        ours = prefix_of(set(self.ours.outside), self.ours.parameters) or ()
        theirs = prefix_of(set(self.theirs.outside), self.theirs.parameters) or ours
        rename: dict[str, str | None] = {}
        for old, new in (options.rename or {}).items():
            if (ours or theirs) and not any(parse(old).reach(other.index.names)):
                inner = None if new is None else "/".join(filter(None, (write_path(ours), new)))
                rename["/".join(filter(None, (write_path(theirs), old)))] = inner
            else:
                rename[old] = new
        return planned(rest, other, replace(options, rename=rename or None))

    def arrays(self, tree: Tree, survey: Survey) -> dict[Path, int]:
        numbers = {tree.index.pieces(number): number for number in tree.index.numbers}
        skipped = self.from_file and survey is self.theirs
        outside = (path for path in survey.outside if not (skipped and self.ours.is_state(path)))
        return {path: numbers[path] for path in outside if path in numbers}

    def follow(self, links: Links, options: Options, ours: Sequence[Path], theirs: Sequence[Path]) -> Grafted:
        """The states, with what the earlier ones have for them; numbers outside the states, at the paths `ours` and
        `theirs`, go on too."""
        new, known = self.ours.states(set(links.targets)), links.sources
        old = States.of_file(self.source, known, self.ours) if self.from_file else self.theirs.states(known)
        new.add_numbers(self.target, ours)
        old.add_numbers(self.source, theirs)
        self._refuse(new, old, options)
        arriving: dict[Path, list[Path]] = {}
        for path, link in links.targets.items():
            if link.source is not None:
                arriving.setdefault(link.source, []).append(path)
        origins: dict[int, Leaf] = {}
        renamed: list[Leaf] = []
        for leaf in old.leaves:
            for param in arriving.get(leaf.param, ()) if leaf.param else ((),):
                path = (*old.heads[leaf.path], *new.rests.get(param, param))
                twin = replace(leaf, path=path, param=param, place=len(origins))
                origins[twin.place] = leaf
                renamed.append(twin)
        sources = Sources(new.leaves, renamed)
        pairs = []
        for leaf in new.leaves:
            found = sources.of(leaf)
            origin = None if found is None else origins[found.place]
            if origin is not None and new.kind(leaf) != old.kind(origin):
                origin = None
            fate = links.targets.get(leaf.param) if leaf.param else None
            pairs.append(_Pair(leaf, origin, _why_not(leaf, origin, fate)))
        _together(pairs)
        return self._carried(pairs, old, links)

    def _refuse(self, new: States, old: States, options: Options) -> None:
        homeless = [kind for kind in old.kinds if kind not in new.kinds]
        unknown = new.unknown or old.unknown
        if not (new.kinds.keys() & old.kinds.keys()) and (new.kinds or old.kinds):
            said = f"is of another optimizer: it keeps {_kept(old.kinds)} for each parameter, and this one "
            said, hint = f"the earlier state {said}{_kept(new.kinds)}", _ANEW
        elif homeless and options.unused == "error":
            said = f"the earlier state keeps {_kept(homeless)} for each parameter, which have no place here"
            hint = 'unused="ok" leaves these behind'
        elif unknown:
            whose, some = "this" if new.unknown else "the earlier", wording.listing(list(map(write_path, unknown)), 4)
            said = f"{whose} state has moments of parameters that are not in the report: {some}"
            hint = "tree, report = pm.graft(params, old_params)  # with what the optimizer was made for"
        else:
            return
        raise GraftRefused(said, report=GraftReport(refused=True), hint=hint)

    def _carried(self, pairs: list[_Pair], old: States, links: Links) -> Grafted:
        report = GraftReport()
        work = _Moves(self.target, self.source, Options(dtype="target"))
        found: dict[int, Any] = {}
        used: set[int] = set()
        for pair in pairs:
            leaf, origin = pair.leaf, pair.origin
            ours = _spec(leaf.value)
            path = write_path(leaf.path)
            if origin is None or pair.why:
                report.fresh.append(GraftRow.of(path, ours, pair.why))
                continue
            used.add(origin.place)
            theirs = _spec(origin.value)
            corner = None
            did = "copied"
            if ours.shape != theirs.shape:
                corner = overlapping("corner", theirs.shape, ours.shape)
                did = corner.did
            if ours.dtype != theirs.dtype:
                did += f", cast from {theirs.dtype}"
            row = GraftRow.of(path, ours, did, write_path(origin.path), theirs, taken=theirs.size)
            if type(leaf.value) in (int, float):
                count = origin.value
                found[leaf.place] = count if type(count) in (int, float) else backend(count).like(count, count)
                report.copied.append(row)
            else:
                work.moves.append(Move(row, leaf.place, origin.place, corner))
        found |= values(work)  # type: ignore[arg-type]
        for move in work.moves:
            getattr(report, move.part).append(move.row)
        arrived = {link.source for link in links.targets.values()}
        for leaf in old.leaves:
            if leaf.place not in used:
                spec, path = _spec(leaf.value), write_path(leaf.path)
                report.unused.append(GraftRow.of(path, spec, _left(leaf, arrived), path, spec))
        return found, report


def _spec(value: Any) -> Spec:
    if type(value) in (int, float):
        return Spec((), "int32" if type(value) is int else "float32")
    return backend(value).spec(value)


def _flat(leaves: dict[Path, Any]) -> Counted:
    return Counted({"/".join(path): value for path, value in leaves.items()})


def _flat_part(tree: Counted, numbers: dict[Path, int]) -> Counted:
    """Some leaves of a tree, whose numbers still belong to the run if they did there."""
    flat = _flat({path: tree.values[number] for path, number in numbers.items()})
    flat.beside = frozenset(n for n in flat.counts if numbers[flat.index.pieces(n)] in tree.beside)
    return flat


def _why_not(leaf: Leaf, origin: Leaf | None, link: Link | None) -> str:
    """Why a leaf is not carried, or ""; `link` is what became of its parameter, None for a number."""
    if leaf.path[-2:-1] == (OWN,) or leaf.field == (OWN,):
        return "a hyperparameter, the new optimizer's own"
    if link is not None and link.source is None:
        return f"as its parameter: {link.did}"
    if origin is None:
        return "nothing in the earlier state"
    ours, theirs = _spec(leaf.value), _spec(origin.value)
    if link is None:
        fits = ours.shape == theirs.shape and ours.kind == theirs.kind
        return "" if fits else f"{theirs} in the earlier state"
    mine = _relation(leaf.field[-1], ours.shape, link.shape)
    fits = mine == _relation(leaf.field[-1], theirs.shape, link.source_shape or ())
    if fits and mine == "other":
        fits = ours.shape == theirs.shape and (not link.corner or ours.size == 1)
    return "" if fits else f"{theirs} in the earlier state means something else"


def _together(pairs: Iterable[_Pair]) -> None:
    """Start moments of one parameter in one record anew together."""
    groups: dict[Any, list[_Pair]] = {}
    for pair in pairs:
        if pair.leaf.param:
            groups.setdefault((pair.leaf.record, pair.leaf.param), []).append(pair)
    for group in groups.values():
        why = next((pair.why for pair in group if pair.why), "")
        for pair in group:
            pair.why = pair.why or why


def _read(source: Any) -> Counted:
    if isinstance(source, Counted):
        return source
    read = getattr(source, "bare", source.read)
    return Counted({source.index.name(number): read(number) for number in source.index.numbers})


def _stand_ins(tree: Tree, survey: Survey) -> dict[Path, Any]:
    """The largest moment of each parameter, which usually has its shape."""
    numbers = numbers_of(tree)
    found = {}
    for param, paths in survey.parameters.items():
        moments = [tree.values[numbers[path]] for path in paths if path in numbers]
        if moments:
            found[param] = max(moments, key=lambda value: _spec(value).size)
    return found


def _relation(name: str, shape: tuple[int, ...], of: tuple[int, ...]) -> str:
    """How the axes of a moment relate to those of its parameter.

    >>> _relation("mu", (4, 8), (4, 8)), _relation("v_row", (200,), (300, 200)), _relation("v", (1,), (300, 200))
    ('all', 'all but 0', 'other')
    """
    if shape == of:
        return "all"
    if name in ("v_row", "v_col") and len(shape) == len(of) - 1:
        # Adafactor keeps means over the two longest axes, and which these are depends on the shape.
        order = np.argsort(of)
        axis = int(order[-1 if name == "v_row" else -2])
        if shape == (*of[:axis], *of[axis + 1 :]):
            return f"all but {axis}"
    return "other"


def _left(leaf: Leaf, arrived: Collection[Path | None]) -> str:
    """Why a leaf of an earlier state goes nowhere."""
    if leaf.path[-2:-1] == (OWN,) or leaf.field == (OWN,):
        return "a hyperparameter, the earlier optimizer's own"
    if leaf.param and leaf.param not in arrived:
        return "its parameter goes nowhere"
    return "no place for it in the new state"


def _kept(kinds: Iterable[frozenset[str]]) -> str:
    return wording.listing([" and ".join(sorted(kind)) for kind in kinds]) or "nothing"
