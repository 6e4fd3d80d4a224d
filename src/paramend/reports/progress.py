"""Progress: what a long task reports to its caller on request.

A function that takes `progress=` calls it with an `Event` now and then. The caller may show a bar or write a log
line; an exception raised there stops the task like any other.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """The progress of a task.

    Attributes:
        done: bytes handled so far.
        total: bytes to handle.
        seconds: time since the task began.
        at: what is being handled, such as the path of a leaf.

    >>> event = Event(done=250, total=1000, seconds=2.0, at="head/kernel")
    >>> event.rate, event.left
    (125.0, 6.0)
    """

    done: int
    total: int
    seconds: float
    at: str = ""

    @property
    def rate(self) -> float:
        """Bytes per second; 0 if not yet known."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def left(self) -> float | None:
        """The seconds left at this rate; None if not yet known."""
        return (self.total - self.done) / self.rate if self.rate else None


Progress = Callable[[Event], object]


class Meter:
    """Counts bytes and calls `progress`, if given."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.done = 0
        self.total = total
        self._progress = progress
        self._began = time.monotonic()

    def advance(self, count: int, at: str = "") -> None:
        """Add `count` bytes to those done."""
        self.done += count
        if self._progress is not None:
            self._progress(Event(self.done, self.total, time.monotonic() - self._began, at))
