"""Directories of slime: one compressed stream for each leaf that changed, and checksums of the outcome.

    weight_v000007/model.safetensors.index.json    metadata: version, base_version, delta_encoding, compression_format,
                                                   checksum_format; weight_map: leaf → file
    weight_v000007/model-00000-of-00001.safetensors    leaf → uint8: a stream of zstd; metadata: leaf → checksum

A stream of `xor` holds, for every byte of the leaf, what old and new differ in. One of `overwrite` holds the number of
bytes that change, as uint32, their positions, each as uint32, and the new bytes.
Source: slime, "Delta Weight Sync", and `overwrite_encode` in `slime/utils/disk_delta.py`.
"""

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from paramend._optional import need
from paramend.deltas.checksums import Checksum
from paramend.deltas.manifest import LeafRow
from paramend.deltas.payload import SPAN, Changes, Payload, Table, Window, itemsize_of
from paramend.disk.io import write_file
from paramend.errors import BadCheckpoint, Unsupported
from paramend.formats.registry import open_source
from paramend.formats.safetensors import SafetensorsFile
from paramend.formats.shards import index_text, read_index
from paramend.leaves.specs import Array, Spec
from paramend.reports.progress import Meter, Progress

if TYPE_CHECKING:
    from paramend.deltas.delta import Delta

INDEX, _FILE = "model.safetensors.index.json", "model-00000-of-00001.safetensors"
_VERSION = re.compile(r"weight_v(\d{1,18})").fullmatch
_FORMATS = get_args(Checksum)[1:]


class SlimePayload(Payload):
    """The streams of a directory."""

    _numbers: Mapping[str, int] = {}  # neither new leaves nor other files

    def __init__(self, files: dict[str, SafetensorsFile], *, xor: bool) -> None:
        self._files, self.xor = files, xor

    @property
    def nbytes(self) -> int:
        return sum(file.header.data_nbytes for file in set(self._files.values()))

    def _windows(self, name: str, nbytes: int, itemsize: int) -> Iterator[Window]:
        found = _xored(self._stream(name), nbytes) if self.xor else self._overwritten(name, nbytes)
        done = 0
        for window in found:
            fault = window.fault(nbytes, 1) or ("its positions do not ascend" if window.start < done else "")
            if fault:
                raise _bad(self._files[name], name, fault)
            done = window.stop
            yield window

    def _stream(self, name: str) -> "_Stream":
        return _Stream(self._files[name], name)

    def _overwritten(self, name: str, nbytes: int) -> Iterator[Window]:
        places, values = self._stream(name), self._stream(name)
        count = int(places.take(4).view("<u4")[0])
        if count > nbytes:
            raise _bad(self._files[name], name, f"it changes {count:,} bytes of {nbytes:,}")
        for at in range(0, 4 + 4 * count, SPAN):
            values.take(min(SPAN, 4 + 4 * count - at))
        for at in range(0, count, SPAN // 4):
            some = min(SPAN // 4, count - at)
            positions = places.take(4 * some).view("<u4")
            first = int(positions[0])
            yield Window(first, values.take(some), positions - np.uint32(first))
        values.end()


def _xored(stream: "_Stream", nbytes: int) -> Iterator[Window]:
    for start in range(0, nbytes, SPAN):
        found = stream.take(min(SPAN, nbytes - start))
        places = np.flatnonzero(found)
        if len(places):
            yield Window(start, found[places], places, xor=True)
    stream.end()


class _Stream:
    """What a compressed tensor of a file holds, first to last."""

    def __init__(self, file: SafetensorsFile, name: str) -> None:
        zstd = need("zstandard", extra="deltas", to="read deltas of slime")
        number = file.names.index(name)
        raw = file.read_range(number, 0, file.spec(number).size)
        self._file, self._name, self._error = file, name, zstd.ZstdError
        self._reader = zstd.ZstdDecompressor().stream_reader(io.BytesIO(raw.tobytes()))

    def take(self, count: int) -> Array:
        try:
            data = self._reader.read(count)
        except self._error as error:
            raise _bad(self._file, self._name, f"it is damaged: {error}") from None
        if len(data) != count:
            raise _bad(self._file, self._name, "its stream is too short for the leaf")
        return np.frombuffer(data, np.uint8)

    def end(self) -> None:
        if self._reader.read(1):
            raise _bad(self._file, self._name, "its stream is too long for the leaf")


def _bad(file: SafetensorsFile, name: str, reason: str) -> BadCheckpoint:
    return BadCheckpoint(f"{file.path}: tensor {name!r:.120}: {reason}; nothing was changed")


def metadata_of(folder: Path) -> dict[str, Any] | None:
    """What the index of a directory says of the delta that it is; None if it is none."""
    found = read_index(folder / INDEX).table.get("metadata") if (folder / INDEX).is_file() else None
    return found if found and "delta_encoding" in found else None


def read(folder: Path) -> dict[str, Any]:
    """The attributes of a delta of slime in a directory."""
    metadata = metadata_of(folder) or {}
    encoding = metadata.get("delta_encoding")
    if encoding not in ("xor", "overwrite") or metadata.get("compression_format") != "zstd":
        said = f"{encoding!r:.40} in {metadata.get('compression_format')!r:.40}"
        raise Unsupported(f"{folder / INDEX}: {said} is not among the encodings of slime that are known")
    checksum = metadata.get("checksum_format")
    if checksum not in _FORMATS:
        raise Unsupported(f"{folder / INDEX}: {checksum!r:.40} is not a checksum that is known")
    source: Any = open_source(folder)
    rows, files = list[LeafRow](), dict[str, SafetensorsFile]()
    for file in source.files:
        for number, name in enumerate(file.names):
            if file.spec(number).dtype != "uint8" or name not in file.metadata:
                raise _bad(file, name, "it is no stream of bytes with a checksum")
            rows.append(LeafRow((name,), (name,), None, None, "", file.metadata[name], held=name))
            files[name] = file
    xor = encoding == "xor"
    found = {"rows": tuple(rows), "files": (), "checksum": checksum, "xor": xor, "separator": ".", "said": ()}
    return found | {"payload": SlimePayload(files, xor=xor)}


def write(delta: "Delta", folder: Path, name: str, progress: Progress | None) -> None:
    """Write a delta as slime has it. `Unsupported` if it holds what slime cannot express."""
    if delta.checksum not in _FORMATS:
        hint = 'pm.delta(before, after, checksum="xxh3-128"); paramend delta A B --slime -o D'
        raise Unsupported(f"slime has no checksums of {delta.checksum}", hint=hint)
    other = [delta.called(row) for row in delta.rows if row.kind not in ("changed", "kept")]
    other += [row.name for row in delta.files]
    if other:
        raise Unsupported(f"slime can only change values, and the delta does more: {', '.join(other[:4])}")
    rows, zstd = delta.of_kind("changed"), need("zstandard", extra="deltas", to="write deltas of slime")
    meter = Meter(progress, sum(row.nbytes for row in rows))
    with closing(Table()) as table:
        for row in rows:
            called = delta.called(row)
            changes = delta.payload.changes(row.held, row.nbytes, 1 if row.spec is None else itemsize_of(row.spec))
            pieces = _xor(changes, row.nbytes) if delta.xor else _overwrite(changes, row.nbytes, called)
            compressor = zstd.ZstdCompressor(level=1).compressobj()
            packed = [*(compressor.compress(piece.data) for piece in pieces), compressor.flush()]
            table.add(called, Spec((sum(map(len, packed)),), "uint8"), packed)
            meter.advance(row.nbytes, called)
        table.write(folder / _FILE, {delta.called(row): row.result for row in rows})
    found = _VERSION(name)
    version = int(found[1]) if found else 1
    metadata = {"version": f"{version:06d}", "base_version": f"{max(version - 1, 0):06d}"}
    metadata |= {"delta_encoding": "xor" if delta.xor else "overwrite", "compression_format": "zstd"}
    metadata |= {"checksum_format": delta.checksum}
    places = {delta.called(row): _FILE for row in rows}
    write_file(folder / INDEX, index_text({"metadata": metadata, "weight_map": places}))


def _xor(changes: Changes, nbytes: int) -> Iterator[Array]:
    for start in range(0, nbytes, SPAN):
        buffer = np.zeros(min(SPAN, nbytes - start), np.uint8)
        changes.put(buffer, start)
        yield buffer


def _overwrite(changes: Changes, nbytes: int, name: str) -> Iterator[Array]:
    if nbytes > 1 << 32:
        raise Unsupported(f"{name} has {nbytes:,} bytes, and slime counts positions in 32 bits", hint='encoding="xor"')
    count = sum(len(places) for places, _ in _bytes(changes, nbytes))
    yield np.array([count], "<u4").view(np.uint8)
    for places, _ in _bytes(changes, nbytes):
        yield places.astype("<u4").view(np.uint8)
    for _, values in _bytes(changes, nbytes):
        yield values


def _bytes(changes: Changes, nbytes: int) -> Iterator[tuple[Array, Array]]:
    """The bytes that change: where they are, and what they become."""
    for start in range(0, nbytes, SPAN):
        buffer, mask = np.zeros((2, min(SPAN, nbytes - start)), np.uint8)
        changes.put(buffer, start, mask)
        places = np.flatnonzero(mask)
        yield places + start, buffer[places]
