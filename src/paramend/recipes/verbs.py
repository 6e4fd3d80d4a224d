"""The table of steps: verbs with the keys that each takes. Edits come from the table of ops."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from paramend.anatomy.documents import json_value
from paramend.edits.arguments import (
    AXIS,
    DTYPE,
    DTYPE_OR_KIND,
    INDEX,
    NATURAL,
    NUMBER,
    SEED,
    SHAPE,
    SIZES,
    TEXT,
    Value,
    shown,
)
from paramend.edits.call import Op
from paramend.edits.ops import OPS
from paramend.errors import BadArgument
from paramend.leaves.codecs.fresh import WRITABLE, check_scheme
from paramend.recipes import changes
from paramend.recipes.changes import Make


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a step: its name, what value it takes, what it means, whether it is required."""

    name: str
    value: Value
    says: str
    required: bool = False


@dataclass(frozen=True, slots=True)
class Verb:
    """A kind of step: its key, what it does, and what the map below it may hold.

    `op` is its row of the table of ops; None for changes of structure and for expectations. Exactly one of the keys
    `one_of` is required, at least one of `any_of`. If it `changes`, the steps after it see different paths or specs.
    `make` is what it makes of a tree, for changes that take more than some leaves; `selects` says whether `at` selects
    leaves as they are stored there.
    """

    name: str
    says: str
    keys: tuple[Key, ...]
    op: Op | None = None
    one_of: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    changes: bool = False
    make: Make | None = None
    selects: bool = True

    def __reduce__(self) -> tuple[Any, ...]:
        return verb_of, (self.name,)

    @property
    def example(self) -> dict[str, Any]:
        if self.any_of:
            return {self.name: {"set": {"text_config.num_hidden_layers": 12}}}
        if self.keys[0].name != "at":  # of a whole model
            named = [key for key in self.keys if key.required] or self.keys[:1]
            return {self.name: {key.name: key.value.typed(key.value.example) for key in named}}
        new = {key.name for key in self.keys if key.required} & {"to", "into"}
        selector: Any = "h/<n>/w" if new else "**/kernel"
        if self.name in ("concat", "interleave"):
            selector = ["h/<n>/q", "h/<n>/k"]
        if self.short:
            return {self.name: selector}
        values = {key.name: key.value.typed(key.value.example) for key in self.keys if key.value.example}
        given = {key.name: values[key.name] for key in self.keys if key.required and key.name != "at"}
        if self.one_of:
            name = next((name for name in self.one_of if name in values), "from")
            given[name] = values.get(name, "values.safetensors")
        return {self.name: {"at": selector, **given}}

    @property
    def short(self) -> bool:
        """Whether a selector alone is enough: `zero: "**/bias"`."""
        return [key.name for key in self.keys if key.required] == ["at"] and not self.one_of


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
WHERE = Value(
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

_HEAD = Key("head", TEXT.named("a path", "lm_head.weight"), "the path of the head's weight, if it is not a usual one")
_KEEP = Key("keep", TEXT.named("a text", "embedding"), "whose values stay if they differ: `embedding` or `head`")
RENAMES = Value("a map of paths", _renames, {"type": "object", "minProperties": 1, "additionalProperties": TEXT.schema})
SCHEME = Value("a scheme of quantised weights", _scheme, {"enum": list(WRITABLE)}, example="fp8-block")
_COUNT = Value("a whole number, not 0", _count, {"type": "integer", "minimum": 1}, example="64")

_AT = Key("at", SELECTOR, "which leaves: a selector, or a list of them", required=True)
_EXCEPT = Key("except", SELECTOR, "which of them are left out: a selector, or a list of them")
_WHERE = Key("where", WHERE, "only leaves whose specs fit: ndim, dtype, shape, min_size, max_size")
_INDEX = Key("index", INDEX, 'the slice of each leaf that changes, such as -1 or "0:4"')
_INTO = (
    "the path of the new leaf, or for `split` a list of them, with the wildcards of `at`; for `fold`: `embedding`, if "
    "a tied head and its embedding shall both change"
)
_RENAME = Key("rename", RENAMES, "path → path in the result, with the wildcards of the first")
_ALONG = Key("axis", AXIS, AXIS.says)
_FROM = Key("from", TEXT, "the .npy file or checkpoint that the values come from, relative to the recipe's folder")
_LEAF = Key("leaf", TEXT, "the leaf of that checkpoint; it takes the wildcards of `at`, as in a rename")


def _of_op(op: Op) -> Verb:
    keys = [_AT, _EXCEPT, _WHERE]
    if op.keeps_spec:
        keys.append(_INDEX)
    for name, value in op.arguments.items():
        keys.append(Key(name, value, value.says, required=name not in (*op.optional, op.array)))
    if op.array:
        keys += [_FROM, _LEAF]
    return Verb(op.name, op.says, tuple(keys), op, (op.array, "from") if op.array else (), changes=not op.keeps_spec)


VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        *(_of_op(op) for op in OPS.values() if not op.code),
        Verb(
            "rename",
            "the leaves get new paths",
            (_AT, _EXCEPT, _WHERE, Key("to", NEW_PATH, "the new path, with the wildcards of `at`", required=True)),
            changes=True,
        ),
        *(
            Verb(
                make.__name__, says, (_AT, Key("into", NEW_PATH, _INTO, required=True), _ALONG), changes=True, make=make
            )
            for make, says in (
                (changes.concat, "several leaves become one, one after the other along an axis"),
                (changes.interleave, "several leaves become one, their places along an axis in turns"),
            )
        ),
        Verb(
            "split",
            "a leaf becomes several, cut along an axis",
            (
                _AT,
                Key("into", PATHS, _INTO, required=True),
                _ALONG,
                Key("sizes", SIZES, "the length of each part along the axis; by default all are equal"),
            ),
            changes=True,
            make=changes.split,
        ),
        Verb(
            "pad",
            "zeros follow the places along an axis",
            (
                _AT,
                Key("multiple", _COUNT, "the length along the axis becomes a multiple of this"),
                Key("length", _COUNT, "the length that the axis gets"),
                _ALONG,
            ),
            one_of=("multiple", "length"),
            changes=True,
            make=changes.pad,
        ),
        Verb(
            "tie",
            "the head becomes the embedding; with `at` and `into`, a leaf stands under further names, too",
            (_HEAD, _KEEP, Key("at", SELECTOR, "the leaf"), Key("into", PATHS, _INTO)),
            changes=True,
            make=changes.tie,
        ),
        Verb("untie", "the head gets a weight of its own", (_HEAD,), changes=True, make=changes.untie, selects=False),
        Verb(
            "dequantize",
            "quantised weights become floats",
            (_AT, Key("dtype", DTYPE, "that of the floats; bfloat16 if it is left out")),
            changes=True,
            make=changes.dequantize,
            selects=False,
        ),
        Verb(
            "quantize",
            "weights get a quantised scheme",
            (
                _AT,
                Key("scheme", SCHEME, "the scheme, such as fp8-block or int4", required=True),
                Key("group_size", AXIS, "how many inputs share a scale, where the scheme leaves it open; -1: all"),
            ),
            changes=True,
            make=changes.quantize,
            selects=False,
        ),
        Verb(
            "part",
            "the selected leaves alone become the model",
            (_AT, _RENAME),
            changes=True,
            make=changes.part,
        ),
        Verb(
            "insert",
            "leaves of another checkpoint, which are not there, come in",
            (
                Key(
                    "at", SELECTOR, "which leaves of the other checkpoint: a selector, or a list of them", required=True
                ),
                Key("from", TEXT.named("a checkpoint", "mtp.safetensors"), _FROM.says, required=True),
                _RENAME,
            ),
            changes=True,
            make=changes.insert,
            selects=False,
        ),
        Verb(
            "config",
            "keys of the `config.json` beside the weights of a checkpoint are set, and others deleted",
            (
                Key("set", VALUES, "key → value; dots lead into parts, as in `text_config.num_hidden_layers`"),
                Key("delete", PATHS, "a list of keys, as in `set`; each must be there"),
            ),
            any_of=("set", "delete"),
        ),
        Verb(
            "merge",
            "the values become those of several models: of the tree, the first one, and of others",
            (
                Key(
                    "source",
                    FILES,
                    "the other models, relative to the recipe's folder or the checkpoint's",
                    required=True,
                ),
                Key("how", TEXT, "the method, by default `linear`"),
                Key("weights", SHARES, "how much each model counts, that of the tree first"),
                Key("base", TEXT, "the model that all come from, for methods that need it"),
                Key(
                    "t", NUMBER, "for `slerp` how far from the first to the second, for `nearswap` the greatest change"
                ),
                *(
                    Key(name, SHARES, says)
                    for name, says in (
                        ("density", "the share of changes that stay"),
                        ("gamma", "for `breadcrumbs`, the share of changes that go because they are the largest"),
                        ("epsilon", "for `della`, how far chances are from the density"),
                    )
                ),
                Key("seed", SEED, "of what `dare` and `della` leave to chance"),
                Key("scale", NUMBER, "a factor of the change of the base"),
                Key("at", VALUES, "selector → settings for its leaves; the first that matches a leaf counts"),
                Key("convention", TEXT, "`paper`, `mergekit` or `peft`"),
                Key("missing", TEXT, "`keep`: leaves that are in some models only stay as they are"),
                Key("stats", TEXT, "statistics of batches: those of the `first` model, or their `mean`"),
            ),
            make=changes.merge,
            selects=False,
        ),
        Verb(
            "widen",
            "axes of a model become longer, and it computes what it did",
            (
                *(Key(name, NATURAL.named("a number", "64"), says) for name, says in WIDTHS.items()),
                Key("features", VALUES, "path of a layer → how many features it is to have"),
                Key("method", TEXT, "`tile`, `split` or `zero`"),
            ),
            changes=True,
            make=changes.widen,
            selects=False,
        ),
        Verb(
            "narrow",
            "axes of a model keep some of their places",
            (
                *(Key(name, KEPT, says) for name, says in WIDTHS.items()),
                Key("layers", KEPT, "the layers"),
                Key("vocabulary", KEPT, "the tokens"),
                Key("features", VALUES, "path of a layer → the features that stay"),
                Key("by", TEXT, "`norm`, or the file with scores of axes"),
            ),
            changes=True,
            make=changes.narrow,
            selects=False,
        ),
        Verb(
            "experts",
            "a mixture has some of its experts, or each several times, with router and configuration",
            (
                Key("keep", EXPERTS, "the experts that stay, in this order: a list, or a map from layers to lists"),
                Key("drop", EXPERTS, "the experts that are left out"),
                Key("duplicate", NATURAL, "how often each expert is there; a token goes to as many times more"),
            ),
            one_of=("keep", "drop", "duplicate"),
            changes=True,
            make=changes.experts,
            selects=False,
        ),
        Verb(
            "upcycle",
            "a dense model becomes a mixture of experts",
            (
                Key("experts", NATURAL.named("a number", "8"), "how many experts each layer gets", required=True),
                Key("top_k", NATURAL.named("a number", "2"), "how many of them a token goes to", required=True),
                Key("router", TEXT, "`random`, or the .npy file of the weight of all routers"),
                Key("drop", NUMBER, "the share of hidden units that are drawn anew in each expert"),
                Key("seed", SEED, SEED.says),
            ),
            changes=True,
            make=changes.upcycle,
            selects=False,
        ),
        Verb(
            "fold",
            "adapters are added to the weights that they change",
            (
                Key("source", SOURCES, "the adapters, relative to the recipe's folder", required=True),
                Key("scale", NUMBER, "a further factor of all terms"),
                Key("into", TEXT, _INTO),
            ),
            changes=True,
            make=changes.fold,
            selects=False,
        ),
        Verb(
            "vocabulary",
            "a model has some of its tokens, or more: tables, configuration and tokenizer",
            (
                Key("keep", IDS, "the numbers of the tokens that stay, with those that they need"),
                Key("extend", TOKENS, "new tokens, at the next numbers"),
                Key("pad", NATURAL, "rows up to a multiple of this"),
                Key(
                    "transplant", TEXT, "the checkpoint whose tokens come in the place, relative to the recipe's folder"
                ),
                Key("init", TEXT, "new rows: `mean`, `subwords` or `zero`"),
            ),
            one_of=("keep", "extend", "pad", "transplant"),
            changes=True,
            make=changes.vocabulary,
            selects=False,
        ),
        Verb("delete", "the leaves are left out", (_AT, _EXCEPT, _WHERE), changes=True),
        Verb(
            "expect",
            "nothing changes; all selected leaves must be as described",
            (_AT, _EXCEPT, _WHERE, Key("count", NATURAL, "how many leaves are selected; may be 0"), *CONDITIONS),
        ),
    )
}


def verb_of(name: str) -> Verb:
    """The row of the table.

    >>> verb_of("delete").says
    'the leaves are left out'
    """
    return VERBS[name]


# Ops that take code.
CODE = {op.name for op in OPS.values() if op.code}
