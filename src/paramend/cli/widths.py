"""The commands that make a model of another width: `widen`, `narrow`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from paramend.cli.opening import open_checkpoint
from paramend.cli.options import ADDRESS, makes
from paramend.cli.writing import write_made
from paramend.disk.urls import path_of
from paramend.edits.arguments import SIZES
from paramend.errors import BadArgument
from paramend.growth.narrowing import narrow as narrowed
from paramend.growth.spreads import METHODS
from paramend.growth.widening import widen as widened
from paramend.recipes.keys import WIDTHS


def _places(ctx: click.Context, option: click.Parameter, text: str | None) -> Any:
    """How many places, or which ones."""
    try:
        found = text and SIZES.typed(text)
    except BadArgument:
        raise click.BadParameter(f"{text!r} is neither a number nor a list of places; write 8 or 0,1,4") from None
    return found[0] if isinstance(found, list) and "," not in str(text) else found


def _features(ctx: click.Context, option: click.Parameter, given: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for text in given:
        layer, _, size = text.rpartition("=")
        if not layer:
            raise click.BadParameter(f"{text!r} is not LAYER=SIZE; write params/Dense_0=16")
        found[layer] = _places(ctx, option, size)
    return found


def _axes(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of both commands."""
    says = "Features of a layer of a plain tree, which the next layer reads; may be repeated."
    feature = click.option("--feature", "features", multiple=True, callback=_features, metavar="LAYER=SIZE", help=says)
    command = feature(command)
    for name, says in reversed(WIDTHS.items()):
        option = f"--{name.replace('_', '-')}"
        command = click.option(option, callback=_places, metavar="SIZE", help=f"{says[0].upper()}{says[1:]}.")(command)
    return command


@click.command()
@click.argument("path", metavar="MODEL", type=ADDRESS)
@_axes
@click.option("--method", default="tile", show_default=True, metavar="|".join(METHODS), help="How it stays the same.")
@makes("which leaves would become larger")
def widen(path: Path, features: dict[str, Any], method: Any, **options: Any) -> None:
    """Write the model in MODEL with longer axes; it computes what it did, and config.json follows.

    With tile, places are copied and what reads them is divided; split divides unevenly, so that copies part; zero puts
    new places beside the old ones. Sizes are absolute.

    Exit status: 0 done; 2 the family is not known, a size does not fit, the method cannot keep what norms see, a file
    is unreadable or damaged, or OUT cannot be written.
    """
    sizes = {name: size for name in WIDTHS if (size := options.pop(name)) is not None}
    with open_checkpoint(path) as checkpoint:
        made, report = widened(checkpoint, features=features or None, method=method, **sizes)
        write_made(made, path, report, **options)


@click.command()
@click.argument("path", metavar="MODEL", type=ADDRESS)
@_axes
@click.option("--layers", callback=_places, metavar="SIZE", help="The layers.")
@click.option("--vocabulary", callback=_places, metavar="SIZE", help="The tokens; the files of a tokenizer stay.")
@click.option("--by", metavar="FILE", help="A file with scores: axis → (layers, places). By default norms decide.")
@makes("which leaves would become smaller")
def narrow(path: Path, features: dict[str, Any], by: str | None, **options: Any) -> None:
    """Write the model in MODEL with some places of its axes; config.json follows.

    SIZE is how many stay, or which ones: 0,1,4. Heads stay in whole groups.

    Exit status: 0 done; 2 the family is not known, a place does not exist, a group would be broken, a file is
    unreadable or damaged, or OUT cannot be written.
    """
    keep = {name: what for name in (*WIDTHS, "layers", "vocabulary") if (what := options.pop(name)) is not None}
    with open_checkpoint(path) as checkpoint:
        scores: Any = "norm" if by is None else dict(open_checkpoint(path_of(by)).items())
        made, report = narrowed(checkpoint, {**keep, **features}, by=scores)
        write_made(made, path, report, **options)
