"""Runs of recipes: step after step on a tree, with all problems collected."""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from paramend.checkpoints.config import config
from paramend.edits.arguments import read_index
from paramend.edits.call import Call, sliced_shape
from paramend.edits.checks import fitted
from paramend.edits.memory import editable
from paramend.edits.ops import OPS
from paramend.edits.weights import Weights, chosen, weighed
from paramend.errors import NoMatch, ParamendError, Problem
from paramend.leaves.leaves import Editable, unique
from paramend.leaves.specs import Spec
from paramend.recipes.donors import Donors
from paramend.recipes.keys import CONDITIONS
from paramend.recipes.steps import Enough, Problems, RecipeStep, problem_of
from paramend.recipes.text import below, write_scalar
from paramend.reports import wording
from paramend.selectors.misses import searching
from paramend.selectors.selector import Selector, Union, Where, sel

_SECONDS = 5.0  # what the search for near misses of all steps may take

# Addresses of problems that may follow from an earlier step that failed: one that changes paths, or specs.
_FOLLOWS_PATHS = re.compile(r"\.((at|except)(\[\d+\])?|where|to|count|from|leaf)$")
_FOLLOWS_SPECS = re.compile(rf"\.(at|where|from|{'|'.join({name for op in OPS.values() for name in op.parameters})})$")


def run(steps: Sequence[RecipeStep], tree: Any, donors: Donors, *, raw: bool) -> tuple[Any, list[Problem]]:
    """The edited tree and all problems; if there are any, the tree has only the steps that could be done."""
    problems = Problems()
    broken: list[_Attempt] = []
    with suppress(Enough), searching(_SECONDS):
        for step in steps:
            at = _Attempt(step, weighed(editable(tree, raw=raw)), donors, f"$.steps[{step.number}]")
            found = None
            with suppress(Enough):
                found = at.carry_out()
            if not at.problems:
                tree = tree if found is None else found
            for problem in at.problems:
                problems.append(_following(problem, broken))
            if at.problems and step.verb.changes:
                broken.append(at)
    return tree, problems


def check_in_place(
    steps: Sequence[RecipeStep], module: Any, donors: Donors, *, raw: bool
) -> tuple[list[Callable[[], None]], list[Problem]]:
    """The functions that carry out the steps in place, in order, and all problems."""
    problems = Problems()
    work: list[Callable[[], None]] = []
    leaves: Any = weighed(editable(module, raw=raw))
    with suppress(Enough), searching(_SECONDS):
        for step in steps:
            at = _Attempt(step, leaves, donors, f"$.steps[{step.number}]")
            if step.verb.changes or step.verb.make is not None:
                what = "shape and dtype stay" if step.verb.op else "the structure stays"
                hint = "recipe.apply(tree) gives a new tree"
                at.problems.add(at.address, f"{step.verb.name}: in place {what}", hint, "unsupported")
            if step.verb.name == "config":
                at.problems.tried(at.address, config, at.stored)
            calls: dict[int, Call] = {}
            with suppress(Enough):
                calls = at.calls()
            if calls and not at.problems:
                at.problems.tried(f"{at.address}.at", leaves.check_, calls)
                # All steps have the same leaves: only values change.
                work.append(partial(lambda calls: weighed(editable(module, raw=raw)).edited_(calls), calls))
            for problem in at.problems:
                problems.append(problem)
    return work, problems


def _following(problem: Problem, broken: Sequence["_Attempt"]) -> Problem:
    """The problem, with the last broken step that it may follow from added to its message."""
    for other in reversed(broken):
        follows = _FOLLOWS_SPECS if other.step.verb.op else _FOLLOWS_PATHS
        if follows.search(problem.address) and problem.code not in ("cannot-read", "bad-checkpoint"):
            return problem._replace(message=f"{problem.message} (this may follow from {other.address})")
    return problem


@dataclass(slots=True)
class _Attempt:
    """One step on a tree, and what is wrong with it."""

    step: RecipeStep
    leaves: Editable
    donors: Donors
    address: str
    problems: Problems = field(default_factory=Problems)

    @property
    def stored(self) -> Any:
        """The leaves as they are stored, for what knows quantised weights itself."""
        return self.leaves.stored if isinstance(self.leaves, Weights) else self.leaves

    def carry_out(self) -> Any:
        """The tree after the step; None if nothing changes or something is wrong."""
        if self.step.verb.op is not None:
            calls = self.calls()
            return self.problems.tried(f"{self.address}.at", self.leaves.edited, calls) if calls else None
        if self.step.verb.name == "config":
            return self._configured()
        make, given = self.step.verb.make, self.step.given
        if make is not None:
            if self.step.verb.selects:
                self._chosen()
            about = self.address
            if "at" in given:
                about += f".{'into' if 'into' in given else 'at'}"
            return None if self.problems else self.problems.tried(about, make, self.stored, given, self.donors)
        numbers = [number for number, _ in self._chosen()]
        if self.problems or self.step.verb.name == "expect":
            return None
        if self.step.verb.name == "delete":
            return self.problems.tried(f"{self.address}.at", self.leaves.deleted, numbers)
        # The wildcards of the new path refer to the selectors that matched the leaves.
        by = Union(tuple(self.step.selectors()))
        return self.problems.tried(f"{self.address}.to", self.leaves.moved, by, numbers, self.step.given["to"])

    def _configured(self) -> Any:
        tree = self.stored
        if self.problems.tried(self.address, config, tree) is None:
            return None
        given = self.step.given
        edits: list[tuple[str, dict[str, Any], list[str]]] = [
            *((below(f"{self.address}.set", key), {key: value}, []) for key, value in given.get("set", {}).items()),
            *((below(f"{self.address}.delete", n), {}, [key]) for n, key in enumerate(given.get("delete", []))),
        ]
        for address, values, gone in edits:
            tree = self.problems.tried(address, config(tree).edited, values, gone) or tree
        return tree

    def calls(self) -> dict[int, Call]:
        """The call of the step's op on each selected leaf, checked against its spec; none if something is wrong."""
        op, given = self.step.verb.op, self.step.given
        picked = self._chosen() if self.step.verb.selects else []
        if op is None or self.problems:
            return {}
        index = read_index(given["index"]) if "index" in given and "index" not in op.parameters else None
        specs = {number: self.leaves.spec(number) for number, _ in picked}
        if index is not None:
            inner = self._each("index", specs, lambda n: Spec(sliced_shape(specs[n].shape, index), specs[n].dtype))
        else:
            inner = specs
        args = {name: given[name] for name in op.parameters if name in given}
        array = op.array or "value"
        values = dict.fromkeys(specs, args.get(array))
        if "from" in given:
            values = self._donated(picked)
        elif array == "value" and isinstance(args.get("value"), list):  # numbers of the dtype of the leaf
            values = self._each("value", inner, lambda number: _literal(args["value"], inner[number]))
        if self.problems:
            return {}
        calls = {n: Call(op, args if value is None else {**args, array: value}, index) for n, value in values.items()}
        about = next((key for key in ("from", *op.parameters) if key in given), "at")
        self._each(about, specs, lambda number: calls[number].spec(specs[number]))
        return {} if self.problems else calls

    def _chosen(self) -> list[tuple[int, Selector]]:
        """The selected leaves, each with the selector that matched it, in tree order."""
        found: dict[int, Selector] = {}
        for part, text in self.step.addressed("at"):
            selector = sel(text)
            where = self.step.given.get("where")
            for key, narrowed in ((part, selector), ("where", selector.where(**where) if where else selector)):
                numbers = self._resolved(key, narrowed)
                if not numbers:
                    break
            found |= {number: found.get(number, selector) for number in numbers}
        found = self._spared(found)
        order = unique(self.leaves, self.leaves.index.ordered(found))
        if self.step.verb.name == "expect" and not self.problems:
            self._expect(order)
        return [(number, found[number]) for number in order]

    def _resolved(self, key: str, selector: Selector) -> tuple[int, ...]:
        """The leaves of a selector; none, and a problem with this key, if it matches nothing."""
        try:
            return tuple(chosen(selector, self.leaves))
        except ParamendError as error:
            problem = problem_of(error, f"{self.address}.{key}")
            if self.step.verb.name == "expect" and isinstance(error, NoMatch):
                problem = problem._replace(code="expect")
            if not (self.step.given.get("count") == 0 and problem.code == "expect"):
                self.problems.append(problem)
            return ()

    def _spared(self, found: dict[int, Selector]) -> dict[int, Selector]:
        """The found leaves without those that `except` names, under any of their paths."""
        ties, spared = self.leaves.ties, set[int]()
        for key, text in self.step.addressed("except"):
            spared |= {ties.get(number, number) for number in self._resolved(key, sel(text))}
        left = {number: by for number, by in found.items() if ties.get(number, number) not in spared}
        if found and not left and self.step.given.get("count") != 0:
            code = "expect" if self.step.verb.name == "expect" else "no-match"
            self.problems.add(f"{self.address}.except", "it leaves nothing of what `at` selects", code=code)
        return left

    def _expect(self, numbers: Sequence[int]) -> None:
        given = self.step.given
        paths = [self.leaves.index.path(number) for number in numbers]
        count = given.get("count", len(numbers))
        if len(numbers) != count:
            are = f"{wording.plural(len(numbers), 'leaf is', 'leaves are')} selected: {wording.listing(paths, 4)}"
            self.problems.add(
                f"{self.address}.count", f"{count} expected, and {are}", f"count: {len(numbers)}", "expect"
            )
        for key in CONDITIONS:
            if key.name not in given:
                continue
            want = given[key.name]
            wanted = sel("**").where(**{key.name: want})
            assert isinstance(wanted, Where)
            bad = [number for number in numbers if not wanted.fits(self.leaves.spec(number))]
            if bad:
                is_not = f"{self.leaves.index.path(bad[0])} is {self.leaves.spec(bad[0])}"
                message = f"{want} expected, and {is_not}{_more(len(bad) - 1)}"
                self.problems.add(f"{self.address}.{key.name}", message, code="expect")

    def _donated(self, chosen: Sequence[tuple[int, Selector]]) -> dict[int, Any]:
        name, leaf = self.step.given["from"], self.step.given.get("leaf")
        try:
            return {**self.donors.values(name, leaf, self.leaves, chosen)}
        except ParamendError as error:
            about = "leaf" if leaf is not None and isinstance(error, LookupError | ValueError) else "from"
            self.problems.append(problem_of(error, f"{self.address}.{about}"))
            return {}

    def _each(self, key: str, specs: dict[int, Spec], check: Callable[[int], Any]) -> dict[int, Any]:
        """Leaf number → the result of a check. The first leaf that fails is described, the others are counted."""
        found: dict[int, Any] = {}
        refused: list[tuple[int, Problem]] = []
        for number in specs:
            try:
                found[number] = check(number)
            except ParamendError as error:
                refused.append((number, problem_of(error, f"{self.address}.{key}")))
        if refused:
            number, problem = refused[0]
            message = f"{self.leaves.index.path(number)}: {problem.message}{_more(len(refused) - 1)}"
            hint = self._hint(problem.hint, self.leaves.spec(number))
            self.problems.append(problem._replace(message=message, hint=hint))
        return found

    def _hint(self, hint: str, spec: Spec) -> str:
        where = re.search(r"\.where\((.*?)\)", hint)
        if where:
            return f"where: {{{where[1].replace('=', ': ').replace(chr(34), '')}}}"
        if self.step.verb.name == "set" and ".cast(" in hint:
            dtype = hint.rpartition('.cast("')[2].removesuffix('")')
            chosen = {key: self.step.given[key] for key in ("at", "except", "where") if key in self.step.given}
            cast = f"cast: {{{write_scalar(chosen)[1:-1]}, dtype: {dtype}}}"
            return f"{cast} in a step before it, and back to {spec.dtype} in one after it"
        return "" if "pm." in hint or hint.startswith(".") else hint


def _literal(value: Any, spec: Spec) -> Any:
    return fitted(value, spec) if spec.kind != "other" else np.asarray(value)


def _more(count: int) -> str:
    return f", and {wording.plural(count, 'more leaf', 'more leaves')} alike" if count else ""
