"""Assembling: a checkpoint put together from leaves of others, which are read only when it is saved."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from paramend.anatomy.documents import Document
from paramend.arrays.registry import to_numpy
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.checkpoints.gathering import gathered, ties_of
from paramend.formats.gathered import leaf_of
from paramend.leaves.leaves import Editable
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.stored import Made
from paramend.leaves.paths import Label

# A leaf of the result: its path and where it comes from: an origin, or a tree and the number of its leaf.
Pick = tuple[Sequence[Label], Origin | tuple[Editable, int]]


def assemble(
    base: Checkpoint, picks: Iterable[Pick], *, texts: Iterable[Document] = (), ties: Mapping[int, int] | None = None
) -> Checkpoint:
    """A checkpoint of leaves from anywhere, with the format, metadata and sidecars of another one, `base`, and the
    files beside the weights that change.

    A leaf brings the edits that were planned for it. Ties are place in `picks` → the first place of the same leaf, for
    leaves with several paths; by default, leaves that are tied in `base` stay tied if each path is taken once.
    """
    picks = list(picks)
    leaves = [(path, *_taken(given)) for path, given in picks]
    if ties is None:
        own: dict[int, list[int]] = {}
        for place, (_, given) in enumerate(picks):
            if isinstance(given, tuple) and isinstance(given[0], Checkpoint) and given[0].source is base.source:
                own.setdefault(given[1], []).append(place)
        ties = ties_of(base.ties, own)
    changed = {each.name: each for each in (*base.texts, *texts)}
    return base.remade(gathered(base.source, leaves, texts=tuple(changed.values()), ties=ties))


def exchanged(
    base: Checkpoint,
    new: Mapping[int, Origin | tuple[Editable, int]],
    more: Iterable[Pick] = (),
    *,
    texts: Iterable[Document] = (),
    ties: Mapping[int, int] = MappingProxyType({}),
) -> Checkpoint:
    """A checkpoint with other values in the places of some leaves, and more leaves at its end, which may have `ties`;
    its own stay, and so do its marked layers."""
    numbers = base.index.numbers
    own: list[Pick] = [(base.index.paths[number], new.get(number, (base, number))) for number in numbers]
    kept = ties_of(base.ties, {number: [place] for place, number in enumerate(numbers)})
    made = assemble(base, [*own, *more], texts=texts, ties=kept | dict(ties))
    for path, layers in base.index.layers.items():
        made.index.mark(path, layers)
    return made


def _taken(given: Origin | tuple[Editable, int]) -> tuple[Origin, Any]:
    """Where a leaf comes from, and its row in the plan; None if it has no edits."""
    if not isinstance(given, tuple):
        return given, None
    tree, number = given
    if not isinstance(tree, Checkpoint):
        return origin_of(tree, number), None
    return leaf_of(tree.source, number), None if tree.untouched else tree.plan.by_number[number]


def origin_of(tree: Any, number: int) -> Origin:
    """The origin of a leaf of a tree, or of a checkpoint with the edits that were planned for it."""
    if not isinstance(tree, Checkpoint):
        return Made(tree.spec(number), lambda: to_numpy(tree.read(number)))
    return tree.expression(number)
