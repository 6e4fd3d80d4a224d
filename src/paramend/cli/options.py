"""The options that commands have in common, each told to click once."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from paramend.disk.urls import path_of

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class _Address(click.Path):
    """A path of this machine, or an address in a remote store."""

    def coerce_path_result(self, value: "str | os.PathLike[str]") -> Any:
        return path_of(value)


ADDRESS = _Address()

# What click is told of each, besides its name.
_ROWS: dict[str, dict[str, Any]] = {
    "out": {"param_decls": ("-o", "--out"), "metavar": "OUT", "help": "The file or directory to write."},
    "in_place": {"is_flag": True, "help": "Change PATH itself; `paramend undo PATH` takes it back."},
    "link": {"is_flag": True, "help": "Hard-link unchanged shards."},
    "max_shard_size": {"metavar": "SIZE", "help": 'The most bytes of tensors in one file, such as "5GB".'},
    "force": {"is_flag": True, "help": "Replace OUT if it exists."},
    "record": {"is_flag": True, "help": "Add a record of what was done to OUT; `paramend verify OUT` checks it."},
    "workers": {"type": click.IntRange(1), "metavar": "N", "help": "Let N processes write OUT."},
    "engine": {"default": "processes", "metavar": "ray", "help": "Let workers of Ray write OUT; or ray://HOST:PORT."},
    "resume": {"is_flag": True, "help": "Go on from what an earlier run left of OUT that was stopped."},
    "dry_run": {"is_flag": True, "help": "Show what would change, and write no checkpoint."},
    "html": {"type": click.Path(path_type=Path), "metavar": "FILE", "help": "Write the report as an HTML page."},
    "json": {"param_decls": ("--json", "as_json"), "is_flag": True, "help": "Print data as JSON."},
}
WRITES = "force", "record", "workers", "engine", "resume", "dry_run", "html", "json"
EDITS = "out", "in_place", "link", *WRITES
DRY_TOO = "Write the report as an HTML page, in a dry run too."


def _told(name: str, words: dict[str, str]) -> dict[str, Any]:
    row = {"param_decls": (f"--{name.replace('_', '-')}",)} | _ROWS[name]
    return row | ({"help": words[name]} if name in words else {})


def takes(*names: str, **words: str) -> Decorator:
    """The options of these names, in their order; `words` say what some of them mean, if not the same as elsewhere."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            row = _told(name, words)
            command = click.option(*row.pop("param_decls"), **row)(command)
        return command

    return add


def numbers(ctx: click.Context, option: click.Parameter, text: str | None) -> list[int] | None:
    """Whole numbers, and ranges of them, each with its end."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
        if last < first:
            raise click.BadParameter(f"{part!r} is neither a number nor a range of them; write 0,3,5-7")
        found += range(first, last + 1)
    return found


def one_of(options: dict[str, Any], *names: str) -> tuple[str, Any]:
    """The name and the value of the one of some options that was given; they are taken out of all."""
    given = {name: value for name in names if (value := options.pop(name)) not in (None, ())}
    if len(given) != 1:
        raise click.UsageError(f"One of {', '.join(f'--{name}' for name in names)} is needed.")
    return given.popitem()


def _rules(ctx: click.Context, option: click.Parameter, given: tuple[str, ...]) -> dict[str, str | None]:
    rules: dict[str, str | None] = {}
    for rule in given:
        old, equals, new = rule.partition("=")
        if not (old and equals):
            raise click.BadParameter(f"{rule!r} is not OLD=NEW; write --rename 'h/<n>/**=layers/<n>/**'")
        rules[old] = new or None
    return rules


def renames(says: str, more: str = "") -> Decorator:
    """The option `--rename`, whose rules are a map."""
    said = f"{says}; may be repeated.{more}"
    return click.option("--rename", multiple=True, callback=_rules, metavar="OLD=NEW", help=said)


def makes(shows: str) -> Decorator:
    """The options of a command that makes a checkpoint from others, for `write_made`, and what its dry run shows."""
    return takes("out", "max_shard_size", *WRITES, dry_run=f"Show {shows}, and write no checkpoint.", html=DRY_TOO)


def edits(*, in_place: bool = True) -> list[click.Parameter]:
    """The options of a command that edits a checkpoint. `--in-place` is hidden where it only raises an error."""
    rows = [_told(name, {"html": DRY_TOO}) for name in EDITS]
    return [click.Option(**row, hidden=row["param_decls"] == ("--in-place",) and not in_place) for row in rows]
