"""Progress: what a long task tells whoever asked to hear of it. By default nobody did.

A function that takes `progress=` calls it with an `Event` now and then. What the caller makes of it, a bar or
a log line, is the caller's matter; an exception raised there stops the task as any other would.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """How far a task is.

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
        """Bytes per second; 0 before anything is known."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def left(self) -> float | None:
        """Seconds still to go at this rate; None before anything is known."""
        return (self.total - self.done) / self.rate if self.rate else None


Progress = Callable[[Event], object]


class Meter:
    """Counts bytes and tells the listener, if there is one.

    >>> heard = []
    >>> meter = Meter(heard.append, total=10)
    >>> meter.advance(4, "a")
    >>> [(event.done, event.total, event.at) for event in heard]
    [(4, 10, 'a')]
    """

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.done = 0
        self.total = total
        self._progress = progress
        self._began = time.monotonic()

    def advance(self, count: int, at: str = "") -> None:
        """Notes that `count` more bytes are done."""
        self.done += count
        if self._progress is not None:
            self._progress(Event(self.done, self.total, time.monotonic() - self._began, at))
