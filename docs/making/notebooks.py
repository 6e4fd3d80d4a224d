"""Notebooks run without Jupyter: their cells in order, what each prints and shows, and the page that this makes."""

import ast
import base64
import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cells(notebook: Path) -> list[tuple[str, str]]:
    """Kind and source of each cell."""
    content = json.loads(notebook.read_text())
    return [(cell["cell_type"], "".join(cell["source"])) for cell in content["cells"]]


def run(notebook: Path) -> Iterator[tuple[str, str, str, object]]:
    """Run the cells in the current folder; yields kind, source, printed text and the value of the last line of each."""
    names: dict[str, object] = {"__name__": "__main__"}
    for kind, source in cells(notebook):
        printed, value = io.StringIO(), None
        if kind == "code":
            tree = ast.parse(source, notebook.name)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            with contextlib.redirect_stdout(printed):
                exec(compile(tree, notebook.name, "exec"), names)
                if last is not None and not source.rstrip().endswith(";"):
                    value = eval(compile(ast.Expression(last.value), notebook.name, "eval"), names)
        yield kind, source, printed.getvalue(), value


def shown(value: object) -> str:
    """The value of a cell as Markdown: a figure as a picture, anything else as text."""
    if value is None:
        return ""
    if hasattr(value, "savefig"):
        picture = io.BytesIO()
        value.savefig(picture, format="png", dpi=110, bbox_inches="tight")
        return f"![Figure](data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()})\n\n"
    return f"```text\n{value}\n```\n\n"


def page_of(notebook: Path) -> str:
    """The notebook as a page, with what its cells print and show when they run."""
    parts = []
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for kind, source, printed, value in run(notebook):
                parts.append(source if kind == "markdown" else f"```python\n{source}\n```")
                parts.append((f"```text\n{printed.rstrip()}\n```\n\n" if printed else "") + shown(value))
        finally:
            os.chdir(before)
    return "\n\n".join(filter(None, parts))
