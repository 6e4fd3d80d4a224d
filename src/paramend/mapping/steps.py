"""The steps of a layout's rules: what each does with the leaves that a rule takes, and the step that takes it back.

A rule takes one leaf for each of its paths, or, where a captured number counts them, a family of leaves. Steps turn
such a bundle into another, on arrays and on origins alike.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from paramend.edits import hands, moves
from paramend.edits.arguments import shown
from paramend.edits.moves import axis_of
from paramend.errors import BadArgument, SpecMismatch
from paramend.leaves.origins.moved import How, check_fit
from paramend.leaves.specs import Spec
from paramend.reports import wording

# One family for each path: the numbers that count its leaves → a leaf; () → the leaf where nothing counts them.
Family: TypeAlias = dict[tuple[int, ...], Any]
Bundle: TypeAlias = list[Family]
Data: TypeAlias = Mapping[str, Any]
Run: TypeAlias = Callable[[Bundle, Data, int], Bundle]
Check: TypeAlias = Callable[[Bundle, Data], None]
# Numbers of the model, which may be given by name; the last one may be a product of several.
COUNTS = ("heads", "kv_heads", "rotary_dim", "size", "to", "multiple")


@dataclass(frozen=True)
class Step:
    """A step of a rule: the name of its row in the table, and its arguments, as data."""

    name: str
    args: Data

    def run(self, bundle: Bundle, count: int) -> Bundle:
        return _ROWS[self.name].run(bundle, self.args, count)

    def check(self, bundle: Bundle) -> None:
        check = _ROWS[self.name].check
        if check is not None:
            check(bundle, self.args)

    @property
    def names(self) -> list[str]:
        return [name for value in self.args.values() for name in _listed(value) if isinstance(name, str)]

    def bound(self, number: Callable[[str], int]) -> "Step":
        def known(value: Any) -> Any:
            return number(value) if isinstance(value, str) else value

        args = self.args.items()
        return Step(self.name, {key: [*map(known, _listed(v))] if isinstance(v, list) else known(v) for key, v in args})

    def inverse(self) -> "Step":
        return Step(*_ROWS[self.name].inverse(self.args))

    def to_data(self) -> dict[str, Any]:
        return {self.name: self.args["axes"] if self.name in ("transpose", "flip") else dict(self.args)}


@dataclass(frozen=True)
class _Kind:
    """A kind of step: the keys that it takes, those that it needs ("a|b" is one of two), what it does, its inverse as
    name and keys, and what raises if values would be lost."""

    keys: tuple[str, ...]
    needs: tuple[str, ...]
    run: Run
    inverse: Callable[[Data], tuple[str, Data]]
    check: Check | None = None


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def read_step(data: Any) -> Step:
    """A step from data; `BadArgument` says why it is none.

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
    wrong = [key for key in args if key not in row.keys]
    wrong += [key for key in row.needs if sum(one in args for one in key.split("|")) != 1]
    if wrong:
        raise BadArgument(f"{name} takes {wording.listing(row.keys)}, and {shown(given)} was given")
    for key, value in args.items():
        if key == "groups":
            _check_groups(value)
            continue
        counts, lists = key in COUNTS, isinstance(value, list | tuple)
        fits = key == COUNTS[-1] or lists != (counts or key == "axis")
        if not fits or not all(
            counts and each.isidentifier() if isinstance(each, str) else type(each) is int and (each > 0 or not counts)
            for each in _listed(value)
        ):
            raise BadArgument(
                f"{name}: {key} cannot be {shown(value)}",
                hint="a whole number or a name, such as num_attention_heads" if key in COUNTS else "whole numbers",
            )
    return Step(name, args)


def _check_groups(groups: Any) -> None:
    """Raise if groups are not lists of places, each place in one."""
    lists = isinstance(groups, list | tuple) and all(isinstance(group, list | tuple) and group for group in groups)
    if not lists or not groups or sorted(n for group in groups for n in group) != list(range(sum(map(len, groups)))):
        raise BadArgument(f"sum: groups cannot be {shown(groups)}", hint="places of the leaves: [[0, 2], [1, 3]]")


def _each(change: Callable[[Any, Data], Any]) -> Run:
    """Every leaf changed by itself."""
    return lambda bundle, args, count: [{key: change(x, args) for key, x in family.items()} for family in bundle]


def _joined(name: str, join: Callable[[list[Any], Data], Any]) -> Run:
    """For each number one leaf made of those of all paths."""
    return lambda bundle, args, count: [{key: join(parts, args) for key, parts in _abreast(name, bundle).items()}]


def _parted(name: str, part: Callable[[Any, Data, int], list[Any]]) -> Run:
    """Several leaves made of each of the one path."""

    def run(bundle: Bundle, args: Data, count: int) -> Bundle:
        if len(bundle) != 1:
            raise BadArgument(f"{name} takes one path, and there are {len(bundle)}")
        made = {key: part(x, args, count) for key, x in bundle[0].items()}
        return [dict(zip(made, parts, strict=True)) for parts in zip(*made.values(), strict=True)]

    return run


def _abreast(name: str, bundle: Bundle) -> dict[tuple[int, ...], list[Any]]:
    """For each number the leaves of all paths."""
    keys = bundle[0].keys()
    if any(family.keys() != keys for family in bundle):
        raise BadArgument(f"{name}: the paths of `from` do not have the same numbers")
    return {key: [family[key] for family in bundle] for key in keys}


def _along(x: Any, args: Data) -> tuple[Spec, int]:
    spec = hands.spec_of(x)
    return spec, axis_of(spec, args["axis"])


def _stack(family: Family, axis: int) -> Family:
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
        out[key] = hands.join([layers[number] for number in numbers], grown, "stack")
    return out


def _unstack(family: Family, axis: int) -> Family:
    out: Family = {}
    for key, x in family.items():
        spec, at = _along(x, {"axis": axis})
        rest = (*spec.shape[:at], *spec.shape[at + 1 :])
        for place in range(spec.shape[at]):
            out[*key, place] = hands.reshape(hands.take(x, range(place, place + 1), at), rest)
    return out


def _join(how: How, bundle: Bundle, args: Data, count: int) -> Bundle:
    if "parts" in args:
        ends = np.cumsum(args["parts"]).tolist()
        if not ends or ends[-1] != len(bundle):
            raise BadArgument(f"concat: parts {list(args['parts'])} do not add up to the {len(bundle)} leaves")
        rest = {"axis": args["axis"]}
        return [_join(how, bundle[end - n : end], rest, 1)[0] for n, end in zip(args["parts"], ends, strict=True)]

    def joined(parts: list[Any], args: Data) -> Any:
        axis = axis_of(hands.spec_of(parts[0]), args["axis"])
        made = hands.join(parts, axis, how)
        if "sizes" in args and [hands.spec_of(part).shape[axis] for part in parts] != list(args["sizes"]):
            raise SpecMismatch(f"concat: the lengths along axis {axis} are not {list(args['sizes'])}")
        return made

    return _joined(how, joined)(bundle, args, count)


def _split(bundle: Bundle, args: Data, count: int) -> Bundle:
    if "parts" in args:
        if len(args["parts"]) != len(bundle):
            raise BadArgument(f"split: parts {list(args['parts'])} are not those of {len(bundle)} leaves")
        rest = {"axis": args["axis"]}
        return [part for x, n in zip(bundle, args["parts"], strict=True) for part in _split([x], rest, n)]
    return _parted("split", _cuts)(bundle, args, count)


def _cuts(x: Any, args: Data, count: int) -> list[Any]:
    spec, axis = _along(x, args)
    length = spec.shape[axis]
    sizes = list(args.get("sizes", [length // count] * count))
    if "sizes" not in args and length % count:
        some = [length - sum(sizes[1:]), *sizes[1:]]
        raise SpecMismatch(f"axis {axis} of {spec} cannot be cut into {count} equal parts", hint=f"sizes={some}")
    if sum(sizes) != length or len(sizes) != count or min(sizes) < 0:
        raise SpecMismatch(f"the sizes {sizes} do not add up to {length:,}, axis {axis} of {spec}, in {count} parts")
    ends = np.cumsum(sizes).tolist()
    return [hands.take(x, range(end - size, end), axis) for size, end in zip(sizes, ends, strict=True)]


def _dealt(x: Any, args: Data, count: int) -> list[Any]:
    spec, axis = _along(x, args)
    if spec.shape[axis] % count:
        raise SpecMismatch(f"axis {axis} of {spec} does not hold {count} parts in turns")
    return [hands.take(x, range(place, spec.shape[axis], count), axis) for place in range(count)]


def _reshaped(x: Any, args: Data) -> Any:
    spec = hands.spec_of(x)
    if spec.shape != tuple(args["back"]):
        raise SpecMismatch(f"reshape from {list(args['back'])} to {list(args['shape'])} does not fit {spec}")
    return moves.reshaped(x, args)


def _roped(x: Any, args: Data, *, back: bool = False) -> Any:
    heads, (spec, axis) = args["heads"], _along(x, args)
    length = spec.shape[axis]
    if length % heads:
        raise SpecMismatch(f"rope: axis {axis} of {spec} does not hold {heads:,} heads of one size")
    size, before, after = length // heads, (*spec.shape[:axis], heads), spec.shape[axis + 1 :]
    turned = args.get("rotary_dim", size)
    if turned % 2 or not 0 < turned <= size:
        raise SpecMismatch(f"rope: heads of {size} places do not have {turned} that are rotated in pairs")
    apart = hands.reshape(x, (*before, size, *after))
    halves = (turned // 2, 2) if back else (2, turned // 2)
    pairs = hands.reshape(hands.take(apart, range(turned), axis + 1), (*before, *halves, *after))
    axes = list(range(spec.ndim + 2))
    axes[axis + 1 : axis + 3] = axis + 2, axis + 1
    done = hands.reshape(hands.transpose(pairs, axes), (*before, turned, *after))
    if turned < size:
        done = hands.join([done, hands.take(apart, range(turned, size), axis + 1)], axis + 1, "concat")
    return hands.reshape(done, spec.shape)


def _flipped(x: Any, args: Data) -> Any:
    spec = hands.spec_of(x)
    for axis in (axis_of(spec, each) for each in args["axes"]):
        x = hands.take(x, range(spec.shape[axis] - 1, -1, -1), axis)
    return x


def _grouped(name: str, args: Data, length: int, heads: int) -> int:
    """The size of a head where an axis of some length holds so many."""
    if args["heads"] % args["kv_heads"]:
        raise SpecMismatch(f"{name}: {args['kv_heads']:,} groups do not divide {args['heads']:,} heads")
    if length % heads:
        raise SpecMismatch(f"{name}: an axis of {length:,} does not hold {heads:,} heads of one size")
    return length // heads


def _by_groups(spec: Spec, axis: int, groups: int) -> tuple[int, ...]:
    return (*spec.shape[:axis], groups, spec.shape[axis] // groups, *spec.shape[axis + 1 :])


def _group_qkv(parts: list[Any], args: Data) -> Any:
    groups = args["kv_heads"]
    if len(parts) != 3:
        raise BadArgument(f"group_qkv takes the paths of q, k and v, and there are {len(parts)}")
    specs = [hands.spec_of(part) for part in parts]
    axis = axis_of(specs[0], args["axis"])
    check_fit(specs, axis, "concat")
    size = _grouped("group_qkv", args, specs[0].shape[axis], args["heads"])
    if any(spec.shape[axis] != groups * size for spec in specs[1:]):
        raise SpecMismatch(f"group_qkv: {specs[1]} and {specs[2]} do not hold {groups:,} heads of {size:,}")
    apart = [hands.reshape(part, _by_groups(spec, axis, groups)) for part, spec in zip(parts, specs, strict=True)]
    length = sum(spec.shape[axis] for spec in specs)
    whole = (*specs[0].shape[:axis], length, *specs[0].shape[axis + 1 :])
    return hands.reshape(hands.join(apart, axis + 1, "concat"), whole)


def _ungroup_qkv(x: Any, args: Data, count: int) -> list[Any]:
    groups, heads, (spec, axis) = args["kv_heads"], args["heads"], _along(x, args)
    size = _grouped("ungroup_qkv", args, spec.shape[axis], heads + 2 * groups)
    apart = hands.reshape(x, _by_groups(spec, axis, groups))
    ends = np.cumsum([0, heads // groups * size, size, size]).tolist()
    found = []
    for start, end in pairwise(ends):
        whole = (*spec.shape[:axis], groups * (end - start), *spec.shape[axis + 1 :])
        found.append(hands.reshape(hands.take(apart, range(start, end), axis + 1), whole))
    return found


def _padded(args: Data, size: int) -> int:
    """The length of an axis of some length with what `pad` adds."""
    multiple = math.prod(_listed(args.get("multiple", 1)))
    return int(args["to"]) if "to" in args else -(-size // multiple) * multiple


def _pad(x: Any, args: Data) -> Any:
    spec, axis = _along(x, args)
    length = spec.shape[axis]
    size, padded = args["size"] or length, _padded(args, length)
    if length != size or padded < length:
        raise SpecMismatch(f"pad: axis {axis} of {spec} cannot be padded from {size:,} to {padded:,}")
    return hands.pad(x, padded - length, axis) if padded > length else x


def _apart(x: Any, args: Data) -> tuple[Any, Any]:
    """A leaf as it was before `pad`, and what `pad` put behind it, or None."""
    spec, axis = _along(x, args)
    length = spec.shape[axis]
    size = args["size"] or (length if _padded(args, 1) == 1 else 0)
    if length == size:
        return x, None
    if not size or length != _padded(args, size):
        said = f"and for {size:,} places `pad` makes {_padded(args, size):,}" if size else "of which `size` are true"
        why = f"pad: axis {axis} of {spec} is {length:,} long, {said}"
        raise SpecMismatch(why, hint="the numbers that `pad` names, such as vocab_size=32000")
    return hands.take(x, range(size), axis), hands.take(x, range(size, length), axis)


def _check_cut(bundle: Bundle, args: Data) -> None:
    for x in (x for family in bundle for x in family.values()):
        kept, rest = _apart(x, args)
        if rest is not None and not hands.is_zero(rest):
            raise BadArgument(
                f"what follows {hands.spec_of(kept)} is not zero: `pad` did not put it there",
                hint=f"if it may go: pm.at(tree, path).take(slice(0, {args['size']}), axis={args['axis']}) first",
            )


def _untie(bundle: Bundle, args: Data, count: int) -> Bundle:
    bundle = list(filter(None, bundle))  # one of the names is enough
    for parts in _abreast("untie", bundle).values():
        check_fit([hands.spec_of(part) for part in parts], 0, "stack")
    return bundle[:1]


def _check_untie(bundle: Bundle, args: Data) -> None:
    for parts in _abreast("untie", list(filter(None, bundle))).values():
        if not all(hands.equal(parts[0], part) for part in parts[1:]):
            raise BadArgument(
                "they are not equal: one of them would be lost",
                hint="a rule for each of them; or delete the one that may go, and take the other by a rename",
            )


def _sum(bundle: Bundle, args: Data, count: int) -> Bundle:
    """The sum of each group of leaves."""
    groups = args.get("groups", [list(range(len(bundle)))])
    if sum(map(len, groups)) + len(args.get("zero", ())) != len(bundle):
        raise BadArgument(f"sum: groups {groups} are not those of {len(bundle)} leaves")
    parts = (_abreast("sum", [bundle[place] for place in group]) for group in groups)
    return [{key: hands.add(each) for key, each in family.items()} for family in parts]


def _check_zero(bundle: Bundle, args: Data) -> None:
    """Raise if a leaf that no sum takes is not zero."""
    for x in (x for place in args.get("zero", ()) for x in bundle[place].values()):
        if not hands.is_zero(x):
            why = f"a part of it, {hands.spec_of(x)}, must be zero, because the other side has no place for it"
            raise BadArgument(why, hint="a model with a place for it")


def _spread(bundle: Bundle, args: Data, count: int) -> Bundle:
    """Each leaf as the first of its group, and zeros as the others."""
    groups, zero = args.get("groups", [list(range(count))]), args.get("zero", [])
    if len(groups) != len(bundle):
        raise BadArgument(f"spread: groups {groups} are not those of {len(bundle)} leaves")
    firsts = {group[0]: family for group, family in zip(groups, bundle, strict=True)}
    like = {place: family for group, family in zip(groups, bundle, strict=True) for place in group}
    like |= dict.fromkeys(zero, bundle[0])
    return [firsts.get(place) or {key: hands.zeros(x) for key, x in like[place].items()} for place in range(len(like))]


def _pair(
    name: str, back: str, keys: str, needs: str, run: Run, undo: Run, check: Check | None = None
) -> dict[str, _Kind]:
    takes = tuple(keys.split()), tuple(needs.split())
    there = _Kind(*takes, run, lambda args: (back, args))
    return {name: there, back: _Kind(*takes, undo, lambda args: (name, args), check)}


def _along_axis(change: Callable[[Family, int], Family]) -> Run:
    return lambda bundle, args, count: [change(family, args["axis"]) for family in bundle]


_TIED = _parted("tie", lambda x, args, count: [x] * count)
_CUT = _each(lambda x, args: _apart(x, args)[0])
_GROUPED, _UNGROUPED = _joined("group_qkv", _group_qkv), _parted("ungroup_qkv", _ungroup_qkv)
_ROWS: Mapping[str, _Kind] = {
    **_pair("pad", "cut", "size multiple to axis", "size multiple|to", _each(_pad), _CUT, _check_cut),
    **_pair("tie", "untie", "", "", _TIED, _untie, _check_untie),
    **_pair("rope", "unrope", "heads rotary_dim axis", "heads", _each(_roped), _each(partial(_roped, back=True))),
    **_pair("group_qkv", "ungroup_qkv", "heads kv_heads axis", "heads kv_heads", _GROUPED, _UNGROUPED),
    **_pair("stack", "unstack", "axis", "", _along_axis(_stack), _along_axis(_unstack)),
    **_pair("concat", "split", "axis sizes parts", "", partial(_join, "concat"), _split),
    **_pair("spread", "sum", "groups zero", "", _spread, _sum, _check_zero),
    "flip": _Kind(("axes",), ("axes",), _each(_flipped), lambda args: ("flip", args)),
    **_pair("interleave", "deal", "axis", "", partial(_join, "interleave"), _parted("deal", _dealt)),
    "transpose": _Kind(
        ("axes",),
        ("axes",),
        _each(moves.transposed),
        lambda args: ("transpose", {"axes": np.argsort(args["axes"]).tolist()}),
    ),
    "reshape": _Kind(
        ("shape", "back"),
        ("shape", "back"),
        _each(_reshaped),
        lambda args: ("reshape", {"shape": args["back"], "back": args["shape"]}),
    ),
    "permute": _Kind(
        ("index", "axis"),
        ("index",),
        _each(moves.permuted),
        lambda args: ("permute", {**args, "index": np.argsort(args["index"]).tolist()}),
    ),
}
