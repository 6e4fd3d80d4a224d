"""A zip archive, read strictly: its members, and where their bytes and their checksums are.

A zip file says everything twice, in the central directory at its end and in a header before each member. Readers
that believe one or the other see different files in the same bytes; here the two must agree. The local headers are
all over the file, so each is read when its member is first used: opening reads only the end of the file.
"""

import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from paramend.errors import BadArgument, BadCheckpoint
from paramend.formats.files import FileSource, OpenFile
from paramend.formats.limits import is_within, shown
from paramend.leaves.origins.origin import Extent
from paramend.reports import wording

STORED = 0

MAX_DIRECTORY = 100_000_000
_CHUNK = 1 << 20

_END = struct.Struct("<IHHHHIIH")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR = struct.Struct("<IIQI")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_LENGTHS = struct.Struct("<HHH")
_LOCAL = struct.Struct("<IHHHHHIIIHH")
_END_MAGIC, _END64_MAGIC, _LOCATOR_MAGIC = 0x06054B50, 0x06064B50, 0x07064B50
_CENTRAL_MAGIC, _LOCAL_MAGIC, _DESCRIPTOR_MAGIC = 0x02014B50, 0x04034B50, 0x08074B50
_U16, _U32 = 0xFFFF, 0xFFFFFFFF

_ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
_DESCRIBED = 1 << 3  # checksum and sizes follow the member
_UTF8 = 1 << 11
_KNOWN = _DESCRIBED | _UTF8 | 1 << 1 | 1 << 2  # the last two are the level of compression


@dataclass(frozen=True, slots=True)
class Member:
    """One file in an archive, as the central directory has it."""

    name: str  # with "/" between folders; checked to stay within the archive
    method: int  # how it is compressed; 0 if it is not
    nbytes: int
    packed: int  # its length in the archive
    crc: int  # the CRC32 of its bytes
    flags: int  # the general purpose bits of the format
    header: int  # the offset of its local header
    central: int  # the offset of its CRC32 in the central directory


class Offsets(NamedTuple):
    """Where a member is: its first byte, and the offsets of its CRC32, four bytes each."""

    start: int
    crcs: tuple[int, ...]


class Archive:
    """The members of a zip file by name, in the order of the central directory; folders are left out. `BadCheckpoint`
    if readers could see it in two ways."""

    def __init__(self, file: OpenFile) -> None:
        self.file = file
        start, size, count = _find_directory(file)
        self._directory = start
        self._offsets: dict[str, Offsets] = {}
        self._names: dict[str, bytes] = {}
        self.members: dict[str, Member] = {}
        every = list(_parse_directory(file, start, size, count, self._names))
        for member in every:
            if member.name in self.members:
                raise self.bad(member.name, "the name appears twice")
            self.members[member.name] = member
        self._order = sorted(self.members.values(), key=lambda member: member.header)
        self._headers = [member.header for member in self._order]
        self._check_apart()
        for member in every:
            if member.name.endswith("/"):
                del self.members[member.name]

    def bad(self, name: str, reason: str, hint: str = "") -> BadCheckpoint:
        return BadCheckpoint(f"{self.file.path}: member {shown(name)}: {reason}", hint=hint)

    def offsets(self, name: str) -> Offsets:
        """Where a member is; `BadCheckpoint` if its local header and the central directory disagree."""
        if name not in self._offsets:
            self._offsets[name] = self._look(self.members[name])
        return self._offsets[name]

    def read(self, name: str) -> bytes:
        """The bytes of an uncompressed member; `BadCheckpoint` if they do not match their checksum."""
        member = self.members[name]
        if member.method != STORED:
            raise self.bad(name, "it is compressed")
        data = self.file.read(self.offsets(name).start, member.nbytes)
        if zlib.crc32(data) != member.crc:
            raise self.bad(name, "its bytes do not match their checksum (CRC32)")
        return data

    def touched(self, extents: Iterable[Extent]) -> list[Member]:
        """The members that hold these bytes of the file; `BadArgument` if an extent is not within a member."""
        found: dict[str, Member] = {}
        for extent in extents:
            start, stop = extent.start, extent.start + extent.nbytes
            if start >= stop:
                continue
            at = bisect_right(self._headers, start) - 1
            member = self.members.get(self._order[at].name) if at >= 0 else None
            first = self.offsets(member.name).start if member else 0
            if member is None or not first <= start < stop <= first + member.packed:
                raise BadArgument(f"{self.file.path}: the bytes {start:,} to {stop:,} are not within one member")
            found[member.name] = member
        return list(found.values())

    def _check_apart(self) -> None:
        """Raise if members overlap, or do not begin the file, as far as the central directory tells."""
        if self._order and self._order[0].header:
            raise self.bad(self._order[0].name, f"{wording.plural(self._order[0].header, 'byte')} come before it")
        for member, limit in zip(self._order, [*self._headers[1:], self._directory], strict=False):
            if member.header + _LOCAL.size + len(self._names[member.name]) + member.packed > limit:
                raise self.bad(member.name, "it runs into the next member")

    def _look(self, member: Member) -> Offsets:
        name = self._names[member.name]
        head = self.file.read(member.header, _LOCAL.size)
        magic, _, flags, method, _, _, crc, packed, nbytes, name_length, extra_length = _LOCAL.unpack(head)
        if magic != _LOCAL_MAGIC:
            raise self.bad(member.name, "it has no local header where it should begin")
        start = member.header + _LOCAL.size + name_length + extra_length
        follows = bisect_right(self._headers, member.header)
        limit = self._headers[follows] if follows < len(self._headers) else self._directory
        if start + member.packed > limit:
            raise self.bad(member.name, "it runs into the next member")
        more = self.file.read(member.header + _LOCAL.size, name_length + extra_length)
        if more[:name_length] != name:
            raise self.bad(member.name, f"its local header has another name, {shown(_decode(more[:name_length]))}")
        if (flags, method) != (member.flags, member.method):
            raise self.bad(member.name, "its local header and the central directory differ in flags or compression")
        nbytes, packed, _ = _widen(more[name_length:], nbytes, packed, 0, self.file, member.name, lax=True)
        said, true = (crc, nbytes, packed), (member.crc, member.nbytes, member.packed)
        here = member.header + 14
        if not flags & _DESCRIBED:
            if said != true:
                raise self.bad(member.name, "its local header and the central directory differ in sizes or checksum")
            return Offsets(start, (here, member.central))
        # If a descriptor follows the member, the fields of the header are empty or (from some writers) already filled.
        if crc not in (0, member.crc) or any(a not in (0, b, _U32) for a, b in zip(said[1:], true[1:], strict=True)):
            raise self.bad(member.name, "its local header and the central directory differ in sizes or checksum")
        crcs = (here,) if crc and crc == member.crc else ()
        return Offsets(start, (*crcs, self._descriptor(member, start + member.packed, limit), member.central))

    def _descriptor(self, member: Member, at: int, limit: int) -> int:
        """The offset of the checksum after a member, which the format allows in four forms."""
        raw = self.file.read(at, min(24, limit - at))
        for size in ("<III", "<IQQ") if member.packed <= _U32 and member.nbytes <= _U32 else ("<IQQ",):
            plain = struct.pack(size, member.crc, member.packed, member.nbytes)
            if raw.startswith(struct.pack("<I", _DESCRIPTOR_MAGIC) + plain):
                return at + 4
            if raw.startswith(plain):
                return at
        raise self.bad(member.name, "the sizes and checksum after it differ from the central directory")


class ZipSource(FileSource):
    """A source over one zip file, an `archive` whose members are not compressed where they can be patched."""

    archive: Archive

    def patched_too(self, extents: Sequence[Extent]) -> list[Extent]:
        members = self.archive.touched(extents)
        return [Extent(self.path, at, 4) for member in members for at in self.archive.offsets(member.name).crcs]

    def after_patch(self, extents: Sequence[Extent]) -> list[tuple[Path, int, bytes]]:
        """The writes, as (file, offset, bytes), that correct the checksums after these bytes changed. Each changed
        member is read once, in chunks."""
        out: list[tuple[Path, int, bytes]] = []
        for member in self.archive.touched(extents):
            place = self.archive.offsets(member.name)
            crc = 0
            for at in range(place.start, place.start + member.packed, _CHUNK):
                crc = zlib.crc32(self._file.read(at, min(_CHUNK, place.start + member.packed - at)), crc)
            out += [(self.path, offset, crc.to_bytes(4, "little")) for offset in place.crcs]
        return out


def names_in(file: OpenFile) -> Iterator[str]:
    """The names in a central directory, in order and unchecked: they tell the kind of archive at little cost."""
    start, size, count = _find_directory(file)
    raw, at = file.read(start, size), 0
    for _ in range(count):
        if at + _CENTRAL.size > size:
            return
        name, extra, comment = _LENGTHS.unpack_from(raw, at + 28)
        at += _CENTRAL.size
        yield _decode(raw[at : at + name])
        at += name + extra + comment


def _find_directory(file: OpenFile) -> tuple[int, int, int]:
    """The offset of the central directory, its length, and the number of members it lists."""

    def bad(reason: str, hint: str = "copy or download it again") -> BadCheckpoint:
        return BadCheckpoint(f"{file.path}: {reason}", hint=hint)

    base = max(file.size - (_END.size + _U16 + _LOCATOR.size + _END64.size), 0)
    tail = file.read(base, file.size - base)
    at = tail.rfind(_END_MAGIC.to_bytes(4, "little"))
    if at < 0 or len(tail) - at < _END.size:
        raise bad("the end of the zip file is missing: it was cut short, or is not a zip file")
    _, disk, first_disk, count_here, count, size, start, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != len(tail):
        raise bad("there are bytes after the end of the zip file", "")
    end = base + at
    if at >= _LOCATOR.size and int.from_bytes(tail[at - _LOCATOR.size :][:4], "little") == _LOCATOR_MAGIC:
        _, _, end64, disks = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        at -= _LOCATOR.size + _END64.size
        if at < 0 or end64 != base + at:
            raise bad("the zip64 end record is not at its recorded offset", "")
        magic, length, _, _, disk64, first64, here64, count64, size64, start64 = _END64.unpack_from(tail, at)
        if magic != _END64_MAGIC or length != _END64.size - 12 or disks != 1:
            raise bad("the zip64 end record is damaged")
        narrow = (disk, first_disk, count_here, count, size, start)
        wide = (disk64, first64, here64, count64, size64, start64)
        full = (_U16, _U16, _U16, _U16, _U32, _U32)
        if any(a not in (b, most) for a, b, most in zip(narrow, wide, full, strict=True)):
            raise bad("the zip64 and plain end records of the zip file differ", "")
        disk, first_disk, count_here, count, size, start = wide
        end = end64
    if disk or first_disk or count_here != count:
        raise bad("it is one part of a multi-part zip file", "join the parts first")
    if size > MAX_DIRECTORY:
        raise bad(f"its central directory would be {size:,} bytes long", "")
    if start + size != end:
        raise bad("the central directory of the zip file is not at its recorded offset")
    if count * _CENTRAL.size > size:
        raise bad(f"its central directory cannot list {wording.plural(count, 'member')} in {size:,} bytes", "")
    return start, size, count


def _parse_directory(file: OpenFile, start: int, size: int, count: int, names: dict[str, bytes]) -> Iterator[Member]:
    raw = file.read(start, size)
    at = 0
    for i in range(count):
        place = f"member {i + 1} of {count:,}"
        if at + _CENTRAL.size > size:
            raise BadCheckpoint(f"{file.path}: {place}: the central directory is cut short")
        fields = _CENTRAL.unpack_from(raw, at)
        magic, _, _, flags, method, _, _, crc, packed, nbytes = fields[:10]
        name_length, extra_length, comment, disk, _, _, header = fields[10:]
        stop = at + _CENTRAL.size + name_length + extra_length + comment
        if magic != _CENTRAL_MAGIC or stop > size:
            raise BadCheckpoint(f"{file.path}: {place}: the central directory is damaged")
        begin = at + _CENTRAL.size
        encoded = raw[begin : begin + name_length]
        name = _name(encoded, flags, file, place)
        extra = raw[begin + name_length : begin + name_length + extra_length]
        nbytes, packed, header = _widen(extra, nbytes, packed, header, file, name)
        reason = _refusal(flags, method, disk, packed, nbytes)
        if not reason and header + _LOCAL.size > start:
            reason = "it would begin after the end of the members"
        if not reason and name.endswith("/") and (nbytes or packed):
            reason = "a folder has no bytes"
        if reason:
            raise BadCheckpoint(f"{file.path}: member {shown(name)}: {reason}")
        names[name] = encoded
        yield Member(name, method, nbytes, packed, crc, flags, header, start + at + 16)
        at = stop
    if at != size:
        raise BadCheckpoint(f"{file.path}: the central directory holds more than the {count:,} members it lists")


def _refusal(flags: int, method: int, disk: int, packed: int, nbytes: int) -> str:
    if flags & _ENCRYPTED:
        return "it is encrypted"
    if flags & ~_KNOWN:
        return f"it has unknown flags ({flags:#06x})"
    if disk:
        return "it is in another part of a multi-part zip file"
    if method == STORED and packed != nbytes:
        return f"it is not compressed, but {nbytes:,} bytes would be in {packed:,}"
    return ""


def _decode(encoded: bytes) -> str:
    return encoded.decode("utf-8", "backslashreplace")


def _name(encoded: bytes, flags: int, file: OpenFile, place: str) -> str:
    try:
        name = encoded.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError:
        raise BadCheckpoint(f"{file.path}: {place}: the name {shown(_decode(encoded))} is not UTF-8") from None
    if not is_within(name.removesuffix("/")):
        raise BadCheckpoint(f"{file.path}: {place}: the name {shown(name)} is not a path within the file")
    return name


def _widen(
    extra: bytes, nbytes: int, packed: int, header: int, file: OpenFile, name: str, *, lax: bool = False
) -> tuple[int, int, int]:
    """Length, length in the archive and offset, from the zip64 field of a header where the narrow fields overflow.
    `lax` allows padding that is not an extra field: some writers align members with it."""
    wide: bytes | None = None
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if at + 4 + length > len(extra):
            break
        if kind == 1:
            if wide is not None:
                raise BadCheckpoint(f"{file.path}: member {shown(name)}: it has two zip64 fields")
            wide = extra[at + 4 : at + 4 + length]
        at += 4 + length
    if at != len(extra) and not lax:
        raise BadCheckpoint(f"{file.path}: member {shown(name)}: its extra fields are damaged")
    narrow = nbytes, packed, header
    full = [number == _U32 for number in narrow]
    if not any(full):
        return narrow
    if wide is None or len(wide) < 8 * sum(full):
        if lax:  # the header was written before the length of its member was known
            return narrow
        raise BadCheckpoint(f"{file.path}: member {shown(name)}: its zip64 field is missing or too short")
    values = (int.from_bytes(wide[at : at + 8], "little") for at in range(0, len(wide), 8))
    nbytes, packed, header = (next(values) if is_full else n for n, is_full in zip(narrow, full, strict=True))
    return nbytes, packed, header


# From this value on, lengths and offsets need the wide fields of zip64; a test lowers it.
WIDE = _U32
ALIGNMENT = 64
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
        length = _U32 if wide else nbytes
        self._fixed = (45 if wide else 20, _UTF8, 0, 0, _DAY)
        lengths = (length, length, len(self._name), len(extra))
        head = struct.pack("<I5H3I2H", _LOCAL_MAGIC, *self._fixed, crc, *lengths)
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
        packed, plain, offset = (_U32 if is_full else n for n, is_full in zip(numbers, full, strict=True))
        head = struct.pack("<IH5H3I", _CENTRAL_MAGIC, 45, *self._fixed, self._crc, packed, plain)
        tail = struct.pack("<5H2I", len(self._name), len(extra), 0, 0, 0, 0, offset)
        self._directory.append(head + tail + self._name + extra)
        return b""

    def finish(self) -> bytes:
        start, count = self.at, len(self._directory)
        out = b"".join(self._directory)
        size, end = len(out), start + len(out)
        if start >= WIDE or size >= WIDE or count >= _U16:
            out += _END64.pack(_END64_MAGIC, 44, 45, 45, 0, 0, count, count, size, start)
            out += _LOCATOR.pack(_LOCATOR_MAGIC, 0, end, 1)
        few = min(count, _U16)
        small = (min(size, _U32), _U32 if start >= WIDE else start)
        out += _END.pack(_END_MAGIC, 0, 0, few, few, *small, 0)
        self.at += len(out)
        return out
