"""What a lesson is made of: a page of text, a reference, random cases, and known mistakes as code that makes them."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Any

import numpy as np

from paramend.lessons.observation import Observation

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
