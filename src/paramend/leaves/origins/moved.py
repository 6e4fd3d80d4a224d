"""Elements of other origins at other places: taken along an axis, joined, with permuted axes, in another shape.

Nothing here computes but a sum: every element keeps its bits. Each kind says where a box of its elements is in those
that it is made of, and into which runs of theirs its own elements fall, which the kernel copies where they are long.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from paramend.errors import SpecMismatch
from paramend.leaves.origins.boxes import Box, Places, Runs, bare, boxes_of, chosen, cut, evenly, shape_of
from paramend.leaves.origins.origin import PAGE, TILE, Namer, OfOne, OfParts, Origin, Unstored
from paramend.leaves.origins.texts import listed, written
from paramend.leaves.specs import Array, Spec, numpy_dtype

Traced = list[tuple[Origin, Runs]]
# Elements that change places together.
_BAND = 1 << 17
How = Literal["concat", "stack", "interleave"]


@dataclass(frozen=True, eq=False, repr=False)
class Taken(OfOne):
    """Some places along an axis, in their order, each perhaps often: a slice, one layer of a stack, permuted rows."""

    axis: int
    places: Places

    @property
    def spec(self) -> Spec:
        spec, axis = self.whole.spec, self.axis
        return Spec((*spec.shape[:axis], len(self.places), *spec.shape[axis + 1 :]), spec.dtype)

    def read_box(self, box: Box) -> Array:
        here = evenly(chosen(box[self.axis], self.places))
        return self.whole.read_box((*box[: self.axis], here, *box[self.axis + 1 :]))

    def trace(self, runs: Runs, most: int) -> Traced | None:
        shape, places = self.whole.spec.shape, self.places
        inner = math.prod(shape[self.axis + 1 :])
        together = isinstance(places, range) and (places.step == 1 or len(places) == 1)
        found = cut(runs, np.array([0, inner * (len(places) if together else 1)]), most)
        if found is None:
            return None
        number, inside, new = found
        if isinstance(places, range) and together:
            starts = (number * shape[self.axis] + places.start) * inner
        else:
            outer, here = np.divmod(number, len(places))
            starts = (outer * shape[self.axis] + np.asarray(places, np.int64)[here]) * inner
        return self.whole.trace(new._replace(starts=starts + inside), most)

    def text(self, name: Namer) -> str:
        return f"{self.whole.text(name)}[{':, ' * self.axis}{written(self.places)}]"


@dataclass(frozen=True, eq=False, repr=False)
class Joined(OfParts):
    """Several origins along an axis, which "stack" makes. Element i of part j comes to j·n + i for "concat", to i·k + j
    for "interleave", n places and k parts; for "stack" part j is place j."""

    axis: int
    how: How

    @property
    def spec(self) -> Spec:
        spec, axis = self.parts[0].spec, self.axis
        if self.how == "stack":
            return Spec((*spec.shape[:axis], len(self.parts), *spec.shape[axis:]), spec.dtype)
        length = sum(part.spec.shape[axis] for part in self.parts)
        return Spec((*spec.shape[:axis], length, *spec.shape[axis + 1 :]), spec.dtype)

    def _lengths(self) -> list[int]:
        return [1 if self.how == "stack" else part.spec.shape[self.axis] for part in self.parts]

    def _located(self, places: Array) -> tuple[Array, Array]:
        """For places along the axis: the part of each, and the place in it."""
        if self.how == "interleave":
            return places % len(self.parts), places // len(self.parts)
        ends = np.cumsum(self._lengths())
        part = np.searchsorted(ends, places, "right")
        return part, places - (ends - self._lengths())[part]

    def read_box(self, box: Box) -> Array:
        part, place = self._located(np.asarray(box[self.axis], np.int64))
        numbers = np.unique(part)
        if len(numbers) == 1 and self.how != "stack":
            return self._piece(int(numbers[0]), box, place)
        found = np.empty(shape_of(box), numpy_dtype(self.spec.dtype))
        pieces: dict[tuple[int, bytes], Array] = {}  # the same part may come several times
        for number in numbers.tolist():
            here = part == number
            key = id(self.parts[number]), place[here].tobytes()
            piece = pieces[key] if key in pieces else pieces.setdefault(key, self._piece(number, box, place[here]))
            at = evenly(np.flatnonzero(here))
            where = slice(at.start, at.stop, at.step) if isinstance(at, range) else at
            found[(slice(None),) * self.axis + (where,)] = piece
        return found

    def _piece(self, number: int, box: Box, place: Array) -> Array:
        before, after = box[: self.axis], box[self.axis + 1 :]
        if self.how == "stack":
            return np.expand_dims(self.parts[number].read_box((*before, *after)), self.axis)
        return self.parts[number].read_box((*before, evenly(place), *after))

    def trace(self, runs: Runs, most: int) -> Traced | None:
        inner = math.prod(self.spec.shape[self.axis + 1 :])
        lengths, count = np.array(self._lengths()), len(self.parts)
        if self.how == "interleave":
            found = cut(runs, np.array([0, inner]), most)
            ends = count * int(lengths[0])
        else:
            found = cut(runs, np.concatenate([[0], np.cumsum(lengths)]) * inner, most)
            ends = count
        if found is None:
            return None
        number, inside, new = found
        outer, here = np.divmod(number, ends)
        part, place = (here % count, here // count) if self.how == "interleave" else (here, 0 * here)
        starts = (outer * lengths[part] + place) * inner + inside
        traced: Traced = []
        for at in np.unique(part).tolist():
            mine = part == at
            more = self.parts[at].trace(new._replace(starts=starts).where(mine), most)
            if more is None:
                return None
            traced += more
        return traced

    def text(self, name: Namer) -> str:
        return f"{self.how}({', '.join(listed(self.parts, name))}, axis={self.axis})"


@dataclass(frozen=True, eq=False, repr=False)
class Permuted(OfOne):
    """The axes in another order, as by numpy's `transpose`."""

    axes: tuple[int, ...]

    @property
    def spec(self) -> Spec:
        return Spec(tuple(self.whole.spec.shape[axis] for axis in self.axes), self.whole.spec.dtype)

    @property
    def tile(self) -> int:
        short = self._inner() * self.bits // 8 < PAGE
        return max(super().tile, TILE * 8 // max(self.bits, 8) if short else 0)

    def _fixed(self) -> int:
        """The first of the last axes, which stay."""
        fixed = len(self.axes)
        while fixed and self.axes[fixed - 1] == fixed - 1:
            fixed -= 1
        return fixed

    def _inner(self) -> int:
        return math.prod(self.whole.spec.shape[self._fixed() :])

    def read_box(self, box: Box) -> Array:
        back = np.argsort(self.axes).tolist()
        old = tuple(box[new] for new in back)
        found = np.empty(shape_of(box), numpy_dtype(self.spec.dtype))
        target = bare(found).transpose(back)
        # Band by band: a band is in the CPU cache while its axes change places.
        axis = next((axis for axis, places in enumerate(old) if len(places) > 1), 0)
        rows = max(_BAND * len(old[axis]) // max(found.size, 1), 1)
        for at in range(0, len(old[axis]), rows):
            band = self.whole.read_box((*old[:axis], old[axis][at : at + rows], *old[axis + 1 :]))
            target[(slice(None),) * axis + (slice(at, at + rows),)] = bare(band)
        return found

    def trace(self, runs: Runs, most: int) -> Traced | None:
        old, new_shape = self.whole.spec.shape, self.spec.shape
        fixed = self._fixed()
        found = cut(runs, np.array([0, self._inner()]), most)
        if found is None:
            return None
        number, inside, new = found
        strides = [math.prod(old[axis + 1 :]) for axis in self.axes[:fixed]]
        at = np.unravel_index(number, new_shape[:fixed]) if fixed else ()
        starts = sum((each * stride for each, stride in zip(at, strides, strict=True)), number * 0)
        return self.whole.trace(new._replace(starts=starts + inside), most)

    def text(self, name: Namer) -> str:
        return f"transpose({self.whole.text(name)}, {list(self.axes)})"


class Summed(Unstored, OfParts):
    """The sum of origins of one spec, the only ones here whose bytes are new."""

    @property
    def spec(self) -> Spec:
        return self.parts[0].spec

    def read_box(self, box: Box) -> Array:
        found = self.parts[0].read_box(box)
        for part in self.parts[1:]:
            found = found + part.read_box(box)
        return found

    def text(self, name: Namer) -> str:
        return f"({' + '.join(part.text(name) for part in self.parts)})"


class Reshape(OfOne):
    """The same elements in the same order, with other axes."""

    def read_range(self, start: int, stop: int) -> Array:
        return self.whole.read_range(start, stop)

    def trace(self, runs: Runs, most: int) -> Traced | None:
        return self.whole.trace(runs, most)

    def text(self, name: Namer) -> str:
        inner = self.whole
        while isinstance(inner, Reshape):
            inner = inner.whole
        return f"reshape({inner.text(name)}, {list(self.spec.shape)})"


@dataclass(frozen=True, eq=False, repr=False)
class Merged(Reshape):
    """Some axes as one: `count` from the first on; 0 makes an axis of one place."""

    axis: int
    count: int

    @property
    def spec(self) -> Spec:
        shape, end = self.whole.spec.shape, self.axis + self.count
        return Spec((*shape[: self.axis], math.prod(shape[self.axis : end]), *shape[end:]), self.whole.spec.dtype)

    def read_box(self, box: Box) -> Array:
        axis, places = self.axis, box[self.axis]
        old = self.whole.spec.shape[axis : axis + self.count]
        long = [at for at, length in enumerate(old) if length != 1]
        if len(long) <= 1:  # the places are those along one of the axes
            inner: list[Places] = [range(1)] * len(old)
            if long:
                inner[long[0]] = places
            found = self.whole.read_box((*box[:axis], *inner, *box[axis + 1 :]))
            length = len(places) if long else 1
            found = found.reshape(*found.shape[:axis], length, *found.shape[axis + len(old) :])
            return found if long else np.take(found, np.asarray(places, np.int64), axis)
        if isinstance(places, range) and places.step == 1:
            return self._joined(box, [(places.start, places.stop)])
        places = np.asarray(places, np.int64)
        low, high = (int(places.min()), int(places.max()) + 1) if len(places) else (0, 0)
        if high - low <= 4 * len(places) + 1024:
            return np.take(self._joined(box, [(low, high)]), places - low, axis)
        each = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        return self._joined(box, [(int(run[0]), int(run[-1]) + 1) for run in each])

    def _joined(self, box: Box, runs: Sequence[tuple[int, int]]) -> Array:
        axis, shape = self.axis, shape_of(box)
        old = self.whole.spec.shape[axis : axis + self.count]
        found = [
            self.whole.read_box((*box[:axis], *inner, *box[axis + 1 :])).reshape(
                *shape[:axis], math.prod(shape_of(inner)), *shape[axis + 1 :]
            )
            for run in runs
            for inner in boxes_of(old, *run)
        ]
        if len(found) == 1:
            return found[0]
        empty = (*shape[:axis], 0, *shape[axis + 1 :])
        return np.concatenate(found, axis) if found else np.empty(empty, numpy_dtype(self.spec.dtype))


@dataclass(frozen=True, eq=False, repr=False)
class Split(Reshape):
    """One axis as several of these lengths; none for an axis of one place that goes."""

    axis: int
    lengths: tuple[int, ...]

    @property
    def spec(self) -> Spec:
        shape = self.whole.spec.shape
        return Spec((*shape[: self.axis], *self.lengths, *shape[self.axis + 1 :]), self.whole.spec.dtype)

    def read_box(self, box: Box) -> Array:
        end = self.axis + len(self.lengths)
        flat: Array = np.zeros((), np.int64)
        for length, places in zip(self.lengths, box[self.axis : end], strict=True):
            flat = flat[..., None] * length + np.asarray(places, np.int64)
        found = self.whole.read_box((*box[: self.axis], evenly(flat.reshape(-1)), *box[end:]))
        return found.reshape(shape_of(box))


def take(origin: Origin, places: Places, axis: int) -> Origin:
    """Some places along an axis."""
    places = evenly(places) if len(places) else range(0)
    nothing = isinstance(places, range) and places == range(origin.spec.shape[axis])
    return origin if nothing else Taken(origin, axis, places)


def check_fit(specs: Sequence[Spec], axis: int, how: How) -> None:
    """Raise `SpecMismatch` if arrays cannot be joined."""
    one = specs[0]
    for spec in specs[1:]:
        ours, theirs = list(one.shape), list(spec.shape)
        if how == "concat" and len(ours) == len(theirs):
            ours[axis] = theirs[axis]
        if (ours, one.dtype) != (theirs, spec.dtype):
            raise SpecMismatch(f"{how} along axis {axis}: {one} and {spec} do not fit")


def join(parts: Sequence[Origin], axis: int, how: How) -> Origin:
    """Origins along an axis; `SpecMismatch` if they do not fit together."""
    check_fit([part.spec for part in parts], axis, how)
    return parts[0] if len(parts) == 1 and how != "stack" else Joined(tuple(parts), axis, how)


def permute_axes(origin: Origin, axes: Sequence[int]) -> Origin:
    """The axes in another order."""
    if isinstance(origin, Permuted):
        return permute_axes(origin.whole, [origin.axes[axis] for axis in axes])
    return origin if list(axes) == sorted(axes) else Permuted(origin, tuple(axes))


def reshape(origin: Origin, shape: Sequence[int]) -> Origin:
    """The elements in another shape of the same size; `SpecMismatch` if the sizes differ."""
    old, new = origin.spec.shape, tuple(shape)
    if math.prod(old) != math.prod(new):
        raise SpecMismatch(f"{origin.spec} has {math.prod(old):,} elements, and {list(new)} has {math.prod(new):,}")
    inner = origin
    while isinstance(inner, Reshape) and inner.spec.shape != new:
        inner = inner.whole
    if inner.spec.shape == new:  # there and back
        return inner
    for first, last, lengths in reversed(_groups(old, new)):
        origin = origin if last - first == 1 else Merged(origin, first, last - first)
        origin = origin if len(lengths) == 1 else Split(origin, first, lengths)
    return origin


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[int, int, tuple[int, ...]]]:
    """The smallest groups of axes that hold the same elements: (first old one, one after the last, new lengths).

    >>> _groups((4, 6, 5), (2, 2, 30)), _groups((), (1,))
    ([(0, 1, (2, 2)), (1, 3, (30,))], [(0, 0, (1,))])
    """
    groups: list[tuple[int, int, tuple[int, ...]]] = []
    i = j = 0
    while math.prod(old) and i < len(old) and j < len(new):
        first, before, size, other = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while size != other:
            if size < other:
                size, i = size * old[i], i + 1
            else:
                other, j = other * new[j], j + 1
        groups.append((first, i, new[before:j]))
    if i < len(old) or j < len(new):  # axes of one place are left over, or nothing has a place
        first, _, lengths = groups.pop() if groups else (0, 0, ())
        groups.append((first, len(old), (*lengths, *new[j:])))
    return groups
