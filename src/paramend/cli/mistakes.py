"""What was probably meant by a command line that cannot be carried out: a better hint than the error has."""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from paramend.errors import BadCheckpoint, BadRecipe, CannotRead, NoMatch, SelectorError
from paramend.reports import wording

_RECIPES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Typed:
    """A subcommand as it was typed.

    Attributes:
        name: its name.
        command: the command.
        args: what follows the name.
    """

    name: str
    command: click.Command
    args: tuple[str, ...]

    def given(self, parent: click.Context) -> Mapping[str, Any]:
        """The values of its parameters, as far as they can be read."""
        with self.command.make_context(self.name, [*self.args], parent=parent, resilient_parsing=True) as context:
            return context.params

    def swapped(self, one: str, other: str) -> str:
        """The command with two of its words exchanged."""
        at, to = self.args.index(one), self.args.index(other)
        args = [*self.args]
        args[at], args[to] = other, one
        return f"paramend {shlex.join([self.name, *args])}"


def hint_for(error: Exception, typed: Typed, parent: click.Context) -> str:
    """What to type instead, or "" if the hint of the error is as good."""
    given = typed.given(parent)
    if isinstance(given.get("recipe"), Path):
        return _recipe_second(error, typed, given)
    path = given.get("path")
    words = [word for name in ("selectors", "targets", "layers") for word in _texts(given.get(name))]
    files = [word for word in words if exists(word)]
    if not (isinstance(path, Path) and files):
        return ""
    if isinstance(error, CannotRead) and not exists(path):
        first = next((word for word in typed.args if Path(word) == path), "")
        return f"PATH comes first: {typed.swapped(first, files[0])}" if first and files[0] in typed.args else ""
    if isinstance(error, NoMatch | SelectorError):
        return (
            f"{files[0]} is a file here: did the shell put the names of files in place of a pattern? Quote it: "
            f"paramend {typed.name} {shlex.quote(str(path))} '**/bias'"
        )
    return ""


def _recipe_second(error: Exception, typed: Typed, given: Mapping[str, Any]) -> str:
    """The hint for `paramend apply PATH RECIPE`."""
    first, second = given["recipe"], given.get("path")
    if not isinstance(second, Path) or not isinstance(error, BadCheckpoint | BadRecipe | CannotRead):
        return ""
    recipes = [path.suffix in _RECIPES and path.is_file() for path in (first, second)]
    words = {Path(word): word for word in typed.args}
    if recipes != [False, True] or not {first, second} <= words.keys():
        return ""
    return f"RECIPE comes first: {typed.swapped(words[first], words[second])}"


def no_such_option(error: click.NoSuchOption, commands: Iterable[tuple[str, click.Command]]) -> str:
    """What to say of an option that a command lacks: that it is an argument, or which commands have it."""
    said = error.format_message()
    command = None if error.ctx is None else error.ctx.command
    word = error.option_name.lstrip("-").replace("-", "_")
    own = command.params if command is not None else []
    arguments = [p for p in own if isinstance(p, click.Argument) and word in (p.name, str(p.name).removesuffix("s"))]
    if arguments and error.ctx is not None and command is not None:
        usage = " ".join(command.collect_usage_pieces(error.ctx)[1:])
        return f"{said} It is an argument, without a name: {error.ctx.command_path} {usage}"
    having = [name for name, other in commands if other is not command and error.option_name in _options(other)]
    return f"{said} {wording.listing(having, 6)} {'have' if having[1:] else 'has'} it." if having else said


def _options(command: click.Command) -> set[str]:
    options = (param for param in command.params if isinstance(param, click.Option) and not param.hidden)
    return {name for option in options for name in option.opts}


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [*value] if isinstance(value, tuple) else []


def exists(path: str | Path) -> bool:
    """Whether there is a file or a folder of this name."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a name, or with a zero byte in it
        return False
