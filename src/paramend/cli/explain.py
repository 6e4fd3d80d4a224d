"""`paramend explain CODE`: what an error means, with code that raises it; and topics of `paramend help`."""

import re
from collections.abc import Mapping
from importlib import resources
from textwrap import indent

import click

from paramend.reports import wording

SELECTORS = """\
A selector is text, matched against the whole path of a leaf. Quote it, so that the shell leaves it alone.

  layers.0.mlp.kernel        that leaf; . and / are the same separator
  *                          anything within one key: 'Dense_*', '*_proj'
  **                         any number of whole keys, also none: '**/bias'
  {kernel,bias}              either
  layers[-1]/**              positions, as in Python, among the numbered children: layers/0, layers/1 ...
  Dense_[:2]/*               the same among numbered siblings: Dense_0, Dense_1 ...
  layers/<n>/**              a number that is captured, for renames: to 'h/<n+1>/**'
  "a/b".c                    quotes: exactly this key; a backslash takes the next character as it is

A command takes several, and leaves out what --except matches. Each must match something.

  paramend show PATH 'layers[-1]/**' '**/bias' --except 'head/*'
"""

# Word → text.
TOPICS = dict.fromkeys(("selector", "selectors", "--except", "patterns", "paths"), SELECTORS)


def explanations() -> Mapping[str, str]:
    """Code → the page about that error, as Markdown."""
    text = resources.files("paramend.cli").joinpath("errors.md").read_text(encoding="utf-8")
    pages = (page.partition("\n") for page in re.split(r"^## ", text, flags=re.MULTILINE)[1:])
    return {code: page.strip() for code, _, page in pages}


@click.command()
@click.argument("code", required=False)
def explain(code: str | None) -> None:
    """Explain an error by its CODE, which stands in brackets before its message; without one, list them.

    The same is `error.code` in Python.
    """
    pages = explanations()
    if code is None:
        width = max(map(len, pages))
        firsts = (
            (name, re.split(r"(?<=[.:]) ", " ".join(page.split()))[0].rstrip(".:")) for name, page in pages.items()
        )
        click.echo("\n".join(f"{name:<{width}}  {first}" for name, first in firsts))
        return
    name = re.sub(r"^error\[(.*)\]:?$", r"\1", code.strip()).lower()
    if name not in pages:
        near = wording.closest(name, pages, limit=1)
        hint = f"Did you mean {near[0]!r}?" if near else "To list them: paramend explain"
        raise click.UsageError(f"There is no error {code!r}. {hint}")
    page = re.sub(r"```\w*\n(.*?)```", lambda code: indent(code[1], "    ").rstrip(), pages[name], flags=re.DOTALL)
    click.echo(f"error[{name}]\n\n{page}")
