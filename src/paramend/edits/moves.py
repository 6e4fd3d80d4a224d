"""The verbs that move elements, the same on arrays of any library and on origins of leaves on disk."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from paramend.edits import hands
from paramend.edits.arguments import Args, read_index, shown
from paramend.errors import BadArgument, OutOfRange, SpecMismatch
from paramend.leaves.origins.boxes import Places
from paramend.leaves.specs import Array, Spec
from paramend.reports import wording


def _is_whole(value: Any) -> bool:
    return hasattr(type(value), "__index__") and not isinstance(value, bool | np.bool_)


def whole_numbers(values: Any, what: str, hint: str) -> list[int]:
    """The whole numbers of a list; `BadArgument` if it is not one."""
    if isinstance(values, str) or not isinstance(values, Iterable) or not all(map(_is_whole, values)):
        raise BadArgument(f"{what} {shown(values)} is not a list of whole numbers", hint=hint)
    return list(map(int, values))


def axis_of(spec: Spec, axis: Any) -> int:
    """An axis of a leaf, counted from the front; `OutOfRange` if the leaf has no such axis."""
    if not _is_whole(axis):
        raise BadArgument(f"the axis {shown(axis)} is not a whole number", hint="axis=0")
    found = int(axis)
    if not -spec.ndim <= found < spec.ndim:
        raise OutOfRange(f"{spec} has no axis {found}; it has {wording.plural(spec.ndim, 'axis', 'axes')}")
    return found % spec.ndim


def _axes_of(spec: Spec, axes: Any) -> tuple[int, ...]:
    found = tuple(axis_of(spec, axis) for axis in whole_numbers(axes, "axes", "axes=(1, 0)"))
    if sorted(found) != list(range(spec.ndim)):
        raise SpecMismatch(
            f"transpose takes each axis of {spec} once, and axes is {shown(list(axes))}",
            hint=f"axes={list(range(spec.ndim))[::-1]}",
        )
    return found


def transposed(x: Any, args: Args) -> Any:
    """The axes in another order."""
    return hands.transpose(x, _axes_of(hands.spec_of(x), args["axes"]))


def _shape_of(spec: Spec, shape: Any) -> tuple[int, ...]:
    lengths = whole_numbers(shape, "the shape", "shape=(4, -1)")
    known = 1
    for length in lengths:
        known *= length if length != -1 else 1
    if lengths.count(-1) == 1 and known > 0 and not spec.size % known:
        lengths[lengths.index(-1)] = spec.size // known
        known = spec.size
    if min(lengths, default=0) < 0 or known != spec.size:
        raise SpecMismatch(f"{spec} has {spec.size:,} elements, which do not fit the shape {shown(list(shape))}")
    return tuple(lengths)


def reshaped(x: Any, args: Args) -> Any:
    """The elements in another shape."""
    return hands.reshape(x, _shape_of(hands.spec_of(x), args["shape"]))


_LIST = "[0, 2], a slice, or a mask of bools"


def places(spec: Spec, args: Args) -> tuple[Places, int]:
    """The places along an axis that indices, a slice or a mask name, and the axis."""
    axis = axis_of(spec, args.get("axis", 0))
    length, indices = spec.shape[axis], args["indices"]
    if isinstance(indices, str):
        indices = read_index(indices)
    if isinstance(indices, slice):
        return range(*indices.indices(length)), axis
    try:
        given: Array = np.asarray(indices)
    except Exception as error:
        raise BadArgument("places must be known before the edit runs; this is a traced value") from error
    given = given.astype(np.int64) if not given.size else given
    if given.ndim != 1 or given.dtype.kind not in "iub":
        raise BadArgument(f"{shown(indices)} is not a list of places", hint=_LIST)
    if given.dtype == bool:
        if len(given) != length:
            raise SpecMismatch(f"the mask has {len(given):,} places, and axis {axis} of {spec} has {length:,}")
        return np.flatnonzero(given), axis
    outside = given[(given < -length) | (given >= length)]
    if len(outside):
        raise OutOfRange(f"axis {axis} of {spec} has no place {outside[0]}; it has {length:,}")
    return given.astype(np.int64) % max(length, 1), axis


def permutation(spec: Spec, args: Args) -> tuple[Places, int]:
    """The old place of each new one along an axis, and the axis."""
    axis = axis_of(spec, args.get("axis", 0))
    try:
        found: Places | None = places(spec, {"indices": args["index"], "axis": axis})[0]
    except OutOfRange:
        found = None
    if found is None or not np.array_equal(np.sort(found), np.arange(spec.shape[axis])):
        raise SpecMismatch(
            f"permute takes each of the {spec.shape[axis]:,} places along axis {axis} of {spec} once, and index is "
            f"{shown(args['index'])}",
            hint=".take(indices, axis) takes some places, or one more than once",
        )
    return found, axis


def taken(x: Any, args: Args) -> Any:
    """Some places along an axis."""
    return hands.take(x, *places(hands.spec_of(x), args))


def permuted(x: Any, args: Args) -> Any:
    """All places along an axis in another order."""
    return hands.take(x, *permutation(hands.spec_of(x), args))
