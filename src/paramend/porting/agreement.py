"""How far two arrays are apart, whichever way round their axes are."""

from collections.abc import Iterator, Sequence

import numpy as np

from paramend.porting.values import Values

Move = tuple[int, int]
# Channels first ↔ channels last, with an axis of examples and without.
MOVES: tuple[Move, ...] = ((1, -1), (-1, 1), (0, -1), (-1, 0))


def moves(target: Values, source: Values) -> set[Move]:
    """The moves of an axis that make the source's array the target's.

    >>> image = np.arange(24.0).reshape(1, 2, 3, 4)
    >>> moves(np.moveaxis(image, 1, -1), image)
    {(1, -1)}
    """
    if not 3 <= source.ndim <= 5 or np.array_equal(target, source):
        return set()
    return {move for move in MOVES if np.array_equal(np.moveaxis(source, *move), target)}


def distance(
    target: Values, source: Values, allowed: Sequence[Move] = MOVES, *, inside: bool = True, least: float = 0.0
) -> tuple[float, float]:
    """The largest absolute difference, and its share of the largest value; inf for shapes that do not fit.

    Args:
        target: an array.
        source: another one.
        allowed: the moves of an axis after which they may agree.
        inside: whether they are of layers: axes may also be split, and time and examples change places.
        least: the size below which values are small.

    >>> distance(np.array([[1.0, 2.0]]), np.array([1.0, 2.5]))
    (0.5, 0.2)
    """
    found = [_difference(target, seen) for seen in _views(source, target.shape, allowed, inside)]
    difference = min(found, default=np.inf)
    scale = max(_largest(target), _largest(source), least)
    return difference, difference / scale if difference else 0.0


def _views(source: Values, shape: tuple[int, ...], allowed: Sequence[Move], inside: bool) -> Iterator[Values]:
    """The ways to see the source's array in the shape of the target's."""
    if source.size == np.prod(shape) and (inside or _squeezed(source.shape) == _squeezed(shape)):
        yield source.reshape(shape)
    turned = [np.moveaxis(source, *move) for move in allowed] if 3 <= source.ndim <= 5 else []
    turned += [source.swapaxes(0, 1)] if inside and source.ndim == 3 else []
    yield from (each for each in turned if each.shape == shape)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if shape[:1] == (1,) else shape


def _difference(one: Values, other: Values) -> float:
    apart = ~((one == other) | ((one != one) & (other != other)))
    if not apart.any():
        return 0.0
    with np.errstate(invalid="ignore"):
        found = np.abs(one[apart].astype("complex128") - other[apart]).max()
    return float(found) if found == found else np.inf


def _largest(values: Values) -> float:
    return float(np.abs(values[np.isfinite(values)].astype("complex128")).max(initial=0.0))
