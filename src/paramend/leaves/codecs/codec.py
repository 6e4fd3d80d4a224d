"""`Codec`: how a weight is made of the leaves of its group, and back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from paramend.leaves.codecs.codes import Codes
from paramend.leaves.codecs.fields import Field, Groups
from paramend.leaves.origins.boxes import Box
from paramend.leaves.origins.moved import permute_axes, reshape
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import Array, Spec

# Role of a leaf in its group, "payload" for the codes → what is there, or what is known of it.
Parts = Mapping[str, Origin]
Grids = Mapping[str, Array]


class Scaling(ABC):
    """What the values of codes are multiplied by: made of the leaves with scales."""

    @abstractmethod
    def factors(self, grids: Grids) -> tuple[Array, ...]:
        """Factors in float32, in the order in which values are multiplied by them."""


@dataclass(frozen=True, eq=False, slots=True)
class Codec:
    """How one weight is made of codes and scales. It holds no values.

    Attributes:
        scheme: the name of the scheme.
        spec: shape and dtype of the weight, its axes in the order of storage; the dtype is that of the library.
        fields: role → how the leaf lies over the weight.
        codes: what the codes of the payload stand for.
        scaling: what they are multiplied by.
        zeros: what the codes of the zero points stand for; None if there are none.
        axes: for each axis of the weight in its model, that of storage; empty if they are the same.
        shape: the shape of the weight in its model, if its elements are stored as one row.
    """

    scheme: str
    spec: Spec
    fields: Mapping[str, Field]
    codes: Codes
    scaling: Scaling
    zeros: Codes | None = None
    axes: tuple[int, ...] = ()
    shape: tuple[int, ...] = field(default=())

    def views(self, parts: Parts) -> Parts:
        """The leaves with the axes of the weight in storage."""
        return {role: each.view(parts[role]) for role, each in self.fields.items() if role in parts}

    def weight(self, stored: Origin) -> Origin:
        """A weight as its model has it, of one with the axes of storage."""
        if self.shape:
            return reshape(stored, self.shape)
        return permute_axes(stored, self.axes) if self.axes else stored

    def grids(self, views: Parts, box: Box) -> dict[str, Array]:
        """Role → codes, scales and zero points of a box, as arrays that broadcast to it."""
        groups = self.groups(views)
        return {role: each.read(views[role], box, groups) for role, each in self.fields.items() if role != "group"}

    def groups(self, views: Parts) -> Groups:
        """What `g_idx` says of an axis."""
        if "group" not in self.fields:
            return {}
        axis = next(axis for axis, every in enumerate(self.fields["group"].every) if every)
        return {axis: views["group"].read().reshape(-1)}

    def decode(self, views: Parts, box: Box) -> Array:
        """The values of a box, float32: nothing is rounded but by the operations of float32.

        Args:
            views: the leaves, from `views`.
            box: the places, in axes of storage.
        """
        grids = self.grids(views, box)
        with np.errstate(all="ignore"):
            values = self.codes.decode(grids["payload"])
            zero = self.zero(grids)
            if zero is not None:
                values = np.subtract(values, zero, out=values)
            for factor in self.scaling.factors(grids):
                values = np.multiply(values, factor, out=values)
        return values

    def zero(self, grids: Grids) -> Array | None:
        """The zero points, float32; None where zero is code 0."""
        if self.zeros is None or "zero" not in grids:
            return None
        return self.zeros.decode(grids["zero"])
