"""Safetensors files as leaves: a header that says where the bytes of every tensor are, then the bytes.

The reader is stricter than the reference: a name appears once. What the reference refuses is refused here
too, except unknown dtypes: their tensors are listed and copied, never read or edited.
"""

import os
from collections.abc import Mapping
from functools import cached_property

from paramend.formats.files import FileSource, OpenFile
from paramend.formats.jsontext import bad
from paramend.formats.safetensors_header import MAX_HEADER, Header, SafetensorsWriter, parse_header
from paramend.leaves.leaves import Index, separator_of, uncollected
from paramend.leaves.origins.origin import Extent
from paramend.leaves.specs import BITS
from paramend.reports import wording

WRITER = SafetensorsWriter()

# How other files begin, what they are, and a hint.
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "git lfs pull"),
    (b"PK\x03\x04", "a zip file, as torch.save and numpy.savez write them, not safetensors", ""),
    (b"\x89HDF", "an HDF5 file, not safetensors", ""),
    (b"GGUF", "a GGUF file, not safetensors", ""),
    (b"\x1f\x8b", "compressed with gzip", "gunzip it first"),
    (b"\x80", "a Python pickle, as old versions of torch.save write it, not safetensors", ""),
    (b"<", "a web page (HTML or XML), not safetensors", "download the file itself"),
)


class SafetensorsFile(FileSource):
    """One safetensors file as `Leaves`. Opening reads the header; arrays are read on demand.

    A leaf's number is its position in the order of the bytes.

    Attributes:
        index: the names; its separator is "/" where the file's own names hold "/" and no ".".

    >>> import tempfile
    >>> from pathlib import Path
    >>> from paramend.leaves.specs import Spec
    >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
    >>> from paramend.formats.safetensors_header import layout
    >>> header = layout([("fc.weight", Spec((2, 1), "float32"), 8)])
    >>> _ = path.write_bytes(header.to_bytes() + np.array([1, 2], "float32").tobytes())
    >>> with SafetensorsFile(path) as file:
    ...     print(file.index.path(0), file.spec(0), file.read(0).tolist())
    fc.weight float32[2,1] [[1.0], [2.0]]
    """

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
