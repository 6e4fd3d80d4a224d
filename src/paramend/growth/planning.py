"""Plans of a change of depth: everything is checked before anything changes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paramend.edits.call import Call
from paramend.errors import BadArgument
from paramend.growth import configs, families, identities, numbered
from paramend.growth.depth import Order, order_of
from paramend.growth.families import modules_of
from paramend.growth.numbered import Layers
from paramend.growth.report import DeepenReport, LayerRow
from paramend.leaves.leaves import Editable
from paramend.leaves.paths import Names
from paramend.reports import wording
from paramend.selectors.layers import known
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

    def __init__(self, tree: Editable, layers: Any, order: Any, identity: Any, config_at: ConfigAt) -> None:
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
        if config:
            self.config, self.said = configs.configured(config, self.order, self.runs[0].parent)
            if not self.said:
                self.said = [f"not changed: nothing in it counts {wording.plural(count, 'layer')}"]
        self.family = ""
        self.strict = True
        self.rules = self._rules(identity, configs.model_type(config, count, self.runs[0].parent) if config else None)
        self._check_rules()

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
