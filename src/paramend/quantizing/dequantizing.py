"""Quantised weights as floats: `pm.dequantize`."""

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar, cast

from paramend.arrays.registry import backend
from paramend.edits.memory import editable
from paramend.errors import BadArgument
from paramend.leaves.leaves import Editable, keys_of
from paramend.leaves.leaves import Group as Regrouped
from paramend.leaves.origins.decoded import decoded
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import BITS, DtypeLike, Spec, dtype_name
from paramend.leaves.weights import Weight
from paramend.quantizing.choice import Seen, labels_of
from paramend.quantizing.report import Coded, QuantizeReport
from paramend.selectors.selector import SelectorLike

T = TypeVar("T")


def dequantize(
    model: T, selector: SelectorLike = "**", dtype: DtypeLike | None = "bfloat16"
) -> tuple[T, QuantizeReport]:
    """A model with quantised weights as floats, each one leaf, and the report.

    A weight is codes times scales, computed in float32 and rounded once. Its leaf is `<module>.weight`, of shape (out,
    in) also where GPTQ, AWQ or bitsandbytes store it otherwise; scales and zero points go. All other leaves stay what
    they are. Beside a checkpoint, `quantization_config` goes with the last quantised weight; before that, the modules
    join its list of those that are not quantised.

    Args:
        model: a checkpoint from `pm.open`, of which nothing is computed before it is saved, in bounded memory; or a
            tree in memory: dicts, a state dict, an NNX State.
        selector: the weights, by the names that they will have, or by those of the leaves that they are stored in.
        dtype: that of the new leaves; None for the one that the library of each scheme gives.

    Returns:
        The model, of the same type, and which weights were decoded, of which schemes, and which ones stay quantised.

    Raises:
        NoMatch: the selector names no quantised weight.
        Quantized: a scheme is recognised and cannot be decoded.
        SpecMismatch: leaves disagree with the configuration, or with each other.
        RenameClash: the name of a weight is taken.
        Unsupported: the tree is a module, whose class determines what it holds, or a configuration cannot say which
            of its modules are quantised.

    >>> model = {"fc": {"weight_packed": np.array([[0x76543210]], "int32"), "weight_scale": np.ones((1, 1), "float32")}}
    >>> tree, report = pm.dequantize(model, dtype="float32")
    >>> tree["fc"]["weight"].tolist(), report.rows[0].scheme
    ([[-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0]], 'int4')
    """
    name = "" if dtype is None else dtype_name(dtype)
    if name and (not name.startswith(("float", "bfloat")) or BITS.get(name, 0) < 16):
        raise BadArgument(f"dtype={name!r} is no float of 16 bits or more", hint='dtype="bfloat16"')
    leaves = editable(model)
    seen = Seen(leaves)
    chosen = seen.chosen(selector)
    weights = [seen.weight(group) for group in chosen]
    tree = leaves.regrouped([_as_one(leaves, weight, name) for weight in weights])
    gone = {id(group) for group in chosen}
    index = leaves.index
    rows = [
        Coded(
            seen.index.path(_payload(weight)),
            weight.group.scheme.name,
            Spec(weight.spec.shape, name or weight.spec.dtype),
            tuple(map(index.path, weight.group.numbers)),
        )
        for weight in weights
    ]
    kept = {seen.index.path(at): group.scheme.name for at, group in seen.groups.items() if id(group) not in gone}
    others = len(seen.index.numbers) - len(rows) - len(kept)
    return cast(T, tree), QuantizeReport("dequantised", tuple(rows), kept, others)


def _payload(weight: Weight) -> int:
    assert weight.group.payload is not None
    return weight.group.payload


def _as_one(leaves: Editable, weight: Weight, dtype: str) -> Regrouped:
    """A group of leaves that becomes one."""
    path = [(key, depth) for depth, key in enumerate(keys_of(labels_of(leaves, weight.group)))]
    return Regrouped(weight.group.numbers, (path,), partial(_values, weight, dtype))


def _values(weight: Weight, dtype: str, stored: Sequence[Any]) -> list[Any]:
    roles = map(weight.group.role, weight.group.numbers)
    if isinstance(stored[0], Origin):
        return [decoded(weight.codec, dict(zip(roles, stored, strict=True)), dtype)]
    return [backend(stored[0]).beside(weight.origin(dtype).read(), stored[0])]
