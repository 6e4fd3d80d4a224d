"""Distributed checkpoints of torch as sources: each tensor is its global array, put together when it is read."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paramend.disk.urls import path_of
from paramend.errors import BadCheckpoint
from paramend.formats.dcp.files import DistFile, ItemRow
from paramend.formats.dcp.metadata import METADATA, SUFFIX, Manifest, metadata_bytes, read_manifest, relabelled
from paramend.formats.dcp.writer import DcpWriter
from paramend.formats.files import OpenFile
from paramend.formats.source import Few, Gathering
from paramend.formats.tiles import Tile, assembled
from paramend.formats.torch.pickles import Foreign
from paramend.leaves.leaves import Index, separator_of, uncollected
from paramend.leaves.origins.boxes import Box
from paramend.leaves.origins.origin import Origin
from paramend.leaves.outlines import Keys, Outline, Place
from paramend.leaves.specs import Array
from paramend.reports import wording

WRITER = DcpWriter()


class Assembled(Gathering):
    """A source whose leaves are put together from chunks in several files."""

    format = ""
    ties: Mapping[int, int] = {}

    def __init__(self, path: Path, files: Sequence[Any], leaves: Mapping[str, Origin]) -> None:
        self.path = self.folder = path
        self.files = tuple(files)
        self._origins = list(leaves.values())
        self.index = Index.of_names(leaves, separator_of(leaves))

    def __repr__(self) -> str:
        leaves = wording.plural(len(self._origins), "leaf", "leaves")
        return f"<{self.path}: {leaves} in {wording.plural(len(self.files), 'file')}>"

    @property
    def sources(self) -> Sequence[Any]:
        return self.files

    def origin(self, number: int) -> Origin:
        return self._origins[number]

    def tiles(self, number: int) -> list[Tile]:
        """The chunks of a leaf."""
        return [each for each in self.origin(number).stored() if isinstance(each, Tile)]

    def read_box(self, number: int, box: tuple[slice, ...]) -> Array:
        """The elements of a leaf within a box."""
        places: Box = tuple(range(part.start, part.stop) for part in box)
        return self.origin(number).read_box(places)


class DcpCheckpoint(Assembled):
    """A directory of `torch.distributed.checkpoint` as `Leaves`: `.metadata`, and files of chunks."""

    format = "dcp"
    steps = ()

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = path_of(path)
        if not (path / METADATA).is_file():
            raise BadCheckpoint(
                f"{path}: {METADATA} is missing: the checkpoint was not finished, or not copied completely"
            )
        file = OpenFile(path / METADATA)
        with uncollected():
            try:
                self.manifest: Manifest = read_manifest(file)
            finally:
                file.close()
            self._own = {file.path: file.stat}
            files = _open_files(path, self.manifest)
            try:
                super().__init__(path, [*files.values()], dict(_leaves(files, self.manifest)))
            except BaseException:
                for each in files.values():
                    each.close()
                raise
        # What else is there, by name: its bytes are not read.
        self.metadata: Mapping[str, Any] = {
            name: Foreign(f"{item.nbytes:,} bytes") for name, item in self.manifest.objects.items()
        }

    @property
    def stats(self) -> Mapping[Path, os.stat_result]:
        return {**self._own, **super().stats}

    def outline(self) -> Outline:
        """What is there, at its place in the nested state dict."""
        paths = self.manifest.paths
        entries: list[tuple[Keys, Any]] = [
            (paths.get(name, (name,)), Place(number)) for number, name in enumerate(self.manifest.tensors)
        ]
        entries += [(paths.get(name, (name,)), value) for name, value in self.metadata.items()]
        lists: dict[Keys, Any] = {
            keys[:at]: [] for keys, _ in entries for at, key in enumerate(keys) if type(key) is int
        }
        return Outline(entries, lists, self.format)

    @property
    def objects(self) -> set[Path]:
        """The files that hold what is not a tensor."""
        return {self.path / item.file for item in self.manifest.objects.values()}

    def relabelled(self, names: Mapping[int, str]) -> tuple[Path, bytes, bytes]:
        old = list(self.manifest.tensors)
        found = relabelled(self.manifest, {old[number]: name for number, name in names.items()})
        return self.path / METADATA, (self.path / METADATA).read_bytes(), metadata_bytes(found)


def _open_files(path: Path, manifest: Manifest) -> dict[str, DistFile]:
    rows: dict[str, list[ItemRow]] = {}
    for name, entry in manifest.tensors.items():
        for chunk in entry.chunks:
            rows.setdefault(chunk.item.file, []).append(ItemRow(name, entry, chunk))
    for item in manifest.objects.values():
        rows.setdefault(item.file, [])
    missing = sorted(name for name in rows if not (path / name).is_file())
    if missing:
        there = wording.plural(len(missing), "file is", "files are")
        raise BadCheckpoint(
            f"{path}: {there} missing: {wording.listing(missing, 3)}", hint="copy or download the checkpoint again"
        )
    files: dict[str, DistFile] = {}
    try:
        for name, mine in rows.items():
            files[name] = DistFile(path / name, mine)
            files[name].release()
    except BaseException:
        for file in files.values():
            file.close()
        raise
    return files


def _leaves(files: Mapping[str, DistFile], manifest: Manifest) -> Any:
    few = Few()
    numbers = {id(row.chunk): number for file in files.values() for number, row in enumerate(file.rows)}
    for name, entry in manifest.tensors.items():
        tiles = [
            Tile(files[chunk.item.file], numbers[id(chunk)], chunk.offsets, str(chunk), few) for chunk in entry.chunks
        ]
        yield name, assembled(entry.spec, tiles, f"{next(iter(files.values())).path.parent}: {name}")


def is_checkpoint(path: Path) -> bool:
    """Whether a directory is a distributed checkpoint, whole or not."""
    try:
        with (path / METADATA).open("rb") as file:
            return file.read(1) == b"\x80" or any(path.glob(f"*{SUFFIX}"))
    except OSError:
        return any(path.glob(f"*{SUFFIX}"))


def home(path: Path) -> Path:
    """The folder of a checkpoint, where its undo records are: itself."""
    return path
