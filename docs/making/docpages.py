"""Pages of the site that are made while it is built: the Python API, and a page for each table of the code."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import click
from doctables import DOCS, errors_table, ops_table, steps_table

import paramend
from paramend.anatomy.families import FAMILIES
from paramend.cli.main import ROWS, cli, edits
from paramend.edits.arguments import DEFINITIONS
from paramend.edits.ops import OPS
from paramend.formats.registry import FORMATS
from paramend.mapping import layout as shelf
from paramend.recipes.verbs import VERBS

PACKAGE = Path(paramend.__file__).parent


def code(names: tuple[str, ...] | list[str], between: str = ", ") -> str:
    return between.join(f"`{name}`" for name in names)


def text(block: str, language: str = "text") -> str:
    return f"```{language}\n{block.rstrip()}\n```"


def yes(flag: bool) -> str:
    return "yes" if flag else "no"


# ---- Python -----------------------------------------------------------------------------------------------------


def groups() -> dict[str, list[str]]:
    """Heading of docs/reference.md → the public names that it introduces. A name that no heading has is an error."""
    parts = re.split(r"^## ", (DOCS / "reference.md").read_text(), flags=re.MULTILINE)[1:]
    chapters = {title: body for title, _, body in (part.partition("\n") for part in parts)}
    found: dict[str, list[str]] = {title: [] for title in chapters}
    for name in paramend.__all__:
        if name.startswith("__"):
            continue
        # Where a list introduces it; else where it is mentioned.
        for line, end in ((r"^(?:- |  ).*", r"\("), (r"^- .*", ""), ("", "")):
            pattern = rf"{line}`pm\.{name}\b{end}"
            homes = [title for title, body in chapters.items() if re.search(pattern, body, re.MULTILINE)]
            if homes:
                found[homes[0]].append(name)
                break
        else:
            raise LookupError(f"docs/reference.md does not name pm.{name}")
    return {title: names for title, names in found.items() if names}


def object_section(name: str) -> str:
    home = paramend._MODULES.get(name) or f"{paramend._LATER[name]}.{name}"
    return f'::: {home}\n    options:\n      heading: "pm.{name}"\n      toc_label: "{name}"\n'


def api_page(title: str, names: list[str]) -> str:
    opening = f"# {title}: the Python API\n\n[How these fit together](../reference.md#{title.lower()}).\n"
    return "\n\n".join([opening, *map(object_section, names)])


# ---- tables -----------------------------------------------------------------------------------------------------


def ops_page() -> str:
    parts = [
        "# Edits of values",
        "A row of one table in the code is a verb of `pm.at`, a command and a step of recipes. "
        "[Editing](../editing.md) shows them at work, [structure](../reference.md#editing) is `delete` and `rename`.",
        ops_table(),
    ]
    commands = {row.name: row for row in edits()}
    for op in OPS.values():
        parts += [f"## {op.name}", f"{op.says[0].upper()}{op.says[1:]}."]
        given = [f"{name}={op.optional[name]!r}" if name in op.optional else name for name in op.parameters]
        rows = [f"| in Python | `pm.at(tree, selector).{op.name}({', '.join(given)})` |"]
        if op.name in commands:
            rows.append(f"| as a command | [`paramend {op.name}`](commands.md#{op.name}) |")
        if op.name in VERBS:
            rows.append(f"| in a recipe | [`{op.name}:`](recipe-steps.md#{op.name}) |")
        rows.append(f"| reads the old value | {yes(op.reads)} |")
        rows.append(f"| keeps shape and dtype | {yes(op.keeps_spec)} |")
        rows.append(f"| on disk | {'in pieces' if op.chunks else 'one whole leaf at a time in memory'} |")
        parts.append("\n".join(["| | |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def kind_of(schema: dict[str, object], depth: int = 0) -> str:
    """What JSON values a key takes, in words."""
    if "$ref" in schema:
        return kind_of(DEFINITIONS[str(schema["$ref"]).rpartition("/")[2]], depth)
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(kind_of(each, depth) for each in schema[key]))
    kind = schema.get("type", "anything")
    if kind == "array" and depth < 1 and schema.get("items"):
        return f"list of {kind_of(schema['items'], depth + 1)}"
    return {"array": "list", "object": "map"}.get(kind, kind) if isinstance(kind, str) else " or ".join(kind)


def steps_page() -> str:
    schema = paramend.Recipe.schema()["$defs"]
    parts = [
        "# Steps of recipes",
        "A recipe is a map with `version: 1`, `steps`, and perhaps `raw: true`. "
        "Here is every step with its keys; [Recipes](../recipes.md) says how they are used, and "
        "[recipe.schema.json](../recipe.schema.json) is the same for editors. Keys in bold are required.",
        steps_table().partition("\n\n")[0],
    ]
    for verb in VERBS.values():
        parts += [f"## {verb.name}", f"{verb.says[0].upper()}{verb.says[1:]}."]
        rows = ["| key | value | what stands there |", "|---|---|---|"]
        for key in verb.keys:
            name = f"**{key.name}**" if key.required else key.name
            rows.append(f"| {name} | {kind_of(key.value.schema)} | {key.says} |")
        parts.append("\n".join(rows))
        for value in schema[verb.name]["examples"]:
            parts.append(text(f"- {verb.name}: {json.dumps(value)}", "yaml"))
    return "\n\n".join(parts)


def commands_page() -> str:
    parts = ["# Commands", "What `--help` prints for each. [The command line](../cli.md) shows them at work."]
    for title, rows in (("Commands", ROWS), ("Edits of the leaves that a selector matches", edits())):
        parts.append(f"## {title}")
        for row in rows:
            context = click.Context(cli, info_name="paramend", max_content_width=92, terminal_width=92)
            command = cli.get_command(context, row.name)
            inner = click.Context(command, info_name=row.name, parent=context, terminal_width=92)
            also = f"Also `{'`, `'.join(row.aliases)}`.\n\n" if row.aliases else ""
            parts.append(f"### {row.name}\n\n{also}{text(click.unstyle(command.get_help(inner)))}")
    return "\n\n".join(parts)


def errors_page() -> str:
    parts = [
        "# Errors",
        "All are a `pm.errors.ParamendError`. Each has a `code`, and most a `hint` with what to type; "
        "`paramend explain CODE` prints what stands here.",
        errors_table(),
    ]
    return "\n\n".join([*parts, (PACKAGE / "cli" / "errors.md").read_text()])


def layouts_page() -> str:
    parts = [
        "# Layouts that ship",
        "`pm.layout(name)` opens one; `paramend layout NAME MODEL -o OUT` stores a model by it, `--back` undoes it. "
        "[Layouts](../layouts.md) says what the rules mean.",
    ]
    rows = ["| layout | what it is |", "|---|---|"]
    shown = []
    for name in shelf.layouts():
        lines = (shelf._SHELF / f"{name}.yaml").read_text().splitlines()
        said = [line for line in lines if line.startswith("#")]
        rows.append(f"| [`{name}`](#{name}) | {' '.join(line.lstrip('# ') for line in said)} |")
        shown.append(f"## {name}\n\n" + text("\n".join(line for line in lines if line not in said), "yaml"))
    return "\n\n".join([*parts, "\n".join(rows), *shown])


def families_page() -> str:
    rows = ["| family | model types | projections that write to the residual stream | set to |", "|---|---|---|---|"]
    refused = ["| family | model types | why |", "|---|---|---|"]
    for row in FAMILIES:
        types = code(row.model_types)
        if row.refused:
            refused.append(f"| `{row.name}` | {types} | {row.refused} |")
        else:
            rows.append(f"| `{row.name}` | {types} | {code(row.writers)} | {row.value:g} |")
    return "\n\n".join(
        [
            "# Model families",
            "What makes a layer the identity, for `identity=` of `pm.deepen`, `pm.init.zero_residual` and "
            '`pm.ablate(how="identity")`. Names are relative to a layer, and `*` is a number. '
            "Models that are not here name their leaves themselves, or let "
            "[`pm.residual_writers`](../growth.md#which-leaves-make-a-layer-the-identity) find them by trial. "
            "[`pm.anatomy`](../checkpoints.md#what-a-model-is) reads any model, whatever its family.",
            "\n".join(rows),
            "## Refused",
            "\n".join(refused),
        ]
    )


def formats_page() -> str:
    rows = [
        "| format | what it is | names end in | new files | in place | what survives an edit |",
        "|---|---|---|---|---|---|",
    ]
    for row in FORMATS:
        needs = f" (needs `paramend[{row.extra}]`)" if row.extra else ""
        cells = (f"`{row.name}`", row.says + needs, code(row.suffixes), "yes", "yes", row.keeps)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n\n".join(
        [
            "# Formats",
            "The content of a file decides its format when it is read, the suffix when it is written. "
            "[Checkpoints](../checkpoints.md) says how they are opened, edited and converted.",
            "\n".join(rows),
        ]
    )


PAGES: dict[str, Callable[[], str]] = {
    "reference/edits.md": ops_page,
    "reference/recipe-steps.md": steps_page,
    "reference/commands.md": commands_page,
    "reference/errors.md": errors_page,
    "reference/layouts.md": layouts_page,
    "reference/families.md": families_page,
    "reference/formats.md": formats_page,
}


def made_pages() -> dict[str, str]:
    """Path in the site → Markdown, for every page that is made."""
    api = {f"reference/api-{title.lower()}.md": api_page(title, names) for title, names in groups().items()}
    return api | {path: make() for path, make in PAGES.items()}
