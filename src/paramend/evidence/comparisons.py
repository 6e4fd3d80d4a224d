"""Comparisons of pairs of leaves: whether they are equal bit by bit, and how far apart, in bounded memory."""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from paramend.errors import Unsupported
from paramend.evidence.distances import Distance, Gap
from paramend.evidence.reading import Span, Task, looked
from paramend.evidence.streams import CHUNK, Desk, Stream, hindrance, stream_of
from paramend.leaves.leaves import Leaves
from paramend.leaves.specs import Array, Spec
from paramend.reports.progress import Meter

R = TypeVar("R")

_SMALL = 1 << 14
# Bytes of a side that are compared at once: unlike distances, comparing takes no memory, so more is faster.
_AT_ONCE = 8 * CHUNK


@dataclass(frozen=True, slots=True)
class Pair:
    """Two leaves to compare: number `a` of the tree `old`, and `b` of `new`."""

    old: Leaves
    a: int
    new: Leaves
    b: int

    @property
    def same(self) -> bool:
        """Whether both are one object in memory."""
        if hasattr(self.old, "home") or hasattr(self.new, "home"):
            return False
        return self.old.read(self.a) is self.new.read(self.b)

    @property
    def specs(self) -> tuple[Spec, Spec]:
        return self.old.spec(self.a), self.new.spec(self.b)

    @property
    def nbytes(self) -> int:
        return self.old.nbytes(self.a) + self.new.nbytes(self.b)

    @property
    def hindrance(self) -> str:
        """Why the values of one of them are not available, or ""."""
        return hindrance(self.old, self.a) or hindrance(self.new, self.b)

    def streams(self) -> tuple[Stream, Stream]:
        """The streams of both."""
        a, b = stream_of(self.old, self.a), stream_of(self.new, self.b)
        if a.size != b.size or (a.dtype is None) != (b.dtype is None):
            raise Unsupported(
                f"{self.new.index.path(self.b)} cannot be compared: its values, {b.spec}, are packed on one side"
            )
        return a, b


class Comparer:
    """Comparisons of pairs of leaves on two threads, whose bytes advance a meter."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def equal(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether the leaves of each pair, of one spec, are equal bit by bit."""
        found = [True] * len(pairs)
        self.meter.total += sum(pair.nbytes for pair in pairs)

        def streams() -> Iterator[Task]:
            for index, pair in enumerate(pairs):
                if not pair.same:
                    a, b = pair.streams()
                    if not a.is_at(b):
                        yield index, (a, b)

        for index, same in self._looked(streams(), _agree):
            found[index] &= same
        return found

    def distances(self, pairs: Sequence[Pair]) -> list[Distance]:
        """How far the leaves of each pair, of one shape, are apart."""
        found = [Gap() for _ in pairs]
        self.meter.total += sum(pair.nbytes for pair in pairs)
        streams = ((index, pair.streams()) for index, pair in enumerate(pairs))
        for index, gap in self._looked(streams, _gap):
            found[index].merge(gap)
        return [gap.distance() for gap in found]

    def _looked(self, tasks: Iterable[Task], look: Callable[[Span, Desk], R]) -> Iterator[tuple[int, R]]:
        for span, found in looked(tasks, look):
            self.meter.advance(span.nbytes)
            yield span.index, found


def _agree(span: Span, desk: Desk) -> bool:
    return all(same_bytes(a, b) for a, b in span.pieces(desk, _AT_ONCE))


def _gap(span: Span, desk: Desk) -> Gap:
    gap = Gap()
    bits = None if span.streams[0].dtype is not None else span.streams[0].bits
    for a, b in span.pieces(desk):
        if bits is not None:
            gap.add_opaque(a, b, bits)
        else:
            gap.add(a, b)
    return gap


_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def same_bytes(a: Array, b: Array) -> bool:
    """Whether two arrays, contiguous and of one length in bytes, are equal bit by bit."""
    if a.nbytes < _SMALL:
        return a.tobytes() == b.tobytes()
    # Unlike comparisons in numpy or of bytes, ctypes lets other threads run and allocates nothing.
    return not _memcmp(a.ctypes.data, b.ctypes.data, a.nbytes)
