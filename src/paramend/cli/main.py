"""The command `paramend`: its subcommands by name, each opened when it is called."""

import importlib
import signal
import sys
from dataclasses import dataclass
from typing import Any

import click

from paramend.cli import _ui
from paramend.errors import MissingExtra, ParamendError
from paramend.reports import wording


@dataclass(frozen=True, slots=True)
class Row:
    """A subcommand: its name, the module that holds it, and what it does.

    `paramend --help` reads this table, so that it opens no framework.
    """

    name: str
    module: str
    says: str


ROWS = (
    Row("show", "paramend.cli.look", "List the leaves of a checkpoint."),
    Row("diff", "paramend.cli.compare", "Compare two checkpoints leaf by leaf, or hold that only some leaves changed."),
    Row("zero", "paramend.cli.edit", "Write a checkpoint with leaves set to 0."),
    Row("fill", "paramend.cli.edit", "Write a checkpoint with leaves set to a number."),
    Row("scale", "paramend.cli.edit", "Write a checkpoint with leaves multiplied by a number."),
    Row("set", "paramend.cli.edit", "Write a checkpoint with leaves from another file."),
    Row("noise", "paramend.cli.edit", "Write a checkpoint with noise added to leaves."),
    Row("cast", "paramend.cli.edit", "Write a checkpoint with leaves in another dtype."),
    Row("delete", "paramend.cli.edit", "Write a checkpoint without some leaves."),
    Row("rename", "paramend.cli.edit", "Write a checkpoint with leaves under other paths."),
    Row("apply", "paramend.cli.recipe", "Carry out a recipe: edits as data, in a YAML or JSON file."),
    Row("convert", "paramend.cli.make", "Write a checkpoint in another format, or in files of another size."),
    Row("graft", "paramend.cli.make", "Write a checkpoint that starts from the leaves of another."),
    Row("stack", "paramend.cli.stack", "Write a checkpoint whose numbered layers are one stack."),
    Row("unstack", "paramend.cli.stack", "Write a checkpoint with the layers of a stack side by side."),
    Row("ablate", "paramend.cli.ablate", "Score a checkpoint without each of its parts; write nothing."),
    Row("deepen", "paramend.cli.grow", "Write a model with more layers, or fewer, made of those it has."),
    Row("undo", "paramend.cli.undo", "Take back the last edit that was made in place."),
    Row("history", "paramend.cli.undo", "List the edits that a checkpoint's record tells of, and those made in place."),
    Row("verify", "paramend.cli.undo", "Hold a checkpoint against the record that it carries."),
    Row("demo", "paramend.cli.demo", "Run the five surgeries on a classifier of handwritten digits."),
    Row("lesson", "paramend.cli.learn", "Learn the five surgeries: worked problems that grade your answer."),
)


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [row.name for row in ROWS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        row = next((row for row in ROWS if row.name == cmd_name), None)
        if row is None:
            return None
        try:
            found: click.Command = getattr(importlib.import_module(row.module), row.name)
        except ImportError as error:
            if isinstance(error, MissingExtra):
                raise
            raise MissingExtra(
                f"`paramend {row.name}` needs a package that cannot be imported: {error}",
                hint="pip install 'paramend[demo]'",
            ) from error
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.list_commands(ctx):
            near = wording.closest(name, self.list_commands(ctx), limit=1)
            did = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"There is no command {name!r}.{did}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(row.name, row.says) for row in ROWS])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            _ui.nobody_reads()
            raise SystemExit(128 + signal.SIGPIPE) from None
        except KeyboardInterrupt:
            raise SystemExit(128 + signal.SIGINT) from None
        except (ParamendError, OSError) as error:
            raise _ui.refusal(error) from error
        return result


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="paramend")
def cli() -> None:
    """Surgery for model parameters: pick leaves by path, change exactly those, know that nothing else moved.

    Quote selectors, so that the shell leaves them alone: paramend show model.safetensors '**/bias'
    """


def main() -> None:
    """Runs the command line and ends the process."""
    for stream in (sys.stdout, sys.stderr):
        # Names may hold what the terminal's encoding lacks.
        getattr(stream, "reconfigure", lambda **_: None)(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ui.stop)
    try:
        cli(prog_name="paramend")
    except BaseException:
        if _ui.stopped:  # a compiled module that is just being imported turns the exception into an ImportError
            raise SystemExit(128 + _ui.stopped[0]) from None
        raise
