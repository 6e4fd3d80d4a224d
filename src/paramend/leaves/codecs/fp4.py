"""FP4: MXFP4 of gpt-oss, DeepSeek and compressed-tensors, NVFP4 of modelopt and compressed-tensors."""

from functools import partial

from paramend.leaves.codecs.codec import Codec, Parts, Scaling
from paramend.leaves.codecs.codes import codes_of
from paramend.leaves.codecs.fields import Field, Packing
from paramend.leaves.codecs.scalings import Plain, Powers, Twice
from paramend.leaves.codecs.stated import Stated, disagree
from paramend.leaves.specs import Spec


def mxfp4(scheme: str, parts: Parts, stated: Stated) -> Codec:
    """The codec of MXFP4: codes of E2M1, a power of two for 32 of them, and bfloat16 as transformers has it.

    gpt-oss stores what its model has as [experts, in, out] with the inputs last, in blocks of 16 bytes.
    """
    turned = parts["payload"].spec.ndim > parts["scale"].spec.ndim
    return _codec(scheme, parts, stated, 32, Powers() if turned else Plain(), "bfloat16", turned)


def _nvfp4(scheme: str, parts: Parts, stated: Stated, divides: bool, dtype: str) -> Codec:
    """The codec of NVFP4: codes of E2M1, a scale for 16 of them, and one for these scales."""
    found = _codec(scheme, parts, stated, 16, Twice(divides), dtype)
    shape, top = found.spec.shape, parts["global"].spec
    if top.size != 1 and top.shape[:1] != shape[: len(shape) - 2]:
        raise disagree(f"{top.size} scales of scales", f"a weight of shape {list(shape)}", *parts.values())
    every = (0,) * len(shape) if top.size == 1 else (1, *[0] * (len(shape) - 1))
    grid = Spec((top.size, *[1] * (len(shape) - 1)), top.dtype)
    return Codec(scheme, found.spec, {**found.fields, "global": Field(grid, every)}, found.codes, found.scaling)


# modelopt multiplies by the scale of scales, compressed-tensors divides by it.
nvfp4 = partial(_nvfp4, divides=False, dtype="float32")
nvfp4_ct = partial(_nvfp4, divides=True, dtype="bfloat16")


def _codec(
    scheme: str, parts: Parts, stated: Stated, group: int, scaling: Scaling, dtype: str, turned: bool = False
) -> Codec:
    payload, scale = parts["payload"].spec, parts["scale"].spec
    lead, last = scale.shape[:-1], scale.ndim - 1
    words = (payload.size // max(scale.size // max(scale.shape[-1], 1), 1)) if turned else payload.shape[-1]
    alone = payload.dtype.startswith("float4")  # a code each
    width = words if alone else 2 * words
    if payload.shape[: len(lead)] != lead or -(-width // group) != scale.shape[-1]:
        said = f"the scales of groups of {group} have the shape {list(scale.shape)}"
        raise disagree(f"{width} codes in a row", said, parts["payload"], parts["scale"])
    if stated.group not in (None, group):
        raise disagree(f"the groups are of {group}", f"the configuration says {stated.group}", *parts.values())
    fields = {
        "payload": Field(Spec((*lead, words), payload.dtype), (1,) * scale.ndim, None if alone else Packing(last, 4)),
        "scale": Field(scale, (*[1] * last, group)),
    }
    axes = (*range(last - 1), last, last - 1) if turned else ()
    return Codec(scheme, Spec((*lead, width), dtype), fields, codes_of("e2m1"), scaling, axes=axes)
