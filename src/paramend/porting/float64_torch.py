"""Torch in float64, whatever a model asks for: some cast to float32 in the middle of a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DTYPES = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64}
_DTYPES |= {torch.complex32: torch.complex128, torch.complex64: torch.complex128}
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}
_AS_THEY_ARE = {"__get__", "__set__", "view"}  # attributes, and bits that are read as another dtype


@contextmanager
def float64() -> Iterator[None]:
    """A context in which floats are float64 in all functions of torch, and nothing is dropped."""
    dtype, fast = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    try:
        torch.set_default_dtype(torch.float64)
        torch.backends.mha.set_fastpath_enabled(False)  # it calls no modules
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.backends.mha.set_fastpath_enabled(fast)


class _Float64(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = getattr(func, "__name__", ""), dict(kwargs or {})
        if name in _AS_THEY_ARE:
            return func(*args, **options)
        if "dropout" in name:
            return args[0] if args else options["input"]
        if name == "scaled_dot_product_attention":
            args, options = (*args[:4], 0.0, *args[5:])[: len(args)], options | {"dropout_p": 0.0}
            options = options if len(args) < 5 else {k: v for k, v in options.items() if k != "dropout_p"}
        if func in _CASTS:
            func = torch.Tensor.double
        first = args[:1] if name.endswith("_") or name == "__setitem__" else _wide(args[:1])  # written in place
        return func(*first, *_wide(args[1:]), **_wide(options))


def _wide(value: Any) -> Any:
    """The value with tensors and dtypes of floats as float64."""
    if isinstance(value, torch.Tensor):
        return value.to(_DTYPES[value.dtype]) if value.dtype in _DTYPES else value
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, value)
    if type(value) in (tuple, list):
        return type(value)(map(_wide, value))
    return {key: _wide(each) for key, each in value.items()} if type(value) is dict else value
