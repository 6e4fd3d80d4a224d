"""How an edit of a quantised weight is made in what it is stored in: by codes, by scales, or encoded anew."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from paramend.arrays.registry import backend_of, to_numpy
from paramend.edits.arguments import RULES
from paramend.edits.call import Call, Coding, Op, explained
from paramend.errors import Quantized
from paramend.leaves.codecs.encoding import Misfit, finite
from paramend.leaves.codecs.fields import Field
from paramend.leaves.origins.boxes import Places
from paramend.leaves.origins.encoded import encoded
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.rescaled import rescaled
from paramend.leaves.specs import Array, Spec, numpy_dtype
from paramend.leaves.weights import Weight

# From the origin of a weight, float32, to that of its values after a call.
Compute = Callable[[Origin, Call], Origin]


def coded(
    weight: Weight, call: Call, compute: Compute, ops: Mapping[str, Op], *, shares: bool = False
) -> dict[str, Call]:
    """What a call on a quantised weight is in the leaves that it is stored in: role → call that sets the leaf. 0 is set
    by codes, and scales are kept. A factor goes to scales where they can take it. What else there is, is computed in
    float32 and encoded to the nearest; blocks whose values stay keep their bytes. `shares` says whether its scale of
    scales is that of other weights, too, which do not change with it. `Quantized` if it would have to be encoded, and
    the call says never."""
    rule = call.args.get("requantize", "amax")
    codec, parts = weight.codec, weight.parts
    call = _wide(weight, call)
    explained(weight.path, call.spec, Spec(weight.spec.shape, "float32"))
    whole, misfit = call.index is None, None
    found: Mapping[str, Origin] | None = None
    if call.op.name == "zero" and whole and (word := codec.zero_word) is not None and finite(codec, codec.views(parts)):
        how, payload = "codes of 0", parts["payload"].spec
        there = Coding(weight.path, weight.spec, weight.spec, codec.scheme, (call,), (how,))
        fill = Call(ops["fill"], {"value": _scalar(word, payload)}) if word else Call(ops["zero"])
        return {"payload": replace(fill, coding=there)}
    if call.op.name == "multiply" and whole and np.ndim(call.args["value"]) == 0 and not shares:
        found, how = rescaled(codec, parts, float(call.args["value"])), "by its scales"
    if found is None:
        keep = call.op.name == "zero" or rule == "keep"
        how = "codes of 0" if call.op.name == "zero" else f"encoded {RULES[rule]}"
        if rule == "never" and call.op.name != "zero":
            raise Quantized(
                f"{weight.path}: {call} would encode the weight anew in {codec.scheme}, and requantize is 'never'",
                scheme=codec.scheme,
                payload=weight.path,
                hint='requantize="amax" encodes blocks that change, to the nearest; pm.dequantize makes floats of it',
            )
        if not codec.writes:
            raise Quantized(
                f"{weight.path}: {call} would encode the weight anew, and {codec.scheme} is only decoded: exact in "
                "it are zero and factors of a whole weight other than 0, and whole rows that move",
                scheme=codec.scheme,
                payload=weight.path,
                hint='pm.at(tree, selector).cast("float16") makes floats of it, pm.quantize(..., scheme="q8_0") blocks',
            )
        misfit = None if call.op.name == "zero" else Misfit(blocks=codec.count)
        # All values are new, and so may a scale of scales be that no other weight has; not if they are computed.
        value = call.args.get("value")
        fresh = whole and not call.op.reads and not (keep or shares) and bool(codec.top)
        fresh = fresh and not (isinstance(value, Origin) and not value.moves)
        kept = {role: part for role, part in parts.items() if not fresh or role not in (*codec.encodes, codec.top)}
        specs, values = {role: part.spec for role, part in parts.items()}, compute(weight.origin("float32"), call)
        found = encoded(codec, values, specs, kept, keep=keep, free=not (shares or keep), misfit=misfit)
    there = Coding(weight.path, weight.spec, weight.spec, codec.scheme, (call,), (how,), misfit)
    return {role: Call(ops["set"], {"value": values}, coding=there) for role, values in found.items()}


def _scalar(word: int, spec: Spec) -> Any:
    """A word of codes as a scalar of a dtype."""
    dtype = numpy_dtype(spec.dtype)
    size = dtype.itemsize
    return np.frombuffer((word & ((1 << 8 * size) - 1)).to_bytes(size, "little"), dtype)[0]


def _wide(weight: Weight, call: Call) -> Call:
    """The call with an array to set in float32: it may have that dtype, or that of the weight."""
    value = call.args.get("value")
    library = backend_of(type(value)) if call.op.name == "set" else None
    if library is None or library.spec(value).dtype != weight.spec.dtype:
        return call
    return replace(call, args={**call.args, "value": to_numpy(value).astype(np.float32)})


# ---- places along an axis ----------------------------------------------------------------------------------------


def taken(weight: Weight, places: Places, axis: int) -> dict[str, tuple[Array, int]] | None:
    """Role → places along an axis of the leaf as it is stored, for some places along an axis of the model; None if
    blocks are cut."""
    codec, found = weight.codec, {}
    at = codec.axes[axis] if codec.axes else axis
    wanted = np.asarray(places, dtype=np.int64)
    if (
        codec.shape
        or "group" in codec.fields
        or any(role not in (*codec.fields, "shape", "input") for role in weight.parts)
    ):
        return None
    for role, field in codec.fields.items():
        part = weight.parts[role].spec
        if not field.every[at]:
            continue
        if part.shape[: at + 1] != field.spec.shape[: at + 1]:
            return None
        blocks = _blocks(field, at, wanted, codec.spec.shape[at])
        if blocks is None:
            return None
        found[role] = blocks, at
    return found


def _blocks(field: Field, axis: int, places: Array, length: int) -> Array | None:
    """The words of a leaf that hold some places of the weight, if they hold no others."""
    codes, words = 1, 1
    if field.packing is not None and field.packing.axis == axis:
        codes, words = field.packing.lump(numpy_dtype(field.spec.dtype).itemsize)
    step = codes * field.every[axis]
    blocks = places[::step] // step
    all_of = [np.arange(block * step, min((block + 1) * step, length)) for block in blocks.tolist()]
    if not np.array_equal(np.concatenate(all_of) if all_of else places[:0], places):
        return None
    found: Array = (blocks[:, None] * words + np.arange(words)).reshape(-1)
    return found[found < field.spec.shape[axis]]
