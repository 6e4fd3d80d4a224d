"""Stacks in checkpoints: layers are stacked and unstacked by reference; values are read only when saved."""

from collections.abc import Mapping, Sequence

from paramend.checkpoints.assemble import origin_of
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.checkpoints.gathering import Leaf, labels_of, replaced
from paramend.errors import Unsupported
from paramend.leaves.origins.moved import join, reshape, take
from paramend.leaves.origins.origin import Origin
from paramend.stacking.plan import Member, Path

# Leaf number → its new path, as `renames.keys` returns it.
Keys = Mapping[int, Sequence[tuple[str, int | None]]]


def stacked(tree: Checkpoint, groups: Sequence[Sequence[Member]], axes: Mapping[Path, int], paths: Keys) -> Checkpoint:
    """The checkpoint with each group of leaves, in layer order, as one leaf in the position of the first."""
    places: dict[int, list[Leaf]] = {member.number: [] for group in groups for member in group}
    for group in groups:
        first, axis = group[0], axes[group[0].name]
        parts = [_readable(tree, member.number, axis) for member in group]
        places[first.number].append((labels_of(paths[first.number]), join(parts, axis, "stack"), None))
    return tree.remade(replaced(tree.plan, places, 'into="stack", a path that is free'))


def unstacked(
    tree: Checkpoint,
    members: Sequence[Member],
    depths: Mapping[Path, int],
    axes: Mapping[Path, int],
    paths: Sequence[Keys],
) -> Checkpoint:
    """The checkpoint with the layers of stacks one after the other, from the position of each stack's first leaf."""
    places: dict[int, list[Leaf]] = {member.number: [] for member in members}
    firsts: dict[Path, int] = {}
    for member in members:
        firsts.setdefault(member.stack, member.number)
    origins = {m.number: _readable(tree, m.number, axes[m.name]) for m in members}
    for layer, new in enumerate(paths):
        for member in members:
            if layer < depths[member.stack]:
                taken = _layer(origins[member.number], layer, axes[member.name])
                places[firsts[member.stack]].append((labels_of(new[member.number]), taken, None))
    return tree.remade(replaced(tree.plan, places, 'into="stack", a path that is free'))


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
