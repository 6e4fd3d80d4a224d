"""`paramend ablate`: what a checkpoint scores without each of its parts."""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from paramend.ablation.ablate import ablate as ablate_tree, named as named_targets
from paramend.ablation.methods import METHODS
from paramend.checkpoints.whole import Kind, load
from paramend.cli import _ui
from paramend.cli.choosing import EXCEPT
from paramend.cli.opening import raw
from paramend.cli.options import ADDRESS, takes
from paramend.edits.memory import Memory
from paramend.errors import BadArgument, ParamendError
from paramend.reports import wording
from paramend.selectors.selector import resolve, sel


@click.command()
@click.argument("path", type=ADDRESS)
@click.argument("targets", metavar="[TARGET]...", nargs=-1)
@click.option(
    "--score",
    "file",
    required=True,
    metavar="FILE",
    type=ADDRESS,
    help="A Python file that defines score(tree), which returns one number.",
)
@click.option("--target", "named", multiple=True, metavar="NAME=SELECTOR", help="A target with a name.")
@click.option("--except", "excepts", **EXCEPT | {"help": "Leaves that no target takes out; may be repeated."})
@click.option("--how", type=click.Choice(list(METHODS)), default="zero", show_default=True, help="How to ablate it.")
@click.option("--pairs", is_flag=True, help="Take out each pair as well.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of noise and permuted.")
@click.option(
    "--kind",
    type=click.Choice(["numpy", "jax", "torch"]),
    default="numpy",
    show_default=True,
    help="The arrays that score(tree) gets.",
)
@click.option("--flat", is_flag=True, help="score(tree) takes a flat dict by name, as load_state_dict does.")
@click.option("--no-jit", is_flag=True, help="Call the score directly instead of letting JAX trace it.")
@takes("html", "json")
def ablate(
    path: Path,
    targets: tuple[str, ...],
    file: Path,
    named: tuple[str, ...],
    excepts: tuple[str, ...],
    kind: Kind,
    flat: bool,
    no_jit: bool,
    html: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Score PATH without each TARGET in turn; PATH is only read.

    A target is a selector; 'model.layers[*]', or one with <n> in it, such as 'model.layers.<n>.mlp.**', is one target
    for each number. The score file runs with your rights: use only files you trust.

    Exit status: 0 done; 2 an unreadable file, a target that matches nothing, a score that fails.
    """
    _ui.check_page(html)
    chosen: Any = _targets(targets, named)
    score = _function(file)
    tree = load(path, kind, nested=not flat)
    if excepts:
        leaves, spared = Memory(tree), sel(list(excepts))
        resolve(spared, leaves)  # each must match something
        chosen = {name: sel(target) & ~spared for name, target in named_targets(leaves, chosen).items()}
    try:
        report = ablate_tree(tree, chosen, score, jit=False if no_jit else None, raw=raw(), **given)
    except ParamendError:
        raise
    except Exception as error:  # the user's score may raise anything
        raise BadArgument(f"{file}: score(tree) raised {type(error).__name__}: {error}") from error
    _ui.tell(report, path, page=html, as_json=as_json)


def _targets(targets: tuple[str, ...], named: tuple[str, ...]) -> Any:
    if len(targets) == 1 and not named:
        return targets[0]
    found: dict[str, str] = {target: target for target in targets}
    for text in named:
        name, equals, selector = text.partition("=")
        if not (name and equals and selector):
            raise click.BadParameter(f"{text!r} is not NAME=SELECTOR; write --target 'last=layers[-1]/**'")
        found[name] = selector
    if not found:
        raise click.UsageError("There are no targets; write 'model.layers.<n>.**', for example.")
    return found


def _function(file: Path) -> Callable[[Any], Any]:
    if not file.is_file():
        raise BadArgument(f"{file}: no such file")
    try:
        names = runpy.run_path(str(file))
    except Exception as error:
        place = f"line {error.lineno}: " if isinstance(error, SyntaxError) else ""
        raise BadArgument(f"{file}: {place}{type(error).__name__}: {error}") from error
    score = names.get("score")
    if not callable(score):
        near = wording.closest("score", [name for name, value in names.items() if callable(value)], limit=1)
        raise BadArgument(
            f"{file} has no function `score`", hint=f"did you mean {near[0]}?" if near else "def score(tree): ..."
        )
    found: Callable[[Any], Any] = score
    return found
