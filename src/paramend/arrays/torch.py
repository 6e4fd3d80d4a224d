"""Verbs over torch tensors, as `Backend` documents them. Imported only after torch was."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from paramend.arrays import torch_codes, torch_sharded
from paramend.errors import Unsupported
from paramend.leaves.specs import Spec, numpy_dtype

# torch and numpy cannot share memory of these dtypes: they are passed as integers of the same width.
_CARRIERS = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.int16), 4: (torch.int32, np.int32)}


def owns(kind: type) -> bool:
    """Whether arrays of this type are torch's. The parameters of lazy layers have no shape yet: they do not count."""
    return issubclass(kind, torch.Tensor) and not issubclass(kind, torch.nn.parameter.UninitializedTensorMixin)


def spec(x: Any) -> Spec:
    return Spec(tuple(x.shape), str(x.dtype).removeprefix("torch."))


def refusal(x: Any) -> str:
    if x.is_quantized:
        return f"it is quantized ({x.dtype})"
    if torch_codes.owns(type(x)):
        return f"{type(x).__name__} holds codes and scales, of which pm.dequantize makes floats"
    coded = hasattr(x, "SCB") and x.dtype == torch.int8  # Int8Params
    if coded or getattr(x, "quant_state", None) is not None:  # Params4bit
        return "it holds codes of bitsandbytes, and their scales are no leaf"
    return "it is on the meta device and has no values" if x.is_meta else ""


def abstract(x: Any) -> bool:
    return bool(x.is_meta)


def traced(x: Any) -> bool:
    return False


def _new(x: Any, compute: Callable[[], Any]) -> Any:
    """A new tensor like x: a leaf of the autograd graph stays a leaf, a Parameter a Parameter."""
    if x.grad_fn is not None:
        return compute()
    with torch.no_grad():
        result = compute()
    if isinstance(x, torch.nn.Parameter):
        result = torch.nn.Parameter(result, requires_grad=x.requires_grad)
        vars(result).update(vars(x))
        return result
    return result.requires_grad_() if x.requires_grad and not result.requires_grad else result


_by_part = torch_sharded.by_part(_new)


def zeros(x: Any) -> Any:
    return _new(x, lambda: torch.zeros_like(x))


@_by_part
def full(x: Any, value: Any) -> Any:
    return _new(x, lambda: torch.zeros_like(x).copy_(_tensor(value, x)))


@_by_part
def like(value: Any, x: Any) -> Any:
    """The values as a tensor with the device, memory format and `requires_grad` of `x`. For `x` on the meta device, the
    result is on the default device."""
    if torch_codes.alike(value, x):
        twin = value.detach().clone()
        return torch.nn.Parameter(twin, x.requires_grad) if isinstance(x, torch.nn.Parameter) else twin
    home = torch.get_default_device() if x.is_meta else x.device
    return _new(x, lambda: torch.empty_like(x, device=home).copy_(_tensor(value, x, home)))


def _tensor(value: Any, x: Any, device: Any = None) -> Any:
    """A tensor of the dtype of x, on its device or another. Scalars are rounded to the dtype, as in numpy and JAX."""
    device = x.device if device is None else device
    if isinstance(value, torch.Tensor):
        return value.to(device, x.dtype)
    if isinstance(value, bool | int | float | complex):
        return torch.tensor(value, dtype=x.dtype, device=device)
    return from_numpy(np.asarray(value)).to(device, x.dtype)


def from_numpy(array: Any) -> Any:
    """A tensor on the host with the values of a numpy array, bit for bit; a copy."""
    array = np.array(array, order="C")
    if array.dtype.kind == "V" or array.dtype.name == "bfloat16" or array.dtype.name.startswith("float8"):
        name = array.dtype.name
        _, carrier = _CARRIERS[array.dtype.itemsize]
        return torch.from_numpy(array.view(carrier)).view(getattr(torch, name))
    return torch.from_numpy(array)


def beside(values: Any, x: Any) -> Any:
    new = from_numpy(values).to(x.device)
    return torch_sharded.beside(new, x) if torch_sharded.owns(x) else new


def resized(values: Any, x: Any) -> Any:
    new = from_numpy(values).to(x.device)
    return torch_sharded.beside(new, x, range(new.ndim)) if torch_sharded.owns(x) else new


gathered = torch_sharded.gathered
parted = spread = torch_sharded.owns


def parts(x: Any) -> list[tuple[Any, Any]]:
    return torch_sharded.parts(x) if torch_sharded.owns(x) else [(tuple(map(range, x.shape)), x)]


def filled(x: Any, read: Callable[[Any], Any]) -> Any:
    return _new(x, lambda: torch_sharded.filled(x, lambda box: from_numpy(read(box)).to(x.device)))


def _wide(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The verb, also for fp8, in which torch cannot compute: operands and result are float32."""

    def run(x: Any, *values: Any) -> Any:
        if x.dtype.itemsize == 1 and x.dtype.is_floating_point:
            return verb(x.float(), *(None if value is None else value.float() for value in values)).to(x.dtype)
        return verb(x, *values)

    return run


_VERBS = {"add": _wide(torch.add), "multiply": _wide(torch.mul)}


@_by_part
def add(x: Any, value: Any) -> Any:
    return _new(x, lambda: _VERBS["add"](x, _tensor(value, x)))


@_by_part
def multiply(x: Any, value: Any) -> Any:
    return _new(x, lambda: _VERBS["multiply"](x, _tensor(value, x)))


def matmul(x: Any, y: Any) -> Any:
    return x @ y


@_by_part
def clip(x: Any, lo: Any, hi: Any) -> Any:
    low, high = (None if bound is None else _tensor(bound, x) for bound in (lo, hi))
    return _new(x, lambda: _wide(torch.clamp)(x, low, high))


@_by_part
def cast(x: Any, dtype: str) -> Any:
    return _new(x, lambda: x.to(getattr(torch, dtype), copy=True))


def get(x: Any, index: Any) -> Any:
    """x[index], a copy outside the autograd graph unless x is in it."""
    if torch_sharded.owns(x):
        return torch_sharded.get(x, _torch_index(index, x.shape))
    index = _torch_index(index, x.shape)
    return x[index].clone() if x.grad_fn is not None else x.detach()[index].clone()


@_by_part
def put(x: Any, index: Any, verb: str, value: Any) -> Any:
    index = _torch_index(index, x.shape)

    def compute() -> Any:
        out = x.clone()
        new = _tensor(value, x)
        out[index] = new if verb == "set" else _VERBS[verb](out[index], new)
        return out

    return _new(x, compute)


@_by_part
def take(x: Any, positions: Sequence[int], axis: int) -> Any:
    """A new tensor of slices of x, with its axes in the same order in memory."""
    places = torch.tensor(positions, dtype=torch.int64, device=x.device)
    order = sorted(range(x.ndim), key=lambda each: -x.stride(each))
    back = [order.index(each) for each in range(x.ndim)]
    return _new(x, lambda: torch.index_select(x.permute(order), back[axis], places).permute(back))


@_by_part
def transpose(x: Any, axes: Sequence[int]) -> Any:
    return _new(x, lambda: x.permute(*axes).clone(memory_format=torch.contiguous_format))


@_by_part
def reshape(x: Any, shape: Sequence[int]) -> Any:
    return _new(x, lambda: x.clone(memory_format=torch.contiguous_format).reshape(tuple(shape)))


def _torch_index(index: Any, shape: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(part, slice) and (part.step or 1) < 0 for part in parts):  # which torch lacks: element by element
        shape = tuple(shape)
        places = np.arange(math.prod(shape)).reshape(shape)[index]
        parts = np.unravel_index(places, shape) if shape else parts
    return tuple(torch.as_tensor(part) if isinstance(part, np.ndarray) else part for part in parts)


@torch_sharded.by_part(lambda first, compute: compute())
def stack(tensors: Any, axis: int) -> Any:
    """The tensors along a new axis; none is in the autograd graph unless the first is."""
    return torch.stack([x if tensors[0].grad_fn is not None else x.detach() for x in tensors], axis)


@_by_part
def concat(tensors: Any, axis: int) -> Any:
    """The tensors one after the other; none is in the autograd graph unless the first is."""
    return _new(
        tensors[0], lambda: torch.cat([x if tensors[0].grad_fn is not None else x.detach() for x in tensors], axis)
    )


def numpy(x: Any) -> np.ndarray[Any, Any]:
    if torch_codes.owns(type(x)):
        raise Unsupported(f"a leaf is no array: {refusal(x)}", hint="tree, report = pm.dequantize(tree)")
    torch_sharded.refuse(x)
    x = x.detach().cpu().contiguous()
    name = str(x.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):
        tensor, _ = _CARRIERS[x.dtype.itemsize]
        bits: np.ndarray[Any, Any] = x.view(tensor).numpy().view(numpy_dtype(name))
        return bits
    array: np.ndarray[Any, Any] = x.numpy()
    return array


def local(x: Any) -> bool:
    return bool(x.device.type == "cpu")


def mutable(x: Any) -> bool:
    return True


class _Pointer:
    """Memory as numpy takes it over: an address, which numpy does not read from unless told to."""

    def __init__(self, x: Any) -> None:
        width = x.element_size()
        self.__array_interface__ = {
            "data": (x.data_ptr(), True),
            "shape": tuple(x.shape),
            "strides": tuple(step * width for step in x.stride()),
            "typestr": f"|V{width}",
            "version": 3,
        }


def memory(x: Any) -> tuple[str, np.ndarray[Any, Any]] | None:
    """The device, and the elements as untyped memory, which may lie on the device; None if there is none."""
    try:
        x = torch_sharded.part(x) if torch_sharded.owns(x) else x
        if x.is_meta or x.layout != torch.strided or not x.numel() or not x.data_ptr():
            return None
    except RuntimeError:  # a tensor of another kind, without a storage of its own
        return None
    return str(x.device), np.asarray(_Pointer(x))


def assign(x: Any, value: Any) -> None:
    with torch.no_grad():
        if not torch_codes.alike(value, x):
            x.copy_(value)
            return
        for name, part in torch_codes.inner(x).items():
            part.copy_(getattr(value, name))


def storage(x: Any) -> object:
    """A key that is equal for tied tensors. In a state dict, tied weights are two tensors over one storage."""
    if torch_sharded.owns(x) and not x.is_meta:
        # Not its address, which all parts without elements share: ties are the same in all processes.
        held = torch_sharded.part(x)
        return StorageWeakRef(held.untyped_storage()).cdata, held.storage_offset(), tuple(x.shape), x.placements
    try:
        pointer = 0 if x.is_meta or x.layout != torch.strided else x.untyped_storage().data_ptr()
    except RuntimeError:  # a tensor of another kind, as within `torch.func.vmap`
        pointer = 0
    if not pointer or not x.numel():
        return id(x)
    return (pointer, x.device, x.dtype, x.storage_offset(), tuple(x.shape), x.stride())
