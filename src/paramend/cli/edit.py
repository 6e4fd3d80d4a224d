"""The commands that edit a checkpoint: one for each row of the table of edits, and `delete` and `rename`."""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import click

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.cli.choosing import EXCEPT, Chosen, chosen
from paramend.cli.examples import shown
from paramend.cli.opening import raw
from paramend.cli.options import ADDRESS, edits
from paramend.cli.writing import edit_checkpoint
from paramend.disk.urls import path_of
from paramend.edits.arguments import ARRAY, NUMBER, TEXT, Value
from paramend.edits.call import Op
from paramend.edits.ops import OPS
from paramend.edits.plan import call
from paramend.edits.weights import weighed
from paramend.errors import BadArgument, BadRecipe, SpecMismatch
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import Spec
from paramend.recipes.donors import Donors
from paramend.reports import wording

Args = Mapping[str, Any]

_NEGATIVE = re.compile(r"-(\.?[0-9]|inf|nan)", re.IGNORECASE)
_FILE = "a .npy file, another checkpoint, whose leaves at the same paths are taken, or OTHER:PATH, one of its leaves"
_IN_PLACE = "With --in-place only the bytes of the selected leaves are written, and checksums over them."
_REST = (
    "With -o, PATH, a file or a directory, is only read; OUT gets the edited leaves and all other bytes as they are. "
    f"{_IN_PLACE}\n\n"
    "Exit status: 0 done; 2 an unreadable or damaged file, a selector that matches nothing, an edit that does "
    "not fit a selected leaf, or an OUT that cannot be written."
)


def _typed(value: Value) -> Callable[[Any], Any]:
    """The parser of a typed argument. Where an array is allowed, so is the name of a file."""

    def read(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        try:
            return value.typed(text)
        except BadArgument as error:
            if value.array and (not value.example or path_of(_split(text)[0]).exists()):
                if value is ARRAY and re.fullmatch(r"-?[\d.]+(e-?\d+)?", text) and not path_of(text).exists():
                    raise click.BadParameter(f"{text} is no file; `paramend fill` takes a number") from None
                return _File(text)
            message = f"{str(error).partition(chr(10))[0]}{', nor an existing file' if value.array else ''}"
            raise click.BadParameter(f"{message}; write {error.hint}" if error.hint else message) from None

    return read


class _File(str):
    """The name of a file, perhaps with one of its leaves, in place of a number."""

    __slots__ = ()


class _Command(click.Command):
    """A command whose arguments may be negative numbers, which click would take for options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        takes = {name for p in self.params if isinstance(p, click.Option) and not p.is_flag for name in p.opts}
        given, values = list[str](), list[str]()
        rest = iter(args)
        for arg in rest:
            if arg == "--":
                values += rest
            elif arg in takes:
                given += [arg, *islice(rest, 1)]
            elif arg.startswith("-") and arg != "-" and not _NEGATIVE.match(arg):
                given.append(arg)
            else:
                values.append(arg)
        arguments = [p for p in self.params if isinstance(p, click.Argument)]
        asks = ctx.resilient_parsing or {*ctx.help_option_names} & {*given}
        if len(values) < len(arguments) and not asks:
            raise click.MissingParameter(ctx=ctx, param=arguments[len(values)])
        return super().parse_args(ctx, [*given, "--", *values])


def _donated(checkpoint: Any, op: Op, choice: Chosen, numbers: Sequence[int], name: str, args: Args) -> Checkpoint:
    """The checkpoint with an edit whose argument `name` names the file that the arrays come from."""
    value = args[name]
    file, leaf = _split(value)
    by = choice.named
    found = Donors(raw=raw()).values(file, leaf, checkpoint, [(number, by) for number in numbers])
    calls = {number: call(op.name, {**args, name: array}) for number, array in found.items()}
    wrong = list(_refused(checkpoint, calls)) if name == "value" else []
    if wrong:
        spec, given = checkpoint.spec(wrong[0]), _spec(found[wrong[0]])
        of, leaves, to = str(checkpoint.path), choice.typed, given.dtype
        if not file.endswith(".npy"):
            of, leaves, to = file, shlex.quote(leaf) if leaf else choice.typed, spec.dtype
        cast = f"paramend cast {shlex.quote(of)} {leaves} {to} -o OUT"
        raise SpecMismatch(
            f"{checkpoint.index.path(wrong[0])} is {spec}, and {value} has {given} for it"
            + (f"; {wording.plural(len(wrong) - 1, 'more leaf does', 'more leaves do')} not fit" if wrong[1:] else ""),
            hint=cast if given.shape == spec.shape else "",
        )
    made: Checkpoint = checkpoint.edited(calls)
    return made


def _refused(checkpoint: Any, calls: Mapping[int, Any]) -> Iterator[int]:
    for number, each in calls.items():
        try:
            each.spec(checkpoint.spec(number))
        except SpecMismatch:
            yield number


def _spec(value: Any) -> Spec:
    return value.spec if isinstance(value, Origin) else Spec(value.shape, value.dtype.name)


def _split(value: str) -> tuple[str, str | None]:
    """A file, and the leaf after its colon; names of files may hold colons too."""
    cuts = [at for at, char in enumerate(value) if char == ":"]
    if not cuts or path_of(value).exists():
        return value, None
    at = next((at for at in reversed(cuts) if path_of(value[:at]).exists()), cuts[0])
    return value[:at], value[at + 1 :]


def _recipe(name: str, choice: Chosen, args: Args) -> str:
    """The command as a recipe, with file names without folders; "" if it cannot be written as one."""
    from paramend.recipes.recipe import Recipe  # only for records

    body = choice.to_dict()
    for key, value in args.items():
        if isinstance(value, _File):
            file, leaf = _split(value)
            body |= {"from": path_of(file).name} | ({} if leaf is None else {"leaf": leaf})
        elif value is not None and (key, value) != ("requantize", "amax"):
            body[key] = value
    with suppress(BadRecipe):
        return str(Recipe([{name: body}], raw=raw()))
    return ""


def _command(
    name: str,
    says: str,
    params: list[click.Parameter],
    edited: Callable[[Any, Chosen, Sequence[int], Args], Checkpoint],
    *,
    in_place: bool,
    examples: Sequence[str] = (),
) -> click.Command:
    """A command that edits the leaves that selectors match, named like the recipe step that does the same. `params` are
    what it takes besides PATH, SELECTOR... and the common options; `edited` makes of (checkpoint, choice, chosen
    leaves, args) the edited checkpoint. Where the files themselves cannot be edited, `--in-place` is hidden."""

    def run(path: Path, selectors: tuple[str, ...], excepts: tuple[str, ...], **given: Any) -> None:
        choice = chosen(selectors, excepts)
        args = {str(param.name): given.pop(str(param.name)) for param in params}

        def edit(checkpoint: Checkpoint) -> Checkpoint:
            leaves = weighed(checkpoint)
            found = edited(leaves, choice, choice.numbers(leaves), args)
            return found.planned(found.plan, _recipe(name, choice, args)) if given["record"] else found

        edit_checkpoint(path, edit, patches=in_place, **given)

    first = [
        click.Argument(["path"], type=ADDRESS),
        click.Argument(["selectors"], metavar="SELECTOR...", nargs=-1, required=True),
    ]
    rest = [click.Option(["--except", "excepts"], **EXCEPT), *edits(in_place=in_place)]
    whole = _REST if in_place else _REST.replace(f" {_IN_PLACE}", "")
    text = f"{says}\n\n{whole}"
    return _Command(name, callback=run, params=[*first, *params, *rest], help=text, epilog=shown(name, examples))


def edit_command(op: Op) -> click.Command:
    """The command of a row of the table of edits."""
    params: list[click.Parameter] = []
    told = []
    for name, value in op.arguments.items():
        said = f"{value.says[0].upper()}{value.says[1:]}."
        if name in op.optional:
            params.append(
                click.Option(
                    [f"--{name}"],
                    type=_typed(value),
                    metavar=name.upper(),
                    help=said,
                    default=op.optional[name],
                    show_default=True,
                )
            )
        else:
            params.append(click.Argument([name], metavar=name.upper(), type=_typed(value)))
            # A list of numbers is not typed; it comes from a file.
            takes = (
                f"{NUMBER.says}, or {_FILE}" if value.array and value.example else _FILE if value.array else value.says
            )
            such = "" if value.scalar or value.array or not value.example else f", such as {value.example}"
            told.append(f"{name.upper()}: {takes}{such}.")

    def edited(checkpoint: Any, choice: Chosen, numbers: Sequence[int], args: Args) -> Checkpoint:
        files = [key for key, value in args.items() if isinstance(value, _File)]
        if files:
            return _donated(checkpoint, op, choice, numbers, files[0], args)
        made: Checkpoint = checkpoint.edited(dict.fromkeys(numbers, call(op.name, args)))
        return made

    says = f"In the leaves that a SELECTOR matches, {op.says}."
    if told:
        says += "\n\n\b\n" + "\n".join(told) if max(map(len, told)) < 70 else "\n\n" + " ".join(told)
    examples = [value.example or f"{name}.npy" for name, value in op.arguments.items() if name not in op.optional]
    return _command(op.name, says, params, edited, in_place=op.keeps_spec, examples=examples)


delete = _command(
    "delete",
    "Delete the leaves that a SELECTOR matches.",
    [],
    lambda checkpoint, choice, numbers, args: checkpoint.deleted(numbers),
    in_place=False,
)
rename = _command(
    "rename",
    "Give the leaves that a SELECTOR matches new paths: what its wildcards matched replaces the same wildcards in TO, "
    "where <n> may be <n+1>.",
    [click.Argument(["to"], metavar="TO", type=_typed(TEXT))],
    lambda checkpoint, choice, numbers, args: checkpoint.moved(choice.named, numbers, args["to"]),
    in_place=False,
)


def named(name: str) -> click.Command | None:
    """The command of an edit, by its name or an alias."""
    return next((edit_command(op) for op in OPS.values() if not op.code and name in (op.name, *op.aliases)), None)
