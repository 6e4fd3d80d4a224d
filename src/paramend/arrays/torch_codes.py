"""Tensors that hold codes and their scales themselves, of torchao and bitsandbytes. Imported only after torch was."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from paramend._optional import imported
from paramend.errors import Unsupported
from paramend.leaves.rules import Codec

# What the methods are called that give the values, of which the first counts. The second is one of every tensor.
_DECODING = ("get_original_weight", "dequantize")
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_ROW = 7.874015718698502e-3  # 1/127, as bitsandbytes has it


def owns(kind: type) -> bool:
    """Whether tensors of a type have a decoding of their own, and are made of others."""
    own = any(getattr(kind, name, None) is not getattr(torch.Tensor, name, None) for name in _DECODING)
    return issubclass(kind, torch.Tensor) and own and hasattr(kind, "__tensor_flatten__")


def rule_of(x: Any) -> Codec | None:
    """How the values of a tensor are decoded that holds codes and scales itself; None for any other."""
    if type(x) in _PLAIN:
        return None
    if owns(type(x)):
        return Codec(type(x).__name__, ("*",), _decode, _encode if hasattr(x, "from_hp") else None)
    if getattr(x, "quant_state", None) is not None and imported("bitsandbytes"):
        return _PARAMS4
    return _INT8 if getattr(x, "SCB", None) is not None else None


def alike(x: Any, y: Any) -> bool:
    """Whether two tensors hold codes in one way: the same type, made of tensors of the same shapes and dtypes."""
    return type(x) is type(y) and owns(type(x)) and _layout(x) == _layout(y)


def inner(x: Any) -> dict[str, Any]:
    """The tensors that a tensor is made of, by name."""
    return {name: getattr(x, name) for name in x.__tensor_flatten__()[0]}


@torch.no_grad()
def _decode(x: Any) -> Any:
    return getattr(x, next(name for name in _DECODING if hasattr(x, name)))()


@torch.no_grad()
def _encode(weight: Any, x: Any) -> Mapping[str, Any]:
    """A weight in the type of a tensor that there is, with scales of its own, by the constructor of its library;
    `Unsupported` if that needs what the tensor does not tell."""
    kind: Any = type(x)
    wanted = list(inspect.signature(kind.from_hp).parameters)[1:]
    known = {name: getattr(x, name) for name in wanted if hasattr(x, name) and name not in ("scale", "zero_point")}
    try:
        if "granularity" in wanted:
            known["granularity"] = _granularity(x)
        if "float8_dtype" in wanted:
            known["float8_dtype"] = x.qdata.dtype
        made = _finite(kind.from_hp(weight, **known), weight)
        why = "" if alike(made, x) else "what it makes is stored otherwise"
        if "mapping_type" in wanted and x.zero_point is not None and x.zero_point.any():
            why = "it has zero points"
    except Exception as error:  # of its library, such as kernels that are not there
        why = str(error) or repr(error)
    if why:
        raise Unsupported(
            f"{kind.__name__}.from_hp cannot encode it as it is: {why}",
            hint="tree, report = pm.dequantize(tree, selector) makes floats of it first",
        )
    return {"*": made}


def _finite(made: Any, weight: Any) -> Any:
    """A tensor that was made of a weight, without NaN for blocks of zeros alone, whose scale may be 0."""
    lost = ~_decode(made).isfinite() & weight.isfinite()
    if lost.any():
        made.qdata.view(torch.uint8)[lost & (weight == 0)] = 0
        if not (_decode(made).isfinite() | ~weight.isfinite()).all():
            raise ValueError("some values become inf or NaN")
    return made


def _granularity(x: Any) -> Any:
    """What torchao calls the size of blocks."""
    from torchao.quantization.granularity import PerGroup, PerRow, PerTensor  # its tensor is here

    block, shape = tuple(x.block_size), tuple(x.shape)
    if block == shape:
        return PerTensor()
    return PerRow() if block[-1] == shape[-1] else PerGroup(block[-1])


def _layout(x: Any) -> Any:
    context = x.__tensor_flatten__()[1]
    return {name: (each.shape, each.dtype) for name, each in inner(x).items()}, repr(context)


def _params4(x: Any) -> Any:
    import bitsandbytes  # its tensor is here

    return bitsandbytes.functional.dequantize_4bit(x.data, x.quant_state)


_PARAMS4 = Codec("bnb-4bit", ("*",), _params4)
_INT8 = Codec("bnb-int8", ("*",), lambda x: x.data.float() * x.SCB.view(-1, 1).float() * _ROW)
