"""The commands that edit a checkpoint, made from the table of ops."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from paramend.cli import _ui
from paramend.formats.safetensors import SafetensorsFile
from paramend.ops import OPS
from paramend.plans import call
from paramend.rewriting import check_output, plan_rewrite, write

_NEGATIVE = re.compile(r"-(\.?[0-9]|inf|nan)", re.IGNORECASE)


def _number(text: str) -> int | float | bool:
    """A number as it is typed: 3 is an int, 0.5, inf and nan are floats, true and false are bools."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    raise click.BadParameter(f"{text!r} is no number; write 3, 0.5, 1e-3, inf, nan, true or false")


@dataclass(frozen=True, slots=True)
class Verb:
    """One command.

    Attributes:
        name: as it is typed.
        op: the row of the table of ops.
        argument: which argument of the op follows the selector, and how it is shown and read.
    """

    name: str
    op: str
    argument: tuple[str, str, Callable[[str], Any]] | None = None


VERBS = (
    Verb("zero", "zero"),
    Verb("fill", "fill", ("value", "VALUE", _number)),
    Verb("scale", "multiply", ("value", "FACTOR", _number)),
    Verb("noise", "noise", ("std", "STD", _number)),
    Verb("cast", "cast", ("dtype", "DTYPE", str)),
)


class _Command(click.Command):
    """A command whose last argument may be a negative number, which click would take for an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" not in args:
            takes = {name for p in self.params if isinstance(p, click.Option) and not p.is_flag for name in p.opts}
            before = ["", *args]
            last = [
                arg for arg, prior in zip(args, before, strict=False) if _NEGATIVE.match(arg) and prior not in takes
            ]
            if last:
                args = [arg for arg in args if arg not in last] + ["--", *last]
        return super().parse_args(ctx, args)


def _command(verb: Verb) -> click.Command:
    op = OPS[verb.op]

    def run(
        path: Path, selector: str, out: Path | None, force: bool, dry_run: bool, as_json: bool, **args: Any
    ) -> None:
        if out is None and not dry_run:
            raise click.UsageError("-o OUT is needed: the checkpoint itself is never changed.")
        with SafetensorsFile(path) as file:
            made = plan_rewrite(file, selector, call(verb.op, args))
            data: dict[str, Any] = {"source": str(path), "path": None if out is None else str(out), "dry_run": dry_run}
            if out is not None:
                check_output(file, made, out, force=force)
            if dry_run or out is None:
                data |= made.to_dict()
                done = "dry run: nothing was written"
            else:
                with _ui.bar(f"writing {out.name}") as progress:
                    report = write(file, made, out, force=force, progress=progress)
                data |= report.to_dict()
                done = report.summary
        if as_json:
            _ui.emit(data)
        else:
            _ui.show_lines(str(made).split("\n"), header=True)
        _ui.say(done)

    params: list[click.Parameter] = [
        click.Argument(["path"], type=click.Path(path_type=Path)),
        click.Argument(["selector"]),
    ]
    if verb.argument is not None:
        name, metavar, kind = verb.argument
        params.append(click.Argument([name], metavar=metavar, type=kind))
    if "seed" in op.parameters:
        seed = click.IntRange(min=0)
        params.append(click.Option(["--seed"], type=seed, default=0, show_default=True, help="Seed of the noise."))
    params += [
        click.Option(["-o", "--out"], type=click.Path(path_type=Path), metavar="OUT", help="The file to write."),
        click.Option(["--force"], is_flag=True, help="Replace OUT if it exists."),
        click.Option(["--dry-run"], is_flag=True, help="Show the table of what would change, and write nothing."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print data as JSON."),
    ]
    first = f"{op.says[0].upper()}{op.says[1:]}, in the leaves that SELECTOR chooses."
    rest = (
        "PATH is read and never changed; OUT gets the edited leaves and all other bytes as they are.\n\n"
        "Exit status: 0 done; 2 an unreadable or damaged file, a selector that chooses nothing, an edit that does "
        "not fit a chosen leaf, or an OUT that cannot be written."
    )
    return _Command(verb.name, callback=run, params=params, help=f"{first}\n\n{rest}")


zero, fill, scale, noise, cast = map(_command, VERBS)
