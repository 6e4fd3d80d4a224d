"""Kinds of layers: one row says how every library holds the parameters of a layer.

A form opens what a library holds into parts that all forms of a kind share: a weight as (out, in, *space), each gate
and each projection on its own. A port opens the form of the source and closes that of the target.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
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


@dataclass(frozen=True, eq=False)
class Hold:
    """Leaves of a form that are opened together.

    Attributes:
        names: the paths of the leaves within the module.
        parts: what they are opened into.
        do: how: steps as data, and words of `_WORDS`, which depend on the number of axes.
    """

    names: tuple[str, ...]
    parts: tuple[str, ...]
    do: tuple[Any, ...] = ()

    def steps(self, ndim: int) -> list[Step]:
        """The steps that open leaves with so many axes."""
        return [step for each in self.do for step in (_WORDS[each](ndim) if isinstance(each, str) else [each])]


@dataclass(frozen=True, eq=False)
class Form:
    """How a library holds a kind.

    Attributes:
        kind: the kind.
        classes: the names of the classes that hold it so, `library:name` where only one library does.
        holds: what they hold; parts that may be absent are `optional`.
        optional: these parts.
        last: whether channels come last in the library's arrays of features.
    """

    kind: str
    classes: frozenset[str]
    holds: tuple[Hold, ...]
    optional: frozenset[str] = frozenset()
    last: bool = False

    @cached_property
    def names(self) -> frozenset[str]:
        """The paths of all leaves."""
        return frozenset(name for hold in self.holds for name in hold.names)

    @cached_property
    def needed(self) -> frozenset[str]:
        """The paths of the leaves that it cannot lack."""
        return frozenset(name for hold in self.holds if not self.optional.issuperset(hold.parts) for name in hold.names)

    def present(self, names: Iterable[str]) -> tuple[Hold, ...]:
        """The holds whose leaves are there."""
        there = set(names)
        return tuple(hold for hold in self.holds if there.issuperset(hold.names))


def _step(name: str, **args: Any) -> Step:
    return read_step({name: args})


def _flipped(ndim: int, axes: Sequence[int], first: int) -> list[Step]:
    """The spatial axes in reverse, and the axes in another order."""
    return [_step("flip", axes=list(range(first, first + ndim - 2))), _step("transpose", axes=list(axes))]


# How a leaf with so many axes becomes (out, in, *space), or for a transposed convolution (in, out, *space).
_WORDS: Mapping[str, Any] = {
    "in_out": lambda n: [_step("transpose", axes=list(axes_to_first(n)))],
    "flipped": lambda n: _flipped(n, (n - 2, n - 1, *range(n - 2)), 0),
    "flipped_last": lambda n: _flipped(n, (n - 1, n - 2, *range(n - 2)), 0),
    "flipped_out_in": lambda n: _flipped(n, (1, 0, *range(2, n)), 2),
}
_GATES = {"lstm": "ifgo", "gru": "rzn", "rnn": "h"}


def _hold(names: str, parts: str, *do: Any) -> Hold:
    return Hold(tuple(names.split()), tuple(parts.split()), do)


def _form(kind: str, classes: str, *holds: Hold, optional: str = "bias", last: bool = False) -> Form:
    return Form(kind, frozenset(classes.split()), holds, frozenset(optional.split()), last)


_WEIGHT, _KERNEL, _W = (
    _hold("weight", "weight"),
    _hold("kernel", "weight", "in_out"),
    _hold("w", "weight", "in_out"),
)
_BIAS, _B, _OFFSET = _hold("bias", "bias"), _hold("b", "bias"), _hold("offset", "bias")
_SCALE = _hold("scale", "scale")


def _attention(weight: str, *names: str, do: Sequence[Any] = (), classes: str = "", last: bool = False) -> Form:
    """Attention with a module for each projection."""
    bias = "b" if weight == "w" else "bias"
    holds = [
        hold
        for part, name in zip("qkvo", names, strict=True)
        for hold in (_hold(f"{name}/{weight}", f"w{part}", *do), _hold(f"{name}/{bias}", f"b{part}"))
    ]
    return _form("attention", classes, *holds, optional="bq bk bv bo", last=last)


def _packed(weight: str, bias: str, out: str) -> Form:
    """Attention with one leaf for q, k and v."""
    three = _step("split", parts=[3])
    holds = (_hold(weight, "wq wk wv", three), _hold(bias, "bq bk bv", three))
    out_holds = (_hold(f"{out}/weight", "wo"), _hold(f"{out}/bias", "bo"))
    return _form("attention", "MultiheadAttention", *holds, *out_holds, optional="bq bk bv bo")


def _parts(kind: str, letter: str) -> str:
    return " ".join(f"{letter}{gate}" for gate in _GATES[kind])


def _gates(kind: str, ih: str, hh: str, *do: Any) -> list[Hold]:
    """The two packed weights of a recurrent layer."""
    split = _step("split", parts=[len(_GATES[kind])])
    return [_hold(ih, _parts(kind, "i"), *do, split), _hold(hh, _parts(kind, "h"), *do, split)]


_SUMMED = (_step("sum"),)
# b_ih and b_hh of a GRU: those of r and z add up, those of n stay apart, because r comes between them.
_GRU = (
    _step("concat", parts=[2]),
    _step("split", parts=[6]),
    _step("sum", groups=[[0, 3], [1, 4], [2], [5]]),
)
_GRU_PARTS = "br bz bn bhn"
# Without a place for b_hn: it must be zero.
_NO_HN = (_step("split", parts=[3]), _step("spread", groups=[[0], [1], [2]], zero=[3]))


def _cell(names: Mapping[str, str], biases: Mapping[str, str], kind: str, classes: str) -> Form:
    """A cell with a module for each gate."""
    holds = [_hold(f"{name}/kernel", part, "in_out") for part, name in names.items()]
    return _form(kind, classes, *holds, *(_hold(f"{n}/bias", p) for p, n in biases.items()), optional="", last=True)


def _split(count: int) -> Step:
    return _step("split", parts=[count])


_TORCH_BIASES = "bias_ih bias_hh"
_LSTM = _parts("lstm", "b")
FORMS: tuple[Form, ...] = (
    # ---- one leaf, or a weight and a bias
    _form("linear", "Linear NonDynamicallyQuantizableLinear LazyLinear", _WEIGHT, _BIAS),
    _form("linear", "Dense DenseGeneral Linear LinearGeneral Einsum", _KERNEL, _BIAS, last=True),
    _form("linear", "Einsum:out_first", _hold("kernel", "weight"), _BIAS, last=True),
    _form("linear", "Linear", _W, _B, last=True),
    _form("linear", "Conv1D", _hold("weight", "weight", "in_out"), _BIAS),
    _form("conv", "Conv1d Conv2d Conv3d Conv", _WEIGHT, _BIAS),
    _form("conv", "Conv", _KERNEL, _BIAS, last=True),
    _form("conv", "Conv1D Conv2D Conv3D", _W, _B, last=True),
    _form("conv_transpose", "torch:ConvTranspose1d torch:ConvTranspose2d torch:ConvTranspose3d", _WEIGHT, _BIAS),
    _form("conv_transpose", "ConvTranspose", _hold("kernel", "weight", "flipped"), _BIAS, last=True),
    _form("conv_transpose", "ConvTranspose:transposed", _KERNEL, _BIAS, last=True),
    _form(
        "conv_transpose",
        "Conv1DTranspose Conv2DTranspose Conv3DTranspose",
        _hold("w", "weight", "flipped_last"),
        _B,
        last=True,
    ),
    _form(
        "conv_transpose",
        "equinox:ConvTranspose1d equinox:ConvTranspose2d equinox:ConvTranspose3d",
        _hold("weight", "weight", "flipped_out_in"),
        _BIAS,
    ),
    _form("embedding", "Embedding", _hold("weight", "table")),
    _form("embedding", "Embed", _hold("embedding", "table"), last=True),
    _form("embedding", "Embed", _hold("embeddings", "table"), last=True),
    _form(
        "norm",
        "LayerNorm RMSNorm GroupNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d",
        _hold("weight", "scale"),
        _BIAS,
    ),
    _form("norm", "LayerNorm RMSNorm GroupNorm InstanceNorm", _SCALE, _BIAS, last=True),
    _form("norm", "LayerNorm RMSNorm GroupNorm InstanceNorm", _SCALE, _OFFSET, last=True),
    _form("prelu", "PReLU", _hold("weight", "slope")),
    _form("prelu", "PReLU", _hold("negative_slope", "slope"), last=True),
    _form(
        "batch_norm",
        "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d",
        _hold("weight", "scale"),
        _BIAS,
        _hold("running_mean", "mean"),
        _hold("running_var", "var"),
        optional="scale bias",
    ),
    _form(
        "batch_norm",
        "BatchNorm",
        _SCALE,
        _BIAS,
        _hold("mean", "mean"),
        _hold("var", "var"),
        optional="scale bias",
        last=True,
    ),
    _form("weight_norm", "", _hold("weight_g", "g"), _hold("weight_v", "weight"), _BIAS),
    _form("weight_norm", "", _hold("kernel/scale", "g"), _KERNEL, _BIAS, last=True),
    # ---- attention
    _packed("in_proj_weight", "in_proj_bias", "out_proj"),
    *(
        _packed(f"{name}/weight", f"{name}/bias", out)
        for name in ("qkv", "Wqkv", "in_proj")
        for out in ("proj", "out_proj")
    ),
    _form(
        "attention",
        "MultiheadAttention",
        *(_hold(f"{part}_proj_weight", f"w{part}") for part in "qkv"),
        _hold("in_proj_bias", "bq bk bv", _split(3)),
        _hold("out_proj/weight", "wo"),
        _hold("out_proj/bias", "bo"),
        optional="bq bk bv bo",
    ),
    _attention(
        "kernel",
        "query",
        "key",
        "value",
        "out",
        do=["in_out"],
        last=True,
        classes="MultiHeadAttention MultiHeadDotProductAttention SelfAttention",
    ),
    _attention("weight", "query_proj", "key_proj", "value_proj", "output_proj", classes="MultiheadAttention"),
    _attention("w", "query", "key", "value", "linear", do=["in_out"], last=True, classes="MultiHeadAttention"),
    # ---- recurrent layers
    _form(
        "lstm",
        "LSTM LSTMCell",
        *_gates("lstm", "weight_ih", "weight_hh"),
        _hold(_TORCH_BIASES, _LSTM, *_SUMMED, _split(4)),
        optional=_LSTM,
    ),
    _form(
        "lstm", "LSTMCell", *_gates("lstm", "weight_ih", "weight_hh"), _hold("bias", _LSTM, _split(4)), optional=_LSTM
    ),
    *(
        _cell(
            {f"{a}{g}": f"{a}{g}{forget if a + g == 'if' else ''}" for a in "ih" for g in "ifgo"},
            {f"b{g}": f"h{g}" for g in "ifgo"},
            "lstm",
            "LSTMCell OptimizedLSTMCell",
        )
        for forget in ("", "_")
    ),
    _form(
        "lstm",
        "OptimizedLSTMCell",
        *_gates("lstm", "dense_i/kernel", "dense_h/kernel", "in_out"),
        _hold("dense_h/bias", _LSTM, _split(4)),
        optional="",
        last=True,
    ),
    _form(
        "gru",
        "GRU GRUCell",
        *_gates("gru", "weight_ih", "weight_hh"),
        _hold(_TORCH_BIASES, _GRU_PARTS, *_GRU),
        optional=_GRU_PARTS,
    ),
    _form(
        "gru",
        "GRUCell",
        *_gates("gru", "weight_ih", "weight_hh"),
        _hold("bias bias_n", _GRU_PARTS, _step("split", parts=[3, 1])),
        optional=_GRU_PARTS,
    ),
    _cell(
        {f"{a}{g}": f"{a}{g}" for a in "ih" for g in "rzn"},
        {"br": "ir", "bz": "iz", "bn": "in", "bhn": "hn"},
        "gru",
        "GRUCell",
    ),
    _form(
        "gru",
        "GRUCell",
        *_gates("gru", "dense_i/kernel", "dense_h/kernel", "in_out"),
        _hold("dense_i/bias", _GRU_PARTS, *_NO_HN),
        optional="",
        last=True,
    ),
    _form(
        "rnn",
        "RNN RNNCell",
        _hold("weight_ih", "ih"),
        _hold("weight_hh", "hh"),
        _hold(_TORCH_BIASES, "bh", *_SUMMED),
        optional="bh",
    ),
    _cell({"ih": "i", "hh": "h"}, {"bh": "i"}, "rnn", "SimpleCell"),
    _cell({"ih": "dense_i", "hh": "dense_h"}, {"bh": "dense_i"}, "rnn", "SimpleCell"),
)
# A leaf of no known layer: a class token, a table of positions, a parameter of the user's own.
PARAMETER = Form("parameter", frozenset(), (Hold(("",), ("value",)),))
# A part with these axes is of this kind.
_NDIM = {
    "linear": (2, 99),
    "conv": (3, 5),
    "conv_transpose": (3, 5),
    "embedding": (2, 2),
    "norm": (1, 3),
    "prelu": (0, 1),
}
NESTED = tuple(form for form in FORMS if any("/" in name for name in form.names) or len(form.needed) > 2)


@dataclass(frozen=True)
class Shaped:
    """A form with the shapes of its leaves.

    Attributes:
        form: the form.
        shapes: the paths of the leaves within the module, and their shapes.
    """

    form: Form
    shapes: tuple[tuple[str, Shape], ...]

    @property
    def holds(self) -> tuple[Hold, ...]:
        """The holds whose leaves are there."""
        return self.form.present(name for name, _ in self.shapes)

    @cached_property
    def key(self) -> tuple[Any, ...] | None:
        """What a form of the other side must share: the kind, and the sizes of its parts. None if it does not open."""
        return _key(self)

    def of(self, hold: Hold) -> list[Shape]:
        """The shapes of the leaves of a hold."""
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
    """A rule of a layout between two modules.

    Attributes:
        sources: the paths of the leaves within the module of the source.
        targets: those within that of the target.
        do: the steps.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
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
    return [*opening, *closing, _step("reshape", shape=list(new[0]), back=list(shapes[0]))]


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
