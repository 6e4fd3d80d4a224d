"""Formats whose checkpoints are directories, such as Orbax: a copy with other values, or a new one."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from paramend.rewriting.files import File
from paramend.rewriting.sidecars import walked


def tree_within(source: Any) -> Path:
    """The folder that holds the tree, within that of the checkpoint."""
    return Path(source.folder.relative_to(source.path))


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
            continue
        for name, file in walked(home, entry.name, hidden=True):  # some stores have hidden files
            if isinstance(file, File):
                files.append(replace(file, link=link and _OWN.fullmatch(name.rpartition("/")[2]) is None))
            else:
                left_out.append(f"{name} ({file})")
    return files, left_out


# Metadata files, which say what other files count: hard links to them could not be replaced.
_OWN = re.compile(r"_(?!.*\.distcp).*|\..*|manifest\..*|zarr\.json")
