"""Directions: a vector along an axis of a leaf, whose share of the leaf `project_out` takes out."""

import numpy as np

from paramend.arrays.lowrank import Projection
from paramend.edits.arguments import Args, shown
from paramend.edits.checks import concrete
from paramend.edits.moves import axis_of
from paramend.errors import BadArgument, SpecMismatch
from paramend.leaves.origins.stored import Stored
from paramend.leaves.specs import AnyArray, Array, Spec, kind_of


def unit_of(direction: AnyArray) -> Array:
    """A direction as a unit vector of float64; `BadArgument` if it is none."""
    given = concrete(direction.read() if isinstance(direction, Stored) else direction)
    if given is None:
        raise BadArgument("the direction must be known before the edit runs; this is a traced value")
    if given.ndim != 1 or kind_of(given.dtype.name) not in ("int", "float"):
        raise BadArgument(f"the direction is a vector of numbers, and this is {shown(direction)}")
    vector = given.astype(np.float64)
    if not np.isfinite(vector).all():
        raise BadArgument("the direction holds values that are not finite")
    most = np.abs(vector).max(initial=0.0)
    if not most:
        raise BadArgument("the direction is zero, which points nowhere")
    vector /= most  # the squares of very small numbers would be zero
    return np.asarray(vector / np.sqrt(vector @ vector))


def axis_along(spec: Spec, length: int, axis: object) -> int:
    """The axis of a leaf that a direction is along, counted from the front: of the last two, the one of its length."""
    fits = [each for each in range(spec.ndim) if spec.shape[each] == length]
    if axis is not None:
        chosen = axis_of(spec, axis)
        if chosen not in fits:
            said = f"axis {chosen} of {spec} has {spec.shape[chosen]:,}"
            raise SpecMismatch(f"the direction has {length:,} elements, and {said}")
        return chosen
    last = [each for each in fits if each >= spec.ndim - 2]
    if len(last) == 1:
        return last[0]
    if last:
        said = f"axes {last[0]} and {last[1]} of {spec} both have"
        raise SpecMismatch(f"the direction has {length:,} elements, and {said} {length:,}", hint="axis=-2 or axis=-1")
    said = f"neither of the last two axes of {spec} has"
    hint = f"axis={fits[0]}" if fits else ""
    raise SpecMismatch(f"the direction has {length:,} elements, and {said} {length:,}", hint=hint)


def along(spec: Spec, args: Args) -> tuple[Array, int]:
    """The unit vector that is taken out of a leaf, and the axis that it is along."""
    unit = unit_of(args["direction"])
    return unit, axis_along(spec, len(unit), args.get("axis"))


def check_projection(spec: Spec, args: Args) -> Spec:
    """The leaf must hold floats, and have one axis that the direction is along."""
    if spec.kind != "float":
        raise SpecMismatch(
            f"project_out computes with floats, and the leaf is {spec}", hint='pm.sel(...).where(dtype="float")'
        )
    strength = concrete(args.get("strength", 1.0))
    if strength is not None and (np.iscomplexobj(strength) or not np.isfinite(strength)):
        raise BadArgument(f"strength={shown(args['strength'])} is not a finite number", hint="strength=1.0")
    along(spec, args)
    return spec


def projection(spec: Spec, args: Args) -> Projection:
    """What is added to a leaf on disk."""
    unit, axis = along(spec, args)
    return Projection(spec, axis, unit, float(args.get("strength", 1.0)))
