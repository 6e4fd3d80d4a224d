"""New groups: which leaves a weight becomes in a scheme, and the codec that gives them their values."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from paramend.errors import BadArgument, SpecMismatch
from paramend.leaves.codecs.codec import Codec
from paramend.leaves.codecs.codes import codes_of
from paramend.leaves.codecs.stated import NOTHING, Stated
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Held, Made
from paramend.leaves.schemes import SCHEMES
from paramend.leaves.specs import Array, Spec, numpy_dtype

_F8 = "float8_e4m3fn"
_Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """The leaves of a new group.

    Attributes:
        names: role → name of the leaf, with "*" for the name of the weight.
        specs: role → its spec.
        known: the leaves that do not depend on the values of the weight, by role.
        stated: what a configuration says of it.
    """

    names: Mapping[str, str]
    specs: Mapping[str, Spec]
    known: Mapping[str, Array] = field(default_factory=dict)
    stated: Stated = NOTHING


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
    if scheme not in _LAYOUTS:
        known = ", ".join(_LAYOUTS)
        raise BadArgument(f"{scheme!r} is no scheme that a weight can be quantised to", hint=f"one of {known}")
    if weight.kind != "float" or (weight.ndim < 2 and scheme not in ("nf4", "fp4")) or not weight.size:
        raise SpecMismatch(f"a leaf {weight} cannot be quantised to {scheme}: it is no matrix of floats")
    return _LAYOUTS[scheme](weight, group, block)


def codec_for(scheme: str, layout: Layout) -> Codec:
    """The codec of a new group."""
    name = "int4" if scheme == "int8" else scheme
    row = next(row for row in SCHEMES if row.name == name and layout.names["payload"] in row.payload and row.codec)
    parts: dict[str, Origin] = {
        role: Held(layout.known[role]) if role in layout.known else Made(spec, partial(_nothing, spec))
        for role, spec in layout.specs.items()
    }
    assert row.codec is not None
    return row.codec(scheme, parts, layout.stated)


def _nothing(spec: Spec) -> Array:
    return np.zeros(spec.shape, numpy_dtype(spec.dtype))


def _fp8(weight: Spec, group: int | None, block: tuple[int, int], scheme: str) -> Layout:
    shape, lead = weight.shape, weight.shape[:-2]
    scales = {"fp8-tensor": (1,), "fp8-channel": (*shape[:-1], 1)}.get(scheme) or (
        *lead,
        *(-(-length // each) for length, each in zip(shape[-2:], block, strict=True)),
    )
    blocks = scheme == "fp8-block"
    for length, each in zip(shape[-2:], block, strict=True):
        if blocks and length > each and length % each:
            raise SpecMismatch(
                f"a leaf {weight} is not made of whole blocks of {block[0]} by {block[1]}, and loaders differ in what "
                "the last ones are then",
                hint='scheme="fp8-channel" takes any shape',
            )
    names = {"payload": "*", "scale": "*_scale_inv" if blocks else "*_scale"}
    specs = {"payload": Spec(shape, _F8), "scale": Spec(scales, "float32" if blocks else _scale(weight))}
    return Layout(names, specs, stated=Stated(block=block) if blocks else NOTHING)


def _packed(weight: Spec, group: int | None, block: tuple[int, int], bits: int) -> Layout:
    size = group or (128 if bits == 4 else -1)
    *lead, inputs = weight.shape
    names = {"payload": "*_packed", "scale": "*_scale", "shape": "*_shape"}
    specs = {
        "payload": Spec((*lead, _words(inputs * bits)), "int32"),
        "scale": Spec((*lead, _groups(weight, inputs, size)), _scale(weight)),
        "shape": Spec((weight.ndim,), "int64"),
    }
    return Layout(names, specs, {"shape": np.array(weight.shape, np.int64)}, Stated(bits=bits, group=size))


def _gptq(weight: Spec, group: int | None, block: tuple[int, int]) -> Layout:
    outputs, inputs, groups, size = _matrix(weight, group)
    names = {"payload": "qweight", "zero": "qzeros", "scale": "scales", "group": "g_idx"}
    specs = {
        "payload": Spec((inputs // 8, outputs), "int32"),
        "zero": Spec((groups, outputs // 8), "int32"),
        "scale": Spec((groups, outputs), "float16"),
        "group": Spec((inputs,), "int32"),
    }
    # Symmetric, in the first version: the zero point 8 is stored as 7.
    zeros = np.full(specs["zero"].shape, 0x77777777, np.int32)
    known = {"zero": zeros, "group": np.arange(inputs, dtype=np.int32) // (inputs // groups)}
    return Layout(names, specs, known, Stated("gptq", 4, size, symmetric=True, form="gptq"))


def _awq(weight: Spec, group: int | None, block: tuple[int, int]) -> Layout:
    outputs, inputs, groups, size = _matrix(weight, group)
    names = {"payload": "qweight", "zero": "qzeros", "scale": "scales"}
    specs = {
        "payload": Spec((inputs, outputs // 8), "int32"),
        "zero": Spec((groups, outputs // 8), "int32"),
        "scale": Spec((groups, outputs), "float16"),
    }
    return Layout(names, specs, stated=Stated("awq", 4, size))


def _mxfp4(weight: Spec, group: int | None, block: tuple[int, int]) -> Layout:
    if weight.ndim == 2:
        outputs, inputs = weight.shape
        groups = _groups(weight, inputs, 32)
        names = {"payload": "*_packed", "scale": "*_scale"}
        return Layout(names, _of_words((outputs, inputs // 2), (outputs, groups)))
    *lead, inputs, outputs = weight.shape
    groups = _groups(weight, inputs, 32)
    names = {"payload": "*_blocks", "scale": "*_scales"}
    return Layout(names, _of_words((*lead, outputs, groups, 16), (*lead, outputs, groups)))


def _of_words(payload: _Shape, scale: _Shape) -> dict[str, Spec]:
    return {"payload": Spec(payload, "uint8"), "scale": Spec(scale, "uint8")}


def _nvfp4(weight: Spec, group: int | None, block: tuple[int, int]) -> Layout:
    *lead, inputs = weight.shape
    names = {"payload": "*_packed", "scale": "*_scale", "global": "*_global_scale"}
    specs = {
        "payload": Spec((*lead, inputs // 2), "uint8"),
        "scale": Spec((*lead, _groups(weight, inputs, 16)), _F8),
        "global": Spec((1,), "float32"),
    }
    return Layout(names, specs)


def _four_bits(weight: Spec, group: int | None, block: tuple[int, int], scheme: str) -> Layout:
    size = group if group and group > 0 else 64
    dtype = weight.dtype if weight.dtype in ("bfloat16", "float16", "float32") else "float32"
    state = {"quant_type": scheme, "blocksize": size, "dtype": dtype, "shape": list(weight.shape)}
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    names = {"payload": "*", "scale": "*.absmax", "map": "*.quant_map"}
    names["state"] = f"*.quant_state.bitsandbytes__{scheme}"
    specs = {
        "payload": Spec((-(-weight.size // 2), 1), "uint8"),
        "scale": Spec((-(-weight.size // size),), "float32"),
        "map": Spec((16,), "float32"),
        "state": Spec(text.shape, "uint8"),
    }
    return Layout(names, specs, {"map": codes_of(scheme).values, "state": text})


def _int8(weight: Spec, group: int | None, block: tuple[int, int]) -> Layout:
    rows, _ = _two(weight)
    names = {"payload": "*", "scale": "SCB", "format": "*_format"}
    specs = {"payload": Spec(weight.shape, "int8"), "scale": Spec((rows,), "float32"), "format": Spec((), "uint8")}
    return Layout(names, specs, {"format": np.zeros((), np.uint8)})


_LAYOUTS: Mapping[str, Callable[[Spec, int | None, tuple[int, int]], Layout]] = {
    **{scheme: partial(_fp8, scheme=scheme) for scheme in ("fp8-tensor", "fp8-channel", "fp8-block")},
    "int8": partial(_packed, bits=8),
    "int4": partial(_packed, bits=4),
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
    "nf4": partial(_four_bits, scheme="nf4"),
    "fp4": partial(_four_bits, scheme="fp4"),
    "bnb-int8": _int8,
}


def _scale(weight: Spec) -> str:
    """The dtype of scales: that of the weight, as loaders have it, or float32."""
    return weight.dtype if weight.dtype in ("bfloat16", "float16") else "float32"


def _words(bits: int) -> int:
    return -(-bits // 32)


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
