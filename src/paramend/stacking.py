"""Stacks of layers: layers side by side under numbered names become one subtree with an axis of layers, and back.

`nn.scan` and `nnx.vmap` keep the layers of a model in one subtree, in which every leaf has one axis more. A model in
one form starts from one in the other when its layers are stacked or unstacked.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from paramend import _text
from paramend.arrays.registry import backend
from paramend.errors import BadArgument, RenameClash, SpecMismatch, Unsupported
from paramend.grammar import Number, Piece
from paramend.leaves import Editable
from paramend.paths import write_piece
from paramend.patterns import parse
from paramend.renames import Rename, Step, keys, pieces, rename
from paramend.selectors import resolve
from paramend.structure import Draft, origins, separator_if_flat, take_apart
from paramend.trees.kinds import find_kind
from paramend.trees.registry import Tree

T = TypeVar("T")
Path = tuple[str, ...]

_REST = "\u2026"  # stands between the path of a stack and that of a leaf in it


class _Member(NamedTuple):
    """A leaf of one layer: its number in the tree, the layer, the stack, and its path in the layer."""

    number: int
    layer: int
    stack: Path
    rest: Path


def stack_layers(tree: T, layers: str, *, into: str | None = None, axis: int = 0, like: Any = None) -> T:
    """The tree with its numbered layers as one: each leaf holds those of all layers, along a new axis.

    Args:
        tree: nested dicts, FrozenDict, lists, an NNX State, a train state, a state dict.
        layers: the path of the layers with a number in it: `"params/layers_<n>"`, `"model.layers.<n>"`. With wildcards,
            as in `"**/layers_<n>"`, several stacks, also those in the moments of an optimizer's state.
        into: the path of the stack, with the same wildcards; by default that of the layers without the number.
        axis: where the new axis goes.
        like: a tree with the stack that is wanted, such as the parameters of the scanned model: its shapes say which
            axis it is, and `axis` is not asked.

    Returns:
        A new tree of the same containers. Leaves outside of the layers are the same objects.

    Raises:
        NoMatch: there are no such layers.
        BadArgument: the numbers are not 0, 1, 2 and so on, or the layers have different leaves, or no axis fits.
        SpecMismatch: leaves differ in shape or dtype from layer to layer.
        RenameClash: something stands at the new path.
        Unsupported: an opened checkpoint, or a module, whose class says what it holds.

    >>> unrolled = {"layers_0": {"w": np.zeros((2, 3))}, "layers_1": {"w": np.ones((2, 3))}, "head": np.ones(3)}
    >>> scanned = stack_layers(unrolled, "layers_<n>")
    >>> scanned["layers"]["w"].shape, list(scanned)
    ((2, 2, 3), ['layers', 'head'])
    """
    leaves = _tree(tree, f'pm.stack_layers(pm.load("model/"), {layers!r})')
    name = _number_in(layers, "layers")
    into = _without_number(layers) if into is None else into
    resolve(f"{layers}/**", leaves)  # for its error, which knows what comes close
    members = _members(leaves, rename(f"{layers}/**", f"<{name}>/{into}/{_REST}/**"))
    groups = _checked(leaves, members, layers)
    axes = _axes(leaves, {(*m[0].stack, *m[0].rest): m[0].number for m in groups}, axis, like, extra=1)
    draft = take_apart(leaves)
    boxes = {member.number: draft.take(member.number) for group in groups for member in group}
    _remove_layers(draft, members, lists=_number_at(layers)[1])
    paths = _keys(leaves, rename(f"{layers}/**", f"{into}/**"))
    for group in groups:
        first = group[0].number
        values = [leaves.values[member.number] for member in group]
        at = axes[(*group[0].stack, *group[0].rest)]
        stacked = backend(values[0]).stack(values, at)
        draft.put(first, paths[first], _boxed(boxes[first], stacked, at, grows=True))
    return _closed(draft, members)  # type: ignore[no-any-return]


def unstack_layers(tree: T, stack: str, *, into: str, axis: int = 0, like: Any = None) -> T:
    """The tree with the layers of a stack one by one, under numbered names: the way back from `stack_layers`.

    Args:
        tree: nested dicts, FrozenDict, an NNX State, a train state, a state dict.
        stack: the path of the stack: `"params/layers"`. With wildcards, as in `"**/layers"`, several of them.
        into: the path of the layers, with the same wildcards and a number: `"params/layers_<n>"`. A number that is a
            key of its own, as in `"layers/<n>"`, makes a list; in an NNX State, which has no lists, int keys.
        axis: which axis counts the layers.
        like: a tree with the layers that are wanted: its shapes say which axis it is, and `axis` is not asked.

    Returns:
        A new tree of the same containers. Leaves outside of the stack are the same objects.

    Raises:
        NoMatch: there is no such stack.
        BadArgument: the leaves of a stack do not hold as many layers each, or no axis fits.
        RenameClash: something stands at a new path.
        Unsupported: an opened checkpoint, or a module, whose class says what it holds.

    >>> scanned = {"layers": {"w": np.zeros((2, 2, 3))}, "head": np.ones(3)}
    >>> unrolled = unstack_layers(scanned, "layers", into="layers_<n>")
    >>> unrolled["layers_1"]["w"].shape, list(unrolled)
    ((2, 3), ['layers_0', 'layers_1', 'head'])
    """
    leaves = _tree(tree, f'pm.unstack_layers(pm.load("model/"), {stack!r}, into={into!r})')
    _number_in(into, "into")
    resolve(f"{stack}/**", leaves)
    zeroth = _numbered(into, 0)
    members = _members(leaves, rename(f"{stack}/**", f"0/{zeroth}/{_REST}/**"))
    axes = _axes(leaves, {(*m.stack, *m.rest): m.number for m in members}, axis, like, extra=-1)
    depths = _depths(leaves, members, axes)
    draft = take_apart(leaves)
    boxes = {member.number: draft.take(member.number) for member in members}
    _remove_layers(draft, members, lists=False)
    place, alone = _number_at(into)
    for layer in range(max(depths.values())):
        paths = _keys(leaves, rename(f"{stack}/**", f"{_numbered(into, layer)}/**"))
        for member in members:
            if layer < depths[member.stack]:
                value = leaves.values[member.number]
                at = axes[(*member.stack, *member.rest)]
                piece = backend(value).get(value, (*[slice(None)] * at, layer))
                box = _boxed(boxes[member.number], piece, at, grows=False)
                path = paths[member.number]
                # The number's key, counted from the end: wildcards before it may stand for any number of keys.
                position = len(path) - len(member.rest) + place if alone else None
                draft.put(member.number, path, box, position=position)
    return _closed(draft, members)  # type: ignore[no-any-return]


def _tree(tree: Any, call: str) -> Tree:
    if isinstance(tree, Editable):
        raise Unsupported("the layers of an opened checkpoint are not stacked or unstacked yet", hint=call)
    return Tree(tree)


# ---- what is written ----------------------------------------------------------------------------------------


def _numbers(part: Piece) -> list[Number]:
    return [atom for atom in part.atoms if isinstance(atom, Number)]


def _number_in(text: str, argument: str) -> str:
    """The name of the number in a path."""
    found = [atom for part in parse(text).segments if isinstance(part, Piece) for atom in _numbers(part)]
    if len(found) != 1 or str(found[0]) != f"<{found[0].name}>":
        raise BadArgument(
            f"{argument}={text!r} has {len(found) or 'no'} numbers, and one of them counts the layers"
            if len(found) != 1
            else f"{argument}={text!r} reckons with the number of a layer",
            hint=f'{argument}="params/layers_<n>"',
        )
    return found[0].name


def _number_at(text: str) -> tuple[int, bool]:
    """The place of the segment with the number, counted from the end, and whether the number is all of it.

    >>> _number_at("layers/<n>"), _number_at("h_<n>/inner")
    ((-1, True), (-2, False))
    """
    segments = parse(text).segments
    place, part = next((i, part) for i, part in enumerate(segments) if isinstance(part, Piece) and _numbers(part))
    return place - len(segments), len(part.atoms) == 1


def _without_number(layers: str) -> str:
    """The path of the stack, by default.

    >>> _without_number("params/layers_<n>"), _without_number("model.layers.<n>"), _without_number("h<n>")
    ('params/layers', 'model/layers', 'h')
    """
    out = []
    for part in parse(layers).segments:
        text = str(part)
        if isinstance(part, Piece) and _numbers(part):
            text = re.sub(r"[_-]?<\w+>", "", text)
        out.append(text)
    if not any(out):
        raise BadArgument(f"{layers!r} without its number is no path", hint=f'into="layers" beside {layers!r}')
    return "/".join(filter(None, out))


def _numbered(into: str, layer: int) -> str:
    return re.sub(r"<\w+>", str(layer), into)


# ---- what is there ------------------------------------------------------------------------------------------


def _members(tree: Tree, rule: Rename) -> list[_Member]:
    """The leaves of layers; the rule writes the number of the layer, the stack, a mark and the rest."""
    members = []
    for number, path in rule.over(tree.index).items():
        layer, *rest = pieces(path)
        mark = rest.index(_REST)
        members.append(_Member(number, int(layer), tuple(rest[:mark]), tuple(rest[mark + 1 :])))
    return members


def _keys(tree: Tree, rule: Rename) -> dict[int, Any]:
    """The new keys of each leaf."""
    flat = separator_if_flat(tree.index)
    found = rule.over(tree.index)
    return {number: keys([s for s in path if isinstance(s, Step)], flat=flat) for number, path in found.items()}


def _checked(tree: Tree, members: Sequence[_Member], layers: str) -> list[list[_Member]]:
    """The members that become one leaf each, in the order of the layers."""
    stacks: dict[Path, dict[Path, dict[int, _Member]]] = defaultdict(lambda: defaultdict(dict))
    for member in members:
        stacks[member.stack][member.rest][member.layer] = member
    wrong: list[str] = []
    differ: list[str] = []
    for stack, rests in stacks.items():
        numbers = sorted({layer for found in rests.values() for layer in found})
        if numbers != list(range(len(numbers))):
            there = _text.listing(list(map(str, numbers)), 12)
            name = "/".join(map(write_piece, stack))
            raise BadArgument(
                f"the layers of {name} are numbered {there}, and not 0 to {len(numbers) - 1}",
                hint=f"rename them first: pm.at(tree, {layers + '/**'!r}).rename(...)",
            )
        for rest, found in rests.items():
            name = "/".join(map(write_piece, rest)) or "the leaf itself"
            lacking = [layer for layer in numbers if layer not in found]
            if lacking:
                wrong.append(f"{name} is not in layer {_text.listing(list(map(str, lacking)))}")
                continue
            specs: dict[str, int] = {}
            for layer in numbers:
                specs.setdefault(str(tree.spec(found[layer].number)), layer)
            if len(specs) > 1:
                differ.append(f"{name} is " + ", ".join(f"{spec} in layer {layer}" for spec, layer in specs.items()))
    if wrong:
        raise BadArgument(
            f"the layers {layers} do not hold the same leaves:\n  " + "\n  ".join(wrong[:16]),
            hint=f"pm.at(tree, {layers + '/**'!r}).paths lists them",
        )
    if differ:
        raise SpecMismatch(
            f"the layers {layers} differ:\n  " + "\n  ".join(differ[:16]),
            hint="stack those that are alike, under names of their own",
        )
    return [[found[i] for i in range(len(found))] for rests in stacks.values() for found in rests.values()]


def _depths(tree: Tree, members: Sequence[_Member], axes: Mapping[Path, int]) -> dict[Path, int]:
    """How many layers each stack holds."""
    sizes: dict[Path, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for member in members:
        shape = tree.spec(member.number).shape
        at = axes[(*member.stack, *member.rest)]
        sizes[member.stack][shape[at]].append(tree.index.path(member.number))
    for found in sizes.values():
        if len(found) > 1:
            said = "; ".join(f"{size} in {_text.listing(paths, 2)}" for size, paths in found.items())
            raise BadArgument(
                f"the leaves of one stack hold different numbers of layers: {said}",
                hint="axis=1, or like=params with the layers that are wanted, says which axis counts them",
            )
        if 0 in found:
            raise BadArgument("a stack without layers cannot be unstacked", hint="pm.at(tree, path).delete()")
    return {stack: next(iter(found)) for stack, found in sizes.items()}


def _axes(tree: Tree, members: Mapping[Path, int], axis: int, like: Any, extra: int) -> dict[Path, int]:
    """The axis of each new leaf, or of each old one if axes go: counted from the front.

    Args:
        tree: the tree.
        members: new path → number of a leaf.
        axis: the axis, if there is no other tree to tell.
        like: a tree that tells by its shapes, or None.
        extra: how many axes more the new leaves have.
    """
    shapes = {path: tree.spec(number).shape for path, number in members.items()}
    lengths = {path: len(shape) + max(extra, 0) for path, shape in shapes.items()}
    if like is None:
        wrong = [path for path, length in lengths.items() if not -length <= axis < length]
        if wrong:
            some = _text.listing([tree.index.path(members[path]) for path in wrong], 4)
            raise BadArgument(f"axis={axis} is no axis of {some}", hint="axis=0")
        return {path: axis % length for path, length in lengths.items()}
    other = Tree(like)
    wanted = {other.index.pieces(number): other.spec(number).shape for number in other.index.numbers}
    fits: dict[Path, list[int]] = {}
    for path, shape in shapes.items():
        there = wanted.get(path)
        long, short = (there, shape) if extra > 0 else (shape, there)
        if there is None or long is None or short is None or len(long) != len(short) + 1:
            said = "is not in `like`" if there is None else f"is {list(there)} in `like`"
            raise BadArgument(
                f"{'/'.join(path)} {said}, and here {list(shape)}",
                hint="axis=0 instead of like= says where the layers are",
            )
        fits[path] = [at for at in range(len(long)) if (*long[:at], *long[at + 1 :]) == short]
    # One axis for all leaves, from the front or from the back, is likelier than one for each.
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
        raise BadArgument(f"{said} the shapes in `like`", hint="axis=0 instead of like= says where the layers are")
    return ways[0]


# ---- what is made -------------------------------------------------------------------------------------------


def _boxed(box: Any, value: Any, axis: int, *, grows: bool) -> Any:
    """A value in a box like the one that a leaf was in, if there was one; names of its axes follow."""
    kind = find_kind(box)
    if kind is None:
        return value
    for attribute in ("names", "out_sharding"):  # of Flax linen, of NNX
        names = getattr(box, attribute, None)
        if isinstance(names, tuple):
            names = (*names[:axis], None, *names[axis:]) if grows else (*names[:axis], *names[axis + 1 :])
            box = box.replace(**{attribute: names})
    return kind.close(box, [value])


def _remove_layers(draft: Draft, members: Sequence[_Member], *, lists: bool) -> None:
    """Removes the containers of layers from which all leaves were taken.

    Args:
        draft: the tree.
        members: the leaves that were taken.
        lists: whether the layers stand in a container of their own, which goes too.

    Raises:
        Unsupported: something that is no array is left.
    """
    for number, _, _, rest in members:
        chain, path, _ = draft.places[number]
        labels = draft.index.paths[number]
        top = origins(labels)[len(labels) - len(rest) - 1] + 1
        left = _left(chain[top]) if top < len(chain) else None
        if left is not None:
            name = "/".join((*chain[top].path, *left[0]))
            raise Unsupported(
                f"{name} is a {type(left[1]).__name__}, and only arrays have an axis of layers",
                hint="of an optimizer with masks, pm.graft_opt_state(tx.init(params), state, report)",
            )
        _sweep(chain[max(top - lists, 1) - 1 :], path[max(top - lists, 1) - 1 :])


def _sweep(chain: Sequence[Any], path: Sequence[Any]) -> None:
    """Removes the containers of a chain that are empty, the innermost first, and the outermost never."""
    for depth in range(len(chain) - 1, 0, -1):
        parent, key = chain[depth - 1], path[depth - 1]
        if chain[depth].entries or parent.fixed:
            break
        if parent.entries.get(key) is chain[depth]:
            del parent.entries[key]


def _left(child: Any) -> tuple[Path, Any] | None:
    """Something in a container that is neither an array that was taken nor a container that held some; its path."""
    if not hasattr(child, "entries"):
        return (), child
    if not child.before:
        return (), child.node
    for key, inner in child.entries.items():
        found = _left(inner)
        if found is not None:
            return (str(key), *found[0]), found[1]
    return None


def _closed(draft: Draft, members: Sequence[_Member]) -> Any:
    if draft.clashes:
        raise RenameClash(
            f"{_text.plural(len(draft.clashes), 'leaf has', 'leaves have')} no place of their own: "
            f"{_text.listing(draft.clashes, 4)}",
            hint='into="stack" names another place',
        )
    for member in members:
        _sweep(*draft.places[member.number][:2])
    return draft.root.close(close_up=False)
