"""The commands that add models to each other: `merge`, `fold`, `extract`."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import click

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.cli import _ui, fates
from paramend.cli.opening import open_checkpoint
from paramend.cli.options import ADDRESS, DRY_TOO, EDITS, Decorator, makes, takes
from paramend.cli.writing import carry_out, edit_checkpoint
from paramend.merging.extracting import extract as extracted
from paramend.merging.folding import fold as folded
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


@click.command()
@click.argument("base", type=ADDRESS)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=ADDRESS)
@click.option("--scale", type=float, default=1.0, show_default=True, help="A further factor of all terms.")
@click.option("--untie", is_flag=True, help="Give a tied head a leaf of its own if only one of the two changes.")
@click.option("--into", type=click.Choice(["embedding"]), help="Change a tied head and its embedding both.")
@takes(*EDITS, in_place="Change BASE itself; `paramend undo BASE` takes it back.", html=DRY_TOO)
def fold(base: Path, adapters: tuple[Path, ...], scale: float, untie: bool, into: Any, **options: Any) -> None:
    """Write BASE with adapters added to its weights.

    ADAPTER is a folder of PEFT or a file of kohya; the terms of several are added first. Every tensor of theirs must
    have a place in BASE, or all that have none are listed.

    Exit status: 0 done; 2 an adapter does not fit, a weight of BASE is quantised, a file is unreadable or damaged, or
    OUT cannot be written.
    """

    def edit(old: Checkpoint) -> Checkpoint:
        new, report = folded(old, list(adapters), scale=scale, untie=untie, into=into)
        for line in report.said:
            _ui.say(line)
        return new

    edit_checkpoint(base, edit, **options)


@click.command()
@click.argument("tuned", type=ADDRESS)
@click.argument("base", type=ADDRESS)
@click.option("--rank", type=int, help="The rank of all terms.")
@click.option("--energy", type=float, help="Instead of it, the share of the squares of each difference that they hold.")
@click.option("-o", "--out", required=True, metavar="OUT", type=ADDRESS, help="The folder to write.")
@takes("force", "json")
def extract(
    tuned: Path, base: Path, rank: int | None, energy: float | None, out: Path, *, force: bool, as_json: bool
) -> None:
    """Write the difference of TUNED and BASE as an adapter of low rank, a folder that PEFT loads.

    Leaves that changed and are not matrices, such as norms and biases, are listed: the adapter does not hold them.

    Exit status: 0 done; 2 the two do not have the same leaves, nothing differs, a file is unreadable or damaged, or OUT
    cannot be written.
    """
    with open_checkpoint(tuned) as after, open_checkpoint(base) as before:
        adapter, report = extracted(after, before, rank=rank, energy=energy)
    _ui.watch(fates.Outputs([out]))
    adapter.save(out, force=force)
    if as_json:
        _ui.emit(report.to_dict() | {"path": str(out)})
    else:
        _ui.show_lines(str(report).split("\n"))
    _ui.say(f"wrote {out}")
