"""`paramend delta`: what is different in one model, as a directory that makes it of another."""

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import click

from paramend.cli import _ui, fates
from paramend.cli.options import ADDRESS, takes
from paramend.cli.writing import edit_checkpoint
from paramend.deltas.checksums import Checksum
from paramend.deltas.comparing import Encoding, delta as delta_of
from paramend.deltas.delta import Delta
from paramend.disk.urls import path_of
from paramend.errors import Unsupported


@click.command()
@click.argument("paths", metavar="A B", nargs=-1, required=True, type=ADDRESS)
@click.option(
    "--encoding", type=click.Choice(get_args(Encoding)), help="Hold new values, or what old and new differ in."
)
@click.option("--checksum", type=click.Choice(get_args(Checksum)), help="Of leaves; by default sha256.")
@click.option("--slime", is_flag=True, help="Write it as slime has it: by default xor, with xxh3-128.")
@takes("out", "force", "dry_run", "json", out="The directory to write.", dry_run="Show what differs; write nothing.")
def delta(
    paths: Sequence[Path], out: Path | None, *, slime: bool, force: bool, dry_run: bool, as_json: bool, **how: Any
) -> None:
    """Write what is different in B, as a directory that makes it of A.

    paramend delta A B -o D              only new values, their positions, checksums
    paramend apply D A -o B              B again; or --in-place, which can be undone
    paramend delta squash D1 D2 -o D     deltas, one after the other, as one
    paramend delta D                     what a delta holds

    A and B are files or directories of any format.

    Exit status: 0 done; 2 deltas do not follow each other, a file is unreadable or damaged, or OUT cannot be written.
    """
    squash, looks = str(paths[0]) == "squash" and len(paths) > 2, len(paths) == 1
    if not (squash or looks or len(paths) == 2):
        raise click.UsageError("A and B are needed, or `squash` and two deltas or more.")
    if out is None and not (looks or dry_run):
        raise click.UsageError("-o OUT is needed.")
    if squash or looks:
        found = reduce(Delta.then, map(Delta.load, paths[squash:]))
    else:
        named = {name: value for name, value in how.items() if value is not None}
        named = ({"encoding": "xor", "checksum": "xxh3-128"} if slime else {}) | named
        with _ui.bar(f"comparing {paths[0].name} and {paths[1].name}") as progress:
            found = delta_of(*paths, **named, progress=progress)
    if as_json:
        _ui.emit(found.to_dict() | {"path": None if out is None else str(out)})
    else:
        _ui.show_lines(str(found).split("\n"))
    if out is not None and not dry_run:
        _ui.watch(fates.Outputs([path_of(out)]))
        found.save(out, force=force, slime=slime)
        _ui.say(f"wrote {out}")


def apply_delta(folder: Path, path: Path, **given: Any) -> None:
    """Carry out `paramend apply` with a delta."""
    found = Delta.load(folder)
    if given["in_place"] and found.restructures:
        raise Unsupported(
            f"{folder}: only values can change in place, and leaves or files come, go, or get another name or spec",
            hint=f"paramend apply {folder} {path} -o OUT",
        )

    def edit(base: Any) -> Any:
        made = found.apply(base)
        if made is base:
            _ui.say(f"{path} is the outcome of {folder} already: nothing to do")
        return made

    edit_checkpoint(path, edit, **given)
