"""Arrays in memory as origins, which engines read box by box."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

from paramend.arrays.registry import backend, to_numpy
from paramend.leaves.origins.boxes import Box
from paramend.leaves.origins.moved import join
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Made
from paramend.leaves.specs import Array


class Spread(Made):
    """An array that is spread over processes. When it is read all of it is read, by a function."""

    def __init__(self, x: Any, whole: Callable[[Any], Array]) -> None:
        super().__init__(backend(x).spec(x), lambda: whole(x))
        self.array = x


def made(x: Any, whole: Callable[[Any], Array] = to_numpy) -> Origin:
    """An array of any library, which a function reads; one whose parts are all in this process is read part by part, so
    that it is never whole on the host."""
    library = backend(x)
    if library.spread(x):
        return Spread(x, whole)
    if not library.parted(x):
        return Made(library.spec(x), lambda: whole(x))
    parts = library.parts(x)
    return _joined([(box, Made(library.spec(part), partial(library.numpy, part))) for box, part in parts])


def _joined(parts: Sequence[tuple[Box, Origin]], axis: int = 0) -> Origin:
    """Parts that lie in a grid, from an axis on."""
    if len(parts) == 1:
        return parts[0][1]
    rows = groupby(sorted(parts, key=lambda each: each[0][axis][0]), lambda each: each[0][axis][0])
    return join([_joined(list(row), axis + 1) for _, row in rows], axis, "concat")
