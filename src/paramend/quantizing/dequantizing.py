"""Quantised weights as floats: `pm.dequantize`."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

from paramend.anatomy.counts import retyped
from paramend.anatomy.recoding import dequantised
from paramend.arrays.registry import backend
from paramend.edits.memory import editable
from paramend.edits.plan import call
from paramend.errors import BadArgument, Unsupported
from paramend.formats.jsontext import CONFIG
from paramend.leaves.leaves import Group
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import BITS, DtypeLike, Spec, dtype_name
from paramend.leaves.weights import Weight
from paramend.quantizing.choice import Seen, followed, keys
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
    kept = sorted(seen.groups.keys() - set(chosen))
    _check_modules(seen, chosen, kept)
    weights = {at: seen.weight(at) for at in chosen}
    made: dict[tuple[int, ...], list[Any]] = {}  # tied ones are made once

    def make(weight: Weight, stored: Sequence[Any]) -> list[Any]:
        values = weight.origin("float32" if _is_half(weight, name) else name)
        if isinstance(stored[0], Origin):
            return [values]
        one = tuple(leaves.ties.get(number, number) for number in weight.group.numbers)
        if one not in made:
            made[one] = [backend(stored[0]).beside(values.read(), stored[0])]
        return made[one]

    path, stored = seen.index.path, leaves.index.path
    groups, rows = [], []
    for at, weight in weights.items():
        groups.append(Group(weight.group.numbers, (keys(seen.index.paths[at]),), partial(make, weight)))
        spec = Spec(weight.spec.shape, name or weight.spec.dtype)
        rows.append(Coded(path(at), weight.codec.scheme, spec, tuple(map(stored, weight.group.numbers))))
    halves = {path(at) for at, weight in weights.items() if _is_half(weight, name)}
    tree, said = followed(_halved(leaves.regrouped(groups), halves), partial(_configured, seen, chosen, kept, name))
    stay = {path(at): seen.groups[at].scheme.name for at in kept}
    others = len(seen.index.numbers) - len(seen.groups)
    return cast(T, tree), QuantizeReport("dequantised", tuple(rows), stay, others, said)


def _is_half(weight: Weight, dtype: str) -> bool:
    """Whether a weight becomes float16, which ends at 65,504: the edit that casts to it counts what it cannot hold."""
    return (dtype or weight.spec.dtype) == "float16"


def _halved(tree: Any, paths: Collection[str]) -> Any:
    """A tree with some leaves in float16."""
    leaves, half = editable(tree), call("cast", {"dtype": "float16"})
    index, ties = leaves.index, leaves.ties
    numbers = [number for number in index.numbers if index.path(number) in paths and ties.get(number, number) == number]
    return leaves.edited(dict.fromkeys(numbers, half)) if numbers else tree


def _check_modules(seen: Seen, chosen: Sequence[int], kept: Sequence[int]) -> None:
    """Raise if a configuration could not say what a module is then: it says of a whole one whether it is quantised."""
    both = sorted(set(seen.modules(chosen)) & set(seen.modules(kept)))
    if both and getattr(seen.leaves, "quantization", None):
        raise Unsupported(
            f"{both[0]} would be quantised in part, which no configuration can say of a module", hint=f'"{both[0]}.*"'
        )


def _configured(
    seen: Seen, chosen: Sequence[int], kept: Sequence[int], dtype: str, file: str, values: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What a file beside the weights holds then; None if nothing."""
    new = dequantised(file, values, seen.modules(chosen), seen.floats(), left=bool(kept))
    if new is None or file != CONFIG or not dtype:
        return new
    others = [seen.spec(number).dtype for number in seen.index.numbers if number not in seen.groups]
    return retyped(new, [*others, *[""] * len(chosen)], [*others, *[dtype] * len(chosen)])[0]
