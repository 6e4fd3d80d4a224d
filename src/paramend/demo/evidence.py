"""Evidence: what changed between two trees, determined from their bytes."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from paramend.arrays.registry import to_numpy
from paramend.edits.selection import at


def moved(before: Any, after: Any) -> list[str]:
    """The paths of the leaves whose bytes differ."""
    new = at(after, "**").get()
    return [path for path, leaf in at(before, "**") if digest(leaf) != digest(new[path])]


def touched(before: Any, after: Any) -> list[str]:
    """The paths of the leaves that are different objects, whatever they hold."""
    new = at(after, "**").get()
    return [path for path, leaf in at(before, "**") if leaf is not new[path]]


def digest(leaf: Any) -> str:
    """The first half of the SHA-256 of an array's bytes.

    >>> digest(np.zeros(2)) == digest(-np.zeros(2))
    False
    """
    return hashlib.sha256(np.ascontiguousarray(to_numpy(leaf)).tobytes()).hexdigest()[:32]


def data_digest(file: Path) -> str:
    """The same digest of the tensors of a safetensors file, without its header."""
    raw = file.read_bytes()
    return hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()[:32]
