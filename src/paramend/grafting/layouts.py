"""Layouts: two ways to store one weight, told by the names and shapes of a pair of leaves.

Torch and Equinox say weight and put the outputs first; Flax says kernel, Haiku says w, and the outputs are last. Where
a rename brings the two together, equal shapes prove nothing: a square matrix fits either way.
"""

import re
from collections.abc import Iterable, Sequence

from paramend.arrays.registry import backend
from paramend.leaves.leaves import Leaves
from paramend.leaves.specs import Spec
from paramend.trees.tree import Tree

Shape = tuple[int, ...]

_FIRST = re.compile(r"(.*_)?weight(_(ih|hh)_l\d+(_reverse)?|_orig)?").fullmatch
_LAST = re.compile(r"(.*_)?kernel|w").fullmatch
_SPACE = ("", "length, ", "height, width, ", "depth, height, width, ")


def crossed(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether the names of a leaf of the target and one of the source say that they are stored in different ways.

    >>> crossed(["fc", "kernel"], ["fc", "weight"]), crossed(["fc", "kernel"], ["fc", "kernel"])
    (True, False)
    """
    pair = ours[-1] if ours else "", theirs[-1] if theirs else ""
    return bool((_FIRST(pair[0]) and _LAST(pair[1])) or (_LAST(pair[0]) and _FIRST(pair[1])))


def outputs_last(name: Sequence[str]) -> bool:
    """Whether a name says that the outputs are the last axis."""
    return bool(name and _LAST(name[-1]))


def axes_to_last(ndim: int) -> tuple[int, ...]:
    """The permutation of axes that takes a torch weight to a Flax kernel.

    >>> axes_to_last(2), axes_to_last(4)
    ((1, 0), (2, 3, 1, 0))
    """
    return (*range(2, ndim), 1, 0)


def axes_to_first(ndim: int) -> tuple[int, ...]:
    """The permutation of axes that takes a Flax kernel to a torch weight."""
    return (ndim - 1, ndim - 2, *range(ndim - 2))


def _matrices(ndim: int) -> tuple[int, ...]:
    """The permutation that transposes each matrix of a stack."""
    return (*range(ndim - 2), ndim - 1, ndim - 2)


def permuted(shape: Shape, axes: Iterable[int]) -> Shape:
    """A shape with its axes in another order."""
    return tuple(shape[axis] for axis in axes)


def proves(ours: Spec, theirs: Spec) -> bool:
    """Whether a pair of leaves with crossed names is stored alike after all: the shapes agree, and only as they are."""
    if ours.shape != theirs.shape or ours.ndim < 2:
        return False
    return all(permuted(ours.shape, order(ours.ndim)) != ours.shape for order in (axes_to_last, axes_to_first))


def transposing(ours: Spec, theirs: Spec) -> tuple[int, ...]:
    """The permutation of axes that makes one shape of the other, where they differ; `()` if there is none.

    >>> transposing(Spec((3, 4), "float32"), Spec((4, 3), "float32"))
    (1, 0)
    """
    if ours.ndim != theirs.ndim or ours.ndim < 2 or ours.shape == theirs.shape:
        return ()
    orders = (axes_to_last(ours.ndim), axes_to_first(ours.ndim), tuple(range(ours.ndim))[::-1], _matrices(ours.ndim))
    return next((order for order in orders if permuted(theirs.shape, order) == ours.shape), ())


def axes(name: Sequence[str], ours: Spec, theirs: Spec) -> tuple[int, ...]:
    """The permutation of axes for a leaf of the target with a crossed name.

    Where that of a convolution does not fit and a transposition of the last two axes does, as in a stack of matrices,
    it is that.
    """
    ndim = ours.ndim
    order = axes_to_last(ndim) if outputs_last(name) else axes_to_first(ndim)
    stack = _matrices(ndim)
    fits = [permuted(theirs.shape, each) == ours.shape for each in (order, stack)]
    return stack if fits == [False, True] else order


def said(name: Sequence[str], ours: Spec, theirs: Spec) -> str:
    """What the axes of a pair of leaves with crossed names are."""
    if ours.ndim != theirs.ndim:
        return "transposed, and with another number of axes"
    if ours.ndim > 2 and axes(name, ours, theirs)[0] == 0:
        return "each matrix transposed"
    space = _SPACE[min(ours.ndim - 2, 3)]
    first = f"weight (out, in{', ' + space[:-2] if space else ''})"
    last = f"{name[-1] if outputs_last(name) else 'kernel'} ({space}in, out)"
    return f"transposed, a {first} for a {last}" if outputs_last(name) else f"transposed, a {last} for a {first}"


def code(order: tuple[int, ...], source: Leaves, number: int) -> str:
    """The code that permutes the axes of a leaf of the source."""
    if order == (1, 0):
        return ".T"
    torch = isinstance(source, Tree) and str(getattr(backend(source.read(number)), "__name__", "")).endswith(".torch")
    return f".{'permute' if torch else 'transpose'}({', '.join(map(str, order))})"
