"""Mismatches: what becomes of a pair of leaves whose shapes differ, decided from their paths and shapes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from paramend.arrays.losses import on_host
from paramend.arrays.registry import backend
from paramend.errors import SpecMismatch, Unsupported
from paramend.leaves.specs import Spec
from paramend.resize.detection import detected
from paramend.resize.fits import Fit, Shape
from paramend.resize.rules import Resize

Region = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class Meeting:
    """How a leaf of the source becomes values of a leaf of the target that has another shape."""

    did: str  # the same in words
    taken: int  # how many of the values represent values of the source
    make: Callable[[Any], Any]  # the leaf of the source, of any library → the values
    into: Region | None = None  # where they go in the target; None: they fill it
    kind: str = "resize"  # "corner", "center" or "tile", for old numbers in other places; "resize", for new ones

    @property
    def computed(self) -> bool:
        return self.kind == "resize"


def overlapping(place: str, old: Shape, new: Shape) -> Meeting:
    """The values that fit both shapes, at a place.

    The smaller half of an odd difference comes before, as in `(n - m) // 2`.

    >>> overlapping("center", (2, 6), (5, 3)).did
    'center [:, 1:4] copied to [1:3, :]'
    """
    if len(old) != len(new):
        raise SpecMismatch("the number of axes differs")
    common = tuple(map(min, old, new))
    if place == "tile":
        if 0 in old:
            raise SpecMismatch("there is nothing to repeat")
        both = enumerate(zip(old, new, strict=True))
        repeats = " and ".join(f"{a} → {b} on axis {axis}" for axis, (a, b) in both if a != b)
        return Meeting(f"tiled {repeats}", math.prod(new), partial(_tiled, shape=new), kind=place)
    if place == "corner":
        corner = tuple(slice(0, size) for size in common)
        said = f"corner [{', '.join(f':{size}' for size in common)}] copied"
        return Meeting(said, math.prod(common), partial(_part, region=corner), corner, place)
    out, into = (tuple(map(_middle, shape, common)) for shape in (old, new))
    said = f"center {_written(out, old)} copied to {_written(into, new)}"
    return Meeting(said, math.prod(common), partial(_part, region=out), into, place)


def _middle(size: int, part: int) -> slice:
    start = (size - part) // 2
    return slice(start, start + part)


def _written(region: Region, shape: Shape) -> str:
    both = zip(region, shape, strict=True)
    parts = (":" if part == slice(0, size) else f"{part.start}:{part.stop}" for part, size in both)
    return f"[{', '.join(parts)}]"


def _part(value: Any, region: Region) -> Any:
    return backend(value).get(value, region)


def _tiled(value: Any, shape: Shape) -> Any:
    return on_host(value)[np.ix_(*(np.arange(size) % old for size, old in zip(shape, value.shape, strict=True)))]


def resizing(rule: Resize | None, path: Sequence[str], old: Spec, new: Spec) -> Meeting:
    """The values by a rule of `pm.resize`; without one, by the rule that the name and the shapes suggest."""
    if (old.kind, new.kind) != ("float", "float"):
        raise SpecMismatch("only floating point values can be resized")
    given = rule or detected(path, old.shape, new.shape)
    fit = given.planned(old.shape, new.shape, path)
    found = "" if rule else f" (detected: {given.kind})"
    return Meeting(fit.did + found, fit.taken, partial(_made, fit=fit))


def _made(value: Any, fit: Fit) -> Any:
    host = on_host(value)
    if not isinstance(host, np.ndarray | np.generic):
        raise Unsupported("a traced array cannot be resized", hint="graft outside of jax.jit")
    return fit.make(np.asarray(host))
