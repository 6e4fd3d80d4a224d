"""Checksums of the bytes of leaves, under the names that deltas have for them."""

import hashlib
import zlib
from collections.abc import Iterator
from typing import Literal, Protocol, Self, get_args

import numpy as np

from paramend._optional import need
from paramend.deltas.payload import SPAN
from paramend.errors import BadArgument
from paramend.evidence.streams import Desk, Stream
from paramend.leaves.specs import Array

Checksum = Literal["sha256", "xxh3-128", "blake3", "adler32"]


class Hasher(Protocol):
    """Bytes on their way into a checksum, as `hashlib` has it."""

    def update(self, data: memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...

    def copy(self) -> Self: ...


class _Adler32:
    def __init__(self, value: int = 1) -> None:
        self._value = value

    def update(self, data: memoryview) -> None:
        self._value = zlib.adler32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"

    def copy(self) -> "_Adler32":
        return _Adler32(self._value)


def hasher(algorithm: str) -> Hasher:
    """A new checksum.

    Raises:
        BadArgument: there is none of that name.
        MissingExtra: its package is not installed.

    >>> found = hasher("adler32")
    >>> found.update(memoryview(b"Wikipedia"))
    >>> found.hexdigest()
    '11e60398'
    """
    if algorithm == "sha256":
        return hashlib.sha256()
    if algorithm == "adler32":
        return _Adler32()
    if algorithm not in get_args(Checksum):
        raise BadArgument(f"{algorithm!r:.60} is not a checksum", hint=", ".join(get_args(Checksum)))
    module, _, _ = algorithm.partition("3")
    found = need({"xxh": "xxhash", "blake": "blake3"}[module], extra="deltas", to=f"compute {algorithm}")
    made: Hasher = found.xxh3_128() if module == "xxh" else found.blake3()
    return made


def bytes_of(stream: Stream) -> Iterator[tuple[int, Array]]:
    """The bytes of a leaf, piece by piece: (the first byte, those bytes)."""
    return ((start, piece) for start, piece, _ in both(stream, stream))


def both(a: Stream, b: Stream) -> Iterator[tuple[int, Array, Array]]:
    """The bytes of two streams of one size, piece by piece: (the first byte, those of one, those of the other)."""
    step = max(SPAN // a.width, 1)
    with Desk() as desk:
        for start in range(0, a.size, step):
            stop = min(start + step, a.size)
            one = a.piece(desk, 0, start, stop).view(np.uint8)
            two = one if b is a else b.piece(desk, 1, start, stop).view(np.uint8)
            yield start * a.width, one, two
