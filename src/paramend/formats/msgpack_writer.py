"""`MsgpackWriter`: files as `flax.serialization.to_bytes` writes them, without flax."""

import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from paramend.errors import Unsupported
from paramend.formats.source import Item, LeafBytes, Parts, Writer, outline_of_items
from paramend.leaves.outlines import ATOMS, BOXED, Keys, Outline, Place, once
from paramend.leaves.specs import BITS, Spec

ARRAY, COMPLEX, SCALAR = 1, 2, 3
# flax splits arrays of more than 1 GB into flat pieces, and writes a map in their place.
CHUNKED = "__msgpack_chunked_array__"
# A test sets it low.
MAX_CHUNK = 1 << 30


class Extension(NamedTuple):
    """A value of a kind that flax does not write: the number of the kind, and its bytes."""

    code: int
    data: bytes


class MsgpackWriter(Writer):
    """Lays out files that `flax.serialization.from_bytes` reads: nested maps of arrays and plain values, by their keys.
    Lists and tuples become maps by position, as flax writes them; those of a msgpack file stay lists. The metadata of
    other formats is left out: flax would take it for parameters."""

    def refusal(self, spec: Spec) -> str:
        return f"flax cannot write {spec.dtype}" if BITS.get(spec.dtype, 1) % 8 else ""

    def holds(self, value: Any) -> bool:
        if isinstance(value, list | tuple) and type(value) is not Extension:
            return all(map(self.holds, value))
        if isinstance(value, np.generic):
            value = value.item()
        if type(value) is int:
            return -(1 << 63) <= value < 1 << 64
        return type(value) in ATOMS or type(value) is Extension or (type(value) in (dict, OrderedDict) and not value)

    def parts(self, items: Sequence[Item], metadata: Mapping[str, Any], outline: Outline | None = None) -> Parts:
        return _emit(self._tree(outline or outline_of_items(items)), items)

    def _tree(self, outline: Outline) -> Any:
        own, holds = outline.format == "msgpack", once(self.holds)
        held = ((keys, value) for keys, value in outline.entries if type(value) is Place or holds(value))
        entries = [(_path(keys, value, own=own), value) for keys, value in held]
        containers = outline.containers if own else {}
        return Outline(entries, containers).nested(lambda value: value if own else _as_flax(value))


def _path(keys: Keys, value: Any, *, own: bool) -> Keys:
    """Keys as flax writes them; those of a msgpack file may be whole numbers. Boxes of metadata are maps."""
    path = tuple(key if type(key) is int and own else str(key) for key in keys)
    return (*path, BOXED) if type(value) is Place and value.boxed == "box" else path


def _as_flax(value: Any) -> Any:
    """A value as flax writes it: lists and tuples become maps by position."""
    if type(value) is Place or not isinstance(value, list | tuple) or type(value) is Extension:
        return value
    return {str(at): _as_flax(each) for at, each in enumerate(value)}


def _emit(node: Any, items: Sequence[Item]) -> Parts:
    if type(node) is Place:
        yield from _item(node.number, items[node.number])
    elif isinstance(node, dict):
        yield _count(node, (0x80, 15), 0xDE)
        for key, child in node.items():
            yield _plain(key)
            yield from _emit(child, items)
    elif type(node) in (list, tuple):
        yield _count(node, (0x90, 15), 0xDC)
        for child in node:
            yield from _emit(child, items)
    else:
        yield _plain(node)


def _item(place: int, item: Item) -> Parts:
    shape, dtype = item.spec.shape, item.spec.dtype
    if item.nbytes <= MAX_CHUNK:
        yield _head(shape, dtype, item.nbytes)
        yield LeafBytes(place, 0, item.nbytes)
        return
    width = BITS[dtype] // 8
    most = max(MAX_CHUNK // width, 1) * width
    starts = range(0, item.nbytes, most)
    yield b"\x83" + _plain(CHUNKED) + _plain(True) + _plain("shape")
    yield from _emit({str(i): axis for i, axis in enumerate(shape)}, [])
    yield _plain("chunks") + _count(starts, (0x80, 15), 0xDE)
    for i, start in enumerate(starts):
        stop = min(start + most, item.nbytes)
        yield _plain(str(i)) + _head(((stop - start) // width,), dtype, stop - start)
        yield LeafBytes(place, start, stop)


def _head(shape: tuple[int, ...], dtype: str, nbytes: int) -> bytes:
    """The bytes that precede those of an array."""
    inner = b"\x93" + _count(shape, (0x90, 15), 0xDC) + b"".join(map(_plain, shape)) + _plain(dtype)
    inner += _sized(nbytes, 0xC4)
    length = len(inner) + nbytes
    return _sized(length, 0xC7) + bytes([ARRAY]) + inner


def _plain(value: Any) -> bytes:
    """A value that holds no others."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) is bool:
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if type(value) is int:
        if -32 <= value < 128:
            return struct.pack(">b" if value < 0 else ">B", value)
        return (b"\xcf" + struct.pack(">Q", value)) if value >= 0 else (b"\xd3" + struct.pack(">q", value))
    if type(value) is float:
        return b"\xcb" + struct.pack(">d", value)
    if type(value) is bytes:
        return _sized(len(value), 0xC4) + value
    if type(value) is complex:
        return b"\xc7\x13" + bytes([COMPLEX]) + b"\x92" + _plain(value.real) + _plain(value.imag)
    if type(value) is Extension:
        return _sized(len(value.data), 0xC7) + struct.pack(">b", value.code) + value.data
    encoded: bytes = value.encode()
    if len(encoded) < 32:
        return bytes([0xA0 | len(encoded)]) + encoded
    return _sized(len(encoded), 0xD9) + encoded


_FORMS = ((">B", 1 << 8), (">H", 1 << 16), (">I", 1 << 32))


def _sized(length: int, first: int, forms: Sequence[tuple[str, int]] = _FORMS) -> bytes:
    """The head of a value of so many bytes, for lengths of one, two or four bytes."""
    for step, (form, most) in enumerate(forms):
        if length < most:
            return bytes([first + step]) + struct.pack(form, length)
    raise Unsupported(f"a msgpack value cannot have {length:,} bytes")


def _count(values: Any, short: tuple[int, int], first: int) -> bytes:
    if len(values) <= short[1]:
        return bytes([short[0] | len(values)])
    return _sized(len(values), first, _FORMS[1:])
