"""bitsandbytes: nf4 and fp4, also with scales that are quantised themselves, and int8."""

import json
import math

from paramend.errors import Unsupported
from paramend.leaves.codecs.codec import Codec, Parts, Stated, disagree
from paramend.leaves.codecs.codes import codes_of
from paramend.leaves.codecs.fields import Field, Packing
from paramend.leaves.codecs.scalings import Nested, Plain, Rows
from paramend.leaves.specs import BITS, Spec, dtype_name


def bnb4(scheme: str, parts: Parts, stated: Stated) -> Codec:
    """The codec of nf4 and fp4: two codes in a byte, the first one above, and a scale for 64 or so of them in a row.
    Shape, dtype and sizes of blocks are in a leaf of JSON."""
    payload, scale = parts["payload"], parts["scale"]
    try:
        state = json.loads(parts["state"].read().tobytes())
        shape, block, dtype = tuple(map(int, state["shape"])), int(state["blocksize"]), dtype_name(str(state["dtype"]))
    except (ValueError, LookupError, TypeError) as error:
        said = f"{parts['state']} has no JSON of its shape, dtype and blocks: {error!r}"
        raise disagree(f"a weight in {scheme} is here", said, *parts.values()) from error
    size, blocks = math.prod(shape), -(-math.prod(shape) // block)
    if scale.spec.size != blocks or -(-size // 2) != payload.spec.nbytes or state.get("quant_type") != scheme:
        said = f"the state says {state.get('quant_type')}, {list(shape)} in {blocks} blocks of {block}"
        raise disagree(f"{payload.spec.nbytes} bytes of {scheme} in {scale.spec.size} blocks", said, *parts.values())
    codes = BITS[payload.spec.dtype] // 4
    order = tuple(code ^ 1 for code in range(codes))
    fields = {
        "payload": Field(Spec((payload.spec.size,), payload.spec.dtype), (1,), Packing(0, 4, order)),
        "scale": Field(Spec((blocks,), scale.spec.dtype), (block,)),
    }
    scaling: Plain | Nested = Plain()
    if "nested scale" in parts:
        few, every = parts["nested scale"].spec, int(state["nested_blocksize"])
        if few.size != -(-blocks // every):
            said = f"the state says {every} scales in a block of theirs, which makes {-(-blocks // every)}"
            raise disagree(f"{blocks} scales in {few.size} blocks", said, *parts.values())
        fields["nested scale"] = Field(few, (block * every,))
        scaling = Nested(parts["nested map"].read(), float(state["nested_offset"]))
    return Codec(scheme, Spec((size,), dtype), fields, codes_of(scheme), scaling, shape=shape)


def bnb8(scheme: str, parts: Parts, stated: Stated) -> Codec:
    """The codec of int8: code · scale of the row · 1/127, float32 as the library has it."""
    payload, scale = parts["payload"], parts["scale"]
    rows = payload.spec.shape[0]
    if scale.spec.size != rows:
        raise disagree(f"{rows} rows", f"{scale.spec.size} scales", payload, scale)
    if "format" in parts and parts["format"].read().any():
        raise Unsupported(
            f"{payload} is in an order of tiles, as bitsandbytes once stored it: {parts['format']} is not 0",
            hint="load it with the version of bitsandbytes that wrote it, and save it again",
        )
    fields = {"payload": Field(payload.spec, (1, 1)), "scale": Field(Spec((rows, 1), scale.spec.dtype), (1, 0))}
    return Codec(scheme, Spec(payload.spec.shape, "float32"), fields, codes_of("int8"), Rows())
