"""`DcpWriter`: distributed checkpoints that `torch.distributed.checkpoint` loads on any mesh, written without torch."""

import contextlib
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from paramend.disk.io import put, write_file
from paramend.formats.dcp.metadata import (
    METADATA,
    SUFFIX,
    Chunk,
    Entry,
    Item,
    Manifest,
    check_apart,
    metadata_bytes,
    moved_path,
)
from paramend.formats.files import OpenFile
from paramend.formats.source import Data, Item as Leaf, Writer
from paramend.formats.torch.rebuilds import Tensor
from paramend.formats.torch.writer import TorchWriter, pickled, tensor
from paramend.formats.zips import ZipHeaders
from paramend.leaves.outlines import Keys, Outline, Place
from paramend.leaves.specs import Spec

# The most bytes of a chunk, which a rank that loads a part of it reads as a whole, and about those of a file.
MAX_CHUNK, MAX_FILE = 1 << 28, 1 << 32
_PIECE = 1 << 20


class DcpWriter(Writer):
    """Writes directories as `FileSystemWriter` of one rank does. Objects of an edited checkpoint are carried."""

    def refusal(self, spec: Spec) -> str:
        return TorchWriter().refusal(spec)

    def write(self, folder: Path, items: Sequence[Leaf], data: Data, outline: Outline, base: Any) -> None:
        """Fill an empty folder with a checkpoint; see `OrbaxWriter.write`."""
        form = getattr(base, "format", "")
        old: Manifest = base.manifest if form == "dcp" else Manifest({})
        flat = form in ("safetensors", "npz")  # their names are as they are
        places = {value.number: (keys, value) for keys, value in outline.entries if type(value) is Place}
        keys = [_keys(places[at][0]) for at in range(len(items))]
        named = flat or form == "dcp"
        names = [leaf.name if named else ".".join(map(str, own)) for leaf, own in zip(items, keys, strict=True)]
        check_apart(names, old)
        tensors: dict[str, Entry] = {}
        with contextlib.closing(_Files(folder)) as files:
            objects = {name: files.carry(base.path, item) for name, item in old.objects.items()}
            for at, (name, leaf) in enumerate(zip(names, items, strict=True)):
                whole = Tensor(leaf.spec.shape, (), leaf.spec.dtype)
                tensors[name] = Entry(whole, tuple(files.leaf(leaf.spec, data(at))))
        paths = {name: old.paths[name] for name in objects if name in old.paths}
        before = list(old.tensors)
        for at, name in enumerate(names):
            like = places[at][1].like
            was = old.paths.get(before[like]) if form == "dcp" and like >= 0 else None
            paths[name] = (name,) if flat else keys[at] if was is None else moved_path(was, name)
        found = replace(old, tensors=tensors, objects=objects, paths=paths)
        write_file(folder / METADATA, metadata_bytes(found))


def _keys(keys: Keys) -> tuple[str | int, ...]:
    return tuple(key if type(key) in (str, int) else str(key) for key in keys or ("",))


def chunk_sizes(spec: Spec) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The chunks that a leaf is written in, (offsets, sizes): rows of it, first to last."""
    if not spec.shape or spec.nbytes <= MAX_CHUNK:
        yield (0,) * spec.ndim, spec.shape
        return
    rows = max(MAX_CHUNK * spec.shape[0] // spec.nbytes, 1)
    for start in range(0, spec.shape[0], rows):
        count = min(rows, spec.shape[0] - start)
        yield (start, *[0] * (spec.ndim - 1)), (count, *spec.shape[1:])


@dataclass
class _Files:
    """The files of a checkpoint that is written: the next begins where one is full."""

    folder: Path
    name: str = ""
    count: int = 0
    at: int = 0
    target: int = -1

    def begin(self) -> tuple[str, int]:
        if self.target < 0 or self.at >= MAX_FILE:
            self.close()
            self.name, self.at = f"__0_{self.count}{SUFFIX}", 0
            self.target = os.open(self.folder / self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self.count += 1
        return self.name, self.at

    def close(self) -> None:
        if self.target >= 0:
            os.close(self.target)
        self.target = -1

    def put(self, piece: bytes | memoryview) -> None:
        self.at += put(self.target, piece)

    def carry(self, home: Path, item: Item) -> Item:
        """An object of another checkpoint, byte for byte."""
        name, start = self.begin()
        with contextlib.closing(OpenFile(home / item.file)) as file:
            for at in range(0, item.nbytes, _PIECE):
                self.put(file.read(item.start + at, min(_PIECE, item.nbytes - at)))
        return Item(name, start, item.nbytes, item.transforms)

    def leaf(self, spec: Spec, pieces: Iterator[memoryview]) -> Iterator[Chunk]:
        """The chunks of a leaf, each a file of `torch.save`."""
        rest = memoryview(b"")
        for offsets, sizes in chunk_sizes(spec):
            name, start = self.begin()
            part, zipped = Spec(sizes, spec.dtype), ZipHeaders()
            head = zipped.member("archive/data.pkl", pickled(tensor(part, "0")))
            for piece in (*head, *zipped.member("archive/byteorder", b"little")):
                self.put(piece)
            header = self.at
            self.put(zipped.open("archive/data/0", part.nbytes))
            left, crc = part.nbytes, 0
            while left:
                rest = rest if len(rest) else next(pieces)
                crc = zlib.crc32(rest[:left], crc)
                self.put(rest[:left])
                left, rest = left - len(rest[:left]), rest[left:]
            put(self.target, crc.to_bytes(4, "little"), header + 14)
            self.put(zipped.close(crc))
            for piece in (*zipped.member("archive/version", b"3\n"), zipped.finish()):
                self.put(piece)
            yield Chunk(offsets, sizes, Item(name, start, self.at - start))
        next(pieces, None)  # at its end it checks how much it yielded
