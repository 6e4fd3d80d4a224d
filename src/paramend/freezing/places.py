"""Which leaves of JAX parameters are frozen, which elements of them, as masks that broadcast to the leaf, and when."""

from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paramend.edits.call import sliced_shape
from paramend.edits.subjects import barren
from paramend.errors import BadArgument, NoMatch, OutOfRange, Unsupported
from paramend.freezing.schedules import Clause, Schedule, Window
from paramend.reports import wording
from paramend.selectors.selector import Held, resolve
from paramend.trees.tree import Tree

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Region = tuple[Mask, ...]
"""Masks whose conjunction is the region. One vector per axis describes most slices, where one mask of the leaf's
shape would be a constant as large as a quarter of the leaf in every compiled step. `()` is the whole leaf."""

WHOLE: Region = ()


def region_of(index: Any, shape: tuple[int, ...]) -> Region:
    """The elements that a slice of a leaf of this shape names."""
    if index is None:
        return WHOLE
    sliced_shape(shape, index)
    parts = tuple(_part(part) for part in (index if isinstance(index, tuple) else (index,)) if part is not None)
    if not _by_axis(parts):
        mask = np.zeros(shape, bool)
        mask[parts] = True
        return _reduced([mask])
    masks = []
    for axis, part in enumerate(_spread(parts, len(shape))):
        vector = np.zeros(shape[axis], bool)
        vector[part] = True
        masks.append(vector.reshape([-1 if other == axis else 1 for other in range(len(shape))]))
    return _reduced(masks)


def both(one: Region, other: Region) -> Region:
    """The elements in two regions of one leaf."""
    return _reduced([*one, *other])


def is_empty(region: Region) -> bool:
    """Whether a region has no elements."""
    if not all(mask.any() for mask in region):
        return True
    # Vectors along different axes always meet; only a mask of several axes can miss the others.
    crossed = any(sum(length > 1 for length in mask.shape) > 1 for mask in region)
    return len(region) > 1 and crossed and not reduce(np.logical_and, region).any()


def _part(part: Any) -> Any:
    return part if isinstance(part, int | slice | type(...)) else np.asarray(part)


def _by_axis(parts: tuple[Any, ...]) -> bool:
    """Whether each part indexes a separate axis. Two lists index in pairs, and a bool array may span several axes."""
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    return (
        len(arrays) <= 1
        and all(part.dtype != bool for part in arrays)
        and not any(isinstance(part, bool) for part in parts)
    )


def _spread(parts: tuple[Any, ...], ndim: int) -> list[Any]:
    """One part for each axis."""
    places = [place for place, part in enumerate(parts) if part is Ellipsis] or [len(parts)]
    before, after = parts[: places[0]], parts[places[0] + 1 :]
    return [*before, *[slice(None)] * (ndim - len(before) - len(after)), *after]


def _reduced(masks: list[Mask]) -> Region:
    """The region of masks, without those that are all true; masks of equal shape are merged."""
    merged: dict[tuple[int, ...], Mask] = {}
    for mask in masks:
        merged[mask.shape] = merged[mask.shape] & mask if mask.shape in merged else mask
    return tuple(mask for mask in merged.values() if not mask.all())


# Collections of Flax beside "params", which `apply(..., mutable=...)` returns.
_COLLECTIONS = frozenset({"batch_stats", "cache", "intermediates", "perturbations"})


@dataclass(frozen=True)
class FrozenPlace:
    """What is frozen of one leaf: elements in a region during a window; where regions overlap the first counts."""

    pieces: tuple[tuple[Region, Window], ...] = ()  # regions with their windows; empty if the leaf is trained

    @property
    def free(self) -> bool:
        """Whether nothing of it is ever frozen."""
        return not self.pieces

    @property
    def window(self) -> Window | None:
        """When all of it is frozen together, or None if slices or nothing are frozen."""
        return self.pieces[0][1] if len(self.pieces) == 1 and not self.pieces[0][0] else None

    @property
    def always(self) -> bool:
        """Whether all of it is frozen at every step."""
        return self.window is not None and self.window.always

    @property
    def partial(self) -> bool:
        """Whether its slices are frozen separately."""
        return not self.free and self.window is None


@dataclass(frozen=True)
class _Found:
    """Places of one structure: in JAX's order, and by name and shape."""

    places: list[FrozenPlace]
    by_name: dict[Any, FrozenPlace]


class Finder:
    """The places of a schedule in trees of parameters. What `init` finds holds for every update of leaves with the same
    names and shapes: a selector may ask for dtypes that gradients do not have, or for classes that the pure arrays of
    an NNX module do not have."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._known: dict[Any, _Found] = {}

    def find(self, params: Any) -> list[FrozenPlace]:
        """The place of each leaf of the parameters, in JAX's order, resolved again."""
        return self._resolve(*named(params))

    def find_again(self, tree: Any, params: Any = None) -> list[FrozenPlace]:
        """The place of each leaf of updates or parameters, the same as at `init`."""
        names, structure, numbers = named(tree)
        found = self._known.get(_key(names))
        if found is not None:
            return found.places
        if params is None:  # gradients of the trained leaves alone have only some of the names that `init` saw
            key = set(_key(names))
            for found in self._known.values():
                if key <= found.by_name.keys():
                    places = [FrozenPlace()] * structure.num_leaves
                    for number in names.index.numbers:
                        places[numbers[id(names.values[number])]] = found.by_name[_name(names, number)]
                    return places
        # A state from elsewhere: `init` was not called here.
        return self._resolve(*(named(params) if params is not None else (names, structure, numbers)))

    def _resolve(self, tree: Tree, structure: Any, numbers: dict[int, int]) -> list[FrozenPlace]:
        schedule = self.schedule
        if not tree.index.numbers:
            what, meant = barren(tree.root)
            if meant:
                raise Unsupported(f"there is nothing to freeze in {what}", hint=f"pass {meant}")
        until = [(clause, self._chosen(clause.selector, tree)) for clause in schedule.until]
        since = [(clause, self._chosen(clause.selector, tree)) for clause in schedule.since]
        if schedule.selector is None:
            chosen = set().union(*(found for _, found in (*until, *since)))
        else:
            chosen = self._chosen(schedule.selector, tree)
        if chosen <= moved_by_model(tree):
            some = wording.listing([tree.index.path(number) for number in sorted(chosen)], 4)
            raise Unsupported(
                f"nothing selected is trained by an optimizer: the model itself moves {some} in its forward pass",
                hint="BatchNorm(use_running_average=True) leaves its statistics as they are",
            )
        for clause, found in (*until, *since):
            if clause.selector is not None and found - chosen:
                stray = tree.index.path(min(found - chosen))
                raise BadArgument(
                    f"the schedule selects {stray} ({clause.selector!r}), but {schedule.selector!r} does not freeze it",
                    hint=f"freeze both: [{schedule.selector!r}, {clause.selector!r}]",
                )
        places = [FrozenPlace()] * structure.num_leaves
        for number in chosen:
            place = self._place(tree, number, until, since)
            places[numbers[id(tree.values[number])]] = place
        if all(place.free for place in places):
            raise NoMatch(f"the slice of {schedule.selector!r} selects no element of any leaf")
        by_name = {_name(tree, n): places[numbers[id(tree.values[n])]] for n in tree.index.numbers}
        self._known[_key(tree)] = _Found(places, by_name)
        return places

    def _chosen(self, selector: Any, tree: Tree) -> set[int]:
        """The numbers of the selected leaves; all of them for a clause without a selector."""
        if selector is None:
            return set(tree.index.numbers)
        try:
            return set(resolve(selector, tree))
        except NoMatch as error:
            if not isinstance(selector, Held):
                raise
            raise NoMatch(
                f"{str(error).partition(chr(10))[0]}; an optimizer sees only the parameters, and those of Flax models "
                "do not keep module classes",
                hint=f'select by path, such as "{tree.index.path(tree.index.numbers[0])}"',
            ) from None

    def _place(
        self, tree: Tree, number: int, until: list[tuple[Clause, set[int]]], since: list[tuple[Clause, set[int]]]
    ) -> FrozenPlace:
        shape = tree.values[number].shape
        try:
            base = region_of(self.schedule.index, shape)
            thaws = _regions(until, number, shape)
            stops = _regions(since, number, shape)
        except OutOfRange as error:
            raise OutOfRange(f"{tree.index.path(number)}: {error}") from None
        pieces: list[tuple[Region, Window]] = []
        for thawed, thaw in thaws:
            for stopped, stop in stops:
                region = both(base, both(thawed, stopped))
                if not is_empty(region):
                    pieces.append((region, Window(since=stop, until=thaw)))
                if not region:  # the whole leaf: nothing is left for those that follow
                    return FrozenPlace(tuple(pieces))
        return FrozenPlace(tuple(pieces))


def _regions(clauses: list[tuple[Clause, set[int]]], number: int, shape: tuple[int, ...]) -> list[tuple[Region, Any]]:
    """The regions of a leaf that clauses select, with their events; the last is the rest of the leaf."""
    found = [(region_of(clause.index, shape), clause.event) for clause, chosen in clauses if number in chosen]
    return [*found, (WHOLE, None)]


def named(params: Any) -> tuple[Tree, Any, dict[int, int]]:
    """The leaves with their names, the structure, and the place of each leaf in JAX's order. Each leaf is replaced by
    its spec. So Python numbers are leaves here, as they are in JAX, and one array at two places is two parameters, as
    it is to an optimizer and under `jit`."""
    leaves, structure = jax.tree.flatten(params)
    specs = [_spec(leaf) for leaf in leaves]
    return Tree(structure.unflatten(specs)), structure, {id(spec): place for place, spec in enumerate(specs)}


def dtype_of(x: Any) -> Any:
    """The dtype that JAX gives to a leaf."""
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def _spec(leaf: Any) -> Any:
    if hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex):
        return jax.ShapeDtypeStruct(jnp.shape(leaf), dtype_of(leaf))
    return leaf


def _name(tree: Tree, number: int) -> Any:
    return tree.index.pieces(number), tree.values[number].shape


def _key(tree: Tree) -> Any:
    return tuple(_name(tree, number) for number in tree.index.numbers)


def moved_by_model(tree: Tree) -> frozenset[int]:
    """The numbers of the leaves that the model moves itself: statistics, counts of random keys, caches. They are told
    by their Variables (NNX), by their collection (Flax), or by the state that they are in (Equinox)."""
    index = tree.index
    found = set()
    for kind, start, stop in index.spans:
        if kind.__module__.startswith("equinox.") and kind.__name__ in ("State", "StateIndex"):
            found.update(index.numbers[start:stop])
    tops = {number: index.pieces(number)[:1] for number in index.numbers}
    if ("params",) in tops.values():
        found.update(number for number, top in tops.items() if top and top[0] in _COLLECTIONS)
    if tree.boxes:
        from paramend.freezing.nnx import moves_itself  # imports flax

        found |= moves_itself(tree.boxes)
    return frozenset(found)
