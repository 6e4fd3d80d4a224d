"""`paramend demo`: the surgeries on a classifier of handwritten digits, with the evidence."""

import os
from pathlib import Path
from typing import Any

import click

from paramend._optional import need
from paramend.cli import _ui, fates
from paramend.cli.options import takes
from paramend.reports import wording
from paramend.reports.tables import aligned

NEEDS = ("sklearn.model_selection", "safetensors.numpy", "flax.linen", "optax", "torch")


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="paramend-demo",
    show_default=True,
    metavar="DIR",
    help="Where to write the files.",
)
@click.option("--force", is_flag=True, help="Replace the files of an earlier demo in DIR.")
@click.option(
    "--seed", type=click.IntRange(min=0, max=2**31), default=0, show_default=True, help="Seed of all randomness."
)
@takes("json")
@click.pass_context
def demo(context: click.Context, out: Path, force: bool, seed: int, as_json: bool) -> None:
    """Run the five surgeries on a classifier of handwritten digits.

    Trains a small Flax network on the digits that ship with scikit-learn, edits it in memory, on disk and in
    torch, and checks each time that the requested edit was made, and nothing else.

    Exit status: 0 all claims held; 1 a claim failed; 2 DIR holds other files or cannot be written to, or a package
    is missing.
    """
    # Before JAX starts: accelerators round differently, and the demo claims equal bits.
    os.environ["JAX_PLATFORMS"] = "cpu"
    for module in NEEDS:
        need(module, extra="demo", to="run the demo")
    _ui.say("five surgeries on a small network that reads handwritten digits; they take less than a minute")

    def progress(row: Any) -> None:
        if as_json:
            _ui.say(f"{row.number:2}  {row.step.title}: {_verdict(row.held)}")
        else:
            _ui.show_lines(_told(row))

    from paramend.demo.tour import tour  # imports jax, flax, optax and torch

    _ui.watch(fates.Filled(out))
    report = tour(out, seed=seed, force=force, progress=progress)
    if as_json:
        _ui.emit(report.to_dict())
    else:
        _ui.show_lines(_summary(report), header=True)
        _ui.show_lines(_ending(report))
    context.exit(0 if report.held else 1)


def _told(row: Any) -> list[str]:
    """One step: the code, what changed, the effect on accuracy, and the evidence."""
    outcome = row.outcome
    facts = [("changed", _changed(outcome)), ("accuracy", _accuracy(outcome))]
    facts += [(_verdict(held), claim) for claim, held in outcome.claims.items()]
    return [
        f"{row.number:2}  {row.step.title}",
        "",
        f"    {row.code}",
        "",
        *(f"    {line}" for line in aligned(facts)),
        *([""] if outcome.detail else []),
        *(f"      {line}".rstrip() for line in outcome.detail),
        "",
    ]


def _summary(report: Any) -> list[str]:
    rows = [("", "step", "leaves changed", "accuracy", "claims")]
    for row in report.rows:
        outcome = row.outcome
        count = f"{len(outcome.changed)} of {outcome.leaves}"
        rows.append((str(row.number), row.step.title, count, _accuracy(outcome), _verdict(row.held)))
    return aligned(rows, right="rlrl")


def _ending(report: Any) -> list[str]:
    claims = [held for row in report.rows for held in row.outcome.claims.values()]
    return [
        "",
        f"{sum(claims)} of {wording.plural(len(claims), 'claim')} held, in {report.seconds:.0f} s",
        f"{report.folder} holds {wording.listing(report.files)}",
        "",
        "try next:",
        *(f"    {command}" for command in report.next),
    ]


def _changed(outcome: Any) -> str:
    count = f"{len(outcome.changed)} of {wording.plural(outcome.leaves, 'leaf', 'leaves')}"
    return f"{count}: {wording.listing(outcome.changed, 2)}" if outcome.changed else count


def _accuracy(outcome: Any) -> str:
    return f"{outcome.before:.1%} -> {outcome.after:.1%}"


def _verdict(held: bool) -> str:
    return "ok" if held else "FAILED"
