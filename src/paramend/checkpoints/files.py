"""The files of checkpoints, for reports that tell of them."""

from pathlib import Path
from typing import Any

from paramend.checkpoints.checkpoint import Checkpoint
from paramend.disk.urls import path_of


def read_by(tree: Any) -> list[Path]:
    """The path of a checkpoint, unless it is the working directory, and the files that it is read from; none for a tree
    in memory."""
    if not isinstance(tree, Checkpoint):
        return []
    path = path_of(tree.source.path)
    return [*([path] if path.name else ()), *tree.source.stats]
