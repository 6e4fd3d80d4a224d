"""Tables: the leaves that have a row for each token, found by their names and shapes."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from paramend.anatomy.beside import EMBEDDINGS, HEADS
from paramend.edits.moves import axis_of
from paramend.edits.quantized import check_values
from paramend.errors import BadArgument, Unsupported
from paramend.leaves.leaves import Editable
from paramend.leaves.paths import number_of
from paramend.reports import wording
from paramend.selectors.selector import resolve

_FIRST = {*EMBEDDINGS, "embeddings", "embedding", "token_embedding", "token_embedder", "embedder", "embed", "Embed_0"}
_PER_LAYER = "embed_tokens_per_layer"
_LAST = {*HEADS, "output_layer", "logits_dense", "head"}
# Modules in the modules that compute logits.
_IN_HEAD, _HEADS = {"decoder", "proj", "head"}, {*_LAST, "predictions", "shared_head"}
_OTHERS = re.compile(r"pos|type|norm|wpe", re.IGNORECASE)
_DRAFT = ("d2t", "t2d")


class Table(NamedTuple):
    """A leaf with a row for each token."""

    number: int
    axis: int  # that of the tokens
    rows: int  # its length


def tables_of(leaves: Editable, sizes: Sequence[int], given: Mapping[str, int] | None = None) -> list[Table]:
    """The tables of a model whose configuration has vocabularies of some sizes; `given` and raised is what
    `pm.vocabulary` says.

    >>> from paramend.edits.memory import editable
    >>> model = {"fc": np.zeros((2, 2)), "lm_head": {"bias": np.zeros(6)}, "wte": {"weight": np.zeros((6, 2))}}
    >>> [(table.number, table.axis) for table in tables_of(editable(model), [])]
    [(1, 0), (2, 0)]
    """
    index = leaves.index
    pieces = {number: index.pieces(number) for number in index.numbers}
    kinds = {number: kind for number, path in pieces.items() if (kind := _kind(path))}
    drafts = [index.path(number) for number, path in pieces.items() if path[-1] in _DRAFT]
    if drafts:
        raise Unsupported(f"{drafts[0]} numbers the tokens of a draft model in those of another one")
    shapes = {number: leaves.spec(number).shape for number in index.numbers}
    if given:
        axes = {number: axis for selector, axis in given.items() for number in resolve(selector, leaves)}
        return [Table(n, axis_of(leaves.spec(n), axis), shapes[n][axis]) for n, axis in axes.items()]
    check_values(leaves, kinds, "cannot lose or gain rows", "pm.dequantize(model, selector) makes floats of it")
    size = _size(leaves, kinds, sizes)
    tables, doubtful = [], []
    for number, shape in shapes.items():
        path, kind = pieces[number], kinds.get(number)
        found = [axis for axis, length in enumerate(shape) if length == size]
        if kind == _PER_LAYER and shape:
            found = found[:1] or [0]
        if not found or (kind is None and any(_is_number(piece) or _OTHERS.search(piece) for piece in path)):
            continue
        axis = found[-1] if path[-1] == "kernel" else found[0]
        tables.append(Table(number, axis, shape[axis]))
        doubtful += [number] if kind is None else []
    inside = {length for n, path in pieces.items() if any(map(_is_number, path)) for length in shapes[n]}
    if doubtful and (size in inside or len({pieces[number][:-1] for number in doubtful}) > 1):
        named = wording.listing([f"{index.path(number)} {leaves.spec(number)}" for number in doubtful])
        raise BadArgument(
            f"tables of {size:,} tokens cannot be told from others by their shapes: {named}",
            hint=f"pm.vocabulary(model, tables={ ({index.path(n): axis for n, axis, _ in tables}) })",
        )
    return tables


def _is_number(piece: str) -> bool:
    return number_of(piece) is not None


def _kind(path: Sequence[str]) -> str | None:
    """What a leaf is by its name: "first", "last", or one with rows for the layers; None if it is no table."""
    above, module, name = ("", "", *path)[-3:]
    if module == _PER_LAYER:
        return _PER_LAYER
    if _OTHERS.search(module) or _OTHERS.search(name):
        return None
    if module in _FIRST or name in ("embedding", "input_embedding"):
        return "first"
    if module in _LAST or (module in _IN_HEAD and above in _HEADS) or name == "final_logits_bias":
        return "last"
    return "last" if (module, name) == ("predictions", "bias") else None


def _size(leaves: Editable, kinds: Mapping[int, str], sizes: Sequence[int]) -> int:
    """The number of rows of the tables."""
    for kind in ("first", "last"):
        found = {}
        for number in (number for number, each in kinds.items() if each == kind and leaves.spec(number).ndim == 2):
            found[number] = leaves.spec(number).shape[-1 if leaves.index.pieces(number)[-1] == "kernel" else 0]
        lengths = [size for size in sizes if size in found.values()][:1] or list(dict.fromkeys(found.values()))
        if len(lengths) > 1:
            named = [f"{leaves.index.path(number)} {leaves.spec(number)}" for number in found]
            why = f"tables of tokens have several lengths, and no configuration says which: {wording.listing(named)}"
            raise BadArgument(why)
        if lengths:
            return lengths[0]
    why = "no leaf is known to be a table of tokens"
    raise BadArgument(why, hint='pm.vocabulary(model, tables={"embed/table": 0})')
