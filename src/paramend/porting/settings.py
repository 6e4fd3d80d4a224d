"""Settings of layers that are no parameters: what differs between the two sides of a pair, with numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from paramend.porting.kinds import Path

Value = Any  # numbers, or pairs of them for each axis
_GELU = "the two forms of GELU are up to 4.7e-4 apart"


def differences(
    pairs: Sequence[tuple[Path, Any, Any]], sides: tuple[Mapping[Path, Any], Mapping[Path, Any]]
) -> list[str]:
    """What differs beside parameters, one sentence for each layer and setting.

    Args:
        pairs: for each layer its path in the target, the module of the target and that of the source.
        sides: all modules of the target, and all of the source.
    """
    found = []
    for path, ours, theirs in pairs:
        for name, read in _SETTINGS.items():
            here, there = read(ours), read(theirs)
            if here is not None and there is not None and not _alike(here, there):
                found.append(f"{'/'.join(path) or 'the layer'}: {name} is {here}, and {there} in the source")
    here, there = (sorted({form for module in side.values() for form in _gelus(module)}) for side in sides)
    if here and there and here != there:
        found.append(f"GELU is {' and '.join(here)}, and {' and '.join(there)} in the source: {_GELU}")
    elif (there and not here) or (here and not there):
        which, form = ("source", there) if there else ("target", here)
        found.append(f"GELU of the {which} is {' and '.join(form)}; torch means erf by default, and JAX tanh: {_GELU}")
    return found


def _alike(here: Value, there: Value) -> bool:
    if isinstance(here, str) or isinstance(there, str):
        return bool(here == there)
    return np.shape(here) == np.shape(there) and bool(np.allclose(here, there, rtol=1e-9, atol=0))


def _is_torch(module: Any) -> bool:
    return hasattr(module, "state_dict")


def _eps(module: Any) -> Value:
    if type(module).__name__ == "RMSNorm" and _is_torch(module) and module.eps is None:
        return float(np.finfo(str(module.weight.dtype).removeprefix("torch.")).eps)
    found = getattr(module, "eps", getattr(module, "epsilon", getattr(module, "variance_epsilon", None)))
    return found if isinstance(found, float) else None


def _momentum(module: Any) -> Value:
    """The share of the old statistics that stays."""
    found = getattr(module, "momentum", None)
    if not isinstance(found, float):
        return None
    return round(1 - found, 12) if _is_torch(module) else found


def _norm(module: Any) -> Value:
    name = type(module).__name__
    return name if name in ("LayerNorm", "RMSNorm", "GroupNorm") else None


def _per_axis(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [1 if value is None else value] * count


def _space(module: Any) -> list[int] | None:
    size = getattr(module, "kernel_size", None)
    if size is None or "Conv" not in type(module).__name__:
        return None
    return list(size) if isinstance(size, tuple | list) else [size]


def _of_conv(*names: str) -> Callable[[Any], Value]:
    def read(module: Any) -> Value:
        size = _space(module)
        return (
            None
            if size is None
            else next((_per_axis(getattr(module, name), len(size)) for name in names if hasattr(module, name)), None)
        )

    return read


def _padding(module: Any) -> Value:
    """The places added before and after each axis, or the word for them."""
    size, strides = _space(module), _of_conv("stride", "strides")(module)
    if size is None or strides is None:
        return None
    mode = getattr(module, "padding_mode", "zeros").lower()
    padding = getattr(module, "padding", 0)
    word = padding.upper() if isinstance(padding, str) else ""
    if mode not in ("zeros",):
        return mode.upper()
    dilation = _of_conv("dilation", "kernel_dilation")(module) or [1] * len(size)
    spread = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
    if word == "SAME" and set(strides) == {1} and "Transpose" not in type(module).__name__:
        return [(each // 2, each - each // 2) for each in spread]
    if word == "VALID":
        return [(0, 0)] * len(size)
    if word:
        return word
    pairs = [each if isinstance(each, tuple | list) else (each, each) for each in _per_axis(padding, len(size))]
    if hasattr(module, "output_padding") and "Transpose" in type(module).__name__:
        more = _per_axis(module.output_padding, len(size))
        return [(s - low, s - high + m) for (low, high), s, m in zip(pairs, spread, more, strict=True)]
    return [tuple(pair) for pair in pairs]


def _gelus(module: Any) -> Iterator[str]:
    """The forms of GELU that a module has among its settings."""
    if type(module).__name__ == "GELU":
        yield "erf" if getattr(module, "approximate", "none") == "none" else "tanh"
    for value in vars(module).values() if hasattr(module, "__dict__") else ():
        function = getattr(value, "func", value)
        if callable(function) and getattr(function, "__name__", "") == "gelu":
            given = getattr(value, "keywords", {}).get("approximate")
            torch = getattr(function, "__module__", "").startswith("torch")
            tanh = given == "tanh" or given is True or (given is None and not torch and not _builtin(function))
            yield "tanh" if tanh else "erf"


def _builtin(function: Any) -> bool:
    return type(function).__name__ == "builtin_function_or_method"  # that of torch


_SETTINGS: Mapping[str, Callable[[Any], Value]] = {
    "eps": _eps,
    "momentum (what stays of the old statistics)": _momentum,
    "the class": _norm,
    "the stride": _of_conv("stride", "strides"),
    "the dilation": _of_conv("dilation", "kernel_dilation"),
    "the padding": _padding,
}
