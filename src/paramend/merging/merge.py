"""`pm.merge`: one model made of several, leaf by leaf."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np

from paramend.anatomy.beside import EMBEDDINGS, HEADS
from paramend.checkpoints.assemble import exchanged
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.disk.urls import path_of
from paramend.edits.memory import Memory, editable, valued
from paramend.edits.plan import call
from paramend.edits.quantized import check_values
from paramend.edits.structure import enter
from paramend.edits.weights import Weights, exact, is_coded, weighed
from paramend.errors import BadArgument, SpecMismatch
from paramend.leaves.leaves import Editable, keys_of
from paramend.leaves.origins.boxes import bare
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.reduced import Reduced
from paramend.leaves.specs import AnyTree, Spec
from paramend.mapping.report import LayoutReport, Moved
from paramend.merging.methods import METHODS, changed, method_of, settings_of
from paramend.merging.reduction import Merging, Vector
from paramend.merging.settings import Convention, Settings
from paramend.reports import wording
from paramend.selectors.selector import resolve

T = TypeVar("T")
Missing = Literal["error", "keep"]
Stats = Literal["first", "mean"]
_STATISTICS = {"running_mean", "running_var", "num_batches_tracked"}
_VOCABULARY = {*EMBEDDINGS, *HEADS}


@dataclass(slots=True)
class Matched:
    """What becomes of the leaves of several models."""

    # Number in the host → the number in each model, that in the base last.
    merged: dict[int, tuple[int, ...]] = field(default_factory=dict)
    averaged: set[int] = field(default_factory=set)  # those of them that are statistics, of which the mean is taken
    # The leaves that the host lacks: the model, and the number in it.
    extra: list[tuple[Editable, int]] = field(default_factory=list)


class Models:
    """Models that are merged: those that count, and the base last if there is one."""

    def __init__(self, host: Editable, models: Sequence[Editable], base: Editable | None) -> None:
        self.host, self.all = host, [*models, *([] if base is None else [base])]
        # What messages call them: the paths of checkpoints, if all have different ones.
        self.names = [f"model {at + 1}" for at in range(len(models))] + ([] if base is None else ["the base"])
        # The same without folders, for expressions and records.
        self.short = [name.removeprefix("the ") for name in self.names]
        paths = [path_of(getattr(model, "path", "")) for model in self.all]
        if len({path.resolve() for path in paths}) == len(paths):
            self.names = list(map(str, paths))
            short = [path.name for path in paths]
            self.short = short if len({*short}) == len(paths) else self.short

    def match(self, missing: Missing = "error", stats: Stats | None = None, only: Sequence[int] = ()) -> Matched:
        """The leaves that are one; `only` some of the host, if these are given."""
        for model in self.all:
            check_values(model, model.index.numbers, "cannot be merged", "pm.dequantize(model) makes floats of it")
        found, problems, hints = Matched(), [], []
        numbers = [{model.index.pieces(n): n for n in model.index.numbers} for model in self.all]
        moved = frozenset[int]()
        if isinstance(self.host, Memory) and "jax" in sys.modules:  # else there is no such leaf
            from paramend.freezing.places import moved_by_model  # imports jax

            moved = moved_by_model(self.host)
        own = {self.host.index.pieces(n): n for n in only or self.host.index.numbers}
        for pieces in dict.fromkeys(each for known in (own, *([] if only else numbers)) for each in known):
            here = [known.get(pieces) for known in numbers]
            first = own.get(pieces)
            if None in here:
                if missing == "keep":
                    if first is None:
                        found.extra.append(next((m, n) for m, n in zip(self.all, here, strict=True) if n is not None))
                    continue
                lacking = [name for name, number in zip(self.names, here, strict=True) if number is None]
                problems.append(f"{'/'.join(pieces)} is not in {wording.listing(lacking)}")
                hints.append('missing="keep" keeps leaves that are in some models only as they are')
                continue
            assert first is not None
            both = tuple(number for number in here if number is not None)
            statistic = pieces[-1] in _STATISTICS or "batch_stats" in pieces or first in moved
            one = self.host.ties.get(first, first)
            problem, hint = self._hindrance(first, both, statistic=statistic, worded=stats is not None)
            if not problem and one != first:
                problem = self._untied(found.merged.get(one, both), both)
            if problem:
                problems.append(f"{self.host.index.path(first)} {problem}")
                hints.append(hint)
            elif self.host.spec(first).kind == "float" and (not statistic or stats == "mean"):
                found.merged[first] = both
                if statistic:
                    found.averaged.add(first)
        if problems:
            leaves = wording.plural(len(problems), "leaf", "leaves")
            lines = "\n  ".join(problems)
            hint = "\n      ".join(dict.fromkeys(filter(None, hints)))
            raise SpecMismatch(f"{leaves} cannot be merged:\n  {lines}", hint=hint)
        return found

    def _hindrance(self, first: int, numbers: Sequence[int], *, statistic: bool, worded: bool) -> tuple[str, str]:
        """Why a leaf cannot be merged, and what can be done; "" if it can, or all have the same."""
        specs = [model.spec(number) for model, number in zip(self.all, numbers, strict=True)]
        kinds = {spec.kind for spec in specs}
        why = next(filter(None, (m.refusal(n) for m, n in zip(self.all, numbers, strict=True))), "")
        if why:
            return f"cannot be read: {why}", ""
        if len({spec.shape for spec in specs}) > 1:
            return self._misshapen(first, specs)
        if len(kinds) > 1:
            return f"has dtypes of several kinds: {self._said([spec.dtype for spec in specs])}", ""
        fine = worded if statistic else kinds == {"float"}
        if fine or _alike(*zip(self.all, numbers, strict=True)):
            return "", ""
        if statistic:
            hint = 'stats="first" takes statistics of batches from the first model, stats="mean" their mean'
            return "is moved by the model itself, as statistics of batches are: no average of it is right", hint
        if kinds & {"int", "bool"}:
            return f"holds {specs[0].dtype}, and differs between the models", ""
        return f"is {specs[0].dtype}, of which there is no average, and differs between the models", ""

    def _untied(self, one: Sequence[int], other: Sequence[int]) -> str:
        """Why two leaves that are one in the host cannot be so in the result; "" if they are one in all models."""
        for name, model, *pair in zip(self.names, self.all, one, other, strict=True):
            if len({model.ties.get(number, number) for number in pair}) > 1 and not _alike(*((model, n) for n in pair)):
                return f"is tied to {model.index.path(pair[0])}, and in {name} it is a leaf of its own"
        return ""

    def _misshapen(self, first: int, specs: Sequence[Spec]) -> tuple[str, str]:
        shapes, pieces = [spec.shape for spec in specs], self.host.index.pieces(first)
        named = _VOCABULARY & {*pieces[-2:]} or any("embed" in piece.lower() for piece in pieces[-2:])
        if named and shapes[0] and all(len(shape) == len(shapes[0]) for shape in shapes):
            differ = [{*lengths} for lengths in zip(*shapes, strict=True)]
            axes = [axis for axis, lengths in enumerate(differ) if len(lengths) > 1]
            if len(axes) == 1:
                sizes = self._said([f"{shape[axes[0]]:,}" for shape in shapes])
                hint = (
                    "tree, report = pm.vocabulary(model).transplant(donor) brings a model to the vocabulary of another"
                )
                return f"is of vocabularies of different sizes: {sizes}", hint
        return f"has different shapes: {self._said([str(spec) for spec in specs])}", ""

    def _said(self, each: Sequence[str]) -> str:
        return wording.listing([f"{what} in {name}" for what, name in zip(each, self.names, strict=True)])


def _alike(*leaves: tuple[Editable, int]) -> bool:
    """Whether leaves have the same bits; integers of any size, whether they are the same."""
    specs = {model.spec(number) for model, number in leaves}
    whole = {spec.kind for spec in specs} == {"int"}
    if len({spec.shape if whole else spec for spec in specs}) > 1:
        return False
    if next(iter(specs)).kind == "other":
        return len({str(model.read(number)) for model, number in leaves}) == 1
    origins = [model.expression(number) for model, number in leaves]
    for start, stop in origins[0].ranges():
        first, *rest = (each if whole else bare(each) for each in (o.read_range(start, stop) for o in origins))
        if not all(np.array_equal(first, other) for other in rest):
            return False
    return True


def merge(
    models: Sequence[T],
    how: str = "linear",
    *,
    weights: Sequence[float] | None = None,
    base: AnyTree | None = None,
    t: float | None = None,
    density: float | Sequence[float] | None = None,
    gamma: float | Sequence[float] | None = None,
    epsilon: float | Sequence[float] | None = None,
    seed: int | None = None,
    scale: float | None = None,
    at: Mapping[str, Mapping[str, object]] | None = None,
    convention: Convention = "paper",
    missing: Missing = "error",
    stats: Stats | None = None,
) -> tuple[T, LayoutReport]:
    """One model made of several, and the report.

    Averages are exact: each element of the mean of models in bfloat16, float16 or float32 is the correctly rounded one.
    All other results are computed in floats of 32 bits or more and rounded once. Models that are the same give back the
    same bits, and their order changes none, except of what is left to chance.

    Args:
        models: trees of any library, or opened checkpoints, of which nothing is read before `.save(out)`; the result is
            like the first one, with its dtypes and the files beside its weights.
        how: "linear", "slerp", "karcher", "multislerp"; or, with a base, "task_arithmetic", "ties", "dare",
            "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "model_stock", "nearswap".
        weights: how much each model counts, by default all the same: linear divides by their sum, and with it ties.
        base: the model that the others come from.
        t: for slerp how far from the first model to the second; for nearswap the most that an element changes.
        density: the share of changes that stay, of all models or of each.
        gamma: for breadcrumbs, the share of changes that go because they are the largest.
        epsilon: for della, by how much the chance of the largest change in a row to stay exceeds the density.
        seed: of what dare and della leave to chance, which depends on the path and the model as well.
        scale: a factor of the change of the base, the lambda of papers, by default 1.
        at: selector → settings for its leaves: `{"**/mlp/**": {"t": 0.3}}`; the first that matches a leaf counts.
        convention: whose reading of a method: that of its paper, in which ties ranks the changes of a whole model, that
            of mergekit, or that of PEFT.
        missing: whether leaves that are in some models only are an error, or stay as they are.
        stats: what becomes of statistics of batches: those of the first model, or their mean.

    Returns:
        The model, of the type of the first; and a report, whose `rows` are the leaves that were merged.

    Raises:
        BadArgument: a setting means nothing to the method, is lacking or out of range.
        SpecMismatch: leaves do not fit together, are in some models only, or hold integers that differ: all are listed.
        Quantized: a model has quantised weights that cannot be decoded.
        NoMatch: a selector of `at` matches nothing.

    >>> tree, report = merge([{"w": np.array([1.0, 2.0])}, {"w": np.array([2.0, 4.0])}], weights=[1, 3])
    >>> tree["w"].tolist(), report.rows[0].origin
    ([1.75, 3.5], 'linear(model 1, model 2, weights=[1, 3])')
    """
    if isinstance(models, Mapping | str) or not isinstance(models, Iterable):
        raise BadArgument("one model is given, and a list of them is needed", hint="pm.merge([a, b])")
    for name, word, known in (("missing", missing, get_args(Missing)), ("stats", stats, (None, *get_args(Stats)))):
        if word not in known:
            raise BadArgument(f"{name}={word!r} is not known", hint=f"{name}={known[-1]!r}")
    trees = [weighed(valued(model)) for model in models]
    given: dict[str, Any] = {"how": how, "weights": weights, "t": t, "density": density, "gamma": gamma}
    given |= {"epsilon": epsilon, "seed": seed, "scale": scale, "convention": convention}
    check_models(how, len(trees), based=base is not None)
    whole = settings_of(given, len(trees))
    under = None if base is None else weighed(valued(base))
    host = trees[0]
    some: dict[int, Settings] = {}
    for selector, others in (at or {}).items():
        settings = changed(whole, others, len(trees))
        check_models(settings.how, len(trees), based=under is not None)
        some = dict.fromkeys(resolve(selector, host), settings) | some
    together = Models(host, trees, under)
    found = together.match(missing, stats)
    made = reduced(together, found, lambda number: some.get(number, whole))
    return cast("tuple[T, LayoutReport]", finished(host, made, found.extra, how))


def check_models(how: str, count: int, *, based: bool) -> None:
    """Raise if a method does not merge so many models, or lacks a base."""
    method = method_of(how)
    least, most = method.models
    if not least <= count <= most:
        takes = f"{wording.plural(least, 'model')}{'' if least == most else ' or more'}"
        more = f' besides the base: merge([b], "{how}", base=a)' if method.base == "needed" else ""
        raise BadArgument(f"{how} takes {takes}, and there are {count}{more}")
    if method.base == "needed" and not based:
        raise BadArgument(f"{how} needs the model that the others come from", hint="base=pm.open(path)")
    if method.base == "refused" and based:
        others = wording.listing([row.name for row in METHODS.values() if row.base == "needed"][:3])
        raise BadArgument(f"{how} has no use for a base, as {others} have", hint="leave base out")


def reduced(
    models: Models, found: Matched, settings_for: Callable[[int], Settings], dtype: str = ""
) -> dict[int, Reduced]:
    """The merged leaves, by their numbers in the host; tied ones are the same."""
    host, index = models.host, models.host.index
    made: dict[int, Reduced] = {}
    vectors: dict[Settings, list[Merging]] = {}
    for number, numbers in found.merged.items():
        one = host.ties.get(number, number)
        if one in made:
            made[number] = made[one]
            continue
        settings = settings_for(number)
        count, path, pieces = len(settings.weights), index.path(number), index.pieces(number)
        if number in found.averaged:
            settings = settings_of({"how": "linear"}, count)
        method, kind = method_of(settings.how), "float32" if is_coded(host, number) else host.spec(number).dtype
        kind = dtype or kind
        parts = tuple(exact(model, each) for model, each in zip(models.all, numbers, strict=True))
        parts = parts[:count] if method.base == "refused" else parts
        merging = Merging(method, settings, parts, len(parts) > count, kind, tuple(models.short), path, pieces)
        if method.name == "ties" and settings.convention == "paper":
            vectors.setdefault(settings, []).append(merging)
        made[number] = made[one] = Reduced(parts, merging, kind)
    for leaves in vectors.values():
        ordered = sorted(leaves, key=lambda leaf: leaf.pieces)  # the same in every file
        together = Vector(ordered)
        for place, leaf in enumerate(ordered):
            leaf.vector, leaf.member = together, place
    return made


def finished(
    host: Editable, made: Mapping[int, Origin], extra: Sequence[tuple[Editable, int]] = (), how: str = "merge"
) -> tuple[Any, LayoutReport]:
    """The host with other values in some leaves, and with those that it lacks; and the report."""
    paths = host.index.texts
    rows = tuple(Moved(paths[number], new.spec, str(new), (paths[number],)) for number, new in made.items())
    kept = tuple(path for number, path in paths.items() if number not in made)
    report = LayoutReport(how, rows, kept, ("merged", "kept"))
    ones = {n: new for n, new in made.items() if host.ties.get(n, n) == n or host.ties[n] not in made}
    lazy = isinstance(host.stored if isinstance(host, Weights) else host, Checkpoint)
    dtypes = {n: new.spec.dtype for n, new in ones.items() if new.spec.dtype != host.spec(n).dtype}
    dtypes = {n: dtype for n, dtype in dtypes.items() if dtype != "float32" or not is_coded(host, n)}
    tree = host.edited({n: call("cast", {"dtype": dtype}) for n, dtype in dtypes.items()}) if dtypes else host
    tree = tree.edited({n: call("set", {"value": new}) for n, new in ones.items()})
    if extra and lazy:
        return exchanged(tree, {}, [(each.index.paths[n], each.expression(n)) for each, n in extra]), report
    if extra:
        entries = [(keys_of(other.index.paths[number]), other.fetch(number)) for other, number in extra]
        return enter(cast(Memory, editable(tree)), entries), report
    return tree, report
