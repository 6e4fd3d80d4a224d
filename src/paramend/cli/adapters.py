"""The commands of adapters: `fold`, `extract`."""

from pathlib import Path
from typing import Any

import click

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.cli import _ui, fates
from paramend.cli.opening import open_checkpoint
from paramend.cli.options import ADDRESS, DRY_TOO, EDITS, takes
from paramend.cli.writing import edit_checkpoint
from paramend.merging.extracting import extract as extracted
from paramend.merging.folding import fold as folded


@click.command()
@click.argument("base", type=ADDRESS)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=ADDRESS)
@click.option("--scale", type=float, default=1.0, show_default=True, help="A further factor of all terms.")
@click.option("--untie", is_flag=True, help="Give a tied head a leaf of its own if only one of the two changes.")
@click.option("--into", type=click.Choice(["embedding"]), help="Change a tied head and its embedding both.")
@takes(*EDITS, in_place="Change BASE itself; `paramend undo BASE` takes it back.", html=DRY_TOO)
def fold(base: Path, adapters: tuple[Path, ...], scale: float, untie: bool, into: Any, **options: Any) -> None:
    """Write BASE with adapters added to its weights.

    ADAPTER is a folder of PEFT or a file of kohya; the terms of several are added first. Every tensor of theirs must
    have a place in BASE, or all that have none are listed.

    Exit status: 0 done; 2 an adapter does not fit, a weight of BASE is quantised, a file is unreadable or damaged, or
    OUT cannot be written.
    """

    def edit(old: Checkpoint) -> Checkpoint:
        new, report = folded(old, list(adapters), scale=scale, untie=untie, into=into)
        for line in report.said:
            _ui.say(line)
        return new

    edit_checkpoint(base, edit, **options)


@click.command()
@click.argument("tuned", type=ADDRESS)
@click.argument("base", type=ADDRESS)
@click.option("--rank", type=int, help="The rank of all terms.")
@click.option("--energy", type=float, help="Instead of it, the share of the squares of each difference that they hold.")
@click.option("-o", "--out", required=True, metavar="OUT", type=ADDRESS, help="The folder to write.")
@takes("force", "json")
def extract(
    tuned: Path, base: Path, rank: int | None, energy: float | None, out: Path, *, force: bool, as_json: bool
) -> None:
    """Write the difference of TUNED and BASE as an adapter of low rank, a folder that PEFT loads.

    Leaves that changed and are not matrices, such as norms and biases, are listed: the adapter does not hold them.

    Exit status: 0 done; 2 the two do not have the same leaves, nothing differs, a file is unreadable or damaged, or OUT
    cannot be written.
    """
    with open_checkpoint(tuned) as after, open_checkpoint(base) as before:
        adapter, report = extracted(after, before, rank=rank, energy=energy)
    _ui.watch(fates.Outputs([out]))
    adapter.save(out, force=force)
    if as_json:
        _ui.emit(report.to_dict() | {"path": str(out)})
    else:
        _ui.show_lines(str(report).split("\n"))
    _ui.say(f"wrote {out}")
