"""`paramend undo`, `history`, `verify`: edits of a checkpoint taken back, listed, and checked against its bytes."""

from dataclasses import replace
from pathlib import Path

import click

from paramend.cli import _ui, fates
from paramend.errors import BadCheckpoint, UnexpectedChange, printable
from paramend.journal.history import table
from paramend.journal.undo import drop
from paramend.journal.undo import history as history_of
from paramend.journal.undo import undo as take_back
from paramend.reports import wording
from paramend.rewriting.provenance import record as record_of
from paramend.rewriting.provenance import verify_record


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Restore the old bytes even if they were changed since.")
@click.option("--drop", "drops", is_flag=True, help="Delete undo records instead, to free their space.")
@click.option("--keep", type=click.IntRange(min=0), metavar="N", help="With --drop: keep the N latest records.")
@click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")
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
            _ui.emit(
                {"path": str(path), "dropped": [str(row) if isinstance(row, Path) else row.to_dict() for row in gone]}
            )
        _ui.say(f"forgot {wording.plural(len(gone), 'undo record')} of {path}")
        return
    with _ui.bar(f"restoring {path.name}") as progress:
        report = take_back(path, force=force, progress=progress)
    if as_json:
        _ui.emit(report.to_dict())
    _ui.say(report.summary)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")
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
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")
def verify(path: Path, as_json: bool) -> None:
    """Check a checkpoint against the record that it carries: shape, dtype and bytes of every edited leaf.

    Exit status: 0 all are as written; 1 a leaf differs or is missing; 2 there is no record, or something is damaged or
    cannot be read.
    """
    changes: dict[str, str] = {}
    leaves: list[str] = []
    hint = ""
    try:
        with _ui.bar(f"reading {path.name}") as progress:
            leaves = verify_record(path, progress=progress)
        said = f"{path}: {wording.plural(len(leaves), 'recorded leaf is', 'recorded leaves are')} as written"
    except UnexpectedChange as error:
        changes, hint = error.changes, error.hint
        said = str(error).partition("\n\nhint:")[0]
    if as_json:
        _ui.emit({"path": str(path), "holds": not changes, "leaves": leaves, "changes": changes})
    else:
        _ui.show_lines([printable(line) for line in said.split("\n")])
    if hint:
        _ui.say(f"hint: {hint}")
    if changes:
        raise SystemExit(1)
