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
from paramend.reports import wording
from paramend.selectors.layers import candidates, known
from paramend.selectors.selector import Union, sel

Config = Mapping[str, Any] | None
ConfigAt = Callable[[Sequence[str]], Config]  # path of the layers → the configuration of the model that they are in


class DepthPlan:
    """One change of depth. `config` is the new configuration, or None, and `said` tells of its changes."""

    def __init__(
        self, tree: Editable, layers: Any, order: Any, identity: Any, config_at: ConfigAt, given: Config = None
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
        first = self.moves[0]
        self.rules = self._rules(identity, sections.model_type(config, first.n, first.where) if config else None)
        self._check_rules()

    def _left(self) -> list[str]:
        """Lists beside the layers, of as many entries, that do not move with them."""
        if all(move.trivial for move in self.moves):
            return []
        moving = {run.parent for run in self.runs}
        beside = {(run.parent[:-1], run.numbers) for run in self.runs if len(run.numbers) > 1 and not run.head}
        found = [one for one in candidates(self.tree.index) if (one.parent[:-1], one.numbers) in beside]
        left = [one for one in found if one.parent not in moving and not one.head]
        said = "if they belong to the layers, name both"
        return [f"{'.'.join(one.parent)} keeps its {len(one.numbers)} entries: {said}" for one in left]

    @cached_property
    def moves(self) -> list[Move]:
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
        self.strict = given is not None
        sources = sorted({self.order.sources[target] for target in self.order.identity})
        if given is not None:
            return [dict.fromkeys(sources, given) for _ in self.runs]
        found = [{source: self._family(run, source, identity, model_type) for source in sources} for run in self.runs]
        self.family = found[-1][sources[-1]].name
        return [{source: families.values(family) for source, family in each.items()} for each in found]

    def _family(self, run: Layers, source: int, identity: str, model_type: str | None) -> families.Family:
        """The family of a layer; one with quantised weights is of none."""
        index, depth = self.tree.index, len(run.parent) + 1
        inside = numbered.leaves_below(numbered.layer(index, run, run.numbers[source])[1])
        leaves = [path for n in inside if (path := index.pieces(n)[depth:])]
        try:
            return identities.family_of(modules_of(leaves), identity, model_type)
        except BadArgument:
            identities.check_values(self.tree, inside)
            raise

    def _check_rules(self) -> None:
        for run, rules in zip(self.runs, self.rules, strict=False):
            for source, rule in rules.items():
                where, names = numbered.layer(self.tree.index, run, run.numbers[source])
                found = identities.calls(self.tree, names, rule, where, strict=self.strict)
                identities.check_untied(self.tree, found, set(numbered.leaves_below(names)))

    def finished(self, new: Editable) -> tuple[dict[int, Call], DeepenReport]:
        """The edits still to be made to the rearranged tree, and the report."""
        made: dict[tuple[int, int], dict[int, Call]] = {}
        for i, (run, rules) in enumerate(zip(self.runs, self.rules, strict=False)):
            for target in self.order.identity:
                where, names = numbered.layer(new.index, run, run.target(target))
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
                path, names = numbered.layer(tree.index, run, run.target(target))
                did = "kept" if order.kept.get(source) == target else identity
                above = len(path) + len(separator)
                sets = {tree.index.path(n)[above:]: float(c.args.get("value", 0.0)) for n, c in calls.items()}
                size = sum(tree.spec(n).size for n in numbered.leaves_below(names))
                report.layers.append(LayerRow(path, run.path(run.numbers[source], separator), did, sets, size))
            report.rename |= _renames(run, order, separator)
        if order.new:
            parts = tuple(sel(run.select(order.new, numbered.separator_of(tree.index, run))) for run in self.runs)
            report.new = parts[0] if len(parts) == 1 else Union(parts)
        return report


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
