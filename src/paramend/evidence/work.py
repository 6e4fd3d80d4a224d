"""Work in pieces, on two threads: numpy, the system's reads and comparisons of memory let Python run meanwhile."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import TypeVar

_THREADS = 2
_WAITING = 4  # pieces that are made before the first of them is done: their arrays are in memory meanwhile

T = TypeVar("T")
R = TypeVar("R")


def spread(pieces: Iterable[T], run: Callable[[T], R]) -> Iterator[R]:
    """What `run` gives for each piece, in order. Pieces are made as they are needed.

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
