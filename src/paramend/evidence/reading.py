"""Reading: one pass over all elements of some streams, on two threads, in pieces made as they are needed."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

from paramend.evidence.streams import CHUNK, Desk, Stream
from paramend.evidence.work import spread
from paramend.leaves.specs import Array

R = TypeVar("R")
Task = tuple[int, tuple[Stream, ...]]

# The bytes that one thread takes at a time.
_SPAN = 32 << 20


def looked(tasks: Iterable[Task], look: Callable[["Span", Desk], R]) -> Iterator[tuple["Span", R]]:
    """The result of `look` for each span of the streams of some tasks, in order.

    Args:
        tasks: the number of each task and its streams, of one size.
        look: a function of a span, called on any thread.
    """
    turn = threading.Lock()

    def run(batch: Sequence[Span]) -> list[tuple[Span, R]]:
        # A decompressor serves one reader at a time, from the beginning of a leaf to its end.
        with turn if batch[0].in_turn else nullcontext(), Desk() as desk:
            return [(span, look(span, desk)) for span in batch]

    for results in spread(_batches(tasks), run):
        yield from results


@dataclass(frozen=True, slots=True)
class Span:
    """Some elements of streams that are read together.

    Attributes:
        index: the number of the task.
        streams: the streams, of one size.
        start: the first element.
        stop: the element after the last.
    """

    index: int
    streams: tuple[Stream, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """The bytes to read."""
        return (self.stop - self.start) * sum(stream.width for stream in self.streams)

    @property
    def in_turn(self) -> bool:
        """Whether they must be read by one thread at a time."""
        return any(stream.source is not None for stream in self.streams)

    def pieces(self, desk: Desk, nbytes: int = CHUNK) -> Iterator[tuple[Array, ...]]:
        """The elements, in pieces of at most so many bytes: an array for each stream."""
        step = nbytes // max(max(stream.width for stream in self.streams), 1)
        for start in range(self.start, self.stop, step):
            stop = min(start + step, self.stop)
            yield tuple(stream.piece(desk, slot, start, stop) for slot, stream in enumerate(self.streams))


def _batches(tasks: Iterable[Task]) -> Iterator[Sequence[Span]]:
    """All elements of some streams in batches, each large enough for a thread."""
    batch: list[Span] = []
    nbytes = 0
    for index, streams in tasks:
        size = streams[0].size
        piece = CHUNK // max(max(stream.width for stream in streams), 1)  # spans are of whole pieces
        step = max(_SPAN // max(sum(stream.width for stream in streams), 1) // piece, 1) * piece
        if Span(index, streams, 0, size).in_turn:  # a decompressor reads a leaf once, from its beginning
            yield [Span(index, streams, 0, size)]
            continue
        for start in range(0, size, step):
            batch.append(Span(index, streams, start, min(start + step, size)))
            nbytes += batch[-1].nbytes
            if nbytes >= _SPAN:
                yield batch
                batch, nbytes = [], 0
    if batch:
        yield batch
