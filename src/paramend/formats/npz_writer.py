"""`NpzWriter`: files as `numpy.savez` writes them, each array aligned."""

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from paramend.errors import RenameClash
from paramend.formats.limits import shown
from paramend.formats.writer import Item, LeafBytes
from paramend.formats.zips.headers import ALIGNMENT, ZipHeaders
from paramend.leaves.outlines import Outline
from paramend.leaves.specs import Spec

MAGIC = b"\x93NUMPY"
# The dtypes that numpy can name: it saves those of ml_dtypes as void.
_NATIVE = ["bool", "float16", "float32", "float64", "complex64", "complex128"]
_NATIVE += [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
DESCRS = {name: np.dtype(name).newbyteorder("<").str for name in _NATIVE}


class NpzWriter:
    """Lays out files that `numpy.load` reads and maps: each leaf uncompressed, its bytes aligned. Other files of an
    archive are kept; all other metadata of a source has no place, and is left out."""

    seals = True
    copies_raw = False
    flat = True

    def refusal(self, spec: Spec) -> str:
        return "" if spec.dtype in DESCRS else f"numpy files cannot hold {spec.dtype}"

    def holds(self, value: Any) -> bool:
        return False

    def parts(
        self, items: Sequence[Item], metadata: Mapping[str, Any], outline: Outline | None = None
    ) -> Iterator[bytes | LeafBytes]:
        """The file from its first byte to its last; each leaf needs a name of its own, a path within an archive."""
        taken: set[str] = set()
        read: dict[str, Item] = {}
        zipped = ZipHeaders()
        for place, item in enumerate(items):
            _check_name(item.name, taken)
            other = read.setdefault(item.name.replace(".", "/"), item)
            if other is not item:
                raise RenameClash(
                    f"{shown(other.name)} and {shown(item.name)} read the same, and in a file of names nothing tells "
                    "their keys apart",
                    hint="rename one of them, or save to .safetensors, .pt or .msgpack",
                )
            head = _head(item.spec)
            crc = 0 if item.nbytes else zlib.crc32(head)
            yield zipped.open(f"{item.name}.npy", len(head) + item.nbytes, crc)
            yield head
            yield LeafBytes(place, 0, item.nbytes)
            yield zipped.close()
        for name, data in metadata.items():
            if type(data) is bytes and not name.endswith(".npy"):
                _check_name(name, taken)
                yield from zipped.member(name, data)
        yield zipped.finish()


def _head(spec: Spec) -> bytes:
    """The header of an array in version 1.0 of the format, padded so that the array is aligned."""
    text = f"{{'descr': '{DESCRS[spec.dtype]}', 'fortran_order': False, 'shape': {spec.shape}, }}".encode()
    pad = -(len(MAGIC) + 4 + len(text) + 1) % ALIGNMENT
    return MAGIC + b"\1\0" + struct.pack("<H", len(text) + pad + 1) + text + b" " * pad + b"\n"


def _check_name(name: str, taken: set[str]) -> None:
    pieces = name.split("/")
    if any(piece in ("", ".", "..") for piece in pieces) or "\\" in name or "\0" in name or ":" in pieces[0]:
        raise RenameClash(f"{shown(name)} is not a valid name in a zip file", hint="rename it first")
    if len(name.encode()) > 60_000:
        raise RenameClash(f"{shown(name)} is too long for a name in a zip file", hint="rename it first")
    if name in taken:
        raise RenameClash(f"two leaves would have the same name, {shown(name)}", hint="rename or delete one first")
    taken.add(name)
