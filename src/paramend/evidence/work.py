"""Work in pieces, on two threads: numpy, file reads and memory comparisons release the GIL."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

_THREADS = 2
_WAITING = 4  # pieces in flight: their arrays are in memory

T = TypeVar("T")
R = TypeVar("R")


def spread(pieces: Iterable[T], run: Callable[[T], R]) -> Iterator[R]:
    """The result of `run` for each piece, in order. Pieces are made as they are needed.

    >>> list(spread(range(5), lambda n: n * n))
    [0, 1, 4, 9, 16]
    """
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
