"""Ablation: what a model scores without each of its parts."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from typing import Any

from paramend.ablation.methods import How, calls, floating
from paramend.ablation.report import AblationReport, AblationRow
from paramend.ablation.stages import Calls, Compiled, Functional, InPlace
from paramend.arrays.registry import backend
from paramend.edits.memory import Memory
from paramend.errors import BadArgument, NoMatch
from paramend.leaves.leaves import Editable, unique
from paramend.reports import wording
from paramend.selectors.grammar import around_captures
from paramend.selectors.selector import resolve
from paramend.trees.lookup import is_torch_module

Targets = str | Mapping[str, Any] | Sequence[Any]


def ablate(
    tree: Any,
    targets: Targets,
    score: Callable[[Any], Any],
    *,
    how: How = "zero",
    order: int = 1,
    seed: int = 0,
    jit: bool | None = None,
    batch: int = 0,
) -> AblationReport:
    """The report of what a model scores without each target in turn.

    The tree is never copied as a whole, and it is bit for bit as before afterwards: a torch module is edited in place
    and put back, also when the score raises; of other trees each edit is a new tree that shares what stays.

    Args:
        tree: any tree that `pm.at` takes, also an opened checkpoint.
        targets: what to do without: name → selector, a list of selectors, or one text with `<n>`, such as
            "layers/<n>/**", which stands for a target for each n. Of what a selector finds, leaves of floating dtype
            are taken; steps and random states stay.
        score: a function of the tree, of the module for modules, that gives one number.
        how: "zero", "mean" (each leaf its own mean), "noise" (of the leaf's own mean and standard deviation),
            "permuted", "identity" (each target is one layer of a family that `pm.deepen` knows, and passes its input
            on), or a function from leaf to leaf of the same spec.
        order: 2 to take out each pair as well.
        seed: of "noise" and "permuted".
        jit: whether the score is traced by JAX, once for the whole sweep. None: if the leaves are JAX arrays.
        batch: how many targets a traced score is mapped over at once by `vmap`; 0 for one after the other.

    Returns:
        The report: `baseline`, a row for each target with `score` and `delta`, `ranking`, `plot()`.

    Raises:
        NoMatch: a target selects nothing; nothing was scored.
        BadArgument: a target holds no floating leaf, the score gives no number, or JAX cannot trace it.
        Unsupported: the score changes the module, as batch norms in training mode do.

    >>> import numpy as np
    >>> params = {"layers": [np.array([1.0, 2.0]), np.array([10.0])]}
    >>> table = ablate(params, "layers/<n>", lambda p: sum(x.sum() for x in p["layers"]))
    >>> print(table)
    2 ablations (zero), baseline 13; most without layers/1: -10
    <BLANKLINE>
    target    score  delta  leaves  parameters
    layers/1      3    -10       1           1
    layers/0     10     -3       1           2
    """
    if order not in (1, 2):
        raise BadArgument(f"order={order!r}: targets are taken out one by one (1), or in pairs as well (2)")
    leaves = tree if isinstance(tree, Editable) else Memory(tree)
    chosen = {name: _chosen(leaves, name, selector) for name, selector in _named(leaves, targets).items()}
    stage = _stage(leaves, score, jit, batch)
    groups = [(name,) for name in chosen] + (list(combinations(chosen, 2)) if order == 2 else [])
    edits: dict[str, Calls] = {name: calls(leaves, numbers, how, seed) for name, numbers in chosen.items()}
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
            f"batch={batch}: targets are scored at once for trees of JAX arrays, when the score is traced",
            hint="batch=0",
        )
    if jit and not in_jax:
        raise BadArgument("jit=True: the leaves of this tree are no JAX arrays", hint="jit=None")
    if in_jax and jit is not False:
        assert isinstance(leaves, Memory)
        return Compiled(leaves, score, batch)
    if isinstance(leaves, Memory) and is_torch_module(leaves.root):
        return InPlace(leaves, score)
    return Functional(leaves, score)


def _named(leaves: Editable, targets: Targets) -> dict[str, Any]:
    """Name → selector."""
    if isinstance(targets, Mapping):
        named = dict(targets)
    elif isinstance(targets, str) and len(around_captures(targets)) > 1:
        named = {name: name for name in _numbered(leaves, targets)}
    elif isinstance(targets, Sequence) and not isinstance(targets, str):
        named = {str(target): target for target in targets}
    else:
        named = {str(targets): targets}
    if not named:
        raise BadArgument("there are no targets", hint='targets={"block 0": "block_0/**"}')
    return named


def _numbered(leaves: Editable, text: str) -> Iterable[str]:
    """A text with a captured number, for each number for which it selects something, ascending."""
    found = resolve(text, leaves)
    numbers = {int(n) for number in found for n in re.findall(r"[0-9]+", leaves.index.path(number))}
    for number in sorted(numbers):
        name = str(number).join(around_captures(text))
        with suppress(NoMatch):
            resolve(name, leaves)
            yield name


def _chosen(leaves: Editable, name: str, selector: Any) -> tuple[int, ...]:
    numbers = unique(leaves, [leaves.ties.get(number, number) for number in resolve(selector, leaves)])
    found = floating(leaves, numbers)
    if not found:
        raise BadArgument(
            f"target {name!r} holds no leaf of floating dtype: {wording.listing(_paths(leaves, numbers))}"
        )
    return found


def _paths(leaves: Editable, numbers: Iterable[int]) -> list[str]:
    return [leaves.index.path(number) for number in numbers]
