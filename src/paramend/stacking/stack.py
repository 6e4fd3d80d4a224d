"""Stacks of layers: layers under numbered names become one subtree with an axis of layers, and back.

`nn.scan` and `nnx.vmap` keep the layers of a model in one subtree, in which every leaf has one more axis. Stacking and
unstacking let a model in one form start from one in the other.
"""

from collections.abc import Sequence
from typing import Any, TypeVar, cast

from paramend.arrays.registry import backend
from paramend.edits.structure import Draft, take_apart
from paramend.errors import Unsupported
from paramend.leaves.leaves import Editable
from paramend.leaves.specs import AnyTree
from paramend.selectors.layers import without_rest
from paramend.selectors.nesting import depths as depths_in
from paramend.selectors.renames import rename
from paramend.selectors.selector import resolve
from paramend.stacking.plan import (
    REST,
    Member,
    axes_of,
    checked,
    depths_of,
    keys_of_leaves,
    members_of,
    new_layers,
    number_at,
    number_in,
    numbered,
    picked,
    without_number,
)
from paramend.trees.lookup import find_kind
from paramend.trees.tree import Tree

T = TypeVar("T")
Path = tuple[str, ...]


def stack_layers(tree: T, layers: str, *, into: str | None = None, axis: int = 0, like: AnyTree | None = None) -> T:
    """The tree with its numbered layers as one: each leaf holds that of every layer, along a new axis.

    Args:
        tree: nested dicts, FrozenDict, lists, an NNX State, a train state, a state dict; or a checkpoint opened by
            `pm.open`: then the result is a checkpoint, written by its `.save(out)`.
        layers: the layers: `"params/layers_<n>"`, `"model.layers[*]"`; `"Dense_[1:-1]"` leaves the first and the last
            where they are. With wildcards, as in `"**/layers_<n>"`, several stacks, including those in the moments of
            an optimizer state.
        into: the path of the stack, with the same wildcards; by default that of the layers without the number.
        axis: where the new axis goes.
        like: a tree or a checkpoint with the wanted stack, such as the parameters of the scanned model: its shapes
            determine the axis, and `axis` is ignored.

    Returns:
        A new tree of the same containers. Leaves outside the layers are the same objects. A checkpoint is read only
        when it is saved, in bounded memory; along axis 0 its bytes are copied by the kernel.

    Raises:
        NoMatch: there are no such layers.
        BadArgument: the numbers are not 0, 1, 2 and so on, or the layers have different leaves, or no axis fits.
        SpecMismatch: leaves differ in shape or dtype from layer to layer.
        RenameClash: something is already at the new path.
        Unsupported: the tree is a module, whose class determines what it holds.

    >>> unrolled = {"layers_0": {"w": np.zeros((2, 3))}, "layers_1": {"w": np.ones((2, 3))}, "head": np.ones(3)}
    >>> scanned = stack_layers(unrolled, "layers_<n>")
    >>> scanned["layers"]["w"].shape, list(scanned)
    ((2, 2, 3), ['layers', 'head'])
    """
    leaves: Any = tree if isinstance(tree, Editable) else Tree(tree)
    layers, places = picked(leaves, layers)
    name = number_in(layers, "layers")
    into = without_number(layers) if into is None else into
    resolve(f"{layers}/**", leaves)  # for its error, which names near matches
    members = members_of(leaves, rename(f"{layers}/**", f"<{name}>/{into}/{REST}/**"), places)
    groups = checked(leaves, members, layers)
    axes = axes_of(leaves, {group[0].name: group[0].number for group in groups}, axis, like, extra=1)
    paths = keys_of_leaves(leaves, rename(f"{layers}/**", f"{into}/**"))
    if not isinstance(leaves, Tree):
        from paramend.stacking.checkpoints import stacked  # only for checkpoints

        return cast(T, stacked(leaves, groups, axes, paths))
    draft = take_apart(leaves)
    boxes = {member.number: draft.take(member.number) for group in groups for member in group}
    _remove_layers(draft, members, lists=number_at(layers)[1])
    for group in groups:
        first, at = group[0].number, axes[group[0].name]
        values = [leaves.values[member.number] for member in group]
        stacked = backend(values[0]).stack(values, at)
        draft.put(first, paths[first], _boxed(boxes[first], stacked, at, grows=True))
    return _closed(draft, members)  # type: ignore[no-any-return]


def unstack_layers(tree: T, stack: str, *, into: str, axis: int = 0, like: AnyTree | None = None) -> T:
    """The tree with the layers of a stack under numbered names: the inverse of `stack_layers`.

    Args:
        tree: nested dicts, FrozenDict, an NNX State, a train state, a state dict; or a checkpoint opened by `pm.open`:
            then the result is a checkpoint, written by its `.save(out)`.
        stack: the path of the stack: `"params/layers"`. With wildcards, as in `"**/layers"`, several stacks.
        into: the path of the layers, with the same wildcards and a number: `"params/layers_<n>"`. A number that is a
            whole key, as in `"layers/<n>"` or `"layers[*]"`, makes a list; in an NNX State, which has no lists, int
            keys.
        axis: which axis counts the layers.
        like: a tree or a checkpoint with the wanted layers: its shapes determine the axis, and `axis` is ignored.

    Returns:
        A new tree of the same containers. Leaves outside the stack are the same objects. A checkpoint is read only when
        it is saved, in bounded memory; along axis 0 its bytes are copied by the kernel.

    Raises:
        NoMatch: there is no such stack.
        BadArgument: the leaves of a stack hold different numbers of layers, or no axis fits.
        RenameClash: something is already at a new path.
        Unsupported: the tree is a module, whose class determines what it holds.

    >>> scanned = {"layers": {"w": np.zeros((2, 2, 3))}, "head": np.ones(3)}
    >>> unrolled = unstack_layers(scanned, "layers", into="layers_<n>")
    >>> unrolled["layers_1"]["w"].shape, list(unrolled)
    ((2, 3), ['layers_0', 'layers_1', 'head'])
    """
    leaves: Any = tree if isinstance(tree, Editable) else Tree(tree)
    stack, into = without_rest(stack), new_layers(into)
    number_in(into, "into")
    resolve(f"{stack}/**", leaves)
    zeroth = numbered(into, 0)
    members = members_of(leaves, rename(f"{stack}/**", f"0/{zeroth}/{REST}/**"))
    axes = axes_of(leaves, {member.name: member.number for member in members}, axis, like, extra=-1)
    depths = depths_of(leaves, members, axes)
    layers = range(max(depths.values()))
    paths = [keys_of_leaves(leaves, rename(f"{stack}/**", f"{numbered(into, layer)}/**")) for layer in layers]
    if not isinstance(leaves, Tree):
        from paramend.stacking.checkpoints import unstacked  # only for checkpoints

        return cast(T, unstacked(leaves, members, depths, axes, paths))
    draft = take_apart(leaves)
    boxes = {member.number: draft.take(member.number) for member in members}
    _remove_layers(draft, members, lists=False)
    place, alone = number_at(into)
    for layer in layers:
        for member in members:
            if layer < depths[member.stack]:
                value, at = leaves.values[member.number], axes[member.name]
                piece = backend(value).get(value, (*[slice(None)] * at, layer))
                box = _boxed(boxes[member.number], piece, at, grows=False)
                path = paths[layer][member.number]
                # The number's key is counted from the end: wildcards before it may match any number of keys.
                position = len(path) - len(member.rest) + place if alone else None
                draft.put(member.number, path, box, position=position)
    return _closed(draft, members)  # type: ignore[no-any-return]


# ---- what is made -------------------------------------------------------------------------------------------


def _boxed(box: Any, value: Any, axis: int, *, grows: bool) -> Any:
    """A value in a box like the leaf's old one, if it had one, with the names of its axes adapted."""
    kind = find_kind(box)
    if kind is None:
        return value
    for attribute in ("names", "out_sharding"):  # Flax linen, NNX
        names = getattr(box, attribute, None)
        if isinstance(names, tuple):
            names = (*names[:axis], None, *names[axis:]) if grows else (*names[:axis], *names[axis + 1 :])
            box = box.replace(**{attribute: names})
    return kind.close(box, [value])


def _remove_layers(draft: Draft, members: Sequence[Member], *, lists: bool) -> None:
    """Remove the containers of layers from which all leaves were taken; with `lists`, also that of the layers.

    Raises:
        Unsupported: something that is not an array is left.
    """
    for number, _, _, rest in members:
        chain, path, _ = draft.places[number]
        labels = draft.index.paths[number]
        top = depths_in(labels)[len(labels) - len(rest) - 1] + 1
        left = _left(chain[top]) if top < len(chain) else None
        if left is not None:
            name = "/".join((*chain[top].path, *left[0]))
            raise Unsupported(
                f"{name} is a {type(left[1]).__name__}, and only arrays have an axis of layers",
                hint="for an optimizer with masks: pm.graft_opt_state(tx.init(params), state, report)",
            )
        _sweep(chain[max(top - lists, 1) - 1 :], path[max(top - lists, 1) - 1 :])


def _sweep(chain: Sequence[Any], path: Sequence[Any]) -> None:
    """Remove the empty containers of a chain, innermost first, except the outermost."""
    for depth in range(len(chain) - 1, 0, -1):
        parent, key = chain[depth - 1], path[depth - 1]
        if chain[depth].entries or parent.fixed:
            break
        if parent.entries.get(key) is chain[depth]:
            del parent.entries[key]


def _left(child: Any) -> tuple[Path, Any] | None:
    """The path and value of something left in a container: not a taken array, nor a container that held only those."""
    if not hasattr(child, "entries"):
        return (), child
    if not child.before:
        return (), child.node
    for key, inner in child.entries.items():
        found = _left(inner)
        if found is not None:
            return (str(key), *found[0]), found[1]
    return None


def _closed(draft: Draft, members: Sequence[Member]) -> Any:
    draft.check('into="stack", a path that is free')
    for member in members:
        _sweep(*draft.places[member.number][:2])
    return draft.root.close(close_up=False)
