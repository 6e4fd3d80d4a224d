"""The commands that edit a checkpoint, made from the table of ops."""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from paramend.checkpoints import Checkpoint
from paramend.checkpoints import open as open_checkpoint
from paramend.cli.writing import carry_out, patch_in_place
from paramend.ops import OPS
from paramend.plans import Plan, call
from paramend.selectors import resolve, sel

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
        op: the row of the table of ops; "" for changes of structure.
        argument: which argument of the op follows the selector, and how it is shown and read.
        says: what it does, where no row of the table says it.
    """

    name: str
    op: str
    argument: tuple[str, str, Callable[[str], Any]] | None = None
    says: str = ""


VERBS = (
    Verb("zero", "zero"),
    Verb("fill", "fill", ("value", "VALUE", _number)),
    Verb("scale", "multiply", ("value", "FACTOR", _number)),
    Verb("noise", "noise", ("std", "STD", _number)),
    Verb("cast", "cast", ("dtype", "DTYPE", str)),
    Verb("delete", "", says="Leave the leaves that SELECTOR chooses out of the checkpoint."),
    Verb(
        "rename",
        "",
        ("to", "TO", str),
        "Give the leaves that SELECTOR chooses new paths: what its wildcards matched goes where the same wildcards "
        "stand in TO, <n> also as <n+1>.",
    ),
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
    op = OPS[verb.op] if verb.op else None

    def edited(made: Plan, selector: str, args: dict[str, Any]) -> Plan:
        if op is not None:
            return made.edited(dict.fromkeys(resolve(selector, made.leaves), call(op.name, args)))
        checkpoint = Checkpoint(made.leaves, made)
        numbers = resolve(selector, checkpoint)
        if verb.name == "delete":
            return checkpoint.deleted(numbers).plan
        return checkpoint.moved(sel(selector), numbers, args["to"]).plan

    def run(
        path: Path,
        selector: str,
        out: str | None,
        in_place: bool,
        link: bool,
        force: bool,
        dry_run: bool,
        as_json: bool,
        **args: Any,
    ) -> None:
        if in_place and (out is not None or link or force):
            raise click.UsageError("--in-place changes PATH itself: it goes with no -o, --link or --force.")
        if out is None and not (dry_run or in_place):
            raise click.UsageError("-o OUT or --in-place is needed.")
        if in_place:
            patch_in_place(path, lambda plan: edited(plan, selector, args), dry_run=dry_run, as_json=as_json)
            return
        with open_checkpoint(path) as checkpoint:
            made = edited(checkpoint.plan, selector, args)
            carry_out(made, path, out, force=force, dry_run=dry_run, as_json=as_json, link=link)

    params: list[click.Parameter] = [
        click.Argument(["path"], type=click.Path(path_type=Path)),
        click.Argument(["selector"]),
    ]
    if verb.argument is not None:
        name, metavar, kind = verb.argument
        params.append(click.Argument([name], metavar=metavar, type=kind))
    if op is not None and "seed" in op.parameters:
        seed = click.IntRange(min=0)
        params.append(click.Option(["--seed"], type=seed, default=0, show_default=True, help="Seed of the noise."))
    params += [
        click.Option(["-o", "--out"], metavar="OUT", help="The file or directory to write."),
        click.Option(["--in-place"], is_flag=True, help="Change PATH itself; `paramend undo PATH` takes it back."),
        click.Option(["--link"], is_flag=True, help="Hard-link the shards in which nothing changes."),
        click.Option(["--force"], is_flag=True, help="Replace OUT if it exists."),
        click.Option(["--dry-run"], is_flag=True, help="Show the table of what would change, and write nothing."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print data as JSON."),
    ]
    says = verb.says or f"{OPS[verb.op].says[0].upper()}{OPS[verb.op].says[1:]}, in the leaves that SELECTOR chooses."
    rest = (
        "With -o, PATH, a file or a directory, is read and never changed; OUT gets the edited leaves and all other "
        "bytes as they are. With --in-place only the bytes of the chosen leaves are written.\n\n"
        "Exit status: 0 done; 2 an unreadable or damaged file, a selector that chooses nothing, an edit that does "
        "not fit a chosen leaf, or an OUT that cannot be written."
    )
    return _Command(verb.name, callback=run, params=params, help=f"{says}\n\n{rest}")


zero, fill, scale, noise, cast, delete, rename = map(_command, VERBS)
