"""Plans of a change of depth: everything is checked before anything changes."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

from paramend.anatomy import families, sections
from paramend.anatomy.families import modules_of
from paramend.anatomy.layers import followed
from paramend.anatomy.moves import Move
from paramend.edits.call import Call
from paramend.errors import BadArgument
from paramend.growth import identities, numbered
from paramend.growth.depth import Order, order_of
from paramend.growth.numbered import Layers
from paramend.growth.report import DeepenReport, LayerRow
from paramend.leaves.leaves import Editable
from paramend.leaves.paths import Names
from paramend.reports import wording
from paramend.selectors.layers import candidates, known
from paramend.selectors.patterns import parse
from paramend.selectors.selector import Union, sel

# Path of the layers → the configuration of the model that they are in; None if it has none.
ConfigAt = Callable[[Sequence[str]], Mapping[str, Any] | None]


class DepthPlan:
    """One change of depth.

    Attributes:
        tree: the old model.
        runs: its layers.
        order: the order of the new ones.
        config: the new configuration; None if there is none.
        said: a description of its changes.
    """

    def __init__(
        self,
        tree: Editable,
        layers: Any,
        order: Any,
        identity: Any,
        config_at: ConfigAt,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        if layers is not None and not isinstance(layers, str):
            text = getattr(layers, "text", None)
            if text is None:
                raise BadArgument(f"layers={layers!r} is not a text that names layers", hint=known(tree.index))
            layers = text
        self.tree = tree
        self.runs = numbered.find(tree, layers)
        count = len(self.runs[0].numbers)
        self.order = order_of(order, count)
        self.config: dict[str, Any] | None = None
        self.said: list[str] = []
        config = config_at(self.runs[0].parent)
        self._given = given
        if config:
            self.config, counted = dict(config), False
            for move in self.moves:
                self.config, said = followed(self.config, move)
                self.said += said
                counted = counted or bool(sections.sections_of(self.config, len(move.sources), move.where))
            if not self.said and not counted:
                self.said = [f"not changed: nothing in it counts {wording.plural(self.moves[0].n, 'layer')}"]
            self.said += self._left() if counted else []
        elif given:
            raise BadArgument(f"config={dict(given)!r} is given, and there is no configuration beside the weights")
        self.family = ""
        self.strict = True
        self.rules = self._rules(identity, self._model_type(config))
        self._check_rules()

    def _left(self) -> list[str]:
        """Lists beside the layers, of as many entries, that do not move with them."""
        moving = {run.parent for run in self.runs}
        beside = {(run.parent[:-1], run.numbers) for run in self.runs if len(run.numbers) > 1 and not run.head}
        found = [one for one in candidates(self.tree.index) if (one.parent[:-1], one.numbers) in beside]
        return [
            f"{'.'.join(one.parent)} keeps its {len(one.numbers)} entries: if they belong to the layers, name both"
            for one in found
            if one.parent not in moving and not one.head and not self._trivial
        ]

    @property
    def _trivial(self) -> bool:
        return all(move.trivial for move in self.moves)

    @cached_property
    def moves(self) -> list[Move]:
        """How the layers of each run move, for a configuration."""
        return [self._move(run) for run in self.runs]

    def _move(self, run: Layers) -> Move:
        sources, n = run.whole(self.order)
        numbers = (*run.before, *run.numbers, *run.after)[:n]
        shapes: dict[int, dict[tuple[str, ...], object]] = {number: {} for number in numbers}
        for leaf in self.tree.index.numbers:
            pieces = self.tree.index.pieces(leaf)
            number = run.place(pieces)
            if number in shapes:
                shapes[number][pieces[len(run.parent) + 1 :]] = self.tree.spec(leaf).shape
        leaves = list(shapes.values()) if run.step == 1 else None
        return Move(run.parent, sources, n, numbers[0], len(run.blocks), self._given, leaves)

    def _model_type(self, config: Mapping[str, Any] | None) -> str | None:
        return sections.model_type(config, self.moves[0].n, self.moves[0].where) if config else None

    def _rules(self, identity: Any, model_type: str | None) -> list[dict[int, Any]]:
        """For each run of layers, old layer → the rules that make its copy the identity."""
        if not self.order.identity or identity is None:
            if self.order.identity or identity in (None, "auto"):
                return []
            raise BadArgument(
                f"identity={identity!r} is given, and the order {self.order} has no identity layers",
                hint=f"order=pm.depth.Order({list(self.order.sources)}, identity=[{len(self.order) - 1}])",
            )
        given = identities.rules_of(identity)
        found: list[dict[int, Any]] = []
        for run in self.runs:
            rules: dict[int, Any] = {}
            for source in sorted({self.order.sources[target] for target in self.order.identity}):
                rules[source] = given
                if given is None:
                    family = self._family(run, source, identity, model_type)
                    self.family = family.name
                    rules[source] = families.values(family)
            found.append(rules)
        self.strict = given is not None
        return found

    def _family(self, run: Layers, source: int, identity: str, model_type: str | None) -> families.Family:
        """The family of a layer; one with quantised weights is of none."""
        try:
            return identities.family_of(modules_of(self._leaves(run, source)), identity, model_type)
        except BadArgument:
            inside = [n for names in self._names(self.tree.index, run, run.numbers[source]) for n in _all(names)]
            identities.check_values(self.tree, inside)
            raise

    def _names(self, index: Any, run: Layers, number: int) -> list[Any]:
        return numbered.under(index.names, (*run.parent, run.piece(number)))

    def _leaves(self, run: Layers, source: int) -> list[tuple[str, ...]]:
        depth = len(run.parent) + 1
        index = self.tree.index
        numbers = [n for names in self._names(index, run, run.numbers[source]) for n in _all(names)]
        return [index.pieces(number)[depth:] for number in numbers if len(index.pieces(number)) > depth]

    def _check_rules(self) -> None:
        for run, rules in zip(self.runs, self.rules, strict=False):
            for source, rule in rules.items():
                number = run.numbers[source]
                where = run.path(number, numbered.separator_of(self.tree.index, run))
                names = self._names(self.tree.index, run, number)
                found = identities.calls(self.tree, names, rule, where, strict=self.strict)
                within = {n for inner in names for n in _all(inner)}
                identities.check_untied(self.tree, found, within)

    def finished(self, new: Editable) -> tuple[dict[int, Call], DeepenReport]:
        """The edits still to be made to the rearranged tree, and the report."""
        made: dict[tuple[int, int], dict[int, Call]] = {}
        for i, rules in enumerate(self.rules):
            run = self.runs[i]
            for target in self.order.identity:
                number = run.target(target)
                names = self._names(new.index, run, number)
                where = run.path(number, numbered.separator_of(new.index, run))
                rule = rules[self.order.sources[target]]
                made[i, target] = identities.calls(new, names, rule, where, strict=self.strict)
        calls = {number: call for found in made.values() for number, call in found.items()}
        return calls, self._report(new, made)

    def _report(self, tree: Editable, made: Mapping[tuple[int, int], Mapping[int, Call]]) -> DeepenReport:
        order = self.order
        report = DeepenReport(order, config=self.said, family=self.family)
        for i, run in enumerate(self.runs):
            separator = numbered.separator_of(tree.index, run)
            for target, source in enumerate(order.sources):
                calls = made.get((i, target), {})
                identity = "identity" if calls else "copied"
                path = run.path(run.target(target), separator)
                did = "kept" if order.kept.get(source) == target else identity
                above = len(path) + len(separator)
                sets = {tree.index.path(n)[above:]: float(c.args.get("value", 0.0)) for n, c in calls.items()}
                below = [n for names in self._names(tree.index, run, run.target(target)) for n in _all(names)]
                size = sum(tree.spec(n).size for n in below)
                report.layers.append(LayerRow(path, run.path(run.numbers[source], separator), did, sets, size))
            report.rename |= _renames(run, order, separator)
        if order.new:
            parts = tuple(sel(run.select(order.new, numbered.separator_of(tree.index, run))) for run in self.runs)
            report.new = parts[0] if len(parts) == 1 else Union(parts)
        return report


def _all(names: Names) -> list[int]:
    return parse("**").find(names)


def _renames(run: Layers, order: Order, separator: str) -> dict[str, str | None]:
    """Rules for `pm.graft` that carry what belongs to old layers to their new places."""
    rules: dict[str, str | None] = {}

    def rule(number: int) -> str:
        return separator.join(("**", run.path(number, separator), "**"))

    for source, number in enumerate(run.numbers):
        target = order.kept.get(source)
        if target is None:
            rules[rule(number)] = None
        elif run.target(target) != number:
            rules[rule(number)] = rule(run.target(target))
    for number in run.after:
        new = run.moved(number, order)[0][0]
        if new != number:
            rules[rule(number)] = rule(new)
    return rules
