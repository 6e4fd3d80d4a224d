"""`pm.merge`: one model made of several, leaf by leaf."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast, get_args

from paramend.checkpoints.assemble import exchanged
from paramend.checkpoints.checkpoint import Checkpoint
from paramend.edits.memory import Memory, editable, valued
from paramend.edits.plan import call
from paramend.edits.structure import enter
from paramend.edits.weights import Weights, exact, is_coded, weighed
from paramend.errors import BadArgument
from paramend.leaves.leaves import Editable, keys_of
from paramend.leaves.origins.origin import Origin
from paramend.leaves.origins.reduced import Reduced
from paramend.leaves.specs import AnyTree
from paramend.mapping.report import LayoutReport, Moved
from paramend.merging.matching import Matched, Missing, Models, Stats
from paramend.merging.methods import METHODS, changed, method_of, settings_of
from paramend.merging.reduction import Merging, Vector
from paramend.merging.settings import Convention, Settings
from paramend.reports import wording
from paramend.selectors.selector import resolve

T = TypeVar("T")


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
