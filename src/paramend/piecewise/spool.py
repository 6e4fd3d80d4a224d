"""Spooling: new values of leaves that are made of old ones, computed before the first of these is overwritten."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import IO, Any

import numpy as np

from paramend.edits.ops import OPS
from paramend.edits.plan import Row
from paramend.leaves.origins.boxes import Box, ends, select, shifted
from paramend.leaves.origins.origin import Given, Origin, Partly
from paramend.leaves.specs import Array, Spec, numpy_dtype
from paramend.piecewise.changes import merged
from paramend.piecewise.rows import expression, pieces

# Bytes that stay in memory; more go to a file.
_MEMORY = 32 << 20
# What differs is recorded and written in units of so many bytes.
PAGE = 4096


class Spooled(Given, Partly):
    """A leaf whose new values are in a spool."""

    changed: Array = np.empty(0)

    def __init__(self, file: IO[bytes], at: int, spec: Spec, changed: Array) -> None:
        self._file, self._at, self._spec, self.changed = file, at, spec, changed

    @property
    def says(self) -> str:  # type: ignore[override]
        return str(self.spec)

    def read_range(self, start: int, stop: int) -> Array:
        dtype = numpy_dtype(self.spec.dtype)
        self._file.seek(self._at + start * dtype.itemsize)
        return np.frombuffer(self._file.read((stop - start) * dtype.itemsize), dtype).copy()

    def read_box(self, box: Box) -> Array:
        shape = self.spec.shape
        if not box:
            return self.read_range(0, 1).reshape(())
        low, high = ends(box[0])
        inner = math.prod(shape[1:])
        rows = self.read_range(low * inner, high * inner).reshape(high - low, *shape[1:])
        return np.array(select(rows, (shifted(box[0], low), *box[1:])))

    def data(self, start: int, stop: int, old: Callable[[], bytearray]) -> bytes:
        self._file.seek(self._at + start)
        return self._file.read(stop - start)


class Spool:
    """Room for new values, which is given back when it is closed."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._end = 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def taken(self, source: Any, row: Row) -> Row:
        """The row with its new values computed."""
        origin, last = expression(source, row), row.calls[-1]
        values = self._filled(origin, source, row.source)
        call = replace(last, op=OPS["set"], args={"value": values}, index=None)
        return replace(row, calls=(call,), places=row.places[-1:])

    def _filled(self, origin: Origin, source: Any, number: int) -> Spooled:
        if self._file is None:
            self._file = tempfile.SpooledTemporaryFile(_MEMORY, prefix="paramend-")  # noqa: SIM115  closed by `close`
        spec, at, start = origin.spec, self._end, 0
        found: list[Array] = []
        for piece in pieces(origin):
            flat = np.ascontiguousarray(piece).reshape(-1)
            old = np.ascontiguousarray(source.read_range(number, start, start + flat.size)).reshape(-1)
            found.append(_differ(flat.view(np.uint8), old.view(np.uint8)) + start * flat.itemsize)
            self._file.seek(self._end)
            self._file.write(flat.view(np.uint8).data)
            start, self._end = start + flat.size, self._end + flat.nbytes
        return Spooled(self._file, at, spec, merged(*found))


def _differ(new: Array, old: Array) -> Array:
    """The pages that differ, as (start, stop)."""
    whole = len(new) // PAGE * PAGE
    paged = (new[:whole] != old[:whole]).reshape(-1, PAGE).any(1)
    pages = np.flatnonzero(np.append(paged, not np.array_equal(new[whole:], old[whole:])))
    return np.stack([pages * PAGE, np.minimum((pages + 1) * PAGE, len(new))], 1)
