"""Specs: what is known of an array without reading it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Protocol, SupportsIndex, TypeAlias, cast

import numpy as np

from paramend.errors import BadArgument
from paramend.reports import wording

Array: TypeAlias = np.ndarray[Any, Any]
# An array of any library, and any tree of arrays: no type names them all, and type checkers take both as they come.
AnyArray: TypeAlias = Any
AnyTree: TypeAlias = Any
# A number, also one of numpy or a traced one: arrays without axes are numbers.
Scalar: TypeAlias = complex | np.number[Any] | np.bool_ | SupportsIndex
# An int, or a key of JAX.
Seed: TypeAlias = SupportsIndex
# What stands between brackets.
Axis: TypeAlias = SupportsIndex | slice | EllipsisType | Sequence[int] | Array | None
Slice: TypeAlias = Axis | tuple[Axis, ...]


class TorchDtype(Protocol):
    """A dtype of torch, which need not be there."""

    @property
    def is_floating_point(self) -> bool:
        """Whether it is one of floats."""


DtypeLike: TypeAlias = str | type | np.dtype[Any] | TorchDtype

# One row per dtype: its name, its bits, its safetensors code (None: the format has none).
_ROWS: tuple[tuple[str, int, str | None], ...] = (
    ("bool", 8, "BOOL"),
    ("int4", 4, None),
    ("uint4", 4, None),
    ("int8", 8, "I8"),
    ("uint8", 8, "U8"),
    ("int16", 16, "I16"),
    ("uint16", 16, "U16"),
    ("int32", 32, "I32"),
    ("uint32", 32, "U32"),
    ("int64", 64, "I64"),
    ("uint64", 64, "U64"),
    ("float4_e2m1fn", 4, "F4"),
    ("float6_e2m3fn", 6, "F6_E2M3"),
    ("float6_e3m2fn", 6, "F6_E3M2"),
    ("float8_e4m3fn", 8, "F8_E4M3"),
    ("float8_e4m3fnuz", 8, "F8_E4M3FNUZ"),
    ("float8_e5m2", 8, "F8_E5M2"),
    ("float8_e5m2fnuz", 8, "F8_E5M2FNUZ"),
    ("float8_e8m0fnu", 8, "F8_E8M0"),
    ("float8_e3m4", 8, None),
    ("float8_e4m3", 8, None),
    ("float8_e4m3b11fnuz", 8, None),
    ("float16", 16, "F16"),
    ("bfloat16", 16, "BF16"),
    ("float32", 32, "F32"),
    ("float64", 64, "F64"),
    ("complex64", 64, "C64"),
    ("complex128", 128, None),
)
# Blocks of ggml as GGUF has them, each an element of a leaf as it is stored: how many values it holds, and its bytes.
BLOCKS: dict[str, tuple[int, int]] = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "iq1_s": (256, 50),
    "iq1_m": (256, 56),
    "iq2_xxs": (256, 66),
    "iq2_xs": (256, 74),
    "iq2_s": (256, 82),
    "iq3_xxs": (256, 98),
    "iq3_s": (256, 110),
    "iq4_nl": (32, 18),
    "iq4_xs": (256, 136),
    "tq1_0": (256, 54),
    "tq2_0": (256, 66),
    "mxfp4": (32, 17),
    "nvfp4": (64, 36),
}
BITS = {name: bits for name, bits, _ in _ROWS}
WIDTHS = BITS | {name: 8 * nbytes for name, (_, nbytes) in BLOCKS.items()}
SAFETENSORS_CODES = {name: code for name, _, code in _ROWS if code}
FROM_SAFETENSORS = {code: name for name, code in SAFETENSORS_CODES.items()}
ALIASES = {"half": "float16", "float": "float32", "double": "float64", "bf16": "bfloat16", "fp16": "float16"}
ALIASES |= {"fp32": "float32", "f32": "float32", "f16": "float16", "int": "int32", "long": "int64"}


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape and dtype of a leaf.

    Attributes:
        shape: the length of each axis.
        dtype: the name that numpy and ml_dtypes give it, such as "float32" or "bfloat16"; of a JAX PRNG key,
            such as "key<fry>".

    >>> Spec((4, 8), "bfloat16").nbytes
    64
    >>> print(Spec((4, 8), "bfloat16"))
    bfloat16[4,8]
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of scalars."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory or on disk; 0 for a dtype of unknown width."""
        return (self.size * WIDTHS.get(self.dtype, 0) + 7) // 8

    @property
    def kind(self) -> str:
        """One of "bool", "int", "float", "complex", "other"."""
        return kind_of(self.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def kind_of(dtype: str) -> str:
    """The kind of a dtype's name: "bool", "int", "float", "complex" or "other" (PRNG keys, strings).

    >>> kind_of("float8_e5m2"), kind_of("uint8"), kind_of("key<fry>")
    ('float', 'int', 'other')
    """
    if dtype not in BITS:  # also blocks
        return "other"
    if dtype.startswith(("int", "uint")):
        return "int"
    if dtype.startswith(("float", "bfloat")):
        return "float"
    return "complex" if dtype.startswith("complex") else "bool"


def dtype_name(dtype: DtypeLike) -> str:
    """The name of a dtype given as text or as an object of numpy, JAX or torch; `BadArgument` for an unknown one.

    >>> dtype_name("bf16"), dtype_name(np.float32), dtype_name(np.dtype("int8"))
    ('bfloat16', 'float32', 'int8')
    """
    if isinstance(dtype, str):
        name = ALIASES.get(dtype, dtype)
    elif str(dtype).startswith("torch."):
        name = str(dtype).removeprefix("torch.")
    else:
        try:
            name = np.dtype(cast(type, dtype)).name
        except TypeError:
            name = str(dtype)
    if name in BITS or name.startswith("key<"):
        return name
    if name in BLOCKS:
        raise BadArgument(
            f"{name} is a code, not a dtype", hint=f'pm.quantize(tree, selector, scheme="{name}"), for q8_0 and q4_0'
        )
    near = wording.closest(name, BITS) if len(name) < 40 else []
    shown = repr(dtype) if len(name) < 40 else wording.described(dtype)
    raise BadArgument(
        f"{shown} is not a known dtype", hint=f'"{near[0]}"' if near else 'one such as "float32", "bfloat16", "int8"'
    )


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of that name, with ml_dtypes for what numpy lacks.

    >>> numpy_dtype("bfloat16").itemsize
    2
    """
    if name in BLOCKS:
        return np.dtype(f"V{BLOCKS[name][1]}")
    try:
        found: np.dtype[Any] = np.dtype(name)
    except TypeError:
        import ml_dtypes  # once imported, numpy knows its dtypes by name

        found = np.dtype(getattr(ml_dtypes, name))
    return found
