"""Pruning in width: a model with some places of its axes, in every leaf that has them."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np

from paramend.arrays.registry import to_numpy
from paramend.checkpoints.assemble import origin_of
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.errors import BadArgument, SpecMismatch
from paramend.growth import numbered
from paramend.growth.axes import KEYS
from paramend.growth.deepening import deepen
from paramend.growth.spreads import layer_of
from paramend.growth.widening import WidthReport, Work
from paramend.leaves.origins.stored import Held
from paramend.leaves.specs import AnyArray, Array
from paramend.reports import wording
from paramend.resize.widths import Spread

T = TypeVar("T")
Keep: TypeAlias = Mapping[str, int | Sequence[int] | AnyArray]
Scores: TypeAlias = Literal["norm"] | Mapping[str, AnyArray]

# Axes with places of their own in each layer.
_LAYERED = frozenset(KEYS) - {"hidden", "vocabulary"}
_ROWS = 1 << 20  # elements that are read at once


def narrow(tree: T, keep: Keep, *, by: Scores = "norm") -> tuple[T, WidthReport]:
    """A model with some places of its axes alone, and the report: structured pruning (Minitron, arXiv:2407.14679).

    Every leaf that has an axis keeps the same places of it, bit for bit, and the configuration follows. What a model
    computes without places of `mlp` or without groups of heads is what it computes with zeros there.

    Args:
        tree: a checkpoint from `pm.open`, of which nothing is computed before it is saved; a model of transformers; any
            tree or module, for layers by their paths as in `pm.widen(tree, features=...)`.
        keep: axis → how many places stay, or which ones, in this order; an array (layers, places) says it for each
            layer. Axes are `hidden`, `mlp`, `heads`, `kv_heads`, `layers`, `vocabulary`, and in mixtures `expert_mlp`
            and `shared_mlp`; or paths of layers. Heads stay in whole groups: those of queries with the head of keys
            that they read.
        by: which places stay where `keep` is a number: those with the highest scores, of axis → array (layers, places)
            or (places,); "norm" for the root of the sum of squares of what belongs to a place.

    Returns:
        A new tree of the same type, and the report; `report.kept` has the places.

    Raises:
        BadArgument: there is no such axis, a place does not exist or stays twice, or a group would be broken.
        NoMatch, SpecMismatch, Unsupported: as in `pm.widen`.

    >>> params = {"Dense_0": {"kernel": np.array([[1.0, 9.0, 2.0]])}, "Dense_1": {"kernel": np.ones((3, 1))}}
    >>> tree, report = pm.narrow(params, keep={"Dense_0": 2})
    >>> tree["Dense_0"]["kernel"].tolist(), report.kept
    ([[9.0, 2.0]], {'Dense_0': [[1, 2]]})
    """
    wanted = {axis: int(what) if isinstance(what, np.integer) else what for axis, what in keep.items()}
    layers = wanted.pop("layers", None)
    features = [axis for axis in wanted if axis not in KEYS]
    if not keep or (features and len(features) < len(wanted)):
        raise BadArgument("narrow takes axes of a model, or paths of layers", hint='keep={"mlp": 4096}')
    work = Work(tree, features, "narrow")
    if "vocabulary" in wanted:
        _check_tokens(work, wanted["vocabulary"])
    places = _Choice(work, wanted, by).places() if wanted else {}
    spreads = {(axis, at): Spread.kept(work.axes.sizes[axis], each) for (axis, at), each in places.items()}
    kept: dict[str, list[list[int]]] = {}
    for (axis, _), each in places.items():
        kept.setdefault(axis, []).append(each)
    new, report = work.spread(spreads).carried_out(tree)
    report.kept = kept
    return (new, report) if layers is None else _without_layers(new, report, layers, work, by)


def _check_tokens(work: Work, what: Any) -> None:
    """Raise if a token that the configuration names would have no row."""
    count = what if isinstance(what, int) else len(what)
    for key, token in (work.config or {}).items():
        if key.endswith("_token_id") and type(token) is int and token >= count:
            raise BadArgument(f"vocabulary: the configuration says {key}: {token}, which {count} rows do not have")


def _without_layers(new: T, report: WidthReport, layers: Any, work: Work, by: Scores) -> tuple[T, WidthReport]:
    count = len(numbered.find(work.leaves, None)[0].numbers)
    choice = _Choice(work, {}, by)
    order = choice.chosen("layers", layers, count, lambda: choice.of_layers(count))[0]
    new, deepened = deepen(new, order=order, identity=None)
    report.sizes["layers"] = count, len(order)
    report.kept["layers"], report.moved = [order], True
    report.config += deepened.config
    return new, report


class _Choice:
    """Which places of some axes stay."""

    def __init__(self, work: Work, keep: Mapping[str, Any], by: Scores) -> None:
        if by != "norm" and not isinstance(by, Mapping):
            raise BadArgument(f"by={by!r} is not 'norm' and has no scores", hint='by={"mlp": array}')
        self.work, self.keep, self.by = work, dict(keep), by
        self.axes = work.axes

    def places(self) -> dict[tuple[str, int | None], list[int]]:
        for axis in self.keep:
            if not self.axes.has(axis):
                raise BadArgument(f"{axis!r}: the model has no such axis")
        found: dict[tuple[str, int | None], list[int]] = {}
        if self.axes.has("kv_heads") and {"heads", "kv_heads"} & self.keep.keys():
            found |= self._groups()
        for axis, what in self.keep.items():
            layers = self._layers(axis) if axis in _LAYERED else [None]
            lists = self.chosen(axis, what, self.axes.sizes[axis], lambda axis=axis: self._scores(axis), len(layers))
            found |= {(axis, layer): each for layer, each in zip(layers, lists, strict=True)}
        return found

    def _groups(self) -> dict[tuple[str, int | None], list[int]]:
        heads, groups = self.axes.sizes["heads"], self.axes.sizes["kv_heads"]
        size, layers = heads // groups, self._layers("heads")
        if {"heads", "kv_heads"} <= self.keep.keys():
            raise BadArgument("heads of queries stay with their groups", hint='keep={"kv_heads": ...}')
        axis = "heads" if "heads" in self.keep else "kv_heads"
        what: Any = self.keep.pop(axis)
        if axis == "heads":
            what = self._whole(what, size)

        def scores() -> Any:
            given = self._given("kv_heads") if axis == "kv_heads" else self._given("heads")
            if given is not None:
                return np.sum(given.reshape(*given.shape[:-1], groups, -1), -1)
            return np.sum(self._scores("heads").reshape(len(layers), groups, size), -1) + self._scores("kv_heads")

        lists = self.chosen("kv_heads", what, groups, scores, len(layers))
        found: dict[tuple[str, int | None], list[int]] = {}
        for layer, each in zip(layers, lists, strict=True):
            found["kv_heads", layer] = each
            found["heads", layer] = [group * size + at for group in each for at in range(size)]
        return found

    def _whole(self, what: Any, size: int) -> Any:
        """The groups that heads of queries are."""
        if isinstance(what, int):
            if what % size:
                raise BadArgument(f"{what} heads are not whole groups of {size}", hint=f"heads: {what // size * size}")
            return what // size
        found = np.asarray(what)
        rows = found.reshape(*found.shape[:-1], -1, size) if not found.shape[-1] % size else found[..., None]
        if rows.shape[-1] != size or (rows - rows[..., :1] != np.arange(size)).any() or (rows[..., 0] % size).any():
            why = f"heads {np.ravel(found).tolist()} break groups of {size} that read one head of keys"
            raise BadArgument(why, hint=f"heads: {list(range(size))}")
        return rows[..., 0] // size

    def chosen(self, axis: str, what: Any, size: int, scores: Any, layers: int = 1) -> list[list[int]]:
        """The places of an axis that stay, for each layer."""
        if isinstance(what, int) and not isinstance(what, bool):
            if not 1 <= what <= size:
                raise BadArgument(f"{axis}: {what} of {size} places cannot stay", hint=f"{axis}: {size}")
            found = np.atleast_2d(scores())
            best = np.sort(np.argsort(-found, axis=1, kind="stable")[:, :what], axis=1)
            return [list(map(int, row)) for row in np.broadcast_to(best, (layers, what))]
        rows = np.asarray(what)
        if rows.dtype.kind not in "iu" or rows.ndim not in (1, 2) or not rows.size:
            raise BadArgument(f"{axis}: {what!r} is neither a number nor a list of places", hint=f"{axis}: [0, 1]")
        if rows.ndim == 2 and len(rows) != layers:
            raise SpecMismatch(f"{axis}: {len(rows)} lists of places, and there are {wording.plural(layers, 'layer')}")
        for row in np.atleast_2d(rows).tolist():
            wrong = [place for place in row if not 0 <= place < size]
            if wrong or len(set(row)) < len(row):
                why = f"{wrong[0]} is not one of {size}" if wrong else "one of them would stay twice"
                raise BadArgument(f"{axis}: {row[:16]}: {why}")
        return [list(map(int, row)) for row in np.broadcast_to(np.atleast_2d(rows), (layers, rows.shape[-1]))]

    def _layers(self, axis: str) -> list[int | None]:
        some = (number for number, uses in self.axes.uses.items() if any(axis in dict(use.parts) for use in uses))
        found = {layer_of(self.work.leaves.index.pieces(number)) for number in some}
        return sorted(found, key=lambda layer: -1 if layer is None else layer)

    def _given(self, axis: str) -> Array | None:
        if self.by == "norm" or axis not in self.by:
            return None
        found = to_numpy(self.by[axis])
        size = self.axes.sizes.get(axis, found.shape[-1])
        layers = len(self._layers(axis)) if axis in _LAYERED else 1
        if found.shape not in ((size,), (layers, size)) or np.isnan(found).any():
            raise SpecMismatch(f"scores of {axis} are {list(found.shape)}, and [{layers}, {size}] is needed")
        return found

    def _scores(self, axis: str) -> Array:
        given = self._given(axis)
        if given is not None:
            return given
        layers = self._layers(axis) if axis in _LAYERED else [None]
        return np.stack([self._norms[axis, layer] for layer in layers])

    def of_layers(self, count: int) -> Array:
        """The scores of layers: by default the norms of all of their leaves."""
        if self.by != "norm" and "layers" in self.by:
            return to_numpy(self.by["layers"])
        return np.array([self._norms["layers", layer][0] for layer in range(count)])

    @cached_property
    def _norms(self) -> dict[tuple[str, int | None], Array]:
        """The sums of squares of what belongs to a place, of each axis and layer; each leaf is read once."""
        leaves, norms = self.work.leaves, dict[tuple[str, int | None], Array]()
        for number, uses in self.axes.uses.items():
            if leaves.ties.get(number, number) != number or not uses:
                continue
            layer = layer_of(leaves.index.pieces(number))
            for use, sums in zip(uses, _squares(leaves, number), strict=True):
                start = 0
                for name, unit in use.parts:
                    size = self.axes.sizes.get(name)
                    if size is None:
                        continue
                    key = name, layer if name in _LAYERED else None
                    part = sums[start : start + size * unit].reshape(size, unit).sum(1)
                    norms[key] = norms.get(key, np.zeros(size)) + part
                    start += size * unit
            norms["layers", layer] = norms.get(("layers", layer), np.zeros(1)) + sums.sum()
        return norms


def _squares(leaves: Any, number: int) -> list[Array]:
    """For each axis of a leaf the sums of squares at its places, read in bounded memory."""
    origin = origin_of(leaves, number) if isinstance(leaves, Checkpoint) else Held(to_numpy(leaves.read(number)))
    shape = origin.spec.shape
    found = [np.zeros(length) for length in shape]
    rows = max(_ROWS * shape[0] // max(origin.spec.size, 1), 1)
    for start in range(0, shape[0], rows):
        box = (range(start, min(start + rows, shape[0])), *map(range, shape[1:]))
        squares = origin.read_box(box).astype(np.float64) ** 2
        for axis, each in enumerate(found):
            sums = squares.sum(tuple(at for at in range(len(shape)) if at != axis))
            each[slice(start, start + len(sums)) if not axis else slice(None)] += sums
    return found
