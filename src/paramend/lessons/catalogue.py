"""The lessons, one row each, listed without importing any framework."""

import importlib
from dataclasses import dataclass

from paramend._optional import need
from paramend.errors import BadArgument
from paramend.lessons.lesson import Lesson
from paramend.reports.wording import closest, listing


@dataclass(frozen=True)
class LessonRow:
    """Where a lesson is, and what it needs installed.

    Attributes:
        needs: the packages that the lesson imports.
        extra: the extra of Paramend that installs them.
    """

    name: str
    title: str
    module: str
    needs: tuple[str, ...]
    extra: str


ROWS = (
    LessonRow("kernel_replace", "Replace one kernel, keep its bias", "kernel", ("jax", "flax"), "jax"),
    LessonRow("zero_last_layer", "Zero the last kernel, keep its bias", "last_layer", ("jax", "flax"), "jax"),
    LessonRow("freeze_first_dense", "Freeze the first layer for one step", "frozen_layer", ("jax", "flax"), "jax"),
    LessonRow("partial_init", "Start a bigger model from a smaller one", "warm_start", ("jax", "flax"), "jax"),
    LessonRow("init_zero", "Zero one torch layer in place", "torch_layer", ("torch",), "torch"),
)


def find(name: str) -> Lesson:
    """The lesson of that name; `kernel-replace` means `kernel_replace`.

    Raises:
        BadArgument: there is no such lesson; the hint has the nearest name.
        MissingExtra: the framework it uses is not installed.

    Example:
        >>> find("kernel_replace").title
        'Replace one kernel, keep its bias'
    """
    rows = {row.name: row for row in ROWS}
    row = rows.get(name.replace("-", "_"))
    if row is None:
        near = closest(name.replace("-", "_"), rows, limit=1)
        known = listing(list(rows))
        raise BadArgument(
            f"no lesson is called '{name}'", hint=f"did you mean {near[0]}?" if near else f"lessons: {known}"
        )
    for package in row.needs:
        need(package, extra=row.extra, to=f"run the lesson {row.name}")
    lesson: Lesson = importlib.import_module(f"paramend.lessons.{row.module}").LESSON
    return lesson
