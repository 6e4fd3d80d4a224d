"""The commands that edit a checkpoint, made from the table of ops."""

import re
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.cli.writing import edit_checkpoint, options
from paramend.edits.arguments import read_number
from paramend.edits.ops import OPS
from paramend.edits.plan import call
from paramend.errors import BadArgument, BadRecipe, SpecMismatch
from paramend.leaves.leaves import Stored
from paramend.leaves.specs import Spec
from paramend.recipes.donors import Donors
from paramend.reports import wording
from paramend.selectors.selector import resolve, sel

_NEGATIVE = re.compile(r"-(\.?[0-9]|inf|nan)", re.IGNORECASE)


def _number(text: str) -> int | float | bool:
    """A number as it is typed: 3 is an int, 0.5, inf and nan are floats, true and false are bools."""
    try:
        return read_number(text)
    except BadArgument as error:
        raise click.BadParameter(f"{text!r} is no number; write {error.hint}") from None


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
    Verb(
        "set",
        "set",
        ("value", "VALUE", str),
        "Replace the leaves that SELECTOR chooses. VALUE is a .npy file; another checkpoint, whose leaves of the same "
        "paths are taken; or OTHER:PATH, one of its leaves. Shapes and dtypes must agree.",
    ),
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


def _set(checkpoint: Checkpoint, selector: str, numbers: Sequence[int], value: str) -> Checkpoint:
    """The checkpoint with leaves replaced by what VALUE names."""
    path = checkpoint.path
    name, leaf = _split(value)
    by = sel(selector)
    found = Donors().values(name, leaf, checkpoint, [(number, by) for number in numbers])
    wrong = [number for number, array in found.items() if _spec(array) != checkpoint.spec(number)]
    if wrong:
        shape, dtype = checkpoint.spec(wrong[0]).shape, checkpoint.spec(wrong[0]).dtype
        given = _spec(found[wrong[0]])
        of, chosen, to = (path, selector, given.dtype) if name.endswith(".npy") else (name, leaf or selector, dtype)
        cast = f"paramend cast {shlex.quote(str(of))} {shlex.quote(chosen)} {to} -o OUT"
        raise SpecMismatch(
            f"{checkpoint.index.path(wrong[0])} is {checkpoint.spec(wrong[0])}, and {value} has {given} for it"
            + (f"; {wording.plural(len(wrong) - 1, 'more leaf does', 'more leaves do')} not fit" if wrong[1:] else ""),
            hint=cast if given.shape == shape else "",
        )
    return checkpoint.edited({number: call("set", {"value": array}) for number, array in found.items()})


def _spec(value: Any) -> Spec:
    return value.spec if isinstance(value, Stored) else Spec(value.shape, value.dtype.name)


def _split(value: str) -> tuple[str, str | None]:
    """A file, and the leaf after its colon; names of files may hold colons too."""
    cuts = [at for at, char in enumerate(value) if char == ":"]
    if not cuts or Path(value).exists():
        return value, None
    at = next((at for at in reversed(cuts) if Path(value[:at]).exists()), cuts[0])
    return value[:at], value[at + 1 :]


def _recipe(verb: Verb, selector: str, args: dict[str, Any]) -> str:
    """What was typed as a recipe, with files by their names alone; "" if it cannot be written as one."""
    from paramend.recipes.recipe import Recipe  # only records ask for it

    if verb.name == "set":
        name, leaf = _split(args["value"])
        args = {"from": Path(name).name} | ({} if leaf is None else {"leaf": leaf})
    with suppress(BadRecipe):
        return str(Recipe([{verb.op or verb.name: {"at": selector, **args}}]))
    return ""


def _command(verb: Verb) -> click.Command:
    op = OPS[verb.op] if verb.op else None

    def edited(checkpoint: Checkpoint, selector: str, args: dict[str, Any]) -> Checkpoint:
        numbers = resolve(selector, checkpoint)
        if verb.name == "delete":
            return checkpoint.deleted(numbers)
        if verb.name == "rename":
            return checkpoint.moved(sel(selector), numbers, args["to"])
        if verb.name == "set":
            return _set(checkpoint, selector, numbers, args["value"])
        return checkpoint.edited(dict.fromkeys(numbers, call(verb.op, args)))

    def run(
        path: Path,
        selector: str,
        out: str | None,
        in_place: bool,
        link: bool,
        force: bool,
        record: bool,
        dry_run: bool,
        as_json: bool,
        **args: Any,
    ) -> None:
        def edit(checkpoint: Checkpoint) -> Checkpoint:
            found = edited(checkpoint, selector, args)
            return Checkpoint(found.source, found.plan, _recipe(verb, selector, args)) if record else found

        edit_checkpoint(
            path,
            edit,
            out=out,
            in_place=in_place,
            link=link,
            force=force,
            record=record,
            dry_run=dry_run,
            as_json=as_json,
        )

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
    params += options()
    says = verb.says or f"{OPS[verb.op].says[0].upper()}{OPS[verb.op].says[1:]}, in the leaves that SELECTOR chooses."
    rest = (
        "With -o, PATH, a file or a directory, is read and never changed; OUT gets the edited leaves and all other "
        "bytes as they are. With --in-place only the bytes of the chosen leaves are written.\n\n"
        "Exit status: 0 done; 2 an unreadable or damaged file, a selector that chooses nothing, an edit that does "
        "not fit a chosen leaf, or an OUT that cannot be written."
    )
    return _Command(verb.name, callback=run, params=params, help=f"{says}\n\n{rest}")


zero, fill, scale, set, noise, cast, delete, rename = map(_command, VERBS)
