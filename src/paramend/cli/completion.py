"""`paramend completion`: what a shell needs to complete commands, options and the paths of leaves."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class

from paramend.cli._ui import say
from paramend.disk.io import write_file

# Shell → where it looks for completions, below the home folder of the user, and what else it needs.
_PLACES = {
    "bash": (".local/share/bash-completion/completions/paramend", "the package bash-completion of your system"),
    "zsh": (
        ".local/share/zsh/site-functions/_paramend",
        "fpath=(~/.local/share/zsh/site-functions $fpath) in ~/.zshrc, before compinit",
    ),
    "fish": (".config/fish/completions/paramend.fish", ""),
}


def paths_from(names: Sequence[str], begun: str) -> list[str]:
    """How a path that was begun may go on: to the next key, or on to where names part, so that a single one is a leaf.

    >>> names = ["layers.0.w", "layers.0.b", "layers.1.w", "head.w"]
    >>> paths_from(names, ""), paths_from(names, "l"), paths_from(names, "layers.1")
    (['layers.', 'head.w'], ['layers.0.', 'layers.1.w'], ['layers.1.w'])
    """
    names = [name for name in names if name.startswith(begun)]
    while True:
        ends = (
            min((at for at in (name.find(".", len(begun)), name.find("/", len(begun))) if at >= 0), default=-1)
            for name in names
        )
        found = dict.fromkeys(name[: end + 1] if end >= 0 else name for name, end in zip(names, ends, strict=True))
        whole = [
            next(name for name in names if name.startswith(each))
            if sum(name.startswith(each) for name in names) == 1
            else each
            for each in found
        ]
        if len(whole) != 1 or whole[0] in names:
            return whole
        begun = whole[0]


if TYPE_CHECKING:
    _Text = click.ParamType[str]
else:
    _Text = click.ParamType  # older versions of click have no parameters of types


class _Leaf(_Text):
    """A selector, completed from the names in the checkpoint before it."""

    name = "text"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        path = next((ctx.params[key] for key in ("path", "model", "a") if ctx.params.get(key)), None)
        try:
            from paramend.checkpoints.checkpoint import checkpoint_at  # imports numpy

            with checkpoint_at(path) as checkpoint:  # type: ignore[arg-type]  # None is no checkpoint either
                names = list(checkpoint)
        except Exception:  # whatever is wrong with it, the shell is no place to say so
            names = []
        return [CompletionItem(each) for each in paths_from(names, incomplete)]


LEAF = _Leaf()
_SELECTORS = {"selectors", "selector", "leaves", "leaf", "layers", "targets"}


def completes(command: click.Command) -> click.Command:
    """The command, whose selectors are completed."""
    for param in command.params:
        if isinstance(param, click.Argument) and param.name in _SELECTORS and param.type is click.STRING:
            param.type = LEAF
    return command


@click.command()
@click.argument("shell", type=click.Choice([*_PLACES]), required=False)
@click.option("--install", is_flag=True, help="Write it where the shell finds it.")
@click.pass_context
def completion(ctx: click.Context, shell: str | None, install: bool) -> None:
    """Print the script that lets SHELL complete commands, options, files and selectors.

    Without SHELL, for the one that $SHELL names. New shells have it once it is installed.
    """
    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in _PLACES:
        known = ", ".join(_PLACES)
        raise click.UsageError(f"$SHELL names {name or 'no shell'}; completions are there for {known}", ctx=ctx)
    made = get_completion_class(name)
    assert made is not None
    text = made(ctx.find_root().command, {}, "paramend", "_PARAMEND_COMPLETE").source()
    if not install:
        click.echo(text)
        return
    place, more = _PLACES[name]
    path = Path.home() / place
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, text.encode())
    say(f"wrote {path}; shells started from now on read it")
    if more:
        say(f"{name} also needs: {more}")
