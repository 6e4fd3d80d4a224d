"""The steps of a layout's rules: what each does with the leaves that a rule takes, and the step that takes it back.

A rule takes one leaf for each of its paths, or, where a captured number counts them, a family of leaves. Steps turn
such a bundle into another, on arrays and on origins alike.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from paramend.edits.arguments import shown
from paramend.edits.moves import axis_of
from paramend.errors import BadArgument, SpecMismatch
from paramend.leaves.origins.moved import How
from paramend.leaves.specs import Spec
from paramend.mapping import hands
from paramend.reports import wording

# One family for each path: the numbers that count its leaves → a leaf; () → the leaf where nothing counts them.
Family: TypeAlias = dict[tuple[int, ...], Any]
Bundle: TypeAlias = list[Family]
Data: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """A step of a rule.

    Attributes:
        name: its row in the table.
        args: its arguments, as data.
    """

    name: str
    args: Data

    def run(self, bundle: Bundle, count: int) -> Bundle:
        """The bundle after the step, in a rule that ends in `count` paths."""
        return _ROWS[self.name].run(bundle, self.args, count)

    def inverse(self) -> "Step":
        """The step that takes this one back."""
        return Step(*_ROWS[self.name].inverse(self.args))

    def to_data(self) -> dict[str, Any]:
        """The step as YAML has it."""
        return {self.name: self.args["axes"] if self.name == "transpose" else dict(self.args)}


@dataclass(frozen=True)
class _Kind:
    """A kind of step: the keys that it takes, those that it needs, what it does, and its inverse as name and keys."""

    keys: tuple[str, ...]
    needs: tuple[str, ...]
    run: Callable[[Bundle, Data, int], Bundle]
    inverse: Callable[[Data], tuple[str, Data]]


def read_step(data: Any) -> Step:
    """A step from data.

    Raises:
        BadArgument: it is not one; the message says why.

    >>> read_step({"stack": {"axis": 0}}), read_step({"transpose": [1, 0]}).inverse().args
    (Step(name='stack', args={'axis': 0}), {'axes': [1, 0]})
    """
    if isinstance(data, str):
        data = {data: {}}
    if not isinstance(data, Mapping) or len(data) != 1:
        raise BadArgument(f"{shown(data)} is not a step", hint="{stack: {axis: 0}}")
    name, given = next(iter(data.items()))
    row = _ROWS.get(name)
    if row is None:
        near = wording.closest(str(name), _ROWS, limit=1)
        raise BadArgument(f"there is no step {name!r}", hint=f"{near[0]}" if near else wording.listing(list(_ROWS), 12))
    if isinstance(given, list | tuple):
        given = {row.keys[0]: list(given)}
    args = {"axis": 0, **(given or {})} if "axis" in row.keys else dict(given or {})
    wrong = [key for key in args if key not in row.keys] + [key for key in row.needs if key not in args]
    if wrong:
        raise BadArgument(f"{name} takes {wording.listing(row.keys)}, and {shown(given)} was given")
    for key, value in args.items():
        whole = isinstance(value, list | tuple) if key != "axis" else True
        if not whole or not all(type(each) is int for each in (value if key != "axis" else [value])):
            raise BadArgument(f"{name}: {key} cannot be {shown(value)}", hint="whole numbers")
    return Step(name, args)


# ---- what the rows do --------------------------------------------------------------------------------------------


def _each(bundle: Bundle, change: Callable[[Any], Any]) -> Bundle:
    return [{key: change(x) for key, x in family.items()} for family in bundle]


def _stack(bundle: Bundle, args: Data, count: int) -> Bundle:
    return [_stacked(family, args["axis"]) for family in bundle]


def _stacked(family: Family, axis: int) -> Family:
    found: dict[tuple[int, ...], dict[int, Any]] = {}
    for key, x in family.items():
        if not key:
            raise BadArgument("stack needs a number in `from` that is not in `to`", hint="experts.<e>.w -> experts.w")
        found.setdefault(key[:-1], {})[key[-1]] = x
    out: Family = {}
    for key, layers in found.items():
        numbers = sorted(layers)
        if numbers != list(range(len(numbers))):
            there = wording.listing(list(map(str, numbers)), 12)
            raise BadArgument(f"the leaves to stack are numbered {there}, not 0 to {len(numbers) - 1}")
        spec = hands.spec_of(layers[0])
        grown = axis_of(Spec((*spec.shape, 1), spec.dtype), axis)
        _alike([hands.spec_of(layers[number]) for number in numbers], grown, "stack")
        out[key] = hands.join([layers[number] for number in numbers], grown, "stack")
    return out


def _unstack(bundle: Bundle, args: Data, count: int) -> Bundle:
    out: Bundle = []
    for family in bundle:
        cut: Family = {}
        for key, x in family.items():
            spec = hands.spec_of(x)
            axis = axis_of(spec, args["axis"])
            rest = (*spec.shape[:axis], *spec.shape[axis + 1 :])
            for place in range(spec.shape[axis]):
                cut[*key, place] = hands.reshape(hands.take(x, range(place, place + 1), axis), rest)
        out.append(cut)
    return out


def _alike(specs: Sequence[Spec], axis: int, how: How) -> None:
    first = specs[0]
    for spec in specs[1:]:
        ours, theirs = list(first.shape), list(spec.shape)
        if how == "concat" and len(ours) == len(theirs):
            ours[axis] = theirs[axis]
        if (ours, first.dtype) != (theirs, spec.dtype):
            raise SpecMismatch(f"{how} along axis {axis}: {first} and {spec} do not fit")


def _join(how: How, bundle: Bundle, args: Data, count: int) -> Bundle:
    keys = bundle[0].keys()
    if any(family.keys() != keys for family in bundle):
        raise BadArgument(f"{how}: the paths of `from` do not have the same numbers")
    out: Family = {}
    for key in keys:
        parts = [family[key] for family in bundle]
        specs = [hands.spec_of(part) for part in parts]
        axis = axis_of(specs[0], args["axis"])
        _alike(specs, axis, how)
        if how == "concat" and "sizes" in args and [spec.shape[axis] for spec in specs] != list(args["sizes"]):
            raise SpecMismatch(f"concat: the lengths along axis {axis} are not {list(args['sizes'])}")
        out[key] = hands.join(parts, axis, how)
    return [out]


def _split(bundle: Bundle, args: Data, count: int) -> Bundle:
    (family,) = bundle
    out: Bundle = [{} for _ in range(count)]
    for key, x in family.items():
        spec = hands.spec_of(x)
        axis = axis_of(spec, args["axis"])
        length = spec.shape[axis]
        sizes = list(args.get("sizes", [length // count] * count))
        if sum(sizes) != length or len(sizes) != count:
            said = f"into {count} equal parts" if "sizes" not in args else f"into {sizes}"
            raise SpecMismatch(f"axis {axis} of {spec} cannot be cut {said}", hint="sizes: [...]")
        ends = np.cumsum(sizes).tolist()
        for part, size, end in zip(out, sizes, ends, strict=True):
            part[key] = hands.take(x, range(end - size, end), axis)
    return out


def _deal(bundle: Bundle, args: Data, count: int) -> Bundle:
    (family,) = bundle
    out: Bundle = [{} for _ in range(count)]
    for key, x in family.items():
        spec = hands.spec_of(x)
        axis = axis_of(spec, args["axis"])
        if spec.shape[axis] % count:
            raise SpecMismatch(f"axis {axis} of {spec} does not hold {count} parts in turns")
        for place, part in enumerate(out):
            part[key] = hands.take(x, range(place, spec.shape[axis], count), axis)
    return out


def _transpose(bundle: Bundle, args: Data, count: int) -> Bundle:
    axes = args["axes"]

    def changed(x: Any) -> Any:
        spec = hands.spec_of(x)
        if sorted(axes) != list(range(spec.ndim)):
            raise SpecMismatch(f"transpose takes each axis of {spec} once, and axes is {list(axes)}")
        return hands.transpose(x, axes)

    return _each(bundle, changed)


def _reshape(bundle: Bundle, args: Data, count: int) -> Bundle:
    def changed(x: Any) -> Any:
        spec = hands.spec_of(x)
        for key, have in (("shape", np.prod(args["shape"])), ("back", spec.shape)):
            want = spec.size if key == "shape" else tuple(args["back"])
            if have != want:
                raise SpecMismatch(f"reshape from {list(args['back'])} to {list(args['shape'])} does not fit {spec}")
        return hands.reshape(x, args["shape"])

    return _each(bundle, changed)


def _permute(bundle: Bundle, args: Data, count: int) -> Bundle:
    index = np.asarray(args["index"], np.int64)

    def changed(x: Any) -> Any:
        spec = hands.spec_of(x)
        axis = axis_of(spec, args["axis"])
        if sorted(args["index"]) != list(range(spec.shape[axis])):
            raise SpecMismatch(f"permute: index is not a permutation of the {spec.shape[axis]:,} places of {spec}")
        return hands.take(x, index, axis)

    return _each(bundle, changed)


_ROWS: Mapping[str, _Kind] = {
    "stack": _Kind(("axis",), (), _stack, lambda args: ("unstack", args)),
    "unstack": _Kind(("axis",), (), _unstack, lambda args: ("stack", args)),
    "concat": _Kind(("axis", "sizes"), (), partial(_join, "concat"), lambda args: ("split", args)),
    "split": _Kind(("axis", "sizes"), (), _split, lambda args: ("concat", args)),
    "interleave": _Kind(("axis",), (), partial(_join, "interleave"), lambda args: ("deal", args)),
    "deal": _Kind(("axis",), (), _deal, lambda args: ("interleave", args)),
    "transpose": _Kind(
        ("axes",), ("axes",), _transpose, lambda args: ("transpose", {"axes": np.argsort(args["axes"]).tolist()})
    ),
    "reshape": _Kind(
        ("shape", "back"),
        ("shape", "back"),
        _reshape,
        lambda args: ("reshape", {"shape": args["back"], "back": args["shape"]}),
    ),
    "permute": _Kind(
        ("index", "axis"),
        ("index",),
        _permute,
        lambda args: ("permute", {**args, "index": np.argsort(args["index"]).tolist()}),
    ),
}
