"""What torch's pickles may name: storages, dtypes and the functions that rebuild tensors, all as inert data."""

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

import numpy as np

from paramend.formats.limits import MAX_AXES
from paramend.formats.torch.foreign import foreign
from paramend.formats.torch.pickles import Flaw, Foreign, Name
from paramend.leaves.specs import BITS, Spec, kind_of

# Bits per element of the dtypes that torch has but numpy lacks: their bytes can only be copied.
_RAW_BITS = {"complex32": 32, "qint32": 32, "bits16": 16, "quint4x2": 4, "quint2x4": 2}
_BYTES = ("float4_e2m1fn_x2", "qint8", "quint8", "bits8", "bits1x8", "bits2x4", "bits4x2")
_RAW_BITS |= dict.fromkeys((*_BYTES, *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8))), 8)
_DTYPES = {name: bits for name, bits in BITS.items() if bits % 8 == 0} | _RAW_BITS
# Names of storage classes → the dtype of their elements; "" if only the tensors say.
STORAGES = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Bool": "bool"}
STORAGES |= {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8"}
STORAGES |= {"ComplexDouble": "complex128", "ComplexFloat": "complex64", "Untyped": ""}
STORAGES |= {name: name.lower() for name in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")}
_LAYOUTS = ("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "jagged", "_mkldnn")
_SCHEMES = ("tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric", "channel_affine_float_qparams")
_NUMPY_CODES = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"])
_I63 = 2**63


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """The bytes that one or more tensors view."""

    key: str  # they are in the record "data/<key>"
    dtype: str  # of its elements; "" if only the tensors say
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor of a checkpoint: a view of the elements of a storage."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]  # the step along each axis, in elements
    dtype: str  # in torch's spelling
    storage: Storage | None = None  # where its elements are; None if they are not in a single storage
    offset: int = 0  # of the first element, in elements
    conj: bool = False  # whether its values are the conjugates of those in the storage
    neg: bool = False  # whether its values are the negatives of those in the storage
    sealed: str = ""  # why it cannot be read as an array, or ""
    parts: tuple["Tensor", ...] = ()  # the tensors that a sparse tensor consists of

    @property
    def spec(self) -> Spec:
        """Shape and dtype; a dtype that numpy lacks, such as qint8, is "raw<qint8>"."""
        return Spec(self.shape, self.dtype if self.dtype in BITS else f"raw<{self.dtype}>")

    @property
    def bits(self) -> int:
        return _DTYPES[self.dtype]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes of all elements; of a sparse tensor, those of its parts."""
        if self.storage is None:
            return sum(part.nbytes for part in self.parts)
        return (self.size * self.bits + 7) // 8

    @property
    def reach(self) -> int:
        """The number of elements from the first to the last, including gaps; 0 if there are none."""
        if not self.size:
            return 0
        return 1 + sum((length - 1) * step for length, step in zip(self.shape, self.stride, strict=True))

    @property
    def bounds(self) -> tuple[int, int]:
        """The bits of the storage from the first element to the last, including gaps."""
        return self.offset * self.bits, (self.offset + self.reach) * self.bits

    @property
    def contiguous(self) -> bool:
        step = 1
        for length, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if length != 1 and stride != step and self.size:
                return False
            step *= length
        return True

    def flaw(self) -> str:
        """What is wrong with it, or "": it must be within its storage."""
        for part in self.parts:
            why = part.flaw()
            if why:
                return f"one of its parts: {why}"
        kind = kind_of(self.dtype) if self.conj or self.neg else ""
        if kind and kind != "complex" and (self.conj or kind != "float"):
            return f"{self.dtype} does not support the conjugate or negative flag"
        shape = self.shape if self.size else [max(length, 1) for length in self.shape]
        if math.prod(shape) * self.bits >= _I63:
            return "its shape overflows 64 bits"
        reach = self.reach
        if self.storage is None or not reach:
            return ""
        needed, there = (self.offset + reach) * self.bits, 8 * self.storage.nbytes
        if needed > there:
            return f"it runs past its storage: it reaches byte {-(-needed // 8):,} of {self.storage.nbytes:,}"
        return ""


class TorchWords:
    """The vocabulary of torch's pickles, for storages of these lengths; `carried` names classes that stay unread."""

    def __init__(self, storages: Mapping[str, int]) -> None:
        self._storages = storages
        self.carried: list[str] = []
        self._met: dict[tuple[str, str], Storage] = {}

    def names(self) -> Mapping[str, Name]:
        return KNOWN

    def foreign(self, module: str, name: str) -> Name:
        found = foreign(module, name)
        self.carried.append(found.text)
        return found

    def resolve(self, reference: Any) -> Storage:
        """The storage of a persistent id ("storage", class, key, device, number of elements)."""
        known = type(reference) is tuple and len(reference) in (5, 6) and reference[0] == "storage"
        _check(known, "a persistent id refers to something other than a storage")
        kind, key, _, count = reference[1:5]
        dtype = _STORAGE_NAMES.get(kind.text) if type(kind) is Name else None
        if dtype is None or type(key) is not str:
            raise Flaw("a storage of an unknown kind")
        _check(reference[5:] in ((), (None,)), "a storage is part of another")
        nbytes = self._storages.get(key)
        if nbytes is None:
            raise Flaw(f"storage {key!r:.100} is not in the file")
        wide = _whole(count, "the length of a storage") * (_DTYPES[dtype] if dtype else 8)
        if wide != 8 * nbytes and not (dtype.startswith("quint") and count == nbytes):
            raise Flaw(f"storage {key!r:.100} should have {wide // 8:,} bytes, but its record has {nbytes:,}")
        return self._met.setdefault((key, dtype), Storage(key, dtype, nbytes))

    def build(self, thing: Any, state: Any) -> None:
        """Check the state of a numpy dtype; nothing else has one."""
        _check(type(thing) is _NumpyDtype, f"{type(thing).__name__.lower()} takes no state")
        _check(type(state) is tuple and len(state) > 1, "a numpy dtype of an unknown kind")
        thing.swapped = state[1] not in ("<", "|", "=")


# ---- what calls return ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _NumpyDtype:
    code: str
    swapped: bool = False


def _check(sound: bool, otherwise: str) -> None:
    if not sound:
        raise Flaw(otherwise)


def _whole(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < _I63:
        raise Flaw(f"{what} must be a whole number from 0 to 2**63 - 1")
    return value


def _wholes(values: Any, what: str) -> tuple[int, ...]:
    if type(values) is not tuple:
        raise Flaw(f"{what} must be a tuple of whole numbers")
    if len(values) > MAX_AXES:
        raise Flaw(f"a tensor of {len(values):,} axes")
    for value in values:
        _whole(value, what)
    return values


def _strided(shape: Any, stride: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape, stride = _wholes(shape, "the shape of a tensor"), _wholes(stride, "the strides of a tensor")
    if len(shape) != len(stride):
        raise Flaw(f"a tensor of {len(shape)} axes with {len(stride)} strides")
    return shape, stride


def dtype_of(value: Any) -> str:
    """The name of a dtype in torch's spelling, without "torch."; `Flaw` for anything else."""
    name = value.text.removeprefix("torch.") if type(value) is Name else ""
    _check(name in _DTYPES, "a dtype is expected")
    return name


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, dtype: str | None = None, flags: Any = None, sealed: str = ""
) -> Tensor:
    _check(type(storage) is Storage, "a tensor without a storage")
    dtype, flags = dtype or storage.dtype, {} if flags is None else flags
    _check(bool(dtype), "a tensor without a dtype")
    shape, stride = _strided(shape, stride)
    _check(type(flags) is dict and flags.keys() <= {"conj", "neg"}, "a tensor has unknown properties")
    conj, neg = (bool(flags.get(flag)) for flag in ("conj", "neg"))
    if not sealed and dtype not in BITS:
        sealed = f"its dtype, torch.{dtype}, has no counterpart in numpy: its bytes can only be copied"
    return Tensor(shape, stride, dtype, storage, _whole(offset, "the offset of a tensor"), conj, neg, sealed)


def _rebuild_sparse(layout: Any, data: Any) -> Tensor:
    parts = [part for part in data if type(part) is Tensor and not part.parts] if type(data) is tuple else []
    shapes = [part for part in data if type(part) is tuple] if parts else []
    _check(len(data) <= 5 and len(shapes) == 1 and type(layout) is Name, "a sparse tensor of an unknown kind")
    shape = _wholes(shapes[0], "the shape of a tensor")
    name = layout.text.removeprefix("torch.")
    sealed = f"it is sparse ({name}): its bytes can only be copied"
    return Tensor(shape, (0,) * len(shape), parts[-1].dtype, sealed=sealed, parts=tuple(parts))


def _rebuild_nested(buffer: Any, *tables: Any) -> Tensor:
    known = all(type(part) is Tensor and not part.parts for part in (buffer, *tables)) and len(tables) <= MAX_AXES
    _check(known, "a nested tensor of an unknown kind")
    sealed = "it is a nested tensor: its bytes can only be copied"
    return Tensor(buffer.shape, buffer.stride, buffer.dtype, sealed=sealed, parts=(buffer, *tables))


def _rebuild_meta(dtype: Any, shape: Any, stride: Any, grad: Any) -> Tensor:
    shape, stride = _strided(shape, stride)
    return Tensor(shape, stride, dtype_of(dtype), sealed="it is a meta tensor, which has a shape but no values")


def _parameter(data: Any, grad: Any, hooks: Any, state: Any = None) -> Tensor:
    if type(data) is not Tensor:
        raise Flaw("a parameter is not a tensor")
    return replace(data)  # torch, too, makes a new tensor on the same storage


def _typed(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor that has attributes; these stay in the pickle."""
    known = type(function) is Name and function.call is not None and function.text.startswith("torch._utils._rebuild")
    _check(known, "a tensor is rebuilt by an unknown function")
    if type(kind) is not Name or kind.text not in ("torch.Tensor", "torch.nn.parameter.Parameter"):
        what = f", {kind.text:.100}" if type(kind) is Name else ""
        raise Flaw(f"a tensor of an unknown class{what}", hint="save plain tensors: tensor.as_subclass(torch.Tensor)")
    _check(type(arguments) is tuple, "the arguments of a function must be a tuple")
    return function.call(*arguments)


def _ordered(pairs: Any = ()) -> "OrderedDict[Any, Any]":
    _check(pairs == (), "an OrderedDict is filled by its call")
    return OrderedDict()


def _size(lengths: Any = ()) -> tuple[int, ...]:
    return _wholes(tuple(lengths) if type(lengths) is list else lengths, "torch.Size")


def _counter(counts: Any = None) -> dict[Any, Any]:
    _check(type(counts) in (dict, type(None)), "a counter is made from something that is not a dict")
    return dict(counts or {})


def _set(values: Any = ()) -> set[Any]:
    _check(type(values) in (list, tuple), "a set is made from something that is not a list")
    for value in values:
        small = abs(value) < _I63 if type(value) is int else type(value) in (str, bytes, bool, float, NoneType, Foreign)
        _check(small, "a set contains something other than plain values")
    return set(values)


def _complex(real: Any, imaginary: Any) -> complex:
    _check(type(real) is type(imaginary) is float, "a complex number is not made from two floats")
    return complex(real, imaginary)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes as protocol 2 writes them."""
    try:
        if type(text) is str and encoding in ("latin1", "latin-1"):
            return text.encode("latin1")
    except UnicodeEncodeError:
        pass
    raise Flaw("bytes in an unknown encoding")


def _bytearray(value: Any = b"", encoding: Any = "latin1") -> bytearray:
    return bytearray(value if type(value) is bytes else _encode(value, encoding))


def _device(kind: Any, index: Any = None) -> Name:
    known = type(kind) is str and kind.isidentifier() and type(index) in (int, type(None))
    _check(known, "a device of an unknown kind")
    return Name(f"torch.device('{kind[:100]}'{'' if index is None else f', {index}'})")


def _layout(name: Any) -> Name:
    _check(name in _LAYOUT_NAMES, "an unknown layout")
    return _LAYOUT_NAMES[name]


def _numpy_dtype(code: Any, align: Any = False, copy: Any = False) -> _NumpyDtype:
    _check(type(code) is str, "a numpy dtype without a name")
    return _NumpyDtype(code)


def _numpy_scalar(dtype: Any, raw: Any) -> Any:
    _check(type(dtype) is _NumpyDtype and type(raw) is bytes, "a numpy scalar of an unknown kind")
    _check(dtype.code in _NUMPY_CODES, "a numpy dtype is not a plain number")
    _check(not dtype.swapped, "a numpy dtype is not little-endian")
    found = np.dtype(dtype.code)
    _check(len(raw) == found.itemsize, f"a numpy scalar has {len(raw):,} bytes instead of {found.itemsize}")
    return np.frombuffer(raw, found)[0]


_CALLS: dict[str, Callable[..., Any]] = {
    # The view of a storage (the storage itself, offset, shape, strides), gradients, hooks; then the dtype, and flags.
    "torch._utils._rebuild_tensor": lambda s, at, shape, strides: _tensor(s, at, shape, strides),
    "torch._utils._rebuild_tensor_v2": lambda s, at, shape, strides, grad, hooks, flags=None: _tensor(
        s, at, shape, strides, None, flags
    ),
    "torch._utils._rebuild_tensor_v3": lambda s, at, shape, strides, grad, hooks, dtype, flags=None: _tensor(
        s, at, shape, strides, dtype_of(dtype), flags
    ),
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_qtensor": lambda s, at, shape, strides, quantizer, grad, hooks: _tensor(
        s, at, shape, strides, sealed="it is quantized: its bytes can only be copied"
    ),
    "torch._utils._rebuild_sparse_tensor": _rebuild_sparse,
    "torch._utils._rebuild_nested_tensor": _rebuild_nested,
    "torch._utils._rebuild_meta_tensor_no_storage": _rebuild_meta,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.serialization._get_layout": _layout,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "builtins.set": _set,
    "builtins.complex": _complex,
    "builtins.bytes": lambda: b"",
    "builtins.bytearray": _bytearray,
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
_STORAGE_NAMES = {
    f"{module}.{name}Storage": dtype
    for name, dtype in STORAGES.items()
    for module in ("torch", "torch.cuda", "torch.storage")
}
_LAYOUT_NAMES = {f"torch.{name}": Name(f"torch.{name}") for name in _LAYOUTS}
_CONSTANTS = [
    *_STORAGE_NAMES,
    *_LAYOUT_NAMES,
    *(f"torch.{name}" for name in _DTYPES),
    *(f"torch.per_{name}" for name in _SCHEMES),
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
]
KNOWN: dict[str, Name] = {name: Name(name) for name in _CONSTANTS}
KNOWN |= {name: Name(name, call) for name, call in _CALLS.items()}
