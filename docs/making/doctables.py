"""Tables of the pages, made from those in the code. `python docs/making/doctables.py` writes them into the pages."""

import inspect
import re
from pathlib import Path

from paramend import errors
from paramend.edits.ops import OPS
from paramend.leaves.schemes import SCHEMES
from paramend.merging.methods import METHODS
from paramend.recipes.verbs import VERBS

DOCS = Path(__file__).parents[1]


def ops_table() -> str:
    rows = ["| verb | what it does | reads the old value | keeps the spec |", "|---|---|---|---|"]
    for op in OPS.values():
        verb = f"`{op.name}({', '.join(op.parameters)})`"
        rows.append(f"| {verb} | {op.says} | {'yes' if op.reads else 'no'} | {'yes' if op.keeps_spec else 'no'} |")
    return "\n".join(rows)


def errors_table() -> str:
    rows = ["| error | also a | code | when |", "|---|---|---|---|"]
    for error in vars(errors).values():
        if isinstance(error, type) and issubclass(error, errors.ParamendError) and error is not errors.ParamendError:
            builtin = next(base for base in error.__mro__ if base.__module__ == "builtins")
            says = " ".join(inspect.getdoc(error).split())
            rows.append(f"| `{error.__name__}` | `{builtin.__name__}` | `{error.code}` | {says} |")
    return "\n".join(rows)


def steps_table() -> str:
    rows = ["| step | what it does | keys |", "|---|---|---|"]
    for verb in VERBS.values():
        keys = [f"**{key.name}**" if key.required else key.name for key in verb.keys]
        rows.append(f"| `{verb.name}` | {verb.says} | {', '.join(keys)} |")
    keys = {key.name: key for verb in reversed(VERBS.values()) for key in reversed(verb.keys)}
    keys = dict(reversed(keys.items()))
    rows += ["", "| key | what stands there |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | {key.says} |" for name, key in keys.items())])


def commands_table() -> str:
    rows = ["| command | also | options | what it does to the selected leaves |", "|---|---|---|---|"]
    for op in OPS.values():
        if not op.code:
            required = [name.upper() for name in op.parameters if name not in op.optional]
            command = " ".join([op.name, "PATH", "SELECTOR...", *required])
            options = ", ".join(
                [*(f"`--{name}`" for name in op.optional), *(["`--in-place`"] if op.keeps_spec else [])]
            )
            also = ", ".join(f"`{name}`" for name in op.aliases)
            rows.append(f"| `{command} -o OUT` | {also} | {options} | {op.says} |")
    return "\n".join(rows)


def schemes_table() -> str:
    rows = ["| scheme | what it is | the codes | beside them | perhaps too |", "|---|---|---|---|---|"]
    for row in SCHEMES:
        cells = [" or ".join(f"`{name}`" for name in row.payload)]
        for optional in (False, True):
            found = (each.names for each in row.companions if each.optional == optional)
            cells.append(", ".join(" or ".join(f"`{name}`" for name in names) for names in found))
        rows.append(f"| `{row.name}` | {row.says} | {' | '.join(cells)} |")
    return "\n".join(rows)


def methods_table() -> str:
    rows = ["| method | what it does | base | models | settings |", "|---|---|---|---|---|"]
    for row in METHODS.values():
        least, most = row.models
        base = {"needed": "yes", "taken": "may be", "refused": ""}[row.base]
        settings = [name if default is None else f"{name}={default}" for name, default in row.takes.items()]
        rows.append(
            f"| `{row.name}` | {row.says} | {base} | {least}{'' if least == most else ' or more'} | "
            f"{', '.join(f'`{each}`' for each in settings)} |"
        )
    return "\n".join(rows)


def costs_lines() -> str:
    """The costs that README.md has from the results of benchmarks; a test holds that it does."""
    return re.search(r"<!-- costs -->\n(.*?)\n<!-- /costs -->", (DOCS.parent / "README.md").read_text(), re.DOTALL)[1]


TABLES = {
    "costs": ("costs.md", costs_lines),
    "ops": ("reference.md", ops_table),
    "steps": ("reference.md", steps_table),
    "errors": ("reference.md", errors_table),
    "commands": ("cli.md", commands_table),
    "schemes": ("quantised.md", schemes_table),
    "methods": ("merging.md", methods_table),
}


def fresh(page: str) -> str:
    """The text of a page with its tables as they are now."""
    text = (DOCS / page).read_text()
    for name, (home, table) in TABLES.items():
        if home == page:
            block = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
            text, found = re.subn(rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
            assert found == 1, f"{page} has {found} places for the table {name}"
    return text


if __name__ == "__main__":
    for page in {page for page, _ in TABLES.values()}:
        (DOCS / page).write_text(fresh(page))
