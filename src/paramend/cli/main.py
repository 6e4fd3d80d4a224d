"""The command `paramend`: its subcommands by name, each imported when it is called."""

import ast
import importlib
import signal
import sys
from dataclasses import dataclass
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

import click

from paramend.cli import _ui
from paramend.cli.opening import takes_raw
from paramend.errors import MissingExtra, ParamendError
from paramend.reports import wording


@dataclass(frozen=True, slots=True)
class CommandRow:
    """A subcommand: `paramend --help` reads these rows, so that it imports no framework.

    Attributes:
        name: its name, as it is typed.
        module: the module that defines it.
        says: what it does.
        aliases: its other names.
        also: words that users may look for it by.
        opens: whether it opens checkpoints, and so takes `--raw`.
    """

    name: str
    module: str
    says: str
    aliases: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    opens: bool = True


# Without the edits of values, which `edits()` finds.
ROWS = (
    CommandRow("show", "paramend.cli.look", "List the leaves of a checkpoint."),
    CommandRow(
        "diff", "paramend.cli.compare", "Compare two checkpoints leaf by leaf; check that only some leaves changed."
    ),
    CommandRow("delete", "paramend.cli.edit", "Write a checkpoint without some leaves."),
    CommandRow("rename", "paramend.cli.edit", "Write a checkpoint with leaves under other paths."),
    CommandRow("apply", "paramend.cli.recipe", "Apply a recipe: edits as data, in a YAML or JSON file."),
    CommandRow("convert", "paramend.cli.make", "Write a checkpoint in another format, or in files of another size."),
    CommandRow("graft", "paramend.cli.make", "Write a checkpoint that starts from the leaves of another."),
    CommandRow("stack", "paramend.cli.stack", "Write a checkpoint whose numbered layers are one stack."),
    CommandRow("unstack", "paramend.cli.stack", "Write a checkpoint with the layers of a stack under numbered names."),
    CommandRow("ablate", "paramend.cli.ablate", "Score a checkpoint without each of its parts; write nothing."),
    CommandRow("deepen", "paramend.cli.grow", "Write a model with more layers, or fewer, made from those it has."),
    CommandRow("undo", "paramend.cli.undo", "Take back the last edit that was made in place.", opens=False),
    CommandRow(
        "history", "paramend.cli.undo", "List the edits in a checkpoint's record, and those made in place.", opens=False
    ),
    CommandRow("verify", "paramend.cli.undo", "Check a checkpoint against the record that it carries.", opens=False),
    CommandRow(
        "demo", "paramend.cli.demo", "Run the five surgeries on a classifier of handwritten digits.", opens=False
    ),
    CommandRow(
        "lesson", "paramend.cli.learn", "Learn the five surgeries: worked problems that grade your answer.", opens=False
    ),
    CommandRow("help", "paramend.cli.main", "Show this text, or that of a command.", opens=False),
)


@cache
def edits() -> tuple[CommandRow, ...]:
    """The rows of the table of edits that are commands.

    The table is parsed, not imported: importing it imports numpy, and `--help` would take twice as long.
    """
    table = util.find_spec("paramend.edits.ops")
    assert table is not None and table.origin is not None
    found = []
    tree = ast.parse(Path(table.origin).read_text(encoding="utf-8"))
    for verb in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for row in verb.decorator_list:
            if not (isinstance(row, ast.Call) and isinstance(row.func, ast.Name) and row.func.id == "edit"):
                continue
            given = {option.arg: option.value for option in row.keywords}
            if "takes" not in given and len(verb.args.args) > 1:  # it takes code
                continue
            aliases, also = (ast.literal_eval(given[key]) if key in given else () for key in ("aliases", "also"))
            says = str(ast.literal_eval(row.args[0]))
            found.append(CommandRow(verb.name, "paramend.cli.edit", f"{says[0].upper()}{says[1:]}.", aliases, also))
    return tuple(found)


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [row.name for row in (*ROWS, *edits())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        row = next((row for row in ROWS if row.name == cmd_name), None)
        try:
            if row is not None:
                found: click.Command = getattr(importlib.import_module(row.module), row.name)
                return takes_raw(found) if row.opens else found
            if any(cmd_name in (row.name, *row.aliases) for row in edits()):
                from paramend.cli.edit import named  # imports the engines

                made = named(cmd_name)
                return made and takes_raw(made)
        except ImportError as error:
            if isinstance(error, MissingExtra):
                raise
            raise MissingExtra(
                f"`paramend {cmd_name}` needs a package that cannot be imported: {error}",
                hint="pip install 'paramend[demo]'",
            ) from error
        return None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            ctx.fail(_unknown(name))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Edits of the leaves that a selector matches"):
            formatter.write_dl([(", ".join((row.name, *row.aliases)), row.says) for row in edits()])
        with formatter.section("Commands"):
            formatter.write_dl([(row.name, row.says) for row in ROWS])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            _ui.nobody_reads()
            raise SystemExit(128 + signal.SIGPIPE) from None
        except (ParamendError, OSError) as error:
            raise _ui.refusal(error) from error
        return result


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="paramend")
def cli() -> None:
    """Surgery for model parameters: select leaves by path, change exactly those, and know that nothing else moved.

    Quote selectors, so that the shell leaves them alone: paramend show model.safetensors '**/bias'
    """


@click.command()
@click.argument("command", required=False)
@click.pass_context
def help(ctx: click.Context, command: str | None) -> None:
    """Show what `paramend --help` shows, or `paramend COMMAND --help`."""
    top = ctx.find_root()
    found = cli if command is None else cli.get_command(top, command)
    if found is None:
        ctx.fail(_unknown(str(command)))
    click.echo(found.get_help(top if command is None else click.Context(found, parent=top, info_name=command)))


def _unknown(name: str) -> str:
    rows = (*ROWS, *edits())
    near = [row.name for row in rows if name in row.also]
    near = near or wording.closest(name, [known for row in rows for known in (row.name, *row.aliases)], limit=1)
    return f"There is no command {name!r}. {f'Did you mean {near[0]!r}?' if near else 'To list them: paramend help'}"


def main() -> None:
    """Run the command line and end the process."""
    for stream in (sys.stdout, sys.stderr):
        # Names may contain characters that the terminal's encoding lacks.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ui.stop)
    try:
        cli(prog_name="paramend")
    except BaseException:
        if _ui.stopped:  # a compiled module being imported turns the exception into an ImportError
            raise SystemExit(128 + _ui.stopped[0]) from None
        raise
