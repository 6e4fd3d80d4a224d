"""`paramend apply`: a recipe applied to a checkpoint."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from paramend.cli import _ui
from paramend.cli.writing import edit_checkpoint, options
from paramend.errors import BadRecipe
from paramend.recipes.recipe import Recipe


class _Unmet(_ui.Refusal):
    """Only expectations of the recipe failed."""

    exit_code = 1


def _run(recipe: Path, path: Path, **given: Any) -> None:
    """Apply a recipe to a checkpoint.

    RECIPE is a YAML or JSON file of steps; PATH is a file or a directory. With -o, PATH is only read; OUT gets the
    edited leaves and all other bytes as they are. With --in-place only the bytes of the selected leaves are written,
    and checksums over them, and steps must keep shape, dtype and path. Every step is checked before anything is
    written, and all problems are listed with their addresses in the recipe.

    Exit status: 0 done; 1 only expectations of the recipe failed; 2 anything else is wrong with the recipe, an
    unreadable or damaged file, or an OUT that cannot be written.
    """
    try:
        edit_checkpoint(path, partial(Recipe.apply_file, recipe), **given)
    except BadRecipe as error:
        if all(problem.code == "expect" for problem in error.problems):
            raise _Unmet(str(error)) from error
        raise


apply = click.Command(
    "apply",
    callback=_run,
    params=[
        click.Argument(["recipe"], type=click.Path(path_type=Path)),
        click.Argument(["path"], type=click.Path(path_type=Path)),
        *options(),
    ],
    help=_run.__doc__,
)
