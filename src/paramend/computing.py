"""Computing: an edit of a leaf piece by piece, so that memory is bounded by a piece and not by the leaf."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from paramend.arrays import numpy as numpy_backend
from paramend.errors import SpecMismatch
from paramend.initializers import Place, generator
from paramend.leaves import Stored
from paramend.ops import Call
from paramend.specs import Spec, numpy_dtype

Array = np.ndarray[Any, Any]
Step = Callable[[Array, int], Array]

# Elements computed at once: they fit the processor's cache; whole tensors are two to three times slower.
CHUNK = 1 << 18


def step_of(edit: Call, spec: Spec, place: Place) -> Step | None:
    """The edit of a flat piece of a leaf that begins at an element, or None: then it needs the leaf whole.

    Pieces must come in order.

    >>> from paramend.initializers import NOWHERE
    >>> from paramend.ops import OPS
    >>> step = step_of(Call(OPS["add"], {"value": np.array([10, 20])}), Spec((2, 2), "int64"), NOWHERE)
    >>> step(np.array([1, 2, 3]), 0).tolist(), step(np.array([4]), 3).tolist()
    ([11, 22, 13], [24])
    """
    if edit.index is not None:
        return None
    value: Any = edit.args.get("value")
    if edit.op.name == "set":
        if isinstance(value, Stored):
            return lambda x, start: value.read_range(start, start + x.size)
        values = np.asarray(value).astype(numpy_dtype(spec.dtype), copy=False).reshape(-1)
        return lambda x, start: values[start : start + x.size]
    if not edit.op.chunks:
        return None
    if np.ndim(value) == 0:
        # One stream of numbers runs through the leaf, as when they are drawn at once.
        random = "seed" in edit.op.parameters
        here = replace(place, stream=generator(int(edit.args.get("seed", 0)), place)) if random else place
        return lambda x, start: edit.run(x, here)
    if isinstance(value, Stored) and value.spec.shape == spec.shape:
        piece = value.read_range
    else:
        spread = np.broadcast_to(np.asarray(value.read() if isinstance(value, Stored) else value), spec.shape).flat
        piece = lambda start, stop: spread[start:stop]

    def step(x: Array, start: int) -> Array:
        part = {**edit.args, "value": piece(start, start + x.size)}
        return edit.op.run(numpy_backend, x, part, place)  # type: ignore[no-any-return]

    return step


def flat(x: Any, spec: Spec, what: str) -> Array:
    """The elements of a result in C order; it must be what was planned.

    Raises:
        SpecMismatch: shape or dtype is another; `what` names the leaf and the edit.
    """
    array = np.ascontiguousarray(x)
    found = Spec(np.shape(x), array.dtype.name)
    if found != spec:
        raise SpecMismatch(f"{what} gave {found} where {spec} was planned")
    return array.reshape(-1)
