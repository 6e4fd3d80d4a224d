"""Blends: how much of each model a leaf gets, by the angles between the models.

Each function takes the dot products of all models with each other, as vectors of all elements of a leaf (of their
changes, if there is a base), and returns a factor for each.
"""

import itertools
import math

import numpy as np

from paramend.errors import SpecMismatch
from paramend.leaves.specs import Array
from paramend.merging.settings import Settings

# Vectors this short have no direction, and those with a greater cosine are blended along a straight line.
_SHORT, _STRAIGHT = 1e-8, 0.9995
_ROUNDS, _NEAR = 100, 1e-10


def slerp(dots: Array, settings: Settings) -> Array:
    """Along the arc from one to the other.

    >>> slerp(np.eye(2), Settings("slerp", (1, 1))).round(7).tolist()
    [0.7071068, 0.7071068]
    """
    lengths, t = _lengths(dots), settings.t
    cosine = float(np.clip(dots[0, 1] / lengths.prod(), -1, 1)) if lengths.min() > _SHORT else 0.0
    if cosine < -_STRAIGHT and settings.convention != "mergekit":
        raise SpecMismatch("the two point in opposite directions, and no arc leads from one to the other")
    if abs(cosine) > _STRAIGHT:
        return np.array([1 - t, t])
    angle = np.arccos(cosine)
    return np.asarray(np.sin(np.array([1 - t, t]) * angle) / np.sin(angle))


def model_stock(dots: Array, settings: Settings) -> Array:
    """From the base towards the mean, the further the better the changes agree.

    >>> model_stock(np.eye(2), Settings("model_stock", (1, 1))).tolist()  # at right angles they tell nothing
    [0.0, 0.0]
    """
    count, lengths = len(dots), _lengths(dots)
    least = 1e-6 if settings.convention == "mergekit" else np.finfo(float).tiny
    pairs = itertools.combinations(range(count), 2)
    cosine = np.mean([np.clip(dots[i, j] / max(lengths[i] * lengths[j], least), -1, 1) for i, j in pairs])
    below = 1 + (count - 1) * cosine
    return np.full(count, 0.0 if abs(below) < 1e-6 else cosine / below)


def karcher(dots: Array, settings: Settings) -> Array:
    """The mean on the sphere, from which the directions of all cancel out, with the mean of their lengths."""
    lengths, weights = _lengths(dots), np.array(settings.weights) / sum(settings.weights)
    length = float(weights @ lengths)
    some = lengths > _SHORT
    if not some.any():
        return np.zeros(len(dots))
    shares = np.where(some, weights, 0) / weights[some].sum()
    units = dots / np.outer(np.where(some, lengths, 1), np.where(some, lengths, 1))
    mean, size = shares, _length(shares, units)
    mean = shares / size if size > _SHORT else np.eye(len(dots))[int(some.argmax())]
    for _ in range(_ROUNDS):
        cosines = np.clip(units @ mean, -1, 1)
        angles = np.arccos(cosines)
        pulls = shares * np.where(angles < _SHORT, 0, angles / np.maximum(np.sin(angles), _SHORT))
        step = pulls - (pulls @ cosines) * mean
        size = _length(step, units)
        if size < _NEAR:
            break
        mean = np.cos(size) * mean + np.sin(size) / size * step
        mean = mean / _length(mean, units)
    return np.asarray(length * mean / np.where(some, lengths, 1))


def multislerp(dots: Array, settings: Settings) -> Array:
    """From the weighted mean of the directions once along the sphere, with the mean of their lengths."""
    lengths, weights = _lengths(dots), np.array(settings.weights)
    weights = weights / weights.sum() if settings.divide is not False else weights
    safe = np.where(lengths > _SHORT, lengths, 1)
    units = dots / np.outer(safe, safe)
    size = _length(weights, units)
    if size < _SHORT:
        if len(dots) > 2 and lengths.max() > _SHORT:
            raise SpecMismatch("the weighted directions of the models cancel out: their mean is zero")
        return weights
    mean = weights / size
    step = weights - (weights @ (units @ mean)) * mean
    size = _length(step, units) + _SHORT
    found = np.cos(size) * mean + np.sin(size) / size * step
    return np.asarray(found * (lengths @ weights) / safe)


def _lengths(dots: Array) -> Array:
    return np.asarray(np.sqrt(np.diagonal(dots)))


def _length(shares: Array, dots: Array) -> float:
    """The length of a sum of vectors with these factors."""
    return math.sqrt(max(float(shares @ dots @ shares), 0))
