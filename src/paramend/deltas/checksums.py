"""Checksums of leaves, under the names that deltas have for them."""

import hashlib
import zlib
from typing import Literal, Protocol, Self, get_args

from paramend._optional import need
from paramend.errors import BadArgument

Checksum = Literal["sha256", "xxh3-128", "blake3", "adler32"]


class Hasher(Protocol):
    """Bytes on their way into a checksum."""

    def update(self, data: memoryview, /) -> object:
        """Take further bytes."""

    def hexdigest(self) -> str:
        """The checksum of all bytes so far."""

    def copy(self) -> Self:
        """The same, to go on with other bytes."""


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
