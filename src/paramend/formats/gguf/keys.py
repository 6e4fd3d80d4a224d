"""Keys and values of a GGUF file: how they are read and written, and as the configuration that they are.

A value is a `str`, a bool, a number of numpy, whose dtype is its type in the file, or an array: of numpy for numbers, a
list for texts and for arrays.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from paramend.errors import BadArgument
from paramend.formats.files import OpenFile
from paramend.formats.jsontext import bad
from paramend.formats.limits import shown
from paramend.leaves.specs import Array

ALIGNMENT = "general.alignment"
# The keys that say which part of a model a file is.
SPLIT = "split."
# Longer headers are refused: the largest vocabularies take a tenth of it.
MAX_HEADER = 1 << 28
# Longer arrays, as those of tokens, are kept as they are, and are no part of the configuration.
_FEW = 4096
_TYPES = dict(enumerate(["u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", "text", "array", "<u8", "<i8", "<f8"]))
_CODES = {np.dtype(code): number for number, code in _TYPES.items() if code not in ("text", "array")}
_WINDOW = 1 << 20


class Cursor:
    """The header of a file, read from its first byte on, in bounded memory."""

    def __init__(self, file: OpenFile) -> None:
        self.file, self.at = file, 0
        self.wide = True  # whether counts and lengths have 64 bits: not in the first version
        self._window, self._start = b"", 0

    def bad(self, reason: str, at: int | None = None) -> Exception:
        """The error for a fault at a byte, by default the next one."""
        return bad(str(self.file.path), f"byte {self.at if at is None else at}", reason)

    @property
    def left(self) -> int:
        return min(self.file.size, MAX_HEADER) - self.at

    def take(self, nbytes: int, what: str) -> bytes:
        if nbytes > self.left:
            most = "a header may have" if self.file.size > MAX_HEADER else "are there"
            raise self.bad(f"{what} takes {nbytes:,} bytes, and no more than {max(self.left, 0):,} {most}")
        first = self.at - self._start
        if first + nbytes > len(self._window):
            self._start, first = self.at, 0
            self._window = self.file.read(self.at, min(max(nbytes, _WINDOW), self.file.size - self.at))
        self.at += nbytes
        return self._window[first : first + nbytes]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def count(self, what: str, least: int = 1) -> int:
        """A count of things that take so many bytes at least."""
        at, found = self.at, self.u64(what) if self.wide else self.u32(what)
        if found * least > self.left:
            raise self.bad(f"{what} is {found:,}, for which {max(self.left, 0):,} bytes are too few", at)
        return found

    def text(self, what: str) -> str:
        """A string; bytes that are not UTF-8 are kept as half surrogate pairs."""
        return self.take(self.count(f"the length of {what}"), what).decode("utf-8", "surrogateescape")

    def value(self, what: str, kind: int | None = None, depth: int = 0) -> Any:
        """A value of a type, which comes first if it is not known."""
        at, kind = self.at, self.u32(f"the type of {what}") if kind is None else kind
        code = _TYPES.get(kind)
        if code == "text":
            return self.text(what)
        if code == "array" and depth < 4:
            return self._array(what, depth)
        if code is None or code == "array":
            why = "nests arrays" if code else f"has the type {kind}, which is unknown"
            raise self.bad(f"{what} {why}", at)
        return self._numbers(1, code, what)[0]

    def _array(self, what: str, depth: int) -> Any:
        kind = self.u32(f"the type in {what}")
        code = _TYPES.get(kind, "")
        if code in ("text", "array", ""):
            count = self.count(f"the length of {what}", 8 if self.wide else 4)
            near = self._near if code == "text" else lambda: None
            return [self.value(what, kind, depth + 1) if (text := near()) is None else text for _ in range(count)]
        return self._numbers(self.count(f"the length of {what}", np.dtype(code).itemsize), code, what)

    def _near(self) -> str | None:
        """The next string if it is in the window, as most of a hundred thousand tokens are; else None."""
        width, at = 8 if self.wide else 4, self.at - self._start
        stop = at + width + int.from_bytes(self._window[at : at + width], "little")
        if stop > len(self._window) or stop - at > self.left:
            return None
        self.at += stop - at
        return self._window[at + width : stop].decode("utf-8", "surrogateescape")

    def _numbers(self, count: int, code: str, what: str) -> Array:
        at, dtype = self.at, np.dtype(code)
        data = self.take(count * dtype.itemsize, what)
        if code == "?" and data.strip(b"\0\1"):
            raise self.bad(f"{what} is neither true nor false", at)
        return np.frombuffer(data, dtype)


def written(key: str, value: Any) -> bytes:
    """A key with its value."""
    kind, data = _typed(key, value)
    return _text(key) + struct.pack("<I", kind) + data


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def _typed(key: str, value: Any) -> tuple[int, bytes]:
    if isinstance(value, str):
        return 8, _text(value)
    if not isinstance(value, list | np.ndarray):
        number = np.asarray(value)
        return _CODES[number.dtype], number.tobytes()
    if isinstance(value, np.ndarray):
        kind, data = _CODES[value.dtype], value.tobytes()
    else:
        nested_ = bool(value) and not isinstance(value[0], str)
        kind, data = 9 if nested_ else 8, b"".join(_typed(key, each)[1] if nested_ else _text(each) for each in value)
    return 9, struct.pack("<IQ", kind, len(value)) + data


# ---- as a configuration ------------------------------------------------------------------------------------------


def nested(metadata: Mapping[str, Any], *, every: bool = False) -> dict[str, Any]:
    """The values by the pieces of their keys, as JSON has them; long arrays, such as those of tokens, if asked for.

    >>> nested({"general.name": "m", "llama.rope.freq_base": np.float32(1e-5), "a": "", "a.b": np.uint8(3)})
    {'general': {'name': 'm'}, 'llama': {'rope': {'freq_base': 1e-05}}, 'a': '', 'a.b': 3}
    """
    found: dict[str, Any] = {}
    for key, value in metadata.items():
        if _is_long(value) and not every:
            continue
        part, pieces = found, key.split(".")
        for at in range(1, len(pieces)):
            if ".".join(pieces[:at]) in metadata:  # a value, in which nothing can be
                pieces[at - 1 :] = [".".join(pieces[at - 1 :])]
                break
            part = part.setdefault(pieces[at - 1], {})
        part[pieces[-1]] = _plain(value)
    return found


def as_json(metadata: Mapping[str, Any]) -> bytes:
    """The values as the text of a configuration; half surrogate pairs are bytes that are not UTF-8."""
    return json.dumps(nested(metadata), indent=2).encode()


def entered(metadata: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with what a configuration says; a value that changes keeps its type.

    Raises:
        BadArgument: a value has another type than the one that is there, or one that GGUF lacks.

    >>> entered({"llama.block_count": np.uint32(2)}, {"llama": {"block_count": 3}, "general": {"name": "m"}})
    {'llama.block_count': np.uint32(3), 'general.name': 'm'}
    """
    new = dict(_flat(values))
    found: dict[str, Any] = {}
    for key, old in metadata.items():
        if key not in new and _is_long(old):
            found[key] = old
        elif key in new:
            value = new.pop(key)
            found[key] = old if _plain(old) == value else _like(key, value, old)
    found |= {key: _like(key, value, None) for key, value in new.items()}
    alignment(found)
    return found


def alignment(metadata: Mapping[str, Any]) -> int:
    """What the offsets of tensors are multiples of; `BadArgument` for what is no power of two."""
    value = metadata.get(ALIGNMENT, 32)
    if not isinstance(value, int | np.integer) or value < 1 or value & (value - 1) or value > 1 << 20:
        raise BadArgument(f"{ALIGNMENT} is {value}, and no power of two", hint=f"{ALIGNMENT}: 32")
    return int(value)


def _is_long(value: Any) -> bool:
    return isinstance(value, list | np.ndarray) and len(value) > _FEW


def _plain(value: Any) -> Any:
    """A value as JSON has it: a float32 with no more digits than it needs."""
    if isinstance(value, list | np.ndarray):
        return [_plain(each) for each in value]
    if isinstance(value, np.float32):
        return float(str(value))
    return value.item() if isinstance(value, np.generic) else value


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def _like(key: str, value: Any, old: Any) -> Any:
    """A value of JSON as one of GGUF, of the type of another."""
    dtype, many = getattr(old, "dtype", None), value if isinstance(value, list) else [value]
    if any(isinstance(each, list) for each in many):
        return [_like(key, each, None) for each in many]
    if dtype is None and all(isinstance(each, str) for each in many):
        return value
    if not isinstance(old, str) and all(isinstance(each, bool | int | float) for each in many):
        found = _numbers(many, dtype, single=many is not value)
        if found is not None:
            return found if many is value else found[0]
    there = "can be no value of GGUF" if old is None else f"is {'a text' if dtype is None else dtype.name} there"
    raise BadArgument(f"{key}: {shown(str(value))} is {type(value).__name__}, and {there}")


def _numbers(values: list[Any], dtype: np.dtype[Any] | None, *, single: bool) -> Array | None:
    """Numbers, or bools, of a dtype, else of the first one that holds them; None if none does."""
    for kind in map(np.dtype, _codes(values, single=single)) if dtype is None else [dtype]:
        with suppress(OverflowError):
            found = np.array(values, kind)
            if kind.kind == "f" or found.tolist() == values:
                return found
    return None


def _codes(values: list[Any], *, single: bool) -> list[str]:
    """The types that new numbers may get, as the package of llama.cpp gives them."""
    kinds = {type(each) for each in values}
    if bool in kinds:
        return ["?"] if len(kinds) == 1 else []
    if float in kinds:
        return ["<f4"]
    return ["<u4", "<i4", "<u8", "<i8"] if single else ["<i4", "<u4", "<i8", "<u8"]
