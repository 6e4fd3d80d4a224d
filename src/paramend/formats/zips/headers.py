"""`ZipHeaders`: everything in a zip file besides the bytes of its members."""

import struct
import zlib
from collections.abc import Iterator

# From this value on, lengths and offsets need the wide fields of zip64; a test lowers it.
WIDE = 0xFFFFFFFF
ALIGNMENT = 64
_UTF8 = 1 << 11
_DAY = 0x21  # 1 January 1980, the first day of zip's calendar


class ZipHeaders:
    """The headers of a zip file that has grown to `at` bytes. Records are uncompressed and aligned."""

    def __init__(self, alignment: int = ALIGNMENT) -> None:
        self.at = 0
        self._alignment = alignment
        self._directory: list[bytes] = []

    def member(self, name: str, data: bytes) -> Iterator[bytes]:
        """A member of these bytes, with the headers around it."""
        yield self.open(name, len(data), zlib.crc32(data))
        yield data
        yield self.close()

    def open(self, name: str, nbytes: int, crc: int = 0) -> bytes:
        """The bytes before a member; its checksum is 0 if it is corrected later."""
        self._header, self._name, self._nbytes, self._crc = self.at, name.encode(), nbytes, crc
        wide = nbytes >= WIDE
        sizes = struct.pack("<HHQQ", 1, 16, nbytes, nbytes) if wide else b""
        pad = -(self.at + 30 + len(self._name) + len(sizes) + 4) % self._alignment
        extra = sizes + struct.pack("<2sH", b"FB", pad) + b"Z" * pad
        length = 0xFFFFFFFF if wide else nbytes
        self._fixed = (45 if wide else 20, _UTF8, 0, 0, _DAY)
        lengths = (length, length, len(self._name), len(extra))
        head = struct.pack("<I5H3I2H", 0x04034B50, *self._fixed, crc, *lengths)
        self.at += len(head) + len(self._name) + len(extra)
        return head + self._name + extra

    def close(self, crc: int | None = None) -> bytes:
        """The bytes after the member: none. The directory at the end of the file will list it, with its checksum if it
        is known only now."""
        self._crc = self._crc if crc is None else crc
        self.at += self._nbytes
        numbers = [self._nbytes, self._nbytes, self._header]
        full = [number >= WIDE for number in numbers]
        wide = b"".join(struct.pack("<Q", number) for number, is_full in zip(numbers, full, strict=True) if is_full)
        extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
        packed, plain, offset = (0xFFFFFFFF if is_full else n for n, is_full in zip(numbers, full, strict=True))
        head = struct.pack("<IH5H3I", 0x02014B50, 45, *self._fixed, self._crc, packed, plain)
        tail = struct.pack("<5H2I", len(self._name), len(extra), 0, 0, 0, 0, offset)
        self._directory.append(head + tail + self._name + extra)
        return b""

    def finish(self) -> bytes:
        """The central directory and the end of the file."""
        start, count = self.at, len(self._directory)
        out = b"".join(self._directory)
        size, end = len(out), start + len(out)
        if start >= WIDE or size >= WIDE or count >= 0xFFFF:
            out += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, start)
            out += struct.pack("<IIQI", 0x07064B50, 0, end, 1)
        few = min(count, 0xFFFF)
        small = (min(size, 0xFFFFFFFF), 0xFFFFFFFF if start >= WIDE else start)
        out += struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, few, few, *small, 0)
        self.at += len(out)
        return out
