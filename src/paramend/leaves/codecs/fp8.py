"""FP8 and int8 with a scale per tensor, channel or block; FP4 with a scale for a few codes: MXFP4 and NVFP4."""

from functools import partial

from paramend.errors import Unsupported
from paramend.leaves.codecs.codec import Codec, Parts, Scaling, Stated, disagree
from paramend.leaves.codecs.codes import codes_of
from paramend.leaves.codecs.fields import Field, Packing
from paramend.leaves.codecs.scalings import Plain, Powers, Twice
from paramend.leaves.specs import BITS, Spec

# What a block is where neither a configuration nor the sizes say it.
_USUAL = 128


def fp8(scheme: str, parts: Parts, stated: Stated) -> Codec:
    """The codec of codes of one byte with scales. The dtype of the weight is that of its scales, or bfloat16 if they
    are of one byte, as in compressed-tensors and transformers."""
    payload, scale = parts["payload"].spec, parts["scale"].spec
    every = _every(parts, stated)
    grid = tuple(-(-n // each) if each else 1 for n, each in zip(payload.shape, every, strict=True))
    dtype = scale.dtype if scale.kind == "float" and BITS[scale.dtype] >= 16 else "bfloat16"
    fields = {"payload": Field(payload, (1,) * payload.ndim), "scale": Field(Spec(grid, scale.dtype), every)}
    zeros = None
    if "zero" in parts:
        zero = parts["zero"].spec
        if zero.size != scale.size:
            raise disagree(f"{zero.size:,} zero points", f"{scale.size:,} scales", parts["zero"], parts["scale"])
        fields["zero"] = Field(Spec(grid, zero.dtype), every)
        if zero.kind != "int" or BITS[zero.dtype] != 8:
            raise Unsupported(f"{parts['zero']} has zero points of {zero.dtype}: what is meant by them is not known")
        zeros = codes_of(zero.dtype)
    return Codec(scheme, Spec(payload.shape, dtype), fields, codes_of(payload.dtype), Plain(), zeros)


def torchao(scheme: str, parts: Parts, stated: Stated) -> Codec:
    """The codec of Float8Tensor of torchao; the dtype is that of the scales, as its own is not in the leaves."""
    payload = parts["payload"]
    if not payload.spec.dtype.startswith("float8") or not {"zero", "global", "input"}.isdisjoint(parts):
        names = ", ".join(map(str, parts.values()))
        raise Unsupported(
            f"{names} are a weight of torchao, {payload.spec}: only Float8Tensor of torchao can be decoded"
        )
    return fp8(scheme, parts, stated)


def _every(parts: Parts, stated: Stated) -> tuple[int, ...]:
    """How many places share a scale, along each axis; 0 where all do."""
    payload, scale = parts["payload"], parts["scale"]
    shape, grid = payload.spec.shape, scale.spec.shape
    block = stated.block or ((1, stated.group) if stated.group and stated.group > 0 else None)
    if scale.spec.size == 1 and len(grid) != len(shape):
        many = block and any(length > size for length, size in zip(shape[-2:], block, strict=False))
        if many and stated.block:
            raise disagree(
                "there is one scale", f"the configuration says one for each block of {block}", payload, scale
            )
        return (0,) * len(shape)
    if len(grid) == len(shape):
        sizes: list[int | None] = [None] * len(shape)
        sizes[-2:] = block or sizes[-2:]
        return tuple(_block(parts, axis, size, stated) for axis, size in enumerate(sizes))
    if len(shape) > 2 and grid == shape[:1]:
        return (1, *[0] * (len(shape) - 1))
    for shared in (-2, -1) if stated.outputs_last else (-1, -2):
        every = [1] * len(shape)
        every[shared] = 0
        if scale.spec.size * shape[shared] == payload.spec.size:
            return tuple(every)
    raise disagree(f"there are scales of shape {list(grid)}", f"codes of shape {list(shape)}", payload, scale)


def _block(parts: Parts, axis: int, stated: int | None, by: Stated) -> int:
    """How many places share a scale along an axis. compressed-tensors cuts the last block. transformers has blocks of
    one size, found from the grid, whatever its configuration says; where the grid does not divide an axis it refuses,
    and DeepSeek's own kernels cut the last one."""
    payload, scale = parts["payload"], parts["scale"]
    length = payload.spec.shape[axis]
    count = scale.spec.shape[axis]
    if stated and -(-length // stated) != count:
        raise disagree(
            f"axis {axis} of {length} places has {count} scales",
            f"the configuration says a scale for {stated} of them, which makes {-(-length // stated)}",
            payload,
            scale,
        )
    if count in (1, length):
        return 0 if count == 1 else 1
    if stated and by.method != "fp8":
        return stated
    if length % count == 0:
        return length // count
    size = stated or _USUAL
    if -(-length // size) != count:
        raise disagree(f"axis {axis} has {length} places", f"{count} scales: no block makes so many", payload, scale)
    return size


def mxfp4(scheme: str, parts: Parts, stated: Stated) -> Codec:
    """The codec of MXFP4: codes of E2M1, a power of two for 32 of them, and bfloat16 as transformers has it. gpt-oss
    stores what its model has as [experts, in, out] with the inputs last, in blocks of 16 bytes."""
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
