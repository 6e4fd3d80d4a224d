"""Stacks of layers: layers under numbered names become one subtree with an axis of layers, and back.

`nn.scan` and `nnx.vmap` keep the layers of a model in one subtree, in which every leaf has one more axis. Stacking and
unstacking let a model in one form start from one in the other.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeVar, cast

from paramend.arrays.registry import backend
from paramend.edits import hands
from paramend.edits.memory import editable
from paramend.edits.structure import take_apart
from paramend.errors import Unsupported
from paramend.leaves.leaves import Editable, Group
from paramend.leaves.origins.origin import Origin
from paramend.leaves.specs import AnyTree
from paramend.selectors.layers import without_rest
from paramend.selectors.nesting import depths as depths_in
from paramend.selectors.renames import rename
from paramend.selectors.selector import resolve
from paramend.stacking import plan
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
    leaves = editable(tree)
    layers, places = plan.picked(leaves, layers)
    name = plan.number_in(layers, "layers")
    into = plan.without_number(layers) if into is None else into
    resolve(f"{layers}/**", leaves)  # for its error, which names near matches
    members = plan.members_of(leaves, rename(f"{layers}/**", f"<{name}>/{into}/{plan.REST}/**"), places)
    groups = plan.checked(leaves, members, layers)
    axes = plan.axes_of(leaves, {group[0].name: group[0].number for group in groups}, axis, like, extra=1)
    paths = plan.keys_of_leaves(leaves, rename(f"{layers}/**", f"{into}/**"))
    _check_layers(leaves, members)
    made = []
    for group in groups:
        numbers, axis = tuple(member.number for member in group), axes[group[0].name]
        whole, boxed = partial(_whole, axis=axis), partial(_boxed, axis=axis, grows=True)
        made.append(Group(numbers, (paths[numbers[0]],), whole, boxed))
    return cast(T, leaves.regrouped(made, close_up=False))


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
    leaves = editable(tree)
    stack, into = without_rest(stack), plan.new_layers(into)
    plan.number_in(into, "into")
    resolve(f"{stack}/**", leaves)
    zeroth = plan.numbered(into, 0)
    members = plan.members_of(leaves, rename(f"{stack}/**", f"0/{zeroth}/{plan.REST}/**"))
    axes = plan.axes_of(leaves, {member.name: member.number for member in members}, axis, like, extra=-1)
    depths = plan.depths_of(leaves, members, axes)
    every = [rename(f"{stack}/**", f"{plan.numbered(into, layer)}/**") for layer in range(max(depths.values()))]
    paths = [plan.keys_of_leaves(leaves, rule) for rule in every]
    _check_layers(leaves, members)
    place, alone = plan.number_at(into)
    groups: dict[Path, list[Group]] = {}
    for member in members:
        axis, layers = axes[member.name], range(depths[member.stack])
        new = tuple(paths[layer][member.number] for layer in layers)
        # The number's key is counted from the end: wildcards before it may match any number of keys.
        position = len(new[0]) - len(member.rest) + place if alone else None
        cut, boxed = partial(_cut, layers=layers, axis=axis), partial(_boxed, axis=axis, grows=False)
        groups.setdefault(member.stack, []).append(Group((member.number,), new, cut, boxed, position))
    in_memory = isinstance(leaves, Tree)
    made = [one for group in groups.values() for one in (group if in_memory else [_layer_by_layer(group)])]
    return cast(T, leaves.regrouped(made, close_up=False))


def _whole(values: Sequence[Any], axis: int) -> list[Any]:
    return [hands.join(values, axis, "stack")]


def _cut(values: Sequence[Any], layers: range, axis: int) -> list[Any]:
    (stack,) = values
    if not isinstance(stack, Origin):
        return [backend(stack).get(stack, (*[slice(None)] * axis, layer)) for layer in layers]
    shape = (*stack.spec.shape[:axis], *stack.spec.shape[axis + 1 :])
    return [hands.reshape(hands.take(stack, range(layer, layer + 1), axis), shape) for layer in layers]


def _layer_by_layer(groups: Sequence[Group]) -> Group:
    """The groups of one stack as one, in the order in which files hold layers."""

    def make(values: Sequence[Any]) -> list[Any]:
        cuts = [group.make([value]) for group, value in zip(groups, values, strict=True)]
        return [value for layer in zip(*cuts, strict=True) for value in layer]

    paths = tuple(path for layer in zip(*(group.paths for group in groups), strict=True) for path in layer)
    return Group(tuple(group.numbers[0] for group in groups), paths, make)


def _boxed(box: Any, axis: int, *, grows: bool) -> Any:
    """The box of a leaf with the names of its axes adapted."""
    for attribute in ("names", "out_sharding"):  # Flax linen, NNX
        names = getattr(box, attribute, None)
        if isinstance(names, tuple):
            names = (*names[:axis], None, *names[axis:]) if grows else (*names[:axis], *names[axis + 1 :])
            box = box.replace(**{attribute: names})
    return box


def _check_layers(leaves: Editable, members: Sequence[plan.Member]) -> None:
    """Raise `Unsupported` if layers in memory hold something that cannot become part of a stack."""
    if not isinstance(leaves, Tree):
        return
    draft = take_apart(leaves)
    for member in members:
        draft.take(member.number)
    for number, _, _, rest in members:
        chain, labels = draft.places[number].chain, leaves.index.paths[number]
        top = depths_in(labels)[len(labels) - len(rest) - 1] + 1
        left = _left(chain[top]) if top < len(chain) else None
        if left is not None:
            raise Unsupported(
                f"{'/'.join((*chain[top].path, *left[0]))} is a {type(left[1]).__name__}, and only arrays have an axis "
                "of layers",
                hint="for an optimizer with masks: pm.graft_opt_state(tx.init(params), state, report)",
            )


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
