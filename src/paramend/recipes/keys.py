"""The keys that steps take, and the kinds of their values."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from paramend.anatomy.documents import json_value
from paramend.edits.arguments import (
    AXIS,
    DTYPE_OR_KIND,
    INDEX,
    NATURAL,
    NUMBER,
    SHAPE,
    SIZES,
    TEXT,
    Value,
    shown,
)
from paramend.errors import BadArgument
from paramend.leaves.codecs.fresh import WRITABLE, check_scheme


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a step: its name, what value it takes, what it means, whether it is required."""

    name: str
    value: Value
    says: str
    required: bool = False


# The conditions of `pm.sel(...).where(...)`.
CONDITIONS = (
    Key("ndim", NATURAL, "the number of axes"),
    Key("dtype", DTYPE_OR_KIND, "a dtype; as a condition also a kind: float, int, bool, complex"),
    Key("shape", SHAPE, "the exact shape"),
    Key("min_size", NATURAL, "the least number of scalars"),
    Key("max_size", NATURAL, "the greatest number of scalars"),
)
# `recipes.steps` reads `at`, `except` and `where`: they hold lists and maps whose parts have their own addresses.
SELECTOR = Value(
    "a selector", TEXT.read, {"anyOf": [TEXT.schema, {"type": "array", "minItems": 1, "items": TEXT.schema}]}
)
_CONDITION_MAP = Value(
    "a map of conditions",
    dict,
    {
        "type": "object",
        "properties": {key.name: key.value.schema for key in CONDITIONS},
        "additionalProperties": False,
        "minProperties": 1,
    },
)


def _texts(data: Any) -> list[str]:
    if isinstance(data, list | tuple) and not data:
        raise BadArgument("an empty list names nothing")
    return [TEXT.read(text) for text in (data if isinstance(data, list | tuple) else [data])]


def _values(data: Any) -> dict[str, Any]:
    if not isinstance(data, Mapping) or not data:
        raise BadArgument(f"{shown(data)} is not a map of keys and values", hint="{num_hidden_layers: 12}")
    return {TEXT.read(key): json_value(key, value) for key, value in data.items()}


def _shares(data: Any) -> Any:
    return [NUMBER.read(each) for each in data] if isinstance(data, list | tuple) else NUMBER.read(data)


def _kept(data: Any) -> Any:
    return data if type(data) is int else SIZES.read(data)


def _experts(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(layer): SIZES.read(ids) for layer, ids in data.items()}
    return SIZES.read(data)


def _renames(data: Any) -> dict[str, str]:
    if not isinstance(data, Mapping) or not data:
        raise BadArgument(f"{shown(data)} is not a map of paths", hint='{"old.**": "new.**"}')
    return {TEXT.read(old): TEXT.read(new) for old, new in data.items()}


def _count(data: Any) -> int:
    if not NATURAL.read(data):
        raise BadArgument("0 is too few")
    return int(data)


def _scheme(data: Any) -> str:
    check_scheme(TEXT.read(data))
    return str(data)


NEW_PATH = TEXT.named("a path", "layers/<n>/w")
PATHS = Value("a list of paths", _texts, {"type": "array", "minItems": 1, "items": TEXT.schema}, example="layers/<n>/w")
KEPT = Value("how many places stay, or which ones", _kept, SIZES.schema, example="0,1")
WIDTHS = {
    "hidden": "the residual width",
    "mlp": "the width of the feed-forward layers",
    "heads": "the number of query heads",
    "kv_heads": "the number of heads of keys and values",
}
EXPERTS = Value(
    "experts, or a map from layers to those of each",
    _experts,
    {"anyOf": [SIZES.schema, {"type": "object", "additionalProperties": SIZES.schema}]},
    example="0,1",
)
SOURCES = Value("a path, or a list of them", _texts, SELECTOR.schema, example="adapter/")
IDS = SIZES.named("a list of numbers", "0,1,2")
TOKENS = PATHS.named("a list of texts", "<a>")
VALUES = Value("a map of keys and values", _values, {"type": "object", "minProperties": 1})
FILES = replace(PATHS, says="a list of checkpoints", example="tuned.safetensors")
SHARES = Value(
    "a number, or one for each model", _shares, {"anyOf": [NUMBER.schema, {"type": "array", "items": NUMBER.schema}]}
)

HEAD = Key("head", TEXT.named("a path", "lm_head.weight"), "the path of the head's weight, if it is not a usual one")
KEEP = Key("keep", TEXT.named("a text", "embedding"), "whose values stay if they differ: `embedding` or `head`")
RENAMES = Value("a map of paths", _renames, {"type": "object", "minProperties": 1, "additionalProperties": TEXT.schema})
SCHEME = Value("a scheme of quantised weights", _scheme, {"enum": list(WRITABLE)}, example="fp8-block")
COUNT = Value("a whole number, not 0", _count, {"type": "integer", "minimum": 1}, example="64")

AT = Key("at", SELECTOR, "which leaves: a selector, or a list of them", required=True)
EXCEPT = Key("except", SELECTOR, "which of them are left out: a selector, or a list of them")
WHERE = Key("where", _CONDITION_MAP, "only leaves whose specs fit: ndim, dtype, shape, min_size, max_size")
CHOSEN = AT, EXCEPT, WHERE
SLICE = Key("index", INDEX, 'the slice of each leaf that changes, such as -1 or "0:4"')
INTO = (
    "the path of the new leaf, or for `split` a list of them, with the wildcards of `at`; for `fold`: `embedding`, if "
    "a tied head and its embedding shall both change"
)
RENAME = Key("rename", RENAMES, "path → path in the result, with the wildcards of the first")
ALONG = Key("axis", AXIS, AXIS.says)
FROM = Key("from", TEXT, "the .npy file or checkpoint that the values come from, relative to the recipe's folder")
LEAF = Key("leaf", TEXT, "the leaf of that checkpoint; it takes the wildcards of `at`, as in a rename")
