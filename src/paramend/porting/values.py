"""The arrays in what a model takes and returns, as float64."""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from paramend.arrays.registry import backend_of, to_numpy
from paramend.leaves.specs import kind_of

Values = np.ndarray[Any, Any]
_WIDE = {"float": "float64", "complex": "complex128"}


def wide(values: Values) -> Values:
    """A copy, as float64 or complex128 if it holds floats."""
    return values.astype(_WIDE.get(kind_of(values.dtype.name), values.dtype))


def largest(values: Values) -> float:
    """The largest finite absolute value, 0 if there is none."""
    return float(np.abs(values[np.isfinite(values)].astype("complex128")).max(initial=0.0))


def arrays(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays and floats in nested containers, with their places."""
    inside: Iterable[tuple[Any, Any]] = ()
    if backend_of(type(value)) is not None or isinstance(value, float | complex):
        yield path, value
    elif isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list | tuple):
        inside = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif is_dataclass(value) and not isinstance(value, type) and not callable(value):
        inside = ((field.name, getattr(value, field.name)) for field in fields(value))
    for key, each in inside:
        yield from arrays(each, f"{path}/{key}" if path else str(key))


def noted(value: Any) -> dict[str, Values] | None:
    """The numbers in nested containers as they are now, by their places; None if JAX traces any."""
    found: dict[str, Values] = {}
    for path, array in arrays(value):
        library = backend_of(type(array))
        if library is None or library.spec(array).kind != "other":
            try:
                found[path] = wide(to_numpy(array))
            except TypeError:  # a tracer has no values
                return None
    return found


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same dicts, lists and tuples with other arrays."""
    if isinstance(value, Mapping):
        return {key: mapped(each, change) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(mapped(each, change) for each in value)
    library = backend_of(type(value))
    return value if library is None or library.spec(value).kind == "other" else change(value)


def given_as(library: str) -> Callable[[Any], Any]:
    """An array → one of this library, as float64 if it holds floats."""
    make = importlib.import_module(f"paramend.arrays.{library}").from_numpy
    return lambda array: make(wide(to_numpy(array)))
