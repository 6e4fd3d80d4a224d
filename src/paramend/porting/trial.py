"""Trials: ports with random parameters, which find in what models compute what names leave open."""

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from paramend.errors import BadArgument
from paramend.grafting.graft import graft
from paramend.grafting.options import Dtype
from paramend.grafting.report import GraftReport
from paramend.leaves.leaves import Editable
from paramend.mapping.layout import Layout
from paramend.porting.calls import Call, calls
from paramend.porting.flattening import Flat
from paramend.porting.forms import Path
from paramend.porting.frameworks import copied, float64, rebound, runs
from paramend.porting.matching import Pair
from paramend.porting.models import Model
from paramend.porting.plan import PortPlan, Renames, Rules
from paramend.porting.proof import Proof, prove, sides_of
from paramend.porting.values import Values, largest, wide
from paramend.reports import wording
from paramend.trees.lookup import find_kind, is_torch_module

_MOST = 64  # ways to answer all questions


def stored(source: Model, layout: Layout) -> Any:
    """The source under the names and in the shapes of the target."""
    return layout.to(source.root if isinstance(source.root, Editable) else source.flat())[0]


def carried(target: Model, source: Model, layout: Layout, *, dtype: Dtype = "target") -> tuple[Any, GraftReport]:
    """The target with what a layout makes of the source, and the report of the graft."""
    made, report = graft(target.tree, stored(source, layout), dtype=dtype)
    return rebound(target.root, made) if target.bound else made, report


def tried(
    target: Model, source: Model, rename: Renames | None, rules: Rules | None, inputs: Any
) -> tuple[PortPlan, Proof | None]:
    """A plan whose questions are answered by running both models, and its proof; None if questions are left."""
    given = sides_of(inputs)
    ours, theirs = (_calls(model, given[side], side) for side, model in (("target", target), ("source", source)))
    order = source.learn(theirs), target.learn(ours)
    random, proof = Model(perturbed(source.root)), None
    plan = PortPlan(target, source, rename, rules, order)
    for pairs in _pairings(plan):
        trial = PortPlan(target, source, {**pairs, **(rename or {})}, rules, order) if pairs else plan
        if not (trial.doubtful or any(trial.lone)):
            plan, proof = trial, _proven(trial, random, given, order[0])
            if proof:
                break
    return plan, proof


def _pairings(plan: PortPlan) -> Iterator[dict[str, str]]:
    """The ways to pair what is in doubt, as renames."""
    pairs = [(ours, theirs) for ours, theirs in plan.doubtful if len(ours) == len(theirs) <= 4]
    rows = [[list(zip(ours, each, strict=True)) for each in itertools.permutations(theirs)] for ours, theirs in pairs]
    for chosen in itertools.islice(itertools.product(*rows), _MOST):
        yield {"/".join(a.path): "/".join(b.path) for pairs in chosen for a, b in pairs}


def _proven(plan: PortPlan, random: Model, given: dict[str, Any], order: dict[Path, int]) -> Proof | None:
    """The proof of a plan whose questions are answered; a false one if no answers prove it."""
    target, source, proof = plan.target, plan.source, None
    # The likeliest first; that on flattenings comes from values.
    open_ = {path: ways for path, (_, ways) in plan.questions.items() if len(ways) > 1}
    every = itertools.product(*([(path, way) for way in ways] for path, ways in open_.items()))
    for answers in itertools.islice(every, _MOST):
        for path, steps in answers:
            plan.choose(path, steps)
        made = _unflattened(plan, random, given, order)
        pairs = {(_text(target, pair.target.path), _text(source, pair.source.path)) for pair in plan.pairs}
        proof = prove(made, random.root, given, pairs=pairs)
        if proof:
            plan.questions.clear()
            break
    return proof


def _calls(model: Model, inputs: Any, side: str) -> list[Call]:
    if not callable(model.root):
        why = f"prove= runs both models, and the {side} is parameters alone"
        raise BadArgument(why, hint="the module: a torch, NNX or Equinox module, or linen_module.bind(variables)")
    return calls(model.root, inputs)


def _unflattened(plan: PortPlan, source: Model, given: dict[str, Any], order: dict[Path, int]) -> Any:
    """The target with random parameters, once flattened features are in its own order. Layer by layer, as they are
    called: the inputs of both are equal, or equal once their channels change places."""
    last = plan.channels_last(plan.target)
    if plan.channels_last(plan.source) == last:
        return _made(plan, source)
    called = sorted((pair for pair in plan.pairs if pair.source.path in order), key=lambda p: order[p.source.path])
    for pair in called:
        plan.flatten(pair, None)
    made = _made(plan, source)
    theirs, ours = calls(source.root, given["source"]), calls(made, given["target"])
    makers: list[Pair] = []  # a dense layer, and the norms after it
    for pair in called:
        sides = (plan.target, pair.target.path, ours), (plan.source, pair.source.path, theirs)
        one, other = (_input(*side) for side in sides)
        if one is None or other is None:
            continue
        one, other = (other, one) if last else (one, other)
        kind, changed = pair.ways[pair.way].source.form.kind, False
        if kind in ("conv", "conv_transpose"):
            for maker in makers if _unturned(one, other) else ():
                changed = plan.flatten(maker, Flat(one.shape[1], 0)) or changed
            makers = []
        elif one.shape == other.shape and _could_follow(pair, one.ndim):
            channels = _channels(*(each.reshape(-1, each.shape[-1]) for each in (one, other)))
            changed = plan.flatten(pair, Flat(channels) if channels else None)
            makers = [pair] if kind == "linear" else [*makers, pair]
        if changed:
            made = _made(plan, source)
            ours = calls(made, given["target"])
    return made


def _made(plan: PortPlan, source: Model) -> Any:
    with float64(["jax"]):  # in that of torch a tensor is another one whenever it is asked for
        return carried(plan.target, source, plan.layout(), dtype="source")[0]


def _could_follow(pair: Pair, ndim: int) -> bool:
    """Whether a layer may take flattened features: it is dense with a matrix, or a norm of vectors."""
    forms = pair.ways[pair.way].source, pair.ways[pair.way].target
    axes = {"linear": 2, "norm": 1, "batch_norm": 1}.get(forms[0].form.kind)
    return all(len(shaped.shapes[0][1]) == axes for shaped in forms) and (axes == 2 or ndim == 2)


def _input(model: Model, path: Path, found: list[Call]) -> Any:
    call = next((call for call in found if call.path == _text(model, path) and call.inputs), None)
    return None if call is None else call.inputs[0]


def _unturned(first: Any, last: Any) -> bool:
    """Whether images with channels first and last are not equal, but would be if they were flattened."""
    if not first.ndim == last.ndim > 2 or first.size != last.size or len(first) != len(last):
        return False
    turned = np.moveaxis(first, 1, -1)
    if turned.shape != last.shape or np.allclose(turned, last, rtol=1e-6, atol=1e-9):
        return False
    return bool(np.allclose(first.reshape(len(first), -1), last.reshape(len(last), -1), rtol=1e-6, atol=1e-9))


def _channels(first: Any, last: Any) -> int:
    """How many channels were flattened, if features with channels first are those with channels last; else 0."""
    rows, features = first.shape
    if np.allclose(first, last, rtol=1e-6, atol=1e-9):
        return 0
    for channels in range(2, features):
        if not features % channels:
            turned = first.reshape(rows, channels, -1).swapaxes(1, 2).reshape(rows, features)
            if np.allclose(turned, last, rtol=1e-6, atol=1e-9):
                return channels
    return 0


def _text(model: Model, path: Path) -> str:
    return str(model.leaves.index.separator).join(path)


M = TypeVar("M")
_VARIANCE = re.compile(r"(.*[/._])?(running_)?(var|variance|var_ema[/.].*)")


def perturbed(model: M, seed: int = 0) -> M:
    """A copy of a model, or of a tree of arrays, with random parameters near its own.

    What is positive throughout stays so, and so do variances. Values have half of the digits of their dtype, so that
    sums of two (the biases of a recurrent layer) are exact. Integers and tables that are not saved stay as they are.

    >>> model = {"scale": np.ones(3), "bias": np.zeros(3), "steps": np.array(7)}
    >>> new = perturbed(model)
    >>> bool((new["scale"] > 0).all() and (new["scale"] != 1).all() and (new["bias"] != 0).all()), int(new["steps"])
    (True, 7)
    """
    if find_kind(model) is None and not runs(model):
        what = wording.described(model)
        raise BadArgument(f"{what} holds no parameters", hint="module.bind(variables) for linen; or give the tree")
    anything: Any = model
    saved = anything.state_dict() if is_torch_module(model) else None
    random = np.random.default_rng(seed)

    def change(path: str, values: Values) -> Values | None:
        if saved is not None and path not in saved:
            return None
        old, noise = wide(values), random.normal(size=values.shape)
        if old.dtype.kind == "f" and (old > 0).all():
            new = old * np.exp(0.3 * noise)
        else:
            new = old + noise * max(0.1, 0.3 * largest(old))
        new = np.abs(new) + 0.1 if _VARIANCE.fullmatch(path) else new
        unit = 2.0 ** (math.frexp(largest(new))[1] - ml_dtypes.finfo(values.dtype).nmant // 2)
        rounded: Values = (np.round(new / unit) * unit + unit / 2).astype(values.dtype)
        return rounded

    return copied(model, change)
