"""`paramend merge`: a model made of several."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import click

from paramend.cli.opening import open_checkpoint
from paramend.cli.options import ADDRESS, Decorator, makes, takes
from paramend.cli.writing import carry_out
from paramend.merging.merge import Missing, Stats, merge as merge_models
from paramend.merging.methods import METHODS
from paramend.merging.settings import Convention


def _shares(name: str, says: str, option: str = "") -> Decorator:
    said = f"{says}; one for all models, or repeated, one for each."
    return click.option(f"--{option or name}", name, type=float, multiple=True, metavar="X", help=said)


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=ADDRESS)
@click.option("--how", default="linear", show_default=True, type=click.Choice(list(METHODS)), help="The method.")
@_shares("weights", "How much a model counts", "weight")
@click.option("--base", type=ADDRESS, help="The model that the others come from.")
@click.option("--t", type=float, metavar="X", help="How far from the first to the second, for slerp and nearswap.")
@_shares("density", "The share of changes that stay")
@_shares("gamma", "The share of changes that go because they are the largest, for breadcrumbs")
@_shares("epsilon", "How far chances are from the density, for della")
@click.option("--seed", type=click.IntRange(0), help="The seed of dare and della.")
@click.option("--scale", type=float, metavar="X", help="A factor of the change of the base.")
@click.option(
    "--convention", type=click.Choice(get_args(Convention)), default="paper", help="Whose reading of the method."
)
@click.option("--missing", type=click.Choice(get_args(Missing)), default="error", help="Leaves in some models only.")
@click.option(
    "--stats", type=click.Choice(get_args(Stats)), help="Statistics of batches: the first model's, or the mean."
)
@takes("link", link="Hard-link shards that stay whole.")
@makes("what would be merged")
def merge(models: Sequence[Path], base: Path | None, *, out: str | None, record: bool, **given: Any) -> None:
    """Write a model made of several, in bounded memory.

    The result has the names, the dtypes and the files beside the weights of the first MODEL. Means are rounded once.

    Exit status: 0 done; 2 models do not fit together, a setting means nothing to the method, a file is unreadable or
    damaged, or OUT cannot be written.
    """
    if out is None and not given["dry_run"]:
        raise click.UsageError("-o OUT is needed.")
    names = "how", "weights", "t", "density", "gamma", "epsilon", "seed", "scale", "convention", "missing", "stats"
    settings = {name: value for name in names if (value := given.pop(name)) not in (None, ())}
    for name, value in settings.items():
        if isinstance(value, tuple) and len(value) == 1:
            settings[name] = value[0]
    with ExitStack() as opened:
        trees = [opened.enter_context(open_checkpoint(path)) for path in models]
        under = None if base is None else opened.enter_context(open_checkpoint(base))
        new, _ = merge_models(trees, base=under, **settings)
        carry_out(new.plan, models[0], out, record="" if record else None, **given)
