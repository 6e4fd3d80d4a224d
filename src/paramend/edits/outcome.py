"""`Outcome`: what became of a plan, as a report."""

from dataclasses import replace

from paramend.edits.plan import Plan
from paramend.errors import printable_lines
from paramend.pages.page import Page
from paramend.pages.paged import Paged


class Outcome(Paged):
    """A report of a plan that was carried out, whose rows are those of the plan."""

    plan: Plan

    def __post_init__(self) -> None:
        object.__setattr__(self, "plan", self.plan.told())

    @property
    def summary(self) -> str:
        """What was written, in one line."""
        raise NotImplementedError

    def headline(self) -> str:
        return self.summary

    def page(self) -> Page:
        return replace(self.plan.page(), headline=self.summary)

    def __str__(self) -> str:
        return f"{self.plan}\n{printable_lines(self.summary)}"
