"""Ablation: what a model scores without each of its parts."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, TypeAlias, TypeVar

from paramend.ablation.methods import How, calls, floating
from paramend.ablation.report import AblationReport, AblationRow
from paramend.ablation.stages import Calls, Compiled, Functional, InPlace
from paramend.arrays.registry import backend
from paramend.edits.memory import Memory, editable
from paramend.edits.quantized import check_values
from paramend.edits.weights import Weights, is_coded, weighed
from paramend.errors import BadArgument
from paramend.leaves.leaves import Editable, unique
from paramend.leaves.rules import Codec
from paramend.leaves.specs import Scalar
from paramend.reports import wording
from paramend.selectors.grammar import captures_of
from paramend.selectors.layers import notation, spelled, starred, whole, without_rest
from paramend.selectors.selector import SelectorLike, resolve
from paramend.trees.lookup import is_torch_module

T = TypeVar("T")
Targets: TypeAlias = str | Mapping[str, SelectorLike] | Sequence[SelectorLike]

_RAW = "pm.ablate(..., raw=True) takes leaves as they are stored"


def ablate(
    tree: T,
    targets: Targets,
    score: Callable[[T], Scalar],
    *,
    how: How = "zero",
    pairs: bool = False,
    seed: int = 0,
    jit: bool | None = None,
    batch: int = 0,
    raw: bool = False,
    codec: Codec | None = None,
) -> AblationReport:
    """The report of the model's score without each target in turn.

    The tree is never copied as a whole, and afterwards it is bit for bit what it was: a torch module is edited in place
    and restored, even if the score raises; for other trees each edit makes a new tree that shares the leaves that stay.

    Args:
        tree: any tree that `pm.at` takes, or an opened checkpoint.
        targets: what to take out: a selector, a list of them, or name → selector. A text with `<n>`, such as
            "layers/<n>/attn/**", is one target for each n, under any name; so is one that indexes layers, such as
            "layers[*]" or "Dense_[:-1]/**", unless you name it. Only matched leaves of floating dtype are ablated; step
            counts and random states stay.
        score: a function from the tree (for modules, the module) to one number.
        how: "zero", "mean" (each leaf its own mean), "noise" (of the leaf's own mean and standard deviation),
            "permuted", "identity" (each target is one layer of a family that `pm.deepen` knows, and passes its input
            through), or a function from leaf to leaf of the same spec.
        pairs: whether each pair is taken out as well.
        seed: the seed of "noise" and "permuted".
        jit: whether JAX traces the score, once for the whole sweep. None: only if the leaves are JAX arrays.
        batch: how many targets `vmap` maps a traced score over at once; 0 for one after the other.
        raw: whether leaves are taken as they are stored. Without it, targets with quantised weights are refused.
        codec: a `pm.Codec`, by which leaves that stand beside each other are one weight.

    Returns:
        The report: `baseline`, a row for each target with `score` and `delta`, `ranking`, `plot()`.

    Raises:
        NoMatch: a target matches nothing; nothing was scored.
        BadArgument: a target holds no floating leaf, or a star in it matches the numbers of several layers; the score
            does not return one number, or JAX cannot trace it.
        Quantized: a target holds a leaf of a quantised weight.
        Unsupported: the score changes the module, as batch norms in training mode do.

    >>> import numpy as np
    >>> params = {"layers": [np.array([1.0, 2.0]), np.array([10.0])]}
    >>> table = ablate(params, "layers[*]", lambda p: sum(x.sum() for x in p["layers"]))
    >>> print(table)
    2 ablations (zero), baseline 13; most without layers/1: -10
    <BLANKLINE>
    target    score  delta  leaves  parameters
    layers/1      3    -10       1           1
    layers/0     10     -3       1           2
    """
    leaves = weighed(editable(tree, raw=raw), rule=codec)
    chosen = {name: _chosen(leaves, name, selector) for name, selector in named(leaves, targets).items()}
    stage = _stage(leaves, score, jit, batch)
    groups = [(name,) for name in chosen] + (list(combinations(chosen, 2)) if pairs else [])
    edits: dict[str, Calls] = {name: calls(leaves, numbers, how, seed) for name, numbers in chosen.items()}
    stored = leaves.stored if isinstance(leaves, Weights) else leaves
    for name, edited in edits.items():
        plain = [number for number in edited if not is_coded(leaves, number)]
        check_values(stored, plain, f"cannot be ablated as {name!r}", _RAW)
    found = stage.run([{}, *({n: c for name in group for n, c in edits[name].items()} for group in groups)])
    baseline, alone = found[0], dict(zip(chosen, found[1:], strict=False))
    rows = []
    for group, scored in zip(groups, found[1:], strict=True):
        numbers = {number for name in group for number in edits[name]}
        delta = scored - baseline
        rows.append(
            AblationRow(
                " + ".join(group),
                group,
                scored,
                delta,
                len(numbers),
                sum(leaves.spec(number).size for number in numbers),
                None if len(group) == 1 else delta - sum(alone[name] - baseline for name in group),
            )
        )
    said = how if isinstance(how, str) else getattr(how, "__name__", "a function")
    return AblationReport(said, baseline, rows, stage.traces)


def _stage(leaves: Editable, score: Callable[[Any], Any], jit: bool | None, batch: int) -> Any:
    in_jax = isinstance(leaves, Memory) and any(
        getattr(backend(leaves.values[number]), "__name__", "").endswith(".jax") for number in leaves.index.numbers[:1]
    )
    if batch < 0 or (batch and (not in_jax or jit is False)):
        raise BadArgument(
            f"batch={batch}: targets are scored in batches only if the leaves are JAX arrays and the score is traced",
            hint="batch=0",
        )
    if jit and not in_jax:
        raise BadArgument("jit=True: the leaves of this tree are not JAX arrays", hint="jit=None")
    if in_jax and jit is not False:
        assert isinstance(leaves, Memory)
        return Compiled(leaves, score, batch)
    if isinstance(leaves, Memory) and is_torch_module(leaves.root):
        return InPlace(leaves, score)
    return Functional(leaves, score)


def named(leaves: Editable, targets: Targets) -> dict[str, Any]:
    """Name → selector; a text that is one target for each number is expanded."""
    if isinstance(targets, Mapping):
        given = dict(targets)
    elif isinstance(targets, Sequence) and not isinstance(targets, str):
        given = {str(target): target for target in targets}
    else:
        given = {str(targets): targets}
    if not given:
        raise BadArgument("there are no targets", hint='targets={"block 0": "block_0/**"}')
    found: dict[str, Any] = {}
    for name, selector in given.items():
        found |= _each(leaves, name, selector) if isinstance(selector, str) else {name: selector}
    return found


def _each(leaves: Editable, name: str, text: str) -> dict[str, str]:
    """The targets that a text expands to."""
    index, bare = leaves.index, name == text
    if captures_of(text):
        found = spelled(index, whole(index, text))
        labels = {selector: selector if bare else f"{name} {' '.join(n)}" for selector, n in found.items()}
        return {label: selector for selector, label in labels.items()} or {name: text}  # resolving it raises
    said = notation(text)
    if bare and said is not None:
        below = text[len(without_rest(text)) :]
        layers = [(one, position) for one in said.find(index.names) for position in said.pick(one)]
        if len(layers) > 1:
            paths = (one.path(one.numbers[position], index.separator) + below for one, position in layers)
            return {path: path for path in map(partial(whole, index), paths)}
    numbered = starred(index, text) if bare else None
    if numbered is not None:
        raise BadArgument(
            f"{text!r} takes out {wording.plural(len(spelled(index, numbered)), 'layer')} at once",
            hint=f'pm.ablate(tree, "{numbered}", score) for each by itself, or '
            f'pm.ablate(tree, {{"all": "{whole(index, text)}"}}, score)',
        )
    return {name: whole(index, text) if said is not None else text}


def _chosen(leaves: Editable, name: str, selector: Any) -> tuple[int, ...]:
    numbers = unique(leaves, [leaves.ties.get(number, number) for number in resolve(selector, leaves)])
    found = floating(leaves, numbers)
    if not found:
        paths = wording.listing([leaves.index.path(number) for number in numbers])
        raise BadArgument(f"target {name!r} holds no leaf of floating dtype: {paths}")
    return found
