"""Lessons: what one is made of, and a row for each, listed without importing any framework.

A lesson is a page of text, a reference, random cases, and known mistakes as code that makes them.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Any

import numpy as np

from paramend._optional import need
from paramend.errors import BadArgument
from paramend.lessons.observation import Observation
from paramend.reports.wording import closest, listing

Solve = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One set of arguments, and what is unusual about the call."""

    args: tuple[Any, ...]  # what `solve` is called with, in order
    note: str = ""  # why this case is tried, or an empty string for an ordinary one
    half: bool = False  # whether `init` returns the model's parameters in bfloat16


@dataclass(frozen=True)
class Mistake:
    """A common mistake: its name, why it is one, and code that makes it."""

    name: str
    why: str
    forms: tuple[Solve, ...]  # solutions with the mistake, one for each way in which it is usually written


def page_of(lesson: str) -> tuple[str, str, str]:
    """The title of a lesson, its text, and the Paramend way."""
    page = resources.files("paramend.lessons").joinpath("texts", f"{lesson}.md").read_text("utf-8")
    title, _, rest = page.removeprefix("# ").partition("\n")
    text, _, way = rest.partition("\n---\n")
    return title, text.strip(), way.strip()


def mistake(name: str, why: str, *forms: Solve) -> Mistake:
    """A mistake of some forms."""
    return Mistake(name, why, forms)


def edited(solution: Callable[..., Any], name: str, why: str, *edits: Callable[..., Any]) -> Mistake:
    """A mistake whose forms are `solution`, which takes an edit before the arguments of `solve`, with each edit."""
    return Mistake(name, why, tuple(partial(solution, edit) for edit in edits))


def two_widths(rng: np.random.Generator, args: Callable[[int], tuple[Any, ...]]) -> list[Case]:
    """An ordinary model and one in bfloat16, of different widths, so that they share no compiled program."""
    odd, even = args(int(rng.choice([3, 5, 7]))), args(int(rng.choice([2, 4, 6])))
    return [Case(odd), Case(even, note="the model's parameters are bfloat16", half=True)]


@dataclass(frozen=True)
class Lesson:
    """One worked problem."""

    name: str  # the name of the reference function, and of the lesson on the command line
    reference: Solve  # the right solution
    cases: Callable[[np.random.Generator], Sequence[Case]]  # makes the random cases of one trial
    observe: Callable[[Solve, Case], Observation]  # calls a solution on a case and returns what it returned and did
    mistakes: tuple[Mistake, ...]  # the known mistakes; `observe` distinguishes each from the reference
    unseen: str = ""  # what `observe` cannot see; shown to learners who pass
    title: str = field(init=False)
    text: str = field(init=False)  # the problem, the idea, the pitfall
    way: str = field(init=False)  # the Paramend way: like `reference`, it is shown only on request

    def __post_init__(self) -> None:
        for name, text in zip(("title", "text", "way"), page_of(self.name), strict=True):
            object.__setattr__(self, name, text)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the arguments of `solve`, in order."""
        return tuple(inspect.signature(self.reference).parameters)


@dataclass(frozen=True)
class LessonRow:
    """Where a lesson is, and what it needs installed."""

    name: str
    module: str
    needs: tuple[str, ...]  # the packages that the lesson imports
    extra: str  # the extra of Paramend that installs them

    @property
    def title(self) -> str:
        """Its title."""
        return page_of(self.name)[0]


ROWS = (
    LessonRow("kernel_replace", "kernel", ("jax", "flax"), "jax"),
    LessonRow("zero_last_layer", "last_layer", ("jax", "flax"), "jax"),
    LessonRow("freeze_first_dense", "frozen_layer", ("jax", "flax"), "jax"),
    LessonRow("partial_init", "warm_start", ("jax", "flax"), "jax"),
    LessonRow("init_zero", "torch_layer", ("torch",), "torch"),
)


def row_of(name: str) -> LessonRow:
    """The row of that name; `kernel-replace` means `kernel_replace`, and `3` the third."""
    rows = {row.name: row for row in ROWS} | {str(number): row for number, row in enumerate(ROWS, 1)}
    word = name.lower().replace("-", "_")
    if word in rows:
        return rows[word]
    names = [row.name for row in ROWS]
    near = closest(word, names, limit=1) or [known for known in names if word and word in known]
    hint = f"did you mean {near[0]}?" if near else f"lessons: {listing(names)}, or their numbers, 1 to {len(ROWS)}"
    raise BadArgument(f"no lesson is called '{name}'", hint=hint)


def find(name: str) -> Lesson:
    """The lesson of that name, as `row_of` takes it; `MissingExtra` if its framework is not installed."""
    row = row_of(name)
    for package in row.needs:
        need(package, extra=row.extra, to=f"run the lesson {row.name}")
    lesson: Lesson = importlib.import_module(f"paramend.lessons.{row.module}").LESSON
    return lesson
