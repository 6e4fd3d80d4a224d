"""How commands write or change a checkpoint, and what they print."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Unpack

import click

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.cli import _ui, fates
from paramend.cli.opening import open_checkpoint, raw
from paramend.disk.urls import path_of
from paramend.edits.plan import Plan
from paramend.errors import ParamendError
from paramend.pages.paged import Paged
from paramend.piecewise.rows import survey
from paramend.reports import wording
from paramend.rewriting.crews import Crew
from paramend.rewriting.files import sources
from paramend.rewriting.layouts import lay_out
from paramend.rewriting.output import check_output
from paramend.rewriting.rewrite import write
from paramend.rewriting.wishes import How


def carry_out(
    made: Plan,
    path: Path,
    out: str | None,
    *,
    force: bool,
    dry_run: bool,
    as_json: bool,
    record: str | None = None,
    quiet: bool = False,
    told: Paged | None = None,
    html: Path | None = None,
    workers: int | None = None,
    engine: str = "processes",
    resume: bool = False,
    **how: Unpack[How],
) -> None:
    """Write the result of a plan, or only show it in a dry run, which needs no `out`. `record` is the recipe of the
    plan, or "", if the output carries a record of it. `told` is printed instead of the plan's table, of which `quiet`
    prints nothing."""
    _ui.check_page(html)
    crew = Crew(workers, engine, resume)
    if html is not None and out is not None and html.absolute() == path_of(out).absolute():
        raise click.UsageError("OUT and the page of --html need names of their own.")
    data: dict[str, Any] = {"source": str(path), "path": None if out is None else str(path_of(out)), "dry_run": dry_run}
    said: tuple[str, ...] = ()
    if out is None:
        with suppress(ParamendError):  # a name may solve it
            said = lay_out(made, path).said
    else:
        crew.check()
        layout = check_output(made, out, force=force, resume=resume, **how)
        data["format"], said = layout.format.name, layout.said
        if layout.left_out and dry_run:
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
        _ui.watch(fates.Outputs([path_of(out), *([] if html is None else [html])], resumes=resume))
        with _ui.bar(f"writing {path_of(out).name}") as progress:
            report = write(made, out, force=force, record=record, progress=progress, crew=crew, **how)
        data |= report.to_dict() if as_json else {}
        shown, done = report if told is None else told, report.summary
    if html is not None:
        shown.tells_of([path], *([Path(source.path), *source.stats] for source in sources(made) if source.stats))
    if as_json:
        _ui.emit(data | (told.to_dict() if told is not None else {}))
    elif told is not None:
        _ui.show_lines(str(told).split("\n"))
    elif not quiet:
        _ui.show_lines(made.lines(), header=True)
    for line in done.split("\n"):
        _ui.say(line)
    _ui.write_page(shown, html)


def write_made(made: Checkpoint, path: Path, told: Paged, *, out: str | None, record: bool, **given: Any) -> None:
    """Write a checkpoint that was made from others, or only show its report in a dry run."""
    if out is None and not given["dry_run"]:
        raise click.UsageError("-o OUT is needed.")
    carry_out(made.plan, path, out, record="" if record else None, told=told, **given)


def edit_checkpoint(
    path: Path,
    edit: Callable[[Checkpoint], Checkpoint],
    *,
    out: str | None,
    in_place: bool,
    record: bool,
    dry_run: bool,
    html: Path | None,
    patches: bool = True,
    **given: Any,
) -> None:
    """Write an edited checkpoint, or change its own files, or only show the edit in a dry run. `patches` says whether
    the edit can be made in place; the others are as in `EDITS`."""
    others = record, given["link"], given["force"], given["workers"], given["resume"], given["engine"] != "processes"
    if in_place and (out is not None or any(others)):
        raise click.UsageError(
            "--in-place changes PATH itself: it excludes -o, --link, --force, --record, --workers, --engine, --resume."
        )
    if out is None and not (dry_run or in_place):
        raise click.UsageError(f"-o OUT {'or --in-place ' * patches}is needed.")
    _ui.check_page(html)
    if not in_place:
        with open_checkpoint(path) as checkpoint:
            edited = edit(checkpoint)
            by = edited.recipe if record else None
            carry_out(edited.plan, path, out, record=by, dry_run=dry_run, html=html, **given)
        return
    from paramend.checkpoints.patching import patch  # only for --in-place

    if not dry_run:
        _ui.watch(fates.Patched(path))
    with _ui.bar(f"patching {path.name}") as progress:
        report = patch(path, edit, dry_run=dry_run, raw=raw(), progress=progress)
    if given["as_json"]:
        _ui.emit(report.to_dict())
    else:
        _ui.show_lines(report.plan.lines(), header=True)
    _ui.say(report.summary)
    _ui.write_page(report, html)
