"""The command that makes a checkpoint for a model of another framework: `port`."""

import importlib
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.cli import _ui
from paramend.cli.opening import open_checkpoint
from paramend.cli.options import makes, renames
from paramend.cli.writing import write_made
from paramend.disk.urls import path_of
from paramend.porting.port import port as ported, port_on_disk

_FUNCTION = re.compile(r"([\w.]+):(\w+)").fullmatch


@click.command()
@click.argument("source")
@click.option("--like", "target", required=True, metavar="TARGET", help="The model that the output is for.")
@renames("A layer or leaf of SOURCE and what it is in TARGET, as in 'encoder.<n>/**=block_<n>/**'")
@click.option("--prove", is_flag=True, help="Run both models with random parameters in float64, and compare them.")
@makes("what would go where")
def port(source: str, target: str, prove: bool, rename: dict[str, str | None], **options: Any) -> None:
    """Write the parameters of SOURCE as a checkpoint for TARGET, a model of another framework.

    Both are checkpoints, or functions as `package.module:make` that return a model: a torch, NNX or Equinox module, a
    bound linen module, or parameters. For --prove both are functions, which return the model and a tuple of its inputs.

    Exit status: 0 done; 2 the two do not fit, or do not compute the same, a file is unreadable or damaged, or OUT
    cannot be written.
    """
    with ExitStack() as stack:
        (like, ours), (model, theirs) = (_opened(each, stack) for each in (target, source))
        inputs: Any = None
        if prove:
            held = [f"{text} is a checkpoint" for text, each in ((source, model), (target, like)) if _on_disk(each)]
            if held:
                raise click.UsageError(f"--prove runs both models, and {held[0]}: name a function, package.module:make")
            if ours is None and theirs is None:
                raise click.UsageError("--prove needs functions that return (model, inputs): package.module:make")
            inputs = {"target": theirs if ours is None else ours, "source": ours if theirs is None else theirs}
        made: Any
        if _on_disk(model) and not _on_disk(like):
            made, report = port_on_disk(like, model, rename=rename)
        else:
            made, report = ported(like, model, rename=rename, prove=inputs)
        if report.proof is not None:
            _ui.show_lines([*str(report.proof).split("\n"), ""])
        if isinstance(made, Checkpoint):
            write_made(made, made.path, report, **options)
        else:
            _save(made, report, **options)


def _on_disk(model: Any) -> bool:
    return isinstance(model, Checkpoint)


def _opened(text: str, stack: ExitStack) -> tuple[Any, Any]:
    """A checkpoint, or a model and the inputs that its function returns; None for no inputs."""
    named = None if path_of(text).exists() else _FUNCTION(text)
    if named is None:
        return stack.enter_context(open_checkpoint(path_of(text))), None
    sys.path.insert(0, here := str(Path.cwd()))  # as for `python -m`
    try:
        made = getattr(importlib.import_module(named[1]), named[2])()
    except Exception as error:  # of the user's own code
        raise click.UsageError(f"{text}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    return made if isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], tuple | dict) else (made, None)


def _save(
    made: Any, report: Any, *, out: str | None, dry_run: bool, as_json: bool, html: Path | None, **given: Any
) -> None:
    from paramend.checkpoints.whole import save  # most ports are from files

    if out is None and not dry_run:
        raise click.UsageError("-o OUT is needed.")
    if given["record"] or given["workers"] or given["resume"] or given["engine"] != "processes":
        raise click.UsageError(
            "--record, --workers, --engine and --resume are for checkpoints: SOURCE is a model in memory."
        )
    if not dry_run:
        tree = made.variables if hasattr(made, "unbind") else made
        _ui.say(save(tree, out or "", force=given["force"], max_shard_size=given["max_shard_size"]).summary)
    _ui.tell(report, page=html, as_json=as_json)
