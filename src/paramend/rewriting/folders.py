"""Formats whose checkpoints are directories, such as Orbax: a copy with other values, or a new one."""

import os
import re
from pathlib import Path
from typing import Any

from paramend.rewriting.files import Copy, File
from paramend.rewriting.sidecars import is_of_hub_cache


def tree_within(source: Any) -> Path:
    """The folder that holds the tree, within that of the checkpoint."""
    found: Path = source.folder.relative_to(source.path)
    return found


def own_files(source: Any, *, link: bool) -> tuple[list[File], list[str]]:
    """The files of a directory, and what is left out."""
    home, inner = source.path, tree_within(source)
    files: list[File] = []
    left_out: list[str] = []
    for entry in sorted(os.scandir(home), key=lambda entry: entry.name):
        # From the folder of a manager, one step and the metadata common to all steps are copied.
        step = source.steps and entry.is_dir() and entry.name != "metadata" and entry.name != inner.parts[0]
        if step:
            left_out.append(f"{entry.name} (another step)" if entry.name.isdigit() else entry.name)
        else:
            _gather(home, entry.name, files, left_out, link=link)
    return files, left_out


# Metadata files, which say what other files count: hard links to them could not be replaced.
_OWN = re.compile(r"_.*|\..*|manifest\..*|zarr\.json")


def _gather(home: Path, name: str, files: list[File], left_out: list[str], *, link: bool) -> None:
    """Add a file, or those of a directory, including hidden ones, which some stores have."""
    path = home / name
    if path.name == ".undo" or path.name.endswith(".orbax-checkpoint-tmp"):
        return
    if path.is_symlink() and not (path.is_file() and is_of_hub_cache(home, path)):
        left_out.append(f"{name} (a symbolic link)")
    elif path.is_dir():
        for inner in sorted(path.iterdir()):
            _gather(home, f"{name}/{inner.name}", files, left_out, link=link)
    elif path.is_file():
        status = path.stat()
        copy = (Copy(path, 0, status.st_size),) if status.st_size else ()
        linked = link and _OWN.fullmatch(path.name) is None
        files.append(File(name, status.st_size, copy, path, linked))
    else:
        left_out.append(f"{name} (not a regular file)")
