"""Forms: how each library holds the parameters of a kind of layer, one row each.

A form opens what a library holds into parts that all forms of a kind share: a weight as (out, in, *space), each gate
and each projection on its own. A port opens the form of the source and closes that of the target, by rules that are
found from the shapes of both.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, TypeAlias

import numpy as np

from paramend.errors import ParamendError
from paramend.grafting.layouts import axes_to_first
from paramend.leaves.origins.stored import Held
from paramend.mapping.steps import Step, read_step

Shape: TypeAlias = tuple[int, ...]
Path: TypeAlias = tuple[str, ...]
# Kind; classes, `library:class` where another library has a class of that name; where channels are in features; leaves
# with the parts that they are opened into, ? for those that may be absent, and how they are opened.
_TABLE = """
linear | Linear NonDynamicallyQuantizableLinear LazyLinear | first | weight; bias?
linear | Dense DenseGeneral Linear LinearGeneral Einsum | last | kernel > weight: in_out; bias?
linear | Einsum:out_first | last | kernel > weight; bias?
linear | Linear | last | w > weight: in_out; b > bias?
linear | Conv1D | first | weight: in_out; bias?
conv | Conv1d Conv2d Conv3d Conv | first | weight; bias?
conv | Conv | last | kernel > weight: in_out; bias?
conv | Conv1D Conv2D Conv3D | last | w > weight: in_out; b > bias?
conv_transpose | torch:ConvTranspose1d torch:ConvTranspose2d torch:ConvTranspose3d | first | weight; bias?
conv_transpose | equinox:ConvTranspose1d equinox:ConvTranspose2d equinox:ConvTranspose3d | first |
    weight: flip_swap; bias?
conv_transpose | ConvTranspose | last | kernel > weight: flip_in_out; bias?
conv_transpose | ConvTranspose:transposed | last | kernel > weight: in_out; bias?
conv_transpose | Conv1DTranspose Conv2DTranspose Conv3DTranspose | last | w > weight: flip_out_in; b > bias?
embedding | Embedding | first | weight > table
embedding | Embed | last | embedding > table
embedding | Embed | last | embeddings > table
norm | LayerNorm RMSNorm GroupNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d | first | weight > scale; bias?
norm | LayerNorm RMSNorm GroupNorm InstanceNorm | last | scale; bias?
norm | LayerNorm RMSNorm GroupNorm InstanceNorm | last | scale; offset > bias?
prelu | PReLU | first | weight > slope
prelu | PReLU | last | negative_slope > slope
batch_norm | BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d | first |
    weight > scale?; bias?; running_mean > mean; running_var > var
batch_norm | BatchNorm | last | scale?; bias?; mean; var
weight_norm | | first | weight_g > g; weight_v > weight; bias?
weight_norm | | last | kernel/scale > g; kernel > weight: in_out; bias?
attention | MultiheadAttention | first |
    in_proj_weight > wq wk wv: split3; in_proj_bias > bq bk bv?: split3; out_proj/weight > wo; out_proj/bias > bo?
attention | MultiheadAttention | first |
    {q,k,v}_proj_weight > w{q,k,v}; in_proj_bias > bq bk bv?: split3; out_proj/weight > wo; out_proj/bias > bo?
attention | MultiheadAttention | first |
    {query,key,value,output}_proj/weight > w{q,k,v,o}; {query,key,value,output}_proj/bias > b{q,k,v,o}?
attention | | first | qkv/weight > wq wk wv: split3; qkv/bias > bq bk bv?: split3; proj/weight > wo; proj/bias > bo?
attention | | first |
    Wqkv/weight > wq wk wv: split3; Wqkv/bias > bq bk bv?: split3; out_proj/weight > wo; out_proj/bias > bo?
attention | MultiHeadAttention MultiHeadDotProductAttention SelfAttention | last |
    {query,key,value,out}/kernel > w{q,k,v,o}: in_out; {query,key,value,out}/bias > b{q,k,v,o}?
attention | MultiHeadAttention | last |
    {query,key,value,linear}/w > w{q,k,v,o}: in_out; {query,key,value,linear}/b > b{q,k,v,o}?
lstm | LSTM LSTMCell | first |
    weight_ih > ii if ig io: split4; weight_hh > hi hf hg ho: split4; bias_ih bias_hh > bi bf bg bo?: sum split4
lstm | LSTMCell | first | weight_ih > ii if ig io: split4; weight_hh > hi hf hg ho: split4; bias > bi bf bg bo?: split4
lstm | LSTMCell OptimizedLSTMCell | last |
    i{i,f,g,o}/kernel > i{i,f,g,o}: in_out; h{i,f,g,o}/kernel > h{i,f,g,o}: in_out; h{i,f,g,o}/bias > b{i,f,g,o}
lstm | LSTMCell | last |
    i{i,f_,g,o}/kernel > i{i,f,g,o}: in_out; h{i,f,g,o}/kernel > h{i,f,g,o}: in_out; h{i,f,g,o}/bias > b{i,f,g,o}
lstm | OptimizedLSTMCell | last | dense_i/kernel > ii if ig io: in_out split4;
    dense_h/kernel > hi hf hg ho: in_out split4; dense_h/bias > bi bf bg bo: split4
gru | GRU GRUCell | first |
    weight_ih > ir iz in: split3; weight_hh > hr hz hn: split3; bias_ih bias_hh > br bz bn bhn?: gru_biases
gru | GRUCell | first | weight_ih > ir iz in: split3; weight_hh > hr hz hn: split3; bias bias_n > br bz bn bhn?: split31
gru | GRUCell | last | i{r,z,n}/kernel > i{r,z,n}: in_out; h{r,z,n}/kernel > h{r,z,n}: in_out;
    i{r,z,n}/bias > b{r,z,n}; hn/bias > bhn
gru | GRUCell | last | dense_i/kernel > ir iz in: in_out split3; dense_h/kernel > hr hz hn: in_out split3;
    dense_i/bias > br bz bn bhn: without_bhn
rnn | RNN RNNCell | first | weight_ih > i; weight_hh > h; bias_ih bias_hh > b?: sum
rnn | SimpleCell | last | i/kernel > i: in_out; h/kernel > h: in_out; i/bias > b
rnn | SimpleCell | last | dense_i/kernel > i: in_out; dense_h/kernel > h: in_out; dense_i/bias > b
"""


@dataclass(frozen=True, eq=False)
class Hold:
    """Leaves of a form that are opened together."""

    names: tuple[str, ...]  # the paths of the leaves within the module
    parts: tuple[str, ...]  # what they are opened into
    do: tuple[str, ...] = ()  # how, in words of `_WORDS`

    def steps(self, ndim: int) -> list[Step]:
        """The steps that open leaves with so many axes."""
        return [step for word in self.do for step in _WORDS[word](ndim)]


@dataclass(frozen=True, eq=False)
class Form:
    """How a library holds a kind."""

    kind: str
    classes: frozenset[str]  # the names of the classes that hold it so, `library:name` where only one library does
    holds: tuple[Hold, ...]  # what they hold; parts that may be absent are `optional`
    optional: frozenset[str] = frozenset()  # these parts
    last: bool = False  # whether channels come last in the library's arrays of features

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(name for hold in self.holds for name in hold.names)

    @cached_property
    def needed(self) -> frozenset[str]:
        """The paths of the leaves that it cannot lack."""
        return frozenset(name for hold in self.holds if not self.optional.issuperset(hold.parts) for name in hold.names)

    def present(self, names: Iterable[str]) -> tuple[Hold, ...]:
        there = set(names)
        return tuple(hold for hold in self.holds if there.issuperset(hold.names))


def _step(name: str, **args: Any) -> Step:
    return read_step({name: args})


def _flipped(ndim: int, axes: Iterable[int], first: int) -> list[Step]:
    """The spatial axes in reverse, and the axes in another order."""
    return [_step("flip", axes=list(range(first, first + ndim - 2))), _step("transpose", axes=list(axes))]


# How a leaf with so many axes becomes (out, in, *space), or for a transposed convolution (in, out, *space).
_WORDS: Mapping[str, Any] = {
    "in_out": lambda n: [_step("transpose", axes=list(axes_to_first(n)))],
    "flip_in_out": lambda n: _flipped(n, (n - 2, n - 1, *range(n - 2)), 0),
    "flip_out_in": lambda n: _flipped(n, (n - 1, n - 2, *range(n - 2)), 0),
    "flip_swap": lambda n: _flipped(n, (1, 0, *range(2, n)), 2),
    "sum": lambda n: [_step("sum")],
    **{
        f"split{parts}": lambda n, each=parts: [_step("split", parts=list(map(int, each)))]
        for parts in ("3", "4", "31")
    },
    # b_ih and b_hh of a GRU: those of r and z add up, those of n stay apart, because r comes between them.
    "gru_biases": lambda n: [
        _step("concat", parts=[2]),
        _step("split", parts=[6]),
        _step("sum", groups=[[0, 3], [1, 4], [2], [5]]),
    ],
    # Without a place for b_hn: it must be zero.
    "without_bhn": lambda n: [_step("split", parts=[3]), _step("spread", groups=[[0], [1], [2]], zero=[3])],
}


def _expanded(text: str) -> Iterator[str]:
    """A text with `{a,b}` once for each choice, all choices in step.

    >>> list(_expanded("{q,k}/kernel > w{q,k}"))
    ['q/kernel > wq', 'k/kernel > wk']
    """
    first, *others = re.split(r"{(.*?)}", text)
    choices = [each.split(",") for each in others[::2]] or [[""]]
    for chosen in zip(*choices, strict=True):
        yield first + "".join(a + b for a, b in zip(chosen, others[1::2], strict=False))


def _read(row: str) -> Form:
    kind, classes, side, text = (part.strip() for part in row.split("|"))
    holds, optional = [], set()
    for each in (one for hold in text.split(";") for one in _expanded(hold)):
        left, _, do = each.partition(":")
        names, _, parts = left.replace("?", "").partition(">")
        hold = Hold(tuple(names.split()), tuple((parts or names).split()), tuple(do.split()))
        holds.append(hold)
        optional |= {*hold.parts} if "?" in left else set()
    return Form(kind, frozenset(classes.split()), tuple(holds), frozenset(optional), side == "last")


# What projections of attention are called in models of the users' own.
_PROJECTIONS = (
    "q,k,v,o q,k,v,out q_proj,k_proj,v_proj,o_proj q_proj,k_proj,v_proj,out_proj wq,wk,wv,wo query,key,value,out"
)
_ROW = "attention | | {side} | {{{names}}}/{leaf} > w{{q,k,v,o}}: {do}; {{{names}}}/bias > b{{q,k,v,o}}?"
_OWN = [
    _ROW.format(names=names, side=side, leaf=leaf, do=do)
    for names in (*_PROJECTIONS.split(), "to_q,to_k,to_v,to_out")
    for side, leaf, do in (("first", "weight", ""), ("last", "kernel", "in_out"))
]
FORMS = tuple(map(_read, [*re.split(r"\n(?! )", _TABLE.strip()), *_OWN]))
# A leaf of no known layer: a class token, a table of positions, a parameter of the user's own.
PARAMETER = Form("parameter", frozenset(), (Hold(("",), ("value",)),))
# Layers of several modules, or of more leaves than a weight and a bias.
NESTED = tuple(form for form in FORMS if any("/" in name for name in form.names) or len(form.needed) > 2)


# A part with these axes is of this kind.
_NDIM = {"linear": (2, 99), "conv": (3, 5), "conv_transpose": (3, 5), "embedding": (2, 2)}
_NDIM |= {"norm": (1, 3), "prelu": (0, 1)}


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
    aligned = _squeezed(shapes[0]) == _squeezed(new[0])
    if not aligned and loose in ("linear", "attention"):
        # Some of the first axes of a kernel are the rows of a matrix, and the rest its columns.
        rows = (math.prod(new[0][:at]) for at in range(1, len(new[0])))
        aligned = len(shapes[0]) == 1 or shapes[0][0] in rows
    if not alike or not aligned:
        return None
    return [*opening, *closing, read_step({"reshape": {"shape": list(new[0]), "back": list(shapes[0])}})]


def _squeezed(shape: Shape) -> Shape:
    return tuple(length for length in shape if length != 1)


def _shortened(steps: Sequence[Step]) -> list[Step]:
    """The steps without those that the next one takes back."""
    kept: list[Step] = []
    for step in steps:
        if kept and kept[-1].inverse() == step:
            kept.pop()
        else:
            kept.append(step)
    return kept
