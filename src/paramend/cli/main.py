"""The command `paramend`: its subcommands by name, each imported when it is called."""

import ast
import importlib
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

import click

from paramend.cli import _ui
from paramend.cli.completion import completes
from paramend.cli.examples import shown, to_try
from paramend.cli.explain import TOPICS
from paramend.cli.mistakes import Typed, exists, incomplete, no_such_option, told
from paramend.cli.opening import takes_raw
from paramend.disk.urls import path_of
from paramend.errors import MissingExtra, ParamendError, masked
from paramend.reports import wording


@dataclass(frozen=True, slots=True)
class CommandRow:
    """A subcommand: `paramend --help` reads these rows, so that it imports no framework. `also` are words that users
    may look for it by. One that `opens` checkpoints takes `--raw`."""

    name: str
    module: str
    says: str
    aliases: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    opens: bool = True


def _row(name: str, module: str, says: str, also: str = "", *, opens: bool = True) -> CommandRow:
    return CommandRow(name, module, says, also=tuple(also.split()), opens=opens)


# Without the edits of values, which `edits()` finds.
ROWS = (
    _row("show", "look", "List the leaves of a checkpoint.", "list ls inspect info stats open load print cat"),
    _row(
        "diff", "compare", "Compare two checkpoints leaf by leaf; check that only some leaves changed.", "compare cmp"
    ),
    _row("delete", "edit", "Write a checkpoint without some leaves.", "rm remove drop prune"),
    _row("rename", "edit", "Write a checkpoint with leaves under other paths.", "mv move"),
    _row("apply", "recipe", "Apply a recipe, in a YAML or JSON file, or a delta.", "patch recipe recipes run edit"),
    _row("delta", "delta", "Write what is different in one model, which makes it of another.", opens=False),
    _row("config", "recipe", "Read or edit the configuration beside the weights."),
    _row(
        "convert", "make", "Write a checkpoint in another format, or in files of another size.", "save export cp copy"
    ),
    _row("graft", "make", "Write a checkpoint that starts from the leaves of another.", "init transfer"),
    _row("port", "port", "Write the parameters of a model for one of another framework."),
    _row("stack", "stack", "Write a checkpoint whose numbered layers are one stack.", "stack_layers"),
    _row("unstack", "stack", "Write a checkpoint with the layers of a stack under numbered names.", "unstack_layers"),
    _row("concat", "stack", "Write a checkpoint in which several leaves are one.", "fuse"),
    _row("interleave", "stack", "Write a checkpoint in which several leaves are one, in turns."),
    _row("split", "stack", "Write a checkpoint in which a leaf is cut into several."),
    _row("layout", "stack", "Write a checkpoint stored another way, by the rules of a layout."),
    _row("insert", "make", "Write a checkpoint with leaves of another that it lacks."),
    _row("part", "make", "Write leaves of a checkpoint as a model of their own."),
    _row("fold", "merge", "Write a checkpoint with adapters added to its weights.", "lora"),
    _row("extract", "merge", "Write what training changed as an adapter.", "lora"),
    _row("merge", "merge", "Write a model made of several.", "average soup slerp ties"),
    _row("tie", "stack", "Write a checkpoint whose head is its embedding."),
    _row("untie", "stack", "Write a checkpoint whose head has a weight of its own."),
    _row("dequantize", "codes", "Write a checkpoint with quantised weights as floats."),
    _row("quantize", "codes", "Write a checkpoint with weights in a quantised scheme."),
    _row("ablate", "ablate", "Score a checkpoint without each of its parts; write nothing."),
    _row("deepen", "grow", "Write a model with more layers, or fewer, made from those it has.", "grow"),
    _row("widen", "widths", "Write a model with longer axes, which computes what it did.", "grow"),
    _row("narrow", "widths", "Write a model with some places of its axes.", "shrink"),
    _row("experts", "grow", "Write a model with some of its experts, or with each several times.", "prune"),
    _row("upcycle", "grow", "Write a dense model as a mixture of experts.", "moe"),
    _row("vocabulary", "tokens", "Write a model with some of its tokens, or more.", "tokenizer embedding"),
    _row("undo", "undo", "Take back the last edit that was made in place.", "revert rollback restore", opens=False),
    _row(
        "history",
        "undo",
        "List the edits in a checkpoint's record, and those made in place.",
        "log record",
        opens=False,
    ),
    _row(
        "verify", "undo", "Check a checkpoint against the record that it carries.", "check verify_record", opens=False
    ),
    _row("demo", "demo", "Run the five surgeries on a classifier of handwritten digits.", opens=False),
    _row(
        "lesson",
        "learn",
        "Learn the five surgeries: worked problems that grade your answer.",
        "lessons learn tutorial",
        opens=False,
    ),
    _row("explain", "explain", "Explain an error by its code, or list them.", "error", opens=False),
    _row("completion", "completion", "Let the shell complete commands, options and paths.", opens=False),
    _row("help", "main", "Show this text, or that of a command.", "man", opens=False),
)


@cache
def edits() -> tuple[CommandRow, ...]:
    """The rows of the table of edits that are commands. The table is parsed, not imported: importing it imports numpy,
    and `--help` would take twice as long."""
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
            found.append(CommandRow(verb.name, "edit", f"{says[0].upper()}{says[1:]}.", aliases, also))
    return tuple(found)


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [row.name for row in (*ROWS, *edits())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        row = next((row for row in ROWS if row.name == cmd_name), None)
        try:
            if row is not None:
                found: click.Command = getattr(importlib.import_module(f"paramend.cli.{row.module}"), row.name)
                found.epilog = shown(row.name)
                return completes(takes_raw(found)) if row.opens else found
            if any(cmd_name in (row.name, *row.aliases) for row in edits()):
                from paramend.cli.edit import named  # imports the engines

                made = named(cmd_name)
                return made and completes(takes_raw(made))
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
        found = super().resolve_command(ctx, args)
        if found[1] is not None:
            ctx.obj = Typed(str(found[0]), found[1], tuple(found[2]))
            lacks = incomplete(found[1], found[2])
            if lacks:
                raise click.UsageError(lacks, ctx=click.Context(found[1], parent=ctx, info_name=str(found[0])))
        return found

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
        except click.NoSuchOption as error:
            raise click.UsageError(no_such_option(error, self._all(ctx)), ctx=error.ctx) from error
        except click.UsageError as error:
            if masked(error.message) != error.message:
                raise click.UsageError(masked(error.message), ctx=error.ctx) from None
            raise
        except (ParamendError, OSError) as error:
            message = _ui.message_of(error)
            typed = ctx.obj if isinstance(ctx.obj, Typed) else None
            message = message if typed is None else told(message, error, typed, ctx)
            raise _ui.Refusal(message, getattr(error, "code", "")) from error
        return result

    def _all(self, ctx: click.Context) -> Iterator[tuple[str, click.Command]]:
        """The commands by name, without those whose packages are missing."""
        for name in self.list_commands(ctx):
            with suppress(MissingExtra):
                command = self.get_command(ctx, name)
                if command is not None:
                    yield name, command


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(package_name="paramend")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Surgery for model parameters: select leaves by path, change exactly those, and know that nothing else moved.

    Quote selectors, so that the shell leaves them alone: paramend show model.safetensors '**/bias'

    To read more of selectors: paramend help selectors
    """
    if ctx.invoked_subcommand is None:
        click.echo(to_try())


@click.command()
@click.argument("commands", metavar="[COMMAND]...", nargs=-1)
@click.pass_context
def help(ctx: click.Context, commands: tuple[str, ...]) -> None:
    """Show what `paramend --help` shows, or `paramend COMMAND --help`; `paramend help selectors` for selectors."""
    top = ctx.find_root()
    texts = [cli.get_help(top)] if not commands else []
    for name in commands:
        found = cli.get_command(top, name)
        if found is None and name not in TOPICS:
            ctx.fail(_unknown(name))
        told = None if found is None else found.get_help(click.Context(found, parent=top, info_name=name))
        texts.append(told or TOPICS[name].rstrip())
    click.echo("\n\n".join(texts))


def _unknown(name: str) -> str:
    rows = (*ROWS, *edits())
    said = f"There is no command {masked(name)!r}"
    near = [row.name for row in rows if name.lower() in row.also]
    near = near or wording.closest(name, [known for row in rows for known in (row.name, *row.aliases)], limit=1)
    there = exists(name)
    if near and not (there and path_of(name).is_file()):
        return f"{said}. Did you mean {near[0]!r}?"
    if name in TOPICS:
        return f"{said}; about {name}: paramend help {name}"
    if there:
        what = "directory" if path_of(name).is_dir() else "file"
        return f"{said}, but a {what}; to look at it: paramend show {shlex.quote(name)}"
    if name in sys.modules["paramend"].__all__:
        return f"{said}: pm.{name} is for Python. To list the commands: paramend help"
    return f"{said}. To list them: paramend help"


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
        if not _ui.stopped:  # a compiled module being imported turns the exception into an ImportError
            raise
    _ui.end_stopped()
