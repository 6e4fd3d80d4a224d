"""FP8, and int8 with a scale for each of its parts: codes of one byte, and scales per tensor, channel or block."""

from paramend.errors import Unsupported
from paramend.leaves.codecs.codec import Codec, Parts
from paramend.leaves.codecs.codes import codes_of
from paramend.leaves.codecs.fields import Field
from paramend.leaves.codecs.scalings import Plain
from paramend.leaves.codecs.stated import Stated, disagree
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
    fields = {
        "payload": Field(payload, (1,) * payload.ndim),
        "scale": Field(Spec(grid, scale.dtype), every),
    }
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
    """How many places share a scale along an axis.

    compressed-tensors cuts the last block. transformers has blocks of one size, found from the grid, whatever its
    configuration says; where the grid does not divide an axis it refuses, and DeepSeek's own kernels cut the last one.
    """
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
