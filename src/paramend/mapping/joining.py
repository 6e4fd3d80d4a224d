"""Several leaves as one along an axis, and one leaf as several: `concat`, `interleave`, `split`."""

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar, cast

from paramend.edits.memory import editable
from paramend.edits.moves import axis_of
from paramend.errors import BadArgument, SpecMismatch
from paramend.leaves.leaves import Editable, Group
from paramend.leaves.origins.moved import How
from paramend.leaves.specs import Spec
from paramend.mapping import hands
from paramend.reports import wording
from paramend.selectors.renames import NewPath, keys, pieces, rename
from paramend.selectors.selector import resolve

T = TypeVar("T")


def concat(tree: T, leaves: Sequence[str], *, into: str, axis: int = 0) -> T:
    """The tree with several leaves as one, one after the other along an axis: separate projections as a fused one.

    Args:
        tree: nested dicts, FrozenDict, lists, an NNX State, a state dict; or a checkpoint opened by `pm.open`, of which
            nothing is read before `.save(out)`.
        leaves: the leaves, first to last, as selectors. With a number or wildcards, as in `"layers.<n>.q.weight"`, one
            leaf is made for each of what they match, which must be the same for all.
        into: the path of the new leaf, with the same wildcards.
        axis: the axis.

    Raises:
        NoMatch: a selector matches nothing.
        BadArgument: one of the leaves is missing where the others are.
        SpecMismatch: dtypes differ, or shapes along another axis.
        RenameClash: something is already at the new path.
        Unsupported: the tree is a module, whose class determines what it holds.

    >>> pm.concat({"q": np.zeros((1, 2)), "k": np.ones((1, 2))}, ["q", "k"], into="qk")
    {'qk': array([[0., 0.],
           [1., 1.]])}
    """
    return _joined(tree, leaves, into, axis, "concat")


def interleave(tree: T, leaves: Sequence[str], *, into: str, axis: int = 0) -> T:
    """The tree with several leaves as one, their places along an axis in turns: place i of leaf j of k goes to i*k + j.

    Args:
        tree: as in `concat`.
        leaves: as in `concat`; all have one shape.
        into: as in `concat`.
        axis: the axis.

    Raises:
        NoMatch: as in `concat`.
        BadArgument: as in `concat`.
        SpecMismatch: shapes or dtypes differ.
        RenameClash: as in `concat`.
        Unsupported: as in `concat`.

    >>> pm.interleave({"gate": np.array([1, 3]), "up": np.array([2, 4])}, ["gate", "up"], into="gate_up")
    {'gate_up': array([1, 2, 3, 4])}
    """
    return _joined(tree, leaves, into, axis, "interleave")


def split(tree: T, leaf: str, *, into: Sequence[str], axis: int = 0, sizes: Sequence[int] | None = None) -> T:
    """The tree with one leaf as several, cut along an axis: the inverse of `concat`.

    Args:
        tree: as in `concat`.
        leaf: the leaf, as a selector; with a number or wildcards each leaf that it matches is cut.
        into: the paths of the parts, first to last, with the same wildcards.
        axis: the axis.
        sizes: the length of each part along the axis; by default all are equal.

    Raises:
        NoMatch: the selector matches nothing.
        BadArgument: there are no new paths, or as many sizes are not given.
        SpecMismatch: the sizes do not add up to the length, or it cannot be cut into equal parts.
        OutOfRange: there is no such axis.
        RenameClash: something is already at a new path.
        Unsupported: as in `concat`.

    >>> pm.split({"qkv": np.arange(6)}, "qkv", into=["q", "k", "v"])
    {'q': array([0, 1]), 'k': array([2, 3]), 'v': array([4, 5])}
    """
    if isinstance(into, str) or not into:
        raise BadArgument(f"into={into!r} is not a list of paths", hint='into=["q", "k", "v"]')
    if sizes is not None and len(sizes) != len(into):
        raise BadArgument(f"there are {len(into)} new paths, and {len(sizes)} sizes: {list(sizes)}")
    leaves = editable(tree)
    resolve(leaf, leaves)
    paths = [rename(leaf, path).over(leaves.index) for path in into]
    groups = []
    for number in paths[0]:
        cuts, at = _cuts(leaves.index.path(number), leaves.spec(number), axis, len(into), sizes)
        new = tuple(keys(path[number]) for path in paths)
        groups.append(Group((number,), new, partial(_cut, cuts, at)))
    return cast(T, leaves.regrouped(groups))


def _cuts(path: str, spec: Spec, axis: int, count: int, sizes: Sequence[int] | None) -> tuple[list[range], int]:
    """The places of each part along the axis, and the axis counted from the front."""
    at = axis_of(spec, axis)
    length = spec.shape[at]
    if sizes is None and length % count:
        raise SpecMismatch(f"{path}: axis {at} of {spec} cannot be cut into {count} equal parts", hint="sizes=[...]")
    lengths = [length // count] * count if sizes is None else [int(size) for size in sizes]
    if sum(lengths) != length or min(lengths) < 0:
        raise SpecMismatch(f"{path}: the sizes {lengths} do not add up to {length:,}, axis {at} of {spec}")
    ends = [sum(lengths[: place + 1]) for place in range(count)]
    return [range(end - size, end) for end, size in zip(ends, lengths, strict=True)], at


def _cut(cuts: Sequence[range], axis: int, values: Sequence[Any]) -> list[Any]:
    return [hands.take(values[0], places, axis) for places in cuts]


def _whole(axis: int, how: How, values: Sequence[Any]) -> list[Any]:
    return [hands.join(values, axis, how)]


def _joined(tree: T, leaves: Sequence[str], into: str, axis: int, how: How) -> T:
    if isinstance(leaves, str) or not leaves:
        raise BadArgument(f"leaves={leaves!r} is not a list of selectors", hint=f'["q", "k"], into="{into}"')
    opened = editable(tree)
    found: dict[tuple[str, ...], tuple[NewPath, dict[int, int]]] = {}
    for place, leaf in enumerate(leaves):
        resolve(leaf, opened)
        for number, path in rename(leaf, into).over(opened.index).items():
            found.setdefault(pieces(path), (path, {}))[1][place] = number
    groups = []
    for name, (path, numbers) in found.items():
        lacking = [leaf for place, leaf in enumerate(leaves) if place not in numbers]
        if lacking:
            raise BadArgument(f"there is no {wording.listing(lacking)} for {'/'.join(name)}")
        chosen = [numbers[place] for place in range(len(leaves))]
        at = _check(opened, chosen, axis, how)
        groups.append(Group(tuple(chosen), (keys(path),), partial(_whole, at, how)))
    return cast(T, opened.regrouped(groups))


def _check(leaves: Editable, numbers: Sequence[int], axis: int, how: How) -> int:
    """The axis of leaves that are joined, counted from the front."""
    first = leaves.spec(numbers[0])
    at = axis_of(first, axis)
    for number in numbers[1:]:
        spec = leaves.spec(number)
        ours, theirs = list(first.shape), list(spec.shape)
        if how == "concat" and len(ours) == len(theirs):
            ours[at] = theirs[at]
        if (ours, first.dtype) != (theirs, spec.dtype):
            one, other = leaves.index.path(numbers[0]), leaves.index.path(number)
            raise SpecMismatch(f"{one} is {first}, and {other} is {spec}: {how} along axis {at} does not fit")
    return at
