"""`prove`: whether two models compute the same, and which layer is the first that does not."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paramend.errors import BadArgument, printable_lines
from paramend.pages.page import Page
from paramend.pages.paged import Paged
from paramend.porting.calls import Call, Run, run
from paramend.porting.values import Values, largest, noted
from paramend.reports import wording
from paramend.reports.fields import fields_of, picked
from paramend.reports.tables import aligned

Move = tuple[int, int]
# Channels first ↔ channels last, with an axis of examples and without.
MOVES: tuple[Move, ...] = ((1, -1), (-1, 1), (0, -1), (-1, 0))


def moves(target: Values, source: Values) -> set[Move]:
    """The moves of an axis that make the source's array the target's."""
    if not 3 <= source.ndim <= 5 or np.array_equal(target, source):
        return set()
    return {move for move in MOVES if np.array_equal(np.moveaxis(source, *move), target)}


def distance(
    target: Values, source: Values, turned: Collection[Move] | None = None, *, least: float = 0.0
) -> tuple[float, float]:
    """The largest absolute difference, and its share of the largest value; inf for shapes that do not fit.

    Outputs may agree after one of the moves of an axis in `turned`. What layers return (None) may also have axes that
    are split, and time and examples change places. Values below `least` are small.

    >>> distance(np.array([[1.0, 2.0]]), np.array([1.0, 2.5]))
    (0.5, 0.2)
    """
    found = [_difference(target, seen) for seen in _views(source, target.shape, turned)]
    difference = min(found, default=np.inf)
    scale = max(largest(target), largest(source), least)
    return difference, difference / scale if difference else 0.0


def _views(source: Values, shape: tuple[int, ...], turned: Collection[Move] | None) -> Iterator[Values]:
    """The ways to see the source's array in the shape of the target's."""
    if source.size == np.prod(shape) and (turned is None or _squeezed(source.shape) == _squeezed(shape)):
        yield source.reshape(shape)
    some = MOVES if 3 <= source.ndim <= 5 else ()
    views = [np.moveaxis(source, *move) for move in some if turned is None or move in turned]
    views += [source.swapaxes(0, 1)] if turned is None and source.ndim == 3 else []
    yield from (each for each in views if each.shape == shape)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if shape[:1] == (1,) else shape


def _difference(one: Values, other: Values) -> float:
    apart = ~((one == other) | ((one != one) & (other != other)))
    if not apart.any():
        return 0.0
    with np.errstate(invalid="ignore"):
        found = np.abs(one[apart].astype("complex128") - other[apart]).max()
    return float(found) if found == found else np.inf


_SHOWN = 12  # layers before the first that differs
Pairs = Collection[tuple[str, str]] | None


@dataclass(frozen=True, slots=True)
class ProofRow:
    """One output of both models, or of a layer of both.

    Attributes:
        target: the path of the layer in the target, or the place of the output in what it returned.
        source: the same in the source.
        kinds: the classes of both layers.
        shapes: of the target's array and the source's.
        difference: the largest absolute difference; inf for shapes that do not fit, or NaN on one side.
        relative: the same as a share of the largest value.
        agrees: whether this is within the tolerance.
        inputs: whether the inputs of the layers agree.
    """

    target: str
    source: str
    kinds: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    difference: float
    relative: float
    agrees: bool
    inputs: bool = True

    @property
    def name(self) -> str:
        """Both sides, with their classes."""
        sides = zip((self.target, self.source), self.kinds, strict=True)
        return " ◄─ ".join(f"{path} ({kind})" if path and kind else path or kind or "output" for path, kind in sides)

    @property
    def path(self) -> str:
        """Where it is in the target."""
        return self.target or "output"

    @property
    def size(self) -> int:
        """The number of scalars of the target's array."""
        return math.prod(self.shapes[0])

    @property
    def both(self) -> str:
        """The classes of both layers, as text."""
        return " ◄─ ".join(self.kinds)

    def to_dict(self) -> dict[str, Any]:
        known = math.isfinite(self.relative)
        return picked(self, *fields_of(self)) | ({} if known else {"difference": None, "relative": None})


@dataclass(repr=False)
class Proof(Paged):
    """Whether two models compute the same in float64; false if they do not, or if nothing could be compared.

    Attributes:
        tolerance: how far apart results may be, as a share of the largest value.
        outputs: the outputs of both.
        layers: the layers of both that belong together, as they were called.
        before: what either side calls between the last layer that agrees and the first that does not.
        alone: how many outputs one side has and the other has not.
    """

    _data = ("tolerance", "first", "outputs", "layers", "before", "alone")

    tolerance: float
    outputs: list[ProofRow] = field(default_factory=list)
    layers: list[ProofRow] = field(default_factory=list)
    before: tuple[str, ...] = ()
    alone: int = 0

    def __bool__(self) -> bool:
        return bool(self.outputs) and all(row.agrees for row in self.outputs)

    @property
    def first(self) -> ProofRow | None:
        """The first layer that differs, as they are called; None if the outputs agree, or all layers do."""
        return None if self else next((row for row in self.layers if not row.agrees), None)

    def headline(self) -> str:
        """Whether they agree, how closely, and where they part."""
        said = f"{wording.plural(len(self.outputs), 'output')} compared"
        said += f", {self.alone} without counterpart" if self.alone else ""
        worst = max(self.outputs, key=lambda row: row.relative, default=None)
        if worst is None or (not self and worst.relative <= self.tolerance):
            return f"nothing is proven: {said}{', one without a finite value' if worst else ''}"
        within = f"{worst.relative:.2g} of the largest value (tolerance {self.tolerance:g})"
        if self:
            return f"both compute the same: {said}, {within}; {wording.plural(len(self.layers), 'layer')} compared"
        if math.isinf(worst.difference) and worst.shapes[0] != worst.shapes[1]:
            within = f"shape {worst.shapes[0]} in the target, {worst.shapes[1]} in the source"
        return f"the outputs differ: {said}, {within}; {self._where()}"

    def _where(self) -> str:
        first = self.first
        if first is None:
            return "no layers could be compared" if not self.layers else "all layers that were compared agree"
        if first.inputs and (first.target or first.source or len(self.layers) == 1):
            return f"the first layer that differs is {first.name}: its inputs agree"
        place = self.layers.index(first)
        after = f", after {self.layers[place - 1].name}" if place else ""
        between = f"; between them {wording.listing(self.before)}" if self.before else ""
        given = f" in what {first.name} is given" if first.target or first.source else ""
        return f"the first difference is{given}{after}{between}"

    def __str__(self) -> str:
        ends = [place for place, row in enumerate(self.layers, 1) if not row.agrees]
        shown = self.layers[max(ends[0] - _SHOWN, 0) : ends[0]] if ends and not self else self.layers[-_SHOWN:]
        titles = ("", "shape", "difference", "relative", "")
        table = [titles, *((row.name, *_cells(row)) for row in (*shown, *self.outputs))]
        return "\n".join([printable_lines(self.headline()), "", *aligned(table, right="llrrl")])

    def to_dict(self) -> dict[str, Any]:
        return {"agrees": bool(self)} | super().to_dict()

    def page(self) -> Page:
        """A map of the layers and outputs, coloured by whether they agree."""
        rows = [*self.layers, *self.outputs]
        groups = ["agrees" if row.agrees else "differs" for row in rows]
        columns = "relative", "difference", "source", "both as kinds"
        return Page.of_rows("proof", self.headline(), rows, *columns, size="size", groups=groups, group_title="result")


def _cells(row: ProofRow) -> tuple[str, ...]:
    shapes = [str(list(shape)).replace(" ", "") for shape in dict.fromkeys(row.shapes)]
    numbers = f"{row.difference:.3g}", f"{row.relative:.3g}"
    return " ◄─ ".join(shapes), *numbers, "" if row.agrees else "differs"


def prove(target: object, source: object, inputs: object, *, tolerance: float = 1e-11, pairs: Pairs = None) -> Proof:
    """A report, false if two models do not compute the same, of where they part.

    Copies of both run in float64, whatever their dtypes: parameters, statistics and modes stay, and dropout passes on
    what it is given. The outputs must agree in their order, or by their names where both have names; a batch of one
    may lack its axis, and channels may stand first on one side and last on the other if they do so in the inputs, or if
    images are made of inputs that are none.
    Modules are compared while both run, whichever way round their axes are.

    Zeros and ones hide mistakes: compare models with trained or random parameters. `pm.port(prove=)` makes some.

    Args:
        target: a torch, NNX or Equinox module, a bound linen module, or a function.
        source: the same.
        inputs: a tuple of arguments or a dict of keywords for both; or `{"target": ..., "source": ...}`.
        tolerance: how far apart results may be, as a share of the largest value.
        pairs: the paths of modules of the target and of the source that belong together; None to find them by their
            classes, their shapes and the order in which they are called.

    Raises:
        BadArgument: a model cannot run, the tolerance is negative, or inputs are given for one side alone.

    >>> import torch
    >>> right = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4, eps=1e-5))
    >>> wrong = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4, eps=1e-6))
    >>> wrong.load_state_dict(right.state_dict())
    <All keys matched successfully>
    >>> bool(prove(right, right, (torch.ones(2, 3),)))
    True
    >>> proof = prove(wrong, right, (torch.ones(2, 3),))
    >>> bool(proof), proof.first.target, proof.first.inputs
    (False, '1', True)
    """
    if not tolerance >= 0:
        raise BadArgument(f"tolerance={tolerance!r} is not a share of the largest value", hint="tolerance=1e-11")
    given = sides_of(inputs)
    ours, theirs = (_run(model, given[side], side) for side, model in (("target", target), ("source", source)))
    left, right = (list((noted(given[side]) or {}).values()) for side in ("target", "source"))
    same = [(name, name) for name in ours.outputs if name in theirs.outputs]
    names = same or list(zip(ours.outputs, theirs.outputs, strict=False))
    proof = Proof(tolerance, alone=len(ours.outputs) + len(theirs.outputs) - 2 * len(names))
    turned = {move for one, other in zip(left, right, strict=False) for move in moves(one, other)}
    for one, other in names:
        values, others = ours.outputs[one], theirs.outputs[other]
        free = values.ndim > 3 and all(each.ndim < 3 for each in (*left, *right))  # images made of none
        found = distance(values, others, MOVES if free else turned, least=_least(left))
        shapes = (values.shape, others.shape)
        agrees = found[1] <= tolerance and bool(np.isfinite(values).any())
        proof.outputs.append(ProofRow(one, other, ("", ""), shapes, *found, agrees))
    noted_here, noted_there = ([call for call in each.calls if call.outputs] for each in (ours, theirs))
    _compare_layers(proof, noted_here, noted_there, pairs)
    return proof


def _compare_layers(proof: Proof, ours: list[Call], theirs: list[Call], pairs: Pairs) -> None:
    """Add the layers of both, and what lies before the first that differs."""
    last = (-1, -1)
    for i, j in paired(ours, theirs, pairs):
        one, other = ours[i], theirs[j]
        shapes = (one.outputs[0].shape, other.outputs[0].shape)
        found = _apart(one.outputs, other.outputs, _least(one.inputs))
        inputs = _apart(one.inputs, other.inputs)[1] <= proof.tolerance
        agrees = found[1] <= proof.tolerance
        row = ProofRow(one.path, other.path, (one.kind, other.kind), shapes, *found, agrees, inputs)
        if all(each.agrees for each in proof.layers):
            between = (*ours[last[0] + 1 : i], *theirs[last[1] + 1 : j])
            proof.before = tuple(f"{call.path}: {call.kind}" for call in between if not call.composite)
        proof.layers.append(row)
        last = i, j


def _apart(ours: tuple[Values, ...], theirs: tuple[Values, ...], least: float = 0.0) -> tuple[float, float]:
    """How far the arrays of two calls are apart: all of them if there are as many, else the first."""
    count = None if len(ours) == len(theirs) else 1
    found = [distance(one, other, least=least) for one, other in zip(ours[:count], theirs[:count], strict=False)]
    return max(found, key=lambda each: each[1], default=(0.0, 0.0))


def _least(inputs: Sequence[Values]) -> float:
    """What is small beside the inputs: a difference of larger numbers, of which rounding is a larger share."""
    return 0.1 * max((largest(each) for each in inputs if each.dtype.kind in "fc"), default=0.0)


def sides_of(inputs: Any) -> dict[str, Any]:
    """The inputs of the target and of the source."""
    if isinstance(inputs, Mapping) and (there := {"target", "source"} & set(inputs)):
        if len(there) < 2 or len(inputs) > 2:
            why = f"the inputs are named {wording.listing(list(inputs))}"
            raise BadArgument(why, hint='{"target": (x,), "source": (x,)}')
        return dict(inputs)
    return {"target": inputs, "source": inputs}


def _run(model: object, inputs: object, side: str) -> Run:
    try:
        return run(model, inputs)
    except Exception as error:
        error.add_note(f"raised by the {side} of a proof")
        raise


# Words in the names of classes that frameworks give to layers of one kind.
_WORDS = {
    "transpose": "conv transpose", "deconv": "conv transpose", "conv": "conv", "patchembed": "conv",
    "batchnorm": "batch norm", "layernorm": "layer norm", "rmsnorm": "rms norm", "groupnorm": "group norm",
    "attention": "attention", "embed": "embedding", "lstm": "recurrent", "gru": "recurrent", "rnn": "recurrent",
    "linear": "dense", "dense": "dense", "einsum": "dense",
}  # fmt: skip


def family(kind: str) -> str:
    """What kind of layer a class is, by its name."""
    name = kind.lower()
    return next((family for word, family in _WORDS.items() if word in name), name)


def paired(
    target: Sequence[Call], source: Sequence[Call], pairs: Collection[tuple[str, str]] | None = None
) -> list[tuple[int, int]]:
    """The numbers of calls of two models that belong together, in the order of both. Without the `pairs` of paths of
    modules they are found: of one kind or with equal values, in outputs of one size."""
    known = None if pairs is None else set(pairs)
    # What stays when axes change places: how many values there are, and their sum without signs.
    outputs = ([call.outputs[0] for call in calls] for calls in (target, source))
    ours, theirs = ([(each.size, float(np.abs(each).sum())) for each in side] for side in outputs)

    def score(i: int, j: int) -> int:
        if not target[i].path and not source[j].path:
            return 8  # the models themselves
        if known is not None:
            return int((target[i].path, source[j].path) in known)
        (size, total), (other_size, other) = ours[i], theirs[j]
        if size != other_size:
            return 0
        alike = 4 * (family(target[i].kind) == family(source[j].kind))
        equal = 2 * (abs(total - other) <= 1e-9 * max(total, other))
        return (alike + equal) and alike + equal + (target[i].composite == source[j].composite)

    # The best common subsequence, from the ends.
    best = [[0] * (len(source) + 1) for _ in range(len(target) + 1)]
    scores = [[score(i, j) for j in range(len(source))] for i in range(len(target))]
    for i in range(len(target) - 1, -1, -1):
        for j in range(len(source) - 1, -1, -1):
            taken = scores[i][j] and scores[i][j] + best[i + 1][j + 1]
            best[i][j] = max(best[i + 1][j], best[i][j + 1], taken)
    found, i, j = [], 0, 0
    while i < len(target) and j < len(source):
        if scores[i][j] and best[i][j] == scores[i][j] + best[i + 1][j + 1]:
            found.append((i, j))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return found
