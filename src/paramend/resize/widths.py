"""`Growth`: what becomes of a leaf when axes of its model get longer or shorter, and of the moments that belong to it.

An axis of a model, such as its residual width, becomes another by an index map: for each new place the old one, and the
share by which what reads the copies divides among them (Net2Net, arXiv:1511.05641; HyperCloning, arXiv:2409.12903). A
leaf has several such axes; it writes to some and reads from others. Its gradient is divided where it is not.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from paramend.arrays import origins
from paramend.arrays.registry import backend
from paramend.leaves.origins.moved import join, take
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.scaled import Mean, Scaled, Term
from paramend.leaves.specs import Array
from paramend.reports.ends import Ends

Path = tuple[str, ...]
_RUNS = 16
Zero = Literal["readers", "writers", "means"]


@dataclass(frozen=True, eq=False)
class Spread:
    """What becomes of an axis of a model."""

    old: int  # how many places it had
    places: Array  # for each new place the old one that it copies
    shares: Array  # for each new place the part that readers take of it; those of one old place sum to 1
    fresh: Array  # which places copy none; their numbers are those of others times random factors, or zero
    zero: Zero = "readers"  # whether readers or writers are zero there; "means": writers have the mean of all others
    # For each new place how its share is larger for some readers than for others; these sum to 0.
    split: Array | None = None

    @classmethod
    def copies(cls, old: int, places: Sequence[int] | Array, *, split: bool = False) -> "Spread":
        """Copies of old places; what reads them divides evenly, or `split`."""
        found = np.asarray(places, np.int64)
        counts = np.bincount(found, minlength=old)
        ranks, order = np.zeros(len(found)), np.argsort(found, kind="stable")
        ranks[order] = np.arange(len(found)) - np.repeat(np.cumsum(counts) - counts, counts)
        most = counts[found] - 1
        uneven = np.where(most > 0, 2 * ranks / np.maximum(most, 1) - 1, 0) if split else None
        return cls(old, found, 1 / counts[found], np.zeros(len(found), bool), split=uneven)

    @classmethod
    def kept(cls, old: int, places: Sequence[int] | Array) -> "Spread":
        """Some old places alone."""
        found = np.asarray(places, np.int64)
        return cls(old, found, np.ones(len(found)), np.zeros(len(found), bool))

    @property
    def even(self) -> bool:
        """Whether each old place has as many copies, so that norms over the axis see what they saw."""
        counts = np.bincount(self.places, minlength=self.old)
        return not self.fresh.any() and len(set(counts.tolist())) == 1


@dataclass(frozen=True)
class Use:
    """An axis of a leaf: one or more axes of its model in a row, each place of which has `unit` places here."""

    parts: tuple[tuple[str, int], ...]  # the names of these axes with their units
    reads: bool = False  # whether the leaf reads from it; it writes to it otherwise

    def length(self, sizes: Mapping[str, int]) -> int | None:
        """How long it is by the sizes of the model; None if these do not say."""
        known = [sizes.get(name) for name, _ in self.parts]
        return None if None in known else sum(sizes[name] * unit for name, unit in self.parts)

    def along(self, sizes: Mapping[str, int], spreads: Mapping[str, Spread]) -> Spread | None:
        """What becomes of it; None if it stays."""
        if not any(name in spreads for name, _ in self.parts):
            return None
        found: list[tuple[Array, ...]] = []
        start = 0
        for name, unit in self.parts:
            spread = spreads.get(name) or Spread.kept(sizes[name], range(sizes[name]))
            inner = spread.places[:, None] * unit + np.arange(unit) + start
            split = np.zeros(len(spread.places)) if spread.split is None else spread.split
            found.append((inner.reshape(-1), *(np.repeat(x, unit) for x in (spread.shares, spread.fresh, split))))
            start += sizes[name] * unit
        places, shares, fresh, split = map(np.concatenate, zip(*found, strict=True))
        zero = next(spreads[name].zero for name, _ in self.parts if name in spreads)
        return Spread(start, places, shares, fresh, zero, split if split.any() else None)


@dataclass(frozen=True, eq=False)
class Growth:
    """What becomes of a leaf."""

    shape: tuple[int, ...]  # its old shape
    places: tuple[Array | None, ...]  # for each axis the old place of each new one; None where it stays
    terms: tuple[Term, ...]  # the factors of the values; none if they are only moved
    moments: tuple[Term, ...]  # those of the first moments of an optimizer
    squares: tuple[Term, ...]  # those of the second moments
    shift: float = 0.0  # 1 for gains that their norm adds to 1
    means: tuple[int, int] | None = None  # the axis whose last places hold the mean of all, and how many these are
    rate: float | None = 1.0  # the factor of all values that are old ones; None if they differ

    def origin(self, whole: Origin) -> Origin:
        """Its values, made of the old ones when they are read."""
        axis, count = self.means or (-1, 0)
        among = {at for _, axes in self.terms for at, each in enumerate(axes) if each is not None}
        made = [(at, places) for at, places in enumerate(self.places) if places is not None and at != axis]
        for at, places in made if count else [each for each in made if each[0] in among]:
            whole = _copies(whole, places, at)
        if count:
            old = take(whole, np.asarray(self.places[axis])[:-count], axis)
            whole = join([old, Mean(whole, axis, count)], axis, "concat")
        if self.terms:
            whole = Scaled(whole, self.terms, self.shift)
        for at, places in () if count else [each for each in made if each[0] not in among]:  # the same factors for all
            whole = _copies(whole, places, at)
        return whole

    def array(self, x: Any) -> Any:
        """Its values, of an array of any library."""
        return _computed(x, self.origin)

    def moment(self, x: Any, *, squared: bool) -> Any:
        """A moment of it, of an array of any library."""
        terms = self.squares if squared else self.moments
        return _computed(x, replace(self, terms=terms, shift=0.0, means=None).origin)


def _copies(origin: Origin, places: Array, axis: int) -> Origin:
    """Some places along an axis; a few runs of them are joined, which is faster than to take them one by one."""
    runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    if not 1 < len(runs) <= _RUNS:
        return take(origin, places, axis)
    return join([take(origin, run, axis) for run in runs], axis, "concat")


def _computed(x: Any, make: Callable[[Origin], Origin]) -> Any:
    return backend(x).resized(make(origins.made(x)).read(), x)


def growth(
    shape: Sequence[int],
    along: Sequence[Spread | None],
    reads: Sequence[bool],
    path: Path,
    *,
    scale: float = 1.0,
    shift: float = 0.0,
    norm: bool = False,
) -> Growth:
    """What becomes of a leaf of an old shape, of which each axis becomes another, and is read from or written to. The
    numbers of fresh places depend on its path. `scale` is a factor of all values, `shift` 1 for gains that their norm
    adds to 1; `norm` says that they are the gains of a norm, which have no zeros, and no means."""
    rng = np.random.default_rng(zlib.crc32("/".join(path).encode()))
    lengths = [n if each is None else len(each.places) for n, each in zip(shape, along, strict=True)]
    factors: list[Array | None] = [None] * len(shape)
    slopes, kept, born, extra = ([*factors] for _ in range(4))
    means = None
    for axis, each in enumerate(along):
        if each is None:
            continue
        there = each.fresh & (not norm)
        dead = there & (each.zero == ("readers" if reads[axis] else "writers"))
        factors[axis] = np.where(dead, 0.0, each.shares if reads[axis] else 1.0)
        slopes[axis] = each.shares ** (not reads[axis])
        kept[axis] = (~each.fresh).astype(float)
        if each.zero == "means" and not reads[axis]:
            means = (axis, int(there.sum())) if there.any() else None
        elif (there & ~dead).any() and len(shape) > 1:
            born[axis] = kept[axis]
        if reads[axis] and each.split is not None:
            extra[axis] = each.split / 2
    terms = [_times(scale, factors, born)]
    for axis, old in enumerate(born):
        if old is not None:  # where this axis is new, and none before it
            here: list[Array | None] = [*born[:axis], 1 - old, *[None] * (len(shape) - axis - 1)]
            terms += [_times(scale, factors, waves, here) for waves in _waves(rng, lengths, axis)]
    if any(each is not None for each in extra):
        others: list[Array | None] = [
            None if at else rng.uniform(-1, 1, length) for at, length in zip(reads, lengths, strict=True)
        ]
        terms.append(_times(scale, factors, extra, others))
    moved = len(terms) == 1 and terms[0][0] == 1 and all(each is None for each in terms[0][1])
    return Growth(
        tuple(shape),
        tuple(None if each is None else each.places for each in along),
        () if moved else tuple(terms),
        (_times(1 / scale, slopes, kept),),
        (_times(scale**-2, slopes, slopes),),
        shift,
        means,
        _rate(terms[0]) if not any(each is not None for each in extra) else None,
    )


def _waves(rng: np.random.Generator, lengths: Sequence[int], axis: int) -> list[list[Array | None]]:
    """Two products whose sum is the root of 2 times the cosine of a random difference, of mean square 1: places that
    are made of one old place get numbers of their own by it, along an axis and the longest other one."""
    other = max((at for at in range(len(lengths)) if at != axis), key=lengths.__getitem__)
    angles = {at: rng.uniform(0, 2 * np.pi, lengths[at]) for at in (axis, other)}
    waves = (np.cos, np.sin)
    return [[2**0.25 * wave(angles[at]) if at in angles else None for at in range(len(lengths))] for wave in waves]


def _rate(term: Term) -> float | None:
    """The factor of places that are not new, if it is one."""
    number, axes = term
    for each in axes:
        found = set() if each is None else set(each.tolist()) - {0.0}
        if len(found) > 1:
            return None
        number *= next(iter(found), 1.0)
    return number


def _times(number: float, *factors: Sequence[Array | None]) -> Term:
    """A term that is a product; what is the same at all places of an axis goes into its number."""
    axes: list[Array | None] = []
    for each in zip(*factors, strict=True):
        some = [factor for factor in each if factor is not None]
        found = np.prod(some, axis=0) if some else None
        if found is not None and len(found) and (found == found[0]).all():
            number, found = number * float(found[0]), None
        axes.append(found)
    return number, tuple(axes)


@dataclass(repr=False)
class Widths:
    """How the leaves of a model follow when its axes become longer or shorter."""

    growths: dict[Path, Growth] = field(default_factory=dict, compare=False)  # of leaves that change, by their paths
    moved: bool = False  # whether leaves have other paths, too
    # The new model and the old one, as long as they are alive, for `pm.graft_optimizer_`.
    ends: Ends | None = field(default=None, compare=False)
