"""`paramend undo` and `paramend history`: edits made in place, listed and taken back."""

from pathlib import Path

import click

from paramend import _text
from paramend.cli import _ui
from paramend.undoing import drop, table
from paramend.undoing import history as history_of
from paramend.undoing import undo as take_back


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Put the old bytes back although those places were changed since.")
@click.option("--drop", "drops", is_flag=True, help="Forget undo records instead, to free the space that they take.")
@click.option("--keep", type=click.IntRange(min=0), metavar="N", help="With --drop: keep the N latest records.")
@click.option("--json", "as_json", is_flag=True, help="Print data as JSON.")
def undo(path: Path, force: bool, drops: bool, keep: int | None, as_json: bool) -> None:
    """Take back the last edit that was made in place.

    Edits stack: each call takes back one more. An edit that was cut short is taken back by itself. After --drop the
    checkpoint stays as it is, and what was forgotten cannot be taken back any more.

    Exit status: 0 done; 2 there is nothing to take back, the checkpoint was changed since, or a record is damaged.
    """
    if keep is not None and not drops:
        raise click.UsageError("--keep goes with --drop.")
    if drops:
        gone = drop(path, keep=keep or 0)
        if as_json:
            _ui.emit(
                {"path": str(path), "dropped": [str(row) if isinstance(row, Path) else row.to_dict() for row in gone]}
            )
        _ui.say(f"forgot {_text.plural(len(gone), 'undo record')} of {path}")
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
    """List the edits made in place that can be taken back, the latest last.

    Exit status: 0 done; 2 there is no such checkpoint, or a record is damaged.
    """
    rows = history_of(path)
    if as_json:
        _ui.emit([row.to_dict() for row in rows])
    else:
        _ui.show_lines(table(rows), header=bool(rows))
