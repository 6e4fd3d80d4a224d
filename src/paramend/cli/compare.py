"""`paramend diff`: what differs between two checkpoints, and whether only what may differ does."""

from pathlib import Path
from typing import get_args

import click

from paramend.cli import _ui
from paramend.cli.choosing import EXCEPT, chosen
from paramend.cli.options import ADDRESS, takes
from paramend.evidence.diff import Sort, diff as diff_of


@click.command()
@click.argument("a", type=ADDRESS)
@click.argument("b", type=ADDRESS)
@click.argument("selectors", metavar="[SELECTOR]...", nargs=-1)
@click.option(
    "--only",
    metavar="SELECTOR",
    multiple=True,
    help="Check that leaves that SELECTOR matches differ, and no others; may be repeated.",
)
@click.option(
    "--except",
    "excepts",
    **EXCEPT
    | {"help": "Leave out the leaves that SELECTOR matches: of --only if it is given, else of all; may be repeated."},
)
@click.option("--allow-noop", is_flag=True, help="With --only: also pass if nothing differs.")
@click.option(
    "--sort",
    type=click.Choice(get_args(Sort)),
    default="change",
    help="The order of changed leaves; by change, largest first.",
)
@takes("html", "json")
def diff(
    a: Path,
    b: Path,
    selectors: tuple[str, ...],
    only: tuple[str, ...],
    excepts: tuple[str, ...],
    allow_noop: bool,
    sort: Sort,
    html: Path | None,
    as_json: bool,
) -> None:
    """Compare two checkpoints leaf by leaf and bit by bit: what was added, removed, renamed, respecified or changed.

    A and B are files or directories of any format. What a SELECTOR matches in either is compared, by default all;
    those of --only are resolved in A, and for new leaves in B. What --except takes away from --only is compared too,
    and must not differ.

    Exit status without --only: 0 nothing differs; 1 something does. With --only: 0 some of the selected leaves differ
    and no others; 1 another leaf differs, or nothing does. 2 an unreadable or damaged file, or a selector that matches
    nothing.
    """
    if allow_noop and not only:
        raise click.UsageError("--allow-noop needs --only.")
    _ui.check_page(html)
    compared, allowed = chosen(selectors, () if only else excepts), chosen(only, excepts)
    with _ui.bar(f"comparing {a.name} and {b.name}") as progress:
        report = diff_of(
            a,
            b,
            compared.selector,
            only=allowed.selector if only else None,
            sort=sort,
            histograms=html is not None,
            progress=progress,
        )
    if only:
        report.only = str(allowed)
    _ui.tell(report, a, b, page=html, as_json=as_json)
    holds = not report.unexpected and (bool(report) or allow_noop) if only else not report
    if not holds:
        raise SystemExit(1)
