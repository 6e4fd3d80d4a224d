"""The commands that give weights another code: `dequantize`, `quantize`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from paramend.cli.choosing import EXCEPT, chosen
from paramend.cli.opening import open_checkpoint
from paramend.cli.options import ADDRESS, makes
from paramend.cli.writing import write_made
from paramend.quantizing.dequantizing import dequantize as as_floats
from paramend.quantizing.quantizing import quantize as in_scheme


@click.command()
@click.argument("path", metavar="MODEL", type=ADDRESS)
@click.argument("selectors", metavar="[SELECTOR]...", nargs=-1)
@click.option("--except", "excepts", **EXCEPT)
@click.option("--dtype", default="bfloat16", show_default=True, help="The dtype of the weights.")
@makes("which weights would be floats")
def dequantize(path: Path, selectors: Sequence[str], excepts: Sequence[str], dtype: str, **options: Any) -> None:
    """Write a checkpoint with quantised weights as floats, each one leaf; config.json follows.

    SELECTOR names weights, as in '**/mlp/*/weight'; without one all of them are meant.

    Exit status: 0 done; 2 nothing selected is quantised, a scheme cannot be decoded, leaves disagree with the
    configuration, a file is unreadable or damaged, or OUT cannot be written.
    """
    with open_checkpoint(path) as old:
        new, report = as_floats(old, chosen(selectors, excepts).selector, dtype)
        write_made(new, path, report, **options)


@click.command()
@click.argument("path", metavar="MODEL", type=ADDRESS)
@click.argument("selectors", metavar="SELECTOR...", nargs=-1, required=True)
@click.option("--except", "excepts", **EXCEPT)
@click.option("--scheme", required=True, metavar="SCHEME", help="fp8-block, fp8-channel, int4, nf4 ...")
@click.option("--group-size", type=int, metavar="N", help="How many inputs share a scale; -1 for all.")
@click.option("--simulate", is_flag=True, help="Keep floats, with the values that the scheme gives.")
@makes("which weights would be quantised, and how far they would be off")
def quantize(path: Path, selectors: Sequence[str], excepts: Sequence[str], **given: Any) -> None:
    """Write a checkpoint with weights in a quantised scheme, rounded to the nearest; config.json follows.

    Embeddings and heads stay floats unless a selector names them.

    Exit status: 0 done; 2 a weight has no such form or is quantised already, config.json says another scheme, a file is
    unreadable or damaged, or OUT cannot be written.
    """
    how = {name: given.pop(name) for name in ("scheme", "group_size", "simulate")}
    with open_checkpoint(path) as old:
        new, report = in_scheme(old, chosen(selectors, excepts).selector, **how)
        write_made(new, path, report, **given)
