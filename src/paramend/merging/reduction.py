"""`Merging`: how the elements of one leaf are made of those of several models."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from paramend.arrays.initializers import Site
from paramend.edits.call import explained
from paramend.leaves.origins.boxes import bare
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.reduced import BAND
from paramend.leaves.specs import Array, numpy_dtype
from paramend.merging.averages import average, keep_same, put, rounded, summed
from paramend.merging.methods import Method
from paramend.merging.rankings import Member, Ranking
from paramend.merging.settings import Settings


@dataclass(eq=False)
class Merging:
    """How a leaf is merged: a `Reduction`."""

    method: Method  # the row of the table
    settings: Settings
    parts: tuple[Origin, ...]  # the leaf of each model, and that of the base last if there is one
    based: bool  # whether there is a base
    dtype: str  # that of the result
    names: tuple[str, ...]  # what the models are called in the expression, the base last
    path: str
    pieces: tuple[str, ...]  # the same piece by piece, of which chance depends
    # The leaves whose changes are ranked together, this one among them; None: it is ranked alone.
    vector: "Vector | None" = None
    member: int = 0  # its place among these

    @property
    def align(self) -> int:
        """The size of pieces in which places matter: whole rows where changes are ranked within them."""
        if self.method.keep == "all":
            return 1
        if self.method.keep != "ranked":
            return BAND
        return self._row * max(BAND // self._row, 1)

    @property
    def _row(self) -> int:
        shape = self.parts[0].spec.shape
        return max(math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape), 1)

    def text(self, parts: Sequence[str]) -> str:
        given, count = self.settings, len(self.settings.weights)
        said = [*self.names[:count], *(f"base={name}" for name in self.names[count : len(parts)])]
        values = {name: _shown(getattr(given, name)) for name in self.method.takes}
        plain = {"weights": "1", "scale": "1"}
        return f"{given.how}({', '.join([*said, *(f'{n}={v}' for n, v in values.items() if plain.get(n) != v)])})"

    @property
    def elementwise(self) -> bool:
        """Whether an element depends on nothing but those at its place, nor on this place."""
        return self.method.keep == "all" and self.method.blends is None

    def prepare(self) -> None:
        """Find out what must be known of the whole leaf, or of all leaves, first."""
        with np.errstate(all="ignore"):
            if self.method.blends is not None:
                self._shares  # noqa: B018 - it is kept
            elif self.method.keep == "largest" and min(self.settings.density) < 1:
                self._ranking.cuts  # noqa: B018 - as above
            elif self._by_norm:
                self._factors  # noqa: B018 - as above

    @property
    def _ranking(self) -> Ranking:
        return (self.vector or self._alone).ranking

    def compute(self, values: Sequence[Array], start: int) -> Array:
        with np.errstate(all="ignore"):  # what the dtype cannot hold is inf
            if self.method.name == "linear":
                return self._averaged(values)
            if self.method.blends is not None:
                return self._blended(values)
            return self._swapped(values) if self.method.swaps else self._changed(values, start)

    def _averaged(self, values: Sequence[Array]) -> Array:
        some = [(value, weight) for value, weight in zip(values, self.settings.weights, strict=True) if weight]
        arrays, weights = zip(*some, strict=True)
        total = math.fsum(weights) if self.method.divided(self.settings) else 1.0
        return average(arrays, weights, total, self.dtype)

    @cached_property
    def _shares(self) -> list[float]:
        """How much of each model the leaf gets."""
        assert self.method.blends is not None
        count = len(self.settings.weights)
        dots, same = np.zeros((count, count)), True
        for values in self._pieces():
            wide, _ = self._vectors([value.astype(np.float64) for value in values])
            same = same and all(_alike(value, values[0]) for value in values[:count])
            for i in range(count):
                for j in range(i + 1):
                    dots[i, j] = dots[j, i] = dots[i, j] + float(np.add.reduce(wide[i] * wide[j]))
        if same:  # and back with its bits
            return [1.0] + [0.0] * (count - 1)
        settings = self.settings
        if self.parts[0].spec.size == 1:  # two numbers of different signs are not opposite, and blended as in mergekit
            settings = replace(settings, convention="mergekit")
        order, weights = list(range(count)), settings.weights
        if self.method.name != "slerp":  # the order in which models are given changes no bit
            order.sort(key=lambda at: (weights[at], dots[at, at], sorted(dots[at])))
        ordered = replace(settings, weights=tuple(weights[at] for at in order))
        found = explained(self.path, partial(self.method.blends, dots[np.ix_(order, order)]), ordered)
        return [float(found[order.index(at)]) for at in range(count)]

    def _vectors(self, values: list[Array]) -> tuple[list[Array], Array | None]:
        """The models, or what each changes in the base."""
        if not self.based:
            return values, None
        *models, base = values
        return [_difference(model, base) for model in models], base

    def _blended(self, values: Sequence[Array]) -> Array:
        some = [(share, at) for at, share in enumerate(self._shares) if share]
        if len(some) == 1 and some[0][0] == 1 and values[some[0][1]].dtype == numpy_dtype(self.dtype):
            return values[some[0][1]]
        wide, base = self._vectors(self._wide(values))
        total = summed([wide[at] * share for share, at in some]) if some else 0 * wide[0]
        if base is not None:
            return self._on(base, total, values)
        found = rounded(total, self.dtype)
        if math.isclose(math.fsum(self._shares), 1):
            keep_same(found, values)
        return found

    def _changed(self, values: Sequence[Array], start: int) -> Array:
        wide = self._wide(values)
        changes = [_difference(model, wide[-1]) for model in wide[:-1]]
        for change, (mask, factor) in zip(changes, self._kept(changes, start), strict=True):
            if mask is not None:
                _keep(change, mask)
            if factor is not None:
                change *= factor
        return self._on(wide[-1], self._summed(changes), values)

    def _summed(self, changes: Sequence[Array]) -> Array:
        """The change of all, of those of each model that stay."""
        settings, divided = self.settings, self.method.divided(self.settings)
        pairs = zip(changes, settings.weights, strict=True)
        weighted = [change if weight == 1 else change * weight for change, weight in pairs]
        if not self.method.elect:
            total = summed(weighted)
            weights = math.fsum(settings.weights)
            return total * (settings.scale / weights if divided and abs(weights) > 1e-8 else settings.scale)
        plain = settings.convention == "peft"
        voters = changes if plain else weighted
        votes = summed(voters)
        sign = np.copysign(votes.dtype.type(1), votes + 0)  # of 0 it is 1
        counts = []
        for voter, change, weight in zip(voters, weighted, settings.weights, strict=True):
            agrees = voter * sign > 0
            counts.append(agrees.astype(votes.dtype) * votes.dtype.type(1 if plain else weight))
            _keep(change, agrees)
        total = summed(weighted)
        if divided:
            count = summed(counts)
            count[count == 0] = 1
            total /= count
        return total * settings.scale if settings.scale != 1 else total

    def _on(self, base: Array, total: Array, values: Sequence[Array]) -> Array:
        """The base with a change, and its own bits where there is none."""
        found = rounded(base + total, self.dtype)
        if values[-1].dtype == found.dtype:
            put(found, values[-1], total == 0)
        return found

    def _swapped(self, values: Sequence[Array]) -> Array:
        other, base = self._wide(values)
        change = _difference(other, base)
        size, t = np.abs(change), self.settings.t
        found = self._on(base, change * np.clip(t / np.maximum(size, 1e-6), 0, 1), values)
        if values[0].dtype == found.dtype:
            put(found, values[0], (size <= t) & (size > 0))
        return found

    def _kept(self, changes: Sequence[Array], start: int) -> list[tuple[Array | None, Array | float | None]]:
        """For each model, which of its changes stay, and what they are multiplied with."""
        masks = self._chosen(changes, start)
        if not self._by_norm:
            return masks
        return [(mask, factor) for (mask, _), factor in zip(masks, self._factors, strict=True)]

    def _chosen(self, changes: Sequence[Array], start: int) -> list[tuple[Array | None, Array | float | None]]:
        keep, density = self.method.keep, self.settings.density
        if keep == "all" or min(density) >= 1:
            return [(None, None) for _ in changes]
        if keep == "largest":
            sizes = self._sizes(changes)
            return [(mask, None) for mask in self._ranking.kept(self.member, start // BAND, sizes)]
        chances: Iterable[Any] = density if keep == "random" else self._chances(changes)
        found: list[tuple[Array | None, Array | float | None]] = []
        for model, chance in enumerate(chances):
            mask = self._drawn(model, start, changes[model].size) < chance
            grows = self.settings.rescale is not False
            found.append((mask, 1 / chance if grows else None))
        return found

    def _chances(self, changes: Sequence[Array]) -> Iterator[Array]:
        """The chance of each change to stay, by its rank within its row."""
        for change, density, epsilon in zip(changes, self.settings.density, self.settings.epsilon, strict=True):
            rows = np.abs(change).reshape(-1, self._row)
            ranks = rows.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
            share = ranks / max(self._row - 1, 1) if self._row > 1 else np.full(rows.shape, 0.5)
            chance = density - epsilon + share * 2 * epsilon if density < 1 else np.ones(rows.shape)
            yield chance.reshape(-1).astype(change.dtype)

    def _drawn(self, model: int, start: int, count: int) -> Array:
        """Numbers from 0 to 1 that depend on the seed, the path, the model and the place alone."""
        digest = Site(self.pieces).number
        words = [digest >> (32 * at) & 0xFFFFFFFF for at in range(8)]
        seeds = np.random.SeedSequence([self.settings.seed, *words, model, start // self.align])
        return np.random.Generator(np.random.PCG64(seeds)).random(count, np.float32)

    @property
    def _by_norm(self) -> bool:
        """Whether changes that stay are scaled to the sum of all magnitudes, as mergekit does."""
        return self.method.keep in ("random", "ranked") and (
            self.settings.convention == "mergekit" and self.settings.rescale is not False
        )

    @cached_property
    def _factors(self) -> list[float]:
        before, after = np.zeros(len(self.settings.weights)), np.zeros(len(self.settings.weights))
        for at, values in enumerate(self._pieces()):
            changes = self._differences(values)
            for model, (mask, _) in enumerate(self._chosen(changes, at * self.align)):
                size = np.abs(changes[model]).astype(np.float64)
                before[model] += size.sum()
                after[model] += size[mask].sum()
        fine = (before > 1e-7) & (after > 1e-7)
        return np.where(fine, before / np.where(fine, after, 1), 1).tolist()  # type: ignore[no-any-return]

    @cached_property
    def _alone(self) -> "Vector":
        return Vector([self])

    def _pieces(self, numbers: range | None = None) -> Iterator[list[Array]]:
        """The elements of all parts, piece by piece; some of the pieces, if their numbers are given."""
        step, size = self.align if self.align > 1 else BAND, self.parts[0].spec.size
        for start in range(0, size, step) if numbers is None else (number * step for number in numbers):
            yield [part.read_range(start, min(start + step, size)) for part in self.parts]

    @property
    def magnitudes(self) -> Member:
        """How much each model changes the base in each element."""
        size = self.parts[0].spec.size

        def pieces(numbers: range) -> Iterator[list[Array]]:
            return (self._sizes(self._differences(values)) for values in self._pieces(numbers))

        return Member(pieces, size, -(-size // BAND))

    def _sizes(self, changes: Sequence[Array]) -> list[Array]:
        """The magnitudes that are ranked; of changes that are computed in more bits than any leaf has, in 32."""
        wide = any(part.spec.dtype == "float64" for part in self.parts)
        return [np.abs(change).astype(np.float64 if wide else np.float32, copy=False) for change in changes]

    def _differences(self, values: Sequence[Array]) -> list[Array]:
        *models, base = self._wide(values)
        return [_difference(model, base) for model in models]

    def _wide(self, values: Sequence[Array]) -> list[Array]:
        """The elements as floats in which they are computed: of 32 bits if all have 16 at most, else of 64."""
        short = all(part.spec.dtype not in ("float32", "float64") for part in self.parts)
        return [value.astype(np.float32 if short else np.float64) for value in values]


class Vector:
    """Leaves whose changes are ranked together: one, or all of a model."""

    def __init__(self, leaves: Sequence[Merging]) -> None:
        self.leaves = leaves

    def __reduce__(self) -> tuple[type["Vector"], tuple[Sequence[Merging]]]:
        return Vector, (self.leaves,)

    @cached_property
    def ranking(self) -> Ranking:
        size, settings = sum(leaf.parts[0].spec.size for leaf in self.leaves), self.leaves[0].settings
        places = []
        for density, gamma in zip(settings.density, settings.gamma or [0.0] * len(settings.density), strict=True):
            stay = int(density * size) if settings.convention != "mergekit" else max(int(density * size), 1)
            first = min(int(gamma * size), size - stay)
            places.append((first, first + stay))
        return Ranking([leaf.magnitudes for leaf in self.leaves], places)


def _difference(model: Array, base: Array) -> Array:
    """What a model changes in the base: nothing where both have the same bits, of infinite numbers too."""
    change: Array = model - base
    fine = np.isfinite(change)
    if not fine.all():
        change[~fine & (bare(model) == bare(base))] = 0
    return change


def _keep(x: Array, mask: Array) -> None:
    """Make elements zero where a mask is false, of infinite ones too."""
    bits = x.view(f"i{x.itemsize}")
    bits &= -mask.astype(bits.dtype)


def _alike(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and np.array_equal(bare(one), bare(other))


def _shown(value: object) -> str:
    many = value if isinstance(value, tuple) else (value,)
    shown = [f"{each:g}" for each in many]
    return shown[0] if len({*shown}) == 1 else f"[{', '.join(shown)}]"
