"""The report of a port: which leaf was made of which, how and why, and what differs beside parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from paramend.errors import PortRefused
from paramend.grafting.report import GraftReport, GraftRow
from paramend.mapping.layout import Layout
from paramend.pages.page import Page
from paramend.porting.models import Model, Unit
from paramend.porting.plan import PortPlan
from paramend.porting.proof import Proof
from paramend.porting.settings import differences
from paramend.reports import wording
from paramend.reports.fields import picked
from paramend.reports.report import Report


@dataclass(repr=False)
class PortReport(GraftReport):
    """Which leaves of the target were made of which leaves of the source, by which rule, and why these are one.

    The four lists of rows are those of a graft: `copied`, `fresh`, `mismatched`, `unused`. Paths of rows are those of
    the target, in `unused` those of the source.

    Attributes:
        layout: the map from the source to the target: it can be saved, applied to any checkpoint of the same model, and
            reversed.
        warnings: what differs beside parameters, with numbers, and what was assumed.
        unproven: the paths of the leaves that rest on the numbers in their names alone, or on features that are taken
            to be flattened.
        proof: the proof that both models compute the same, if `prove=` was given.
    """

    layout: Layout | None = None
    warnings: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    proof: Proof | None = None

    def headline(self) -> str:
        said = super().headline().replace("graft", "port", 1)
        if self.unproven and self.proof is None and not self.refused:
            said += (
                f"; {wording.plural(len(self.unproven), 'leaf rests', 'leaves rest')} on the numbers in names alone, "
                "which follow construction and not calls, or on an assumption: prove=(x,) proves them"
            )
        return said if self.proof is None else f"{said}; {self.proof.headline()}"

    def __str__(self) -> str:
        text = Report.__str__(self)
        warnings = "".join(f"\n  {each}" for each in self.warnings)
        return f"{text}\n\nwarnings: {len(self.warnings)}{warnings}" if warnings else text

    def page(self) -> Page:
        """The page of the graft."""
        return replace(super().page(), title="port")

    def to_dict(self) -> dict[str, Any]:
        layout = None if self.layout is None else self.layout.to_data()
        return super().to_dict() | picked(self, "warnings", "unproven") | {"layout": layout} | picked(self, "proof")


def reported(plan: PortPlan, told: GraftReport, layout: Layout | None = None, proof: Proof | None = None) -> PortReport:
    """The report of a graft of stored leaves as that of the port."""
    made: dict[str, tuple[str, str, str]] = {}
    for pair in plan.pairs:
        for move in pair.moves:
            sources = ", ".join(plan.source.text(pair.source.leaves[name]) for name in move.sources)
            steps = " → ".join(_said(step) for step in plan.rule(pair, move).get("do", ()))
            for path in (plan.target.text(pair.target.leaves[name]) for name in move.targets):
                made[path] = sources, "; ".join(filter(None, (steps, plan.notes.get(path, "")))), pair.by
    copied = []
    for row in told.copied:
        source, steps, by = made.get(row.path, (str(row.source), "", ""))
        cast = row.did.removeprefix("copied, ") * ("cast" in row.did)
        said = (steps, f"by {by}", cast) if steps else (row.did, f"by {by}")
        copied.append(replace(row, source=source, did="; ".join(filter(None, said))))
    unused = [*told.unused, *(_row(plan.source, number, _why(plan, number)) for number in plan.left_behind())]
    lone = [number for unit in plan.lone[1] for number in unit.leaves.values()]
    fresh = [*told.fresh, *(_row(plan.target, number, "nothing in the source") for number in lone)]
    both = [(pair.target.path, pair.target.module, pair.source.module) for pair in plan.pairs]
    beside = differences([row for row in both if None not in row], (plan.target.modules, plan.source.modules))
    return PortReport(
        copied,
        fresh,
        told.mismatched,
        unused,
        told.refused,
        layout=layout,
        warnings=[*beside, *(f"{path}: {note}" for path, note in plan.notes.items())],
        unproven=[path for path, (*_, by) in made.items() if not proof and (by == "number" or path in plan.assumed)],
        proof=proof,
    )


def _why(plan: PortPlan, number: int) -> str:
    if number in {n for unit in plan.left for n in unit.leaves.values()}:
        return "left behind by `rename`"
    return "no such leaf in the target" if number in plan.source.names else "not a parameter"


def _row(model: Model, number: int, did: str) -> GraftRow:
    return GraftRow.of(model.text(number), model.spec(number), did)


def _said(step: Mapping[str, Any]) -> str:
    """A step in a few words."""
    ((name, args),) = step.items()
    shown = args if isinstance(args, list) else args.get("shape") or args.get("parts") or args.get("sizes")
    return f"{name} {shown}" if shown else name


def refusal(plan: PortPlan) -> PortRefused:
    """The error for what a port does not guess, with the candidates and what to type."""
    blocks = ["the source cannot be ported to the target, and nothing was changed"]
    for ours, theirs in plan.doubtful:
        counts = wording.plural(len(ours), "layer"), wording.plural(len(theirs), "layer")
        blocks.append(f"{counts[0]} of the source fit {counts[1]} of the target in several ways:")
        blocks[-1] += f"\n  {_listed(ours)}\n  {_listed(theirs)}"
    blocks += [f"the layout of {path} is not known: {why}" for path, (why, _) in plan.questions.items()]
    places = "of the source has no place in the target", "of the target has nothing in the source"
    for units, said in zip(plan.lone, places, strict=True):
        if units:
            blocks.append(f"what {said}:\n" + "\n".join(f"  {unit}" for unit in units))
    names = [[["/".join(unit.path) for unit in units] for units in pair] for pair in plan.doubtful]
    candidates = [(ours, theirs) for ours, theirs in names]
    renames = {old: new for ours, theirs in candidates for old, new in zip(ours, theirs, strict=False)}
    rules = {path: [step.to_data() for step in ways[-1]] for path, (_, ways) in plan.questions.items()}
    hints = [f"rename={renames}, with the right pairs"] * bool(renames)
    hints += [f"rules={rules}, with what is right"] * bool(rules)
    hints += ["prove=(x,) finds it out, where both models run"] * bool(hints)
    hint = "\n      ".join(hints) or 'rename={"layer/of/source": "layer/of/target"}; None leaves it behind'
    report = reported(plan, GraftReport(refused=True))
    return PortRefused("\n\n".join(blocks), report=report, candidates=candidates, hint=hint)


def _listed(units: list[Unit]) -> str:
    return wording.listing([str(unit).replace("  ", " ") for unit in units], 12)
