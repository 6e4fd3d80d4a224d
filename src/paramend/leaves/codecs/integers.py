"""Integers packed in words, as compressed-tensors, GPTQ and AWQ store them."""

import numpy as np

from paramend.leaves.codecs.codec import Codec, Parts, Stated, disagree
from paramend.leaves.codecs.codes import codes_of
from paramend.leaves.codecs.fields import Field, Packing
from paramend.leaves.codecs.scalings import Plain
from paramend.leaves.specs import Spec

# The bits that a layout may have if nothing says which, likely ones first.
_BITS = (4, 8, 2, 1, 3, 5, 6, 7)
# Where AWQ has each of 8 codes in a word, from the lowest bits up.
_AWQ = (0, 4, 1, 5, 2, 6, 3, 7)


def packed(scheme: str, parts: Parts, stated: Stated) -> Codec:
    """The codec of what compressed-tensors calls pack-quantized: (code - 2^(bits-1) - zero point) · scale. The dtype is
    that of the scales, as there."""
    payload, scale = parts["payload"], parts["scale"]
    words, grid, last = payload.spec.shape, scale.spec.shape, payload.spec.ndim - 1
    shape = tuple(map(int, parts["shape"].read().reshape(-1))) if "shape" in parts else ()
    width = shape[-1] if shape else (stated.group or 0) * grid[-1]
    bits = stated.bits or next((b for b in _BITS if _words(width, b) == words[-1]), 4)
    width = width if width > 0 else words[-1] * 32 // bits
    if _words(width, bits) != words[-1] or (shape and shape != (*words[:-1], width)):
        says = f"a weight of shape {list(shape)} in codes" if shape else f"{width} codes"
        raise disagree(f"a row has {words[-1]} words", f"{says} of {bits} bits", *parts.values())
    if stated.symmetric is False and "zero" not in parts:
        raise disagree("there are no zero points", "the configuration says not symmetric", *parts.values())
    groups = grid[-1] if scale.spec.ndim == len(words) else 1
    shared = scale.spec.size == 1
    every = (*(0 if shared else 1 for _ in range(last)), _group(parts, width, groups, stated))
    grid = (*((1,) * last if shared else words[:-1]), groups)
    fields = {
        "payload": Field(payload.spec, (1,) * len(words), Packing(last, bits)),
        "scale": Field(Spec(grid, scale.spec.dtype), every),
    }
    if "zero" in parts:
        zero = parts["zero"].spec
        few = zero.dtype == "int32"
        fields["zero"] = Field(zero if few else Spec(grid, zero.dtype), every, Packing(last - 1, bits) if few else None)
        if few and zero.shape != (*grid[:-2], _words(grid[-2], bits), groups):
            raise disagree(f"zero points of shape {list(zero.shape)}", f"scales of {list(grid)}", *parts.values())
    codes = codes_of(f"{-(1 << bits - 1)}..{(1 << bits - 1) - 1}")
    zeros = codes if "zero" not in parts or parts["zero"].spec.dtype == "int32" else codes_of(parts["zero"].spec.dtype)
    fields |= _by_index(parts, width, groups, last, len(words))
    return Codec(f"int{bits}", Spec((*words[:-1], width), scale.spec.dtype), fields, codes, Plain(), zeros)


def gptq(scheme: str, parts: Parts, stated: Stated) -> Codec:
    """The codec of GPTQ: (code - zero point) · scale, with zero points stored one lower in its first version."""
    _check_matrix(parts)
    payload, scale = parts["payload"], parts["scale"]
    (rows, outputs), groups = payload.spec.shape, scale.spec.shape[0]
    bits = _gptq_bits(parts, stated)
    inputs = rows * 32 // bits
    every = (_group(parts, inputs, groups, stated), 1)
    fields = {"payload": Field(payload.spec, (1, 1), Packing(0, bits)), "scale": Field(scale.spec, every)}
    first = 0
    if "zero" in parts:
        fields["zero"] = Field(parts["zero"].spec, every, Packing(1, bits))
        first = _version(parts, fields["zero"], outputs, bits, stated)
    fields |= _by_index(parts, inputs, groups, 0, 2)
    most = (1 << bits) - 1
    return Codec(
        scheme,
        Spec((inputs, outputs), scale.spec.dtype),
        fields,
        codes_of(f"0..{most}" if "zero" in parts else f"{-(1 << bits - 1)}..{(1 << bits - 1) - 1}"),
        Plain(),
        codes_of(f"{first}..{most + first}"),
        axes=(1, 0),
    )


def awq(scheme: str, parts: Parts, stated: Stated) -> Codec:
    """The codec of AWQ: (code - zero point) · scale, packed along the outputs in an order of their own."""
    _check_matrix(parts)
    payload, scale = parts["payload"], parts["scale"]
    inputs, groups = payload.spec.shape[0], scale.spec.shape[0]
    if stated.bits not in (None, 4):
        raise disagree("there are 8 codes in a word", f"the configuration says {stated.bits} bits", payload, scale)
    every = (_group(parts, inputs, groups, stated), 1)
    fields = {"payload": Field(payload.spec, (1, 1), Packing(1, 4, _AWQ)), "scale": Field(scale.spec, every)}
    if "zero" in parts:
        fields["zero"] = Field(parts["zero"].spec, every, Packing(1, 4, _AWQ))
    codes = codes_of("0..15" if "zero" in parts else "-8..7")
    return Codec(scheme, Spec((inputs, scale.spec.shape[1]), scale.spec.dtype), fields, codes, Plain(), codes, (1, 0))


def _check_matrix(parts: Parts) -> None:
    payload, scale = parts["payload"], parts["scale"]
    if payload.spec.ndim != 2 or scale.spec.ndim != 2:
        raise disagree("codes and scales have more axes", "this scheme is one of matrices", payload, scale)


def _words(codes: int, bits: int) -> int:
    """The number of words of 32 bits that hold so many codes."""
    return -(-codes * bits // 32)


def _group(parts: Parts, inputs: int, groups: int, stated: Stated) -> int:
    """How many inputs share a scale; 0 where all do."""
    size = stated.group or 0
    if size > 0 and -(-inputs // size) != groups:
        raise disagree(
            f"{inputs} inputs have {groups} {'group' if groups == 1 else 'groups'}",
            f"the configuration says groups of {size}, which makes {-(-inputs // size)}",
            *parts.values(),
        )
    if groups == 1:
        return 0
    if size <= 0 and inputs % groups:
        raise disagree(f"{inputs} inputs", f"{groups} groups, which do not divide them", *parts.values())
    return size if size > 0 else inputs // groups


def _by_index(parts: Parts, inputs: int, groups: int, axis: int, ndim: int) -> dict[str, Field]:
    """The field of the group of each input, if one is stored that says something."""
    if "group" not in parts or groups == 1:
        return {}
    index = parts["group"].read()
    if index.min(initial=0) < 0:  # compressed-tensors writes -1 where the groups are in order
        return {}
    if index.size != inputs or index.max(initial=0) >= groups:
        said = f"the groups of {index.size} inputs, up to {index.max(initial=0)}"
        raise disagree(said, f"{inputs} inputs and {groups} groups", *parts.values())
    if (index == np.arange(inputs) // -(-inputs // groups)).all():
        return {}
    every = tuple(int(at == axis) for at in range(ndim))
    shape = tuple(inputs if each else 1 for each in every)
    return {"group": Field(Spec(shape, parts["group"].spec.dtype), every)}


def _gptq_bits(parts: Parts, stated: Stated) -> int:
    """The bits of a code, which the shapes say in several ways."""
    payload, scale = parts["payload"], parts["scale"]
    (rows, outputs), found = payload.spec.shape, {}
    if "zero" in parts:
        found["zero points"] = [b for b in _BITS if outputs * b == 32 * parts["zero"].spec.shape[-1]]
    if "group" in parts:
        found["groups of inputs"] = [b for b in _BITS if parts["group"].spec.size * b == 32 * rows]
    if stated.bits:
        found["the configuration"] = [stated.bits]
    bits = next((b for b in _BITS if all(b in each for each in found.values())), None)
    if bits is None or scale.spec.shape[-1] != outputs:
        said = "; ".join(f"{name}: {' or '.join(map(str, each)) or 'none'}" for name, each in found.items())
        raise disagree(f"{rows} rows of words", f"the bits of a code are, by {said}", *parts.values())
    return bits


def _version(parts: Parts, field: Field, outputs: int, bits: int, stated: Stated) -> int:
    """What is added to stored zero points: 1 in the first version of GPTQ, 0 in the second. A symmetric model has one
    zero point, in the middle, so that it tells the version."""
    groups = parts["zero"].spec.shape[0]
    zeros = np.unique(field.read(parts["zero"], (range(groups * max(field.every[0], 1)), range(outputs))))
    middle = 1 << bits - 1
    seen = {middle - 1: 1, middle: 0}.get(int(zeros[0])) if len(zeros) == 1 else None
    said = {"gptq": 1, "gptq_v2": 0}.get(stated.form) if stated.form else (1 if stated.method else None)
    shown = f"{int(zeros[0])}" if len(zeros) == 1 else f"{int(zeros[0])} to {int(zeros[-1])}"
    ways = 'set "checkpoint_format" to "gptq" or to "gptq_v2" in the configuration, whichever is true: the zero point '
    ways += "is the stored one plus 1 in the first, and the stored one in the second"
    if (stated.symmetric and seen is None) or (said is None and seen is None):
        says = "the configuration says symmetric" if stated.symmetric else "no configuration says the version"
        raise disagree(f"the stored zero points are {shown}", says, *parts.values(), hint=ways)
    if seen is not None and said is not None and seen != said and stated.symmetric is not False:
        label = stated.form or f"{stated.method}, without checkpoint_format, which is the first version"
        says = f"that is {'the first' if seen else 'the second'} version of GPTQ"
        here, there = f"all stored zero points are {shown}, {says}", f"the configuration says {label}"
        raise disagree(here, there, *parts.values(), hint=ways)
    found = said if said is not None else seen
    assert found is not None
    return found
