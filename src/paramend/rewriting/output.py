"""The place of an output: problems are found before anything is written."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Unpack

from paramend.disk.copying import BLOCK, share, shareable
from paramend.disk.failures import check_room, reason
from paramend.disk.publishing import exists, there, unpublished
from paramend.disk.uploads import check_writable
from paramend.disk.urls import Url, path_of
from paramend.edits.plan import Plan
from paramend.errors import CannotRead, CannotWrite, Unsupported
from paramend.formats.registry import SUFFIXES, find_format, home_of
from paramend.reports import wording
from paramend.rewriting.files import placed, sources
from paramend.rewriting.layouts import Layout, lay_out
from paramend.rewriting.wishes import How


def check_output(
    made: Plan, out: str | os.PathLike[str], *, force: bool = False, resume: bool = False, **how: Unpack[How]
) -> Layout:
    """The files that a rewrite will make, after all checks that are possible before anything is written. If it is to
    `resume`, what an earlier run left needs no more room."""
    layout = lay_out(made, out, **how)
    source: Any = made.leaves
    out = path_of(out)
    if isinstance(out, Url):
        check_writable(out)
        if resume:
            raise Unsupported(f"{out}: what is begun in a remote store is not taken up again", hint="without --resume")
        if layout.format.folder:
            raise Unsupported(
                f"{out}: {layout.format.says} are written by their own library, onto this machine",
                hint="-o with a path, then copy the directory into the store",
            )
    found = _look(out)
    if found is not None:
        _check_other(out, found, sources(made), folder=layout.folder)
        if layout.folder and not stat.S_ISDIR(found.st_mode):
            raise CannotWrite(f"{out} is a file, but the model needs a directory", hint="write to another name")
        if not layout.folder and stat.S_ISDIR(found.st_mode):
            raise CannotWrite(f"{out} is a directory", hint=f"{out / (source.path.name or 'model.safetensors')}")
        if not layout.folder and not stat.S_ISREG(found.st_mode):
            raise CannotWrite(f"{out} is not a regular file (it is a pipe, a device or a socket)")
    if there(out) and not force:
        raise exists(out)
    if layout.folder and found is not None:
        _check_replaceable(out)
    if isinstance(out, Url):
        return layout
    folder = out.parent
    if not folder.is_dir():
        what = "is not a directory" if there(folder) else "does not exist"
        raise CannotWrite(f"{out}: {folder} {what}", hint="" if there(folder) else f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CannotWrite(f"{out}: no permission to write into {folder}", hint=f"ls -ld {folder}")
    held = sum(map(_allocated, unpublished(out))) if resume else 0
    try:
        check_room(folder, layout.nbytes - held, str(out))
    except CannotWrite:
        check_room(folder, layout.nbytes - held - _shared(folder, layout), str(out))
    return layout


def _check_other(out: Path, found: os.stat_result, sources: Sequence[Any], *, folder: bool) -> None:
    """Raise for an output that is a source, a part of it, or a directory around the first source."""
    home = path_of(sources[0].path)
    paths = {home, *(path for source in sources for path in source.stats)}
    for path in paths:
        now = _look(path)
        if now is not None and os.path.samestat(now, found):
            what = "is the file that is being read" if path != home or path.is_file() else "is what is being read"
            raise CannotWrite(f"{out} {what}", hint="write to another name, then rename it")
    if folder and home.resolve().is_relative_to(out.resolve()):
        raise CannotWrite(f"{out} holds the checkpoint that is being read", hint="write to another name")


def _check_replaceable(out: Path) -> None:
    """Raise for a directory that is not a checkpoint, which even force=True must not replace."""
    inside = sorted(path.name for path in out.iterdir())
    row = find_format(out, b"")
    if row is not None and row.folder:
        steps = [name for name in inside if name.rpartition("_")[2].isdigit()]
        if home_of(out) != out and len(steps) > 1:
            raise CannotWrite(
                f"{out} holds {len(steps)} steps, which would all be lost: {wording.listing(steps, 4)}",
                hint="write to another name",
            )
        return
    if inside and not any(name.lower().endswith(SUFFIXES) for name in inside):
        raise CannotWrite(
            f"{out} is a directory without a checkpoint, whose content would be lost: {wording.listing(inside, 4)}",
            hint="write to another name",
        )


def _shared(folder: Path, layout: Layout) -> int:
    """The bytes that need no room because files in the folder will share them: tried with one block of each source."""
    found: dict[Path, tuple[int, int]] = {}  # source → a block that can be shared, how many bytes can
    for copy, at in chain.from_iterable(placed(file.pieces) for file in layout.files if not file.link):
        low, high = shareable(copy.start, copy.stop, at)
        if low < high:
            found[copy.path] = low, high - low + found.get(copy.path, (0, 0))[1]
    total = 0
    for path, (start, nbytes) in found.items():
        with contextlib.suppress(OSError), path.open("rb") as source, tempfile.TemporaryFile(dir=folder) as trial:
            total += nbytes if share(source.fileno(), trial.fileno(), start, BLOCK) else 0
    return total


def _allocated(path: Path) -> int:
    """The bytes that a file, or the files in a folder, take on the disk."""
    return sum(each.lstat().st_blocks * 512 for each in (path, *path.rglob("*")))


def _look(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except CannotRead:  # a store that does not answer
        raise
    except OSError as error:
        raise CannotWrite(f"{path}: {reason(error)}") from None
