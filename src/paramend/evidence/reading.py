"""Reading: one pass over all elements of some streams, in pieces made as they are needed.

It is done on two threads: numpy, file reads and memory comparisons release the GIL.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

from paramend.evidence.streams import CHUNK, Desk, Stream
from paramend.leaves.specs import Array

T = TypeVar("T")
R = TypeVar("R")
Task = tuple[int, tuple[Stream, ...]]

# The bytes that one thread takes at a time.
_SPAN = 32 << 20
_THREADS = 2
_WAITING = 4  # batches in flight: their arrays are in memory


def looked(tasks: Iterable[Task], look: Callable[["Span", Desk], R]) -> Iterator[tuple["Span", R]]:
    """The result of `look`, called on any thread, for each span of the streams of some tasks, in order. The streams of
    a task are of one size."""
    turn = threading.Lock()

    def run(batch: Sequence[Span]) -> list[tuple[Span, R]]:
        # A decompressor serves one reader at a time, from the beginning of a leaf to its end.
        with turn if batch[0].in_turn else nullcontext(), Desk() as desk:
            return [(span, look(span, desk)) for span in batch]

    for results in _spread(_batches(tasks), run):
        yield from results


@dataclass(frozen=True, slots=True)
class Span:
    """Some elements of the streams of a task, which are of one size and are read together."""

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


def _spread(pieces: Iterable[T], run: Callable[[T], R]) -> Iterator[R]:
    """The result of `run` for each piece, in order. Pieces are made as they are needed."""
    coming = iter(pieces)
    first = list(islice(coming, 2))
    if len(first) < 2:
        yield from map(run, first)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="paramend") as pool:
        try:
            for piece in chain(first, coming):
                waiting.append(pool.submit(run, piece))
                if len(waiting) > _WAITING:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
