"""Assembling: a checkpoint put together from leaves of others, which are read only when it is saved."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from paramend.arrays.registry import to_numpy
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.plan import Plan, Row
from paramend.formats.gathered import Gathered, Made, Origin, Part
from paramend.leaves.leaves import Editable
from paramend.leaves.paths import Label
from paramend.leaves.specs import Array, numpy_dtype
from paramend.piecewise.rows import values

# A leaf of the result: its path and where it comes from: an origin, or a tree and the number of its leaf.
Pick = tuple[Sequence[Label], Origin | tuple[Editable, int]]


def assemble(
    base: Checkpoint,
    picks: Iterable[Pick],
    *,
    texts: Mapping[str, bytes] | None = None,
    ties: Mapping[int, int] | None = None,
) -> Checkpoint:
    """A checkpoint of leaves from anywhere, with the format, metadata and sidecars of another one.

    A leaf brings the edits that were planned for it.

    Args:
        base: the checkpoint that gives format, metadata and sidecars.
        picks: the leaves, in order.
        texts: new texts of files beside the weights, by name.
        ties: place in `picks` → the first place of the same leaf, for leaves with several paths. By default, leaves
            that are tied in `base` stay tied if each path is taken once.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from paramend.checkpoints.checkpoint import open
    >>> from paramend.checkpoints.whole import save
    >>> from paramend.edits.selection import at
    >>> from paramend.leaves.paths import labels
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> _ = save({"layers": {"0": np.ones(2, "int8")}}, path)
    >>> small = open(path)
    >>> two = assemble(small, [((*labels("layers"), *labels(n)), (small, 0)) for n in ("0", "1")])
    >>> at(two, "layers[-1]").zero()["layers.1"].tolist(), two["layers.0"].tolist()
    ([0, 0], [1, 1])
    """
    picks = list(picks)
    under = base.source.base if isinstance(base.source, Gathered) else base.source
    before = base.source.texts if isinstance(base.source, Gathered) else {}
    taken = [_taken(pick[1]) for pick in picks]
    paths = [pick[0] for pick in picks]
    gathered = Gathered(
        under,
        zip(paths, (origin for origin, _ in taken), strict=True),
        texts={**before, **(texts or {})},
        ties=_ties(base, [pick[1] for pick in picks]) if ties is None else ties,
    )
    made = Plan.of(gathered)
    if not any(row is not None and row.calls for _, row in taken):
        return Checkpoint(gathered, raw=base.raw)
    rows = (
        mine if row is None else replace(mine, spec=row.spec, calls=row.calls, places=row.places)
        for mine, (_, row) in zip(made.rows, taken, strict=True)
    )
    return Checkpoint(gathered, Plan(gathered, tuple(rows)), raw=base.raw)


def _taken(given: Origin | tuple[Editable, int]) -> tuple[Origin, Any]:
    """Where a leaf comes from, and its row in the plan; None if it has no edits."""
    if not isinstance(given, tuple):
        return given, None
    tree, number = given
    if not isinstance(tree, Checkpoint):
        return origin_of(tree, number), None
    return _unedited(tree.source, number), None if tree.untouched else tree.plan.by_number[number]


def _unedited(source: Any, number: int) -> Origin:
    return source.origins[number] if isinstance(source, Gathered) else Part(source, number)


def origin_of(tree: Any, number: int) -> Origin:
    """The origin of a leaf of a tree, or of a checkpoint with the edits that were planned for it."""
    if not isinstance(tree, Checkpoint):
        return Made(tree.spec(number), lambda: to_numpy(tree.read(number)))
    row = None if tree.untouched else tree.plan.by_number[number]
    return Edited(tree.source, row) if row is not None and row.calls else _unedited(tree.source, number)


class Edited:
    """A leaf of a source with edits, which are computed piece by piece as it is read from first to last.

    Attributes:
        source: the source.
        spec: shape and dtype after the edits.
    """

    refusal = ""
    extent = None

    def __init__(self, source: Any, row: Row) -> None:
        self.source, self.spec = source, row.spec
        self._row = row
        self._end()

    def _end(self) -> None:
        """Drop the last piece; the next range is computed from the first element on."""
        self._pieces: Iterator[Array] = iter(())
        self._piece = np.empty(0, numpy_dtype(self.spec.dtype))
        self._at = self.spec.size

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    def read_range(self, start: int, stop: int) -> Array:
        if start < min(self._at, stop):
            self._end()
            self._pieces, self._at = values(self.source, self._row), 0
        found = [self._piece[:0]]
        while start < stop:
            after = self._at + self._piece.size
            if start < after:
                found.append(self._piece[start - self._at : stop - self._at])
                start = after
            else:
                self._at, self._piece = after, next(self._pieces)
        if stop >= self.spec.size:
            self._end()
        return np.concatenate(found)


def _ties(base: Checkpoint, given: Sequence[Any]) -> dict[int, int]:
    """The leaves of the result that are tied."""
    if not base.ties:
        return {}
    places: dict[int, list[int]] = {}
    for place, pick in enumerate(given):
        if isinstance(pick, tuple) and isinstance(pick[0], Checkpoint) and pick[0].source is base.source:
            places.setdefault(pick[1], []).append(place)
    ties: dict[int, int] = {}
    first: dict[int, int] = {}
    for number, found in places.items():
        unit = base.ties.get(number)
        if unit is not None and len(found) == 1:
            ties[found[0]] = first.setdefault(unit, found[0])
    shared = {one for number, one in ties.items() if number != one}
    return {number: one for number, one in ties.items() if one in shared}
