"""Layers of plain trees: the axis that a layer writes to, the norms that see it, and the next layer, which reads it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from paramend.errors import BadArgument, NoMatch, Unsupported
from paramend.growth.axes import Axes, Family
from paramend.leaves.leaves import Leaves
from paramend.leaves.paths import text_of
from paramend.reports import wording
from paramend.resize.widths import Use
from paramend.selectors.selector import resolve
from paramend.trees.tree import Tree
from paramend.trees.walks import containers

Pieces = tuple[str, ...]

_DIGITS = "0123456789"
# Leaf that makes its module a layer → the axis that it writes to, and the one that it reads from; None where it reads
# places of a table.
_LAYERS: Mapping[str, tuple[int, int | None]] = {
    **dict.fromkeys(("kernel", "w"), (-1, -2)),
    "weight": (0, 1),
    **dict.fromkeys(("embedding", "embeddings"), (-1, None)),
}
_STATISTICS = {"mean", "var", "running_mean", "running_var", "average"}
_PLAIN = Family((), norm="layer")


@dataclass
class _Layer:
    """A module that has leaves of its own: name → number; and those of its statistics, in other collections too."""

    path: Pieces
    leaves: dict[str, int] = field(default_factory=dict)
    main: str = ""
    module: Any = None

    @property
    def axes(self) -> tuple[int, int | None]:
        """The axis that it writes to, and the one that it reads from."""
        kind = (type(self.module).__name__ if self.module is not None else "".join(self.path[-1:])).lower()
        if self.main == "weight" and ("embed" in kind or kind in ("wte", "wpe")):
            return 1, None
        return (1, 0) if kind.startswith("convtranspose") and self.main == "weight" else _LAYERS[self.main]

    @property
    def grouped(self) -> bool:
        """Whether it treats features in groups, which copies would change."""
        names = ("groups", "feature_group_count", "num_groups")
        return any(getattr(self.module, name, 1) not in (1, None) for name in names)


def _trailing(piece: str) -> int:
    """The number at the end of a piece; -1 if there is none."""
    return int(piece[len(piece.rstrip(_DIGITS)) :] or -1)


def axes_of(leaves: Leaves, features: Mapping[str, Any]) -> Axes:
    """The axes of a tree that layers write to: the name of each is the path of its layer."""
    layers = _layers(leaves)
    chain = [layer for layer in layers if layer.main]
    sizes: dict[str, int] = {}
    uses: dict[int, list[Use]] = {}
    norms: set[int] = set()
    named = {text: _named(leaves, layers, text) for text in features}
    groups: dict[str, list[_Layer]] = {}
    for text, layer in named.items():
        if layer.main:
            groups[text] = []
        elif groups:  # a norm, named after the layer whose features it sees
            groups[[*groups][-1]].append(layer)
        else:
            raise BadArgument(f"{text} is not a layer: it has {wording.listing(sorted(layer.leaves))}")
    for text, followers in groups.items():
        layer, (out, _) = named[text], named[text].axes
        size = sizes[text] = _width(leaves, layer)
        if layer is chain[-1]:
            raise BadArgument(f"{text} is the last layer: nothing reads what it writes", hint=f'"{_shown(chain[0])}"')
        reader = chain[chain.index(layer) + 1]
        for number in layer.leaves.values():
            shape = leaves.spec(number).shape
            at = out if number == layer.leaves[layer.main] else shape.index(size) if size in shape else 0
            _put(uses, leaves, number, at, Use(((text, 1),)))
        opaque = layers[layers.index(layer) + 1 : layers.index(reader)]
        others = [one for one in opaque if any(leaves.spec(number).ndim > 1 for number in one.leaves.values())]
        norms_of = followers or _norms(leaves, layers, layer, reader, size)
        strange = [one for one in (layer, reader, *norms_of) if one.grouped] or others
        if strange:
            why = f"how {_shown(strange[0])} sees the features of {text} is not known"
            raise Unsupported(why, hint="another layer")
        for norm in norms_of:
            for number in norm.leaves.values():
                _put(uses, leaves, number, -1, Use(((text, 1),)))
            if not _STATISTICS & norm.leaves.keys():
                norms |= set(norm.leaves.values())
        axis, use = _reads(leaves, text, size, layer, reader)
        _put(uses, leaves, reader.leaves[reader.main], axis, use)
    made = {number: tuple(each) for number, each in uses.items()}
    nothing: frozenset[int] = frozenset()
    return Axes(_PLAIN, sizes, made, frozenset(norms), nothing, nothing, False)


def _layers(leaves: Leaves) -> list[_Layer]:
    """The modules with leaves, in the order of the tree; of dicts, numbers count: Dense_2 comes before Dense_10."""
    found: dict[Pieces, _Layer] = {}
    index = leaves.index
    statistics: list[tuple[Pieces, str, int]] = []
    for number in index.numbers:
        *above, name = index.pieces(number)
        if above[:1] == ["batch_stats"]:
            statistics.append((tuple(above[1:]), name, number))
            continue
        layer = found.setdefault(tuple(above), _Layer(tuple(above)))
        layer.leaves[name] = number
        if name in _LAYERS and leaves.spec(number).ndim > 1:
            layer.main = name
    for path, node, _ in containers(leaves.root) if isinstance(leaves, Tree) else ():
        here = tuple(map(text_of, path))
        if here in found and hasattr(node, "__dict__"):
            found[here].module = node
    for path, name, number in statistics:
        for layer in found.values():
            if layer.path[-len(path) :] == path:
                layer.leaves[name] = number
    stems: dict[Pieces, int] = {}  # dicts that JAX made have their keys in the order of the alphabet

    def key(layer: _Layer) -> list[tuple[int, int]]:
        pieces = [(piece.rstrip(_DIGITS), _trailing(piece)) for piece in layer.path]
        above = [(*layer.path[:at], stem) for at, (stem, _) in enumerate(pieces)]
        return [(stems.setdefault(one, len(stems)), number) for one, (_, number) in zip(above, pieces, strict=True)]

    return sorted(found.values(), key=key)


def _named(leaves: Leaves, layers: list[_Layer], text: str) -> _Layer:
    numbers = resolve(f"{text}/**", leaves)
    found = [layer for layer in layers if set(layer.leaves.values()) & set(numbers)]
    if len(found) != 1:
        shown = [_shown(layer) for layer in found]
        raise NoMatch(f"{text!r} names {wording.plural(len(found), 'layer')}: {wording.listing(shown)}", hint=shown[0])
    return found[0]


def _shown(layer: _Layer) -> str:
    return "/".join(layer.path)


def _norms(leaves: Leaves, layers: list[_Layer], layer: _Layer, reader: _Layer, size: int) -> list[_Layer]:
    """The modules that scale the features one by one: in modules of torch those between a layer and its reader. Trees
    of JAX may have lost the order; there norms are paired with the layers beside them that write as many features.
    """
    shapes = [{leaves.spec(number).shape for number in one.leaves.values()} for one in layers]
    pairs = zip(layers, shapes, strict=True)
    alike = [one for one, held in pairs if not one.main and held in ({(size,)}, {(size,), ()})]
    if leaves.index.separator == ".":
        return [one for one in alike if layers.index(layer) < layers.index(one) < layers.index(reader)]
    alike = [one for one in alike if one.path[:-1] == layer.path[:-1]]
    chain = [one for one in layers if one.main][:-1]
    writers = [one for one in chain if one.path[:-1] == layer.path[:-1] and _width(leaves, one) == size]
    if len(alike) == len(writers):
        return [alike[writers.index(layer)]]
    numbered = [one for one in alike if _of_number(one) == _of_number(layer) >= 0]
    if not alike or len(writers) == 1 or numbered:
        return alike if len(writers) == 1 else numbered
    raise BadArgument(
        f"it is not known which of {wording.listing(list(map(_shown, alike)))} sees the features of {_shown(layer)}",
        hint=f'name it after the layer: features={{"{_shown(layer)}": 16, "{_shown(alike[0])}": 16}}',
    )


def _width(leaves: Leaves, layer: _Layer) -> int:
    return leaves.spec(layer.leaves[layer.main]).shape[layer.axes[0]]


def _of_number(layer: _Layer) -> int:
    return _trailing(layer.path[-1]) if layer.path else -1


def _reads(leaves: Leaves, text: str, size: int, layer: _Layer, reader: _Layer) -> tuple[int, Use]:
    """The axis by which the next layer reads the features."""
    number = reader.leaves[reader.main]
    spec, axis = leaves.spec(number), reader.axes[1]
    length = None if axis is None else spec.shape[axis]
    if axis is not None and length == size:
        return axis, Use(((text, 1),), True)
    flat = spec.ndim == 2 and leaves.spec(layer.leaves[layer.main]).ndim > 2
    if axis is None or not length or length % size or not flat:
        raise Unsupported(
            f"{text} writes {size:,} features, and the next layer, {leaves.index.path(number)} {spec}, does not read "
            "as many",
            hint="name layers whose features only the next layer reads",
        )
    # Places of an image in a row: torch has the places of a channel together, JAX the channels of a place.
    times = length // size
    return axis, Use(((text, times),) if reader.main == "weight" else ((text, 1),) * times, True)


def _put(uses: dict[int, list[Use]], leaves: Leaves, number: int, axis: int, use: Use) -> None:
    """Enter an axis of a leaf; the other ones stay until they are entered too."""
    shape = leaves.spec(number).shape
    mine = uses.setdefault(number, [Use(((f"axis {at}", 1),)) for at in range(len(shape))])
    if shape:
        mine[axis] = use
