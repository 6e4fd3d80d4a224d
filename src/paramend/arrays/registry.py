"""Which library an array belongs to. Only libraries that the user has imported are used."""

import importlib
from typing import Any, cast

import numpy as np

from paramend._optional import imported
from paramend.arrays import numpy as numpy_backend
from paramend.arrays.backend import Backend

_known: dict[type, Backend | None] = {np.ndarray: numpy_backend}
_LIBRARIES = ("jax", "torch")


def backend_of(kind: type) -> Backend | None:
    """The verbs for arrays of this type, or None if a leaf of this type is not an array."""
    try:
        return _known[kind]
    except KeyError:
        return _find(kind)


def _find(kind: type) -> Backend | None:
    if issubclass(kind, np.ndarray | np.generic):
        found: Backend | None = numpy_backend
    else:
        found = None
        for library in _LIBRARIES:
            if imported(library):
                module: Any = importlib.import_module(f"paramend.arrays.{library}")
                if module.owns(kind):
                    found = cast(Backend, module)
    # A type that is not an array stays out of the table: its library may register itself later.
    if found is not None:
        _known[kind] = found
    return found


def backend(x: Any) -> Backend:
    """The verbs for this array; `TypeError` if it is not an array."""
    found = backend_of(type(x))
    if found is None:
        raise TypeError(f"{type(x).__name__} is not an array of numpy, JAX or torch")
    return found


def to_numpy(x: Any) -> "np.ndarray[Any, Any]":
    """The values of an array of any library on the host; anything else as numpy reads it. Those of an array that is
    spread over processes are gathered: all of them must call this."""
    found = backend_of(type(x))
    if found is None:
        return np.asarray(x)
    whole = found.gathered(x)
    return backend(whole).numpy(whole)
