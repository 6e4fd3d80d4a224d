"""Computing: an edit of a leaf piece by piece, so that memory is bounded by a piece, not by the leaf."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from paramend.arrays import numpy as numpy_backend
from paramend.arrays.initializers import Draws, Site, generator
from paramend.arrays.lowrank import Projection
from paramend.edits.call import Call
from paramend.edits.damage import Damage
from paramend.errors import SpecMismatch
from paramend.leaves.mapped import give_back, mapping
from paramend.leaves.origins.origin import CHUNK as CHUNK, Origin
from paramend.leaves.specs import Array, Spec, numpy_dtype
from paramend.piecewise.regions import region

Step = Callable[[Array, int], Array]


@dataclass(frozen=True, slots=True)
class Learner:
    """A step that must first `learn` all elements, in order, in flat pieces."""

    step: Step
    learn: Callable[[Array, int], None]

    def __call__(self, x: Array, start: int) -> Array:
        return self.step(x, start)


def step_of(edit: Call, spec: Spec, place: Site, damage: Damage | None = None) -> Step | None:
    """The edit as a function of a flat piece of a leaf and its first element; None if it needs the whole leaf. Values
    that the dtype cannot hold are counted in `damage`. Pieces must come in order. Functions, JAX keys, indices that
    repeat an element, and random values or arrays for a slice whose elements are not in the order of the leaf need
    whole leaves."""
    if edit.index is not None:
        return _slice_step(edit, spec, place, damage)
    value: Any = edit.args.get("value")
    seed = edit.args.get("seed", 0)
    if not isinstance(seed, int | np.integer):  # a JAX key draws for the whole leaf at once
        return None
    if edit.op.name == "set":
        if isinstance(value, Origin):
            return lambda x, start: value.read_range(start, start + x.size)
        dtype, values = numpy_dtype(spec.dtype), _flat_reader(np.asarray(value))
        return lambda x, start: values(start, start + x.size).astype(dtype, copy=False)
    if edit.op.name == "reinit":
        draws = Draws(edit.args["init"], generator(int(seed), place), spec, out_first=place.out_first)
        return lambda x, start: draws.next(x.size).astype(numpy_dtype(spec.dtype))
    product = edit.op.product and edit.op.product(spec, edit.args)
    if product:
        added = _counted(edit, product.added, damage)
        return Learner(added, product.learn) if isinstance(product, Projection) else added
    if not edit.op.chunks:
        return None
    if spec.dtype == "bfloat16" and edit.op.name in _FLOAT32 and np.ndim(value) == 0:
        return _counted(edit, _bfloat16_step(_FLOAT32[edit.op.name], np.asarray(value)), damage)
    if np.ndim(value) == 0:
        # One stream of numbers runs through the leaf, as when they are drawn at once.
        here = replace(place, stream=generator(int(seed), place)) if "seed" in edit.op.parameters else place
        return _counted(edit, lambda x, start: edit.run(x, here), damage)
    if isinstance(value, Origin) and value.spec.shape == spec.shape:
        operand: Callable[[int, int], Array] = value.read_range
    else:
        whole = np.asarray(value.read() if isinstance(value, Origin) else value)
        operand = _flat_reader(np.broadcast_to(whole, spec.shape))

    def step(x: Array, start: int) -> Array:
        part = {**edit.args, "value": operand(start, start + x.size)}
        found: Array = edit.op.run(numpy_backend, x, part, place)
        if damage is not None and edit.op.losses is not None:
            damage.add(edit.op.losses(x, found, part))
        return found

    return step


def _counted(edit: Call, step: Step, damage: Damage | None) -> Step:
    """A step that also counts the values that the dtype cannot hold."""
    losses = edit.op.losses
    if damage is None or losses is None:
        return step

    def counted(x: Array, start: int) -> Array:
        found = step(x, start)
        damage.add(losses(x, found, edit.args))
        return found

    return counted


_FLOAT32: dict[str, np.ufunc] = {"add": np.add, "multiply": np.multiply}


def _bfloat16_step(verb: np.ufunc, value: Array) -> Step:
    """bfloat16 arithmetic in float32, rounded once: the same bits in half the time."""
    dtype = numpy_dtype("bfloat16")
    operand = value.astype(dtype).astype(np.float32)

    def step(x: Array, start: int) -> Array:
        wide = x.astype(np.float32)
        verb(wide, operand, out=wide)
        return wide.astype(dtype)

    return step


def _slice_step(edit: Call, spec: Spec, place: Site, damage: Damage | None) -> Step | None:
    """The edit of the part of a flat piece that is in a slice; the rest of the piece stays."""
    where = region(spec.shape, edit.index)
    inner = step_of(replace(edit, index=None), Spec(where.shape, spec.dtype), place, damage)
    if where.last is not None or inner is None:
        return None
    if not where.ascends:
        # Where values depend on the order.
        if np.ndim(edit.args.get("value", 0)) or "seed" in edit.op.parameters or not edit.op.chunks:
            return None
        where = where.ascending()
    runs = range(where.count if where.size else 0)
    run = where.run

    def parts(start: int, size: int) -> Iterator[tuple[Any, int]]:
        """The places in a piece that the slice takes, and where each of them begins in the slice."""
        low = bisect_right(runs, start - run, key=where.start)
        high = bisect_left(runs, start + size, lo=low, key=where.start)
        if low == high:
            return
        starts = where.starts(low, high) - start
        at = low * run + max(-int(starts[0]), 0)  # the first run may have begun before
        if run * (high - low) > 2 * size:  # few, long runs
            for first in starts.tolist():
                begin, end = max(first, 0), min(first + run, size)
                yield slice(begin, end), at
                at += end - begin
            return
        places = (starts[:, None] + np.arange(run)).reshape(-1)
        yield places[(places >= 0) & (places < size)], at

    def step(x: Array, start: int) -> Array:
        found = list(parts(start, x.size))
        x = x.copy() if found else x
        for places, at in found:
            x[places] = inner(x[places], at)
        return x

    if not isinstance(inner, Learner):
        return step
    learns = inner.learn

    def learn(x: Array, start: int) -> None:
        for places, at in parts(start, x.size):
            learns(x[places], at)

    return Learner(step, learn)


def _flat_reader(array: Array) -> Callable[[int, int], Array]:
    """(start, stop) → a copy of those elements in C order. For an array in a file, no other pages stay in memory."""
    elements: Any = array.reshape(-1) if array.flags.c_contiguous else array.flat
    mapped = mapping(array) if array.flags.c_contiguous else None

    def read(start: int, stop: int) -> Array:
        found = np.array(elements[start:stop])
        if mapped is not None and start < stop:
            pages, at = mapped
            give_back(pages, at + start * array.itemsize, (stop - start) * array.itemsize)
        return found

    return read


def flat(x: Any, spec: Spec, what: str) -> Array:
    """The elements of a result in C order; `SpecMismatch`, which says `what`, if its shape or dtype is not as
    planned."""
    array = np.ascontiguousarray(x)
    if (np.shape(x), array.dtype) != (spec.shape, numpy_dtype(spec.dtype)):
        raise SpecMismatch(f"{what} returned {Spec(np.shape(x), array.dtype.name)} where {spec} was planned")
    return array.reshape(-1)
