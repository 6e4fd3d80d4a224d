"""The rows of a delta: what becomes of each leaf, and of each file beside the weights."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from paramend.evidence.pairing import Name
from paramend.leaves.leaves import labels_of, plain
from paramend.leaves.paths import text_of
from paramend.leaves.specs import Spec

# The files beside weights that a delta takes along: configurations and what tokenizers are made of. None holds code.
BESIDE = re.compile(r"[^./\\\0][^/\\\0]*\.(json|model|jinja)|(vocab|merges)\.txt")
# The keys of a leaf, as its containers have them.
Keys = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LeafRow:
    """What becomes of one leaf.

    Attributes:
        path: its keys in the outcome; None if it is deleted.
        was: those in the base; None if it is added.
        spec: its shape and dtype in the outcome; None if it is deleted, or the delta does not say.
        before: those in the base; None if it is added, or the delta does not say.
        base: the checksum of its bytes in the base; "" if it is added, or the delta does not say.
        result: that in the outcome; "" if it is deleted.
        changed: how many elements are new.
        held: the name in the delta of what changes; "" if nothing does.
        nbytes: the bytes of the leaf in the outcome, if something changes.
    """

    path: Keys | None
    was: Keys | None
    spec: Spec | None
    before: Spec | None
    base: str
    result: str
    changed: int = 0
    held: str = ""
    nbytes: int = 0

    @property
    def kind(self) -> str:
        """One of "added", "deleted", "respecified", "changed", "renamed", "kept"."""
        if self.was is None or self.path is None:
            return "added" if self.was is None else "deleted"
        if self.spec != self.before:
            return "respecified"
        return "changed" if self.base != self.result else "renamed" if self.path != self.was else "kept"

    @property
    def whole(self) -> bool:
        """Whether the delta holds all of it."""
        return self.path is not None and (self.was is None or self.spec != self.before)

    def to_dict(self) -> dict[str, Any]:
        """The row as data that JSON can hold: "path" and "before" stand for what they equal in the base."""
        specs = {name: [spec.dtype, *spec.shape] for name in ("before", "spec") if (spec := getattr(self, name))}
        found: dict[str, Any] = {"path": None if self.path is None else list(self.path)}
        found |= {"was": None if self.was is None else list(self.was)} if self.was != self.path else {}
        found |= {name: spec for name, spec in specs.items() if name == "spec" or self.before != self.spec}
        more = {"changed": self.changed, "held": self.held, "nbytes": self.nbytes}
        found |= {"base": self.base} | ({"result": self.result} if self.result != self.base else {})
        return found | (more if self.held else {})


@dataclass(frozen=True, slots=True)
class FileChange:
    """What becomes of a file beside the weights: the SHA-256 in the base and in the outcome, "" where it is not."""

    name: str
    base: str
    result: str
    nbytes: int


def name_of(keys: Keys, separator: str) -> str:
    """A path as plain text."""
    return plain(labels_of(keys), separator)


def by_name(rows: Iterable[LeafRow], side: str) -> dict[Name, LeafRow]:
    """The rows by what their leaves are called on a side: "was" or "path"."""
    seen: Counter[tuple[str, ...]] = Counter()
    found: dict[Name, LeafRow] = {}
    for row in rows:
        keys: Keys | None = getattr(row, side)
        if keys is not None:
            pieces = tuple(map(text_of, labels_of(keys)))
            found[pieces, seen[pieces]] = row
            seen[pieces] += 1
    return found
