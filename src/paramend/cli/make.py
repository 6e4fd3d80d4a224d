"""The commands that make a checkpoint from others: `convert`, `graft`, `insert`, `part`."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.cli import _ui
from paramend.cli.choosing import EXCEPT, chosen
from paramend.cli.opening import open_checkpoint
from paramend.cli.options import ADDRESS, DRY_TOO, WRITES, Decorator, makes, renames, takes
from paramend.cli.stack import rewrite
from paramend.cli.writing import carry_out, edit_checkpoint, write_made
from paramend.errors import GraftRefused
from paramend.formats.registry import FORMATS
from paramend.grafting import parts
from paramend.grafting.options import Dtype, Mismatch, Missing, Place, Unused


@click.command()
@click.argument("path", metavar="IN", type=ADDRESS)
@click.argument("out", metavar="OUT")
@click.option("--to", type=click.Choice([row.name for row in FORMATS]), help="The format, if OUT does not say it.")
@takes(
    *("max_shard_size", *WRITES),
    dry_run="Check that it can be done, and write no checkpoint.",
    html=DRY_TOO,
)
def convert(path: Path, out: str, to: str | None, record: bool, **given: Any) -> None:
    """Write a checkpoint in another format, as one file, or as several.

    IN is a file or a directory. The suffix of OUT selects the format (model.safetensors, model.pt ...); a trailing
    slash, or --max-shard-size, selects a directory of safetensors files; --to says it for other names. Every value is
    kept bit for bit; what the format cannot hold is named. To and from GGUF, models of llama, mistral, qwen2 and qwen3
    are translated: names, the order of rows, configuration, and tokens to GGUF.

    Exit status: 0 done; 2 an unreadable or damaged file, a leaf that the format cannot hold, or an OUT that cannot
    be written.
    """
    from paramend.mapping.llama_cpp import translated  # the other commands here translate nothing
    from paramend.rewriting.wishes import wish_of  # as above

    with open_checkpoint(path) as checkpoint:
        wish = wish_of(checkpoint.plan, out, sized=given["max_shard_size"] is not None, to=to or "")
        made, said = translated(checkpoint, wish.format.name)
        carry_out(made.plan, path, out, record="" if record else None, to=to or "", quiet=True, **given)
        for line in said:
            _ui.say(line)


def _choice(name: str, kinds: Any, says: str) -> Decorator:
    return click.option(f"--{name}", type=click.Choice(get_args(kinds)), help=says)


def _by_leaf(ctx: click.Context, option: click.Parameter, given: tuple[str, ...]) -> str | dict[str, str]:
    """One choice for all leaves, or one for each selector."""
    if len(given) == 1 and "=" not in given[0]:
        return given[0]
    choices = dict(text.rpartition("=")[::2] for text in given)
    if "" in choices:
        raise click.BadParameter(f"{choices['']!r} applies to all leaves; write '**={choices['']}' after the others")
    return choices


def _choices(name: str, word: str, kinds: Any, says: str) -> Decorator:
    said = f"{says}: {', '.join(get_args(kinds))}."
    return click.option(f"--{name}", multiple=True, callback=_by_leaf, metavar=f"[SELECTOR=]{word}", help=said)


_OPTIONS = ("rename", "mismatch", "place", "unused", "missing", "dtype")


@click.command()
@click.argument("source", type=ADDRESS)
@click.option("--into", "target", required=True, metavar="TARGET", type=ADDRESS, help="What gets the values.")
@renames("Where leaves of SOURCE go in TARGET, as in 'h/<n>/**=layers/<n>/**'", " 'OLD=' leaves them behind.")
@click.option(
    "--only", multiple=True, metavar="SELECTOR", help="The leaves of TARGET that may change; may be repeated."
)
@click.option("--except", "excepts", **EXCEPT | {"help": "Leaves of TARGET that stay as they are; may be repeated."})
@_choices("mismatch", "HOW", Mismatch, "When shapes differ, for all leaves or by selector")
@_choices("place", "WHERE", Place, "Where leaves overlap")
@_choice("unused", Unused, "When a leaf of SOURCE goes nowhere; by default an error.")
@_choice("missing", Missing, "When a leaf of TARGET gets nothing from SOURCE; by default it stays fresh.")
@_choice("dtype", Dtype, "When dtypes differ: convert to the target's (the default), take the source's, or refuse.")
@makes("what would go where")
def graft(source: Path, target: Path, only: tuple[str, ...], excepts: tuple[str, ...], **options: Any) -> None:
    """Write TARGET with the values of SOURCE where their names agree.

    Neither changes. By default a leaf of SOURCE that goes nowhere, a shape that differs, and two sources for one leaf
    are errors, all listed at once with the options that allow them.

    Exit status: 0 done; 2 the two do not fit, a file is unreadable or damaged, or OUT cannot be written.
    """
    from paramend.grafting.graft import graft as graft_onto  # the other commands here graft nothing

    given = {name: value for name in _OPTIONS if (value := options.pop(name))}
    choice = chosen(only, excepts)
    if only or excepts:
        given["only"] = choice.selector
    with open_checkpoint(target) as onto, open_checkpoint(source) as other:
        try:
            made, report = graft_onto(onto, other, **given)
        except GraftRefused as error:
            typed = [_typed(way | {"only": only, "except": excepts}) for way in error.ways if "resize" not in way]
            out = shlex.quote(options["out"] or "OUT")  # no rules of resizing: those are written in Python
            names = f"{shlex.quote(str(source))} --into {shlex.quote(str(target))}"
            ways = [f"paramend graft {names}{way} -o {out}" for way in typed]
            message = str(error).partition("\n\nhint:")[0]
            hint = "\n      ".join(ways) or error.hint
            raise GraftRefused(message, report=error.report, ways=error.ways, hint=hint) from error
        write_made(made, target, report, **options)


def _typed(options: Mapping[str, Any]) -> str:
    said = []
    for name, value in options.items():
        many = [f"{old}={new or ''}" for old, new in value.items()] if isinstance(value, Mapping) else value
        many = [many] if isinstance(many, str) else many
        said += [f" --{name} {shlex.quote(one)}" for one in many]
    return "".join(said)


@click.command()
@click.argument("target", type=ADDRESS)
@click.argument("source", type=ADDRESS)
@click.argument("selector")
@renames("A path of SOURCE and its path in OUT: 'mtp.**=model.mtp.**'")
@takes("in_place", "link", in_place="Change TARGET itself; `paramend undo TARGET` takes it back.")
@makes("what would be made")
def insert(
    target: Path,
    source: Path,
    selector: str,
    rename: dict[str, str],
    *,
    in_place: bool,
    max_shard_size: str | None,
    **options: Any,
) -> None:
    """Write TARGET with leaves of SOURCE that it lacks.

    With --in-place, TARGET is a folder of safetensors files, and what comes goes into further ones.

    Exit status: 0 done; 2 the selector matches nothing, a leaf is there already, a file is unreadable or damaged, or
    OUT cannot be written.
    """
    if in_place and max_shard_size is not None:
        raise click.UsageError("--in-place changes TARGET itself: it excludes --max-shard-size.")
    if not (in_place or options["out"] or options["dry_run"]):
        raise click.UsageError("-o OUT or --in-place is needed.")
    with open_checkpoint(source) as donor:

        def inserted(old: Checkpoint) -> Checkpoint:
            return parts.insert(old, donor, selector, rename=rename)[0]

        if in_place:
            edit_checkpoint(target, inserted, in_place=True, **options)
        else:
            rewrite(target, inserted, {"max_shard_size": max_shard_size, **options})


@click.command()
@click.argument("model", type=ADDRESS)
@click.argument("selector")
@renames("A path of MODEL and its path in OUT: 'language_model.**=**'")
@takes("link", link="Hard-link shards that stay whole.")
@makes("what would be made")
def part(model: Path, selector: str, rename: dict[str, str], **options: Any) -> None:
    """Write some leaves of MODEL as a model of their own.

    If they are exactly the text model, or another one that has its own part of config.json, that part becomes the
    configuration. Files beside the weights go along.

    Exit status: 0 done; 2 the selector matches nothing, two leaves would have one path, a file is unreadable or
    damaged, or OUT cannot be written.
    """
    rewrite(model, lambda old: parts.part(old, selector, rename=rename)[0], options)
