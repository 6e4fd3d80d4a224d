"""Stacks in checkpoints: layers are stacked and unstacked by reference; values are read only when saved."""

from collections import Counter
from collections.abc import Mapping, Sequence

from paramend.checkpoints.assemble import Pick, assemble, origin_of
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.errors import RenameClash, Unsupported
from paramend.leaves.leaves import plain
from paramend.leaves.origins.moved import join, reshape, take
from paramend.leaves.origins.origin import Origin
from paramend.leaves.paths import Label, labels
from paramend.reports import wording
from paramend.stacking.plan import Member, Path

# Leaf number → its new path, as `renames.keys` returns it.
Keys = Mapping[int, Sequence[tuple[str, int | None]]]


def stacked(tree: Checkpoint, groups: Sequence[Sequence[Member]], axes: Mapping[Path, int], paths: Keys) -> Checkpoint:
    """The checkpoint with each group of leaves as one leaf, in the position of the first.

    Args:
        tree: the checkpoint.
        groups: the leaves that become one, in layer order.
        axes: path of the stack and within the layer → the new axis.
        paths: the new path of the first leaf of each group.
    """
    places: dict[int, list[Pick]] = {member.number: [] for group in groups for member in group}
    for group in groups:
        first = group[0]
        axis = axes[(*first.stack, *first.rest)]
        parts = [_readable(tree, member.number, axis) for member in group]
        places[first.number].append((_labels(paths[first.number]), join(parts, axis, "stack")))
    return _replaced(tree, places)


def unstacked(
    tree: Checkpoint,
    members: Sequence[Member],
    depths: Mapping[Path, int],
    axes: Mapping[Path, int],
    paths: Sequence[Keys],
) -> Checkpoint:
    """The checkpoint with the layers of stacks one after the other, from the position of each stack's first leaf.

    Args:
        tree: the checkpoint.
        members: the leaves of the stacks.
        depths: path of a stack → how many layers it holds.
        axes: path of the stack and within the layer → the axis of the layers.
        paths: the new path of each leaf, layer by layer.
    """
    places: dict[int, list[Pick]] = {member.number: [] for member in members}
    firsts: dict[Path, int] = {}
    for member in members:
        firsts.setdefault(member.stack, member.number)
    origins = {m.number: _readable(tree, m.number, axes[(*m.stack, *m.rest)]) for m in members}
    for layer, new in enumerate(paths):
        for member in members:
            if layer < depths[member.stack]:
                taken = _layer(origins[member.number], layer, axes[(*member.stack, *member.rest)])
                places[firsts[member.stack]].append((_labels(new[member.number]), taken))
    return _replaced(tree, places)


def _readable(tree: Checkpoint, number: int, axis: int) -> Origin:
    """A leaf as part of another; along axis 0 even an unreadable one, because its bytes stay contiguous."""
    why = tree.refusal(number)
    if axis and why:
        raise Unsupported(
            f"{tree.index.path(number)} cannot be read: {why}", hint="axis=0 copies bytes without reading them"
        )
    return origin_of(tree, number)


def _layer(stack: Origin, layer: int, axis: int) -> Origin:
    shape = stack.spec.shape
    return reshape(take(stack, range(layer, layer + 1), axis), (*shape[:axis], *shape[axis + 1 :]))


def _labels(path: Sequence[tuple[str, int | None]]) -> tuple[Label, ...]:
    return tuple(label for key, _ in path for label in labels(key))


def _replaced(tree: Checkpoint, places: Mapping[int, Sequence[Pick]]) -> Checkpoint:
    """The checkpoint with some leaves replaced by others."""
    index = tree.index
    picks: list[Pick] = []
    for number in index.numbers:
        picks += places[number] if number in places else [(index.paths[number], (tree, number))]
    names = [plain(path, index.separator) for path, _ in picks]
    inside = {plain(path[:depth], index.separator) for path, _ in picks for depth in range(1, len(path))}
    clashes = [name for name, count in Counter(names).items() if count > 1 or name in inside]
    if clashes:
        raise RenameClash(
            f"{wording.plural(len(clashes), 'leaf', 'leaves')} would collide with others: "
            f"{wording.listing(clashes, 4)}",
            hint='into="stack", a path that is free',
        )
    return assemble(tree, picks)
