"""The JSON Schema of recipes, made from the table of steps, for completion and checks in editors."""

from typing import Any

from paramend.edits.arguments import DEFINITIONS
from paramend.recipes.verbs import VERBS, Verb

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def make_schema() -> dict[str, Any]:
    """The schema, in the 2020-12 dialect."""
    return {
        "$schema": DIALECT,
        "title": "Paramend recipe",
        "description": "Edits of model parameters, carried out in order.",
        "type": "object",
        "properties": {
            "version": {"const": 1, "description": "the version of the format"},
            "raw": {"type": "boolean", "description": "whether leaves are taken as they are stored"},
            "steps": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "minProperties": 1,
                    "maxProperties": 1,
                    "additionalProperties": False,
                    "properties": {verb.name: {"$ref": f"#/$defs/{verb.name}"} for verb in VERBS.values()},
                },
            },
        },
        "required": ["version", "steps"],
        "additionalProperties": False,
        "$defs": {name: dict(schema) for name, schema in DEFINITIONS.items()}
        | {
            verb.name: {"description": verb.says, **_body(verb), "examples": [*verb.example.values()]}
            for verb in VERBS.values()
        },
    }


def _body(verb: Verb) -> dict[str, Any]:
    table: dict[str, Any] = {
        "type": "object",
        "properties": {key.name: {"description": key.says, **key.value.schema} for key in verb.keys},
        "required": [key.name for key in verb.keys if key.required],
        "additionalProperties": False,
    }
    if verb.any_of:
        table["anyOf"] = [{"required": [name]} for name in verb.any_of]
    if verb.one_of:
        table["oneOf"] = [{"required": [name]} for name in verb.one_of]
    if any(key.name == "leaf" for key in verb.keys):
        table["dependentRequired"] = {"leaf": ["from"]}
    return {"anyOf": [verb.keys[0].value.schema, table]} if verb.short else table
