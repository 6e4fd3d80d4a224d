"""The plan of a port: which leaf is made of which, as the rules of a layout, and what speaks against it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from paramend.edits.hands import equal
from paramend.errors import BadArgument, NoMatch
from paramend.mapping.layout import Layout
from paramend.mapping.steps import Step, read_step
from paramend.porting.flattening import Flat, Flattening, Layer, flattenings
from paramend.porting.forms import Move, Path
from paramend.porting.matching import Orders, Pair, match
from paramend.porting.models import Model, Unit
from paramend.selectors.renames import captures, pieces, rename as parse_rename
from paramend.selectors.selector import resolve

Renames: TypeAlias = Mapping[str, str | None]
Rules: TypeAlias = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]
# Words in the name of a table of a row for each position or token, which is never transposed, and others beside these.
_TABLE = {
    "pos", "position", "positions", "positional", "embed", "embeds", "embedding", "embeddings", "emb", "pe", "wpe",
    "wte", "tok", "token", "tokens", "table",
}  # fmt: skip
_BESIDE = {"cls", "class", "type", "patch", "relative", "absolute", "bias"}


class PortPlan:
    """Which leaf of a target is made of which leaves of a source."""

    def __init__(
        self, target: Model, source: Model, rename: Renames | None, rules: Rules | None, order: Orders = None
    ) -> None:
        self.target, self.source = target, source
        self._given, steps = _read_rules(rules)
        self._steps = {target.text(number): do for path, do in steps.items() for number in resolve(path, target.leaves)}
        self.left: list[Unit] = []  # units of the source that `rename` leaves behind
        if not isinstance(rename, Mapping | None) or not all(isinstance(old, str) for old in rename or ()):
            why = f"rename={rename!r} is not a dict of paths"
            raise BadArgument(why, hint='rename={"layer/of/source": "layer/of/target"}')
        renamed = self._renamed(rename or {})
        sources = [unit for unit in source.units if unit not in self.left]
        self.notes: dict[str, str] = {}  # target path → what was assumed
        # Target path → why its layout is not known, and steps that it may have.
        self.questions: dict[str, tuple[str, list[list[Step]]]] = {}
        self.flattened: dict[str, Flat] = {}  # target path → the flattened features that a leaf has an axis of
        self.assumed: set[str] = set()  # those of them that no class speaks for
        # Leaf of the source → leaves that hold the same once more, such as a tied head in a file.
        self.copies: dict[int, list[int]] = {}
        self._find(sources, renamed, order)
        if any(len(ours) > len(theirs) for ours, theirs in self.doubtful) and self._find_copies():
            self._find(sources, renamed, order)
        self._second_names(sources, renamed)
        self._look_closer()

    def _find(self, sources: Sequence[Unit], renamed: Mapping[Unit, Unit], order: Orders) -> None:
        """Pair the units, all but those that are second names of others."""
        ours = [unit for unit in sources if not self._second(self.source, unit)]
        theirs = [unit for unit in self.target.units if not self._second(self.target, unit)]
        found = match(*_broken(self.source, self.target, ours, theirs, renamed), renamed, order)
        self.pairs, self.doubtful, self.lone = found.pairs, found.doubtful, found.lone

    def _second(self, model: Model, unit: Unit) -> bool:
        """Whether all leaves of a unit are second names of others, or copies."""
        copies = {n for each in self.copies.values() for n in each} if model is self.source else set()
        return all(n in copies or model.leaves.ties.get(n, n) != n for n in unit.leaves.values())

    def _renamed(self, rename: Renames) -> dict[Unit, Unit]:
        """The pairs that the user gave, by name and by rule."""
        found: dict[Unit, Unit] = {}
        rows = [(old, new) for old, new in rename.items()] + [
            (old, new) for rule in self._given for old in _listed(rule["from"]) for new in _listed(rule["to"])[:1]
        ]
        for old, new in rows:
            for unit, path in self._moved(old, new):
                if unit in self.left or unit in found:
                    continue
                if path is None:
                    self.left.append(unit)
                    continue
                partner = self._at(path)
                if partner is None:
                    raise NoMatch(f"{new!r}: there is no {'/'.join(path)} in the target")
                found[unit] = partner
        return found

    def _moved(self, old: str, new: str | None) -> list[tuple[Unit, Path | None]]:
        """The units that a rename takes, and the path of a leaf or a module of the target for each."""
        index = self.source.leaves.index
        unit = next((unit for unit in self.source.units if unit.path == tuple(re.split("[./]", old))), None)
        if unit is not None:
            return [(unit, None if new is None else tuple(re.split("[./]", new)))]
        if not captures(old) or not old.endswith("**"):
            try:
                resolve(old, self.source.leaves)
            except NoMatch:  # perhaps a module
                old, new = f"{old}/**", None if new is None else f"{new}/**"
        hits = resolve(old, self.source.leaves)
        paths = {} if new is None else parse_rename(old, new, indexed=True).over(index)
        out: list[tuple[Unit, Path | None]] = []
        for number in hits:
            unit = next((unit for unit in self.source.units if number in unit.leaves.values()), None)
            if unit is not None:
                path = None if new is None else pieces(paths[number], self.target.leaves.index.names)
                out.append((unit, path))
        return out

    def _at(self, path: Path) -> Unit | None:
        """The unit of the target that a renamed leaf belongs to: by its own path, or by that of its module."""
        numbers = {self.target.leaves.index.pieces(n): n for n in self.target.names}
        for lead in ((), ("params",)):
            number = numbers.get((*lead, *path))
            for unit in self.target.units:
                if number in unit.leaves.values():
                    return unit
        bare = path[1:] if path[:1] == ("params",) else path
        units = {unit.path: unit for unit in self.target.units}
        return next((units[bare[:depth]] for depth in range(len(bare), -1, -1) if bare[:depth] in units), None)

    def _second_names(self, sources: Sequence[Unit], renamed: Mapping[Unit, Unit]) -> None:
        """Pair what is left of the target with second names of tied leaves; those of the source go with the first."""
        twins = [unit for unit in sources if self._second(self.source, unit)]
        if self.lone[1] and twins:
            more = match(twins, self.lone[1], {})
            self.pairs += more.pairs
            self.lone = self.lone[0], more.lone[1] + [u for _, theirs in more.doubtful for u in theirs]
        if self.lone[0]:
            self._find_copies()
            self.lone = [unit for unit in self.lone[0] if not self._second(self.source, unit)], self.lone[1]

    def _find_copies(self) -> bool:
        """Find units without partner that are others again: a tied head in a file that holds it twice."""
        leaves, before = self.source.leaves, len(self.copies)
        open_ = [*self.lone[0], *(unit for ours, theirs in self.doubtful if len(ours) > len(theirs) for unit in ours)]
        known = [n for pair in self.pairs for n in pair.source.leaves.values()]
        for number in (number for unit in open_ for number in unit.leaves.values()):
            spec, value = leaves.spec(number), leaves.read(number)
            first = next((n for n in known if leaves.spec(n) == spec and equal(leaves.read(n), value)), None)
            known.append(number)
            if first is not None:
                self.copies.setdefault(first, []).append(number)
        return len(self.copies) > before

    def _look_closer(self) -> None:
        """Find what the names leave open: square leaves, transposed convolutions, what comes after a flattening."""
        backwards = {pair.source.path[-1:] for pair in self.pairs if pair.rare[0]}  # of GPT-2
        self.pairs = [
            p.taking(p.rare.index(True)) if any(p.rare[1:]) and p.source.path[-1:] in backwards else p
            for p in self.pairs
        ]
        for pair in self.pairs:
            path = self.target.text(pair.target.leaves[pair.moves[0].targets[0]])
            if path in self._steps:
                continue
            form = pair.ways[0].target.form
            if len(pair.ways) > 1 and any(pair.rare):
                if backwards and not pair.way:
                    why = "it is square, and other weights of the source are (in, out)"
                    self.questions[path] = (why, [list(way.moves[0].do) for way in pair.ways])
                continue
            several = form.kind == "conv_transpose" or "Einsum" in (pair.source.kind, pair.target.kind)
            if several and len(pair.ways) > 1:
                why = "it may be stored in several ways"
                self.questions[path] = (why, [list(way.moves[0].do) for way in pair.ways])
            elif form.kind == "parameter" and self._open(pair):
                why = "it is square, and its name does not say what comes first"
                axes, do = list(range(len(pair.ways[0].target.shapes[0][1]))), list(pair.moves[0].do)
                one, other = [axis for axis in axes if pair.ways[0].target.shapes[0][1][axis] > 1][-2:]
                axes[one], axes[other] = other, one
                self.questions[path] = (why, [do, [*do, read_step({"transpose": axes})]])
        self._flattenings()

    def _open(self, pair: Pair) -> bool:
        long = [length for length in pair.ways[0].target.shapes[0][1] if length > 1]
        names = [unit.path[-1].lower() for unit in (pair.source, pair.target)]
        alike = self.source.framework == self.target.framework != "" and names[0] == names[1]
        square = len(long) > 1 and long[-1] == long[-2]
        words = [set(re.findall("[a-z]+", name)) for name in names]
        return square and not alike and not any(each & _TABLE and each <= _TABLE | _BESIDE for each in words)

    def _norms(self, source_last: bool) -> None:
        """Ask about norms of several axes that fit as they are, and with their channels in another place."""
        for pair in self.pairs:
            way = pair.ways[pair.way]
            old, new = (shaped.shapes[0][1] for shaped in (way.source, way.target))
            axes, first = list(range(len(old))), -1 if source_last else 1
            axes = axes[first:] + axes[:first]
            long = [axis for axis in axes if old[axis] > 1]
            turned = long != sorted(long) and tuple(old[axis] for axis in axes) == new
            for move in pair.moves if way.source.form.kind == "norm" and turned else ():
                path = self.target.text(pair.target.leaves[move.targets[0]])
                if path not in self._steps:
                    why = "its axes have one length, and which are channels is not known"
                    self.questions[path] = (why, [list(move.do), [read_step({"transpose": axes})]])

    @staticmethod
    def channels_last(model: Model) -> bool:
        """Whether the arrays of features of a model have their channels last."""
        if model.framework in ("torch", "equinox"):
            return False
        return any(shaped.form.last for unit in model.units for shaped in unit.shaped[:1])

    def _flattenings(self) -> None:
        """Find layers that take or make flattened features, and norms of images, where one side has channels last."""
        last = self.channels_last(self.source), self.channels_last(self.target)
        if last[0] == last[1]:
            return
        self._norms(last[0])
        first = self.target if last[0] else self.source  # its order is that in which its layers were made
        partner = {(pair.target if last[0] else pair.source): pair for pair in self.pairs}
        layers = []
        for unit, pair in ((unit, partner[unit]) for unit in first.units if unit in partner):
            shaped = pair.ways[pair.way].target if last[0] else pair.ways[pair.way].source
            kind, groups = shaped.form.kind, getattr(unit.module, "groups", 1)
            layers.append(Layer(pair, kind, unit.kind, shaped.shapes[0][1], groups))
        names = list(first.names.values())
        modules = (*self.source.modules.values(), *self.target.modules.values())
        classes = frozenset(type(module).__name__ for module in modules)
        for found in flattenings(layers, classes, ordered=bool(first.modules) or names != sorted(names)):
            for pair in found.pairs:
                self._flattened(pair, found)

    def _flattened(self, pair: Pair, found: Flattening) -> None:
        """Take one layer for one of flattened features, or ask."""
        moves = self._of_flat(pair, found.flat)
        if self._steps.keys() & moves.keys():
            return
        if not found.doubt:
            self.flatten(pair, found.flat)
            self.assumed |= set() if found.certain else moves.keys()
            return
        said = "follow" if found.flat.axis else "make"
        why = f"it may {said} {found.flat.channels} channels of {found.places} places each"
        for path, move in moves.items():
            steps = self._flat_steps(pair, move, found.flat)
            self.questions[path] = (f"{why}, which are flattened in another order", [steps])

    def _of_flat(self, pair: Pair, flat: Flat | None) -> dict[str, Move]:
        """The rules of a layer whose leaves have an axis of flattened features, by target path; None: all rules."""
        matrix = flat is not None and flat.axis == 1 and pair.ways[pair.way].source.form.kind == "linear"
        rules = pair.moves[:1] if matrix else pair.moves
        return {self.target.text(pair.target.leaves[move.targets[0]]): move for move in rules}

    def flatten(self, pair: Pair, flat: Flat | None) -> bool:
        """Let a layer take or make flattened features, or none; whether that is a change."""
        paths = self._of_flat(pair, None)
        before = {path: self.flattened.pop(path) for path in paths if path in self.flattened}
        for path in paths:
            self.questions.pop(path, None)
            self.notes.pop(path, None)
        if flat is not None:
            self.flattened |= dict.fromkeys(self._of_flat(pair, flat), flat)
            said = "before" if flat.axis else "after"
            note = f"{flat.channels} channels are flattened {said} it, in another order on each side"
            self.notes |= dict.fromkeys(self._of_flat(pair, flat), note)
        return before != {path: self.flattened[path] for path in paths if path in self.flattened}

    def _flat_steps(self, pair: Pair, move: Move, flat: Flat) -> list[Step]:
        back = self.channels_last(self.source)
        side, name = (pair.source, move.sources[0]) if back else (pair.target, move.targets[0])
        leaves = (self.source if back else self.target).leaves
        steps = flat.steps(leaves.spec(side.leaves[name]).shape[::-1])
        return [step.inverse() for step in reversed(steps)] if back else steps

    def choose(self, path: str, steps: Sequence[Step]) -> None:
        self.questions.pop(path, None)
        self._steps[path] = list(steps)

    def rules(self) -> list[dict[str, Any]]:
        return [self.rule(pair, move) for pair in self.pairs for move in pair.moves]

    def rule(self, pair: Pair, move: Move) -> dict[str, Any]:
        ours = [pair.source.leaves[name] for name in move.sources]
        theirs = [pair.target.leaves[name] for name in move.targets]
        targets = [self.target.text(number) for number in theirs]
        steps = list(move.do)
        if targets[0] in self.flattened:
            steps = self._flat_steps(pair, move, self.flattened[targets[0]])
        given = self._steps.get(targets[0])
        steps = steps if given is None else list(given)
        sources = [self.source.text(number) for number in ours]
        if len(ours) == 1 and (twins := self._twins(self.source, ours[0])):
            sources, steps = sources + twins, [Step("untie", {}), *steps]
        if len(theirs) == 1 and (twins := self._twins(self.target, theirs[0])):
            targets, steps = targets + twins, [*steps, Step("tie", {})]
        do = {"do": [step.to_data() for step in steps]} if steps else {}
        return {"from": _one(sources), "to": _one(targets)} | do

    def _twins(self, model: Model, number: int) -> list[str]:
        twins = [*model.leaves.twins(number), *(self.copies.get(number, ()) if model is self.source else ())]
        if len(twins) == 1:
            return []
        side = "source" if model is self.source else "target"
        paired = {n for pair in self.pairs for n in getattr(pair, side).leaves.values()}
        return [model.text(n) for n in twins if n != number and n not in paired]

    def layout(self) -> Layout:
        behind = [self.source.text(number) for number in self.left_behind()]
        stored = {"from": self.source.stored, "to": self.target.stored}
        return Layout(self.rules(), name="port", drop=behind, stored={k: how for k, how in stored.items() if how})

    def left_behind(self) -> list[int]:
        """The leaves of the source that have, under all their names, no place in the target."""
        leaves = self.source.leaves
        taken = {twin for pair in self.pairs for n in pair.source.leaves.values() for twin in leaves.twins(n)}
        taken |= {number for first, copies in self.copies.items() if first in taken for number in copies}
        return [number for number in leaves.index.numbers if number not in taken]


def _one(paths: list[str]) -> str | list[str]:
    return paths[0] if len(paths) == 1 else paths


def _listed(paths: str | Sequence[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else list(paths)


def _broken(
    source: Model, target: Model, ours: list[Unit], theirs: list[Unit], renamed: Mapping[Unit, Unit]
) -> tuple[list[Unit], list[Unit]]:
    """Layers of several modules as one unit for each module, where the other side has no such layer."""
    keys = [{shaped.key for unit in units for shaped in unit.shaped} for units in (ours, theirs)]

    def parts(model: Model, units: list[Unit], other: set[Any]) -> list[Unit]:
        out: list[Unit] = []
        for unit in units:
            whole = unit in (*renamed, *renamed.values()) or any(shaped.key in other for shaped in unit.shaped)
            nested = any("/" in name and name != "kernel/scale" for name in unit.leaves)
            out += [unit] if whole or not nested else model.simple(unit)
        return out

    return parts(source, ours, keys[1]), parts(target, theirs, keys[0])


def _read_rules(rules: Rules | None) -> tuple[list[Mapping[str, Any]], dict[str, list[Step]]]:
    """The rules of the user as pairs of paths, and the steps of each target path."""
    if rules is None:
        return [], {}
    if isinstance(rules, Layout):
        rules = rules.to_data()["rules"]
    if isinstance(rules, Mapping):
        return [], {path: [read_step(step) for step in steps] for path, steps in rules.items()}
    listed = isinstance(rules, list | tuple)
    if not listed or not all(isinstance(rule, Mapping) and {"from", "to"} <= rule.keys() for rule in rules):
        why = f"rules={rules!r} is not a list of rules"
        raise BadArgument(why, hint='[{"from": "fc.weight", "to": "fc/kernel", "do": [...]}]')
    steps = {_listed(rule["to"])[0]: [read_step(step) for step in rule.get("do") or ()] for rule in rules}
    return list(rules), steps
