"""The command that changes the tokens of a model: `vocabulary`."""

import json
from pathlib import Path
from typing import Any

import click

from paramend.cli.opening import open_checkpoint
from paramend.cli.options import ADDRESS, makes, numbers, one_of
from paramend.cli.writing import write_made
from paramend.tokens.vocabulary import vocabulary as vocabulary_of


def _ids(ctx: click.Context, option: click.Parameter, text: str | None) -> Any:
    """Numbers and ranges of them, or what a JSON file holds: a list, or a map of counts."""
    try:
        if text is None or not Path(text).is_file():
            return numbers(ctx, option, text)
        found = json.loads(Path(text).read_text(encoding="utf-8"))
        return {int(key): count for key, count in found.items()} if isinstance(found, dict) else found
    except (ValueError, OSError) as error:
        raise click.BadParameter(f"{text!r} is neither 0-99,105 nor a file of JSON: {error}") from None


@click.command()
@click.argument("path", metavar="MODEL", type=ADDRESS)
@click.option(
    "--keep", callback=_ids, metavar="IDS", help="Keep tokens: 0-99,105, or a JSON file of numbers, or counts."
)
@click.option("--extend", multiple=True, metavar="TOKEN", help="Add a token; may be repeated.")
@click.option("--pad", type=int, metavar="N", help="Add rows up to a multiple of N.")
@click.option("--transplant", type=ADDRESS, metavar="DONOR", help="Take the tokens of another model.")
@click.option("--init", default="mean", show_default=True, metavar="HOW", help="New rows: mean, subwords or zero.")
@makes("which tables would change")
def vocabulary(path: Path, init: str, **options: Any) -> None:
    """Write a model with some of its tokens, or more: tables, config.json and tokenizer together.

    Exit status: 0 done; 2 there is no such token, or one that is new already, no leaf is a table of tokens, a table is
    quantised, a file is unreadable or damaged, or OUT cannot be written.
    """
    name, value = one_of(options, "keep", "extend", "pad", "transplant")
    how = {"init": init} if name in ("extend", "transplant") else {}
    with open_checkpoint(path) as model:
        value = open_checkpoint(value) if name == "transplant" else value
        made, report = getattr(vocabulary_of(model), name)(value, **how)
        write_made(made, path, report, **options)
