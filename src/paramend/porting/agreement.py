"""How far two arrays are apart, whichever way round their axes are."""

from collections.abc import Collection, Iterator

import numpy as np

from paramend.porting.values import Values, largest

Move = tuple[int, int]
# Channels first ↔ channels last, with an axis of examples and without.
MOVES: tuple[Move, ...] = ((1, -1), (-1, 1), (0, -1), (-1, 0))


def moves(target: Values, source: Values) -> set[Move]:
    """The moves of an axis that make the source's array the target's."""
    if not 3 <= source.ndim <= 5 or np.array_equal(target, source):
        return set()
    return {move for move in MOVES if np.array_equal(np.moveaxis(source, *move), target)}


def distance(
    target: Values, source: Values, turned: Collection[Move] | None = None, *, least: float = 0.0
) -> tuple[float, float]:
    """The largest absolute difference, and its share of the largest value; inf for shapes that do not fit.

    Outputs may agree after one of the moves of an axis in `turned`. What layers return (None) may also have axes that
    are split, and time and examples change places. Values below `least` are small.

    >>> distance(np.array([[1.0, 2.0]]), np.array([1.0, 2.5]))
    (0.5, 0.2)
    """
    found = [_difference(target, seen) for seen in _views(source, target.shape, turned)]
    difference = min(found, default=np.inf)
    scale = max(largest(target), largest(source), least)
    return difference, difference / scale if difference else 0.0


def _views(source: Values, shape: tuple[int, ...], turned: Collection[Move] | None) -> Iterator[Values]:
    """The ways to see the source's array in the shape of the target's."""
    if source.size == np.prod(shape) and (turned is None or _squeezed(source.shape) == _squeezed(shape)):
        yield source.reshape(shape)
    views = (
        [np.moveaxis(source, *move) for move in MOVES if turned is None or move in turned]
        if 3 <= source.ndim <= 5
        else []
    )
    views += [source.swapaxes(0, 1)] if turned is None and source.ndim == 3 else []
    yield from (each for each in views if each.shape == shape)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if shape[:1] == (1,) else shape


def _difference(one: Values, other: Values) -> float:
    apart = ~((one == other) | ((one != one) & (other != other)))
    if not apart.any():
        return 0.0
    with np.errstate(invalid="ignore"):
        found = np.abs(one[apart].astype("complex128") - other[apart]).max()
    return float(found) if found == found else np.inf
