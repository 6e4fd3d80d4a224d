"""The commands of adapters: `fold`."""

from pathlib import Path
from typing import Any

import click

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.cli import _ui
from paramend.cli.options import DRY_TOO, EDITS, takes
from paramend.cli.writing import edit_checkpoint
from paramend.merging.folding import fold as folded


@click.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=click.Path(path_type=Path))
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
