"""`Edited`: an origin with edits, which are computed as its elements are read, piece by piece from first to last, or
box by box where each element is computed from the one at its place alone."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from paramend.arrays.initializers import Site
from paramend.edits.call import Call
from paramend.edits.damage import Damage, of_call
from paramend.errors import SpecMismatch
from paramend.leaves.origins.boxes import Box, contiguous, select, shape_of
from paramend.leaves.origins.origin import Given, Namer, Origin, Unstored
from paramend.leaves.specs import Array, Spec, numpy_dtype
from paramend.piecewise.steps import Learner, Step, step_of


class Edited(Unstored, Given):
    """The elements of an origin, edited. Boxes with gaps are taken from the whole, kept until its last element is read,
    if elements depend on their places or on others. `places` says where the leaf was when each call was made; values
    that the dtype cannot hold are counted in `damage`."""

    refusal = ""  # a leaf that cannot be read takes no edits but those that do not read it

    def __init__(self, base: Origin, calls: Sequence[Call], places: Sequence[Site], path: str, damage: Damage) -> None:
        self.base, self.calls, self.places, self.path = base, tuple(calls), tuple(places), path
        self.damage = damage
        spec = base.spec
        for call in calls:
            spec = call.spec(spec)
        self._spec = spec
        self._end()

    def __reduce__(self) -> tuple[Any, ...]:
        return Edited, (self.base, self.calls, self.places, self.path, self.damage)

    def text(self, name: Namer) -> str:
        return ".".join((self.base.text(name), *map(str, self.calls)))

    @property
    def children(self) -> tuple[Origin, ...]:  # type: ignore[override]
        operands = (call.args.get("value") for call in self.calls)
        return self.base, *(each for each in operands if isinstance(each, Origin))

    def _end(self) -> None:
        """Drop what is computed; the next range is computed from the first element on."""
        self._pieces: Iterator[Array] = iter(())
        self._piece = np.empty(0, numpy_dtype(self.spec.dtype))
        self._at = self.spec.size
        self._whole: Array | None = None

    def read_range(self, start: int, stop: int) -> Array:
        if start < min(self._at, stop):
            self._end()
            self._pieces, self._at = self.pieces(), 0
        found = [self._piece[:0]]
        while start < stop:
            after = self._at + self._piece.size
            if start < after:
                found.append(self._piece[start - self._at : stop - self._at])
                start = after
            else:
                self._at, self._piece = after, next(self._pieces)
        if stop >= self.spec.size:
            self._end()
        return np.concatenate(found)

    @property
    def boxed(self) -> bool:
        return self.base.boxed and are_alike(self.calls)

    def read_box(self, box: Box) -> Array:
        if are_alike(self.calls):
            steps, deaf = steps_of(self.base.spec, self.calls, self.places, self.damage)
            new = shape_of(box)
            x = np.empty(math.prod(new), deaf) if deaf else self.base.read_box(box).reshape(-1)
            with np.errstate(all="ignore"):  # an overflow to inf is a valid result
                for step in steps:
                    assert step is not None
                    x = step(x, 0)
            return x.reshape(new)
        shape = self.spec.shape
        run = contiguous(box, shape)
        if run is not None and self._whole is None:
            return self.read_range(*run).reshape([len(places) for places in box])
        if self._whole is None:
            self._whole = self.read_range(0, self.spec.size).reshape(shape)
        found = np.array(select(self._whole, box))
        if all(len(places) and max(places) == length - 1 for places, length in zip(box, shape, strict=True)):
            self._end()
        return found

    def pieces(self) -> Iterator[Array]:
        base = self.base
        self.damage.clear()
        steps, deaf = steps_of(base.spec, self.calls, self.places, self.damage)
        if None in steps:
            with np.errstate(all="ignore"):  # an overflow to inf is a valid result
                x = np.empty(base.spec.size, deaf) if deaf else base.read_range(0, base.spec.size)
                x = x.reshape(base.spec.shape)
                for edit, place in list(zip(self.calls, self.places, strict=True))[-len(steps) :]:
                    before, x = x, edit.run(x, place)
                    self.damage.add(of_call(edit, before, x))
                self.check(np.shape(x), np.asarray(x).dtype)
            yield np.ascontiguousarray(x).reshape(-1)
            return
        for at, learner in enumerate(steps):
            if isinstance(learner, Learner):
                again, _ = steps_of(base.spec, self.calls, self.places, Damage())
                earlier = [old if isinstance(old, Learner) else new for old, new in zip(steps, again, strict=True)]
                for start, piece in self._through(earlier[:at], deaf):
                    learner.learn(piece, start)
        for _, piece in self._through(steps, deaf):
            yield piece

    def _through(self, steps: Sequence[Step | None], deaf: np.dtype[Any] | None) -> Iterator[tuple[int, Array]]:
        """The pieces after some steps, each with the place of its first element."""
        for start, stop in self.base.ranges():
            # An overflow to inf is valid. Between pieces the caller's rules hold, and another thread may take over.
            with np.errstate(all="ignore"):
                x = np.empty(stop - start, deaf) if deaf else self.base.read_range(start, stop)
                for step in steps:
                    assert step is not None
                    x = step(x, start)
            yield start, x

    def check(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if (tuple(shape), dtype) != (self.spec.shape, numpy_dtype(self.spec.dtype)):
            said, found = ", ".join(map(str, self.calls)), Spec(tuple(shape), dtype.name)
            raise SpecMismatch(f"{self.path}: {said} returned {found} where {self.spec} was planned")


def is_orderless(edit: Call) -> bool:
    """Whether a call gives the elements that it takes new values that do not depend on their order."""
    ordered = edit.op.name == "set" or "seed" in edit.op.parameters or np.ndim(edit.args.get("value", 0)) > 0
    return edit.op.chunks and not ordered


def are_alike(calls: Sequence[Call]) -> bool:
    """Whether each new element depends neither on its place nor on other elements."""
    return all(edit.index is None and is_orderless(edit) for edit in calls)


def steps_of(
    spec: Spec, calls: Sequence[Call], places: Sequence[Site], damage: Damage
) -> tuple[list[Step | None], np.dtype[Any] | None]:
    """Edits of a leaf as steps over flat pieces, first to last, without those whose results are overwritten; None for
    an edit that needs the whole leaf. Then, if the first step does not read the old values, the dtype of its input,
    else None."""
    deaf = [at for at, edit in enumerate(calls) if not edit.op.reads and edit.index is None]
    first = deaf[-1] if deaf else 0
    for edit in calls[:first]:
        spec = edit.spec(spec)
    dtype = numpy_dtype(spec.dtype) if deaf else None
    steps = []
    for edit, place in zip(calls[first:], places[first:], strict=True):
        steps.append(step_of(edit, spec, place, damage))
        spec = edit.spec(spec)
    return steps, dtype
