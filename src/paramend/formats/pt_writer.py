"""`TorchWriter`: writes tensors as `torch.save` does, without torch, in one pass and in bounded memory.

The pickle is written by hand, of the names that `torch.load(weights_only=True)` knows. Checksums follow each record,
so that a leaf is computed once and nothing is written twice.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from paramend.errors import RenameClash
from paramend.formats.writer import Item
from paramend.specs import Spec

_STORAGES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
    "complex128": "ComplexDouble",
    "complex64": "ComplexFloat",
}
# Newer dtypes have no storage class of their own: their tensors look at bytes and say the dtype themselves.
_NEWER = frozenset({"uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"})
_NEWER |= {"float8_e5m2fnuz", "float8_e8m0fnu"}
_FOLDER = "archive"
_ALIGNMENT = 64
# From here on, lengths and offsets need the wide fields of zip64; a test sets it low.
WIDE = 0xFFFFFFFF
_FLAGS = 1 << 3 | 1 << 11  # the checksum follows the record; names are UTF-8


class TorchWriter:
    """Writes files that `torch.load(weights_only=True)` reads: nested dicts of tensors, by their keys.

    What a source says besides its leaves has no place in such a dict, and is left out.
    """

    def refusal(self, spec: Spec) -> str:
        """Why the format cannot hold such a leaf, or ""."""
        return "" if spec.dtype in _STORAGES or spec.dtype in _NEWER else f"torch has no dtype {spec.dtype}"

    def nbytes(self, items: Sequence[Item], metadata: Mapping[str, Any]) -> int:
        """How large the file will be at most."""
        header = 30 + 46 + 24 + 2 * 28 + 2 * len(f"{_FOLDER}/data/{len(items)}") + _ALIGNMENT + 4
        return sum(item.nbytes + header for item in items) + len(_pickle(items)) + 4 * header + 98

    def write(self, file: BinaryIO, items: Sequence[Item], metadata: Mapping[str, Any]) -> None:
        """Writes the whole file.

        Raises:
            RenameClash: a leaf stands where others have their container.

        >>> import tempfile
        >>> from pathlib import Path
        >>> from paramend.formats.pt import TorchFile
        >>> path = Path(tempfile.mkdtemp(), "model.pt")
        >>> data = np.array([1, 2], "float32")
        >>> item = Item("fc.weight", ("fc.weight",), Spec((2,), "float32"), 8, lambda: iter([data.view("u1").data]))
        >>> with path.open("wb") as file:
        ...     TorchWriter().write(file, [item], {})
        >>> with TorchFile(path) as file:
        ...     print(file.index.path(0), file.read(0))
        fc.weight [1. 2.]
        """
        zipped = _Zip(file)
        zipped.add("data.pkl", [_pickle(items)])
        zipped.add("byteorder", [b"little"])
        for i, item in enumerate(items):
            zipped.add(f"data/{i}", item.chunks(), item.nbytes)
        zipped.add("version", [b"3\n"])
        zipped.finish()


class _Zip:
    """A zip file that is written from its first byte to its last."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.at = 0
        self.directory: list[bytes] = []

    def put(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.at += len(data)

    def add(self, name: str, chunks: Iterable[bytes | memoryview], nbytes: int | None = None) -> None:
        """Writes a record; its length must be given if it is too long to be a few bytes."""
        header, encoded = self.at, f"{_FOLDER}/{name}".encode()
        wide = (nbytes or 0) >= WIDE
        sizes = struct.pack("<HHQQ", 1, 16, nbytes or 0, nbytes or 0) if wide else b""
        pad = -(header + 30 + len(encoded) + len(sizes) + 4) % _ALIGNMENT
        extra = sizes + struct.pack("<2sH", b"FB", pad) + b"Z" * pad
        length = 0xFFFFFFFF if wide else 0
        fixed = (45 if wide else 20, _FLAGS, 0, 0, 0x21)  # 1 January 1980, the first day of zip's calendar
        self.put(struct.pack("<I5H3I2H", 0x04034B50, *fixed, 0, length, length, len(encoded), len(extra)))
        self.put(encoded + extra)
        start, crc = self.at, 0
        for chunk in chunks:
            crc = zlib.crc32(chunk, crc)
            self.put(chunk)
        count = self.at - start
        self.put(struct.pack("<IIQQ" if wide else "<IIII", 0x08074B50, crc, count, count))
        self._list(encoded, fixed, crc, count, header)

    def _list(self, encoded: bytes, fixed: tuple[int, ...], crc: int, count: int, header: int) -> None:
        full = [count >= WIDE, count >= WIDE, header >= WIDE]
        numbers = [count, count, header]
        wide = b"".join(struct.pack("<Q", number) for number, is_full in zip(numbers, full, strict=True) if is_full)
        extra = struct.pack("<HH", 1, len(wide)) + wide if wide else b""
        packed, plain, offset = (0xFFFFFFFF if is_full else n for n, is_full in zip(numbers, full, strict=True))
        head = struct.pack("<IH5H3I", 0x02014B50, 45, *fixed, crc, packed, plain)
        tail = struct.pack("<5H2I", len(encoded), len(extra), 0, 0, 0, 0, offset)
        self.directory.append(head + tail + encoded + extra)

    def finish(self) -> None:
        """Writes the central directory."""
        start, count = self.at, len(self.directory)
        self.put(b"".join(self.directory))
        size, end = self.at - start, self.at
        if start >= WIDE or size >= WIDE or count >= 0xFFFF:
            self.put(struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, start))
            self.put(struct.pack("<IIQI", 0x07064B50, 0, end, 1))
        few = min(count, 0xFFFF)
        small = (min(size, 0xFFFFFFFF), 0xFFFFFFFF if start >= WIDE else start)
        self.put(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, few, few, *small, 0))


# ---- the pickle ----------------------------------------------------------------------------------------------


def _pickle(items: Sequence[Item]) -> bytes:
    tree: dict[str, Any] = {}
    for i, item in enumerate(items):
        node = tree
        for key in item.keys[:-1]:
            node = node.setdefault(key, {})
            if type(node) is not dict:
                raise RenameClash(f"{item.name} would go into {key!r}, which is a leaf")
        if item.keys[-1] in node:
            raise RenameClash(f"{item.name}: another leaf or container has that path")
        node[item.keys[-1]] = i
    return b"\x80\x02" + b"".join(_dict(tree, items)) + b"."


def _dict(tree: dict[str, Any], items: Sequence[Item]) -> Iterator[bytes]:
    yield b"}("
    for key, child in tree.items():
        yield _text(key)
        if type(child) is dict:
            yield from _dict(child, items)
        else:
            yield _tensor(child, items[child])
    yield b"u"


def _tensor(number: int, item: Item) -> bytes:
    shape, dtype = item.spec.shape, item.spec.dtype
    strides: list[int] = []
    step = 1
    for length in reversed(shape):
        strides.insert(0, step)
        step *= max(length, 1)
    kind = _STORAGES.get(dtype)
    if kind:
        function, storage, count = "_rebuild_tensor_v2", f"torch\n{kind}Storage", item.spec.size
    else:
        function, storage, count = "_rebuild_tensor_v3", "torch.storage\nUntypedStorage", item.nbytes
    reference = _text("storage") + f"c{storage}\n".encode() + _text(str(number)) + _text("cpu") + _integer(count)
    return b"".join(
        [
            f"ctorch._utils\n{function}\n".encode(),
            b"((" + reference + b"tQ",
            _integer(0) + _tuple(shape) + _tuple(strides),
            b"\x89ccollections\nOrderedDict\n)R",  # no gradient, no hooks
            b"" if kind else f"ctorch\n{dtype}\n".encode(),
            b"tR",
        ]
    )


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(9, "little")
    return b"\x8a" + bytes([len(raw)]) + raw


def _tuple(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
