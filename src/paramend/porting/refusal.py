"""Refusals: what a port does not guess, with the candidates and what to type."""

from paramend.errors import PortRefused
from paramend.grafting.report import GraftReport
from paramend.porting.models import Unit
from paramend.porting.plan import PortPlan
from paramend.porting.report import reported
from paramend.reports import wording


def refusal(plan: PortPlan) -> PortRefused:
    """The error for a plan with questions."""
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
    candidates = [([_name(u) for u in ours], [_name(u) for u in theirs]) for ours, theirs in plan.doubtful]
    renames = {old: new for ours, theirs in candidates for old, new in zip(ours, theirs, strict=False)}
    rules = {path: [step.to_data() for step in ways[-1]] for path, (_, ways) in plan.questions.items()}
    hints = [f"rename={renames}, with the right pairs"] * bool(renames)
    hints += [f"rules={rules}, with what is right"] * bool(rules)
    hints += ["prove=(x,) finds it out, where both models run"] * bool(hints)
    hint = "\n      ".join(hints) or 'rename={"layer/of/source": "layer/of/target"}; None leaves it behind'
    report = reported(plan, GraftReport(refused=True))
    return PortRefused("\n\n".join(blocks), report=report, candidates=candidates, hint=hint)


def _name(unit: Unit) -> str:
    return "/".join(unit.path)


def _listed(units: list[Unit]) -> str:
    return wording.listing([str(unit).replace("  ", " ") for unit in units], 12)
