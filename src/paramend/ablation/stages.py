"""Stages: how a tree is scored with some leaves edited, and left as it was."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paramend.arrays.registry import backend, backend_of, to_numpy
from paramend.edits.call import Call
from paramend.edits.memory import Memory
from paramend.edits.weights import Weights
from paramend.errors import BadArgument, Unsupported
from paramend.leaves.leaves import Editable

Score = Callable[[Any], Any]
Calls = Mapping[int, Call]


def number_of(result: Any) -> float:
    """A score as a float; `BadArgument` if the score function returned something else.

    >>> number_of(np.float32(0.5))
    0.5
    """
    try:
        array = np.asarray(to_numpy(result) if backend_of(type(result)) is not None else result)
        if array.size == 1 and array.dtype.kind in "biufV":
            return float(array.reshape(()))
    except (TypeError, ValueError):
        pass
    raise BadArgument(
        f"the score returned {type(result).__name__} {getattr(result, 'shape', result)!r}, not one number",
        hint="return its mean",
    )


class Functional:
    """A tree whose edits make new trees that share the leaves that stay."""

    traces: int | None = None

    def __init__(self, tree: Editable, score: Score) -> None:
        self._tree, self._score = tree, score

    def run(self, edits: Sequence[Calls]) -> list[float]:
        """The score under each of some edits; with no calls, that of the tree itself."""
        stored = self._tree.stored if isinstance(self._tree, Weights) else self._tree
        root = getattr(stored, "root", stored)
        return [number_of(self._score(self._tree.edited(calls) if calls else root)) for calls in edits]


class Compiled:
    """A tree of JAX arrays, with a score that is traced once for the whole sweep; `batch` edits are scored at once, by
    `vmap`, or one after the other if it is 0."""

    def __init__(self, tree: Memory, score: Score, batch: int = 0) -> None:
        self._tree, self._batch = tree, batch
        self._numbers = [n for n in tree.index.numbers if tree.ties.get(n, n) == n]
        import jax

        self._jax: Any = jax
        self.traces = 0

        def scored(values: Sequence[Any]) -> Any:
            self.traces += 1
            return score(tree.with_leaves(dict(zip(self._numbers, values, strict=True))))

        def switched(values: Sequence[Any], others: Mapping[int, Any], flags: Mapping[int, Any]) -> Any:
            where = self._jax.numpy.where
            chosen = {n: where(flags[n], other, values[n]) for n, other in others.items()}
            return scored([chosen.get(place, value) for place, value in enumerate(values)])

        self._one = self._jax.jit(scored)
        self._many = self._jax.jit(self._jax.vmap(switched, in_axes=(None, None, 0)))

    def run(self, edits: Sequence[Calls]) -> list[float]:
        """The score under each of some edits, in one compilation; `BadArgument` if JAX cannot trace it."""
        errors = (self._jax.errors.JAXTypeError, self._jax.errors.JAXIndexError)
        try:
            if self._batch:
                return self._batched(edits)
            return [number_of(self._one(self._leaves(calls))) for calls in edits]
        except errors as error:
            raise BadArgument(
                f"JAX cannot trace the score: {str(error).partition(chr(10))[0]}", hint="pm.ablate(..., jit=False)"
            ) from error

    def _leaves(self, calls: Calls) -> list[Any]:
        new = dict(self._tree.computed(calls))
        return [new.get(number, self._tree.values[number]) for number in self._numbers]

    def _batched(self, edits: Sequence[Calls]) -> list[float]:
        places = {number: place for place, number in enumerate(self._numbers)}
        every = {number: call for calls in edits for number, call in calls.items()}
        others = {places[number]: value for number, value in self._tree.computed(every)}
        values = [self._tree.values[number] for number in self._numbers]
        found: list[float] = []
        for start in range(0, len(edits), self._batch):
            part = list(edits[start : start + self._batch])
            full = part + [{}] * (self._batch - len(part))  # batches of one size need one compilation
            flags = {places[n]: np.array([n in calls for calls in full]) for n in every}
            found += map(number_of, self._many(values, others, flags)[: len(part)])
        return found


class InPlace:
    """A module whose leaves are edited in place and restored bit for bit, even after an exception."""

    traces: int | None = None

    def __init__(self, tree: Memory, score: Score) -> None:
        self._tree, self._score = tree, score

    def run(self, edits: Sequence[Calls]) -> list[float]:
        """The score under each of some edits; `Unsupported` if the score itself changes the module."""
        return [self._scored(calls) for calls in edits]

    def _scored(self, calls: Calls) -> float:
        tree = self._tree
        old = {number: backend(tree.values[number]).like(tree.values[number], tree.values[number]) for number in calls}
        try:
            tree.edited_(calls)
            before = self._versions()
            found = number_of(self._score(tree.root))
            moved = [number for number, version in self._versions().items() if version != before[number]]
        finally:
            for number, value in old.items():
                tree.assign(number, value)
        if moved:
            raise Unsupported(
                f"the score changes {tree.index.path(moved[0])}, so no two scores would be of the same module",
                hint="model.eval() first",
            )
        return found

    def _versions(self) -> dict[int, Any]:
        """How often each leaf was written, where torch counts it."""
        found = {}
        for number in self._tree.index.numbers:
            try:
                found[number] = getattr(self._tree.values[number], "_version", 0)
            except RuntimeError:  # inference tensors have no version counter
                found[number] = 0
        return found
