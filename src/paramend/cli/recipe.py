"""`paramend apply`: a recipe applied to a checkpoint; `paramend config`: its configuration read and edited."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import click

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.checkpoints.config import config as config_of
from paramend.cli import _ui
from paramend.cli.opening import open_checkpoint
from paramend.cli.options import ADDRESS, DRY_TOO, EDITS, takes
from paramend.cli.writing import carry_out, edit_checkpoint
from paramend.errors import BadRecipe
from paramend.recipes.recipe import Recipe, document_at


class _Unmet(_ui.Refusal):
    """Only expectations of the recipe failed."""

    exit_code = 1


@click.command()
@click.argument("recipe", type=ADDRESS)
@click.argument("path", type=ADDRESS, required=False)
@takes(*EDITS, html=DRY_TOO)
def apply(recipe: Path, path: Path | None, **given: Any) -> None:
    """Apply a recipe, or a delta, to a checkpoint.

    RECIPE is a YAML or JSON file of steps; PATH is a file or a directory. With -o, PATH is only read; OUT gets the
    edited leaves and all other bytes as they are. With --in-place only the bytes of the selected leaves are written,
    and checksums over them, and steps must keep shape, dtype and path. Every step is checked before anything is
    written, and all problems are listed with their addresses in the recipe.

    RECIPE may be a configuration of mergekit as well, which names its models itself: PATH is left out then. Or it is a
    delta, a directory that `paramend delta` or slime wrote: PATH must be its base, bit for bit.

    Exit status: 0 done; 1 only expectations of the recipe failed; 2 anything else is wrong with the recipe, an
    unreadable or damaged file, or an OUT that cannot be written.
    """
    if path is not None and not (given["in_place"] or given["dry_run"] or given["out"]):
        edit_checkpoint(path, partial(Recipe.apply_file, recipe), **given)  # which says what is missing
    if recipe.is_dir():
        if path is None:
            raise click.UsageError("PATH is needed: what the delta is applied to.")
        from paramend.cli.delta import apply_delta  # most are recipes

        apply_delta(recipe, path, **given)
        return
    data = document_at(recipe).data
    if isinstance(data, Mapping) and "merge_method" in data:
        _merge(data, recipe, path, **given)
        return
    if path is None:
        raise click.UsageError("PATH is needed: what the recipe is applied to.")
    try:
        edit_checkpoint(path, partial(Recipe.apply_file, recipe), **given)
    except BadRecipe as error:
        if all(problem.code == "expect" for problem in error.problems):
            raise _Unmet(str(error)) from error
        raise


def _merge(
    data: Mapping[str, Any], file: Path, path: Path | None, *, in_place: bool, record: bool, **given: Any
) -> None:
    """Carry out a configuration of mergekit."""
    from paramend.merging.mergekit import merge_configured  # most recipes are our own

    if path is not None or in_place or (given["out"] is None and not given["dry_run"]):
        raise click.UsageError("A configuration of mergekit names its models: -o OUT is needed, without PATH.")
    with ExitStack() as opened:
        first, new, _ = merge_configured(
            data, file.name, file.parent, lambda path: opened.enter_context(open_checkpoint(path))
        )
        carry_out(new.plan, first.path, given.pop("out"), record="" if record else None, **given)


def keyed(ctx: click.Context, option: click.Parameter, given: tuple[str, ...]) -> dict[str, Any] | None:
    """Key → value, as JSON or as text."""
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals and text != "none":
            raise click.BadParameter(f"{text!r} is not KEY=VALUE; write layer_types='[...]', or none")
        if equals:
            with suppress(ValueError):
                value = json.loads(value)
            found[key] = value
    return found if given else None


@click.command()
@click.argument("path", type=ADDRESS)
@click.argument("key", required=False)
@click.option(
    "--set",
    "values",
    multiple=True,
    callback=keyed,
    metavar="KEY=VALUE",
    help="Set a key; VALUE is JSON, or else text; may be repeated.",
)
@click.option("--delete", "gone", multiple=True, metavar="KEY", help="Delete a key; may be repeated.")
@takes(*EDITS, html=DRY_TOO)
def config(
    path: Path, key: str | None, values: dict[str, Any] | None, gone: Sequence[str], as_json: bool, **given: Any
) -> None:
    """Read the configuration beside the weights, or edit it.

    Without --set and --delete it prints config.json, or the value of a KEY; dots in KEY lead into parts. With them it
    writes the checkpoint with another configuration: what stays in config.json keeps its characters.

    Exit status: 0 done; 2 there is no config.json, or no such key, or OUT cannot be written.
    """
    step = {name: body for name, body in (("set", values), ("delete", list(gone))) if body}
    if not step:
        with open_checkpoint(path) as checkpoint:
            found = config_of(checkpoint)
            text = found.document.text.decode() if key is None else json.dumps(found[key], indent=2, ensure_ascii=False)
        click.echo(text.rstrip("\n"))
        return
    if key is not None:
        raise click.UsageError("KEY is read, and --set and --delete edit: one or the other.")

    def edit(checkpoint: Checkpoint) -> Checkpoint:
        if given["record"]:
            return Recipe([{"config": step}]).apply(checkpoint)
        return config_of(checkpoint).edited(values or {}, gone)

    edit_checkpoint(path, edit, as_json=as_json, **given)
