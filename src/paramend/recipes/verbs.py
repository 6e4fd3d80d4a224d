"""The table of steps: verbs with the keys that each takes. Edits come from the table of ops.

What the others make of a tree is a function of the tree, the keys of the step, and the files that it names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from paramend.checkpoints import tying
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.arguments import AXIS, DEFINITIONS, DTYPE, NATURAL, NUMBER, SEED, SIZES, TEXT
from paramend.edits.call import Op
from paramend.edits.memory import Memory
from paramend.edits.ops import OPS
from paramend.errors import BadArgument
from paramend.mapping import joining
from paramend.recipes import keys
from paramend.recipes.donors import Donors
from paramend.recipes.keys import Key
from paramend.selectors.selector import Selector, Union, sel

Given: TypeAlias = Mapping[str, Any]
Make: TypeAlias = Callable[[Any, Given, Donors], Any]


@dataclass(frozen=True, slots=True)
class Verb:
    """A kind of step: its key, what it does, and what the map below it may hold."""

    name: str
    says: str
    keys: tuple[Key, ...]
    op: Op | None = None  # its row of the table of ops; None for changes of structure and for expectations
    one_of: tuple[str, ...] = ()  # keys of which exactly one is required
    any_of: tuple[str, ...] = ()  # keys of which at least one is required
    changes: bool = False  # whether the steps after it see different paths or specs
    make: Make | None = None  # what it makes of a tree, for changes that take more than some leaves
    selects: bool = True  # whether `at` selects leaves as they are stored there

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


VERBS: dict[str, Verb] = {}


def _enter(name: str, says: str, *taken: Key, **more: Any) -> None:
    VERBS[name] = Verb(name, says, taken, **more)


def _step(*taken: Key, changes: bool = True, selects: bool = False, **more: Any) -> Callable[[Make], Make]:
    """Enter a function as a step: its name is that of the verb, and its docstring says what it does."""

    def entered(make: Make) -> Make:
        says = str(make.__doc__)
        says = f"{says[0].lower()}{says[1:-1]}"
        _enter(make.__name__, says, *taken, make=make, changes=changes, selects=selects, **more)
        return make

    return entered


def _enter_op(op: Op) -> None:
    taken = [*keys.CHOSEN, *[keys.SLICE] * op.keeps_spec]
    for name, value in op.arguments.items():
        taken.append(Key(name, value, value.says, required=name not in (*op.optional, op.array)))
    taken += [keys.FROM, keys.LEAF] if op.array else []
    one_of = (op.array, "from") if op.array else ()
    _enter(op.name, op.says, *taken, op=op, one_of=one_of, changes=not op.keeps_spec)


for _op in OPS.values():
    if not _op.code:
        _enter_op(_op)
_to = Key("to", keys.NEW_PATH, "the new path, with the wildcards of `at`", required=True)
_enter("rename", "the leaves get new paths", *keys.CHOSEN, _to, changes=True)


def _texts(given: Given) -> list[str]:
    at = given["at"]
    return at if isinstance(at, list) else [at]


def _selector(given: Given) -> Selector:
    return Union(tuple(map(sel, _texts(given))))


def _whole(tree: Any) -> Any:
    """The model itself: a checkpoint, or what a tree in memory was made of."""
    return tree.root if isinstance(tree, Memory) else tree


@_step(keys.AT, Key("into", keys.NEW_PATH, keys.INTO, required=True), keys.ALONG, selects=True)
def concat(tree: Any, given: Given, donors: Donors) -> Any:
    """Several leaves become one, one after the other along an axis."""
    return joining.concat(tree, _texts(given), into=given["into"], axis=given.get("axis", 0))


@_step(keys.AT, Key("into", keys.NEW_PATH, keys.INTO, required=True), keys.ALONG, selects=True)
def interleave(tree: Any, given: Given, donors: Donors) -> Any:
    """Several leaves become one, their places along an axis in turns."""
    return joining.interleave(tree, _texts(given), into=given["into"], axis=given.get("axis", 0))


@_step(
    keys.AT,
    Key("into", keys.PATHS, keys.INTO, required=True),
    keys.ALONG,
    Key("sizes", SIZES, "the length of each part along the axis; by default all are equal"),
    selects=True,
)
def split(tree: Any, given: Given, donors: Donors) -> Any:
    """A leaf becomes several, cut along an axis."""
    texts = _texts(given)
    if len(texts) > 1:
        raise BadArgument(f"split cuts one leaf, and at names {len(texts)}", hint="a step for each")
    return joining.split(tree, texts[0], into=given["into"], axis=given.get("axis", 0), sizes=given.get("sizes"))


@_step(
    keys.AT,
    Key("multiple", keys.COUNT, "the length along the axis becomes a multiple of this"),
    Key("length", keys.COUNT, "the length that the axis gets"),
    keys.ALONG,
    one_of=("multiple", "length"),
    selects=True,
)
def pad(tree: Any, given: Given, donors: Donors) -> Any:
    """Zeros follow the places along an axis."""
    length = {"to": given["length"]} if "length" in given else {"multiple": given["multiple"]}
    args = {"size": 0, "axis": given.get("axis", 0), **length}
    for text in _texts(given):
        tree = joining.ruled(tree, [text], [text], joining.Step("pad", args))
    return tree


@_step(keys.HEAD, keys.KEEP, Key("at", keys.SELECTOR, "the leaf"), Key("into", keys.PATHS, keys.INTO), selects=True)
def tie(tree: Any, given: Given, donors: Donors) -> Any:
    """The head becomes the embedding; with `at` and `into`, a leaf stands under further names, too."""
    if "at" not in given and "into" not in given:
        return tying.tie(_whole(tree), **given)[0]
    if given.keys() != {"at", "into"}:
        raise BadArgument("a leaf gets further names by at and into alone", hint="{at: a/w, into: [b/w]}")
    texts = _texts(given)
    if len(texts) > 1:
        raise BadArgument(f"tie gives names to one leaf, and at names {len(texts)}", hint="a step for each")
    return joining.ruled(tree, texts, [*texts, *given["into"]], joining.Step("tie", {}))


@_step(keys.HEAD)
def untie(tree: Any, given: Given, donors: Donors) -> Any:
    """The head gets a weight of its own."""
    return tying.untie(_whole(tree), **given)[0]


@_step(keys.AT, Key("dtype", DTYPE, "that of the floats; bfloat16 if it is left out"))
def dequantize(tree: Any, given: Given, donors: Donors) -> Any:
    """Quantised weights become floats."""
    from paramend.quantizing import dequantizing  # most recipes have no such step

    return dequantizing.dequantize(tree, _selector(given), given.get("dtype", "bfloat16"))[0]


@_step(
    keys.AT,
    Key("scheme", keys.SCHEME, "the scheme, such as fp8-block or int4", required=True),
    Key("group_size", AXIS, "how many inputs share a scale, where the scheme leaves it open; -1: all"),
)
def quantize(tree: Any, given: Given, donors: Donors) -> Any:
    """Weights get a quantised scheme."""
    from paramend.quantizing import quantizing  # as above

    group_size = given.get("group_size")
    return quantizing.quantize(tree, _selector(given), scheme=given["scheme"], group_size=group_size)[0]


@_step(keys.AT, keys.RENAME, selects=True)
def part(tree: Any, given: Given, donors: Donors) -> Any:
    """The selected leaves alone become the model."""
    from paramend.grafting import parts  # as above

    return parts.part(tree, _selector(given), rename=given.get("rename"))[0]


@_step(
    Key("at", keys.SELECTOR, "which leaves of the other checkpoint: a selector, or a list of them", required=True),
    Key("from", TEXT.named("a checkpoint", "mtp.safetensors"), keys.FROM.says, required=True),
    keys.RENAME,
)
def insert(tree: Any, given: Given, donors: Donors) -> Any:
    """Leaves of another checkpoint, which are not there, come in."""
    from paramend.grafting import parts  # as above

    name = given["from"]
    donor = donors.open(name)
    if not isinstance(donor, Checkpoint):
        raise BadArgument(f"{name} holds one array, without a name", hint='pm.save({"w": array}, "new.safetensors")')
    return parts.insert(tree, donor, _selector(given), rename=given.get("rename"))[0]


_enter(
    "config",
    "keys of the `config.json` beside the weights of a checkpoint are set, and others deleted",
    Key("set", keys.VALUES, "key → value; dots lead into parts, as in `text_config.num_hidden_layers`"),
    Key("delete", keys.PATHS, "a list of keys, as in `set`; each must be there"),
    any_of=("set", "delete"),
)


@_step(
    Key("source", keys.FILES, "the other models, relative to the recipe's folder or the checkpoint's", required=True),
    Key("how", TEXT, "the method, by default `linear`"),
    Key("weights", keys.SHARES, "how much each model counts, that of the tree first"),
    Key("base", TEXT, "the model that all come from, for methods that need it"),
    Key("t", NUMBER, "for `slerp` how far from the first to the second, for `nearswap` the greatest change"),
    Key("density", keys.SHARES, "the share of changes that stay"),
    Key("gamma", keys.SHARES, "for `breadcrumbs`, the share of changes that go because they are the largest"),
    Key("epsilon", keys.SHARES, "for `della`, how far chances are from the density"),
    Key("seed", SEED, "of what `dare` and `della` leave to chance"),
    Key("scale", NUMBER, "a factor of the change of the base"),
    Key("at", keys.VALUES, "selector → settings for its leaves; the first that matches a leaf counts"),
    Key("convention", TEXT, "`paper`, `mergekit` or `peft`"),
    Key("missing", TEXT, "`keep`: leaves that are in some models only stay as they are"),
    Key("stats", TEXT, "statistics of batches: those of the `first` model, or their `mean`"),
    changes=False,
)
def merge(tree: Any, given: Given, donors: Donors) -> Any:
    """The values become those of several models: of the tree, the first one, and of others."""
    from paramend.merging import merge as of  # as above

    how = dict(given)
    models = [tree, *(donors.model(name, tree) for name in how.pop("source"))]
    base = donors.model(how.pop("base"), tree) if "base" in how else None
    return of.merge(models, base=base, **how)[0]


@_step(
    *(Key(name, NATURAL.named("a number", "64"), says) for name, says in keys.WIDTHS.items()),
    Key("features", keys.VALUES, "path of a layer → how many features it is to have"),
    Key("method", TEXT, "`tile`, `split` or `zero`"),
)
def widen(tree: Any, given: Given, donors: Donors) -> Any:
    """Axes of a model become longer, and it computes what it did."""
    from paramend.growth import widening  # as above

    return widening.widen(_whole(tree), **given)[0]


@_step(
    *(Key(name, keys.KEPT, says) for name, says in keys.WIDTHS.items()),
    Key("layers", keys.KEPT, "the layers"),
    Key("vocabulary", keys.KEPT, "the tokens"),
    Key("features", keys.VALUES, "path of a layer → the features that stay"),
    Key("by", TEXT, "`norm`, or the file with scores of axes"),
)
def narrow(tree: Any, given: Given, donors: Donors) -> Any:
    """Axes of a model keep some of their places."""
    from paramend.growth import narrowing  # as above

    keep = {axis: what for axis, what in given.items() if axis not in ("features", "by")} | given.get("features", {})
    if given.get("by", "norm") == "norm":
        return narrowing.narrow(_whole(tree), keep)[0]
    scores = donors.open(given["by"])
    if not isinstance(scores, Checkpoint):
        hint = 'np.savez("scores.npz", mlp=scores)'
        raise BadArgument(f"{given['by']} holds one array, without the name of an axis", hint=hint)
    return narrowing.narrow(_whole(tree), keep, by=dict(scores.items()))[0]


@_step(
    Key("keep", keys.EXPERTS, "the experts that stay, in this order: a list, or a map from layers to lists"),
    Key("drop", keys.EXPERTS, "the experts that are left out"),
    Key("duplicate", NATURAL, "how often each expert is there; a token goes to as many times more"),
    one_of=("keep", "drop", "duplicate"),
)
def experts(tree: Any, given: Given, donors: Donors) -> Any:
    """A mixture has some of its experts, or each several times, with router and configuration."""
    from paramend.growth.experts import experts as of  # as above

    ((name, value),) = given.items()
    return getattr(of(_whole(tree)), name)(value)[0]


@_step(
    Key("experts", NATURAL.named("a number", "8"), "how many experts each layer gets", required=True),
    Key("top_k", NATURAL.named("a number", "2"), "how many of them a token goes to", required=True),
    Key("router", TEXT, "`random`, or the .npy file of the weight of all routers"),
    Key("drop", NUMBER, "the share of hidden units that are drawn anew in each expert"),
    Key("seed", SEED, SEED.says),
)
def upcycle(tree: Any, given: Given, donors: Donors) -> Any:
    """A dense model becomes a mixture of experts."""
    from paramend.growth import upcycling  # as above

    router = given.get("router", "random")
    return upcycling.upcycle(
        _whole(tree), **{**given, "router": donors.open(router) if router.endswith(".npy") else router}
    )[0]


@_step(
    Key("source", keys.SOURCES, "the adapters, relative to the recipe's folder", required=True),
    Key("scale", NUMBER, "a further factor of all terms"),
    Key("into", TEXT, keys.INTO),
)
def fold(tree: Any, given: Given, donors: Donors) -> Any:
    """Adapters are added to the weights that they change."""
    from paramend.merging import folding  # as above

    options = dict(given)
    sources = [donors.place(name, tree) for name in options.pop("source")]
    return folding.fold(_whole(tree), sources, **options)[0]


@_step(
    Key("keep", keys.IDS, "the numbers of the tokens that stay, with those that they need"),
    Key("extend", keys.TOKENS, "new tokens, at the next numbers"),
    Key("pad", NATURAL, "rows up to a multiple of this"),
    Key("transplant", TEXT, "the checkpoint whose tokens come in the place, relative to the recipe's folder"),
    Key("init", TEXT, "new rows: `mean`, `subwords` or `zero`"),
    one_of=("keep", "extend", "pad", "transplant"),
)
def vocabulary(tree: Any, given: Given, donors: Donors) -> Any:
    """A model has some of its tokens, or more: tables, configuration and tokenizer."""
    from paramend.tokens import vocabulary as of  # as above

    how = {"init": given["init"]} if "init" in given else {}
    ((name, value),) = ((key, each) for key, each in given.items() if key != "init")
    value = donors.open(value) if name == "transplant" else value
    return getattr(of.vocabulary(_whole(tree)), name)(value, **how)[0]


_count = Key("count", NATURAL, "how many leaves are selected; may be 0")
_enter("delete", "the leaves are left out", *keys.CHOSEN, changes=True)
_enter("expect", "nothing changes; all selected leaves must be as described", *keys.CHOSEN, _count, *keys.CONDITIONS)


def verb_of(name: str) -> Verb:
    """The row of the table.

    >>> verb_of("delete").says
    'the leaves are left out'
    """
    return VERBS[name]


# Ops that take code.
CODE = {op.name for op in OPS.values() if op.code}


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
