"""Spreads: the index maps by which axes of a model become longer, so that it computes what it did."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from paramend.errors import BadArgument, Unsupported
from paramend.growth.axes import KEYS, Axes
from paramend.leaves.leaves import Leaves
from paramend.leaves.paths import number_of
from paramend.resize.widths import Growth, Spread, growth

Method = Literal["tile", "zero", "split"]
METHODS = ("tile", "zero", "split")
# Axis, and the number of a layer; None for all layers alike.
Spreads = Mapping[tuple[str, int | None], Spread]

# What is written where no key says it.
_UNSAID = {"mlp": "n_inner", "kv_heads": "num_key_value_heads"}
_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")


def spreads_of(axes: Axes, wanted: Mapping[str, int], method: Method) -> dict[tuple[str, int | None], Spread]:
    """The index maps of the axes that become longer."""
    new = {axis: size for axis, size in wanted.items() if size != axes.sizes.get(axis)}
    for axis, size in new.items():
        old = axes.sizes.get(axis)
        if old is None or not axes.has(axis):
            raise BadArgument(f"{axis}={size}: the model has no such axis")
        if size < old:
            raise BadArgument(f"{axis}={size} is less than {old}", hint=f"pm.narrow(model, keep={{'{axis}': {size}}})")
    found: dict[tuple[str, int | None], Spread] = {}
    heads = {axis: new.pop(axis, axes.sizes.get(axis, 0)) for axis in ("heads", "kv_heads")}
    if axes.has("heads") and any(heads[axis] != axes.sizes[axis] for axis in heads):
        if not axes.has("kv_heads"):
            found["heads", None] = _longer(axes.sizes["heads"], heads["heads"], method)
        else:
            found |= {(axis, None): each for axis, each in _grouped(axes.sizes, heads, method).items()}
    for axis, size in new.items():
        make = _hidden if axis == "hidden" else _longer
        found[axis, None] = make(axes.sizes[axis], size, method, *([axes] if axis == "hidden" else []))
    found = {key: each for key, each in found.items() if each.places.tolist() != list(range(each.old))}
    for number in axes.norms:
        for name, _ in axes.uses[number][0].parts:
            if name != "hidden" and (name, None) in found and not found[name, None].even:
                raise Unsupported(
                    f"norms run over the whole of {name}, and would see something else unless each place has as many "
                    "copies",
                    hint=f'"{name}": {2 * axes.sizes[name]}, method="tile"',
                )
    return found


def _longer(old: int, new: int, method: Method) -> Spread:
    """An axis within a branch: copies that share what is read from them, or places that are not read yet."""
    if method == "zero":
        return replace(Spread.kept(old, np.arange(new) % old), fresh=np.arange(new) >= old)
    return Spread.copies(old, np.arange(new) % old, split=method == "split")


def _hidden(old: int, new: int, method: Method, axes: Axes) -> Spread:
    """The residual stream, which every norm sees."""
    if method != "zero":
        if new % old:
            why = f"hidden={new} is not a multiple of {old}: norms would see some places more often than others"
            raise Unsupported(why, hint=f'hidden={-(-new // old) * old}, or method="zero"')
        if axes.tied and not axes.final:
            raise Unsupported("the head is tied to the embedding, and there is no norm before it that could be divided")
        return _longer(old, new, method)
    if axes.family.post:
        why = "the residual stream passes through norms, after which no new place is zero or the mean"
        raise Unsupported(why, hint=f'hidden={-(-new // old) * old}, method="tile"')
    if axes.family.norm == "rms":
        return Spread(old, np.arange(new) % old, np.ones(new), np.arange(new) >= old, "writers")
    whole = new // old
    return Spread(old, np.arange(new) % old, np.full(new, 1 / whole), np.arange(new) >= whole * old, "means")


def _grouped(sizes: Mapping[str, int], new: Mapping[str, int], method: Method) -> dict[str, Spread]:
    """Heads of queries and of keys: each new query head is in the group of the head of keys that it reads."""
    heads, groups, more, count = sizes["heads"], sizes["kv_heads"], new["heads"], new["kv_heads"]
    size = heads // groups
    if count < groups or more % count or count * (more // count) < heads:
        raise BadArgument(f"{more} heads of queries cannot be in {count} groups", hint=f"heads={count * size}")
    each = more // count
    if method == "zero":
        if each < size:
            why = f"groups of {each} heads are smaller than those of {size}, and method='zero' keeps these"
            raise BadArgument(why, hint=f"heads={count * size}")
        group, slot = np.divmod(np.arange(more), each)
        fresh = (group >= groups) | (slot >= size)
        queries = replace(Spread.kept(heads, group % groups * size + slot % size), fresh=fresh)
        return {"heads": queries, "kv_heads": _longer(groups, count, method)}
    split = method == "split"
    if more == heads:  # as many queries, each where it was
        if count % groups:
            raise BadArgument(f"{count} groups are not a multiple of {groups}", hint=f"kv_heads={2 * groups}")
        return {"kv_heads": Spread.copies(groups, np.arange(count) // (count // groups))}
    group, slot = np.divmod(np.arange(more), each)
    copy, group = np.divmod(group, groups)
    places = group * size + (copy * each + slot) % size
    if len(set(places.tolist())) < heads:
        why = f"{count} groups of {each} heads have no place for each of {heads}"
        raise BadArgument(why, hint=f"heads={count * size}")
    queries = Spread.copies(heads, places, split=split)
    return {"heads": queries, "kv_heads": Spread.copies(groups, np.arange(count) % groups)}


def growths_of(axes: Axes, leaves: Leaves, spreads: Spreads) -> dict[int, Growth]:
    """What becomes of each leaf that changes."""
    found: dict[int, Growth] = {}
    for number in leaves.index.ordered(axes.uses):
        uses = axes.uses[number]
        path = leaves.index.pieces(number)
        first = leaves.ties.get(number, number)
        layer = layer_of(path)
        mine = {axis: each for (axis, at), each in spreads.items() if at in (None, layer)}
        along = [use.along(axes.sizes, mine) for use in uses]
        if first in found:
            found[number] = found[first]
        elif any(each is not None for each in along):
            shape = leaves.spec(number).shape
            reads, scale = _read(axes, number, [use.reads for use in uses], along, spreads, path[-1] == "bias")
            along += [None] * (len(shape) - len(along))
            gains = number in axes.norms and path[-1] != "bias"
            shift = float(axes.family.one and gains)
            found[number] = growth(shape, along, reads, path, scale=scale, shift=shift, norm=gains)
    return found


def layer_of(path: Sequence[str]) -> int | None:
    """The number of the layer that a leaf is in, or None."""
    return next((n for piece in path if (n := number_of(piece)) is not None), None)


def _read(
    axes: Axes, number: int, reads: list[bool], along: list[Spread | None], spreads: Spreads, bias: bool
) -> tuple[list[bool], float]:
    """Which axes a leaf reads from, and the factor of its values, where the residual stream gets wider.

    What a tied head cannot divide the norm before it does. Where embeddings are multiplied by the root of the width,
    half of it is theirs.
    """
    hidden, rooted = spreads.get(("hidden", None)), axes.family.rooted
    if hidden is None:
        return reads, 1.0
    gain, last = seen(spreads) ** 0.5, axes.tied and number in axes.final
    root = float(np.sqrt(hidden.old / len(hidden.places)))
    if number in axes.norms and axes.uses[number][0].parts[0][0] == "hidden":
        if bias:
            along[0] = replace(hidden, zero="readers" if last else "writers")
        scale = 1.0 if bias else gain
        return [last], scale / root if last and rooted else scale
    if rooted and number in axes.embeddings:
        return reads, root
    return reads, gain if number in axes.normed else 1.0


def seen(spreads: Spreads) -> float:
    """The share of the residual stream that is not zero or the mean: by it the mean square that norms see shrinks."""
    hidden = spreads.get(("hidden", None))
    return 1.0 if hidden is None else float((~hidden.fresh).mean())


def configured(axes: Axes, config: Mapping[str, Any], spreads: Spreads) -> dict[str, Any]:
    """The configuration with the new lengths."""
    new = {**axes.sizes, **{axis: len(each.places) for (axis, _), each in spreads.items()}}
    made = dict(config)
    for axis, keys in KEYS.items():
        old = axes.sizes.get(axis)
        there = [key for key in keys if config.get(key) == old]
        silent = {"mlp": 4 * new["hidden"], "kv_heads": new["heads"]}.get(axis, old)  # what no key says
        if axes.has(axis) and new.get(axis) != (old if there else silent):
            made |= dict.fromkeys(there or [_UNSAID[axis]], new[axis])
    hidden, heads, head = new["hidden"], new["heads"], axes.sizes["head"]
    derived = not hidden % heads and hidden // heads == head
    if axes.family.fixed and not derived:
        fit = f"heads={hidden // head}" if not hidden % head else f"hidden={heads * head}"
        why = f"{heads} heads of {head} are not the residual width of {hidden}, and this family has no others"
        raise BadArgument(why, hint=fit)
    if not derived and type(config.get("head_dim")) is not int:
        made["head_dim"] = head
    if (factor := seen(spreads)) != 1:
        key = next((key for key in _EPS if key in config), None)
        if key is None:
            raise Unsupported("its configuration does not say what norms add to the mean square", hint='method="tile"')
        made[key] = config[key] * factor
    return made
