"""`paramend apply`: a recipe carried out on a checkpoint."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from paramend.cli import _ui
from paramend.cli.writing import edit_checkpoint, options
from paramend.errors import BadRecipe
from paramend.recipes.recipe import Recipe


class _Unmet(_ui.Refusal):
    """Nothing is wrong but that the checkpoint is not as the recipe expects."""

    exit_code = 1


def _run(recipe: Path, path: Path, **given: Any) -> None:
    """Carry out a recipe on a checkpoint.

    RECIPE is a YAML or JSON file of steps; PATH, a file or a directory, is what they are carried out on. With -o, PATH
    is read and never changed; OUT gets the edited leaves and all other bytes as they are. With --in-place only the
    bytes of the chosen leaves are written, and steps must keep shape, dtype and path. Every step is checked before
    anything is written, and all that is wrong is listed with its address in the recipe.

    Exit status: 0 done; 1 only expectations of the recipe did not hold; 2 anything else is wrong with the recipe, an
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
