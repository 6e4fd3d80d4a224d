"""Settings of layers that are no parameters: what differs between the two sides of a pair, with numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from paramend.porting.forms import Path
from paramend.trees.lookup import is_torch_module

Value = Any  # numbers, or pairs of them for each axis
_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm")
_STRIDE, _DILATION = ("stride", "strides"), ("dilation", "kernel_dilation")
_GELU = "the two forms of GELU are up to 4.7e-4 apart"


def differences(
    pairs: Sequence[tuple[Path, Any, Any]], sides: tuple[Mapping[Path, Any], Mapping[Path, Any]]
) -> list[str]:
    """What differs beside parameters, one sentence for each layer and setting. A pair is the path of a layer in the
    target, its module and that of the source; `sides` are all modules of both."""
    found = []
    for path, ours, theirs in pairs:
        for name, read in _SETTINGS.items():
            here, there = read(ours), read(theirs)
            if here is not None and there is not None and not _alike(here, there):
                found.append(f"{'/'.join(path) or 'the layer'}: {name} is {here}, and {there} in the source")
    here, there = (sorted({form for module in side.values() for form in _gelus(module)}) for side in sides)
    if here and there and here != there:
        found.append(f"GELU is {' and '.join(here)}, and {' and '.join(there)} in the source: {_GELU}")
    elif here != there:
        which, form = ("source", there) if there else ("target", here)
        found.append(f"GELU of the {which} is {' and '.join(form)}; torch means erf by default, and JAX tanh: {_GELU}")
    return found


def _alike(here: Value, there: Value) -> bool:
    if isinstance(here, str) or isinstance(there, str):
        return bool(here == there)
    return np.shape(here) == np.shape(there) and bool(np.allclose(here, there, rtol=1e-9, atol=0))


def _of(module: Any, *names: str) -> Value:
    """The first of these settings that a module has, None if it has none."""
    return next((value for name in names if (value := getattr(module, name, None)) is not None), None)


def _eps(module: Any) -> Value:
    found = _of(module, "eps", "epsilon", "variance_epsilon")
    if found is None and is_torch_module(module) and type(module).__name__ == "RMSNorm":
        found = float(np.finfo(str(module.weight.dtype).removeprefix("torch.")).eps)
    return found if isinstance(found, float) else None


def _momentum(module: Any) -> Value:
    """The share of the old statistics that stays."""
    found = _of(module, "momentum")
    if not isinstance(found, float):
        return None
    return round(1 - found, 12) if is_torch_module(module) else found


def _by_axis(module: Any, *names: str, absent: int = 1) -> list[Any] | None:
    """A setting of a convolution for each axis of space; None for other layers."""
    size = _of(module, "kernel_size")
    if size is None or "Conv" not in type(module).__name__:
        return None
    value = _of(module, *names)
    if isinstance(value, tuple | list):
        return list(value)
    return [absent if value is None else value] * (len(size) if isinstance(size, tuple | list) else 1)


def _padding(module: Any) -> Value:
    """The places added before and after each axis, or the word for them."""
    size = _by_axis(module, "kernel_size")
    if size is None:
        return None
    mode, padding = getattr(module, "padding_mode", "zeros").upper(), _of(module, "padding")
    if mode != "ZEROS":
        return mode
    transposed = "Transpose" in type(module).__name__
    spread = [d * (k - 1) for d, k in zip(_by_axis(module, *_DILATION) or (), size, strict=True)]
    if isinstance(padding, str):
        word = padding.upper()
        if word == "SAME" and {*(_by_axis(module, *_STRIDE) or ())} == {1} and not transposed:
            return [(each // 2, each - each // 2) for each in spread]
        return [(0, 0)] * len(size) if word == "VALID" else word
    each_axis = _by_axis(module, "padding", absent=0) or ()
    pairs = [tuple(each) if isinstance(each, tuple | list) else (each, each) for each in each_axis]
    if transposed and hasattr(module, "output_padding"):
        more = _by_axis(module, "output_padding") or ()
        return [(s - low, s - high + m) for (low, high), s, m in zip(pairs, spread, more, strict=True)]
    return pairs


def _gelus(module: Any) -> Iterator[str]:
    """The forms of GELU that a module has among its settings."""
    if type(module).__name__ == "GELU":
        yield "erf" if getattr(module, "approximate", "none") == "none" else "tanh"
    for value in getattr(module, "__dict__", {}).values():
        function = getattr(value, "func", value)
        if callable(function) and getattr(function, "__name__", "") == "gelu":
            given = getattr(value, "keywords", {}).get("approximate")
            torch = type(function).__name__ == "builtin_function_or_method" or function.__module__.startswith("torch")
            yield "tanh" if given == "tanh" or given is True or (given is None and not torch) else "erf"


_SETTINGS: Mapping[str, Callable[[Any], Value]] = {
    "eps": _eps,
    "momentum (what stays of the old statistics)": _momentum,
    "the class": lambda module: name if (name := type(module).__name__) in _NORMS else None,
    "the stride": lambda module: _by_axis(module, *_STRIDE),
    "the dilation": lambda module: _by_axis(module, *_DILATION),
    "the padding": _padding,
}
