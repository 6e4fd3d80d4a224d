"""Tensors of which each process holds a part: `DTensor`, which FSDP2 and tensor parallelism make. Imported only after
torch was.

A verb runs on the part that is here; the result has the mesh and the placements of the leaf. Where elements must move
to other processes, they move between devices.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeGuard

import numpy as np
import torch

from paramend._optional import imported
from paramend.arrays.places import chosen, kept_axis
from paramend.errors import Unsupported
from paramend.leaves.specs import Array

Verb = Callable[..., Any]


def owns(x: Any) -> "TypeGuard[Any]":
    """Whether a value is a DTensor."""
    if type(x) is torch.Tensor or not imported("torch.distributed.tensor"):
        return False
    return isinstance(x, _library().DTensor)


def _library() -> Any:
    import torch.distributed.tensor as library  # only where torch was built with it

    return library


def by_part(new: Callable[[Any, Callable[[], Any]], Any]) -> Callable[[Verb], Verb]:
    """A decorator of a verb over tensors: of a DTensor each process computes its part, by the row of `VERBS`. `new`
    makes a tensor like the leaf of what a function computes."""

    def decorated(verb: Verb) -> Verb:
        @wraps(verb)
        def run(x: Any, *args: Any) -> Any:
            leaf = args[0] if verb.__name__ == "like" else x[0] if isinstance(x, list | tuple) else x
            if not owns(leaf):
                return verb(x, *args)
            return new(leaf, lambda: VERBS[verb.__name__](verb, x, *args))

        return run

    return decorated


# ---- parts -----------------------------------------------------------------------------------------------------


def part(x: Any) -> Any:
    """The part of a DTensor in this process: its own memory."""
    return x.to_local() if x.grad_fn is not None else x.detach().to_local()


def parts(x: Any) -> list[tuple[tuple[Array, ...], Any]]:
    """The places of the part of a DTensor in this process, and the part."""
    x = _summed(x)
    return [(tuple(places(x.shape, x)), part(x))]


def gathered(x: Any) -> Any:
    """All of a tensor, in each process: all of them must call this."""
    return x.detach().full_tensor() if owns(x) else x


def _summed(x: Any) -> Any:
    """The tensor, with sums that are not yet made (`Partial`) made."""
    whole = [_library().Replicate() if each.is_partial() else each for each in x.placements]
    return x if whole == list(x.placements) else x.redistribute(placements=whole)


def _axis(placement: Any) -> int | None:
    """The axis that a placement cuts; None if it cuts none."""
    axis: int | None = getattr(placement, "dim", None)
    return axis


def places(shape: Sequence[int], x: Any, placements: Any = None) -> list[Array]:
    """The places, along each axis of a shape, of the elements that this process holds."""
    found = []
    for axis, length in enumerate(shape):
        line = [each if _axis(each) == axis else _library().Replicate() for each in placements or x.placements]
        if not any(_axis(each) == axis for each in line):
            found.append(np.arange(length))
            continue
        with torch.no_grad():
            along = torch.arange(length).reshape([-1 if at == axis else 1 for at in range(len(shape))])
            spread = _spread(along.to(x.device_mesh.device_type), x.device_mesh, line)
        found.append(spread.to_local().flatten().cpu().numpy())
    return found


def _spread(whole: Any, mesh: Any, placements: Any) -> Any:
    """A tensor that every process has, cut by placements: each takes its part, and nothing is sent."""
    library = _library()
    same = library.DTensor.from_local(whole, mesh, [library.Replicate()] * mesh.ndim, run_check=False)
    return same.redistribute(placements=placements)


def _cut(value: Any, held: Sequence[Array]) -> Any:
    """The part of an array of numpy or torch that broadcasts against a part at these places; a view if it can be."""
    for axis in range(value.ndim):
        here = held[axis - value.ndim]
        if value.shape[axis] == 1 or len(here) == value.shape[axis]:
            continue
        even = not len(here) or here[-1] - here[0] + 1 == len(here)
        at = slice(int(here[0]), int(here[-1]) + 1) if even and len(here) else here
        value = value[(*[slice(None)] * axis, at)]
    return value


def _operand(value: Any, x: Any, held: Sequence[Array]) -> Any:
    """The part of an operand that belongs to the part of x."""
    if owns(value):
        if value.shape == x.shape and value.device_mesh == x.device_mesh:
            return value.redistribute(placements=x.placements).to_local()
        value = value.full_tensor()
    return _cut(value, held) if getattr(value, "ndim", 0) else value


def _joined(local: Any, x: Any, shape: Sequence[int] | None = None, placements: Any = None) -> Any:
    """The DTensor that the parts are of."""
    shape = x.shape if shape is None else torch.Size(shape)
    stride = x.stride() if shape == x.shape else torch.empty(shape, device="meta").stride()
    found = x.placements if placements is None else placements
    make = _library().DTensor.from_local
    return make(local, x.device_mesh, found, run_check=False, shape=shape, stride=stride)


def _uncut(x: Any, axes: Sequence[int]) -> Any:
    """The tensor with some axes whole in each process."""
    whole = [_library().Replicate() if _axis(each) in axes else each for each in x.placements]
    return x if whole == list(x.placements) else x.redistribute(placements=whole)


# ---- verbs -----------------------------------------------------------------------------------------------------


def elementwise(verb: Verb, x: Any, *operands: Any) -> Any:
    """A verb that makes each element of those at the same place."""
    x = _summed(x)
    held = places(x.shape, x) if any(getattr(each, "ndim", 0) for each in operands) else ()
    return _joined(verb(part(x), *(_operand(each, x, held) for each in operands)), x)


def like(verb: Verb, value: Any, x: Any) -> Any:
    """The values cut as x is."""
    return elementwise(lambda local, each: verb(each, local), x, value)


def put(verb: Verb, x: Any, index: Any, how: str, value: Any) -> Any:
    """A value in a slice: each process changes what it holds of it. An index that is not one of each axis, such as a
    mask, needs the whole tensor on each device."""
    x = _summed(x)
    value = value.full_tensor() if owns(value) else value
    found = chosen(index, x.shape)
    if found is None:
        whole = _uncut(x, range(x.ndim))
        return _joined(verb(part(whole), index, how, value), whole).redistribute(placements=x.placements)
    inner, wanted = [], []
    for here, each in zip(places(x.shape, x), found.places, strict=True):
        each = np.atleast_1d(each)
        order = np.argsort(here)
        at = np.searchsorted(here, each, sorter=order) if len(here) else np.zeros(len(each), int)
        at = order[np.minimum(at, len(here) - 1)] if len(here) else at
        mine = here[at] == each if len(here) else np.zeros(len(each), bool)
        inner.append(at[mine])
        wanted.append(np.flatnonzero(mine))
    if getattr(value, "ndim", 0):
        value = found.spread(value)
        for axis, at in enumerate(wanted):
            value = value if value.shape[axis] == 1 else value[(*[slice(None)] * axis, at)]
    if not all(map(len, inner)):
        return _joined(part(x).clone(), x)
    return _joined(verb(part(x), np.ix_(*inner) if inner else (), how, value), x)


def take(verb: Verb, x: Any, positions: Sequence[int], axis: int) -> Any:
    """Slices along an axis. If it is cut, they move from device to device, and the result is cut as x was."""
    x = _summed(x)
    axis %= x.ndim
    whole = _uncut(x, [axis])
    shape = [*x.shape[:axis], len(positions), *x.shape[axis + 1 :]]
    found = _joined(verb(part(whole), positions, axis), whole, shape)
    return found.redistribute(placements=x.placements)


def transpose(verb: Verb, x: Any, axes: Sequence[int]) -> Any:
    """The axes in another order, each cut as it was."""
    x, axes = _summed(x), [axis % x.ndim for axis in axes]
    moved = [_moved(each, axes.index) for each in x.placements]
    return _joined(verb(part(x), axes), x, [x.shape[axis] for axis in axes], moved)


def _moved(placement: Any, to: Callable[[int], int]) -> Any:
    """A placement with its axis at another place."""
    axis = _axis(placement)
    if axis is None:
        return placement
    strided = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(to(axis), **strided)


def reshape(verb: Verb, x: Any, shape: Sequence[int]) -> Any:
    """Another shape. Where its parts are those of an axis of it, each is reshaped where it is; other axes are whole in
    the result."""
    x, shape = _summed(x), tuple(torch.empty(x.shape, device="meta").reshape(tuple(shape)).shape)
    cuts: dict[int, int] = {}
    for number, each in enumerate(x.placements):
        if (axis := _axis(each)) is not None:
            cuts[axis] = cuts.get(axis, 1) * x.device_mesh.size(number)
    kept = {axis: kept_axis(x.shape, shape, axis, count) for axis, count in cuts.items()}
    x = _uncut(x, [axis for axis, at in kept.items() if at is None])
    placed = [_moved(each, lambda axis: kept[axis] or 0) for each in x.placements]
    local = [len(each) for each in places(shape, x, placed)]
    return _joined(verb(part(x), local), x, shape, placed)


def stack(verb: Verb, tensors: Sequence[Any], axis: int) -> Any:
    """The tensors along a new axis, which is whole; the others are cut as the first's."""
    first, *rest = tensors
    first = _summed(first)
    held = places(first.shape, first)
    moved = [_moved(each, lambda old: old + (old >= axis)) for each in first.placements]
    parts = [part(first), *(_operand(each, first, held) for each in rest)]
    return _joined(verb(parts, axis), first, [*first.shape[:axis], len(tensors), *first.shape[axis:]], moved)


def concat(verb: Verb, tensors: Sequence[Any], axis: int) -> Any:
    """The tensors one after the other, cut as the first. If the axis is cut, elements move."""
    first = _summed(tensors[0])
    axis %= first.ndim
    whole = _uncut(first, [axis])
    parts = [part(whole)]
    for each in tensors[1:]:
        if owns(each) and each.device_mesh == whole.device_mesh:
            parts.append(part(each.redistribute(placements=whole.placements)))
            continue
        held = places(whole.shape, whole)
        held[axis] = np.arange(each.shape[axis])
        parts.append(_operand(each, whole, held))
    shape = list(first.shape)
    shape[axis] = sum(each.shape[axis] for each in tensors)
    return _joined(verb(parts, axis), whole, shape).redistribute(placements=first.placements)


VERBS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("full", "add", "multiply", "clip", "cast"), elementwise),
    **{row.__name__: row for row in (like, put, take, transpose, reshape, stack, concat)},
}


def get(x: Any, index: Any) -> Any:
    """x[index] by the library's own rules; a slice along an axis that is cut moves elements."""
    return x.detach()[index].clone()


def beside(value: Any, x: Any, axes: Sequence[int] | None = None) -> Any:
    """A tensor that each process has as one on the mesh of x, cut as x is along some axes: by default those of one
    length."""
    if axes is None:
        axes = [axis for axis, (new, old) in enumerate(zip(value.shape, x.shape, strict=False)) if new == old]
    placed = [each if _axis(each) in axes else _library().Replicate() for each in x.placements]
    return _joined(_cut(value, places(value.shape, x, placed)).clone(), x, value.shape, placed)


def filled(x: Any, read: Callable[[tuple[Array, ...]], Any]) -> Any:
    """A tensor like x of parts that are read: each process reads what it will hold."""
    x = _summed(x)
    return _joined(read(tuple(places(x.shape, x))), x)


def refuse(x: Any) -> None:
    """Raise if the host has not all of the values."""
    if owns(x):
        raise Unsupported(
            f"{type(x).__name__}[{', '.join(map(str, x.shape))}] is spread over processes, and its values are not here",
            hint="x.full_tensor(), in every process, gathers it; torch.distributed.checkpoint.save writes parts",
        )
