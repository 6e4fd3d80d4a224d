"""Several leaves as one along an axis, and one leaf as several: `concat`, `interleave`, `split`."""

from collections.abc import Sequence
from typing import TypeVar, cast

from paramend.edits.memory import editable
from paramend.edits.moves import whole_numbers
from paramend.errors import BadArgument
from paramend.leaves.origins.moved import How
from paramend.mapping.layout import Rule, groups_of
from paramend.mapping.steps import Step as Step
from paramend.selectors.grammar import captures_of
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
        NoMatch, BadArgument: as in `concat`.
        SpecMismatch: shapes or dtypes differ.
        RenameClash, Unsupported: as in `concat`.

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
    lengths = None if sizes is None else whole_numbers(sizes, "sizes", "sizes=[4, 2, 2]")
    if lengths is not None and len(lengths) != len(into):
        raise BadArgument(f"there are {len(into)} new paths, and {len(lengths)} sizes: {lengths}")
    args = {"axis": axis, **({} if lengths is None else {"sizes": lengths})}
    return ruled(tree, [leaf], into, Step("split", args))


def _joined(tree: T, leaves: Sequence[str], into: str, axis: int, how: How) -> T:
    if isinstance(leaves, str) or not leaves:
        raise BadArgument(f"leaves={leaves!r} is not a list of selectors", hint=f'["q", "k"], into="{into}"')
    return ruled(tree, leaves, [into], Step(how, {"axis": axis}))


def ruled(tree: T, sources: Sequence[str], targets: Sequence[str], step: Step) -> T:
    """The tree after a rule of a layout with one step; what it does not take stays."""
    here, there = ({name for path in side for name in captures_of(path)} for side in (sources, targets))
    if here != there:
        why = f"{', '.join(sources)} and {', '.join(targets)} do not have the same numbers"
        raise BadArgument(why, hint=f"<{min(here ^ there)}> on both sides: one new leaf for each")
    leaves = editable(tree)
    for source in sources:
        resolve(source, leaves)
    groups = groups_of(leaves, Rule(tuple(sources), tuple(targets), (step,)))
    return cast(T, leaves.regrouped([group for group, _ in groups]))
