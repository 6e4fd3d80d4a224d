"""Kinds: the rules between two forms of one kind of layer, found from their shapes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, TypeAlias

import numpy as np

from paramend.errors import ParamendError
from paramend.leaves.origins.stored import Held
from paramend.mapping.steps import Step, read_step
from paramend.porting.forms import Form, Hold

Shape: TypeAlias = tuple[int, ...]
Path: TypeAlias = tuple[str, ...]


# A part with these axes is of this kind.
_NDIM = {
    "linear": (2, 99),
    "conv": (3, 5),
    "conv_transpose": (3, 5),
    "embedding": (2, 2),
    "norm": (1, 3),
    "prelu": (0, 1),
}


@dataclass(frozen=True)
class Shaped:
    """A form with the shapes of its leaves."""

    form: Form
    shapes: tuple[tuple[str, Shape], ...]  # the paths of the leaves within the module, and their shapes

    @property
    def holds(self) -> tuple[Hold, ...]:
        return self.form.present(name for name, _ in self.shapes)

    @cached_property
    def key(self) -> tuple[Any, ...] | None:
        """What a form of the other side must share: the kind, and the sizes of its parts. None if it does not open."""
        return _key(self)

    def of(self, hold: Hold) -> list[Shape]:
        known = dict(self.shapes)
        return [known[name] for name in hold.names]


@cache
def _key(shaped: Shaped) -> tuple[Any, ...] | None:
    low, high = _NDIM.get(shaped.form.kind, (0, 99))
    if shaped.form.kind == "linear" and not shaped.form.last:
        high = 2  # only kernels may have several axes of inputs or outputs
    if not low <= len(shaped.shapes[0][1]) <= high:
        return None
    sizes: list[tuple[str, int]] = []
    for hold in shaped.holds:
        shapes = shaped.of(hold)
        made = simulated(hold.steps(len(shapes[0])), shapes, len(hold.parts))
        if made is None:
            return None
        sizes += zip(hold.parts, map(math.prod, made), strict=True)
    return shaped.form.kind, tuple(sorted(sizes))


def simulated(steps: Sequence[Step], shapes: Sequence[Shape], count: int) -> list[Shape] | None:
    """The shapes that steps make of others; None if they do not fit."""
    bundle: list[Any] = [{(): Held(np.broadcast_to(np.zeros((), "int8"), shape))} for shape in shapes]
    try:
        for step in steps:
            bundle = step.run(bundle, count)
    except ParamendError:
        return None
    made = [family[()].spec.shape for family in bundle]
    return made if len(made) == count else None


@dataclass(frozen=True)
class Move:
    """A rule of a layout between two modules."""

    sources: tuple[str, ...]  # the paths of the leaves within the module of the source
    targets: tuple[str, ...]  # those within that of the target
    do: tuple[Step, ...] = field(default=())


@cache
def moves(source: Shaped, target: Shaped) -> tuple[Move, ...] | None:
    """The rules that make the leaves of one form of those of another of its kind; None if they do not fit."""
    found: list[Move] = []
    left = list(target.holds)
    if {p for hold in source.holds for p in hold.parts} != {p for hold in left for p in hold.parts}:
        return None
    rest = list(source.holds)
    while rest:
        ours, theirs, parts = [rest.pop(0)], [], {*()}
        while True:  # until both sides hold the same parts
            parts = {part for hold in ours for part in hold.parts}
            theirs = [hold for hold in left if parts & {*hold.parts}]
            more = [hold for hold in rest if {*hold.parts} & {part for each in theirs for part in each.parts}]
            if not more:
                break
            ours, rest = ours + more, [hold for hold in rest if hold not in more]
        left = [hold for hold in left if hold not in theirs]
        move = _move(source, ours, target, theirs)
        if move is None:
            return None
        found.append(move)
    return tuple(found)


def _move(source: Shaped, ours: Sequence[Hold], target: Shaped, theirs: Sequence[Hold]) -> Move | None:
    order = [part for hold in (ours if len(ours) >= len(theirs) else theirs) for part in hold.parts]
    ours = sorted(ours, key=lambda hold: order.index(hold.parts[0]))
    theirs = sorted(theirs, key=lambda hold: order.index(hold.parts[0]))
    if [p for hold in ours for p in hold.parts] != [p for hold in theirs for p in hold.parts]:
        return None
    old = [shape for hold in ours for shape in source.of(hold)]
    new = [shape for hold in theirs for shape in target.of(hold)]
    sources, targets = (tuple(name for hold in holds for name in hold.names) for holds in (ours, theirs))
    if ours[0].do == theirs[0].do and len(ours) == len(theirs) == 1 and old == new:
        return Move(sources, targets)
    backwards = max(map(len, old)) > max(map(len, new))  # a kernel of many axes takes its shape from the other side
    first, last = (theirs, ours) if backwards else (ours, theirs)
    steps = _steps(first, last, *((new, old) if backwards else (old, new)), loose=source.form.kind)
    if steps is None:
        return None
    steps = [step.inverse() for step in reversed(steps)] if backwards else steps
    return Move(sources, targets, tuple(_shortened(steps)))


def _steps(
    ours: Sequence[Hold], theirs: Sequence[Hold], old: Sequence[Shape], new: Sequence[Shape], loose: str
) -> list[Step] | None:
    """The steps between holds, of which the first has no more axes than the second."""
    if any(hold.do != holds[0].do for holds in (ours, theirs) for hold in holds):
        return None
    count = sum(len(hold.parts) for hold in ours)
    opening = ours[0].steps(len(old[0]))
    opened = simulated(opening, old, count)
    if opened is None:
        return None
    matrix = len(opened[0]) == 2 and len(new[0]) > 2 and loose in ("linear", "attention")
    closing = [step.inverse() for step in reversed(theirs[0].steps(2 if matrix else len(new[0])))]
    shapes = simulated([*opening, *closing], old, len(new))
    if shapes is None:
        return None
    if shapes == list(new):
        return [*opening, *closing]
    alike = len({*shapes}) == len({*new}) == 1 and math.prod(shapes[0]) == math.prod(new[0])
    aligned = _squeezed(shapes[0]) == _squeezed(new[0]) or (
        loose in ("linear", "attention") and (len(shapes[0]) == 1 or _aligned(shapes[0], new[0]))
    )
    if not alike or not aligned:
        return None
    return [*opening, *closing, read_step({"reshape": {"shape": list(new[0]), "back": list(shapes[0])}})]


def _squeezed(shape: Shape) -> Shape:
    return tuple(length for length in shape if length != 1)


def _aligned(matrix: Shape, shape: Shape) -> bool:
    """Whether some of the first axes of a kernel are the rows of a matrix, and the rest its columns."""
    return any(math.prod(shape[:at]) == matrix[0] for at in range(1, len(shape)))


def _shortened(steps: Sequence[Step]) -> list[Step]:
    """The steps without those that the next one takes back."""
    kept: list[Step] = []
    for step in steps:
        if kept and kept[-1].inverse() == step:
            kept.pop()
        else:
            kept.append(step)
    return kept
