"""What was probably meant by a command line that cannot be carried out, told in the words of the command line."""

import ast
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from paramend.disk.urls import Url, path_of
from paramend.errors import BadCheckpoint, BadRecipe, CannotRead, NoMatch, SelectorError
from paramend.reports import wording

_RECIPES = (".yaml", ".yml", ".json")
# An argument as it is written in Python.
_GIVEN = re.compile(r"""(?<![\w.])(\w+)=("[^"\n]*"|'[^'\n]*'|\[[^]\n]*\]|\{[^}\n]*\}|-?[\d.]+(?!\w))""")
# Command → name of an argument in Python → the options that it may come from.
_FROM = {"deepen": {"count": ["blocks"], "times": ["stack", "interleave"], "drop": ["overlap"], "layers": ["drop"]}}
# Calls in hints, and the commands that do the same.
_SPOKEN = {
    "tree, report = pm.vocabulary(model).transplant(donor)": "vocabulary MODEL --transplant DONOR -o OUT",
    "pm.diff(tuned, base)": "diff TUNED BASE",
    "pm.dequantize(model)": "dequantize MODEL -o OUT",
    "pm.at(pm.open(adapter_file), selector).delete()": "delete ADAPTER SELECTOR -o OUT",
}


@dataclass(frozen=True)
class Typed:
    """A subcommand as it was typed: its name, and what follows it."""

    name: str
    command: click.Command
    args: tuple[str, ...]

    def given(self, parent: click.Context) -> Mapping[str, Any]:
        with self.command.make_context(self.name, [*self.args], parent=parent, resilient_parsing=True) as context:
            return context.params

    def written(self, given: Mapping[str, Any], name: str, value: Any) -> str:
        """An argument of Python as it is typed; "" if the command has none of this name."""
        value = [f"{old}={new}" for old, new in value.items()] if isinstance(value, dict) else value
        numbers = isinstance(value, list) and all(isinstance(each, int) for each in value)
        others = [] if isinstance(value, str) else _FROM.get(self.name, {}).get(name, [])
        name = next((other for other in others if given.get(other) is not None), name)
        param = next((param for param in self.command.params if param.name == name), None)
        if param is None:
            return f"--set {name}={value}" if "--set" in _options(self.command) else ""
        first = param.opts[0] if isinstance(param, click.Option) else name.upper()
        values = [",".join(map(str, value))] if numbers else value if isinstance(value, list) else [value]
        return " ".join(f"{first} {shlex.quote(str(each))}" for each in values)

    def swapped(self, one: str, other: str) -> str:
        at, to = self.args.index(one), self.args.index(other)
        args = [*self.args]
        args[at], args[to] = other, one
        return f"paramend {shlex.join([self.name, *args])}"


def told(message: str, error: Exception, typed: Typed, parent: click.Context) -> str:
    """The message of an error in the words of the command line, with what to type instead if that can be guessed."""
    given = typed.given(parent)

    def written(match: re.Match[str]) -> str:
        try:
            return typed.written(given, match[1], ast.literal_eval(match[2])) or match[0]
        except (SyntaxError, ValueError):
            return match[0]

    said, _, hint = message.partition("\n\nhint: ")
    hint = hint_for(error, typed, given) or _typed_hint(hint, typed, given)
    said, hint = _GIVEN.sub(written, said), hint if hint.startswith("paramend ") else _GIVEN.sub(written, hint)
    return f"{said}\n\nhint: {hint}" if hint else said


def _typed_hint(hint: str, typed: Typed, given: Mapping[str, Any]) -> str:
    call = re.fullmatch(r"\.(\w+)\(([^()]*)\)", hint)
    if call and call[1] == typed.name and isinstance(given.get("path"), Path):
        words = [str(given["path"]), *_texts(given.get("selectors")), *call[2].split(", ")]
        return f"paramend {typed.name} {shlex.join(words)} -o OUT"
    if ".where(" in hint:
        hint = re.sub(r"pm\.sel\(\.\.\.\)\.where\((\w+)=([^()]*)\)", r"in a recipe, where: {\1: \2}", hint)
        return re.sub(r"(?<!\w)\.(\w+)\(\w*\)", r"`paramend \1`", hint)
    hint = re.sub(r"(\w+)=pm\.open\(path\)", r'\1="MODEL"', hint)
    for python, command in _SPOKEN.items():
        hint = hint.replace(python, f"`paramend {command}`")
    parts = re.split(r", or |; ", hint)
    spoken = [part for part in parts if not re.search(r"\bpm\.", part)]
    return spoken[0] if spoken and len(spoken) < len(parts) else hint


def hint_for(error: Exception, typed: Typed, given: Mapping[str, Any]) -> str:
    """What to type instead, or "" if the hint of the error is as good."""
    if isinstance(given.get("recipe"), Path):
        return _recipe_second(error, typed, given)
    path = given.get("path")
    words = [word for name in ("selectors", "targets", "layers") for word in _texts(given.get(name))]
    files = [word for word in words if exists(word)]
    said = str(error)
    numbers = [word for word in words if re.fullmatch(r"-?[\d.]+(e-?\d+)?", word) and f'"{word}" matches' in said]
    if isinstance(error, NoMatch) and numbers and typed.name != "show":
        return f"{numbers[0]} stands where a SELECTOR does: paramend {typed.name} {usage(typed.command)}"
    if not (isinstance(path, Path) and files):
        return ""
    if isinstance(error, CannotRead) and not exists(path):
        first = next((word for word in typed.args if path_of(word) == path), "")
        return f"PATH comes first: {typed.swapped(first, files[0])}" if first and files[0] in typed.args else ""
    named = [file for file in files if file in said]
    if isinstance(error, NoMatch | SelectorError) and named:
        return (
            f"{named[0]} is a file here: did the shell put the names of files in place of a pattern? Quote it: "
            f"paramend {typed.name} {shlex.quote(str(path))} '**/bias'"
        )
    return ""


def _recipe_second(error: Exception, typed: Typed, given: Mapping[str, Any]) -> str:
    first, second = given["recipe"], given.get("path")
    if not isinstance(second, Path) or not isinstance(error, BadCheckpoint | BadRecipe | CannotRead):
        return ""
    recipes = [path.suffix in _RECIPES and path.is_file() for path in (first, second)]
    words = {path_of(word): word for word in typed.args}
    if recipes != [False, True] or not {first, second} <= words.keys():
        return ""
    return f"RECIPE comes first: {typed.swapped(words[first], words[second])}"


def no_such_option(error: click.NoSuchOption, commands: Iterable[tuple[str, click.Command]]) -> str:
    """What to say of an option that a command lacks: that it is an argument, or which commands have it."""
    said = error.format_message()
    command = None if error.ctx is None else error.ctx.command
    word = error.option_name.lstrip("-").replace("-", "_")
    word = {"o": "out"}.get(word, word)
    own = command.params if command is not None else []
    arguments = [p for p in own if isinstance(p, click.Argument) and word in (p.name, str(p.name).removesuffix("s"))]
    if arguments and error.ctx is not None and command is not None:
        return f"{said} It is an argument, without a name: {error.ctx.command_path} {usage(command)}"
    having = [name for name, other in commands if other is not command and error.option_name in _options(other)]
    return f"{said} {wording.listing(having, 6)} {'have' if having[1:] else 'has'} it." if having else said


def usage(command: click.Command) -> str:
    """The arguments of a command, in order."""
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    return " ".join(param.metavar or str(param.name).upper() for param in arguments)


def incomplete(command: click.Command, args: Sequence[str]) -> str:
    """What is wrong with words of a command that lack something: an option its value, or a word its letters."""
    if "" in args:
        return "An argument is empty: is a variable of the shell not set?"
    options = [param for param in command.params if isinstance(param, click.Option)]
    names = {name for option in options for name in option.opts}
    takes = {name for option in options if not option.is_flag for name in option.opts}
    rest = iter(args)
    for arg in rest:
        if arg == "--":
            break
        if arg in takes and next(rest, "--") in {*names, "--"}:
            return f"Option {arg!r} requires an argument."
    return ""


def _options(command: click.Command) -> set[str]:
    options = (param for param in command.params if isinstance(param, click.Option) and not param.hidden)
    return {name for option in options for name in option.opts}


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [*value] if isinstance(value, tuple) else []


def exists(path: str | Path) -> bool:
    """Whether there is a file or a folder of this name."""
    try:
        found = path_of(path)
        return path != "" and (isinstance(found, Url) or found.exists())  # a store that fails is not asked again
    except (OSError, ValueError):  # too long for a name, or with a zero byte in it
        return False
