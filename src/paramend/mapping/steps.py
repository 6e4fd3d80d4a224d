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
COUNTS = ("heads", "kv_heads", "rotary_dim")  # numbers of the model, which may be given by name


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

    @property
    def names(self) -> list[str]:
        """The numbers of the model that it names."""
        return [value for value in self.args.values() if isinstance(value, str)]

    def bound(self, number: Callable[[str], int]) -> "Step":
        """The step with numbers in place of their names."""
        return Step(
            self.name, {key: number(value) if isinstance(value, str) else value for key, value in self.args.items()}
        )

    def inverse(self) -> "Step":
        """The step that takes this one back."""
        return Step(*_ROWS[self.name].inverse(self.args))

    def to_data(self) -> dict[str, Any]:
        """The step as YAML has it."""
        if not self.args:
            return {self.name: {}}
        return {self.name: self.args["axes"] if self.name in ("transpose", "flip") else dict(self.args)}


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
        single = key == "axis" or key in COUNTS
        if key == "groups":
            _check_groups(value)
            continue
        whole = single or isinstance(value, list | tuple)
        named = key in COUNTS and isinstance(value, str) and value.isidentifier()
        values = [value] if single else value
        if not named and not (whole and all(type(each) is int and (each > 0 or key not in COUNTS) for each in values)):
            raise BadArgument(
                f"{name}: {key} cannot be {shown(value)}",
                hint="a whole number or a name, such as num_attention_heads" if key in COUNTS else "whole numbers",
            )
    return Step(name, args)


def _check_groups(groups: Any) -> None:
    whole = isinstance(groups, list | tuple) and all(isinstance(group, list | tuple) and group for group in groups)
    if not whole or not groups or sorted(n for group in groups for n in group) != list(range(sum(map(len, groups)))):
        raise BadArgument(f"sum: groups cannot be {shown(groups)}", hint="places of the leaves: [[0, 2], [1, 3]]")


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


def _abreast(name: str, bundle: Bundle) -> dict[tuple[int, ...], list[Any]]:
    """For each number the leaves of all paths."""
    keys = bundle[0].keys()
    if any(family.keys() != keys for family in bundle):
        raise BadArgument(f"{name}: the paths of `from` do not have the same numbers")
    return {key: [family[key] for family in bundle] for key in keys}


def _alone(name: str, bundle: Bundle) -> Family:
    if len(bundle) != 1:
        raise BadArgument(f"{name} takes one path, and there are {len(bundle)}")
    return bundle[0]


def _join(how: How, bundle: Bundle, args: Data, count: int) -> Bundle:
    if "parts" in args:
        ends = np.cumsum(args["parts"]).tolist()
        if not ends or ends[-1] != len(bundle):
            raise BadArgument(f"concat: parts {list(args['parts'])} do not add up to the {len(bundle)} leaves")
        rest = {"axis": args["axis"]}
        return [_join(how, bundle[end - n : end], rest, 1)[0] for n, end in zip(args["parts"], ends, strict=True)]
    out: Family = {}
    for key, parts in _abreast(how, bundle).items():
        specs = [hands.spec_of(part) for part in parts]
        axis = axis_of(specs[0], args["axis"])
        _alike(specs, axis, how)
        if how == "concat" and "sizes" in args and [spec.shape[axis] for spec in specs] != list(args["sizes"]):
            raise SpecMismatch(f"concat: the lengths along axis {axis} are not {list(args['sizes'])}")
        out[key] = hands.join(parts, axis, how)
    return [out]


def _split(bundle: Bundle, args: Data, count: int) -> Bundle:
    if "parts" in args:
        if len(args["parts"]) != len(bundle):
            raise BadArgument(f"split: parts {list(args['parts'])} are not those of {len(bundle)} leaves")
        rest = {"axis": args["axis"]}
        return [part for x, n in zip(bundle, args["parts"], strict=True) for part in _split([x], rest, n)]
    out: Bundle = [{} for _ in range(count)]
    for key, x in _alone("split", bundle).items():
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
    out: Bundle = [{} for _ in range(count)]
    for key, x in _alone("deal", bundle).items():
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


def _flip(bundle: Bundle, args: Data, count: int) -> Bundle:
    def changed(x: Any) -> Any:
        spec = hands.spec_of(x)
        for axis in (axis_of(spec, each) for each in args["axes"]):
            x = hands.take(x, range(spec.shape[axis] - 1, -1, -1), axis)
        return x

    return _each(bundle, changed)


def _sum(bundle: Bundle, args: Data, count: int) -> Bundle:
    groups, zero = args.get("groups", [list(range(len(bundle)))]), args.get("zero", [])
    if sum(map(len, groups)) + len(zero) != len(bundle):
        raise BadArgument(f"sum: groups {groups} are not those of {len(bundle)} leaves")
    for place in zero:
        for x in bundle[place].values():
            hands.check_zero(x)
    return [
        {key: hands.add(parts) for key, parts in _abreast("sum", [bundle[place] for place in group]).items()}
        for group in groups
    ]


def _spread(bundle: Bundle, args: Data, count: int) -> Bundle:
    groups, zero = args.get("groups", [list(range(count))]), args.get("zero", [])
    if len(groups) != len(bundle):
        raise BadArgument(f"spread: groups {groups} are not those of {len(bundle)} leaves")
    out: Bundle = [{} for _ in range(sum(map(len, groups)) + len(zero))]
    for group, family in zip(groups, bundle, strict=True):
        out[group[0]] = family
        for place in group[1:]:
            out[place] = {key: hands.zeros(x) for key, x in family.items()}
    for place in zero:
        out[place] = {key: hands.zeros(x) for key, x in bundle[0].items()}
    return out


def _tie(bundle: Bundle, args: Data, count: int) -> Bundle:
    there = [family for family in bundle if family]
    for twin in there[1:]:
        for key, x in there[0].items():
            if key in twin:
                hands.check_equal(x, twin[key])
    return there[:1]


def _untie(bundle: Bundle, args: Data, count: int) -> Bundle:
    return [dict(_alone("untie", bundle)) for _ in range(count)]


def _rope(back: bool, bundle: Bundle, args: Data, count: int) -> Bundle:
    heads = args["heads"]

    def changed(x: Any) -> Any:
        spec = hands.spec_of(x)
        axis = axis_of(spec, args["axis"])
        length = spec.shape[axis]
        if length % heads:
            raise SpecMismatch(f"rope: axis {axis} of {spec} does not hold {heads:,} heads of one size")
        turned = args.get("rotary_dim", length // heads)
        if turned % 2 or not 0 < turned <= length // heads:
            raise SpecMismatch(
                f"rope: heads of {length // heads} places do not have {turned} that are rotated in pairs"
            )
        size, before, after = length // heads, (*spec.shape[:axis], heads), spec.shape[axis + 1 :]
        apart = hands.reshape(x, (*before, size, *after))
        halves = (turned // 2, 2) if back else (2, turned // 2)
        pairs = hands.reshape(hands.take(apart, range(turned), axis + 1), (*before, *halves, *after))
        axes = list(range(spec.ndim + 2))
        axes[axis + 1 : axis + 3] = axis + 2, axis + 1
        done = hands.reshape(hands.transpose(pairs, axes), (*before, turned, *after))
        if turned < size:
            done = hands.join([done, hands.take(apart, range(turned, size), axis + 1)], axis + 1, "concat")
        return hands.reshape(done, spec.shape)

    return _each(bundle, changed)


def _grouped(name: str, args: Data, length: int, heads: int) -> int:
    """The size of a head where an axis of some length holds so many."""
    if args["heads"] % args["kv_heads"]:
        raise SpecMismatch(f"{name}: {args['kv_heads']:,} groups do not divide {args['heads']:,} heads")
    if length % heads:
        raise SpecMismatch(f"{name}: an axis of {length:,} does not hold {heads:,} heads of one size")
    return length // heads


def _by_groups(spec: Spec, axis: int, groups: int) -> tuple[int, ...]:
    return (*spec.shape[:axis], groups, spec.shape[axis] // groups, *spec.shape[axis + 1 :])


def _group_qkv(bundle: Bundle, args: Data, count: int) -> Bundle:
    groups = args["kv_heads"]
    if len(bundle) != 3:
        raise BadArgument(f"group_qkv takes the paths of q, k and v, and there are {len(bundle)}")
    out: Family = {}
    for key, parts in _abreast("group_qkv", bundle).items():
        specs = [hands.spec_of(part) for part in parts]
        axis = axis_of(specs[0], args["axis"])
        _alike(specs, axis, "concat")
        size = _grouped("group_qkv", args, specs[0].shape[axis], args["heads"])
        if any(spec.shape[axis] != groups * size for spec in specs[1:]):
            raise SpecMismatch(f"group_qkv: {specs[1]} and {specs[2]} do not hold {groups:,} heads of {size:,}")
        apart = [hands.reshape(part, _by_groups(spec, axis, groups)) for part, spec in zip(parts, specs, strict=True)]
        length = sum(spec.shape[axis] for spec in specs)
        whole = (*specs[0].shape[:axis], length, *specs[0].shape[axis + 1 :])
        out[key] = hands.reshape(hands.join(apart, axis + 1, "concat"), whole)
    return [out]


def _ungroup_qkv(bundle: Bundle, args: Data, count: int) -> Bundle:
    groups, heads = args["kv_heads"], args["heads"]
    out: Bundle = [{}, {}, {}]
    for key, x in _alone("ungroup_qkv", bundle).items():
        spec = hands.spec_of(x)
        axis = axis_of(spec, args["axis"])
        size = _grouped("ungroup_qkv", args, spec.shape[axis], heads + 2 * groups)
        apart = hands.reshape(x, _by_groups(spec, axis, groups))
        ends = np.cumsum([0, heads // groups * size, size, size]).tolist()
        for part, start, end in zip(out, ends, ends[1:], strict=False):
            whole = (*spec.shape[:axis], groups * (end - start), *spec.shape[axis + 1 :])
            part[key] = hands.reshape(hands.take(apart, range(start, end), axis + 1), whole)
    return out


_ROWS: Mapping[str, _Kind] = {
    "rope": _Kind(("heads", "rotary_dim", "axis"), ("heads",), partial(_rope, False), lambda args: ("unrope", args)),
    "unrope": _Kind(("heads", "rotary_dim", "axis"), ("heads",), partial(_rope, True), lambda args: ("rope", args)),
    "group_qkv": _Kind(
        ("heads", "kv_heads", "axis"), ("heads", "kv_heads"), _group_qkv, lambda args: ("ungroup_qkv", args)
    ),
    "ungroup_qkv": _Kind(
        ("heads", "kv_heads", "axis"), ("heads", "kv_heads"), _ungroup_qkv, lambda args: ("group_qkv", args)
    ),
    "stack": _Kind(("axis",), (), _stack, lambda args: ("unstack", args)),
    "unstack": _Kind(("axis",), (), _unstack, lambda args: ("stack", args)),
    "concat": _Kind(("axis", "sizes", "parts"), (), partial(_join, "concat"), lambda args: ("split", args)),
    "split": _Kind(("axis", "sizes", "parts"), (), _split, lambda args: ("concat", args)),
    "sum": _Kind(("groups", "zero"), (), _sum, lambda args: ("spread", args)),
    "spread": _Kind(("groups", "zero"), (), _spread, lambda args: ("sum", args)),
    "tie": _Kind((), (), _tie, lambda args: ("untie", args)),
    "untie": _Kind((), (), _untie, lambda args: ("tie", args)),
    "flip": _Kind(("axes",), ("axes",), _flip, lambda args: ("flip", args)),
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
