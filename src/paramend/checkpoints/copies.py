"""Leaves of a file as arrays of their own, which no later change of the file reaches."""

import numpy as np

from paramend.errors import Unsupported
from paramend.formats.source import Source
from paramend.leaves.specs import Array
from paramend.reports import wording

# A view of a few elements that repeats them to this many bytes is not written out in memory.
_LARGE = 1 << 30


def copied(source: Source, number: int) -> Array:
    """A copy of a leaf of a source, read without mapping the file; `Unsupported` if numpy cannot make such an array."""
    spec = source.spec(number)
    try:
        if spec.nbytes > _LARGE and source.format == "torch" and 0 in (view := source.read(number)).strides:
            return _once(view)
        flat: Array = source.read_range(number, 0, spec.size)
    except MemoryError:
        size = wording.size(spec.nbytes)
        raise Unsupported(
            f"{source.index.path(number)} takes {size}, and there is no memory for it",
            hint="mmap=True maps what is needed; pm.at(pm.open(path), ...) edits it piece by piece",
        ) from None
    try:
        found = flat.reshape(spec.shape)
    except ValueError as error:  # more axes, or longer ones around an axis of length 0, than numpy has
        raise Unsupported(f"numpy has no array of shape {spec.shape}: {error}") from error
    return found if found.flags.writeable else found.copy()


def _once(view: Array) -> Array:
    """The elements of a view that repeats some of them, each copied once: read-only, of the same shape."""
    first = tuple(slice(None) if step else slice(0, 1) for step in view.strides)
    return np.broadcast_to(view[first].copy(), view.shape)
