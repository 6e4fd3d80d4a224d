"""`Accesses`: who may do what with each file of an output: what all that it is made from, or replaces, allows."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from paramend.disk.permissions import NEW_FILE, NEW_FOLDER, PRIVATE, Access, access_of, files_in, of_folder, reach
from paramend.disk.urls import Url
from paramend.edits.plan import Plan, Row
from paramend.formats.gathered import Gathered
from paramend.formats.registry import SUFFIXES, is_tree
from paramend.formats.shards import Shards
from paramend.formats.source import Chunked
from paramend.leaves.origins.stored import Stored
from paramend.piecewise.rows import expression
from paramend.rewriting.arrangement import base_of
from paramend.rewriting.files import Computed, Copy, File, sources

_Found = Mapping[Path, os.stat_result]


class Accesses:
    """The access of each file and folder of an output, from all files that a plan reads, and what its output replaces.

    Files that are copied with edits stay as open as they are, in folders that stay as open as they are.
    """

    def __init__(self, made: Plan, out: Path, *, folder: bool) -> None:
        self._made, self._out = made, out
        self._read: dict[int, _Found] = {}
        self._homes: dict[Path, os.stat_result] = {}
        for source in _each(sources(made)):
            home = _home(source)
            status = None if home is None else _status(home)
            if home is not None and status is not None:
                self._homes[home] = status
            self._read[id(source)] = _files(source, home)
        self._all: dict[Path, os.stat_result] = {}
        for found in self._read.values():
            self._all |= found
        self._home = _home(base_of(made)) if folder else None
        self._chunks = is_tree(out)  # then all its files hold weights
        self._old = {path.relative_to(out).as_posix(): status for path, status in files_in(out)} if folder else {}

    @property
    def read(self) -> _Found:
        """The files that are read, each as it was when this was made."""
        return self._all

    def read_by(self, row: Row) -> set[Path]:
        found: set[Path] = set()
        for each in expression(self._made.leaves, row).stored():
            if not isinstance(each, Stored):
                continue
            if each.extent is not None:
                found.add(each.extent.path)
            else:
                found |= set(self._read.get(id(each.source), ()))
        return found

    def read_for(self, file: File) -> set[Path]:
        """The files that a file is made from."""
        read = {piece.path for piece in file.pieces if isinstance(piece, Copy)}
        read |= set() if file.origin is None else {file.origin}
        rows = {id(piece.row): piece.row for piece in file.pieces if isinstance(piece, Computed)}
        for row in rows.values():
            read |= self.read_by(row)
        return read

    def of_file(self, file: File, read: set[Path] | None = None) -> Access:
        """The access of a file; `read` are those that it is made from, if they are known."""
        read = self.read_for(file) if read is None else read
        return self._of(read or self._all, file.name, derived=file.origin is None)

    def of_all(self, name: str) -> Access:
        """The access of a file, at a path within the output, that tells of everything that is read."""
        return self._of(self._all, name, derived=True)

    def of_chunks(self, name: str) -> Access:
        """The access of a file of a checkpoint that is a directory, whose format writes it."""
        same = None if self._home is None else self._home / name
        return self._of([*self._all, *([same] if same is not None and same.is_file() else [])], name, derived=True)

    def of_folder(self, name: str = "") -> Access:
        """The access of the output, or of a folder in it."""
        if self._home is not None:
            status = _status(self._home / name) or _status(self._home)
            found = access_of([] if status is None else [status], new=NEW_FOLDER)
        elif self._all:
            found = of_folder(access_of(self._all.values()))
        else:
            found = NEW_FOLDER
        old = self._out / name
        if old.is_dir():
            status = old.stat()
            gids = found.gids | {status.st_gid}
            found = replace(found.within(status.st_mode), uid=status.st_uid, gid=status.st_gid, gids=gids)
        return replace(found, mode=found.mode | PRIVATE)

    def _of(self, read: Iterable[Path], name: str, *, derived: bool) -> Access:
        statuses = {path: self._all.get(path) or _status(path) for path in read}
        found = {path: status for path, status in statuses.items() if status is not None}
        old = self._old.get(name) if name or self._home is not None else _status(self._out)
        access = access_of(found.values(), old, new=NEW_FILE)
        for home, status in self._homes.items():
            if home != self._home and any(path.is_relative_to(home) for path in found):
                access = access.within(reach(status))
        if derived or name not in self._old:
            for other, status in self._old.items():
                if self._chunks or other.lower().endswith(SUFFIXES):
                    access = access.within(status.st_mode)
        return access


def _each(found: Iterable[Any]) -> Iterator[Any]:
    for source in found:
        yield from source.sources if isinstance(source, Gathered) else [source]


def _home(source: Any) -> Path | None:
    path = getattr(source, "path", None)
    if not isinstance(path, Path) or not (isinstance(source, Shards | Chunked)):
        return None
    return path if path.is_dir() else path.parent


def _files(source: Any, home: Path | None) -> _Found:
    """The files of a checkpoint, each as it is now."""
    if home is not None and isinstance(source, Chunked):
        return dict(files_in(home))
    return {path: _status(path) or then for path, then in getattr(source, "stats", {}).items()}


def _status(path: Path) -> os.stat_result | None:
    if isinstance(path, Url):  # it has no permissions
        return None
    try:
        return path.stat()
    except OSError:
        return None
