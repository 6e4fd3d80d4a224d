"""The tables of docs/reference.md are what the code says. `python tests/house/test_reference.py` writes them."""

import re
from pathlib import Path

import pytest

from paramend import errors
from paramend.edits.ops import OPS
from paramend.recipes.verbs import VERBS

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"


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
            rows.append(f"| `{error.__name__}` | `{builtin.__name__}` | `{error.code}` | {error.__doc__} |")
    return "\n".join(rows)


def steps_table() -> str:
    rows = ["| step | what it does | keys |", "|---|---|---|"]
    for verb in VERBS.values():
        keys = [f"**{key.name}**" if key.required else key.name for key in verb.keys]
        rows.append(f"| `{verb.name}` | {verb.says} | {', '.join(keys)} |")
    keys = {key.name: key for verb in VERBS.values() for key in verb.keys}
    rows += ["", "| key | what stands there |", "|---|---|"]
    return "\n".join([*rows, *(f"| `{name}` | {key.says} |" for name, key in keys.items())])


TABLES = {"ops": ops_table, "steps": steps_table, "errors": errors_table}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_reference_is_true(name):
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", PAGE.read_text(), re.DOTALL)
    assert found, f"{PAGE.name} has no place for the table {name}"
    assert found[1] == TABLES[name](), f"run `python {Path(__file__).relative_to(PAGE.parents[1])}`"


if __name__ == "__main__":
    text = PAGE.read_text()
    for name, table in TABLES.items():
        block = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
    PAGE.write_text(text)
