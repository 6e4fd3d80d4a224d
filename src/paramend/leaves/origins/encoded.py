"""`Encoded`: a leaf of a group for new values of its weight, computed block by block as it is read."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

import numpy as np

from paramend.errors import Quantized
from paramend.leaves.codecs.codec import Codec, Grids, Parts
from paramend.leaves.codecs.encoding import (
    Bounds,
    Misfit,
    bounds_of,
    codes_for,
    even,
    factor_of,
    finite,
    scales_for,
    unit,
)
from paramend.leaves.codecs.ggml import Blocks
from paramend.leaves.origins.boxes import Box, ends, select, shape_of, shifted, whole
from paramend.leaves.origins.moved import permute_axes, reshape
from paramend.leaves.origins.origin import CHUNK, Namer, Origin, Unstored
from paramend.leaves.specs import Array, Spec, numpy_dtype

# Bytes of scales that are kept until their leaf is read; they are computed again where there are more.
_FEW = 16 << 20


class _Shared(dict[Box, Grids]):
    """Box → scales and zero points there. A pickle of it is empty."""

    def __reduce__(self) -> tuple[type["_Shared"], tuple[()]]:
        return _Shared, ()


@dataclass(frozen=True, eq=False, repr=False)
class Encoded(Unstored):
    """A leaf of a group with the axes of the weight; `encoded` gives it as it is stored."""

    codec: Codec  # how values are encoded
    values: Origin  # the weight, with the axes of storage
    role: str  # the leaf: "payload", "scale", "zero", or that of scales of scales
    # The leaves as they are, of an edited weight: blocks without a change keep their bytes.
    kept: Parts = field(default_factory=dict)
    keep: bool = False  # whether scales are kept, and only codes change
    even: bool = True  # whether no zero points depend on the values
    free: bool = False  # whether a scale of scales may grow, if a block needs that: then all blocks are encoded anew
    misfit: Misfit | None = None  # what is measured while codes are read
    # Box → scales and zero points there, which all leaves of the weight share, as far as they are few.
    made: _Shared = field(default_factory=_Shared, compare=False)
    _last: tuple[Box, Array] | None = field(default=None, init=False, compare=False)
    together = True

    @property
    def children(self) -> tuple[Origin, ...]:  # type: ignore[override]
        return (self.values, *self.kept.values())

    @property
    def spec(self) -> Spec:
        return self.codec.fields[self.role].spec

    @property
    def bits(self) -> int:
        return 8 * numpy_dtype(self.spec.dtype).itemsize

    def text(self, name: Namer) -> str:
        how = ", scales kept" if self.keep else ""
        return f"encode({self.codec.scheme}, {self.values.text(name)}{how}).{self.role}"

    def read_box(self, box: Box) -> Array:
        if self.role in ("scale", "zero") and self._bounds is not None:
            return np.array(select(self._scales, box))
        cover = tuple(range(*ends(places)) for places in box)
        found = np.empty(shape_of(cover), numpy_dtype(self.spec.dtype))
        for places in self._boxes(self._needed(cover)) if found.size else ():
            there = self.codec.fields[self.role].places(places)
            words = self.codec.fields[self.role].words(there)
            new, old = [], []
            for stored, wanted in zip(words, cover, strict=True):
                low, high = max(stored[0], wanted.start), min(stored[-1] + 1, wanted.stop)
                new.append(slice(low - stored[0], high - stored[0]))
                old.append(slice(low - wanted.start, high - wanted.start))
            if self._last is None or self._last[0] != places:
                object.__setattr__(self, "_last", (places, self._encoded(places)))
            found[tuple(old)] = self._last[1][tuple(new)]  # type: ignore[index]
        near = (shifted(places, low.start) for places, low in zip(box, cover, strict=True))
        return np.array(select(found, tuple(near)))

    def _encoded(self, box: Box) -> Array:
        """The words of a box of the weight."""
        codec, own = self.codec, self.codec.fields[self.role]
        if self.role == codec.top:
            tops = self._tops_at(box)
            return own.pack(tops[self.role]) if tops else self.kept[self.role].read_box(own.places(box))
        if self.role != "payload" and box in self.made:
            return own.pack(self.made[box][self.role])
        values, changed, old = self._read(box)
        if changed is not None and self._tops:
            changed = np.ones_like(changed)
        bounds = self._bounds_at(box) or bounds_of(codec, values, changed, box, self.kept)
        scales = scales_for(codec, bounds, box, self.kept, self._tops_at(box), keep=self.keep, even=self.even)
        before = codec.scales(self.kept, box) | dict(self._tops_at(box))
        there = before | dict(scales)
        if self.role != "payload":
            return own.pack(there[self.role])
        if codec.fields["scale"].spec.nbytes <= _FEW:
            self.made[box] = there
        groups, scale = codec.groups(self.kept), codec.fields["scale"]
        codes = codes_for(codec, values.copy(), there, box, groups)
        if old is not None and changed is not None:
            blocks = bounds.changed if not self.keep else bounds.changed & ~np.isfinite(factor_of(codec, before))
            touched = changed | scale.spread(blocks, box, groups)
            codes = np.where(touched, codes, old)
        if self.misfit is not None:
            new = 0 if self._bounds is not None else int(bounds.changed.sum()) if old is not None else scale.spec.size
            start = tuple(int(places[0]) for places in box)
            self.misfit.measure(start, values, codec.values(codes, there, box, groups), new)
        return own.pack(codes)

    def _read(self, box: Box) -> tuple[Array, Array | None, Array | None]:
        """The values of a box, float32; where they are new; and the codes that are there, if there are any."""
        codec, values = self.codec, self.values.read_box(box)
        if "payload" not in self.kept:
            return values.astype(np.float32), None, None
        codes, groups = codec.stored_codes(self.kept, box), codec.groups(self.kept)
        before = codec.values(codes, codec.scales(self.kept, box), box, groups).astype(values.dtype)
        bits = f"u{values.itemsize}"
        return values.astype(np.float32), values.view(bits) != before.view(bits), codes

    # ---- which part of the weight ------------------------------------------------------------------------------------

    def _needed(self, words: tuple[range, ...]) -> tuple[range, ...]:
        """The places of the weight that some words are made of, as whole units."""
        own, units, found = self.codec.fields[self.role], unit(self.codec), []
        for axis, (places, length) in enumerate(zip(words, self.codec.spec.shape, strict=True)):
            every = own.every[axis]
            if not every:
                found.append(range(min(length, units[axis])))
                continue
            start, stop = places.start, places.stop
            if own.packing is not None and own.packing.axis == axis:
                codes, count = own.packing.lump(numpy_dtype(own.spec.dtype).itemsize)
                start, stop = start // count * codes, -(-stop // count) * codes
            start, stop = start * every // units[axis], -(-stop * every // units[axis])
            found.append(range(start * units[axis], min(stop * units[axis], length)))
        return tuple(found)

    def _boxes(self, of: Box) -> Iterator[Box]:
        """Boxes that hold some places and are encoded one by one, always the same: a few rows of units, all columns."""
        axis, shape = max(len(of) - 2, 0), self.codec.spec.shape
        step = unit(self.codec)[axis]
        rows = step * max(CHUNK // (step * max(math.prod(shape[axis + 1 :]), 1)), 1)
        for above in product(*of[:axis]):
            for at in range(of[axis][0] // rows * rows, of[axis][-1] + 1, rows):
                band = range(at, min(at + rows, shape[axis]))
                yield (*(range(place, place + 1) for place in above), band, *whole(shape[axis + 1 :]))

    @cached_property
    def _bounds(self) -> Bounds | None:
        """The bounds of all blocks, where boxes do not hold whole blocks; None where they do."""
        scale, codec = self.codec.fields["scale"], self.codec
        axis, groups = max(len(scale.every) - 2, 0), codec.groups(self.kept)
        lengths = zip(scale.every[: axis + 1], codec.spec.shape, strict=False)
        if not groups and not any(not every and length > 1 for every, length in lengths):
            return None
        shape = scale.spec.shape
        bounds = Bounds(np.zeros(shape, np.float32), np.zeros(shape, np.float32), np.zeros(shape, np.bool_))
        for box in self._boxes(whole(codec.spec.shape)):
            values, changed, _ = self._read(box)
            here = np.ix_(*map(np.asarray, scale.places(box, groups)))
            some = bounds_of(codec, values, changed, box, self.kept)
            for ufunc, all_, part in zip((np.fmin, np.fmax, np.logical_or), bounds, some, strict=True):
                all_[here] = ufunc(all_[here], part)
        if self.misfit is not None:
            self.misfit.new = int(bounds.changed.sum())
        return bounds

    @cached_property
    def _scales(self) -> Array:
        """All scales or zero points, as they are stored, where boxes do not hold whole blocks."""
        codec, own, box = self.codec, self.codec.fields[self.role], whole(self.codec.spec.shape)
        bounds = self._bounds_at(box)
        assert bounds is not None
        found = scales_for(codec, bounds, box, self.kept, self._tops, keep=self.keep, even=self.even)[self.role]
        if self.role not in self.kept:
            return own.pack(found)
        grid = whole(codec.fields["scale"].spec.shape)
        codes = np.array(own.codes(self.kept[self.role].read(), grid))
        codes[np.ix_(*map(np.asarray, own.places(box, codec.groups(self.kept))))] = found
        return own.pack(codes)

    def _bounds_at(self, box: Box) -> Bounds | None:
        if self._bounds is None:
            return None
        scale = self.codec.fields["scale"]
        here = np.ix_(*map(np.asarray, scale.places(box, self.codec.groups(self.kept))))
        return Bounds(*(each[here] for each in self._bounds))

    @cached_property
    def _tops(self) -> Mapping[str, Array]:
        """New scales of scales, one for each place of their grid."""
        role, scaling = self.codec.top, self.codec.scaling
        if not role or (role in self.kept and not self.free):
            return {}
        top, limit = self.codec.fields[role], np.float32(self.codec.codes.limit)
        greatest, new = np.zeros(top.spec.shape, np.float32), np.zeros(top.spec.shape, np.float32)
        for box in self._boxes(whole(self.codec.spec.shape)):
            here = np.ix_(*map(np.asarray, top.places(box)))
            values, changed, _ = self._read(box)
            values = np.abs(values)
            for found, some in ((greatest, values), (new, values if changed is None else np.where(changed, values, 0))):
                found[here] = np.fmax(found[here], top.reduced(np.fmax, some, box))
        if role in self.kept and scaling.suffices(self.kept[role].read(), new / limit):
            return {}
        return {role: scaling.top(greatest, self.codec.codes.limit)}

    def _tops_at(self, box: Box) -> Mapping[str, Array]:
        return {
            role: each[np.ix_(*map(np.asarray, self.codec.fields[role].places(box)))]
            for role, each in self._tops.items()
        }


@dataclass(frozen=True, eq=False, repr=False)
class Blocked(Unstored):
    """The blocks for some values, each encoded when it is read."""

    codec: Blocks
    values: Origin
    kept: Origin | None = None  # the blocks as they are, of an edited weight: those whose values stay keep their bytes
    misfit: Misfit | None = None  # what is measured while blocks are read

    @property
    def children(self) -> tuple[Origin, ...]:  # type: ignore[override]
        return (self.values,) if self.kept is None else (self.values, self.kept)

    @property
    def spec(self) -> Spec:
        return self.codec.fields["payload"].spec

    @property
    def tile(self) -> int:
        return max(CHUNK // self.codec.size, 1)

    def text(self, name: Namer) -> str:
        return f"encode({self.codec.scheme}, {self.values.text(name)})"

    def read_box(self, box: Box) -> Array:
        values = self.values.read_box((*box[:-1], self.codec.around(box[-1]))).astype(np.float32)
        parts = values.reshape(*values.shape[:-1], -1, self.codec.size)
        changed = np.ones(parts.shape[:-1], np.bool_)
        old = None if self.kept is None else self.kept.read_box(box)
        if old is not None:
            before = self.codec.of(old).reshape(parts.shape)
            changed = (parts.view(np.uint32) != before.view(np.uint32)).any(axis=-1)
        found: Array = np.empty(changed.shape, self.codec.dtype) if old is None else np.array(old)
        found[changed] = self.codec.blocks(parts[changed].reshape(1, -1))[0] if changed.any() else found[changed]
        if self.misfit is not None and changed.size:
            start = tuple(int(places[0]) for places in box)
            self.misfit.measure(start, values, self.codec.of(found), int(changed.sum()))
        return found


def encoded(
    codec: Codec,
    weight: Origin,
    specs: Mapping[str, Spec],
    kept: Parts | None = None,
    *,
    keep: bool = False,
    free: bool = False,
    misfit: Misfit | None = None,
) -> dict[str, Origin]:
    """The leaves of a group for new values of its weight, by role: those that change.

    Args:
        codec: how they are encoded.
        weight: the values, with the axes that the model has.
        specs: role → spec of the leaf as it is stored.
        kept: the leaves as they are, of an edited weight: blocks whose values are what these decode to keep their
            bytes. Of a new weight, the leaves that are known without its values.
        keep, free, misfit: as in `Encoded`.
    """
    if isinstance(codec, Blocks):
        return _blocks(codec, weight, kept or {}, misfit)
    views = codec.views(kept or {})
    axes = [codec.axes.index(axis) for axis in range(len(codec.axes))]
    values = reshape(weight, codec.spec.shape) if codec.shape else permute_axes(weight, axes) if axes else weight
    roles = codec.encodes if not keep or not finite(codec, views) else codec.encodes[:1]
    if "payload" not in views:
        roles = tuple(role for role in roles if role not in views)
    symmetric = even(codec, views)
    roles = tuple(role for role in roles if role != "zero" or not symmetric)
    roles = (*roles, *((codec.top,) if codec.top and (free or codec.top not in views) else ()))
    how = keep, symmetric, free, misfit, _Shared()
    return {role: reshape(Encoded(codec, values, role, views, *how), specs[role].shape) for role in roles}


def _blocks(codec: Blocks, weight: Origin, kept: Mapping[str, Origin], misfit: Misfit | None) -> dict[str, Origin]:
    """The blocks for new values of a weight, as the leaves of its group."""
    if not codec.writes:
        said = f"a weight in {codec.scheme} would be encoded, which is only decoded"
        raise Quantized(said, scheme=codec.scheme, payload="", hint='pm.dequantize(tree, selector, dtype="float16")')
    return {"payload": Blocked(codec, reshape(weight, codec.spec.shape), kept.get("payload"), misfit)}
