"""Regions: which elements of a leaf a slice names, as small masks that broadcast to the leaf."""

from functools import reduce
from typing import Any

import numpy as np

from paramend.edits.call import sliced_shape

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Region = tuple[Mask, ...]
"""Masks whose conjunction is the region. One vector per axis describes most slices, where one mask of the leaf's
shape would be a constant as large as a quarter of the leaf in every compiled step. `()` is the whole leaf."""

WHOLE: Region = ()


def region_of(index: Any, shape: tuple[int, ...]) -> Region:
    """The elements that a slice of a leaf of this shape names."""
    if index is None:
        return WHOLE
    sliced_shape(shape, index)
    parts = tuple(_part(part) for part in (index if isinstance(index, tuple) else (index,)) if part is not None)
    if not _by_axis(parts):
        mask = np.zeros(shape, bool)
        mask[parts] = True
        return _reduced([mask])
    masks = []
    for axis, part in enumerate(_spread(parts, len(shape))):
        vector = np.zeros(shape[axis], bool)
        vector[part] = True
        masks.append(vector.reshape([-1 if other == axis else 1 for other in range(len(shape))]))
    return _reduced(masks)


def both(one: Region, other: Region) -> Region:
    """The elements in two regions of one leaf."""
    return _reduced([*one, *other])


def is_empty(region: Region) -> bool:
    """Whether a region has no elements."""
    if not all(mask.any() for mask in region):
        return True
    # Vectors along different axes always meet; only a mask of several axes can miss the others.
    crossed = any(sum(length > 1 for length in mask.shape) > 1 for mask in region)
    return len(region) > 1 and crossed and not reduce(np.logical_and, region).any()


def _part(part: Any) -> Any:
    return part if isinstance(part, int | slice | type(...)) else np.asarray(part)


def _by_axis(parts: tuple[Any, ...]) -> bool:
    """Whether each part indexes a separate axis. Two lists index in pairs, and a bool array may span several axes."""
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    return (
        len(arrays) <= 1
        and all(part.dtype != bool for part in arrays)
        and not any(isinstance(part, bool) for part in parts)
    )


def _spread(parts: tuple[Any, ...], ndim: int) -> list[Any]:
    """One part for each axis."""
    places = [place for place, part in enumerate(parts) if part is Ellipsis] or [len(parts)]
    before, after = parts[: places[0]], parts[places[0] + 1 :]
    return [*before, *[slice(None)] * (ndim - len(before) - len(after)), *after]


def _reduced(masks: list[Mask]) -> Region:
    """The region of masks, without those that are all true; masks of equal shape are merged."""
    merged: dict[tuple[int, ...], Mask] = {}
    for mask in masks:
        merged[mask.shape] = merged[mask.shape] & mask if mask.shape in merged else mask
    return tuple(mask for mask in merged.values() if not mask.all())
