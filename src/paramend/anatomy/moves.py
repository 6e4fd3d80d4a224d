"""Moves of layers: which layer goes where, and whether it has the leaves that its new place must have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from paramend.anatomy.entries import Names
from paramend.errors import Unsupported
from paramend.reports import wording

Shapes: TypeAlias = Mapping[tuple[str, ...], object]  # path of a leaf within a layer → its shape

# Leaves that models read in the first layer, for all of them.
_FIRST = frozenset({"relative_attention_bias", "global_relative_attention_bias", "rel_attn_embed"})


@dataclass(frozen=True)
class Move:
    """How the layers at a path change."""

    where: Sequence[str]  # their path in the model
    sources: Sequence[int]  # for each new layer the old one that it is made of, from 0
    n: int
    first: int = 0  # the number of the first of them
    blocks: int = 0  # how many blocks that predict further tokens follow them
    # Key → value, as the user wants them in the outcome; dots lead into sections.
    given: Mapping[str, Any] | None = None
    # For each old layer, path of a leaf within it → its shape; None if it is not known.
    leaves: Sequence[Shapes] | None = None

    @property
    def trivial(self) -> bool:
        return list(self.sources) == list(range(self.n))

    def stray(self, path: tuple[str, ...], source: int, target: int) -> bool:
        """Whether a leaf of a layer has no place in a copy of it: all layers read that of the first one."""
        if target == 0 or source != 0 or not _FIRST & set(path) or self.leaves is None:
            return False
        return not any(_FIRST & set(other) for layer in self.leaves[1:] for other in layer)

    def names(self) -> Names:
        to: dict[int, list[int]] = {number: [] for number in range(self.first, self.first + self.n)}
        for target, source in enumerate(self.sources):
            to[self.first + source].append(self.first + target)
        shift = len(self.sources) - self.n
        to |= {self.first + self.n + block: [self.first + self.n + block + shift] for block in range(self.blocks)}
        return Names(self.where, to)

    def holds(self, place: Sequence[str], key: str) -> bool:
        return any(name in (key, ".".join((*place, key))) for name in self.given or ())


def check_places(move: Move, kinds: Sequence[Sequence[object]]) -> None:
    """Raise `Unsupported` if a layer has other leaves than its new place must have; `kinds` is what is said of each.

    Layers of one kind have the same leaves. Where they differ all the same, something that the configuration does not
    say tells them apart by their places: the first or the last layer must stay what it is, or each place must get the
    leaves that it had.
    """
    if move.leaves is None or move.given is not None or move.trivial:
        return
    leaves = [{path: shape for path, shape in layer.items() if not _FIRST & set(path)} for layer in move.leaves]
    first = sorted({name for path in move.leaves[0] for name in _FIRST & set(path)})
    elsewhere = any(_FIRST & set(path) for layer in move.leaves[1:] for path in layer)
    if first and not elsewhere and move.sources[0] != 0:
        raise Unsupported(
            f"{first[0]} is in the first of {'/'.join(move.where)} alone, and all layers use it, so that one must "
            "stay first",
            hint=f"an order that begins with 0: order={[0, *move.sources]}",
        )
    ends = _ends(leaves, kinds)
    for target, source in enumerate(move.sources):
        alike = [layer for layer in range(move.n) if kinds[layer] == kinds[source]]
        usual = max((leaves[layer] for layer in alike), key=[leaves[layer] for layer in alike].count)
        if ends is None:
            wanted = leaves[target] if target < move.n and target in alike else usual
            right = leaves[source] == wanted
        else:
            place = {0: 0, len(move.sources) - 1: move.n - 1}.get(target)
            wanted = leaves[place] if place in ends and place is not None else usual
            right = all((place == end) == (source == end) for end in ends)
        if not right:
            raise _misplaced(move, target, source, leaves[source], wanted)


def _ends(leaves: Sequence[Shapes], kinds: Sequence[Sequence[object]]) -> set[int] | None:
    """The ends of the layers, if without them layers of one kind have the same leaves; None if not even then."""
    n = len(leaves)

    def explained(ends: set[int]) -> bool:
        rest = [layer for layer in range(n) if layer not in ends]
        of_kind: dict[str, Shapes] = {}
        alike = (of_kind.setdefault(repr(kinds[layer]), leaves[layer]) == leaves[layer] for layer in rest)
        return (len(rest) > 1 or not ends) and all(alike)

    if explained(set()):
        return set()
    ends = {end for end in (0, n - 1) if explained({end})}  # both, if either may be the odd one
    return ends or ({0, n - 1} if explained({0, n - 1}) else None)


def _misplaced(move: Move, target: int, source: int, has: Shapes, wants: Shapes) -> Unsupported:
    def told(paths: set[tuple[str, ...]]) -> str:
        return wording.listing(sorted(".".join(path) for path in paths), 3)

    if has == wants:
        return Unsupported(
            f"layer {source} of {'/'.join(move.where)} would become layer {target}: the first and the last layer "
            "may be of kinds of their own, as their leaves differ from those of others",
            hint="config={} moves it all the same; config={key: value} says what the outcome's configuration gets",
        )
    more, less = set(has) - set(wants), set(wants) - set(has)
    what = [f"more: {told(more)}"] * bool(more) + [f"less: {told(less)}"] * bool(less)
    what = what or [f"of other shapes: {told({path for path in has if has[path] != wants[path]})}"]
    return Unsupported(
        f"layer {source} of {'/'.join(move.where)} would become layer {target}, and has other leaves than one there "
        f"({'; '.join(what)}): the configuration does not say which layers have them",
        hint="config={} moves it all the same; config={key: value} says what the outcome's configuration gets",
    )
