"""New groups: which leaves a weight becomes in a scheme, and the codec that gives them their values."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from paramend.errors import BadArgument, SpecMismatch
from paramend.leaves.codecs.codec import NOTHING, Codec, Stated
from paramend.leaves.codecs.codes import codes_of
from paramend.leaves.codecs.ggml import WRITABLE as WRITABLE_BLOCKS
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Held, Made
from paramend.leaves.schemes import IN_BLOCKS, SCHEMES
from paramend.leaves.specs import BLOCKS, Array, Spec, numpy_dtype
from paramend.reports import wording

_F8 = "float8_e4m3fn"
# Name, dtype and shape.
_Leaf = tuple[str, str, Sequence[int]]


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """The leaves of a new group, by role."""

    names: Mapping[str, str]  # with "*" for the name of the weight
    specs: Mapping[str, Spec]
    known: Mapping[str, Array]  # those that do not depend on the values of the weight
    stated: Stated


def layout_of(scheme: str, weight: Spec, group: int | None = None, block: tuple[int, int] = (128, 128)) -> Layout:
    """The leaves that a weight becomes.

    Args:
        scheme: the name of a scheme, such as "fp8-block".
        weight: shape, as the model has it, and dtype of the weight.
        group: how many inputs share a scale, where the scheme leaves it open; -1 for all.
        block: how many outputs and inputs share a scale in fp8-block.

    Raises:
        BadArgument: no scheme of this name can be written.
        SpecMismatch: a weight of this shape has no such form.

    >>> layout = layout_of("nvfp4", Spec((8, 64), "bfloat16"))
    >>> [(layout.names[role], str(spec)) for role, spec in layout.specs.items()]
    [('*_packed', 'uint8[8,32]'), ('*_scale', 'float8_e4m3fn[8,4]'), ('*_global_scale', 'float32[1]')]
    """
    check_scheme(scheme)
    if group and scheme.startswith(("fp8", "mxfp4", "nvfp4", "bnb", "q")):
        raise BadArgument(
            f"group_size={group}: {scheme} has blocks of its own", hint="int4, int8, GPTQ and AWQ have groups"
        )
    if weight.kind != "float" or (weight.ndim < 2 and scheme not in ("nf4", "fp4")) or not weight.size:
        raise SpecMismatch(f"a leaf {weight} cannot be quantised to {scheme}: it is no matrix of floats")
    return _LAYOUTS[scheme](weight, group, block)


def check_scheme(scheme: str) -> None:
    """Raise if no scheme of this name can be written."""
    if scheme not in _LAYOUTS:
        near = wording.closest(scheme, _LAYOUTS, limit=1)
        raise BadArgument(
            f"{scheme!r} is no scheme that a weight can be quantised to",
            hint=near[0] if near else f"one of {', '.join(_LAYOUTS)}",
        )


def codec_for(scheme: str, layout: Layout) -> Codec:
    """The codec of a new group."""
    name = "int4" if scheme == "int8" else scheme
    rows = [IN_BLOCKS[scheme]] if layout.specs["payload"].dtype in BLOCKS else SCHEMES
    row = next(row for row in rows if row.name == name and layout.names["payload"] in row.payload and row.codec)
    parts: dict[str, Origin] = {
        role: Held(layout.known[role])
        if role in layout.known
        else Made(spec, partial(np.zeros, spec.shape, numpy_dtype(spec.dtype)))
        for role, spec in layout.specs.items()
    }
    assert row.codec is not None
    return row.codec(scheme, parts, layout.stated)


def _layout(known: Mapping[str, Array] | None = None, stated: Stated = NOTHING, **leaves: _Leaf) -> Layout:
    roles = {role.rstrip("_"): leaf for role, leaf in leaves.items()}  # "global" is a word of Python
    names = {role: name for role, (name, _, _) in roles.items()}
    specs = {role: Spec(tuple(shape), dtype) for role, (_, dtype, shape) in roles.items()}
    return Layout(names, specs, known or {}, stated)


def _fp8(weight: Spec, group: int | None, block: tuple[int, int], scheme: str) -> Layout:
    shape, codes = weight.shape, ("*", _F8, weight.shape)
    if scheme == "fp8-tensor":
        return _layout(payload=codes, scale=("*_scale", _scale(weight), (1,)))
    if scheme == "fp8-channel":
        return _layout(payload=codes, scale=("*_scale", _scale(weight), (*shape[:-1], 1)))
    pairs = list(zip(shape[-2:], block, strict=True))
    if any(length > each and length % each for length, each in pairs):
        raise SpecMismatch(
            f"a leaf {weight} is not made of whole blocks of {block[0]} by {block[1]}, and loaders differ in what the "
            "last ones are then",
            hint='scheme="fp8-channel" takes any shape',
        )
    grid = (*shape[:-2], *(-(-length // each) for length, each in pairs))
    return _layout(stated=Stated(block=block), payload=codes, scale=("*_scale_inv", "float32", grid))


def _packed(weight: Spec, group: int | None, block: tuple[int, int], bits: int) -> Layout:
    size = group or (128 if bits == 4 else -1)
    *lead, inputs = weight.shape
    return _layout(
        {"shape": np.array(weight.shape, np.int64)},
        Stated(bits=bits, group=size),
        payload=("*_packed", "int32", (*lead, -(-inputs * bits // 32))),
        scale=("*_scale", _scale(weight), (*lead, _groups(weight, inputs, size))),
        shape=("*_shape", "int64", (weight.ndim,)),
    )


def _gptq(weight: Spec, group: int | None, block: tuple[int, int]) -> Layout:
    outputs, inputs, groups, size = _matrix(weight, group)
    # Symmetric, in the first version: the zero point 8 is stored as 7.
    zeros = np.full((groups, outputs // 8), 0x77777777, np.int32)
    return _layout(
        {"zero": zeros, "group": np.arange(inputs, dtype=np.int32) // (inputs // groups)},
        Stated("gptq", 4, size, symmetric=True, form="gptq"),
        payload=("qweight", "int32", (inputs // 8, outputs)),
        zero=("qzeros", "int32", zeros.shape),
        scale=("scales", "float16", (groups, outputs)),
        group=("g_idx", "int32", (inputs,)),
    )


def _awq(weight: Spec, group: int | None, block: tuple[int, int]) -> Layout:
    outputs, inputs, groups, size = _matrix(weight, group)
    return _layout(
        stated=Stated("awq", 4, size),
        payload=("qweight", "int32", (inputs, outputs // 8)),
        zero=("qzeros", "int32", (groups, outputs // 8)),
        scale=("scales", "float16", (groups, outputs)),
    )


def _mxfp4(weight: Spec, group: int | None, block: tuple[int, int]) -> Layout:
    if weight.ndim == 2:
        rows = (weight.shape[0], _groups(weight, weight.shape[1], 32))
        return _layout(payload=("*_packed", "uint8", (rows[0], 16 * rows[1])), scale=("*_scale", "uint8", rows))
    *lead, inputs, outputs = weight.shape
    grid = (*lead, outputs, _groups(weight, inputs, 32))
    return _layout(payload=("*_blocks", "uint8", (*grid, 16)), scale=("*_scales", "uint8", grid))


def _nvfp4(weight: Spec, group: int | None, block: tuple[int, int]) -> Layout:
    *lead, inputs = weight.shape
    return _layout(
        payload=("*_packed", "uint8", (*lead, inputs // 2)),
        scale=("*_scale", _F8, (*lead, _groups(weight, inputs, 16))),
        global_=("*_global_scale", "float32", (1,)),
    )


def _bnb4(weight: Spec, group: int | None, block: tuple[int, int], scheme: str) -> Layout:
    size = group if group and group > 0 else 64
    state = {"quant_type": scheme, "blocksize": size, "dtype": _scale(weight), "shape": list(weight.shape)}
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return _layout(
        {"map": codes_of(scheme).values, "state": text},
        payload=("*", "uint8", (-(-weight.size // 2), 1)),
        scale=("*.absmax", "float32", (-(-weight.size // size),)),
        map=("*.quant_map", "float32", (16,)),
        state=(f"*.quant_state.bitsandbytes__{scheme}", "uint8", text.shape),
    )


def _bnb8(weight: Spec, group: int | None, block: tuple[int, int]) -> Layout:
    rows, _ = _two(weight)
    return _layout(
        {"format": np.zeros((), np.uint8)},
        payload=("*", "int8", weight.shape),
        scale=("SCB", "float32", (rows,)),
        format=("*_format", "uint8", ()),
    )


def _blocks(weight: Spec, group: int | None, block: tuple[int, int], scheme: str) -> Layout:
    *lead, inputs = weight.shape
    return _layout(payload=("*", scheme, (*lead, _groups(weight, inputs, BLOCKS[scheme][0]))))


_LAYOUTS: Mapping[str, Callable[[Spec, int | None, tuple[int, int]], Layout]] = {
    **{scheme: partial(_fp8, scheme=scheme) for scheme in ("fp8-tensor", "fp8-channel", "fp8-block")},
    "int8": partial(_packed, bits=8),
    "int4": partial(_packed, bits=4),
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
    "nf4": partial(_bnb4, scheme="nf4"),
    "fp4": partial(_bnb4, scheme="fp4"),
    "bnb-int8": _bnb8,
    **{scheme: partial(_blocks, scheme=scheme) for scheme in WRITABLE_BLOCKS},
}
WRITABLE = tuple(_LAYOUTS)


def _scale(weight: Spec) -> str:
    """The dtype of scales: that of the weight, as loaders have it, or float32."""
    return weight.dtype if weight.dtype in ("bfloat16", "float16") else "float32"


def _groups(weight: Spec, inputs: int, size: int) -> int:
    """The number of groups of inputs."""
    if size < 0:
        return 1
    if not size or inputs % size:
        raise SpecMismatch(f"a leaf {weight} has {inputs} inputs, which groups of {size} do not divide")
    return inputs // size


def _two(weight: Spec) -> tuple[int, int]:
    if weight.ndim != 2:
        raise SpecMismatch(f"a leaf {weight} is no matrix, and this scheme has no other weights")
    rows, columns = weight.shape
    return rows, columns


def _matrix(weight: Spec, group: int | None) -> tuple[int, int, int, int]:
    """Outputs, inputs, groups and their size, of a matrix that fills words of 8 codes both ways."""
    outputs, inputs = _two(weight)
    if outputs % 8 or inputs % 8:
        raise SpecMismatch(f"a leaf {weight} does not fill words of 8 codes along both of its axes")
    size = group or 128
    return outputs, inputs, _groups(weight, inputs, size), size
