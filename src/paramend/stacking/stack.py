"""Stacks of layers: layers under numbered names become one subtree with an axis of layers, and back.

`nn.scan` and `nnx.vmap` keep the layers of a model in one subtree, in which every leaf has one more axis. Stacking and
unstacking let a model in one form start from one in the other.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

from paramend.arrays.registry import backend
from paramend.edits import hands
from paramend.edits.memory import editable
from paramend.edits.structure import take_apart
from paramend.errors import BadArgument, SpecMismatch, Unsupported
from paramend.leaves.leaves import Editable, Group, Leaves
from paramend.leaves.origins.origin import Origin
from paramend.leaves.paths import write_piece
from paramend.leaves.specs import AnyTree
from paramend.reports import wording
from paramend.selectors.grammar import Number, Piece, around_captures, captures_of
from paramend.selectors.layers import ALL, Numbered, layers_of, notation, without_rest
from paramend.selectors.nesting import depths as depths_in
from paramend.selectors.patterns import parse
from paramend.selectors.renames import Rename, keys, pieces, rename
from paramend.selectors.selector import resolve
from paramend.trees.tree import Tree

T = TypeVar("T")
Path = tuple[str, ...]

REST = "\u2026"  # separates the path of a stack from that of a leaf in it


class Member(NamedTuple):
    """A leaf of one layer: its number in the tree, the layer, the stack, and its path within the layer."""

    number: int
    layer: int
    stack: Path
    rest: Path

    @property
    def name(self) -> Path:
        return *self.stack, *self.rest


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
    layers, places = picked(leaves, layers)
    name = number_in(layers, "layers")
    into = without_number(layers) if into is None else into
    resolve(f"{layers}/**", leaves)  # for its error, which names near matches
    members = members_of(leaves, rename(f"{layers}/**", f"<{name}>/{into}/{REST}/**"), places)
    groups = checked(leaves, members, layers)
    axes = axes_of(leaves, {group[0].name: group[0].number for group in groups}, axis, like, extra=1)
    paths = keys_of_leaves(leaves, rename(f"{layers}/**", f"{into}/**"))
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
        tree: as in `stack_layers`.
        stack: the path of the stack: `"params/layers"`. With wildcards, as in `"**/layers"`, several stacks.
        into: the path of the layers, with the same wildcards and a number: `"params/layers_<n>"`. A number that is a
            whole key, as in `"layers/<n>"` or `"layers[*]"`, makes a list; in an NNX State, which has no lists, int
            keys.
        axis: which axis counts the layers.
        like: a tree or a checkpoint with the wanted layers: its shapes determine the axis, and `axis` is ignored.

    Returns:
        A new tree of the same containers, as `stack_layers` makes it.

    Raises:
        NoMatch: there is no such stack.
        BadArgument: the leaves of a stack hold different numbers of layers, or no axis fits.
        RenameClash, Unsupported: as in `stack_layers`.

    >>> scanned = {"layers": {"w": np.zeros((2, 2, 3))}, "head": np.ones(3)}
    >>> unrolled = unstack_layers(scanned, "layers", into="layers_<n>")
    >>> unrolled["layers_1"]["w"].shape, list(unrolled)
    ((2, 3), ['layers_0', 'layers_1', 'head'])
    """
    leaves = editable(tree)
    stack, into = without_rest(stack), new_layers(into)
    number_in(into, "into")
    resolve(f"{stack}/**", leaves)
    zeroth = numbered(into, 0)
    members = members_of(leaves, rename(f"{stack}/**", f"0/{zeroth}/{REST}/**"))
    axes = axes_of(leaves, {member.name: member.number for member in members}, axis, like, extra=-1)
    depths = depths_of(leaves, members, axes)
    every = [rename(f"{stack}/**", f"{numbered(into, layer)}/**") for layer in range(max(depths.values()))]
    paths = [keys_of_leaves(leaves, rule) for rule in every]
    _check_layers(leaves, members)
    place, alone = number_at(into)
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


def _check_layers(leaves: Editable, members: Sequence[Member]) -> None:
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


def _numbers(part: Piece) -> list[Number]:
    return [atom for atom in part.atoms if isinstance(atom, Number)]


def number_in(text: str, argument: str) -> str:
    """The name of the number in a path."""
    found = [atom for part in parse(text).segments if isinstance(part, Piece) for atom in _numbers(part)]
    if len(found) != 1 or str(found[0]) != f"<{found[0].name}>":
        raise BadArgument(
            f"{argument}={text!r} has {len(found) or 'no'} numbers instead of one that counts the layers"
            if len(found) != 1
            else f"{argument}={text!r} does arithmetic with the number of a layer",
            hint=f'{argument}="{_one_number(text)}"',
        )
    return found[0].name


def _one_number(text: str) -> str:
    """A text in which only the last number is captured."""
    *above, last, end = around_captures(text) if captures_of(text) else (text.rstrip("_/."), "")
    number = f"<{captures_of(text)[-1]}>" if captures_of(text) else "_<n>"
    return "*".join((*above, last)) + number + end


def new_layers(into: str) -> str:
    """The path of new layers, with `<n>` for their number; `layers[*]` is a list, `layers_[*]` are siblings.

    >>> new_layers("params/layers_[*]"), new_layers("model.layers[*]"), new_layers("layers/<n>/**")
    ('params/layers_<n>', 'model/layers/<n>', 'layers/<n>')
    """
    into = without_rest(into)
    said = notation(into)
    if said is None or said.captured or said.positions != ALL:
        return into
    beside = said.tail or not said.head or said.head[-1] in "_-"
    return said.with_number(Numbered((), said.head if beside else "", said.tail, ()))


def picked(tree: Leaves, layers: str) -> tuple[str, dict[int, int] | None]:
    """The layers with `<n>` for their number; and if only some are selected, leaf number → its place among them.
    `BadArgument` if the text does not say where the number is, or matches both lists and siblings."""
    if captures_of(layers):
        return without_rest(layers), None
    said, found = layers_of(tree.index, layers)
    texts = {said.with_number(one) for one in found}
    if len(texts) > 1:
        why = f"layers={layers!r} matches {wording.listing(sorted(texts))}"
        raise BadArgument(why, hint=f'layers="{min(texts)}", one after the other')
    places: dict[int, int] = {}
    for one in found:
        which: dict[int | None, int] = {one.numbers[position]: place for place, position in enumerate(said.pick(one))}
        for number in tree.index.numbers:
            place = which.get(one.place(tree.index.pieces(number)))
            if place is not None:
                places[number] = place
    return texts.pop(), places


def number_at(text: str) -> tuple[int, bool]:
    """The place of the segment with the number, counted from the end, and whether the number is the whole segment.

    >>> number_at("layers/<n>"), number_at("h_<n>/inner")
    ((-1, True), (-2, False))
    """
    segments = parse(text).segments
    place, part = next((i, part) for i, part in enumerate(segments) if isinstance(part, Piece) and _numbers(part))
    return place - len(segments), len(part.atoms) == 1


def without_number(layers: str) -> str:
    """The default path of the stack: that of the layers without the number.

    >>> without_number("params/layers_<n>"), without_number("model.layers.<n>"), without_number("h<n>")
    ('params/layers', 'model/layers', 'h')
    """
    out = []
    for part in parse(layers).segments:
        text = str(part)
        if isinstance(part, Piece) and _numbers(part):
            text = re.sub(r"[_-]?<\w+>", "", text)
        out.append(text)
    if not any(out):
        raise BadArgument(f"{layers!r} without its number is not a path", hint=f'{layers!r}, into="layers"')
    return "/".join(filter(None, out))


def numbered(into: str, layer: int) -> str:
    """A path with the number of a layer in place of `<n>`."""
    return re.sub(r"<\w+>", str(layer), into)


def members_of(tree: Leaves, rule: Rename, places: Mapping[int, int] | None = None) -> list[Member]:
    """The leaves of layers, by a rule that makes of a path the number of the layer, the stack, a mark and the rest; if
    only some layers are selected, `places` says which of them a leaf is in."""
    members = []
    for number, path in rule.over(tree.index).items():
        layer, *rest = pieces(path)
        mark = rest.index(REST)
        if places is None or number in places:
            place = int(layer) if places is None else places[number]
            members.append(Member(number, place, tuple(rest[:mark]), tuple(rest[mark + 1 :])))
    return members


def keys_of_leaves(tree: Leaves, rule: Rename) -> dict[int, Any]:
    """The new keys of each leaf."""
    return {number: keys(path) for number, path in rule.over(tree.index).items()}


def checked(tree: Leaves, members: Sequence[Member], layers: str) -> list[list[Member]]:
    """The members that become one leaf each, in the order of the layers."""
    stacks: dict[Path, dict[Path, dict[int, Member]]] = defaultdict(lambda: defaultdict(dict))
    for member in members:
        stacks[member.stack][member.rest][member.layer] = member
    wrong: list[str] = []
    differ: list[str] = []
    for stack, rests in stacks.items():
        numbers = sorted({layer for found in rests.values() for layer in found})
        if numbers != list(range(len(numbers))):
            there = wording.listing(list(map(str, numbers)), 12)
            name = "/".join(map(write_piece, stack))
            raise BadArgument(
                f"the layers of {name} are numbered {there}, not 0 to {len(numbers) - 1}",
                hint=f"rename them first: pm.at(tree, {layers + '/**'!r}).rename(...)",
            )
        for rest, found in rests.items():
            name = "/".join(map(write_piece, rest)) or "the leaf itself"
            lacking = [layer for layer in numbers if layer not in found]
            if lacking:
                wrong.append(f"{name} is not in layer {wording.listing(list(map(str, lacking)))}")
                continue
            specs: dict[str, int] = {}
            for layer in numbers:
                specs.setdefault(str(tree.spec(found[layer].number)), layer)
            if len(specs) > 1:
                differ.append(f"{name} is " + ", ".join(f"{spec} in layer {layer}" for spec, layer in specs.items()))
    if wrong:
        why = f"the layers {layers} do not hold the same leaves:\n  " + "\n  ".join(wrong[:16])
        raise BadArgument(why, hint=f"pm.at(tree, {layers + '/**'!r}).paths lists them")
    if differ:
        said = f"the layers {layers} differ:\n  " + "\n  ".join(differ[:16])
        raise SpecMismatch(said, hint="stack only layers of equal specs, one stack for each spec")
    return [[found[i] for i in range(len(found))] for rests in stacks.values() for found in rests.values()]


def depths_of(tree: Leaves, members: Sequence[Member], axes: Mapping[Path, int]) -> dict[Path, int]:
    """How many layers each stack holds."""
    sizes: dict[Path, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for member in members:
        shape = tree.spec(member.number).shape
        at = axes[member.name]
        sizes[member.stack][shape[at]].append(tree.index.path(member.number))
    for found in sizes.values():
        if len(found) > 1:
            said = "; ".join(f"{size} in {wording.listing(paths, 2)}" for size, paths in found.items())
            why = f"the leaves of one stack hold different numbers of layers: {said}"
            raise BadArgument(why, hint="axis=1, or like=params of the model with the wanted layers")
        if 0 in found:
            raise BadArgument("a stack without layers cannot be unstacked", hint='pm.at(tree, "layers/**").delete()')
    return {stack: next(iter(found)) for stack, found in sizes.items()}


def axes_of(tree: Leaves, members: Mapping[Path, int], axis: int, like: Any, extra: int) -> dict[Path, int]:
    """The axis of each new leaf (path → number of a leaf), or of each old one if axes are removed, counted from the
    front. Shapes of `like`, a tree or a checkpoint, determine it, if given; new leaves have `extra` more axes."""
    shapes = {path: tree.spec(number).shape for path, number in members.items()}
    lengths = {path: len(shape) + max(extra, 0) for path, shape in shapes.items()}
    if like is None:
        wrong = [path for path, length in lengths.items() if not -length <= axis < length]
        if wrong:
            some = wording.listing([tree.index.path(members[path]) for path in wrong], 4)
            raise BadArgument(f"axis={axis} is not an axis of {some}", hint="axis=0")
        return {path: axis % length for path, length in lengths.items()}
    other: Any = like if isinstance(like, Editable) else Tree(like)
    wanted = {other.index.pieces(number): other.spec(number).shape for number in other.index.numbers}
    fits: dict[Path, list[int]] = {}
    for path, shape in shapes.items():
        there = wanted.get(path)
        long, short = (there, shape) if extra > 0 else (shape, there)
        if there is None or long is None or short is None or len(long) != len(short) + 1:
            said = "is not in `like`" if there is None else f"is {list(there)} in `like`"
            raise BadArgument(f"{'/'.join(path)} {said}, and here {list(shape)}", hint="axis=0 instead of like=")
        fits[path] = [at for at in range(len(long)) if (*long[:at], *long[at + 1 :]) == short]
    # One axis for all leaves, counted from the front or from the back, is likelier than one for each.
    longest = max(lengths.values())
    ways: list[dict[Path, int]] = []
    for at in range(-longest, longest):
        way = {path: at % length if -length <= at < length else -1 for path, length in lengths.items()}
        if all(way[path] in found for path, found in fits.items()) and way not in ways:
            ways.append(way)
    if not ways and all(len(found) == 1 for found in fits.values()):
        ways = [{path: found[0] for path, found in fits.items()}]
    if len(ways) != 1:
        said = "several axes fit" if ways else "no axis fits"
        raise BadArgument(f"{said} the shapes in `like`", hint="axis=0 instead of like=")
    return ways[0]
