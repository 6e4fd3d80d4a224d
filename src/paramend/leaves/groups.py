"""Groups: stored leaves that are one weight together, told by their names and specs; no value is read.

To a file a leaf is an array; to a person it is a weight. A quantised weight is stored as a payload of codes and its
companions: scales, zero points, tables. `leaves.schemes` is the table of how they are called.
"""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from paramend.leaves.leaves import Index
from paramend.leaves.paths import Names, text_of
from paramend.leaves.rules import Codec as Rule
from paramend.leaves.schemes import IN_BLOCKS, SCHEMES, WEIGHTS, WITH_BLOCKS, Companion, Scheme
from paramend.leaves.specs import Spec


@dataclass(frozen=True, slots=True)
class Group:
    """The leaves that are one quantised weight."""

    scheme: Scheme
    payload: int | None  # the number of the leaf with the codes; None if it is not there
    companions: Mapping[int, Companion] = field(default_factory=dict)  # number → its row in the scheme
    missing: tuple[str, ...] = ()  # the roles of what it cannot be read without and is not there

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of all its leaves, the payload first."""
        return (*(() if self.payload is None else (self.payload,)), *self.companions)

    def role(self, number: int) -> str:
        """What a leaf is in the group: "payload", or the role of a companion."""
        return "payload" if number == self.payload else self.companions[number].role


class Named(Protocol):
    """Leaves with names and specs."""

    @property
    def index(self) -> Index:
        """The names."""

    def spec(self, number: int) -> Spec:
        """Shape and dtype of a leaf."""


def groups_of(leaves: Named, numbers: Iterable[int] | None = None) -> list[Group]:
    """The groups of a tree or a checkpoint, in its order; or those that some leaves belong to.

    >>> from paramend.trees.tree import Tree
    >>> import numpy as np
    >>> tree = Tree({"fc": {"qweight": np.zeros((1, 8), "int32"), "scales": np.ones((1, 8), "float16")}})
    >>> [(group.scheme.name, group.role(0), group.role(1)) for group in groups_of(tree)]
    [('gptq', 'payload', 'scale')]
    """
    found: dict[int, Group] = {}
    for number in (leaves.index.numbers if numbers is None else numbers) if may_hold_groups(leaves) else ():
        if number not in found and (group := group_of(leaves, number)) is not None:
            found |= dict.fromkeys(group.numbers, group)
    return list({group.numbers: group for group in found.values()}.values())


def by_rule(leaves: Named, rule: Rule) -> list[Group]:
    """The groups of a rule of the user's: leaves with its names beside each other, whatever they hold."""
    first, *rest = rule.leaves
    companions = tuple(Companion(name, (name,), f"the {name}") for name in rest)
    row = Scheme(rule.name, "a codec of yours", (first,), (), companions, weight=first, rule=rule)
    found = []
    for names in _modules(leaves.index.names, tuple(map(_end, rule.leaves))):
        here = _local(names)
        for name, number in here.items():
            beside = _companions(row, name, here)
            if beside is not None:
                found.append(Group(row, number, {here[text]: each for each, text in beside}))
    return found


def alone(number: int, rule: Rule) -> Group:
    """The group of one leaf, which holds codes and scales itself."""
    return Group(Scheme(rule.name, "a tensor with its own scales", ("*",), (), (), rule=rule), number)


def may_hold_groups(leaves: Named) -> bool:
    """Whether names, types or a configuration suggest groups. For most trees they do not, and that is known at once."""
    named = bool(_named(leaves.index)) or getattr(leaves, "quantization", None) is not None
    return named or bool(getattr(leaves, "codecs", None)) or getattr(leaves, "format", "") in WITH_BLOCKS


def group_of(leaves: Named, number: int) -> Group | None:
    """The group that a leaf belongs to, or None. Names decide which leaves may be one weight, dtypes and shapes whether
    they are. Where a companion is elsewhere, as in one of several files, `quantization_config` decides."""
    if (row := IN_BLOCKS.get(leaves.spec(number).dtype)) is not None:
        return Group(row, number)
    for near in _named(leaves.index).get(number, ()):
        if (found := _fitting(leaves, near)) is not None and number in found.numbers:
            return found
    methods = methods_of(getattr(leaves, "quantization", None))
    return _configured(leaves, number, methods) if methods and leaves.index.names else None


# ---- by names ----------------------------------------------------------------------------------------------------

# The rows that a payload may be of by the names beside it, each with its companions and their names.
_Rows = tuple[tuple[Scheme, tuple[tuple[Companion, str], ...]], ...]
# The leaves of one module by the text of their names in it, the name of one that may be a payload, and its rows.
_Near = tuple[Mapping[str, int], str, _Rows]


def _end(text: str) -> str:
    """What the key of a companion ends with, by its name in the table."""
    return text.rpartition("*")[2].rpartition(".")[2] if "*" in text else text.partition(".")[0]


# The end of a companion's name → (name of the companion, name of the payload), as they stand in the table.
_BY_END: dict[str, set[tuple[str, str]]] = {}
for _row in SCHEMES:
    for _text in (name for each in _row.companions if not each.optional for name in each.names):
        _BY_END.setdefault(_end(_text), set()).update((_text, template) for template in _row.payload)

_ALONE = {name.replace("*", "weight"): row for row in reversed(SCHEMES) if row.alone for name in row.payload}
_ENDS = (*_BY_END, *_ALONE)


def _named(index: Index) -> dict[int, tuple[_Near, ...]]:
    """Number → the payloads that it may belong to by its name. It is found out once for each index."""
    if index.near is None:
        near: dict[int, tuple[_Near, ...]] = {}
        for names in _modules(index.names):
            here = _local(names)
            for payload, rows in _payloads(tuple(here)):
                for name in {payload, *(name for _, found in rows for _, name in found)}:
                    near[here[name]] = (*near.get(here[name], ()), (here, payload, rows))
        index.near = near
    return index.near


def _modules(names: Names, ends: tuple[str, ...] = _ENDS) -> Iterator[Names]:
    """The containers that hold a key with some ends, or a leaf and a container of one name."""
    pending = [names]
    while pending:
        inner = pending.pop()
        texts = list(map(text_of, inner))
        if any(text.endswith(ends) for text in texts) or len(set(texts)) < len(texts):
            yield inner
        pending += (child for child in inner.values() if type(child) is not int)


def _local(names: Names) -> dict[str, int]:
    """The leaves of a module by name, with those below a name that is a leaf too, and lists and boxes of one leaf."""
    here = {text_of(label): child for label, child in names.items() if type(child) is int}
    for label, child in names.items():
        if type(child) is not int and (text_of(label) in here or len(child) == 1):
            below = dict(_below(child, text_of(label), 2))
            # Files of Orbax hold the Variables of NNX as boxes with a `value`.
            here = {**{name.removesuffix(".value"): number for name, number in below.items()}, **here}
    return here


def _below(names: Names, above: str, depth: int) -> Iterator[tuple[str, int]]:
    for label, child in names.items():
        name = f"{above}.{text_of(label)}"
        if type(child) is int:
            yield name, child
        elif depth:
            yield from _below(child, name, depth - 1)


@lru_cache(maxsize=256)
def _payloads(names: tuple[str, ...]) -> tuple[tuple[str, _Rows], ...]:
    """The names that may be payloads, each with its rows. Layers share their names."""
    known = frozenset(names)
    payloads = {name: None for name in names if name in _ALONE}
    for name in names:
        for end, texts in _BY_END.items():
            if end in name:
                for text, template in texts:
                    payloads |= dict.fromkeys(known & _payload_names(name, text, template))
    return tuple((name, _rows(name, known)) for name in payloads)


def _payload_names(name: str, text: str, template: str) -> set[str]:
    """The names of the payloads that a leaf with the name of a companion may belong to."""
    stem = _stem(text, name)
    if stem is None:
        return set()
    stems = (stem,) if "*" in text or "*" not in template else WEIGHTS
    return {template.replace("*", each) for each in stems} - {name}


def _rows(payload: str, known: Container[str]) -> _Rows:
    found = ((row, _companions(row, payload, known)) for row in SCHEMES)
    return tuple((row, tuple(companions)) for row, companions in found if companions)


def _companions(row: Scheme, payload: str, known: Container[str]) -> list[tuple[Companion, str]] | None:
    """The companions of a payload, each with its name; None if it is none of this scheme, or one is not there."""
    for template in row.payload:
        stem = _stem(template, payload)
        if stem is None:
            continue
        bare = "*" not in template or stem in WEIGHTS  # whether what is called after no weight is of this one
        found = []
        for companion in row.companions:
            names = (text.replace("*", stem) for text in companion.names if bare or "*" in text)
            name = next((name for name in names if name in known and name != payload), None)
            if name is not None:
                found.append((companion, name))
            elif not companion.optional:
                break
        else:
            return found
    return None


def weight_name(name: str, scheme: Scheme) -> str:
    """The name of a weight in its module, by that of its payload.

    >>> rows = {row.says: row for row in SCHEMES}
    >>> weight_name("gate_up_proj_blocks", rows["MXFP4 of gpt-oss"]), weight_name("qweight", rows["GPTQ"])
    ('gate_up_proj', 'weight')
    """
    stems = [stem for template in scheme.payload if (stem := _stem(template, name)) is not None]
    return min(stems, key=len, default=name) or scheme.weight


def _stem(template: str, name: str) -> str | None:
    """What stands for the star of a template, if a name is of it; "" if it has none."""
    before, star, after = template.partition("*")
    if not star:
        return "" if name == template else None
    fits = name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)
    return name[len(before) : len(name) - len(after)] if fits else None


# ---- by specs ----------------------------------------------------------------------------------------------------


def _fitting(leaves: Named, near: _Near) -> Group | None:
    """The group of a payload, by the first row whose dtypes and shapes agree."""
    here, payload, rows = near
    number = here[payload]
    spec = leaves.spec(number)
    for row, found in rows:
        fits = not row.dtypes or spec.dtype in row.dtypes
        if fits and row.fits(spec, {each.role: leaves.spec(here[name]) for each, name in found}):
            return Group(row, number, {here[name]: each for each, name in found})
    alone = _ALONE.get(payload)
    return _lone(alone, number) if alone is not None and spec.kind == "int" else None


def _lone(row: Scheme, number: int) -> Group:
    return Group(row, number, missing=tuple(each.role for each in row.companions if not each.optional))


def _configured(leaves: Named, number: int, methods: set[str]) -> Group | None:
    """The group of a leaf whose payload or companions are elsewhere, by what the configuration says."""
    name, spec = leaves.index.pieces(number)[-1], leaves.spec(number)
    if spec.dtype not in _CODES and not name.endswith(_ENDS):
        return None
    for row in (row for row in SCHEMES if not methods.isdisjoint(row.methods)):
        stems = (stem for template in row.payload if (stem := _stem(template, name)) is not None)
        if spec.dtype in row.dtypes and any(map(_is_weight, stems)):
            return _lone(row, number)
        for companion in row.companions:
            for stem in _weights_of(row, companion, name, spec):
                if not _beside(leaves.index, number, {template.replace("*", stem) for template in _PAYLOADS}):
                    return Group(row, None, {number: companion}, ("payload",))
    return None


def _weights_of(row: Scheme, companion: Companion, name: str, spec: Spec) -> list[str]:
    """The names of the weights that a leaf may be a companion of, "" for the only one of a module."""
    found = [stem for text in companion.names if "*" in text and (stem := _stem(text, name)) is not None]
    # A layer may have `scales` of its own, which are of one axis.
    only = row.alone and name in companion.names and spec.ndim > 1
    return [*filter(_is_weight, found), *([""] if only else [])]


# The names of payloads; where one of them is, with codes or floats, the leaves beside it are known by it.
_PAYLOADS = {template for row in SCHEMES for template in row.payload}
# The dtypes of codes that a configuration tells of.
_CODES = {dtype for row in SCHEMES if row.methods for dtype in row.dtypes}


def _is_weight(stem: str) -> bool:
    """Whether a name is that of a weight: not of keys, values or inputs, which have scales too."""
    return stem in WEIGHTS or stem.endswith(("_proj", "weight"))


def _beside(index: Index, number: int, names: set[str]) -> bool:
    inner: Any = index.names
    for label in index.paths[number][:-1]:
        inner = inner[label]
    return any(text_of(label) in names for label in inner)


def methods_of(config: Mapping[str, Any] | None) -> set[str]:
    """What a `quantization_config`, or a file in place of one, says of the methods in use.

    >>> methods_of({"quant_method": "fp8"}), methods_of({"group_size": 64, "bits": 4}), methods_of(None)
    ({'fp8'}, {'mlx'}, set())
    """
    if not config:
        return set()
    given = config.get("quant_method") or ("modelopt" if "quant_algo" in config else "")
    if not given and "bits" in config:
        given = "gptq" if {"desc_act", "checkpoint_format", "sym"} & set(config) else "mlx"
    return {str(getattr(given, "value", given)).lower()} if given else set()
