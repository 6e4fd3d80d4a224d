"""Matching: which leaves of several models are one, and what hinders that they are merged."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from paramend.anatomy.beside import EMBEDDINGS, HEADS
from paramend.disk.urls import path_of
from paramend.edits.memory import Memory
from paramend.edits.quantized import check_values
from paramend.errors import SpecMismatch
from paramend.leaves.leaves import Editable
from paramend.leaves.origins.boxes import bare
from paramend.leaves.specs import Spec
from paramend.reports import wording

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
