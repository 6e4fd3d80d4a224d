"""Resizing: the values of an array for another shape, computed by numpy from the array and numbers alone.

Each function takes and returns a numpy array; the caller handles dtypes. Small arrays are computed in
float64, large ones in float32.
"""

from __future__ import annotations  # numpy.random is slow to import, and annotations would import it

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from paramend.leaves.specs import Array

# The number of elements up to which float64 costs little; larger arrays are read in pieces of this size.
_SMALL = 1 << 22


def _wide(x: Array) -> Array:
    """The array in the dtype to compute in, which represents all of its values."""
    return x.astype(np.float64 if x.size <= _SMALL or x.dtype == np.float64 else np.float32, copy=False)


def _cubic(a: float, distance: Array) -> Array:
    """Keys' cubic convolution kernel (1981) with the parameter a."""
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def _triangle(distance: Array) -> Array:
    found: Array = np.maximum(1 - np.abs(distance), 0.0)
    return found


def weights(old: int, new: int, *, cubic: bool, antialias: bool) -> Array:
    """The matrix (new, old) that interpolates along one axis, as torch does with align_corners=False. With antialias
    the kernel widens when the axis shrinks, and cubic means a = -0.5, as in Pillow and jax.image; without, cubic means
    a = -0.75, as in torch and OpenCV. Positions outside take the values of the edge.

    >>> weights(2, 4, cubic=False, antialias=False)
    array([[1.  , 0.  ],
           [0.75, 0.25],
           [0.25, 0.75],
           [0.  , 1.  ]])
    """
    if old == new:
        return np.eye(old)
    scale = old / new
    center = (np.arange(new)[:, None] + 0.5) * scale
    if antialias:
        distance = (np.arange(old)[None, :] + 0.5 - center) / max(scale, 1.0)
        found = _cubic(-0.5, distance) if cubic else _triangle(distance)
        found /= found.sum(axis=1, keepdims=True)
        return found
    places = center - 0.5
    if not cubic:
        places = np.clip(places, 0, old - 1)
    first = np.floor(places).astype(int)
    reached = first + (np.arange(-1, 3) if cubic else np.arange(2))
    share = _cubic(-0.75, places - reached) if cubic else _triangle(places - reached)
    found = np.zeros((new, old))
    np.add.at(found, (np.arange(new)[:, None], np.clip(reached, 0, old - 1)), share)
    return found


def _along(x: Array, axis: int, matrix: Array) -> Array:
    moved = np.tensordot(matrix.astype(x.dtype), x, axes=(1, axis))
    return np.moveaxis(moved, 0, axis)


def interpolated(x: Array, sizes: Mapping[int, int], *, cubic: bool, antialias: bool) -> Array:
    """The array with other sizes along some axes."""
    return _interpolated(_wide(x), sizes, cubic, antialias)


def _interpolated(x: Array, sizes: Mapping[int, int], cubic: bool, antialias: bool) -> Array:
    for axis, size in sizes.items():
        x = _along(x, axis, weights(x.shape[axis], size, cubic=cubic, antialias=antialias))
    return x


def grid(
    x: Array, axis: int, *, prefix: int, old: tuple[int, int], new: tuple[int, int], cubic: bool, antialias: bool
) -> Array:
    """A table of positions along an axis: `prefix` tokens unchanged, then a resized grid, row by row."""
    x = np.moveaxis(_wide(x), axis, 0)
    rest = x.shape[1:]
    cells = x[prefix:].reshape(*old, *rest)
    cells = _interpolated(cells, {0: new[0], 1: new[1]}, cubic, antialias)
    return np.moveaxis(np.concatenate([x[:prefix], cells.reshape(-1, *rest)]), 0, axis)


def patches(x: Array, sizes: Mapping[int, int], *, cubic: bool, antialias: bool) -> Array:
    """A patch kernel for patches of another size, by pseudo-inverse (FlexiViT, arXiv 2212.08013, section 3.4).

    With B the interpolation of a patch, the new kernel w' = pinv(B.T) w is the one whose outputs for resized patches
    B x are closest to those of w for x, and equal to them when patches grow. B is a Kronecker product of one matrix
    per axis, and so is its pseudo-inverse.

    >>> kernel = np.array([1.0, 2.0])
    >>> wider = patches(kernel, {0: 4}, cubic=False, antialias=False)
    >>> float(kernel @ [3.0, 5.0]), round(float(wider @ [3.0, 3.5, 4.5, 5.0]), 12)
    (13.0, 13.0)
    """
    x = _wide(x)
    for axis, size in sizes.items():
        x = _along(x, axis, np.linalg.pinv(weights(x.shape[axis], size, cubic=cubic, antialias=antialias).T))
    return x


def flat_patches(
    x: Array, axis: int, *, channels_first: bool, channels: int, old: int, new: int, cubic: bool, antialias: bool
) -> Array:
    """Like `patches`, for a linear layer whose inputs along an axis are square patches, flattened with channels."""
    x = np.moveaxis(x, axis, 0)
    rest = x.shape[1:]
    square = (channels, old, old) if channels_first else (old, old, channels)
    first = 1 if channels_first else 0
    x = patches(x.reshape(*square, *rest), {first: new, first + 1: new}, cubic=cubic, antialias=antialias)
    return np.moveaxis(x.reshape(-1, *rest), 0, axis)


def channels(x: Array, axis: int, count: int, *, gray: bool) -> Array:
    """A kernel for another number of input channels.

    With gray, the output for an image with equal channels stays: of more channels, number j takes the kernel of old
    channel j modulo the old count, divided among those that share it; of fewer, each takes an equal share of the
    sum. If the new count is a multiple of the old, or 1, timm's `adapt_input_conv` does the same; otherwise that
    function does not keep the output. Without gray, the old channels stay, and added ones are zero.

    >>> channels(np.array([[1.0, 2.0, 3.0]]), 1, 4, gray=True)
    array([[0.5, 2. , 3. , 0.5]])
    >>> channels(np.array([[1.0, 2.0, 3.0]]), 1, 4, gray=False)
    array([[1., 2., 3., 0.]])
    """
    x = _wide(x)
    old = x.shape[axis]
    if not gray:
        matrix = np.eye(count, old)
    elif count < old:
        matrix = np.full((count, old), 1 / count)
    else:
        matrix = (np.arange(count)[:, None] % old == np.arange(old)).astype(float)
        matrix /= matrix.sum(axis=0)
    return _along(x, axis, matrix)


# The variance of fresh rows relative to the old: small enough that no row outweighs an old one, and the value in
# `resize_token_embeddings` of transformers.
_SHARE = 1e-9


def rows(x: Array, axis: int, count: int, fresh: str, rng: np.random.Generator) -> Array:
    """An array with another number of rows along an axis: the old ones bit for bit, then fresh ones; or the first ones.
    Rows are read in pieces, so that besides the result only a few of them are in memory in float64. The result is
    float32, or float64 for a float64 array. Fresh rows are as `Fresh` in `vocabulary`.

    >>> rows(np.array([[1.0, 2.0], [3.0, 6.0]]), 0, 3, "mean", np.random.default_rng(0))
    array([[1., 2.],
           [3., 6.],
           [2., 4.]])
    """
    shape = list(x.shape)
    old, shape[axis] = shape[axis], count
    out = np.zeros(shape, np.float64 if x.dtype == np.float64 else np.float32)
    into, given = np.moveaxis(out, axis, 0), np.moveaxis(x, axis, 0)
    into[: min(old, count)] = given[:count]
    if count > old and fresh != "zeros":
        into[old:] = _fresh(given, count - old, fresh, rng).reshape(count - old, *given.shape[1:])
    return out


def _fresh(given: Array, wanted: int, fresh: str, rng: np.random.Generator) -> Array:
    old, width = len(given), math.prod(given.shape[1:])
    step = max(1, _SMALL // max(width, wanted))

    def pieces() -> Any:
        for start in range(0, old, step):
            piece = given[start : start + step]
            yield piece.reshape(len(piece), width).astype(np.float64)

    if fresh == "random":
        mean = sum(piece.sum() for piece in pieces()) / (old * width)
        variance = sum(((piece - mean) ** 2).sum() for piece in pieces()) / (old * width)
        return math.sqrt(variance) * rng.standard_normal((wanted, width), dtype=np.float32)
    center = sum(piece.sum(axis=0) for piece in pieces()) / old
    drawn = np.broadcast_to(center, (wanted, width))
    if fresh == "mean+cov":
        # Normal weights over the centred rows give exactly their covariance, even if it is singular.
        for piece in pieces():
            shares = rng.standard_normal((wanted, len(piece)), dtype=np.float32)
            drawn = drawn + math.sqrt(_SHARE / old) * (shares @ (piece - center).astype(np.float32))
    return drawn
