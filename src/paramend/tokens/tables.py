"""Tables: the leaves that have a row for each token, found by their names and shapes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paramend.anatomy.beside import EMBEDDINGS, HEADS
from paramend.edits.quantized import check_values
from paramend.errors import BadArgument, Unsupported
from paramend.leaves.leaves import Editable
from paramend.leaves.paths import number_of
from paramend.reports import wording

_FIRST = {*EMBEDDINGS, "embeddings", "embedding", "token_embedding", "token_embedder", "embedder", "embed", "Embed_0"}
_PER_LAYER = "embed_tokens_per_layer"
_LAST = {*HEADS, "output_layer", "logits_dense", "head"}
# Modules in the modules that compute logits.
_IN_HEAD, _HEADS = {"decoder", "proj", "head"}, {*_LAST, "predictions", "shared_head"}
_OTHERS = re.compile(r"pos|type|norm|wpe", re.IGNORECASE)
_DRAFT = ("d2t", "t2d")


@dataclass(frozen=True, slots=True)
class Table:
    """A leaf with a row for each token.

    Attributes:
        number: the number of the leaf.
        axis: the axis of the tokens.
        rows: its length.
    """

    number: int
    axis: int
    rows: int


def tables_of(leaves: Editable, sizes: Sequence[int]) -> list[Table]:
    """The tables of a model, those of embeddings first.

    Args:
        leaves: the model.
        sizes: the sizes of vocabularies that its configuration has.

    Raises:
        BadArgument: no leaf is known to be one, or several have different lengths.
        Quantized: one is quantised.
        Unsupported: the model drafts for another one, in whose vocabulary its own is numbered.

    >>> from paramend.edits.memory import editable
    >>> model = {"wte": {"weight": np.zeros((6, 2))}, "fc": np.zeros((2, 2)), "lm_head": {"bias": np.zeros(6)}}
    >>> [(table.number, table.axis) for table in tables_of(editable(model), [])]
    [(0, 0), (2, 0)]
    """
    index = leaves.index
    pieces = {number: index.pieces(number) for number in index.numbers}
    kinds = {number: kind for number, path in pieces.items() if (kind := _kind(path))}
    drafts = [index.path(number) for number, path in pieces.items() if path[-1] in _DRAFT]
    if drafts:
        raise Unsupported(f"{drafts[0]} numbers the tokens of a draft model in those of another one")
    check_values(leaves, kinds, "cannot lose or gain rows", "pm.dequantize(model, selector) makes floats of it")
    shapes = {number: leaves.spec(number).shape for number in index.numbers}
    size = _size(leaves, kinds, sizes)
    inside = {n for number, path in pieces.items() if any(map(_is_number, path)) for n in shapes[number]}
    tables = []
    for number, shape in shapes.items():
        path, kind = pieces[number], kinds.get(number)
        axes = [axis for axis, length in enumerate(shape) if length == size]
        if kind == _PER_LAYER and shape:
            axes = axes[:1] or [0]
        elif kind is None and (
            len(axes) != 1 or size in inside or any(map(_is_number, path)) or any(map(_OTHERS.search, path))
        ):
            continue
        if axes:
            axis = axes[-1] if path[-1] == "kernel" else axes[0]
            tables.append(Table(number, axis, shape[axis]))
    return tables


def _is_number(piece: str) -> bool:
    return number_of(piece) is not None


def _kind(path: Sequence[str]) -> str | None:
    """What a leaf is by its name: "first", "last", or one with rows for the layers; None if it is no table."""
    above, module, name = ("", "", *path)[-3:]
    if module == _PER_LAYER:
        return _PER_LAYER
    if _OTHERS.search(module):
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
            raise BadArgument(
                f"tables of tokens have several lengths, and no configuration says which: {wording.listing(named)}"
            )
        if lengths:
            return lengths[0]
    raise BadArgument("no leaf is known to be a table of tokens", hint='pm.at(model, "embed/table").take(ids)')
