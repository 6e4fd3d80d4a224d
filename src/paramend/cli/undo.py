"""`paramend undo`, `history`, `verify`: edits of a checkpoint taken back, listed, and checked against its bytes."""

from dataclasses import replace
from pathlib import Path

import click

from paramend.cli import _ui, fates
from paramend.cli.options import ADDRESS, takes
from paramend.disk.urls import path_of
from paramend.errors import BadCheckpoint, UnexpectedChange, printable
from paramend.journal.history import table
from paramend.journal.undo import drop, history as history_of, undo as take_back
from paramend.reports import wording
from paramend.rewriting.provenance import record as record_of
from paramend.rewriting.verification import Verified, lacks, verified


@click.command()
@click.argument("path", type=ADDRESS)
@click.option("--force", is_flag=True, help="Restore the old bytes even if they were changed since.")
@click.option("--drop", "drops", is_flag=True, help="Delete undo records instead, to free their space.")
@click.option("--keep", type=click.IntRange(min=0), metavar="N", help="With --drop: keep the N latest records.")
@takes("json")
def undo(path: Path, force: bool, drops: bool, keep: int | None, as_json: bool) -> None:
    """Take back the last edit that was made in place.

    Each call takes back one more edit. An interrupted edit of your own is taken back automatically; one that somebody
    else made, or that came with the files, only by this command. --drop leaves the checkpoint as it is, and the edits
    whose records are deleted can no longer be taken back.

    Exit status: 0 done; 2 there is nothing to take back, the checkpoint was changed since, or a record is damaged.
    """
    if keep is not None and not drops:
        raise click.UsageError("--keep needs --drop.")
    _ui.watch(fates.Dropped(path) if drops else fates.Undone(path))
    if drops:
        gone = drop(path, keep=keep or 0)
        if as_json:
            rows = [str(row) if isinstance(row, Path) else row.to_dict() for row in gone]
            _ui.emit({"path": str(path), "dropped": rows})
        _ui.say(f"forgot {wording.plural(len(gone), 'undo record')} of {path}")
        return
    with _ui.bar(f"restoring {path.name}") as progress:
        report = take_back(path, force=force, progress=progress)
    if as_json:
        _ui.emit(report.to_dict())
    _ui.say(report.summary)


@click.command()
@click.argument("path", type=ADDRESS)
@takes("json")
def history(path: Path, as_json: bool) -> None:
    """List what was done to a checkpoint: the record that it carries, and the edits made in place, the latest last.

    The record lists the edits by which the checkpoint was written with --record, oldest first. Edits made in place can
    be taken back. With --json each is an object; those of the record have "record".

    Exit status: 0 done; 2 there is no such checkpoint, or a record is damaged.
    """
    rows, record, damage = history_of(path), None, None
    try:
        record = record_of(path)
    except BadCheckpoint as error:  # the edits that can be taken back are shown anyway
        damage = error
    if as_json:
        recorded = [] if record is None else [*record.earlier, replace(record, earlier=())]
        _ui.emit([*({"record": each.to_dict()} for each in recorded), *(row.to_dict() for row in rows)])
    else:
        if record is not None:
            _ui.show_lines([*map(printable, str(record).split("\n")), ""])
        _ui.show_lines(table(rows), header=bool(rows))
    if damage is not None:
        raise damage


@click.command()
@click.argument("path", type=ADDRESS)
@click.option(
    "--source",
    "given",
    multiple=True,
    metavar="[NAME=]PATH",
    help="What leaves were made of, if it is not beside PATH; NAME in the record, if it has another one now.",
)
@takes("json")
def verify(path: Path, given: tuple[str, ...], as_json: bool) -> None:
    """Check a checkpoint against the record that it carries: shape, dtype and bytes of every edited leaf.

    Leaves that were made of others (by concat, split, stack, insert, layout ...) are made again and compared bit for
    bit, where the files that they were made of are beside PATH, or named by --source. What is not there is said.

    Exit status: 0 all are as written; 1 a leaf differs or is missing, or its sources give something else now; 2 there
    is no record, something is damaged or cannot be read, or --source is given and one of them is missing.
    """
    parts = ((each.rpartition("=")) if not path_of(each).exists() else ("", "", each) for each in given)
    sources = {name or path_of(path).name: path for name, _, path in parts}
    found, changes, hint = Verified([], [], {}), {}, ""
    try:
        with _ui.bar(f"reading {path.name}") as progress:
            found = verified(path, sources or None, progress=progress)
        lines = [f"{path}: {wording.plural(len(found.leaves), 'recorded leaf is', 'recorded leaves are')} as written"]
        made = wording.plural(len(found.remade), "leaf is", "leaves are")
        lines += [f"{made} what their sources give"] * bool(found.remade)
        lines += [f"not made again: {lacks(*each)} (--source [NAME=]PATH)" for each in found.lacking.items()]
    except UnexpectedChange as error:
        changes, hint = error.changes, error.hint
        lines = str(error).partition("\n\nhint:")[0].split("\n")
    if as_json:
        _ui.emit({"path": str(path), "holds": not changes, **found._asdict(), "changes": changes})
    else:
        _ui.show_lines([*map(printable, lines)])
    if hint:
        _ui.say(f"hint: {hint}")
    if changes:
        raise SystemExit(1)
