"""Fits: what each kind of rule does to turn one shape into another, known from the shapes alone."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from paramend.arrays.initializers import Site, generator
from paramend.errors import SpecMismatch
from paramend.leaves.specs import Array
from paramend.reports import wording
from paramend.resize import arithmetic

Shape = tuple[int, ...]
Grid = tuple[int, int]
Path = tuple[str, ...]

# Methods of interpolation: along how many axes, and whether with the cubic kernel.
METHODS = {"bicubic": (2, True), "bilinear": (2, False), "linear": (1, False), "cubic": (1, True)}
# Class token, distillation token and registers: the most prefix tokens to look for.
_MOST_PREFIX = 8


@dataclass(frozen=True, slots=True)
class Fit:
    """What a rule does to turn one shape into another."""

    did: str  # the same in words
    taken: int  # how many of the new values come from old ones
    make: Callable[[Array], Array]  # an array → its values in the new shape, in float32 or float64


def positions(
    old: Shape,
    new: Shape,
    _: Path,
    *,
    prefix: int | None,
    grid: Grid | None,
    new_grid: Grid | None,
    method: str,
    antialias: bool,
) -> Fit:
    """Positions over a grid or along a sequence."""
    axes = _differing(old, new, "positions") or (_holding(old, prefix, grid) if grid else [])
    along, cubic = METHODS[method]
    others = sum(size > 1 for axis, size in enumerate(old) if axis not in axes)
    if along == 2 and others and (len(axes) == 2 or (len(axes) == 1 and others > 1)):
        return _spread(old, new, axes, prefix, grid or new_grid, method, antialias)
    where = "the positions of a grid are along one axis, or rows and columns have one each"
    axis = _only(axes, old, new, where if along == 2 else "the positions of a sequence are along one axis")
    if axis == len(old) - 1 > 0:
        raise SpecMismatch(f"{_sizes(old)} → {_sizes(new)}: the last axis is the width of a position, not their number")
    if along == 2:
        kept, before, after = grids(old[axis], new[axis], prefix, grid, new_grid)
        said = f"{_by(before)} → {_by(after)}"
    else:
        kept = prefix or 0
        before, after = (old[axis] - kept, 1), (new[axis] - kept, 1)
        said = f"{old[axis]:,} → {new[axis]:,} positions"
        if min(before[0], after[0]) < 1:
            raise SpecMismatch(f"{said}: nothing is left after {wording.plural(kept, 'prefix token')}")
    make = partial(arithmetic.grid, axis=axis, prefix=kept, old=before, new=after, cubic=cubic, antialias=antialias)
    tokens = f", {wording.plural(kept, 'prefix token')}" if kept else ""
    return Fit(f"resized {said}{tokens}, {method}", math.prod(new), make)


def _spread(
    old: Shape, new: Shape, axes: list[int], prefix: int | None, grid: Grid | None, method: str, antialias: bool
) -> Fit:
    if prefix or grid:
        raise SpecMismatch(
            f"{_sizes(old)} → {_sizes(new)}: rows and columns have separate axes, which need no prefix or grid"
        )
    if axes[-1] - axes[0] > 1:
        raise SpecMismatch(f"{_sizes(old)} → {_sizes(new)}: axes {axes[0]} and {axes[1]} are not rows and columns")
    make = partial(
        arithmetic.interpolated, sizes={axis: new[axis] for axis in axes}, cubic=METHODS[method][1], antialias=antialias
    )
    said = " and ".join(f"{old[axis]} → {new[axis]} on axis {axis}" for axis in axes)
    if len(axes) == 2:
        said = f"{_by(old[axis] for axis in axes)} → {_by(new[axis] for axis in axes)}"
    return Fit(f"resized {said}, {method}", math.prod(new), make)


def _holding(old: Shape, prefix: int | None, grid: Grid) -> list[int]:
    count = math.prod(grid)
    sizes = range(count, count + _MOST_PREFIX + 1) if prefix is None else (count + prefix,)
    return [axis for axis, size in enumerate(old) if size in sizes]


def grids(
    old: int, new: int, prefix: int | None = None, grid: Grid | None = None, new_grid: Grid | None = None
) -> tuple[int, Grid, Grid]:
    """The prefix and the two grids that make up these numbers of positions; `SpecMismatch` if there are none.

    >>> grids(197, 577)
    (1, (14, 14), (24, 24))
    """
    left = {count - math.prod(size) for count, size in ((old, grid), (new, new_grid)) if size is not None}
    # Of the squares above 1 only 4, 9 and 9, 16 differ by 8 or less, so at most one prefix fits both counts.
    for kept in [prefix] if prefix is not None else sorted(left) or range(_MOST_PREFIX + 1):
        before, after = grid or _square(old - kept), new_grid or _square(new - kept)
        if kept >= 0 and before and after and math.prod(before) + kept == old and math.prod(after) + kept == new:
            return kept, before, after
    said = f"{old:,} → {new:,} positions"
    if grid or new_grid:
        both = f"{_by(grid) if grid else 'a square'} and {_by(new_grid) if new_grid else 'a square'}"
        raise SpecMismatch(f"{said} are not {both} after the same number of prefix tokens")
    tokens = f"{prefix}" if prefix is not None else f"0 to {_MOST_PREFIX}"
    raise SpecMismatch(
        f"{said} are not two square grids after {tokens} prefix tokens; "
        'grid=(h, w) and new_grid=(h, w) give others, and method="linear" is for a sequence',
        hint='pm.resize.positions(method="linear")',
    )


def _square(count: int) -> Grid | None:
    side = math.isqrt(max(count, 0))
    return (side, side) if side * side == count and side > 1 else None


def vocabulary(old: Shape, new: Shape, path: Path, *, rows: str, axis: int | None, shrink: bool, seed: int) -> Fit:
    """Rows of an embedding, an output layer or its bias."""
    axes = _differing(old, new, "a vocabulary")
    axis = _only(axes, old, new, "a vocabulary is counted along one axis") if axis is None else axis
    if not -len(old) <= axis < len(old) or axes != [axis % len(old)]:
        raise SpecMismatch(f"{_sizes(old)} → {_sizes(new)}: axis {axis} must be the only one that differs")
    axis %= len(old)
    before, after = old[axis], new[axis]
    said = f"resized {before:,} → {after:,} rows{f' on axis {axis}' * bool(axis)}"
    if after < before:
        if not shrink:
            raise SpecMismatch(
                f"{before:,} → {after:,} rows would drop {before - after:,}, which shrink=True allows",
                hint="pm.resize.vocabulary(shrink=True)",
            )
        said += f", the last {before - after:,} dropped"
    else:
        said += f", {after - before:,} fresh: {rows}"
    taken = math.prod(new) // after * min(before, after)
    return Fit(said, taken, partial(_rows, axis=axis, count=after, fresh=rows, seed=seed, path=path))


def _rows(x: Array, *, axis: int, count: int, fresh: str, seed: int, path: Path) -> Array:
    return arithmetic.rows(x, axis, count, fresh, generator(seed, Site(path)))


def patches(
    old: Shape, new: Shape, path: Path, *, method: str, antialias: bool, flat: str | None, channels: int
) -> Fit:
    """A patch embedding."""
    axes = _differing(old, new, "a patch embedding")
    cubic = METHODS[method][1]
    if len(old) == 2:
        axis = _only(axes, old, new, "flattened patches are along one axis")
        sides = [_square(size // channels) for size in (old[axis], new[axis])]
        if None in sides or any(size % channels for size in (old[axis], new[axis])):
            raise SpecMismatch(
                f"{old[axis]:,} → {new[axis]:,} inputs are not square patches of {wording.plural(channels, 'channel')}"
            )
        if flat is None and channels > 1:
            raise SpecMismatch(
                'shapes do not tell the order of flattened patches: flat="chw" or flat="hwc"',
                hint='pm.resize.patches(flat="chw")',
            )
        before, after = (side[0] for side in sides if side)
        make = partial(
            arithmetic.flat_patches,
            axis=axis,
            channels_first=flat == "chw",
            channels=channels,
            old=before,
            new=after,
            cubic=cubic,
            antialias=antialias,
        )
        both = (before, before), (after, after)
    else:
        if len(old) != 4 or flat is not None:
            wanted = "2 axes" if flat is not None else "4 axes, or 2 if patches are flattened"
            raise SpecMismatch(f"a patch embedding has {wanted}, but this is {_sizes(old)}")
        layout = _layout(path) or ("out, in, h, w" if set(axes) <= {2, 3} else "h, w, in, out")
        spread = (2, 3) if layout == "out, in, h, w" else (0, 1)
        if not axes or not set(axes) <= set(spread):
            raise SpecMismatch(f"{_sizes(old)} → {_sizes(new)}: patches of ({layout}) differ only in h and w")
        both = (old[spread[0]], old[spread[1]]), (new[spread[0]], new[spread[1]])
        make = partial(arithmetic.patches, sizes={axis: new[axis] for axis in axes}, cubic=cubic, antialias=antialias)
    return Fit(f"resized {_by(both[0])} → {_by(both[1])} patches, pseudo-inverse, {method}", math.prod(new), make)


def channels(old: Shape, new: Shape, path: Path, *, keep: str) -> Fit:
    """The input channels of a kernel."""
    axis = _only(_differing(old, new, "a kernel"), old, new, "input channels are one axis")
    layout = _layout(path)
    places = {"out, in, h, w": (1,), "h, w, in, out": (len(old) - 2,)}.get(layout, (1, len(old) - 2))
    if len(old) < 2 or axis not in places:
        said = layout or "out, in, ...) or (..., in, out"
        raise SpecMismatch(f"axis {axis} of {_sizes(old)} does not count input channels as ({said})")
    before, after = old[axis], new[axis]
    if keep == "rgb" and after < before:
        raise SpecMismatch(f"{before} → {after} channels cannot all be kept", hint="pm.resize.channels()")
    said = f"resized {before:,} → {after:,} input channels, {keep} kept"
    taken = math.prod(new) if keep == "gray" else math.prod(old)
    return Fit(said, taken, partial(arithmetic.channels, axis=axis, count=after, gray=keep == "gray"))


def _layout(path: Path) -> str:
    """The layout of a kernel by its name: torch and Equinox say weight, Flax says kernel; "" for another name."""
    return {"weight": "out, in, h, w", "kernel": "h, w, in, out"}.get(path[-1] if path else "", "")


def _differing(old: Shape, new: Shape, what: str) -> list[int]:
    """The axes that differ; raises for shapes without values."""
    if len(old) != len(new):
        raise SpecMismatch(f"{_sizes(old)} → {_sizes(new)}: {what} cannot gain or lose axes")
    if 0 in (*old, *new):
        raise SpecMismatch(f"{_sizes(old)} → {_sizes(new)}: there are no values")
    return [axis for axis, (before, after) in enumerate(zip(old, new, strict=True)) if before != after]


def _only(axes: list[int], old: Shape, new: Shape, rule: str) -> int:
    if len(axes) != 1:
        differ = " and ".join(map(str, axes)) or "none"
        raise SpecMismatch(f"{_sizes(old)} → {_sizes(new)}: {rule}, but here axes {differ} differ")
    return axes[0]


def _sizes(shape: Iterable[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def _by(sizes: Iterable[int]) -> str:
    return "×".join(map(str, sizes))


PLANS: dict[str, Callable[..., Fit]] = {each.__name__: each for each in (positions, vocabulary, patches, channels)}
