"""Grading: a solution compared with the reference on random inputs, and with every known mistake."""

import textwrap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from paramend.errors import BadArgument
from paramend.lessons.lesson import Case, Lesson, Mistake, Solve, find
from paramend.lessons.observation import Observation, differences, sketch
from paramend.reports.fields import fields_of, picked
from paramend.reports.wording import plural


@dataclass(frozen=True)
class Failure:
    """One input on which the solution did not do what the reference does."""

    number: int  # from 1
    inputs: dict[str, str]  # name of argument → its value as text
    note: str  # what is unusual about this input, or an empty string
    got: tuple[str, ...]  # what the solution returned or did, line by line
    want: tuple[str, ...]  # what the reference did


@dataclass(frozen=True)
class Likeness:
    """A known mistake that the solution behaves like."""

    _data: ClassVar = ("mistake.name", "mistake.why", "on", "everywhere")

    mistake: Mistake
    on: tuple[int, ...]  # the inputs on which it does, from 1
    everywhere: bool  # whether it does on all inputs, not only on some of those that failed


@dataclass(frozen=True)
class Grade:
    """The verdict on a solution."""

    lesson: str
    passed: bool  # whether it did what the reference does on every input
    trials: int  # how many times inputs were drawn; a trial may hold several inputs
    inputs: int  # how many inputs were tried in all
    failures: tuple[Failure, ...] = ()  # the inputs on which it did not
    likeness: tuple[Likeness, ...] = ()  # the known mistakes it behaves like, likeliest first
    unseen: str = ""  # what the grader cannot see in this lesson, or an empty string

    def to_dict(self) -> dict[str, Any]:
        return picked(self, *fields_of(self))

    def __str__(self) -> str:
        inputs = plural(self.inputs, "input")
        if self.passed:
            return f"{self.lesson}: passed on {inputs}" + (f"\n\n{self.unseen}" if self.unseen else "")
        blocks = [f"{self.lesson}: not yet, wrong on {len(self.failures)} of {inputs}"]
        one_of_each = {failure.note: failure for failure in reversed(self.failures)}  # the first of its kind
        shown = sorted(one_of_each.values(), key=lambda failure: failure.number)
        blocks += [_block(failure) for failure in shown]
        if len(self.failures) > len(shown):
            blocks.append(f"and {plural(len(self.failures) - len(shown), 'more input')} of these kinds")
        if not self.likeness:
            blocks.append("It does not behave like any known mistake.")
        for like in self.likeness:
            inputs = f"{'input' if len(like.on) == 1 else 'inputs'} {', '.join(map(str, like.on))}"
            where = "" if like.everywhere else f" on {inputs}"
            why = textwrap.fill(like.mistake.why, 96, initial_indent="  ", subsequent_indent="  ")
            blocks.append(f"It behaves{where} like a known mistake: {like.mistake.name}.\n{why}")
        return "\n\n".join(blocks)


def grade(lesson: Lesson | str, solve: Solve, *, trials: int = 5, seed: int = 0) -> Grade:
    """The verdict on a solution: right on random inputs, or the known mistakes it behaves like.

    Args:
        lesson: a lesson, or its name.
        solve: a function with the positional arguments of the lesson's reference.
        trials: how many times inputs are drawn.
        seed: the same seed draws the same inputs.

    Example:
        >>> def solve(seed, x, features, replacement_value):
        ...     return [[replacement_value * sum(row)] * int(features) for row in x]
        >>> print(grade("kernel_replace", solve, trials=1).likeness[0].mistake.name)
        the bias dropped or zeroed as well
    """
    if isinstance(lesson, str):
        lesson = find(lesson)
    if trials < 1:
        raise BadArgument(f"trials is {trials}; at least one is needed")
    cases = draw(lesson, trials=trials, seed=seed)
    tried = [_Tried(case, lesson.observe(solve, case), lesson.observe(lesson.reference, case)) for case in cases]
    failures = tuple(
        Failure(number, summary(lesson, one.case), one.case.note, *(tuple(side) for side in zip(*pairs, strict=True)))
        for number, one in enumerate(tried, start=1)
        if (pairs := differences(one.got, one.want))
    )
    likeness = _likeness(lesson, tried, [f.number - 1 for f in failures]) if failures else ()
    return Grade(lesson.name, not failures, trials, len(cases), failures, likeness, lesson.unseen)


def draw(lesson: Lesson, *, trials: int, seed: int) -> list[Case]:
    """The inputs that a seed draws for a lesson."""
    salt = zlib.crc32(lesson.name.encode())
    return [case for trial in range(trials) for case in lesson.cases(np.random.default_rng([seed, trial, salt]))]


def summary(lesson: Lesson, case: Case) -> dict[str, str]:
    """Name of each argument of a case → its value in one line."""
    return {
        name: str(value) if isinstance(value, float) else sketch(value)
        for name, value in zip(lesson.parameters, case.args, strict=True)
    }


class _Tried(NamedTuple):
    """A case, and what the solution and the reference did."""

    case: Case
    got: Observation
    want: Observation


def _likeness(lesson: Lesson, tried: Sequence[_Tried], failed: Sequence[int]) -> tuple[Likeness, ...]:
    """The mistakes it behaves like on all inputs; if there are none, the few that explain most failures."""
    order = [*failed, *(i for i in range(len(tried)) if i not in failed)]
    everywhere: list[tuple[Mistake, bool]] = []
    for mistake in lesson.mistakes:
        exact: list[bool] = []
        for form in mistake.forms:
            seen: dict[int, Observation] = {}
            for i in order:  # most forms are ruled out by one call, on the first input that failed
                seen[i] = lesson.observe(form, tried[i].case)
                if not _alike(tried[i], seen[i]):
                    break
            else:
                exact.append(not any(differences(tried[i].got, observation) for i, observation in seen.items()))
        if exact:
            everywhere.append((mistake, any(exact)))
    if everywhere:
        # Two mistakes may reach one result in two ways; if the way was seen, it decides.
        decided = any(exact for _, exact in everywhere)
        numbers = tuple(range(1, len(tried) + 1))
        return tuple(Likeness(m, numbers, everywhere=True) for m, exact in everywhere if exact or not decided)
    return _cover(lesson, tried, failed)


def _cover(lesson: Lesson, tried: Sequence[_Tried], failed: Sequence[int]) -> tuple[Likeness, ...]:
    """The fewest mistakes that explain the failed inputs, the one that explains most first."""
    explains = [
        (mistake, {i for i in failed if _alike(tried[i], lesson.observe(form, tried[i].case))})
        for mistake in lesson.mistakes
        for form in mistake.forms
    ]
    left, found = set(failed), dict[str, tuple[Mistake, set[int]]]()
    while left:
        mistake, inputs = max(explains, key=lambda row: len(row[1] & left))
        if not inputs & left:
            break
        found.setdefault(mistake.name, (mistake, set()))[1].update(inputs & left)
        left -= inputs
    return tuple(
        Likeness(mistake, tuple(i + 1 for i in sorted(inputs)), everywhere=False) for mistake, inputs in found.values()
    )


def _alike(tried: _Tried, mistaken: Observation) -> bool:
    """Whether the solution did what the mistake does. A wrong result is compared alone. Only if the result is right do
    other facts distinguish mistakes."""
    bare = [Observation(one.result, one.raised) for one in (tried.got, tried.want, mistaken)]
    return not (differences(bare[0], bare[2]) if differences(bare[0], bare[1]) else differences(tried.got, mistaken))


def _block(failure: Failure) -> str:
    note = f"  ({failure.note})" if failure.note else ""
    lines = [f"input {failure.number}{note}", *(f"  {name} = {text}" for name, text in failure.inputs.items())]
    for got, want in zip(failure.got, failure.want, strict=True):
        lines += [f"  got   {got}", f"  want  {want}"]
    return "\n".join(lines)
