"""Safetensors files as leaves: a header that says where the bytes of every tensor are, then the bytes."""

import os
from collections.abc import Mapping
from functools import cached_property

from paramend.formats.files import FOREIGN, FileSource, OpenFile
from paramend.formats.jsontext import bad
from paramend.formats.safetensors_header import MAX_HEADER, Header, SafetensorsWriter, parse_header
from paramend.leaves.leaves import Index, separator_of, uncollected
from paramend.leaves.origins.origin import Extent
from paramend.leaves.specs import BITS
from paramend.reports import wording

WRITER = SafetensorsWriter()

_FOREIGN = (
    *FOREIGN,
    (b"PK\x03\x04", "a zip file, as torch.save and numpy.savez write them, not safetensors", ""),
    (b"\x80", "a Python pickle, as old versions of torch.save write it, not safetensors", ""),
)


class SafetensorsFile(FileSource):
    """One safetensors file as `Leaves`. Opening reads the header; arrays are read on demand. A leaf's number is its
    position in the order of the bytes."""

    format = "safetensors"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, holds="*.safetensors")

    def _begin(self) -> None:
        self.header = _read_header(self._file)
        self.rows = self.header.entries

    @cached_property
    def index(self) -> Index:  # type: ignore[override]  # made on first use
        names = self.names
        return Index.of_names(names, separator_of(names))

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.header.entries]

    @property
    def metadata(self) -> Mapping[str, str]:
        """The strings under `__metadata__`."""
        return self.header.metadata or {}

    def release(self) -> None:
        self._file.release()

    def hold(self) -> None:
        self._file.hold()

    def refusal(self, number: int) -> str:
        dtype = self.spec(number).dtype
        if dtype.startswith("raw<"):
            return f"its dtype, {dtype[4:-1]!r}, is unknown: its bytes can only be copied"
        if BITS[dtype] % 8:
            return f"its {dtype} values are packed, {BITS[dtype]} bits each: its bytes can only be copied"
        return ""

    def extent(self, number: int) -> Extent:
        entry = self.header.entries[number]
        return Extent(self.path, self.header.nbytes + entry.start, entry.nbytes)


@uncollected()
def _read_header(opened: OpenFile) -> Header:
    file, size = str(opened.path), opened.size
    head = opened.read(0, min(size, 64))
    if size < 8:
        raise bad(
            file,
            "byte 0",
            "the file is empty" if not size else f"a file of {wording.plural(size, 'byte')} has no header",
        )
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER or length > size - 8:
        for magic, what, hint in _FOREIGN:
            if head.startswith(magic) and head[8:].lstrip()[:1] != b"{":  # else the length only looks like one
                raise bad(file, "byte 0", f"it is {what}", hint)
        if length > MAX_HEADER:
            raise bad(file, "byte 0", f"not a safetensors file: its header would be {length:,} bytes long")
        raise bad(
            file,
            "byte 0",
            f"the header should be {length:,} bytes long, but only {size - 8:,} bytes follow",
            hint="copy or download it again, if it is a safetensors file",
        )
    return parse_header(opened.read(8, length), size - 8 - length, file=file)
