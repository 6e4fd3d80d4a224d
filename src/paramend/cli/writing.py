"""How commands write or change a checkpoint, and what they print."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.cli import _ui, fates
from paramend.cli.opening import open_checkpoint, raw
from paramend.edits.plan import Plan
from paramend.errors import ParamendError
from paramend.pages.paged import Paged
from paramend.piecewise.rows import survey
from paramend.reports import wording
from paramend.rewriting.files import sources
from paramend.rewriting.layouts import Layout, lay_out
from paramend.rewriting.output import check_output
from paramend.rewriting.rewrite import write

# What click is told of the option `--html`.
HTML: dict[str, Any] = {
    "type": click.Path(path_type=Path),
    "metavar": "FILE",
    "help": "Write the report as an HTML page, in a dry run too.",
}
RECORD = "Add a record of what was done to OUT; `paramend verify OUT` checks it."


def carry_out(
    made: Plan,
    path: Path,
    out: str | None,
    *,
    force: bool,
    dry_run: bool,
    as_json: bool,
    link: bool = False,
    max_shard_size: str | None = None,
    record: str | None = None,
    to: str | None = None,
    quiet: bool = False,
    told: Paged | None = None,
    html: Path | None = None,
) -> None:
    """Write the result of a plan, or only show it in a dry run.

    Args:
        record: the recipe that made the plan, or "", if the output carries a record of it; None for no record.
        to: the name of the format, if OUT need not say it; "" if it must.
        quiet: whether no table is printed.
        told: a report that is printed instead of the plan's table.
    """
    _ui.check_page(html)
    if html is not None and out is not None and html.absolute() == Path(out).absolute():
        raise click.UsageError("OUT and the page of --html need names of their own.")
    data: dict[str, Any] = {"source": str(path), "path": None if out is None else str(Path(out)), "dry_run": dry_run}
    said: tuple[str, ...] = ()
    layout: Layout | None = None
    if out is None:
        with suppress(ParamendError):  # a name may solve it
            said = lay_out(made, path).said
    else:
        layout = check_output(made, out, force=force, link=link, max_shard_size=max_shard_size, to=to)
        data["format"], said = layout.format.name, layout.said
        if layout.left_out and (dry_run or out is None):
            data["left_out"] = list(layout.left_out)
            said = (f"not copied: {wording.listing(layout.left_out)}", *said)
    shown: Paged = made if told is None else told
    if dry_run or out is None:
        if told is None:
            survey(made)
        data |= made.to_dict() if as_json else {}
        data |= {"said": list(said)} if as_json and said else {}
        done = "\n".join((f"dry run: {'nothing' if html is None else 'no checkpoint'} was written", *said))
    else:
        _ui.watch(fates.Outputs([Path(out), *([] if html is None else [html])]))
        with _ui.bar(f"writing {Path(out).name}") as progress:
            given: dict[str, Any] = {"force": force, "link": link, "max_shard_size": max_shard_size, "to": to}
            report = write(made, out, record=record, progress=progress, **given)
        data |= report.to_dict() if as_json else {}
        shown, done = report if told is None else told, report.summary
    if html is not None:
        shown.tells_of(path, *(Path(file) for source in sources(made) for file in source.stats))
    if as_json:
        _ui.emit(data | (told.to_dict() if told is not None else {}))
    elif told is not None:
        _ui.show_lines(str(told).split("\n"))
    elif not quiet:
        _ui.show_lines(made.lines(), header=True)
    for line in done.split("\n"):
        _ui.say(line)
    _ui.write_page(shown, html)


def makes(shows: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of a command that makes a checkpoint from others; `write_made` takes their values.

    Args:
        shows: what a dry run shows.
    """
    rows: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        (("-o", "--out"), {"metavar": "OUT", "help": "The file or directory to write."}),
        (("--max-shard-size",), {"metavar": "SIZE", "help": 'The most bytes of tensors in one file, such as "5GB".'}),
        (("--force",), {"is_flag": True, "help": "Replace OUT if it exists."}),
        (("--record",), {"is_flag": True, "help": RECORD}),
        (("--dry-run",), {"is_flag": True, "help": f"Show {shows}, and write no checkpoint."}),
        (("--html",), HTML),
        (("--json", "as_json"), {"is_flag": True, "help": "Print data as JSON."}),
    ]

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for names, said in reversed(rows):
            command = click.option(*names, **said)(command)
        return command

    return add


def write_made(made: Checkpoint, path: Path, told: Paged, *, out: str | None, record: bool, **given: Any) -> None:
    """Write a checkpoint that was made from others, or only show its report in a dry run."""
    if out is None and not given["dry_run"]:
        raise click.UsageError("-o OUT is needed.")
    carry_out(made.plan, path, out, record="" if record else None, told=told, **given)


def options(*, in_place: bool = True) -> list[click.Parameter]:
    """The options of a command that edits a checkpoint.

    Args:
        in_place: whether it can change the files themselves; if not, `--in-place` is hidden: using it raises an error
            that says why.
    """
    return [
        click.Option(["-o", "--out"], metavar="OUT", help="The file or directory to write."),
        click.Option(
            ["--in-place"],
            is_flag=True,
            hidden=not in_place,
            help="Change PATH itself; `paramend undo PATH` takes it back.",
        ),
        click.Option(["--link"], is_flag=True, help="Hard-link unchanged shards."),
        click.Option(["--force"], is_flag=True, help="Replace OUT if it exists."),
        click.Option(["--record"], is_flag=True, help=RECORD),
        click.Option(["--dry-run"], is_flag=True, help="Show what would change, and write no checkpoint."),
        click.Option(["--html"], **HTML),
        click.Option(["--json", "as_json"], is_flag=True, help="Print data as JSON."),
    ]


def edit_checkpoint(
    path: Path,
    edit: Callable[[Checkpoint], Checkpoint],
    *,
    out: str | None,
    in_place: bool,
    link: bool,
    force: bool,
    record: bool,
    dry_run: bool,
    html: Path | None,
    as_json: bool,
    patches: bool = True,
) -> None:
    """Write an edited checkpoint, or change its own files, or only show the edit in a dry run."""
    if in_place and (out is not None or link or force or record):
        raise click.UsageError("--in-place changes PATH itself: it excludes -o, --link, --force and --record.")
    if out is None and not (dry_run or in_place):
        raise click.UsageError(f"-o OUT {'or --in-place ' * patches}is needed.")
    _ui.check_page(html)
    if not in_place:
        with open_checkpoint(path) as checkpoint:
            edited = edit(checkpoint)
            by = edited.recipe if record else None
            given: dict[str, Any] = {"force": force, "dry_run": dry_run, "html": html, "as_json": as_json, "link": link}
            carry_out(edited.plan, path, out, record=by, **given)
        return
    from paramend.checkpoints.patching import patch  # only for --in-place

    if not dry_run:
        _ui.watch(fates.Patched(path))
    with _ui.bar(f"patching {path.name}") as progress:
        report = patch(path, edit, dry_run=dry_run, raw=raw(), progress=progress)
    if as_json:
        _ui.emit(report.to_dict())
    else:
        _ui.show_lines(report.plan.lines(), header=True)
    _ui.say(report.summary)
    _ui.write_page(report, html)
