"""How commands open checkpoints: `--raw` is one option for all of them."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from paramend.checkpoints.checkpoint import Checkpoint

_KEY = "paramend.raw"


def _given(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    ctx.meta[_KEY] = value


RAW = click.Option(
    ["--raw"],
    is_flag=True,
    expose_value=False,
    callback=_given,
    help="Take leaves as they are stored, also the codes and scales of quantised weights.",
)


def takes_raw(command: click.Command) -> click.Command:
    """The command with `--raw`, the last of its options but `--json`."""
    if RAW not in command.params:
        last = bool(command.params) and command.params[-1].name == "as_json"
        command.params.insert(len(command.params) - last, RAW)
    return command


def raw() -> bool:
    """Whether `--raw` was given to the command that runs."""
    ctx = click.get_current_context(silent=True)
    return ctx is not None and bool(ctx.meta.get(_KEY))


def open_checkpoint(path: Path) -> "Checkpoint":
    """A checkpoint, opened as the command was told to."""
    from paramend.checkpoints.checkpoint import open  # imports numpy, and `--help` needs none

    return open(path, raw=raw())
