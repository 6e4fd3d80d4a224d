"""The lessons, one row each, listed without importing any framework."""

import importlib
from dataclasses import dataclass

from paramend._optional import need
from paramend.errors import BadArgument
from paramend.lessons.lesson import Lesson, page_of
from paramend.reports.wording import closest, listing


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
