"""`Codec`: how a weight is made of the leaves of its group, and back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from paramend.errors import SpecMismatch
from paramend.leaves.codecs.codes import Codes
from paramend.leaves.codecs.fields import NO_GROUPS, Field, Groups
from paramend.leaves.origins.boxes import Box
from paramend.leaves.origins.moved import permute_axes, reshape
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import Array, Spec

# Role of a leaf in its group, "payload" for the codes → what is there, or what is known of it.
Parts = Mapping[str, Origin]
Grids = Mapping[str, Array]
Terms: TypeAlias = list[tuple[np.ufunc, Array]]


# What `g_idx` tells the places of.
_GROUPED = ("scale", "zero")


@dataclass(frozen=True, slots=True)
class Stated:
    """What a configuration says of one weight; None where it says nothing."""

    method: str = ""  # `quant_method`, "" if there is none
    bits: int | None = None  # of a code
    group: int | None = None  # how many inputs share a scale; -1 for all
    block: tuple[int, int] | None = None  # how many outputs and inputs share a scale
    symmetric: bool | None = None  # whether there are no zero points
    form: str = ""  # how a method stores it, such as `checkpoint_format` of GPTQ, or `version` of AWQ
    ignored: str = ""  # the entry of an ignore list that names the module, "" if none does
    # Whether outputs are the last axis, as in kernels of JAX; they are the first of weights of torch.
    outputs_last: bool = False


NOTHING = Stated()


def disagree(here: str, there: str, *leaves: Origin, hint: str = "") -> SpecMismatch:
    """The error for leaves that are not as the configuration, or another leaf, says."""
    rows = "\n".join(f"    {leaf}  {leaf.spec}" for leaf in leaves)
    way = hint or "correct the configuration, or open the file with raw=True to see what is stored"
    return SpecMismatch(f"a quantised weight and what is said of it disagree: {here}, and {there}\n\n{rows}", hint=way)


class Scaling(ABC):
    """What the values of codes are multiplied by: made of the leaves with scales."""

    @abstractmethod
    def factors(self, grids: Grids) -> tuple[Array, ...]:
        """Factors in float32, in the order in which values are multiplied by them."""

    @abstractmethod
    def fitted(self, greatest: Array, limit: float, spec: Spec, grids: Grids) -> Array:
        """The scales, stored by a spec, with which the greatest code, of value `limit`, is for the greatest magnitude
        of each block; `grids` is what stays, as scales of scales."""

    def through(self, factor: float) -> tuple[str, float] | None:
        """The role of the leaf that takes a factor of the weight, and the factor for it; None if none can."""
        return "scale", factor

    def suffices(self, top: Array, factors: Array) -> bool:
        """Whether scales of scales hold scales for some factors of blocks."""
        raise NotImplementedError

    def top(self, greatest: Array, limit: float) -> Array:
        """The scale of scales for the greatest magnitude of a weight, float32."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, slots=True)
class Codec:
    """How one weight is made of codes and scales. It holds no values."""

    scheme: str  # the name of the scheme
    spec: Spec  # shape and dtype of the weight, its axes in the order of storage; the dtype is that of the library
    fields: Mapping[str, Field]  # role → how the leaf lies over the weight
    codes: Codes  # what the codes of the payload stand for
    scaling: Scaling  # what they are multiplied by
    zeros: Codes | None = None  # what the codes of the zero points stand for; None if there are none
    axes: tuple[int, ...] = ()  # for each axis of the weight in its model, that of storage; empty if they are the same
    # The shape of the weight in its model, if its elements are stored as one row.
    shape: tuple[int, ...] = field(default=())

    @property
    def count(self) -> int:
        """How many blocks the weight has."""
        return self.fields.get("scale", self.fields["payload"]).spec.size

    @property
    def writes(self) -> bool:
        """Whether new values can be encoded."""
        return True

    def views(self, parts: Parts) -> Parts:
        """The leaves with the axes of the weight in storage."""
        return {role: each.view(parts[role]) for role, each in self.fields.items() if role in parts}

    def weight(self, stored: Origin) -> Origin:
        """A weight as its model has it, of one with the axes of storage."""
        if self.shape:
            return reshape(stored, self.shape)
        return permute_axes(stored, self.axes) if self.axes else stored

    def decode(self, views: Parts, box: Box) -> Array:
        """The values of a box, in axes of storage, float32: nothing is rounded but by the operations of float32."""
        return self.values(self.stored_codes(views, box), self.scales(views, box), box, self.groups(views))

    def values(self, codes: Array, scales: Grids, box: Box, groups: Groups) -> Array:
        """The values of codes, float32, with scales and zero points from `scales`."""
        return self.computed(codes, self.terms(scales), box, groups)

    def terms(self, scales: Grids) -> Terms:
        """What values of codes are computed with, first to last: zero points, then factors."""
        with np.errstate(all="ignore"):
            found: Terms = [(np.multiply, factor) for factor in self.scaling.factors(scales)]
        if self.zeros is not None and "zero" in scales:
            found.insert(0, (np.subtract, self.zeros.decode(scales["zero"])))
        return found

    def computed(self, codes: Array, terms: Terms, box: Box, groups: Groups) -> Array:
        """The values of codes, float32, computed with terms that have a place for each block of the box."""
        values = self.codes.decode(codes)
        with np.errstate(all="ignore"):
            for ufunc, term in terms:
                self.fields["scale"].apply(ufunc, values, term, box, groups)
        return values

    def stored_codes(self, views: Parts, box: Box) -> Array:
        """The codes of a box, one byte each."""
        return self.fields["payload"].read(views["payload"], box).view(np.uint8)

    def scales(self, views: Parts, box: Box) -> dict[str, Array]:
        """Scales, zero points and scales of scales, one for each place of the grid of scales that a box needs."""
        groups = self.groups(views)
        one = self.fields["scale"].first(box, groups)
        return {
            role: each.read(views[role], one, groups if role in _GROUPED else NO_GROUPS)
            for role, each in self.fields.items()
            if role in views and role not in ("payload", "group")
        }

    def groups(self, views: Parts) -> Groups:
        """What `g_idx` says of an axis."""
        if "group" not in views or "group" not in self.fields:
            return NO_GROUPS
        axis = next(axis for axis, every in enumerate(self.fields["group"].every) if every)
        return {axis: views["group"].read().reshape(-1)}

    @property
    def encodes(self) -> tuple[str, ...]:
        """The roles of the leaves that new values change: the codes first, then scales and zero points."""
        return tuple(role for role in ("payload", *_GROUPED) if role in self.fields)

    @property
    def top(self) -> str:
        """The role of the leaf with scales of scales, which new values may need greater; "" if there is none."""
        return next((role for role in ("global", "nested scale") if role in self.fields), "")

    @property
    def block(self) -> str:
        """How many places of the weight share a scale, along each axis of which a block has several, but not all."""
        lengths = [self.fields["scale"].every[axis] for axis in (self.axes or range(len(self.spec.shape)))]
        return "×".join(str(each) for each in lengths if each > 1)

    @property
    def zero_word(self) -> int | None:
        """The word of the payload, of 64 bits, in which all codes are those of 0; None if zero points say which."""
        if self.zeros is not None and "zero" in self.fields:
            return None
        packing, code = self.fields["payload"].packing, int(self.codes.nearest(np.zeros(1, np.float32))[0])
        bits = 8 if packing is None else packing.bits
        if 64 % bits:
            return None if code else 0
        return sum(code << at for at in range(0, 64, bits))
