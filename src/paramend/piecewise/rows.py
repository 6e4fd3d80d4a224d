"""The rows of a plan as origins: what becomes of a leaf, as one expression, and its elements piece by piece."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import Any

import numpy as np

from paramend.arrays.losses import holds
from paramend.edits.call import Call
from paramend.edits.plan import Plan, Row
from paramend.formats.gathered import leaf_of
from paramend.leaves.origins.origin import CHUNK, Origin, Partly
from paramend.leaves.origins.stored import Stored
from paramend.leaves.specs import Array, numpy_dtype
from paramend.piecewise.edited import Edited


def expression(source: Any, row: Row) -> Origin:
    """Where the leaf of a row comes from: a leaf of the source, then the edits that move its elements or compute."""
    origin = leaf_of(source, row.source)
    if not row.calls:
        return origin
    for how, group in groupby(zip(row.calls, row.places, strict=True), lambda each: _how(each[0])):
        if how == "computes":
            calls, places = zip(*group, strict=True)
            origin = Edited(origin, calls, places, row.path, row.damage)
            continue
        for call, _ in group:
            if call.op.moves is not None:
                origin = call.op.moves(origin, call.args)
            else:  # set to a leaf of another file, or to what is made of other leaves
                value: Origin = call.args["value"]
                origin = leaf_of(value.source, value.number) if isinstance(value, Stored) else value
    return origin


def _how(call: Call) -> str:
    whole = call.index is None
    replaced = whole and call.op.name == "set" and isinstance(call.args.get("value"), Origin)
    return "moves" if replaced or (whole and call.op.moves is not None) else "computes"


def clear(origin: Origin) -> None:
    """Forget what its edits lost when it was read before."""
    if isinstance(origin, Edited):
        origin.damage.clear()
    for child in origin.children:
        clear(child)


def pieces(origin: Origin) -> Iterator[Array]:
    """The elements of an origin in pieces: flat arrays, first to last."""
    clear(origin)
    if isinstance(origin, Edited):
        yield from origin.pieces()
        return
    for start, stop in origin.ranges():
        yield origin.read_range(start, stop)


def values(source: Any, row: Row) -> Iterator[Array]:
    """The leaf of a row, edited, in pieces: flat arrays of the new dtype, first to last."""
    return pieces(expression(source, row))


def data(origin: Origin) -> Iterator[memoryview]:
    """The bytes of an origin, in pieces."""
    if isinstance(origin, Partly) and origin.refusal:
        return origin.contents()
    found = (_bytes(origin, array) for array in pieces(origin))
    return _ahead(found) if origin.tile > CHUNK else found


def _bytes(origin: Origin, array: Array) -> memoryview:
    spec = origin.spec
    if isinstance(origin, Edited):
        origin.check(spec.shape, array.dtype)
    flat = np.ascontiguousarray(array).astype(numpy_dtype(spec.dtype), copy=False).reshape(-1)
    return flat.view(np.uint8).data


def _ahead(tiles: Iterator[memoryview]) -> Iterator[memoryview]:
    """Tiles, each put together by another thread while the one before is written; chunks are too small for that."""
    with ThreadPoolExecutor(1, thread_name_prefix="paramend") as pool:
        coming = pool.submit(next, tiles, None)
        while (tile := coming.result()) is not None:
            coming = pool.submit(next, tiles, None)
            yield tile


def survey(plan: Plan) -> None:
    """Count in the rows of a plan the values that its edits cannot hold, without writing: for dry runs. Only leaves
    that such edits change are read."""
    for row in plan.changed:
        # A cast to a dtype that holds every value loses none.
        safe = [edit.op.name for edit in row.calls] == ["cast"] and holds(row.spec.dtype, row.before.dtype)
        encoded = any(edit.coding is not None and edit.coding.misfit is not None for edit in row.calls)
        if encoded or (any(edit.op.losses is not None for edit in row.calls) and not safe):
            for _ in values(plan.leaves, row):
                pass
